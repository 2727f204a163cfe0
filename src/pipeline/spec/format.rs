//! The layout of a TOML file: spaces, blank lines, comments in line. No value, key, comment or order changes.
//!
//! One space stands around `=` and behind commas, nothing is indented but what lies in arrays that are written over several
//! lines, at most one blank line follows another, comments behind consecutive lines stand in one column, and the file ends
//! with one newline. Arrays and inline tables keep the lines that they were written on; an array that is too long for one
//! line gets a line an element.

use std::path::Path;

use toml_edit::{Array, ArrayOfTables, Decor, DocumentMut, InlineTable, Item, Key, RawString, Table, Value};

use crate::pipeline::spec::diagnostic::{Diagnostics, Mistake, Report};
use crate::pipeline::spec::parse::parse;
use crate::pipeline::spec::source::{Sources, Span};

/// Columns of a line with an array, at most; then each element gets a line.
const WIDTH: usize = 120;

/// Spaces before what lies in an array.
const INDENT: usize = 4;

/// The text of `file` as it is laid out by everyone; mistakes of its syntax are told as [`super::read`] tells them.
pub fn format(file: &Path, text: &str) -> Result<String, Diagnostics> {
    let mut sources = Sources::default();
    let mut report = Report::default();
    let source = sources.add(file.to_owned(), file.parent().unwrap_or(Path::new("")).to_owned(), text.to_owned());
    parse(&mut sources, source, &mut report);
    if !report.is_empty() {
        return Err(report.finish(&sources));
    }
    let mut nowhere = |message: String| {
        report.add(Mistake::at(Span::new(source, 0..0), message));
        std::mem::take(&mut report).finish(&sources)
    };
    let mut document = text
        .trim_start_matches('\u{feff}')
        .parse::<DocumentMut>()
        .map_err(|error| nowhere(format!("broken TOML: {}", error.message())))?;
    let trailing = trailing(document.trailing().as_str().unwrap_or_default());
    table(document.as_table_mut());
    document.set_trailing(trailing);
    let laid_out = document.to_string();
    let laid_out = format!("{}\n", laid_out.trim_start_matches('\n').trim_end());
    // What would be a mistake of this file must never become a mistake of the user's.
    let values = |text: &str| toml::from_str::<toml::Table>(text).map(|table| format!("{table:?}"));
    if values(text.trim_start_matches('\u{feff}')) != values(&laid_out) {
        return Err(nowhere("it cannot be laid out without changing a value; it stays as it is".to_owned()));
    }
    Ok(if laid_out.trim().is_empty() { String::new() } else { laid_out })
}

/// A value behind which a comment stands, in the order of the file.
struct Commented<'a> {
    value: &'a mut Value,
    comment: String,
    /// Columns of its last line.
    width: usize,
}

/// Lays out the entries of a table and of all below it.
fn table(table: &mut Table) {
    let mut run = Vec::new();
    entries(table, "", &mut run);
    align(&mut run);
}

/// Lays out the entries of a table whose keys begin with `path`. `run` holds the commented lines that the next one may join.
fn entries<'a>(table: &'a mut Table, path: &str, run: &mut Vec<Commented<'a>>) {
    for (mut key, item) in table.iter_mut() {
        let shown = format!("{path}{}", key.display_repr());
        bare(key.dotted_decor_mut());
        match item {
            Item::None => {}
            Item::Value(value) => {
                let prefix = prefix(key.leaf_decor());
                if !prefix.is_empty() {
                    align(run);
                }
                key.leaf_decor_mut().set_prefix(prefix);
                key.leaf_decor_mut().set_suffix(" ");
                let comment = comment(value.decor());
                self::value(value, shown.chars().count() + " = ".len(), 0);
                value.decor_mut().set_prefix(" ");
                value.decor_mut().set_suffix("");
                if let Some(comment) = comment {
                    let text = value.to_string();
                    let head = if text.contains('\n') { 0 } else { shown.chars().count() + " =".len() };
                    let width = head + text.lines().last().unwrap_or_default().chars().count();
                    run.push(Commented { value, comment, width });
                } else {
                    align(run);
                }
            }
            Item::Table(inner) => {
                bare(key.leaf_decor_mut());
                if inner.is_dotted() {
                    // What it holds stands here, under the name that it leads to.
                    entries(inner, &format!("{shown}."), run);
                } else {
                    header(inner);
                }
            }
            Item::ArrayOfTables(tables) => {
                bare(key.leaf_decor_mut());
                headers(tables);
            }
        }
    }
}

