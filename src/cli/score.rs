//! `pipe score`: the log-probability of every token of given rows under a model.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::cli::Session;
use crate::cli::failure::Failure;
use crate::pipeline::exec;

/// Print the log-probability of every token of ROWS under the model in MODEL_DIR
///
/// A row is a line of JSON, `{"ids": [1, 5]}` or `{"text": "a b"}`, and may have an `id`. Each gives one line, in the same
/// order: `{"ids": [1, 5], "logprobs": [null, -0.31]}`, where a log-probability (natural logarithm, temperature 1) is that
/// of the token given all before it. Texts are tokenized as `transformers` does it, with what the tokenizer adds by itself.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A folder as `transformers` saves it: config.json, safetensors, tokenizer.json
    #[arg(value_name = "MODEL_DIR")]
    model: PathBuf,
    /// Rows as JSON lines
    #[arg(value_name = "ROWS.jsonl")]
    rows: PathBuf,
    /// `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Rows in a forward pass
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Write to FILE instead of stdout
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// The worker program computes and prints; what it calls wrong is the user's input.
pub fn run(args: &Args, _: &Session) -> Result<(), Failure> {
    let mut arguments: Vec<OsString> =
        ["score", "--device", &args.device, "--batch-size", &args.batch_size.to_string()].map(OsString::from).into();
    if let Some(output) = &args.output {
        arguments.extend([OsString::from("--output"), output.into()]);
    }
    arguments.extend(["--".into(), args.model.clone().into(), args.rows.clone().into()]);
    let status = exec::run_worker(&arguments).map_err(|error| Failure::stage(&error))?;
    match status.code() {
        Some(0) => Ok(()),
        // It has said why.
        Some(code) => Err(Failure::silent(u8::try_from(code).unwrap_or(1))),
        None => Err(Failure::failed(format!("`pipe-worker` did not finish: {status}"))),
    }
}
