//! The life of results from the outside: collected, accepted, carried elsewhere, verified; and every way to ask for that wrongly.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{Ended, Sandbox, files, wait_for};

/// Two stages in a row over a file of the user's; the second writes what the parameter says.
const CHAIN: &str = r#"
    [params]
    word = "one"
    [stages.data]
    kind = "command"
    command = ["sh", "-c", "sort numbers.txt > out"]
    files = ["numbers.txt"]
    outputs = ["out"]
    [stages.last]
    kind = "command"
    command = ["sh", "-c", "cat {inputs.a}/out > out; echo ${params.word} >> out"]
    inputs = { a = "data" }
    outputs = ["out"]
"#;

fn chain() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("numbers.txt", "3\n1\n").write("chain.toml", CHAIN);
    sandbox
}

/// How many stages ran, and how many were cached.
fn ran(outcome: &Value) -> (u64, u64) {
    assert_eq!(outcome["code"], 0, "{outcome}");
    (outcome["run"].as_u64().unwrap(), outcome["cached"].as_u64().unwrap())
}

fn with_word(word: &str) -> String {
    format!("params.word=\"{word}\"")
}

fn refused(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}\n{}", ended.stdout, ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "no `{word}` in:\n{}", ended.stderr);
    }
}

fn objects(sandbox: &Sandbox) -> usize {
    files(&sandbox.path("artifacts/objects")).len()
}

/// Changes one byte of a file that may be read-only.
fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, mode).unwrap();
}

#[test]
fn a_collection_plans_first_and_removes_only_when_told_to() {
    let sandbox = chain();
    for word in ["one", "two", "three"] {
        sandbox.run(&["chain.toml", "--set", &with_word(word)]);
    }
    assert_eq!(objects(&sandbox), 4);
    let plan = sandbox.json(&["gc", "--keep-last", "1", "--dry-run", "--json"]);
    assert_eq!((plan["results"].as_array().unwrap().len(), &plan["removed"]), (2, &Value::Null), "{plan}");
    assert_eq!(plan["results"][0]["name"], "chain/last");
    refused(&sandbox.pipe(&["gc", "--keep-last", "1"]), 2, &["nothing was removed", "--yes"]);
    assert_eq!(objects(&sandbox), 4);
    let removed = sandbox.json(&["gc", "--keep-last", "1", "--yes", "--json"]);
    assert_eq!((removed["removed"]["results"].as_u64(), removed["removed"]["objects"].as_u64()), (Some(2), Some(2)));
    assert_eq!(objects(&sandbox), 2);
    assert_eq!(ran(&sandbox.run(&["chain.toml", "--set", &with_word("three")])), (0, 2));
    assert_eq!(ran(&sandbox.run(&["chain.toml", "--set", &with_word("two")])), (1, 1));
    assert!(sandbox.ok(&["gc", "--yes"]).stdout.contains("nothing to remove"));
    assert_eq!(sandbox.pipe(&["verify"]).code, Some(0));
}

#[test]
fn pins_and_named_experiments_hold_what_policies_would_take() {
    let sandbox = chain();
    sandbox.run(&["chain.toml"]);
    sandbox.ok(&["gc", "--pin", "chain/last"]);
    sandbox.run(&["chain.toml", "--set", &with_word("two")]);
    let all = ["gc", "--max-size", "0", "--yes", "--json"];
    let plan = sandbox.json(&["gc", "--max-size", "0", "--keep", "chain.toml", "--dry-run", "--json"]);
    assert_eq!(
        (plan["kept"]["pinned"]["count"].as_u64(), plan["kept"]["needed"]["count"].as_u64()),
        (Some(2), Some(1)),
        "{plan}"
    );
    assert_eq!(sandbox.json(&all)["removed"]["results"], 1, "the data alone is neither pinned nor needed");
    let pins = sandbox.json(&["gc", "--pins", "--json"]);
    assert_eq!((&pins[0]["name"], pins.as_array().unwrap().len()), (&"chain/last".into(), 1));
    refused(&sandbox.pipe(&["gc", "--pin", "chain/lost"]), 2, &["chain/lost", "EXPERIMENT"]);
    refused(&sandbox.pipe(&["gc", "--unpin", "chain/lasd"]), 2, &["did you mean `chain/last`"]);
    sandbox.ok(&["gc", "--unpin", "chain/last"]);
    assert_eq!(sandbox.json(&all)["removed"]["results"], 2);
    assert_eq!((objects(&sandbox), files(&sandbox.path("artifacts/manifests")).len()), (0, 0));
    assert_eq!(ran(&sandbox.run(&["chain.toml"])), (2, 0));
}

