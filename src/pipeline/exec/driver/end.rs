//! How a node ends: what it tells on the way, its result or its failure, and the record of both.

use std::sync::Arc;

use super::{Driver, made_of, shown};
use crate::pipeline::exec::event::Event;
use crate::pipeline::exec::local::{Ending, News};
use crate::pipeline::exec::scheduler::Input;
use crate::pipeline::stage::Place;
use crate::pipeline::store::{Digest, Lookup, Manifest, RunRecord, StoredResult};

impl Driver<'_, '_> {
    pub(super) fn hear(&mut self, node: usize, news: News) {
        let ending = match news {
            News::Event(event) => return (self.events)(&Event::Stage { node, event }),
            News::Prepared(stored) => return self.prepared(node, &stored),
            News::Ended(ending) => ending,
        };
        self.alarms.cancel(node);
        let live = self.running.remove(&node);
        let prepared = self.seconds.remove(&node);
        let seconds = prepared.or(live.as_ref().map(|live| live.began.elapsed().as_secs_f64())).unwrap_or_default();
        let input = match ending {
            Ending::Done { manifest, ran } => {
                let ended = self.done(node, manifest, ran.then_some(seconds));
                ended.unwrap_or_else(|problem| self.failed(node, problem, false))
            }
            Ending::Lost { what } => {
                let text = format!("the result of `{}` was lost: {what}", shown(&self.plan.nodes[node]));
                (self.events)(&Event::Warning { text });
                self.errors.insert(node, what);
                Input::Lost(node)
            }
            Ending::Elsewhere => Input::Elsewhere(node),
            Ending::Interrupted if live.is_some_and(|live| live.timed_out) => {
                let timeout = self.plan.nodes[node].spec.run.timeout.clone().unwrap_or_default();
                let problem = format!("timed out after {timeout}");
                if let Some(Err(error)) =
                    self.keys[node].as_ref().map(|key| self.store.append_log(key, &format!("failed: {problem}")))
                {
                    tracing::warn!(%error, "the reason of a failure is not in its log");
                }
                self.failed(node, problem, false)
            }
            Ending::Interrupted => {
                (self.events)(&Event::Interrupted { node, name: self.plan.nodes[node].name().clone() });
                Input::Interrupted(node)
            }
            Ending::Failed { problem, lasting } => self.failed(node, problem, lasting),
            Ending::Damaged { reference, what } => self.damaged(node, &reference, &what),
        };
        self.inbox.push_back(input);
    }

    /// Takes in what a node has made, which others may use and which is not durable yet.
    fn prepared(&mut self, node: usize, stored: &StoredResult) {
        self.alarms.cancel(node);
        if let Some(live) = self.running.remove(&node) {
            self.seconds.insert(node, live.began.elapsed().as_secs_f64());
        }
        self.made[node] = Some(made_of(stored));
        self.as_planned[node] = false;
        self.inbox.push_back(Input::Prepared(node));
    }

    /// Takes in a node's result, for which it ran so many seconds, if it did.
    fn done(&mut self, node: usize, manifest: Option<Box<Manifest>>, seconds: Option<f64>) -> Result<Input, String> {
        let key = self.keys[node].clone().ok_or("the stage has no key")?;
        let manifest = match manifest {
            Some(manifest) => *manifest,
            None => match self.store.lookup(&key).map_err(|error| error.to_string())? {
                Lookup::Hit(manifest) => Arc::unwrap_or_clone(manifest),
                Lookup::Miss => return Err("the worker said that it is done and there is no result".to_owned()),
                Lookup::Damaged { what } => return Err(format!("the result is damaged already: {what}")),
            },
        };
        self.made[node] = Some(made_of(&StoredResult::of(&manifest)));
        self.as_planned[node] = false;
        self.again.remove(&node);
        let Some(seconds) = seconds else {
            self.cached(node);
            return Ok(Input::Taken(node));
        };
        self.record(node, &key);
        let name = self.plan.nodes[node].name().clone();
        (self.events)(&Event::Done { node, name, key, seconds, metrics: manifest.metrics });
        Ok(Input::Done(node))
    }

    pub(super) fn cached(&mut self, node: usize) {
        if let Some(key) = self.made[node].as_ref().map(|made| made.key.clone()) {
            self.record(node, &key);
            (self.events)(&Event::Cached { node, name: self.plan.nodes[node].name().clone(), key });
        }
    }

    fn damaged(&mut self, node: usize, reference: &str, what: &str) -> Input {
        let planned = &self.plan.nodes[node];
        let problem = format!("the input `{reference}` is damaged: {what}");
        let Some(edge) = planned.edge(reference) else {
            return self.failed(node, problem, true);
        };
        self.as_planned[edge.from] = false;
        let text = format!("the input `{reference}` of `{}` is damaged and was put aside: {what}", shown(planned));
        (self.events)(&Event::Warning { text });
        self.errors.insert(node, problem);
        Input::Damaged { node, producer: edge.from }
    }

    /// Keeps why a node failed; whether that is its end is the scheduler's to say.
    pub(super) fn failed(&mut self, node: usize, problem: String, lasting: bool) -> Input {
        self.errors.insert(node, problem);
        Input::Failed { node, lasting }
    }

    /// Tells that `node` failed for the reason of `other`.
    pub(super) fn tell_failure(&mut self, node: usize, other: usize) {
        let error = self.errors.get(&other).cloned().unwrap_or_default();
        let log = self.keys[node].as_ref().map(|key| self.store.logs(key).join("log.txt"));
        let log = log.filter(|log| log.is_file()).map_or_else(String::new, |log| log.display().to_string());
        (self.events)(&Event::Failed { node, name: self.plan.nodes[node].name().clone(), error, log });
    }

    /// Writes down what every name of the node has become. The result is safe already; a view that cannot be written is
    /// worth a warning.
    fn record(&mut self, node: usize, key: &Digest) {
        let planned = &self.plan.nodes[node];
        for name in &planned.names {
            let file = self.plan.experiments.get(&name.experiment).cloned().unwrap_or_default();
            let (recipe, kind) = (planned.recipe.clone(), planned.spec.kind.name.to_owned());
            let record = RunRecord { recipe, key: key.clone(), kind, file, earlier: Vec::new() };
            // Only a worker writes curves: elsewhere there is nothing to link or to take away unless the name has moved on.
            let in_worker = planned.spec.kind.place == Place::Worker;
            let written = match self.store.record(name, &record) {
                Ok(is_new) if is_new || in_worker => self.store.link_tensorboard(name, key),
                recorded => recorded.map(drop),
            };
            if let Err(error) = written {
                let text = format!("the run of `{}` is not recorded: {error}", shown(planned));
                (self.events)(&Event::Warning { text });
            }
        }
    }
}
