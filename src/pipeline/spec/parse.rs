//! TOML text to spanned tree, every syntax error located.
//!
//! The parser gives up on the rest of a document at some errors. So each broken statement is reported, blanked out
//! (which moves no byte) and the text parsed again until the syntax is whole; what is left keeps its places.

use std::ops::Range;
use std::sync::Arc;

use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::pipeline::spec::diagnostic::{Mistake, Report};
use crate::pipeline::spec::source::{Sources, Span};
use crate::pipeline::spec::tree::{Entry, Node, Table, Value};

/// More broken statements than this in one text are not told one by one.
const PATIENCE: usize = 50;

/// Bytes of a piece of a long text.
const PIECE: usize = 1 << 15;

/// The largest magnitude that every integer up to it is told apart in canonical JSON.
const LARGEST_INTEGER: i128 = 1 << 53;

/// The tree of the text number `source`.
pub(super) fn parse(sources: &mut Sources, source: u32, report: &mut Report) -> Node {
    if let Some(node) = in_pieces(sources.whole(source), source, PIECE) {
        return node;
    }
    let mut text = sources.whole(source).to_owned();
    let mut stand_ins: Vec<String> = Vec::new();
    for _ in 0..PATIENCE {
        let (table, errors) = DeTable::parse_recoverable(&text);
        let end = text.len();
        let place = |error: &toml::de::Error| error.span().unwrap_or(end..end);
        let (repeated, mut broken): (Vec<_>, Vec<_>) = errors.iter().partition(|error| is_repetition(error.message()));
        broken.sort_by_key(|error| place(error).start);
        let Some(first) = broken.first() else {
            let mut converter = Converter { source, offset: 0, report };
            for error in repeated {
                converter.repetition(&text, place(error), error.message());
            }
            let mut node = converter.table(&table);
            for name in &stand_ins {
                node.remove(name);
            }
            return node;
        };
        let unclosed = broken.iter().any(|error| {
            error.message().starts_with("unclosed array") || error.message().starts_with("unclosed inline table")
        });
        let statement = statement(&text, place(first).start, unclosed);
        let opening = &text[statement.start..statement.start + line_length(&text, statement.start)];
        let opened = unclosed && opens_bracket(opening);
        let (range, message) = if opened {
            let line = statement.start..statement.start + line_length(&text, statement.start);
            (trimmed(&text, line), "unclosed array or inline table".to_owned())
        } else {
            // The parser takes a value that is not there for an empty string without its quotes.
            let is_absent = place(first).is_empty() && first.message().starts_with("string values must be quoted");
            let message = if is_absent { "key without a value" } else { first.message() };
            (place(first), message.to_owned())
        };
        let span = Span::new(source, range);
        let (what, wanted) = message.split_once(", expected ").unwrap_or((&message, ""));
        let label = if wanted.is_empty() || wanted == "nothing" { String::new() } else { format!("expected {wanted}") };
        report.add(Mistake::at(span, format!("broken TOML: {what}")).label(label));
        sources.mark_broken(span);
        stand_ins.extend(blank(&mut text, statement, stand_ins.len()));
    }
    Node::empty(Span::new(source, 0..0))
}

/// The tree of a long text without mistakes, parsed in pieces of about `size` bytes, side by side; `None` where it is short,
/// or where anything is or may be wrong, so that the whole must be parsed to tell what.
///
/// A piece begins at a header `[stages.NAME]`. Where such a line is none, because it lies in a string or in an array, the
/// piece before it is left open, which is an error. Headers are absolute, so a piece means the same by itself; what two pieces
/// both say is for the whole to judge.
fn in_pieces(text: &str, source: u32, size: usize) -> Option<Node> {
    if text.len() < 2 * size {
        return None;
    }
    let mut starts = vec![0];
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let is_first = starts.len() == 1;
        if begins_stage(line) && (is_first || at >= starts[starts.len() - 1] + size) {
            starts.push(at);
        } else if line.trim_start().starts_with('[') && is_stages(line) {
            return None;
        }
        at += line.len();
    }
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    let pieces: Vec<Range<usize>> = starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect();
    let parsed: Option<Vec<Node>> =
        pieces.par_iter().map(|piece| whole(&text[piece.clone()], source, piece.start)).collect();
    let mut parsed = parsed?.into_iter();
    let first = parsed.next()?;
    let Value::Table(mut root) = first.value else { return None };
    if root.contains_key("stages") {
        return None;
    }
    let mut header: Option<Entry> = None;
    let mut stages: Vec<(Arc<str>, Entry)> = Vec::new();
    let top = Arc::make_mut(&mut root);
    for node in parsed {
        let Value::Table(table) = node.value else { return None };
        for (name, entry) in Arc::unwrap_or_clone(table) {
            if *name != *"stages" {
                if top.insert(name, entry).is_some() {
                    return None;
                }
                continue;
            }
            let empty = Entry { node: Node::empty(entry.node.span), ..entry };
            header.get_or_insert(empty);
            let Value::Table(table) = entry.node.value else { return None };
            stages.extend(Arc::unwrap_or_clone(table));
        }
    }
    let count = stages.len();
    let stages: Table = stages.into_iter().collect();
    if stages.len() < count {
        return None;
    }
    let mut header = header?;
    header.node.value = Value::Table(Arc::new(stages));
    top.insert("stages".into(), header);
    Some(Node { value: Value::Table(root), ..first })
}

