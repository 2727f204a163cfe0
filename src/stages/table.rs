//! Parquet files of plain columns (text, numbers, flags, lists of ids), written so that equal rows give equal bytes.
//!
//! Writer properties are pinned (`created_by`, codec, row groups, no clock), so a data stage that runs twice gives one
//! digest. It knows columns and files, never what is in them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use arrow_array::cast::AsArray as _;
use arrow_array::types::{Float64Type, Int32Type, Int64Type};
use arrow_array::{ArrayRef, BooleanArray, Float64Array, Int64Array, ListArray, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use serde_json::Value;

/// Rows in a row group.
const ROW_GROUP: usize = 65_536;

/// A column's values.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// Strings; `None` is a null.
    Text(Vec<Option<String>>),
    /// 64-bit integers; `None` is a null.
    Integer(Vec<Option<i64>>),
    /// 64-bit floating-point numbers; `None` is a null.
    Number(Vec<Option<f64>>),
    /// Booleans.
    Flag(Vec<bool>),
    /// Lists of 32-bit integers, as token ids.
    Integers(Vec<Vec<i32>>),
    /// Lists of 64-bit floating-point numbers, as log-probabilities.
    Numbers(Vec<Vec<f64>>),
}

impl Column {
    /// A text column without nulls.
    pub fn text(values: impl IntoIterator<Item = String>) -> Self {
        Self::Text(values.into_iter().map(Some).collect())
    }

    /// An integer column without nulls.
    pub fn integer(values: impl IntoIterator<Item = i64>) -> Self {
        Self::Integer(values.into_iter().map(Some).collect())
    }
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnType {
    /// Strings.
    Text,
    /// 64-bit integers.
    Integer,
    /// 64-bit floating-point numbers.
    Number,
    /// Booleans.
    Flag,
    /// Lists of 32-bit integers.
    Integers,
    /// Lists of 64-bit floating-point numbers.
    Numbers,
}

/// Writes a Parquet file piece by piece.
pub struct TableWriter {
    path: PathBuf,
    schema: Arc<Schema>,
    writer: ArrowWriter<File>,
}

impl TableWriter {
    /// Begins the file at `path` with the named columns.
    pub fn create(path: &Path, columns: &[(&str, ColumnType)]) -> anyhow::Result<Self> {
        let fields: Vec<Field> = columns
            .iter()
            .map(|(name, kind)| {
                let data_type = match kind {
                    ColumnType::Text => DataType::Utf8,
                    ColumnType::Integer => DataType::Int64,
                    ColumnType::Number => DataType::Float64,
                    ColumnType::Flag => DataType::Boolean,
                    ColumnType::Integers => DataType::new_list(DataType::Int32, true),
                    ColumnType::Numbers => DataType::new_list(DataType::Float64, true),
                };
                Field::new(*name, data_type, true)
            })
            .collect();
        let schema = Arc::new(Schema::new(fields));
        let properties = WriterProperties::builder()
            .set_created_by("pipe".to_owned())
            .set_writer_version(WriterVersion::PARQUET_1_0)
            .set_compression(Compression::SNAPPY)
            .set_max_row_group_row_count(Some(ROW_GROUP))
            .set_statistics_enabled(EnabledStatistics::Chunk)
            .build();
        let writer = File::create_new(path)
            .map_err(anyhow::Error::from)
            .and_then(|file| Ok(ArrowWriter::try_new(file, Arc::clone(&schema), Some(properties))?))
            .with_context(|| format!("creating `{}`", path.display()))?;
        Ok(Self { path: path.to_owned(), schema, writer })
    }

