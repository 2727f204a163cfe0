//! `pipe audit rewards`: what a reward pays for, before anything is trained on it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::cli::failure::Failure;
use crate::cli::rescore::{Line, lines, stored, table};
use crate::cli::show::{StageObjects, find};
use crate::cli::{Session, render};
use crate::pipeline::plan::{Plan, PlannedTrial};
use crate::pipeline::store::{Lookup, Store};
use crate::rewards::{Outcome, RewardSpec, ScoreError, Scorer};
use crate::stages::grpo::Grpo;
use crate::stages::samples::{Sample, Samples};
use crate::tasks::probes::{Probe, pieces, probes};
use crate::tasks::{Finish, FormatSpec, Measurements, Reply, Start, Task, TaskSpec, open};

/// Look for what rewards pay for although nothing is solved, before training on them
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Rewards(Rewards),
}

/// Audit the rewards of a `grpo` stage
///
/// Answers that no honest model gives (spam, loops, walks that overshoot, nothing at all) are played on some instances and
/// scored, and so are stored completions of the model that the stage starts from, where an `evaluate` stage of that model
/// is in the store. Shown are what each reward is worth, and the most that an answer earns without solving.
#[derive(Debug, clap::Args)]
struct Rewards {
    /// An experiment or pipeline file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The stage, where there are several of kind `grpo`
    #[arg(long, value_name = "STAGE")]
    stage: Option<String>,
    /// Completions to score: `EXPERIMENT[/TRIAL]/STAGE` of an `evaluate` or `grpo` stage
    #[arg(long, value_name = "RESULT")]
    completions: Option<String>,
    /// Instances that adversarial answers are played on
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u64).range(2..=1000))]
    instances: u64,
    /// Exit with 1 where an unsolved answer earns more than the mean solved one
    #[arg(long)]
    deny: bool,
    /// Lay a value over the file, as for `pipe run`
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
}

#[derive(Serialize)]
struct Report {
    experiment: String,
    trial: String,
    stage: String,
    /// Adversarial answers that were played.
    answers: usize,
    /// Stored completions that were scored besides.
    completions: usize,
    /// Over the stored completions, or else over demonstrations and adversarial answers.
    rewards: Vec<Line>,
    /// What each reward pays unsolved answers, by name.
    holes: BTreeMap<String, Hole>,
    /// The same of the total.
    total: Hole,
    /// Outcomes that were errors.
    errors: usize,
}

/// What may be earned without solving, weighted.
#[derive(Clone, Debug, Default, Serialize)]
struct Hole {
    /// The most that an unsolved answer earns.
    unsolved: Option<f64>,
    /// The mean that solved answers earn.
    mean_solved: Option<f64>,
    /// The most that any answer earns.
    most: Option<f64>,
    /// Whether an unsolved answer earns at least what solved ones do on average, and more than the least that is earned.
    pays_unsolved: bool,
    /// The answer that earns the most unsolved: its family, and what it says.
    answer: Option<Answer>,
}

#[derive(Clone, Debug, Serialize)]
struct Answer {
    family: String,
    completion: String,
    prompt: String,
}

/// Exit code 0 whatever it finds, but for `--deny`. With `--json`, an array with an element for each set of rewards.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let What::Rewards(args) = &args.what;
    let experiments = session.read(std::slice::from_ref(&args.file), &args.sets)?;
    let store = session.existing_store()?;
    let plan = session.plan(&experiments, store.as_ref())?;
    let mut seen = Vec::new();
    let mut reports = Vec::new();
    for trial in &plan.trials {
        let (name, params) = stage_of(args, &plan, trial)?;
        let (task, format) = task_of(&plan, trial, &params)?;
        // Trials that differ in neither rewards nor task have one audit.
        let subject = serde_json::json!([params.rewards, task, format]);
        if !seen.contains(&subject) {
            seen.push(subject);
            let task = open(&task, &format).map_err(|error| Failure::wrong(format!("{error:#}")))?;
            let completions = completions(args, session, &plan, trial, &params, store.as_ref())?;
            let report = audit(args.instances, task.as_ref(), &params, completions.as_ref())?;
            reports.push(Report {
                experiment: trial.experiment.clone(),
                trial: trial.trial.clone(),
                stage: name,
                ..report
            });
        }
    }
    if session.ui.is_json() {
        session.ui.json_pretty(&reports)?;
    } else {
        for report in &reports {
            session.ui.data(&text(report, session.ui.output_width()))?;
        }
    }
    if args.deny && reports.iter().any(|report| report.total.pays_unsolved) {
        return Err(Failure::failed("an unsolved answer earns as much as the mean solved one")
            .hint("lower the weight of the reward that is named as a hole, or pay for it only when `solved`"));
    }
    Ok(())
}

