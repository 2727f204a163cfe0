//! What `plan` and `why` say before a run, held against what the run then does.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;

use crate::sandbox::{Sandbox, files};

/// `sorted` reads a file and a file for all, `first` keeps some lines, `last` copies them; `alone` rests on nothing.
const CHAIN: &str = r#"
    [params]
    keep = 1
    [stages.sorted]
    kind = "command"
    command = ["sh", "-c", "cat all.txt > /dev/null; sort numbers.txt > out"]
    files = ["numbers.txt", "all.txt"]
    outputs = ["out"]
    [stages.first]
    kind = "command"
    command = ["sh", "-c", "head -n ${params.keep} {inputs.a}/out > out"]
    inputs = { a = "sorted" }
    outputs = ["out"]
    [stages.last]
    kind = "command"
    command = ["sh", "-c", "test ! -e FAIL && cat {inputs.a}/out > out && echo last >> out"]
    inputs = { a = "first" }
    outputs = ["out"]
    [stages.alone]
    kind = "command"
    command = ["sh", "-c", "echo alone > out"]
    outputs = ["out"]
"#;

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("numbers.txt", "3\n1\n2\n").write("all.txt", "x\n");
    sandbox.write("chain.toml", &CHAIN.replace("FAIL", sandbox.path("fail").to_str().unwrap()));
    sandbox
}

fn edit(sandbox: &Sandbox, file: &str, from: &str, to: &str) {
    let text = fs::read_to_string(sandbox.path(file)).unwrap();
    assert!(text.contains(from), "{from} is not in {file}");
    sandbox.write(file, &text.replace(from, to));
}

/// State and reasons of every stage, by `trial/stage`.
fn plan(sandbox: &Sandbox, file: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let rows = sandbox.json(&["plan", "--json", file]);
    let row = |row: &Value| {
        let reasons = row["reasons"].as_array().unwrap().iter().map(text).collect();
        (format!("{}/{}", text(&row["trial"]), text(&row["stage"])), (text(&row["state"]), reasons))
    };
    rows.as_array().unwrap().iter().map(row).collect()
}

/// `trial/stage` to recipe: stages of one recipe run once, under the name of the first.
fn recipes(sandbox: &Sandbox, file: &str) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let rows = sandbox.json(&["plan", "--json", file]);
    let row = |row: &Value| (format!("{}/{}", text(&row["trial"]), text(&row["stage"])), text(&row["recipe"]));
    rows.as_array().unwrap().iter().map(row).collect()
}

/// The stages that began in a run, by `trial/stage`.
fn ran(sandbox: &Sandbox, file: &str) -> Vec<String> {
    let ended = sandbox.pipe(&["run", "--json", file]);
    let events = ended.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let name = |event: &Value| {
        let name = &event["name"];
        format!("{}/{}", name["trial"].as_str().unwrap(), name["stage"].as_str().unwrap())
    };
    events.filter(|event| event["type"] == "running").map(|event| name(&event)).collect()
}

/// What is said of one stage, and that the run does as all of it says.
fn said_and_done(sandbox: &Sandbox, file: &str, stage: &str) -> (String, Vec<String>) {
    let said = plan(sandbox, file);
    let recipes = recipes(sandbox, file);
    let ran: Vec<&String> = ran(sandbox, file).iter().map(|name| &recipes[name]).collect();
    for (name, (state, reasons)) in &said {
        let did = ran.contains(&&recipes[name]);
        match state.as_str() {
            "cached" => assert!(!did, "{name} was said to be cached and ran"),
            "run" | "resume" => assert!(did, "{name} was said to {state} ({reasons:?}) and did not"),
            _ => assert_eq!(state, "maybe"),
        }
        assert_eq!(state == "cached", reasons.is_empty(), "{name} {state} {reasons:?}");
    }
    let known = || said.keys().collect::<Vec<_>>();
    said.get(stage).unwrap_or_else(|| panic!("no {stage} among {:?}", known())).clone()
}