#[test]
fn age_counts_from_the_last_run_that_used_a_result() {
    let sandbox = chain();
    sandbox.run(&["chain.toml"]);
    sandbox.run(&["chain.toml", "--set", &with_word("two")]);
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(ran(&sandbox.run(&["chain.toml"])), (0, 2));
    let plan = sandbox.json(&["gc", "--max-size", "9", "--dry-run", "--json"]);
    let first = plan["results"][0]["last_used"].as_str().unwrap().to_owned();
    let removed = sandbox.json(&["gc", "--max-size", "9", "--yes", "--json"]);
    assert!(removed["removed"]["results"].as_u64().unwrap() >= 1, "{first}");
    let plan = sandbox.json(&["plan", "--json", "chain.toml", "--set", &with_word("two")]);
    assert_eq!(plan[1]["state"], "run", "the one not used since went first: {plan}");
}

#[test]
fn policies_that_cannot_be_understood_are_refused() {
    let sandbox = chain();
    refused(&sandbox.pipe(&["gc"]), 2, &["there is no store"]);
    assert!(!sandbox.path("artifacts").exists());
    sandbox.run(&["chain.toml"]);
    for wrong in [["--older-than", "30"], ["--older-than", "soon"], ["--max-size", "5 apples"], ["--keep-last", "0"]] {
        refused(&sandbox.pipe(&["gc", wrong[0], wrong[1]]), 2, &[wrong[1]]);
    }
    refused(&sandbox.pipe(&["gc", "--keep", "none.toml"]), 2, &["none.toml"]);
    refused(&sandbox.pipe(&["gc", "--pin", "a", "--older-than", "1d"]), 2, &["cannot be used with"]);
}

#[test]
fn a_collection_beside_runs_takes_nothing_from_them_and_a_killed_one_leaves_whole_results() {
    let sandbox = Sandbox::new();
    let text = r#"
        [stages.data]
        kind = "command"
        command = ["sh", "-c", "seq 1000 > out"]
        outputs = ["out"]
        [stages.slow]
        kind = "command"
        command = ["sh", "-c", "touch BEGAN; WAIT; wc -l < {inputs.a}/out > out"]
        inputs = { a = "data" }
        outputs = ["out"]
        [stages.after]
        kind = "command"
        command = ["sh", "-c", "cat {inputs.a}/out {inputs.b}/out | wc -l > out"]
        inputs = { a = "data", b = "slow" }
        outputs = ["out"]
    "#;
    let text = text.replace("BEGAN", sandbox.path("began").to_str().unwrap());
    sandbox.write("slow.toml", &text.replace("WAIT", &sandbox.until_there("go")));
    let run = sandbox.start(&["run", "--json", "slow.toml"]);
    wait_for("the slow stage", || sandbox.path("began").exists());
    // The slow stage may begin before the result that it reads is durable.
    let is_manifest = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "json");
    wait_for("its input's result", || files(&sandbox.path("artifacts/manifests")).iter().any(is_manifest));
    let report = sandbox.json(&["gc", "--max-size", "0", "--yes", "--json"]);
    assert_eq!(report["kept"]["in_use"]["count"], 1, "{report}");
    for milliseconds in 0..20 {
        let mut collection = sandbox.start(&["gc", "--max-size", "0", "--yes"]);
        std::thread::sleep(Duration::from_millis(milliseconds));
        collection.kill().unwrap();
        collection.wait().unwrap();
    }
    sandbox.write("go", "");
    let ended = Ended::of(&run.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let outcome: Value = serde_json::from_str(ended.stdout.lines().last().unwrap()).unwrap();
    assert_eq!((&outcome["run"], &outcome["failed"]), (&3.into(), &0.into()), "nothing was made twice");
    assert_eq!(ran(&sandbox.run(&["slow.toml"])), (0, 3));
    assert_eq!(sandbox.pipe(&["verify"]).code, Some(0));
    assert_eq!(sandbox.json(&["gc", "--max-size", "0", "--yes", "--json"])["removed"]["results"], 3);
}