/// The stage to audit and its parameters.
fn stage_of(args: &Rewards, plan: &Plan, trial: &PlannedTrial) -> Result<(String, Grpo), Failure> {
    let of_kind = |(_, node): &(&String, &usize)| plan.nodes[**node].spec.kind.name == "grpo";
    let names: Vec<&String> = trial.stages.iter().filter(of_kind).map(|(name, _)| name).collect();
    let listed = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let name = match (&args.stage, &names[..]) {
        (Some(wanted), _) => names.iter().copied().find(|name| *name == wanted).ok_or_else(|| {
            Failure::wrong(format!("`{wanted}` is no stage of kind `grpo`")).hint(format!("there are: {listed}"))
        })?,
        (None, [one]) => one,
        (None, []) => return Err(Failure::wrong(format!("`{}` has no stage of kind `grpo`", args.file.display()))),
        (None, _) => {
            return Err(Failure::wrong(format!("there are several stages of kind `grpo`: {listed}"))
                .hint("name one with `--stage`"));
        }
    };
    let params = plan.nodes[trial.stages[name]].spec.stage.params();
    let params = serde_json::from_value(params).map_err(|error| Failure::failed(format!("stage `{name}`: {error}")))?;
    Ok((name.clone(), params))
}

/// The task and the format behind the stage's prompts.
fn task_of(plan: &Plan, trial: &PlannedTrial, params: &Grpo) -> Result<(TaskSpec, FormatSpec), Failure> {
    let stages: BTreeMap<String, Value> =
        trial.stages.iter().map(|(name, node)| (name.clone(), plan.nodes[*node].spec.stage.params())).collect();
    let upstream = crate::pipeline::stage::Upstream { stages: &stages };
    let nearest = |field| upstream.nearest(&params.prompts.reference, field).cloned();
    let task = nearest("task").and_then(|task| serde_json::from_value(task).ok());
    let task = task.ok_or_else(|| Failure::wrong("the prompts have no task, so that no answer can be judged"))?;
    let format = nearest("format").and_then(|format| serde_json::from_value(format).ok()).unwrap_or_default();
    Ok((task, format))
}

/// The completions that were asked for, or those of an evaluation of the model that the stage starts from.
fn completions(
    args: &Rewards,
    session: &Session,
    plan: &Plan,
    trial: &PlannedTrial,
    params: &Grpo,
    store: Option<&Store>,
) -> Result<Option<Samples>, Failure> {
    if let Some(target) = &args.completions {
        return stored(&find(target, &[], session)?.result()).map(Some);
    }
    let Some(store) = store else { return Ok(None) };
    // A stage that goes on from another starts from that one's last weights, its default output.
    let starts = match (&params.model, &params.continue_from) {
        (Some(model), _) => vec![model.reference.clone()],
        (None, Some(from)) => {
            let stage = from.reference.split('.').next().unwrap_or_default();
            vec![stage.to_owned(), format!("{stage}.last")]
        }
        (None, None) => Vec::new(),
    };
    for node in trial.stages.values().map(|node| &plan.nodes[*node]) {
        let model = node.spec.stage.params()["model"]["$input"].as_str().map(str::to_owned);
        let fits = node.spec.kind.name == "evaluate" && model.is_some_and(|model| starts.contains(&model));
        if let Some(result) = node.result.as_ref().filter(|_| fits) {
            let found = store.lookup(&result.key).map_err(|error| Failure::stage(&error))?;
            let Lookup::Hit(manifest) = found else { continue };
            return stored(&StageObjects { store, manifest: &manifest }).map(Some);
        }
    }
    Ok(None)
}

