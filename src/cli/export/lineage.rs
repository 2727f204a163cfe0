//! What a result rests on, and which evaluations rest on it, as the last run of its experiment recorded them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use crate::cli::export::without_places;
use crate::cli::show::Found;
use crate::pipeline::stage::{ArtifactType, references};
use crate::pipeline::store::{Digest, Manifest, Store, StoreError, TrialRecords};

/// The stages around a result.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    /// The experiment's file, as far as this machine's folders need not be told.
    pub(super) file: Option<PathBuf>,
    /// The stage itself.
    pub(super) stage: String,
    /// The trial, where there is more than one.
    pub(super) trial: String,
    /// The stages that it rests on, those nearest first, and itself before them.
    pub(super) stages: Vec<Ancestor>,
    /// The evaluations of this very result.
    pub(super) evaluations: Vec<Evaluation>,
    /// The parameters of [`Lineage::stages`], in the same order.
    params: Vec<Value>,
}

/// A stage that a result rests on.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Ancestor {
    pub(super) stage: String,
    pub(super) kind: String,
    pub(super) version: u32,
    pub(super) key: Digest,
}

/// An evaluation of a result.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Evaluation {
    pub(super) stage: String,
    pub(super) key: Digest,
    /// What was evaluated on, and how it was sampled.
    pub(super) params: Value,
    pub(super) metrics: BTreeMap<String, f64>,
}

impl Lineage {
    /// The stages around `found`; nothing but itself where its experiment's records have gone on.
    pub(super) fn of(found: &Found<'_>, store: &Store) -> Result<Self, StoreError> {
        let (experiment, stage) = found.name();
        let manifest = found.result().manifest;
        let trials = store.recorded_trials(&experiment)?;
        let has_it = |records: &&TrialRecords| records.get(stage).is_some_and(|record| record.key == manifest.key);
        let mut lineage = Self { stage: stage.to_owned(), ..Self::default() };
        let Some((trial, records)) = trials.iter().find(|(_, records)| has_it(records)) else {
            lineage.add(stage, manifest);
            return Ok(lineage);
        };
        trial.clone_into(&mut lineage.trial);
        lineage.file = records.get(stage).map(|record| shown(&record.file));
        let mut seen = BTreeSet::new();
        let mut layer = vec![stage.to_owned()];
        while !layer.is_empty() {
            let mut next = BTreeSet::new();
            for name in layer {
                if !seen.insert(name.clone()) {
                    continue;
                }
                let Some(manifest) =
                    records.get(&name).map(|record| store.manifest_of(&record.key)).transpose()?.flatten()
                else {
                    continue;
                };
                lineage.add(&name, &manifest);
                let inputs = references(&manifest.params).into_iter();
                next.extend(inputs.map(|(reference, _)| reference.split('.').next().unwrap_or_default().to_owned()));
            }
            layer = next.into_iter().collect();
        }
        let digests: Vec<&Digest> = found.output().map(|output| &output.digest).into_iter().collect();
        for (name, record) in records {
            let Some(other) = store.manifest_of(&record.key)? else { continue };
            if is_evaluation(&other) && other.inputs.values().any(|input| digests.contains(&input)) {
                lineage.evaluations.push(Evaluation {
                    stage: name.clone(),
                    key: other.key.clone(),
                    params: without_places(&other.params),
                    metrics: other.metrics.clone(),
                });
            }
        }
        Ok(lineage)
    }

    fn add(&mut self, stage: &str, manifest: &Manifest) {
        self.stages.push(Ancestor {
            stage: stage.to_owned(),
            kind: manifest.parts.kind.clone(),
            version: manifest.parts.version,
            key: manifest.key.clone(),
        });
        self.params.push(without_places(&manifest.params));
    }

    /// The first value of a parameter among the stages (of `kind`, if named), the nearest first.
    pub(super) fn nearest(&self, kind: Option<&str>, pointer: &str) -> Option<&Value> {
        let of_kind = |stage: &Ancestor| kind.is_none_or(|kind| kind == stage.kind);
        let params = self.stages.iter().zip(&self.params).filter(|(stage, _)| of_kind(stage));
        params.filter_map(|(_, params)| params.pointer(pointer)).find(|value| !value.is_null())
    }

    /// The command that makes the result again.
    pub(super) fn again(&self) -> String {
        let file = self.file.as_deref().unwrap_or(Path::new("FILE.toml"));
        format!("pipe run {} --until {}", file.display(), self.stage)
    }
}

fn is_evaluation(manifest: &Arc<Manifest>) -> bool {
    manifest.outputs.iter().any(|output| output.artifact == ArtifactType::Evaluation)
}

/// A file below the folder that we run in by its path from there, and another by its name alone.
fn shown(file: &Path) -> PathBuf {
    let here = std::env::current_dir().ok();
    let below = here.and_then(|here| file.strip_prefix(here).ok().map(Path::to_owned));
    below.unwrap_or_else(|| file.file_name().map(PathBuf::from).unwrap_or_default())
}
