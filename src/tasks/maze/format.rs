//! How a maze is written for a model, and how its answer is read.
//!
//! Texts are tokens without separators (`<|up|><|up|>`), so that text and token ids determine each other. A completion
//! is `<think>`, a trace, `</think>`, and the answer: move tokens and nothing else. The trace is the model's own and may
//! say anything but `<think>`, `</think>` and the special tokens. A prompt shows walls and endpoints, never the way.

use std::fmt::Write as _;

use rand_chacha::ChaCha8Rng;

use crate::random;
use crate::tasks::maze::grid::{CLOSED, Direction, Maze};
use crate::tasks::{FormatSpec, SearchOrder, SearchTrace, Trace};

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

/// How cells and the steps of a trace are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Alphamaze,
    Compact,
    Fused,
}

/// What stands in a demonstration between `<think>` and `</think>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thought {
    Search,
    Path,
    Direct,
}

/// A way of writing mazes.
#[derive(Clone, Debug)]
pub(super) struct Format {
    style: Style,
    thought: Thought,
    order: SearchOrder,
    rows: usize,
    columns: usize,
}

/// What an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The completion has the format's form, from `<think>` to the last move.
    pub well_formed: bool,
    /// The moves of the answer up to the first thing that is no move.
    pub moves: Vec<Direction>,
}

impl Format {
    /// The format `spec` for mazes of `rows` x `columns`; an error where it is none for mazes.
    pub(super) fn new(spec: &FormatSpec, rows: usize, columns: usize) -> anyhow::Result<Self> {
        let thought = |trace: SearchTrace| match trace {
            SearchTrace::Search => Thought::Search,
            SearchTrace::Path => Thought::Path,
            SearchTrace::Direct => Thought::Direct,
        };
        let (style, thought, order) = match *spec {
            FormatSpec::Alphamaze { trace: Trace::Path } => (Style::Alphamaze, Thought::Path, SearchOrder::Random),
            FormatSpec::Alphamaze { trace: Trace::Direct } => (Style::Alphamaze, Thought::Direct, SearchOrder::Random),
            FormatSpec::Compact { trace, order } => (Style::Compact, thought(trace), order),
            FormatSpec::Fused { trace, order } => (Style::Fused, thought(trace), order),
            FormatSpec::Json { .. } | FormatSpec::Plain {} => {
                anyhow::bail!("the format is none for a maze: `alphamaze`, `compact` and `fused` are")
            }
        };
        Ok(Self { style, thought, order, rows, columns })
    }

    /// Every token, in the order of ids: specials, thinking, then what cells and moves are written with.
    pub(super) fn vocabulary(&self) -> Vec<String> {
        let mut tokens: Vec<String> = [PAD, BEGIN, END, THINK, END_THINK].map(str::to_owned).into();
        let cells = 0..self.rows * self.columns;
        let coordinates = cells.clone().map(|cell| self.coordinate(cell));
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
                tokens
                    .extend(cells.clone().flat_map(|cell| Direction::ALL.map(|direction| self.step(direction, cell))));
                tokens.extend(cells.flat_map(|cell| (0..=CLOSED).map(move |mask| self.place(cell, mask))));
            }
        }
        tokens
    }

    /// The maze as the model reads it.
    pub(super) fn prompt(&self, maze: &Maze) -> String {
        let mut text = String::new();
        for (cell, &mask) in maze.walls.iter().enumerate() {
            let marker = if cell == maze.origin {
                "origin"
            } else if cell == maze.target {
                "target"
            } else {
                "blank"
            };
            match self.style {
                Style::Alphamaze => {
                    let _ = write!(text, "{}{}<|{marker}|>", self.coordinate(cell), wall_token(mask));
                }
                Style::Compact => text += &marked_token(mask, marker),
                Style::Fused => text += &self.place(cell, mask),
            }
        }
        if self.style == Style::Fused {
            text += &self.coordinate(maze.origin);
            text += &self.coordinate(maze.target);
        }
        text
    }

    /// A completion that solves the maze.
    pub(super) fn demonstrate(&self, maze: &Maze, random: &mut ChaCha8Rng) -> String {
        let path = maze.path();
        let mut text = THINK.to_owned();
        match self.thought {
            Thought::Search => self.write_walk(&mut text, maze, &search(maze, self.order, random)),
            Thought::Path => self.write_walk(&mut text, maze, &path),
            Thought::Direct => {}
        }
        text += END_THINK;
        for direction in path {
            text += &move_token(direction);
        }
        text
    }

    fn write_walk(&self, text: &mut String, maze: &Maze, walk: &[Direction]) {
        let mut cell = maze.origin;
        *text += &self.coordinate(cell);
        for &direction in walk {
            cell = maze.step(cell, direction).expect("a walk of a demonstration goes through no wall");
            if self.style == Style::Fused {
                *text += &self.step(direction, cell);
            } else {
                *text += &move_token(direction);
                *text += &self.coordinate(cell);
            }
        }
    }

    /// A cell of a fused prompt.
    fn place(&self, cell: usize, mask: u8) -> String {
        format!("<|{}-{}_{}|>", cell / self.columns, cell % self.columns, wall_name(mask))
    }

    /// A step of a fused trace: the move and the cell it leads to.
    fn step(&self, direction: Direction, cell: usize) -> String {
        format!("<|{}_{}-{}|>", direction.name(), cell / self.columns, cell % self.columns)
    }

    fn coordinate(&self, cell: usize) -> String {
        format!("<|{}-{}|>", cell / self.columns, cell % self.columns)
    }
}

