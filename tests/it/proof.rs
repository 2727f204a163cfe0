//! The proofs of `benches/` in small, and what befalls a run from outside: edits in the middle, processes left behind,
//! odd files, stores that move, disks that are full or may not be written.

use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::sandbox::{Ended, Sandbox, wait_for};

/// Runs one of the programs of `benches/` on the binary under test.
fn bench(name: &str, arguments: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches").join(name);
    let mut command = Command::new("python3");
    command.arg(script).args(arguments).args(["--pipe", env!("CARGO_BIN_EXE_pipe")]);
    command.env_remove("PIPE_STORE").env_remove("PIPE_LOG").env_remove("PIPE_WORKER");
    let ended = Ended::of(&command.output().unwrap());
    assert_eq!(ended.code, Some(0), "{name} {arguments:?}\n{}\n{}", ended.stdout, ended.stderr);
}

#[test]
fn a_dozen_kills_among_runs_that_share_a_store() {
    bench("stress.py", &["12"]);
}

#[test]
fn harm_to_a_few_files_of_a_finished_store() {
    bench("flips.py", &["8"]);
}

#[test]
fn ten_probes_have_their_ideal_answers() {
    bench("probes.py", &[]);
}

#[test]
fn a_sweep_that_is_killed_runs_only_what_is_missing() {
    bench("sweep64.py", &["--kills", "2"]);
}

/// A stage `a` of one shell script, with its further lines of TOML.
fn stage(sandbox: &Sandbox, script: &str, rest: &str) {
    let script = serde_json::to_string(script).unwrap();
    sandbox.write(
        "one.toml",
        &format!("[stages.a]\nkind = \"command\"\noutputs = [\"out\"]\ncommand = [\"sh\", \"-c\", {script}]\n{rest}\n"),
    );
}

#[test]
fn a_file_edited_while_its_stage_runs_keeps_no_result() {
    let sandbox = Sandbox::new();
    let began = sandbox.path("began");
    let script = format!("touch {}; {}; cat in.txt > out", began.display(), sandbox.until_there("go"));
    stage(&sandbox, &script, "files = [\"in.txt\"]");
    sandbox.write("in.txt", "one\n");
    let run = sandbox.start(&["run", "one.toml"]);
    wait_for("the stage", || began.exists());
    sandbox.write("in.txt", "two\n").write("go", "");
    let ended = Ended::of(&run.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("in.txt` changed while the stage ran; its result was not kept"), "{}", ended.stderr);
    assert_eq!(sandbox.run(&["one.toml"])["run"], 1);
    assert_eq!(fs::read_to_string(output(&sandbox).join("out")).unwrap(), "two\n");
}

/// The folder of the stage `a`'s output.
fn output(sandbox: &Sandbox) -> std::path::PathBuf {
    sandbox.path(sandbox.json(&["show", "--json", "one/a"])["path"].as_str().unwrap())
}

#[test]
fn a_time_in_the_future_hides_no_edit() {
    let sandbox = Sandbox::new();
    stage(&sandbox, "cat in.txt > out", "files = [\"in.txt\"]");
    let future = SystemTime::now() + Duration::from_secs(1_000_000_000);
    for content in ["one\n", "two\n", "six\n"] {
        sandbox.write("in.txt", content);
        fs::File::options().append(true).open(sandbox.path("in.txt")).unwrap().set_modified(future).unwrap();
        assert_eq!(sandbox.run(&["one.toml"])["run"], 1, "{content}");
        assert_eq!(sandbox.run(&["one.toml"])["cached"], 1, "{content}");
        assert_eq!(fs::read_to_string(output(&sandbox).join("out")).unwrap(), content);
    }
}

#[test]
fn what_a_process_left_behind_writes_is_never_delivered() {
    let sandbox = Sandbox::new();
    let [left, stop, stopped] = ["left", "stop", "stopped"].map(|name| sandbox.path(name).display().to_string());
    // It has left the program's group before that ends, so that nothing ends it, and writes to the output until the run is over.
    let test = std::process::id();
    let behind = format!(
        "touch {left}; while [ ! -e {stop} ] && [ -e /proc/{test} ]; do echo bad >&3; sleep 0.02; done; \
         echo bad >&3; touch {stopped}"
    );
    let wait = sandbox.until_there("left");
    stage(&sandbox, &format!("echo good > out; exec 3>>out; setsid sh -c '{behind}' & {wait}"), "");
    let first = sandbox.run(&["one.toml"]);
    sandbox.write("stop", "");
    wait_for("its last line", || sandbox.path("stopped").exists());
    // Either it was seen at once, or the result that changed after it was stored is no result.
    assert!(first["code"] == 1 || sandbox.pipe(&["show", "one/a"]).code != Some(0), "{first}");
    stage(&sandbox, "echo good > out", "");
    assert_eq!(sandbox.run(&["one.toml"])["code"], 0);
    assert_eq!(fs::read_to_string(output(&sandbox).join("out")).unwrap(), "good\n");
}

