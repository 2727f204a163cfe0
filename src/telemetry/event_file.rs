//! TensorBoard event files on `tensorboard-rs`'s record writer and protos.
//!
//! Its `SummaryWriter` is not used: it panics on a full disk, loses events on exit, and two of one second destroy each
//! other's file. Every opening makes a new file whose number sorts after its predecessors', as TensorBoard reads a folder
//! in the order of names; nothing is ever appended to an old file, whose tail may be cut off.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use protobuf::{Message as _, RepeatedField};
use tensorboard_proto::event::{Event, SessionLog, SessionLog_SessionStatus};
use tensorboard_proto::summary::{
    HistogramProto, Summary, Summary_Image, Summary_Value, SummaryMetadata, SummaryMetadata_PluginData,
};
use tensorboard_proto::tensor::TensorProto;
use tensorboard_proto::tensor_shape::TensorShapeProto;
use tensorboard_proto::types::DataType;
use tensorboard_rs::record_writer::RecordWriter;

use crate::telemetry::Histogram;

/// The part of a file's name by which TensorBoard knows it.
pub(super) const PREFIX: &str = "events.out.tfevents.";

/// One event file, open for writing.
pub struct EventFile {
    records: RecordWriter<BufWriter<File>>,
    path: PathBuf,
    /// Seconds since 1970 that events carry instead of the time at which they are written.
    clock: Option<f64>,
}

/// A picture as a PNG.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// The file.
    pub png: Vec<u8>,
}

impl EventFile {
    /// A new file in `folder` (made when missing), whose first step is `first_step`.
    ///
    /// It opens with a `session_log START` event, at which TensorBoard drops every point at or after `first_step` of the
    /// files before it: what an attempt wrote after its last saved state.
    pub fn open(folder: &Path, first_step: u64) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut number = 1 + last_number(folder)?;
        let (file, path) = loop {
            let path = folder.join(format!("{PREFIX}{number:06}.pipe"));
            match File::create_new(&path) {
                Ok(file) => break (file, path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error),
            }
        };
        Self::begin(file, path, first_step, None)
    }

    /// A new file of the given `name` for what was done at `clock` (seconds since 1970): the same events give the same file.
    pub fn create(folder: &Path, name: &str, clock: f64) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(format!("{PREFIX}{name}"));
        Self::begin(File::create_new(&path)?, path, 0, Some(clock))
    }

    fn begin(file: File, path: PathBuf, first_step: u64, clock: Option<f64>) -> io::Result<Self> {
        let mut events = Self { records: RecordWriter::new(BufWriter::new(file)), path, clock };
        let mut version = Event::new();
        version.set_file_version("brain.Event:2".to_owned());
        events.write(version, 0)?;
        let mut session = SessionLog::new();
        session.set_status(SessionLog_SessionStatus::START);
        let mut start = Event::new();
        start.set_session_log(session);
        events.write(start, first_step)?;
        events.flush()?;
        Ok(events)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Numbers by tag at one step. TensorBoard holds them as f32; the exact ones stand in `metrics.jsonl`.
    pub fn scalars<'a>(&mut self, step: u64, values: impl IntoIterator<Item = (&'a str, f64)>) -> io::Result<()> {
        let values = values.into_iter().map(|(tag, number)| {
            let mut value = Summary_Value::new();
            value.set_tag(tag.to_owned());
            value.set_simple_value(number as f32);
            value
        });
        self.summary(step, values.collect())
    }

    /// How values lie at one step.
    pub fn histogram(&mut self, step: u64, tag: &str, histogram: &Histogram) -> io::Result<()> {
        let mut counts = HistogramProto::new();
        counts.set_min(histogram.min);
        counts.set_max(histogram.max);
        counts.set_num(histogram.counts.iter().sum());
        counts.set_sum(histogram.sum);
        counts.set_sum_squares(histogram.squares);
        // A bucket begins where the one before it ends, the first at the least value.
        counts.set_bucket_limit(histogram.limits.clone());
        counts.set_bucket(histogram.counts.clone());
        let mut value = Summary_Value::new();
        value.set_tag(tag.to_owned());
        value.set_histo(counts);
        self.summary(step, vec![value])
    }

    /// A picture by tag at one step.
    pub fn image(&mut self, step: u64, tag: &str, picture: &Picture) -> io::Result<()> {
        let mut image = Summary_Image::new();
        image.set_width(picture.width as i32);
        image.set_height(picture.height as i32);
        image.set_colorspace(3);
        image.set_encoded_image_string(picture.png.clone());
        let mut value = Summary_Value::new();
        value.set_tag(tag.to_owned());
        value.set_image(image);
        self.summary(step, vec![value])
    }

    /// What a plugin reads that keeps its data in the metadata of a tag.
    pub fn plugin(&mut self, step: u64, tag: &str, plugin: &str, content: Vec<u8>) -> io::Result<()> {
        let mut metadata = metadata(plugin);
        metadata.mut_plugin_data().set_content(content);
        let mut value = Summary_Value::new();
        value.set_tag(tag.to_owned());
        value.set_metadata(metadata);
        self.summary(step, vec![value])
    }

    /// A text by tag at one step, shown as Markdown.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> io::Result<()> {
        let metadata = metadata("text");
        let mut tensor = TensorProto::new();
        tensor.set_dtype(DataType::DT_STRING);
        tensor.set_tensor_shape(TensorShapeProto::new());
        tensor.set_string_val(RepeatedField::from_vec(vec![text.as_bytes().to_vec()]));
        let mut value = Summary_Value::new();
        value.set_tag(format!("{tag}/text_summary"));
        value.set_metadata(metadata);
        value.set_tensor(tensor);
        self.summary(step, vec![value])
    }

    /// Hands what is buffered to the system.
    pub fn flush(&mut self) -> io::Result<()> {
        self.records.flush()
    }

    fn summary(&mut self, step: u64, values: Vec<Summary_Value>) -> io::Result<()> {
        let mut summary = Summary::new();
        summary.set_value(RepeatedField::from_vec(values));
        let mut event = Event::new();
        event.set_summary(summary);
        self.write(event, step)
    }

    fn write(&mut self, mut event: Event, step: u64) -> io::Result<()> {
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        event.set_wall_time(self.clock.unwrap_or_else(now));
        event.set_step(step as i64);
        let bytes = event.write_to_bytes().map_err(io::Error::other)?;
        self.records.write(&bytes)
    }
}

