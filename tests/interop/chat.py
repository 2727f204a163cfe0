"""What `transformers` makes of conversations is what `pipe` makes of them.

usage: chat.py [--write]

Checks that src/stages/chat/golden.json, against which the unit tests hold our renderer, is what `transformers` renders
for the templates beside it (`--write` writes it anew).
"""

import json
import sys
from pathlib import Path

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


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        GOLDEN.write_text(golden())
    assert GOLDEN.read_text() == golden(), f"{GOLDEN} is not what transformers renders; run this with --write"
    print(f"transformers renders the golden texts of {len(list(TEMPLATES.glob('*.jinja')))} chat templates")


if __name__ == "__main__":
    main()
