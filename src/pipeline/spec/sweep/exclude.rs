//! `exclude`: combinations that are left out.

use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean, expected};
use crate::pipeline::spec::source::Span;
use crate::pipeline::spec::sweep::{Axis, is_same, leaves, shown};
use crate::pipeline::spec::tree::Node;

/// Values that are left out where they meet.
pub(super) struct Exclusion {
    /// By axis: which of its points are meant.
    fits: Vec<(usize, Vec<bool>)>,
    span: Span,
}

impl Exclusion {
    /// Whether it leaves out the combination that has the point `chosen[axis]` of each axis.
    pub(super) fn fits(&self, chosen: &[usize]) -> bool {
        self.fits.iter().all(|(axis, fits)| fits[chosen[*axis]])
    }

    /// Says that it left nothing out.
    pub(super) fn is_idle(&self) -> Mistake {
        let label = "each of the values is swept, but they never meet";
        Mistake::at(self.span, "this exclusion leaves nothing out").label(label)
    }
}

/// The exclusions of `sweep` over its axes, in their order.
pub(super) fn read(sweep: &Node, axes: &[Axis], report: &mut Report) -> Vec<Exclusion> {
    let tables = sweep.get("exclude").and_then(|entry| entry.node.array()).unwrap_or_default();
    tables.iter().filter_map(|table| exclusion(table, axes, report)).collect()
}

fn exclusion(table: &Node, axes: &[Axis], report: &mut Report) -> Option<Exclusion> {
    let mut fits: Vec<(usize, Vec<bool>)> = Vec::new();
    let mut is_good = true;
    for (segments, key, value) in leaves(table) {
        let name = segments.join(".");
        let Some((index, column)) = find(axes, &name) else {
            let columns = || axes.iter().flat_map(|axis| &axis.columns);
            let label = expected(columns().map(|column| column.label.as_str()));
            let names = columns().flat_map(|column| [column.name.as_str(), column.label.as_str()]);
            let mistake = Mistake::at(key, format!("nothing sweeps `{name}`, which is excluded")).label(label);
            report.add(mistake.hint(did_you_mean(&name, names)));
            is_good = false;
            continue;
        };
        let given = value.json();
        let meant: Vec<bool> = axes[index].values(column).map(|swept| is_same(&swept.json(), &given)).collect();
        if !meant.contains(&true) {
            let message = format!("the excluded `{name}` is not among the swept values");
            report.add(not_swept(&axes[index], column, value, message));
            is_good = false;
            continue;
        }
        match fits.iter_mut().find(|(axis, _)| *axis == index) {
            Some((_, known)) => known.iter_mut().zip(meant).for_each(|(known, meant)| *known &= meant),
            None => fits.push((index, meant)),
        }
    }
    is_good.then_some(Exclusion { fits, span: table.span })
}

/// The axis and its column that people call `name`.
pub(in crate::pipeline::spec) fn find(axes: &[Axis], name: &str) -> Option<(usize, usize)> {
    axes.iter().enumerate().find_map(|(index, axis)| {
        axis.columns.iter().position(|column| column.is_called(name)).map(|column| (index, column))
    })
}