/// The tree of a text without mistakes that begins at byte `offset` of the source.
fn whole(text: &str, source: u32, offset: usize) -> Option<Node> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut report = Report::default();
    let node = errors.is_empty().then(|| Converter { source, offset, report: &mut report }.table(&table))?;
    report.is_empty().then_some(node)
}

/// Whether a line is the header of a stage's own table.
fn begins_stage(line: &str) -> bool {
    let name = line.strip_prefix("[stages.").and_then(|rest| rest.trim_end().strip_suffix(']'));
    name.is_some_and(|name| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
    })
}

/// Whether a line may be the header `[stages]`, however it is written.
fn is_stages(line: &str) -> bool {
    let inner = line.trim_start().trim_start_matches('[').split(']').next().unwrap_or_default();
    inner.chars().filter(|c| !matches!(c, ' ' | '\t' | '"' | '\'')).eq("stages".chars())
}

/// The value of a `--set` argument from byte `start` on: TOML, or else the text itself.
pub(super) fn parse_value(sources: &Sources, source: u32, start: usize, report: &mut Report) -> Node {
    let whole = sources.whole(source);
    let text = &whole[start..];
    match DeValue::parse(text) {
        Ok(value) => Converter { source, offset: start, report }.value(&value),
        Err(_) => Node::new(Value::String(text.into()), Span::new(source, start..whole.len())),
    }
}

/// The segments of a dotted key such as `stages.grpo."a.b"`.
pub(super) fn parse_path(text: &str) -> Option<Vec<String>> {
    let document = format!("{text} = 0");
    let table = DeTable::parse(&document).ok()?;
    let mut segments = Vec::new();
    let mut table = table.get_ref();
    loop {
        let (key, value) = table.iter().next().filter(|_| table.len() == 1)?;
        segments.push(key.get_ref().to_string());
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => return Some(segments),
        }
    }
}

fn is_repetition(message: &str) -> bool {
    message.starts_with("duplicate key") || message.starts_with("cannot extend value")
}

fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |newline| newline + 1)
}

fn line_length(text: &str, start: usize) -> usize {
    text[start..].find('\n').unwrap_or(text.len() - start)
}

fn trimmed(text: &str, line: Range<usize>) -> Range<usize> {
    let content = &text[line.clone()];
    let start = line.start + (content.len() - content.trim_start().len());
    start..start + content.trim().len()
}

/// The bytes of the broken statement around `at`: its line, or every line of the bracket that was left open.
fn statement(text: &str, at: usize, unclosed: bool) -> Range<usize> {
    let at = (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let mut start = line_start(text, at);
    if start == text.len() && start > 0 {
        start = line_start(text, start - 1);
    }
    let mut end = start + line_length(text, start);
    if unclosed {
        let mut opening = start;
        while !opens_bracket(&text[opening..opening + line_length(text, opening)]) {
            if opening == 0 {
                return start..end;
            }
            opening = line_start(text, opening - 1);
        }
        start = opening;
        end = start + line_length(text, start);
        while end < text.len() {
            let length = line_length(text, end + 1);
            if begins_statement(&text[end + 1..end + 1 + length]) {
                break;
            }
            end += 1 + length;
        }
    }
    start..end
}

/// Whether a line is `key = [...` or `key = {...` with a bracket left open.
fn opens_bracket(line: &str) -> bool {
    let count = |open: char, close: char| line.matches(open).count() > line.matches(close).count();
    line.contains('=') && (count('[', ']') || count('{', '}'))
}

/// Whether a line looks like a table header or `key = ...`.
fn begins_statement(line: &str) -> bool {
    let line = line.trim_start();
    let is_header = line.starts_with('[') && line.trim_end().ends_with(']') && !line.contains(',');
    let key = line.split('=').next().unwrap_or_default().trim();
    let is_key = line.contains('=')
        && !key.is_empty()
        && key.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '"' | '\''));
    is_header || is_key
}

