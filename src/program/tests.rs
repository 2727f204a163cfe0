use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::{Value, json};

use super::*;

fn start(script: &str, timeout: f64) -> Program {
    let command = ["sh".to_owned(), "-c".to_owned(), script.to_owned()];
    let timeout = Duration::from_secs_f64(timeout);
    Program::start(&Launch { command: &command, files: &[], timeout, interrupt: None }).unwrap()
}

fn error(script: &str, timeout: f64) -> ProgramError {
    start(script, timeout).call::<Value>(&json!({"n": 1})).unwrap_err()
}

#[test]
fn a_line_is_answered_by_a_line_as_often_as_asked() {
    let mut program = start("while read -r line; do echo \"[$line]\"; done", 60.0);
    for n in 0..50 {
        assert_eq!(program.call::<Value>(&json!({"n": n})).unwrap(), json!([{"n": n}]));
    }
    // More than a pipe holds, both ways.
    let long = json!({"text": "x".repeat(1 << 20)});
    let mut program = start("cat", 60.0);
    assert_eq!(program.call::<Value>(&long).unwrap(), long);
}

#[test]
fn a_crash_shows_the_status_and_the_last_words() {
    let error = error("echo first >&2; read -r line; echo no such maze >&2; exit 3", 60.0);
    assert!(matches!(&error, ProgramError::Ended { how, .. } if how == "ended with exit status 3"), "{error:?}");
    assert!(error.to_string().contains("`sh` ended with exit status 3; it said:\nfirst\nno such maze"), "{error}");
}

#[test]
fn an_early_end_is_an_error_whatever_its_status() {
    assert!(error("exit 0", 60.0).to_string().contains("ended without an answer"));
    let half = error("read -r line; printf '[1'; exit 0", 60.0);
    assert!(half.to_string().contains("in the middle of an answer line"), "{half}");
    assert!(error("kill -9 $$", 60.0).to_string().contains("SIGKILL"));
}

#[test]
fn a_program_that_is_slow_to_end_is_not_said_to_be_short_of_memory() {
    let slow = error("read -r line; echo no such maze >&2; exec >&-; sleep 100", 60.0).to_string();
    assert!(slow.contains("`sh` closed its standard output without ending; it said:\nno such maze"), "{slow}");
}

#[test]
fn a_hang_ends_with_all_that_was_started() {
    let mut program = start("read -r line; echo $$; read -r line; sleep 600 & sleep 600", 60.0);
    let group: i32 = program.call(&json!(0)).unwrap();
    // It has started, for which it may take as long as it likes.
    program.timeout = Duration::from_millis(300);
    let began = Instant::now();
    let error = program.call::<Value>(&json!(0)).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(60), "it took {:?}", began.elapsed());
    assert!(error.to_string().contains("gave no answer within 0.3 s"), "{error}");
    assert!(error.to_string().contains("flush"), "{error}");
    let group = rustix::process::Pid::from_raw(group).unwrap();
    let gone = || rustix::process::test_kill_process_group(group) == Err(rustix::io::Errno::SRCH);
    // Init takes a moment to reap what was killed.
    assert!((0..15_000).any(|_| {
        std::thread::sleep(Duration::from_millis(4));
        gone()
    }));
    assert!(program.call::<Value>(&json!(0)).unwrap_err().to_string().contains("after an earlier error"));
}

#[test]
fn a_line_without_an_end_is_told_from_silence() {
    let error = error("read -r line; printf '[1, 2]'; sleep 100", 3.0);
    assert!(error.to_string().contains("written 6 bytes without a line end"), "{error}");
}

#[test]
fn what_is_no_answer_is_shown() {
    let no_json = error("read -r line; echo hello; sleep 100", 60.0);
    assert!(no_json.to_string().contains("is no JSON") && no_json.to_string().contains("`hello`"), "{no_json}");
    let other = start("read -r line; echo '{\"a\": 1}'; sleep 9", 60.0).call::<Vec<f64>>(&json!(0)).unwrap_err();
    assert!(other.to_string().contains("of another form"), "{other}");
    let long = error("read -r line; head -c 1000 /dev/zero | tr '\\0' x; echo; sleep 9", 60.0).to_string();
    assert!(long.contains("xxx...`") && long.len() < 400, "{long}");
    let mut twice = start("read -r line; printf '1\\n2\\n'; read -r line; echo 3", 60.0);
    assert_eq!(twice.call::<i32>(&json!(0)).unwrap(), 1);
    // Both lines have come at once; the second takes a moment from one thread to the other.
    std::thread::sleep(Duration::from_millis(500));
    let error = twice.call::<i32>(&json!(0)).unwrap_err();
    assert!(error.to_string().contains("nobody asked for: `2`"), "{error}");
}

#[test]
fn endless_output_is_cut_off() {
    // Nothing is kept of standard error but its end, and no more of standard output than an answer may have.
    let mut program = start("read -r line; head -c 3000000 /dev/zero >&2; echo end >&2; echo 1", 60.0);
    assert_eq!(program.call::<i32>(&json!(0)).unwrap(), 1);
    let endless = error("read -r line; cat /dev/zero", 60.0);
    assert!(endless.to_string().contains("longer than 64 MiB"), "{endless}");
}

