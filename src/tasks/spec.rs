//! Tasks and formats as a file names them, and the one place that turns the names into code.
//!
//! A new task is a variant of [`TaskSpec`], a new way of writing a task for a model a variant of [`FormatSpec`], and
//! each has a version: raise it when instances, texts or verdicts would come out otherwise.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tasks::maze::MazeSpec;
use crate::tasks::program::ProgramTask;
use crate::tasks::{Measure, Task, maze, number_line, program};

/// What a model is taught to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TaskSpec {
    /// Walk from the origin of a maze to its target; one turn.
    Maze(MazeSpec),
    /// Bring a number to a target by steps of one, a step a turn (NumberLine of RL4VLM, arXiv 2405.10292, as text). A
    /// reply that names no action moves at random.
    NumberLine {
        /// Numbers run from 0 to this.
        #[serde(default = "default_max_position")]
        #[schemars(range(min = 1, max = 99))]
        max_position: u64,
        /// Turns in an episode, at most.
        #[serde(default = "default_max_turns")]
        #[schemars(range(min = 1, max = 1000))]
        max_turns: u64,
    },
    /// A task of your own: a program that answers JSON lines.
    Program(ProgramTask),
}

/// Whether a parameter says what it says where it is left out: then old keys do not have it.
pub(super) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn default_max_position() -> u64 {
    5
}

fn default_max_turns() -> u64 {
    10
}

/// What stands between `<think>` and `</think>` in a demonstration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trace {
    /// The right path, as `cell move cell move ... cell`.
    #[default]
    Path,
    /// Nothing: the answer follows at once. Where a `prompt` says what to do, the answer is the whole reply.
    Direct,
    /// The right path in words, the whole maze printed again at each step: the thoughts of AlphaMaze.
    Reprint,
}

/// What a prompt of the format `alphamaze` holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MazePrompt {
    /// The maze.
    #[default]
    Maze,
    /// What is to be done, what the signs mean, and the maze.
    Legend,
}

/// What the format `alphamaze` is written with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Signs {
    /// Tokens of its own: coordinates, walls, markers and moves.
    #[default]
    Tokens,
    /// Plain characters, for tokenizers that get no tokens added.
    Text,
}

/// Where the wrong attempts of demonstrations leave the right path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    /// At the origin, by the rules of AlphaMaze: one wrong attempt where two ways lead out, one for each wrong way where
    /// three do, else none.
    #[default]
    Origin,
    /// At any cell of the right path from which a wrong way leads.
    Junction,
}

/// Which way a search tries first at every cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SearchOrder {
    /// Any.
    #[default]
    Random,
    /// One that leads closer to the target as the crow flies, where there is one; else any.
    Toward,
}

/// What stands between `<think>` and `</think>` in a demonstration of the formats `compact` and `fused`.
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

/// How a task is written for a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum FormatSpec {
    /// The tokens of AlphaMaze (arXiv 2502.14669): coordinate, walls and marker, three tokens a cell.
    Alphamaze {
        /// What demonstrations think before they answer.
        #[serde(default)]
        trace: Trace,
        /// What the prompt holds.
        #[serde(default, skip_serializing_if = "is_default")]
        #[schemars(extend("default" = "maze"))]
        prompt: MazePrompt,
        /// What prompt, thoughts and answer are written with.
        #[serde(default, skip_serializing_if = "is_default")]
        #[schemars(extend("default" = "tokens"))]
        signs: Signs,
        /// Where the wrong attempts of demonstrations leave the right path.
        #[serde(default, skip_serializing_if = "is_default")]
        #[schemars(extend("default" = "origin"))]
        retry: Retry,
        /// The share of demonstrations that begin with a wrong attempt, of the mazes that have one; 0 has the words for it
        /// and none is shown.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 0.0, max = 1.0))]
        retry_share: Option<f64>,
    },
    /// One token a cell: walls and marker fused, the place in the prompt says which cell it is.
    Compact {
        /// What demonstrations think before they answer.
        #[serde(default)]
        trace: SearchTrace,
        /// Which way a search tries first.
        #[serde(default)]
        order: SearchOrder,
        /// Where the wrong attempts of demonstrations leave the right path.
        #[serde(default, skip_serializing_if = "is_default")]
        #[schemars(extend("default" = "origin"))]
        retry: Retry,
        /// The share of demonstrations that begin with a wrong attempt, of the mazes that have one; 0 has the words for it
        /// and none is shown.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 0.0, max = 1.0))]
        retry_share: Option<f64>,
    },
    /// One token a cell and one a step: a cell's coordinate and walls are fused, and so are a move of the trace and the
    /// cell it leads to; the coordinates of origin and target end the prompt. The shortest rows, the largest vocabulary.
    Fused {
        /// What demonstrations think before they answer.
        #[serde(default)]
        trace: SearchTrace,
        /// Which way a search tries first.
        #[serde(default)]
        order: SearchOrder,
        /// Where the wrong attempts of demonstrations leave the right path.
        #[serde(default, skip_serializing_if = "is_default")]
        #[schemars(extend("default" = "origin"))]
        retry: Retry,
        /// The share of demonstrations that begin with a wrong attempt, of the mazes that have one; 0 has the words for it
        /// and none is shown.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 0.0, max = 1.0))]
        retry_share: Option<f64>,
    },
    /// English and JSON, for `number_line`: each reply is an object with the keys of RL4VLM, `action` last.
    Json {
        /// Whether replies state what they see and think before they act; else they are an action alone.
        #[serde(default = "default_thoughts")]
        thoughts: bool,
    },
    /// The task's own text as it is, for `program` tasks.
    Plain {},
}

