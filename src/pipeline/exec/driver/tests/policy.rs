//! Attempts, limits of time, and stages side by side.

use super::*;
use crate::pipeline::exec::device::Gpus;

fn retrying(act: Act, retries: u32, backoff: &str) -> StageSpec {
    let mut spec = toy("a", "", act, &[]);
    (spec.run.retries, spec.run.backoff) = (retries, backoff.to_owned());
    spec
}

impl Came {
    /// The reasons of the attempts that were followed by another.
    fn retried(&self) -> Vec<&str> {
        let reason = |event: &'_ Event| matches!(event, Event::Retrying { .. });
        let retried = self.events.iter().filter(|event| reason(event));
        retried
            .map(|event| match event {
                Event::Retrying { error, .. } => error.as_str(),
                _ => "",
            })
            .collect()
    }
}

#[test]
fn a_stage_with_retries_is_tried_again() {
    let place = Place::new();
    let came = place.run(&toys(vec![retrying(Act::Flaky, 1, "20ms")]));
    assert_eq!((came.outcome.run, came.outcome.failed), (1, 0));
    assert_eq!((came.retried(), came.failures()), (vec!["the first attempt fails"], vec![]));
    let retry = came.events.iter().find(|event| matches!(event, Event::Retrying { .. })).unwrap();
    let Event::Retrying { attempt, attempts, seconds, .. } = retry else { panic!("{retry:?}") };
    assert_eq!((*attempt, *attempts, *seconds), (2, 2, 0.02));
    let came = place.run(&toys(vec![retrying(Act::Fail, 2, "1ms"), echo("b", "", &["a"])]));
    assert_eq!((came.ran.len(), came.retried().len(), came.outcome.blocked), (3, 2, 1));
    assert_eq!(came.failures(), ["it was meant to fail"]);
}

#[test]
fn times_that_no_clock_shows_never_come() {
    let place = Place::new();
    let longest = format!("{}s", u64::MAX);
    let mut patient = echo("b", "b", &[]);
    patient.run.timeout = Some(longest.clone());
    assert_eq!(place.run(&toys(vec![patient])).outcome.run, 1);
    let stop = std::sync::Arc::clone(&place.options.interrupt);
    let came = place.run_watched(&toys(vec![retrying(Act::Flaky, 1, &longest)]), &mut |event| {
        if matches!(event, Event::Retrying { .. }) {
            stop.store(true, Ordering::Relaxed);
        }
    });
    assert_eq!((came.retried().len(), came.outcome.interrupted), (1, 1));
}

#[test]
fn a_forced_stage_that_fails_at_first_does_not_take_its_old_result() {
    let mut place = Place::new();
    let stages = toys(vec![retrying(Act::Flaky, 1, "1ms")]);
    place.run(&stages);
    place.options.again = vec!["a".into()];
    let came = place.run(&stages);
    assert_eq!((came.ran.len(), came.outcome.run), (2, 1));
    let log = place.store.logs(place.plan(&stages).nodes[0].key.as_ref().unwrap()).join("log.txt");
    assert_eq!(std::fs::read_to_string(log).unwrap().matches("begins").count(), 4);
}

#[test]
fn a_file_that_changed_is_no_reason_to_try_again() {
    let place = Place::new();
    let file = place.folder.path().join("data.jsonl");
    std::fs::write(&file, "one").unwrap();
    let mut spec = with_file("a", &file);
    spec.run.retries = 5;
    let came = place.run_watched(&toys(vec![spec]), &mut |event| {
        if matches!(event, Event::Running { .. }) {
            std::fs::write(&file, "two").unwrap();
        }
    });
    assert_eq!((came.ran.len(), came.retried().len()), (1, 0));
    assert!(came.failures()[0].contains("changed after the run was planned"), "{:?}", came.failures());
}

/// Limits of time to try one after the other, milliseconds: the first is long enough unless the machine is busy.
const LIMITS: [u64; 8] = [100, 200, 400, 800, 2_000, 5_000, 15_000, 60_000];

fn limit(milliseconds: u64) -> String {
    format!("{milliseconds}ms")
}

/// Runs a stage that waits, with the first limit of time that lets it begin to; the limit stays with the stage.
fn ended_inside(place: &Place, spec: &mut StageSpec) -> Came {
    let waits = |event: &Event| matches!(event, Event::Stage { event: StageEvent::Progress { .. }, .. });
    let mut runs = LIMITS.into_iter().map(|milliseconds| {
        spec.run.timeout = Some(limit(milliseconds));
        place.run(&toys(vec![spec.clone()]))
    });
    runs.find(|came| came.events.iter().any(waits)).expect("it begins within a minute")
}

