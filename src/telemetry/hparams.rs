//! What TensorBoard's HParams page reads: a session a trial, with what was swept and what came out.
//!
//! No summary declares the whole experiment: the page then takes its columns from the sessions themselves, so that one folder
//! may hold many experiments. A session's metrics are the scalars of its own run, which is why it has one to itself.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use protobuf::Message as _;
use protobuf::well_known_types::Value as Shown;
use serde_json::Value;
use tensorboard_proto::api::Status;
use tensorboard_proto::plugin_hparams::{HParamsPluginData, SessionEndInfo, SessionStartInfo};

use crate::telemetry::EventFile;
use crate::telemetry::event_file::PREFIX;

/// The run of a session among the runs of its trial's stages.
pub const SESSION_RUN: &str = "hparams";

const PLUGIN: &str = "hparams";
const START_TAG: &str = "_hparams_/session_start_info";
const END_TAG: &str = "_hparams_/session_end_info";

/// One trial.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Session {
    /// What was swept, by its name.
    pub parameters: BTreeMap<String, Value>,
    /// Sessions of one group are shown as one row: seeds of an arm.
    pub group: String,
    /// By tag.
    pub metrics: BTreeMap<String, f64>,
    /// Seconds since 1970 at which its last result was finished.
    pub finished: f64,
    /// Seconds that its stages took.
    pub seconds: f64,
}

impl Session {
    /// Makes the event file of the session the only one in `folder`; leaves it alone where it is there already.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let name = format!("{:012.0}.{}", self.finished, &self.digest()[..16]);
        let mut others = Vec::new();
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let entry = entry?;
            match entry.file_name().to_str().and_then(|file| file.strip_prefix(PREFIX)) {
                Some(known) if known == name => return Ok(()),
                Some(_) => others.push(entry.path()),
                None => {}
            }
        }
        others.iter().try_for_each(std::fs::remove_file)?;
        let mut file = EventFile::create(folder, &name, self.finished)?;
        let mut start = SessionStartInfo::new();
        start.set_hparams(self.parameters.iter().map(|(name, value)| (name.clone(), shown(value))).collect());
        start.set_group_name(self.group.clone());
        start.set_start_time_secs(self.finished - self.seconds);
        let mut data = HParamsPluginData::new();
        data.set_session_start_info(start);
        file.plugin(0, START_TAG, PLUGIN, data.write_to_bytes().map_err(io::Error::other)?)?;
        file.scalars(0, self.metrics.iter().map(|(tag, value)| (tag.as_str(), *value)))?;
        let mut end = SessionEndInfo::new();
        end.set_status(Status::STATUS_SUCCESS);
        end.set_end_time_secs(self.finished);
        let mut data = HParamsPluginData::new();
        data.set_session_end_info(end);
        file.plugin(0, END_TAG, PLUGIN, data.write_to_bytes().map_err(io::Error::other)?)?;
        file.flush()
    }
}

impl Session {
    /// Of all that it says.
    fn digest(&self) -> String {
        blake3::hash(format!("{self:?}").as_bytes()).to_hex().to_string()
    }
}

/// Numbers, truth values and texts as they are; anything else as its JSON.
fn shown(value: &Value) -> Shown {
    let mut shown = Shown::new();
    match value {
        Value::Bool(truth) => shown.set_bool_value(*truth),
        Value::Number(number) => shown.set_number_value(number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => shown.set_string_value(text.clone()),
        other => shown.set_string_value(other.to_string()),
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::event_file::tests::read;
    use serde_json::json;

    #[test]
    fn a_session_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let session = Session {
            parameters: [("rate".to_owned(), json!(1e-3)), ("drop".to_owned(), json!("none"))].into(),
            group: "maze/rate=1e-3".to_owned(),
            metrics: [("evaluate.solved".to_owned(), 0.5)].into(),
            finished: 2000.0,
            seconds: 500.0,
        };
        session.write(folder.path()).unwrap();
        let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let events = read(&file);
        let values: Vec<_> = events.iter().flat_map(|event| event.get_summary().get_value()).collect();
        let data = |place: usize| {
            let plugin = values[place].get_metadata().get_plugin_data();
            assert_eq!(plugin.get_plugin_name(), "hparams");
            HParamsPluginData::parse_from_bytes(plugin.get_content()).unwrap()
        };
        assert_eq!(values[0].get_tag(), START_TAG);
        let start = data(0).take_session_start_info();
        assert_eq!((start.get_group_name(), start.get_start_time_secs()), ("maze/rate=1e-3", 1500.0));
        assert_eq!(start.get_hparams()["rate"].get_number_value().to_bits(), 1e-3f64.to_bits());
        assert_eq!(start.get_hparams()["drop"].get_string_value(), "none");
        assert_eq!((values[1].get_tag(), values[1].get_simple_value()), ("evaluate.solved", 0.5));
        assert_eq!(data(2).get_session_end_info().get_status(), Status::STATUS_SUCCESS);
        assert!(events.iter().all(|event| event.get_wall_time().to_bits() == 2000f64.to_bits()));
        let files = || -> Vec<_> { std::fs::read_dir(folder.path()).unwrap().map(|one| one.unwrap().path()).collect() };
        session.write(folder.path()).unwrap();
        assert_eq!(files(), std::slice::from_ref(&file), "the same session is the same file");
        Session { seconds: 501.0, ..session }.write(folder.path()).unwrap();
        assert_eq!(files().len(), 1, "a session that has changed takes the place of the old one");
        assert_ne!(files(), [file]);
    }
}
