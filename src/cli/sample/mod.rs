//! `pipe sample`: what a model says, drawn where the task is a maze, and told turn by turn everywhere else.

mod by_hand;
mod sheet;
mod telling;

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::cli::failure::Failure;
use crate::cli::sample::telling::{drawing, text};
use crate::cli::show::find;
use crate::cli::stored::Completions;
use crate::cli::{Session, render};

/// Columns where there is no terminal.
const COLUMNS: u16 = 100;

/// Stored completions that are shown where nobody says how many.
const COUNT: usize = 3;

/// Show what a model said: its walk through the maze, its mistakes, its reasoning
///
/// It reads what a stage has stored: every completion of a `grpo` stage, the last of each instance of an `evaluate` stage. In
/// a drawn maze `O` is the origin, `T` the target, `•` the walk (a digit: how often a cell was entered), `✗` a move against a
/// wall, `◆` where the walk ends elsewhere, `·` what only the reasoning has visited, `◦` the way that it has missed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `EXPERIMENT[/TRIAL]/STAGE` of a `grpo` or an `evaluate` stage, or `FILE.toml[/TRIAL]/STAGE`
    #[arg(value_name = "STAGE")]
    target: String,
    /// So many [default: 3, or 1 by hand]
    #[arg(long, short, value_name = "N")]
    count: Option<usize>,
    /// Only what is solved
    #[arg(long, conflicts_with = "failed")]
    solved: bool,
    /// Only what is not solved
    #[arg(long)]
    failed: bool,
    /// Only this instance
    #[arg(long, value_name = "ID")]
    instance: Option<String>,
    /// Of a training, the completions of this step [default: the last]
    #[arg(long, value_name = "N")]
    step: Option<i64>,
    /// Leave out so many before
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip: usize,
    /// Write the mazes to an SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write the mazes to a PNG file
    #[arg(long, value_name = "FILE")]
    png: Option<PathBuf>,
    /// By hand: let the stage's model answer the instance in FILE, or `-` for what is pasted; as JSON, or a maze as it is drawn
    #[arg(long, value_name = "FILE|-", conflicts_with_all = ["solved", "failed", "instance", "step", "generate"], help_heading = "By hand")]
    prompt: Option<PathBuf>,
    /// By hand: let it answer instance number INDEX of the task's stream SEED, whatever split that falls in
    #[arg(long, value_name = "INDEX", conflicts_with_all = ["solved", "failed", "instance", "step"], help_heading = "By hand")]
    generate: Option<u64>,
    /// What an instance is drawn with, and what a model draws with
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "By hand")]
    seed: u64,
    /// The sampling temperature; 0 is greedy
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "By hand")]
    temperature: f64,
    /// Tokens in a reply, at most [default: as the stage says]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "By hand")]
    max_new_tokens: Option<u64>,
    /// `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto", help_heading = "By hand")]
    device: String,
    /// Lay a value over the file, as for `pipe run`
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
}

/// With `--json`, an array of completions.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let is_by_hand = args.prompt.is_some() || args.generate.is_some();
    if !(0.0..=10.0).contains(&args.temperature) {
        return Err(Failure::wrong(format!("`--temperature` is {}, and lies between 0 and 10", args.temperature)));
    }
    let completions = if is_by_hand {
        by_hand::play(args, session)?
    } else {
        Completions::of(&find(&args.target, &args.sets, session)?.result())?
    };
    let rows = if is_by_hand { (0..completions.rows().len()).collect() } else { chosen(&completions, args)? };
    let ui = &session.ui;
    write_pictures(&completions, &rows, args)?;
    if ui.is_json() {
        let all: Vec<Value> = rows.iter().map(|row| value(&completions, *row)).collect();
        return ui.json_pretty(&all);
    }
    let width = usize::from(ui.output_width().unwrap_or(COLUMNS));
    let shown: Vec<String> = rows.iter().map(|row| text(&completions, *row, width, ui.output_color())).collect();
    ui.data(&shown.join("\n\n"))?;
    for file in [&args.svg, &args.png].into_iter().flatten() {
        ui.note(&format!("wrote {}", file.display()));
    }
    Ok(())
}

