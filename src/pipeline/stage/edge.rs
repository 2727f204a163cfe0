//! What stages are joined by: artifact types and inputs, as fields of a stage's parameters.
//!
//! An input reads from a plain string and writes a tagged object, so that one walk over a serialised stage finds every
//! edge without knowing the stage.

use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;

use crate::file::tagged_string;

/// What an edge of the graph carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ArtifactType {
    /// Parquet files with one row an instance or example, a file a split.
    Dataset,
    /// `tokenizer.json` and its companions.
    Tokenizer,
    /// Token ids, row offsets and loss masks, the rows they came from, and the task they belong to.
    Tokens,
    /// A Hugging Face model folder.
    Checkpoint,
    /// The final state of a training: weights, moments and counters, and all that the model is opened with.
    TrainingState,
    /// Every completion that a training stage sampled, with its rewards.
    Rollouts,
    /// One row an evaluated example, and the metrics over them.
    Evaluation,
    /// Whatever a `command` stage wrote.
    Files,
}

impl ArtifactType {
    /// Every type.
    const ALL: [Self; 8] = [
        Self::Dataset,
        Self::Tokenizer,
        Self::Tokens,
        Self::Checkpoint,
        Self::TrainingState,
        Self::Rollouts,
        Self::Evaluation,
        Self::Files,
    ];

    /// Its name in files and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dataset => "dataset",
            Self::Tokenizer => "tokenizer",
            Self::Tokens => "tokens",
            Self::Checkpoint => "checkpoint",
            Self::TrainingState => "training_state",
            Self::Rollouts => "rollouts",
            Self::Evaluation => "evaluation",
            Self::Files => "files",
        }
    }

    /// The type of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|artifact| artifact.name() == name)
    }
}

impl fmt::Display for ArtifactType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The type-level side of [`ArtifactType`]: what an [`Input`] wants.
pub trait Artifact: 'static {
    /// The type that an edge must carry; `None` takes any.
    const WANTS: Option<ArtifactType>;
}

macro_rules! artifacts {
    ($($(#[$doc:meta])* $name:ident = $wants:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub enum $name {}
        impl Artifact for $name { const WANTS: Option<ArtifactType> = $wants; }
    )*};
}

artifacts! {
    /// Marks an input of type [`ArtifactType::Dataset`].
    Dataset = Some(ArtifactType::Dataset);
    /// Marks an input of type [`ArtifactType::Tokenizer`].
    Tokenizer = Some(ArtifactType::Tokenizer);
    /// Marks an input of type [`ArtifactType::Tokens`].
    Tokens = Some(ArtifactType::Tokens);
    /// Marks an input of type [`ArtifactType::Checkpoint`].
    Checkpoint = Some(ArtifactType::Checkpoint);
    /// Marks an input of type [`ArtifactType::TrainingState`].
    TrainingState = Some(ArtifactType::TrainingState);
    /// Marks an input of type [`ArtifactType::Rollouts`].
    Rollouts = Some(ArtifactType::Rollouts);
    /// Marks an input of type [`ArtifactType::Evaluation`].
    Evaluation = Some(ArtifactType::Evaluation);
    /// Marks an input that takes an artifact of any type.
    Any = None;
}

/// An edge of the graph: the name of a stage of the same pipeline, or `stage.output` for one of its outputs.
///
/// A stage alone means its first output, or, where that is of another type than is wanted, its only one of that type.
///
/// It reads from a string and writes `{"$input": reference, "wants": type}`, so that one walk over a serialised stage
/// finds every edge with its type.
pub struct Input<A> {
    /// As the user wrote it: `stage` or `stage.output`.
    pub reference: String,
    artifact: PhantomData<fn() -> A>,
}

impl<A> Clone for Input<A> {
    fn clone(&self) -> Self {
        Self { reference: self.reference.clone(), artifact: PhantomData }
    }
}

impl<A> fmt::Debug for Input<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Input({})", self.reference)
    }
}

impl<A: Artifact> Input<A> {
    /// An edge from `reference`.
    pub fn new(reference: impl Into<String>) -> Self {
        Self { reference: reference.into(), artifact: PhantomData }
    }
}

impl<A: Artifact> Serialize for Input<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json!({"$input": self.reference, "wants": A::WANTS}).serialize(serializer)
    }
}

impl<'de, A: Artifact> Deserialize<'de> for Input<A> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        tagged_string(deserializer, "$input").map(|(reference, _)| Self::new(reference))
    }
}

impl<A: Artifact> JsonSchema for Input<A> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        A::WANTS.map_or_else(|| "AnyInput".into(), |wants| format!("Input_{wants}").into())
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let wants = A::WANTS.map_or_else(|| "any".to_owned(), |wants| wants.to_string());
        json_schema!({"type": "string", "x-input": wants})
    }
}
