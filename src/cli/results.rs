//! What a stored result says of itself: its headline numbers, and an evaluation's measurements by instance.
//!
//! It reads `examples.parquet` as any other program would: a column `instance`, a column `stratum` that may be missing,
//! and a number or truth value a measurement. Columns of other types (prompts, completions) are never read, nor is the
//! number of a completion among those of its instance (`sample`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use arrow_array::cast::AsArray as _;
use arrow_array::types::{Float32Type, Float64Type, Int32Type, Int64Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef};
use arrow_schema::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::cli::rollouts;
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::{Manifest, Store};

/// The rows of an evaluation, in the order of the file.
#[derive(Clone, Debug, Default)]
pub struct Examples {
    instances: Vec<Arc<str>>,
    strata: Vec<Option<String>>,
    /// In the order of the columns, which is the task's own.
    measurements: Vec<(String, Vec<Option<f64>>)>,
}

/// A stage's result as far as tables need it.
pub struct StageResult {
    metrics: BTreeMap<String, f64>,
    examples: Option<Examples>,
}

/// One metric of one result.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// A value an instance: the mean over its rows.
    Instances(BTreeMap<Arc<str>, f64>),
    /// One number for the whole result.
    Whole(f64),
}

impl StageResult {
    /// Reads the result behind a manifest.
    pub fn read(manifest: &Manifest, store: &Store) -> anyhow::Result<Self> {
        let evaluation = manifest.outputs.iter().find(|output| output.artifact == ArtifactType::Evaluation);
        let examples = match evaluation {
            Some(output) => Examples::read(&store.object(&output.digest))?,
            None => None,
        };
        let mut metrics = manifest.metrics.clone();
        if let Some(output) = manifest.outputs.iter().find(|output| output.artifact == ArtifactType::Rollouts) {
            metrics.extend(rollouts::metrics(&store.object(&output.digest), &manifest.params["rewards"])?);
        }
        Ok(Self { metrics, examples })
    }

    /// The values of a metric: a measurement by instance (`solved`, or `solved.STRATUM` for the rows of one stratum), or
    /// else a headline number of that name.
    pub fn values(&self, metric: &str) -> Option<Values> {
        let measured = self.examples.as_ref().and_then(|examples| examples.values(metric));
        measured.map(Values::Instances).or_else(|| self.metrics.get(metric).copied().map(Values::Whole))
    }

    /// A measurement of every row, in the order of the file.
    pub fn column(&self, measurement: &str) -> Option<&[Option<f64>]> {
        let mut columns = self.examples.iter().flat_map(|examples| &examples.measurements);
        columns.find(|(name, _)| name == measurement).map(|(_, column)| column.as_slice())
    }

    /// The metrics to show where none is asked for: every measurement, or else every headline number.
    pub fn metrics(&self) -> Vec<&str> {
        let measured: Vec<&str> = self.measured().collect();
        if measured.is_empty() { self.metrics.keys().map(String::as_str).collect() } else { measured }
    }

    /// The name of every metric: measurements first.
    pub fn known(&self) -> Vec<&str> {
        let headlines = self.metrics.keys().map(String::as_str);
        self.measured().chain(headlines.filter(|name| !self.measured().any(|measured| measured == *name))).collect()
    }

    /// The same with each measurement over each stratum of instances.
    pub fn every_name(&self) -> Vec<String> {
        let mut names: Vec<String> = self.known().into_iter().map(str::to_owned).collect();
        let Some(examples) = &self.examples else { return names };
        let strata: BTreeSet<&str> = examples.strata.iter().flatten().map(String::as_str).collect();
        let parts = self.measured().flat_map(|name| strata.iter().map(move |stratum| format!("{name}.{stratum}")));
        let parts: Vec<String> = parts.filter(|name| !names.contains(name)).collect();
        names.extend(parts);
        names
    }

    /// The names of its measurements.
    pub fn measured(&self) -> impl Iterator<Item = &str> {
        self.examples.iter().flat_map(|examples| &examples.measurements).map(|(name, _)| name.as_str())
    }
}

