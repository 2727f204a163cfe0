//! A training under way: the model, its optimizer, the best weights so far, and a loop's own counters.
//!
//! [`Training`] is the whole mutable state of a loop, and exactly what its training state on disk holds; what is not in
//! it is a pure function of parameters and inputs. The loops are in `kinds`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use pipe::pipeline::stage::StageContext;
use pipe::stages::training::{Lora, Optimizer, Precision};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor, no_grad};

use crate::model::new_tokens::{self, Occurred};
use crate::model::{self, Transformer};
use crate::optimizer::AdamW;
use crate::training_state::{self, State};

/// Everything of a loop that changes from step to step.
pub struct Training<C> {
    /// The weights.
    pub model: Transformer,
    /// AdamW and its moments.
    pub optimizer: AdamW,
    /// Steps done, and what the loop counts.
    pub counters: Counters<C>,
    /// The weights at the best validation, `[P]` f32.
    best: Option<Tensor>,
    folder: PathBuf,
}

/// The plain numbers of a training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters<C> {
    /// Steps done.
    pub step: u64,
    /// The metrics of the last step, while its validation is still due. They are recorded with the validation's.
    pub unrecorded: Option<BTreeMap<String, f64>>,
    /// The best validation so far.
    pub best: Option<Best>,
    /// Updates that the optimizer has made.
    updates: u64,
    /// The new tokens of the model that the training has met.
    #[serde(default)]
    pub occurred: Occurred,
    /// Those of them that it had met at the best validation.
    #[serde(default, skip_serializing_if = "Occurred::is_empty")]
    best_occurred: Occurred,
    /// The loop's own.
    pub own: C,
}

/// The name of the term by which the best weights are chosen.
pub const VALIDATE: &str = "validate";
/// Before the names of the weights to which a KL is measured, in a published state.
const REFERENCE: &str = "reference.";

/// The entry of a published state with what a stage that goes on from it must agree with.
const TERMS: &str = "terms";

/// What a training rests on, by the name of the parameter.
pub type Terms = BTreeMap<String, Value>;

/// The final state of a training, as another stage takes it up.
pub struct Published {
    state: State,
    terms: Terms,
}

impl Published {
    /// Reads the artifact in `folder`.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let state = training_state::load(folder)?;
        let state = state.with_context(|| format!("`{}` has no whole training state", folder.display()))?;
        let terms = Terms::deserialize(&state.json[TERMS]).context("the training state tells no terms")?;
        Ok(Self { state, terms })
    }

    /// Steps that it has done.
    pub fn steps(&self) -> u64 {
        self.state.json["step"].as_u64().unwrap_or(0)
    }

    /// The model whose training it is, from the folder of the artifact; [`Training::resume`] fills in what is trained.
    pub fn model(
        &self,
        folder: &Path,
        device: Device,
        precision: Precision,
        lora: Option<&Lora>,
        seed: u64,
    ) -> anyhow::Result<Transformer> {
        Transformer::empty(folder, device, precision, lora.map(|lora| (lora, seed)), &self.state.tensors)
    }

    /// The weights that the first of the trainings in a row began with, for a KL to be measured to; an error where none
    /// were kept.
    pub fn reference(&self, folder: &Path, device: Device, precision: Precision) -> anyhow::Result<Transformer> {
        let kept = |prefix: &&str| self.state.tensors.keys().any(|name| name.starts_with(prefix));
        let prefix = [REFERENCE, model::BASE].into_iter().find(kept).context(
            "this stage measures a KL to the weights that training began with, but the training to go on from has kept \
             none: set `kl.beta` to 0, or begin anew from its weights with `model`",
        )?;
        Transformer::restored(folder, device, precision, prefix, &self.state.tensors)
    }

    /// The value of a term.
    pub fn term(&self, name: &str) -> &Value {
        self.terms.get(name).unwrap_or(&Value::Null)
    }

    /// Refuses a stage of `steps` steps whose terms differ, those in `free` left aside.
    pub fn check(&self, wanted: &Terms, steps: u64, free: &[&str]) -> anyhow::Result<()> {
        let mut differ = Vec::new();
        for (name, wanted) in wanted.iter().filter(|(name, _)| !free.contains(&name.as_str())) {
            let found = self.term(name);
            if found != wanted {
                differ.push(format!("`{name}` is {wanted} here and was {found}"));
            }
        }
        ensure!(
            differ.is_empty(),
            "this stage cannot go on from that training: {}; make them equal, or begin anew from its weights with `model`",
            differ.join(", ")
        );
        ensure!(
            self.steps() < steps,
            "the training to go on from has done {} steps, and `steps` is {steps}: it counts those, too",
            self.steps()
        );
        Ok(())
    }
}

