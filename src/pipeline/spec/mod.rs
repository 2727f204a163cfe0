//! Reading pipelines and experiments: TOML text to checked values, every mistake with its place, all in one pass.
//!
//! ```text
//! parse        text               ->  spanned tree        syntax, duplicates, numbers that JSON would merge
//! compose      files, --set       ->  one document        extends, pipeline beneath, overlays, `false` drops
//! sweep        document           ->  assignments         axes multiply, trials get their names
//! interpolate  document, params   ->  document            `${params.x}`
//! walk         stage, shape       ->  JSON, edges         unknown, missing, mistyped, out of range, files
//! graph        stages, edges      ->  sound stages        dangling, wrongly typed, cycles
//! metrics      stages, names      ->  nothing             metrics that no stage measures
//! ```
//!
//! It knows no kind by name: kinds are an argument, and their JSON Schemas say what their tables may hold.

mod compose;
mod diagnostic;
mod format;
mod graph;
mod interpolate;
mod metrics;
pub mod origin;
mod parse;
pub mod point;
mod resolve;
mod resolved;
mod schema;
mod shape;
mod size;
mod source;
mod sweep;
mod table;
#[cfg(test)]
mod testing;
mod tree;
pub mod tune;
mod walk;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::pipeline::spec::compose::Composer;
use crate::pipeline::spec::diagnostic::Mistake;
pub use crate::pipeline::spec::diagnostic::{Diagnostic, Diagnostics};
pub use crate::pipeline::spec::format::format;
pub use crate::pipeline::spec::resolved::{resolved, resolved_stage, resolved_value};
pub use crate::pipeline::spec::schema::{SchemaKind, schema};
pub use crate::pipeline::spec::size::parse_size;
use crate::pipeline::spec::tune::{Purpose, Tuning};
use crate::pipeline::stage::{AnyStage, Kind, RunOptions};

/// An experiment as its files say it, with every trial resolved and checked.
#[derive(Clone)]
pub struct Experiment {
    /// The stem of its file.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// What it asks, in the user's words; may be empty.
    pub description: String,
    /// One element a combination of swept values; one without a name where nothing is swept. Where arms are tuned, those
    /// that tune, and those that report as far as [`Experiment::choose`] was told what.
    pub trials: Vec<Trial>,
    /// What `pipe table` shows.
    pub table: TableSpec,
    /// After so many failed trials a run begins no further stage; none goes on to the end.
    pub max_failures: Option<usize>,
    /// What is chosen for each arm before it is reported.
    pub tuning: Option<Tuning>,
}

/// The `[table]` of an experiment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableSpec {
    /// `stage.metric` or `stage.curve[@point]`, in the order to show; empty shows every metric of every evaluation.
    pub metrics: Vec<String>,
    /// The assignment of the arm that others are compared with; fixes every axis but the seeds.
    pub baseline: Option<BTreeMap<String, Value>>,
    /// Pairs of `stage.metric` whose paired difference (first minus second) is shown within each arm.
    pub differences: Vec<(String, String)>,
}

/// One combination of swept values.
#[derive(Clone)]
pub struct Trial {
    /// The sorted assignment as `seed=1,beta=0.01` (last path segments, full paths where those collide); empty unswept.
    pub name: String,
    /// The same without the seeds: the arm.
    pub arm: String,
    /// Path to value, seeds included.
    pub assignment: BTreeMap<String, Value>,
    /// The seed of this trial, where `sweep.seeds` is used.
    pub seed: Option<Value>,
    /// Whether its results are reported or choose what is.
    pub purpose: Purpose,
    /// Stages by name.
    pub stages: BTreeMap<String, StageSpec>,
}

/// A stage of a trial, resolved, parsed and checked.
#[derive(Clone)]
pub struct StageSpec {
    /// Its name in the file.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// Its parameters.
    pub stage: Arc<dyn AnyStage>,
    /// Its `run` table.
    pub run: RunOptions,
    /// Where the stage is declared, for messages.
    pub origin: Origin,
}

/// A place in a file of the user's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// The file, as it was named.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

/// Every file that reading these experiments reads, by its absolute path: themselves, what they extend, their pipelines.
pub fn sources(files: &[PathBuf]) -> BTreeSet<PathBuf> {
    let mut composer = Composer::new(&[]);
    for file in files {
        composer.experiment(file);
    }
    composer.paths()
}

/// The absolute path by which a file is known: its folder with symbolic links followed, then its own name.
pub fn absolute_path(path: &Path) -> std::io::Result<PathBuf> {
    source::absolute(path)
}