/// A value that the column number `column` of an axis does not have.
pub(in crate::pipeline::spec) fn not_swept(axis: &Axis, column: usize, value: &Node, message: String) -> Mistake {
    let swept: Vec<String> = axis.values(column).filter_map(shown).collect();
    let swept = || swept.iter().map(String::as_str);
    // Of numbers the nearest in spelling is not what was meant.
    let hint = value.text().and_then(|text| did_you_mean(text, swept()));
    Mistake::at(value.span, message).label(expected(swept())).hint(hint)
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::swept;

    const SWEEP: &str = "[sweep]\nseeds = { path = \"params.seed\", values = [1, 2, 3] }\n\
                         grid = { \"stages.train.steps\" = [5, 6], \"stages.train.optimizer.beta\" = [0.0, 0.01] }\n\
                         zip = [{ \"params.rate\" = [0.1, 0.2], \"stages.train.note\" = [\"a\", \"b\"] }]\n";

    #[test]
    fn trials_that_have_all_values_are_left_out() {
        let sweep = format!(
            "{SWEEP}exclude = [{{ beta = 0, stages.train.steps = 6 }}, {{ rate = 0.1, seed = 3 }}, {{ note = \"b\", rate = 0.2, seed = 1 }}]\n"
        );
        let trials = swept(&sweep).good("a.toml", &[]).trials;
        let has = |parts: &[&str]| {
            trials.iter().any(|trial| parts.iter().all(|part| trial.name.split(',').any(|own| own == *part)))
        };
        assert!(!has(&["beta=0.0", "steps=6"]) && has(&["beta=0.01", "steps=6"]) && has(&["beta=0.0", "steps=5"]));
        assert!(!has(&["rate=0.1", "seed=3"]) && !has(&["rate=0.2", "seed=1"]) && has(&["rate=0.2", "seed=3"]));
        assert_eq!(trials.len(), (8 - 2) * 3 - 3 - 3);
    }

    #[test]
    fn exclusions_that_leave_nothing_out_are_mistakes() {
        let sweep = format!(
            "{SWEEP}exclude = [{{ beta = 0.02 }}, {{ bta = 0.0 }}, {{ rate = 0.1, note = \"b\" }}, {{}}, {{ note = \"bb\" }}]\n"
        );
        insta::assert_snapshot!(swept(&sweep).bad("a.toml", &[]), @r#"
            error: too few entries in `exclude[3]` of `sweep`
             --> a.toml:6:72
            6 | exclude = [{ beta = 0.02 }, { bta = 0.0 }, { rate = 0.1, note = "b" }, {}, { note = "bb" }]
              |                                                                        ^^ expected at least 1, found 0
        "#);
        let sweep = format!(
            "{SWEEP}exclude = [{{ beta = 0.02 }}, {{ bta = 0.0 }}, {{ rate = 0.1, note = \"b\" }}, {{ note = \"aa\" }}]\n"
        );
        insta::assert_snapshot!(swept(&sweep).bad("a.toml", &[]), @r#"
            error: the excluded `beta` is not among the swept values
             --> a.toml:6:21
            6 | exclude = [{ beta = 0.02 }, { bta = 0.0 }, { rate = 0.1, note = "b" }, { note = "aa" }]
              |                     ^^^^ expected one of `0.0`, `0.01`

            error: nothing sweeps `bta`, which is excluded
             --> a.toml:6:31
            6 | exclude = [{ beta = 0.02 }, { bta = 0.0 }, { rate = 0.1, note = "b" }, { note = "aa" }]
              |                               ^^^ expected one of `rate`, `note`, `beta`, `steps`, `seed`
            hint: did you mean `beta`?

            error: this exclusion leaves nothing out
             --> a.toml:6:44
            6 | exclude = [{ beta = 0.02 }, { bta = 0.0 }, { rate = 0.1, note = "b" }, { note = "aa" }]
              |                                            ^^^^^^^^^^^^^^^^^^^^^^^^^^ each of the values is swept, but they never meet

            error: the excluded `note` is not among the swept values
             --> a.toml:6:81
            6 | exclude = [{ beta = 0.02 }, { bta = 0.0 }, { rate = 0.1, note = "b" }, { note = "aa" }]
              |                                                                                 ^^^^ expected one of `a`, `b`
            hint: did you mean `a`?
        "#);
        insta::assert_snapshot!(swept("[sweep]\ngrid = { \"params.seed\" = [1, 2] }\nexclude = [{ seed = 1 }, { seed = 2 }]\n").bad("a.toml", &[]), @r#"
            error: `exclude` leaves nothing of the sweep
             --> a.toml:2:2
            2 | [sweep]
              |  ^^^^^ every trial is excluded
        "#);
    }
}