#[test]
fn for_every_edit_the_reason_is_said_and_the_run_does_as_was_said() {
    let sandbox = sandbox();
    let here = |stage: &str| said_and_done(&sandbox, "chain.toml", stage);
    let is = |state: &str, reasons: &[&str]| {
        (state.to_owned(), reasons.iter().map(|&reason| reason.to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(here("/last"), is("run", &["never run"]));
    assert_eq!(here("/last"), is("cached", &[]));

    // A file, with an equal outcome further down: only what reads it is sure to run.
    edit(&sandbox, "numbers.txt", "3", "7");
    let numbers = sandbox.path("numbers.txt").canonicalize().unwrap();
    let shown = numbers.file_name().unwrap().to_str().unwrap().to_owned();
    let said = here("/sorted");
    assert_eq!((said.0.as_str(), said.1.len()), ("run", 1));
    assert!(said.1[0].starts_with("file ") && said.1[0].ends_with(&format!("{shown} changed")), "{said:?}");
    edit(&sandbox, "numbers.txt", "7", "8");
    assert_eq!(here("/last"), is("maybe", &["input `first` may run"]));

    // A parameter, and back.
    edit(&sandbox, "chain.toml", "keep = 1", "keep = 2");
    let said = here("/first");
    assert_eq!(said.0, "run");
    assert!(said.1[0].starts_with("command.2 changed (\"head -n 1") && said.1[0].contains(" => "), "{said:?}");
    edit(&sandbox, "chain.toml", "keep = 2", "keep = 1");
    assert_eq!(here("/first"), is("cached", &[]));

    // A file that is declared no more.
    edit(&sandbox, "chain.toml", "cat all.txt > /dev/null; sort", "sort");
    edit(&sandbox, "chain.toml", "[\"numbers.txt\", \"all.txt\"]", "[\"numbers.txt\"]");
    let said = here("/sorted");
    assert_eq!(said.1[1], "files changed ([numbers.txt, all.txt] => [numbers.txt])", "{said:?}");

    // A stage whose name is new.
    edit(&sandbox, "chain.toml", "stages.alone", "stages.lone");
    assert_eq!(here("/lone"), is("cached", &[]));

    // Another input, which is there: the edge now leads elsewhere.
    edit(&sandbox, "chain.toml", "a = \"first\"", "a = \"lone\"");
    assert_eq!(here("/last"), is("run", &["input `lone` now differs (it was `first`)"]));
    edit(&sandbox, "chain.toml", "a = \"lone\"", "a = \"first\"");
    assert_eq!(here("/last"), is("cached", &[]));

    // What the producer makes has changed meanwhile, and the producer has run.
    edit(&sandbox, "chain.toml", "echo alone", "echo lonely");
    edit(&sandbox, "chain.toml", "a = \"first\"", "a = \"lone\"");
    sandbox.ok(&["run", "chain.toml", "--until", "lone"]);
    assert_eq!(here("/last").1, ["input `lone` now differs (it was `first`)"]);
    edit(&sandbox, "chain.toml", "echo lonely", "echo lonelier");
    sandbox.ok(&["run", "chain.toml", "--until", "lone"]);
    assert_eq!(here("/last"), is("run", &["input `lone` now differs (its output `out`)"]));

    // It fails, and is mended.
    sandbox.write("fail", "");
    edit(&sandbox, "chain.toml", "test ! -e", "test  ! -e");
    let said = here("/last");
    assert!(said.1[0].starts_with("command.2 changed"), "{said:?}");
    let said = plan(&sandbox, "chain.toml")["/last"].clone();
    assert!(said.1[0].starts_with("failed last time: `sh` "), "{said:?}");
    fs::remove_file(sandbox.path("fail")).unwrap();
    assert!(here("/last").1[0].starts_with("failed last time: "));

    // Its result is removed, and is damaged.
    let shown = sandbox.json(&["show", "--json", "chain/last"]);
    let key = shown["key"].as_str().unwrap().to_owned();
    fs::remove_file(sandbox.path(&format!("artifacts/manifests/{}/{key}.json", &key[..2]))).unwrap();
    assert_eq!(here("/last"), is("run", &["its result was removed"]));
    let file = sandbox.path(shown["path"].as_str().unwrap()).join("out");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&file, "7\n").unwrap();
    let said = here("/last");
    assert!(said.1[0].starts_with("its result is damaged: `") && said.1[0].contains("/out` "), "{said:?}");
    assert_eq!(here("/last"), is("cached", &[]));
    assert!(!files(&sandbox.path("artifacts/quarantine")).is_empty());
}

#[test]
fn a_value_added_to_a_sweep_is_a_new_trial() {
    let sandbox = sandbox();
    sandbox.write("sweep.toml", "pipeline = \"chain.toml\"\n[sweep.grid]\n\"params.keep\" = [1, 2]\n");
    let here = |stage: &str| said_and_done(&sandbox, "sweep.toml", stage);
    assert_eq!(here("keep=1/last").1, ["never run"]);
    sandbox.write("sweep.toml", "pipeline = \"chain.toml\"\n[sweep.grid]\n\"params.keep\" = [1, 2, 3]\n");
    let why = sandbox.json(&["why", "--json", "sweep.toml", "keep=3/last"]);
    let compared = &why[0]["compared_with"];
    assert_eq!(why[0]["because"], "new trial", "{why}");
    assert_eq!(compared["differences"], serde_json::json!(["input `first` runs"]), "{why}");
    let why = sandbox.json(&["why", "--json", "sweep.toml", "keep=3/first"]);
    let differences = why[0]["compared_with"]["differences"].as_array().unwrap();
    assert!(differences[0].as_str().unwrap().starts_with("command.2 changed"), "{why}");
    assert_eq!(here("keep=3/first").1, ["new trial"]);
    assert_eq!(here("keep=3/first").0, "cached");
}

#[test]
fn why_follows_the_inputs_to_the_cause() {
    let sandbox = sandbox();
    sandbox.ok(&["run", "chain.toml"]);
    let said = sandbox.ok(&["why", "chain.toml", "last"]).stdout;
    assert!(said.starts_with("cached  chain/last\n  made 2"), "{said}");
    edit(&sandbox, "numbers.txt", "3", "7");
    let said = sandbox.ok(&["why", "chain.toml", "last"]).stdout;
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], "maybe  chain/last");
    assert!(
        lines[1].starts_with("  because chain/sorted: file ") && lines[1].ends_with("numbers.txt changed"),
        "{said}"
    );
    assert_eq!(
        [&lines[2..6], &[lines[6].split(" file").next().unwrap()]].concat(),
        [
            "  - input `first` may run",
            "  maybe  chain/first",
            "    - input `sorted` runs",
            "    run  chain/sorted",
            "      -"
        ],
        "{said}"
    );
    let why = sandbox.json(&["why", "--json", "chain.toml", "last"]);
    let names: Vec<&Value> = why.as_array().unwrap().iter().map(|row| &row["names"][0]["stage"]).collect();
    assert_eq!(names, ["last", "first", "sorted"]);
    let wrong = sandbox.pipe(&["why", "chain.toml", "lst"]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("did you mean `last`?"), "{}", wrong.stderr);
}

