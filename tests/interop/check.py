"""Programs that we did not write read what `pipe` wrote: transformers, pandas, TensorBoard, a TOML checker.

usage: check.py STORE TOML...

STORE holds a finished run of experiments/smoke.toml. Exits with 1 and says why at the first thing that does not agree.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from verdicts import disagreements, shared_layouts

ROOT = Path(__file__).resolve().parents[2]


def show(store: Path, name: str) -> dict:
    """What `pipe show` says of a stage's output."""
    command = [ROOT / "pipe", "--store", store, "show", "--json", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check_events(store: Path) -> None:
    """Every event file is read, has steps that only rise, and carries the configuration."""
    folders = {path.parent for path in store.glob("logs/*/**/events.out.tfevents.*")}
    assert len(folders) >= 2, f"expected the event files of two training stages, found {len(folders)}"
    for folder in sorted(folders):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        assert events.Tags()["scalars"], f"{folder} has no scalar"
        for tag in events.Tags()["scalars"]:
            steps = [event.step for event in events.Scalars(tag)]
            assert steps == sorted(set(steps)), f"{folder}: {tag} is not one curve"
        texts = [tag for tag in events.Tags()["tensors"] if "config" in tag]
        assert texts, f"{folder} has no configuration text"
    print(f"tensorboard reads {len(folders)} runs")


def check_parquet(store: Path) -> None:
    """Every Parquet file is a table with rows."""
    paths = sorted(store.glob("objects/**/*.parquet"))
    assert paths, "no Parquet file"
    for path in paths:
        assert len(pandas.read_parquet(path)) > 0, f"{path} has no row"
    print(f"pandas reads {len(paths)} Parquet files")


def check_evaluations(store: Path) -> None:
    """Every verdict of every evaluation comes out the same from the rules alone, and so does the solved share."""
    paths = sorted(store.glob("objects/**/examples.parquet"))
    assert paths, "no evaluation"
    count = 0
    for path in paths:
        rows, wrong, outcomes = disagreements(path)
        assert not wrong, f"{path}: verdicts differ: {wrong[:5]}"
        metrics = json.loads((path.parent / "metrics.json").read_text())
        assert math.isclose(metrics["solved"], outcomes["solved"] / rows), f"{path}: the share differs"
        count += rows
    print(f"{len(paths)} evaluations recomputed, {count} rows agree in every verdict")


def check_splits(store: Path) -> None:
    """No layout of a test stands in training data, in the mazes or in their tokens."""
    for name in ["smoke/mazes", "smoke/tokens"]:
        shared = shared_layouts([Path(show(store, name)["path"])])
        assert not shared, f"{name}: {shared[:5]}"


def check_checkpoints(store: Path) -> None:
    """transformers loads every checkpoint and its tokenizer, whose sizes agree."""
    paths = sorted({path.parent for path in store.glob("objects/**/model.safetensors")})
    assert paths, "no checkpoint"
    for path in paths:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
        assert not info["missing_keys"] and not info["unexpected_keys"], f"{path}: {info}"
        # By its class: AutoTokenizer takes every checkpoint of this architecture for one with Qwen2's own vocabulary.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        assert len(tokenizer) == model.config.vocab_size, f"{path}: vocabulary sizes differ"
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
    print(f"transformers loads {len(paths)} checkpoints")


def check_greedy_choices(store: Path) -> None:
    """Every token that our greedy decoding chose is the best by transformers' logits too, to 1e-4."""
    folder = Path(show(store, "smoke/sft")["path"])
    rows = pandas.read_parquet(Path(show(store, "smoke/evaluate_sft_greedy")["path"]) / "examples.parquet").head(100)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    worst, tokens = 0.0, 0
    for row in rows.itertuples():
        prompt = tokenizer(row.prompt)["input_ids"]
        assert prompt[0] == tokenizer.bos_token_id != prompt[1], "a text does not begin as rows do"
        answer = tokenizer(row.completion.removesuffix("<|eos|>"), add_special_tokens=False)["input_ids"]
        answer += [tokenizer.eos_token_id] if row.finish == "stop" else []
        assert "".join(tokenizer.convert_ids_to_tokens(prompt[1:])) == row.prompt, "the prompt is not read as written"
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double()
        logits = logits[len(prompt) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        worst = max(worst, (logits.max(-1).values - chosen).max().item())
        tokens += len(answer)
    assert worst <= 1e-4, f"a greedy choice lies {worst} below the best logit"
    print(f"transformers makes the same {tokens} greedy choices, at most {worst:.1e} apart")


def check_toml(paths: list[str]) -> None:
    """An editor's checker accepts every TOML file against our published schema."""
    command = [Path(sys.executable).parent / "tombi", "lint", "--offline", "--error-on-warnings", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"tombi accepts {len(paths)} TOML files")


def check_templates() -> None:
    """And every template of `pipe init`, against the schema that is written beside it."""
    with tempfile.TemporaryDirectory() as place:
        for template in ["maze", "number_line", "own-data", "own-task"]:
            subprocess.run([ROOT / "pipe", "init", template, "--template", template, "--quiet"], cwd=place, check=True)
        check_toml(sorted(str(path) for path in Path(place).glob("*.toml")))


COMMAND = '[stages.a]\nkind = "command"\ncommand = ["true"]\noutputs = ["o"]\n'
MAZES = '[stages.a]\nkind = "synthesize"\nsplits = {{ train = 5 }}\ntask = {{ kind = "maze", rows = {}, columns = 3 }}\n'
# The schema, a text with one mistake, and where it is: line and column from 1, the line of the schema not counted.
MISTAKES = {
    "an unknown field": ("pipeline", COMMAND + "outpts = []\n", (5, 1)),
    "a wrong type": ("pipeline", COMMAND.replace('["true"]', '"true"'), (3, 11)),
    "a number below its range": ("pipeline", MAZES.format(1), (4, 32)),
    "an unknown kind": ("pipeline", COMMAND.replace('"command"', '"comand"'), (2, 8)),
    "a word that is no choice": ("pipeline", MAZES.format('3, algorithm = "dsf"'), (4, 47)),
    "an unknown field of an inner table": ("experiment", "[stages.sft.optimizer]\nweight_deca = 0.1\n", (2, 1)),
    "a float for an integer": ("experiment", "[stages.sft]\nsteps = 1.5\n", (2, 9)),
    "a reward of no kind": ("experiment", '[stages.grpo.rewards.x]\nkind = "corect"\n', (2, 8)),
    "a number below the range of an overlay": ("experiment", "[stages.grpo]\ngroup_size = 1\n", (2, 14)),
    "a list for a table": ("experiment", "[sweep]\nseeds = [1, 2]\n", (2, 9)),
    "a text for a list": ("experiment", '[table]\nmetrics = "a.solved"\n', (2, 11)),
    "a negative count": ("pipeline", COMMAND + "[stages.a.run]\nretries = -1\n", (6, 11)),
}


def check_mistakes() -> None:
    """The editor's checker points at each planted mistake, and at nothing else."""
    tombi = Path(sys.executable).parent / "tombi"
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "planted.toml"
        for name, (schema, text, (line, column)) in MISTAKES.items():
            file.write_text(f"#:schema {ROOT / 'schemas' / schema}.json\n{text}")
            done = subprocess.run([tombi, "lint", "--offline", file.name], cwd=place, capture_output=True, text=True)
            said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
            places = {(int(line) - 1, int(column)) for line, column in re.findall(r"planted\.toml:(\d+):(\d+)", said)}
            # What is missing has no place but the file's beginning; an unknown kind lacks every kind's fields.
            places.discard((0, 1))
            assert done.returncode != 0 and places == {(line, column)}, f"{name}: {said}"
    print(f"tombi points at {len(MISTAKES)} planted mistakes")


def main() -> None:
    store = Path(sys.argv[1]).resolve()
    check_toml(sys.argv[2:])
    check_templates()
    check_mistakes()
    check_events(store)
    check_parquet(store)
    check_evaluations(store)
    check_splits(store)
    check_checkpoints(store)
    check_greedy_choices(store)


if __name__ == "__main__":
    main()
