//! What a GPU has beside libtorch's ordinary operations: attention over sequences of unequal lengths, writes to distinct
//! places, and graphs that replay what was launched once.
//!
//! Attention takes half precision on GPUs of compute capability 8.0 (Ampere) or newer. Graphs want a build that found CUDA's
//! headers. Everything is tried before a stage begins (`preflight::kernels`), and [`super::SWITCH`] and [`GRAPHS`] turn it off.

use std::sync::OnceLock;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::{error, off, taken};

#[allow(clippy::allow_attributes, improper_ctypes, reason = "a tensor is an opaque pointer")]
unsafe extern "C" {
    fn pipe_native_varlen(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        begins_q: *const C_tensor,
        begins_k: *const C_tensor,
        longest_q: i64,
        longest_k: i64,
        causal: bool,
        used: *const C_tensor,
    ) -> *mut C_tensor;
    fn pipe_native_place(into: *mut C_tensor, index: *const C_tensor, rows: *const C_tensor) -> bool;
    fn pipe_native_graphs() -> bool;
    fn pipe_native_capability(device: i32) -> i64;
    fn pipe_native_graph_pool(out: *mut u64) -> bool;
    fn pipe_native_side_enter(device: i8) -> *mut RawSide;
    fn pipe_native_side_leave(side: *mut RawSide) -> bool;
    fn pipe_native_graph_begin(pool: *const u64) -> *mut RawGraph;
    fn pipe_native_graph_end(graph: *mut RawGraph) -> bool;
    fn pipe_native_graph_replay(graph: *mut RawGraph) -> bool;
    fn pipe_native_graph_free(graph: *mut RawGraph);
}

/// The environment variable that turns CUDA graphs off with `none`.
pub const GRAPHS: &str = "PIPE_GRAPHS";

/// The oldest GPUs (10 times their compute capability) that libtorch's attention over unequal lengths takes.
const AMPERE: i64 = 80;
/// The widest head that it takes, and what a head's width must be a multiple of.
const WIDEST: i64 = 256;
const STEP: i64 = 8;

/// Sequences side by side, as attention over unequal lengths takes them.
#[derive(Debug)]
pub struct Sequences<'a> {
    /// `[B + 1]` i32: where the queries of each begin, and all end.
    pub begins_q: &'a Tensor,
    /// `[B + 1]` i32: the same of keys.
    pub begins_k: &'a Tensor,
    /// Queries of the longest.
    pub longest_q: i64,
    /// Keys of the longest.
    pub longest_k: i64,
    /// Whether a query sees no key behind it, the last query of a sequence standing at its last key.
    pub causal: bool,
    /// `[B]` i32: how many keys of each count, from the first; `None` is all.
    pub used: Option<&'a Tensor>,
}

/// Whether a GPU's way of generating and of drawing tokens is taken on `device`.
pub fn takes(device: Device) -> bool {
    #[cfg(test)]
    if let Some(as_on_gpu) = super::AS_ON_GPU.get() {
        return as_on_gpu != super::AsOnGpu::No;
    }
    matches!(device, Device::Cuda(_)) && !matches!(off(super::SWITCH), Ok(true))
}

/// Whether [`attention`] takes heads of `kind` and `width` elements on `device`.
pub fn attends(device: Device, kind: Kind, width: i64) -> bool {
    #[cfg(test)]
    if let Some(as_on_gpu) = super::AS_ON_GPU.get() {
        return as_on_gpu == super::AsOnGpu::WithAttention;
    }
    let fits = matches!(kind, Kind::Half | Kind::BFloat16) && width % STEP == 0 && width <= WIDEST;
    fits && takes(device) && capability(device).is_some_and(|capability| capability >= AMPERE)
}

/// Ten times the compute capability of the GPU `device`; `None` where nothing tells.
pub fn capability(device: Device) -> Option<i64> {
    // Asked in every layer of every pass. A worker sees one GPU.
    static FIRST: OnceLock<i64> = OnceLock::new();
    let Device::Cuda(index) = device else { return None };
    // SAFETY: it reads properties of a device and takes no pointer.
    let of = |index: usize| unsafe { pipe_native_capability(i32::try_from(index).unwrap_or(-1)) };
    Some(if index == 0 { *FIRST.get_or_init(|| of(0)) } else { of(index) }).filter(|&capability| capability > 0)
}

/// Whether CUDA graphs are used on `device`; an error where [`GRAPHS`] says neither `auto` nor `none`.
pub fn graphs(device: Device) -> Result<bool> {
    // SAFETY: it reads a constant.
    let built = unsafe { pipe_native_graphs() };
    Ok(!off(GRAPHS)? && built && matches!(device, Device::Cuda(_)) && takes(device) && tch::Cuda::is_available())
}

