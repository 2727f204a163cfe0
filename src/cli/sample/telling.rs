//! One completion as text: the drawing on the left where there is one, beside it or below what was thought and said.

use crate::cli::render;
use crate::cli::stored::{Completions, ERROR, SOLVED};
use crate::cli::ui::Look;
use crate::tasks::maze::drawing::{Drawing, Ink, Span};
use std::fmt::Write as _;

/// Columns of text beside a drawing, at least.
const BESIDE: usize = 36;

/// The drawing of a row, where its instance is a maze.
pub(super) fn drawing(completions: &Completions, row: usize) -> Option<Drawing> {
    let said = completions.exchanges[row].first().map(|exchange| exchange.text.as_str());
    Drawing::read(&completions.rows()[row].data, said).ok()
}

/// A row as text of so many columns.
pub(super) fn text(completions: &Completions, row: usize, width: usize, color: bool) -> String {
    let mut lines = vec![title(completions, row, color)];
    let Some(drawing) = drawing(completions, row) else {
        lines.extend(told(completions, row, width, color));
        return lines.join("\n");
    };
    let (_, columns) = drawing.cells();
    let is_narrow = 4 * columns + 1 > width;
    let wide = if is_narrow { 2 * columns + 1 } else { 4 * columns + 1 };
    let drawn: Vec<String> = drawing.lines(is_narrow).iter().map(|line| colored(line, color)).collect();
    let is_beside = wide + 3 + BESIDE <= width;
    let beside =
        said(&completions.exchanges[row][0].text, &drawing, if is_beside { width - wide - 3 } else { width }, color);
    if is_beside {
        for place in 0..drawn.len().max(beside.len()) {
            let left = drawn.get(place).cloned().unwrap_or_else(|| " ".repeat(wide));
            let right = beside.get(place).map_or("", String::as_str);
            lines.push(format!("{left}   {right}").trim_end().to_owned());
        }
    } else {
        lines.extend(drawn);
        lines.extend(beside);
    }
    lines.join("\n")
}

/// `rl-0  not solved  steps 2, ...`, and what it earned.
fn title(completions: &Completions, row: usize, color: bool) -> String {
    let sample = &completions.rows()[row];
    let mut parts = vec![Look::Bold.on(&sample.instance, color)];
    if completions.is_training {
        parts.push(Look::Dim.on(&format!("step {}, sample {}", sample.step, sample.sample), color));
    }
    parts.push(match completions.is_solved(row) {
        Some(true) => Look::Green.on("solved", color),
        Some(false) => Look::Red.on("not solved", color),
        None => String::new(),
    });
    let is_told = |name: &&String| *name != SOLVED;
    let measured: Vec<String> = completions
        .samples
        .measures
        .iter()
        .filter(is_told)
        .filter_map(|name| Some((name, *sample.measurements.get(name)?)))
        // What did not go wrong needs no word.
        .filter(|(name, value)| !name.starts_with(ERROR) || *value != 0.0)
        .map(|(name, value)| format!("{name} {}", render::number(value)))
        .collect();
    parts.push(Look::Dim.on(&measured.join(", "), color));
    let mut text = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("  ");
    if let Some(total) = sample.total {
        let value = |value: &Option<f64>| value.map_or_else(|| "none".to_owned(), render::number);
        let rewards = completions.rewards.iter().zip(&sample.rewards);
        let rewards: Vec<String> = rewards.map(|(name, reward)| format!("{name} {}", value(reward))).collect();
        let advantages: Vec<String> = completions.advantages[row].iter().map(|one| render::number(*one)).collect();
        let learnt = if completions.kept[row] { String::new() } else { ", its group was dropped".to_owned() };
        let _ = write!(
            text,
            "\nreward {} ({}), advantage {}{learnt}",
            render::number(total),
            rewards.join(", "),
            advantages.join(" ")
        );
    }
    text
}

/// What was thought and answered in a maze, and what goes wrong in it.
fn said(completion: &str, drawing: &Drawing, width: usize, color: bool) -> Vec<String> {
    let (thought, answer) = completion.split_once("</think>").unwrap_or((completion, ""));
    let thought = thought.strip_prefix("<think>").unwrap_or(thought);
    let mut lines = Vec::new();
    for (head, text) in [("thinks", readable(thought)), ("answers", readable(answer))] {
        let text = if text.is_empty() { "nothing".to_owned() } else { text };
        lines.extend(headed(head, &text, width, color));
    }
    for mistake in drawing.mistakes() {
        let folded = render::folded(&mistake, width.saturating_sub(2));
        lines.extend(folded.into_iter().enumerate().map(|(place, line)| {
            let mark = if place == 0 { "✗ " } else { "  " };
            Look::Red.on(&format!("{mark}{line}"), color)
        }));
    }
    lines
}

/// The turns of an episode.
fn told(completions: &Completions, row: usize, width: usize, color: bool) -> Vec<String> {
    let mut lines = headed("reads", completions.rows()[row].prompt.trim_end(), width, color);
    for exchange in &completions.exchanges[row] {
        if !exchange.observation.is_empty() {
            lines.extend(headed("reads", exchange.observation.trim(), width, color));
        }
        lines.extend(headed("says", exchange.text.trim_end(), width, color));
    }
    lines
}

/// Text behind a word that says whose it is.
fn headed(head: &str, text: &str, width: usize, color: bool) -> Vec<String> {
    const HEAD: usize = 9;
    let folded = text.lines().flat_map(|line| render::folded(line, width.saturating_sub(HEAD).max(10)));
    let line = |(place, line): (usize, String)| {
        let head = if place == 0 { format!("{head:HEAD$}") } else { " ".repeat(HEAD) };
        format!("{}{line}", Look::Dim.on(&head, color)).trim_end().to_owned()
    };
    folded.enumerate().map(line).collect()
}

/// Tokens as words: `<|2-2|><|up|>` as `2-2 up`.
fn readable(text: &str) -> String {
    let spaced = text.replace("<|", " ").replace("|>", " ");
    spaced.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn colored(line: &[Span], color: bool) -> String {
    let span = |span: &Span| match span.ink {
        Ink::Blank => span.text.clone(),
        Ink::Wall | Ink::Thought => Look::Dim.on(&span.text, color),
        Ink::End => Look::Bold.on(&span.text, color),
        Ink::Walk => Look::Green.on(&span.text, color),
        Ink::Mistake => Look::Red.on(&span.text, color),
        Ink::Way => Look::Cyan.on(&span.text, color),
    };
    line.iter().map(span).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_as_words() {
        assert_eq!(readable("<|2-2|><|up|>x<|left_1-1|>"), "2-2 up x left_1-1");
    }
}
