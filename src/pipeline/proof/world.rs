//! What a user has and does: a graph of probes in some trials, files, versions of code, and edits of all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use serde_json::json;

use super::probe::{Content, Probe, Shape, Tuple};
use crate::pipeline::fixture::{experiment, stage, trial};
use crate::pipeline::spec::Experiment;
use crate::pipeline::stage::{Input, SourceFile};

/// The user's files, kinds and parts: few, so that edits meet.
const FEW: u8 = 3;

/// The stages that a world has at most.
const MOST: usize = 9;

/// A stage of every trial.
#[derive(Clone, Debug)]
struct Model {
    /// Changes its place among the others as well.
    name: u8,
    kind: u8,
    part: Option<u8>,
    shape: Shape,
    text: u8,
    outputs: u8,
    /// A stage of a lower number, and its output.
    inputs: Vec<(u32, u8)>,
    file: Option<u8>,
}

/// Something that a user does between two runs.
#[derive(Clone, Copy, Debug)]
pub(super) enum Edit {
    Text {
        stage: u8,
        to: u8,
    },
    Shape {
        stage: u8,
        to: Shape,
    },
    Rename {
        stage: u8,
        to: u8,
    },
    Outputs {
        stage: u8,
        to: u8,
    },
    Add {
        shape: Shape,
        above: u8,
        file: u8,
        text: u8,
    },
    Remove {
        stage: u8,
    },
    Edge {
        stage: u8,
        above: u8,
        output: u8,
    },
    Unlink {
        stage: u8,
    },
    UseFile {
        stage: u8,
        file: u8,
    },
    /// All contents of a file are of one size; its time may be set back.
    File {
        file: u8,
        to: u8,
        keeps_time: bool,
    },
    Touch {
        file: u8,
    },
    Kind {
        kind: u8,
        to: u8,
    },
    Part {
        part: u8,
        to: u8,
    },
    Trial {
        stage: u8,
        to: u8,
    },
    DropTrial {
        trial: u8,
    },
}

pub(super) fn shapes() -> impl Strategy<Value = Shape> {
    prop_oneof![
        4 => Just(Shape::Everything),
        2 => Just(Shape::Constant),
        2 => Just(Shape::FirstBytes),
        1 => Just(Shape::Same)
    ]
}

pub(super) fn edits() -> impl Strategy<Value = Edit> {
    let few = || 0..FEW;
    let any = any::<u8>;
    prop_oneof![
        6 => (any(), few()).prop_map(|(stage, to)| Edit::Text { stage, to }),
        1 => (any(), shapes()).prop_map(|(stage, to)| Edit::Shape { stage, to }),
        2 => (any(), few()).prop_map(|(stage, to)| Edit::Rename { stage, to }),
        1 => (any(), few()).prop_map(|(stage, to)| Edit::Outputs { stage, to }),
        4 => (shapes(), any(), few(), few()).prop_map(|(shape, above, file, text)| Edit::Add { shape, above, file, text }),
        1 => any().prop_map(|stage| Edit::Remove { stage }),
        3 => (any(), any(), any()).prop_map(|(stage, above, output)| Edit::Edge { stage, above, output }),
        1 => any().prop_map(|stage| Edit::Unlink { stage }),
        1 => (any(), few()).prop_map(|(stage, file)| Edit::UseFile { stage, file }),
        4 => (few(), few(), proptest::bool::ANY)
            .prop_map(|(file, to, keeps_time)| Edit::File { file, to, keeps_time }),
        1 => few().prop_map(|file| Edit::Touch { file }),
        2 => (few(), few()).prop_map(|(kind, to)| Edit::Kind { kind, to }),
        2 => (few(), few()).prop_map(|(part, to)| Edit::Part { part, to }),
        2 => (any(), few()).prop_map(|(stage, to)| Edit::Trial { stage, to }),
        1 => any().prop_map(|trial| Edit::DropTrial { trial }),
    ]
}

/// Where a graph begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start {
    Fan,
    Chain,
    Diamond,
}

pub(super) fn starts() -> impl Strategy<Value = Start> {
    prop_oneof![Just(Start::Fan), Just(Start::Chain), Just(Start::Diamond)]
}

/// See the module.
#[derive(Debug)]
pub(super) struct World {
    stages: BTreeMap<u32, Model>,
    /// Each trial sets the texts of some stages.
    trials: Vec<BTreeMap<u32, u8>>,
    kinds: [u32; FEW as usize],
    parts: [u32; FEW as usize],
    files: [u8; FEW as usize],
    folder: PathBuf,
}