/// Overwrites a statement with spaces; a table header with another one, whose name it gives, so that the fields
/// beneath it do not fall to the table before. `number` tells such names apart.
fn blank(text: &mut String, range: Range<usize>, number: usize) -> Option<String> {
    let old = &text[range.clone()];
    let is_header = old.trim_start().starts_with('[');
    let name = format!("{number:0>width$}", width = range.len().saturating_sub(2));
    let (new, name) = if is_header && name.len() + 2 == range.len() {
        (format!("[{name}]"), Some(name))
    } else {
        (old.chars().map(|c| if c == '\n' { "\n".to_owned() } else { " ".repeat(c.len_utf8()) }).collect(), None)
    };
    text.replace_range(range, &new);
    name
}

struct Converter<'a> {
    source: u32,
    /// Where the text that is parsed begins in the source.
    offset: usize,
    report: &'a mut Report,
}

impl Converter<'_> {
    fn span(&self, range: Range<usize>) -> Span {
        Span::new(self.source, self.offset + range.start..self.offset + range.end)
    }

    fn repetition(&mut self, text: &str, range: Range<usize>, message: &str) {
        let key = text.get(range.clone()).unwrap_or_default().to_owned();
        let span = self.span(range);
        let mistake = if message.starts_with("duplicate key") {
            Mistake::at(span, format!("duplicate key `{key}`")).label("already given above")
        } else {
            Mistake::at(span, message.to_owned())
        };
        self.report.add(mistake);
    }

    fn table(&mut self, table: &Spanned<DeTable<'_>>) -> Node {
        let entries = self.entries(table.get_ref());
        Node::new(Value::Table(Arc::new(entries)), self.span(table.span()))
    }

    fn entries(&mut self, table: &DeTable<'_>) -> Table {
        let entry = |(key, value): (&Spanned<toml::de::DeString<'_>>, &Spanned<DeValue<'_>>)| {
            let node = self.value(value);
            (Arc::from(key.get_ref().as_ref()), Entry { key: self.span(key.span()), node })
        };
        table.iter().map(entry).collect()
    }

    fn value(&mut self, value: &Spanned<DeValue<'_>>) -> Node {
        let span = self.span(value.span());
        let mut refuse = |message: &str, hint: Option<&str>| {
            self.report.add(Mistake::at(span, message).hint(hint.map(str::to_owned)));
            Value::Invalid
        };
        let converted = match value.get_ref() {
            DeValue::String(text) => Value::String(text.as_ref().into()),
            DeValue::Boolean(truth) => Value::Boolean(*truth),
            DeValue::Integer(integer) => match i128::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(number) if number.abs() <= LARGEST_INTEGER => Value::Integer(number as i64),
                _ => refuse("integer beyond 2^53", Some("integers that large are not told apart in JSON")),
            },
            DeValue::Float(float) => match float.as_str().parse::<f64>() {
                Ok(number) if number.is_finite() => Value::Float(number),
                _ => refuse("not a finite number", None),
            },
            DeValue::Datetime(_) => {
                refuse("dates and times are not supported", Some("write it as a string, in quotes"))
            }
            DeValue::Array(items) => Value::Array(Arc::new(items.iter().map(|item| self.value(item)).collect())),
            DeValue::Table(table) => Value::Table(Arc::new(self.entries(table))),
        };
        Node::new(converted, span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (serde_json::Value, String) {
        let mut sources = Sources::default();
        let source = sources.add("a.toml".into(), "".into(), text.to_owned());
        let mut report = Report::default();
        let node = parse(&mut sources, source, &mut report);
        (node.json(), report.finish(&sources).render(false))
    }

    #[test]
    fn pieces_are_the_whole() {
        let text = "description = \"d\"\n[params]\nseed = 1\n\n[stages.b]\nkind = \"draw\"\nx = [\n  [1, 2],\n  [3]]\n\
                    [stages.b.run]\ncpus = 2\n[stages.a]  \ny = { z = \"é\" }\n[stages.a.\"x.y\"]\nq.r = 1\n[table]\nmetrics = [\"a\"]\n";
        let mut sources = Sources::default();
        let source = sources.add("a.toml".into(), "".into(), text.to_owned());
        let expected = whole(text, source, 0).unwrap();
        for size in [1, 20, 60] {
            assert_eq!(in_pieces(text, source, size).as_ref(), Some(&expected), "{size}");
        }
        assert_eq!(in_pieces(text, source, 1000), None, "it is short");
    }

    #[test]
    fn pieces_that_are_none_or_touch_are_left_to_the_whole() {
        for text in [
            "[stages.a]\nx = \"\"\"\n[stages.b]\n\"\"\"\ny = 1\n",
            "[stages.a]\nx = [\n[stages.b]\n]\n",
            "[stages.a]\nx = 1\n[stages.a]\ny = 1\n",
            "[stages.a.run]\nx = 1\n[stages.a]\ny = 1\n[stages.b]\n",
            "[stages.a]\nx = 1\n[stages.b]\nx 1\n",
            "[stages.a]\nx = 1\n[stages.b]\nx = 1\nx = 2\n",
            "[stages.a]\nx = 1\n[stages.b]\nx = inf\n",
            "stages = { c = 1 }\n[stages.a]\nx = 1\n[stages.b]\nx = 1\n",
            "stages.c.x = 1\n[stages.a]\nx = 1\n[stages.b]\nx = 1\n",
            "[stages]\n[stages.a]\nx = 1\n[ 'stages' ]\n[stages.b]\nx = 1\n",
            "[stages.a]\nx = 1\n[params]\n[stages.b]\nx = 1\n[params]\n",
            "[stages.a]\nx = 1\n[[stages.b]]\n[stages.c]\nx = 1\n[[stages.b]]\n",
        ] {
            assert_eq!(in_pieces(text, 0, 1), None, "{text}");
        }
    }

    #[test]
    fn every_syntax_error_is_told_and_the_rest_is_read() {
        let (json, errors) = parsed(
            "[a]\nkind = \"sft\"\nsteps 100\nrate = \nlist = [1,\n  2\nd = 1\n[bb\nx = 1\n[c]\nz = 1\nz = 2\nday = 1979-05-27\n",
        );
        assert_eq!(json, serde_json::json!({"a": {"kind": "sft", "d": 1}, "c": {"z": 1, "day": null}}));
        insta::assert_snapshot!(errors, @r#"
            error: broken TOML: key with no value
             --> a.toml:3:7
            3 | steps 100
              |       ^ expected `=`

            error: broken TOML: key without a value
             --> a.toml:4:8
            4 | rate =
              |        ^

            error: broken TOML: unclosed array or inline table
             --> a.toml:5:1
            5 | list = [1,
              | ^^^^^^^^^^

            error: broken TOML: unclosed table
             --> a.toml:8:4
            8 | [bb
              |    ^ expected `]`

            error: duplicate key `z`
              --> a.toml:12:1
            12 | z = 2
               | ^ already given above

            error: dates and times are not supported
              --> a.toml:13:7
            13 | day = 1979-05-27
               |       ^^^^^^^^^^
            hint: write it as a string, in quotes
        "#);
    }

    #[test]
    fn numbers_that_canonical_json_would_merge_are_refused() {
        let (json, errors) =
            parsed("a = 9007199254740993\nb = inf\nc = -nan\nd = 0x1F\ne = 9007199254740992\nf = 1e999\ng = 1_000.5\n");
        assert_eq!(
            json,
            serde_json::json!({"a": null, "b": null, "c": null, "d": 31, "e": 9_007_199_254_740_992_u64, "f": null, "g": 1000.5})
        );
        insta::assert_snapshot!(errors, @r#"
            error: integer beyond 2^53
             --> a.toml:1:5
            1 | a = 9007199254740993
              |     ^^^^^^^^^^^^^^^^
            hint: integers that large are not told apart in JSON

            error: not a finite number
             --> a.toml:2:5
            2 | b = inf
              |     ^^^

            error: not a finite number
             --> a.toml:3:5
            3 | c = -nan
              |     ^^^^

            error: not a finite number
             --> a.toml:6:5
            6 | f = 1e999
              |     ^^^^^
        "#);
    }

    #[test]
    fn paths_and_set_values() {
        assert_eq!(parse_path("stages.\"a.b\".c").unwrap(), ["stages", "a.b", "c"]);
        assert_eq!(parse_path("a..b"), None);
        assert_eq!(parse_path("a = 1\nb"), None);
        let mut sources = Sources::default();
        let mut value = |text: &str| {
            let source = sources.add("--set".into(), "".into(), text.to_owned());
            let node = parse_value(&sources, source, 2, &mut Report::default());
            (node.json(), sources.text(node.span).to_owned())
        };
        assert_eq!(value("a=[1, 2]"), (serde_json::json!([1, 2]), "[1, 2]".to_owned()));
        assert_eq!(value("a=path"), (serde_json::json!("path"), "path".to_owned()));
        assert_eq!(value("a=\"q\""), (serde_json::json!("q"), "\"q\"".to_owned()));
    }
}
