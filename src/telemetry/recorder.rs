//! One writer for both views of a run's metrics: exact numbers in `metrics.jsonl`, curves in TensorBoard event files.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::telemetry::{EventFile, Histogram, Picture, StepLines};

/// The exact metrics: `{"step": .., "name": value, ..}` a line, f64, null where a value is not finite.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// The folder of event files among a run's logs, to which TensorBoard's view has a link.
pub const EVENTS_FOLDER: &str = "tensorboard";

/// What a step shows beside its numbers; in TensorBoard alone.
#[derive(Clone, Debug, PartialEq)]
pub enum Exhibit {
    /// How values lie.
    Distribution(Vec<f64>),
    /// Markdown.
    Text(String),
    /// A picture.
    Picture(Picture),
}

/// Metrics of one stage's run, over all its attempts.
///
/// Every failure to write is handed back by the call that met it; only the first says why, the others are `Ok`, so that a
/// loop can tell of it once and go on. Writing is tried again each time: a disk that has room again is used again.
#[derive(Default)]
pub struct Recorder {
    folder: PathBuf,
    lines: Option<StepLines>,
    events: Option<EventFile>,
    last_step: Option<u64>,
    failed: bool,
}

impl Recorder {
    /// Opens both views in `logs`, keeping what was recorded up to `resumed_step` (`None`: the run begins anew).
    ///
    /// `config_text` (Markdown), where there is any, is shown beside the curves of a run that begins. The second value is what went wrong, if
    /// anything did; the recorder is usable either way.
    pub fn open(logs: &Path, resumed_step: Option<u64>, config_text: &str) -> (Self, io::Result<()>) {
        let mut recorder = Self { folder: logs.to_owned(), last_step: resumed_step, ..Self::default() };
        let opened = recorder.reopen().and_then(|()| match (&mut recorder.events, resumed_step) {
            (Some(events), None) if !config_text.is_empty() => {
                events.text(0, "config", config_text).and_then(|()| events.flush())
            }
            _ => Ok(()),
        });
        let opened = recorder.once(opened);
        (recorder, opened)
    }

    /// Records the metrics of `step`, which counts finished steps and grows from call to call.
    pub fn record(&mut self, step: u64, values: &BTreeMap<String, f64>) -> io::Result<()> {
        let written = self.reopen().and_then(|()| self.write(step, values));
        self.last_step = Some(step);
        self.once(written)
    }

    /// Shows what a step has to show beside its numbers, by tag. To be called before the step is recorded, so that what an
    /// attempt showed after its last saved state is dropped with its numbers.
    pub fn show(&mut self, step: u64, exhibits: &[(String, Exhibit)]) -> io::Result<()> {
        let shown = self.reopen().and_then(|()| {
            let Some(events) = &mut self.events else { return Ok(()) };
            let shown = exhibits.iter().try_for_each(|(tag, exhibit)| match exhibit {
                Exhibit::Distribution(values) => {
                    Histogram::of(values).map_or(Ok(()), |histogram| events.histogram(step, tag, &histogram))
                }
                Exhibit::Text(text) => events.text(step, tag, text),
                Exhibit::Picture(picture) => events.image(step, tag, picture),
            });
            let shown = shown.and_then(|()| events.flush());
            if shown.is_err() {
                self.events = None;
            }
            shown
        });
        self.once(shown)
    }

    /// Hands what is buffered to the system; [`Recorder::record`] has done so already.
    pub fn flush(&mut self) -> io::Result<()> {
        let flushed = self.events.as_mut().map_or(Ok(()), EventFile::flush);
        self.once(flushed)
    }

    fn reopen(&mut self) -> io::Result<()> {
        if self.lines.is_none() {
            self.lines = Some(StepLines::open(&self.folder.join(METRICS_FILE), self.last_step)?);
        }
        if self.events.is_none() {
            let folder = self.folder.join(EVENTS_FOLDER);
            self.events = Some(EventFile::open(&folder, self.last_step.map_or(0, |step| step + 1))?);
        }
        Ok(())
    }

    fn write(&mut self, step: u64, values: &BTreeMap<String, f64>) -> io::Result<()> {
        let (Some(lines), Some(events)) = (&mut self.lines, &mut self.events) else { return Ok(()) };
        let mut line = Map::from_iter([("step".to_owned(), Value::from(step))]);
        // A value that is not finite becomes null: JSON has no word for it.
        line.extend(values.iter().map(|(name, value)| (name.clone(), Value::from(*value))));
        let written = lines.append(&Value::Object(line));
        let scalars = values.iter().map(|(name, value)| (name.as_str(), *value));
        let shown = events.scalars(step, scalars).and_then(|()| events.flush());
        if shown.is_err() {
            // Its tail may be torn, and TensorBoard reads nothing after that: the next record begins a new file.
            self.events = None;
        }
        written.and(shown)
    }

