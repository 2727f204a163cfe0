//! Rows of token ids to padded tensors, and the positions whose logits a loss needs.
//!
//! Only positions that predict a target are ever turned into logits. It knows nothing of where rows come from.

use anyhow::{Result, ensure};
use tch::{Device, Tensor};

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
}

/// Rows as tensors, padded on the right. Targets are ordered by row, then by place; `N` counts them.
#[derive(Debug)]
pub struct Batch {
    /// `[B, T]` i64.
    pub ids: Tensor,
    /// `[N]` i64: the flat index `row * T + place` of the hidden state that predicts each target.
    pub positions: Tensor,
    /// `[N]` i64: the ids to be predicted.
    pub targets: Tensor,
    /// `[N]` i64: the row of each target.
    pub row: Tensor,
}

impl Batch {
    /// Pads `rows` with the id `pad` to the longest of them; a row may have no target.
    pub fn new(rows: &[Row<'_>], pad: i64, device: Device) -> Result<Self> {
        ensure!(!rows.is_empty(), "a batch without rows");
        let length = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        ensure!(length > 0, "a batch whose rows are all empty");
        let mut ids = vec![pad; rows.len() * length];
        let (mut positions, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        for (index, row) in rows.iter().enumerate() {
            let (tokens, marks) = (row.ids.len(), row.mask.len());
            ensure!(tokens == marks, "row {index} has {tokens} tokens, but its mask has {marks}");
            ensure!(
                row.mask.first().is_none_or(|&mask| mask == 0),
                "row {index} wants its first token predicted, but nothing precedes it"
            );
            ids[index * length..index * length + tokens].copy_from_slice(row.ids);
            for place in (1..tokens).filter(|&place| row.mask[place] != 0) {
                positions.push((index * length + place - 1) as i64);
                targets.push(row.ids[place]);
                owners.push(index as i64);
            }
        }
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        Ok(Self {
            ids: tensor(&ids).view([rows.len() as i64, length as i64]),
            positions: tensor(&positions),
            targets: tensor(&targets),
            row: tensor(&owners),
        })
    }

    /// Targets in the batch.
    pub fn count(&self) -> i64 {
        self.targets.size()[0]
    }

    /// The hidden states `[N, H]` that predict the targets, of all hidden states `[B, T, H]`.
    pub fn select(&self, hidden: &Tensor) -> Tensor {
        hidden.flatten(0, 1).index_select(0, &self.positions)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::Kind;

    use super::*;
    use crate::loss::{supervised_loss, token_logprobs};
    use crate::model::Transformer;
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
        let batch = Batch::new(&borrowed(&rows), 0, Device::Cpu).expect("a batch");
        assert_eq!(batch.ids.size(), [10, 9]);
        assert_eq!(batch.count() as u64, borrowed(&rows).iter().map(Row::targets).sum::<u64>());
        let following = batch.ids.flatten(0, 1).index_select(0, &(&batch.positions + 1));
        assert_eq!(following, batch.targets);
        assert_eq!(batch.positions.divide_scalar_mode(9, "floor"), batch.row);
    }

    #[test]
    fn rows_that_cannot_be_trained_on_are_refused() {
        let error = |ids: &[i64], mask: &[u8]| {
            Batch::new(&[Row { ids, mask }], 0, Device::Cpu).expect_err("it is refused").to_string()
        };
        assert!(error(&[1, 2], &[0]).contains("mask has 1"));
        assert!(error(&[1, 2], &[1, 1]).contains("first token"));
        assert!(error(&[], &[]).contains("empty"));
        let none = Batch::new(&[Row { ids: &[1], mask: &[0] }], 0, Device::Cpu).expect("no target is no error");
        assert_eq!(none.count(), 0);
    }

    /// A table-driven model: the summed log-probability by the batch is that of a loop over the table of next tokens.
    #[test]
    fn summed_log_probabilities_are_those_of_brute_force() {
        let table: Vec<f32> = (0..169).map(|index| ((index * 37 % 101) as f32 / 20.0).sin() * 2.0).collect();
        let logits = Tensor::from_slice(&table).view([13, 13]);
        let rows = rows();
        let batch = Batch::new(&borrowed(&rows), 0, Device::Cpu).expect("a batch");
        let hidden = logits.index_select(0, &batch.ids.flatten(0, 1)).view([10, 9, 13]);
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
            let batch = Batch::new(&borrowed(chunk), 0, Device::Cpu).expect("a batch");
            let logits = model.logits(&batch.select(&model.hidden(&batch.ids)));
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
}
