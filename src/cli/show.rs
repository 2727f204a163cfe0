//! `pipe show`: one result, and where it lies.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::cli::failure::Failure;
use crate::cli::{Session, costs, render};
use crate::pipeline::store::{Acceptance, Digest, Lookup, Manifest, Store, StoreError, StoredOutput};

/// Show a stage's result: where it lies, what made it, its metrics
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `EXPERIMENT[/TRIAL]/STAGE[.OUTPUT]` of the last run, or `FILE.toml[/TRIAL]/STAGE[.OUTPUT]` as the file is now
    #[arg(value_name = "RESULT")]
    target: String,
    /// Lay a value over the file, as for `pipe run`
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
}

/// What a target names.
#[derive(Debug, PartialEq, Eq)]
struct Target<'a> {
    /// The experiment's name, or its file.
    experiment: &'a str,
    is_file: bool,
    trial: Option<&'a str>,
    stage: &'a str,
    output: Option<&'a str>,
}

impl<'a> Target<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (experiment, rest, is_file) = match text.find(".toml/") {
            Some(end) => (&text[..end + ".toml".len()], &text[end + ".toml/".len()..], true),
            None => text.split_once('/').map(|(experiment, rest)| (experiment, rest, false))?,
        };
        // A trial's values may hold slashes; a stage's name does not.
        let (trial, stage) = rest.rsplit_once('/').map_or((None, rest), |(trial, stage)| (Some(trial), stage));
        let (stage, output) = stage.split_once('.').map_or((stage, None), |(stage, output)| (stage, Some(output)));
        let whole = !experiment.is_empty() && !stage.is_empty();
        whole.then_some(Self { experiment, is_file, trial, stage, output })
    }
}

/// A stage's result in the store.
pub struct Found<'a> {
    target: Target<'a>,
    recipe: Digest,
    store: Store,
    manifest: Arc<Manifest>,
}

/// A result and the store that holds its objects.
#[derive(Clone, Copy)]
pub struct StageObjects<'a> {
    /// The store.
    pub store: &'a Store,
    /// The record.
    pub manifest: &'a Manifest,
}

impl Found<'_> {
    /// The record.
    pub(super) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The output that was named, or else the first.
    pub fn output(&self) -> Result<&StoredOutput, Failure> {
        output(&self.target, &self.manifest)
    }

    /// Whether an output was named.
    pub(super) fn names_output(&self) -> bool {
        self.target.output.is_some()
    }

    /// The result with its store.
    pub fn result(&self) -> StageObjects<'_> {
        StageObjects { store: &self.store, manifest: &self.manifest }
    }

    /// The experiment's name and the stage's.
    pub fn name(&self) -> (String, &str) {
        let experiment = if self.target.is_file {
            Path::new(self.target.experiment).file_stem().unwrap_or_default().to_string_lossy().into_owned()
        } else {
            self.target.experiment.to_owned()
        };
        (experiment, self.target.stage)
    }
}

/// Looks up `EXPERIMENT[/TRIAL]/STAGE[.OUTPUT]` as it last ran, or `FILE.toml[/TRIAL]/STAGE[.OUTPUT]` as the file is now.
pub fn find<'a>(text: &'a str, sets: &[String], session: &Session) -> Result<Found<'a>, Failure> {
    let target = parsed(text)?;
    let Some(store) = session.existing_store()? else {
        return Err(Failure::wrong(format!("there is no store at `{}`", session.store.display()))
            .hint("`pipe run` makes it; `--store DIR` or PIPE_STORE names another"));
    };
    let (recipe, key) = meant(&target, text, sets, session, &store)?;
    let manifest = match store.lookup(&key).map_err(failed)? {
        Lookup::Hit(manifest) => manifest,
        Lookup::Miss => return Err(no_result(text, "its result is no longer in the store")),
        Lookup::Damaged { what } => {
            return Err(Failure::failed(format!("the result of `{text}` is damaged: {what}"))
                .hint("`pipe verify --repair` puts it aside and the next run makes it again"));
        }
    };
    Ok(Found { target, recipe, store, manifest })
}

/// The key that a target names, whether or not its result is there.
pub(super) fn key(text: &str, sets: &[String], session: &Session, store: &Store) -> Result<Digest, Failure> {
    Ok(meant(&parsed(text)?, text, sets, session, store)?.1)
}

fn parsed(text: &str) -> Result<Target<'_>, Failure> {
    Target::parse(text).ok_or_else(|| {
        Failure::wrong(format!("`{text}` names no result"))
            .hint("it reads `EXPERIMENT/STAGE`, `EXPERIMENT/TRIAL/STAGE` or `FILE.toml/STAGE`")
    })
}

/// Recipe and key.
fn meant(
    target: &Target<'_>,
    text: &str,
    sets: &[String],
    session: &Session,
    store: &Store,
) -> Result<(Digest, Digest), Failure> {
    if target.is_file { planned(target, text, sets, session, store) } else { recorded(target, store) }
}

