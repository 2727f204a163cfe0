//! Rows of token ids to tensors without padding, and the positions whose logits a loss needs.
//!
//! Only positions that predict a target are ever turned into logits. It knows nothing of where rows come from.

use anyhow::{Result, ensure};
use tch::{Device, Tensor};

use crate::model::layout::Segment;
use crate::model::{Layout, Transformer};

/// A row to train on.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Token ids.
    pub ids: &'a [i64],
    /// 1 where the token is to be predicted from those before it, else 0; as long as `ids`, and 0 at its first place.
    pub mask: &'a [u8],
}

impl Row<'_> {
    /// Tokens to be predicted: what denominators count.
    pub fn targets(&self) -> u64 {
        self.mask.iter().filter(|&&mask| mask != 0).count() as u64
    }

    /// The ids before the first target.
    fn prompt(&self) -> &[i64] {
        let first = self.mask.iter().position(|&mask| mask != 0);
        &self.ids[..first.unwrap_or(self.ids.len())]
    }
}

/// Rows as tensors, one behind another. Targets are ordered by row, then by place; `N` counts them.
#[derive(Debug)]
pub struct Batch {
    /// `[T]` i64, `T` being the tokens that are computed.
    pub ids: Tensor,
    /// Where they stand.
    pub layout: Layout,
    /// `[N]` i64: the token whose hidden state predicts each target.
    pub positions: Tensor,
    /// `[N]` i64: the ids to be predicted.
    pub targets: Tensor,
    /// `[N]` i64: the row of each target.
    pub row: Tensor,
}

