//! One attempt at one stage, once its key and its inputs are known: the same for kinds that run in the driver and for
//! those that run in the worker.
//!
//! Its order is its promise: lock, look again, verify what is used, run, look whether the user's files still are what the key
//! says, publish. It knows no kind: what runs is a closure.

use std::any::Any;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::plan::NodeName;
use crate::pipeline::stage::{
    ArtifactType, InputArtifact, Interrupted, Output, Resources, StageContext, StageEvent,
};
use crate::pipeline::store::{
    Attempts, Digest, DraftOutput, KeyLock, KeyParts, Lookup, Manifest, ManifestDraft, Store, StoreError,
    link_tensorboard,
};

/// The version of [`Request`]; a worker refuses any other.
pub const PROTOCOL: u32 = 1;

/// How often a waiting process asks for the lock.
const ASK: Duration = Duration::from_millis(20);

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

/// Why an attempt has no result.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// It was asked to stop; saved work stays.
    #[error("interrupted")]
    Interrupted,
    /// The stage failed.
    #[error("{0:#}")]
    Failed(anyhow::Error),
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
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Runs a stage once and publishes its result, or takes the result that another process has made meanwhile.
///
/// `waiting` is called once if another process works on the key. A panic of `run` fails the stage with its message.
pub fn attempt(
    store: &Store,
    request: &Request,
    run: &dyn Fn(&mut StageContext) -> anyhow::Result<()>,
    interrupt: Arc<AtomicBool>,
    waiting: &mut dyn FnMut(),
    mut events: Box<dyn FnMut(StageEvent) + Send>,
) -> Result<Manifest, AttemptError> {
    if request.protocol != PROTOCOL {
        let message = "the request has protocol `{}`, and this program speaks `{}`; build both programs from one source";
        let message = message.replacen("{}", &request.protocol.to_string(), 1).replacen("{}", &PROTOCOL.to_string(), 1);
        return Err(AttemptError::Failed(anyhow!(message)));
    }
    let lock = lock(store, &request.key, &interrupt, waiting)?;
    if !request.again {
        match store.lookup(&request.key)? {
            Lookup::Hit(manifest) => return Ok(Arc::unwrap_or_clone(manifest)),
            Lookup::Miss => {}
            Lookup::Damaged { what } => {
                store.quarantine(&request.key, &what)?;
                events(StageEvent::Note { text: format!("the stored result was damaged and is made again: {what}") });
            }
        }
    }
    let inputs = verified_inputs(store, request, &interrupt)?;
    if let Some(problem) = changed_file(store, &request.files)? {
        return Err(AttemptError::Failed(anyhow!("{problem} after the run was planned; run again")));
    }
    let began = Instant::now();
    let attempts = begin(store, &lock, request, &mut events)?;
    let names: Vec<&str> = request.outputs.iter().map(|output| output.name.as_str()).collect();
    let out = store.begin_attempt(&lock, attempts.attempts, &names)?;
    attempts.save(&store.work(&request.key))?;
    if !request.config_text.is_empty() {
        let path = store.logs(&request.key).join("config.toml");
        std::fs::write(&path, &request.config_text).map_err(|cause| io("write", &path, cause))?;
    }
    for name in &request.names {
        store.link_tensorboard(name, &request.key)?;
    }
    let mut context = StageContext {
        inputs,
        out: out.clone(),
        work: store.state(&request.key),
        logs: store.logs(&request.key),
        resources: Resources {
            device: request.device.clone(),
            threads: attempts.threads,
            save_every: Duration::try_from_secs_f64(request.save_every_seconds).unwrap_or(Duration::from_mins(1)),
        },
        interrupt,
        events: watched(store, request, &attempts, began, events),
    };
    let ran = catch_unwind(AssertUnwindSafe(|| run(&mut context)))
        .unwrap_or_else(|panic| Err(anyhow!("the stage panicked: {}", panic_text(panic.as_ref()))));
    for name in &request.names {
        store.link_tensorboard(name, &request.key)?;
    }
    let seconds = attempts.seconds + began.elapsed().as_secs_f64();
    let ended = Attempts { seconds, ..attempts.clone() };
    let finished = ran.and_then(|()| finish(store, request, &out, &mut context));
    drop(context);
    match finished {
        Ok(metrics) => {
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
            store.publish(&lock, draft).map_err(|error| match error {
                // A stage that writes what cannot be stored has failed; the store is well.
                StoreError::Unfit { .. } => fail(store, &lock, &out, &ended, error.into()),
                error => AttemptError::Store(error),
            })
        }
        Err(error) if error.chain().any(|cause| cause.is::<Interrupted>()) => {
            ended.save(&store.work(&request.key))?;
            Store::drop_out(&out)?;
            Err(AttemptError::Interrupted)
        }
        Err(error) => Err(fail(store, &lock, &out, &ended, error)),
    }
}

/// Takes the lock of a key; an interrupt ends the wait.
fn lock(
    store: &Store,
    key: &Digest,
    interrupt: &AtomicBool,
    waiting: &mut dyn FnMut(),
) -> Result<KeyLock, AttemptError> {
    if let Some(lock) = store.try_lock(key)? {
        return Ok(lock);
    }
    waiting();
    loop {
        if interrupt.load(Ordering::Relaxed) {
            return Err(AttemptError::Interrupted);
        }
        std::thread::sleep(ASK);
        if let Some(lock) = store.try_lock(key)? {
            return Ok(lock);
        }
    }
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
                store.quarantine(&input.key, &what)?;
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
    let mut numerics = numerics(request, threads);
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
    Ok(Attempts { attempts, threads, device: request.device.clone(), seconds: earlier.seconds, numerics })
}