fn default_thoughts() -> bool {
    true
}

impl Default for FormatSpec {
    fn default() -> Self {
        Self::Alphamaze {
            trace: Trace::default(),
            prompt: MazePrompt::default(),
            signs: Signs::default(),
            retry: Retry::default(),
            retry_share: None,
        }
    }
}

impl TaskSpec {
    /// The piece of code behind the task and its version, for keys.
    pub fn part(&self) -> (&'static str, u32) {
        match self {
            Self::Maze(_) => ("task.maze", maze::VERSION),
            Self::NumberLine { .. } => ("task.number_line", number_line::VERSION),
            Self::Program(_) => ("task.program", program::VERSION),
        }
    }

    /// What verdicts of the task measure, whatever the format.
    pub fn measures(&self) -> Vec<Measure> {
        match self {
            Self::Maze(_) => maze::MEASURES.to_vec(),
            Self::NumberLine { .. } => number_line::MEASURES.to_vec(),
            Self::Program(program) => program.measurements(),
        }
    }

    /// What diagnoses of the task tell beside its measurements, whatever the format.
    pub fn diagnoses(&self) -> &'static [Measure] {
        match self {
            Self::Maze(_) => maze::DIAGNOSES,
            Self::NumberLine { .. } | Self::Program(_) => &[],
        }
    }

    /// The strata into which instances may fall; `None` where the task does not say.
    ///
    /// A name of several classes, as `10x10.long`, stands beside the names of its classes.
    pub fn strata(&self) -> Option<Vec<String>> {
        let (all, sizes) = match self {
            Self::Maze(mazes) => (maze::STRATA, maze::size_names(mazes)),
            Self::NumberLine { .. } => (number_line::STRATA, Vec::new()),
            Self::Program(_) => return None,
        };
        let longest = self.longest().unwrap_or(u64::MAX);
        let lengths = all.iter().filter(|(least, _)| *least <= longest).map(|(_, name)| (*name).to_owned());
        let lengths: Vec<String> = lengths.collect();
        let both: Vec<String> =
            sizes.iter().flat_map(|size| lengths.iter().map(move |length| format!("{size}.{length}"))).collect();
        Some([lengths, sizes, both].concat())
    }

    /// The longest that the `length` of an instance can be, where instances have one.
    pub fn longest(&self) -> Option<u64> {
        match self {
            Self::Maze(mazes) => Some((mazes.rows * mazes.columns).saturating_sub(1)),
            Self::NumberLine { max_position, .. } => Some(*max_position),
            Self::Program(_) => None,
        }
    }

    /// A format in which the task can be written, for stages that need its instances alone.
    pub fn any_format(&self) -> FormatSpec {
        match self {
            Self::Maze(_) => FormatSpec::default(),
            Self::NumberLine { .. } => FormatSpec::Json { thoughts: true },
            Self::Program(_) => FormatSpec::Plain {},
        }
    }

    /// Writes what the task needs besides its words into the folder of an artifact; gives the task as its `task.json`
    /// names it, free of this machine's paths.
    pub fn store(&self, folder: &Path) -> anyhow::Result<Self> {
        Ok(match self {
            Self::Program(program) => Self::Program(program.store(folder)?),
            other => other.clone(),
        })
    }

    /// The task that the `task.json` of an artifact in `folder` names.
    #[must_use]
    pub fn stored_in(&self, folder: &Path) -> Self {
        match self {
            Self::Program(program) => Self::Program(program.stored_in(folder)),
            other => other.clone(),
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
            Self::Json { .. } => ("format.json", number_line::JSON_VERSION),
            Self::Plain {} => ("format.plain", program::PLAIN_VERSION),
        }
    }
}

/// Every task and format with its version: for the keys of stages that learn from their input alone which task it is.
pub fn parts() -> [(&'static str, u32); 8] {
    [
        ("format.alphamaze", maze::ALPHAMAZE_VERSION),
        ("format.compact", maze::COMPACT_VERSION),
        ("format.fused", maze::FUSED_VERSION),
        ("format.json", number_line::JSON_VERSION),
        ("format.plain", program::PLAIN_VERSION),
        ("task.maze", maze::VERSION),
        ("task.number_line", number_line::VERSION),
        ("task.program", program::VERSION),
    ]
}

/// The task written in the format; an error says which numbers are out of range.
pub fn open(task: &TaskSpec, format: &FormatSpec) -> anyhow::Result<Box<dyn Task>> {
    opened(task, format, None)
}

/// The same for a stage, whose `interrupt` ends the calls of a task that is a program.
pub fn open_with(task: &TaskSpec, format: &FormatSpec, interrupt: &Arc<AtomicBool>) -> anyhow::Result<Box<dyn Task>> {
    opened(task, format, Some(Arc::clone(interrupt)))
}

fn opened(task: &TaskSpec, format: &FormatSpec, interrupt: Option<Arc<AtomicBool>>) -> anyhow::Result<Box<dyn Task>> {
    match task {
        TaskSpec::Maze(mazes) => Ok(Box::new(maze::MazeTask::new(mazes, format)?)),
        TaskSpec::NumberLine { max_position, max_turns } => {
            Ok(Box::new(number_line::NumberLine::new(*max_position, *max_turns, format)?))
        }
        TaskSpec::Program(program) => Ok(Box::new(program.open(format, interrupt)?)),
    }
}