    /// Appends rows: one column each, in the order of the file, all of one length.
    pub fn write(&mut self, columns: Vec<Column>) -> anyhow::Result<()> {
        let arrays = columns
            .into_iter()
            .map(|column| match column {
                Column::Text(values) => Arc::new(StringArray::from(values)) as ArrayRef,
                Column::Integer(values) => Arc::new(Int64Array::from(values)) as ArrayRef,
                Column::Number(values) => Arc::new(Float64Array::from(values)) as ArrayRef,
                Column::Flag(values) => Arc::new(BooleanArray::from(values)) as ArrayRef,
                Column::Integers(values) => {
                    let lists = values.into_iter().map(|list| Some(list.into_iter().map(Some)));
                    Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(lists)) as ArrayRef
                }
                Column::Numbers(values) => {
                    let lists = values.into_iter().map(|list| Some(list.into_iter().map(Some)));
                    Arc::new(ListArray::from_iter_primitive::<Float64Type, _, _>(lists)) as ArrayRef
                }
            })
            .collect();
        RecordBatch::try_new(Arc::clone(&self.schema), arrays)
            .map_err(anyhow::Error::from)
            .and_then(|batch| Ok(self.writer.write(&batch)?))
            .with_context(|| format!("writing `{}`", self.path.display()))
    }

    /// Ends the file.
    pub fn finish(self) -> anyhow::Result<()> {
        self.writer.close().with_context(|| format!("writing `{}`", self.path.display()))?;
        Ok(())
    }
}

/// The columns `names` of a Parquet file, in that order; an error names the file and the columns there are.
pub fn read(path: &Path, names: &[&str]) -> anyhow::Result<Vec<Column>> {
    read_columns(path, names).with_context(|| format!("reading `{}`", path.display()))
}

/// A column of a Parquet file as JSON values: text, and lists and structures of it; nulls are null.
pub fn read_json(path: &Path, name: &str) -> anyhow::Result<Vec<Value>> {
    let read = || {
        let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
        let mask = ProjectionMask::columns(builder.parquet_schema(), [name]);
        let mut values = Vec::new();
        for batch in builder.with_projection(mask).with_batch_size(8_192).build()? {
            let batch = batch?;
            let array = batch.column_by_name(name).with_context(|| format!("there is no column `{name}`"))?;
            for row in 0..array.len() {
                values.push(json_value(array, row).with_context(|| format!("column `{name}`"))?);
            }
        }
        anyhow::Ok(values)
    };
    read().with_context(|| format!("reading `{}`", path.display()))
}

/// The value at `row` of an array.
fn json_value(array: &ArrayRef, row: usize) -> anyhow::Result<Value> {
    let list = |items: &ArrayRef| (0..items.len()).map(|item| json_value(items, item)).collect::<anyhow::Result<_>>();
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    Ok(match array.data_type() {
        DataType::Utf8 => Value::from(array.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => Value::from(array.as_string::<i64>().value(row)),
        DataType::Utf8View => Value::from(array.as_string_view().value(row)),
        DataType::List(_) => Value::Array(list(&array.as_list::<i32>().value(row))?),
        DataType::LargeList(_) => Value::Array(list(&array.as_list::<i64>().value(row))?),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            let field = |(field, column): (&Arc<Field>, &ArrayRef)| {
                anyhow::Ok((field.name().clone(), json_value(column, row)?))
            };
            Value::Object(fields.iter().zip(columns).map(field).collect::<anyhow::Result<_>>()?)
        }
        other => bail!("values of type `{other}` are not read"),
    })
}

/// The names of a Parquet file's columns.
pub fn column_names(path: &Path) -> anyhow::Result<Vec<String>> {
    let open = || {
        let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
        anyhow::Ok(builder.schema().fields().iter().map(|field| field.name().clone()).collect())
    };
    open().with_context(|| format!("reading `{}`", path.display()))
}

