//! For the terminal: a line for every stage, and beside the lines the ways that lead from each to those that need it.
//!
//! A way runs down in a lane of its own until its last consumer; lines join it with `├`, `┴` and the like, and pass it by
//! where they are broken. What a stage takes stands behind it as well, so nothing must be guessed from the lines.

use crate::cli::graph::drawing::{Arrow, Drawing};
use crate::cli::plan::{state_look, state_name};
use crate::cli::ui::Look;
use crate::pipeline::plan::State;

/// The drawing in lines of at most `width` characters.
pub(super) fn write(drawing: &Drawing, color: bool, width: usize) -> String {
    let rows = rows(drawing);
    let lanes = rows.iter().map(|row| row.lanes.chars().count()).max().unwrap_or(0);
    let cells: Vec<Option<[String; 4]>> =
        rows.iter().map(|row| row.vertex.map(|vertex| cells(drawing, vertex))).collect();
    let longest = |cell: usize| cells.iter().flatten().map(|cells| cells[cell].chars().count()).max().unwrap_or(0);
    let widths = [longest(0), longest(1), longest(2)];
    let mut text = String::new();
    for (row, cells) in rows.iter().zip(&cells) {
        let Some((vertex, [title, kind, state, inputs])) = row.vertex.zip(cells.as_ref()) else {
            text.push_str(row.lanes.trim_end());
            text.push('\n');
            continue;
        };
        let look = state_look(drawing.vertices[vertex].state());
        let beside = lanes + widths.iter().sum::<usize>() + 6;
        let inputs = cut(inputs, width.saturating_sub(beside + 1));
        let (bullet, lane) = (mark(drawing.vertices[vertex].state()), format!("{:<lanes$}", row.lanes));
        let line = format!(
            "{}  {}{}  {}  {}  {}",
            lane.replace('*', &look.on(bullet, color)),
            Look::Bold.on(title, color),
            " ".repeat(widths[0] - title.chars().count()),
            format_args!("{kind:<0$}", widths[1]),
            format_args!("{}{}", look.on(state, color), " ".repeat(widths[2] - state.chars().count())),
            Look::Dim.on(&inputs, color && !inputs.is_empty()),
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Title, kind, state and inputs of a stage.
fn cells(drawing: &Drawing, vertex: usize) -> [String; 4] {
    let shown = &drawing.vertices[vertex];
    let title = match shown.times() {
        Some(times) => format!("{} {times}", shown.title()),
        None => shown.title(),
    };
    let input = |arrow: &Arrow| {
        let from = drawing.vertices[arrow.from].title();
        if arrow.outputs.is_empty() { from } else { format!("{from}.{}", arrow.label().replace(", ", "+")) }
    };
    let inputs: Vec<String> = drawing.edges.iter().filter(|arrow| arrow.to == vertex).map(input).collect();
    let inputs = if inputs.is_empty() { String::new() } else { format!("<- {}", inputs.join(", ")) };
    [title, shown.kind.clone(), shown.state_text(), inputs]
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    match width {
        0..8 => String::new(),
        width => text.chars().take(width - 3).chain("...".chars()).collect(),
    }
}

/// States differ in shape too, for those who see no colour.
fn mark(state: State) -> &'static str {
    match state_name(state) {
        "cached" => "●",
        "maybe" => "◌",
        "resume" => "◐",
        "blocked" => "×",
        _ => "○",
    }
}

/// A line: what stands in the lanes (`*` for the stage itself), and the stage if it has one.
struct Row {
    lanes: String,
    vertex: Option<usize>,
}

fn rows(drawing: &Drawing) -> Vec<Row> {
    let count = drawing.vertices.len();
    let order = producers_first(drawing);
    let mut place = vec![0; count];
    for (at, vertex) in order.iter().enumerate() {
        place[*vertex] = at;
    }
    // An edge that would lead up is told by the names alone.
    let edges: Vec<&Arrow> = drawing.edges.iter().filter(|arrow| place[arrow.from] < place[arrow.to]).collect();
    let mut sources: Vec<Vec<usize>> = vec![Vec::new(); count];
    let mut consumers = vec![0; count];
    for arrow in &edges {
        sources[arrow.to].push(arrow.from);
        consumers[arrow.from] += 1;
    }
    let mut lanes: Vec<Option<usize>> = Vec::new();
    let mut rows = Vec::new();
    for vertex in order {
        let joined: Vec<usize> = (0..lanes.len())
            .filter(|lane| lanes[*lane].is_some_and(|source| sources[vertex].contains(&source)))
            .collect();
        let before: Vec<bool> = lanes.iter().map(Option::is_some).collect();
        for source in &sources[vertex] {
            consumers[*source] -= 1;
        }
        for lane in &mut lanes {
            if lane.is_some_and(|source| consumers[source] == 0) {
                *lane = None;
            }
        }
        let ended = joined.iter().copied().find(|lane| lanes[*lane].is_none());
        let right = joined.last().copied().unwrap_or(0);
        let free = (right..lanes.len()).chain(0..right).find(|lane| lanes[*lane].is_none());
        let own = ended.or(free).unwrap_or(lanes.len());
        if own == lanes.len() {
            lanes.push(None);
        }
        if joined.iter().any(|lane| *lane != own) {
            rows.push(Row { lanes: joint(&lanes, &before, &joined, own), vertex: None });
        }
        let glyph = |lane: usize| match &lanes[lane] {
            _ if lane == own => '*',
            Some(_) => '│',
            None => ' ',
        };
        rows.push(Row { lanes: spaced((0..lanes.len()).map(glyph)), vertex: Some(vertex) });
        if consumers[vertex] > 0 {
            lanes[own] = Some(vertex);
        }
        while lanes.last() == Some(&None) {
            lanes.pop();
        }
    }
    rows
}

fn spaced(glyphs: impl Iterator<Item = char>) -> String {
    let mut text = String::new();
    for glyph in glyphs {
        text.extend([glyph, ' ']);
    }
    text.trim_end().to_owned()
}

/// The line that joins lanes to the one below which the next stage stands.
fn joint(lanes: &[Option<usize>], before: &[bool], joined: &[usize], own: usize) -> String {
    let first = joined.iter().copied().chain([own]).min().unwrap_or(own);
    let last = joined.iter().copied().chain([own]).max().unwrap_or(own);
    let mut text = String::new();
    for (lane, source) in lanes.iter().enumerate() {
        let passes = source.is_some();
        let glyph = if joined.contains(&lane) || lane == own {
            let up = before.get(lane).copied().unwrap_or(false);
            let down = passes || lane == own;
            match (up, down, lane > first, lane < last) {
                (true, true, true, true) => '┼',
                (true, true, true, false) => '┤',
                (true, true, false, true) => '├',
                (true, false, true, true) => '┴',
                (true, false, true, false) => '╯',
                (true, false, false, true) => '╰',
                (false, _, true, true) => '┬',
                (false, _, true, false) => '╮',
                (false, _, false, true) => '╭',
                _ => '│',
            }
        } else if passes {
            '│'
        } else if lane > first && lane < last {
            '─'
        } else {
            ' '
        };
        text.push(glyph);
        text.push(if lane >= first && lane < last { '─' } else { ' ' });
    }
    text.trim_end().to_owned()
}

/// Each stage right after the last thing that it needs, as far as that can be.
fn producers_first(drawing: &Drawing) -> Vec<usize> {
    let count = drawing.vertices.len();
    let mut sources: Vec<Vec<usize>> = vec![Vec::new(); count];
    let mut is_end = vec![true; count];
    for arrow in &drawing.edges {
        sources[arrow.to].push(arrow.from);
        is_end[arrow.from] = false;
    }
    let mut seen = vec![false; count];
    let mut order = Vec::with_capacity(count);
    // What lies on a circle that nothing leaves is reached from no end.
    for start in (0..count).filter(|vertex| is_end[*vertex]).chain(0..count) {
        let mut stack = vec![(start, 0)];
        while let Some((vertex, next)) = stack.pop() {
            if next == 0 && std::mem::replace(&mut seen[vertex], true) {
                continue;
            }
            match sources[vertex].get(next) {
                Some(source) => {
                    stack.push((vertex, next + 1));
                    if !seen[*source] {
                        stack.push((*source, 0));
                    }
                }
                None => order.push(vertex),
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::graph::drawing::tests::drawing;

    #[test]
    fn ways_join_where_they_are_needed() {
        let names = ["mazes", "tokenizer", "tokens", "base", "sft", "grpo", "evaluate_sft", "evaluate_grpo"];
        let edges = [
            (0, 2, ""),
            (1, 2, ""),
            (1, 3, ""),
            (3, 4, ""),
            (2, 4, ""),
            (4, 5, "best"),
            (2, 5, ""),
            (4, 6, ""),
            (2, 6, ""),
            (5, 7, ""),
            (2, 7, ""),
        ];
        insta::assert_snapshot!(write(&drawing(&names, &edges), false, 80), @r#"
            ○      tokenizer      toy  run
            ├─╮
            │ ○    base           toy  run  <- tokenizer
            │ │ ○  mazes          toy  run
            ├─│─╯
            ○ │    tokens         toy  run  <- mazes, tokenizer
            ├─┤
            │ ○    sft            toy  run  <- base, tokens
            ├─┼─╮
            │ │ ○  evaluate_sft   toy  run  <- sft, tokens
            ├─┤
            │ ○    grpo           toy  run  <- sft.best, tokens
            ├─╯
            ○      evaluate_grpo  toy  run  <- grpo, tokens
        "#);
    }

    #[test]
    fn a_circle_and_a_long_list_are_drawn() {
        let text = write(&drawing(&["a", "b"], &[(0, 1, ""), (1, 0, "")]), false, 80);
        assert_eq!(text.lines().filter(|line| line.contains('○')).count(), 2, "{text}");
        assert_eq!(cut("<- aaaaaaaaaaaa", 10), "<- aaaa...");
        let names: Vec<String> = (0..40).map(|number| format!("stage_{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let edges: Vec<(usize, usize, &str)> = (0..39).map(|from| (from, 39, "")).collect();
        let text = write(&drawing(&names, &edges), false, 80);
        assert_eq!(text.lines().filter(|line| line.contains("stage_")).count(), 40);
    }
}
