//! A stage behind a pointer: what the engine holds of one whose kind it does not know.

use serde_json::Value;

use crate::pipeline::stage::{Output, Part, Problem, Stage, StageContext, Upstream};

/// The object-safe side of [`Stage`].
pub trait AnyStage: Send + Sync {
    /// See [`Stage::outputs`].
    fn outputs(&self) -> Vec<Output>;
    /// See [`Stage::parts`].
    fn parts(&self) -> Vec<Part>;
    /// See [`Stage::check`].
    fn check(&self, upstream: &Upstream<'_>) -> Vec<Problem>;
    /// See [`Stage::metrics`].
    fn metrics(&self, upstream: &Upstream<'_>) -> Option<Vec<String>>;
    /// See [`Stage::curves`].
    fn curves(&self) -> &'static [&'static str];
    /// See [`Stage::split`].
    fn split(&self) -> Option<&str>;
    /// See [`Stage::normal_form`].
    fn normal_form(&self) -> Option<Value>;
    /// See [`Stage::run`].
    fn run(&self, context: &mut StageContext) -> anyhow::Result<()>;
    /// Every parameter with its default written out; edges and files as their tagged objects.
    fn params(&self) -> Value;
}

impl<S: Stage> AnyStage for S {
    fn outputs(&self) -> Vec<Output> {
        Stage::outputs(self)
    }
    fn parts(&self) -> Vec<Part> {
        Stage::parts(self)
    }
    fn check(&self, upstream: &Upstream<'_>) -> Vec<Problem> {
        Stage::check(self, upstream)
    }
    fn metrics(&self, upstream: &Upstream<'_>) -> Option<Vec<String>> {
        Stage::metrics(self, upstream)
    }
    fn curves(&self) -> &'static [&'static str] {
        Stage::curves(self)
    }
    fn split(&self) -> Option<&str> {
        Stage::split(self)
    }
    fn normal_form(&self) -> Option<Value> {
        Stage::normal_form(self)
    }
    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        Stage::run(self, context)
    }
    fn params(&self) -> Value {
        serde_json::to_value(self).expect("a stage's parameters are plain data")
    }
}