#[test]
fn its_folder_holds_its_files_and_nothing_of_ours_is_open() {
    let place = tempfile::tempdir().unwrap();
    let script = "#!/bin/sh\nread -r line\nopen=$(ls -l /proc/$$/fd | grep -o '[0-9]* -> [^ ]*' | tr '\\n' ' ')\n\
                  echo [\\\"$(echo *)\\\", \\\"$(echo sub/*)\\\", \\\"$open\\\"]\n";
    std::fs::write(place.path().join("tool"), script).unwrap();
    std::fs::set_permissions(place.path().join("tool"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let lock = std::fs::File::create(place.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let file = |placed: &str| PlacedFile { path: place.path().join("tool"), placed: placed.to_owned() };
    let files = [file("./tool"), file("sub/data")];
    let command = ["./tool".to_owned()];
    let launch = Launch { command: &command, files: &files, timeout: Duration::from_secs(10), interrupt: None };
    let mut program = Program::start(&launch).unwrap();
    let folder = program.folder().to_owned();
    let seen: Vec<String> = program.call(&json!(0)).unwrap();
    assert_eq!(&seen[..2], ["sub tool", "sub/data"]);
    assert!(["0 -> pipe:", "1 -> pipe:", "2 -> pipe:"].iter().all(|open| seen[2].contains(open)), "{seen:?}");
    assert!(!seen[2].contains("lock"), "{seen:?}");
    drop(program);
    assert!(!folder.exists());
}

#[test]
fn what_cannot_start_says_why() {
    let start = |command: &[&str]| {
        let command: Vec<String> = command.iter().map(|&word| word.to_owned()).collect();
        let launch = Launch { command: &command, files: &[], timeout: Duration::from_secs(1), interrupt: None };
        Program::start(&launch).err().unwrap().to_string()
    };
    assert!(start(&["no-such-program"]).contains("no such program is found in `PATH`"));
    assert!(start(&["./gone.py"]).contains("name it in `files`"));
    assert_eq!(start(&[]), "no program is named");
}

#[test]
fn an_interrupt_ends_a_call() {
    let interrupt = Arc::<AtomicBool>::default();
    let command = ["sleep".to_owned(), "100".to_owned()];
    let timeout = Duration::from_secs(50);
    let launch = Launch { command: &command, files: &[], timeout, interrupt: Some(Arc::clone(&interrupt)) };
    let mut program = Program::start(&launch).unwrap();
    interrupt.store(true, Ordering::Relaxed);
    assert_eq!(program.call::<Value>(&json!(0)), Err(ProgramError::Interrupted));
}

#[test]
fn a_dropped_program_may_finish_and_then_ends() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("done");
    let script = format!("read -r line; echo 1; read -r line; sleep 0.1; echo bye > {}", path.display());
    // It needs a tenth of the second that it has. A busy machine may leave one too little, and not each of ten.
    let may_finish = || {
        let mut program = start(&script, 60.0);
        program.call::<i32>(&json!(0)).unwrap();
        drop(program);
        path.exists()
    };
    assert!((0..10).any(|_| may_finish()), "it was not given the time to end by itself");
    let began = Instant::now();
    drop(start("trap '' TERM; while true; do sleep 1; done", 60.0));
    assert!(began.elapsed() < Duration::from_secs(60));
}

/// The program of the documentation that a heading introduces.
fn documented(heading: &str) -> String {
    let text = include_str!("../../docs/programs.md");
    let section = &text[text.find(heading).unwrap()..];
    let code = &section[section.find("```python\n").unwrap() + "```python\n".len()..];
    code[..code.find("```").unwrap()].to_owned()
}

#[test]
fn the_task_of_the_documentation_keeps_its_protocol() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("sums.py"), documented("## A task")).unwrap();
    let files = [PlacedFile { path: place.path().join("sums.py"), placed: "sums.py".to_owned() }];
    let command = ["python3".to_owned(), "sums.py".to_owned()];
    let timeout = Duration::from_secs(20);
    let mut task = Program::start(&Launch { command: &command, files: &files, timeout, interrupt: None }).unwrap();
    let mut call = |request: Value| task.call::<Value>(&request).unwrap();
    let made = call(json!({"call": "generate", "seed": 1, "indices": [0, 7]}));
    assert_eq!(made["instances"].as_array().unwrap().len(), 2);
    let instance = &made["instances"][1];
    let read = call(json!({"call": "reset", "episodes": [{"id": 5, "instance": instance, "seed": 0}]}));
    assert_eq!(read["observations"][0], format!("{} + {} =", instance["a"], instance["b"]));
    let asked = json!([{"instance": instance, "seed": 0}]);
    let shown = call(json!({"call": "demonstrate", "demonstrations": asked}));
    let reply = json!({"id": 5, "text": shown["replies"][0][0], "finish": "stop"});
    let turns = call(json!({"call": "step", "replies": [reply]}));
    assert_eq!(turns["turns"][0]["terminated"], true);
    assert_eq!(call(json!({"call": "verdict", "ids": [5]})), json!({"verdicts": [{"solved": 1.0}]}));
}
