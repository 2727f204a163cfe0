//! A dataset: its files and columns, and a row of it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde_json::{Map, Value, json};

use super::{Look, Seen};
use crate::cli::render;
use crate::stages::table::{Column, column_names, read, read_json};
use crate::tasks::maze::drawing::Drawing;

/// Characters of a value that are shown.
const SHOWN: usize = 400;

pub(super) fn inspect(folder: &Path, look: &Look<'_>) -> anyhow::Result<Seen> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "parquet"));
    files.sort();
    let split = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut rows = Vec::new();
    let mut splits = Vec::new();
    for path in &files {
        let (count, columns) = (length(path)?, column_names(path)?);
        rows.push(vec![split(path), render::count(count as u64), columns.join(", ")]);
        splits.push(json!({"split": split(path), "rows": count, "columns": columns}));
    }
    let mut text = render::columns(&["split", "rows", "columns"], &[1], rows, None);
    let wanted = look.args.split.as_deref();
    let names = || files.iter().map(|path| split(path)).collect::<Vec<_>>().join("`, `");
    let chosen = files.iter().find(|path| wanted.is_none_or(|wanted| wanted == split(path)));
    let chosen = chosen
        .with_context(|| format!("there is no split `{}`; there are `{}`", wanted.unwrap_or_default(), names()))?;
    let number = look.args.row.unwrap_or(0);
    let row = row(chosen, number)?;
    let _ = writeln!(text, "\nrow {number} of {}", split(chosen));
    let width = row.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    for (name, value) in &row {
        let shown = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let cut: String = shown.chars().take(SHOWN).collect();
        let end = if cut.len() < shown.len() { " ..." } else { "" };
        let _ = writeln!(text, "  {name:<width$}  {}{end}", cut.replace('\n', &format!("\n  {:width$}  ", "")));
    }
    if let Some(drawn) = row.iter().find(|(name, _)| name == "data").and_then(|(_, value)| drawn(value.as_str()?)) {
        let _ = write!(text, "\n{drawn}");
    }
    let row: Map<String, Value> = row.into_iter().collect();
    Ok(Seen {
        value: json!({"splits": splits, "row": {"split": split(chosen), "number": number, "values": row}}),
        text,
    })
}

/// The rows of a file.
fn length(path: &Path) -> anyhow::Result<usize> {
    let open = || {
        let file = std::fs::File::open(path)?;
        let builder = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file)?;
        anyhow::Ok(usize::try_from(builder.metadata().file_metadata().num_rows())?)
    };
    open().with_context(|| format!("reading `{}`", path.display()))
}

/// Every column's value in a row, in the order of the file.
fn row(path: &Path, number: usize) -> anyhow::Result<Vec<(String, Value)>> {
    let count = length(path)?;
    ensure!(number < count, "`{}` has no row {number}: it has {count}", path.display());
    let value = |name: &String| {
        // Lists of structures, as conversations are, are read another way.
        let value = match read(path, &[name]) {
            Ok(mut columns) => cell(&columns.remove(0), number),
            Err(_) => read_json(path, name)?[number].clone(),
        };
        anyhow::Ok((name.clone(), value))
    };
    column_names(path)?.iter().map(value).collect()
}

fn cell(column: &Column, row: usize) -> Value {
    match column {
        Column::Text(values) => json!(values[row]),
        Column::Integer(values) => json!(values[row]),
        Column::Number(values) => json!(values[row]),
        Column::Flag(values) => json!(values[row]),
        Column::Integers(values) => json!(values[row]),
        Column::Numbers(values) => json!(values[row]),
    }
}

/// The instance as a drawing, where it is a maze.
fn drawn(data: &str) -> Option<String> {
    let drawing = Drawing::read(&serde_json::from_str(data).ok()?, None).ok()?;
    let line = |line: Vec<crate::tasks::maze::drawing::Span>| {
        line.into_iter().map(|span| span.text).collect::<String>() + "\n"
    };
    Some(drawing.lines(false).into_iter().map(line).collect())
}

#[cfg(test)]
mod tests {
    use super::super::tests::look_at;
    use super::*;
    use crate::stages::table::{ColumnType, TableWriter};

    #[test]
    fn splits_are_counted_and_a_row_is_shown_with_its_maze() {
        let folder = tempfile::tempdir().unwrap();
        for (split, rows) in [("train", 3), ("test", 2)] {
            let path = folder.path().join(format!("{split}.parquet"));
            let mut table =
                TableWriter::create(&path, &[("instance", ColumnType::Text), ("data", ColumnType::Text)]).unwrap();
            let maze = r#"{"rows":2,"columns":3,"walls":[13,13,13,6,2,10],"origin":0,"target":2,"length":4}"#;
            let names = (0..rows).map(|row| format!("{split}-{row}"));
            table.write(vec![Column::text(names), Column::text((0..rows).map(|_| maze.to_owned()))]).unwrap();
            table.finish().unwrap();
        }
        let see = |options: &[&str]| look_at(options, |look| inspect(folder.path(), look));
        insta::assert_snapshot!(see(&["--split", "train", "--row", "1"]).unwrap().text);
        assert_eq!(see(&[]).unwrap().value["row"]["values"]["instance"], "test-0");
        let says = |options: &[&str]| format!("{:#}", see(options).err().unwrap());
        assert!(says(&["--row", "9"]).contains("has no row 9: it has 2"));
        assert!(says(&["--split", "rl"]).contains("there is no split `rl`; there are `test`, `train`"));
    }
}
