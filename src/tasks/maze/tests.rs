//! Attempts to fool the verifier, and the promises of the task.

#![expect(clippy::float_cmp, reason = "measurements of known walks are exact")]

use super::*;
use crate::tasks::{Reply, SearchOrder, SearchTrace, TaskSpec, Trace, open, replay};

fn specs() -> Vec<FormatSpec> {
    let traces = [SearchTrace::Search, SearchTrace::Path, SearchTrace::Direct];
    let compact = traces.map(|trace| FormatSpec::Compact { trace, order: SearchOrder::Random });
    let fused = traces.map(|trace| FormatSpec::Fused { trace, order: SearchOrder::Toward });
    let alphamaze = [Trace::Path, Trace::Direct].map(|trace| FormatSpec::Alphamaze { trace });
    compact.into_iter().chain(alphamaze).chain(fused).collect()
}

fn task(format: &FormatSpec) -> Box<dyn Task> {
    open(&TaskSpec::Maze { rows: 4, columns: 4, algorithm: Algorithm::Dfs }, format).unwrap()
}

fn judge(task: &dyn Task, instance: &Value, reply: &str, finish: Finish) -> Measurements {
    played(task, instance, reply, finish).1
}

/// The one turn of an episode, and the verdict.
fn played(task: &dyn Task, instance: &Value, reply: &str, finish: Finish) -> (Turn, Measurements) {
    let (mut turns, verdict) = replay(task, Start { instance, seed: 0 }, &[reply.to_owned()], finish).unwrap();
    (turns.remove(0), verdict)
}

/// An instance of the stream `seed`.
fn generate(task: &dyn Task, seed: u64, index: u64) -> Value {
    task.generate(seed, index..index + 1).unwrap().remove(0)
}

/// An answer by letters: `u`, `d`, `l`, `r`.
fn answer(letters: &str) -> String {
    let tokens = letters.chars().map(|letter| match letter {
        'u' => "<|up|>",
        'd' => "<|down|>",
        'l' => "<|left|>",
        'r' => "<|right|>",
        other => panic!("no move `{other}`"),
    });
    "<think></think>".to_owned() + &tokens.collect::<String>()
}

/// A 2 x 3 maze: origin at the top left, target at the top right, and the way leads below.
///
/// ```text
/// O | T
/// .   .     with (0, 1) a dead end above (1, 1)
/// ```
fn fixed() -> (Box<dyn Task>, Value) {
    let maze = Maze { rows: 2, columns: 3, walls: vec![13, 13, 13, 6, 2, 10], origin: 0, target: 2, length: 4 };
    let spec = TaskSpec::Maze { rows: 2, columns: 3, algorithm: Algorithm::Dfs };
    (open(&spec, &FormatSpec::default()).unwrap(), serde_json::to_value(maze).unwrap())
}

#[test]
fn every_measurement_of_known_walks() {
    let (task, maze) = fixed();
    let check = |letters: &str, wanted: [f64; 8]| {
        let names = ["solved", "valid_moves", "steps", "shortest", "wall_hits", "progress", "format", "finished"];
        let wanted: Measurements = names.iter().map(|name| (*name).to_owned()).zip(wanted).collect();
        assert_eq!(judge(&*task, &maze, &answer(letters), Finish::Stop), wanted, "{letters}");
    };
    check("drru", [1.0, 4.0, 4.0, 4.0, 0.0, 1.0, 1.0, 1.0]);
    check("drudru", [1.0, 6.0, 6.0, 4.0, 0.0, 1.0, 1.0, 1.0]); // by way of the dead end
    check("dr", [0.0, 2.0, 2.0, 4.0, 0.0, 0.5, 1.0, 1.0]);
    check("drrud", [0.0, 5.0, 5.0, 4.0, 0.0, 0.75, 1.0, 1.0]); // overshoot
    check("drrudu", [0.0, 6.0, 6.0, 4.0, 0.0, 1.0, 1.0, 1.0]); // overshoot and back again
    check("rdrru", [0.0, 0.0, 5.0, 4.0, 1.0, 0.0, 1.0, 1.0]); // through a wall at first
    check("drruu", [0.0, 4.0, 5.0, 4.0, 1.0, 1.0, 1.0, 1.0]); // against a wall at last
    check("dlldrru", [0.0, 1.0, 7.0, 4.0, 3.0, 0.25, 1.0, 1.0]);
    check("dru", [0.0, 3.0, 3.0, 4.0, 0.0, 0.25, 1.0, 1.0]); // in the dead end
    check("", [0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 1.0]);
}

