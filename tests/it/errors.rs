//! Every error that people can meet, as they meet it: one snapshot, read it as a page. Whoever words one anew sees it here.
//!
//! Each has a place and, where there is something to do, a hint; none shows how the program is made.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use crate::sandbox::{Ended, Sandbox};

/// What is seen of one file: its text, and what `pipe check` says.
const FILES: &[(&str, &str)] = &[
    ("a string without an end", "[stages.a]\nkind = \"command\ncommand = [\"true\"]\n"),
    ("a key twice, a key without a value", "[stages.a]\nkind = \"command\"\nkind = \"model\"\ncommand\n"),
    ("an unknown field", "[stages.a]\nkind = \"command\"\ncommand = [\"true\"]\noutpts = [\"x\"]\n"),
    ("an unknown kind", "[stages.a]\nkind = \"comand\"\n"),
    ("no kind", "[stages.a]\ncommand = [\"true\"]\n"),
    ("a field that is missing", "[stages.a]\nkind = \"sft\"\nmodel = \"b\"\n"),
    ("a wrong type", "[stages.a]\nkind = \"command\"\ncommand = \"true\"\noutputs = [\"o\"]\n"),
    (
        "a number out of range",
        "[stages.a]\nkind = \"synthesize\"\ntask = { kind = \"maze\", rows = 1, columns = 3 }\nsplits = { train = 5 }\n",
    ),
    (
        "a word that is none of the choices",
        "[stages.a]\nkind = \"synthesize\"\ntask = { kind = \"maze\", rows = 3, columns = 3, algorithm = \"dsf\" }\nsplits = { train = 5 }\n",
    ),
    ("an unknown task", "[stages.a]\nkind = \"synthesize\"\ntask = { kind = \"mase\" }\nsplits = { train = 5 }\n"),
    ("a number that JSON would not keep", "[stages.a]\nkind = \"model\"\nseed = 9007199254740993\n"),
    (
        "no number",
        "[stages.a]\nkind = \"command\"\ncommand = [\"true\"]\noutputs = [\"o\"]\n[stages.a.run]\nretries = nan\n",
    ),
    (
        "a stage that is not there",
        "[stages.a]\nkind = \"command\"\ncommand = [\"true\"]\ninputs = { x = \"datta\" }\noutputs = [\"o\"]\n[stages.data]\nkind = \"command\"\ncommand = [\"true\"]\noutputs = [\"o\"]\n",
    ),
    (
        "an output that is not there",
        "[stages.a]\nkind = \"command\"\ncommand = [\"true\"]\ninputs = { x = \"b.q\" }\noutputs = [\"o\"]\n[stages.b]\nkind = \"command\"\ncommand = [\"true\"]\noutputs = [\"o\"]\n",
    ),
    (
        "an edge of another type",
        "[stages.a]\nkind = \"command\"\ncommand = [\"true\"]\noutputs = [\"o\"]\n[stages.b]\nkind = \"tokenize\"\ndataset = \"a\"\ntokenizer = \"a\"\n",
    ),
    (
        "a ring",
        "[stages.a]\nkind = \"command\"\ncommand = [\"true\"]\ninputs = { x = \"b\" }\noutputs = [\"o\"]\n[stages.b]\nkind = \"command\"\ncommand = [\"true\"]\ninputs = { x = \"a\" }\noutputs = [\"o\"]\n",
    ),
    ("a parameter that is not there", "[params]\nseed = 1\n[stages.a]\nkind = \"model\"\nseed = \"${params.sede}\"\n"),
    ("a text that is no reference", "[stages.a]\nkind = \"model\"\nseed = \"${seed}\"\n"),
    (
        "a parameter of another type",
        "[params]\nseed = \"one\"\n[stages.a]\nkind = \"model\"\ntokenizer = \"t\"\narchitecture = { kind = \"qwen2\", hidden_size = 8, layers = 1, heads = 1 }\nseed = \"${params.seed}\"\n[stages.t]\nkind = \"tokenizer\"\ntask = { kind = \"maze\", rows = 3, columns = 3 }\n",
    ),
    (
        "a file that is not there",
        "[stages.a]\nkind = \"command\"\ncommand = [\"sh\", \"run.sh\"]\nfiles = [\"run.sh\"]\noutputs = [\"o\"]\n",
    ),
    ("a pipeline that is not there", "pipeline = \"none.toml\"\n"),
    ("itself beneath itself", "extends = \"a.toml\"\n[stages.a]\nkind = \"command\"\ncommand = [\"true\"]\n"),
    ("an unknown table", "[stage.a]\nkind = \"command\"\ncommand = [\"true\"]\n"),
    (
        "a sweep of nothing",
        "[params]\nrate = 1\n[stages.a]\nkind = \"command\"\ncommand = [\"true\", \"x${params.rate}\"]\noutputs = [\"o\"]\n[sweep.grid]\n\"params.rat\" = [1, 2]\n",
    ),
    (
        "a sweep of one value",
        "[params]\nrate = 1\n[stages.a]\nkind = \"command\"\ncommand = [\"true\", \"x${params.rate}\"]\noutputs = [\"o\"]\n[sweep]\nseeds = [1, 2]\n",
    ),
    (
        "a metric that no stage measures",
        "[stages.a]\nkind = \"synthesize\"\ntask = { kind = \"maze\", rows = 3, columns = 3 }\nsplits = { train = 5 }\n[table]\nmetrics = [\"a.solvd\", \"b.solved\"]\n",
    ),
    (
        "a time that is none",
        "[stages.a]\nkind = \"command\"\ncommand = [\"true\"]\noutputs = [\"o\"]\nrun = { timeout = \"soon\" }\n",
    ),
    (
        "a device that is none",
        "[stages.a]\nkind = \"command\"\ncommand = [\"true\"]\noutputs = [\"o\"]\nrun = { device = \"gpu\" }\n",
    ),
];

