//! One attempt at one stage, once its key and its inputs are known: the same for kinds that run in the driver and for
//! those that run in the worker.
//!
//! Its order is its promise: lock, lease what it rests on, look again, verify what is used, run, look whether the user's files
//! still are what the key says, prepare the result. It knows no kind: what runs is a closure.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::exec::failure::{fail, note_failure, panic_text, uncommitted};
use crate::pipeline::exec::left::{holds_file, read_metrics};
use crate::pipeline::exec::numerics::numerics;
use crate::pipeline::plan::NodeName;
use crate::pipeline::stage::{ArtifactType, InputArtifact, Interrupted, Output, Resources, StageContext, StageEvent};
use crate::pipeline::store::{
    Attempts, Digest, DraftOutput, KeyLock, KeyParts, Lookup, Manifest, ManifestDraft, Owner, Prepared, Reached, Store,
    StoreError,
};

/// The version of [`Request`]; a worker refuses any other.
pub const PROTOCOL: u32 = 3;

/// How often a held lock is asked for before the attempt is left to the other process, and how long apart. Whoever merely
/// looks whether a lock is free holds it for a moment.
const ASKS: u32 = 10;
const ASK: Duration = Duration::from_millis(5);

/// How often the seconds so far are written down while a stage says something.
const NOTE_SECONDS: Duration = Duration::from_secs(10);

/// Everything that an attempt is told; plain data, so that it can be another process's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// [`PROTOCOL`] of the writer.
    pub protocol: u32,
    /// The store's folder.
    pub store: PathBuf,
    /// The key.
    pub key: Digest,
    /// The recipe under which it is made.
    pub recipe: Digest,
    /// The kind's name.
    pub kind: String,
    /// What the key is the hash of.
    pub parts: KeyParts,
    /// The stage's parameters, with references by name and files by path: what its kind parses.
    pub params: Value,
    /// The stage's outputs, default one first.
    pub outputs: Vec<Output>,
    /// Reference to input.
    pub inputs: BTreeMap<String, RequestInput>,
    /// Digests of the user's files by absolute path, as they stand in the key.
    pub files: BTreeMap<String, Digest>,
    /// Where the stage stands in experiments.
    pub names: Vec<NodeName>,
    /// Run even where there is a result, and replace it.
    pub again: bool,
    /// `cpu` or `cuda:0`.
    pub device: String,
    /// Threads for computation, unless saved work was made with another number.
    pub threads: usize,
    /// What `CUDA_VISIBLE_DEVICES` must be for programs of the stage; as it is where there is none.
    #[serde(default)]
    pub visible_devices: Option<String>,
    /// How often a training stage saves its state.
    pub save_every_seconds: f64,
    /// The stage's resolved table as TOML, which is kept as `config.toml` beside the logs.
    pub config_text: String,
    /// What the process that runs the stage adds to [`Manifest::numerics`], as the version of libtorch.
    #[serde(default)]
    pub numerics: BTreeMap<String, String>,
}

/// An input of a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RequestInput {
    /// The producer's key.
    pub key: Digest,
    /// The producer's output.
    pub output: String,
    /// The digest of its content.
    pub digest: Digest,
    /// What it carries.
    pub artifact: ArtifactType,
}

/// What came of an attempt that went well.
#[derive(Debug)]
pub enum Attempted {
    /// The stage ran. [`Store::commit_all`] makes it the result; until then the lock must be held.
    Prepared(KeyLock, Box<Prepared>),
    /// The result is there: another process has made it since it was looked for, or an attempt that was killed had.
    Found(Box<Manifest>),
}

impl Attempted {
    /// Commits what was prepared; gives whether the stage ran.
    pub fn commit(self, store: &Store) -> Result<bool, AttemptError> {
        let Self::Prepared(lock, prepared) = self else { return Ok(false) };
        let committed: Result<(), StoreError> = store.commit_all(&[(&lock, &*prepared)]).into_iter().collect();
        committed.map_err(|error| uncommitted(store, &lock, &prepared, error))?;
        store.drop_work(&lock);
        Ok(true)
    }
}

