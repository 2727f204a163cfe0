//! How a maze is written for a model.
//!
//! Texts of the bare formats are tokens without separators (`<|up|><|up|>`), so that text and token ids determine each
//! other. A completion is `<think>`, a trace, `</think>`, and the answer: move tokens and nothing else. The trace is the
//! model's own and may say anything but `<think>`, `</think>` and the special tokens. A prompt shows walls and endpoints,
//! never the way. Texts with a legend or with reprinted mazes have lines; `lines.rs` writes what they say in words.

use std::ops::Range;

use anyhow::{bail, ensure};
use rand::Rng as _;
use rand_chacha::ChaCha8Rng;

use crate::random;
use crate::tasks::maze::answer::Form;
use crate::tasks::maze::attempt::{Attempt, attempts, search};
use crate::tasks::maze::grid::{CLOSED, Direction, Maze};
use crate::tasks::maze::lines::text_cell;
use crate::tasks::{Demonstrated, FormatSpec, MazePrompt, Retry, SearchOrder, SearchTrace, Signs, Trace};

/// Padding; never part of a text.
pub const PAD: &str = "<|pad|>";
/// Begins a row.
pub const BEGIN: &str = "<|bos|>";
/// Ends a row.
pub const END: &str = "<|eos|>";
/// Begins the trace.
pub const THINK: &str = "<think>";
/// Ends the trace.
pub const END_THINK: &str = "</think>";
/// Gives an attempt up: the trace begins anew at the origin.
pub(super) const RESET: &str = "<|reset|>";
/// The same as a line of its own, in texts that have lines.
pub(super) const RESET_LINE: &str = "RESET";
/// Ends a row of cells, where the cells themselves do not tell.
const ROW: &str = "<|row|>";

/// How cells and the steps of a trace are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Alphamaze,
    Compact,
    Fused,
}

/// What stands in a demonstration between `<think>` and `</think>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thought {
    Search,
    Path,
    Direct,
    Reprint,
}

/// Wrong attempts in demonstrations.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Retries {
    from: Retry,
    share: f64,
}

/// A way of writing mazes.
#[derive(Clone, Debug)]
pub(super) struct Format {
    pub(super) style: Style,
    pub(super) thought: Thought,
    pub(super) prompt: MazePrompt,
    pub(super) signs: Signs,
    order: SearchOrder,
    retries: Option<Retries>,
    /// Rows and columns of the largest maze.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Mazes of several sizes are written.
    mixed: bool,
}

impl Format {
    /// The format `spec` for mazes of up to `rows` x `columns`, of several sizes if `mixed`; an error where it is none for
    /// mazes.
    pub(super) fn new(spec: &FormatSpec, rows: usize, columns: usize, mixed: bool) -> anyhow::Result<Self> {
        let found = |trace: SearchTrace| match trace {
            SearchTrace::Search => Thought::Search,
            SearchTrace::Path => Thought::Path,
            SearchTrace::Direct => Thought::Direct,
        };
        let bare = (MazePrompt::Maze, Signs::Tokens);
        let (style, thought, order, (prompt, signs), retry, share) = match *spec {
            FormatSpec::Alphamaze { trace, prompt, signs, retry, retry_share } => {
                let thought = match trace {
                    Trace::Path => Thought::Path,
                    Trace::Direct => Thought::Direct,
                    Trace::Reprint => Thought::Reprint,
                };
                (Style::Alphamaze, thought, SearchOrder::Random, (prompt, signs), retry, retry_share)
            }
            FormatSpec::Compact { trace, order, retry, retry_share } => {
                (Style::Compact, found(trace), order, bare, retry, retry_share)
            }
            FormatSpec::Fused { trace, order, retry, retry_share } => {
                (Style::Fused, found(trace), order, bare, retry, retry_share)
            }
            FormatSpec::Json { .. } | FormatSpec::Plain {} => {
                bail!("the format is none for a maze: `alphamaze`, `compact` and `fused` are")
            }
        };
        if let Some(share) = share {
            ensure!((0.0..=1.0).contains(&share), "`retry_share` is {share}, not a share from 0 to 1");
            let has_path = share == 0.0 || matches!(thought, Thought::Path | Thought::Reprint);
            ensure!(
                has_path,
                "a wrong attempt stands before the right path: `retry_share` needs a trace that shows it"
            );
        } else {
            ensure!(retry == Retry::default(), "`retry` says where attempts go wrong: give their `retry_share`, too");
        }
        let retries = share.map(|share| Retries { from: retry, share });
        Ok(Self { style, thought, prompt, signs, order, retries, rows, columns, mixed })
    }