#[test]
fn a_completion_that_was_cut_off_is_not_solved() {
    let (task, maze) = fixed();
    let verdict = judge(&*task, &maze, &answer("drru"), Finish::Length);
    assert_eq!((verdict["solved"], verdict["finished"], verdict["progress"]), (0.0, 0.0, 1.0));
    let turn = played(&*task, &maze, &answer("drru"), Finish::Length).0;
    assert!(turn.truncated && !turn.terminated);
    let turn = played(&*task, &maze, &answer("drru"), Finish::Stop).0;
    assert!(turn.terminated && !turn.truncated);
}

#[test]
fn forms_that_are_refused() {
    let (task, maze) = fixed();
    let good = "<|down|><|right|><|right|><|up|>";
    let bad = [
        good.to_owned(),
        format!("</think>{good}"),
        format!("<think>{good}"),
        format!("x<think></think>{good}"),
        format!("<think><think></think>{good}"),
        format!("<think></think></think>{good}"),
        format!("<think></think><think></think>{good}"),
        format!("<think><|eos|></think>{good}"),
        format!("<think></think> {good}"),
        format!("<think></think>{good}\n"),
        format!("<think></think>{good}<|eos|>"),
        format!("<think></think>{good}<|target|>"),
        format!("<think></think>{good}<|blank|>"),
        "<think></think><|down|> <|right|> <|right|> <|up|>".to_owned(),
        "<think></think><|down|><|right|><|blank|><|right|><|up|>".to_owned(),
        "<think></think>down right right up".to_owned(),
        "<think></think><|down|><|right|><|right|><|up|".to_owned(),
        "<think></think><|down|><|right|><|right|><|UP|>".to_owned(),
        String::new(),
        "<think>".to_owned(),
        "<think></think>".to_owned(),
    ];
    for completion in bad {
        let verdict = judge(&*task, &maze, &completion, Finish::Stop);
        assert_eq!((verdict["solved"], verdict["format"]), (0.0, 0.0), "{completion}");
    }
    let free = format!("<think>the trace is free <|no-such-token|> <</think>{good}");
    assert_eq!(judge(&*task, &maze, &free, Finish::Stop)["solved"], 1.0);
    let spoiled = judge(&*task, &maze, "<think></think><|down|>?<|right|>", Finish::Stop);
    assert_eq!((spoiled["steps"], spoiled["valid_moves"], spoiled["progress"]), (1.0, 1.0, 0.25));
}

/// Solves by an independent reading: the exact text of the answer against the exact text of a right walk.
fn is_right(maze: &Maze, tokens: &[String]) -> bool {
    let Some(close) = tokens.iter().position(|token| token == END_THINK) else { return false };
    let inside = &tokens[..close];
    if inside.first().is_none_or(|token| token != THINK) {
        return false;
    }
    if inside[1..].iter().any(|token| [THINK, PAD, BEGIN, END].contains(&token.as_str())) {
        return false;
    }
    let mut cell = maze.origin;
    for token in &tokens[close + 1..] {
        let (row, column) = ((cell / maze.columns) as i64, (cell % maze.columns) as i64);
        let (bit, row, column) = match token.as_str() {
            "<|up|>" => (1, row - 1, column),
            "<|down|>" => (2, row + 1, column),
            "<|left|>" => (4, row, column - 1),
            "<|right|>" => (8, row, column + 1),
            _ => return false,
        };
        if cell == maze.target || maze.walls[cell] & bit != 0 {
            return false;
        }
        cell = (row * maze.columns as i64 + column) as usize;
    }
    cell == maze.target
}