#[test]
fn a_plan_says_how_long_and_by_its_exit_code_whether_anything_would_run() {
    let sandbox = sandbox();
    sandbox
        .write("slow.toml", "[stages.slow]\nkind = \"command\"\ncommand = [\"sleep\", \"0.3\"]\noutputs = [\"out\"]\n");
    edit(&sandbox, "slow.toml", "[\"sleep\", \"0.3\"]", "[\"sh\", \"-c\", \"sleep 0.3; echo > out\"]");
    assert_eq!(sandbox.pipe(&["plan", "slow.toml", "--exit-code"]).code, Some(3));
    let unknown = sandbox.ok(&["plan", "slow.toml"]);
    assert!(unknown.stderr.contains("how long 1 stage will take is not known"), "{}", unknown.stderr);
    sandbox.ok(&["run", "slow.toml"]);
    let cached = sandbox.ok(&["plan", "slow.toml", "--exit-code"]);
    assert!(!cached.stdout.contains("time"), "{}", cached.stdout);
    edit(&sandbox, "slow.toml", "echo >", "echo x >");
    let rows = sandbox.json(&["plan", "--json", "slow.toml"]);
    assert!(rows[0]["seconds"].as_f64().is_some_and(|seconds| seconds > 0.25), "{rows}");
    let said = sandbox.pipe(&["plan", "--json", "slow.toml", "--exit-code"]);
    assert_eq!((said.code, said.stdout.is_empty()), (Some(3), false));
    let said = sandbox.ok(&["plan", "slow.toml"]);
    assert!(said.stderr.contains(" of work"), "{}", said.stderr);
}

