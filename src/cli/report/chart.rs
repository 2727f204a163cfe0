//! A small chart as SVG: a curve an arm, with a band over its seeds.

use std::fmt::Write as _;

use crate::cli::render;
use crate::cli::report::html::escaped;

/// Pixels of the whole, and of the place for curves in it.
const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 210.0;
const LEFT: f64 = 46.0;
const TOP: f64 = 10.0;
const RIGHT: f64 = 8.0;
const BOTTOM: f64 = 24.0;

/// With more curves than these bands would hide each other.
const BANDED: usize = 8;

/// Points of all curves of a chart together; each has no fewer than [`FEWEST`].
const POINTS: usize = 1600;
const FEWEST: usize = 40;

/// The colours that the page's style names.
pub(super) const COLORS: usize = 8;

/// One arm.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Line {
    /// Its name.
    pub(super) label: String,
    /// Its place among the colours.
    pub(super) color: usize,
    /// Step, mean, least and greatest over the seeds.
    pub(super) points: Vec<(f64, f64, f64, f64)>,
}

/// A chart of `lines` over steps, under the name of what they show. Empty without points.
pub(super) fn chart(name: &str, axis: &str, lines: &[Line]) -> String {
    let banded = lines.len() <= BANDED;
    let all = || lines.iter().flat_map(|line| &line.points);
    let heights = || all().flat_map(|(_, mean, low, high)| if banded { [*low, *high] } else { [*mean, *mean] });
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (x0, x1) = bounds(&mut all().map(|point| point.0));
    let (low, high) = bounds(&mut heights());
    if !(x0.is_finite() && low.is_finite()) {
        return String::new();
    }
    let x1 = if x1 > x0 { x1 } else { x0 + 1.0 };
    let is_share = is_share(name) && low >= 0.0 && high <= 1.0;
    let ticks = ticks(low, if high > low { high } else { low + low.abs().max(1.0) * 0.1 });
    let (y0, y1) = (ticks[0].min(low), ticks[ticks.len() - 1].max(high));
    let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
    let x = |value: f64| LEFT + (value - x0) / (x1 - x0) * width;
    let y = |value: f64| TOP + (y1 - value) / (y1 - y0) * height;
    let many = if banded { "" } else { " many" };
    let percent = if is_share { " data-percent=\"\"" } else { "" };
    let mut text = format!(
        "<figure><figcaption>{}</figcaption>\n<svg class=\"chart{many}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         data-area=\"{LEFT} {TOP} {width} {height}\" data-range=\"{x0} {x1} {y0} {y1}\" data-x=\"{axis}\"{percent}>\n<title>{}</title>\n",
        escaped(name),
        escaped(name)
    );
    for tick in &ticks {
        let label = if is_share { format!("{} %", trimmed(100.0 * tick)) } else { trimmed(*tick) };
        let _ = writeln!(
            text,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{2:.1}\" y2=\"{2:.1}\"/><text x=\"{:.0}\" y=\"{3:.1}\" \
             text-anchor=\"end\">{label}</text>",
            WIDTH - RIGHT,
            LEFT - 5.0,
            y(*tick),
            y(*tick) + 3.5
        );
    }
    for (value, anchor) in [(x0, "start"), (f64::midpoint(x0, x1), "middle"), (x1, "end")] {
        let label = if anchor == "middle" { axis.to_owned() } else { trimmed(value) };
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{label}</text>",
            x(value),
            HEIGHT - 6.0
        );
    }
    let budget = (POINTS / lines.len().max(1)).max(FEWEST);
    for line in lines {
        let points = thinned(&line.points, budget);
        if points.is_empty() {
            continue;
        }
        let path = |heights: &mut dyn Iterator<Item = (f64, f64)>| {
            let places: Vec<String> = heights.map(|(at, value)| format!("{:.1} {:.1}", x(at), y(value))).collect();
            places.join("L")
        };
        let color = line.color % COLORS;
        if banded && points.iter().any(|(_, _, low, high)| high > low) {
            let upper = path(&mut points.iter().map(|point| (point.0, point.3)));
            let lower = path(&mut points.iter().rev().map(|point| (point.0, point.2)));
            let _ = writeln!(text, "<path class=\"band\" d=\"M{upper}L{lower}Z\" fill=\"var(--s{color})\"/>");
        }
        let _ = writeln!(
            text,
            "<path class=\"curve\" d=\"M{}\" stroke=\"var(--s{color})\" data-label=\"{}\"/>",
            path(&mut points.iter().map(|point| (point.0, point.1))),
            escaped(&line.label)
        );
    }
    let _ = writeln!(
        text,
        "<line class=\"rule\" x1=\"0\" x2=\"0\" y1=\"{TOP}\" y2=\"{}\"/>\n</svg></figure>",
        TOP + height
    );
    text
}

/// Whether a curve of that name is a share of something.
fn is_share(name: &str) -> bool {
    name.ends_with("/solved") || name.ends_with("_share") || name.ends_with("_accuracy") || name.ends_with("/progress")
}

/// At most `most` points: the first, the last, and every so manieth.
fn thinned<T: Copy>(points: &[T], most: usize) -> Vec<T> {
    if points.len() <= most {
        return points.to_vec();
    }
    let last = points.len() - 1;
    (0..most).map(|place| points[place * last / (most - 1)]).collect()
}

/// Round numbers from at or below `low` to at or above `high`, three to six of them.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let raw = (high - low) / 4.0;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= raw);
    let step = step.unwrap_or(10.0 * power);
    let (first, last) = ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil());
    (0..=(last - first) as usize).map(|place| (first + place as f64) * step).collect()
}

/// A tick without what rounding leaves behind.
fn trimmed(value: f64) -> String {
    render::number(if value.abs() < 1e-12 { 0.0 } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_hold_the_range() {
        assert_eq!(ticks(0.03, 0.97), [0.0, 0.5, 1.0]);
        assert_eq!(ticks(0.0, 1.0).len(), 3);
        let tight = ticks(99.2, 101.1);
        assert!(tight[0] <= 99.2 && *tight.last().unwrap() >= 101.1 && (3..=6).contains(&tight.len()), "{tight:?}");
    }

    #[test]
    fn a_chart_has_a_curve_an_arm_and_bands_where_seeds_differ() {
        let line = |label: &str, spread: f64| Line {
            label: label.to_owned(),
            color: 1,
            points: (0..500).map(|step| (f64::from(step), 0.5, 0.5 - spread, 0.5 + spread)).collect(),
        };
        let text = chart("validation/solved", "step", &[line("a<b", 0.1), line("c", 0.0)]);
        assert_eq!((text.matches("class=\"curve\"").count(), text.matches("class=\"band\"").count()), (2, 1));
        assert!(text.contains("a&lt;b") && text.contains(" %</text>"), "{text}");
        let many: Vec<Line> = (0..64).map(|arm| line(&arm.to_string(), 0.1)).collect();
        let text = chart("loss", "step", &many);
        assert!(!text.contains("band") && text.len() < 64 * 700, "{}", text.len());
        assert_eq!(chart("loss", "step", &[]), "");
    }

    #[test]
    fn thinned_points_keep_both_ends() {
        let points: Vec<usize> = (0..1000).collect();
        let kept = thinned(&points, 40);
        assert_eq!((kept.len(), kept[0], kept[39]), (40, 0, 999));
    }
}
