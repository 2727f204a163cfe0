//! Why a node runs, in the words of the person who changed something: the parts of its key beside those of the last
//! recorded run of the same name.
//!
//! It must never decide anything: the state of a node rests on keys alone.

use std::fmt;
use std::path::Path;

use serde_json::Value;

use crate::pipeline::store::{Digest, KeyParts};

/// The characters of a value that are shown.
const SHOWN: usize = 40;

/// A reason why a node runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// No run under any of its names is recorded.
    NeverRun,
    /// A run was stopped before its end.
    Interrupted,
    /// The result is there and is not what was stored.
    Damaged {
        /// What is wrong.
        what: String,
    },
    /// It does not run: the result of another key was accepted.
    Accepted {
        /// Why, in the user's words.
        reason: String,
    },
    /// Nothing changed, but the result is not in the store.
    Gone,
    /// The stage is of another kind now.
    Kind {
        /// The kind before.
        old: String,
        /// The kind now.
        new: String,
    },
    /// The code of a kind or of one of its parts has another version.
    Version {
        /// `kind sft`, `task.maze`.
        of: String,
        /// The version before.
        old: Option<u32>,
        /// The version now.
        new: Option<u32>,
    },
    /// A parameter changed.
    Parameter {
        /// Its dotted path.
        path: String,
        /// The value before.
        old: Option<Value>,
        /// The value now.
        new: Option<Value>,
    },
    /// The content of a file changed.
    File {
        /// The file.
        name: String,
    },
    /// An input is there and is not what it was.
    InputDiffers {
        /// As the stage names it.
        reference: String,
    },
    /// An input is made in this run.
    InputRuns {
        /// As the stage names it.
        reference: String,
    },
    /// An input may be made in this run.
    InputMayRun {
        /// As the stage names it.
        reference: String,
    },
}

impl Reason {
    /// Whether the reason lies in an input that is not there yet: the early cutoff may prove it void.
    pub fn rests_on_a_run(&self) -> bool {
        matches!(self, Self::InputRuns { .. } | Self::InputMayRun { .. })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverRun => write!(f, "never run"),
            Self::Interrupted => write!(f, "was interrupted"),
            Self::Damaged { what } => write!(f, "its result is damaged: {what}"),
            Self::Accepted { reason } => write!(f, "accepted: {reason}"),
            Self::Gone => write!(f, "its result is no longer in the store"),
            Self::Kind { old, new } => write!(f, "kind changed ({old} => {new})"),
            Self::Version { of, old: Some(old), new: Some(new) } => write!(f, "{of} v{old} => v{new}"),
            Self::Version { of, old: None, new: Some(new) } => write!(f, "{of} v{new} is new"),
            Self::Version { of, .. } => write!(f, "{of} is no longer used"),
            Self::Parameter { path, old: Some(old), new: Some(new) } => {
                write!(f, "{path} changed ({} => {})", shown(old), shown(new))
            }
            Self::Parameter { path, old: None, new: Some(new) } => write!(f, "{path} added ({})", shown(new)),
            Self::Parameter { path, old, .. } => {
                write!(f, "{path} removed ({})", old.as_ref().map_or_else(String::new, shown))
            }
            Self::File { name } => write!(f, "file {name} changed"),
            Self::InputDiffers { reference } => write!(f, "input `{reference}` now differs"),
            Self::InputRuns { reference } => write!(f, "input `{reference}` runs"),
            Self::InputMayRun { reference } => write!(f, "input `{reference}` may run"),
        }
    }
}

fn shown(value: &Value) -> String {
    let text = match value.get("$input").or_else(|| value.get("$file")) {
        Some(Value::String(text)) => text.clone(),
        _ => match value.as_f64().filter(|number| number.abs() < 1e-3 && *number != 0.0) {
            // As people write learning rates.
            Some(number) => format!("{number:e}"),
            None => value.to_string(),
        },
    };
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// What is known of an input when planning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputNow {
    /// It is there.
    Is(Digest),
    /// It is made in this run.
    Runs,
    /// It may be made in this run.
    MayRun,
}

/// What a stage is now, for comparing with what it was.
pub struct Now<'a> {
    /// Its parts; `$input`s that are not there yet may be anything.
    pub parts: &'a KeyParts,
    /// Its serialised parameters, with references and paths.
    pub params: &'a Value,
    /// What is known of a reference.
    pub input: &'a dyn Fn(&str) -> InputNow,
    /// The digest of a path.
    pub file: &'a dyn Fn(&str) -> Option<Digest>,
}