    fn once(&mut self, result: io::Result<()>) -> io::Result<()> {
        if result.is_err() && std::mem::replace(&mut self.failed, true) {
            return Ok(());
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::event_file::tests::read;

    fn values(loss: f64) -> BTreeMap<String, f64> {
        BTreeMap::from([("loss".to_owned(), loss)])
    }

    /// What TensorBoard shows of a folder: later files override from their START step on.
    fn curve(folder: &Path) -> Vec<(i64, f32)> {
        let mut files: Vec<_> =
            std::fs::read_dir(folder.join(EVENTS_FOLDER)).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.to_str().unwrap().contains(".tfevents."));
        files.sort();
        let mut points: Vec<(i64, f32)> = Vec::new();
        for event in files.iter().flat_map(|file| read(file)) {
            if event.has_session_log() {
                points.retain(|(step, _)| *step < event.get_step());
            }
            for value in event.get_summary().get_value().iter().filter(|value| value.get_tag() == "loss") {
                points.push((event.get_step(), value.get_simple_value()));
            }
        }
        points
    }

    #[test]
    fn a_resumed_run_shows_one_curve_in_both_views() {
        let folder = tempfile::tempdir().unwrap();
        let (mut recorder, opened) = Recorder::open(folder.path(), None, "seed = 1");
        opened.unwrap();
        for step in 1..=8 {
            recorder.record(step, &values(step as f64)).unwrap();
        }
        drop(recorder);
        let (mut recorder, opened) = Recorder::open(folder.path(), Some(5), "seed = 1");
        opened.unwrap();
        for step in 6..=9 {
            recorder.record(step, &values(step as f64 + 0.1)).unwrap();
        }
        recorder.flush().unwrap();
        let steps: Vec<i64> = curve(folder.path()).iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, (1..=9).collect::<Vec<_>>());
        let text = std::fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 9);
        assert_eq!((&lines[4]["loss"], &lines[8]["loss"]), (&Value::from(5.0), &Value::from(9.1)));
    }

    #[test]
    fn what_is_shown_beside_numbers_resumes_with_them() {
        let folder = tempfile::tempdir().unwrap();
        let shown = |recorder: &mut Recorder, steps: std::ops::RangeInclusive<u64>| {
            for step in steps {
                let exhibits = [
                    ("completions/length".to_owned(), Exhibit::Distribution(vec![step as f64, 9.0])),
                    ("validation/completions".to_owned(), Exhibit::Text(format!("at {step}"))),
                ];
                recorder.show(step, &exhibits).unwrap();
                recorder.record(step, &values(step as f64)).unwrap();
            }
        };
        shown(&mut Recorder::open(folder.path(), None, "").0, 1..=5);
        shown(&mut Recorder::open(folder.path(), Some(3), "").0, 4..=6);
        let events = folder.path().join(EVENTS_FOLDER);
        let mut files: Vec<_> = std::fs::read_dir(events).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.to_str().unwrap().contains(".tfevents."));
        files.sort();
        let mut steps: Vec<i64> = Vec::new();
        for event in files.iter().flat_map(|file| read(file)) {
            if event.has_session_log() {
                steps.retain(|step| *step < event.get_step());
            }
            steps.extend(
                event.get_summary().get_value().iter().filter(|value| value.has_histo()).map(|_| event.get_step()),
            );
        }
        assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn numbers_are_exact_and_what_is_not_finite_is_null() {
        let folder = tempfile::tempdir().unwrap();
        let (mut recorder, _) = Recorder::open(folder.path(), None, "");
        let exact = 0.1 + 0.2;
        recorder.record(1, &values(exact)).unwrap();
        recorder.record(2, &values(f64::NAN)).unwrap();
        let text = std::fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0]["loss"].as_f64().unwrap().to_bits(), exact.to_bits());
        assert!(lines[1]["loss"].is_null());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_told_of_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a file");
        std::fs::write(&file, "").unwrap();
        let (mut recorder, opened) = Recorder::open(&file.join("logs"), None, "");
        assert!(opened.is_err());
        recorder.record(1, &values(1.0)).unwrap();
        std::fs::remove_file(&file).unwrap();
        recorder.record(2, &values(2.0)).unwrap();
        assert_eq!(curve(&file.join("logs")), [(2, 2.0)]);
    }
}
