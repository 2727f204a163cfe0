//! Mistakes of the user's, collected while reading and shown all at once, each with its place.

use std::collections::HashSet;
use std::fmt;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use serde::{Serialize, Serializer};

use crate::pipeline::spec::Origin;
use crate::pipeline::spec::source::{Excerpt, Sources, Span};

/// One mistake, ready to be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// What is wrong: lower case, literals in backticks, no full stop.
    pub message: String,
    /// What stands beneath the carets: what was expected; may be empty.
    pub label: String,
    /// What the user may do.
    pub hint: Option<String>,
    /// Another place that takes part in it: where `${...}` brought a wrong value, where its counterpart stands.
    pub note: Option<String>,
    /// The place; none for a file that cannot be read at all.
    pub origin: Option<Origin>,
    excerpt: Option<Excerpt>,
}

impl Serialize for Diagnostic {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let origin = self.origin.as_ref();
        serde_json::json!({
            "message": self.message,
            "label": self.label,
            "file": origin.map(|origin| origin.file.to_string_lossy()),
            "line": origin.map(|origin| origin.line),
            "column": origin.map(|origin| origin.column),
            "note": self.note,
            "hint": self.hint,
        })
        .serialize(serializer)
    }
}

/// Every mistake that was found, sorted by file and place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl Diagnostics {
    /// The mistakes as text for a terminal, a blank line between two.
    pub fn render(&self, color: bool) -> String {
        let renderer = if color { Renderer::styled() } else { Renderer::plain() };
        let shown: Vec<String> = self.0.iter().map(|diagnostic| diagnostic.render(&renderer)).collect();
        shown.join("\n")
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.render(false).trim_end())
    }
}

impl std::error::Error for Diagnostics {}

impl Diagnostic {
    fn render(&self, renderer: &Renderer) -> String {
        let mut group = Group::with_title(Level::ERROR.primary_title(self.message.as_str()));
        if let (Some(origin), Some(excerpt)) = (&self.origin, &self.excerpt) {
            let mut mark = AnnotationKind::Primary.span(excerpt.marked.clone());
            if !self.label.is_empty() {
                mark = mark.label(self.label.as_str());
            }
            group = group.element(
                Snippet::source(excerpt.line.as_str())
                    .line_start(origin.line)
                    .path(origin.file.to_string_lossy().into_owned())
                    .annotation(mark),
            );
        }
        let mut groups = vec![group];
        let asides = [(Level::NOTE, &self.note), (Level::HELP.with_name("hint"), &self.hint)];
        for (level, text) in asides {
            if let Some(text) = text {
                groups.push(Group::with_title(level.secondary_title(text.as_str())));
            }
        }
        without_empty_gutters(&renderer.render(&groups))
    }
}

/// The rendered text without lines that hold nothing but the gutter's bar.
fn without_empty_gutters(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    for line in text.lines() {
        let mut escaped = false;
        let visible: String = line
            .chars()
            .filter(|&c| {
                let hidden = escaped || c == '\u{1b}';
                escaped = hidden && c != 'm';
                !hidden
            })
            .collect();
        if visible.trim() != "|" && !visible.trim().is_empty() {
            kept.push_str(line.trim_end());
            kept.push('\n');
        }
    }
    kept
}

/// A mistake as it is found, before places are turned into lines.
#[derive(Clone, Debug)]
pub(super) struct Mistake {
    span: Option<Span>,
    /// Another place, with what is said of it.
    other: Option<(Span, &'static str)>,
    /// What it is about where several mistakes may share a place, such as fields missing in one table.
    about: Option<String>,
    absence: Absence,
    message: String,
    label: String,
    hint: Option<String>,
}

/// Whether a mistake is that something is not there, which broken syntax may only make it seem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Absence {
    No,
    OfField,
    OfStage,
}

impl Mistake {
    /// Something wrong at `span`.
    pub(super) fn at(span: Span, message: impl Into<String>) -> Self {
        Self {
            span: Some(span),
            other: None,
            about: None,
            absence: Absence::No,
            message: message.into(),
            label: String::new(),
            hint: None,
        }
    }

    /// Something wrong that has no place in a text.
    pub(super) fn nowhere(message: impl Into<String>) -> Self {
        let message = message.into();
        let about = Some(message.clone());
        Self { span: None, other: None, about, absence: Absence::No, message, label: String::new(), hint: None }
    }

    /// With `label` beneath the carets.
    pub(super) fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    /// With a hint, if there is one.
    pub(super) fn hint(mut self, hint: impl Into<Option<String>>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Noting that `${...}` at `via` brought the value there.
    pub(super) fn via(mut self, via: Option<Span>) -> Self {
        self.other = via.map(|via| (via, "the value is used")).or(self.other);
        self
    }

    /// Noting that what is said of it stands at `span`.
    pub(super) fn also(mut self, span: Span, what: &'static str) -> Self {
        self.other = Some((span, what));
        self
    }

    /// One of several that may share a place.
    pub(super) fn about(mut self, about: impl Into<String>) -> Self {
        self.about = Some(about.into());
        self
    }

    /// A field that is not there.
    pub(super) fn absent_field(mut self) -> Self {
        self.absence = Absence::OfField;
        self
    }

    /// A stage that is not there.
    pub(super) fn absent_stage(mut self) -> Self {
        self.absence = Absence::OfStage;
        self
    }
}

/// The mistakes found so far, one a place.
#[derive(Debug, Default)]
pub(super) struct Report {
    mistakes: Vec<Mistake>,
    seen: HashSet<(Option<Span>, Option<String>)>,
}

impl Report {
    /// Adds a mistake, unless one at the same place (and about the same) is already known.
    pub(super) fn add(&mut self, mistake: Mistake) {
        if self.seen.insert((mistake.span, mistake.about.clone())) {
            self.mistakes.push(mistake);
        }
    }

