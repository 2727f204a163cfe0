//! libtorch's switches that decide bits, and its memory on a GPU.

use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};
use tch::Device;

use crate::native;

unsafe extern "C" {
    fn pipe_native_exact(strict: bool) -> bool;
    #[cfg(test)]
    fn pipe_native_exactness(out: *mut Exactness) -> bool;
    fn pipe_native_device_free(device: i8, out: *mut u64) -> bool;
    fn pipe_native_device_peak(device: i8, out: *mut u64) -> bool;
    fn pipe_native_device_reset(device: i8) -> bool;
}

/// How libtorch's switches stand.
#[cfg(test)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Exactness {
    /// Operations take their deterministic form where they have one.
    deterministic: bool,
    /// Operations without one are an error.
    strict: bool,
    /// Deterministic operations fill new memory.
    fills: bool,
    /// Products of fp32 matrices may round their factors to TF32.
    tf32_products: bool,
    /// The same of convolutions.
    tf32_convolutions: bool,
}

/// Has fp32 be fp32 (no TF32), and operations take their deterministic form where they have one, in all of this process.
///
/// On CUDA that decides, of what a training computes: products (with `CUBLAS_WORKSPACE_CONFIG`, which the driver sets); the
/// backward pass of `index_select` and of an embedding, where an index that stands several times is summed in the order of
/// its places (`index_add` becomes an `index_put` that sorts) instead of by atomic additions in whatever order they arrive;
/// `index_copy`. Nothing of it changes what a processor computes, or how fast.
///
/// What has no deterministic form is a warning in the log and no error. See [`strictly`] for what that leaves out.
pub fn exact() -> Result<()> {
    apply(|_| ())
}

/// Those who run [`strictly`] now: the switches are the process's.
static STRICT: Mutex<usize> = Mutex::new(0);

fn apply(change: impl FnOnce(&mut usize)) -> Result<()> {
    let mut strict = STRICT.lock().unwrap_or_else(PoisonError::into_inner);
    change(&mut strict);
    // SAFETY: it sets variables of libtorch's.
    ensure!(unsafe { pipe_native_exact(*strict > 0) }, "setting libtorch's switches: {}", native::error());
    Ok(())
}

/// Runs `run` so that an operation without a deterministic form is an error.
///
/// The backward pass of libtorch's attention on CUDA needs it: its kernels split the keys of a query over blocks that add
/// up in whatever order they end, unless the mode is strict; a warning is all that they give otherwise.
pub fn strictly<R>(run: impl FnOnce() -> R) -> Result<R> {
    /// Ends the strict mode, after a panic, too.
    struct Ends;
    impl Drop for Ends {
        fn drop(&mut self) {
            let _ = apply(|strict| *strict -= 1);
        }
    }
    let _ends = Ends;
    apply(|strict| *strict += 1)?;
    Ok(run())
}

/// The index of a GPU; `None` of a processor.
fn gpu(device: Device) -> Option<i8> {
    let Device::Cuda(index) = device else { return None };
    i8::try_from(index).ok()
}

/// Bytes of the GPU `device` that no process holds; `None` where nothing tells.
pub fn free(device: Device) -> Option<u64> {
    let (device, mut bytes) = (gpu(device)?, 0);
    // SAFETY: there is room for the number.
    unsafe { pipe_native_device_free(device, &raw mut bytes) }.then_some(bytes)
}

/// The most bytes that tensors of this process have held on the GPU `device`, since [`reset`] where that was called; `None`
/// where nothing tells.
pub fn peak(device: Device) -> Option<u64> {
    let (device, mut bytes) = (gpu(device)?, 0);
    // SAFETY: there is room for the number.
    unsafe { pipe_native_device_peak(device, &raw mut bytes) }.then_some(bytes)
}

/// Gives memory of the GPU `device` that no tensor needs back, and forgets its [`peak`]. It does nothing on a processor.
pub fn reset(device: Device) {
    if let Some(device) = gpu(device) {
        // SAFETY: it touches no tensor. A refusal leaves a number too high and nothing else.
        unsafe { pipe_native_device_reset(device) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exactness() -> Exactness {
        let mut out = Exactness::default();
        // SAFETY: there is room for the switches.
        assert!(unsafe { pipe_native_exactness(&raw mut out) }, "{}", native::error());
        out
    }

    #[test]
    fn switches_are_set_and_strict_only_as_long_as_asked() {
        // Only this test makes them strict: a processor's backward pass does not.
        let usual = Exactness { deterministic: true, ..Exactness::default() };
        exact().unwrap();
        assert_eq!(exactness(), usual);
        let strict = Exactness { strict: true, ..usual };
        let still = || {
            strictly(|| ()).unwrap();
            exact().unwrap();
            exactness()
        };
        assert_eq!(strictly(still).unwrap(), strict, "another's beginning or end changes nothing");
        assert_eq!(exactness(), usual);
        let panicked = std::panic::catch_unwind(|| strictly(|| panic!("within")));
        assert!(panicked.is_err() && exactness() == usual);
    }

    #[test]
    fn where_no_gpu_is_nothing_is_told() {
        assert_eq!((free(Device::Cpu), peak(Device::Cpu)), (None, None));
        reset(Device::Cpu);
        if !tch::Cuda::is_available() {
            assert_eq!((free(Device::Cuda(0)), peak(Device::Cuda(0))), (None, None));
            assert!(!native::error().is_empty(), "libtorch says why");
            reset(Device::Cuda(0));
        }
    }
}