#[test]
fn a_large_sweep_is_told_in_few_lines() {
    let sandbox = sandbox();
    let values: Vec<String> = (1..=64).map(|value| value.to_string()).collect();
    let text = format!("pipeline = \"chain.toml\"\n[sweep.grid]\n\"params.keep\" = [{}]\n", values.join(", "));
    sandbox.write("sweep.toml", &text);
    let said = sandbox.ok(&["plan", "sweep.toml"]).stdout;
    let shown: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(shown.len(), 5, "{said}");
    assert!(said.contains("64 trials  first x64") && said.contains("64 trials  sorted "), "{said}");
    assert_eq!(sandbox.ok(&["plan", "sweep.toml", "--all"]).stdout.lines().count(), 1 + 4 * 64);
    assert_eq!(sandbox.json(&["plan", "--json", "sweep.toml"]).as_array().unwrap().len(), 4 * 64);
}

#[test]
fn the_configuration_says_where_every_value_comes_from_and_reads_again() {
    let sandbox = sandbox();
    sandbox.write("sweep.toml", "pipeline = \"chain.toml\"\n[sweep.grid]\n\"params.keep\" = [1, 2]\n");
    let said = sandbox.ok(&["config", "sweep.toml", "--trial", "keep=2", "--resolved", "--origin"]).stdout;
    assert!(said.contains("head -n 2 {inputs.a}"), "{said}");
    assert!(said.contains("# pipeline chain.toml:11 (params.keep sweep.toml:3)"), "{said}");
    assert!(said.contains("cpus = 0") && said.contains("# default"), "{said}");
    // It is the same configuration once more: every recipe is as it was.
    let stages = |file: &str, trial: &str| -> BTreeMap<String, String> {
        let recipes = recipes(&sandbox, file).into_iter();
        recipes.filter_map(|(name, recipe)| Some((name.strip_prefix(trial)?.to_owned(), recipe))).collect()
    };
    sandbox.write("again.toml", &said);
    assert_eq!(stages("again.toml", "/"), stages("sweep.toml", "keep=2/"));
    let written = sandbox.ok(&["config", "sweep.toml", "--trial", "keep=2"]).stdout;
    assert!(written.starts_with("[params]\nkeep = 2\n") && written.contains("${params.keep}"), "{written}");
    let json =
        sandbox.json(&["config", "sweep.toml", "first", "--json", "--resolved", "--set", "stages.first.env.A=\"b\""]);
    assert_eq!(json.as_array().unwrap().len(), 2);
    let values = &json[1]["values"];
    assert_eq!(values["stages.first.env.A"]["source"], "--set", "{values}");
    assert_eq!(
        (&values["stages.first.kind"]["line"], &values["stages.first.kind"]["file"]),
        (&10.into(), &"chain.toml".into())
    );
    let wrong = sandbox.pipe(&["config", "sweep.toml", "--trial", "keep=3"]);
    assert!(wrong.code == Some(2) && wrong.stderr.contains("there is `keep="), "{}", wrong.stderr);
    // A changed parameter is told with its place.
    sandbox.ok(&["run", "sweep.toml"]);
    edit(&sandbox, "chain.toml", "head -n", "head  -n");
    let said = sandbox.ok(&["why", "sweep.toml", "keep=1/first"]).stdout;
    assert!(said.contains(", at chain.toml:11\n"), "{said}");
}

