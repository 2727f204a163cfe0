//! Attempts to fool the verifier, and the promises of the task.

#![expect(clippy::float_cmp, reason = "measurements of known walks are exact")]

mod texts;

use serde_json::json;

use super::*;
use crate::tasks::{Reply, TaskSpec, open, replay};

/// A format as a file has it.
pub(super) fn format(value: Value) -> FormatSpec {
    serde_json::from_value(value).unwrap()
}

/// The formats that trained results have.
fn old_specs() -> Vec<FormatSpec> {
    let traces = ["search", "path", "direct"];
    let compact = traces.map(|trace| json!({"kind": "compact", "trace": trace}));
    let alphamaze = ["path", "direct"].map(|trace| json!({"kind": "alphamaze", "trace": trace}));
    let fused = traces.map(|trace| json!({"kind": "fused", "trace": trace, "order": "toward"}));
    compact.into_iter().chain(alphamaze).chain(fused).map(format).collect()
}

/// Formats without lines that retry.
fn retrying_specs() -> Vec<FormatSpec> {
    ["alphamaze", "compact", "fused"]
        .into_iter()
        .zip(["origin", "junction", "junction"])
        .map(|(kind, retry)| format(json!({"kind": kind, "trace": "path", "retry": retry, "retry_share": 0.5})))
        .collect()
}

/// Formats with lines.
fn line_specs() -> Vec<FormatSpec> {
    let mut found = Vec::new();
    for signs in ["tokens", "text"] {
        for (prompt, trace) in [("legend", "reprint"), ("legend", "direct"), ("maze", "reprint"), ("legend", "path")] {
            found.push(json!({"kind": "alphamaze", "prompt": prompt, "trace": trace, "signs": signs}));
        }
        for (trace, retry) in [("reprint", "origin"), ("path", "junction")] {
            found.push(json!({
                "kind": "alphamaze", "prompt": "legend", "trace": trace, "signs": signs, "retry": retry,
                "retry_share": 1.0
            }));
        }
    }
    found.into_iter().map(format).collect()
}

/// Every way of writing a maze.
pub(super) fn specs() -> Vec<FormatSpec> {
    [old_specs(), retrying_specs(), line_specs()].concat()
}

fn maze_spec(rows: u64, columns: u64) -> TaskSpec {
    TaskSpec::Maze(MazeSpec::new(rows, columns))
}

