//! `pipe export`: a result as a folder that other programs read, with a card that says where it comes from.

mod card;
mod lineage;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cli::export::lineage::Lineage;
use crate::cli::failure::Failure;
use crate::cli::{Session, render, show};
use crate::pipeline::export::{ExportError, export};
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::{Store, StoredOutput};

/// Copy a result into a folder that other programs read: a checkpoint for `transformers`, a data set for `datasets`
///
/// Beside the files stand a card (`README.md`, with the front matter of the Hugging Face hub) and `pipe.json`: parameters,
/// versions, keys, evaluations that rest on it, and the command that makes it again. Every byte is hashed on its way.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `EXPERIMENT[/TRIAL]/STAGE[.OUTPUT]` of the last run, or `FILE.toml[/TRIAL]/STAGE[.OUTPUT]` as the file is now
    #[arg(value_name = "RESULT")]
    target: String,
    /// The folder to make; an empty one may be there
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Lay a value over the file, as for `pipe run`
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
}

/// With `--json`, `{path, type, digest, key, bytes, files}`.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let found = show::find(&args.target, &args.sets, session)?;
    let output = found.output()?;
    let show::StageObjects { store, manifest } = found.result();
    let lineage = Lineage::of(&found, store).map_err(|error| Failure::stage(&error))?;
    let mut about = match output.artifact {
        ArtifactType::Checkpoint => own_tokenizer(store, output)?,
        _ => BTreeMap::new(),
    };
    let changed: Vec<&str> = about.keys().map(String::as_str).collect();
    let card = card::text(&args.target, manifest, output, &lineage, &changed);
    about.insert("README.md".to_owned(), card);
    let provenance = json!({
        "result": args.target,
        "output": output.name,
        "type": output.artifact,
        "digest": output.digest,
        "key": manifest.key,
        "recipe": manifest.recipe,
        "made_from": manifest.parts,
        "params": without_places(&manifest.params),
        "inputs": manifest.inputs,
        "numerics": manifest.numerics,
        "finished": manifest.finished,
        "stages": lineage.stages,
        "evaluations": lineage.evaluations,
        "again": lineage.again(),
        "pipe": env!("CARGO_PKG_VERSION"),
    });
    let text = serde_json::to_string_pretty(&provenance).expect("provenance is plain data");
    about.insert("pipe.json".to_owned(), text + "\n");
    let bytes = export(store, manifest, output, &about, &args.folder).map_err(failure)?;
    if session.ui.is_json() {
        return session.ui.json_pretty(&json!({
            "path": std::path::absolute(&args.folder).unwrap_or_else(|_| args.folder.clone()),
            "type": output.artifact,
            "digest": output.digest,
            "key": manifest.key,
            "bytes": bytes,
            "files": output.files.len() + about.len(),
        }));
    }
    let folder = args.folder.display();
    session.ui.note(&format!("wrote {} ({}) to {folder}", output.artifact, render::bytes(bytes as f64)));
    if session.ui.is_quiet() {
        return Ok(());
    }
    session.ui.hint(&match output.artifact {
        ArtifactType::Checkpoint => format!("AutoModelForCausalLM.from_pretrained(\"{folder}\")"),
        ArtifactType::Dataset => format!("datasets.load_dataset(\"{folder}\")"),
        _ => format!("`{folder}/README.md` says what is in it"),
    });
    Ok(())
}

/// Parameters with the names of the user's files in place of where they lie, which says something of a machine.
fn without_places(params: &Value) -> Value {
    match params {
        Value::Object(fields) => {
            let file = fields.get("$file").and_then(Value::as_str);
            if let Some(file) = file {
                let name = fields.get("as").and_then(Value::as_str).or(file.rsplit('/').next());
                return json!({"file": name});
            }
            Value::Object(fields.iter().map(|(name, value)| (name.clone(), without_places(value))).collect())
        }
        Value::Array(items) => items.iter().map(without_places).collect(),
        other => other.clone(),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is handed to `map_err`")]
fn failure(error: ExportError) -> Failure {
    let failure = Failure::stage(&error);
    match error {
        ExportError::Occupied(_) => Failure::input(&error).hint("nothing is overwritten: name a new folder"),
        ExportError::Damaged { .. } => {
            failure.hint("`pipe verify --repair` puts it aside, and the next run makes it again")
        }
        ExportError::Io { .. } | ExportError::Store(_) => failure,
    }
}

/// The file with the class that [`own_tokenizer`] names.
const TOKENIZER_CODE: &str = "tokenization_pipe.py";

/// What makes `AutoTokenizer` take the tokenizer of a checkpoint as it is.
///
/// `transformers` 5 takes every folder of the type `qwen2` for one with Qwen2's own vocabulary, whatever class the tokenizer
/// names, unless it names code of its own. That code is a class without a word of its own, which is not even read unless it is
/// trusted: without, the general class is taken.
fn own_tokenizer(store: &Store, output: &StoredOutput) -> Result<BTreeMap<String, String>, Failure> {
    let object = store.object(&output.digest);
    let read = |name: &str| -> Result<Option<Value>, Failure> {
        let path = object.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|error| Failure::failed(format!("`{}` is no JSON: {error}", path.display()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::failed(format!("cannot read `{}`: {error}", path.display()))),
        }
    };
    let (Some(model), Some(mut tokenizer)) = (read("config.json")?, read("tokenizer_config.json")?) else {
        return Ok(BTreeMap::new());
    };
    let is_general =
        matches!(tokenizer["tokenizer_class"].as_str(), Some("PreTrainedTokenizerFast" | "TokenizersBackend"));
    if model["model_type"] != "qwen2" || !is_general || !tokenizer["auto_map"].is_null() {
        return Ok(BTreeMap::new());
    }
    let class =
        format!("{}.PipeTokenizer", Path::new(TOKENIZER_CODE).file_stem().unwrap_or_default().to_string_lossy());
    tokenizer["auto_map"] = json!({"AutoTokenizer": [class, class]});
    let text = serde_json::to_string_pretty(&tokenizer).expect("a configuration is plain data") + "\n";
    let code = "from transformers import PreTrainedTokenizerFast\n\n\n\
                class PipeTokenizer(PreTrainedTokenizerFast):\n    \
                \"\"\"tokenizer.json as it is; without a name of its own, AutoTokenizer takes Qwen2's vocabulary.\"\"\"\n";
    Ok(BTreeMap::from([("tokenizer_config.json".to_owned(), text), (TOKENIZER_CODE.to_owned(), code.to_owned())]))
}