/// With `--json`, `{recipe, key, digest, path, kind, params, inputs, seconds, attempts, metrics, costs}`.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let Found { target, recipe, store, manifest } = find(&args.target, &args.sets, session)?;
    let output = output(&target, &manifest)?;
    let path = absolute(&store.object(&output.digest))?;
    if session.ui.is_json() {
        return session.ui.json_pretty(&json!({
            "recipe": recipe,
            "key": manifest.key,
            "digest": output.digest,
            "path": path,
            "kind": manifest.parts.kind,
            "params": manifest.params,
            "inputs": manifest.inputs,
            "seconds": manifest.seconds,
            "attempts": manifest.attempts,
            "metrics": manifest.metrics,
            "costs": costs::read(&store.logs(&manifest.key)),
            "accepted": manifest.accepted,
        }));
    }
    session.ui.data(&text(&manifest, &recipe, output, &path, &store))
}

#[expect(clippy::needless_pass_by_value, reason = "it is handed to `map_err`")]
fn failed(error: StoreError) -> Failure {
    Failure::stage(&error)
}

fn no_result(target: &str, why: &str) -> Failure {
    Failure::wrong(format!("`{target}` has no result: {why}")).hint("`pipe run` makes it")
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::failed(format!("cannot resolve `{}`: {error}", path.display())))
}

/// Recipe and key as the file is now.
fn planned(
    target: &Target<'_>,
    text: &str,
    sets: &[String],
    session: &Session,
    store: &Store,
) -> Result<(Digest, Digest), Failure> {
    let experiments = session.read(&[PathBuf::from(target.experiment)], sets)?;
    let plan = session.plan(&experiments, Some(store))?;
    let trials: Vec<_> =
        plan.trials.iter().filter(|trial| target.trial.is_none_or(|wanted| wanted == trial.trial)).collect();
    if trials.is_empty() {
        let known = plan.trials.iter().map(|trial| trial.trial.as_str());
        return Err(unknown("trial", target.trial.unwrap_or_default(), known));
    }
    let nodes: BTreeSet<usize> = trials.iter().filter_map(|trial| trial.stages.get(target.stage).copied()).collect();
    match nodes.len() {
        0 => {
            Err(unknown("stage", target.stage, trials.iter().flat_map(|trial| trial.stages.keys().map(String::as_str))))
        }
        1 => {
            let node = &plan.nodes[*nodes.first().expect("there is one")];
            let key = node.key.clone().ok_or_else(|| no_result(text, "its inputs have not run"))?;
            Ok((node.recipe.clone(), key))
        }
        _ => Err(ambiguous(target.stage, trials.iter().map(|trial| trial.trial.as_str()))),
    }
}

/// Recipe and key of the last run.
fn recorded(target: &Target<'_>, store: &Store) -> Result<(Digest, Digest), Failure> {
    let trials = store.recorded_trials(target.experiment).map_err(failed)?;
    if trials.is_empty() {
        let experiments = store.recorded_experiments().map_err(failed)?;
        if experiments.is_empty() {
            return Err(Failure::wrong(format!("nothing has run in the store `{}`", store.root().display()))
                .hint("`pipe run` fills it; `--store DIR` or PIPE_STORE names another"));
        }
        return Err(unknown("experiment", target.experiment, experiments.iter().map(String::as_str)));
    }
    let wanted: Vec<_> =
        trials.iter().filter(|(trial, _)| target.trial.is_none_or(|wanted| wanted == trial.as_str())).collect();
    if wanted.is_empty() {
        return Err(unknown("trial", target.trial.unwrap_or_default(), trials.keys().map(String::as_str)));
    }
    let found: BTreeSet<(&Digest, &Digest)> = wanted
        .iter()
        .filter_map(|(_, stages)| stages.get(target.stage))
        .map(|record| (&record.recipe, &record.key))
        .collect();
    match found.into_iter().collect::<Vec<_>>()[..] {
        [] => {
            Err(unknown("stage", target.stage, wanted.iter().flat_map(|(_, stages)| stages.keys().map(String::as_str))))
        }
        [(recipe, key)] => Ok((recipe.clone(), key.clone())),
        _ => Err(ambiguous(target.stage, wanted.iter().map(|(trial, _)| trial.as_str()))),
    }
}

fn unknown<'a>(what: &str, wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Failure {
    let known: BTreeSet<&str> = known.into_iter().filter(|name| !name.is_empty()).collect();
    let failure = Failure::wrong(format!("there is no {what} `{wanted}`"));
    let near = render::near(wanted, known.iter().copied());
    if !near.is_empty() {
        return failure.hint(format!("did you mean `{}`?", near.join("` or `")));
    }
    let shown: Vec<&str> = known.iter().copied().take(12).collect();
    let more = if known.len() > shown.len() { ", ..." } else { "" };
    if shown.is_empty() && what == "trial" {
        return failure.hint("nothing is swept there: leave the trial out");
    }
    if shown.is_empty() { failure } else { failure.hint(format!("there are: {}{more}", shown.join(", "))) }
}

fn ambiguous<'a>(stage: &str, trials: impl Iterator<Item = &'a str>) -> Failure {
    let trials: Vec<&str> = trials.collect();
    let shown = trials.iter().take(8).copied().collect::<Vec<_>>().join(", ");
    let more = if trials.len() > 8 { ", ..." } else { "" };
    Failure::wrong(format!("the trials have different results of `{stage}`"))
        .hint(format!("name the trial between two slashes: {shown}{more}"))
}

