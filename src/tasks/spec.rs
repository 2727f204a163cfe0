//! Tasks and formats as a file names them, and the one place that turns the names into code.
//!
//! A new task is a variant of [`TaskSpec`], a new way of writing a task for a model a variant of [`FormatSpec`], and
//! each has a version: raise it when instances, texts or verdicts would come out otherwise.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tasks::{Measure, Task, maze};

/// What a model is taught to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TaskSpec {
    /// Walk from the origin of a maze to its target; one turn.
    Maze {
        /// Rows of cells.
        #[schemars(range(min = 2, max = 32))]
        rows: u64,
        /// Columns of cells.
        #[schemars(range(min = 2, max = 32))]
        columns: u64,
        /// How layouts are drawn.
        #[serde(default)]
        algorithm: Algorithm,
    },
}

/// How maze layouts are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Randomised depth-first search from a uniformly random cell: every cell is reached by exactly one path.
    #[default]
    Dfs,
}

/// What stands between `<think>` and `</think>` in a demonstration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trace {
    /// The right path, as `cell move cell move ... cell`.
    #[default]
    Path,
    /// Nothing: the answer follows at once.
    Direct,
}

/// What stands between `<think>` and `</think>` in a demonstration of the `compact` format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SearchTrace {
    /// A depth-first search for the target as `cell move cell move ... cell`, steps back included.
    #[default]
    Search,
    /// The right path, as `cell move cell move ... cell`.
    Path,
    /// Nothing: the answer follows at once.
    Direct,
}

/// In which order a demonstrated search tries the ways on from a cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SearchOrder {
    /// In an order of its own at every cell, drawn at random.
    #[default]
    Random,
    /// Ways that come closer to the target, counted without walls, before ways that lead away; drawn among equals.
    Toward,
}

/// How a task is written for a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum FormatSpec {
    /// The tokens of AlphaMaze (arXiv 2502.14669): coordinate, walls and marker, three tokens a cell.
    Alphamaze {
        /// What demonstrations think before they answer.
        #[serde(default)]
        trace: Trace,
    },
    /// One token a cell: walls and marker fused, the place in the prompt says which cell it is.
    Compact {
        /// What demonstrations think before they answer.
        #[serde(default)]
        trace: SearchTrace,
    },
    /// One token a cell that fuses coordinate and walls, the endpoints after them, and one token a step of the trace
    /// that fuses the move and the cell it leads to: the fewest tokens, the largest vocabulary.
    Fused {
        /// What demonstrations think before they answer.
        #[serde(default)]
        trace: SearchTrace,
        /// How a demonstrated search chooses its way.
        #[serde(default)]
        order: SearchOrder,
    },
}

impl Default for FormatSpec {
    fn default() -> Self {
        Self::Alphamaze { trace: Trace::default() }
    }
}

impl TaskSpec {
    /// The piece of code behind the task and its version, for keys.
    pub fn part(&self) -> (&'static str, u32) {
        match self {
            Self::Maze { .. } => ("task.maze", maze::VERSION),
        }
    }

    /// What verdicts of the task measure, whatever the format.
    pub fn measures(&self) -> &'static [Measure] {
        match self {
            Self::Maze { .. } => maze::MEASURES,
        }
    }
}

impl FormatSpec {
    /// The piece of code behind the format and its version, for keys.
    pub fn part(&self) -> (&'static str, u32) {
        match self {
            Self::Alphamaze { .. } => ("format.alphamaze", maze::ALPHAMAZE_VERSION),
            Self::Compact { .. } => ("format.compact", maze::COMPACT_VERSION),
            Self::Fused { .. } => ("format.fused", maze::FUSED_VERSION),
        }
    }
}

/// Every task and format with its version: for the keys of stages that learn from their input alone which task it is.
pub fn parts() -> [(&'static str, u32); 4] {
    [
        ("format.alphamaze", maze::ALPHAMAZE_VERSION),
        ("format.compact", maze::COMPACT_VERSION),
        ("format.fused", maze::FUSED_VERSION),
        ("task.maze", maze::VERSION),
    ]
}

/// The task written in the format; an error says which numbers are out of range.
pub fn open(task: &TaskSpec, format: &FormatSpec) -> anyhow::Result<Box<dyn Task>> {
    match task {
        TaskSpec::Maze { rows, columns, algorithm } => {
            Ok(Box::new(maze::MazeTask::new(*rows, *columns, *algorithm, format)?))
        }
    }
}