#[test]
fn a_stage_that_takes_too_long_saves_fails_and_goes_on_at_the_next_attempt() {
    let place = Place::new();
    let mut spec = toy("a", "", Act::Wait, &[]);
    let came = ended_inside(&place, &mut spec);
    let stages = toys(vec![spec.clone()]);
    let words = format!("timed out after {}", spec.run.timeout.as_ref().unwrap());
    assert_eq!((came.failures(), came.outcome.interrupted), (vec![words.as_str()], 0));
    assert_eq!(place.plan_says(&stages)[0].1, State::Resume);
    let log = place.store.logs(place.plan(&stages).nodes[0].key.as_ref().unwrap()).join("log.txt");
    assert!(std::fs::read_to_string(log).unwrap().ends_with(&format!("failed: {words}\n")));
    spec.run.timeout = Some("5m".into());
    assert_eq!(place.run(&toys(vec![spec.clone()])).outcome.run, 1);
    // The second attempt ends by itself, for which the limit must be no shorter than it takes.
    let other = |milliseconds: u64| {
        let mut other = toy("a", &format!("other {milliseconds}"), Act::Wait, &[]);
        (other.run.timeout, other.run.retries, other.run.backoff) = (Some(limit(milliseconds)), 1, "1ms".into());
        (place.run(&toys(vec![other])), format!("timed out after {}", limit(milliseconds)))
    };
    let (came, words) = LIMITS.into_iter().map(other).find(|(came, _)| came.outcome.run == 1).unwrap();
    assert_eq!(came.retried(), [words]);
}

#[test]
fn a_worker_that_takes_too_long_and_does_not_listen_is_killed() {
    let place = Place::new();
    let mut spec = remote("a", Act::Deaf, &[]);
    let came = ended_inside(&place, &mut spec);
    assert_eq!(came.failures(), [format!("timed out after {}", spec.run.timeout.unwrap())]);
}

#[test]
fn an_interrupt_ends_the_pause_before_the_next_attempt() {
    let place = Place::new();
    let flag = Arc::clone(&place.options.interrupt);
    let came = place.run_watched(&toys(vec![retrying(Act::Fail, 1, "1h")]), &mut |event| {
        if matches!(event, Event::Retrying { .. }) {
            flag.store(true, Ordering::Relaxed);
        }
    });
    assert_eq!((came.outcome.interrupted, came.outcome.failed, came.ran.len()), (1, 0, 1));
}

#[test]
fn workers_side_by_side_have_a_core_and_a_gpu_each() {
    let mut place = Place::new();
    place.machine =
        Machine { cores: 2, gpus: Gpus::of(&["nvidia0".into(), "nvidia1".into()], Some("5,7")), ..place.machine };
    let report = |name: &str| {
        let mut spec = remote(name, Act::Report, &[]);
        (spec.run.cpus, spec.run.device) = (1, "cuda".into());
        spec
    };
    let stages = toys(vec![report("a"), report("b")]);
    let came = place.run(&stages);
    let first_end = came.events.iter().position(|event| matches!(event, Event::Done { .. })).unwrap();
    let begun = came.events[..first_end].iter().filter(|event| matches!(event, Event::Running { .. }));
    assert_eq!(begun.count(), 2, "both run at once");
    assert_eq!(place.text(&stages, "a"), "1 threads on cuda:0 of 5 out");
    assert_eq!(place.text(&stages, "b"), "1 threads on cuda:0 of 7 out");
    let whole = {
        let mut spec = remote("c", Act::Report, &[]);
        (spec.run.cpus, spec.run.device) = (0, "cpu".into());
        toys(vec![spec])
    };
    place.run(&whole);
    assert_eq!(place.text(&whole, "c"), "2 threads on cpu of  out");
}

#[test]
fn a_need_beyond_the_machine_is_told_and_too_many_slots_stop_the_run() {
    let mut place = Place::new();
    place.machine.memory = 1 << 30;
    let mut spec = echo("a", "", &[]);
    (spec.run.cpus, spec.run.memory) = (64, Some("2GiB".into()));
    let came = place.run(&toys(vec![spec.clone()]));
    let warnings = came.events.iter().filter(|event| matches!(event, Event::Warning { .. }));
    assert_eq!((warnings.count(), came.outcome.run), (2, 1));
    let came = place.run(&toys(vec![spec.clone()]));
    assert!(!came.events.iter().any(|event| matches!(event, Event::Warning { .. })), "nothing runs");
    spec = echo("b", "b", &[]);
    spec.run.slots = [("licence".to_owned(), 2)].into();
    let plan = place.plan(&toys(vec![echo("a", "a", &[]), spec]));
    let mut ran = false;
    let error = execute(&plan, &place.store, &place.options, &mut |_| ran = true).unwrap_err();
    assert!(matches!(error, ExecError::TooFewSlots { asked: 2, there: 1, .. }) && !ran, "{error}");
}