fn headers(tables: &mut ArrayOfTables) {
    tables.iter_mut().for_each(header);
}

/// Lays out a table that has a header of its own.
fn header(inner: &mut Table) {
    let prefix = prefix(inner.decor());
    let behind = comment(inner.decor()).map(|comment| format!("  {comment}")).unwrap_or_default();
    inner.decor_mut().set_prefix(prefix);
    inner.decor_mut().set_suffix(behind);
    table(inner);
}

/// Puts the comments behind consecutive lines in one column.
fn align(run: &mut Vec<Commented<'_>>) {
    let column = run.iter().map(|line| line.width).max().unwrap_or(0) + 2;
    for Commented { value, comment, width } in run.drain(..) {
        value.decor_mut().set_suffix(format!("{}{comment}", " ".repeat(column - width)));
    }
}

/// Lays out what a value is made of. It begins at `column`; what follows it on lines of their own is indented by `indent`.
fn value(value: &mut Value, column: usize, indent: usize) {
    match value {
        Value::Array(array) => self::array(array, column, indent),
        Value::InlineTable(table) => inline(table, column, indent),
        _ => {}
    }
}

fn array(array: &mut Array, column: usize, indent: usize) {
    let decors = array.iter().map(|element| around(element.decor(), element.decor()));
    let gaps = gaps(decors, array.trailing(), indent, "");
    let is_over_lines = gaps.last().is_some_and(|gap| gap.contains('\n'));
    lay_elements(array, &gaps, column, indent);
    if is_over_lines || array.len() < 2 || column + array.to_string().trim().chars().count() <= WIDTH {
        return;
    }
    let mut gaps = vec![format!("\n{}", " ".repeat(indent + INDENT)); array.len()];
    gaps.push(format!("\n{}", " ".repeat(indent)));
    lay_elements(array, &gaps, column, indent);
}

fn lay_elements(array: &mut Array, gaps: &[String], column: usize, indent: usize) {
    for (element, before) in array.iter_mut().zip(gaps) {
        let column = if before.contains('\n') { indent + INDENT } else { column + 1 };
        value(element, column, indent + INDENT);
        element.decor_mut().set_prefix(before);
        element.decor_mut().set_suffix("");
    }
    let last = gaps.last().map_or("", String::as_str);
    array.set_trailing_comma(last.contains('\n') && !array.is_empty());
    array.set_trailing(last);
}

fn inline(table: &mut InlineTable, column: usize, indent: usize) {
    let mut decors = Vec::new();
    each_decor(table, &mut decors);
    let plain = if decors.is_empty() { "" } else { " " };
    let gaps = gaps(decors.into_iter(), table.trailing(), indent, plain);
    let last = gaps.last().map_or("", String::as_str);
    let is_over_lines = last.contains('\n');
    let mut left = gaps.iter();
    lay_entries(table, &mut left, column, indent);
    // Without a comma behind the last value, what stands before the brace is that value's.
    table.set_trailing_comma(is_over_lines && gaps.len() > 1);
    table.set_trailing(if is_over_lines || gaps.len() == 1 { last } else { "" });
}

/// What stands before and behind each entry, those of dotted keys included.
fn each_decor(table: &InlineTable, decors: &mut Vec<(String, String)>) {
    for (name, value) in table {
        match value {
            Value::InlineTable(dotted) if dotted.is_dotted() => each_decor(dotted, decors),
            value => {
                let key = table.key(name).map(Key::leaf_decor).cloned().unwrap_or_default();
                decors.push(around(&key, value.decor()));
            }
        }
    }
}

fn lay_entries(table: &mut InlineTable, gaps: &mut std::slice::Iter<'_, String>, column: usize, indent: usize) {
    for (mut key, value) in table.iter_mut() {
        bare(key.dotted_decor_mut());
        match value {
            Value::InlineTable(dotted) if dotted.is_dotted() => lay_entries(dotted, gaps, column, indent),
            value => {
                key.leaf_decor_mut().set_prefix(gaps.next().map_or(" ", String::as_str));
                key.leaf_decor_mut().set_suffix(" ");
                self::value(value, column + 1, indent + INDENT);
                value.decor_mut().set_prefix(" ");
                let is_last = gaps.len() == 1;
                let behind = gaps.as_slice().first().filter(|gap| is_last && !gap.contains('\n'));
                value.decor_mut().set_suffix(behind.map_or("", String::as_str));
            }
        }
    }
}

