//! How a node begins: its key, its result if there is one, and its start on this machine.

use std::time::Instant;

use super::alarms::Alarm;
use super::{Driver, Live, made_of};
use crate::pipeline::exec::event::Event;
use crate::pipeline::exec::request;
use crate::pipeline::exec::scheduler::Input;
use crate::pipeline::exec::slots::Grant;
use crate::pipeline::exec::{committer, local};
use crate::pipeline::plan::State;
use crate::pipeline::spec::parse_duration;
use crate::pipeline::stage::Place;
use crate::pipeline::store::Found;

impl Driver<'_, '_> {
    /// Works out a node's key and looks for its result.
    pub(super) fn find(&mut self, node: usize) -> Result<Input, String> {
        let planned = &self.plan.nodes[node];
        let known = planned.key.clone().filter(|_| planned.edges.iter().all(|edge| self.as_planned[edge.from]));
        let key = if let Some(key) = known { key } else { request::key(planned, &self.made)? };
        // What the plan has just seen need not be looked up twice; whoever uses it reads every byte anyway.
        let seen = planned.result.as_ref().filter(|result| self.keys[node].is_none() && result.key == key);
        self.keys[node] = Some(key.clone());
        if let Some(stored) = seen {
            self.made[node] = Some(made_of(stored));
            self.as_planned[node] = true;
            return Ok(Input::Found { node, key, cached: true });
        }
        // What is found now must stay until the run ends.
        self.store.lease(&[&key]).map_err(|error| error.to_string())?;
        let cached = match self.store.find(&key).map_err(|error| error.to_string())? {
            Found::Hit(stored) => {
                self.made[node] = Some(made_of(&stored));
                self.as_planned[node] = planned.key.as_ref() == Some(&key) && planned.state == State::Cached;
                true
            }
            // The attempt puts what is damaged aside and says so, once it holds the key.
            Found::Miss | Found::Damaged { .. } => false,
        };
        Ok(Input::Found { node, key, cached })
    }

    pub(super) fn start(&mut self, node: usize, grant: Grant) -> Result<(), String> {
        if let Some(problem) = self.unfit.get(&node) {
            return Err(problem.clone());
        }
        let planned = &self.plan.nodes[node];
        let timeout = planned.spec.run.timeout.as_deref().map(parse_duration).transpose()?;
        let key = self.keys[node].clone().ok_or("the stage has no key")?;
        let lock = self.store.try_lock(&key).map_err(|error| error.to_string())?;
        if lock.is_none() {
            self.inbox.push_back(Input::Elsewhere(node));
            return Ok(());
        }
        // What was asked while it waited for another process is over.
        self.alarms.cancel(node);
        // Whoever runs the stage takes it again, which is another process where the kind runs in the worker.
        drop(lock);
        let again = self.again.contains(&node);
        let visible = self.gpus.visible_to(planned.spec.kind.place, &planned.spec.run, grant.gpu);
        let request = request::request(planned, key.clone(), again, grant, visible, self.store, &self.made)?;
        let kind = request.kind.clone();
        (self.events)(&Event::Running { node, name: planned.name().clone(), kind, key: key.clone() });
        let running = match planned.spec.kind.place {
            Place::InProcess => {
                let no_thread = |error: std::io::Error| format!("cannot start a thread: {error}");
                let committer = match self.committer.take() {
                    Some(committer) => committer,
                    None => committer::start(self.scope, self.store, &self.sender).map_err(no_thread)?,
                };
                let committer = self.committer.insert(committer);
                let stage = planned.spec.stage.clone();
                local::start_thread(self.scope, self.store, node, request, stage, &self.sender, committer)
                    .map_err(no_thread)?
            }
            Place::Worker => {
                let program = match self.worker.take() {
                    Some(program) => program,
                    None => (self.find_worker)().map_err(|error| error.to_string())?,
                };
                let program = self.worker.insert(program);
                let log = self.store.logs(&key).join("log.txt");
                local::start_worker(self.scope, program, node, &request, log, &self.sender)
                    .map_err(|error| format!("{error:#}"))?
            }
        };
        let began = Instant::now();
        // A time so long that no clock shows its end never comes.
        if let Some(moment) = timeout.and_then(|timeout| began.checked_add(timeout)) {
            self.alarms.set(node, moment, Alarm::Timeout);
        }
        self.running.insert(node, Live { running, began, timed_out: false });
        Ok(())
    }
}
