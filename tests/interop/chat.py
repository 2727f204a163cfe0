"""What `transformers` makes of conversations is what `pipe` makes of them.

usage: chat.py [--write]

Checks that src/stages/chat/golden.json, against which the unit tests hold our renderer, is what `transformers` renders
for the templates beside it (`--write` writes it anew), and that the ids of rows that `tokenize` writes are those of
`apply_chat_template` for a tokenizer that is trained here.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "src" / "stages" / "chat"
GOLDEN = TEMPLATES / "golden.json"
SPECIALS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}
CONVERSATIONS = {
    "single": [("user", "Hi there")],
    "answered": [("user", "Hi there"), ("assistant", "Hello!")],
    "multi": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    "system": [
        ("system", "Be brief. "),
        ("user", " 2+2? "),
        ("assistant", "  4\n"),
        ("user", '<b>"é" & 3</b>'),
        ("assistant", "<think>\nhm\n</think>\n\nsix"),
    ],
}


def messages(pairs: list[tuple[str, str]]) -> list[dict]:
    """Pairs of role and content as messages."""
    return [{"role": role, "content": content} for role, content in pairs]


def golden() -> str:
    """The conversations and every template's text of them, without (`name`) and with (`name+`) a generation prompt."""
    rendered = {}
    for path in sorted(TEMPLATES.glob("*.jinja")):
        texts = rendered[path.stem] = {}
        for name, pairs in CONVERSATIONS.items():
            for suffix, prompted in [("", False), ("+", True)]:
                texts[name + suffix] = render_jinja_template(
                    [messages(pairs)], chat_template=path.read_text(), add_generation_prompt=prompted, **SPECIALS
                )[0][0]
    conversations = {name: messages(pairs) for name, pairs in CONVERSATIONS.items()}
    content = {"conversations": conversations, "rendered": rendered}
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


PIPELINE = """
[stages.rows]
kind = "dataset"
files = {{ train = "rows.jsonl" }}
[stages.words]
kind = "tokenizer"
from = "{folder}"
[stages.tokens]
kind = "tokenize"
dataset = "rows"
tokenizer = "words"
"""
FRAMES = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<|eot_id|>"]


def trained(folder: Path, template: str, corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in `folder`, trained on a corpus, with the special tokens of all templates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|pad|>", *FRAMES]
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    end = "<|im_end|>" if "im_end" in template else "<|eot_id|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token=end, pad_token="<|pad|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def conversations(source: random.Random, count: int) -> list[list[dict]]:
    """Random conversations whose last message is the assistant's."""
    words = ["maze", "Target: 3", "né", "<think>", "left\n", "  two", "{\"action\": \"+\"}", "日本", "'s", "12"]

    def say() -> str:
        return " ".join(source.choices(words, k=source.randint(1, 8))).strip()

    rows = []
    for _ in range(count):
        turns = [("system", say())] if source.random() < 0.3 else []
        for _ in range(source.randint(1, 3)):
            turns += [("user", say()), ("assistant", say())]
        rows.append(messages(turns))
    return rows


def check_ids(name: str) -> None:
    """The ids of every row are those of `apply_chat_template` up to the last end of turn."""
    source = random.Random(name)
    rows = conversations(source, 60)
    template = (TEMPLATES / f"{name}.jinja").read_text()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        corpus = [message["content"] for row in rows for message in row] + ["user assistant system"] * 5
        theirs = trained(folder / "words", template, corpus)
        (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        (folder / "chat.toml").write_text(PIPELINE.format(folder=folder / "words"))
        store = folder / "store"
        run = subprocess.run([ROOT / "pipe", "--store", store, "run", folder / "chat.toml"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        show = [ROOT / "pipe", "--store", store, "show", "--json", "chat/tokens"]
        shown = json.loads(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
        tensors = load_file(Path(shown["path"]) / "tokens.safetensors")
        subprocess.run(["chmod", "-R", "u+w", store], check=True)
    end = theirs.eos_token_id
    compared = 0
    for at, row in enumerate(rows):
        begin, stop = tensors["offsets"][at], tensors["offsets"][at + 1]
        ours, mask = tensors["ids"][begin:stop].tolist(), tensors["mask"][begin:stop].tolist()
        ids = theirs.apply_chat_template(row, tokenize=True, return_dict=False)
        last = len(ids) - ids[::-1].index(end)
        assert ours == ids[:last], f"{name}: {row}\n{ours}\n{ids[:last]}"
        ends = sum(marked for id, marked in zip(ours, mask) if id == end)
        replies = [message for message in row if message["role"] == "assistant"]
        assert ends == len(replies), f"{name}: {ends} ends of {len(replies)} replies are learnt"
        assert ours.count(theirs.bos_token_id) == (name == "headers"), f"{name}: the beginning stands twice or never"
        compared += 1
    print(f"transformers has the same ids for {compared} conversations of the template `{name}`")


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        GOLDEN.write_text(golden())
    assert GOLDEN.read_text() == golden(), f"{GOLDEN} is not what transformers renders; run this with --write"
    print(f"transformers renders the golden texts of {len(list(TEMPLATES.glob('*.jinja')))} chat templates")
    for name in ["chatml", "headers"]:
        check_ids(name)


if __name__ == "__main__":
    main()
