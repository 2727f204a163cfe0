//! The values of one step as counts in buckets.

/// Buckets of values that are not few integers.
const BUCKETS: usize = 30;

/// Counts in buckets that lie side by side.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// The least value.
    pub min: f64,
    /// The greatest value.
    pub max: f64,
    /// The sum.
    pub sum: f64,
    /// The sum of the squares.
    pub squares: f64,
    /// The upper end of each bucket, growing.
    pub limits: Vec<f64>,
    /// How many values lie in each: above the limit before and up to its own.
    pub counts: Vec<f64>,
}

impl Histogram {
    /// Counts `values`; what is not finite is left out, and of nothing there is no histogram.
    ///
    /// Integers within a small range have a bucket each. Others lie in buckets of one width between the least and the greatest.
    pub fn of(values: &[f64]) -> Option<Self> {
        let finite = || values.iter().copied().filter(|value| value.is_finite());
        let (min, max) = (finite().reduce(f64::min)?, finite().reduce(f64::max)?);
        let whole = max - min <= 2.0 * BUCKETS as f64 && finite().all(|value| value.fract() == 0.0);
        let (first, width, buckets) = if whole {
            (min - 0.5, 1.0, (max - min) as usize + 1)
        } else if min < max {
            (min, (max - min) / BUCKETS as f64, BUCKETS)
        } else {
            let width = min.abs().max(1.0) * 1e-6;
            (min - width / 2.0, width, 1)
        };
        let mut counts = vec![0.0; buckets];
        for value in finite() {
            counts[(((value - first) / width) as usize).min(buckets - 1)] += 1.0;
        }
        let limits = (1..=buckets).map(|bucket| first + width * bucket as f64).collect();
        let (sum, squares) = (finite().sum(), finite().map(|value| value * value).sum());
        Some(Self { min, max, sum, squares, limits, counts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_have_a_bucket_each() {
        let found = Histogram::of(&[3.0, 5.0, 3.0, f64::NAN]).unwrap();
        assert_eq!((found.limits, found.counts), (vec![3.5, 4.5, 5.5], vec![2.0, 0.0, 1.0]));
        assert_eq!((found.min, found.max, found.sum, found.squares), (3.0, 5.0, 11.0, 43.0));
    }

    #[test]
    fn every_value_lies_in_a_bucket() {
        let values: Vec<f64> = (0..1000).map(|place| (f64::from(place) / 1000.0).powi(2)).collect();
        let found = Histogram::of(&values).unwrap();
        assert_eq!((found.counts.len(), found.counts.iter().sum::<f64>()), (30, 1000.0));
        assert!(found.limits.is_sorted() && (found.limits[29] - found.max).abs() < 1e-12);
        let alike = Histogram::of(&[0.25; 4]).unwrap();
        assert_eq!(alike.counts, [4.0]);
        assert!(alike.limits[0] > 0.25);
        assert_eq!(Histogram::of(&[]), None);
        assert_eq!(Histogram::of(&[f64::INFINITY]), None);
    }
}
