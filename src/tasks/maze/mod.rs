//! The maze task: walk from the origin to the target, in one turn, checked by walking.
//!
//! A completion is judged by simulation alone; no gold string exists. What it says while it thinks is its own affair,
//! what it answers is read strictly: anything but move tokens after `</think>` spoils the answer, and so does walking on
//! after the target was reached.

mod answer;
mod attempt;
pub mod drawing;
mod format;
mod grid;
mod layout;
mod lines;
mod parse;
mod spec;
mod verdict;

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

pub use format::{BEGIN, END, END_THINK, PAD, THINK};
pub use grid::{Direction, Maze};
pub use spec::{Algorithm, MazeSpec, StartLaw};
pub use verdict::{DIAGNOSES, MEASURES};

use crate::random;
use crate::tasks::maze::answer::{Form, read_answer};
use crate::tasks::maze::format::Format;
use crate::tasks::maze::grid::{Symmetry, canonical, symmetries, transposed};
use crate::tasks::maze::layout::Layouts;
use crate::tasks::maze::verdict::{diagnose, measure};
use crate::tasks::words::PIECES;
use crate::tasks::{
    Demonstrated, Drawn, Episode, Episodes, Finish, FormatSpec, Measure, Measurements, Start, Task, Turn, stratum,
};

/// The version of instances and verdicts.
pub const VERSION: u32 = 1;
/// The version of the texts of the format `alphamaze`.
pub const ALPHAMAZE_VERSION: u32 = 1;
/// The version of the texts of the format `compact`.
pub const COMPACT_VERSION: u32 = 1;

/// The version of the texts of the format `fused`.
pub const FUSED_VERSION: u32 = 1;

/// The strata of instances by the length of the shortest path, each with the least length in it.
pub static STRATA: &[(u64, &str)] = &[(0, "short"), (5, "medium"), (9, "long"), (14, "very_long")];

/// The names of the sizes of mazes as strata have them; none where there is one size.
pub fn size_names(spec: &MazeSpec) -> Vec<String> {
    let mut sizes = spec.sizes.clone();
    sizes.sort_unstable();
    sizes.dedup();
    sizes.iter().map(|[rows, columns]| size_name(*rows, *columns)).collect()
}

fn size_name(rows: u64, columns: u64) -> String {
    format!("{rows}x{columns}")
}

/// Mazes in one format.
pub struct MazeTask {
    /// Rows and columns of the mazes that are drawn, one as often as another.
    sizes: Vec<(usize, usize)>,
    /// There may be several sizes: strata and canonical forms tell them apart.
    mixed: bool,
    layouts: Layouts,
    format: Format,
    /// By rows and columns, which is the longer side where mazes are `mixed`.
    symmetries: BTreeMap<(usize, usize), Vec<Symmetry>>,
}

impl MazeTask {
    /// The mazes that a file asks for; an error where it asks for what cannot be.
    pub fn new(spec: &MazeSpec, format: &FormatSpec) -> anyhow::Result<Self> {
        for (name, cells) in [("rows", spec.rows), ("columns", spec.columns)] {
            ensure!((2..=32).contains(&cells), "a maze has 2 to 32 `{name}`, not {cells}");
        }
        for [rows, columns] in &spec.sizes {
            let fits = (2..=spec.rows).contains(rows) && (2..=spec.columns).contains(columns);
            let most = size_name(spec.rows, spec.columns);
            ensure!(fits, "the size {rows} x {columns} in `sizes` does not lie between 2x2 and {most}");
        }
        ensure!((0.0..=1.0).contains(&spec.loops), "`loops` is {}, not a share from 0 to 1", spec.loops);
        if spec.start != StartLaw::Any && spec.algorithm != Algorithm::Dfs {
            bail!("`start` matters to the algorithm `dfs` alone: leave it out");
        }
        let (rows, columns) = (spec.rows as usize, spec.columns as usize);
        let mixed = !spec.sizes.is_empty();
        let sizes: Vec<(usize, usize)> = if mixed {
            spec.sizes.iter().map(|[rows, columns]| (*rows as usize, *columns as usize)).collect()
        } else {
            vec![(rows, columns)]
        };
        let keyed = sizes.iter().map(|&(rows, columns)| {
            let (rows, columns) = if mixed { (rows.min(columns), rows.max(columns)) } else { (rows, columns) };
            ((rows, columns), symmetries(rows, columns))
        });
        let symmetries = keyed.collect();
        let format = Format::new(format, rows, columns, mixed)?;
        Ok(Self { sizes, mixed, layouts: Layouts::new(spec), format, symmetries })
    }

    fn read(&self, instance: &Value) -> anyhow::Result<Maze> {
        use serde::Deserialize as _;
        let maze = Maze::deserialize(instance).context("the instance is no maze")?;
        self.check(&maze).context("the maze does not hold together")?;
        Ok(maze)
    }

    /// Whether a maze is one of this task.
    fn check(&self, maze: &Maze) -> anyhow::Result<()> {
        let (rows, columns) = match self.sizes[..] {
            [size] => size,
            _ => (maze.rows, maze.columns),
        };
        if !self.sizes.contains(&(rows, columns)) {
            let sizes: Vec<String> =
                self.sizes.iter().map(|(rows, columns)| size_name(*rows as u64, *columns as u64)).collect();
            bail!("the maze has {rows} x {columns} cells, the task {}", sizes.join(", "));
        }
        maze.check(rows, columns)
    }