/// A pipeline that learns, for mistakes of rewards; nothing of it runs.
const LEARNING: &str = r#"
[stages.mazes]
kind = "synthesize"
task = { kind = "maze", rows = 3, columns = 3 }
splits = { train = 5, rl = 5 }
[stages.tokenizer]
kind = "tokenizer"
task = { kind = "maze", rows = 3, columns = 3 }
[stages.tokens]
kind = "tokenize"
dataset = "mazes"
tokenizer = "tokenizer"
[stages.base]
kind = "model"
tokenizer = "tokenizer"
architecture = { kind = "qwen2", hidden_size = 8, layers = 1, heads = 1 }
[stages.grpo]
kind = "grpo"
model = "base"
prompts = "tokens"
steps = 1
max_new_tokens = 4
"#;

/// Tables of rewards that are wrong.
const REWARDS: &[(&str, &str)] = &[
    ("no reward at all", ""),
    (
        "a measurement that is not there",
        "[stages.grpo.rewards.x]\nkind = \"expression\"\nexpression = \"2 * progres\"\n",
    ),
    (
        "an expression that cannot be read",
        "[stages.grpo.rewards.x]\nkind = \"expression\"\nexpression = \"2 * (progress\"\n",
    ),
    ("a program without a name", "[stages.grpo.rewards.x]\nkind = \"program\"\ncommand = []\n"),
    (
        "an illegal pair",
        "ratio = \"sequence\"\nreduction = \"token_mean\"\n[stages.grpo.rewards.x]\nkind = \"correct\"\n",
    ),
];

/// Command lines in a folder with `good.toml` (which has run), `data.bin` (no text) and `folder`.
const LINES: &[&[&str]] = &[
    &["rnu", "good.toml"],
    &["run"],
    &["run", "good.toml", "--jbos", "2"],
    &["run", "good.toml", "--jobs", "two"],
    &["run", "good.toml", "--until", "lst"],
    &["run", "good.toml", "--slot", "gpu"],
    &["run", "none.toml"],
    &["run", "folder"],
    &["run", "data.bin"],
    &["run", "good.toml", "good.toml"],
    &["plan", "good.toml", "--set", "params.word"],
    &["plan", "good.toml", "--set", "params.wrd=2"],
    &["plan", "good.toml", "--set", "stages.last.comand=[\"a\"]"],
    &["show", "good"],
    &["show", "god/last"],
    &["show", "good/lst"],
    &["show", "good/last.q"],
    &["show", "good/seed=1/last"],
    &["show", "none.toml/last"],
    &["show", "good/last", "--store", "nowhere"],
    &["why", "good.toml", "lst"],
    &["config", "good.toml", "stage"],
    &["table", "good.toml", "--sort", "x"],
    &["graph", "good.toml", "-o", "graph.xyz"],
    &["bundle", "good.toml", "-o", "good.zip"],
    &["import", "data.bin"],
    &["import", "none.tar"],
    &["rescore", "good/last", "--rewards", "none.toml"],
    &["audit", "rewards", "good.toml"],
    &["accept", "good.toml", "lst", "--reason", "x"],
    &["gc", "--older-than", "soon"],
    &["verify", "--store", "nowhere"],
    &["export", "good/last", "folder"],
    &["export", "good/lst", "new"],
    &["init", "good.toml"],
    &["init", "a b"],
    &["init", "--template", "mazes"],
    &["fmt", "broken.toml"],
    &["fmt"],
    &["man", "rnu"],
    &["completions", "tcsh"],
    &["schema", "pipelin"],
    &["score", "nowhere", "rows.jsonl"],
    &["plan", "good.toml", "--store", "data.bin"],
    &["plan", "good.toml", "--store", "data.bin/store"],
    &["run", "good.toml", "--store", "/proc/none/store"],
    &["plan", "good.toml", "--store", "other"],
];

