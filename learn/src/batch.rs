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
    ///
    /// `embedding` is used for its backward pass, which is fast and reproducible where rows are picked.
    pub fn select(&self, hidden: &Tensor) -> Tensor {
        Tensor::embedding(&hidden.flatten(0, 1), &self.positions, -1, false, false)
    }
}