    /// Adds mistakes.
    pub(super) fn extend(&mut self, mistakes: impl IntoIterator<Item = Mistake>) {
        mistakes.into_iter().for_each(|mistake| self.add(mistake));
    }

    /// Adds the mistakes of another report.
    pub(super) fn absorb(&mut self, other: Self) {
        self.extend(other.mistakes);
    }

    /// Whether nothing was wrong.
    pub(super) fn is_empty(&self) -> bool {
        self.mistakes.is_empty()
    }

    /// What to show.
    pub(super) fn finish(self, sources: &Sources) -> Diagnostics {
        let broken_header = sources.has_broken_header();
        let real = |mistake: &Mistake| match mistake.absence {
            Absence::No => true,
            Absence::OfField => !mistake.span.is_some_and(|span| sources.is_broken_after(span)),
            Absence::OfStage => !broken_header,
        };
        let shown = |mistake: Mistake| {
            let note = mistake.other.map(|(span, what)| {
                let origin = sources.origin(span);
                let (file, line, column) = (origin.file.display(), origin.line, origin.column);
                format!("{what} at {file}:{line}:{column}")
            });
            Diagnostic {
                message: mistake.message,
                label: mistake.label,
                hint: mistake.hint,
                note,
                origin: mistake.span.map(|span| sources.origin(span)),
                excerpt: mistake.span.map(|span| sources.excerpt(span)),
            }
        };
        let mut diagnostics: Vec<Diagnostic> = self.mistakes.into_iter().filter(real).map(shown).collect();
        diagnostics.sort_by(|a, b| (&a.origin, &a.message).cmp(&(&b.origin, &b.message)));
        Diagnostics(diagnostics)
    }
}

/// `did you mean ...?` for the candidate that is nearest to `given`, where one is near enough.
pub(super) fn did_you_mean<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(given, candidates).map(|nearest| format!("did you mean `{nearest}`?"))
}

/// The candidate that is nearest to `given`: at most 1 to 3 typing slips away, by length.
pub(super) fn nearest<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = match given.chars().count() {
        0 | 1 => return None,
        2..=3 => 1,
        4..=8 => 2,
        _ => 3,
    };
    candidates
        .into_iter()
        .filter(|candidate| candidate.len().abs_diff(given.len()) <= 4 * limit)
        .map(|candidate| (strsim::damerau_levenshtein(given, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, candidate)| candidate)
}

/// `expected one of ...`, cut after a dozen.
pub(super) fn expected<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let mut shown: Vec<String> = names.into_iter().map(|name| format!("`{name}`")).collect();
    let count = shown.len();
    if count > 12 {
        shown.truncate(12);
        shown.push("...".to_owned());
    }
    match count {
        0 => "nothing is expected here".to_owned(),
        1 => format!("expected {}", shown[0]),
        _ => format!("expected one of {}", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnostics() -> Diagnostics {
        let mut sources = Sources::default();
        let text = format!("{}learnig_rate = 1e-5\n", "\n".repeat(13));
        let source = sources.add("experiments/maze.toml".into(), "".into(), text);
        let mut report = Report::default();
        for _ in 0..2 {
            report.add(
                Mistake::at(Span::new(source, 13..25), "unknown field `learnig_rate` in stage `sft`")
                    .label("expected one of `model`, `data`, `learning_rate`")
                    .hint("did you mean `learning_rate`?".to_owned()),
            );
        }
        report.finish(&sources)
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let expected = "error: unknown field `learnig_rate` in stage `sft`
  --> experiments/maze.toml:14:1
14 | learnig_rate = 1e-5
   | ^^^^^^^^^^^^ expected one of `model`, `data`, `learning_rate`
hint: did you mean `learning_rate`?
";
        assert_eq!(diagnostics().render(false), expected);
    }

    #[test]
    fn colour_adds_only_escapes() {
        let colored = diagnostics().render(true);
        assert!(colored.contains('\u{1b}'));
        assert_eq!(colored.lines().count(), diagnostics().render(false).lines().count());
    }

    #[test]
    fn json_has_the_place() {
        let json = serde_json::to_value(diagnostics()).unwrap();
        assert_eq!(json[0]["file"], "experiments/maze.toml");
        assert_eq!((json[0]["line"].clone(), json[0]["column"].clone()), (14.into(), 1.into()));
        assert_eq!(json[0]["hint"], "did you mean `learning_rate`?");
    }

    #[test]
    fn near_names_are_suggested_and_far_ones_are_not() {
        assert_eq!(nearest("learnig_rate", ["model", "learning_rate"]), Some("learning_rate"));
        assert_eq!(nearest("stf", ["sft", "grpo"]), Some("sft"));
        assert_eq!(nearest("sede", ["seed", "steps"]), Some("seed"));
        assert_eq!(nearest("warmup", ["model", "data"]), None);
        assert_eq!(nearest("a", ["b"]), None);
    }
}