/// Why an attempt has no result.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// It was asked to stop; saved work stays.
    #[error("interrupted")]
    Interrupted,
    /// Another process works on the key.
    #[error("another process works on it")]
    Elsewhere,
    /// The stage failed.
    #[error("{0:#}")]
    Failed(anyhow::Error),
    /// The attempt was in vain, and so would be another one in this run: the user's files have changed, or two programs do
    /// not fit together.
    #[error("{0:#}")]
    Lasting(anyhow::Error),
    /// An input is not what was stored. It is put aside; once its producer has run again, this stage can.
    #[error("the input `{reference}` is damaged and was put aside: {what}")]
    DamagedInput {
        /// The input.
        reference: String,
        /// The key of its producer.
        producer: Digest,
        /// What is wrong, naming the file.
        what: String,
    },
    /// It ran, and what it made was lost before it was durable.
    #[error("{0}")]
    Lost(String),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Runs a stage once and prepares its result, or takes the result that another process has made meanwhile. It does not wait
/// for a process that works on the key now: whoever waits should hold no share of the machine.
///
/// A panic of `run` fails the stage with its message.
pub fn attempt(
    store: &Store,
    request: &Request,
    run: &dyn Fn(&mut StageContext) -> anyhow::Result<()>,
    interrupt: Arc<AtomicBool>,
    mut events: Box<dyn FnMut(StageEvent) + Send>,
) -> Result<Attempted, AttemptError> {
    if request.protocol != PROTOCOL {
        return Err(AttemptError::Lasting(anyhow!(
            "the request has protocol `{}`, and this program speaks `{PROTOCOL}`; build both programs from one source",
            request.protocol
        )));
    }
    let lock = lock(store, &request.key, &interrupt)?;
    // The objects too: an input's manifest may be replaced or put aside while it is read.
    let inputs = request.inputs.values().flat_map(|input| [&input.key, &input.digest]);
    let rests_on: Vec<&Digest> = std::iter::once(&request.key).chain(inputs).collect();
    store.lease(&rests_on)?;
    if !request.again {
        match store.lookup(&request.key)? {
            Lookup::Hit(manifest) => return Ok(Attempted::Found(Box::new(Arc::unwrap_or_clone(manifest)))),
            Lookup::Miss => {}
            Lookup::Damaged { what } => {
                store.quarantine(&lock, &what)?;
                events(StageEvent::Note { text: format!("the stored result was damaged and is made again: {what}") });
            }
        }
    }
    if !request.again
        && let Some(prepared) = store.recover(&lock)?
    {
        events(StageEvent::Note {
            text: "an earlier attempt had ended well, and only its commit was missing: its result is taken".into(),
        });
        let manifest = Box::new(prepared.manifest().clone());
        Attempted::Prepared(lock, Box::new(prepared)).commit(store)?;
        return Ok(Attempted::Found(manifest));
    }
    let inputs = verified_inputs(store, request, &interrupt)?;
    if let Some(problem) = changed_file(store, &request.files)? {
        return Err(AttemptError::Lasting(anyhow!("{problem} after the run was planned; run again")));
    }
    let began = Instant::now();
    let attempts = begin(store, &lock, request, &mut events)?;
    let names: Vec<&str> = request.outputs.iter().map(|output| output.name.as_str()).collect();
    let out = store.begin_attempt(&lock, attempts.attempts, &names)?;
    store.save_attempts(&request.key, &attempts)?;
    if !request.config_text.is_empty() {
        store.save_config(&lock, &request.config_text)?;
    }
    for name in &request.names {
        show_curves(store, name, &request.key);
    }
    let log = store.logs(&request.key).join("log.txt");
    let _log = crate::telemetry::logging::thread_to_file(&log).map_err(AttemptError::Failed)?;
    let (kind, threads, device) = (&request.kind, attempts.threads, &request.device);
    tracing::info!(%kind, attempt = attempts.attempts, threads, %device, "begins");
    let reached = Arc::new(Mutex::new(attempts.reached.clone()));
    let mut context = StageContext {
        inputs,
        out: out.clone(),
        work: store.state(&request.key),
        logs: store.logs(&request.key),
        resources: Resources {
            device: request.device.clone(),
            threads: attempts.threads,
            visible_devices: request.visible_devices.clone(),
            save_every: Duration::try_from_secs_f64(request.save_every_seconds).unwrap_or(Duration::from_secs(60)),
        },
        interrupt,
        events: watched(store, request, &attempts, Arc::clone(&reached), began, events),
    };
    let ran = catch_unwind(AssertUnwindSafe(|| run(&mut context)))
        .unwrap_or_else(|panic| Err(anyhow!("the stage panicked: {}", panic_text(panic.as_ref()))));
    for name in &request.names {
        show_curves(store, name, &request.key);
    }
    let seconds = attempts.seconds + began.elapsed().as_secs_f64();
    let reached = reached.lock().map(|reached| reached.clone()).unwrap_or_default();
    let ended = Attempts { seconds, reached, owner: None, ..attempts.clone() };
    let changed = if ran.is_ok() { changed_file(store, &request.files)? } else { None };
    let finished = ran.and_then(|()| finish(request, &out, &mut context));
    drop(context);
    if let Some(problem) = changed {
        let error = anyhow!("{problem} while the stage ran; its result was not kept");
        return Err(AttemptError::Lasting(fail(store, &lock, &out, &ended, error)));
    }
    match finished {
        Ok(metrics) => {
            tracing::info!(seconds, "done");
            let draft = ManifestDraft {
                recipe: request.recipe.clone(),
                parts: request.parts.clone(),
                params: request.params.clone(),
                inputs: request.inputs.iter().map(|(name, input)| (name.clone(), input.digest.clone())).collect(),
                outputs: draft_outputs(request, &out),
                seconds,
                attempts: attempts.attempts,
                numerics: attempts.numerics,
                metrics,
            };
            match store.prepare(&lock, draft) {
                Ok(prepared) => Ok(Attempted::Prepared(lock, Box::new(prepared))),
                // A stage that writes what cannot be stored has failed; the store is well.
                Err(error @ StoreError::Unfit { .. }) => {
                    Err(AttemptError::Failed(fail(store, &lock, &out, &ended, error.into())))
                }
                Err(error) => {
                    note_failure(store, &lock, seconds, &error.to_string());
                    Err(AttemptError::Store(error))
                }
            }
        }
        Err(error) if error.chain().any(<dyn std::error::Error>::is::<Interrupted>) => {
            store.save_attempts(&request.key, &ended)?;
            store.drop_out(&out)?;
            Err(AttemptError::Interrupted)
        }
        Err(error) => Err(AttemptError::Failed(fail(store, &lock, &out, &ended, error))),
    }
}