/// With what `device` computes beside libtorch's ordinary operations: `flash` (attention in half precision), `graphs`, both
/// as `flash+graphs`, or `none`.
pub(super) fn set(device: Device) -> Result<&'static str> {
    Ok(match (attends(device, Kind::BFloat16, STEP), graphs(device)?) {
        (true, true) => "flash+graphs",
        (true, false) => "flash",
        (false, true) => "graphs",
        (false, false) => "none",
    })
}

/// Attention of `query` `[Tq, heads, D]` over `key` and `value` `[Tk, kv heads, D]`, scaled by `1 / sqrt(D)`, sequence by
/// sequence; gives `[Tq, heads, D]`. Differentiable where all keys count. See [`attends`] for what it takes.
pub fn attention(query: &Tensor, key: &Tensor, value: &Tensor, sequences: &Sequences<'_>) -> Tensor {
    let Sequences { begins_q, begins_k, longest_q, longest_k, causal, used } = *sequences;
    #[cfg(test)]
    if query.device() == Device::Cpu {
        return super::reference::attention(query, key, value, sequences);
    }
    let used = used.map_or(std::ptr::null(), Tensor::as_ptr);
    // SAFETY: all are tensors, and libtorch checks their shapes and types. Where sequences begin lies within the keys: they
    // are made by `Layout` and by the cache, beside the tensors themselves.
    taken(unsafe {
        pipe_native_varlen(
            query.as_ptr(),
            key.as_ptr(),
            value.as_ptr(),
            begins_q.as_ptr(),
            begins_k.as_ptr(),
            longest_q,
            longest_k,
            causal,
            used,
        )
    })
}

/// Writes `rows` `[M, ..]` over the rows `index` `[M]` i64 of `into` `[N, ..]`, no two of which are the same. On a GPU it is
/// one launch in every mode.
pub fn place(into: &Tensor, index: &Tensor, rows: &Tensor) {
    let mut into = into.shallow_clone();
    // SAFETY: all are tensors, and libtorch checks shapes, types and, on a processor, indices.
    let done = unsafe { pipe_native_place(into.as_mut_ptr(), index.as_ptr(), rows.as_ptr()) };
    assert!(done, "{}", error());
}

enum RawSide {}
enum RawGraph {}

/// Memory that graphs share which are replayed one at a time.
#[derive(Clone, Copy, Debug)]
pub struct Pool([u64; 2]);

impl Pool {
    /// A new one.
    pub fn new() -> Result<Self> {
        let mut name = [0; 2];
        // SAFETY: there is room for both numbers.
        ensure!(unsafe { pipe_native_graph_pool(name.as_mut_ptr()) }, "no memory for CUDA graphs: {}", error());
        Ok(Self(name))
    }
}

/// While it lives, what this thread asks of a GPU is done beside its usual stream, behind what was asked before.
struct Side(*mut RawSide);

impl Side {
    fn enter(device: Device) -> Result<Self> {
        let Device::Cuda(index) = device else { anyhow::bail!("CUDA graphs are for GPUs") };
        // SAFETY: it takes no pointer.
        let side = unsafe { pipe_native_side_enter(i8::try_from(index)?) };
        ensure!(!side.is_null(), "no stream for CUDA graphs: {}", error());
        Ok(Self(side))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // SAFETY: the pointer is that of `enter` and is given back once. A failure shows in what is asked next.
        unsafe { pipe_native_side_leave(self.0) };
    }
}

/// Runs `run` once on the stream on which graphs are recorded: libraries make what they need at the first call, which
/// must not be recorded.
pub fn warm<R>(device: Device, run: impl FnOnce() -> R) -> Result<R> {
    let _side = Side::enter(device)?;
    Ok(run())
}

/// What a GPU was given to do, to be done again.
#[derive(Debug)]
pub struct Graph(*mut RawGraph);

impl Graph {
    /// Records what `run` asks of `device` without doing it, and gives it with what `run` gave. Tensors that `run` reads and
    /// gives must stay where they are: [`Graph::replay`] reads and writes the same memory. `run` must not wait for the device.
    pub fn record<R>(device: Device, pool: Pool, run: impl FnOnce() -> R) -> Result<(Self, R)> {
        let _side = Side::enter(device)?;
        // SAFETY: the pool has two numbers.
        let graph = unsafe { pipe_native_graph_begin(pool.0.as_ptr()) };
        ensure!(!graph.is_null(), "a CUDA graph cannot be begun: {}", error());
        let recorded = Self(graph);
        let mut ends = Ends { graph, ended: false };
        let made = run();
        ends.ended = true;
        // SAFETY: the graph was begun on this stream.
        ensure!(unsafe { pipe_native_graph_end(graph) }, "a CUDA graph cannot be recorded: {}", error());
        Ok((recorded, made))
    }