fn read_columns(path: &Path, names: &[&str]) -> anyhow::Result<Vec<Column>> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
    let mut columns = empty(builder.schema(), names)?;
    each_batch(builder, names, |arrays| {
        columns.iter_mut().zip(arrays).for_each(|(column, array)| append(column, array));
        Ok(())
    })?;
    let lengths: Vec<usize> = columns
        .iter()
        .map(|column| match column {
            Column::Text(values) => values.len(),
            Column::Integer(values) => values.len(),
            Column::Number(values) => values.len(),
            Column::Flag(values) => values.len(),
            Column::Integers(values) => values.len(),
            Column::Numbers(values) => values.len(),
        })
        .collect();
    ensure!(lengths.windows(2).all(|pair| pair[0] == pair[1]), "the columns differ in length");
    Ok(columns)
}

/// Reads the named columns of a Parquet file as [`read`] does, some thousand rows at a time.
pub fn scan(
    path: &Path,
    names: &[&str],
    mut each: impl FnMut(Vec<Column>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut scan = || {
        let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
        let none = empty(builder.schema(), names)?;
        each_batch(builder, names, |arrays| {
            let mut columns = none.clone();
            columns.iter_mut().zip(arrays).for_each(|(column, array)| append(column, array));
            each(columns)
        })
    };
    scan().with_context(|| format!("reading `{}`", path.display()))
}

fn each_batch(
    builder: ParquetRecordBatchReaderBuilder<File>,
    names: &[&str],
    mut each: impl FnMut(Vec<&ArrayRef>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mask = ProjectionMask::columns(builder.parquet_schema(), names.iter().copied());
    for batch in builder.with_projection(mask).with_batch_size(8_192).build()? {
        let batch = batch?;
        let array = |name: &&str| batch.column_by_name(name).with_context(|| format!("column `{name}` is gone"));
        each(names.iter().map(array).collect::<anyhow::Result<_>>()?)?;
    }
    Ok(())
}

/// The columns that hold what the named ones do, without values.
fn empty(schema: &Schema, names: &[&str]) -> anyhow::Result<Vec<Column>> {
    let mut columns = Vec::with_capacity(names.len());
    for name in names {
        let Some((_, field)) = schema.column_with_name(name) else {
            let there: Vec<String> = schema.fields().iter().map(|field| format!("`{}`", field.name())).collect();
            bail!("there is no column `{name}`; the columns are {}", there.join(", "));
        };
        columns.push(match field.data_type() {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Column::Text(Vec::new()),
            DataType::Int64 => Column::Integer(Vec::new()),
            DataType::Float64 => Column::Number(Vec::new()),
            DataType::Boolean => Column::Flag(Vec::new()),
            DataType::List(item) if *item.data_type() == DataType::Int32 => Column::Integers(Vec::new()),
            DataType::List(item) if *item.data_type() == DataType::Float64 => Column::Numbers(Vec::new()),
            other => bail!("column `{name}` holds values of type `{other}`, which is not read"),
        });
    }
    Ok(columns)
}

fn append(column: &mut Column, array: &ArrayRef) {
    match column {
        Column::Integer(values) => values.extend(array.as_primitive::<Int64Type>().iter()),
        Column::Number(values) => values.extend(array.as_primitive::<Float64Type>().iter()),
        Column::Flag(values) => values.extend(array.as_boolean().iter().map(|flag| flag == Some(true))),
        Column::Integers(values) => {
            let lists = array.as_list::<i32>().iter();
            let ids = |list: ArrayRef| list.as_primitive::<Int32Type>().values().to_vec();
            values.extend(lists.map(|list| list.map(ids).unwrap_or_default()));
        }
        Column::Numbers(values) => {
            let lists = array.as_list::<i32>().iter();
            let numbers = |list: ArrayRef| list.as_primitive::<Float64Type>().values().to_vec();
            values.extend(lists.map(|list| list.map(numbers).unwrap_or_default()));
        }
        Column::Text(values) => match array.data_type() {
            DataType::Utf8 => {
                values.extend(array.as_string::<i32>().iter().map(|text| text.map(str::to_owned)));
            }
            DataType::LargeUtf8 => {
                values.extend(array.as_string::<i64>().iter().map(|text| text.map(str::to_owned)));
            }
            _ => values.extend(array.as_string_view().iter().map(|text| text.map(str::to_owned))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_give_equal_bytes_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = folder.path().join(name);
            let mut writer =
                TableWriter::create(&path, &[("a", ColumnType::Text), ("b", ColumnType::Integer)]).unwrap();
            writer.write(vec![Column::Text(vec![Some("x".into()), None]), Column::integer([1, 2])]).unwrap();
            writer.write(vec![Column::text(["y".into()]), Column::Integer(vec![None])]).unwrap();
            writer.finish().unwrap();
            path
        };
        let (first, second) = (write("1.parquet"), write("2.parquet"));
        assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
        let columns = read(&first, &["b", "a"]).unwrap();
        assert_eq!(columns[0], Column::Integer(vec![Some(1), Some(2), None]));
        assert_eq!(columns[1], Column::Text(vec![Some("x".into()), None, Some("y".into())]));
        assert_eq!(column_names(&first).unwrap(), ["a", "b"]);
    }

    #[test]
    fn lists_of_structures_are_read_as_json() {
        use arrow_array::builder::{ListBuilder, StringBuilder, StructBuilder};
        let fields = ["role", "content"].map(|name| Field::new(name, DataType::Utf8, true));
        let mut lists = ListBuilder::new(StructBuilder::from_fields(fields.to_vec(), 2));
        for (role, content, last) in [("user", Some("a"), false), ("assistant", None, true), ("user", Some("b"), true)]
        {
            let message = lists.values();
            message.field_builder::<StringBuilder>(0).unwrap().append_value(role);
            message.field_builder::<StringBuilder>(1).unwrap().append_option(content);
            message.append(true);
            if last {
                lists.append(true);
            }
        }
        lists.append(false);
        let array: ArrayRef = Arc::new(lists.finish());
        let other: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 3]));
        let batch = RecordBatch::try_from_iter([("other", other), ("messages", array)]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let message = |role: &str, content: Option<&str>| serde_json::json!({"role": role, "content": content});
        let wanted = [
            Value::Array(vec![message("user", Some("a")), message("assistant", None)]),
            Value::Array(vec![message("user", Some("b"))]),
            Value::Null,
        ];
        assert_eq!(read_json(&path, "messages").unwrap(), wanted);
        let error = format!("{:#}", read_json(&path, "other").unwrap_err());
        assert!(error.contains("`Int64` are not read"), "{error}");
        assert!(format!("{:#}", read_json(&path, "none").unwrap_err()).contains("there is no column `none`"));
    }

    #[test]
    fn numbers_flags_and_lists_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let columns = [
            ("n", ColumnType::Number),
            ("f", ColumnType::Flag),
            ("ids", ColumnType::Integers),
            ("logprobs", ColumnType::Numbers),
        ];
        let mut writer = TableWriter::create(&path, &columns).unwrap();
        let rows = vec![
            Column::Number(vec![Some(0.1 + 0.2), None]),
            Column::Flag(vec![true, false]),
            Column::Integers(vec![vec![3, 1, 2], vec![]]),
            Column::Numbers(vec![vec![], vec![-0.25, f64::from(-0.1f32)]]),
        ];
        writer.write(rows.clone()).unwrap();
        writer.finish().unwrap();
        assert_eq!(read(&path, &["n", "f", "ids", "logprobs"]).unwrap(), rows);
    }

    #[test]
    fn a_missing_column_and_a_file_of_another_kind_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        TableWriter::create(&path, &[("a", ColumnType::Text)]).unwrap().finish().unwrap();
        let error = format!("{:#}", read(&path, &["b"]).unwrap_err());
        assert!(error.contains("t.parquet") && error.contains("no column `b`; the columns are `a`"), "{error}");
        std::fs::write(folder.path().join("n.parquet"), "no Parquet").unwrap();
        assert!(format!("{:#}", read(&folder.path().join("n.parquet"), &["a"]).unwrap_err()).contains("n.parquet"));
    }
}