/// Reads the answer of a completion. The same for every format: only the prompt and the trace differ between them.
pub(super) fn read_answer(completion: &str) -> Answer {
    let mut well_formed = true;
    let mut pieces = Pieces(completion);
    well_formed &= pieces.next() == Some(THINK);
    let mut closed = false;
    for piece in pieces.by_ref() {
        if piece == END_THINK {
            closed = true;
            break;
        }
        well_formed &= ![THINK, PAD, BEGIN, END].contains(&piece);
    }
    let mut moves = Vec::new();
    let mut clean = true;
    for piece in pieces {
        match Direction::ALL.into_iter().find(|&direction| is_move(piece, direction)) {
            Some(direction) if clean => moves.push(direction),
            _ => clean = false,
        }
    }
    Answer { well_formed: well_formed && closed && clean && !moves.is_empty(), moves }
}

/// Cuts a text into tokens (`<think>`, `</think>`, `<|...|>`) and whatever stands between them.
pub(super) struct Pieces<'a>(pub(super) &'a str);

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        if self.0.is_empty() {
            return None;
        }
        let length = token_length(self.0).unwrap_or_else(|| {
            let starts = self.0.char_indices().skip(1).filter(|(_, character)| *character == '<');
            let mut tokens = starts.filter(|(at, _)| token_length(&self.0[*at..]).is_some());
            tokens.next().map_or(self.0.len(), |(at, _)| at)
        });
        let (piece, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(piece)
    }
}

/// The bytes of the token that `text` begins with.
fn token_length(text: &str) -> Option<usize> {
    if let Some(token) = [THINK, END_THINK].into_iter().find(|token| text.starts_with(token)) {
        return Some(token.len());
    }
    let inner = text.strip_prefix("<|")?;
    let end = inner.find(['<', '>'])?;
    (inner[end..].starts_with('>') && inner[..end].ends_with('|')).then_some(2 + end + 1)
}

fn is_move(piece: &str, direction: Direction) -> bool {
    piece.strip_prefix("<|").and_then(|piece| piece.strip_suffix("|>")) == Some(direction.name())
}