#[test]
fn odd_outputs_are_kept_or_refused_by_name() {
    let sandbox = Sandbox::new();
    for (script, words) in [
        ("ln -s /etc/hostname out", "is a symbolic link"),
        ("mkfifo out", "is a special file"),
        ("mkdir out; echo x > \"$(printf 'out/\\377')\"", "has a name that is not UTF-8"),
        ("mkdir out", "without writing its output"),
    ] {
        stage(&sandbox, script, "");
        let ended = sandbox.pipe(&["run", "one.toml"]);
        assert_eq!(ended.code, Some(1), "{script}: {}", ended.stderr);
        assert!(ended.stderr.contains(words), "{script}: {}", ended.stderr);
    }
    stage(&sandbox, "mkdir out; echo x > 'out/a b'; echo y > \"$(printf 'out/c\\nd')\"", "");
    assert_eq!(sandbox.run(&["one.toml"])["run"], 1);
    assert_eq!(sandbox.run(&["one.toml"])["cached"], 1);
    assert_eq!(fs::read_to_string(output(&sandbox).join("out/c\nd")).unwrap(), "y\n");
}

#[test]
fn odd_inputs_are_read_or_refused_by_name() {
    let sandbox = Sandbox::new();
    stage(&sandbox, "ls in | wc -l > out", "files = [\"in\"]");
    sandbox.write("in/a b", "x").write("in/c\nd", "y");
    assert_eq!(sandbox.run(&["one.toml"])["run"], 1);
    let name = sandbox.path("in").join(std::ffi::OsStr::from_bytes(b"\xff"));
    fs::write(&name, "z").unwrap();
    let ended = sandbox.pipe(&["run", "one.toml"]);
    assert!(ended.code == Some(2) && ended.stderr.contains("has a name that is not UTF-8"), "{}", ended.stderr);
    fs::remove_file(&name).unwrap();
    std::os::unix::fs::symlink("nowhere", sandbox.path("in/dangling")).unwrap();
    let ended = sandbox.pipe(&["run", "one.toml"]);
    assert!(ended.code == Some(2) && ended.stderr.contains("in/dangling"), "{}", ended.stderr);
}

#[test]
fn a_store_may_move_and_be_read_only() {
    let sandbox = Sandbox::new();
    stage(&sandbox, "echo x > out", "");
    sandbox.run(&["one.toml"]);
    fs::rename(sandbox.path("artifacts"), sandbox.path("moved")).unwrap();
    assert_eq!(sandbox.run(&["--store", "moved", "one.toml"])["cached"], 1);
    let set = |mode: &str| Command::new("chmod").args(["-R", mode]).arg(sandbox.path("moved")).status().unwrap();
    assert!(set("a-w").success());
    let plan = sandbox.json(&["--store", "moved", "plan", "--json", "one.toml"]);
    assert_eq!(plan[0]["state"], "cached", "{plan}");
    sandbox.ok(&["--store", "moved", "show", "one/a"]);
    sandbox.ok(&["--store", "moved", "verify"]);
    assert!(set("u+w").success());
}

#[test]
fn a_full_disk_fails_the_stage_and_loses_nothing_that_was_finished() {
    let sandbox = Sandbox::new();
    let disk = sandbox.path("disk");
    fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(&disk).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        // Only root may, and not in every container.
        std::io::stderr().write_all(b"not tested: this process may not mount a disk\n").unwrap();
        return;
    }
    let size = |size: &str| {
        Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&disk).status().unwrap().success()
    };
    sandbox.write(
        "full.toml",
        "[stages.a]\nkind = \"command\"\noutputs = [\"out\"]\ncommand = [\"sh\", \"-c\", \"echo x > out\"]\n\
         [stages.b]\nkind = \"command\"\noutputs = [\"out\"]\ninputs = { x = \"a\" }\n\
         command = [\"sh\", \"-c\", \"(cat {inputs.x}/out; head -c 6000000 /dev/zero) > out\"]\n",
    );
    let first = sandbox.pipe(&["--store", "disk/store", "run", "full.toml"]);
    let grown = size("40m");
    let second = sandbox.pipe(&["--store", "disk/store", "run", "full.toml"]);
    let third = sandbox.pipe(&["--store", "disk/store", "run", "full.toml"]);
    let verified = sandbox.pipe(&["--store", "disk/store", "verify"]);
    assert!(Command::new("umount").arg(&disk).status().unwrap().success());
    assert_eq!((first.code, grown, second.code), (Some(1), true, Some(0)), "{}\n{}", first.stderr, second.stderr);
    assert!(second.stderr.contains("1 run, 1 cached"), "what was finished is still there: {}", second.stderr);
    assert!(third.stderr.contains("nothing to run"), "{}", third.stderr);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
}

#[test]
fn a_folder_of_ten_thousand_files_is_an_input() {
    let sandbox = Sandbox::new();
    for folder in 0..100 {
        fs::create_dir_all(sandbox.path(&format!("many/{folder}"))).unwrap();
        for file in 0..100 {
            fs::write(sandbox.path(&format!("many/{folder}/{file}")), file.to_string()).unwrap();
        }
    }
    stage(&sandbox, "find many -type f | wc -l > out", "files = [\"many\"]");
    assert_eq!(sandbox.run(&["one.toml"])["run"], 1);
    assert_eq!(fs::read_to_string(output(&sandbox).join("out")).unwrap().trim(), "10000");
    assert_eq!(sandbox.run(&["one.toml"])["cached"], 1);
    let path = sandbox.path("many/57/3");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(sandbox.run(&["one.toml"])["run"], 1, "an executable bit of one of them counts");
}
