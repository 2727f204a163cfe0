//! `pipe bundle`: experiments as one file that runs elsewhere.

use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::failure::Failure;
use crate::cli::pace::Pace;
use crate::cli::ui::Ui;
use crate::cli::{Session, render, store_hint};
use crate::pipeline::bundle::{self, BundleError, Layout, Packing};
use crate::pipeline::store::Store;
use crate::stages::KINDS;

/// Pack experiments, the files they name and their results into one file that runs elsewhere
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Experiment or pipeline files
    #[arg(required = true, value_name = "FILES")]
    files: Vec<PathBuf>,
    /// The file to write: `.tar`, or `.tar.zst` for a compressed one
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Pack logs and curves as well
    #[arg(long)]
    logs: bool,
}

/// With `--json`, what was packed.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let ui = &session.ui;
    let name = args.output.to_string_lossy();
    if !name.ends_with(".tar") && !name.ends_with(".tar.zst") {
        return Err(Failure::wrong(format!("`{name}` says no format")).hint("end it in `.tar` or `.tar.zst`"));
    }
    let experiments = session.read(&args.files, &[])?;
    let Some(store) = session.existing_store()? else {
        return Err(Failure::wrong(format!("there is no store at `{}`", session.store.display()))
            .hint("`pipe run` makes it; `--store DIR` or PIPE_STORE names another"));
    };
    // What is packed counts as used and stays until it is; a store that cannot be written cannot promise that.
    let store = match Store::open(&session.store) {
        Ok(writable) => writable,
        Err(error) => {
            ui.note(&format!("a collection elsewhere may take results that are being packed: {error}"));
            store
        }
    };
    let plan = session.plan(&experiments, Some(&store))?;
    let layout = Layout::new(&args.files, &plan, &store, KINDS).map_err(|error| failure(&error, session))?;
    let packing = Packing { plan: &plan, layout: &layout, logs: args.logs };
    let mut progress = ByteProgress::new(ui, "packing");
    let report = bundle::pack(&packing, &store, &args.output, &mut |done, total| progress.tell(done, total));
    progress.end();
    let report = report.map_err(|error| failure(&error, session))?;
    if ui.is_json() {
        return ui.json_pretty(&report);
    }
    ui.note(&format!(
        "packed {} and {}, {}, into `{name}`",
        render::plural(report.results, "result"),
        render::plural(report.files, "file"),
        render::bytes(report.bytes as f64)
    ));
    if report.missing > 0 {
        ui.note(&format!("{} without a result would run there", render::plural(report.missing, "stage")));
    }
    Ok(())
}

/// How a command ends that could not pack or unpack.
pub fn failure(error: &BundleError, session: &Session) -> Failure {
    match error {
        BundleError::Layout(_) | BundleError::Broken { .. } => Failure::input(error),
        BundleError::Occupied(_) => {
            Failure::input(error).hint("name another folder with `--into DIR`; nothing is ever overwritten")
        }
        BundleError::Damaged { .. } => {
            Failure::stage(error).hint("`pipe verify --repair` puts it aside, and the next run makes it again")
        }
        BundleError::Changed(_) => Failure::stage(error).hint("pack again when nothing runs"),
        BundleError::NoRoom { .. } => Failure::stage(error).hint("name a store on a larger disk with `--store DIR`"),
        BundleError::Io { .. } => Failure::stage(error),
        BundleError::Store(_) => Failure::stage(error).hint(store_hint(&session.store)),
    }
}

/// A bar of bytes, or a line now and then where none can be drawn.
pub struct ByteProgress<'a> {
    ui: &'a Ui,
    bar: ProgressBar,
    what: &'static str,
    pace: Pace,
    begun: std::time::Instant,
    told: Duration,
}

/// How often progress is told where no bar can be drawn.
const TELL: Duration = Duration::from_secs(10);

impl<'a> ByteProgress<'a> {
    /// The progress of `what`, as `hashing`.
    pub fn new(ui: &'a Ui, what: &'static str) -> Self {
        let bar = ui.bars().add(ProgressBar::no_length());
        let style = ProgressStyle::with_template("{prefix} {bar:20} {wide_msg}");
        bar.set_style(style.expect("the template is well formed"));
        bar.set_prefix(what);
        Self { ui, bar, what, pace: Pace::new(), begun: std::time::Instant::now(), told: Duration::ZERO }
    }

    /// It is `done` of `total` bytes along.
    pub fn tell(&mut self, done: u64, total: u64) {
        let now = self.begun.elapsed();
        self.pace.reach(now, done);
        let draws = self.ui.draws_bars();
        if !draws && now < self.told + TELL {
            return;
        }
        let rate = self.pace.rate().map(|rate| format!(", {}/s", render::bytes(rate))).unwrap_or_default();
        let left = self.pace.left(total).filter(|_| done < total);
        let left = left.map(|left| format!(", {} left", render::duration(left))).unwrap_or_default();
        let line = format!("{} of {}{rate}{left}", render::bytes(done as f64), render::bytes(total as f64));
        if draws {
            self.bar.set_length(total);
            self.bar.set_position(done);
            self.bar.set_message(line);
        } else {
            self.told = now;
            self.ui.note(&format!("{}: {line}", self.what));
        }
    }

    /// Clears the bar.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
