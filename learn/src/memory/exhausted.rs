//! What is said when memory runs out although the forecast fitted: another program has taken it, or the forecast was wrong.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use anyhow::anyhow;

/// What libtorch and the driver say when memory is at its end.
const SAID: [&str; 4] = ["out of memory", "can't allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED"];

thread_local! {
    /// What was forecast last on this thread, and what makes it smaller.
    static FORECAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps what a stage is about to need, and what to lower, in case that memory runs out.
pub fn remember(forecast: String) {
    FORECAST.set(Some(forecast));
}

/// Runs a stage. Where memory runs out within it, be it as an error or as a panic of libtorch's, the error tells what was
/// forecast and which parameters make that smaller. Everything else goes through.
pub fn explaining<R>(run: impl FnOnce() -> anyhow::Result<R>) -> anyhow::Result<R> {
    FORECAST.take();
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(made)) => Ok(made),
        Ok(Err(error)) => Err(match explained(&format!("{error:#}")) {
            Some(explained) => error.context(explained),
            None => error,
        }),
        Err(panic) => match text(panic.as_ref()).and_then(|said| explained(said).zip(Some(said))) {
            Some((explained, said)) => Err(anyhow!("{}", first_line(said)).context(explained)),
            None => resume_unwind(panic),
        },
    }
}

/// What to say of an error with this text; `None` where memory is not at its end.
fn explained(said: &str) -> Option<String> {
    SAID.iter().find(|end| said.contains(**end))?;
    Some(match FORECAST.take() {
        Some(forecast) => format!("memory ran out: {forecast}"),
        None => {
            "memory ran out before a forecast could be made: the model or its training state does not fit".to_owned()
        }
    })
}

/// A panic's words.
fn text(panic: &(dyn Any + Send)) -> Option<&str> {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str))
}

/// The trace of calls that libtorch puts behind an error's first line helps nobody who is short of memory.
fn first_line(said: &str) -> &str {
    let line = |text: &'_ str| text.find("\\n").or_else(|| text.find('\n'));
    line(said).map_or(said, |end| &said[..end])
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    const HINT: &str = "training needs about 3 MiB; lower `micro_batch_size`";

    fn ran_out(run: impl FnOnce() -> anyhow::Result<()>) -> String {
        format!("{:#}", explaining(run).expect_err("memory ran out"))
    }

    #[test]
    fn an_end_of_memory_is_explained_by_the_forecast() {
        let cuda = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB";
        for said in
            [cuda, "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", "std::bad_alloc"]
        {
            let error = ran_out(|| {
                remember(HINT.to_owned());
                Err(anyhow!("{said}").context("at step 3"))
            });
            assert_eq!(error, format!("memory ran out: {HINT}: at step 3: {said}"));
        }
        let early = ran_out(|| Err(anyhow!("{cuda}")));
        assert!(early.starts_with("memory ran out before a forecast"), "a forecast of a stage before: {early}");
        let other = explaining(|| {
            remember(HINT.to_owned());
            Err::<(), _>(anyhow!("a row is wrong"))
        });
        assert_eq!(other.unwrap_err().to_string(), "a row is wrong");
        assert_eq!(explaining(|| Ok(3)).unwrap(), 3);
    }

    #[test]
    fn libtorchs_own_panic_is_explained_and_others_go_on() {
        let error = ran_out(|| {
            remember(HINT.to_owned());
            // More than any machine has.
            drop(Tensor::zeros([1 << 46], (Kind::Double, Device::Cpu)));
            Ok(())
        });
        assert!(error.starts_with(&format!("memory ran out: {HINT}: ")) && !error.contains('\n'), "{error}");
        assert!(error.contains("allocate"), "{error}");
        let panic = std::panic::catch_unwind(|| explaining(|| -> anyhow::Result<()> { panic!("row 7 is wrong") }));
        assert_eq!(text(panic.unwrap_err().as_ref()), Some("row 7 is wrong"));
    }
}
