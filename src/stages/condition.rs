//! `where`: an expression over named numbers that says which rows or completions a stage takes.

use std::collections::BTreeSet;

use anyhow::{Context as _, anyhow};
use serde_json::Value;

use crate::pipeline::stage::Problem;
use crate::rewards::{Expression, GRAMMAR};
use crate::tasks::{TaskSpec, open};

/// What a model's completions are known by besides the task's measurements: 1 where the episode was cut off.
pub const TRUNCATED: &str = "truncated";

/// A compiled condition; it holds where its value is not 0.
pub struct Condition(Expression);

impl Condition {
    /// Reads a condition.
    pub fn compile(text: &str) -> anyhow::Result<Self> {
        Expression::compile(text).map(Self).map_err(|message| anyhow!("`where` is `{text}`: {message}"))
    }

    /// Whether it holds where `number` gives the numbers; an error where one is missing or the value is not finite.
    pub fn holds(&self, number: &dyn Fn(&str) -> Option<f64>) -> anyhow::Result<bool> {
        if let Some(name) = self.0.names().iter().find(|name| number(name).is_none()) {
            return Err(anyhow!("`where` names `{name}`, which is not there"));
        }
        Ok(self.0.evaluate(number).context("evaluating `where`")? != 0.0)
    }
}

/// The number `name` of a task instance.
pub fn number_of(instance: Option<&Value>, name: &str) -> Option<f64> {
    instance?.get(name)?.as_f64()
}

/// The numbers that instances of a task have; `None` where they cannot be told before it has run.
pub fn numbers_of(task: &TaskSpec) -> Option<Vec<String>> {
    if matches!(task, TaskSpec::Program(_)) {
        return None;
    }
    let instance = open(task, &task.any_format()).ok()?.generate(0, 0..1).ok()?.pop()?;
    let numbers = instance.as_object()?.iter().filter(|(_, value)| value.is_number());
    Some(numbers.map(|(name, _)| name.clone()).collect())
}

/// What is wrong with the condition `text` at `path`; `known` are the names it may use, where they can be told.
pub fn check(path: &str, text: &str, known: Option<&BTreeSet<String>>) -> Vec<Problem> {
    let compiled = match Expression::compile(text) {
        Ok(compiled) => compiled,
        Err(message) => return vec![Problem::new(path, message).hint(GRAMMAR)],
    };
    let Some(known) = known else { return Vec::new() };
    let unknown = compiled.names().iter().filter(|name| !known.contains(*name));
    let problems = unknown.map(|name| {
        let distance = |other: &&String| strsim::damerau_levenshtein(name, other);
        let near = known.iter().min_by_key(distance).filter(|near| distance(near) <= 2);
        let listed = || known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let hint = near.map_or_else(|| format!("there are {}", listed()), |near| format!("did you mean `{near}`?"));
        Problem::new(path, format!("there is no number `{name}` here")).hint(hint)
    });
    problems.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_checked_where_they_can_be_told() {
        let known = BTreeSet::from(["length", "solved"].map(str::to_owned));
        let problems = |text: &str| check("where", text, Some(&known));
        assert_eq!(problems("length >= 9 and solved < 1"), []);
        let wanted = Problem::new("where", "there is no number `lenght` here").hint("did you mean `length`?");
        assert_eq!(problems("lenght >= 9"), [wanted]);
        assert_eq!(problems("elephants")[0].hint.as_deref(), Some("there are `length`, `solved`"));
        assert!(problems("length >=")[0].message.contains("cannot be read from `>=` on"));
        assert_eq!(check("where", "elephants", None), []);
        let maze: TaskSpec = serde_json::from_value(json!({"kind": "maze", "rows": 3, "columns": 3})).unwrap();
        assert!(numbers_of(&maze).unwrap().contains(&"length".to_owned()));
        let program = json!({"kind": "program", "command": ["x"], "measures": ["score"]});
        assert_eq!(numbers_of(&serde_json::from_value(program).unwrap()), None);
    }

    #[test]
    fn a_number_that_is_missing_is_an_error_and_no_refusal() {
        let condition = Condition::compile("length >= 3").unwrap();
        let instance = json!({"length": 4, "name": "x"});
        assert!(condition.holds(&|name| number_of(Some(&instance), name)).unwrap());
        let error = condition.holds(&|name| number_of(None, name)).unwrap_err().to_string();
        assert_eq!(error, "`where` names `length`, which is not there");
        let nothing = Condition::compile("1 / (length - 4)").unwrap();
        assert!(nothing.holds(&|name| number_of(Some(&instance), name)).is_err());
    }
}