/// Shows a key's curves under the name of its stage. They are a view: that it cannot be made costs no result.
fn show_curves(store: &Store, name: &NodeName, key: &Digest) {
    if let Err(error) = store.link_tensorboard(name, key) {
        tracing::warn!(%error, "the curves are not shown");
    }
}

/// Takes the lock of a key.
fn lock(store: &Store, key: &Digest, interrupt: &AtomicBool) -> Result<KeyLock, AttemptError> {
    for _ in 0..ASKS {
        if let Some(lock) = store.try_lock(key)? {
            return Ok(lock);
        }
        if interrupt.load(Ordering::Relaxed) {
            return Err(AttemptError::Interrupted);
        }
        std::thread::sleep(ASK);
    }
    Err(AttemptError::Elsewhere)
}

/// The inputs as the stage finds them, every byte hashed. A damaged one is put aside together with its producer's result.
fn verified_inputs(
    store: &Store,
    request: &Request,
    interrupt: &AtomicBool,
) -> Result<BTreeMap<String, InputArtifact>, AttemptError> {
    let mut sound = Vec::new();
    let mut inputs = BTreeMap::new();
    for (reference, input) in &request.inputs {
        if interrupt.load(Ordering::Relaxed) {
            return Err(AttemptError::Interrupted);
        }
        if !sound.contains(&&input.digest) {
            if let Err(what) = store.verify_digest(&input.digest)? {
                // Whoever works on the producer makes its result anew.
                if let Some(producer) = store.try_lock(&input.key)? {
                    store.quarantine(&producer, &what)?;
                }
                store.quarantine_object(&input.digest, &what)?;
                let (reference, producer) = (reference.clone(), input.key.clone());
                return Err(AttemptError::DamagedInput { reference, producer, what });
            }
            sound.push(&input.digest);
        }
        let path = store.object(&input.digest);
        let artifact = InputArtifact { path, digest: input.digest.0.clone(), artifact: input.artifact };
        inputs.insert(reference.clone(), artifact);
    }
    Ok(inputs)
}

