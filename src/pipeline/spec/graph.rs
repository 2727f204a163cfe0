//! The edges between stages: each must lead to a stage and an output of the type that is wanted, and none may lead round.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, OnceLock};

use petgraph::algo::kosaraju_scc;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;
use serde_json::Value;

use crate::pipeline::spec::StageSpec;
use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean, expected};
use crate::pipeline::spec::tree::Entry;
use crate::pipeline::spec::walk::{Edge, with_article};
use crate::pipeline::stage::{ArtifactType, Output, Stages, meant};

/// A stage that was walked.
pub(super) struct Checked {
    /// Its name.
    pub(super) name: Arc<str>,
    /// Its table, parameters substituted.
    pub(super) entry: Entry,
    /// What became of it; none where it is wrong.
    pub(super) spec: Option<StageSpec>,
    /// Its outputs; none where it is wrong.
    pub(super) outputs: Vec<Output>,
    /// Its inputs.
    pub(super) edges: Vec<Edge>,
    /// Its serialised parameters, once someone has asked for them.
    pub(super) params: OnceLock<Value>,
}

/// The stages of a trial by name.
pub(super) type CheckedStages = BTreeMap<Arc<str>, Arc<Checked>>;

/// The same as a stage's own checks see them.
pub(super) struct Serialized<'a>(pub(super) &'a CheckedStages);

impl fmt::Debug for Serialized<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Stages for Serialized<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        let checked = self.0.get(name)?;
        let spec = checked.spec.as_ref()?;
        Some(checked.params.get_or_init(|| spec.stage.params()))
    }
}

type Graph<'a> = DiGraph<&'a Arc<Checked>, &'a Edge>;

/// Checks the edges and gives the stages that are right together with everything that they rest on.
pub(super) fn check<'a>(stages: &'a CheckedStages, report: &mut Report) -> Vec<&'a Arc<Checked>> {
    let mut graph = Graph::with_capacity(stages.len(), stages.len());
    let indices: HashMap<&str, NodeIndex> =
        stages.iter().map(|(name, checked)| (name.as_ref(), graph.add_node(checked))).collect();
    let mut unsound: Vec<NodeIndex> = Vec::new();
    for (name, consumer) in stages {
        let to = indices[name.as_ref()];
        if consumer.spec.is_none() {
            unsound.push(to);
        }
        for edge in &consumer.edges {
            let (stage, output) =
                edge.reference.split_once('.').map_or((&*edge.reference, None), |(a, b)| (a, Some(b)));
            let Some(producer) = stages.get(stage) else {
                report.add(dangling(stage, name, edge, stages));
                unsound.push(to);
                continue;
            };
            graph.add_edge(indices[stage], to, edge);
            if let Some(mistake) = mismatch(producer, output, name, edge) {
                report.add(mistake);
                unsound.push(to);
            }
        }
    }
    unsound.extend(cycles(&graph, report));
    let mut reached: BTreeSet<NodeIndex> = unsound.iter().copied().collect();
    while let Some(node) = unsound.pop() {
        unsound.extend(graph.neighbors(node).filter(|next| reached.insert(*next)));
    }
    graph.node_indices().filter(|node| !reached.contains(node)).map(|node| graph[node]).collect()
}

fn dangling(stage: &str, consumer: &str, edge: &Edge, stages: &CheckedStages) -> Mistake {
    let message = format!("unknown stage `{stage}` in `{}` of stage `{consumer}`", edge.field);
    // Only stages that make what is wanted are worth naming, where that is known.
    let fits = |checked: &&Arc<Checked>| {
        *checked.name != *consumer
            && (checked.outputs.is_empty() || checked.outputs.iter().any(|output| takes(&edge.wants, output)))
    };
    let names = || stages.values().filter(fits).map(|checked| checked.name.as_ref());
    let hint = did_you_mean(stage, names()).or_else(|| did_you_mean(stage, stages.keys().map(AsRef::as_ref)));
    Mistake::at(edge.span, message).label(expected(names())).hint(hint).via(edge.via).absent_stage()
}

fn takes(wants: &str, output: &Output) -> bool {
    wants == "any" || output.artifact.name() == wants
}

