"""Programs that we did not write read what `pipe` wrote: transformers, pandas, TensorBoard, a TOML checker.

usage: check.py STORE TOML...

STORE holds a finished run of experiments/smoke.toml. Exits with 1 and says why at the first thing that does not agree.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
UP, DOWN, LEFT, RIGHT = 1, 2, 4, 8


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


def moves_of(completion: str) -> list[str] | None:
    """The answer's moves, or None where the completion has another form."""
    trace, closed, answer = completion.partition("</think>")
    answer = answer.removesuffix("<|eos|>")
    if not closed or not trace.startswith("<think>") or "<think>" in trace[1:]:
        return None
    if any(special in trace for special in ["<|pad|>", "<|bos|>", "<|eos|>"]):
        return None
    tokens = answer.replace("<|", " <|").split()
    names = ["<|up|>", "<|down|>", "<|left|>", "<|right|>"]
    return tokens if tokens and all(token in names for token in tokens) else None


def solved(maze: dict, completion: str, finish: str) -> bool:
    """The verdict, computed afresh from the stored instance and text."""
    moves = moves_of(completion)
    if moves is None or finish != "stop":
        return False
    cell, columns = maze["origin"], maze["columns"]
    for move in moves:
        if cell == maze["target"]:
            return False  # An answer ends where the target is reached.
        side, step = {
            "<|up|>": (UP, -columns),
            "<|down|>": (DOWN, columns),
            "<|left|>": (LEFT, -1),
            "<|right|>": (RIGHT, 1),
        }[move]
        if maze["walls"][cell] & side:
            return False
        cell += step
    return cell == maze["target"]


def check_evaluations(store: Path) -> None:
    """The solved share of every evaluation comes out the same when it is computed here."""
    found = 0
    for path in sorted(store.glob("objects/**/examples.parquet")):
        rows = pandas.read_parquet(path)
        mine = [
            solved(json.loads(row.data), row.completion, row.finish) for row in rows.itertuples()
        ]
        assert [float(value) for value in mine] == list(rows["solved"]), f"{path}: verdicts differ"
        metrics = json.loads((path.parent / "metrics.json").read_text())
        assert math.isclose(metrics["solved"], sum(mine) / len(mine)), f"{path}: the share differs"
        found += 1
    assert found, "no evaluation"
    print(f"{found} evaluations recomputed")


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


def main() -> None:
    store = Path(sys.argv[1]).resolve()
    check_toml(sys.argv[2:])
    check_events(store)
    check_parquet(store)
    check_evaluations(store)
    check_checkpoints(store)
    check_greedy_choices(store)


if __name__ == "__main__":
    main()
