//! The resolved configuration as TOML text: what a trial or a stage really is, every default written out.

use serde_json::{Map, Value as Json};

use crate::pipeline::spec::{StageSpec, Trial};

/// Every stage of a trial as one TOML document.
pub fn resolved(trial: &Trial) -> String {
    text(&resolved_value(trial))
}

/// Every stage of a trial as one plain value, as [`resolved`] writes it.
pub fn resolved_value(trial: &Trial) -> Json {
    let stages = trial.stages.iter().map(|(name, spec)| (name.clone(), stage_value(spec)));
    Json::Object(Map::from_iter([("stages".to_owned(), Json::Object(stages.collect()))]))
}

/// One stage as a TOML document, `[stages.NAME]` and below.
pub fn resolved_stage(spec: &StageSpec) -> String {
    let stages = Json::Object(Map::from_iter([(spec.name.clone(), stage_value(spec))]));
    text(&Json::Object(Map::from_iter([("stages".to_owned(), stages)])))
}

fn stage_value(spec: &StageSpec) -> Json {
    let mut fields = Map::from_iter([("kind".to_owned(), Json::from(spec.kind.name))]);
    if let Some(Json::Object(params)) = as_written(spec.stage.params()) {
        fields.extend(params);
    }
    let run = serde_json::to_value(&spec.run).expect("run options are plain data");
    fields.insert("run".to_owned(), run);
    Json::Object(fields)
}

/// Edges as references and files as paths again, without what is null, which TOML cannot say.
fn as_written(value: Json) -> Option<Json> {
    match value {
        Json::Null => None,
        Json::Array(items) => Some(Json::Array(items.into_iter().filter_map(as_written).collect())),
        Json::Object(mut fields) => {
            // A file that is placed stands in the text as the place that it gets.
            let path = fields.remove("$file");
            let placed = path.is_some().then(|| fields.remove("as")).flatten();
            if let Some(written) = placed.or(path).or_else(|| fields.remove("$input")) {
                return Some(written);
            }
            Some(Json::Object(fields.into_iter().filter_map(|(key, value)| Some((key, as_written(value)?))).collect()))
        }
        scalar => Some(scalar),
    }
}

fn text(value: &Json) -> String {
    // Integers between 2^63 and 2^64 exist in no parameter that was read from TOML.
    toml::to_string(value).expect("resolved parameters are plain data that TOML can say")
}
