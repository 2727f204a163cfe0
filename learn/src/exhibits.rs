//! What a step shows beside its numbers: how lengths, rewards and ratios lie, completions to read, walks to look at.
//!
//! It is kept for the thread and taken by whoever records the step, as [`crate::phases`] does with seconds. Nothing here
//! changes a result, and nothing of it enters an output; what a stop within a step has not recorded is shown when the step is
//! done again.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use pipe::tasks::Finish;
use pipe::telemetry::{Exhibit, Picture};

/// The most values of one distribution that are kept in a step: more would not be seen.
const MOST: usize = 1 << 20;

thread_local! {
    static DISTRIBUTIONS: RefCell<BTreeMap<String, Vec<f64>>> = const { RefCell::new(BTreeMap::new()) };
    static OTHERS: RefCell<Vec<(String, Exhibit)>> = const { RefCell::new(Vec::new()) };
}

/// Adds values to the distribution `tag` of the step.
pub fn distribution(tag: &str, values: impl IntoIterator<Item = f64>) {
    DISTRIBUTIONS.with_borrow_mut(|kept| {
        let kept = match kept.get_mut(tag) {
            Some(kept) => kept,
            None => kept.entry(tag.to_owned()).or_default(),
        };
        let room = MOST - kept.len();
        kept.extend(values.into_iter().take(room));
    });
}

/// A text in Markdown.
pub fn text(tag: &str, text: String) {
    OTHERS.with_borrow_mut(|kept| kept.push((tag.to_owned(), Exhibit::Text(text))));
}

/// A picture.
pub fn picture(tag: &str, picture: Picture) {
    OTHERS.with_borrow_mut(|kept| kept.push((tag.to_owned(), Exhibit::Picture(picture))));
}

/// All that was shown since it was last asked.
pub fn take() -> Vec<(String, Exhibit)> {
    let distributions = DISTRIBUTIONS.take().into_iter().map(|(tag, values)| (tag, Exhibit::Distribution(values)));
    distributions.chain(OTHERS.take()).collect()
}

/// A completion as it is read.
#[derive(Clone, Debug)]
pub struct Shown<'a> {
    /// Its instance.
    pub instance: &'a str,
    /// The prompt.
    pub prompt: &'a str,
    /// All that the model wrote.
    pub completion: &'a str,
    /// How it ended.
    pub finish: Finish,
    /// The measurements, by name.
    pub measurements: Vec<(&'a str, f64)>,
}

/// Completions as Markdown: a heading of measurements, the prompt, what the model wrote.
pub fn completions<'a>(shown: impl IntoIterator<Item = Shown<'a>>) -> String {
    let mut text = String::new();
    for Shown { instance, prompt, completion, finish, measurements } in shown {
        let measured: Vec<String> = measurements.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        let measured: Vec<&str> = measured.iter().map(|one| one.trim_end_matches('0').trim_end_matches('.')).collect();
        let finish = if finish == Finish::Length { ", cut off" } else { "" };
        let _ = write!(text, "**{instance}**: {}{finish}\n\n", measured.join(", "));
        for (what, words) in [("prompt", prompt), ("completion", completion)] {
            let _ = write!(text, "{what}\n\n{}\n\n", indented(words));
        }
    }
    text
}

/// Words as a block of code, which needs no escapes whatever they hold.
fn indented(words: &str) -> String {
    let lines: Vec<String> = words.lines().map(|line| format!("    {line}")).collect();
    if lines.is_empty() { "    ".to_owned() } else { lines.join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_taken_once() {
        distribution("completions/length", [1.0, 2.0]);
        distribution("completions/length", [3.0]);
        text("validation/completions", "x".to_owned());
        let taken = take();
        assert_eq!(taken[0], ("completions/length".to_owned(), Exhibit::Distribution(vec![1.0, 2.0, 3.0])));
        assert_eq!(taken[1], ("validation/completions".to_owned(), Exhibit::Text("x".to_owned())));
        assert!(take().is_empty());
        distribution("much", std::iter::repeat_n(0.0, MOST + 5));
        distribution("much", [0.0]);
        assert!(matches!(&take()[0].1, Exhibit::Distribution(values) if values.len() == MOST));
    }

    #[test]
    fn completions_read_well() {
        let shown = Shown {
            instance: "test-3",
            prompt: "# maze",
            completion: "up\n<b>left</b>",
            finish: Finish::Length,
            measurements: vec![("solved", 0.0), ("progress", 0.5)],
        };
        let text = completions([shown]);
        assert_eq!(
            text,
            "**test-3**: solved 0, progress 0.5, cut off\n\nprompt\n\n    # maze\n\ncompletion\n\n    up\n    <b>left</b>\n\n"
        );
    }
}