#[test]
fn a_cosmetic_change_is_accepted_shown_and_taken_back() {
    let sandbox = chain();
    sandbox.run(&["chain.toml"]);
    let before = sandbox.digest("chain/last");
    let set = with_word("uno");
    let accepted =
        sandbox.json(&["accept", "chain.toml", "last", "--set", &set, "--reason", "a word in Spanish", "--json"]);
    assert_eq!(accepted[0]["name"], "chain/last");
    assert!(accepted[0]["differences"][0].as_str().unwrap().contains("uno"), "{accepted}");
    let plan = sandbox.json(&["plan", "--json", "chain.toml", "--set", &set]);
    assert_eq!((&plan[1]["state"], &plan[1]["reasons"][0]), (&"cached".into(), &"accepted: a word in Spanish".into()));
    assert_eq!(ran(&sandbox.run(&["chain.toml", "--set", &set])), (0, 2));
    let shown = sandbox.json(&["show", "--json", "chain/last"]);
    assert_eq!((&shown["digest"], &shown["accepted"]["reason"]), (&before.into(), &"a word in Spanish".into()));
    assert!(sandbox.ok(&["show", "chain/last"]).stdout.contains("a word in Spanish"));
    // A chain of acceptances keeps the one that was computed, which may go.
    let third = with_word("un");
    sandbox.ok(&["accept", "chain.toml", "last", "--set", &third, "--reason", "and in French"]);
    let shown = sandbox.json(&["show", "--json", "chain/last"]);
    assert_eq!(shown["accepted"]["earlier"]["reason"], "a word in Spanish");
    assert_eq!(sandbox.json(&["gc", "--keep-last", "1", "--yes", "--json"])["removed"]["objects"], 0);
    assert_eq!(
        (ran(&sandbox.run(&["chain.toml", "--set", &third])), sandbox.pipe(&["verify"]).code),
        ((0, 2), Some(0))
    );
    sandbox.ok(&["accept", "chain.toml", "last", "--set", &third, "--undo"]);
    assert_eq!(ran(&sandbox.run(&["chain.toml", "--set", &third])), (1, 1));
    refused(&sandbox.pipe(&["accept", "chain.toml", "last", "--set", &third, "--undo"]), 2, &["not accepted"]);
}