/// The rows that are asked for; none is an error that says what there is.
fn chosen(completions: &Completions, args: &Args) -> Result<Vec<usize>, Failure> {
    let step = if completions.is_training { args.step.unwrap_or_else(|| completions.last_step()) } else { 0 };
    if let Some(asked) = args.step.filter(|_| !completions.is_training) {
        return Err(Failure::wrong(format!("an evaluation has no steps, and `--step {asked}` asks for one")));
    }
    let of_step: Vec<usize> =
        (0..completions.rows().len()).filter(|row| completions.rows()[*row].step == step).collect();
    if of_step.is_empty() {
        return Err(Failure::wrong(format!("the training has stored nothing of step {step}"))
            .hint(format!("its last step is {}", completions.last_step())));
    }
    let of_instance: Vec<usize> = match &args.instance {
        None => of_step.clone(),
        Some(id) => of_step.iter().copied().filter(|row| completions.rows()[*row].instance == *id).collect(),
    };
    if let (true, Some(id)) = (of_instance.is_empty(), &args.instance) {
        let known = of_step.iter().map(|row| completions.rows()[*row].instance.as_str());
        let near = render::near(id, known.clone());
        let failure = Failure::wrong(format!("there is no completion of the instance `{id}`"));
        let first = known.take(3).collect::<Vec<_>>().join("`, `");
        return Err(match near.first() {
            Some(near) => failure.hint(format!("did you mean `{near}`?")),
            None => failure.hint(format!("the first are `{first}`")),
        });
    }
    let count = args.count.unwrap_or(COUNT);
    let fits = |row: &usize| match completions.is_solved(*row) {
        _ if !args.solved && !args.failed => true,
        Some(solved) => solved == args.solved,
        None => false,
    };
    let rows: Vec<usize> = of_instance.iter().copied().filter(fits).skip(args.skip).take(count).collect();
    if rows.is_empty() && count > 0 {
        let what = if args.solved { "solved" } else { "that fails" };
        let asked =
            if args.solved || args.failed { format!("no completion {what}") } else { "no completion".to_owned() };
        return Err(Failure::wrong(format!(
            "there is {asked} among {}",
            render::plural(of_instance.len(), "completion")
        )));
    }
    Ok(rows)
}

fn write_pictures(completions: &Completions, rows: &[usize], args: &Args) -> Result<(), Failure> {
    if args.svg.is_none() && args.png.is_none() {
        return Ok(());
    }
    let pictures: Vec<_> =
        rows.iter().filter_map(|row| drawing(completions, *row)).map(|drawing| drawing.picture()).collect();
    if pictures.is_empty() {
        return Err(Failure::wrong(format!("nothing of `{}` can be drawn", args.target))
            .hint("mazes are drawn; other tasks are told as text"));
    }
    let sheet = sheet::sheet(&pictures);
    let write = |file: &PathBuf, bytes: Vec<u8>| {
        std::fs::write(file, bytes)
            .map_err(|error| Failure::wrong(format!("cannot write `{}`: {error}", file.display())))
    };
    if let Some(file) = &args.svg {
        write(file, sheet.svg().into_bytes())?;
    }
    if let Some(file) = &args.png {
        write(file, sheet.png().map_err(|error| Failure::failed(format!("{error:#}")))?.bytes)?;
    }
    Ok(())
}