fn audit(instances: u64, task: &dyn Task, params: &Grpo, completions: Option<&Samples>) -> Result<Report, Failure> {
    let failed = |error: ScoreError| Failure::stage(&error);
    let mut scorer = Scorer::new(&params.rewards, None).map_err(failed)?;
    let counts = params.rewards.values().any(RewardSpec::reads_lengths);
    let (probed, families) = probed(instances, task, counts).map_err(|error| Failure::stage(error.as_ref()))?;
    let mut score = |samples: &Samples| {
        let inputs: Vec<_> = samples.rows.iter().map(Sample::input).collect();
        scorer.score(&inputs).map_err(failed)
    };
    let of_probes = score(&probed)?;
    let of_completions = completions.map(&mut score).transpose()?;
    let stored = completions.zip(of_completions.as_ref());
    let scored: Vec<(&Sample, &[Outcome], &str)> = probed
        .rows
        .iter()
        .zip(&of_probes)
        .zip(&families)
        .map(|((sample, outcomes), family)| (sample, outcomes.as_slice(), *family))
        .chain(stored.into_iter().flat_map(|(samples, outcomes)| {
            samples.rows.iter().zip(outcomes).map(|(sample, outcomes)| (sample, outcomes.as_slice(), "completion"))
        }))
        .collect();
    let holes = scorer.names().iter().zip(scorer.weights()).enumerate().map(|(at, (name, weight))| {
        (name.clone(), hole(&scored, |outcomes| outcomes[at].value().map(|value| weight * value)))
    });
    Ok(Report {
        experiment: String::new(),
        trial: String::new(),
        stage: String::new(),
        answers: families.iter().filter(|family| **family != DEMONSTRATION).count(),
        completions: completions.map_or(0, |samples| samples.rows.len()),
        rewards: stored.map_or_else(
            || lines(&scorer, &probed, &of_probes),
            |(samples, outcomes)| lines(&scorer, samples, outcomes),
        ),
        holes: holes.collect(),
        total: hole(&scored, |outcomes| scorer.total(outcomes)),
        errors: scored.iter().flat_map(|(_, outcomes, _)| *outcomes).filter(|one| one.error().is_some()).count(),
    })
}

/// How an honest answer is called.
const DEMONSTRATION: &str = "demonstration";

/// Demonstrations and adversarial answers as they were played, and the family of each.
///
/// Tokens are counted only where a reward wants them, and in the task's own vocabulary: there is no tokenizer here.
fn probed(instances: u64, task: &dyn Task, counts: bool) -> anyhow::Result<(Samples, Vec<&'static str>)> {
    let drawn = task.generate(0, 0..instances)?;
    let vocabulary = task.vocabulary();
    let (mut samples, mut families) = (Samples::default(), Vec::new());
    for (place, instance) in drawn.iter().enumerate() {
        let other = &drawn[(place + 1) % drawn.len()];
        let mut asked = probes(task, instance, Some(other), place as u64);
        if let Ok(replies) = task.demonstrate(instance, 0) {
            let finish = Finish::Stop;
            asked.insert(0, Probe { family: DEMONSTRATION, replies, finish });
        }
        let begin = samples.rows.len();
        samples.rows.extend(played(task, instance, &asked, counts.then_some(&vocabulary[..]))?);
        samples.groups.push((begin..samples.rows.len()).collect());
        families.extend(asked.iter().map(|probe| probe.family));
    }
    Ok((samples, families))
}

/// Plays answers to one instance side by side; with a vocabulary, their tokens are counted.
fn played(
    task: &dyn Task,
    instance: &Value,
    asked: &[Probe],
    vocabulary: Option<&[String]>,
) -> anyhow::Result<Vec<Sample>> {
    let starts = vec![Start { instance, seed: 0 }; asked.len()];
    let mut episodes = task.begin(&starts)?;
    let prompts = episodes.observe()?;
    let mut turns: Vec<Vec<Measurements>> = vec![Vec::new(); asked.len()];
    let mut completions = vec![String::new(); asked.len()];
    let mut lengths: Vec<Vec<u64>> = vec![Vec::new(); asked.len()];
    let mut going: Vec<usize> = (0..asked.len()).collect();
    for turn in 0..task.max_turns() {
        let said: Vec<Reply<'_>> = going
            .iter()
            .filter_map(|&episode| {
                let probe = &asked[episode];
                let text = probe.replies.get(turn).or(probe.replies.last())?;
                Some(Reply { episode, text, finish: probe.finish })
            })
            .collect();
        if said.is_empty() {
            break;
        }
        let mut next = Vec::new();
        for (reply, came) in said.iter().zip(episodes.step(&said)?) {
            completions[reply.episode].push_str(reply.text);
            if let Some(vocabulary) = vocabulary {
                let ends = u64::from(reply.finish == Finish::Stop);
                lengths[reply.episode].push(pieces(reply.text, vocabulary).len() as u64 + ends);
            }
            turns[reply.episode].push(came.measurements);
            if !came.terminated && !came.truncated {
                completions[reply.episode].push_str(&came.observation);
                next.push(reply.episode);
            }
        }
        going = next;
    }
    let verdicts = episodes.verdicts()?.into_iter();
    let parts = verdicts.zip(turns).zip(completions).zip(lengths).zip(prompts).zip(asked);
    Ok(parts
        .map(|(((((measurements, turns), completion), lengths), prompt), probe)| Sample {
            step: 0,
            sample: 0,
            instance: String::new(),
            data: instance.clone(),
            prompt,
            completion,
            finish: probe.finish,
            truncated: probe.finish == Finish::Length,
            measurements,
            turns,
            lengths,
            ids: Vec::new(),
            replies: Vec::new(),
            kept: true,
            rewards: Vec::new(),
            total: None,
        })
        .collect())
}

