//! `pipe-worker`: runs one stage that computes with libtorch, and ends. `pipe run` starts it; people never need to.

use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use pipe::pipeline::exec::attempt::Request;
use pipe::pipeline::exec::worker::{Program, serve};
use pipe_learn::kinds::RUNNERS;

fn main() -> anyhow::Result<ExitCode> {
    let set_threads = |threads: usize| tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
    serve(&Program { runners: RUNNERS, prepare, set_threads }).map(ExitCode::from)
}

/// Notes which build computes, and refuses a device that is not there.
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
    Ok(())
}
