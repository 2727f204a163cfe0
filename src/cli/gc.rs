//! `pipe gc`: removes what nobody needs. It plans first, says what would go and why the rest stays, and asks.

use std::io::{BufRead as _, IsTerminal as _};
use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::cli::failure::Failure;
use crate::cli::{Session, render, store_hint};
use crate::pipeline::store::{GarbageKind, GcPlan, GcPolicy, Gone, Kept, Store, StoreError, Tally};

/// Results that are listed; `--json` lists all.
const SHOWN: usize = 20;

/// Remove results and leftovers that nobody needs; without a policy, leftovers alone
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent options of the user's")]
pub struct Args {
    /// Remove results that were last used longer ago than this, as `30d`, `12h` or `2w`
    #[arg(long, value_name = "AGE", value_parser = age)]
    older_than: Option<Duration>,
    /// Remove the results used least recently until the store is no larger than this, as `50GiB` or `200GB`
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_size: Option<u64>,
    /// Keep the newest N results of every stage of every trial; alone, remove what they replaced
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    keep_last: Option<u64>,
    /// Keep the results that these experiments need as they are now
    #[arg(long, value_name = "FILES", num_args = 1..)]
    keep: Vec<PathBuf>,
    /// Lay a value over every file of `--keep`, as for `pipe run`
    #[arg(long = "set", value_name = "PATH=VALUE", requires = "keep")]
    sets: Vec<String>,
    /// Keep what results that stay were made from
    #[arg(long)]
    keep_inputs: bool,
    /// Only say what would go
    #[arg(long, short = 'n')]
    dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Never remove the results of a key or of `EXPERIMENT[/TRIAL][/STAGE]`, now and later
    #[arg(long, value_name = "NAME", conflicts_with_all = ["unpin", "pins", "older_than", "max_size", "keep_last", "keep"])]
    pin: Option<String>,
    /// Take a pin back
    #[arg(long, value_name = "NAME", conflicts_with_all = ["pins", "older_than", "max_size", "keep_last", "keep"])]
    unpin: Option<String>,
    /// List the pins
    #[arg(long, conflicts_with_all = ["older_than", "max_size", "keep_last", "keep"])]
    pins: bool,
}

/// With `--json`, the plan, and under `removed` what was done.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    // A store that is not there is not made by tidying it up.
    if session.existing_store()?.is_none() {
        return Err(Failure::wrong(format!("there is no store at `{}`", session.store.display()))
            .hint("name it with `--store DIR` or PIPE_STORE"));
    }
    let reads_only = args.dry_run || args.pins;
    let store = if reads_only { session.existing_store()? } else { None };
    let store = match store {
        Some(store) => store,
        None => Store::open(&session.store).map_err(|error| Failure::input(&error).hint(store_hint(&session.store)))?,
    };
    if args.pin.is_some() || args.unpin.is_some() || args.pins {
        return pins(args, session, &store);
    }
    collect(args, session, &store)
}