/// Which of the user's files is not what the key says, as the beginning of a sentence.
fn changed_file(store: &Store, files: &BTreeMap<String, Digest>) -> Result<Option<String>, StoreError> {
    for (path, digest) in files {
        match store.file_digest(Path::new(path)) {
            Ok(found) if found == *digest => {}
            Ok(_) => return Ok(Some(format!("`{path}` changed"))),
            Err(error) if error.io().is_some_and(|cause| cause.kind() == std::io::ErrorKind::NotFound) => {
                return Ok(Some(format!("`{path}` was removed")));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Settles the conditions of this attempt: those of the attempt whose training state it goes on from, or its own.
fn begin(
    store: &Store,
    lock: &KeyLock,
    request: &Request,
    events: &mut Box<dyn FnMut(StageEvent) + Send>,
) -> Result<Attempts, StoreError> {
    let earlier = store.attempts(lock.key())?;
    let mut resumes = store.has_saved_work(lock.key());
    let family = |device: &str| device.split(':').next().unwrap_or_default().to_owned();
    let obstacle = match &earlier {
        None => Some("nothing is known of how it was made".to_owned()),
        Some(earlier) if family(&earlier.device) != family(&request.device) => {
            Some(format!("it was made on `{}` and this run is on `{}`", earlier.device, request.device))
        }
        Some(_) => None,
    };
    if let Some(obstacle) = obstacle.filter(|_| resumes) {
        store.forget_state(lock)?;
        events(StageEvent::Note { text: format!("saved work is dropped: {obstacle}") });
        resumes = false;
    }
    let earlier = earlier.unwrap_or_default();
    let threads = if resumes { earlier.threads } else { request.threads.max(1) };
    let mut numerics = numerics(request.numerics.clone(), &request.device, threads);
    if resumes {
        let mut changes: Vec<String> = numerics
            .iter()
            .filter(|(name, value)| earlier.numerics.get(*name).is_some_and(|old| old != *value))
            .map(|(name, value)| format!("{name}: {} => {value}", earlier.numerics[name]))
            .collect();
        if !changes.is_empty() {
            events(StageEvent::Note { text: format!("goes on under other conditions: {}", changes.join(", ")) });
        }
        changes.splice(0..0, earlier.numerics.get(RESUMED_UNDER).cloned());
        if !changes.is_empty() {
            numerics.insert(RESUMED_UNDER.to_owned(), changes.join("; "));
        }
    }
    let attempts = earlier.attempts + 1;
    // How far an earlier attempt came counts as long as its saved work does.
    let reached = earlier.reached.filter(|_| resumes);
    let (device, seconds, owner) = (request.device.clone(), earlier.seconds, Some(Owner::here()));
    Ok(Attempts { attempts, threads, device, seconds, numerics, reached, error: None, owner })
}

/// The name in [`Manifest::numerics`] of what changed between attempts.
const RESUMED_UNDER: &str = "changed_on_resume";

/// The stage's events, with two chores done on the way: curves are linked as soon as there are any, and the seconds so far
/// are written down, so that a kill loses few of them.
fn watched(
    store: &Store,
    request: &Request,
    attempts: &Attempts,
    reached: Arc<Mutex<Option<Reached>>>,
    began: Instant,
    mut events: Box<dyn FnMut(StageEvent) + Send>,
) -> Box<dyn FnMut(StageEvent) + Send> {
    let (store, key, names) = (store.clone(), request.key.clone(), request.names.clone());
    let (earlier, mut attempts) = (attempts.seconds, attempts.clone());
    let (mut linked, mut noted) = (false, began);
    Box::new(move |event| {
        match &event {
            StageEvent::Note { text } => tracing::info!("{text}"),
            StageEvent::Resumed { done } => tracing::info!("goes on from {done}"),
            StageEvent::Progress { done, total, unit } => {
                if let Ok(mut reached) = reached.lock() {
                    *reached = Some(Reached { done: *done, total: *total, unit: unit.clone() });
                }
            }
            StageEvent::Metrics { .. } => {}
        }
        if !linked && store.has_curves(&key) {
            linked = true;
            for name in &names {
                if let Err(error) = store.link_tensorboard(name, &key) {
                    events(StageEvent::Note { text: format!("the curves are not shown: {error}") });
                }
            }
        }
        if noted.elapsed() >= NOTE_SECONDS {
            noted = Instant::now();
            attempts.seconds = earlier + began.elapsed().as_secs_f64();
            attempts.reached = reached.lock().map(|reached| reached.clone()).unwrap_or_default();
            if let Err(error) = store.save_attempts(&key, &attempts) {
                tracing::debug!(%error, "the seconds so far are not written down");
            }
        }
        events(event);
    })
}

/// What stands between a stage that has run and its publication; gives its headline metrics.
fn finish(request: &Request, out: &Path, context: &mut StageContext) -> anyhow::Result<BTreeMap<String, f64>> {
    for output in &request.outputs {
        let folder = out.join(&output.name);
        if !holds_file(&folder).with_context(|| format!("cannot list the output `{}`", output.name))? {
            anyhow::bail!("the stage ended without writing its output `{}`", output.name);
        }
    }
    let Some(first) = request.outputs.first() else { anyhow::bail!("the stage has no outputs") };
    Ok(read_metrics(&out.join(&first.name)).unwrap_or_else(|error| {
        context.note(format!("`metrics.json` of the output `{}` shows no metrics: {error:#}", first.name));
        BTreeMap::new()
    }))
}

fn draft_outputs(request: &Request, out: &Path) -> Vec<DraftOutput> {
    let draft = |output: &Output| DraftOutput {
        name: output.name.clone(),
        artifact: output.artifact,
        folder: out.join(&output.name),
    };
    request.outputs.iter().map(draft).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;

    use serde_json::json;

    use super::*;
    use crate::pipeline::store::fixture::{Sandbox, key, parts};

    type Run<'a> = &'a dyn Fn(&mut StageContext) -> anyhow::Result<()>;

    fn request(sandbox: &Sandbox, number: usize) -> Request {
        Request {
            protocol: PROTOCOL,
            store: sandbox.store.root().to_owned(),
            key: key(number),
            recipe: key(number + 1000),
            kind: "test".into(),
            parts: parts(number),
            params: Value::Null,
            outputs: vec![Output::new("out", ArtifactType::Files)],
            inputs: [].into(),
            files: [].into(),
            names: vec![NodeName { experiment: "e".into(), trial: "seed=1".into(), stage: "s".into() }],
            again: false,
            device: "cpu".into(),
            threads: 2,
            visible_devices: None,
            save_every_seconds: 30.0,
            config_text: "kind = \"test\"\n".into(),
            numerics: [("libtorch".to_owned(), "2".to_owned())].into(),
        }
    }

    fn quiet() -> Box<dyn FnMut(StageEvent) + Send> {
        Box::new(|_| ())
    }

    fn go(sandbox: &Sandbox, request: &Request, run: Run<'_>) -> Result<Manifest, AttemptError> {
        let attempted = attempt(&sandbox.store, request, run, Arc::default(), quiet())?;
        let manifest = match &attempted {
            Attempted::Prepared(_, prepared) => prepared.manifest().clone(),
            Attempted::Found(manifest) => (**manifest).clone(),
        };
        attempted.commit(&sandbox.store)?;
        Ok(manifest)
    }

    fn write(context: &StageContext, text: &str) -> anyhow::Result<()> {
        Ok(std::fs::write(context.output("out").join("data"), text)?)
    }

    #[test]
    fn what_was_prepared_before_a_kill_is_taken_and_what_was_harmed_since_is_made_again() {
        let sandbox = Sandbox::new();
        let request = request(&sandbox, 1);
        let write: Run<'_> = &|context| Ok(std::fs::write(context.output("out").join("data"), "one")?);
        let prepare = || attempt(&sandbox.store, &request, write, Arc::default(), quiet()).unwrap();
        // Dropped, it leaves what a kill would.
        drop(prepare());
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Miss));
        let taken = attempt(&sandbox.store, &request, &|_| panic!("it need not run"), Arc::default(), quiet()).unwrap();
        let Attempted::Found(manifest) = taken else { panic!("it was made before") };
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Hit(_)));
        assert!(!sandbox.store.work(&key(1)).exists());

        std::fs::remove_file(sandbox.store.manifest_path(&key(1))).unwrap();
        drop(prepare());
        let data = sandbox.opened(&manifest.outputs[0].digest).join("data");
        std::fs::remove_file(&data).unwrap();
        std::fs::write(&data, "two").unwrap();
        assert!(matches!(prepare(), Attempted::Prepared(..)), "no byte is taken on trust");
    }

    #[test]
    fn a_stage_runs_once_and_again_when_asked() {
        let sandbox = Sandbox::new();
        let runs = AtomicUsize::new(0);
        let run: Run<'_> = &|context| write(context, &runs.fetch_add(1, Ordering::Relaxed).to_string());
        let mut request = request(&sandbox, 1);
        let first = go(&sandbox, &request, run).unwrap();
        assert_eq!(
            (first.attempts, &first.numerics["threads"], &first.numerics["libtorch"]),
            (1, &"2".into(), &"2".into())
        );
        assert_eq!(go(&sandbox, &request, run).unwrap().finished, first.finished);
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        request.again = true;
        let second = go(&sandbox, &request, run).unwrap();
        assert_ne!(first.outputs[0].digest, second.outputs[0].digest);
        let Lookup::Hit(found) = sandbox.store.lookup(&key(1)).unwrap() else { panic!("no hit") };
        assert_eq!(found.outputs[0].digest, second.outputs[0].digest);
        assert!(!sandbox.store.work(&key(1)).exists());
        assert!(sandbox.store.logs(&key(1)).join("config.toml").exists());
    }

    #[test]
    fn of_many_at_once_one_runs_and_the_others_are_told_and_take_its_result() {
        let sandbox = Sandbox::new();
        let (runs, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let all: Mutex<Vec<Digest>> = Mutex::default();
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    let run: Run<'_> = &|context| {
                        runs.fetch_add(1, Ordering::Relaxed);
                        // It ends when others have been refused often enough, however slow the machine is.
                        while refused.load(Ordering::Relaxed) < 5 {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        write(context, "x")
                    };
                    let manifest = loop {
                        match go(&sandbox, &request(&sandbox, 1), run) {
                            Err(AttemptError::Elsewhere) => refused.fetch_add(1, Ordering::Relaxed),
                            ended => break ended.unwrap(),
                        };
                    };
                    all.lock().unwrap().push(manifest.outputs[0].digest.clone());
                });
            }
        });
        assert_eq!(runs.into_inner(), 1);
        assert!(refused.into_inner() >= 5);
        let all = all.into_inner().unwrap();
        assert!(all.len() == 6 && all.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn a_key_that_is_held_is_left_to_its_holder() {
        let sandbox = Sandbox::new();
        let _lock = sandbox.store.lock(&key(1)).unwrap();
        let run: Run<'_> = &|_| panic!("it is another's turn");
        let result = go(&sandbox, &request(&sandbox, 1), run);
        assert!(matches!(result, Err(AttemptError::Elsewhere)), "{result:?}");
        let interrupt = Arc::new(AtomicBool::new(true));
        let result = attempt(&sandbox.store, &request(&sandbox, 1), run, interrupt, quiet());
        assert!(matches!(result, Err(AttemptError::Interrupted)), "{result:?}");
    }

    #[test]
    fn an_interrupted_stage_goes_on_with_its_threads_and_sums_its_attempts() {
        let sandbox = Sandbox::new();
        let mut request = request(&sandbox, 1);
        let stop: Run<'_> = &|context| {
            std::fs::create_dir_all(&context.work)?;
            std::fs::write(context.work.join("state"), "half")?;
            write(context, "unfinished")?;
            std::thread::sleep(Duration::from_millis(5));
            Err(anyhow::Error::from(Interrupted).context("while training"))
        };
        assert!(matches!(go(&sandbox, &request, stop), Err(AttemptError::Interrupted)));
        assert!(sandbox.store.has_saved_work(&key(1)));
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Miss));
        request.threads = 7;
        request.numerics.insert("libtorch".into(), "3".into());
        let resume: Run<'_> = &|context| {
            assert_eq!(context.resources.threads, 2);
            assert!(!context.output("out").join("data").exists(), "outputs begin afresh");
            write(context, &std::fs::read_to_string(context.work.join("state"))?)
        };
        let manifest = go(&sandbox, &request, resume).unwrap();
        assert_eq!((manifest.attempts, &manifest.numerics["threads"]), (2, &"2".to_owned()));
        assert_eq!(manifest.numerics[RESUMED_UNDER], "libtorch: 2 => 3");
        assert!(manifest.seconds >= 0.005);
        assert!(!sandbox.store.has_saved_work(&key(1)));
    }

    #[test]
    fn saved_work_of_another_device_or_of_unknown_origin_is_dropped() {
        let sandbox = Sandbox::new();
        let stop: Run<'_> = &|context| {
            std::fs::create_dir_all(&context.work)?;
            std::fs::write(context.work.join("state"), "half")?;
            Err(Interrupted.into())
        };
        let fresh: Run<'_> = &|context| {
            assert!(!context.work.join("state").exists());
            write(context, "x")
        };
        let mut one = request(&sandbox, 1);
        go(&sandbox, &one, stop).unwrap_err();
        one.device = "cuda:0".into();
        one.threads = 5;
        assert_eq!(go(&sandbox, &one, fresh).unwrap().numerics["threads"], "5");
        let two = request(&sandbox, 2);
        go(&sandbox, &two, stop).unwrap_err();
        std::fs::write(sandbox.store.work(&key(2)).join("attempts.json"), "").unwrap();
        go(&sandbox, &two, fresh).unwrap();
    }

    #[test]
    fn a_failure_keeps_its_files_its_log_and_its_saved_work() {
        let sandbox = Sandbox::new();
        let request = request(&sandbox, 1);
        let panics: Run<'_> = &|context| {
            write(context, "evidence")?;
            std::fs::create_dir_all(&context.work)?;
            std::fs::write(context.work.join("state"), "half")?;
            let number = 7;
            panic!("row {number} is wrong")
        };
        for _ in 0..2 {
            let error = go(&sandbox, &request, panics).unwrap_err().to_string();
            assert_eq!(error, "the stage panicked: row 7 is wrong");
        }
        let work = sandbox.store.work(&key(1));
        assert_eq!(std::fs::read_to_string(work.join("failed/out/data")).unwrap(), "evidence");
        let log = std::fs::read_to_string(sandbox.store.logs(&key(1)).join("log.txt")).unwrap();
        assert_eq!(log.matches("row 7 is wrong").count(), 2);
        let manifest = go(&sandbox, &request, &|context| write(context, "well")).unwrap();
        assert_eq!(manifest.attempts, 3);
    }

    #[test]
    fn outputs_must_be_there_and_storable() {
        let sandbox = Sandbox::new();
        let request = request(&sandbox, 1);
        let error = go(&sandbox, &request, &|_| Ok(())).unwrap_err().to_string();
        assert_eq!(error, "the stage ended without writing its output `out`");
        let empty: Run<'_> = &|context| Ok(std::fs::create_dir_all(context.output("out").join("a/b"))?);
        assert!(go(&sandbox, &request, empty).is_err());
        let link: Run<'_> = &|context| Ok(std::os::unix::fs::symlink("x", context.output("out").join("link"))?);
        let error = go(&sandbox, &request, link).unwrap_err();
        assert!(matches!(&error, AttemptError::Failed(_)) && error.to_string().contains("symbolic link"), "{error}");
        assert!(sandbox.store.work(&key(1)).join("failed/out/link").is_symlink());
    }

    #[test]
    fn a_file_that_changes_while_the_stage_runs_spoils_the_result() {
        let sandbox = Sandbox::new();
        let file = sandbox.place.path().join("users.txt");
        std::fs::write(&file, "one").unwrap();
        let mut request = request(&sandbox, 1);
        let digest = sandbox.store.file_digest(&file).unwrap();
        request.files.insert(file.display().to_string(), digest);
        let edit: Run<'_> = &|context| {
            std::fs::write(&file, "two")?;
            write(context, "x")
        };
        let error = go(&sandbox, &request, edit).unwrap_err().to_string();
        assert!(error.contains("users.txt` changed while the stage ran; its result was not kept"), "{error}");
        let never: Run<'_> = &|_| panic!("its file has changed");
        let error = go(&sandbox, &request, never).unwrap_err().to_string();
        assert!(error.contains("users.txt` changed after the run was planned"), "{error}");
        std::fs::remove_file(&file).unwrap();
        let error = go(&sandbox, &request, never).unwrap_err().to_string();
        assert!(error.contains("users.txt` was removed"), "{error}");
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Miss));
    }

    #[test]
    fn a_damaged_input_is_never_delivered() {
        let sandbox = Sandbox::new();
        let producer = sandbox.publish(1, &[("data", "one")]);
        let digest = producer.outputs[0].digest.clone();
        let mut request = request(&sandbox, 2);
        let input = RequestInput { key: key(1), output: "out".into(), digest, artifact: ArtifactType::Files };
        request.inputs.insert("a".into(), input.clone());
        let file = sandbox.opened(&input.digest).join("data");
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, "two").unwrap();
        match go(&sandbox, &request, &|_| panic!("it must not run")) {
            Err(AttemptError::DamagedInput { reference, producer, what }) => {
                assert_eq!((reference.as_str(), producer), ("a", key(1)));
                assert!(what.contains("does not have the content"), "{what}");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Miss));
        sandbox.publish(1, &[("data", "one")]);
        let copy: Run<'_> = &|context| write(context, &std::fs::read_to_string(context.inputs["a"].path.join("data"))?);
        assert_eq!(go(&sandbox, &request, copy).unwrap().inputs["a"], input.digest);
    }

    #[test]
    fn a_damaged_result_is_made_again() {
        let sandbox = Sandbox::new();
        let request = request(&sandbox, 1);
        let run: Run<'_> = &|context| write(context, "x");
        let manifest = go(&sandbox, &request, run).unwrap();
        std::fs::remove_file(sandbox.opened(&manifest.outputs[0].digest).join("data")).unwrap();
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Damaged { .. }));
        go(&sandbox, &request, run).unwrap();
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Hit(_)));
    }

    #[test]
    fn metrics_are_the_finite_numbers_of_the_first_output() {
        let sandbox = Sandbox::new();
        let cases = [
            (json!({"solved": 0.5, "rows": 3, "name": "x"}), [("rows", 3.0), ("solved", 0.5)].as_slice()),
            (json!({"metrics": {"solved": 1}, "rows": 3}), &[("solved", 1.0)]),
            (json!([1, 2]), &[]),
        ];
        for (number, (written, expected)) in cases.into_iter().enumerate() {
            let run: Run<'_> =
                &|context| Ok(std::fs::write(context.output("out").join("metrics.json"), written.to_string())?);
            let metrics = go(&sandbox, &request(&sandbox, number), run).unwrap().metrics;
            let metrics: Vec<(&str, f64)> = metrics.iter().map(|(name, value)| (name.as_str(), *value)).collect();
            assert_eq!(metrics, expected);
        }
    }

    #[test]
    fn curves_are_shown_while_the_stage_runs() {
        let sandbox = Sandbox::new();
        let link = sandbox.store.root().join("tensorboard/e/seed=1/s/events");
        let run: Run<'_> = &|context| {
            std::fs::create_dir(context.logs.join("tensorboard"))?;
            std::fs::write(context.logs.join("tensorboard/events"), "x")?;
            context.progress(1, 2, "steps");
            assert!(link.exists());
            write(context, "x")
        };
        go(&sandbox, &request(&sandbox, 1), run).unwrap();
        assert!(link.exists());
    }

    #[test]
    fn a_request_survives_the_way_to_another_process_and_its_protocol_is_checked() {
        let sandbox = Sandbox::new();
        let mut request = request(&sandbox, 1);
        let text = serde_json::to_string(&request).unwrap();
        let back: Request = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
        request.protocol = 99;
        let error = go(&sandbox, &request, &|_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("protocol `99`"), "{error}");
    }
}