fn value(completions: &Completions, row: usize) -> Value {
    let sample = &completions.rows()[row];
    let rewards: serde_json::Map<String, Value> =
        completions.rewards.iter().cloned().zip(sample.rewards.iter().map(|value| json!(value))).collect();
    let mut value = json!({
        "instance": sample.instance,
        "data": sample.data,
        "prompt": sample.prompt,
        "turns": completions.exchanges[row],
        "finish": sample.finish,
        "solved": completions.is_solved(row),
        "measurements": sample.measurements,
    });
    if let Some(drawing) = drawing(completions, row) {
        value["mistakes"] = json!(drawing.mistakes());
    }
    if completions.is_training {
        value["step"] = json!(sample.step);
        value["sample"] = json!(sample.sample);
        value["rewards"] = Value::Object(rewards);
        value["total"] = json!(sample.total);
        value["advantages"] = json!(completions.advantages[row]);
        value["kept"] = json!(completions.kept[row]);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::stored::Exchange;
    use crate::cli::stored::tests::rollouts;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(options: &[&str]) -> Args {
        Line::parse_from(["sample", "maze/grpo"].iter().chain(options)).args
    }

    #[test]
    fn rows_are_chosen_by_step_instance_and_verdict() {
        let folder = tempfile::tempdir().unwrap();
        let completions = rollouts(folder.path());
        let rows = |options: &[&str]| chosen(&completions, &args(options)).unwrap();
        assert_eq!(rows(&[]), [4, 5], "the last step");
        assert_eq!(rows(&["--step", "1", "--count", "9"]), [0, 1, 2, 3]);
        assert_eq!(rows(&["--step", "1", "--failed", "--count", "2"]), [1, 2]);
        assert_eq!(rows(&["--step", "1", "--failed", "--count", "2", "--skip", "2"]), [3]);
        assert_eq!(rows(&["--step", "1", "--instance", "rl-1"]), [2, 3]);
        assert_eq!(rows(&["--solved"]), [4]);
        let says = |options: &[&str]| {
            let failure = chosen(&completions, &args(options)).unwrap_err();
            format!("{}; {}", failure.parts().0, failure.parts().2.join(" "))
        };
        assert_eq!(says(&["--step", "7"]), "the training has stored nothing of step 7; its last step is 2");
        assert_eq!(
            says(&["--instance", "rl-8"]),
            "there is no completion of the instance `rl-8`; did you mean `rl-0`?"
        );
        assert_eq!(
            says(&["--step", "1", "--instance", "rl-1", "--solved"]),
            "there is no completion solved among 2 completions; "
        );
    }

    #[test]
    fn completions_are_drawn_and_told() {
        let folder = tempfile::tempdir().unwrap();
        let completions = rollouts(folder.path());
        let both =
            [text(&completions, 0, 80, false), text(&completions, 1, 80, false), text(&completions, 1, 30, false)];
        insta::assert_snapshot!(both.join("\n\n"));
        let value = value(&completions, 1);
        assert_eq!(value["rewards"], json!({"correct": 0.0, "progress": 0.25}));
        assert_eq!((&value["advantages"], &value["solved"]), (&json!([-1.0]), &json!(false)));
        assert!(value["mistakes"][0].as_str().unwrap().contains("runs into a wall"));
    }

    #[test]
    fn an_episode_of_another_task_is_told_turn_by_turn() {
        let folder = tempfile::tempdir().unwrap();
        let mut completions = rollouts(folder.path());
        completions.samples.rows[0].data = json!({"position": 3});
        completions.samples.rows[0].prompt = "The number is 3, the target 5.\n".to_owned();
        let exchange = |observation: &str, text: &str| Exchange { observation: observation.into(), text: text.into() };
        let first = exchange("", "{\"thoughts\": \"up, and then up again\", \"action\": \"+\"}");
        completions.exchanges[0] = vec![first, exchange("The number is 4.", "{\"action\": \"+\"}")];
        insta::assert_snapshot!(text(&completions, 0, 50, false));
    }

    #[test]
    fn pictures_are_written_and_other_tasks_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut completions = rollouts(folder.path());
        let (svg, png) = (folder.path().join("a.svg"), folder.path().join("a.png"));
        let asked = args(&["--svg", svg.to_str().unwrap(), "--png", png.to_str().unwrap()]);
        write_pictures(&completions, &[0, 1], &asked).unwrap();
        assert!(std::fs::read_to_string(&svg).unwrap().starts_with("<svg"));
        assert!(std::fs::read(&png).unwrap().starts_with(b"\x89PNG"));
        for row in &mut completions.samples.rows {
            row.data = json!({"position": 3});
        }
        assert!(write_pictures(&completions, &[0], &asked).unwrap_err().parts().0.contains("can be drawn"));
    }
}