fn collect(args: &Args, session: &Session, store: &Store) -> Result<(), Failure> {
    let ui = &session.ui;
    let policy = policy(args, session, store)?;
    let bar = bar(session, "reading");
    let plan = store.plan_gc(&policy, &|done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let plan = plan.map_err(failed)?;
    let goes = !args.dry_run && !plan.is_empty();
    if !ui.is_json() {
        ui.data(&text(&plan))?;
        notes(&plan, args, session);
    }
    if goes && !args.yes && !confirmed(session)? {
        return Err(Failure::failed("nothing was removed"));
    }
    let report = if goes {
        let bar = self::bar(session, "removing");
        let report = store.collect_garbage(
            &plan,
            &mut |done, total| {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
            },
            &mut || ui.note("waits for a result that is being published"),
        );
        bar.finish_and_clear();
        Some(report.map_err(failed)?)
    } else {
        if !args.dry_run {
            // Nothing goes, but what ended runs have left of their leases is put together.
            store.collect_garbage(&plan, &mut |_, _| (), &mut || ()).map_err(failed)?;
        }
        None
    };
    if ui.is_json() {
        let mut shown = serde_json::to_value(&plan).expect("a plan is plain data");
        shown["removed"] = json!(report);
        return ui.json_pretty(&shown);
    }
    if let Some(report) = report {
        let objects = render::plural(report.objects, "object");
        ui.note(&format!(
            "removed {} with {objects} and {}: {} freed",
            render::plural(report.results, "result"),
            render::plural(report.garbage, "leftover"),
            render::bytes(report.freed as f64)
        ));
        if report.busy > 0 {
            ui.note(&format!("{} stayed: in use since the plan was made", render::count(report.busy as u64)));
        }
    }
    Ok(())
}

fn policy(args: &Args, session: &Session, store: &Store) -> Result<GcPolicy, Failure> {
    let mut policy = GcPolicy {
        older_than: args.older_than,
        max_size: args.max_size,
        keep_last: args.keep_last.map(|last| usize::try_from(last).unwrap_or(usize::MAX)),
        keep_inputs: args.keep_inputs,
        ..GcPolicy::default()
    };
    if !args.keep.is_empty() {
        let experiments = session.read(&args.keep, &args.sets)?;
        let plan = session.plan(&experiments, Some(store))?;
        policy.roots.extend(plan.nodes.iter().filter_map(|node| node.key.clone()));
        // Below a stage that is to run again keys are not known: there the last results of the names are kept.
        for name in plan.nodes.iter().filter(|node| node.key.is_none()).flat_map(|node| &node.names) {
            let record = store.recorded(&name.experiment, &name.trial, &name.stage).map_err(failed)?;
            policy.roots.extend(record.map(|record| record.key));
        }
    }
    Ok(policy)
}

/// Asks on a terminal; without one nobody can say yes.
fn confirmed(session: &Session) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Failure::wrong("nothing was removed: there is no terminal to ask at")
            .hint("`--yes` removes without asking, `--dry-run` only shows"));
    }
    session.ui.ask("remove this? [y/N]");
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|error| Failure::failed(format!("cannot read the answer: {error}")))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn pins(args: &Args, session: &Session, store: &Store) -> Result<(), Failure> {
    let ui = &session.ui;
    if let Some(name) = &args.pin {
        let Some(pin) = store.pin(name).map_err(failed)? else {
            return Err(Failure::wrong(format!("`{name}` is no key and no name of a recorded result"))
                .hint("a name reads `EXPERIMENT`, `EXPERIMENT/STAGE`, `EXPERIMENT/TRIAL` or `EXPERIMENT/TRIAL/STAGE`; a key has at least 8 digits"));
        };
        ui.note(&format!("pinned `{}`: {}", pin.name, render::plural(pin.keys.len(), "result")));
        return if ui.is_json() { ui.json_pretty(&pin) } else { Ok(()) };
    }
    if let Some(name) = &args.unpin {
        if !store.unpin(name).map_err(failed)? {
            let known = store.pins().map_err(failed)?;
            let near = render::near(name, known.iter().map(|pin| pin.name.as_str()));
            let failure = Failure::wrong(format!("there is no pin `{name}`"));
            let hint = near
                .first()
                .map_or_else(|| "`pipe gc --pins` lists them".to_owned(), |near| format!("did you mean `{near}`?"));
            return Err(failure.hint(hint));
        }
        ui.note(&format!("unpinned `{name}`"));
        return Ok(());
    }
    let pins = store.pins().map_err(failed)?;
    if ui.is_json() {
        return ui.json_pretty(&pins);
    }
    let rows = pins.iter().map(|pin| vec![pin.name.clone(), pin.keys.len().to_string(), pin.pinned.clone()]).collect();
    ui.data(&render::columns(&["pin", "results", "since"], &[1], rows, ui.output_width()))
}

fn text(plan: &GcPlan) -> String {
    let mut text = Vec::new();
    if plan.is_empty() {
        text.push("nothing to remove".to_owned());
    }
    if !plan.results.is_empty() {
        let rows = plan.results.iter().take(SHOWN).map(|one| {
            let name = if one.name.is_empty() { "-".to_owned() } else { one.name.clone() };
            let used = one.last_used.strftime("%Y-%m-%d").to_string();
            vec![
                one.key.short().to_owned(),
                one.kind.clone(),
                name,
                used,
                render::bytes(one.bytes as f64),
                gone(one.why).to_owned(),
            ]
        });
        let header = ["result", "kind", "stage", "last used", "size", "goes because"];
        text.push(render::columns(&header, &[4], rows.collect(), None).trim_end().to_owned());
        if plan.results.len() > SHOWN {
            text.push(format!("... and {} more", render::count((plan.results.len() - SHOWN) as u64)));
        }
        text.push(String::new());
    }
    let mut kinds: std::collections::BTreeMap<GarbageKind, Tally> = std::collections::BTreeMap::new();
    for one in &plan.garbage {
        let tally = kinds.entry(one.kind).or_default();
        tally.count += 1;
        tally.bytes += one.bytes;
    }
    for (kind, tally) in kinds {
        let bytes = render::bytes(tally.bytes as f64);
        text.push(format!("goes: {} {} ({bytes})", render::count(tally.count as u64), garbage(kind, tally.count)));
    }
    for (why, tally) in &plan.kept {
        let bytes = render::bytes(tally.bytes as f64);
        text.push(format!("stays: {} ({bytes}), {}", render::plural(tally.count, "result"), kept(*why)));
    }
    text.push(format!("{} of {} would be freed", render::bytes(plan.freed as f64), render::bytes(plan.size as f64)));
    text.join("\n")
}