/// Stages that fail when they run, each alone in its file.
const FAILING: &[(&str, &str)] = &[
    ("a program that fails", "command = [\"sh\", \"-c\", \"echo first; echo no such thing >&2; exit 3\"]\n"),
    ("a program that is not there", "command = [\"no-such-program\"]\n"),
    ("a program that leaves nothing", "command = [\"true\"]\n"),
    ("a program that is killed", "command = [\"sh\", \"-c\", \"kill -9 $$\"]\n"),
    ("a program that takes too long", "command = [\"sleep\", \"60\"]\nrun = { timeout = \"100ms\" }\n"),
    ("a GPU that is not there", "command = [\"true\"]\nrun = { device = \"cuda:7\" }\n"),
    ("more memory than there is", "command = [\"true\"]\nrun = { memory = \"900000GiB\" }\n"),
    ("a slot that nobody has", "command = [\"true\"]\nrun = { slots = { licence = 3 } }\n"),
];

/// Programs that are tasks, and wrong ones: a shell script each, which is asked to `generate`.
const TASKS: &[(&str, &str)] = &[
    ("a task that crashes", "read -r line; echo 'Traceback: no such maze' >&2; exit 1"),
    ("a task that ends", "exit 0"),
    ("a task that hangs", "read -r line; sleep 60"),
    ("a task that says no JSON", "read -r line; echo hello; sleep 9"),
    ("a task that says NaN", "read -r line; echo '{\"instances\": [{\"a\": NaN}]}'; sleep 9"),
    ("a task that miscounts", "read -r line; echo '{\"instances\": [{}]}'; sleep 9"),
    ("a task that answers something else", "read -r line; echo '{\"rewards\": []}'; sleep 9"),
];

