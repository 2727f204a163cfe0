//! The maze task as a file names it: which mazes there are, and how layouts are drawn.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tasks::spec::is_default;

/// Mazes: their sizes, and how they are drawn.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MazeSpec {
    /// Rows of cells; of the largest maze where there are several `sizes`.
    #[schemars(range(min = 2, max = 32))]
    pub rows: u64,
    /// Columns of cells; of the largest maze where there are several `sizes`.
    #[schemars(range(min = 2, max = 32))]
    pub columns: u64,
    /// How layouts are drawn.
    #[serde(default)]
    pub algorithm: Algorithm,
    /// Sizes as `[rows, columns]`, drawn equally often, none beyond `rows` and `columns`; empty is that one size. The
    /// vocabulary is that of `rows` and `columns` whatever the sizes, so that data sets of other sizes can share a model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("default" = []))]
    pub sizes: Vec<[u64; 2]>,
    /// The share of the walls between cells that are opened when every cell is reached: mazes with loops, in which
    /// several shortest paths may lead to the target.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(range(min = 0.0, max = 1.0), extend("default" = 0.0))]
    pub loops: f64,
    /// The cell where drawing begins.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(extend("default" = "any"))]
    pub start: StartLaw,
}

impl MazeSpec {
    /// Mazes of one size, drawn as a file asks that says no more.
    pub fn new(rows: u64, columns: u64) -> Self {
        Self { rows, columns, ..Self::default() }
    }
}

/// How maze layouts are drawn. Every cell is reached by exactly one path, but for `loops`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Randomised depth-first search: long corridors, few junctions.
    #[default]
    Dfs,
    /// Wilson's loop-erased random walks: every spanning tree equally likely.
    Wilson,
    /// Kruskal's: walls are opened in random order where they part two regions; many short dead ends.
    Kruskal,
}

/// The cell where the drawing of a layout begins; it matters to `dfs` alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartLaw {
    /// Any, all equally likely.
    #[default]
    Any,
    /// Any but those of the last row and of the last column, as `gen_dfs` of the Python package maze-dataset does.
    MazeDataset,
}
