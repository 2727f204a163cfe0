//! `pipe rescore`: stored completions under other rewards, without a model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cli::failure::Failure;
use crate::cli::show::{StageObjects, find};
use crate::cli::{Session, render};
use crate::pipeline::stage::ArtifactType;
use crate::rewards::{Outcome, RewardSpec, Scorer};
use crate::stages::samples::{Sample, Samples};
use crate::stages::table::{Column, ColumnType, TableWriter};
use crate::stages::tokens::{ROWS_FILE, TokensFolder};
use crate::statistics::components::{Component, describe, rank_correlation, variance_shares};
use crate::tasks::Measure;

/// Score the completions that a stage has stored under other rewards
///
/// Every completion of a training is kept with what the task measured of it, so that another reward is tried in seconds
/// and without a model. It shows what each reward is worth: the share of it in the variance of the total within groups,
/// how well it tells solved from unsolved, and how far the ranks of the new totals agree with the stored ones.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `EXPERIMENT[/TRIAL]/STAGE` of a `grpo` or `evaluate` stage, or `FILE.toml[/TRIAL]/STAGE`
    #[arg(value_name = "RESULT")]
    target: String,
    /// A TOML file with `[rewards.NAME]` tables, as a `grpo` stage has them
    #[arg(long, value_name = "FILE")]
    rewards: PathBuf,
    /// Write the scores of every completion to this Parquet file
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RewardsFile {
    rewards: BTreeMap<String, RewardSpec>,
}

/// What is said of one reward.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) weight: f64,
    #[serde(flatten)]
    pub(super) component: Component,
    pub(super) abstained: usize,
    pub(super) errors: usize,
}

#[derive(Serialize)]
struct Report<'a> {
    target: &'a str,
    completions: usize,
    groups: usize,
    without_total: usize,
    rewards: Vec<Line>,
    /// Spearman's correlation of new and stored totals.
    rank_agreement: Option<f64>,
    /// Groups whose samples do not all have the same rewards.
    informative: Informative,
}

#[derive(Serialize)]
struct Informative {
    before: usize,
    after: usize,
}

/// With `--json`, one object.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let specs = read_rewards(&args.rewards)?;
    let samples = stored(&find(&args.target, &[], session)?.result())?;
    check(&specs, &samples.measures, &args.rewards)?;
    let mut scorer = Scorer::new(&specs, None).map_err(|error| Failure::input(&error))?;
    let inputs: Vec<_> = samples.rows.iter().map(Sample::input).collect();
    let outcomes = scorer.score(&inputs).map_err(|error| Failure::stage(&error))?;
    let totals: Vec<Option<f64>> = outcomes.iter().map(|outcomes| scorer.total(outcomes)).collect();
    let lines = lines(&scorer, &samples, &outcomes);
    let pairs = samples.rows.iter().zip(&totals).filter_map(|(row, total)| row.total.zip(*total));
    let (before, after): (Vec<f64>, Vec<f64>) = pairs.unzip();
    let informative = |differ: &dyn Fn(usize, usize) -> bool| {
        samples.groups.iter().filter(|group| group.iter().any(|at| differ(group[0], *at))).count()
    };
    let report = Report {
        target: &args.target,
        completions: samples.rows.len(),
        groups: samples.groups.len(),
        without_total: totals.iter().filter(|total| total.is_none()).count(),
        rewards: lines,
        rank_agreement: rank_correlation(&before, &after),
        informative: Informative {
            before: informative(&|first, other| samples.rows[first].rewards != samples.rows[other].rewards),
            after: informative(&|first, other| outcomes[first] != outcomes[other]),
        },
    };
    if let Some(output) = &args.output {
        write(output, &scorer, &samples, &outcomes, &totals)
            .map_err(|error| Failure::stage(error.as_ref()).hint("the file must not be there yet"))?;
    }
    if session.ui.is_json() {
        return session.ui.json_pretty(&report);
    }
    session.ui.data(&text(&report, session.ui.output_width()))
}