impl Batch {
    /// Rows side by side; a row may have no target.
    pub fn new(rows: &[Row<'_>], device: Device) -> Result<Self> {
        Self::lay(rows, device, false)
    }

    /// [`Batch::new`] with what neighbouring rows have in common before their first targets computed once: the rows are
    /// samples of prompts, those of one prompt side by side.
    pub fn sharing_prompts(rows: &[Row<'_>], device: Device) -> Result<Self> {
        Self::lay(rows, device, true)
    }

    fn lay(rows: &[Row<'_>], device: Device, shares: bool) -> Result<Self> {
        ensure!(!rows.is_empty(), "a batch without rows");
        for (index, row) in rows.iter().enumerate() {
            let (tokens, marks) = (row.ids.len(), row.mask.len());
            ensure!(tokens == marks, "row {index} has {tokens} tokens, but its mask has {marks}");
            ensure!(tokens > 0, "the row {index} of a batch is empty");
            ensure!(row.mask[0] == 0, "row {index} wants its first token predicted, but nothing precedes it");
        }
        let (mut ids, mut segments): (Vec<i64>, Vec<Segment>) = (Vec::new(), Vec::new());
        let (mut positions, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        let mut index = 0;
        while index < rows.len() {
            let prompt = rows[index].prompt();
            let alike = |row: &&Row<'_>| shares && row.prompt() == prompt && row.ids.len() > prompt.len();
            let samples = rows[index..].iter().take_while(alike).count().max(1);
            // A prompt with one sample is one segment with it.
            let begin = ids.len();
            let before = if samples > 1 { prompt.len() } else { 0 };
            if samples > 1 {
                ids.extend(prompt);
                segments.push(Segment { length: before, continues: false });
            }
            for row in &rows[index..index + samples] {
                let own = ids.len();
                ids.extend(&row.ids[before..]);
                segments.push(Segment { length: row.ids.len() - before, continues: before > 0 });
                for place in (1..row.ids.len()).filter(|&place| row.mask[place] != 0) {
                    let from = place - 1;
                    positions.push((if from < before { begin + from } else { own + from - before }) as i64);
                    targets.push(row.ids[place]);
                    owners.push(index as i64);
                }
                index += 1;
            }
        }
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        Ok(Self {
            ids: tensor(&ids),
            layout: Layout::new(&segments, device),
            positions: tensor(&positions),
            targets: tensor(&targets),
            row: tensor(&owners),
        })
    }

    /// Targets in the batch.
    pub fn count(&self) -> i64 {
        self.targets.size()[0]
    }

    /// The hidden states `[N, H]` that predict the targets.
    pub fn states(&self, model: &Transformer) -> Tensor {
        model.hidden_at(&self.ids, &self.layout, &self.positions)
    }

    /// The hidden states `[N, H]` that predict the targets, of all hidden states `[T, H]`.
    pub fn select(&self, hidden: &Tensor) -> Tensor {
        hidden.index_select(0, &self.positions)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::{Kind, no_grad};

    use super::*;
    use crate::loss::{supervised_loss, token_logprobs};
    use crate::sandbox;

    fn rows() -> Vec<(Vec<i64>, Vec<u8>)> {
        let lengths = [9usize, 4, 7, 9, 2, 5, 8, 3, 6, 9];
        lengths
            .iter()
            .enumerate()
            .map(|(row, &length)| {
                let ids = (0..length).map(|place| ((row * 5 + place * 7 + place * place) % 13) as i64).collect();
                let mask = (0..length).map(|place| u8::from(place > 0 && (place > 2 || row % 3 == 0))).collect();
                (ids, mask)
            })
            .collect()
    }

    fn borrowed(rows: &[(Vec<i64>, Vec<u8>)]) -> Vec<Row<'_>> {
        rows.iter().map(|(ids, mask)| Row { ids, mask }).collect()
    }

    #[test]
    fn targets_are_the_marked_tokens_and_positions_precede_them() {
        let rows = rows();
        let batch = Batch::new(&borrowed(&rows), Device::Cpu).expect("a batch");
        assert_eq!(batch.ids.size(), [62]);
        assert_eq!(batch.count() as u64, borrowed(&rows).iter().map(Row::targets).sum::<u64>());
        let following = batch.ids.index_select(0, &(&batch.positions + 1));
        assert_eq!(following, batch.targets);
        let owners = rows
            .iter()
            .zip(0i64..)
            .flat_map(|((_, mask), row)| mask.iter().filter(|mask| **mask != 0).map(move |_| row));
        assert_eq!(batch.row, Tensor::from_slice(&owners.collect::<Vec<_>>()));
    }

    #[test]
    fn rows_that_cannot_be_trained_on_are_refused() {
        let error = |ids: &[i64], mask: &[u8]| {
            Batch::new(&[Row { ids, mask }], Device::Cpu).expect_err("it is refused").to_string()
        };
        assert!(error(&[1, 2], &[0]).contains("mask has 1"));
        assert!(error(&[1, 2], &[1, 1]).contains("first token"));
        assert!(error(&[], &[]).contains("empty"));
        let none = Batch::new(&[Row { ids: &[1], mask: &[0] }], Device::Cpu).expect("no target is no error");
        assert_eq!(none.count(), 0);
    }

    /// A table-driven model: the summed log-probability by the batch is that of a loop over the table of next tokens.
    #[test]
    fn summed_log_probabilities_are_those_of_brute_force() {
        let table: Vec<f32> = (0..169).map(|index| ((index * 37 % 101) as f32 / 20.0).sin() * 2.0).collect();
        let logits = Tensor::from_slice(&table).view([13, 13]);
        let rows = rows();
        let batch = Batch::new(&borrowed(&rows), Device::Cpu).expect("a batch");
        let hidden = logits.index_select(0, &batch.ids);
        let ours = token_logprobs(&batch.select(&hidden), &batch.targets, 0.7).sum(Kind::Double).double_value(&[]);
        let mut brute = 0.0;
        for (ids, mask) in &rows {
            for place in 1..ids.len() {
                let row = &table[ids[place - 1] as usize * 13..][..13];
                let scaled: Vec<f64> = row.iter().map(|logit| f64::from(*logit) / 0.7).collect();
                let total: f64 = scaled.iter().map(|logit| logit.exp()).sum();
                brute += f64::from(mask[place]) * (scaled[ids[place] as usize] - total.ln());
            }
        }
        assert!((ours - brute).abs() < 1e-4, "{ours} against {brute}");
    }

    /// The gradient of one optimizer batch of a supervised loss, computed in micro-batches of `size` rows.
    fn gradient(model: &Transformer, rows: &[(Vec<i64>, Vec<u8>)], size: usize) -> Tensor {
        let denominator = borrowed(rows).iter().map(Row::targets).sum::<u64>() as f64;
        model.zero_gradients();
        for chunk in rows.chunks(size) {
            let batch = Batch::new(&borrowed(chunk), Device::Cpu).expect("a batch");
            let logits = model.logits(&batch.states(model));
            supervised_loss(&token_logprobs(&logits, &batch.targets, 0.9), denominator).backward();
        }
        model.weights().gradient().copy()
    }

    #[test]
    fn gradients_do_not_depend_on_the_split_or_the_order_of_rows() {
        let (_folder, model) = sandbox::model(&json!({}));
        let rows = rows();
        let mut permuted = rows.clone();
        permuted.reverse();
        permuted.swap(1, 6);
        let mut bucketed = rows.clone();
        bucketed.sort_by_key(|(ids, _)| ids.len());
        let whole = gradient(&model, &rows, rows.len());
        assert!(whole.norm().double_value(&[]) > 1e-3);
        for (rows, size) in
            [(&rows, 1), (&rows, 2), (&rows, 4), (&rows, 8), (&permuted, 10), (&permuted, 3), (&bucketed, 3)]
        {
            let distance = sandbox::relative(&gradient(&model, rows, size), &whole);
            assert!(distance <= 1e-5, "size {size}: {distance}");
        }
        assert_eq!(gradient(&model, &rows, 4), gradient(&model, &rows, 4), "the same bits again");
    }

    /// Samples of prompts: rows of one prompt side by side, groups of 1, 2 and 8, prompts and samples of unequal lengths.
    fn samples() -> Vec<(Vec<i64>, Vec<u8>)> {
        let mut rows = Vec::new();
        for (group, (prompt, samples)) in [(11usize, 8usize), (4, 1), (1, 2), (20, 2)].into_iter().enumerate() {
            for sample in 0..samples {
                let length = prompt + 1 + (sample * 5 + group) % 9;
                // The samples differ behind the prompt, and the environment speaks within some.
                let id = |place: usize| {
                    if place < prompt { group * 3 + place * place } else { sample * 7 + place * 5 + group }
                };
                let ids = (0..length).map(|place| (id(place) % 13) as i64).collect();
                let marked = |place: usize| place >= prompt && (place == prompt || !(place + sample).is_multiple_of(4));
                rows.push((ids, (0..length).map(|place| u8::from(marked(place))).collect()));
            }
        }
        rows
    }

    #[test]
    fn a_prompt_that_is_computed_once_gives_the_gradient_of_one_that_is_not() {
        for model in sandbox::families() {
            let model = model.double();
            let rows = samples();
            let made = |shares: bool| {
                let batch = Batch::lay(&borrowed(&rows), Device::Cpu, shares).expect("a batch");
                model.zero_gradients();
                let logprobs = token_logprobs(&model.logits(&batch.states(&model)), &batch.targets, 0.9);
                // Every target counts otherwise, as advantages do.
                let weights = Tensor::arange(batch.count(), (Kind::Double, Device::Cpu)).sin();
                (&logprobs * weights).sum(Kind::Double).backward();
                (batch, logprobs.detach(), model.weights().gradient().copy())
            };
            let ((batch, logprobs, gradient), (plain, alone, theirs)) = (made(true), made(false));
            assert_eq!((&batch.targets, &batch.row), (&plain.targets, &plain.row));
            let (computed, all) = (batch.layout.tokens(), plain.layout.tokens());
            assert_eq!(all - computed, 7 * 11 + 1 + 20, "seven, one and one prompts are not computed again");
            assert!(sandbox::distance(&logprobs, &alone) < 1e-10);
            let distance = sandbox::relative(&gradient, &theirs);
            assert!(distance < 1e-10, "{distance}");
            // Only the last layer knows which states are wanted.
            let all = no_grad(|| batch.select(&model.hidden(&batch.ids, &batch.layout)));
            assert!(sandbox::distance(&no_grad(|| batch.states(&model)), &all) < 1e-12);
            let by_libtorch = crate::native::without(|| made(true));
            assert!(sandbox::relative(&by_libtorch.2, &theirs) < 1e-10);
        }
    }
}