/// What is wrong with an edge to `producer`, as far as that can be told.
fn mismatch(producer: &Checked, output: Option<&str>, consumer: &str, edge: &Edge) -> Option<Mistake> {
    producer.outputs.first()?;
    let name = &producer.name;
    let (field, wants) = (&edge.field, &edge.wants);
    let wanted = ArtifactType::named(wants);
    let found = match (meant(&producer.outputs, output, wanted), output) {
        (Ok(found) | Err(Some(found)), _) => found,
        (Err(None), output) => {
            let output = output.unwrap_or_default();
            let names = || producer.outputs.iter().map(|output| output.name.as_str());
            let message = format!("stage `{name}` has no output `{output}` for `{field}` of stage `{consumer}`");
            let mistake = Mistake::at(edge.span, message).label(expected(names()));
            return Some(mistake.hint(did_you_mean(output, names())).via(edge.via));
        }
    };
    if takes(wants, found) {
        return None;
    }
    let artifact = with_article(&found.artifact.to_string());
    let reference = &edge.reference;
    let message =
        format!("`{field}` of stage `{consumer}` wants {}, but `{reference}` is {artifact}", with_article(wants));
    let other = producer.outputs.iter().find(|output| takes(wants, output));
    let hint = other.map(|other| format!("did you mean `{name}.{}`?", other.name));
    Some(Mistake::at(edge.span, message).hint(hint).via(edge.via))
}

/// Reports every cycle and gives the stages that lie on one.
fn cycles(graph: &Graph<'_>, report: &mut Report) -> Vec<NodeIndex> {
    let mut circular = Vec::new();
    // Kosaraju's algorithm, because Tarjan's is recursive here and a chain of 100,000 stages would overflow the stack.
    for component in kosaraju_scc(graph) {
        let Some(start) = component.iter().copied().min_by_key(|node| &graph[*node].name) else { continue };
        if component.len() == 1 && graph.find_edge(start, start).is_none() {
            continue;
        }
        let (names, edge) = round(graph, start);
        let message = format!("the stages form a cycle: `{}`", names.join(" -> "));
        let label = format!("`{}` rests on itself through this input", graph[start].name);
        report.extend(edge.map(|edge| Mistake::at(edge.span, message).label(label).via(edge.via)));
        circular.extend(component);
    }
    circular
}

/// The shortest way from `start` back to it, and its last edge.
fn round<'a>(graph: &Graph<'a>, start: NodeIndex) -> (Vec<&'a str>, Option<&'a Edge>) {
    let mut before: HashMap<NodeIndex, NodeIndex> = HashMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(node) = queue.pop_front() {
        for edge in graph.edges(node) {
            if edge.target() == start {
                let mut names = vec![graph[start].name.as_ref()];
                let mut at = node;
                while at != start {
                    names.push(&graph[at].name);
                    at = before[&at];
                }
                names.push(&graph[start].name);
                names.reverse();
                return (names, Some(*edge.weight()));
            }
            before.entry(edge.target()).or_insert_with(|| {
                queue.push_back(edge.target());
                node
            });
        }
    }
    (Vec::new(), None)
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::{PIPELINE, mistakes};

    #[test]
    fn edges_lead_to_stages_and_outputs_of_the_right_type() {
        let text = PIPELINE
            .replace("data = \"data\"", "data = \"data.extra\"\nstart = \"data\"")
            .replace("[\"data.extra\", \"train\"]", "[\"data.extr\", \"trian\", \"train.log\"]");
        insta::assert_snapshot!(mistakes(&text), @r#"
            error: `data` of stage `train` wants a dataset, but `data.extra` is files
              --> a.toml:12:8
            12 | data = "data.extra"
               |        ^^^^^^^^^^^^
            hint: did you mean `data.rows`?

            error: `start` of stage `train` wants a checkpoint, but `data` is a dataset
              --> a.toml:13:9
            13 | start = "data"
               |         ^^^^^^

            error: stage `data` has no output `extr` for `others[0]` of stage `score`
              --> a.toml:24:11
            24 | others = ["data.extr", "trian", "train.log"]
               |           ^^^^^^^^^^^ expected one of `rows`, `extra`
            hint: did you mean `extra`?

            error: unknown stage `trian` in `others[1]` of stage `score`
              --> a.toml:24:24
            24 | others = ["data.extr", "trian", "train.log"]
               |                        ^^^^^^^ expected one of `data`, `train`
            hint: did you mean `train`?
        "#);
    }

    #[test]
    fn cycles_are_named() {
        let text = PIPELINE.replace("data = \"data\"", "data = \"data\"\nstart = \"more\"")
            + "[stages.more]\nkind = \"train\"\ndata = \"data\"\nsteps = 1\nstart = \"train\"\n\
               [stages.self]\nkind = \"train\"\ndata = \"data\"\nsteps = 1\nstart = \"self\"\n";
        insta::assert_snapshot!(mistakes(&text), @r#"
            error: the stages form a cycle: `more -> train -> more`
              --> a.toml:29:9
            29 | start = "train"
               |         ^^^^^^^ `more` rests on itself through this input

            error: the stages form a cycle: `self -> self`
              --> a.toml:34:9
            34 | start = "self"
               |         ^^^^^^ `self` rests on itself through this input
        "#);
    }

    #[test]
    fn a_wrong_stage_brings_no_blame_on_its_consumers() {
        let message = mistakes(&PIPELINE.replace("rows = 5", "rows = \"five\""));
        assert_eq!(message.matches("error:").count(), 1, "{message}");
    }
}
