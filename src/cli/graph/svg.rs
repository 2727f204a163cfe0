//! A picture for pages and papers, readable on light and on dark ground.

use std::fmt::Write as _;

use crate::cli::graph::drawing::{Drawing, STATES, Vertex};
use crate::cli::graph::layout::{Item, Layers};
use crate::cli::plan::state_name;

/// Sizes in pixels.
const MARGIN: f64 = 24.0;
const HEIGHT: f64 = 50.0;
const BETWEEN: f64 = 46.0;
const GAP: f64 = 26.0;
const LEAST: f64 = 116.0;
const PADDING: f64 = 14.0;
const BEND: f64 = 10.0;

const STYLE: &str = "
  svg { --ground: #ffffff; --ink: #1c2530; --faint: #5d6b7a; --line: #9aa6b2; --card: #fbfcfd;
        --cached: #2c8a57; --run: #2f6fd0; --resume: #7a4cc2; --maybe: #a8740d; --blocked: #c23b3b; }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #14181d; --ink: #e6ebf0; --faint: #96a3b0; --line: #5c6875; --card: #1c2228;
          --cached: #56bd84; --run: #6ea6f5; --resume: #b08af0; --maybe: #e0ad4a; --blocked: #ee7b7b; } }
  text { font-family: ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; fill: var(--ink); }
  .ground { fill: var(--ground); }
  .card { fill: var(--card); stroke-width: 1.25; }
  .behind { fill: var(--card); stroke-width: 1; opacity: .75; }
  .title { font-size: 13px; font-weight: 600; }
  .times { font-size: 11px; font-weight: 600; fill: var(--faint); }
  .kind, .state { font-size: 11px; fill: var(--faint); }
  .edge { fill: none; stroke: var(--line); stroke-width: 1.4; }
  .head { fill: var(--line); }
  .output { font-size: 10.5px; fill: var(--faint); stroke: var(--ground); stroke-width: 4px; paint-order: stroke; text-anchor: middle; }
  .end { text-anchor: end; }
";

/// The drawing as an SVG document.
pub(super) fn write(drawing: &Drawing) -> String {
    let edges: Vec<(usize, usize)> = drawing.edges.iter().map(|arrow| (arrow.from, arrow.to)).collect();
    let layers = Layers::of(drawing.vertices.len(), &edges);
    let width = |item: usize| match layers.items[item] {
        Item::Vertex(vertex) => card_width(&drawing.vertices[vertex]),
        Item::Bend => BEND,
    };
    let left = layers.places(width, GAP);
    let mut top = vec![0.0; layers.items.len()];
    for (layer, items) in layers.rows.iter().enumerate() {
        for item in items {
            top[*item] = layer as f64 * (HEIGHT + BETWEEN);
        }
    }
    let picture = Picture { drawing, layers: &layers, left, top, width: (0..layers.items.len()).map(width).collect() };
    picture.write()
}

/// Every place, in pixels from the corner of what is drawn.
struct Picture<'a> {
    drawing: &'a Drawing,
    layers: &'a Layers,
    left: Vec<f64>,
    top: Vec<f64>,
    width: Vec<f64>,
}