impl Examples {
    /// Reads `examples.parquet` of an evaluation's folder; `None` where there is none.
    pub fn read(folder: &Path) -> anyhow::Result<Option<Self>> {
        let path = folder.join("examples.parquet");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot open `{}`", path.display())),
        };
        Self::parse(file).with_context(|| format!("cannot read `{}`", path.display())).map(Some)
    }

    fn parse(file: File) -> anyhow::Result<Self> {
        let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
        let wanted = |(place, field): (usize, &Arc<arrow_schema::Field>)| {
            let labels = ["instance", "stratum"].contains(&field.name().as_str());
            (labels || field.name() != "sample" && is_measurement(field.data_type())).then_some(place)
        };
        let roots: Vec<usize> = builder.schema().fields().iter().enumerate().filter_map(wanted).collect();
        let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
        let mut examples = Self::default();
        for batch in builder.with_projection(mask).build()? {
            let batch = batch?;
            let Some(instances) = batch.column_by_name("instance") else { bail!("there is no column `instance`") };
            let instances = labels(instances).context("column `instance`")?;
            for (row, instance) in instances.into_iter().enumerate() {
                let Some(instance) = instance else { bail!("row {row} has no `instance`") };
                examples.instances.push(instance.into());
            }
            match batch.column_by_name("stratum") {
                Some(column) => examples.strata.extend(labels(column).context("column `stratum`")?),
                None => examples.strata.resize(examples.instances.len(), None),
            }
            for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
                if ["instance", "stratum"].contains(&field.name().as_str()) {
                    continue;
                }
                if let Some(numbers) = numbers(column) {
                    match examples.measurements.iter_mut().find(|(name, _)| name == field.name()) {
                        Some((_, column)) => column.extend(numbers),
                        None => examples.measurements.push((field.name().clone(), numbers)),
                    }
                }
            }
        }
        Ok(examples)
    }

    /// The mean of a measurement by instance; rows without a value do not count. `MEASUREMENT.STRATUM` takes the rows of one
    /// stratum; of a stratum of several classes, as `10x10.long`, each class may be named alone.
    fn values(&self, metric: &str) -> Option<BTreeMap<Arc<str>, f64>> {
        let measured =
            |wanted: &str| self.measurements.iter().find(|(name, _)| name == wanted).map(|(_, column)| column);
        let (column, stratum) = match measured(metric) {
            Some(column) => (column, None),
            // Either name may hold dots: the split is at the dot that leaves a measurement before it.
            None => metric
                .match_indices('.')
                .rev()
                .find_map(|(dot, _)| Some((measured(&metric[..dot])?, Some(&metric[dot + 1..]))))?,
        };
        let rows = self.instances.iter().zip(&self.strata).zip(column);
        let of_stratum = |own: &Option<String>| {
            stratum.is_none_or(|wanted| own.as_deref().is_some_and(|own| is_within(own, wanted)))
        };
        let mut measured: Vec<(&Arc<str>, f64)> = rows
            .filter_map(|((instance, own), value)| Some((instance, (*value)?)).filter(|_| of_stratum(own)))
            .collect();
        measured.sort_by_key(|(instance, _)| *instance);
        let means = measured.chunk_by(|one, other| one.0 == other.0).map(|rows| {
            let sum: f64 = rows.iter().map(|(_, value)| value).sum();
            (Arc::clone(rows[0].0), sum / rows.len() as f64)
        });
        let means: BTreeMap<Arc<str>, f64> = means.collect();
        (!means.is_empty()).then_some(means)
    }
}

/// Whether a stratum is the one `wanted`, or has all of its classes.
fn is_within(stratum: &str, wanted: &str) -> bool {
    stratum == wanted || wanted.split('.').all(|class| stratum.split('.').any(|own| own == class))
}

fn is_measurement(data_type: &DataType) -> bool {
    use DataType::{Boolean, Float32, Float64, Int32, Int64, UInt32, UInt64};
    matches!(data_type, Boolean | Float32 | Float64 | Int32 | Int64 | UInt32 | UInt64)
}

/// A column of names or numbers as text.
fn labels(column: &ArrayRef) -> anyhow::Result<Vec<Option<String>>> {
    let owned = |text: Option<&str>| text.map(str::to_owned);
    Ok(match column.data_type() {
        DataType::Utf8 => column.as_string::<i32>().iter().map(owned).collect(),
        DataType::LargeUtf8 => column.as_string::<i64>().iter().map(owned).collect(),
        DataType::Utf8View => column.as_string_view().iter().map(owned).collect(),
        DataType::Int32 => column.as_primitive::<Int32Type>().iter().map(|id| id.map(|id| id.to_string())).collect(),
        DataType::Int64 => column.as_primitive::<Int64Type>().iter().map(|id| id.map(|id| id.to_string())).collect(),
        DataType::UInt32 => column.as_primitive::<UInt32Type>().iter().map(|id| id.map(|id| id.to_string())).collect(),
        DataType::UInt64 => column.as_primitive::<UInt64Type>().iter().map(|id| id.map(|id| id.to_string())).collect(),
        DataType::Null => vec![None; column.len()],
        other => bail!("expected text or integers, found {other}"),
    })
}

/// A column of numbers or truth values as `f64`.
fn numbers(column: &ArrayRef) -> Option<Vec<Option<f64>>> {
    Some(match column.data_type() {
        DataType::Boolean => {
            column.as_boolean().iter().map(|value| value.map(|truth| f64::from(u8::from(truth)))).collect()
        }
        DataType::Float64 => column.as_primitive::<Float64Type>().iter().collect(),
        DataType::Float32 => column.as_primitive::<Float32Type>().iter().map(|value| value.map(f64::from)).collect(),
        DataType::Int32 => column.as_primitive::<Int32Type>().iter().map(|value| value.map(f64::from)).collect(),
        DataType::UInt32 => column.as_primitive::<UInt32Type>().iter().map(|value| value.map(f64::from)).collect(),
        DataType::Int64 => {
            column.as_primitive::<Int64Type>().iter().map(|value| value.map(|value| value as f64)).collect()
        }
        DataType::UInt64 => {
            column.as_primitive::<UInt64Type>().iter().map(|value| value.map(|value| value as f64)).collect()
        }
        _ => return None,
    })
}