/// What stands before an element and behind it.
fn around(before: &Decor, behind: &Decor) -> (String, String) {
    let text = |raw: Option<&RawString>| raw.and_then(RawString::as_str).unwrap_or_default().to_owned();
    (text(before.prefix()), text(behind.suffix()))
}

/// What stands before the first element, between two, and behind the last; `plain` stands at both ends of a single line.
fn gaps(
    decors: impl Iterator<Item = (String, String)>,
    trailing: &RawString,
    indent: usize,
    plain: &str,
) -> Vec<String> {
    let mut texts = Vec::new();
    let mut behind = String::new();
    for (before, next) in decors {
        // A comma stands right behind its element, also where a comment stood between them.
        texts.push(behind + &before);
        behind = next;
    }
    let count = texts.len();
    texts.push(behind + trailing.as_str().unwrap_or_default());
    let is_over_lines = texts.iter().any(|text| text.contains('\n'));
    let laid = |(place, text): (usize, &String)| {
        let is_end = place == 0 || place == count;
        let inner = if place == count { indent } else { indent + INDENT };
        match (text.contains('\n'), is_end && is_over_lines && count > 0) {
            (true, _) => gap(text, is_end, indent + INDENT, inner),
            (false, true) => format!("\n{}", " ".repeat(inner)),
            (false, false) if place == count && count == 0 => String::new(),
            (false, false) if is_end => plain.to_owned(),
            (false, false) => " ".to_owned(),
        }
    };
    texts.iter().enumerate().map(laid).collect()
}

/// The lines between two elements; what follows is indented by `next`, comments by `indent`. Those at an end lose the blank
/// lines around them.
fn gap(text: &str, is_end: bool, indent: usize, next: usize) -> String {
    let mut all: Vec<&str> = text.split('\n').map(str::trim).collect();
    all.pop();
    let mut all = all.into_iter();
    let first = all.next().unwrap_or_default();
    let mut shown = if first.is_empty() { String::new() } else { format!("  {first}") };
    let mut was_blank = false;
    for line in all {
        if line.is_empty() {
            was_blank = true;
            continue;
        }
        if was_blank && !is_end {
            shown.push('\n');
        }
        shown.push('\n');
        shown.extend([" ".repeat(indent).as_str(), line]);
        was_blank = false;
    }
    if was_blank && !is_end {
        shown.push('\n');
    }
    shown.push('\n');
    shown.push_str(&" ".repeat(next));
    shown
}

/// The lines before a key or a header: its comments, and one blank line where there were any.
fn prefix(decor: &Decor) -> String {
    lines(decor.prefix().and_then(RawString::as_str).unwrap_or_default())
}

/// Comments a line, with at most one blank line between two; ends so that what follows begins a line.
fn lines(text: &str) -> String {
    let mut shown = String::new();
    let mut all = text.split('\n').map(str::trim).collect::<Vec<_>>();
    // The last is the space before what follows.
    all.pop();
    let mut was_blank = false;
    for line in all {
        if line.is_empty() {
            was_blank = true;
            continue;
        }
        if was_blank {
            shown.push('\n');
        }
        shown.push_str(line);
        shown.push('\n');
        was_blank = false;
    }
    if was_blank {
        shown.push('\n');
    }
    shown
}

/// The comments behind everything.
fn trailing(text: &str) -> String {
    lines(&format!("{text}\n"))
}

