//! A maze drawn with what a completion does in it: as lines of text, and as shapes for pictures.
//!
//! It judges nothing: how the walk ended is the verdict's to say. What it shows is read as the verdict reads it, so a move
//! against a wall is seen where the verdict counts it. [`picture`] holds shapes and SVG, [`pixels`] PNG.

pub mod drawn;
pub mod picture;
pub mod pixels;

use anyhow::Context as _;
use serde::Deserialize as _;
use serde_json::Value;

use crate::tasks::maze::answer::{Answer, Form, Pieces, read_answer};
use crate::tasks::maze::format::END_THINK;
use crate::tasks::maze::grid::{Direction, Maze};

/// A maze and what a completion does in it.
#[derive(Clone, Debug)]
pub struct Drawing {
    maze: Maze,
    thought: Vec<Thought>,
    steps: Vec<Step>,
    well_formed: bool,
    is_answered: bool,
}

/// A step of the reasoning: the cell that it names next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Thought {
    from: usize,
    to: usize,
    /// Whether a move leads there.
    is_move: bool,
}

/// A move of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    direction: Direction,
    from: usize,
    to: usize,
    outcome: Outcome,
}

/// What a move of the answer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It leads to the next cell.
    Moved,
    /// A wall stands there, and the walker stays.
    Wall,
    /// The target was reached before.
    Past,
}

/// What a piece of a drawn line is, for colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ink {
    /// Nothing is there.
    Blank,
    /// A wall.
    Wall,
    /// Where the walk begins, and where it must end.
    End,
    /// The walk of the answer.
    Walk,
    /// A move against a wall or past the target, or a walk that ends elsewhere.
    Mistake,
    /// What only the reasoning has visited.
    Thought,
    /// The shortest way, where the walk misses it.
    Way,
}

/// A piece of a drawn line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// What it is.
    pub ink: Ink,
    /// How it is written.
    pub text: String,
}

impl Drawing {
    /// The maze of a stored instance with a completion, or alone; an error where the instance is no maze.
    pub fn read(instance: &Value, completion: Option<&str>) -> anyhow::Result<Self> {
        let maze = Maze::deserialize(instance).context("the instance is no maze")?;
        maze.check(maze.rows, maze.columns).context("the maze does not hold together")?;
        Ok(Self::new(maze, completion))
    }

    /// A maze that holds together, with a completion, or alone.
    pub fn new(maze: Maze, completion: Option<&str>) -> Self {
        let answer = completion.map(read_in_any_form);
        let mut cell = maze.origin;
        let mut arrived = false;
        let steps = answer.iter().flat_map(|answer| &answer.moves).map(|&direction| {
            let from = cell;
            arrived |= from == maze.target;
            let next = maze.step(from, direction);
            cell = next.unwrap_or(from);
            let outcome = match next {
                None => Outcome::Wall,
                Some(_) if arrived => Outcome::Past,
                Some(_) => Outcome::Moved,
            };
            Step { direction, from, to: cell, outcome }
        });
        let steps = steps.collect();
        let thought = completion.map(|text| thoughts(&maze, text)).unwrap_or_default();
        let well_formed = answer.as_ref().is_some_and(|answer| answer.well_formed);
        Self { thought, steps, well_formed, is_answered: answer.is_some(), maze }
    }

    /// Rows and columns of cells.
    pub fn cells(&self) -> (usize, usize) {
        (self.maze.rows, self.maze.columns)
    }

    /// Where the walk ends.
    fn end(&self) -> usize {
        self.steps.last().map_or(self.maze.origin, |step| step.to)
    }

    /// Whether the walk reaches the target at all.
    fn arrives(&self) -> bool {
        self.steps.iter().any(|step| step.to == self.maze.target)
    }