    /// Whether texts have lines: rows of cells, and words around them.
    pub(super) fn has_lines(&self) -> bool {
        self.thought == Thought::Reprint || self.prompt == MazePrompt::Legend || self.signs == Signs::Text
    }

    /// Whether demonstrations may begin with a wrong attempt.
    pub(super) fn has_retries(&self) -> bool {
        self.retries.is_some()
    }

    /// How completions are written.
    pub(super) fn form(&self) -> Form {
        match self.signs {
            Signs::Text => Form::Words,
            Signs::Tokens if self.has_lines() => Form::Lines,
            Signs::Tokens => Form::Strict,
        }
    }

    /// Every token, in the order of ids: specials, thinking, then what cells and moves are written with.
    pub(super) fn vocabulary(&self) -> Vec<String> {
        let mut tokens: Vec<String> = [PAD, BEGIN, END].map(str::to_owned).into();
        if self.signs == Signs::Text {
            tokens.extend([THINK, END_THINK].map(str::to_owned));
        }
        tokens.extend(self.added_tokens());
        if self.has_lines() {
            for piece in self.words() {
                if !tokens.contains(&piece) {
                    tokens.push(piece);
                }
            }
        }
        tokens
    }

    /// The tokens that are not plain text: thinking, then what cells and moves are written with.
    pub(super) fn added_tokens(&self) -> Vec<String> {
        if self.signs == Signs::Text {
            return Vec::new();
        }
        let mut tokens: Vec<String> = [THINK, END_THINK].map(str::to_owned).into();
        let cells = 0..self.rows * self.columns;
        let columns = self.columns;
        let coordinates = cells.clone().map(|cell| coordinate(cell, columns));
        let moves = Direction::ALL.map(move_token);
        match self.style {
            Style::Alphamaze => {
                tokens.extend(coordinates);
                tokens.extend(moves);
                tokens.extend(["<|blank|>", "<|origin|>", "<|target|>"].map(str::to_owned));
                tokens.extend((0..=CLOSED).map(wall_token));
            }
            Style::Compact => {
                tokens.extend(moves);
                tokens.extend(coordinates);
                tokens.extend((0..=CLOSED).flat_map(|mask| MARKERS.map(|marker| marked_token(mask, marker))));
            }
            Style::Fused => {
                tokens.extend(moves);
                tokens.extend(coordinates);
                let steps = |cell| Direction::ALL.map(|direction| step_token(direction, cell, columns));
                tokens.extend(cells.clone().flat_map(steps));
                tokens.extend(cells.flat_map(|cell| (0..=CLOSED).map(move |mask| place_token(cell, mask, columns))));
            }
        }
        // What later formats have stands last, so that the ids of the others are the same with and without it.
        if self.has_row_ends() {
            tokens.push(ROW.to_owned());
        }
        if self.retries.is_some() && !self.has_lines() {
            tokens.push(RESET.to_owned());
        }
        tokens
    }

    /// Whether only the end of a row tells to which place a cell belongs.
    fn has_row_ends(&self) -> bool {
        self.mixed && self.style == Style::Compact
    }

    /// The maze as the model reads it.
    pub(super) fn prompt(&self, maze: &Maze) -> String {
        if self.has_lines() {
            return self.lines_prompt(maze);
        }
        let mut text = String::new();
        for (cell, &mask) in maze.walls.iter().enumerate() {
            let marker = marker(maze, cell);
            match self.style {
                Style::Alphamaze => text += &self.cell(maze, cell, marker),
                Style::Compact => text += &marked_token(mask, marker),
                Style::Fused => text += &place_token(cell, mask, maze.columns),
            }
            if self.has_row_ends() && (cell + 1) % maze.columns == 0 {
                text += ROW;
            }
        }
        if self.style == Style::Fused {
            text += &coordinate(maze.origin, maze.columns);
            text += &coordinate(maze.target, maze.columns);
        }
        text
    }

    /// A completion that solves the maze, and its mistakes.
    pub(super) fn demonstrate(&self, maze: &Maze, random: &mut ChaCha8Rng) -> Demonstrated {
        let path = maze.path();
        let wrong = self.attempts(maze, &path, random);
        if self.has_lines() {
            return self.lines_reply(maze, &path, &wrong);
        }
        let mut text = THINK.to_owned();
        let mut mistakes = Vec::new();
        for attempt in &wrong {
            mistakes.push(self.write_walk(&mut text, maze, &attempt.steps, attempt.right));
            text += RESET;
        }
        match self.thought {
            Thought::Search => {
                self.write_walk(&mut text, maze, &search(maze, self.order, random), 0);
            }
            Thought::Path | Thought::Reprint => {
                self.write_walk(&mut text, maze, &path, 0);
            }
            Thought::Direct => {}
        }
        text += END_THINK;
        for direction in path {
            text += &move_token(direction);
        }
        Demonstrated { text, mistakes }
    }

