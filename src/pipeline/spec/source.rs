//! The texts that values come from: files and `--set` arguments, and places in them.
//!
//! A [`Span`] is three numbers, so every value can carry one; lines and columns are computed only for what is shown.

use std::path::{Component, Path, PathBuf};

use crate::pipeline::spec::Origin;

/// A range of bytes in one of the [`Sources`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Span {
    /// Which text.
    pub(super) source: u32,
    /// First byte.
    pub(super) start: u32,
    /// The byte after the last.
    pub(super) end: u32,
}

impl Span {
    /// The bytes `range` of the text `source`.
    pub(super) fn new(source: u32, range: std::ops::Range<usize>) -> Self {
        Self { source, start: range.start as u32, end: range.end as u32 }
    }
}

/// A line with the part of it that a message is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Excerpt {
    /// The line, without its end.
    pub(super) line: String,
    /// The bytes of the line to mark; never past its end by more than one.
    pub(super) marked: std::ops::Range<usize>,
}

/// One text.
#[derive(Debug)]
pub(super) struct Source {
    /// How messages call it.
    pub(super) name: PathBuf,
    /// What relative paths in it are relative to.
    pub(super) folder: PathBuf,
    text: String,
    line_starts: Vec<usize>,
    /// Where its syntax is broken, as byte offsets.
    broken: Vec<usize>,
}

/// Every text that was read.
#[derive(Debug, Default)]
pub(super) struct Sources {
    all: Vec<Source>,
}

impl Sources {
    /// Adds a text and gives its number.
    pub(super) fn add(&mut self, name: PathBuf, folder: PathBuf, text: String) -> u32 {
        let line_starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        self.all.push(Source { name, folder, text, line_starts, broken: Vec::new() });
        (self.all.len() - 1) as u32
    }

    /// The text number `source`.
    pub(super) fn get(&self, source: u32) -> &Source {
        &self.all[source as usize]
    }

    /// What the file says at `span`.
    pub(super) fn text(&self, span: Span) -> &str {
        self.get(span.source).text.get(span.start as usize..span.end as usize).unwrap_or_default()
    }

    /// The whole text number `source`.
    pub(super) fn whole(&self, source: u32) -> &str {
        &self.get(source).text
    }

    /// Remembers that the syntax is broken at `span`.
    pub(super) fn mark_broken(&mut self, span: Span) {
        self.all[span.source as usize].broken.push(span.start as usize);
    }

    /// Whether the syntax is broken between `span` and the next table header: what seems to be missing there may not be.
    pub(super) fn is_broken_after(&self, span: Span) -> bool {
        let source = self.get(span.source);
        let start = span.start as usize;
        source.broken.iter().any(|&at| {
            at >= start
                && source.text.get(start..at).is_some_and(|between| {
                    between.lines().skip(1).all(|line| !line.starts_with('[') || between.ends_with(line))
                })
        })
    }

    /// Whether the syntax of a line that begins a table is broken anywhere: a stage that seems not to exist may exist.
    pub(super) fn has_broken_header(&self) -> bool {
        self.all.iter().any(|source| {
            source
                .broken
                .iter()
                .any(|&at| source.text[source.line_range(source.line_at(at))].trim_start().starts_with('['))
        })
    }

    /// The place of `span` for people.
    pub(super) fn origin(&self, span: Span) -> Origin {
        let source = self.get(span.source);
        let start = source.clamp(span.start as usize);
        let line = source.line_at(start);
        let column = source.text[source.line_starts[line]..start].chars().count() + 1;
        Origin { file: source.name.clone(), line: line + 1, column }
    }

    /// The line in which `span` begins, with the part of it that lies in `span`.
    pub(super) fn excerpt(&self, span: Span) -> Excerpt {
        let source = self.get(span.source);
        let start = source.clamp(span.start as usize);
        let line = source.line_range(source.line_at(start));
        let end = source.clamp(span.end as usize).clamp(start, line.end.max(start));
        let marked = start - line.start..end - line.start;
        Excerpt { line: source.text[line].to_owned(), marked }
    }
}

impl Source {
    fn clamp(&self, mut at: usize) -> usize {
        at = at.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        at
    }

    fn line_at(&self, at: usize) -> usize {
        self.line_starts.partition_point(|&start| start <= at).saturating_sub(1)
    }

    fn line_range(&self, line: usize) -> std::ops::Range<usize> {
        let start = self.line_starts[line];
        let end = self.line_starts.get(line + 1).map_or(self.text.len(), |next| next - 1);
        let end = if self.text[start..end].ends_with('\r') { end - 1 } else { end };
        start..end
    }
}

/// `path` without `.` and with `name/..` folded, for showing; never for opening, where symbolic links decide.
pub(super) fn folded(path: &Path) -> PathBuf {
    let mut folded = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if matches!(folded.components().next_back(), Some(Component::Normal(_))) => {
                folded.pop();
            }
            other => folded.push(other),
        }
    }
    folded
}

/// The absolute path behind which `path` lies: its folder with symbolic links followed, then its own name.
pub(super) fn absolute(path: &Path) -> std::io::Result<PathBuf> {
    std::fs::metadata(path)?;
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) => {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            Ok(folder.canonicalize()?.join(name))
        }
        _ => path.canonicalize(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_count_lines_and_characters() {
        let mut sources = Sources::default();
        let source = sources.add("a.toml".into(), "".into(), "é = 1\r\nnäme = \"ü\"\n".to_owned());
        let text = sources.whole(source);
        let at = text.find('"').unwrap();
        let span = Span::new(source, at..at + 4);
        assert_eq!(sources.origin(span), Origin { file: "a.toml".into(), line: 2, column: 8 });
        assert_eq!(sources.excerpt(span), Excerpt { line: "näme = \"ü\"".to_owned(), marked: 8..12 });
        let end = text.len();
        assert_eq!(sources.origin(Span::new(source, end..end)).line, 3);
        assert_eq!(sources.excerpt(Span::new(source, 0..end)).line, "é = 1");
    }

    #[test]
    fn paths_fold_for_people() {
        assert_eq!(folded(Path::new("experiments/../pipelines/./a.toml")), Path::new("pipelines/a.toml"));
        assert_eq!(folded(Path::new("../a/../../b")), Path::new("../../b"));
    }
}
