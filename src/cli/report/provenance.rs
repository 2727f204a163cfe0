//! Where the numbers of a page come from: what computed them, under which keys, from which files.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::cli::render;
use crate::cli::report::html::escaped;
use crate::pipeline::plan::{Plan, State};
use crate::pipeline::spec::Experiment;
use crate::pipeline::store::Store;

/// The section of all experiments together.
pub(super) fn section(experiments: &[Experiment], plan: &Plan, store: &Store) -> String {
    let mut text = String::from("<section>\n<h2>Where it comes from</h2>\n");
    let mut machines: BTreeMap<Vec<(String, String)>, usize> = BTreeMap::new();
    let mut keys = String::new();
    let (mut first, mut last, mut seconds): (Option<String>, Option<String>, f64) = (None, None, 0.0);
    for node in &plan.nodes {
        let kind = node.spec.kind.name;
        let name = escaped(&render::node(node.name()));
        let more = node.names.len() - 1;
        let name = if more > 0 { format!("{name} <span class=\"faint\">and {more} more</span>") } else { name };
        let found = node.key.as_ref().filter(|_| node.state == State::Cached);
        let Some(manifest) = found.and_then(|key| store.manifest_of(key).ok().flatten()) else {
            let _ = writeln!(
                keys,
                "<tr><td>{name}</td><td class=\"left\">{kind}</td><td class=\"left\">no result</td><td></td><td></td></tr>"
            );
            continue;
        };
        let numerics: Vec<_> = manifest.numerics.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        *machines.entry(numerics).or_default() += 1;
        seconds += manifest.seconds;
        if first.as_ref().is_none_or(|first| manifest.finished < *first) {
            first = Some(manifest.finished.clone());
        }
        if last.as_ref().is_none_or(|last| manifest.finished > *last) {
            last = Some(manifest.finished.clone());
        }
        let accepted = manifest.accepted.as_ref().map(|accepted| format!(" accepted: {}", escaped(&accepted.reason)));
        let _ = writeln!(
            keys,
            "<tr><td>{name}</td><td class=\"left\">{kind} {}</td><td class=\"left\"><code>{}</code>{}</td><td>{}</td><td>{}</td></tr>",
            manifest.parts.version,
            manifest.key.short(),
            accepted.unwrap_or_default(),
            render::duration(manifest.seconds),
            escaped(&day(&manifest.finished)),
        );
    }
    let version = env!("CARGO_PKG_VERSION");
    let _ = write!(text, "<p>Written by pipe {version}; {}", render::plural(plan.nodes.len(), "stage"));
    if let (Some(first), Some(last)) = (first, last) {
        let took = render::duration(seconds);
        let _ = write!(
            text,
            " that took {took} in all, finished between {} and {}",
            escaped(&day(&first)),
            escaped(&day(&last))
        );
    }
    text.push_str(".</p>\n<h3>Computed with</h3>\n");
    let mut machines: Vec<_> = machines.into_iter().collect();
    machines.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (numerics, count) in machines {
        let parts = numerics.iter().map(|(name, value)| format!("{} <code>{}</code>", escaped(name), escaped(value)));
        let _ = writeln!(text, "<p>{}: {}</p>", render::plural(count, "result"), parts.collect::<Vec<_>>().join(", "));
    }
    for experiment in experiments {
        let source = std::fs::read_to_string(&experiment.path).unwrap_or_default();
        let _ = writeln!(
            text,
            "<details><summary>{}</summary><pre>{}</pre></details>",
            escaped(&experiment.path.display().to_string()),
            escaped(&source)
        );
    }
    let _ = writeln!(
        text,
        "<details><summary>Keys of every result</summary><div class=\"scroll\"><table>\n<thead><tr><th>stage</th><th class=\"left\">kind, \
         version</th><th class=\"left\">key</th><th>took</th><th>finished</th></tr></thead>\n<tbody>\n{keys}</tbody></table></div></details>\n</section>"
    );
    text
}

/// A time to the minute.
fn day(time: &str) -> String {
    time.get(..16).map_or_else(|| time.to_owned(), |time| time.replace('T', " "))
}
