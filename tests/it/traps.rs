//! The table of traps names tests that exist, and no trap without one.

use std::fs;
use std::path::Path;

const TABLE: &str = "docs/traps.md";

/// What stands between backticks in `text`.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether the file at `path` below `root` has a test called `name`.
fn has_test(root: &Path, path: &str, name: &str) -> bool {
    let Ok(text) = fs::read_to_string(root.join(path)) else { return false };
    text.split("#[test]\n").skip(1).any(|after| {
        let head = after.split('{').next().unwrap_or_default();
        head.split_once("fn ").is_some_and(|(_, rest)| rest.starts_with(&format!("{name}(")))
    })
}

#[test]
fn every_test_that_the_table_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join(TABLE)).unwrap();
    let tests: Vec<(&str, &str)> = quoted(&text).filter_map(|word| word.split_once("::")).collect();
    assert!(tests.len() > 60, "only {} tests are named", tests.len());
    let missing: Vec<_> = tests.iter().filter(|(path, name)| !has_test(root, path, name)).collect();
    assert!(missing.is_empty(), "{TABLE} names tests that are not there: {missing:#?}");
    assert!(!has_test(root, "tests/it/traps.rs", "no_such_test"), "a test that is not there is seen");
}

#[test]
fn every_trap_has_a_test() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(TABLE)).unwrap();
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    assert!(rows.len() >= 45, "only {} traps", rows.len());
    for row in rows {
        assert!(quoted(row).any(|word| word.contains(".rs::")), "no test holds {row}");
    }
}

#[test]
fn a_temperature_that_is_not_positive_is_a_located_mistake() {
    let sandbox = crate::sandbox::Sandbox::new();
    let stage = "[stages.grpo]\nkind = \"grpo\"\nmodel = \"sft\"\nprompts = \"tokens\"\nsteps = 1\nmax_new_tokens = 8\n\
                 rewards = { correct = { kind = \"correct\" } }\n";
    for temperature in ["0.0", "-1.0"] {
        let text = format!("{stage}temperature = {temperature}\n");
        let ended = sandbox.write("a.toml", &text).pipe(&["check", "a.toml"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains("a.toml:8:15"), "{}", ended.stderr);
    }
}
