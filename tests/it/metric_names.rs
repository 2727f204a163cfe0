//! `docs/metrics.md` against the code: every name that is logged is defined, and none is defined that is not.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What stands before a name where one is logged.
const CALLS: [&str; 8] = [
    "metrics.mean(",
    "metrics.total(",
    "metrics.max(",
    "metrics.min(",
    "metrics.deviation(",
    "exhibits::distribution(",
    "exhibits::text(",
    "exhibits::picture(",
];

/// Names that the code makes otherwise, each with the file and the text by which it is known that it still does.
const OTHERWISE: [(&str, &str, &str); 10] = [
    ("alarm", "kinds/grpo.rs", "(\"alarm\","),
    ("alarms", "kinds/grpo.rs", "(\"alarms\","),
    ("seconds/PHASE", "phases.rs", "format!(\"seconds/{phase}\")"),
    ("seconds/step", "phases.rs", "tell(\"seconds/step\""),
    ("mfu", "phases.rs", "tell(\"mfu\""),
    ("decode_bandwidth_share", "phases.rs", "tell(\"decode_bandwidth_share\""),
    ("tokens_per_second/decode", "phases.rs", "tell(\"tokens_per_second/decode\""),
    ("shared_prompt_share", "phases.rs", "tell(\"shared_prompt_share\""),
    ("padding_share", "phases.rs", "tell(\"padding_share\""),
    ("peak_memory_bytes", "phases.rs", "tell(\"peak_memory_bytes\""),
];

/// Names of an evaluation that no call with a literal makes.
const OF_EVALUATIONS: [&str; 4] = ["NAME", "completion_length", "solved_low", "solved_high"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The code of every file below a folder, without unit tests.
fn code(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if path.file_name().unwrap() != "tests" {
                code(&path, text);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let file = fs::read_to_string(&path).unwrap();
            text.push_str(&file[..file.find("#[cfg(test)]\nmod tests").unwrap_or(file.len())]);
        }
    }
}

/// The literal that a call begins with, `{x}` as `X`; none where it begins with something else.
fn literal(rest: &str) -> Option<String> {
    let rest = rest.trim_start();
    let rest = rest.strip_prefix("&format!(").unwrap_or(rest).trim_start();
    let name = rest.strip_prefix('"')?.split('"').next()?;
    let mut text = String::new();
    for (place, part) in name.split(['{', '}']).enumerate() {
        let part = part.rsplit('.').next().filter(|_| place % 2 == 1).map_or(part.to_owned(), str::to_uppercase);
        text.push_str(&part);
    }
    Some(text)
}

fn logged() -> BTreeSet<String> {
    let mut text = String::new();
    code(&root().join("learn/src"), &mut text);
    let mut names: BTreeSet<String> =
        CALLS.iter().flat_map(|call| text.split(call).skip(1).filter_map(literal)).collect();
    for (name, file, proof) in OTHERWISE {
        let file = fs::read_to_string(root().join("learn/src").join(file)).unwrap();
        assert!(file.contains(proof), "`{name}` is no longer made by `{proof}`");
        names.insert(name.to_owned());
    }
    names.extend(OF_EVALUATIONS.map(str::to_owned));
    names
}

fn defined() -> BTreeSet<String> {
    let page = fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next().map(str::to_owned));
    // A point at which a curve is read is no name.
    let names: Vec<String> = rows.filter(|name| !name.starts_with('@')).collect();
    let distinct: BTreeSet<String> = names.iter().cloned().collect();
    assert_eq!(distinct.len(), names.len(), "a name is defined twice");
    distinct
}

#[test]
fn every_metric_is_defined_and_every_definition_is_of_a_metric() {
    let (logged, defined) = (logged(), defined());
    assert!(logged.len() > 50, "the code is read: {logged:?}");
    let missing: Vec<_> = logged.difference(&defined).collect();
    assert!(missing.is_empty(), "docs/metrics.md does not define {missing:?}");
    let stale: Vec<_> = defined.difference(&logged).collect();
    assert!(stale.is_empty(), "docs/metrics.md defines what nothing logs: {stale:?}");
}

#[test]
fn a_definition_says_unit_and_denominator() {
    let page = fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    for line in page.lines().filter(|line| line.starts_with("| `") && line.matches('|').count() > 3) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 7, "{line}");
        assert!(!cells[2].is_empty() && !cells[3].is_empty(), "{line}");
    }
}

#[test]
fn literals_are_read_as_the_page_writes_them() {
    assert_eq!(literal("\"loss\", value)").as_deref(), Some("loss"));
    assert_eq!(literal("&format!(\"reward/{name}/mean\"), 1.0").as_deref(), Some("reward/NAME/mean"));
    assert_eq!(literal("&format!(\"validation/walks/{}\", x").as_deref(), Some("validation/walks/"));
    assert_eq!(literal("name, *value"), None);
}
