//! The one way to the terminal: data to stdout, talk to stderr, colour and width where there is a terminal.
//!
//! A reader who closes stdout is no error: what is left is not written. Bars are drawn here so that no line tears them.

use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{MultiProgress, ProgressDrawTarget};
use serde::Serialize;

use crate::cli::failure::Failure;

/// When to use colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Color {
    /// On a terminal, unless `NO_COLOR` is set
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// How a word looks. Colour never carries meaning alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Headings.
    Bold,
    /// What matters less.
    Dim,
    /// Good.
    Green,
    /// Bad.
    Red,
    /// To be looked at.
    Yellow,
    /// To be typed or clicked.
    Cyan,
}

impl Look {
    /// `text` in this look, or as it is.
    pub fn on(self, text: &str, color: bool) -> String {
        let code = match self {
            Self::Bold => "1",
            Self::Dim => "2",
            Self::Green => "32",
            Self::Red => "31",
            Self::Yellow => "33",
            Self::Cyan => "36",
        };
        if color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The terminal of a command.
#[expect(clippy::struct_excessive_bools, reason = "they are independent options of the user's")]
pub struct Ui {
    json: bool,
    quiet: bool,
    output_color: bool,
    error_color: bool,
    bars: MultiProgress,
    /// Set once stdout's reader has gone.
    closed: AtomicBool,
}

impl Ui {
    /// The terminal as the global options ask for it.
    pub fn new(json: bool, quiet: bool, color: Color) -> Self {
        let auto = |terminal: bool| match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb"),
        };
        let interactive = std::io::stderr().is_terminal() && set("TERM").is_none_or(|term| term != "dumb");
        let target = if interactive && !quiet { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self {
            json,
            quiet,
            output_color: auto(std::io::stdout().is_terminal()),
            error_color: auto(std::io::stderr().is_terminal()),
            bars: MultiProgress::with_draw_target(target),
            closed: AtomicBool::new(false),
        }
    }

    /// Whether data is JSON.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether only errors are told.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Whether bars can be drawn.
    pub fn draws_bars(&self) -> bool {
        !self.bars.is_hidden()
    }

    /// Where log lines go: to stderr, above the bars.
    pub fn log_writer(&self) -> impl Fn() -> LogLine + Send + Sync + 'static {
        let bars = self.bars.clone();
        move || LogLine(bars.clone())
    }

    /// Where bars are added.
    pub fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    /// Whether stderr takes colour.
    pub fn error_color(&self) -> bool {
        self.error_color
    }

    /// Whether stdout takes colour.
    pub fn output_color(&self) -> bool {
        self.output_color
    }

    /// The columns of the terminal behind stdout; `None` where there is none.
    pub fn output_width(&self) -> Option<u16> {
        comfy_table::Table::new().width()
    }

    /// The columns of the terminal behind stderr; `None` where there is none.
    pub fn error_width(&self) -> Option<u16> {
        let mut table = comfy_table::Table::new();
        table.use_stderr();
        table.width()
    }

    /// Writes data and ends its last line.
    pub fn data(&self, text: &str) -> Result<(), Failure> {
        if self.closed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let written = self.bars.suspend(|| {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(text.as_bytes())?;
            if !text.ends_with('\n') {
                stdout.write_all(b"\n")?;
            }
            stdout.flush()
        });
        match written {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(Failure::failed(format!("cannot write to stdout: {error}"))),
            Ok(()) => Ok(()),
        }
    }

    /// Writes one JSON value on a line of its own.
    pub fn json_line(&self, value: &impl Serialize) -> Result<(), Failure> {
        let line =
            serde_json::to_string(value).map_err(|error| Failure::failed(format!("cannot write JSON: {error}")))?;
        self.data(&line)
    }

    /// Writes one JSON value over several lines.
    pub fn json_pretty(&self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| Failure::failed(format!("cannot write JSON: {error}")))?;
        self.data(&text)
    }

    /// Tells something, unless asked to be quiet.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.say(text);
        }
    }

    /// Asks something, which no option keeps quiet.
    pub fn ask(&self, text: &str) {
        self.say(text);
    }

    /// Tells something that may be wrong.
    pub fn warn(&self, text: &str) {
        self.say(&format!("{} {text}", Look::Yellow.on("warning:", self.error_color)));
    }

    /// Tells what went wrong.
    pub fn error(&self, text: &str) {
        self.say(&format!("{} {text}", Look::Red.on("error:", self.error_color)));
    }

    /// Tells what the user may do.
    pub fn hint(&self, text: &str) {
        self.say(&format!("{} {text}", Look::Cyan.on("hint:", self.error_color)));
    }

    /// Tells why the command failed.
    pub fn failure(&self, failure: &Failure) {
        let (message, rendered, hints) = failure.parts();
        match (message.is_empty(), rendered) {
            (true, _) => {}
            (false, true) => self.say(message),
            (false, false) => self.error(message),
        }
        for hint in hints {
            self.hint(hint);
        }
    }

    /// A line to stderr, above the bars. There is nobody to tell when stderr is closed.
    fn say(&self, text: &str) {
        self.bars.suspend(|| last_words(text));
    }
}

/// A line to stderr without any terminal around it.
pub fn last_words(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "{}", text.trim_end_matches('\n'));
}

/// Takes back the `^C` that a terminal shows when the key is pressed: behind the end of the bars it begins a line of its own, and
/// they would be taken for standing a line lower than they do.
pub fn take_back_echo() {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(b"\r\x1b[K\x1b[1A");
    let _ = stderr.flush();
}

/// An environment variable that is set to something.
fn set(name: &str) -> Option<std::ffi::OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Writes log lines above the bars.
pub struct LogLine(MultiProgress);

impl std::io::Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.suspend(|| std::io::stderr().write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_leave_text_alone_without_colour() {
        assert_eq!(Look::Red.on("x", false), "x");
        assert_eq!(Look::Red.on("x", true), "\x1b[31mx\x1b[0m");
    }

    #[test]
    fn colour_follows_the_option() {
        assert!(Ui::new(false, false, Color::Always).output_color());
        assert!(!Ui::new(false, false, Color::Never).error_color());
    }
}