fn output<'a>(target: &Target<'_>, manifest: &'a Manifest) -> Result<&'a StoredOutput, Failure> {
    let wanted = |output: &&StoredOutput| target.output.is_none_or(|name| name == output.name);
    manifest.outputs.iter().find(wanted).ok_or_else(|| {
        let known = manifest.outputs.iter().map(|output| output.name.as_str());
        unknown(&format!("output of `{}` called", target.stage), target.output.unwrap_or_default(), known)
    })
}

fn text(manifest: &Manifest, recipe: &Digest, output: &StoredOutput, path: &Path, store: &Store) -> String {
    let size: u64 = output.files.iter().map(|file| file.size).sum();
    let mut rows = vec![
        ("kind", manifest.parts.kind.clone()),
        ("output", format!("{} ({}, {})", output.name, output.artifact, render::bytes(size as f64))),
        ("path", path.display().to_string()),
        ("digest", output.digest.to_string()),
        ("key", manifest.key.to_string()),
        ("recipe", recipe.to_string()),
        ("took", {
            let attempts = render::plural(manifest.attempts as usize, "attempt");
            format!("{} in {attempts}, finished {}", render::duration(manifest.seconds), manifest.finished)
        }),
        ("logs", store.logs(&manifest.key).display().to_string()),
    ];
    rows.extend(costs::shown(&costs::read(&store.logs(&manifest.key))));
    if let Some(accepted) = &manifest.accepted {
        let Acceptance { reason, by, when, from, differences, .. } = accepted;
        rows.push(("accepted", format!("{reason} (by {by}, {when}, from {})", from.short())));
        rows.extend(differences.iter().map(|difference| ("", difference.clone())));
        if accepted.original() != from {
            rows.push(("", format!("computed as {}", accepted.original().short())));
        }
    }
    let others: Vec<&str> =
        manifest.outputs.iter().filter(|other| other.name != output.name).map(|other| other.name.as_str()).collect();
    if !others.is_empty() {
        rows.push(("also", others.join(", ")));
    }
    let mut text = rows.into_iter().map(|(name, value)| format!("{name:<8} {value}")).collect::<Vec<_>>();
    let mut section = |title: &str, lines: Vec<(String, String)>| {
        if !lines.is_empty() {
            text.extend([String::new(), title.to_owned()]);
            let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
            text.extend(lines.into_iter().map(|(name, value)| format!("  {name:<width$}  {value}")));
        }
    };
    section("metrics", manifest.metrics.iter().map(|(name, value)| (name.clone(), render::number(*value))).collect());
    section("inputs", manifest.inputs.iter().map(|(name, digest)| (name.clone(), digest.short().to_owned())).collect());
    let mut params = Vec::new();
    flatten("", &manifest.params, &mut params);
    section("params", params);
    section("numerics", manifest.numerics.iter().map(|(name, value)| (name.clone(), value.clone())).collect());
    text.join("\n")
}

/// Parameters as dotted paths; edges and files as their names.
pub(super) fn flatten(path: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for tag in ["$input", "$file"] {
                if let Some(Value::String(name)) = fields.get(tag) {
                    lines.push((path.to_owned(), name.clone()));
                    return;
                }
            }
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                flatten(&path, value, lines);
            }
        }
        other => lines.push((path.to_owned(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read() {
        let target =
            |experiment, is_file, trial, stage, output| Some(Target { experiment, is_file, trial, stage, output });
        assert_eq!(Target::parse("maze/sft"), target("maze", false, None, "sft", None));
        assert_eq!(Target::parse("maze/sft.best"), target("maze", false, None, "sft", Some("best")));
        assert_eq!(
            Target::parse("maze/from=a/b,seed=1/sft"),
            target("maze", false, Some("from=a/b,seed=1"), "sft", None)
        );
        assert_eq!(Target::parse("x/maze.toml/sft"), target("x/maze.toml", true, None, "sft", None));
        assert_eq!(Target::parse("x/maze.toml/seed=1/sft"), target("x/maze.toml", true, Some("seed=1"), "sft", None));
        assert_eq!(Target::parse("maze"), None);
        assert_eq!(Target::parse("maze/"), None);
    }

    #[test]
    fn unknown_names_list_near_ones() {
        let near = unknown("stage", "stf", ["sft", "grpo"]);
        assert_eq!(near.parts().2, ["did you mean `sft`?"]);
        assert_eq!(unknown("stage", "zzz", ["sft", "grpo"]).parts().2, ["there are: grpo, sft"]);
    }

    #[test]
    fn parameters_are_shown_by_path() {
        let mut lines = Vec::new();
        flatten("", &json!({"a": {"b": 1}, "data": {"$input": "tokens", "wants": "tokens"}, "c": [1, 2]}), &mut lines);
        let shown: Vec<String> = lines.into_iter().map(|(path, value)| format!("{path}={value}")).collect();
        assert_eq!(shown, ["a.b=1", "c=[1,2]", "data=tokens"]);
    }
}
