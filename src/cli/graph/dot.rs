//! For Graphviz.

use std::fmt::Write as _;

use crate::cli::graph::drawing::Drawing;
use crate::pipeline::plan::State;

/// The drawing in the DOT language.
pub(super) fn write(drawing: &Drawing) -> String {
    let mut text = String::from(
        "digraph pipe {\n  rankdir = TB;\n  node [shape = box, style = \"rounded,filled\", fontname = \"sans-serif\", fontsize = 11];\n  \
         edge [fontname = \"sans-serif\", fontsize = 9, color = \"#7d8590\"];\n",
    );
    for (number, vertex) in drawing.vertices.iter().enumerate() {
        let times = vertex.times().map(|times| format!(" {times}")).unwrap_or_default();
        let label = format!("{}{times}\n{}\n{}", vertex.title(), vertex.kind, vertex.state_text());
        let _ = writeln!(text, "  n{number} [label = {}, {}];", quoted(&label), look(vertex.state()));
    }
    for arrow in &drawing.edges {
        let label =
            if arrow.outputs.is_empty() { String::new() } else { format!(" [label = {}]", quoted(&arrow.label())) };
        let _ = writeln!(text, "  n{} -> n{}{label};", arrow.from, arrow.to);
    }
    text.push_str("}\n");
    text
}

fn look(state: State) -> &'static str {
    match state {
        State::Cached => "fillcolor = \"#e3f4ea\", color = \"#2c8a57\"",
        State::Run => "fillcolor = \"#e3edfb\", color = \"#2f6fd0\"",
        State::Resume => "fillcolor = \"#efe6fb\", color = \"#7a4cc2\"",
        State::Maybe => "fillcolor = \"#fdf3dc\", color = \"#b07a10\", style = \"rounded,filled,dashed\"",
        State::Blocked => "fillcolor = \"#fbe4e4\", color = \"#c23b3b\"",
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::graph::drawing::tests::drawing;

    #[test]
    fn names_are_quoted_and_outputs_label_edges() {
        let text = write(&drawing(&["a\"b", "c"], &[(0, 1, "best,last")]));
        assert!(
            text.contains("n0 [label = \"a\\\"b\\ntoy\\nrun\", ")
                && text.contains("n0 -> n1 [label = \"best, last\"];"),
            "{text}"
        );
    }

    #[test]
    fn a_hundred_thousand_stages_are_written_at_once() {
        let names: Vec<String> = (0..100_000).map(|number| format!("s{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let edges: Vec<(usize, usize, &str)> = (1..names.len()).map(|to| (to - 1, to, "")).collect();
        assert_eq!(write(&drawing(&names, &edges)).lines().count(), 5 + 100_000 + 99_999);
    }
}