    /// What goes wrong, a sentence each, in the order in which it does; empty for a right answer.
    pub fn mistakes(&self) -> Vec<String> {
        if !self.is_answered {
            return Vec::new();
        }
        let place = |cell: usize| format!("{}-{}", cell / self.maze.columns, cell % self.maze.columns);
        let mut told = Vec::new();
        if let Some(at) = self.thought.iter().position(|thought| !thought.is_move) {
            let others = self.thought.iter().filter(|thought| !thought.is_move).count() - 1;
            let plural = if others == 1 { "" } else { "s" };
            let more = if others > 0 { format!(" (and {others} more such step{plural})") } else { String::new() };
            let Thought { from, to, .. } = self.thought[at];
            told.push(format!(
                "step {} of the reasoning goes from {} to {}, where no way leads{more}",
                at + 1,
                place(from),
                place(to)
            ));
        }
        if !self.well_formed {
            told.push("the completion has not the form of an answer".to_owned());
        }
        for (number, step) in self.steps.iter().enumerate() {
            let (number, name, from) = (number + 1, step.direction.name(), place(step.from));
            match step.outcome {
                Outcome::Moved => {}
                Outcome::Wall => told.push(format!("move {number}, {name} from {from}, runs into a wall")),
                Outcome::Past => {
                    told.push(format!("move {number}, {name} from {from}, comes after the target was reached"));
                    break;
                }
            }
        }
        if self.end() != self.maze.target && !self.steps.is_empty() {
            let left = self.maze.distances()[self.end()].unwrap_or_default();
            let plural = if left == 1 { "" } else { "s" };
            told.push(format!("it ends on {}, {left} move{plural} from the target", place(self.end())));
        }
        told
    }

    /// The drawing in `2 * rows + 1` lines of `4 * columns + 1` characters, or of `2 * columns + 1` where it is `narrow`.
    ///
    /// `O` is the origin, `T` the target, `•` a cell of the walk (a digit: how often it was entered), arrows its moves, `✗` a
    /// move against a wall, `◆` where it ends if not on the target, `·` what only the reasoning has visited, `◦` the shortest
    /// way where the walk never arrives.
    pub fn lines(&self, narrow: bool) -> Vec<Vec<Span>> {
        let mut canvas = Canvas::new(self.maze.rows, self.maze.columns, if narrow { 1 } else { 3 });
        canvas.walls(&self.maze);
        for thought in self.thought.iter().filter(|thought| thought.is_move) {
            canvas.cross(&self.maze, thought.from, thought.to, '·', Ink::Thought);
            canvas.cell(thought.to, '·', Ink::Thought);
        }
        if self.is_answered && !self.arrives() {
            let mut cell = self.maze.origin;
            for direction in self.maze.path() {
                cell = self.maze.step(cell, direction).unwrap_or(cell);
                canvas.cell(cell, '◦', Ink::Way);
            }
        }
        self.draw_walk(&mut canvas);
        canvas.cell(self.maze.origin, 'O', Ink::End);
        canvas.cell(self.maze.target, 'T', Ink::End);
        canvas.lines()
    }

    fn draw_walk(&self, canvas: &mut Canvas) {
        let mut entered = vec![0_u32; self.maze.walls.len()];
        let goes = |from: usize, to: usize| {
            let mut moves = self.steps.iter().filter(|step| step.outcome != Outcome::Wall);
            moves.any(|step| (step.from, step.to) == (from, to))
        };
        for step in &self.steps {
            let ink = if step.outcome == Outcome::Moved { Ink::Walk } else { Ink::Mistake };
            if step.outcome == Outcome::Wall {
                canvas.side(step.from, step.direction, '✗', ink);
                continue;
            }
            let arrow = match (step.direction, goes(step.to, step.from)) {
                (Direction::Up | Direction::Down, true) => '↕',
                (Direction::Left | Direction::Right, true) => '↔',
                (Direction::Up, false) => '↑',
                (Direction::Down, false) => '↓',
                (Direction::Left, false) => '←',
                (Direction::Right, false) => '→',
            };
            canvas.side(step.from, step.direction, arrow, ink);
            entered[step.to] += 1;
            let mark = match entered[step.to] {
                1 => '•',
                times => char::from_digit(times, 10).unwrap_or('*'),
            };
            canvas.cell(step.to, mark, ink);
        }
        if !self.steps.is_empty() && self.end() != self.maze.target {
            canvas.cell(self.end(), '◆', Ink::Mistake);
        }
    }
}

/// The cells that the reasoning names, one after the other, as steps: those of `cell move cell` and of fused steps alike.
fn thoughts(maze: &Maze, completion: &str) -> Vec<Thought> {
    let inner = |piece: &str| -> Option<usize> {
        let named = piece.strip_prefix("<|")?.strip_suffix("|>")?;
        let coordinate = named.rsplit('_').next()?;
        let (row, column) = coordinate.split_once('-')?;
        let (row, column) = (row.parse::<usize>().ok()?, column.parse::<usize>().ok()?);
        (row < maze.rows && column < maze.columns).then_some(row * maze.columns + column)
    };
    let cells: Vec<usize> = Pieces(completion).take_while(|piece| *piece != END_THINK).filter_map(inner).collect();
    let step = |pair: &[usize]| {
        let (from, to) = (pair[0], pair[1]);
        let is_move = Direction::ALL.into_iter().any(|direction| maze.step(from, direction) == Some(to));
        Thought { from, to, is_move }
    };
    cells.windows(2).map(step).collect()
}