/// A validation that has beaten those before it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step after which it was made.
    pub step: u64,
    /// The mean of the selecting measurement.
    pub value: f64,
}

impl<C: Default + Serialize + DeserializeOwned> Training<C> {
    /// The training whose newest state lies in `folder`, or else one that goes on from the published state `from`, or else
    /// one at its beginning; the flag says whether steps are done.
    pub fn resume(
        model: Transformer,
        optimizer: &Optimizer,
        folder: &Path,
        from: Option<&Published>,
    ) -> anyhow::Result<(Self, bool)> {
        std::fs::create_dir_all(folder).with_context(|| format!("creating the folder `{}`", folder.display()))?;
        let optimizer = AdamW::new(model.weights(), optimizer);
        let mut training =
            Self { model, optimizer, counters: Counters::default(), best: None, folder: folder.to_owned() };
        let saved = training_state::load(folder)?;
        let Some(state) = saved.as_ref().or(from.map(|from| &from.state)) else { return Ok((training, false)) };
        training.counters = state.read()?;
        let weights = training.model.weights();
        weights.fill("weights.", weights.flat(), &state.tensors)?;
        training.optimizer.load_state(weights, &state.tensors, training.counters.updates)?;
        if training.counters.best.is_some() {
            let best = weights.flat().zeros_like();
            weights.fill("best.", &best, &state.tensors)?;
            training.best = Some(best);
        }
        Ok((training, true))
    }

    /// Saves the state durably.
    pub fn save(&mut self) -> anyhow::Result<()> {
        let state = self.state()?;
        training_state::save(&self.folder, &state)
    }

    fn state(&mut self) -> anyhow::Result<State> {
        let weights = self.model.weights();
        self.counters.updates = self.optimizer.steps();
        // A step is saved before its validation (unrecorded) or after it, in this order.
        let sequence = 2 * self.counters.step + u64::from(self.counters.unrecorded.is_none());
        let mut state = State::new(sequence, &self.counters)?;
        state.tensors.extend(weights.named("weights.", weights.flat()));
        state.tensors.extend(self.optimizer.state(weights));
        if let Some(best) = &self.best {
            state.tensors.extend(weights.named("best.", best));
        }
        Ok(state)
    }

    /// Keeps the weights as they are now if `value` is higher than at every validation before: the earliest wins a tie.
    pub fn consider(&mut self, value: f64) {
        if self.counters.best.is_none_or(|best| value > best.value) {
            self.counters.best = Some(Best { step: self.counters.step, value });
            self.counters.best_occurred = self.counters.occurred.clone();
            self.best = Some(no_grad(|| self.model.weights().flat().copy()));
        }
    }

    /// Tells what became of the new tokens of the model in `folder`; a row that was used and has not moved is an error.
    pub fn audit(&self, folder: &Path, context: &mut StageContext) -> anyhow::Result<()> {
        // Below adapters no row of a token moves, and a training that needs one to move has not begun.
        if self.model.has_adapters() {
            return Ok(());
        }
        if let Some(audit) = new_tokens::audit(folder, &self.model, &self.counters.occurred)? {
            context.note(audit.to_string());
        }
        Ok(())
    }