#[test]
fn stages_that_have_come_to_one_key_are_accepted_and_taken_back_together() {
    let sandbox = chain();
    let noted = CHAIN.replace("numbers.txt > out\"]", "numbers.txt > out # ${params.note}\"]");
    let sweep = "[sweep.grid]\n\"params.note\" = [\"a\", \"b\"]\n";
    sandbox.write("noted.toml", &noted.replace("word = \"one\"", "word = \"one\"\n    note = \"\""));
    sandbox.write("sweep.toml", &format!("pipeline = \"noted.toml\"\n{sweep}"));
    assert_eq!(sandbox.run(&["sweep.toml"])["failed"], 0);
    let set = with_word("uno");
    let accept = ["accept", "sweep.toml", "last", "--set", &set, "--json"];
    let keys = |done: &Value| {
        let keys = done.as_array().unwrap().iter().map(|one| one["key"].to_string());
        (done.as_array().unwrap().len(), keys.collect::<std::collections::BTreeSet<_>>().len())
    };
    assert_eq!(keys(&sandbox.json(&[&accept[..], &["--reason", "x"]].concat())), (2, 1));
    assert_eq!(ran(&sandbox.run(&["sweep.toml", "--set", &set])).0, 0);
    // What is damaged can be taken back as well.
    let shown = sandbox.json(&["show", "--json", "sweep/note=a/last"]);
    flip(&sandbox.path(shown["path"].as_str().unwrap()).join("out"), 0);
    let again = sandbox.pipe(&["accept", "sweep.toml", "last", "--set", &set, "--reason", "x"]);
    refused(&again, 1, &["is there already", "is damaged", "verify --repair"]);
    assert_eq!(keys(&sandbox.json(&[&accept[..], &["--undo"]].concat())), (2, 1));
    refused(&sandbox.pipe(&[&accept[..], &["--undo"]].concat()), 2, &["was not accepted"]);
    let plan = sandbox.json(&["plan", "--json", "sweep.toml"]);
    let state = |stage: &Value| (stage["stage"] == "last").then(|| stage["reasons"][0].to_string());
    assert!(plan.as_array().unwrap().iter().filter_map(state).all(|reason| !reason.contains("uno")), "{plan}");
}

#[test]
fn what_is_packed_counts_as_used_and_a_collection_that_takes_nothing_folds_what_runs_have_left() {
    let sandbox = chain();
    for word in ["one", "two", "three"] {
        sandbox.run(&["chain.toml", "--set", &with_word(word)]);
    }
    let leases = || files(&sandbox.path("artifacts/leases")).len();
    assert_eq!(leases(), 3);
    sandbox.ok(&["gc", "--dry-run"]);
    assert_eq!(leases(), 3);
    sandbox.ok(&["gc", "--yes"]);
    assert_eq!(leases(), 1);
    sandbox.ok(&["bundle", "chain.toml", "-o", "chain.tar"]);
    assert_eq!(leases(), 2);
}

#[test]
fn what_cannot_be_accepted_is_refused_with_the_reason() {
    let sandbox = chain();
    let accept = |more: &[&str]| sandbox.pipe(&[&["accept", "chain.toml"], more].concat());
    refused(&accept(&["last", "--reason", "x"]), 2, &["there is no store"]);
    sandbox.ok(&["run", "chain.toml", "--until", "data"]);
    refused(&accept(&["last", "--reason", "x"]), 2, &["never run"]);
    sandbox.run(&["chain.toml"]);
    refused(&accept(&["last"]), 2, &["--reason"]);
    refused(&accept(&["last", "--reason", "  "]), 2, &["reason is empty"]);
    refused(&accept(&["lasd", "--reason", "x"]), 2, &["no stage `lasd`", "did you mean `last`"]);
    refused(&accept(&["last", "--reason", "x"]), 2, &["has its result already"]);
    let other = CHAIN
        .replace("outputs = [\"out\"]\n    [stages.last]", "outputs = [\"out\", \"numbers.txt\"]\n    [stages.last]");
    sandbox.write("chain.toml", &other);
    refused(&accept(&["last", "--reason", "x"]), 2, &["its input `data` is not there", "run or accept `data`"]);
    refused(&accept(&["data", "--reason", "x"]), 2, &["has the outputs `out` (files)", "`numbers.txt`"]);
    sandbox.write("chain.toml", CHAIN);
    let result = sandbox.json(&["show", "--json", "chain/last"]);
    flip(&sandbox.path(result["path"].as_str().unwrap()).join("out"), 0);
    refused(&accept(&["last", "--set", &with_word("two"), "--reason", "x"]), 1, &["is damaged", "verify --repair"]);
    sandbox.pipe(&["verify", "--repair"]);
    refused(&accept(&["last", "--set", &with_word("two"), "--reason", "x"]), 2, &["no longer in the store"]);
}

