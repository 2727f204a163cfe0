//! The device and the threads that a stage was given.

use anyhow::{Result, bail, ensure};
use pipe::pipeline::stage::Resources;
use tch::{Cuda, Device, Kind};

use crate::native::context;
use crate::preflight::kernels;

/// The device that `resources` names (`cpu` or `cuda:N`), after setting libtorch's threads and its switches: fp32 is fp32 and
/// not TF32, and what has a deterministic form takes it ([`context::exact`]).
///
/// The kernels that it computes with are tried first; one that is wrong is an error.
pub fn open(resources: &Resources) -> Result<Device> {
    ensure!(resources.threads > 0, "a stage needs at least one thread");
    tch::set_num_threads(resources.threads as i32);
    keep_memory();
    context::exact()?;
    let name = resources.device.as_str();
    let Some(index) = name.strip_prefix("cuda").map(|rest| rest.strip_prefix(':').unwrap_or("0")) else {
        ensure!(name == "cpu", "unknown device `{name}`: expected `cpu` or `cuda:0`");
        kernels::check(Device::Cpu, Kind::Float)?;
        return Ok(Device::Cpu);
    };
    let Ok(index) = index.parse::<usize>() else { bail!("unknown device `{name}`: expected `cpu` or `cuda:0`") };
    ensure!(
        Cuda::is_available(),
        "the device `{name}` was asked for, but libtorch finds no CUDA device: set `device = \"cpu\"` or check the driver"
    );
    let count = Cuda::device_count();
    ensure!((index as i64) < count, "the device `{name}` was asked for, but there are only {count} CUDA devices");
    kernels::check(Device::Cuda(index), Kind::Float)?;
    Ok(Device::Cuda(index))
}

/// Runs a backward pass on `device`, deterministic on a GPU, too: see [`context::strictly`].
pub fn strictly<R>(device: Device, run: impl FnOnce() -> R) -> Result<R> {
    // libtorch reports an operation without a deterministic form as a panic of ours, like any other error.
    if device == Device::Cpu { Ok(run()) } else { context::strictly(run) }
}

/// Lets the allocator keep the memory of freed tensors for the next ones.
///
/// By default every tensor above some hundred KiB is mapped afresh and zeroed page by page by the kernel, in every
/// operation of every step.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(
    unsafe_code,
    reason = "the allocator's thresholds can be set through C alone; the call touches no memory of ours"
)]
fn keep_memory() {
    // The largest threshold that glibc takes. A refusal leaves the defaults, which are slower and nothing else.
    let (mapped, trimmed) = (32 << 20, i32::MAX);
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, mapped);
        libc::mallopt(libc::M_TRIM_THRESHOLD, trimmed);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_memory() {}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;

    pub(crate) fn resources(device: &str) -> Resources {
        Resources { device: device.to_owned(), threads: 2, visible_devices: None, save_every: Duration::from_secs(60) }
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        assert_eq!(open(&resources("cpu")).expect("there is always a processor"), Device::Cpu);
        let error = open(&resources("cuda:64")).expect_err("no machine has so many").to_string();
        assert!(error.contains("`cuda:64`") && error.contains("CUDA"), "{error}");
        assert!(open(&resources("gpu")).expect_err("no such name").to_string().contains("`gpu`"));
    }
}
