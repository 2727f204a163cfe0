//! What the pages show is what the program takes: every command line parses, every TOML plans, every template runs as it is.

use std::fs;
use std::path::{Path, PathBuf};

use crate::sandbox::Sandbox;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The pages for people, with their texts.
fn pages() -> Vec<(PathBuf, String)> {
    let mut pages: Vec<PathBuf> =
        ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"].map(|name| root().join(name)).into();
    pages.extend(fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    pages.retain(|page| page.extension().is_some_and(|extension| extension == "md"));
    pages.sort();
    pages.into_iter().map(|page| (page.clone(), fs::read_to_string(page).unwrap())).collect()
}

/// The blocks of code in a language, with the number of their first line.
fn blocks(text: &str, language: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut block: Option<(usize, String)> = None;
    for (index, line) in text.lines().enumerate() {
        match &mut block {
            None if line.trim() == format!("```{language}") => block = Some((index + 2, String::new())),
            Some(_) if line.trim() == "```" => found.extend(block.take()),
            Some((_, text)) => {
                text.push_str(line);
                text.push('\n');
            }
            None => {}
        }
    }
    found
}

/// The words of a command line as a shell has them, up to what belongs to the shell.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, '|' | '>' | '&' | ';') => break,
            (None, ' ') => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Whether the program takes the words that follow its name.
fn parses(words: &[String]) -> Result<(), String> {
    let program = std::iter::once("pipe".to_owned()).chain(words.iter().cloned());
    pipe::cli::arguments().try_get_matches_from(program).map(drop).map_err(|error| error.to_string())
}

#[test]
fn every_command_line_of_the_pages_parses() {
    let mut count = 0;
    for (page, text) in pages() {
        for language in ["console", "sh", "text"] {
            for (first, block) in blocks(&text, language) {
                for (index, line) in block.lines().enumerate() {
                    let line = line.trim().trim_start_matches("$ ");
                    let Some(line) = line.strip_prefix("./pipe ").or(line.strip_prefix("pipe ")) else { continue };
                    // The usages of the reference are the parser's own.
                    if language == "text" {
                        continue;
                    }
                    let said = parses(&words(line));
                    assert!(said.is_ok(), "{}:{}: `pipe {line}`\n{}", page.display(), first + index, said.unwrap_err());
                    count += 1;
                }
            }
        }
        // In the running text a command may stand without its arguments.
        let commands = pipe::cli::arguments();
        let known: Vec<&str> = commands.get_subcommands().map(clap::Command::get_name).chain(["help"]).collect();
        for inline in text.split('`').filter_map(|piece| piece.strip_prefix("./pipe ").or(piece.strip_prefix("pipe ")))
        {
            let name: String = inline.chars().take_while(|c| c.is_alphanumeric() || "_-".contains(*c)).collect();
            assert!(
                name.is_empty() || name.starts_with('-') || known.contains(&name.as_str()),
                "{}: `pipe {inline}`",
                page.display()
            );
        }
    }
    assert!(count > 30, "{count}");
    assert!(parses(&words("run FILE --untill x")).is_err(), "a wrong one would be seen");
}

/// Folders and files that the TOML of a page may name, with something in them.
fn furnished(sandbox: &Sandbox, text: &str) {
    for pipeline in fs::read_dir(root().join("pipelines")).unwrap().map(|entry| entry.unwrap().path()) {
        sandbox.write(
            &format!("pipelines/{}", pipeline.file_name().unwrap().display()),
            &fs::read_to_string(&pipeline).unwrap(),
        );
    }
    sandbox.write("models/qwen/config.json", "{}").write("models/qwen/tokenizer.json", "{}");
    for name in text.split('"').skip(1).step_by(2) {
        let is_file = [".py", ".txt", ".jinja", ".jsonl", ".parquet", ".sh"].iter().any(|end| name.ends_with(end));
        if is_file && !name.contains(' ') {
            let beside = name.strip_prefix("../").map_or_else(|| format!("experiments/{name}"), str::to_owned);
            sandbox.write(&beside, "x\n");
        }
    }
}

#[test]
fn every_toml_of_the_pages_plans() {
    let mut count = 0;
    for (page, text) in pages() {
        // What one block extends, another of the page may be.
        let sandbox = Sandbox::new();
        for (line, block) in blocks(&text, "toml") {
            furnished(&sandbox, &block);
            let first = block.lines().next().unwrap_or_default();
            let named = first
                .strip_prefix("# ")
                .filter(|name| Path::new(name).extension() == Some("toml".as_ref()) && !name.contains(' '));
            let file = format!("experiments/{}", named.map_or_else(|| format!("block_{line}.toml"), str::to_owned));
            sandbox.write(&file, &block);
            let mut ended = sandbox.pipe(&["plan", &file]);
            if ended.code != Some(0) {
                // It may be a part of an experiment.
                sandbox.write(&file, &format!("pipeline = \"../pipelines/maze.toml\"\n{block}"));
                let part = sandbox.pipe(&["plan", &file]);
                if part.code == Some(0) {
                    ended = part;
                }
            }
            assert_eq!(ended.code, Some(0), "{}:{line}\n{}", page.display(), ended.stderr);
            count += 1;
        }
    }
    assert!(count > 5, "{count}");
}

#[test]
fn every_template_checks_and_plans_where_it_is_written() {
    for template in ["maze", "number_line", "own-data", "own-task"] {
        let sandbox = Sandbox::new();
        // Where there are schemas above, they are named.
        sandbox.write("schemas/experiment.json", "{}").write("experiments/other.toml", "");
        let written = sandbox.json(&["init", "mine", "--template", template, "--json"]);
        let files: Vec<&str> = written.as_array().unwrap().iter().map(|file| file.as_str().unwrap()).collect();
        assert_eq!(files.last(), Some(&"experiments/mine.toml"), "{files:?}");
        let text = fs::read_to_string(sandbox.path("experiments/mine.toml")).unwrap();
        assert!(text.starts_with("#:schema ../schemas/experiment.json\n"), "{text}");
        assert!(!text.contains("NAME.") && !text.contains("NAME_") && !text.contains("SCHEMA"), "{text}");
        sandbox.ok(&["check", "experiments/mine.toml"]);
        sandbox.ok(&["plan", "experiments/mine.toml"]);
        sandbox.ok(&["fmt", "--check", "experiments/mine.toml"]);
        let again = sandbox.pipe(&["init", "mine", "--template", template]);
        assert_eq!(again.code, Some(2), "{}", again.stderr);
        assert!(again.stderr.contains("is there already"), "{}", again.stderr);
        assert_eq!(fs::read_to_string(sandbox.path("experiments/mine.toml")).unwrap(), text);
        // And where there are none, the schema is written beside it.
        let alone = Sandbox::new();
        alone.ok(&["init", "--template", template]);
        let name = template.replace('-', "_");
        assert!(
            fs::read_to_string(alone.path(&format!("{name}.toml")))
                .unwrap()
                .starts_with("#:schema schemas/experiment.json\n")
        );
        let schema = fs::read_to_string(alone.path("schemas/experiment.json")).unwrap();
        assert_eq!(schema, fs::read_to_string(root().join("schemas/experiment.json")).unwrap());
        alone.ok(&["plan", &format!("{name}.toml")]);
    }
}

#[test]
fn the_templates_that_need_no_libtorch_run() {
    let sandbox = Sandbox::new();
    sandbox.ok(&["init", "mine", "--template", "own-task"]);
    sandbox.ok(&["run", "mine.toml", "--until", "tokens", "--until", "base"]);
    sandbox.ok(&["init", "rows", "--template", "own-data"]);
    sandbox.ok(&["run", "rows.toml", "--until", "tokens", "--until", "base"]);
}