/// A project over three folders: a pipeline beneath, an experiment that extends another, files beside and above.
fn project() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("project/data/numbers.txt", "3\n1\n").write("project/data/tools/run.sh", "#!/bin/sh\nsort \"$1\"\n");
    fs::set_permissions(sandbox.path("project/data/tools/run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    let pipeline = CHAIN
        .replace("[\"numbers.txt\"]", "[\"numbers.txt\", \"tools\"]")
        .replace("sort numbers.txt", "tools/run.sh numbers.txt");
    sandbox.write("project/data/pipeline.toml", &pipeline);
    sandbox.write("project/experiments/base.toml", "description = \"base\"\npipeline = \"../data/pipeline.toml\"\n");
    let experiment = "extends = \"base.toml\"\n[sweep.grid]\n\"params.word\" = [\"one\", \"two\"]\n";
    sandbox.write("project/experiments/words.toml", experiment);
    sandbox.ok(&["run", "project/experiments/words.toml"]);
    sandbox
}

#[test]
fn a_bundle_runs_elsewhere_without_running_anything() {
    for name in ["words.tar", "words.tar.zst"] {
        let sandbox = project();
        sandbox.ok(&["bundle", "project/experiments/words.toml", "-o", name, "--logs"]);
        sandbox.ok(&["bundle", "project/experiments/words.toml", "-o", &format!("again-{name}"), "--logs"]);
        let bytes = fs::read(sandbox.path(name)).unwrap();
        assert_eq!(bytes, fs::read(sandbox.path(&format!("again-{name}"))).unwrap(), "equal content, equal bytes");
        fs::rename(sandbox.path("project"), sandbox.path("gone")).unwrap();
        fs::rename(sandbox.path("artifacts"), sandbox.path("gone-store")).unwrap();
        let report = sandbox.json(&["import", name, "--into", "there", "--json"]);
        assert_eq!(
            (report["results"].as_u64(), report["known"].as_u64(), report["files"].as_u64()),
            (Some(3), Some(0), Some(5))
        );
        let there = ["there/experiments/words.toml", "--store", "there/artifacts"];
        assert_eq!(ran(&sandbox.run(&there)), (0, 3));
        assert_eq!(sandbox.pipe(&["verify", "--store", "there/artifacts"]).code, Some(0));
        let shown = sandbox.json(&["show", "--json", "words/word=two/last", "--store", "there/artifacts"]);
        assert_eq!(fs::read_to_string(Path::new(shown["path"].as_str().unwrap()).join("out")).unwrap(), "1\n3\ntwo\n");
        assert!(!files(&sandbox.path("there/artifacts/logs")).is_empty());
        // Packed there, it is the same bundle; imported again, it changes nothing.
        let report = sandbox.json(&["import", name, "--into", "there", "--json"]);
        assert_eq!(
            (report["results"].as_u64(), report["known"].as_u64(), report["files"].as_u64()),
            (Some(0), Some(3), Some(0))
        );
        sandbox.ok(&["bundle", there[0], "--store", there[2], "-o", "third.tar", "--logs"]);
        if name == "words.tar" {
            assert_eq!(fs::read(sandbox.path("third.tar")).unwrap(), bytes);
        }
    }
}

#[test]
fn a_bundle_that_is_not_whole_is_refused_and_leaves_nothing() {
    let sandbox = project();
    for name in ["words.tar", "words.tar.zst"] {
        sandbox.ok(&["bundle", "project/experiments/words.toml", "-o", name]);
        let whole = fs::read(sandbox.path(name)).unwrap();
        let mut harmed: Vec<Vec<u8>> = (1..4).map(|fourth| whole[..whole.len() * fourth / 4].to_vec()).collect();
        for at in (0..whole.len()).step_by(whole.len() / 14 + 1) {
            harmed.push(whole.clone());
            harmed.last_mut().unwrap()[at] ^= 0x10;
        }
        let mut refusals = 0;
        for bytes in harmed {
            fs::write(sandbox.path("harmed"), bytes).unwrap();
            let ended = sandbox.pipe(&["import", "harmed", "--into", "there"]);
            if ended.code == Some(0) {
                // The byte was padding, which says nothing.
                let there = ["there/experiments/words.toml", "--store", "there/artifacts"];
                assert_eq!(ran(&sandbox.run(&there)), (0, 3));
                Command::new("chmod").args(["-R", "u+w"]).arg(sandbox.path("there")).status().unwrap();
                fs::remove_dir_all(sandbox.path("there")).unwrap();
                continue;
            }
            refusals += 1;
            refused(&ended, 2, &["harmed"]);
            assert!(!sandbox.path("there/experiments").exists() && !sandbox.path("there/data").exists());
            for folder in ["objects", "manifests", "work", "runs"] {
                assert!(files(&sandbox.path("there/artifacts").join(folder)).is_empty(), "{folder}");
            }
        }
        assert!(refusals > 6, "{refusals} of {name}");
    }
    sandbox.write("no-bundle.tar", "just text");
    refused(&sandbox.pipe(&["import", "no-bundle.tar"]), 2, &["no-bundle.tar"]);
    refused(&sandbox.pipe(&["import", "none.tar"]), 2, &["none.tar"]);
    sandbox.write("empty.tar", "");
    refused(&sandbox.pipe(&["import", "empty.tar"]), 2, &["empty"]);
    Command::new("tar").args(["cf", "other.tar", "project"]).current_dir(sandbox.path("")).status().unwrap();
    refused(&sandbox.pipe(&["import", "other.tar", "--into", "other"]), 2, &["is no bundle of this program"]);
    assert!(!sandbox.path("other").exists());
}

#[test]
fn an_import_overwrites_nothing_and_can_be_killed_and_repeated() {
    let sandbox = project();
    sandbox.ok(&["bundle", "project/experiments/words.toml", "-o", "words.tar"]);
    sandbox.write("there/data/numbers.txt", "mine\n");
    let ended = sandbox.pipe(&["import", "words.tar", "--into", "there"]);
    refused(&ended, 2, &["there/data/numbers.txt", "differs"]);
    assert_eq!(fs::read_to_string(sandbox.path("there/data/numbers.txt")).unwrap(), "mine\n");
    assert!(
        !sandbox.path("there/experiments").exists() && files(&sandbox.path("there/artifacts/manifests")).is_empty()
    );
    fs::create_dir_all(sandbox.path("linked")).unwrap();
    std::os::unix::fs::symlink(sandbox.path("project"), sandbox.path("linked/experiments")).unwrap();
    refused(&sandbox.pipe(&["import", "words.tar", "--into", "linked"]), 2, &["leads out of"]);
    for kill in (0..30).step_by(3) {
        let mut import =
            sandbox.command(&["import", "words.tar", "--into", "killed"]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(kill));
        import.kill().unwrap();
        import.wait().unwrap();
    }
    sandbox.ok(&["import", "words.tar", "--into", "killed"]);
    let there = ["killed/experiments/words.toml", "--store", "killed/artifacts"];
    assert_eq!(ran(&sandbox.run(&there)), (0, 3));
    let left: Vec<_> =
        files(&sandbox.path("killed")).into_iter().filter(|path| path.to_string_lossy().contains(".import-")).collect();
    sandbox.ok(&["gc", "--yes", "--store", "killed/artifacts"]);
    assert!(files(&sandbox.path("killed/artifacts/work")).is_empty() && left.is_empty(), "{left:?}");
}

#[test]
fn what_cannot_be_carried_is_refused_before_anything_is_written() {
    let sandbox = project();
    let bundle = |file: &str, out: &str| sandbox.pipe(&["bundle", file, "-o", out]);
    refused(&bundle("project/experiments/words.toml", "words.zip"), 2, &[".tar.zst"]);
    refused(&bundle("none.toml", "words.tar"), 2, &["none.toml"]);
    refused(
        &sandbox.pipe(&["bundle", "project/experiments/words.toml", "-o", "x.tar", "--store", "none"]),
        2,
        &["no store"],
    );
    let pipeline = sandbox.path("project/data/pipeline.toml");
    sandbox.write("absolute.toml", &format!("pipeline = \"{}\"\n", pipeline.display()));
    refused(&bundle("absolute.toml", "x.tar"), 2, &["absolute path", "relative to the TOML file"]);
    let shown = sandbox.json(&["show", "--json", "words/word=one/last"]);
    flip(&sandbox.path(shown["path"].as_str().unwrap()).join("out"), 0);
    let ended = bundle("project/experiments/words.toml", "damaged.tar");
    // The plan sees the damage by the file's stat, so the stage would run there.
    assert!(ended.stderr.contains("1 stage without a result"), "{}", ended.stderr);
    fs::create_dir(sandbox.path("closed")).unwrap();
    fs::set_permissions(sandbox.path("closed"), fs::Permissions::from_mode(0o555)).unwrap();
    let ended = bundle("project/experiments/words.toml", "closed/x.tar");
    // Root may write everywhere.
    assert!(ended.code == Some(0) || ended.stderr.contains("closed/x.tar"), "{}", ended.stderr);
    assert!(!files(&sandbox.path("")).iter().any(|path| path.to_string_lossy().contains(".bundle-")));
}

#[test]
fn an_interrupted_verification_goes_on_where_it_stopped() {
    let sandbox = Sandbox::new();
    let stages: Vec<String> = (0..6)
        .map(|number| {
            format!(
                "[stages.s{number}]\nkind = \"command\"\noutputs = [\"out\"]\n\
                 command = [\"sh\", \"-c\", \"head -c 20000000 /dev/zero > out; echo {number} >> out\"]\n"
            )
        })
        .collect();
    sandbox.write("large.toml", &stages.concat());
    sandbox.ok(&["run", "large.toml"]);
    // The signal is to come in the middle: where one has come too late the next comes earlier, and the other way round.
    let mut wait = Duration::from_millis(40);
    let hashed = (0..200).find_map(|_| {
        let verify = sandbox.start(&["verify", "--json"]);
        std::thread::sleep(wait);
        let _ = Command::new("kill").args(["-INT", &verify.id().to_string()]).status();
        let ended = Ended::of(&verify.wait_with_output().unwrap());
        let report: Value = serde_json::from_str(&ended.stdout).unwrap_or_default();
        if ended.code == Some(130) && report["objects"].as_u64() > Some(0) {
            return Some(report["objects"].as_u64().unwrap() + report["resumed"].as_u64().unwrap());
        }
        wait = wait.mul_f64(if ended.code == Some(0) { 0.6 } else { 1.3 });
        None
    });
    let hashed = hashed.expect("one of two hundred signals comes in the middle");
    let report = sandbox.json(&["verify", "--json"]);
    assert_eq!((report["resumed"].as_u64(), report["objects"].as_u64()), (Some(hashed), Some(6 - hashed)), "{report}");
    let report = sandbox.json(&["verify", "--json"]);
    assert_eq!((report["resumed"].as_u64(), report["objects"].as_u64()), (Some(0), Some(6)), "the end forgets");
}

#[test]
fn what_is_shared_with_an_accepted_result_is_repaired_for_both() {
    let sandbox = chain();
    sandbox.run(&["chain.toml"]);
    let set = with_word("uno");
    sandbox.ok(&["accept", "chain.toml", "last", "--set", &set, "--reason", "x"]);
    let shown = sandbox.json(&["show", "--json", "chain/last"]);
    flip(&sandbox.path(shown["path"].as_str().unwrap()).join("out"), 0);
    let ended = sandbox.pipe(&["verify", "chain.toml", "--json"]);
    assert_eq!(ended.code, Some(1));
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["damaged"].as_array().unwrap().len(), 2, "{report}");
    sandbox.ok(&["verify", "chain.toml", "--repair"]);
    assert_eq!(sandbox.pipe(&["verify"]).code, Some(0));
    assert_eq!(ran(&sandbox.run(&["chain.toml", "--set", &set])), (1, 1), "what is gone is computed");
    assert_eq!(sandbox.json(&["show", "--json", "chain/last"])["accepted"], Value::Null);
}