/// Characters with their ink, over the lattice of walls and cells.
struct Canvas {
    columns: usize,
    /// Characters within a cell.
    inside: usize,
    marks: Vec<Vec<(char, Ink)>>,
}

impl Canvas {
    fn new(rows: usize, columns: usize, inside: usize) -> Self {
        let line = vec![(' ', Ink::Blank); (inside + 1) * columns + 1];
        Self { columns, inside, marks: vec![line; 2 * rows + 1] }
    }

    /// The line and the character of a cell's middle.
    fn middle(&self, cell: usize) -> (usize, usize) {
        let (row, column) = (cell / self.columns, cell % self.columns);
        (2 * row + 1, (self.inside + 1) * column + 1 + self.inside / 2)
    }

    fn cell(&mut self, cell: usize, mark: char, ink: Ink) {
        let (line, at) = self.middle(cell);
        self.marks[line][at] = (mark, ink);
    }

    /// Marks what lies between a cell and the next on a side.
    fn side(&mut self, cell: usize, side: Direction, mark: char, ink: Ink) {
        let (line, at) = self.middle(cell);
        let half = self.inside / 2 + 1;
        let (line, at) = match side {
            Direction::Up => (line - 1, at),
            Direction::Down => (line + 1, at),
            Direction::Left => (line, at - half),
            Direction::Right => (line, at + half),
        };
        self.marks[line][at] = (mark, ink);
    }

    fn cross(&mut self, maze: &Maze, from: usize, to: usize, mark: char, ink: Ink) {
        if let Some(side) = Direction::ALL.into_iter().find(|&side| maze.neighbour(from, side) == Some(to)) {
            self.side(from, side, mark, ink);
        }
    }

    fn walls(&mut self, maze: &Maze) {
        let pitch = self.inside + 1;
        // Whether a wall leads from a corner of the lattice along each side.
        let stands = |row: usize, column: usize, side: Direction| {
            let mask = |row: usize, column: usize, of: Direction| {
                row < maze.rows && column < maze.columns && maze.walls[row * maze.columns + column] & of.bit() != 0
            };
            match side {
                Direction::Up => {
                    row > 0
                        && (mask(row - 1, column, Direction::Left)
                            || (column > 0 && mask(row - 1, column - 1, Direction::Right)))
                }
                Direction::Down => {
                    mask(row, column, Direction::Left) || (column > 0 && mask(row, column - 1, Direction::Right))
                }
                Direction::Left => {
                    column > 0
                        && (mask(row, column - 1, Direction::Up)
                            || (row > 0 && mask(row - 1, column - 1, Direction::Down)))
                }
                Direction::Right => {
                    mask(row, column, Direction::Up) || (row > 0 && mask(row - 1, column, Direction::Down))
                }
            }
        };
        for row in 0..=maze.rows {
            for column in 0..=maze.columns {
                let joined = Direction::ALL.map(|side| stands(row, column, side));
                let (line, at) = (2 * row, pitch * column);
                self.marks[line][at] = (corner(joined), Ink::Wall);
                if joined[3] && column < maze.columns {
                    self.marks[line][at + 1..at + pitch].fill(('─', Ink::Wall));
                }
                if joined[1] && row < maze.rows {
                    self.marks[line + 1][at] = ('│', Ink::Wall);
                }
            }
        }
    }

    fn lines(self) -> Vec<Vec<Span>> {
        let line = |marks: Vec<(char, Ink)>| {
            let mut spans: Vec<Span> = Vec::new();
            for (mark, ink) in marks {
                match spans.last_mut() {
                    Some(span) if span.ink == ink => span.text.push(mark),
                    _ => spans.push(Span { ink, text: mark.to_string() }),
                }
            }
            spans
        };
        self.marks.into_iter().map(line).collect()
    }
}

/// The character where walls meet, by whether one leads up, down, left and right.
fn corner(walls: [bool; 4]) -> char {
    const CORNERS: [char; 16] = [' ', '╵', '╷', '│', '╴', '┘', '┐', '┤', '╶', '└', '┌', '├', '─', '┴', '┬', '┼'];
    let mask = Direction::ALL.iter().zip(walls).filter(|(_, wall)| *wall).map(|(side, _)| usize::from(side.bit()));
    CORNERS[mask.sum::<usize>()]
}

