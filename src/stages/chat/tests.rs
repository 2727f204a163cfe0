//! Against what `transformers` renders (`golden.json`, which `tests/interop/chat.py` writes and checks).

use serde_json::{Value as Json, json};

use super::*;

const TEMPLATES: [(&str, &str); 4] = [
    ("chatml", include_str!("chatml.jinja")),
    ("headers", include_str!("headers.jinja")),
    ("thinking", include_str!("thinking.jinja")),
    ("features", include_str!("features.jinja")),
];

/// A tokenizer's folder with the special tokens of the golden texts and more, and a template of its own if given.
fn folder(template: Option<&str>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let specials = ["<|begin_of_text|>", "<|end|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|im_end|>x"];
    let added: Vec<Json> = specials.iter().map(|token| json!({"content": token, "special": true})).collect();
    fs::write(folder.path().join(TOKENIZER_FILE), json!({"added_tokens": added}).to_string()).unwrap();
    let config = json!({
        "bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot_id|>", "pad_token": "<|pad|>",
        "chat_template": null,
    });
    fs::write(folder.path().join(CONFIG_FILE), config.to_string()).unwrap();
    if let Some(template) = template {
        fs::write(folder.path().join(TEMPLATE_FILE), template).unwrap();
    }
    folder
}

fn opened(template: &str) -> anyhow::Result<ChatTemplate> {
    let folder = folder(Some(template));
    Ok(ChatTemplate::open(folder.path())?.unwrap())
}

fn messages(pairs: &[(&str, &str)]) -> Vec<Message> {
    pairs.iter().map(|(role, content)| Message::new(role, content)).collect()
}