#[cfg(test)]
pub(crate) mod fake {
    //! An evaluation's folder as an evaluate stage leaves it.

    use super::*;
    use arrow_array::{Float64Array, RecordBatch, StringArray};
    use arrow_schema::{Field, Schema};

    /// Writes `examples.parquet` with rows of (instance, stratum, solved, steps).
    pub(crate) fn evaluation(folder: &Path, rows: &[(&str, Option<&str>, f64, Option<f64>)]) {
        let schema = Arc::new(Schema::new(vec![
            Field::new("instance", DataType::Utf8, false),
            Field::new("stratum", DataType::Utf8, true),
            Field::new("completion", DataType::Utf8, false),
            Field::new("solved", DataType::Float64, false),
            Field::new("steps", DataType::Float64, true),
        ]));
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(rows.iter().map(|row| row.0))),
            Arc::new(rows.iter().map(|row| row.1).collect::<StringArray>()),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|_| "up down"))),
            Arc::new(Float64Array::from_iter_values(rows.iter().map(|row| row.2))),
            Arc::new(rows.iter().map(|row| row.3).collect::<Float64Array>()),
        ];
        let batch = RecordBatch::try_new(Arc::clone(&schema), columns).unwrap();
        let file = File::create(folder.join("examples.parquet")).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(file, schema, None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rows: &[(&str, Option<&str>, f64, Option<f64>)]) -> Examples {
        let folder = tempfile::tempdir().unwrap();
        fake::evaluation(folder.path(), rows);
        Examples::read(folder.path()).unwrap().unwrap()
    }

    #[test]
    fn a_stratum_of_several_classes_is_found_by_each() {
        for (stratum, wanted, within) in [
            ("10x10.long", "10x10.long", true),
            ("10x10.long", "10x10", true),
            ("10x10.long", "long", true),
            ("10x10.very_long", "long", false),
            ("short", "short", true),
            ("short", "short.4x4", false),
            ("a.b", "a.b", true),
        ] {
            assert_eq!(is_within(stratum, wanted), within, "{stratum} and {wanted}");
        }
    }

    #[test]
    fn measurements_come_by_instance_and_stratum() {
        let examples = read(&[
            ("a", Some("short"), 1.0, Some(4.0)),
            ("b", Some("long"), 0.0, None),
            ("c", Some("long"), 1.0, Some(9.0)),
            ("c", Some("long"), 0.0, Some(5.0)),
        ]);
        let pairs = |metric: &str| {
            let values = examples.values(metric).unwrap();
            values.into_iter().map(|(name, value)| (name.to_string(), value)).collect::<Vec<_>>()
        };
        let pair = |name: &str, value: f64| (name.to_owned(), value);
        assert_eq!(pairs("solved"), [pair("a", 1.0), pair("b", 0.0), pair("c", 0.5)]);
        assert_eq!(pairs("solved.long"), [pair("b", 0.0), pair("c", 0.5)]);
        assert_eq!(pairs("steps"), [pair("a", 4.0), pair("c", 7.0)]);
        assert_eq!(examples.values("solved.huge"), None);
        assert_eq!(examples.values("completion"), None, "text is no measurement");
    }

    #[test]
    fn every_name_has_measurements_by_stratum() {
        let rows = [("a", Some("short"), 1.0, None), ("b", Some("long"), 0.0, None)];
        let metrics = BTreeMap::from([("solved.long".to_owned(), 0.0), ("loss".to_owned(), 0.1)]);
        let result = StageResult { metrics, examples: Some(read(&rows)) };
        assert_eq!(
            result.every_name(),
            ["solved", "steps", "loss", "solved.long", "solved.short", "steps.long", "steps.short"]
        );
    }

    #[test]
    fn headline_numbers_stand_in_where_there_is_no_measurement() {
        let result = StageResult {
            metrics: BTreeMap::from([("loss".to_owned(), 0.3), ("solved".to_owned(), 0.9)]),
            examples: Some(read(&[("a", None, 1.0, None)])),
        };
        assert_eq!(result.values("loss"), Some(Values::Whole(0.3)));
        assert!(matches!(result.values("solved"), Some(Values::Instances(_))));
        assert_eq!(result.values("missing"), None);
        assert_eq!(result.metrics(), ["solved", "steps"]);
        assert_eq!(result.known(), ["solved", "steps", "loss"]);
        let plain = StageResult { examples: None, ..result };
        assert_eq!(plain.metrics(), ["loss", "solved"]);
    }

    #[test]
    fn a_file_that_is_no_parquet_is_named() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Examples::read(folder.path()).unwrap().is_none());
        std::fs::write(folder.path().join("examples.parquet"), "nothing").unwrap();
        let error = format!("{:#}", Examples::read(folder.path()).unwrap_err());
        assert!(error.contains("examples.parquet"), "{error}");
    }
}