/// The answer of a completion of which nothing says in what form it is written: the first form that it has.
fn read_in_any_form(completion: &str) -> Answer {
    let read = |form| read_answer(form, completion);
    let loose = || [Form::Lines, Form::Words].into_iter().map(read).find(|answer| answer.well_formed);
    let strict = read(Form::Strict);
    if strict.well_formed { strict } else { loose().unwrap_or(strict) }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::tasks::maze::MazeSpec;
    use crate::tasks::maze::verdict::{MEASURES, measure};
    use crate::tasks::{Finish, FormatSpec, TaskSpec, open};

    /// `O | T` above three cells in a row, with the way below and a dead end above its middle.
    pub(super) fn fixed() -> Maze {
        Maze { rows: 2, columns: 3, walls: vec![13, 13, 13, 6, 2, 10], origin: 0, target: 2, length: 4 }
    }

    /// A completion by letters, thinking first in coordinates.
    fn completion(thought: &str, letters: &str) -> String {
        let thought = thought.split_whitespace().flat_map(|cell| ["<|", cell, "|>"]).collect::<String>();
        let moves = letters.chars().map(|letter| match letter {
            'u' => "<|up|>",
            'd' => "<|down|>",
            'l' => "<|left|>",
            _ => "<|right|>",
        });
        format!("<think>{thought}</think>{}", moves.collect::<String>())
    }

    fn plain(drawing: &Drawing, narrow: bool) -> String {
        let line = |line: Vec<Span>| line.into_iter().map(|span| span.text).collect::<String>() + "\n";
        drawing.lines(narrow).into_iter().map(line).collect()
    }

    #[test]
    fn a_maze_alone_and_walks_of_every_kind() {
        let mut text = plain(&Drawing::new(fixed(), None), false);
        for (thought, letters) in
            [("0-0 1-0 1-1 0-1 1-1 1-2 0-2", "drru"), ("", "drudru"), ("0-0 0-1 1-2", "dr"), ("", "rddrruld"), ("", "")]
        {
            let drawing = Drawing::new(fixed(), Some(&completion(thought, letters)));
            writeln!(text, "\n{letters}\n{}{:#?}", plain(&drawing, false), drawing.mistakes()).unwrap();
            text += &plain(&drawing, true);
        }
        insta::assert_snapshot!(text);
    }

    #[test]
    fn a_drawn_maze_shows_each_wall_once_and_the_search_of_a_demonstration() {
        for kind in ["compact", "fused"] {
            let format = serde_json::json!({"kind": kind, "trace": "search", "order": "random"});
            let format: FormatSpec = serde_json::from_value(format).unwrap();
            let task = open(&TaskSpec::Maze(MazeSpec::new(5, 5)), &format).unwrap();
            let instance = task.generate(3, 0..1).unwrap().remove(0);
            let reply = task.demonstrate(&instance, 0).unwrap().remove(0);
            let drawing = Drawing::read(&instance, Some(&reply)).unwrap();
            assert_eq!(drawing.mistakes(), [""; 0]);
            let text = plain(&drawing, false);
            assert_eq!(text.lines().count(), 11);
            assert!(text.lines().all(|line| line.chars().count() == 21), "{text}");
            if kind == "compact" {
                insta::assert_snapshot!(text);
            }
        }
        assert!(Drawing::read(&serde_json::json!({"rows": 2}), None).is_err());
    }

    #[test]
    fn what_is_drawn_as_a_mistake_is_what_the_verdict_counts() {
        let count = |name: &str, verdict: &crate::tasks::Measurements| verdict[name] as usize;
        assert!(MEASURES.iter().any(|measure| measure.name == "wall_hits"));
        for letters in ["drru", "rdrru", "drruu", "dlldrru", "drrud", "dru", ""] {
            let text = completion("", letters);
            let verdict = measure(&fixed(), &read_answer(Form::Strict, &text), Finish::Stop);
            let drawing = Drawing::new(fixed(), Some(&text));
            let walls = drawing.steps.iter().filter(|step| step.outcome == Outcome::Wall).count();
            assert_eq!(walls, count("wall_hits", &verdict), "{letters}");
            assert_eq!(drawing.mistakes().is_empty(), count("solved", &verdict) == 1, "{letters}");
        }
    }
}
