"""Exported folders are what `transformers` and `datasets` take, and a model solves there as many mazes as it did here.

usage: export.py STORE

STORE holds a finished run of experiments/smoke.toml. `pipe export` writes a checkpoint and a data set into a temporary folder;
`AutoModelForCausalLM` generates greedily, with padding and a cache of its own, and verdicts are computed from the rules alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pandas
import torch
from check import ROOT, show
from datasets import load_dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from verdicts import verdict

BATCH = 50


def export(store: Path, result: str, folder: Path) -> dict:
    """What `pipe export --json` says."""
    command = [ROOT / "pipe", "--store", store, "export", "--json", result, folder]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def generated(model, tokenizer, prompts: list[str], limit: int) -> list[tuple[str, str]]:
    """The greedy completion of every prompt, and how it ended."""
    answers = []
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in row
            ids = row[: row.index(tokenizer.eos_token_id) + 1] if ended else row
            answers.append(("".join(tokenizer.convert_ids_to_tokens(ids)), "stop" if ended else "length"))
    return answers


def check_checkpoint(store: Path, place: Path, stage: str, evaluation: str) -> None:
    """The folder loads by the Auto classes alone, its ids are ours, and its share of solved mazes is what was reported."""
    folder = place / stage
    said = export(store, f"smoke/{stage}", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    result = Path(show(store, f"smoke/{evaluation}")["path"])
    rows = pandas.read_parquet(result / "examples.parquet")
    metrics = json.loads((result / "metrics.json").read_text())
    for text in [*rows.prompt, *rows.completion]:
        assert tokenizer(text)["input_ids"] == plain(text)["input_ids"], f"AutoTokenizer reads `{text}` otherwise"
    limit = show(store, f"smoke/{evaluation}")["params"]["max_new_tokens"]
    answers = generated(model, tokenizer, list(rows.prompt), limit)
    bare = [(text.removesuffix(tokenizer.eos_token), finish) for text, finish in answers]
    mine = [
        verdict(json.loads(data), prompt, text, finish)["solved"]
        for data, prompt, (text, finish) in zip(rows.data, rows.prompt, bare)
    ]
    share, reported = sum(mine) / len(mine), metrics["solved"]
    theirs = [(text.removesuffix(tokenizer.eos_token), finish) for text, finish in zip(rows.completion, rows.finish)]
    same = sum(here == there for here, there in zip(theirs, bare))
    # Batches are padded there and not here, so a tie within rounding may fall otherwise in a row or two.
    assert abs(share - reported) * len(mine) <= 2, f"{stage}: {share} of {len(mine)} there, {reported} here"
    assert same >= len(mine) - 4, f"{stage}: only {same} of {len(mine)} completions are the same"
    card = ModelCard.load(folder / "README.md").data
    values = {metric.metric_value for metric in card.eval_results or [] if metric.metric_type == "solved"}
    assert any(abs(value - reported) < 1e-12 for value in values), f"{stage}: the card has {values}, not {reported}"
    provenance = json.loads((folder / "pipe.json").read_text())
    assert provenance["key"] == said["key"] and provenance["evaluations"], provenance
    print(f"transformers solves {share:.1%} of {len(mine)} mazes with the exported `{stage}`; pipe reported {reported:.1%}")


def check_dataset(store: Path, place: Path) -> None:
    """`datasets` reads every split, by name and by the card alone."""
    folder = place / "mazes"
    export(store, "smoke/mazes", folder)
    files = {path.stem: str(path) for path in sorted(folder.glob("*.parquet"))}
    cache = str(place / "cache")
    named = load_dataset("parquet", data_files=files, cache_dir=cache)
    carded = load_dataset(str(folder), cache_dir=cache)
    assert set(named) == set(carded) == set(files) and len(files) > 2, (named, carded)
    for split, path in files.items():
        rows = pandas.read_parquet(path)
        assert len(rows) == len(named[split]) == len(carded[split]) > 0, split
        assert list(rows.columns) == named[split].column_names, split
    print(f"datasets reads {len(files)} splits of the exported data set")


def main() -> None:
    store = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as place:
        check_checkpoint(store, Path(place), "sft", "evaluate_sft_greedy")
        check_checkpoint(store, Path(place), "grpo", "evaluate_grpo_greedy")
        check_dataset(store, Path(place))


if __name__ == "__main__":
    main()
