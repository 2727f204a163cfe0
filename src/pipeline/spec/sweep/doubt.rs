//! Arms whose values read the same. Whether they are the same is not for their text to say: what is written in two folders may
//! name two files.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value as Json;

use crate::pipeline::spec::Trial;
use crate::pipeline::spec::diagnostic::Mistake;

/// An arm that reads the same as another.
pub(in crate::pipeline::spec) struct Doubt {
    /// The arm.
    pub(super) arm: String,
    /// The other.
    pub(super) same: String,
    /// What is to be said where they are the same.
    mistake: Mistake,
}

impl Doubt {
    pub(super) fn new(arm: &str, same: &str, mistake: Mistake) -> Self {
        Self { arm: arm.to_owned(), same: same.to_owned(), mistake }
    }

    /// What is to be said of it, unless a trial of the one arm differs from that of the other.
    pub(in crate::pipeline::spec) fn settled(self, trials: &[&Trial]) -> Option<Mistake> {
        let is_of = |trial: &&&Trial, name: &str| trial.assignment.get("arm").and_then(Json::as_str) == Some(name);
        let others: HashMap<String, &Trial> = trials
            .iter()
            .filter(|trial| is_of(trial, &self.same))
            .map(|trial| (beside_the_arm(trial), *trial))
            .collect();
        let mut own = trials.iter().filter(|trial| is_of(trial, &self.arm));
        let is_same =
            own.all(|trial| others.get(&beside_the_arm(trial)).is_none_or(|other| does_the_same(trial, other)));
        is_same.then_some(self.mistake)
    }
}

/// What a trial is assigned beside its arm.
fn beside_the_arm(trial: &Trial) -> String {
    let values = trial.assignment.iter().filter(|(path, _)| *path != "arm");
    Json::Object(values.map(|(path, value)| (path.clone(), value.clone())).collect()).to_string()
}

fn does_the_same(one: &Trial, other: &Trial) -> bool {
    one.stages.len() == other.stages.len()
        && one.stages.iter().zip(&other.stages).all(|((name, a), (other_name, b))| {
            let is_same = || a.kind.name == b.kind.name && a.stage.params() == b.stage.params();
            name == other_name && (Arc::ptr_eq(&a.stage, &b.stage) || is_same())
        })
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::{Files, PIPELINE};

    #[test]
    fn one_text_in_two_folders_may_name_two_files() {
        let pipeline = PIPELINE.replace("splits =", "source = \"rows.jsonl\"\nsplits =");
        let arm = "[sweep]\narm = [{ name = \"other\", stages.data.source = \"rows.jsonl\" }]\n";
        let read = |sweep: &str| {
            let own = format!("extends = \"base/p.toml\"\n{sweep}");
            let base = [("base/p.toml", pipeline.as_str()), ("base/rows.jsonl", "1"), ("rows.jsonl", "2")];
            Files::new(&[&base[..], &[("a.toml", own.as_str())]].concat()).good("a.toml", &[])
        };
        let trials = read(arm).trials;
        let source = |trial: usize| trials[trial].stages["data"].stage.params()["source"].to_string();
        assert!(source(0).contains("/base/rows.jsonl") && !source(1).contains("base"), "{} {}", source(0), source(1));
        let tuned = "seeds = { path = \"params.seed\", values = [1] }\n[sweep.tune]\nseeds = [101]\n\
                     grid = { \"params.rate\" = [0.1, 0.2] }\nmetric = \"score.solved\"\n";
        assert_eq!(read(&format!("{arm}{tuned}")).tuning.unwrap().arms.len(), 2);
    }

    #[test]
    fn one_text_in_two_folders_is_the_same_where_it_names_no_file() {
        let pipeline = PIPELINE.replace("steps = 10", "steps = 10\nnote = \"long\"");
        let own = "extends = \"base/p.toml\"\n[sweep]\ngrid = { \"params.seed\" = [1, 2] }\n\
                   [[sweep.arm]]\nname = \"other\"\nstages.train.note = \"long\"\n";
        insta::assert_snapshot!(Files::new(&[("base/p.toml", &pipeline), ("a.toml", own)]).bad("a.toml", &[]), @r#"
            error: the arm `other` changes nothing
             --> a.toml:5:8
            5 | name = "other"
              |        ^^^^^^^ every value is what it is without the arm
        "#);
    }
}
