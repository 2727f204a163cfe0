//! A stage that is a pure function of what it is given, and that leaves a line outside the store each time it runs.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::stage::{Any, ArtifactType, Input, Output, Part, SourceFile, Stage, StageContext};

/// The file beside the store in which every run of a probe is a line: counted without asking the engine.
pub(super) const RAN: &str = "ran";

/// How the outputs of a probe depend on what it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Shape {
    /// On everything.
    #[default]
    Everything,
    /// On nothing: whatever changes above, what follows is cut off.
    Constant,
    /// On the first byte of each input and on the file: most changes above are cut off.
    FirstBytes,
    /// It passes its first input on: two stages share one object.
    Same,
}

/// The bytes of an output's files by path.
pub(super) type Content = BTreeMap<String, Vec<u8>>;

/// Everything that a result may depend on, and nothing else: equal tuples are one result, others are others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tuple {
    pub(super) kind: u8,
    pub(super) version: u32,
    /// The kind's part and its version.
    pub(super) part: Option<(u8, u32)>,
    pub(super) shape: Shape,
    pub(super) text: u8,
    pub(super) outputs: u8,
    pub(super) inputs: Vec<Content>,
    pub(super) file: Option<Vec<u8>>,
}

impl Tuple {
    /// The outputs, from scratch.
    pub(super) fn compute(&self) -> Vec<Content> {
        let whole = self.line();
        let name = |content: &str, output: u8| blake3::hash(format!("{output} {content}").as_bytes()).to_hex();
        let first = |content: &Content| content.values().next().and_then(|bytes| bytes.first().copied());
        let of = |output| match self.shape {
            Shape::Constant => Content::from([("text".to_owned(), b"constant".to_vec())]),
            Shape::Same if !self.inputs.is_empty() => self.inputs[0].clone(),
            Shape::FirstBytes => {
                let firsts: Vec<_> = self.inputs.iter().map(first).collect();
                let text = name(&format!("{firsts:?} {:?}", self.file), output).to_string();
                Content::from([("text".to_owned(), text.into_bytes())])
            }
            Shape::Everything | Shape::Same => {
                let text = name(&whole, output).to_string();
                // A second file, in a folder.
                let long = text.repeat(10);
                Content::from([("deep/long".to_owned(), long.into_bytes()), ("text".to_owned(), text.into_bytes())])
            }
        };
        (0..self.outputs).map(of).collect()
    }

    /// A line that stands for it.
    pub(super) fn line(&self) -> String {
        let Self { kind, version, part, shape, text, outputs, inputs, file } = self;
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{kind} {version} {part:?} {shape:?} {text} {outputs} {}", inputs.len()).as_bytes());
        for (path, bytes) in inputs.iter().flatten() {
            hasher.update(format!(" {path} {} ", bytes.len()).as_bytes()).update(bytes);
        }
        hasher.update(format!(" {}", file.is_some()).as_bytes()).update(file.as_deref().unwrap_or_default());
        hasher.finalize().to_hex().to_string()
    }
}

/// See the module.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub(super) struct Probe {
    pub(super) shape: Shape,
    pub(super) text: u8,
    pub(super) count: u8,
    pub(super) inputs: Vec<Input<Any>>,
    pub(super) file: Option<SourceFile>,
    /// Code, not parameters: the kind's number and version, and its part's.
    #[serde(skip)]
    pub(super) code: (u8, u32, Option<(u8, u32)>),
}

impl Stage for Probe {
    const KIND: &'static str = "probe";
    const VERSION: u32 = 0;

    fn outputs(&self) -> Vec<Output> {
        (0..self.count).map(|output| Output::new(format!("o{output}"), ArtifactType::Files)).collect()
    }

    fn parts(&self) -> Vec<Part> {
        self.code.2.iter().map(|(part, version)| Part::new(format!("task.{part}"), *version)).collect()
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let inputs: anyhow::Result<_> = self.inputs.iter().map(|input| Ok(read(context.input(input)?))).collect();
        let file = self.file.as_ref().map(|file| std::fs::read(&file.path)).transpose()?;
        let (kind, version, part) = self.code;
        let (shape, text, outputs) = (self.shape, self.text, self.count);
        let tuple = Tuple { kind, version, part, shape, text, outputs, inputs: inputs?, file };
        for (output, content) in tuple.compute().iter().enumerate() {
            for (path, bytes) in content {
                let path = context.output(&format!("o{output}")).join(path);
                std::fs::create_dir_all(path.parent().unwrap())?;
                std::fs::write(path, bytes)?;
            }
        }
        // `<place>/store/logs/<key>`
        let ran = context.logs.ancestors().nth(3).unwrap().join(RAN);
        let mut ran = std::fs::File::options().create(true).append(true).open(ran)?;
        Ok(ran.write_all(format!("{}\n", tuple.line()).as_bytes())?)
    }
}

/// Every file below a folder, by its path.
pub(super) fn read(folder: &Path) -> Content {
    let mut found = Content::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&next) else { continue };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                open.push(path);
            } else if let Ok(bytes) = std::fs::read(&path) {
                found.insert(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned(), bytes);
            }
        }
    }
    found
}
