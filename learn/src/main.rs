//! `pipe-worker`: runs one stage that computes with libtorch, and ends. `pipe run` starts it; people never need to.
//!
//! `pipe-worker score` is what `pipe score` starts: no stage and no store, only a model, rows, and their scores; and
//! `pipe-worker play` what `pipe sample` starts: a model, instances, and what it says of them.

use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;
use pipe::pipeline::exec::attempt::Request;
use pipe::pipeline::exec::worker::{Program, serve};
use pipe::pipeline::stage::Resources;
use pipe::stages::training::Precision;
use pipe_learn::kinds::RUNNERS;
use pipe_learn::model::{ModelConfig, Transformer};
use pipe_learn::{by_hand, device, native, score};

/// What `pipe score` passes on.
#[derive(Debug, Parser)]
struct Score {
    model: PathBuf,
    rows: PathBuf,
    #[arg(long)]
    device: String,
    #[arg(long)]
    batch_size: usize,
    #[arg(long)]
    output: Option<PathBuf>,
}

/// What `pipe sample` passes on.
#[derive(Debug, Parser)]
struct Play {
    asked: PathBuf,
    #[arg(long)]
    device: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let mut arguments = std::env::args_os().skip(1).peekable();
    let mode = arguments.peek().and_then(|mode| mode.to_str()).map(str::to_owned);
    let ended = match mode.as_deref() {
        Some("score") => Some(run_score(&Score::parse_from(arguments))),
        Some("play") => Some(run_play(&Play::parse_from(arguments))),
        _ => None,
    };
    if let Some(ended) = ended {
        return Ok(match ended {
            Ok(()) => ExitCode::SUCCESS,
            Err(failed) => {
                let _ = writeln!(std::io::stderr(), "error: {:#}", failed.error);
                ExitCode::from(failed.code)
            }
        });
    }
    let set_threads = |threads: usize| tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
    serve(&Program { runners: RUNNERS, prepare, set_threads }).map(ExitCode::from)
}

/// Why nothing was scored.
struct Failed {
    error: anyhow::Error,
    /// 2 where the rows or the model are wrong, 1 where the machine is.
    code: u8,
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self { error, code: 1 }
    }
}

/// Opens a device by its name; `auto` is CUDA where there is one.
fn open_device(name: &str) -> anyhow::Result<tch::Device> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let device = match name {
        "auto" if tch::Cuda::is_available() => "cuda:0",
        "auto" => "cpu",
        other => other,
    };
    device::open(&Resources {
        device: device.to_owned(),
        threads,
        visible_devices: None,
        save_every: Duration::from_secs(60),
    })
}

/// Plays what a file asks for; a line of JSON an episode.
fn run_play(asked: &Play) -> Result<(), Failed> {
    let device = open_device(&asked.device)?;
    let input = |error| Failed { error, code: 2 };
    let asked = by_hand::read(&asked.asked).map_err(input)?;
    let mut stdout = std::io::stdout().lock();
    for played in by_hand::run(&asked, device).map_err(input)? {
        let line = serde_json::to_string(&played).context("an episode is plain data")?;
        writeln!(stdout, "{line}").context("cannot write to stdout")?;
    }
    Ok(())
}

/// Scores the rows of a file. Nothing is written before all of it is computed.
fn run_score(asked: &Score) -> Result<(), Failed> {
    let input = |error| Failed { error, code: 2 };
    let device = open_device(&asked.device)?;
    let config = ModelConfig::read(&asked.model).map_err(input)?;
    let rows = score::read_rows(&asked.rows, &asked.model, &config).map_err(input)?;
    let model = Transformer::load_frozen(&asked.model, device, Precision::Fp32).map_err(input)?;
    let scores = score::score(&model, &rows, asked.batch_size)
        .with_context(|| format!("scoring the rows of `{}`", asked.rows.display()))?;
    let Some(output) = &asked.output else {
        return Ok(score::write_rows(&rows, &scores, &mut std::io::stdout().lock())?);
    };
    // Beside its place first, so that a file that is there is whole.
    let writing = || format!("cannot write `{}`", output.display());
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(writing)?;
    score::write_rows(&rows, &scores, &mut BufWriter::new(file.as_file_mut())).with_context(writing)?;
    // A temporary file is its owner's alone; a result is for whoever may read the folder.
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.as_file().set_permissions(permissions).with_context(writing)?;
    file.persist(output).with_context(writing)?;
    Ok(())
}

/// Notes which build computes and with which kernels, and refuses a device that is not there.
///
/// The driver judges by the files of the GPU driver; libtorch has the last word.
fn prepare(request: &mut Request) -> anyhow::Result<()> {
    ensure!(
        !request.device.starts_with("cuda") || tch::Cuda::is_available(),
        "the device `{}` was given to the stage, and libtorch finds no usable GPU; set `run.device` to `cpu`",
        request.device
    );
    let build = std::fs::metadata("/proc/self/exe").context("cannot look at this program")?;
    let changed = build.modified().context("cannot look at this program")?.duration_since(std::time::UNIX_EPOCH)?;
    request.numerics.insert("worker".to_owned(), format!("{} bytes of {}", build.len(), changed.as_secs()));
    let device = if request.device.starts_with("cuda") { tch::Device::Cuda(0) } else { tch::Device::Cpu };
    request.numerics.insert("kernels".to_owned(), native::set(device)?.to_owned());
    Ok(())
}