/// The completions of a result, with structured instances where an input has them.
pub(super) fn stored(found: &StageObjects<'_>) -> Result<Samples, Failure> {
    let kinds = [ArtifactType::Rollouts, ArtifactType::Evaluation];
    let output = found.manifest.outputs.iter().find(|output| kinds.contains(&output.artifact)).ok_or_else(|| {
        Failure::wrong(format!("a `{}` stage stores no completions", found.manifest.parts.kind))
            .hint("name a `grpo` or an `evaluate` stage")
    })?;
    let mut instances: BTreeMap<String, Value> = BTreeMap::new();
    for digest in found.manifest.inputs.values() {
        let folder = found.store.object(digest);
        if output.artifact == ArtifactType::Rollouts && folder.join(ROWS_FILE).exists() {
            let tokens = TokensFolder::open(&folder).map_err(|error| Failure::stage(error.as_ref()))?;
            tokens.read_texts().map_err(|error| Failure::stage(error.as_ref()))?;
            for (row, about) in tokens.rows.iter().enumerate() {
                let data = tokens.data(row).map_err(|error| Failure::stage(error.as_ref()))?;
                instances.extend(data.map(|data| (about.instance.to_string(), data.clone())));
            }
        }
    }
    Samples::open(&found.store.object(&output.digest), &instances).map_err(|error| Failure::stage(error.as_ref()))
}

fn read_rewards(path: &Path) -> Result<BTreeMap<String, RewardSpec>, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::wrong(format!("cannot read `{}`: {error}", path.display())))?;
    let file: RewardsFile = toml::from_str(&text).map_err(|error| {
        Failure::wrong(format!("`{}` is no file of rewards: {}", path.display(), error.to_string().trim_end()))
            .hint("it has tables `[rewards.NAME]`, as a `grpo` stage has them")
    })?;
    let folder = std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned)).unwrap_or_default();
    let mut rewards = file.rewards;
    for spec in rewards.values_mut() {
        if let RewardSpec::Program { files, .. } = spec {
            for file in files {
                file.path = folder.join(&file.path);
            }
        }
    }
    if rewards.is_empty() {
        return Err(Failure::wrong(format!("`{}` has no reward", path.display())));
    }
    Ok(rewards)
}

fn check(specs: &BTreeMap<String, RewardSpec>, measures: &[String], path: &Path) -> Result<(), Failure> {
    let measures: Vec<Measure> =
        measures.iter().map(|name| Measure { name: name.clone().into(), meaning: "".into() }).collect();
    for (name, spec) in specs {
        if let Some((field, message, hint)) = spec.check(&measures).into_iter().next() {
            let place = if field.is_empty() { format!("rewards.{name}") } else { format!("rewards.{name}.{field}") };
            let failure = Failure::wrong(format!("`{place}` in `{}`: {message}", path.display()));
            return Err(match hint {
                Some(hint) => failure.hint(hint),
                None => failure,
            });
        }
    }
    Ok(())
}

/// What is to be said of each reward over stored completions.
pub(super) fn lines(scorer: &Scorer, samples: &Samples, outcomes: &[Vec<Outcome>]) -> Vec<Line> {
    let solved: Vec<f64> =
        samples.rows.iter().map(|row| row.measurements.get("solved").copied().unwrap_or(0.0)).collect();
    let contributions: Vec<Vec<f64>> = outcomes
        .iter()
        .map(|outcomes| {
            let pairs = scorer.weights().iter().zip(outcomes);
            pairs.map(|(weight, outcome)| weight * outcome.value().unwrap_or(0.0)).collect()
        })
        .collect();
    let counted = |group: &Vec<usize>| -> Vec<usize> {
        group.iter().copied().filter(|at| scorer.total(&outcomes[*at]).is_some()).collect()
    };
    // An evaluation has one completion a prompt: its variance is that between prompts.
    let mut groups: Vec<Vec<usize>> = samples.groups.iter().map(counted).collect();
    if samples.groups.iter().all(|group| group.len() == 1) {
        groups = vec![groups.concat()];
    }
    let shares = variance_shares(&contributions, &groups);
    let names = scorer.names().iter().zip(scorer.weights()).enumerate();
    names
        .map(|(place, (name, weight))| {
            let own: Vec<&Outcome> = outcomes.iter().map(|outcomes| &outcomes[place]).collect();
            let values: Vec<Option<f64>> = own.iter().map(|outcome| outcome.value()).collect();
            let mut component = describe(&values, &solved);
            component.variance_share = shares.as_ref().map(|shares| shares[place]);
            Line {
                name: name.clone(),
                weight: *weight,
                component,
                abstained: own.iter().filter(|outcome| ***outcome == Outcome::Abstain).count(),
                errors: own.iter().filter(|outcome| outcome.error().is_some()).count(),
            }
        })
        .collect()
}