#[test]
fn every_single_token_mutation_is_judged_as_an_independent_reading_judges_it() {
    for spec in specs() {
        let task = task(&spec);
        let vocabulary = task.vocabulary();
        let (mut solved, mut failed) = (0, 0);
        for index in 0..3 {
            let instance = generate(&*task, 5, index);
            let maze: Maze = serde_json::from_value(instance.clone()).unwrap();
            let text = task.demonstrate(&instance, index).unwrap().remove(0);
            let tokens: Vec<String> = text.split_inclusive('>').map(str::to_owned).collect();
            let mut mutants = vec![tokens.clone()];
            for at in 0..=tokens.len() {
                if at < tokens.len() {
                    let mut shorter = tokens.clone();
                    shorter.remove(at);
                    mutants.push(shorter);
                }
                for token in &vocabulary {
                    let mut longer = tokens.clone();
                    longer.insert(at, token.clone());
                    mutants.push(longer);
                    if at < tokens.len() {
                        let mut changed = tokens.clone();
                        changed[at].clone_from(token);
                        mutants.push(changed);
                    }
                }
            }
            for mutant in mutants {
                let verdict = judge(&*task, &instance, &mutant.concat(), Finish::Stop);
                let right = is_right(&maze, &mutant);
                assert_eq!(verdict["solved"] == 1.0, right, "{}", mutant.concat());
                if right {
                    solved += 1;
                    assert_eq!((verdict["format"], verdict["progress"], verdict["wall_hits"]), (1.0, 1.0, 0.0));
                } else {
                    failed += 1;
                }
            }
        }
        assert!(solved > 2 && failed > 100, "{solved} and {failed}");
    }
}

#[test]
fn a_demonstration_solves_its_instance_and_its_neighbours_do_not() {
    for spec in specs() {
        let task = task(&spec);
        for index in 0..40 {
            let instance = generate(&*task, 9, index);
            let verdict = judge(&*task, &instance, &task.demonstrate(&instance, 1).unwrap()[0], Finish::Stop);
            assert_eq!((verdict["solved"], verdict["steps"]), (1.0, verdict["shortest"]));
            assert_eq!(verdict.len(), task.measures().len());
            assert_eq!(task.demonstrate(&instance, 3).unwrap(), task.demonstrate(&instance, 3).unwrap());
        }
    }
}

#[test]
fn an_episode_before_and_after_its_turn() {
    let (task, maze) = fixed();
    let mut episodes = task.begin(&[Start { instance: &maze, seed: 0 }]).unwrap();
    assert!(episodes.observe().unwrap()[0].starts_with("<|0-0|><|up_left_right_wall|><|origin|>"));
    assert_eq!(episodes.verdicts().unwrap()[0]["solved"], 0.0);
    let mut step = |letters: &str| {
        let text = answer(letters);
        episodes.step(&[Reply { episode: 0, text: &text, finish: Finish::Stop }]).unwrap().remove(0)
    };
    assert_eq!(step("d").observation, "");
    assert_eq!(step("drru").measurements["solved"], 0.0, "the first reply is the episode");
}

#[test]
fn values_that_are_no_instance_are_refused() {
    let (task, mut maze) = fixed();
    maze["walls"][3] = 7.into();
    assert!(
        format!("{:#}", task.begin(&[Start { instance: &maze, seed: 0 }]).err().unwrap())
            .contains("does not hold together")
    );
    assert!(task.canonical(&maze).is_err());
    assert!(task.demonstrate(&Value::Null, 0).is_err());
    assert!(task.begin(&[Start { instance: &serde_json::json!({"rows": 2}), seed: 0 }]).is_err());
}

#[test]
fn the_canonical_form_forgets_endpoints_and_remembers_layouts() {
    let (task, maze) = fixed();
    let mut other = maze.clone();
    other["origin"] = 1.into();
    other["length"] = 3.into();
    assert_eq!(task.canonical(&maze).unwrap(), task.canonical(&other).unwrap());
    let spec = TaskSpec::Maze { rows: 5, columns: 5, algorithm: Algorithm::Dfs };
    let task = open(&spec, &FormatSpec::default()).unwrap();
    assert_ne!(task.canonical(&generate(&*task, 0, 0)).unwrap(), task.canonical(&generate(&*task, 0, 1)).unwrap());
}

#[test]
fn sizes_out_of_range_are_refused() {
    for (rows, columns) in [(1, 5), (5, 33), (0, 0)] {
        let spec = TaskSpec::Maze { rows, columns, algorithm: Algorithm::Dfs };
        assert!(open(&spec, &FormatSpec::default()).err().unwrap().to_string().contains("2 to 32"));
    }
}

#[test]
fn golden_texts() {
    let mut texts = Vec::new();
    for spec in specs() {
        let task = task(&spec);
        let instance = generate(&*task, 0, 0);
        let prompt = task.begin(&[Start { instance: &instance, seed: 0 }]).unwrap().observe().unwrap().remove(0);
        texts.push((prompt, task.demonstrate(&instance, 0).unwrap().remove(0)));
    }
    insta::assert_debug_snapshot!(texts);
}
