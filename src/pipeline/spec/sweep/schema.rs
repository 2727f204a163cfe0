//! The JSON Schema of `[sweep]`, which editors read and files are walked against.

use serde_json::{Value as Json, json};

use crate::pipeline::spec::shape::EXPECTED;

/// What people are told to write, by the place in the schema: the word "array" helps nobody to a sweep.
const TOLD: &[(&str, &str)] = &[
    ("/properties/seeds", "a table such as `{ path = \"params.seed\", values = [1, 2, 3] }`"),
    ("/properties/grid", "a table of paths with their values"),
    ("/properties/grid/additionalProperties", "a list of values"),
    ("/properties/zip", "tables that begin with `[[sweep.zip]]`"),
    ("/properties/zip/items/additionalProperties", "a list of values"),
    ("/properties/arm", "tables that begin with `[[sweep.arm]]`"),
    ("/properties/exclude", "a list of tables such as `[{ beta = 0.0, seed = 3 }]`"),
    ("/properties/tune/properties/grid/additionalProperties", "a list of values"),
    ("/properties/tune/properties/seeds", "a list of seeds"),
];

/// [`schema`] as files are walked against it.
pub(in crate::pipeline::spec) fn told_schema() -> Json {
    let mut schema = schema();
    for (place, text) in TOLD {
        if let Some(place) = schema.pointer_mut(place) {
            place[EXPECTED] = Json::from(*text);
        }
    }
    schema
}

/// What `[sweep]` may say.
pub(in crate::pipeline::spec) fn schema() -> Json {
    let lists = json!({"anyOf": [{"type": "array", "minItems": 1}, {"type": "object"}]});
    let path = "The path of a table of named tables, as `stages.grpo.rewards`.";
    json!({
        "type": "object",
        "description": "What varies between trials. Axes multiply; paths are the paths of the file.",
        "minProperties": 1,
        "additionalProperties": false,
        "properties": {
            "seeds": {
                "type": "object",
                "description": "The axis that makes an arm's repetitions.",
                "required": ["path", "values"],
                "additionalProperties": false,
                "properties": {
                    "path": {"type": "string", "description": "The path that takes the seed, as `params.seed`."},
                    "values": {"type": "array", "minItems": 1, "description": "The seeds."}
                }
            },
            "grid": {
                "type": "object",
                "description": "Paths as `\"stages.grpo.learning_rate\"` with the values to try: strings, numbers, booleans, or \
                                lists of them. Every path is an axis.",
                "minProperties": 1,
                "additionalProperties": lists
            },
            "zip": {
                "type": "array",
                "description": "Each table is one axis: paths whose values, of one number, vary together.",
                "minItems": 1,
                "items": {"type": "object", "minProperties": 1, "additionalProperties": lists}
            },
            "arm": {
                "type": "array",
                "description": "The axis `arm`: `none`, which is the file as it is, and each table laid over it under its name. \
                                `false` drops a table.",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "minProperties": 2,
                    "properties": {"name": {"type": "string", "description": "How the arm is called."}},
                    "additionalProperties": true
                }
            },
            "drop_one": {
                "type": "string",
                "description": format!("The axis `drop`: `none`, and the table without each of its entries. {path}")
            },
            "add_one": {
                "description": "The axis `add`: `none`, which is the table with the entries of the base alone, and the base with \
                                each other entry. Without a base, each entry alone.",
                "anyOf": [
                    {"type": "string", "description": path},
                    {
                        "type": "object",
                        "required": ["path"],
                        "additionalProperties": false,
                        "properties": {
                            "path": {"type": "string", "description": path},
                            "base": {
                                "type": "array",
                                "description": "The entries that every arm has.",
                                "items": {"type": "string"}
                            }
                        }
                    }
                ]
            },
            "exclude": {
                "type": "array",
                "description": "Combinations that are left out: trials that have all values of a table, by paths or their last \
                                segments.",
                "minItems": 1,
                "items": {"type": "object", "minProperties": 1, "additionalProperties": true}
            },
            "tune": {
                "type": "object",
                "description": "Every arm is tuned alike before it is reported: each candidate of the grid runs on the tuning seeds, \
                                and the one with the best mean of the metric runs on `sweep.seeds`.",
                "required": ["grid", "seeds", "metric"],
                "additionalProperties": false,
                "properties": {
                    "grid": {
                        "type": "object",
                        "description": "Paths with the values to choose from.",
                        "minProperties": 1,
                        "additionalProperties": lists
                    },
                    "seeds": {"type": "array", "minItems": 1, "description": "Seeds of the path of `sweep.seeds` that report nothing."},
                    "metric": {
                        "type": "string",
                        "description": "`STAGE.METRIC` of a stage that does not read the split `test`; what does not lead to it is not \
                                        run while tuning."
                    },
                    "goal": {
                        "description": "Whether more is better; `max` unless set.",
                        "enum": ["max", "min"]
                    }
                }
            },
            "max_failures": {
                "type": "integer", "minimum": 1,
                "description": "After so many failed trials a run begins no further stage."
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::spec::testing::swept;

    #[test]
    fn what_is_told_stands_at_places_that_there_are() {
        let schema = schema();
        assert!(TOLD.iter().all(|(place, _)| schema.pointer(place).is_some()));
    }

    #[test]
    fn wrong_types_say_what_to_write() {
        let mut told = Vec::new();
        for sweep in [
            "[sweep]\nseeds = [1, 2]\n",
            "[sweep.grid]\n\"params.rate\" = \"0.1:0.3\"\n",
            "[sweep.zip]\n\"params.rate\" = [0.1, 0.2]\n",
            "[sweep.arm]\nname = \"a\"\nparams.rate = 0.1\n",
            "[[sweep.arm]]\nparams.rate = 0.1\n",
            "[sweep]\nexclude = { rate = 0.1 }\n[sweep.grid]\n\"params.rate\" = [0.1, 0.2]\n",
        ] {
            told.push(swept(sweep).bad("a.toml", &[]));
        }
        insta::assert_snapshot!(told.join("\n"), @r#"
            error: wrong type of `seeds` in `sweep`
             --> a.toml:3:9
            3 | seeds = [1, 2]
              |         ^^^^^^ expected a table such as `{ path = "params.seed", values = [1, 2, 3] }`, found an array

            error: wrong type of `grid.params.rate` in `sweep`
             --> a.toml:3:17
            3 | "params.rate" = "0.1:0.3"
              |                 ^^^^^^^^^ expected a list of values, found a string

            error: wrong type of `zip` in `sweep`
             --> a.toml:2:1
            2 | [sweep.zip]
              | ^^^^^^^^^^^ expected tables that begin with `[[sweep.zip]]`, found a table

            error: wrong type of `arm` in `sweep`
             --> a.toml:2:1
            2 | [sweep.arm]
              | ^^^^^^^^^^^ expected tables that begin with `[[sweep.arm]]`, found a table

            error: missing field `name` in `arm[0]` of `sweep`
             --> a.toml:2:1
            2 | [[sweep.arm]]
              | ^^^^^^^^^^^^^ expected `name`, a string

            error: wrong type of `exclude` in `sweep`
             --> a.toml:3:11
            3 | exclude = { rate = 0.1 }
              |           ^^^^^^^^^^^^^^ expected a list of tables such as `[{ beta = 0.0, seed = 3 }]`, found a table
        "#);
    }
}