fn write(
    path: &Path,
    scorer: &Scorer,
    samples: &Samples,
    outcomes: &[Vec<Outcome>],
    totals: &[Option<f64>],
) -> anyhow::Result<()> {
    use ColumnType::{Integer, Number, Text};
    let rewards: Vec<String> = scorer.names().iter().map(|name| format!("reward_{name}")).collect();
    let mut columns = vec![("step", Integer), ("instance", Text), ("sample", Integer), ("solved", Number)];
    columns.extend(rewards.iter().map(|name| (name.as_str(), Number)));
    columns.extend([("total", Number), ("stored_total", Number), ("reward_errors", Text)]);
    let rows = &samples.rows;
    let mut values = vec![
        Column::integer(rows.iter().map(|row| row.step)),
        Column::text(rows.iter().map(|row| row.instance.clone())),
        Column::integer(rows.iter().map(|row| row.sample)),
        Column::Number(rows.iter().map(|row| row.measurements.get("solved").copied()).collect()),
    ];
    values.extend(
        (0..rewards.len()).map(|at| Column::Number(outcomes.iter().map(|outcomes| outcomes[at].value()).collect())),
    );
    values.push(Column::Number(totals.to_vec()));
    values.push(Column::Number(rows.iter().map(|row| row.total).collect()));
    let errors = outcomes.iter().map(|outcomes| {
        let named = scorer.names().iter().zip(outcomes);
        let errors: Vec<String> = named.filter_map(|(name, one)| Some(format!("{name}: {}", one.error()?))).collect();
        (!errors.is_empty()).then(|| errors.join("; "))
    });
    values.push(Column::Text(errors.collect()));
    let mut table = TableWriter::create(path, &columns)?;
    table.write(values)?;
    table.finish()
}

/// The table of what each reward is worth.
pub(super) fn table(lines: &[Line], width: Option<u16>) -> String {
    let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), render::number);
    let share =
        |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |share| format!("{} %", render::percent(share)));
    let rows = lines.iter().map(|line| {
        let one = &line.component;
        let mut row = vec![line.name.clone(), render::number(line.weight), shown(one.mean), shown(one.deviation)];
        row.extend([share(one.variance_share), shown(one.auc), shown(one.correlation)]);
        row.extend([line.abstained.to_string(), line.errors.to_string()]);
        row
    });
    let header = ["reward", "weight", "mean", "std", "variance share", "AUC", "correlation", "abstained", "errors"];
    render::columns(&header, &[1, 2, 3, 4, 5, 6, 7, 8], rows.collect(), width)
}

fn text(report: &Report<'_>, width: Option<u16>) -> String {
    let Informative { before, after } = report.informative;
    let agreement = report.rank_agreement.map_or_else(|| "-".to_owned(), render::number);
    format!(
        "{} of {}\n\n{}\n\nAUC and correlation are with `solved`; ranks of the totals agree with the stored ones by \
         {agreement} (Spearman)\ngroups with something to learn from: {before} before, {after} after; without a total: {}",
        render::plural(report.completions, "completion"),
        render::plural(report.groups, "group"),
        table(&report.rewards, width).trim_end(),
        report.without_total
    )
}
