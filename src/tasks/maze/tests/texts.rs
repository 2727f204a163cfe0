//! What is written of mazes, and mazes read back from it.

use super::*;

#[test]
fn a_direct_answer_solves_where_its_prompt_asks_for_it_and_never_for_the_harness() {
    for signs in ["tokens", "text"] {
        let spec = format(json!({"kind": "alphamaze", "prompt": "legend", "trace": "direct", "signs": signs}));
        let task = task(&spec);
        let instance = generate(&*task, 2, 0);
        let reply = task.demonstrate(&instance, 0).unwrap().remove(0);
        assert!(!reply.contains("think"), "{reply}");
        let told = task.diagnose(&instance, &[&reply], Finish::Stop).unwrap();
        assert_eq!((judge(&*task, &instance, &reply, Finish::Stop)["solved"], told["harness"]), (1.0, 0.0));
        let thought = format!("<think>\nso\n</think>\n\n{reply}");
        assert_eq!(task.diagnose(&instance, &[&thought], Finish::Stop).unwrap()["harness"], 1.0);
    }
}

#[test]
fn mistakes_are_what_is_done_on_the_wrong_way() {
    for spec in [retrying_specs(), line_specs()].concat() {
        let (task, mut retried) = (task(&spec), 0);
        for index in 0..60 {
            let instance = generate(&*task, 4, index);
            let reply = task.demonstration(&instance, index).unwrap().remove(0);
            assert_eq!(task.demonstrate(&instance, index).unwrap()[0], reply.text);
            let resets = reply.text.matches("<|reset|>").count() + reply.text.matches("\nRESET\n").count();
            assert_eq!(resets, reply.mistakes.len());
            retried += usize::from(resets > 0);
            let told = task.diagnose(&instance, &[&reply.text], Finish::Stop).unwrap();
            assert_eq!(told["first_attempt"] == 1.0, resets == 0, "{}", reply.text);
            for mistake in &reply.mistakes {
                let said = &reply.text[mistake.clone()];
                let begins = ["<|up", "<|down", "<|left", "<|right", "Step ", " up ", " down ", " left ", " right "];
                assert!(begins.iter().any(|begin| said.starts_with(begin)), "{said}");
                let after = &reply.text[mistake.end..];
                assert!(after.starts_with("<|reset|>") || after.trim_start().starts_with('H'), "{after}");
                assert!(!said.contains("reset") && !said.contains("RESET") && !said.contains("Hit"), "{said}");
            }
        }
        let can = serde_json::to_value(&spec).unwrap()["retry_share"].as_f64().unwrap_or(0.0);
        assert_eq!(retried > 0, can > 0.0);
        assert!(can == 1.0 || retried < 50, "{retried}");
    }
}

#[test]
fn a_prompt_reads_back_as_its_maze() {
    for spec in specs() {
        let (task, value) = (task(&spec), serde_json::to_value(&spec).unwrap());
        for index in 0..20 {
            let instance = generate(&*task, 6, index);
            let prompt = task.begin(&[Start { instance: &instance, seed: 0 }]).unwrap().observe().unwrap().remove(0);
            let read = task.parse(&prompt).ok();
            let can = value["kind"] == "alphamaze" && value.get("signs").is_none();
            assert_eq!(read, can.then_some(instance), "{prompt}");
            if can {
                // The form of the published prompts: spaces at the beginnings of lines, words before.
                let framed = format!("Mazes: <|0-0|>, <|no_wall|> etc.\nMAZE:\n  {prompt} \n<|im_end|>");
                assert!(task.parse(&framed).is_ok());
            }
        }
    }
}

#[test]
fn the_page_on_mazes_shows_what_is_written() {
    let page = include_str!("../../../../docs/maze.md");
    let (_, maze) = fixed();
    assert!(page.contains(&serde_json::to_string(&maze).unwrap().replace(',', ", ").replace(':', ": ")));
    for value in [
        json!({"kind": "alphamaze", "trace": "direct"}),
        json!({"kind": "alphamaze", "trace": "path", "signs": "text"}),
        json!({"kind": "compact", "trace": "path"}),
        json!({"kind": "fused", "trace": "path"}),
    ] {
        let task = open(&maze_spec(2, 3), &format(value.clone())).unwrap();
        let prompt = task.begin(&[Start { instance: &maze, seed: 0 }]).unwrap().observe().unwrap().remove(0);
        assert!(page.contains(&prompt), "{prompt}");
        let reply = task.demonstrate(&maze, 0).unwrap().remove(0);
        assert!(value["kind"] == "alphamaze" && value.get("signs").is_none() || page.contains(&reply), "{reply}");
    }
    for measure in MEASURES.iter().chain(DIAGNOSES) {
        assert!(page.contains(&format!("`{}`", measure.name)), "{}", measure.name);
    }
}

#[test]
fn prompts_that_show_no_maze_are_refused() {
    let (task, instance) = fixed();
    let good = task.begin(&[Start { instance: &instance, seed: 0 }]).unwrap().observe().unwrap().remove(0);
    assert_eq!(task.parse(&good).unwrap(), instance);
    let says = |prompt: &str, words: &str| {
        let error = format!("{:#}", task.parse(prompt).unwrap_err());
        assert!(error.contains(words), "{error}");
    };
    says("", "there is no cell");
    says(&good.replace("<|0-1|>", "<|0-2|>"), "the cell 0-2 stands where 0-1 should");
    says(&good.replace("<|target|>", "<|origin|>"), "two cells");
    says(&good.replace("<|target|>", "<|blank|>"), "no target");
    says(&good.replace("<|origin|>", "<|up|>"), "neither origin nor target");
    says(&good.replacen("<|up_left_right_wall|>", "<|up_left_wall|>", 1), "is not what lies on its other side");
    says(&good.replacen("<|up_left_right_wall|>", "<|hedge|>", 1), "names no walls");
    says(&good[..good.len() - 8], "is not whole");
    says(&(good.clone() + "<|5-5|><|no_wall|><|blank|>"), "ends at 5-5 with 7 cells");
    let small = "<|0-0|><|up_left_right_wall|><|origin|><|1-0|><|down_left_right_wall|><|target|>";
    says(small, "2 x 1 cells, the task 2 x 3");
}
