//! For Markdown pages that show Mermaid.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::cli::graph::drawing::{Drawing, STATES};
use crate::cli::plan::state_name;
use crate::pipeline::plan::State;

/// The drawing as a Mermaid flowchart.
pub(super) fn write(drawing: &Drawing) -> String {
    let mut text = String::from("flowchart TD\n");
    let mut used = BTreeSet::new();
    for (number, vertex) in drawing.vertices.iter().enumerate() {
        let times = vertex.times().map(|times| format!(" {times}")).unwrap_or_default();
        let state = state_name(vertex.state());
        used.insert(state);
        let label =
            format!("{}{times}<br/><small>{}, {}</small>", escaped(&vertex.title()), vertex.kind, vertex.state_text());
        let _ = writeln!(text, "  n{number}[\"{label}\"]:::{state}");
    }
    for arrow in &drawing.edges {
        let label = if arrow.outputs.is_empty() { String::new() } else { format!("|\"{}\"|", escaped(&arrow.label())) };
        let _ = writeln!(text, "  n{} -->{label} n{}", arrow.from, arrow.to);
    }
    for state in STATES.into_iter().filter(|state| used.contains(state_name(*state))) {
        let look = match state {
            State::Cached => "fill:#e3f4ea,stroke:#2c8a57,color:#1d2733",
            State::Run => "fill:#e3edfb,stroke:#2f6fd0,color:#1d2733",
            State::Resume => "fill:#efe6fb,stroke:#7a4cc2,color:#1d2733",
            State::Maybe => "fill:#fdf3dc,stroke:#b07a10,color:#1d2733,stroke-dasharray:4 3",
            State::Blocked => "fill:#fbe4e4,stroke:#c23b3b,color:#1d2733",
        };
        let _ = writeln!(text, "  classDef {} {look}", state_name(state));
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('"', "&quot;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::graph::drawing::tests::drawing;

    #[test]
    fn a_flowchart_names_stages_edges_and_looks() {
        let text = write(&drawing(&["a", "b"], &[(0, 1, "best")]));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "  n0[\"a<br/><small>toy, run</small>\"]:::run");
        assert_eq!(lines[3], "  n0 -->|\"best\"| n1");
        assert!(lines[4].starts_with("  classDef run "));
    }
}
