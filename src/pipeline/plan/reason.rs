//! Why a node runs, in the words of the person who changed something: the parts of its key beside those of the last
//! recorded run of the same name.
//!
//! It must never decide anything: the state of a node rests on keys alone.

use std::fmt;
use std::path::Path;

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::pipeline::store::{Digest, KeyParts, Manifest, Reached};

/// The characters of a value that are shown.
const SHOWN: usize = 40;

/// A reason why a node runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// No run under any of its names is recorded.
    NeverRun,
    /// No run of its trial is recorded, and there are runs of other trials of the experiment.
    NewTrial,
    /// A run was stopped before its end.
    Interrupted {
        /// How far it had come, where that was written down.
        reached: Option<Reached>,
    },
    /// The last attempt failed.
    Failed {
        /// The first line of its error.
        error: String,
    },
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
    Removed,
    /// Something changed since the last run, and of its result nothing is left that would say what.
    ChangedSinceRemoved,
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
        /// The file, absolute.
        path: String,
    },
    /// An input is there and is not what it was.
    InputDiffers {
        /// As the stage names it.
        reference: String,
        /// The output of the producer.
        output: String,
        /// As the stage named it before, where that was otherwise.
        was: Option<String>,
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

    /// The input in which the reason lies, if it lies in one.
    pub fn input(&self) -> Option<&str> {
        match self {
            Self::InputDiffers { reference, .. } | Self::InputRuns { reference } | Self::InputMayRun { reference } => {
                Some(reference)
            }
            _ => None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverRun => write!(f, "never run"),
            Self::NewTrial => write!(f, "new trial"),
            Self::Interrupted { reached: None } => write!(f, "was interrupted"),
            Self::Interrupted { reached: Some(Reached { done, total, unit }) } => {
                write!(f, "was interrupted at {done} of {total} {unit}")
            }
            Self::Failed { error } => write!(f, "failed last time: {error}"),
            Self::Damaged { what } => write!(f, "its result is damaged: {what}"),
            Self::Accepted { reason } => write!(f, "accepted: {reason}"),
            Self::Removed => write!(f, "its result was removed"),
            Self::ChangedSinceRemoved => write!(f, "changed since its last run, whose result was removed"),
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
            Self::File { path } => write!(f, "file {} changed", beneath_here(Path::new(path)).display()),
            Self::InputDiffers { reference, output, was } => {
                write!(f, "input `{reference}` now differs")?;
                match (reference.contains('.'), was) {
                    (_, Some(was)) => write!(f, " (it was `{was}`)"),
                    (false, None) => write!(f, " (its output `{output}`)"),
                    (true, None) => Ok(()),
                }
            }
            Self::InputRuns { reference } => write!(f, "input `{reference}` runs"),
            Self::InputMayRun { reference } => write!(f, "input `{reference}` may run"),
        }
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A path as people see it from the folder in which they are: relative where it lies below.
fn beneath_here(path: &Path) -> &Path {
    let here = std::env::current_dir().ok();
    here.and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path)
}

fn shown(value: &Value) -> String {
    let text = plain(value);
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// A value as people write it; edges and files by their names.
fn plain(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(text)) =
                fields.get("as").or_else(|| fields.get("$input")).or_else(|| fields.get("$file"))
            {
                return text.clone();
            }
            let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{name} = {}", plain(value))).collect();
            format!("{{ {} }}", fields.join(", "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(plain).collect::<Vec<_>>().join(", ")),
        Value::Number(number) => match number.as_f64().filter(|number| number.abs() < 1e-3 && *number != 0.0) {
            // As people write learning rates.
            Some(number) => format!("{number:e}"),
            None => value.to_string(),
        },
        Value::Null => "nothing".to_owned(),
        other => other.to_string(),
    }
}

/// What is known of an input when planning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputNow {
    /// It is there.
    Is {
        /// The digest of its content.
        digest: Digest,
        /// The output of the producer.
        output: String,
    },
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
    pub fn differences(&self, last: &Manifest) -> Vec<Reason> {
        let before = &last.parts;
        if before.kind != self.parts.kind {
            return vec![Reason::Kind { old: before.kind.clone(), new: self.parts.kind.clone() }];
        }
        let mut found = Vec::new();
        let before_by_name = Some(&last.params);
        self.compare("", Some(self.params), Some(&before.params), before_by_name, &mut found);
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

    /// Compares what stands at a path now with what stood there, whose edges are digests, and `named`, whose edges are names.
    fn compare(
        &self,
        path: &str,
        new: Option<&Value>,
        old: Option<&Value>,
        named: Option<&Value>,
        found: &mut Vec<Reason>,
    ) {
        let tagged =
            |value: Option<&Value>, tag: &str| value.and_then(|value| value.get(tag)?.as_str().map(str::to_owned));
        match (new, old) {
            (Some(new), Some(_)) if new.get("$input").is_some() => {
                if let (Some(reference), Some(before)) = (tagged(Some(new), "$input"), tagged(old, "$input")) {
                    found.extend(match (self.input)(&reference) {
                        InputNow::Is { digest, .. } if digest.0 == before => None,
                        InputNow::Is { output, .. } => {
                            let was = tagged(named, "$input").filter(|was| *was != reference);
                            Some(Reason::InputDiffers { reference, output, was })
                        }
                        InputNow::Runs => Some(Reason::InputRuns { reference }),
                        InputNow::MayRun => Some(Reason::InputMayRun { reference }),
                    });
                    return;
                }
            }
            (Some(new), Some(_)) if new.get("$file").is_some() => {
                if let (Some(path_now), Some(before)) = (tagged(Some(new), "$file"), tagged(old, "$file")) {
                    let (placed, placed_before) = (tagged(Some(new), "as"), tagged(old, "as"));
                    if placed != placed_before {
                        let text = |placed: Option<String>| placed.map(Value::String);
                        let (old, new) = (text(placed_before), text(placed));
                        found.push(Reason::Parameter { path: path.to_owned(), old, new });
                    } else if (self.file)(&path_now).is_none_or(|digest| digest.0 != before) {
                        found.push(Reason::File { path: path_now });
                    }
                    return;
                }
            }
            (Some(Value::Object(new)), Some(Value::Object(old))) => {
                let mut names: Vec<&String> = new.keys().chain(old.keys()).collect();
                names.sort();
                names.dedup();
                for name in names {
                    let named = named.and_then(|named| named.get(name));
                    self.compare(&join(path, name), new.get(name), old.get(name), named, found);
                }
                return;
            }
            (Some(Value::Array(new)), Some(Value::Array(old))) if new.len() == old.len() => {
                for (at, (new, old)) in new.iter().zip(old).enumerate() {
                    let named = named.and_then(|named| named.get(at));
                    self.compare(&join(path, &at.to_string()), Some(new), Some(old), named, found);
                }
                return;
            }
            // In canonical JSON `1` and `1.0` are one number.
            (Some(Value::Number(new)), Some(Value::Number(old))) if new.as_f64() == old.as_f64() => return,
            (new, old) if new == old => return,
            _ => {}
        }
        // What was there is shown by its names, not by the digests that stand for them.
        let old = old.map(|old| named.unwrap_or(old).clone());
        found.push(Reason::Parameter { path: path.to_owned(), old, new: new.cloned() });
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// The user's own changes come first, then code, then what follows from changes elsewhere.
fn rank(reason: &Reason) -> u8 {
    match reason {
        Reason::Damaged { .. } | Reason::Interrupted { .. } | Reason::Failed { .. } => 0,
        Reason::Kind { .. } | Reason::Parameter { .. } => 1,
        Reason::File { .. } => 2,
        Reason::Version { .. } => 3,
        Reason::InputDiffers { .. } => 4,
        Reason::InputRuns { .. } => 5,
        Reason::InputMayRun { .. } => 6,
        Reason::Removed
        | Reason::ChangedSinceRemoved
        | Reason::NeverRun
        | Reason::NewTrial
        | Reason::Accepted { .. } => 7,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::pipeline::stage::Part;

    fn parts(version: u32, part: Part, params: Value) -> KeyParts {
        KeyParts { kind: "sft".into(), version, parts: vec![part], params, rng_abi: 1 }
    }

    fn made(parts: KeyParts, params: Value) -> Manifest {
        Manifest {
            key: Digest("k".into()),
            recipe: Digest("r".into()),
            parts,
            params,
            inputs: BTreeMap::new(),
            outputs: Vec::new(),
            seconds: 1.0,
            attempts: 1,
            finished: String::new(),
            numerics: BTreeMap::new(),
            metrics: BTreeMap::new(),
            accepted: None,
        }
    }

    #[test]
    fn each_sort_of_change_is_said_in_its_own_words() {
        let params = json!({
            "learning_rate": 2e-5, "steps": 10.0, "rewards": {"a": {"weight": 1}}, "list": [1, 2], "gone": null,
            "data": {"$file": "/home/me/data.jsonl"}, "files": [{"$file": "/a", "as": "a"}, {"$file": "/b", "as": "b"}], "model": {"$input": "sft", "wants": "checkpoint"},
            "tokens": {"$input": "tokens"}, "tokenizer": {"$input": "tokenizer"},
        });
        let before = json!({
            "learning_rate": 1e-5, "steps": 10, "rewards": {"b": {"weight": 1}}, "list": [1], "gone": null,
            "data": {"$file": "aa"}, "files": [{"$file": "other", "as": "a"}], "model": {"$input": "bb"}, "tokens": {"$input": "cc"}, "tokenizer": {"$input": "dd"},
        });
        let now = Now {
            parts: &parts(2, Part::new("task.maze", 2), json!({})),
            params: &params,
            input: &|reference| match reference {
                "sft" => InputNow::Is { digest: Digest("other".into()), output: "last".into() },
                "tokens" => InputNow::Runs,
                _ => InputNow::Is { digest: Digest("dd".into()), output: "tokenizer".into() },
            },
            file: &|_| Some(Digest("other".into())),
        };
        let named = json!({"model": {"$input": "base"}, "list": [1], "rewards": {"b": {"weight": 1}},
            "files": [{"$file": "/a", "as": "a"}]});
        let found = now.differences(&made(parts(1, Part::new("task.maze", 1), before), named));
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "files changed ([a] => [a, b])",
                "learning_rate changed (1e-5 => 2e-5)",
                "list changed ([1] => [1, 2])",
                "rewards.a added ({ weight = 1 })",
                "rewards.b removed ({ weight = 1 })",
                "file /home/me/data.jsonl changed",
                "kind sft v1 => v2",
                "task.maze v1 => v2",
                "input `sft` now differs (it was `base`)",
                "input `tokens` runs",
            ]
        );
    }

    #[test]
    fn long_values_are_cut() {
        assert_eq!(shown(&json!("é".repeat(90))).chars().count(), SHOWN + 3);
        assert_eq!(shown(&json!({"on": true, "rate": 1e-5})), "{ on = true, rate = 1e-5 }");
        assert_eq!(shown(&json!({"$input": "sft"})), "sft");
    }
}