#[test]
fn a_graph_is_written_as_its_file_is_called() {
    let sandbox = sandbox();
    sandbox.write("sweep.toml", "pipeline = \"chain.toml\"\n[sweep.grid]\n\"params.keep\" = [1, 2]\n");
    for (file, begin) in [("g.svg", "<svg "), ("g.dot", "digraph"), ("g.mmd", "flowchart"), ("g.txt", "○")] {
        sandbox.ok(&["graph", "sweep.toml", "-o", file]);
        let text = fs::read_to_string(sandbox.path(file)).unwrap();
        assert!(text.starts_with(begin) && text.contains("first"), "{file}: {text}");
    }
    let shown = sandbox.ok(&["graph", "sweep.toml"]).stdout;
    assert!(shown.contains("first x2") && shown.contains("<- sorted") && !shown.contains("sorted x2"), "{shown}");
    let one = sandbox.json(&["graph", "sweep.toml", "--trial", "keep=2", "--json"]);
    assert_eq!(one["stages"].as_array().unwrap().iter().map(|stage| &stage["count"]).collect::<Vec<_>>(), [1; 4]);
    assert_eq!(sandbox.pipe(&["graph", "sweep.toml", "-o", "g.png"]).code, Some(2));
    let stage =
        |number: usize| format!("[stages.s{number}]\nkind = \"command\"\ncommand = [\"true\"]\noutputs = [\"out\"]\n");
    sandbox.write("large.toml", &(0..501).map(stage).collect::<String>());
    let refused = sandbox.pipe(&["graph", "large.toml"]);
    assert!(
        refused.code == Some(2) && refused.stderr.contains("501 stages are too many to draw"),
        "{}",
        refused.stderr
    );
    assert!(refused.stderr.contains("--format dot"), "{}", refused.stderr);
    assert_eq!(sandbox.ok(&["graph", "large.toml", "--format", "dot"]).stdout.matches("[label").count(), 501);
}

#[test]
fn who_goes_back_to_an_earlier_value_may_be_spared() {
    let sandbox = sandbox();
    said_and_done(&sandbox, "chain.toml", "/first");
    edit(&sandbox, "chain.toml", "keep = 1", "keep = 2");
    said_and_done(&sandbox, "chain.toml", "/first");
    edit(&sandbox, "chain.toml", "keep = 2", "keep = 1");
    // It is sorted anew and comes out as before, so what rested on it with this value is there.
    sandbox.write("numbers.txt", "2\n1\n3\n");
    let (state, reasons) = plan(&sandbox, "chain.toml")["/first"].clone();
    assert_eq!((state.as_str(), reasons.len()), ("maybe", 2), "{reasons:?}");
    assert!(reasons[0].starts_with("command.2 changed"), "{reasons:?}");
    assert_eq!(ran(&sandbox, "chain.toml"), ["/sorted"]);
    // Nor need it have been the same experiment.
    sandbox
        .write("other.toml", &fs::read_to_string(sandbox.path("chain.toml")).unwrap().replace("keep = 1", "keep = 4"));
    ran(&sandbox, "other.toml");
    edit(&sandbox, "chain.toml", "keep = 1", "keep = 4");
    sandbox.write("numbers.txt", "1\n2\n3\n");
    let rows = sandbox.json(&["plan", "--json", "chain.toml", "other.toml"]);
    let first: Vec<&Value> = rows.as_array().unwrap().iter().filter(|row| row["stage"] == "first").collect();
    assert_eq!((first.len(), &first[0]["state"], &first[0]["shared_by"]), (2, &"maybe".into(), &2.into()), "{rows}");
    assert_eq!(sandbox.run(&["chain.toml", "other.toml"])["run"], 1, "it is sorted anew");
    edit(&sandbox, "chain.toml", "keep = 4", "keep = 1");
    // With a value that it never had there is nothing to come back to.
    edit(&sandbox, "chain.toml", "keep = 1", "keep = 3");
    sandbox.write("numbers.txt", "3\n2\n1\n");
    assert_eq!(said_and_done(&sandbox, "chain.toml", "/first").0, "run");
}
