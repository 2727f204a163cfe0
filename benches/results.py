"""Renews the tables, the curves and the ledger of docs/results.md from the results in a store; runs nothing.

usage: python3 benches/results.py [--pipe FILE] [--store DIR] [NAME...]

For every experiment NAME (all that the page has marks for unless given), what stands on the page between `<!-- table NAME OPTIONS -->`
and `<!-- end -->` becomes what `pipe table experiments/NAME.toml OPTIONS --format markdown` prints, and `docs/results/NAME.json` what
it prints as JSON; OPTIONS may be `--set` and its values. `<!-- ledger NAME OPTIONS -->` becomes the time of every stage that trained or
was evaluated: how many results, minutes of all and of one. `docs/results/NAME-*.svg` are curves of the validations, the mean over seeds
with the band from the least to the greatest.
Needs `matplotlib`.
"""

import argparse
import json
import re
import shlex
import subprocess
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pipe", "font.size": 9})
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / "docs/results.md", ROOT / "docs/results"
# Name of the figure, stages, metric, what the axis says. Arms of a sweep and stages are curves of their own, seeds are not.
FIGURES = {
    "alphamaze": [
        ("sft", ["sft", "sft_search", "sft_direct"], "validation/solved", "solved, validation, greedy"),
        ("more", ["sft_more", "sft_rejection"], "validation/solved", "solved, validation, greedy"),
        ("grpo", ["grpo"], "validation/solved", "solved, validation, temperature 1"),
    ],
    "rewards": [("solved", ["grpo"], "validation/solved", "solved, validation, temperature 1")],
    "loss": [("solved", ["grpo"], "validation/solved", "solved, validation, temperature 1")],
    "group_size": [("solved", ["grpo"], "validation/solved", "solved, validation, temperature 1")],
    "size": [("solved", ["sft"], "validation/solved", "solved, validation, greedy")],
    "encoding": [("solved", ["sft"], "validation/solved", "solved, validation, greedy")],
    "data": [("solved", ["sft"], "validation/solved", "solved, validation, greedy")],
    "maze_size": [("solved", ["sft"], "validation/solved", "solved, validation (all sizes), greedy")],
    "shorter_search": [
        ("length", ["grpo"], "completions/mean_length", "tokens of a completion, training"),
    ],
}
TRAINED = {"sft", "grpo", "evaluate"}


class Store:
    def __init__(self, pipe, folder):
        self.binary, self.folder = pipe, folder

    def pipe(self, *what):
        command = [self.binary, *what, "--store", self.folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr}")
        return done.stdout

    def stages(self, name, sets):
        """What is done of an experiment: (trial, stage, kind, key)."""
        plan = json.loads(self.pipe("plan", f"experiments/{name}.toml", *sets, "--json"))
        return [(one["trial"] or "", one["stage"], one["kind"], one["key"]) for one in plan if one["state"] == "cached"]

    def points(self, key, metric):
        """Steps and values; a torn line says nothing."""
        path = Path(self.folder) / "logs" / key / "metrics.jsonl"
        found = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record.get(metric), float | int):
                found[record["step"]] = record[metric]
        return found


def without_seed(trial):
    return ",".join(part for part in trial.split(",") if not part.startswith("seed="))


def figure(store, name, sets, stages, metric, axis, path):
    curves = defaultdict(list)
    for trial, stage, _, key in store.stages(name, sets):
        points = store.points(key, metric) if stage in stages else {}
        if points:
            arm = ", ".join(part for part in (without_seed(trial), stage if len(stages) > 1 else "") if part)
            curves[arm or stage].append(points)
    if not curves:
        return
    plot, area = plt.subplots(figsize=(7, 3.6))
    for place, (arm, runs) in enumerate(sorted(curves.items())):
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        # At most some hundred points: the mean of as many steps as that takes.
        width = max(1, -(-len(steps) // 100))
        groups = [steps[at : at + width] for at in range(0, len(steps), width)]
        values = [[sum(run[step] for step in group) / len(group) for run in runs] for group in groups]
        steps = [sum(group) / len(group) for group in groups]
        line = ["-", "--", ":"][place // 10 % 3]
        (drawn,) = area.plot(steps, [sum(v) / len(v) for v in values], line, marker="." if len(steps) < 30 else "", label=arm)
        if len(runs) > 1:
            area.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=drawn.get_color())
    area.set_xlabel("step")
    area.set_ylabel(axis)
    area.grid(alpha=0.3)
    area.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    plot.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(plot)


def ledger(store, name, sets):
    seconds = defaultdict(dict)
    for trial, stage, kind, key in store.stages(name, sets):
        if kind in TRAINED and key not in seconds[stage]:
            place = "/".join(part for part in (f"experiments/{name}.toml", trial, stage) if part)
            seconds[stage][key] = json.loads(store.pipe("show", place, *sets, "--json"))["seconds"]
    rows = ["| stage | results | minutes each | minutes in all |", "|---|---:|---:|---:|"]
    for stage, all in seconds.items():
        total = sum(all.values()) / 60
        rows.append(f"| `{stage}` | {len(all)} | {total / len(all):.1f} | {total:.1f} |")
    total = sum(sum(all.values()) for all in seconds.values()) / 60
    return "\n".join([*rows, f"| all | {sum(map(len, seconds.values()))} | | {total:.0f} |"])


def fill(page, mark, text):
    pattern = re.compile(re.escape(mark) + r".*?<!-- end -->", re.S)
    return pattern.sub(lambda _: f"{mark}\n\n{text.strip()}\n\n<!-- end -->", page)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*")
    options.add_argument("--pipe", default=ROOT / "target/debug/pipe")
    options.add_argument("--store", default=ROOT / "artifacts")
    given = options.parse_args()
    store = Store(Path(given.pipe).resolve(), Path(given.store).resolve())
    page = PAGE.read_text()
    FOLDER.mkdir(exist_ok=True)
    for mark, what, name, sets in re.findall(r"(<!-- (table|ledger) (\S+)(.*?) -->)", page):
        if given.names and name not in given.names:
            continue
        sets = shlex.split(sets)
        if what == "ledger":
            page = fill(page, mark, ledger(store, name, sets))
            continue
        table = ["table", f"experiments/{name}.toml", *sets, "--format"]
        page = fill(page, mark, re.sub(r"\A### .*\n+.*\n+", "", store.pipe(*table, "markdown")))
        (FOLDER / f"{name}.json").write_text(store.pipe(*table, "json"))
        for part, stages, metric, axis in FIGURES.get(name, []):
            figure(store, name, sets, stages, metric, axis, FOLDER / f"{name}-{part}.svg")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