fn move_token(direction: Direction) -> String {
    format!("<|{}|>", direction.name())
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

fn wall_token(mask: u8) -> String {
    format!("<|{}|>", wall_name(mask))
}

fn marked_token(mask: u8, marker: &str) -> String {
    if marker == "blank" { wall_token(mask) } else { format!("<|{}_{marker}|>", wall_name(mask)) }
}

/// A depth-first search for the target: at every cell the ways on are tried in an order of their own, drawn at random
/// within what `order` says; a dead end is left cell by cell the way it was entered. Ends where the target is entered.
fn search(maze: &Maze, order: SearchOrder, random: &mut ChaCha8Rng) -> Vec<Direction> {
    let away = |cell: usize| {
        let (row, column) = (cell / maze.columns, cell % maze.columns);
        row.abs_diff(maze.target / maze.columns) + column.abs_diff(maze.target % maze.columns)
    };
    let ways = |seen: &mut Vec<bool>, cell: usize, random: &mut ChaCha8Rng| {
        seen[cell] = true;
        let open = |&direction: &Direction| maze.step(cell, direction).is_some_and(|next| !seen[next]);
        let mut ways: Vec<Direction> = Direction::ALL.into_iter().filter(open).collect();
        random::shuffle(random, &mut ways);
        if order == SearchOrder::Toward {
            // The last one is tried first.
            ways.sort_by_key(|&direction| maze.step(cell, direction).is_some_and(|next| away(next) < away(cell)));
        }
        ways
    };
    let mut seen = vec![false; maze.walls.len()];
    let mut walk = Vec::new();
    let mut stack = vec![(maze.origin, None, ways(&mut seen, maze.origin, random))];
    while let Some((cell, entered, untried)) = stack.last_mut() {
        if *cell == maze.target {
            break;
        }
        if let Some(direction) = untried.pop() {
            let next = maze.step(*cell, direction).expect("only open ways are tried");
            // In a maze with loops another branch may have been there meanwhile.
            if !seen[next] {
                walk.push(direction);
                let ways = ways(&mut seen, next, random);
                stack.push((next, Some(direction), ways));
            }
        } else {
            let back = entered.map(Direction::opposite);
            walk.extend(back);
            stack.pop();
        }
    }
    walk
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formats() -> Vec<FormatSpec> {
        let traces = [SearchTrace::Search, SearchTrace::Path, SearchTrace::Direct];
        let compact = traces.map(|trace| FormatSpec::Compact { trace, order: SearchOrder::Random });
        let fused = traces.map(|trace| FormatSpec::Fused { trace, order: SearchOrder::Toward });
        let alphamaze = [Trace::Path, Trace::Direct].map(|trace| FormatSpec::Alphamaze { trace });
        compact.into_iter().chain(alphamaze).chain(fused).collect()
    }

    fn maze(index: u64) -> Maze {
        Maze::draw(4, 5, &mut random::rng("test", &[index]))
    }

    #[test]
    fn every_text_is_made_of_the_vocabulary_and_solves_its_maze() {
        for spec in formats() {
            let format = Format::new(&spec, 4, 5).unwrap();
            let vocabulary: std::collections::BTreeSet<String> = format.vocabulary().into_iter().collect();
            assert_eq!(vocabulary.len(), format.vocabulary().len(), "no token stands twice");
            for index in 0..50 {
                let maze = maze(index);
                let completion = format.demonstrate(&maze, &mut random::rng("trace", &[index]));
                for piece in Pieces(&(format.prompt(&maze) + &completion)) {
                    assert!(vocabulary.contains(piece), "{piece}");
                }
                let answer = read_answer(&completion);
                assert!(answer.well_formed);
                assert_eq!(answer.moves, maze.path());
            }
        }
    }

    #[test]
    fn a_prompt_depends_on_walls_and_endpoints_alone() {
        for spec in formats() {
            let format = Format::new(&spec, 4, 5).unwrap();
            let maze = maze(1);
            assert_eq!(format.prompt(&maze), format.prompt(&Maze { length: 0, ..maze.clone() }));
            let other = Maze { origin: maze.target, target: maze.origin, ..maze.clone() };
            assert_ne!(format.prompt(&maze), format.prompt(&other));
            let tokens = match format.style {
                Style::Alphamaze => 60,
                Style::Compact => 20,
                Style::Fused => 22,
            };
            assert_eq!(Pieces(&format.prompt(&maze)).count(), tokens);
        }
    }

    #[test]
    fn a_search_walks_every_step_ends_on_the_target_and_varies_with_the_seed() {
        let mut walks = std::collections::BTreeSet::new();
        let maze = (0..100).map(maze).find(|maze| maze.length > 8).unwrap();
        for seed in 0..50 {
            let order = if seed % 2 == 0 { SearchOrder::Random } else { SearchOrder::Toward };
            let walk = search(&maze, order, &mut random::rng("trace", &[seed]));
            let mut cell = maze.origin;
            for (at, &direction) in walk.iter().enumerate() {
                assert!(cell != maze.target, "the search goes on at {at}");
                cell = maze.step(cell, direction).unwrap();
            }
            assert_eq!(cell, maze.target);
            assert!(walk.len() <= 2 * (maze.walls.len() - 1), "every edge is walked at most twice");
            walks.insert(walk.iter().map(|direction| direction.name()).collect::<Vec<_>>());
        }
        assert!(walks.len() > 1, "several seeds give several searches");
    }

    #[test]
    fn a_search_toward_the_target_is_shorter_on_average() {
        let steps = |order| -> usize {
            (0..200).map(|index| search(&maze(index), order, &mut random::rng("trace", &[index])).len()).sum()
        };
        let (random, toward) = (steps(SearchOrder::Random), steps(SearchOrder::Toward));
        assert!(toward * 100 < random * 95, "{toward} and {random}");
    }

    #[test]
    fn vocabularies_are_those_of_the_paper_and_of_its_fused_form() {
        let paper = Format::new(&FormatSpec::default(), 5, 5).unwrap().vocabulary();
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
        let (trace, order) = (SearchTrace::Search, SearchOrder::Random);
        assert_eq!(
            Format::new(&FormatSpec::Compact { trace, order }, 5, 5).unwrap().vocabulary().len(),
            5 + 4 + 25 + 48
        );
        assert_eq!(
            Format::new(&FormatSpec::Fused { trace, order }, 5, 5).unwrap().vocabulary().len(),
            5 + 4 + 25 + 100 + 400
        );
    }

    #[test]
    fn pieces_join_to_the_text_they_were_cut_from() {
        for text in ["", "x", "<", "<|", "<|a", "<|a|", "<|a|>", "a<|b|>c<think></think>é<|<|d|>>", "<|a>|>", "<think"]
        {
            assert_eq!(Pieces(text).collect::<String>(), text);
        }
        assert_eq!(
            Pieces("a<|b|>ü<think><|c<|d|>").collect::<Vec<_>>(),
            ["a", "<|b|>", "ü", "<think>", "<|c", "<|d|>"]
        );
    }
}