    /// Does what was recorded.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the graph lives as long as `self`.
        ensure!(unsafe { pipe_native_graph_replay(self.0) }, "a CUDA graph cannot be replayed: {}", error());
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the pointer is that of `record` and is given back once.
        unsafe { pipe_native_graph_free(self.0) };
    }
}

/// Ends a recording that a panic breaks off, so that the stream is usable again.
struct Ends {
    graph: *mut RawGraph,
    ended: bool,
}

impl Drop for Ends {
    fn drop(&mut self) {
        if !self.ended {
            // SAFETY: the graph was begun and not ended.
            unsafe { pipe_native_graph_end(self.graph) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_nothing_is_available_and_says_why() {
        assert!(!takes(Device::Cpu) && !attends(Device::Cpu, Kind::BFloat16, 64));
        assert!(!graphs(Device::Cpu).unwrap());
        assert!(Graph::record(Device::Cpu, Pool([0, 0]), || ()).unwrap_err().to_string().contains("for GPUs"));
        if tch::Cuda::is_available() {
            return;
        }
        assert_eq!((capability(Device::Cuda(0)), set(Device::Cuda(0)).unwrap()), (None, "none"));
        assert!(!graphs(Device::Cuda(0)).unwrap());
        let error = warm(Device::Cuda(0), || ()).unwrap_err().to_string();
        assert!(error.starts_with("no stream for CUDA graphs: ") && error.len() > 40, "{error}");
    }

    #[test]
    fn the_switch_for_graphs_takes_two_words() {
        let name = "native::gpu::tests::the_switch_for_graphs_takes_two_words";
        match std::env::var(GRAPHS).as_deref() {
            Ok("none") => assert!(!graphs(Device::Cuda(0)).unwrap()),
            Ok("some") => {
                let error = graphs(Device::Cuda(0)).unwrap_err().to_string();
                assert_eq!(error, "`PIPE_GRAPHS` is `some`: expected `auto` or `none`");
            }
            // The environment is the process's, so each value has one of its own.
            _ => {
                for value in ["none", "some"] {
                    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
                    let child = child.args(["--exact", name, "--nocapture"]).env(GRAPHS, value).output().unwrap();
                    assert!(child.status.success(), "{value}: {}", String::from_utf8_lossy(&child.stderr));
                    assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"), "the child ran the case");
                }
            }
        }
    }

    #[test]
    fn rows_are_placed() {
        let into = Tensor::zeros([4, 2], (Kind::Float, Device::Cpu));
        place(&into.narrow(0, 1, 3), &Tensor::from_slice(&[2i64, 0]), &Tensor::from_slice2(&[[1f32, 2.0], [3.0, 4.0]]));
        assert_eq!(into, Tensor::from_slice2(&[[0f32, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]));
    }

    /// Two sequences by hand: more keys than queries, heads that share keys, and keys that do not count.
    #[test]
    fn the_reference_sees_what_the_operator_says_it_sees() {
        let kind = (Kind::Double, Device::Cpu);
        let query = Tensor::zeros([3, 2, 1], kind);
        // All scores are 0, so each output is the mean of the values it sees.
        let value = Tensor::from_slice(&[1f64, 2.0, 4.0, 8.0, 16.0]).view([5, 1, 1]);
        let (begins_q, begins_k) = (Tensor::from_slice(&[0i32, 2, 3]), Tensor::from_slice(&[0i32, 3, 5]));
        let see = |causal: bool, used: Option<&Tensor>| {
            let sequences =
                Sequences { begins_q: &begins_q, begins_k: &begins_k, longest_q: 2, longest_k: 3, causal, used };
            let seen = attention(&query, &value.zeros_like(), &value, &sequences);
            assert_eq!(seen.size(), [3, 2, 1]);
            assert_eq!(seen.select(1, 0), seen.select(1, 1), "both heads read the one of the keys");
            Vec::<f64>::try_from(seen.select(1, 0).view(-1)).unwrap()
        };
        let near = |seen: Vec<f64>, expected: [f64; 3]| {
            let far = seen.iter().zip(expected).any(|(one, other)| (one - other).abs() > 1e-12);
            assert!(!far, "{seen:?} and not {expected:?}");
        };
        // The last query stands at the last key.
        near(see(true, None), [1.5, 7.0 / 3.0, 12.0]);
        near(see(false, None), [7.0 / 3.0, 7.0 / 3.0, 12.0]);
        let used = Tensor::from_slice(&[2i32, 1]);
        near(see(false, Some(&used)), [1.5, 1.5, 8.0]);
    }
}
