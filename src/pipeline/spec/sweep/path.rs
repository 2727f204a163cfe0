//! Swept paths: how tables spell them, and whether they lead somewhere.

use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean, expected};
use crate::pipeline::spec::parse::parse_path;
use crate::pipeline::spec::source::Span;
use crate::pipeline::spec::sweep::Leaf;
use crate::pipeline::spec::tree::{Entry, Node, Value};

/// What is told of a path that begins otherwise.
const BEGIN: &str = "a swept path begins with `params.` or `stages.`";

/// Every path below `table` with its value: `"stages.sft.steps" = 1` and `stages.sft.steps = 1` are the same path.
pub(in crate::pipeline::spec) fn leaves(table: &Node) -> Vec<(Vec<String>, Span, &Node)> {
    let mut found = Vec::new();
    collect(table, &mut Vec::new(), &mut found);
    found
}

fn collect<'a>(table: &'a Node, above: &mut Vec<String>, found: &mut Vec<(Vec<String>, Span, &'a Node)>) {
    for (name, entry) in table.table().into_iter().flatten() {
        let depth = above.len();
        above.extend(parse_path(name).unwrap_or_else(|| vec![name.to_string()]));
        match &entry.node.value {
            Value::Table(inner) if !inner.is_empty() => collect(&entry.node, above, found),
            _ => found.push((above.clone(), entry.key, &entry.node)),
        }
        above.truncate(depth);
    }
}

/// Whether the path of a swept value leads somewhere. Fields of stages are judged by the stage's schema when the trial is
/// resolved.
pub(super) fn check(segments: &[String], key: Span, root: &Node, report: &mut Report) -> bool {
    let path = segments.join(".");
    let refuse = |message: String| Mistake::at(key, message);
    if let Some(whole) = whole(segments, root) {
        let mistake = refuse(format!("`{path}` cannot be swept")).label(BEGIN);
        report.add(mistake.hint(format!("did you mean `{whole}`?")));
        return false;
    }
    if !check_begin(segments, key, report) {
        return false;
    }
    let (top, name) = (segments[0].as_str(), segments[1].as_str());
    let table = root.get(top).and_then(|entry| entry.node.table());
    if !table.is_some_and(|table| table.contains_key(name)) {
        let what = if top == "params" { "parameter" } else { "stage" };
        let names = || table.into_iter().flatten().map(|(name, _)| name.as_ref());
        let mistake = refuse(format!("unknown {what} `{name}` in a swept path")).label(expected(names()));
        let mistake = mistake.hint(did_you_mean(name, names()));
        report.add(if top == "stages" { mistake.absent_stage() } else { mistake });
        return false;
    }
    let depth = segments.len();
    if (top == "params" && depth != 2) || (top == "stages" && depth < 3) {
        let label =
            if top == "params" { "a parameter has no fields" } else { "expected a field of the stage behind it" };
        report.add(refuse(format!("`{path}` is not the path of a value")).label(label));
        return false;
    }
    true
}

/// The whole path of one that names a parameter or a field of a stage without saying so: `rate`, `sft.steps`.
fn whole(segments: &[String], root: &Node) -> Option<String> {
    let first = segments.first()?;
    let has = |top: &str| root.get(top).is_some_and(|entry| entry.node.get(first).is_some());
    let top = match segments.len() {
        _ if matches!(first.as_str(), "params" | "stages") => return None,
        1 if has("params") => "params",
        2.. if has("stages") => "stages",
        _ => return None,
    };
    Some(format!("{top}.{}", segments.join(".")))
}

/// Whether a path begins with what may be swept at all.
pub(super) fn check_begin(segments: &[String], key: Span, report: &mut Report) -> bool {
    let message = format!("`{}` cannot be swept", segments.join("."));
    let top = segments.first().map_or("", String::as_str);
    if segments.len() < 2 || !matches!(top, "params" | "stages") {
        let mistake = Mistake::at(key, message).label(BEGIN);
        let meant = did_you_mean(top, ["params", "stages"]).filter(|_| !matches!(top, "params" | "stages"));
        report.add(mistake.hint(meant));
        return false;
    }
    if top == "stages" && segments.get(2).is_some_and(|field| field == "run") {
        report.add(Mistake::at(key, message).label("what `run` says changes no result"));
        return false;
    }
    true
}

/// The table at `path` in the document, for what names one; `option` is what named it.
pub(super) fn table_at<'a>(
    path: &Node,
    option: &str,
    root: &'a Node,
    report: &mut Report,
) -> Option<(Vec<String>, &'a Entry)> {
    let text = path.text()?;
    let segments = parse_path(text).unwrap_or_default();
    if !check_begin(&segments, path.span, report) {
        return None;
    }
    let mut entry = root.get(&segments[0])?;
    for (depth, name) in segments.iter().enumerate().skip(1) {
        let Some(next) = entry.node.get(name) else {
            let above = segments[..depth].join(".");
            let names = entry.node.table().into_iter().flatten().map(|(name, _)| name.as_ref());
            let message = format!("`{option}` names `{text}`, but `{above}` has no `{name}`");
            report.add(Mistake::at(path.span, message).hint(did_you_mean(name, names)));
            return None;
        };
        entry = next;
    }
    let entries = entry.node.table().into_iter().flatten();
    let not_tables: Vec<&str> =
        entries.filter(|(_, entry)| entry.node.table().is_none()).map(|(name, _)| name.as_ref()).collect();
    let is_whole = segments.len() >= 3 && entry.node.table().is_some() && not_tables.is_empty();
    if !is_whole {
        let message = format!("`{option}` names `{text}`, which is no table of named tables");
        let label = match not_tables.first() {
            Some(name) => format!("`{name}` in it is no table"),
            None => "expected a path such as `stages.grpo.rewards`".to_owned(),
        };
        report.add(Mistake::at(path.span, message).label(label));
        return None;
    }
    Some((segments, entry))
}

impl Leaf {
    /// Its path and value as an overlay.
    pub(super) fn overlay(&self) -> Node {
        Node::nested(&self.segments, self.key, self.value.clone())
    }
}
