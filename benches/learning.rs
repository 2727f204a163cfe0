//! Tokens per second of a training step and of generation for a 0.9 M-parameter model; `learning.py` is its peer in PyTorch.
//!
//! Run with `cargo bench -p pipe-learn --profile dev -- [train|generate|both] [seconds] [threads]`. Beside tokens per second it gives
//! tokens per second of processor time, which other work on the machine moves less (exactly so with one thread).

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Result;
use pipe::pipeline::stage::Resources;
use pipe::stages::model::{Architecture, SpecialIds, write_fresh};
use pipe::stages::training::Optimizer;
use pipe_learn::batch::{Batch, Row};
use pipe_learn::generate::{Group, Sampling, generate};
use pipe_learn::loss::{supervised_loss, token_logprobs};
use pipe_learn::model::Transformer;
use pipe_learn::optimizer::AdamW;
use tch::{Device, no_grad};

const ROWS: usize = 128;
const LENGTH: usize = 73;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let which = arguments.get(1).map_or("both", String::as_str);
    let seconds: f64 = arguments.get(2).map_or(Ok(10.0), |text| text.parse())?;
    let threads = arguments.get(3).map_or(Ok(2), |text| text.parse())?;
    let device = pipe_learn::device::open(&Resources {
        device: "cpu".to_owned(),
        threads,
        save_every: std::time::Duration::from_secs(60),
        visible_devices: None,
    })?;
    let folder = tempfile::tempdir()?;
    let architecture: Architecture =
        serde_json::from_value(serde_json::json!({"kind": "qwen2", "hidden_size": 128, "layers": 4, "heads": 4}))?;
    let ids = SpecialIds { pad: Some(0), bos: Some(1), eos: None };
    write_fresh(folder.path(), &architecture, 128, ids, 1)?;
    let model = Transformer::load(folder.path(), device)?;
    if which != "generate" {
        report("train", seconds, || train(&model))?;
    }
    if which != "train" {
        report("generate", seconds, || sample(&model))?;
    }
    Ok(())
}

fn report(name: &str, seconds: f64, mut run: impl FnMut() -> Result<usize>) -> Result<()> {
    run()?;
    let (begin, mut rates) = (Instant::now(), Vec::new());
    while begin.elapsed().as_secs_f64() < seconds {
        let (start, processor) = (Instant::now(), processor_seconds()?);
        let tokens = run()? as f64;
        rates.push((tokens / start.elapsed().as_secs_f64(), tokens / (processor_seconds()? - processor)));
    }
    let best = |rates: Vec<f64>| rates.into_iter().fold(0.0, f64::max);
    let (wall, processor) = rates.into_iter().unzip();
    println!("{name}: {:.0} tokens/s, {:.0} tokens per processor second", best(wall), best(processor));
    Ok(())
}

/// Seconds of processor time of this process: user and system, in hundredths.
fn processor_seconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

fn train(model: &Transformer) -> Result<usize> {
    let ids: Vec<i64> = (0..ROWS * LENGTH).map(|index| (index * 7919 % 127) as i64).collect();
    let mut mask = vec![1u8; LENGTH];
    mask[0] = 0;
    let rows: Vec<Row<'_>> = ids.chunks(LENGTH).map(|ids| Row { ids, mask: &mask }).collect();
    let mut optimizer = AdamW::new(model.weights(), &Optimizer::default());
    for _ in 0..2 {
        model.zero_gradients();
        let batch = Batch::new(&rows, Device::Cpu)?;
        let logprobs = token_logprobs(&model.logits(&batch.states(model)), &batch.targets, 1.0);
        supervised_loss(&logprobs, batch.count() as f64).backward();
        optimizer.step(model.weights(), 1e-3)?;
    }
    Ok(2 * ROWS * LENGTH)
}

fn sample(model: &Transformer) -> Result<usize> {
    let groups: Vec<Group> = (0..32u64)
        .map(|group| Group {
            prompt: (0..25 + group as i64 % 2).map(|place| (place * 5 + group as i64) % 127).collect(),
            samples: (0..8).map(|sample| vec![1, group, sample]).collect(),
        })
        .collect();
    let sampling = Sampling::new(1.0, 48);
    let mut tokens = 0;
    no_grad(|| {
        generate(model, &groups, &sampling, &AtomicBool::new(false), &mut |written| tokens += written as usize)
    })?;
    Ok(tokens)
}