impl Picture<'_> {
    fn write(&self) -> String {
        let drawn = (0..self.left.len()).map(|item| self.left[item] + self.width[item]).fold(0.0, f64::max);
        let legend = self.legend();
        let width = drawn.max(legend.1) + 2.0 * MARGIN;
        let layers = self.layers.rows.len() as f64;
        let drawn_height = (layers * (HEIGHT + BETWEEN) - BETWEEN).max(0.0);
        let height = drawn_height + 2.0 * MARGIN + 30.0;
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} \
             {height:.0}\" role=\"img\">\n<style>{STYLE}</style>\n<defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" \
             markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\"><path class=\"head\" d=\"M0 .8 7 4 0 7.2z\"/></marker></defs>\n\
             <rect class=\"ground\" width=\"100%\" height=\"100%\" rx=\"6\"/>\n"
        );
        // A narrow graph stands in the middle above a wide legend.
        let aside = MARGIN + (width - 2.0 * MARGIN - drawn) / 2.0;
        let _ = writeln!(text, "<g transform=\"translate({aside:.1} {MARGIN})\">");
        let mut labels = String::new();
        for edge in 0..self.drawing.edges.len() {
            self.edge(edge, &mut text, &mut labels);
        }
        for (vertex, shown) in self.drawing.vertices.iter().enumerate() {
            self.card(vertex, shown, &mut text);
        }
        text.push_str(&labels);
        let _ = writeln!(
            text,
            "</g>\n<g transform=\"translate({MARGIN} {:.1})\">{}</g>\n</svg>",
            drawn_height + MARGIN + 34.0,
            legend.0
        );
        text
    }

    fn middle(&self, item: usize) -> f64 {
        self.left[item] + self.width[item] / 2.0
    }

    /// Where an edge leaves or enters a card: those of one side stand side by side, in the order of their other ends.
    fn port(&self, edge: usize, upper: bool) -> f64 {
        let end = |way: &[usize]| if upper { way[0] } else { way[way.len() - 1] };
        let next = |way: &[usize]| if upper { way[1] } else { way[way.len() - 2] };
        let item = end(&self.layers.ways[edge]);
        let mut sharing: Vec<(f64, usize)> = self
            .layers
            .ways
            .iter()
            .enumerate()
            .filter(|(_, way)| end(way) == item)
            .map(|(other, way)| (self.middle(next(way)), other))
            .collect();
        sharing.sort_by(|a, b| a.0.total_cmp(&b.0));
        let place = sharing.iter().position(|(_, other)| *other == edge).unwrap_or(0) as f64;
        let step = (self.width[item] * 0.6 / sharing.len() as f64).min(18.0);
        self.middle(item) + (place - (sharing.len() as f64 - 1.0) / 2.0) * step
    }

    fn edge(&self, edge: usize, text: &mut String, labels: &mut String) {
        let way = &self.layers.ways[edge];
        let (first, last) = (way[0], way[way.len() - 1]);
        let mut at = (self.port(edge, true), self.top[first] + HEIGHT);
        let mut path = format!("M{:.1} {:.1}", at.0, at.1);
        let mut label_at = None;
        for item in &way[1..] {
            let is_last = *item == last;
            let x = if is_last { self.port(edge, false) } else { self.middle(*item) };
            // The head of an arrow ends at the card, not in it.
            let y = self.top[*item] - if is_last { 2.0 } else { 0.0 };
            let between = f64::midpoint(at.1, y);
            let _ = write!(path, " C{:.1} {between:.1} {x:.1} {between:.1} {x:.1} {y:.1}", at.0);
            label_at.get_or_insert((f64::midpoint(at.0, x), between));
            if !is_last {
                let _ = write!(path, " V{:.1}", y + HEIGHT);
            }
            at = (x, y + if is_last { 0.0 } else { HEIGHT });
        }
        // An edge that closes a circle leads up: its head is at its beginning.
        let turned = first != self.drawing.edges[edge].from;
        let marker = if turned { "marker-start" } else { "marker-end" };
        let _ = writeln!(text, "<path class=\"edge\" {marker}=\"url(#head)\" d=\"{path}\"/>");
        let label = self.drawing.edges[edge].label();
        if let (Some((x, y)), false) = (label_at, label.is_empty()) {
            let _ =
                writeln!(labels, "<text class=\"output\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>", y + 3.5, escaped(&label));
        }
    }

    fn card(&self, vertex: usize, shown: &Vertex, text: &mut String) {
        let (left, top, width) = (self.left[vertex], self.top[vertex], self.width[vertex]);
        let state = state_name(shown.state());
        let dashes = if state == "maybe" { " stroke-dasharray=\"4 3\"" } else { "" };
        let _ = writeln!(text, "<g><title>{}</title>", escaped(&tip(shown)));
        if shown.count > 1 {
            let (x, y) = (left + 4.0, top + 4.0);
            let _ = writeln!(
                text,
                "<rect class=\"behind\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{HEIGHT}\" rx=\"8\" stroke=\"var(--{state})\"/>"
            );
        }
        let _ = writeln!(
            text,
            "<rect class=\"card\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{HEIGHT}\" rx=\"8\" \
             stroke=\"var(--{state})\"{dashes}/>"
        );
        let (begin, end) = (left + PADDING, left + width - PADDING);
        let _ = writeln!(
            text,
            "<text class=\"title\" x=\"{begin:.1}\" y=\"{:.1}\">{}</text>",
            top + 21.0,
            escaped(&shown.title())
        );
        if let Some(times) = shown.times() {
            let times = times.replace('x', "×");
            let _ = writeln!(text, "<text class=\"times end\" x=\"{end:.1}\" y=\"{:.1}\">{times}</text>", top + 21.0);
        }
        let _ = writeln!(
            text,
            "<text class=\"kind\" x=\"{begin:.1}\" y=\"{:.1}\">{}</text>",
            top + 38.0,
            escaped(&shown.kind)
        );
        let _ = writeln!(
            text,
            "<text class=\"state end\" x=\"{end:.1}\" y=\"{:.1}\" style=\"fill: var(--{state})\">{}</text></g>",
            top + 38.0,
            shown.state_text()
        );
    }

    /// The states that there are, in a row, and how wide it is.
    fn legend(&self) -> (String, f64) {
        let mut text = String::new();
        let mut at = 0.0;
        for state in STATES {
            let name = state_name(state);
            let count: usize = self.drawing.vertices.iter().filter_map(|vertex| vertex.states.get(name)).sum();
            if count > 0 {
                let label = format!("{count} {name}");
                let _ = write!(
                    text,
                    "<circle cx=\"{:.1}\" cy=\"-4\" r=\"4\" style=\"fill: var(--{name})\"/><text class=\"kind\" x=\"{:.1}\" y=\"0\">{label}</text>",
                    at + 4.0,
                    at + 13.0
                );
                at += 13.0 + length(&label, 6.8) + 18.0;
            }
        }
        (text, at)
    }
}

