//! The walls between folders, the ceiling on files, and what `pipe` may not be linked to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which folders of `src/` each folder may name with `crate::`. Arrows run only downward.
const MAY_USE: &[(&str, &[&str])] = &[
    ("cli", &["stages", "pipeline", "tasks", "rewards", "statistics", "telemetry", "random", "file"]),
    ("stages", &["pipeline", "tasks", "rewards", "telemetry", "random", "program", "file"]),
    ("pipeline", &["telemetry", "random", "file"]),
    ("rewards", &["tasks", "program", "file", "random"]),
    ("tasks", &["random", "program", "file"]),
    ("statistics", &["random"]),
    ("telemetry", &[]),
    ("random", &[]),
    ("program", &["file"]),
    ("file", &[]),
];

/// Code lines that a file may have, up to its tests.
const CEILING: usize = 500;

/// Names of modules that say nothing of what is in them.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "helper", "helpers", "misc", "manager"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below `folder`, sorted.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The text of a file before its unit tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let end = text.find("#[cfg(test)]\nmod tests").or(text.find("#[cfg(test)]\n#[expect")).unwrap_or(text.len());
    text[..end].to_owned()
}

/// Every `prefix::name` that a line of code names, comments left out.
fn named(code: &str, prefix: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let line = line.split("//").next().unwrap_or_default();
        for rest in line.split(prefix).skip(1) {
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            found.push((index + 1, name));
        }
    }
    found
}

#[test]
fn folders_name_only_what_lies_below_them() {
    let source = root().join("src");
    let mut breaches = Vec::new();
    for path in sources(&source) {
        let relative = path.strip_prefix(&source).unwrap();
        let folder = relative.components().next().unwrap().as_os_str().to_string_lossy().replace(".rs", "");
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == folder) else {
            assert!(matches!(folder.as_str(), "main" | "lib"), "`src/{folder}` stands in no rule of this test");
            continue;
        };
        for (line, name) in named(&code(&path), "crate::") {
            if name != folder && !allowed.contains(&name.as_str()) {
                breaches.push(format!("src/{}:{line}: {folder} names {name}", relative.display()));
            }
        }
    }
    assert!(breaches.is_empty(), "arrows that run upward:\n{}", breaches.join("\n"));
}

#[test]
fn a_breach_of_the_wall_is_seen() {
    let found = named("use crate::cli::Ui; // crate::tasks\nlet x = crate::stages::KINDS;", "crate::");
    assert_eq!(found, [(1, "cli".to_owned()), (2, "stages".to_owned())]);
}

/// Files of the store that may name the file system: the door to it, and what only tests have.
const DOORS: &[&str] = &["disk.rs", "faults.rs", "fixture.rs", "proof.rs", "volatile.rs", "volatile/operations.rs"];

/// Words by which a file would go past the door.
const PAST_THE_DOOR: &[&str] =
    &["std::fs", "rustix::fs", "tempfile::", "os::unix::fs", ".exists()", ".is_dir()", ".is_file()", ".metadata()"];

#[test]
fn everything_that_the_store_reads_or_writes_goes_through_its_disk() {
    let store = root().join("src/pipeline/store");
    let mut breaches = Vec::new();
    for path in sources(&store) {
        let name = path.strip_prefix(&store).unwrap().to_string_lossy().into_owned();
        if DOORS.contains(&name.as_str()) {
            continue;
        }
        for (index, line) in code(&path).lines().enumerate() {
            let line = line.split("//").next().unwrap_or_default();
            let words = PAST_THE_DOOR.iter().filter(|word| line.contains(**word));
            // The kernel's lock on an open file is no name in a folder; `File` is what the door hands out for it.
            breaches.extend(
                words
                    .filter(|_| !line.starts_with("use std::fs::{File, TryLockError}"))
                    .map(|word| format!("src/pipeline/store/{name}:{}: {word}", index + 1)),
            );
        }
    }
    assert!(breaches.is_empty(), "the disk is gone past:\n{}", breaches.join("\n"));
}

#[test]
fn learn_knows_no_terminal_and_pipeline_no_tensor() {
    for path in sources(&root().join("learn/src")) {
        assert!(!code(&path).contains("pipe::cli"), "{} names the command line", path.display());
    }
    for path in sources(&root().join("src")) {
        for library in ["use tch", " tch::", "(tch::", "&tch::", "torch_sys"] {
            assert!(!code(&path).contains(library), "{} names a tensor library", path.display());
        }
    }
}

#[test]
fn no_file_is_over_the_ceiling_or_named_for_nothing() {
    let mut breaches = Vec::new();
    for folder in ["src", "learn/src", "tests", "benches"] {
        for path in sources(&root().join(folder)) {
            let lines = code(&path).lines().count();
            if lines > CEILING {
                breaches.push(format!("{}: {lines} code lines", path.display()));
            }
            let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
            let parent = path.parent().unwrap().file_name().unwrap().to_string_lossy().into_owned();
            if EMPTY_NAMES.contains(&stem.as_str()) || EMPTY_NAMES.contains(&parent.as_str()) {
                breaches.push(format!("{}: a name that says nothing", path.display()));
            }
        }
    }
    assert!(breaches.is_empty(), "split by meaning:\n{}", breaches.join("\n"));
}

#[test]
fn the_command_line_binary_does_not_need_libtorch() {
    let output = Command::new("readelf").args(["--dynamic", env!("CARGO_BIN_EXE_pipe")]).output().unwrap();
    assert!(output.status.success());
    // Addresses in other lines may spell a library's name.
    let dynamic = String::from_utf8(output.stdout).unwrap();
    let needed: String = dynamic.lines().filter(|line| line.contains("NEEDED")).collect();
    assert!(!needed.is_empty(), "readelf named no library at all");
    assert!(!needed.contains("torch") && !needed.contains("c10"), "pipe links libtorch:\n{needed}");
}
