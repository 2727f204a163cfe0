//! What a running stage leaves for people to watch: TensorBoard event files, exact metrics, text logs.
//!
//! Everything here is a view. No result rests on it, no function here panics on a full disk, and a failure to write is
//! handed back once so that the stage can tell of it and go on.

pub mod event_file;
pub mod histogram;
pub mod hparams;
pub mod logging;
pub mod metrics;
pub mod recorder;
pub mod step_lines;

pub use event_file::{EventFile, Picture};
pub use histogram::Histogram;
pub use metrics::Metrics;
pub use recorder::{EVENTS_FOLDER, Exhibit, METRICS_FILE, Recorder};
pub use step_lines::StepLines;