/// Reads experiments (or pipelines, as experiments of one unnamed trial) with `sets` (`path=value`) laid over each.
///
/// Every mistake of every file is found before any is told.
pub fn read(files: &[PathBuf], sets: &[String], kinds: &'static [Kind]) -> Result<Vec<Experiment>, Diagnostics> {
    let mut composer = Composer::new(sets);
    let mut experiments: Vec<Experiment> = Vec::new();
    let mut names: HashMap<String, PathBuf> = HashMap::new();
    for file in files {
        let Some(document) = composer.experiment(file) else { continue };
        if let Some(other) = names.insert(document.name.clone(), file.clone()) {
            let mistake = Mistake::at(document.span, format!("two experiments are called `{}`", document.name));
            let hint =
                format!("the other is `{}`; an experiment is called as its file, so rename one", other.display());
            composer.report.add(mistake.hint(hint).about("name"));
        }
        experiments.push(resolve::experiment(&document, kinds, &composer.sources, &mut composer.report));
    }
    if composer.report.is_empty() { Ok(experiments) } else { Err(composer.report.finish(&composer.sources)) }
}

/// The time that a text such as `500ms`, `30s`, `5m` or `1h` means.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a time such as `30s`, `5m` or `1h`");
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let count: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match &text[digits..] {
        "ms" => return Ok(Duration::from_millis(count)),
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    count.checked_mul(unit).map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::spec::testing::{Files, KINDS, PIPELINE, mistakes};

    #[test]
    fn a_pipeline_is_an_experiment_of_one_trial() {
        let files = Files::new(&[("maze.toml", PIPELINE)]);
        let experiment = files.good("maze.toml", &[]);
        assert_eq!(experiment.name, "maze");
        let [trial] = experiment.trials.as_slice() else { panic!("one trial") };
        assert_eq!((trial.name.as_str(), trial.arm.as_str(), &trial.seed), ("", "", &None));
        let train = &trial.stages["train"];
        assert_eq!((train.kind.name, train.run.cpus, train.run.save_every.as_str()), ("train", 2, "30s"));
        assert_eq!((train.origin.line, train.origin.column), (10, 9));
        let params = train.stage.params();
        assert_eq!(params["learning_rate"], serde_json::json!(1e-3));
        assert_eq!(params["data"], serde_json::json!({"$input": "data", "wants": "dataset"}));
    }

    #[test]
    fn five_mistakes_are_told_in_one_pass() {
        insta::assert_snapshot!(mistakes(r#"[stages.data]
kind = "draw"
task = { kind = "maze", rows = 1 }

[stages.train]
kind = "train"
data = "dta"
stps = 10
optimizer = { beta = "high" }

[stages.score]
kind = "scor"
model = "train"
"#), @r#"
            error: `task.rows` is out of range in stage `data`
             --> a.toml:3:32
            3 | task = { kind = "maze", rows = 1 }
              |                                ^ expected at least 2 and at most 100

            error: unknown stage `dta` in `data` of stage `train`
             --> a.toml:7:8
            7 | data = "dta"
              |        ^^^^^ expected one of `data`, `score`
            hint: did you mean `data`?

            error: unknown field `stps` in stage `train`
             --> a.toml:8:1
            8 | stps = 10
              | ^^^^ expected one of `data`, `learning_rate`, `note`, `optimizer`, `rewards`, `seed`, `start`, `steps`, `validate`
            hint: did you mean `steps`?

            error: wrong type of `optimizer.beta` in stage `train`
             --> a.toml:9:22
            9 | optimizer = { beta = "high" }
              |                      ^^^^^^ expected a number, found a string

            error: unknown kind `scor` of stage `score`
              --> a.toml:12:8
            12 | kind = "scor"
               |        ^^^^^^ expected one of `draw`, `train`, `score`
            hint: did you mean `score`?
        "#);
    }

    #[test]
    fn syntax_errors_hide_nothing_and_invent_nothing() {
        insta::assert_snapshot!(mistakes(r#"[stages.data]
kind = "draw"
task = { kind = "maze", rows = 5
seed = -1

[stages.train]
kind = "train"
data "data"
steps = 1.0
steps = 2

[stages.score
kind = "score"
model = "train"

[stages.again]
kind = "score"
model = "scored"
"#), @r#"
            error: broken TOML: unclosed array or inline table
             --> a.toml:3:1
            3 | task = { kind = "maze", rows = 5
              | ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^

            error: `seed` is out of range in stage `data`
             --> a.toml:4:8
            4 | seed = -1
              |        ^^ expected at least 0

            error: broken TOML: key with no value
             --> a.toml:8:6
            8 | data "data"
              |      ^ expected `=`

            error: wrong type of `steps` in stage `train`
             --> a.toml:9:9
            9 | steps = 1.0
              |         ^^^ expected an integer, found a float
            hint: write it as an integer: `1`

            error: duplicate key `steps`
              --> a.toml:10:1
            10 | steps = 2
               | ^^^^^ already given above

            error: broken TOML: unclosed table
              --> a.toml:12:14
            12 | [stages.score
               |              ^ expected `]`
        "#);
    }

    #[test]
    fn experiments_of_one_name_and_unreadable_files_are_mistakes() {
        let files = Files::new(&[("a.toml", PIPELINE), ("b/a.toml", PIPELINE)]);
        let message = files.read(&["a.toml", "b/a.toml", "none.toml"], &[]).err().unwrap();
        insta::assert_snapshot!(message, @r#"
            error: cannot read `none.toml`: there is no such file

            error: two experiments are called `a`
             --> b/a.toml:1:1
            1 | [params]
              | ^
            hint: the other is `a.toml`; an experiment is called as its file, so rename one
        "#);
    }

    #[test]
    fn a_shared_pipelines_mistake_is_told_once() {
        let wrong = PIPELINE.replace("steps", "stepz");
        let uses = "pipeline = \"p.toml\"\n[sweep]\nseeds = { path = \"params.seed\", values = [1, 2, 3] }\n";
        let files = Files::new(&[("p.toml", &wrong), ("a.toml", uses), ("b.toml", uses)]);
        let message = files.read(&["a.toml", "b.toml", "p.toml"], &[]).err().unwrap();
        assert_eq!(message.matches("error: unknown field `stepz`").count(), 1, "{message}");
        assert_eq!(message.matches("error:").count(), 1, "{message}");
    }

    #[test]
    fn thousands_of_stages_are_read_quickly() {
        let mut text =
            String::from("[params]\nseed = 1\n[stages.data]\nkind = \"draw\"\ntask = { kind = \"maze\", rows = 5 }\n");
        for index in 0..5000 {
            let start = if index == 0 { String::new() } else { format!("start = \"t{}\"\n", index - 1) };
            text.extend([format!(
                "[stages.t{index}]\nkind = \"train\"\ndata = \"data\"\nsteps = 5\nseed = \"${{params.seed}}\"\n{start}\
                 rewards.correct = {{ kind = \"correct\", weight = {index}.5 }}\n"
            )]);
        }
        let files = Files::new(&[("long.toml", &text)]);
        let begin = std::time::Instant::now();
        let experiment = files.good("long.toml", &[]);
        let taken = begin.elapsed();
        assert_eq!(experiment.trials[0].stages.len(), 5001);
        // Generous for an unoptimised build on a busy machine; a quadratic walk would take minutes.
        assert!(taken < Duration::from_secs(60), "{taken:?}");
    }

    #[test]
    fn durations() {
        let seconds = |text: &str| parse_duration(text).map(|duration| duration.as_secs_f64());
        assert_eq!(seconds("30s"), Ok(30.0));
        assert_eq!(seconds("5m"), Ok(300.0));
        assert_eq!(seconds("1h"), Ok(3600.0));
        assert_eq!(seconds("500ms"), Ok(0.5));
        for wrong in ["", "30", "s", "1.5h", "-1s", "1d", "99999999999999999999s", "9999999999999999999h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_resolved_configuration_reads_again() {
        let files = Files::new(&[("maze.toml", PIPELINE)]);
        let text = resolved(&files.good("maze.toml", &[]).trials[0]);
        let again = Files::new(&[("again.toml", &text)]);
        assert_eq!(resolved(&again.good("again.toml", &[]).trials[0]), text);
        assert!(text.contains("beta = 0.9") && text.contains("[stages.train.optimizer]"), "{text}");
    }

    #[test]
    fn a_diagnostic_is_json_with_its_place() {
        let files = Files::new(&[("a.toml", "[stages.a]\nkind = 1\n")]);
        let diagnostics = read(&[files.path("a.toml")], &[], KINDS).err().unwrap();
        let json = serde_json::to_value(&diagnostics).unwrap();
        assert_eq!((json[0]["line"].clone(), json[0]["column"].clone()), (2.into(), 8.into()));
    }
}