    /// The wrong attempts with which a demonstration begins.
    fn attempts(&self, maze: &Maze, path: &[Direction], random: &mut ChaCha8Rng) -> Vec<Attempt> {
        let Some(Retries { from, share }) = self.retries else { return Vec::new() };
        if random::unit(random.next_u64()) >= share {
            return Vec::new();
        }
        attempts(maze, path, from, random)
    }

    /// Writes a walk; gives the bytes of its steps from the one number `right` on.
    fn write_walk(&self, text: &mut String, maze: &Maze, walk: &[Direction], right: usize) -> Range<usize> {
        let mut cell = maze.origin;
        *text += &coordinate(cell, maze.columns);
        let mut begin = text.len();
        for (place, &direction) in walk.iter().enumerate() {
            if place == right {
                begin = text.len();
            }
            cell = maze.step(cell, direction).expect("a walk of a demonstration goes through no wall");
            if self.style == Style::Fused {
                *text += &step_token(direction, cell, maze.columns);
            } else {
                *text += &move_token(direction);
                *text += &coordinate(cell, maze.columns);
            }
        }
        begin..text.len()
    }

    /// A cell of AlphaMaze: place, walls and what is in it.
    pub(super) fn cell(&self, maze: &Maze, cell: usize, marker: &str) -> String {
        let mask = maze.walls[cell];
        match self.signs {
            Signs::Tokens => format!("{}{}<|{marker}|>", coordinate(cell, maze.columns), wall_token(mask)),
            Signs::Text => text_cell(maze, cell, marker),
        }
    }
}

/// What a prompt shows in a cell.
pub(super) fn marker(maze: &Maze, cell: usize) -> &'static str {
    match cell {
        _ if cell == maze.origin => "origin",
        _ if cell == maze.target => "target",
        _ => "blank",
    }
}

/// A cell of a fused prompt.
fn place_token(cell: usize, mask: u8, columns: usize) -> String {
    format!("<|{}-{}_{}|>", cell / columns, cell % columns, wall_name(mask))
}

/// A step of a fused trace: the move and the cell it leads to.
fn step_token(direction: Direction, cell: usize, columns: usize) -> String {
    format!("<|{}_{}-{}|>", direction.name(), cell / columns, cell % columns)
}

/// The token of a place.
pub(super) fn coordinate(cell: usize, columns: usize) -> String {
    format!("<|{}-{}|>", cell / columns, cell % columns)
}

/// The token of a move.
pub(super) fn move_token(direction: Direction) -> String {
    format!("<|{}|>", direction.name())
}

/// The token of a mask.
pub(super) fn wall_token(mask: u8) -> String {
    format!("<|{}|>", wall_name(mask))
}

const MARKERS: [&str; 3] = ["blank", "origin", "target"];

/// The sides of a mask as AlphaMaze names them, always in the order up, down, left, right.
fn wall_name(mask: u8) -> String {
    match mask {
        0 => "no_wall".to_owned(),
        CLOSED => "all_wall".to_owned(),
        _ => {
            let sides = Direction::ALL.into_iter().filter(|direction| mask & direction.bit() != 0);
            sides.map(|direction| format!("{}_", direction.name())).chain(["wall".to_owned()]).collect()
        }
    }
}