    /// Tells that this training goes on from `from`, where no step of its own is done yet, and forgets the best validation
    /// so far if another validation chose it; gives whether it is at that place.
    pub fn goes_on(&mut self, from: &Published, terms: &Terms, context: &mut StageContext) -> bool {
        let begins = self.counters.step == from.steps();
        if begins {
            context.note(format!("goes on behind step {} of another training", from.steps()));
            if self.counters.best.is_some() && *from.term(VALIDATE) != terms[VALIDATE] {
                context.note("the best weights so far are forgotten, because another validation chose them");
                (self.counters.best, self.best) = (None, None);
                self.counters.best_occurred = Occurred::default();
            }
        }
        begins
    }

    /// Writes the state to `folder` for another stage to go on from, under `terms`; `companions` is the model's folder and
    /// `reference` what a KL is measured to.
    pub fn publish_state(
        &mut self,
        folder: &Path,
        companions: &Path,
        terms: &Terms,
        reference: Option<&Transformer>,
    ) -> anyhow::Result<()> {
        let mut state = self.state()?;
        let frozen = self.model.frozen();
        // Frozen weights below adapters are the reference themselves.
        if let Some(reference) = reference.map(Transformer::base).filter(|_| frozen.is_empty()) {
            let wide = |(name, tensor): (String, Tensor)| (name, tensor.to_kind(Kind::Float));
            state.tensors.extend(reference.tensors(REFERENCE).into_iter().map(wide));
        }
        state.tensors.extend(frozen);
        state.json[TERMS] = serde_json::to_value(terms).context("the terms of a training are plain data")?;
        training_state::save(folder, &state)?;
        model::save_companions(companions, folder)
    }

    /// Writes the weights as they are to `last` and those of the best validation to `best`, the last where there was none.
    pub fn publish(&mut self, last: &Path, best: &Path, companions: &Path) -> anyhow::Result<()> {
        self.model.save(last, companions)?;
        if let Some(weights) = &self.best {
            no_grad(|| self.model.weights().flat().shallow_clone().copy_(weights));
        }
        self.model.save(best, companions)?;
        // What the best weights had met is what was trained of them, not what came after.
        let at_best = if self.best.is_some() { &self.counters.best_occurred } else { &self.counters.occurred };
        new_tokens::carry(last, &self.counters.occurred)?;
        new_tokens::carry(best, at_best)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sandbox;

    #[test]
    fn the_best_weights_have_met_what_came_before_them_whether_stopped_or_not() {
        let (folder, _) = sandbox::model(&json!({}));
        let file = json!({"ids": [10, 11], "tokens": ["<up>", "<down>"], "rows": {"init": "mean", "std": 0.0}});
        std::fs::write(folder.path().join("new_tokens.json"), file.to_string()).unwrap();
        let optimizer: Optimizer = serde_json::from_value(json!({})).unwrap();
        let left = |stopped: bool| {
            let work = tempfile::tempdir().unwrap();
            let open = || {
                let model = Transformer::load(folder.path(), Device::Cpu).unwrap();
                let states = work.path().join("states");
                let (mut training, _) = Training::<u64>::resume(model, &optimizer, &states, None).unwrap();
                training.counters.occurred.watch(folder.path()).unwrap();
                training
            };
            let mut training = open();
            training.counters.occurred.note(&[10, 5], &[0, 1]);
            training.consider(1.0);
            if stopped {
                training.save().unwrap();
                training = open();
            }
            training.counters.occurred.note(&[11, 5], &[0, 1]);
            training.consider(0.5);
            let outputs = ["last", "best"].map(|name| work.path().join(name));
            for output in &outputs {
                std::fs::create_dir(output).unwrap();
            }
            training.publish(&outputs[0], &outputs[1], folder.path()).unwrap();
            outputs.map(|output| std::fs::read_to_string(output.join("new_tokens.json")).ok())
        };
        let [last, best] = left(false);
        assert_eq!(last, None);
        assert!(best.as_ref().is_some_and(|best| best.contains("<down>") && !best.contains("<up>")), "{best:?}");
        assert_eq!(left(true), [last, best]);
    }
}