impl Now<'_> {
    /// Every difference to what the stage was, the stage's own first.
    pub fn differences(&self, before: &KeyParts) -> Vec<Reason> {
        if before.kind != self.parts.kind {
            return vec![Reason::Kind { old: before.kind.clone(), new: self.parts.kind.clone() }];
        }
        let mut found = Vec::new();
        self.compare("", Some(self.params), Some(&before.params), &mut found);
        let mut version = |of: String, old: Option<u32>, new: Option<u32>| {
            if old != new {
                found.push(Reason::Version { of, old, new });
            }
        };
        version(format!("kind {}", before.kind), Some(before.version), Some(self.parts.version));
        version("random numbers".to_owned(), Some(before.rng_abi), Some(self.parts.rng_abi));
        let of =
            |parts: &KeyParts, name: &str| parts.parts.iter().find(|part| part.name == name).map(|part| part.version);
        let mut names: Vec<&str> =
            self.parts.parts.iter().chain(&before.parts).map(|part| part.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            version(name.to_owned(), of(before, name), of(self.parts, name));
        }
        found.sort_by_key(rank);
        found.dedup();
        found
    }

    /// Reasons that lie in inputs which are not there yet.
    pub fn pending_inputs(&self) -> Vec<Reason> {
        let mut found: Vec<Reason> = crate::pipeline::stage::references(self.params)
            .into_iter()
            .filter_map(|(reference, _)| match (self.input)(&reference) {
                InputNow::Is(_) => None,
                InputNow::Runs => Some(Reason::InputRuns { reference }),
                InputNow::MayRun => Some(Reason::InputMayRun { reference }),
            })
            .collect();
        found.sort_by_key(rank);
        found
    }

    fn compare(&self, path: &str, new: Option<&Value>, old: Option<&Value>, found: &mut Vec<Reason>) {
        let tagged =
            |value: Option<&Value>, tag: &str| value.and_then(|value| value.get(tag)?.as_str().map(str::to_owned));
        match (new, old) {
            (Some(new), Some(_)) if new.get("$input").is_some() => {
                if let (Some(reference), Some(before)) = (tagged(Some(new), "$input"), tagged(old, "$input")) {
                    found.extend(match (self.input)(&reference) {
                        InputNow::Is(digest) => (digest.0 != before).then_some(Reason::InputDiffers { reference }),
                        InputNow::Runs => Some(Reason::InputRuns { reference }),
                        InputNow::MayRun => Some(Reason::InputMayRun { reference }),
                    });
                    return;
                }
            }
            (Some(new), Some(_)) if new.get("$file").is_some() => {
                if let (Some(file), Some(before)) = (tagged(Some(new), "$file"), tagged(old, "$file")) {
                    let placed = tagged(Some(new), "as");
                    let same = (self.file)(&file).is_some_and(|digest| digest.0 == before);
                    if !same {
                        let name = Path::new(&file).file_name().map(|name| name.to_string_lossy().into_owned());
                        found.push(Reason::File { name: placed.or(name).unwrap_or(file) });
                    } else if placed != tagged(old, "as") {
                        let text = |placed: Option<String>| placed.map(Value::String);
                        let (old, new) = (text(tagged(old, "as")), text(placed));
                        found.push(Reason::Parameter { path: path.to_owned(), old, new });
                    }
                    return;
                }
            }
            (Some(Value::Object(new)), Some(Value::Object(old))) => {
                let mut names: Vec<&String> = new.keys().chain(old.keys()).collect();
                names.sort();
                names.dedup();
                for name in names {
                    self.compare(&join(path, name), new.get(name), old.get(name), found);
                }
                return;
            }
            (Some(Value::Array(new)), Some(Value::Array(old))) if new.len() == old.len() => {
                for (at, (new, old)) in new.iter().zip(old).enumerate() {
                    self.compare(&join(path, &at.to_string()), Some(new), Some(old), found);
                }
                return;
            }
            // In canonical JSON `1` and `1.0` are one number.
            (Some(Value::Number(new)), Some(Value::Number(old))) if new.as_f64() == old.as_f64() => return,
            (new, old) if new == old => return,
            _ => {}
        }
        found.push(Reason::Parameter { path: path.to_owned(), old: old.cloned(), new: new.cloned() });
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// The user's own changes come first, then code, then what follows from changes elsewhere.
fn rank(reason: &Reason) -> u8 {
    match reason {
        Reason::Damaged { .. } | Reason::Interrupted => 0,
        Reason::Kind { .. } | Reason::Parameter { .. } => 1,
        Reason::File { .. } => 2,
        Reason::Version { .. } => 3,
        Reason::InputDiffers { .. } => 4,
        Reason::InputRuns { .. } => 5,
        Reason::InputMayRun { .. } => 6,
        Reason::Gone | Reason::NeverRun | Reason::Accepted { .. } => 7,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pipeline::stage::Part;

    fn parts(version: u32, part: Part, params: Value) -> KeyParts {
        KeyParts { kind: "sft".into(), version, parts: vec![part], params, rng_abi: 1 }
    }

    #[test]
    fn each_sort_of_change_is_said_in_its_own_words() {
        let params = json!({
            "learning_rate": 2e-5, "steps": 10.0, "rewards": {"a": {"weight": 1}}, "list": [1, 2], "gone": null,
            "data": {"$file": "/home/me/data.jsonl"}, "model": {"$input": "sft", "wants": "checkpoint"},
            "tokens": {"$input": "tokens"}, "tokenizer": {"$input": "tokenizer"},
        });
        let before = json!({
            "learning_rate": 1e-5, "steps": 10, "rewards": {"b": {"weight": 1}}, "list": [1], "gone": null,
            "data": {"$file": "aa"}, "model": {"$input": "bb"}, "tokens": {"$input": "cc"}, "tokenizer": {"$input": "dd"},
        });
        let now = Now {
            parts: &parts(2, Part::new("task.maze", 2), json!({})),
            params: &params,
            input: &|reference| match reference {
                "sft" => InputNow::Is(Digest("other".into())),
                "tokens" => InputNow::Runs,
                _ => InputNow::Is(Digest("dd".into())),
            },
            file: &|_| Some(Digest("other".into())),
        };
        let found = now.differences(&parts(1, Part::new("task.maze", 1), before));
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "learning_rate changed (1e-5 => 2e-5)",
                "list changed ([1] => [1,2])",
                "rewards.a added ({\"weight\":1})",
                "rewards.b removed ({\"weight\":1})",
                "file data.jsonl changed",
                "kind sft v1 => v2",
                "task.maze v1 => v2",
                "input `sft` now differs",
                "input `tokens` runs",
            ]
        );
    }

    #[test]
    fn long_values_are_cut() {
        assert_eq!(shown(&json!("é".repeat(90))).chars().count(), SHOWN + 3);
        assert_eq!(shown(&json!({"$input": "sft"})), "sft");
    }
}