/// Rows that are no data.
const ROWS: &[(&str, &str)] = &[
    ("a row that is no JSON", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \n"),
    ("a row without an answer", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n"),
    ("a row that is no text", "{\"prompt\": \"a\", \"completion\": 1}\n"),
    ("rows of nothing", "{\"question\": \"a\"}\n"),
    ("no row", ""),
];

const GOOD: &str = r#"
[params]
word = "one"
[stages.last]
kind = "command"
command = ["sh", "-c", "echo ${params.word} > out"]
outputs = ["out"]
"#;

/// The errors as a page.
#[derive(Default)]
struct Page(String);

impl Page {
    /// What was asked, and all that was said.
    fn add(&mut self, sandbox: &Sandbox, title: &str, asked: &str, ended: &Ended) {
        let said = redacted(sandbox, &ended.stderr);
        let code = ended.code.map_or_else(|| "no code".to_owned(), |code| code.to_string());
        assert!(ended.code != Some(0), "{title}: `{asked}` went well\n{}", ended.stdout);
        assert!(ended.code != Some(70), "{title}: `{asked}` is a bug\n{said}");
        assert!(!said.trim().is_empty(), "{title}: `{asked}` fails without a word");
        let _ = write!(self.0, "# {title}\n$ {asked}\n{}\n[{code}]\n\n", said.trim_end());
    }
}

/// The text without what differs from run to run and from machine to machine.
fn redacted(sandbox: &Sandbox, text: &str) -> String {
    let place = fs::canonicalize(sandbox.path(".")).unwrap();
    let text = text.replace(&format!("{}/", place.display()), "").replace(&place.display().to_string(), ".");
    let mut shown = String::new();
    let mut word = String::new();
    let flush = |word: &mut String, shown: &mut String| {
        let is_digest = word.len() >= 10
            && word.bytes().all(|byte| byte.is_ascii_hexdigit())
            && word.bytes().any(|byte| byte.is_ascii_digit())
            && word.bytes().any(|byte| byte.is_ascii_alphabetic());
        let is_time =
            word.strip_suffix('s').is_some_and(|number| number.contains('.') && number.parse::<f64>().is_ok());
        shown.push_str(if is_digest {
            "DIGEST"
        } else if is_time {
            "TIME"
        } else {
            word
        });
        word.clear();
    };
    for c in text.chars() {
        if c.is_alphanumeric() || c == '.' {
            word.push(c);
        } else {
            flush(&mut word, &mut shown);
            shown.push(c);
        }
    }
    flush(&mut word, &mut shown);
    // What the machine has differs, too.
    let lines = shown.lines().map(|line| line.split("and this machine ").next().unwrap_or(line).trim_end());
    lines.collect::<Vec<_>>().join("\n")
}

/// What shows how the program is made, and helps nobody.
const INNARDS: &[&str] = &[
    "panicked",
    "stack backtrace",
    "RUST_BACKTRACE",
    "Some(",
    "Err(",
    "Ok(",
    "Os {",
    "kind: ",
    "src/",
    ".rs:",
    "\\n",
    "thread '",
];

#[test]
fn every_error_has_a_place_and_a_hint_and_shows_no_innards() {
    let mut page = Page::default();
    reading(&mut page);
    command_lines(&mut page);
    running(&mut page);
    let page = page.0;
    for word in INNARDS {
        let line =
            page.lines().find(|line| line.contains(word) && !line.starts_with("$ ") && !line.contains("kind = "));
        assert!(line.is_none(), "`{word}` in: {}", line.unwrap_or_default());
    }
    insta::assert_snapshot!(page);
}

fn reading(page: &mut Page) {
    let checked = |page: &mut Page, title: &str, text: &str| {
        let sandbox = Sandbox::new();
        sandbox.write("a.toml", text);
        page.add(&sandbox, title, "pipe check a.toml", &sandbox.pipe(&["check", "a.toml"]));
    };
    for (title, text) in FILES {
        checked(page, title, text);
    }
    for (title, text) in REWARDS {
        checked(page, title, &format!("{LEARNING}{text}"));
    }
}

fn command_lines(page: &mut Page) {
    let sandbox = Sandbox::new();
    sandbox.write("good.toml", GOOD).write("broken.toml", "a = = 1\n").write("folder/file", "");
    fs::write(sandbox.path("data.bin"), [0xff, 0xfe, 0x00, 0x80]).unwrap();
    sandbox.ok(&["run", "good.toml"]);
    sandbox.write("other/FORMAT", "999\n");
    for line in LINES {
        page.add(&sandbox, "a command line", &format!("pipe {}", line.join(" ")), &sandbox.pipe(line));
    }
    // A full disk behind stdout.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = sandbox.command(&["schema"]);
    let output = command.stdout(full).stderr(Stdio::piped()).output().unwrap();
    page.add(&sandbox, "a full disk", "pipe schema > /dev/full", &Ended::of(&output));
    page.add(
        &sandbox,
        "a full disk",
        "pipe reference --write /dev/full",
        &sandbox.pipe(&["reference", "--write", "/dev/full"]),
    );
    // A result that somebody has changed.
    let shown = sandbox.json(&["show", "--json", "good/last"]);
    let file = sandbox.path(shown["path"].as_str().unwrap()).join("out");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&file, "two\n").unwrap();
    for line in [&["show", "good/last"][..], &["export", "good/last", "new"], &["verify"]] {
        page.add(&sandbox, "a result that was changed", &format!("pipe {}", line.join(" ")), &sandbox.pipe(line));
    }
}

fn running(page: &mut Page) {
    let run = |page: &mut Page, title: &str, text: &str, files: &[(&str, &str)]| {
        let sandbox = Sandbox::new();
        sandbox.write("a.toml", text);
        for (name, text) in files {
            sandbox.write(name, text);
        }
        page.add(&sandbox, title, "pipe run a.toml --quiet", &sandbox.pipe(&["run", "a.toml", "--quiet"]));
    };
    for (title, text) in FAILING {
        run(page, title, &format!("[stages.a]\nkind = \"command\"\noutputs = [\"out\"]\n{text}"), &[]);
    }
    for (title, script) in TASKS {
        let text = "[stages.a]\nkind = \"synthesize\"\nsplits = { train = 2 }\n[stages.a.task]\nkind = \"program\"\ncommand = [\"sh\", \"task.sh\"]\n\
                    files = [\"task.sh\"]\nmeasures = [\"solved\"]\ntimeout_seconds = 1\n";
        run(page, title, text, &[("task.sh", script)]);
    }
    for (title, rows) in ROWS {
        run(
            page,
            title,
            "[stages.a]\nkind = \"dataset\"\nfiles = { train = \"rows.jsonl\" }\n",
            &[("rows.jsonl", rows)],
        );
    }
    // The program that trains is not there.
    let sandbox = Sandbox::new();
    let worker = sandbox.path("no-worker");
    sandbox.write("a.toml", &format!("{LEARNING}[stages.grpo.rewards.x]\nkind = \"correct\"\n"));
    let mut command = sandbox.command(&["run", "a.toml", "--quiet"]);
    let output = command.env("PIPE_WORKER", &worker).output().unwrap();
    page.add(
        &sandbox,
        "a worker that is not there",
        "PIPE_WORKER=no-worker pipe run a.toml --quiet",
        &Ended::of(&output),
    );
}