    /// The instance number `index` of the stream `seed`.
    fn maze(&self, seed: u64, index: u64) -> Maze {
        let (rows, columns) = if let [size] = self.sizes[..] {
            size
        } else {
            let mut random = random::rng("task.maze.size", &[seed, index]);
            self.sizes[random::below(&mut random, self.sizes.len() as u64) as usize]
        };
        let mut random = random::rng("task.maze", &[seed, rows as u64, columns as u64, index]);
        self.layouts.draw(rows, columns, &mut random)
    }

    /// The bytes that turned and mirrored layouts share.
    fn layout(&self, maze: &Maze) -> Vec<u8> {
        let (mut rows, mut columns) = (maze.rows, maze.columns);
        let mut walls = &maze.walls;
        // A rectangle that lies on its side is the same layout where both stand in one data set.
        let turned;
        if self.mixed && rows > columns {
            turned = transposed(walls, rows, columns);
            walls = &turned;
            (rows, columns) = (columns, rows);
        }
        let mut bytes = vec![rows as u8, columns as u8];
        bytes.extend(canonical(walls, &self.symmetries[&(rows, columns)]));
        bytes
    }

    /// The classes of a maze: its size where there are several, and its length.
    fn class(&self, rows: u64, columns: u64, length: u64) -> Option<String> {
        let length = stratum(STRATA, length)?;
        Some(if self.mixed { format!("{}.{length}", size_name(rows, columns)) } else { length.to_owned() })
    }
}

impl Task for MazeTask {
    fn generate(&self, seed: u64, indices: Range<u64>) -> anyhow::Result<Vec<Value>> {
        Ok(indices.map(|index| serde_json::to_value(self.maze(seed, index)).expect("a maze is plain data")).collect())
    }

    fn draw(&self, seed: u64, indices: Range<u64>, lengths: RangeInclusive<u64>) -> anyhow::Result<Vec<Drawn>> {
        let mazes = indices.map(|index| self.maze(seed, index));
        let mazes = mazes.filter(|maze| lengths.contains(&(maze.length as u64)));
        let drawn = mazes.map(|maze| Drawn {
            canonical: self.layout(&maze),
            length: Some(maze.length as u64),
            stratum: self.class(maze.rows as u64, maze.columns as u64, maze.length as u64),
            data: maze.to_json(),
        });
        Ok(drawn.collect())
    }

    fn canonical(&self, instance: &Value) -> anyhow::Result<Vec<u8>> {
        Ok(self.layout(&self.read(instance)?))
    }

    fn begin(&self, starts: &[Start<'_>]) -> anyhow::Result<Box<dyn Episodes>> {
        let episodes = starts.iter().map(|start| {
            let maze = self.read(start.instance)?;
            let prompt = self.format.prompt(&maze);
            Ok(MazeEpisode { maze, prompt, form: self.format.form(), turn: None })
        });
        Ok(Box::new(episodes.collect::<anyhow::Result<Vec<_>>>()?))
    }

    fn demonstrate(&self, instance: &Value, seed: u64) -> anyhow::Result<Vec<String>> {
        Ok(self.demonstration(instance, seed)?.into_iter().map(|reply| reply.text).collect())
    }

    fn demonstration(&self, instance: &Value, seed: u64) -> anyhow::Result<Vec<Demonstrated>> {
        Ok(vec![self.format.demonstrate(&self.read(instance)?, &mut random::rng("task.maze.demonstrate", &[seed]))])
    }

    fn parse(&self, prompt: &str) -> anyhow::Result<Value> {
        let maze = parse::maze(prompt)?;
        self.check(&maze).context("the maze does not hold together")?;
        Ok(serde_json::to_value(maze).expect("a maze is plain data"))
    }

    fn vocabulary(&self) -> Vec<String> {
        self.format.vocabulary()
    }

    fn added_tokens(&self) -> Vec<String> {
        [PAD, BEGIN, END].map(str::to_owned).into_iter().chain(self.format.added_tokens()).collect()
    }

    fn pieces(&self) -> String {
        if self.format.has_lines() { PIECES.to_owned() } else { r"<\|[^<>]*\|>|</?think>".to_owned() }
    }

    fn measures(&self) -> &[Measure] {
        MEASURES
    }

    fn diagnoses(&self) -> &[Measure] {
        DIAGNOSES
    }

    fn diagnose(&self, instance: &Value, replies: &[&str], finish: Finish) -> anyhow::Result<Measurements> {
        let maze = self.read(instance)?;
        let completion = replies.first().copied().unwrap_or_default();
        let form = self.format.form();
        Ok(diagnose(&maze, form, &read_answer(form, completion), completion, finish))
    }

    fn max_turns(&self) -> usize {
        1
    }

    fn stratum(&self, instance: &Value) -> Option<String> {
        let number = |name: &str| instance.get(name)?.as_u64();
        self.class(number("rows")?, number("columns")?, number("length")?)
    }
}

/// One walk. The first reply is the whole episode; later ones change nothing.
struct MazeEpisode {
    maze: Maze,
    prompt: String,
    form: Form,
    turn: Option<Turn>,
}

impl Episode for MazeEpisode {
    fn observe(&self) -> String {
        self.prompt.clone()
    }

    fn step(&mut self, reply: &str, finish: Finish) -> Turn {
        let turn = self.turn.get_or_insert_with(|| Turn {
            measurements: measure(&self.maze, &read_answer(self.form, reply), finish),
            terminated: finish == Finish::Stop,
            truncated: finish == Finish::Length,
            observation: String::new(),
        });
        turn.clone()
    }

    fn verdict(&self) -> Measurements {
        match &self.turn {
            Some(turn) => turn.measurements.clone(),
            None => measure(&self.maze, &read_answer(self.form, ""), Finish::Length),
        }
    }
}

#[cfg(test)]
mod tests;