impl World {
    pub(super) fn new(start: Start, folder: &Path) -> Self {
        let model = |inputs: &[u32], file| Model {
            name: 0,
            kind: inputs.len() as u8,
            part: Some(0),
            shape: Shape::Everything,
            text: 0,
            outputs: 2,
            inputs: inputs.iter().map(|above| (*above, 0)).collect(),
            file,
        };
        let inputs: &[&[u32]] = match start {
            Start::Fan => &[&[], &[0], &[0], &[0]],
            Start::Chain => &[&[], &[0], &[1], &[2]],
            Start::Diamond => &[&[], &[0], &[0], &[1, 2]],
        };
        let numbered = (0..).zip(inputs);
        let stages = numbered.map(|(id, inputs)| (id, model(inputs, (id == 0).then_some(0)))).collect();
        let world = Self {
            stages,
            trials: vec![BTreeMap::new()],
            kinds: [1; FEW as usize],
            parts: [1; FEW as usize],
            files: [0; FEW as usize],
            folder: folder.to_owned(),
        };
        (0..FEW).for_each(|file| std::fs::write(world.path(file), world.content(file)).unwrap());
        world
    }

    pub(super) fn edit(&mut self, edit: Edit) {
        let stage = |number: u8| *self.stages.keys().nth(usize::from(number) % self.stages.len()).unwrap();
        match edit {
            Edit::Text { stage: number, to } => self.model(stage(number)).text = to,
            Edit::Shape { stage: number, to } => self.model(stage(number)).shape = to,
            Edit::Rename { stage: number, to } => self.model(stage(number)).name = to,
            Edit::Outputs { stage: number, to } => {
                let id = stage(number);
                // Those that are used stay.
                let used = self.stages.values().flat_map(|model| &model.inputs).filter(|(above, _)| *above == id);
                let used = used.map(|(_, output)| output + 1).max().unwrap_or(1);
                self.model(id).outputs = used.max(to + 1);
            }
            Edit::Add { shape, above, file, text } => {
                if self.stages.len() < MOST {
                    let (id, above) = (self.stages.keys().last().unwrap() + 1, stage(above));
                    let (file, inputs) = ((file > 0).then_some(file), vec![(above, 0)]);
                    let (kind, part) = (text, (file != Some(1)).then_some(text));
                    let model = Model { name: 1, kind, part, shape, text, outputs: 1, inputs, file };
                    self.stages.insert(id, model);
                }
            }
            Edit::Remove { stage: number } => {
                let id = stage(number);
                if self.stages.len() > 1 {
                    self.stages.remove(&id);
                    self.stages.values_mut().for_each(|model| model.inputs.retain(|(above, _)| *above != id));
                    self.trials.iter_mut().for_each(|trial| trial.retain(|stage, _| *stage != id));
                }
            }
            Edit::Edge { stage: number, above, output } => {
                let (id, above) = (stage(number).max(stage(above)), stage(number).min(stage(above)));
                let output = output % self.stages[&above].outputs;
                if id != above {
                    self.model(id).inputs.push((above, output));
                }
            }
            Edit::Unlink { stage: number } => drop(self.model(stage(number)).inputs.pop()),
            Edit::UseFile { stage: number, file } => self.model(stage(number)).file = Some(file),
            Edit::File { file, to, keeps_time } => {
                let modified = std::fs::metadata(self.path(file)).unwrap().modified().unwrap();
                self.files[usize::from(file)] = to;
                std::fs::write(self.path(file), self.content(file)).unwrap();
                if keeps_time {
                    set_modified(&self.path(file), modified);
                }
            }
            Edit::Touch { file } => set_modified(&self.path(file), SystemTime::now() + Duration::from_secs(100)),
            Edit::Kind { kind, to } => self.kinds[usize::from(kind)] = u32::from(to),
            Edit::Part { part, to } => self.parts[usize::from(part)] = u32::from(to),
            Edit::Trial { stage: number, to } => {
                let set = BTreeMap::from([(stage(number), to)]);
                if self.trials.len() < 3 {
                    self.trials.push(set);
                }
            }
            Edit::DropTrial { trial } => {
                if self.trials.len() > 1 {
                    self.trials.remove(usize::from(trial) % self.trials.len());
                }
            }
        }
    }

    fn model(&mut self, id: u32) -> &mut Model {
        self.stages.get_mut(&id).unwrap()
    }