fn notes(plan: &GcPlan, args: &Args, session: &Session) {
    let ui = &session.ui;
    if plan.inputs_of_kept > 0 {
        ui.note(&format!(
            "{} that would go went into results that stay: those stay whole, but making them again would need these \
             first (`--keep-inputs` keeps them)",
            render::plural(plan.inputs_of_kept, "result")
        ));
    }
    if plan.over > 0 {
        let over = render::bytes(plan.over as f64);
        ui.warn(&format!("the store stays {over} above `--max-size`: what is left is kept by other rules"));
    }
    if plan.unreadable > 0 {
        let number = render::plural(plan.unreadable, "manifest");
        ui.warn(&format!("{number} cannot be read; `pipe verify --repair` puts them aside"));
    }
    let policy = args.older_than.is_some() || args.max_size.is_some() || args.keep_last.is_some();
    if !policy && plan.is_empty() {
        ui.note("results go only by a policy: `--older-than`, `--max-size` or `--keep-last`");
    }
}

fn gone(why: Gone) -> &'static str {
    match why {
        Gone::Old => "it was not used for so long",
        Gone::Superseded => "newer results stand in its place",
        Gone::Size => "the store is too large",
    }
}

fn kept(why: Kept) -> &'static str {
    match why {
        Kept::InUse => "in use by a run",
        Kept::Pinned => "pinned",
        Kept::Needed => "needed by the files of `--keep`",
        Kept::Newest => "the newest of their stages",
        Kept::Input => "went into results that stay",
        Kept::NoRule => "no rule wants them gone",
    }
}

fn garbage(kind: GarbageKind, count: usize) -> String {
    let (one, many) = match kind {
        GarbageKind::Object => ("object of no result", "objects of no result"),
        GarbageKind::FinishedWork => ("work folder of a finished stage", "work folders of finished stages"),
        GarbageKind::KilledAttempt => ("leftover of a killed attempt", "leftovers of killed attempts"),
        GarbageKind::FailedAttempt => ("leftover of a failed attempt", "leftovers of failed attempts"),
        GarbageKind::OldWork => {
            ("folder of saved work that nobody went on with", "folders of saved work that nobody went on with")
        }
        GarbageKind::Import => ("import that was killed", "imports that were killed"),
        GarbageKind::Logs => ("folder of logs of no result", "folders of logs of no result"),
        GarbageKind::Quarantine => ("folder of damaged files", "folders of damaged files"),
        GarbageKind::Link => ("link to curves that are gone", "links to curves that are gone"),
        GarbageKind::Temporary => ("half-written file", "half-written files"),
        GarbageKind::Trash => ("leftover of an earlier collection", "leftovers of an earlier collection"),
    };
    if count == 1 { one.to_owned() } else { many.to_owned() }
}

fn bar(session: &Session, what: &'static str) -> ProgressBar {
    let bar = session.ui.bars().add(ProgressBar::no_length());
    let style = ProgressStyle::with_template("{prefix} {bar:20} {pos} of {len}, {eta} left");
    bar.set_style(style.expect("the template is well formed"));
    bar.set_prefix(what);
    bar
}

#[expect(clippy::needless_pass_by_value, reason = "it is handed to `map_err`")]
fn failed(error: StoreError) -> Failure {
    Failure::stage(&error)
}

/// `30d`, `12h`, `2w`, `90m`.
fn age(text: &str) -> Result<Duration, String> {
    let units = [("m", 60), ("h", 3600), ("d", 86_400), ("w", 7 * 86_400)];
    let read =
        units.iter().find_map(|(unit, seconds)| text.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(*seconds));
    read.map(Duration::from_secs)
        .ok_or_else(|| "expected a whole number with `m`, `h`, `d` or `w`, as `30d`".to_owned())
}

/// `50GiB`, `200GB`, `1.5TB`, `1000000`.
fn size(text: &str) -> Result<u64, String> {
    let units = [
        ("KiB", 1u64 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
        ("", 1),
    ];
    let read = units
        .iter()
        .find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.trim().parse::<f64>().ok()? * *factor as f64));
    let valid = read.filter(|bytes| bytes.is_finite() && *bytes >= 0.0);
    valid.map(|bytes| bytes as u64).ok_or_else(|| "expected a size as `50GiB`, `200GB` or `1000000`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_and_sizes_are_read() {
        assert_eq!(age("30d"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(age("0d"), Ok(Duration::ZERO));
        assert_eq!(size("50GiB"), Ok(50 << 30));
        assert_eq!(size("1.5 kB"), Ok(1500));
        assert_eq!(size("0"), Ok(0));
        for wrong in ["", "30", "d", "-1d", "1.5d", "99999999999999999999w", "99999999999999999w"] {
            assert!(age(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "GB", "-1GB", "infGB", "5 apples", "nan"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
