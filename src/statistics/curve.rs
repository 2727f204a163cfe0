//! Curves over a quantity that grows: what a run had at equal effort, how soon it got somewhere, how high it lay.

/// Points in the order in which they were measured. What is not finite was left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    points: Vec<(f64, f64)>,
}

/// Which side of a threshold a curve has to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `>=`
    AtLeast,
    /// `<=`
    AtMost,
}

impl Side {
    /// Whether `value` lies on this side of `threshold`.
    pub fn holds(self, value: f64, threshold: f64) -> bool {
        match self {
            Self::AtLeast => value >= threshold,
            Self::AtMost => value <= threshold,
        }
    }
}

impl Curve {
    /// A curve through `points` of (place, height), in their order.
    pub fn new(points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        Self { points: points.into_iter().filter(|(x, y)| x.is_finite() && y.is_finite()).collect() }
    }

    /// Its points.
    pub fn points(&self) -> &[(f64, f64)] {
        &self.points
    }

    /// The height of the last point at or before `x`; `None` before the first. Nothing is invented between two points.
    pub fn at(&self, x: f64) -> Option<f64> {
        self.points.iter().take_while(|(place, _)| *place <= x).last().map(|(_, height)| *height)
    }

    /// The place of the first point on the wanted side of `threshold`; `None` where no point is.
    pub fn reach(&self, threshold: f64, side: Side) -> Option<f64> {
        self.points.iter().find(|(_, height)| side.holds(*height, threshold)).map(|(place, _)| *place)
    }

    /// The mean height between `from` and `to`: the area under straight lines between the points, divided by the length.
    /// `None` where the curve does not span it.
    pub fn mean_height(&self, from: f64, to: f64) -> Option<f64> {
        let (first, last) = (self.points.first()?, self.points.last()?);
        if from >= to || first.0 > from || last.0 < to {
            return None;
        }
        let area: f64 = self
            .points
            .windows(2)
            .map(|pair| {
                let ((x0, y0), (x1, y1)) = (pair[0], pair[1]);
                let (left, right) = (x0.max(from), x1.min(to));
                if left >= right {
                    return 0.0;
                }
                let height = |x: f64| y0 + (y1 - y0) * (x - x0) / (x1 - x0);
                f64::midpoint(height(left), height(right)) * (right - left)
            })
            .sum();
        Some(area / (to - from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rising() -> Curve {
        Curve::new([(1.0, 0.0), (2.0, f64::NAN), (3.0, 0.4), (5.0, 0.6)])
    }

    #[test]
    fn a_height_is_the_last_that_was_measured() {
        assert_eq!(
            [0.5, 1.0, 2.9, 3.0, 9.0].map(|x| rising().at(x)),
            [None, Some(0.0), Some(0.0), Some(0.4), Some(0.6)]
        );
    }

    #[test]
    fn a_threshold_is_reached_at_a_measured_point_or_never() {
        assert_eq!(rising().reach(0.4, Side::AtLeast), Some(3.0));
        assert_eq!(rising().reach(0.7, Side::AtLeast), None);
        assert_eq!(Curve::new([(1.0, 2.0), (4.0, 0.5)]).reach(1.0, Side::AtMost), Some(4.0));
    }

    #[test]
    fn the_mean_height_is_the_area_over_the_length() {
        // numpy.trapezoid([0, .4, .6], [1, 3, 5]) / 4
        assert!((rising().mean_height(1.0, 5.0).unwrap() - 0.35).abs() < 1e-12);
        // Between 2 and 4 the line goes from 0.2 over 0.4 to 0.5.
        assert!((rising().mean_height(2.0, 4.0).unwrap() - 0.375).abs() < 1e-12);
        assert_eq!(rising().mean_height(0.0, 5.0), None, "the curve begins later");
        assert_eq!(rising().mean_height(1.0, 6.0), None, "the curve ends before");
        assert_eq!(rising().mean_height(3.0, 3.0), None);
    }
}