#[test]
fn every_text_is_the_one_that_transformers_renders() {
    let golden: Json = serde_json::from_str(include_str!("golden.json")).unwrap();
    let mut compared = 0;
    for (name, source) in TEMPLATES {
        let template = opened(source).unwrap();
        for (conversation, messages) in golden["conversations"].as_object().unwrap() {
            let messages: Vec<Message> = serde_json::from_value(messages.clone()).unwrap();
            for (suffix, add_generation_prompt) in [("", false), ("+", true)] {
                let wanted = golden["rendered"][name][format!("{conversation}{suffix}")].as_str().unwrap();
                let ours = template.render(&messages, add_generation_prompt).unwrap();
                assert_eq!(ours, wanted, "{name}, {conversation}{suffix}");
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 32);
}

#[test]
fn the_end_of_turn_is_the_special_token_behind_the_reply() {
    let ends = TEMPLATES.map(|(_, source)| opened(source).unwrap().end_of_turn().to_owned());
    assert_eq!(ends, ["<|im_end|>", "<|eot_id|>", "<|im_end|>", "<|end|>"]);
    let error = opened("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").unwrap_err().to_string();
    assert!(error.contains("would not learn to stop"), "{error}");
    let error = opened("{{ messages[0].content }}").unwrap_err().to_string();
    assert!(error.contains("does not show what the role `assistant` says"), "{error}");
}

#[test]
fn the_pieces_of_a_conversation_are_its_text_and_end_every_turn() {
    let spoken = messages(&[("user", "a"), ("assistant", " b\n"), ("user", "c"), ("assistant", "d")]);
    for name in ["chatml", "headers"] {
        let source = TEMPLATES.iter().find(|(other, _)| *other == name).unwrap().1;
        let template = opened(source).unwrap();
        let conversation = template.conversation(&spoken).unwrap();
        assert_eq!(conversation.turns.len(), 2);
        let mut text = conversation.prompt.clone();
        assert_eq!(text, template.first("a").unwrap());
        for turn in &conversation.turns {
            assert!(!turn.reply.contains(template.end_of_turn()));
            text += &(turn.reply.clone() + template.end_of_turn() + &turn.observation);
        }
        // All but what follows the last end of turn, from which nothing is learnt.
        let whole = template.render(&spoken, false).unwrap();
        assert!(whole.starts_with(&text) && !whole[text.len()..].contains(template.end_of_turn()), "{name}");
    }
    let chatml = opened(TEMPLATES[0].1).unwrap();
    let conversation = chatml.conversation(&spoken).unwrap();
    assert_eq!(conversation.turns[0].reply, " b\n");
    assert_eq!(conversation.turns[0].observation, chatml.next("c").unwrap());
    assert_eq!(chatml.next("c").unwrap(), "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n");
    // A template that trims is followed: what is learnt is what the template writes.
    let headers = opened(TEMPLATES[1].1).unwrap();
    assert_eq!(headers.conversation(&spoken).unwrap().turns[0].reply, "b");
}

#[test]
fn a_template_that_rewrites_what_was_said_is_refused() {
    let thinking = opened(TEMPLATES[2].1).unwrap();
    let one = messages(&[("user", "q"), ("assistant", "<think>\nhm\n</think>\n\nsix")]);
    let conversation = thinking.conversation(&one).unwrap();
    assert_eq!(conversation.turns[0].reply, "<think>\nhm\n</think>\n\nsix");
    let two =
        messages(&[("user", "q"), ("assistant", "<think>\nhm\n</think>\n\nsix"), ("user", "r"), ("assistant", "s")]);
    let error = thinking.conversation(&two).unwrap_err().to_string();
    assert!(error.contains("rewrites the first 2 messages") && error.contains("`<think>"), "{error}");
    let error = thinking.next("r").unwrap_err().to_string();
    assert!(error.contains("rewrites"), "{error}");
}

#[test]
fn conversations_without_a_reply_at_their_end_are_refused() {
    let template = opened(TEMPLATES[0].1).unwrap();
    let error = |pairs: &[(&str, &str)]| template.conversation(&messages(pairs)).unwrap_err().to_string();
    assert!(error(&[("user", "q")]).contains("no message has the role `assistant`"));
    assert!(error(&[]).contains("no message"));
    assert!(
        error(&[("user", "q"), ("assistant", "a"), ("user", "q")]).contains("the last message has the role `user`")
    );
}

#[test]
fn errors_of_a_template_are_told_and_the_clock_is_not_read() {
    let ends = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
    let error = |source: &str| format!("{:#}", opened(&(source.to_owned() + ends)).unwrap_err());
    assert!(error("{{ raise_exception('only ' ~ messages|length) }}").contains("only 2"));
    assert!(error("{{ strftime_now('%Y') }}").contains("write a fixed one into the template"));
    assert!(error("{% if %}").contains("is no chat template"));
    assert!(error("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}").contains("fuel"));
    assert!(error("{{ messages }}").contains("tojson"));
    let optional = opened(&("{{ 'now' if strftime_now is defined else 'then' }}".to_owned() + ends)).unwrap();
    assert!(optional.render(&[], false).unwrap().starts_with("then"));
}

#[test]
fn a_template_is_found_in_either_file_and_by_its_name() {
    let ends = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
    let folder = folder(None);
    assert!(ChatTemplate::open(folder.path()).unwrap().is_none());
    let config = |entry: Json| {
        fs::write(folder.path().join(CONFIG_FILE), json!({"chat_template": entry}).to_string()).unwrap();
        let opened = ChatTemplate::open(folder.path());
        opened.map(|template| template.unwrap().render(&[], false).unwrap())
    };
    assert_eq!(config(json!(format!("one{ends}"))).unwrap(), "one");
    let named = |name: &str| json!({"name": name, "template": format!("{name}{ends}")});
    assert_eq!(config(json!([named("tool_use"), named("default")])).unwrap(), "default");
    let error = format!("{:#}", config(json!([named("tool_use"), named("rag")])).unwrap_err());
    assert!(error.contains("named `default`; there are `tool_use`, `rag`"), "{error}");
    fs::write(folder.path().join(TEMPLATE_FILE), format!("file{ends}")).unwrap();
    assert_eq!(config(json!(format!("one{ends}"))).unwrap(), "file");
}
