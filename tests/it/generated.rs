//! What is written by a program and committed is current, and every file that we ship reads without a mistake.

use std::fs;
use std::path::Path;
use std::process::Command;

fn pipe(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_pipe"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text)
}

#[test]
fn the_committed_schemas_are_those_of_the_kinds() {
    for which in ["pipeline", "experiment"] {
        let (code, text) = pipe(&["schema", which]);
        assert_eq!(code, Some(0), "{text}");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("schemas/{which}.json"));
        assert!(fs::read_to_string(&path).unwrap() == text, "run `./pipe schema --write schemas`");
    }
}

#[test]
fn every_pipeline_and_experiment_checks() {
    for folder in ["pipelines", "experiments"] {
        let files = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
        let files: Vec<String> = files.map(|file| file.unwrap().path().to_string_lossy().into_owned()).collect();
        assert!(!files.is_empty());
        let arguments: Vec<&str> = std::iter::once("check").chain(files.iter().map(String::as_str)).collect();
        let (code, text) = pipe(&arguments);
        assert_eq!(code, Some(0), "{text}");
    }
}