/// The metadata of a tag that belongs to `plugin`.
fn metadata(plugin: &str) -> SummaryMetadata {
    let mut named = SummaryMetadata_PluginData::new();
    named.set_plugin_name(plugin.to_owned());
    let mut metadata = SummaryMetadata::new();
    metadata.set_plugin_data(named);
    metadata
}

/// The highest number among the event files of a folder; 0 where there is none.
fn last_number(folder: &Path) -> io::Result<u64> {
    let mut last = 0;
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|rest| rest.split('.').next());
        last = last.max(number.and_then(|number| number.parse().ok()).unwrap_or(0));
    }
    Ok(last)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use tensorboard_rs::masked_crc32c::masked_crc32c;

    /// Every event of a file, each record's two checksums compared.
    pub(in crate::telemetry) fn read(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(masked_crc32c(&rest[..8]), u32::from_le_bytes(rest[8..12].try_into().unwrap()));
            let data = &rest[12..12 + length];
            let crc = u32::from_le_bytes(rest[12 + length..16 + length].try_into().unwrap());
            assert_eq!(masked_crc32c(data), crc);
            events.push(Event::parse_from_bytes(data).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn scalars_and_texts_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(folder.path(), 0).unwrap();
        file.text(0, "config", "seed = 1").unwrap();
        file.scalars(3, [("loss", 0.5), ("reward/correct/mean", 0.25)]).unwrap();
        file.flush().unwrap();
        let events = read(file.path());
        assert_eq!(events[0].get_file_version(), "brain.Event:2");
        assert_eq!(events[1].get_session_log().get_status(), SessionLog_SessionStatus::START);
        let text = &events[2].get_summary().get_value()[0];
        assert_eq!(text.get_tag(), "config/text_summary");
        assert_eq!(text.get_metadata().get_plugin_data().get_plugin_name(), "text");
        assert_eq!(text.get_tensor().get_string_val(), [b"seed = 1"]);
        let values: Vec<_> = events[3].get_summary().get_value().iter().collect();
        assert_eq!(events[3].get_step(), 3);
        assert_eq!((values[0].get_tag(), values[0].get_simple_value()), ("loss", 0.5));
        assert_eq!((values[1].get_tag(), values[1].get_simple_value()), ("reward/correct/mean", 0.25));
    }

    #[test]
    fn histograms_and_pictures_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(folder.path(), 0).unwrap();
        file.histogram(2, "completions/length", &Histogram::of(&[3.0, 5.0, 3.0]).unwrap()).unwrap();
        let picture = Picture { width: 4, height: 2, png: vec![1, 2, 3] };
        file.image(2, "validation/walks", &picture).unwrap();
        file.flush().unwrap();
        let events = read(file.path());
        let counts = events[2].get_summary().get_value()[0].get_histo();
        assert_eq!((counts.get_bucket_limit(), counts.get_bucket()), (&[3.5, 4.5, 5.5][..], &[2.0, 0.0, 1.0][..]));
        assert_eq!((counts.get_num(), counts.get_sum(), counts.get_min()), (3.0, 11.0, 3.0));
        let image = events[3].get_summary().get_value()[0].get_image();
        assert_eq!((image.get_width(), image.get_height(), image.get_encoded_image_string()), (4, 2, &[1u8, 2, 3][..]));
    }

    #[test]
    fn two_openings_never_share_a_file_and_sort_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<_> =
            (0..12).map(|step| EventFile::open(folder.path(), step).unwrap().path().to_owned()).collect();
        let mut sorted = paths.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(paths, sorted);
        assert_eq!(read(&paths[11])[1].get_step(), 11);
    }

    #[test]
    fn a_full_disk_is_an_error_and_no_panic() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut file =
            EventFile { records: RecordWriter::new(BufWriter::new(full)), path: "/dev/full".into(), clock: None };
        file.scalars(1, [("loss", 1.0)]).unwrap();
        assert_eq!(file.flush().unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
