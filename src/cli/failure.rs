//! How a command ends when it does not end well: one type, made once, that knows its exit code and its hints.

use std::error::Error;
use std::panic::PanicHookInfo;

/// The exit code of a bug.
pub const BUG: u8 = 70;

/// Every exit code, and when a command ends with it.
pub const CODES: &[(u8, &str)] = &[
    (0, "done"),
    (1, "a stage failed, or the world around it; `--check` and `--deny` found something"),
    (2, "the input is wrong: a file, an argument, the store's place"),
    (3, "`pipe plan --exit-code`: something would run"),
    (BUG, "a bug of pipe's"),
    (130, "interrupted; running stages have saved their state, and the next `run` goes on where they stopped"),
];

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    code: u8,
    /// What to print; empty where everything was said while it happened.
    message: String,
    /// Whether the message is whole as it stands and wants no `error:` before it.
    rendered: bool,
    hints: Vec<String>,
}

impl Failure {
    /// A stage failed, or the world around it (exit code 1).
    pub fn stage(error: &(dyn Error + 'static)) -> Self {
        Self::new(1, chain(error))
    }

    /// The user's input is wrong (exit code 2).
    pub fn input(error: &(dyn Error + 'static)) -> Self {
        Self::new(2, chain(error))
    }

    /// The user's input is wrong, in one sentence (exit code 2).
    pub fn wrong(message: impl Into<String>) -> Self {
        Self::new(2, message.into())
    }

    /// Something failed that is no mistake of the user's, in one sentence (exit code 1).
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(1, message.into())
    }

    /// Mistakes in files, rendered with their places (exit code 2).
    pub fn diagnostics(rendered: String) -> Self {
        Self { rendered: true, ..Self::new(2, rendered) }
    }

    /// The end of a command that has said why already.
    pub fn silent(code: u8) -> Self {
        Self::new(code, String::new())
    }

    fn new(code: u8, message: String) -> Self {
        Self { code, message: without_numbers(message), rendered: false, hints: Vec::new() }
    }

    /// The same with something that the user may do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The exit code of the process.
    pub fn code(&self) -> u8 {
        self.code
    }

    /// The message, whether it is whole as it stands, and the hints.
    pub fn parts(&self) -> (&str, bool, &[String]) {
        (&self.message, self.rendered, &self.hints)
    }
}

/// The message without the numbers that the system gives its errors beside their names.
fn without_numbers(mut message: String) -> String {
    const MARK: &str = " (os error ";
    while let Some(start) = message.find(MARK) {
        let Some(length) = message[start..].find(')') else { break };
        message.replace_range(start..=start + length, "");
    }
    message
}

/// An error and its causes in one line: `a: b: c`; a cause that the line says already is not said twice.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

/// The panic hook: where it happened and what to do, on one line each.
pub fn report_panic(panic: &PanicHookInfo<'_>) {
    let payload = panic.payload();
    let said = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let place = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    let mut text = format!("panic at {place}: {}", said.unwrap_or("no message"));
    if std::thread::current().name() == Some("main") {
        text.insert_str(0, "error: this is a bug of pipe: ");
        text.push_str("\nhint: please report it with what you ran; RUST_BACKTRACE=1 shows the way to it");
    }
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        text = format!("{text}\n{backtrace}");
    }
    crate::cli::ui::last_words(&text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_says_each_cause_once() {
        let error = anyhow::anyhow!("no space left").context("cannot write `a`").context("stage `sft`");
        assert_eq!(chain(error.as_ref()), "stage `sft`: cannot write `a`: no space left");
        let twice = anyhow::anyhow!("no space left").context("cannot write `a`: no space left");
        assert_eq!(chain(twice.as_ref()), "cannot write `a`: no space left");
    }

    #[test]
    fn the_numbers_of_the_system_are_left_out() {
        let message = Failure::wrong("cannot read `a`: Is a directory (os error 21); `b` (os error 2)");
        assert_eq!(message.parts().0, "cannot read `a`: Is a directory; `b`");
        assert_eq!(Failure::wrong("a (os error ").parts().0, "a (os error ");
    }

    #[test]
    fn codes_are_those_scripts_rely_on() {
        assert_eq!(Failure::failed("x").code(), 1);
        assert_eq!(Failure::wrong("x").code(), 2);
        assert_eq!(Failure::silent(130).code(), 130);
    }
}