/// The comment behind a value or a header.
fn comment(decor: &Decor) -> Option<String> {
    let text = decor.suffix().and_then(RawString::as_str)?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn bare(decor: &mut Decor) {
    decor.set_prefix("");
    decor.set_suffix("");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn laid(text: &str) -> String {
        let once = format(Path::new("a.toml"), text).unwrap();
        assert_eq!(format(Path::new("a.toml"), &once).unwrap(), once, "it is not laid out once and for all");
        once
    }

    #[test]
    fn spaces_blank_lines_and_comments_find_their_places() {
        let text = "\n\n#:schema x.json   \n# Why.\n\n\n\n[ params ]   # what varies\nseed=1 # of everything\n  rate   =  1e-3\t#steps\n\
            long_name = 'a' # last\n\n\n\nalone = true # c\n[ stages . \"a b\" ]\nkind='x'\nrewards . r . weight=2.0\n\n\n\
            [[sweep.arm]]\nname=\"a\"\r\n# at the end\n\n\n";
        assert_eq!(
            laid(text),
            "#:schema x.json\n# Why.\n\n[params]  # what varies\nseed = 1         # of everything\nrate = 1e-3      #steps\n\
             long_name = 'a'  # last\n\nalone = true  # c\n[stages.\"a b\"]\nkind = 'x'\nrewards.r.weight = 2.0\n\n\
             [[sweep.arm]]\nname = \"a\"\n# at the end\n"
        );
        assert_eq!(laid(""), "");
        assert_eq!(laid("# only\n\n\n# this"), "# only\n\n# this\n");
    }

    #[test]
    fn arrays_and_inline_tables_keep_their_lines() {
        assert_eq!(
            laid("a=[1,2 , 3,]\nb=[ ]\nc={x=1,y . z={  }}\nd={ }"),
            "a = [1, 2, 3]\nb = []\nc = { x = 1, y.z = {} }\nd = {}\n"
        );
        let lines =
            "a=[ # first\n1,2, # two\n\n# three\n3\n,4 # four\n]\nb = [[1,2],\n[3]]\nc = { x = 1, # one\ny = 2\n}\n";
        assert_eq!(
            laid(lines),
            "a = [  # first\n    1, 2,  # two\n\n    # three\n    3,\n    4,  # four\n]\nb = [\n    [1, 2],\n    [3],\n]\n\
             c = {\n    x = 1,  # one\n    y = 2,\n}\n"
        );
        let long = format!("metrics = [{}]\n", ["\"evaluate_grpo.solved\""; 6].join(","));
        assert_eq!(laid(&long), format!("metrics = [\n{}]\n", "    \"evaluate_grpo.solved\",\n".repeat(6)));
    }

    #[test]
    fn strings_and_numbers_stay_as_they_are_written() {
        let text = "a = \"\"\"\n  two # no comment\n\n\n\n   lines\\\n   \"\"\"\nb = 1_000\nc = 0x_f\n";
        let text = &text.replace("0x_f", "0xF");
        assert_eq!(&laid(text), text);
    }

    #[test]
    fn what_is_broken_is_told_with_its_place() {
        let told = format(Path::new("a.toml"), "a = 1\nb = = 2\n").unwrap_err().render(false);
        assert!(told.contains("broken TOML") && told.contains("a.toml:2:"), "{told}");
    }

    #[test]
    fn every_file_that_we_ship_is_laid_out() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut count = 0;
        for folder in ["pipelines", "experiments", "benches", "src/cli/init"] {
            for file in std::fs::read_dir(root.join(folder)).unwrap() {
                let path = file.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "toml") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    assert!(laid(&text) == text, "run `./pipe fmt {}`", path.display());
                    count += 1;
                }
            }
        }
        assert!(count > 5);
    }

    proptest::proptest! {
        #[test]
        fn no_value_changes(parts in proptest::collection::vec(0..PARTS.len(), 0..14)) {
            // Each statement has a name of its own, so that any of them may follow any.
            let text: String = parts.iter().enumerate().map(|(place, part)| PARTS[*part].replace('%', &format!("k{place}"))).collect();
            let values = |text: &str| format!("{:?}", text.parse::<toml::Table>().unwrap());
            proptest::prop_assert_eq!(values(&laid(&text)), values(&text));
            let comments = |text: &str| {
                let mut all: Vec<String> = text.lines().filter_map(|line| Some(line.split_once('#')?.1.trim().to_owned())).collect();
                all.sort();
                all
            };
            proptest::prop_assert_eq!(comments(&laid(&text)), comments(&text));
        }
    }

    /// Statements in many layouts; `%` is a name.
    const PARTS: &[&str] = &[
        "%=1\n",
        "  % = 'x'   # behind\n",
        "\n\n\n",
        "# before %\n",
        "% . a=true\n%.b . c = [1 ,2]#x\n",
        "% = [\n1,#one\n\n\n  #two\n2\n]\n",
        "%={a=1,b={c=[ ]}}\n",
        "% = {\n a.b = 1, # in\n c = 2 }\n",
        "% = [ [1,\n2] , {a=1} ]\n",
        "\n[ % . x ] # header\n",
        "[[%]]\n",
        "[%]\n[%.y]\nz=\"\"\"a\n\n # b\"\"\"\n",
        "%=0xF\r\n",
        "'%'=[#c\n]\n",
    ];
}