/// What may be earned without solving, by a value of the outcomes.
fn hole(scored: &[(&Sample, &[Outcome], &str)], value: impl Fn(&[Outcome]) -> Option<f64>) -> Hole {
    let (mut sum, mut solved) = (0.0, 0u32);
    let (mut least, mut most) = (None::<f64>, None::<f64>);
    let mut best: Option<(f64, &Sample, &str)> = None;
    for (sample, outcomes, family) in scored {
        let Some(value) = value(outcomes) else { continue };
        least = Some(least.map_or(value, |least| least.min(value)));
        most = Some(most.map_or(value, |most| most.max(value)));
        if sample.measurements.get("solved").is_some_and(|solved| *solved >= 1.0) {
            sum += value;
            solved += 1;
        } else if best.is_none_or(|(best, _, _)| value > best) {
            best = Some((value, sample, family));
        }
    }
    let mean_solved = (solved > 0).then(|| sum / f64::from(solved));
    let unsolved = best.map(|(value, _, _)| value);
    let beats = unsolved.zip(mean_solved).is_some_and(|(unsolved, solved)| unsolved >= solved - 1e-9);
    Hole {
        unsolved,
        mean_solved,
        most,
        pays_unsolved: beats && unsolved > least,
        answer: best.map(|(_, sample, family)| Answer {
            family: family.to_owned(),
            completion: sample.completion.clone(),
            prompt: sample.prompt.clone(),
        }),
    }
}

fn text(report: &Report, width: Option<u16>) -> String {
    let trial = if report.trial.is_empty() { String::new() } else { format!("/{}", report.trial) };
    let what = if report.completions > 0 {
        format!("over {} of the starting model", render::plural(report.completions, "stored completion"))
    } else {
        "over demonstrations and adversarial answers, as no completion of the starting model is stored".to_owned()
    };
    let mut lines = vec![
        format!(
            "{}{trial}/{}: {} played",
            report.experiment,
            report.stage,
            render::plural(report.answers, "adversarial answer")
        ),
        format!("{what}:"),
        String::new(),
        table(&report.rewards, width).trim_end().to_owned(),
        String::new(),
    ];
    let shown = |value: Option<f64>| value.map_or_else(|| "nothing".to_owned(), render::number);
    for (name, hole) in &report.holes {
        let (unsolved, solved) = (shown(hole.unsolved), shown(hole.mean_solved));
        let word = if hole.pays_unsolved { "a hole" } else { "no hole" };
        lines.push(format!("`{name}` is {word}: unsolved up to {unsolved}, solved {solved} on average"));
    }
    let total = &report.total;
    if let Some(answer) = &total.answer {
        lines.push(format!(
            "a model can earn {} of at most {} without solving: {} `{}`",
            shown(total.unsolved),
            shown(total.most),
            answer.family,
            shortened(&answer.completion)
        ));
    }
    let verdict = match (total.pays_unsolved, total.mean_solved) {
        (true, Some(mean)) => {
            format!("that is at least what a solved answer earns on average ({})", render::number(mean))
        }
        (false, Some(mean)) => format!("a solved answer earns {} on average", render::number(mean)),
        (_, None) => "no answer solved its instance, so that there is nothing to compare with".to_owned(),
    };
    lines.push(verdict);
    if report.errors > 0 {
        lines.push(format!("{} of rewards", render::plural(report.errors, "error")));
    }
    lines.join("\n")
}

/// An answer on one line of bounded length.
fn shortened(text: &str) -> String {
    const MOST: usize = 160;
    let line = text.replace('\n', "\\n");
    if line.chars().count() <= MOST { line } else { line.chars().take(MOST).collect::<String>() + "..." }
}
