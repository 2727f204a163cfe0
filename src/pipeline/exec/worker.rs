//! The worker: a process that runs one stage. Both ends of what it and the driver say to each other stand here.
//!
//! The driver starts `pipe-worker` with a socket as its standard input and writes one [`Request`] as a line of JSON. The
//! worker answers with [`Message`]s, one a line; the last tells how it ended. Standard output and error are the stage's log,
//! so whatever a library prints cannot spoil the talk. When the driver dies the socket closes, and the worker saves and stops.
//!
//! It must never know a kind: runners are an argument.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::exec::attempt::{AttemptError, Request, attempt};
use crate::pipeline::exec::throttle::Throttle;
use crate::pipeline::stage::{StageContext, StageEvent};
use crate::pipeline::store::Store;

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum Message {
    /// The stage says something.
    Event {
        /// What.
        event: StageEvent,
    },
    /// The end: the result is there.
    Done {
        /// Whether the stage ran, or found what another process had made meanwhile.
        ran: bool,
    },
    /// The end: the work is saved.
    Interrupted,
    /// The end: another process works on the key.
    Elsewhere,
    /// The end: the stage failed.
    Failed {
        /// The error and its causes, outermost first.
        causes: Vec<String>,
        /// Whether another attempt in this run would be in vain.
        lasting: bool,
    },
    /// The end: an input is damaged and was put aside.
    DamagedInput {
        /// The input, as the stage names it.
        reference: String,
        /// What is wrong.
        what: String,
    },
    /// The end: the stage ran, and what it made was lost before it was durable.
    Lost {
        /// What is wrong.
        what: String,
    },
}

/// Runs a stage of one kind from its parameters.
pub type Runner = fn(&Value, &mut StageContext) -> anyhow::Result<()>;

/// What a worker program brings along.
pub struct Program<'a> {
    /// Kind to runner.
    pub runners: &'a [(&'static str, Runner)],
    /// Called once before anything else: checks that the device is there, and adds what the program knows of itself to
    /// [`Request::numerics`].
    pub prepare: fn(&mut Request) -> anyhow::Result<()>,
    /// Called just before the runner: sets the threads of computation, whose number saved work may have fixed.
    pub set_threads: fn(usize),
}

/// The life of a worker; gives the exit status of the process. An error means that no driver talks to it.
pub fn serve(program: &Program<'_>) -> anyhow::Result<u8> {
    let no_driver = "no driver at standard input: `pipe run` starts this program";
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().context(no_driver)?);
    socket.peer_addr().context(no_driver)?;
    let mut reader = BufReader::new(socket.try_clone().context("cannot copy the driver's socket")?);
    let speaker = Speaker(Arc::new(Mutex::new(socket)));
    let interrupt = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&interrupt)).context("cannot listen to signals")?;
    }
    let mut line = String::new();
    reader.read_line(&mut line).context("cannot read the request")?;
    let driver_gone = Arc::clone(&interrupt);
    std::thread::Builder::new()
        .name("driver".to_owned())
        .spawn(move || {
            // The driver says nothing more; the end of its side, or an error, is its death.
            while reader.read_line(&mut String::new()).is_ok_and(|bytes| bytes > 0) {}
            driver_gone.store(true, Ordering::Relaxed);
        })
        .context("cannot start a thread")?;
    let ending = match one_request(program, &line, &interrupt, &speaker) {
        Ok(ran) => Message::Done { ran },
        Err(AttemptError::Interrupted) => Message::Interrupted,
        Err(AttemptError::Elsewhere) => Message::Elsewhere,
        Err(AttemptError::DamagedInput { reference, what, .. }) => Message::DamagedInput { reference, what },
        Err(AttemptError::Lost(what)) => Message::Lost { what },
        Err(AttemptError::Failed(error)) => Message::Failed { causes: causes(&error), lasting: false },
        Err(AttemptError::Lasting(error)) => Message::Failed { causes: causes(&error), lasting: true },
        Err(AttemptError::Store(error)) => Message::Failed { causes: vec![error.to_string()], lasting: false },
    };
    speaker.say(&ending);
    Ok(match ending {
        Message::Done { .. } => 0,
        Message::Interrupted => 130,
        _ => 1,
    })
}

fn causes(error: &anyhow::Error) -> Vec<String> {
    error.chain().map(ToString::to_string).collect()
}

/// Runs what the request asks for; gives whether that was still to do.
fn one_request(
    program: &Program<'_>,
    line: &str,
    interrupt: &Arc<AtomicBool>,
    speaker: &Speaker,
) -> Result<bool, AttemptError> {
    let request = serde_json::from_str::<Request>(line).context(
        "cannot understand the request; build `pipe` and `pipe-worker` from one source: `cargo build --workspace`",
    );
    let mut request = request.map_err(AttemptError::Lasting)?;
    (program.prepare)(&mut request).map_err(AttemptError::Lasting)?;
    let Some((_, runner)) = program.runners.iter().find(|(kind, _)| *kind == request.kind) else {
        let error = anyhow::anyhow!(
            "this `pipe-worker` does not know the kind `{}`; run `cargo build --workspace`",
            request.kind
        );
        return Err(AttemptError::Lasting(error));
    };
    let store = Store::open(&request.store)?;
    let (mut throttle, events) = (Throttle::default(), speaker.clone());
    let events = Box::new(move |event: StageEvent| {
        if throttle.lets_through(&event, Instant::now()) {
            for event in finite(event) {
                events.say(&Message::Event { event });
            }
        }
    });
    let run = |context: &mut StageContext| {
        (program.set_threads)(context.resources.threads);
        runner(&request.params, context)
    };
    let attempted = attempt(&store, &request, &run, Arc::clone(interrupt), events)?;
    attempted.commit(&store)
}

/// The worker's side of the socket, shared by the stage's events and the ending.
#[derive(Clone)]
struct Speaker(Arc<Mutex<UnixStream>>);

impl Speaker {
    fn say(&self, message: &Message) {
        let mut line = serde_json::to_vec(message).expect("a message is plain data");
        line.push(b'\n');
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A driver that is gone hears nothing; the other thread sees the socket close and ends the stage.
        if let Err(error) = socket.write_all(&line) {
            tracing::debug!(%error, "the driver does not listen");
        }
    }
}

/// JSON has no inf and nan: such metrics are told as a note instead.
fn finite(event: StageEvent) -> Vec<StageEvent> {
    let StageEvent::Metrics { values } = event else { return vec![event] };
    let (values, rest): (BTreeMap<_, _>, BTreeMap<_, _>) = values.into_iter().partition(|(_, value)| value.is_finite());
    let notes =
        rest.into_iter().map(|(name, value)| StageEvent::Note { text: format!("the metric `{name}` is {value}") });
    notes.chain((!values.is_empty()).then_some(StageEvent::Metrics { values })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_line() {
        let event = StageEvent::Progress { done: 1, total: 2, unit: "a\nb".into() };
        for message in
            [Message::Event { event }, Message::Elsewhere, Message::Failed { causes: vec!["x".into()], lasting: true }]
        {
            let line = serde_json::to_string(&message).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Message>(&line).unwrap(), message);
        }
    }

    #[test]
    fn a_metric_that_is_no_number_is_told_in_words() {
        let values = BTreeMap::from([("loss".to_owned(), f64::NAN), ("reward".to_owned(), 1.0)]);
        let told = finite(StageEvent::Metrics { values });
        assert_eq!(
            told,
            [
                StageEvent::Note { text: "the metric `loss` is NaN".into() },
                StageEvent::Metrics { values: BTreeMap::from([("reward".to_owned(), 1.0)]) }
            ]
        );
    }
}