fn marked_token(mask: u8, marker: &str) -> String {
    if marker == "blank" { wall_token(mask) } else { format!("<|{}_{marker}|>", wall_name(mask)) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;
    use crate::tasks::maze::answer::{Pieces, read_answer};
    use crate::tasks::maze::layout::Layouts;
    use crate::tasks::maze::lines::cut;
    use crate::tasks::maze::spec::MazeSpec;
    use crate::tasks::maze::tests::{format, specs};

    fn maze(index: u64) -> Maze {
        Layouts::new(&MazeSpec::default()).draw(4, 5, &mut random::rng("test", &[index]))
    }

    fn opened(spec: &FormatSpec, rows: usize, columns: usize) -> Format {
        Format::new(spec, rows, columns, false).unwrap()
    }

    #[test]
    fn every_text_is_made_of_the_vocabulary_and_solves_its_maze() {
        for spec in specs() {
            let format = opened(&spec, 4, 5);
            let vocabulary: BTreeSet<String> = format.vocabulary().into_iter().collect();
            assert_eq!(vocabulary.len(), format.vocabulary().len(), "no token stands twice");
            for index in 0..50 {
                let maze = maze(index);
                let completion = format.demonstrate(&maze, &mut random::rng("trace", &[index])).text;
                let text = format.prompt(&maze) + &completion;
                let pieces = if format.has_lines() { cut(&text) } else { Pieces(&text).collect() };
                for piece in pieces {
                    assert!(vocabulary.contains(piece), "`{piece}` in {spec:?}");
                }
                let answer = read_answer(format.form(), &completion);
                assert!(answer.well_formed, "{completion}");
                assert_eq!(answer.moves, maze.path());
            }
        }
    }

    #[test]
    fn a_prompt_depends_on_walls_and_endpoints_alone() {
        for spec in specs() {
            let format = opened(&spec, 4, 5);
            let maze = maze(1);
            assert_eq!(format.prompt(&maze), format.prompt(&Maze { length: 0, ..maze.clone() }));
            let other = Maze { origin: maze.target, target: maze.origin, ..maze.clone() };
            assert_ne!(format.prompt(&maze), format.prompt(&other));
            if !format.has_lines() {
                let tokens = match format.style {
                    Style::Alphamaze => 60,
                    Style::Compact => 20,
                    Style::Fused => 22,
                };
                assert_eq!(Pieces(&format.prompt(&maze)).count(), tokens);
            }
        }
    }

    #[test]
    fn the_vocabulary_of_a_larger_maze_has_every_text_of_a_smaller_one() {
        for spec in specs() {
            let format = Format::new(&spec, 6, 7, true).unwrap();
            let vocabulary: BTreeSet<String> = format.vocabulary().into_iter().collect();
            let maze = maze(3);
            let prompt = format.prompt(&maze);
            let text = prompt.clone() + &format.demonstrate(&maze, &mut random::rng("trace", &[1])).text;
            let pieces = if format.has_lines() { cut(&text) } else { Pieces(&text).collect() };
            assert!(pieces.into_iter().all(|piece| vocabulary.contains(piece)), "{text}");
            // The same cells in rows of another length are another prompt.
            let mut turned = Maze { rows: 5, columns: 4, ..maze.clone() };
            (turned.origin, turned.target) = (maze.origin, maze.target);
            assert_ne!(format.prompt(&turned), prompt, "{spec:?}");
        }
    }

    #[test]
    fn vocabularies_are_those_of_the_paper_and_of_its_fused_form() {
        let paper = opened(&FormatSpec::default(), 5, 5).vocabulary();
        assert_eq!(paper.len(), 5 + 48);
        assert_eq!(&paper[..5], [PAD, BEGIN, END, THINK, END_THINK]);
        assert_eq!(
            &paper[30..37],
            ["<|up|>", "<|down|>", "<|left|>", "<|right|>", "<|blank|>", "<|origin|>", "<|target|>"]
        );
        for wall in ["<|no_wall|>", "<|up_down_wall|>", "<|up_left_right_wall|>", "<|all_wall|>", "<|down_left_wall|>"]
        {
            assert!(paper.iter().any(|token| token == wall), "{wall}");
        }
        let tokens = |value| opened(&format(value), 5, 5).vocabulary().len();
        assert_eq!(tokens(json!({"kind": "compact"})), 5 + 4 + 25 + 48);
        assert_eq!(tokens(json!({"kind": "fused"})), 5 + 4 + 25 + 100 + 400);
        let reprint = opened(&format(json!({"kind": "alphamaze", "trace": "reprint", "prompt": "legend"})), 5, 5);
        assert_eq!(
            reprint.added_tokens(),
            paper[3..],
            "the paper's strings and the ends of thinking are all that is added"
        );
        assert_eq!(&reprint.vocabulary()[..53], paper);
        let text = opened(&format(json!({"kind": "alphamaze", "signs": "text"})), 5, 5);
        assert!(text.added_tokens().is_empty());
    }

    #[test]
    fn parameters_that_cannot_be_are_refused() {
        let says = |value: serde_json::Value| {
            let spec = serde_json::from_value(value).unwrap();
            Format::new(&spec, 4, 4, false).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(says(json!({"kind": "compact", "trace": "search", "retry_share": 0.5})).contains("needs a trace"));
        assert_eq!(says(json!({"kind": "compact", "trace": "search", "retry_share": 0.0})), "");
        assert!(says(json!({"kind": "compact", "trace": "path", "retry_share": 1.5})).contains("not a share"));
        assert!(says(json!({"kind": "alphamaze", "retry": "junction"})).contains("give their `retry_share`"));
    }
}
