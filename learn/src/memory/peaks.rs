//! Peaks of processes of their own, against which the tests hold the forecasts.
//!
//! A forecast counts tensors. Of what is freed in blocks below 32 MiB the C library's allocator keeps some for later blocks, and
//! how much of that a peak meets depends on the processor and on chance. So these processes give every block back once it is
//! free.

use std::process::Command;

use crate::memory::{field, read, shown};

/// Set in the process that is measured: which of the cases it is.
const CASE: &str = "PIPE_MEMORY_CASE";
/// From that many bytes on a block is given back once it is free, and the threshold no longer grows; see mallopt(3).
const GIVEN_BACK: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "65536");

/// The engine and the number of the case that this process is to measure, if it is such a process.
pub(super) fn asked() -> Option<(String, usize)> {
    let case = std::env::var(CASE).ok()?;
    let (engine, case) = case.split_once(' ').expect("an engine and a number");
    Some((engine.to_owned(), case.parse().expect("a number")))
}

/// Bytes in that line of the process's status.
pub(super) fn status(name: &str) -> u64 {
    1024 * field(&read("/proc/self/status").unwrap(), name).unwrap()
}

/// Tells the process that asked what a case took and what was forecast.
pub(super) fn tell(taken: u64, forecast: u64) {
    println!("peak of the case: {taken} {forecast}");
}

/// Has `test` measure a case in a process of its own, because the peak of a process never falls: the bytes that it took and
/// those that were forecast.
pub(super) fn of(test: &str, engine: &str, case: usize) -> [u64; 2] {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).env(CASE, format!("{engine} {case}")).env(GIVEN_BACK.0, GIVEN_BACK.1);
    let child = child.output().unwrap();
    let (out, said) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{said}");
    assert!(out.contains("1 passed"), "the child ran the case");
    let told = out.lines().find_map(|line| line.split("peak of the case: ").nth(1)).expect("the child tells its peak");
    let (taken, forecast) = told.split_once(' ').expect("two numbers");
    [taken, forecast].map(|bytes| bytes.parse().unwrap())
}

/// Holds the forecast of a case of `test` against its peak.
pub(super) fn hold(test: &str, engine: &str, case: usize) {
    let [taken, forecast] = of(test, engine, case);
    assert!(
        forecast as f64 <= 1.5 * taken as f64 && taken as f64 <= 1.5 * forecast as f64,
        "case {case} {engine}: {} forecast, {} taken",
        shown(forecast),
        shown(taken)
    );
}