fn task(format: &FormatSpec) -> Box<dyn Task> {
    open(&maze_spec(4, 4), format).unwrap()
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
    (open(&maze_spec(2, 3), &FormatSpec::default()).unwrap(), serde_json::to_value(maze).unwrap())
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
    for spec in [old_specs(), retrying_specs()].concat() {
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
                let told = task.diagnose(&instance, &[&mutant.concat()], Finish::Stop).unwrap();
                let errors = told.iter().filter(|(name, _)| name.starts_with("error_"));
                let errors: f64 = errors.map(|(_, value)| value).sum();
                assert_eq!(errors + verdict["solved"], 1.0, "{told:?}");
                let retried = mutant.iter().any(|token| token == "<|reset|>");
                assert_eq!(told["first_attempt"] == 1.0, right && !retried);
                assert!(verdict["solved"] <= told["harness"], "the harness is looser");
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
    let task = open(&maze_spec(5, 5), &FormatSpec::default()).unwrap();
    assert_ne!(task.canonical(&generate(&*task, 0, 0)).unwrap(), task.canonical(&generate(&*task, 0, 1)).unwrap());
}

#[test]
fn sizes_out_of_range_are_refused() {
    for (rows, columns) in [(1, 5), (5, 33), (0, 0)] {
        assert!(open(&maze_spec(rows, columns), &FormatSpec::default()).err().unwrap().to_string().contains("2 to 32"));
    }
}

#[test]
fn parameters_that_are_left_out_are_not_written() {
    let spec = serde_json::to_value(maze_spec(5, 5)).unwrap();
    assert_eq!(spec, json!({"kind": "maze", "rows": 5, "columns": 5, "algorithm": "dfs"}), "old keys stay");
    for value in [
        json!({"kind": "alphamaze", "trace": "path"}),
        json!({"kind": "compact", "trace": "search", "order": "random"}),
        json!({"kind": "fused", "trace": "search", "order": "random"}),
    ] {
        assert_eq!(serde_json::to_value(format(json!({"kind": value["kind"]}))).unwrap(), value);
    }
}

#[test]
fn the_errors_of_known_walks() {
    let (task, maze) = fixed();
    let told = |text: &str, finish: Finish| {
        let told = task.diagnose(&maze, &[text], finish).unwrap();
        assert_eq!(told.len(), DIAGNOSES.len());
        let is = |name: &&Measure| told[name.name.as_ref()] == 1.0;
        DIAGNOSES.iter().filter(is).map(|measure| measure.name.to_string()).collect::<Vec<_>>().join(" ")
    };
    let says = |letters: &str| told(&answer(letters), Finish::Stop);
    assert_eq!(says("drru"), "first_attempt optimal harness");
    assert_eq!(says("drudru"), "first_attempt harness");
    assert_eq!(says("dr"), "error_stopped_short");
    assert_eq!(says("drrud"), "error_overshoot");
    assert_eq!(says("drrudu"), "error_overshoot harness");
    assert_eq!(says("rdrru"), "error_wall");
    assert_eq!(says("drruu"), "error_overshoot");
    assert_eq!(says("drruul"), "error_overshoot");
    assert_eq!(says("dlldrru"), "error_wall");
    assert_eq!(says(""), "error_no_answer");
    assert_eq!(told(&answer("drru"), Finish::Length), "error_out_of_tokens harness");
    assert_eq!(told("<|down|><|right|><|right|><|up|>", Finish::Stop), "error_no_answer");
    let (good, think) = ("<|down|><|right|><|right|><|up|>", "<think></think>");
    assert_eq!(told(&format!("{think}{good}<|target|>"), Finish::Stop), "error_malformed harness");
    assert_eq!(told(&format!("{think} go {good}\n"), Finish::Stop), "error_no_answer harness");
    assert_eq!(told(&format!("{think}<|down|> <|right|"), Finish::Stop), "error_malformed");
    assert_eq!(told("x</think><|down|><|right|<|right|><|up|", Finish::Stop), "error_malformed harness");
    assert_eq!(told(&format!("{think}{good}</think><|left|>"), Finish::Stop), "error_malformed harness");
    assert_eq!(told(&format!("{think}<|left|>{good}"), Finish::Stop), "error_wall");
    let retried = format!("<think><|0-0|><|right|><|reset|><|0-0|></think>{good}");
    assert_eq!(told(&retried, Finish::Stop), "optimal harness");
}

#[test]
fn several_sizes_share_a_vocabulary_and_keep_their_layouts_apart() {
    let spec = |sizes: &[[u64; 2]]| MazeSpec { sizes: sizes.to_vec(), ..MazeSpec::new(6, 6) };
    let compact = format(json!({"kind": "compact"}));
    let task = open(&TaskSpec::Maze(spec(&[[3, 5], [4, 4], [5, 3], [6, 6]])), &compact).unwrap();
    let one = open(&TaskSpec::Maze(spec(&[[6, 6]])), &compact).unwrap();
    assert_eq!(task.vocabulary(), one.vocabulary());
    let instances = task.generate(1, 0..400).unwrap();
    let mut sizes = BTreeMap::<(u64, u64), usize>::new();
    for instance in &instances {
        let size = (instance["rows"].as_u64().unwrap(), instance["columns"].as_u64().unwrap());
        *sizes.entry(size).or_default() += 1;
        let class = task.stratum(instance).unwrap();
        assert!(class.starts_with(&format!("{}x{}.", size.0, size.1)), "{class}");
        let prompt = task.begin(&[Start { instance, seed: 0 }]).unwrap().observe().unwrap().remove(0);
        assert_eq!(prompt.matches("<|row|>").count() as u64, size.0, "a row has an end");
        let reply = task.demonstrate(instance, 0).unwrap().remove(0);
        assert_eq!(judge(&*task, instance, &reply, Finish::Stop)["solved"], 1.0);
    }
    assert!(sizes.len() == 4 && sizes.values().all(|count| (60..140).contains(count)), "{sizes:?}");
    // A rectangle and the same on its side are one layout.
    let lying = instances.iter().find(|instance| instance["rows"] == 3).unwrap();
    let maze: Maze = serde_json::from_value(lying.clone()).unwrap();
    let cell = |cell: usize| cell % 5 * 3 + cell / 5;
    let walls = transposed(&maze.walls, 3, 5);
    let standing = Maze { rows: 5, columns: 3, walls, origin: cell(maze.origin), target: cell(maze.target), ..maze };
    let standing = serde_json::to_value(standing).unwrap();
    assert_eq!(task.canonical(lying).unwrap(), task.canonical(&standing).unwrap());
    assert_ne!(task.stratum(lying), task.stratum(&standing));
    assert!(one.canonical(lying).unwrap_err().root_cause().to_string().contains("3 x 5 cells, the task 6 x 6"));
    for sizes in [vec![[7, 6]], vec![[1, 2]]] {
        assert!(open(&TaskSpec::Maze(spec(&sizes)), &compact).err().unwrap().to_string().contains("`sizes`"));
    }
}

#[test]
fn what_is_drawn_for_a_data_set_is_what_is_generated() {
    let specs = [
        MazeSpec::new(5, 5),
        MazeSpec { sizes: vec![[2, 2], [3, 5], [5, 3]], ..MazeSpec::new(5, 5) },
        MazeSpec { algorithm: Algorithm::Kruskal, loops: 0.3, ..MazeSpec::new(12, 3) },
    ];
    for spec in specs {
        let task = open(&TaskSpec::Maze(spec), &FormatSpec::default()).unwrap();
        let drawn = task.draw(7, 10..210, 3..=6).unwrap();
        let instances = task.generate(7, 10..210).unwrap().into_iter();
        let kept = instances.filter(|instance| (3..=6).contains(&instance["length"].as_u64().unwrap()));
        let wanted: Vec<Drawn> = kept
            .map(|instance| Drawn {
                data: instance.to_string(),
                canonical: task.canonical(&instance).unwrap(),
                length: instance["length"].as_u64(),
                stratum: task.stratum(&instance),
            })
            .collect();
        assert!(wanted.len() > 20);
        assert_eq!(drawn, wanted);
    }
}

#[test]
fn where_a_maze_has_loops_any_way_solves_and_a_shortest_one_is_optimal() {
    let spec = MazeSpec { loops: 0.5, algorithm: Algorithm::Wilson, ..MazeSpec::new(4, 4) };
    let task = open(&TaskSpec::Maze(spec), &FormatSpec::default()).unwrap();
    let mut detours = 0;
    for index in 0..200 {
        let instance = generate(&*task, 1, index);
        let maze: Maze = serde_json::from_value(instance.clone()).unwrap();
        // The way that always prefers to go away from the target as long as it comes to no cell twice.
        let (mut been, mut walk) = (vec![maze.origin], String::from("<think></think>"));
        let distances = maze.distances();
        while *been.last().unwrap() != maze.target {
            let ways = Direction::ALL.into_iter().filter_map(|way| Some((way, maze.step(*been.last().unwrap(), way)?)));
            let Some((way, next)) =
                ways.filter(|(_, next)| !been.contains(next)).max_by_key(|(_, next)| distances[*next])
            else {
                break;
            };
            walk += &["<|", way.name(), "|>"].concat();
            been.push(next);
        }
        if *been.last().unwrap() == maze.target {
            let verdict = judge(&*task, &instance, &walk, Finish::Stop);
            assert_eq!(verdict["solved"], 1.0);
            let told = task.diagnose(&instance, &[&walk], Finish::Stop).unwrap();
            assert_eq!(told["optimal"] == 1.0, verdict["steps"] == verdict["shortest"]);
            detours += usize::from(verdict["steps"] > verdict["shortest"]);
        }
    }
    assert!(detours > 10, "{detours}");
}

/// The prompt and the demonstration of the maze number `index` of `size` in each format.
fn texts(specs: &[FormatSpec], size: u64, index: u64) -> Vec<(String, String)> {
    let mut texts = Vec::new();
    for spec in specs {
        let task = open(&maze_spec(size, size), spec).unwrap();
        let instance = generate(&*task, 0, index);
        let prompt = task.begin(&[Start { instance: &instance, seed: 0 }]).unwrap().observe().unwrap().remove(0);
        texts.push((prompt, task.demonstrate(&instance, 0).unwrap().remove(0)));
    }
    texts
}

#[test]
fn golden_texts() {
    let texts = texts(&old_specs(), 4, 0);
    insta::assert_debug_snapshot!(texts);
}

#[test]
fn golden_texts_with_retries_and_lines() {
    // Three ways lead out of the origin of this one.
    let task = open(&maze_spec(3, 3), &FormatSpec::default()).unwrap();
    let open_origin = |index: &u64| {
        let maze: Maze = serde_json::from_value(generate(&*task, 0, *index)).unwrap();
        [1, 2, 4, 8].contains(&maze.walls[maze.origin])
    };
    let texts = texts(&[retrying_specs(), line_specs()].concat(), 3, (0..1_000).find(open_origin).unwrap());
    let shown: Vec<String> = texts.into_iter().map(|(prompt, reply)| prompt + "\n----\n" + &reply).collect();
    insta::assert_snapshot!(shown.join("\n====\n"));
}
