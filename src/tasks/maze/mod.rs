//! The maze task: walk from the origin to the target, in one turn, checked by walking.
//!
//! A completion is judged by simulation alone; no gold string exists. What it says while it thinks is its own affair,
//! what it answers is read strictly: anything but move tokens after `</think>` spoils the answer, and so does walking on
//! after the target was reached.

pub mod drawing;
mod format;
mod grid;

use std::ops::Range;

use anyhow::{Context as _, ensure};
use serde_json::Value;

pub use format::{BEGIN, END, END_THINK, PAD, THINK};
pub use grid::{Direction, Maze};

use crate::random;
use crate::tasks::maze::format::{Format, read_answer};
use crate::tasks::maze::grid::{Symmetry, canonical, symmetries};
use crate::tasks::{
    Algorithm, Episode, Episodes, Finish, FormatSpec, Measure, Measurements, Start, Task, Turn, stratum,
};

/// The version of instances and verdicts.
pub const VERSION: u32 = 1;
/// The version of the texts of the format `alphamaze`.
pub const ALPHAMAZE_VERSION: u32 = 1;
/// The version of the texts of the format `compact`.
pub const COMPACT_VERSION: u32 = 1;

/// The version of the texts of the format `fused`.
pub const FUSED_VERSION: u32 = 1;

/// What a verdict measures.
pub static MEASURES: &[Measure] = &[
    Measure::new(
        "solved",
        "1 where a well-formed, finished answer walks through no wall, reaches the target with its last move \
                  and not before; else 0",
    ),
    Measure::new("valid_moves", "moves of the answer before the first that runs into a wall"),
    Measure::new("steps", "moves of the answer up to the first thing that is no move"),
    Measure::new("shortest", "moves of the shortest path"),
    Measure::new("wall_hits", "moves of the answer that run into a wall, the walker staying where it is"),
    Measure::new("progress", "the share of the distance to the target that the valid moves have covered, from 0 to 1"),
    Measure::new(
        "format",
        "1 where the completion is `<think>`, a trace, `</think>` and at least one move and nothing but \
                  moves; else 0",
    ),
    Measure::new("finished", "1 where the model ended its completion, 0 where the token limit did"),
];

/// The strata of instances by the length of the shortest path, each with the least length in it.
pub static STRATA: &[(u64, &str)] = &[(0, "short"), (5, "medium"), (9, "long"), (14, "very_long")];

/// Mazes of one size in one format.
pub struct MazeTask {
    rows: usize,
    columns: usize,
    format: Format,
    symmetries: Vec<Symmetry>,
}

impl MazeTask {
    /// Mazes of `rows` x `columns` cells, 2 to 32 each.
    pub fn new(rows: u64, columns: u64, algorithm: Algorithm, format: &FormatSpec) -> anyhow::Result<Self> {
        for (name, cells) in [("rows", rows), ("columns", columns)] {
            ensure!((2..=32).contains(&cells), "a maze has 2 to 32 `{name}`, not {cells}");
        }
        let (rows, columns) = (rows as usize, columns as usize);
        let Algorithm::Dfs = algorithm;
        Ok(Self { rows, columns, format: Format::new(format, rows, columns)?, symmetries: symmetries(rows, columns) })
    }

    fn read(&self, instance: &Value) -> anyhow::Result<Maze> {
        use serde::Deserialize as _;
        let maze = Maze::deserialize(instance).context("the instance is no maze")?;
        maze.check(self.rows, self.columns).context("the maze does not hold together")?;
        Ok(maze)
    }
}

impl Task for MazeTask {
    fn generate(&self, seed: u64, indices: Range<u64>) -> anyhow::Result<Vec<Value>> {
        let draw = |index| {
            let mut random = random::rng("task.maze", &[seed, self.rows as u64, self.columns as u64, index]);
            serde_json::to_value(Maze::draw(self.rows, self.columns, &mut random)).expect("a maze is plain data")
        };
        Ok(indices.map(draw).collect())
    }

    fn canonical(&self, instance: &Value) -> anyhow::Result<Vec<u8>> {
        let maze = self.read(instance)?;
        let mut bytes = vec![self.rows as u8, self.columns as u8];
        bytes.extend(canonical(&maze.walls, &self.symmetries));
        Ok(bytes)
    }

    fn begin(&self, starts: &[Start<'_>]) -> anyhow::Result<Box<dyn Episodes>> {
        let episodes = starts.iter().map(|start| {
            let maze = self.read(start.instance)?;
            let prompt = self.format.prompt(&maze);
            Ok(MazeEpisode { maze, prompt, turn: None })
        });
        Ok(Box::new(episodes.collect::<anyhow::Result<Vec<_>>>()?))
    }

    fn demonstrate(&self, instance: &Value, seed: u64) -> anyhow::Result<Vec<String>> {
        Ok(vec![self.format.demonstrate(&self.read(instance)?, &mut random::rng("task.maze.demonstrate", &[seed]))])
    }

    fn vocabulary(&self) -> Vec<String> {
        self.format.vocabulary()
    }

    fn pieces(&self) -> String {
        r"<\|[^<>]*\|>|</?think>".to_owned()
    }

    fn measures(&self) -> &[Measure] {
        MEASURES
    }

    fn max_turns(&self) -> usize {
        1
    }

    fn stratum(&self, instance: &Value) -> Option<String> {
        stratum(STRATA, instance.get("length")?.as_u64()?).map(str::to_owned)
    }
}

/// One walk. The first reply is the whole episode; later ones change nothing.
struct MazeEpisode {
    maze: Maze,
    prompt: String,
    turn: Option<Turn>,
}

impl Episode for MazeEpisode {
    fn observe(&self) -> String {
        self.prompt.clone()
    }

    fn step(&mut self, reply: &str, finish: Finish) -> Turn {
        let turn = self.turn.get_or_insert_with(|| Turn {
            measurements: measure(&self.maze, reply, finish),
            terminated: finish == Finish::Stop,
            truncated: finish == Finish::Length,
            observation: String::new(),
        });
        turn.clone()
    }

    fn verdict(&self) -> Measurements {
        match &self.turn {
            Some(turn) => turn.measurements.clone(),
            None => measure(&self.maze, "", Finish::Length),
        }
    }
}

fn measure(maze: &Maze, completion: &str, finish: Finish) -> Measurements {
    let answer = read_answer(completion);
    let distances = maze.distances();
    let left = |cell: usize| distances[cell].map_or(f64::INFINITY, |moves| moves as f64);
    let (mut cell, mut valid_moves, mut wall_hits, mut overshoot) = (maze.origin, 0, 0, false);
    let mut last_valid = maze.origin;
    for &direction in &answer.moves {
        overshoot |= cell == maze.target;
        match maze.step(cell, direction) {
            Some(next) => cell = next,
            None => wall_hits += 1,
        }
        if wall_hits == 0 {
            valid_moves += 1;
            last_valid = cell;
        }
    }
    let finished = finish == Finish::Stop;
    let solved = finished && answer.well_formed && wall_hits == 0 && !overshoot && cell == maze.target;
    let start = left(maze.origin);
    let values = [
        f64::from(u8::from(solved)),
        f64::from(valid_moves),
        answer.moves.len() as f64,
        maze.length as f64,
        f64::from(wall_hits),
        ((start - left(last_valid)) / start).clamp(0.0, 1.0),
        f64::from(u8::from(answer.well_formed)),
        f64::from(u8::from(finished)),
    ];
    MEASURES.iter().map(|measure| measure.name.clone().into_owned()).zip(values).collect()
}

#[cfg(test)]
mod tests;
