//! Numbers, names and tables as people read them.

use comfy_table::{CellAlignment, ContentArrangement, Table};

use crate::pipeline::plan::NodeName;

/// Seconds as `0.8s`, `42s`, `4m 10s`, `3h 05m`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".to_owned();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h {:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d {:02}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// Bytes as `812 B`, `1.4 kB`, `23.0 MB`: powers of 1000.
pub fn bytes(count: f64) -> String {
    let mut value = count;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 999.5 {
            return if unit == "B" { format!("{value:.0} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// An integer with commas: `1,200`.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A measurement with four significant digits, without trailing zeros: `0.3121`, `1234`, `1.5e-5`.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string();
    }
    let size = value.abs();
    if size == 0.0 {
        return "0".to_owned();
    }
    if !(1e-3..1e7).contains(&size) {
        let text = format!("{value:.2e}");
        let (digits, exponent) = text.split_once('e').expect("exponential form has an e");
        let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
        return format!("{digits}e{exponent}");
    }
    let decimals = (3 - size.log10().floor() as i64).clamp(0, 6) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A share as a percentage with one decimal, without its sign: `87.3`.
pub fn percent(share: f64) -> String {
    // Adding 0 turns the -0.0 of a rounded small negative into 0.0.
    format!("{:.1}", (share * 1000.0).round() / 10.0 + 0.0)
}

/// A p value: `0.031`, `< 0.001`.
pub fn p_value(p: f64) -> String {
    if p < 0.001 { "< 0.001".to_owned() } else { format!("{p:.3}") }
}

/// `1 stage`, `2 stages`.
pub fn plural(number: usize, noun: &str) -> String {
    let number_text = count(number as u64);
    if number == 1 { format!("{number_text} {noun}") } else { format!("{number_text} {noun}s") }
}

/// `EXPERIMENT[/TRIAL]/STAGE`, as `pipe show` takes it.
pub fn node(name: &NodeName) -> String {
    let parts = [&name.experiment, &name.trial, &name.stage];
    parts.into_iter().filter(|part| !part.is_empty()).map(String::as_str).collect::<Vec<_>>().join("/")
}

/// Columns without lines, two spaces apart, right-aligned where `right` says so; folded to `width` columns if given.
pub fn columns(header: &[&str], right: &[usize], rows: Vec<Vec<String>>, width: Option<u16>) -> String {
    let is_plain = |text: &str| text.bytes().all(|byte| (b' '..0x7f).contains(&byte));
    if width.is_none() && header.iter().all(|cell| is_plain(cell)) && rows.iter().flatten().all(|cell| is_plain(cell)) {
        return plain_columns(header, right, &rows);
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.force_no_tty();
    if let Some(width) = width {
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(width);
    }
    table.set_header(header.to_vec());
    table.add_rows(rows);
    for (place, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&place) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// [`columns`] of cells that are as wide as they are long and need no folding, however many rows there are.
fn plain_columns(header: &[&str], right: &[usize], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        for (place, (cell, width)) in cells.zip(&widths).enumerate() {
            let gap = width - cell.len();
            let (before, after) = if right.contains(&place) { (gap, 2) } else { (0, gap + 2) };
            text.extend(std::iter::repeat_n(' ', before));
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', after));
        }
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    };
    line(&mut header.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// A line folded at spaces to so many columns; a word that is longer is cut where it must be.
pub fn folded(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_inclusive(' ') {
        let length = word.trim_end().chars().count();
        if used + length > width && used > 0 {
            lines.push(String::new());
            used = 0;
        }
        for character in word.chars() {
            if used == width && character != ' ' {
                lines.push(String::new());
                used = 0;
            }
            if used < width {
                lines.last_mut().expect("there is one").push(character);
                used += 1;
            }
        }
    }
    lines.into_iter().map(|line| line.trim_end().to_owned()).collect()
}

/// The names of `known` that `wanted` may be a slip of, nearest first, at most three.
pub fn near<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let slips = (wanted.chars().count() / 3).max(1);
    let mut scored: Vec<(usize, &str)> = known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wanted, name), name))
        .filter(|(distance, _)| *distance <= slips)
        .collect();
    scored.sort_unstable();
    scored.into_iter().map(|(_, name)| name).take(3).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let shown = [0.04, 0.84, 9.97, 59.7, 250.0, 11_100.0, 200_000.0, f64::NAN].map(duration);
        assert_eq!(shown, ["0.0s", "0.8s", "10s", "1m 00s", "4m 10s", "3h 05m", "2d 07h", "?"]);
    }

    #[test]
    fn counts_and_bytes_read_well() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([812.0, 1400.0, 23e6, 5e13].map(bytes), ["812 B", "1.4 kB", "23.0 MB", "50.0 TB"]);
        assert_eq!(plural(1, "stage") + &plural(2000, "stage"), "1 stage2,000 stages");
    }

    #[test]
    fn numbers_keep_four_digits() {
        let shown = [0.312_149, 1234.56, 1.5e-5, 0.0, -2.0, 12_345_678.0, 0.5, 1e-3].map(number);
        assert_eq!(shown, ["0.3121", "1235", "1.5e-5", "0", "-2", "1.23e7", "0.5", "0.001"]);
        assert_eq!([0.8734, 1.0, -0.0001].map(percent), ["87.3", "100.0", "0.0"]);
        assert_eq!([0.0314, 0.0001].map(p_value), ["0.031", "< 0.001"]);
    }

    #[test]
    fn columns_line_up_and_end_without_spaces() {
        let rows = vec![vec!["sft".to_owned(), "12".to_owned()], vec!["evaluate".to_owned(), "3".to_owned()]];
        assert_eq!(columns(&["stage", "n"], &[1], rows, None), "stage      n\nsft       12\nevaluate   3\n");
    }

    #[test]
    fn near_names_come_first() {
        assert_eq!(near("evalute", ["sft", "evaluate", "tokens"]), ["evaluate"]);
        assert!(near("zzz", ["sft"]).is_empty());
    }

    #[test]
    fn text_is_folded_at_spaces_and_long_words_are_cut() {
        assert_eq!(folded("one two three", 7), ["one two", "three"]);
        assert_eq!(folded("abcdefgh ij", 3), ["abc", "def", "gh", "ij"]);
        assert_eq!(folded("", 3), [""]);
        for width in 1..20 {
            let lines = folded("a bb ccc dddd eeeee ffffff", width);
            assert!(lines.iter().all(|line| line.chars().count() <= width), "{lines:?}");
            assert_eq!(lines.concat().replace(' ', ""), "abbcccddddeeeeeffffff");
        }
    }
}