    fn path(&self, file: u8) -> PathBuf {
        self.folder.join(format!("file-{file}"))
    }

    fn content(&self, file: u8) -> Vec<u8> {
        format!("content {} of file {file}\n", self.files[usize::from(file)]).into_bytes()
    }

    /// The name of a stage by its number among those that there are.
    pub(super) fn name_of(&self, number: u8) -> String {
        let ids: Vec<u32> = self.stages.keys().copied().collect();
        self.name(ids[usize::from(number) % ids.len()])
    }

    fn name(&self, id: u32) -> String {
        // Names sort by their letter, so that a renamed stage stands elsewhere.
        format!("{}{id}", ["m", "a", "z"][usize::from(self.stages[&id].name)])
    }

    fn code(&self, model: &Model) -> (u8, u32, Option<(u8, u32)>) {
        let kind = model.kind % FEW;
        let part = model.part.map(|part| (part, self.parts[usize::from(part)]));
        (kind, self.kinds[usize::from(kind)], part)
    }

    fn text(&self, trial: usize, id: u32) -> u8 {
        self.trials[trial].get(&id).copied().unwrap_or(self.stages[&id].text)
    }

    /// What the engine is given.
    pub(super) fn experiments(&self) -> [Experiment; 1] {
        let one = |number: usize| {
            let stages = self.stages.iter().map(|(id, model)| {
                let code = self.code(model);
                let mut spec = stage::<Probe>(&self.name(*id), json!({"count": 1}));
                spec.kind.name = ["one", "two", "three"][usize::from(code.0)];
                spec.kind.version = code.1;
                let reference = |(above, output): &(u32, u8)| Input::new(format!("{}.o{output}", self.name(*above)));
                spec.stage = Arc::new(Probe {
                    shape: model.shape,
                    text: self.text(number, *id),
                    count: model.outputs,
                    inputs: model.inputs.iter().map(reference).collect(),
                    file: model.file.map(|file| SourceFile { path: self.path(file) }),
                    code,
                });
                spec
            });
            trial(&format!("trial={number}"), stages.collect())
        };
        [experiment("toys", (0..self.trials.len()).map(one).collect())]
    }

    /// What must come out: the tuple and the outputs of every stage by trial and name, computed from scratch.
    pub(super) fn compute(&self) -> Expected {
        let mut stages = BTreeMap::new();
        for number in 0..self.trials.len() {
            let mut made: BTreeMap<u32, Vec<Content>> = BTreeMap::new();
            for (id, model) in &self.stages {
                let (kind, version, part) = self.code(model);
                let input = |(above, output): &(u32, u8)| made[above][usize::from(*output)].clone();
                let tuple = Tuple {
                    kind,
                    version,
                    part,
                    shape: model.shape,
                    text: self.text(number, *id),
                    outputs: model.outputs,
                    inputs: model.inputs.iter().map(input).collect(),
                    file: model.file.map(|file| self.content(file)),
                };
                let outputs = tuple.compute();
                made.insert(*id, outputs.clone());
                let above = model.inputs.iter().map(|(above, _)| self.name(*above)).collect();
                stages.insert((format!("trial={number}"), self.name(*id)), Computed { tuple, outputs, above });
            }
        }
        Expected { stages }
    }
}

/// What must come out of one stage.
#[derive(Clone, Debug)]
pub(super) struct Computed {
    pub(super) tuple: Tuple,
    pub(super) outputs: Vec<Content>,
    above: Vec<String>,
}

/// What must come out of a world, by trial and stage.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    pub(super) stages: BTreeMap<(String, String), Computed>,
}

impl Expected {
    /// The trials and names of stages called `name` with all that they rest on, or of all stages.
    pub(super) fn wanted(&self, until: Option<&str>) -> BTreeSet<(String, String)> {
        let is_root = |stage: &str| until.is_none_or(|until| until == stage);
        let mut wanted = BTreeSet::new();
        let mut open: Vec<_> = self.stages.keys().filter(|(_, stage)| is_root(stage)).cloned().collect();
        while let Some(next) = open.pop() {
            open.extend(self.stages[&next].above.iter().map(|above| (next.0.clone(), above.clone())));
            wanted.insert(next);
        }
        wanted
    }
}

fn set_modified(path: &Path, modified: SystemTime) {
    std::fs::File::options().append(true).open(path).unwrap().set_modified(modified).unwrap();
}