/// The name in [`Manifest::numerics`] of what changed between attempts.
const RESUMED_UNDER: &str = "changed_on_resume";

/// What the numbers are computed with.
fn numerics(request: &Request, threads: usize) -> BTreeMap<String, String> {
    let mut numerics = request.numerics.clone();
    numerics.insert("pipe".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
    numerics.insert("cpu".to_owned(), cpu_features().to_owned());
    numerics.insert("threads".to_owned(), threads.to_string());
    numerics.insert("device".to_owned(), request.device.clone());
    numerics
}

/// The architecture with those features by which numerical libraries choose their code.
fn cpu_features() -> &'static str {
    static FEATURES: OnceLock<String> = OnceLock::new();
    FEATURES.get_or_init(|| {
        let mut features = vec![std::env::consts::ARCH];
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! detect {
                ($($name:tt)*) => { $(if std::is_x86_feature_detected!($name) { features.push($name); })* };
            }
            detect!("sse4.2" "avx" "f16c" "fma" "avx2" "avx512f" "avx512bw" "avx512vl" "avx512vnni" "avx512bf16");
        }
        features.join("+")
    })
}

/// The stage's events, with two chores done on the way: curves are linked as soon as there are any, and the seconds so far
/// are written down, so that a kill loses few of them.
fn watched(
    store: &Store,
    request: &Request,
    attempts: &Attempts,
    began: Instant,
    mut events: Box<dyn FnMut(StageEvent) + Send>,
) -> Box<dyn FnMut(StageEvent) + Send> {
    let (root, key, names) = (store.root().to_owned(), request.key.clone(), request.names.clone());
    let (work, curves) = (store.work(&key), store.logs(&key).join("tensorboard"));
    let (earlier, mut attempts) = (attempts.seconds, attempts.clone());
    let (mut linked, mut noted) = (false, began);
    Box::new(move |event| {
        if !linked && curves.is_dir() {
            linked = true;
            for name in &names {
                if let Err(error) = link_tensorboard(&root, name, &key) {
                    events(StageEvent::Note { text: format!("the curves are not shown: {error}") });
                }
            }
        }
        if noted.elapsed() >= NOTE_SECONDS {
            noted = Instant::now();
            attempts.seconds = earlier + began.elapsed().as_secs_f64();
            if let Err(error) = attempts.save(&work) {
                tracing::debug!(%error, "the seconds so far are not written down");
            }
        }
        events(event);
    })
}

/// What stands between a stage that has run and its publication; gives its headline metrics.
fn finish(
    store: &Store,
    request: &Request,
    out: &Path,
    context: &mut StageContext,
) -> anyhow::Result<BTreeMap<String, f64>> {
    if let Some(problem) = changed_file(store, &request.files)? {
        anyhow::bail!("{problem} while the stage ran; its result was not kept");
    }
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

fn holds_file(folder: &Path) -> std::io::Result<bool> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() || holds_file(&entry.path())? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The finite numbers of an output's `metrics.json`: of its table `metrics`, or of the whole file where it has none.
fn read_metrics(folder: &Path) -> anyhow::Result<BTreeMap<String, f64>> {
    let text = match std::fs::read(folder.join("metrics.json")) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(error.into()),
    };
    let value: Value = serde_json::from_slice(&text)?;
    let fields = value.get("metrics").unwrap_or(&value).as_object().context("it is no table of numbers")?;
    let number = |(name, value): (&String, &Value)| {
        value.as_f64().filter(|number| number.is_finite()).map(|number| (name.clone(), number))
    };
    Ok(fields.iter().filter_map(number).collect())
}

fn draft_outputs(request: &Request, out: &Path) -> Vec<DraftOutput> {
    let draft = |output: &Output| DraftOutput {
        name: output.name.clone(),
        artifact: output.artifact,
        folder: out.join(&output.name),
    };
    request.outputs.iter().map(draft).collect()
}

/// Keeps what a failed attempt left, and its reason at the end of its log.
fn fail(store: &Store, lock: &KeyLock, out: &Path, ended: &Attempts, error: anyhow::Error) -> AttemptError {
    let kept = ended.save(&store.work(lock.key())).and_then(|()| store.keep_failed(lock, out));
    let path = store.logs(lock.key()).join("log.txt");
    let log = std::fs::File::options().append(true).create(true).open(&path);
    let logged = log.and_then(|mut log| writeln!(log, "failed: {error:#}"));
    // The stage's own error is what the user must see; that its traces could not be kept is the smaller news.
    if let Err(second) = kept {
        tracing::warn!(error = %second, "the files of a failed attempt are not kept");
    }
    if let Err(second) = logged {
        tracing::warn!(error = %second, file = %path.display(), "the reason of a failure is not in its log");
    }
    AttemptError::Failed(error)
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

fn io(action: &'static str, path: &Path, cause: std::io::Error) -> StoreError {
    StoreError::Io { action, path: path.to_owned(), cause }
}