fn tip(shown: &Vertex) -> String {
    let trials = if shown.trials > 1 { format!(", in {} trials", shown.trials) } else { String::new() };
    format!("{} ({}): {}{trials}", shown.title(), shown.kind, shown.state_text())
}

/// How wide a card must be for what stands on it, by the widths that letters have on the whole.
fn card_width(shown: &Vertex) -> f64 {
    let above = length(&shown.title(), 8.3) + shown.times().map_or(0.0, |times| 14.0 + length(&times, 7.0));
    let below = length(&shown.kind, 6.8) + 18.0 + length(&shown.state_text(), 6.8);
    (above.max(below) + 2.0 * PADDING).max(LEAST)
}

fn length(text: &str, letter: f64) -> f64 {
    text.chars().count() as f64 * letter
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::graph::drawing::tests::drawing;

    #[test]
    fn every_stage_edge_and_output_is_in_the_picture() {
        let text = write(&drawing(&["a<b", "b", "c"], &[(0, 1, ""), (1, 2, "best"), (0, 2, "")]));
        assert_eq!(text.matches("class=\"card\"").count(), 3);
        assert_eq!(text.matches("marker-end").count(), 3);
        assert!(text.contains(">a&lt;b</text>") && text.contains(">best</text>") && text.contains("3 run"), "{text}");
        assert_eq!(text.matches("<g>").count() + text.matches("<g ").count(), text.matches("</g>").count());
    }

    #[test]
    fn cards_of_a_layer_do_not_touch() {
        let names: Vec<String> = (0..40).map(|number| format!("stage_{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let edges: Vec<(usize, usize, &str)> = (1..40).map(|to| (to / 3, to, "")).collect();
        let drawing = drawing(&names, &edges);
        let pairs: Vec<(usize, usize)> = drawing.edges.iter().map(|arrow| (arrow.from, arrow.to)).collect();
        let layers = Layers::of(40, &pairs);
        let left = layers.places(|_| LEAST, GAP);
        for layer in &layers.rows {
            for pair in layer.windows(2) {
                assert!(left[pair[0]] + LEAST + GAP <= left[pair[1]] + 1e-6, "{pair:?}");
            }
        }
        assert_eq!(layers.crossings(), 0, "a tree has none");
    }
}
