#!/usr/bin/env python3
"""Kills training runs with SIGKILL at random moments and compares every result with a run that was never killed.

    python3 benches/kills.py [KILLS] [PIPE]

SFT, GRPO and evaluation of a tiny model on two tasks: mazes (one turn) and number lines (several turns). A run is
killed ten times, driver and worker in turn or both at once, then left to end; digests of all outputs must be those of the
uninterrupted run. Exits with 1 at the first that differs.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KILLS_A_RUN = 10

TRAINING = """
[stages.base]
kind = "model"
tokenizer = "tokenizer"
architecture = { kind = "qwen2", hidden_size = 32, layers = 2, heads = 2 }
[stages.sft]
kind = "sft"
model = "base"
data = "tokens"
steps = 100
batch_size = 32
learning_rate = 3e-3
validate = { every = 25, samples = 20 }
run = { cpus = 1, save_every = "1s", device = "cpu" }
[stages.grpo]
kind = "grpo"
model = "sft"
prompts = "tokens"
steps = 10
prompts_per_step = 8
group_size = 4
generation_chunk = 2
max_new_tokens = 40
updates_per_step = 2
validate = { every = 4, samples = 20 }
rewards = { correct = { kind = "correct" }, shaped = { kind = "expression", expression = "SHAPED", weight = 0.5 } }
run = { cpus = 1, save_every = "1s", device = "cpu" }
[stages.evaluate]
kind = "evaluate"
model = "grpo"
prompts = "tokens"
max_new_tokens = 40
generation_chunk = 5
run = { cpus = 1, device = "cpu" }
"""

DATA = """
[stages.data]
kind = "synthesize"
task = TASK
unique = false
splits = { train = 400, rl = 60, validation = 20, test = 30 }
[stages.tokenizer]
kind = "tokenizer"
task = TASK
format = FORMAT
[stages.tokens]
kind = "tokenize"
dataset = "data"
tokenizer = "tokenizer"
format = FORMAT
"""

TASKS = {
    "maze": ('{ kind = "maze", rows = 3, columns = 3 }', '{ kind = "compact", trace = "path" }', "progress"),
    "number_line": (
        '{ kind = "number_line", max_position = 9, max_turns = 5 }',
        '{ kind = "json", thoughts = false }',
        "valid",
    ),
}
OUTPUTS = ["sft.last", "sft.best", "grpo.last", "grpo.best", "grpo.rollouts", "evaluate"]


def write(folder, name):
    task, form, shaped = TASKS[name]
    data = DATA.replace("TASK", task).replace("FORMAT", form)
    if name == "number_line":
        data = data.replace("unique = false", "unique = false\nmax_length = 4")
    (folder / f"{name}.toml").write_text(data + TRAINING.replace("SHAPED", shaped))


def start(pipe, folder, *arguments):
    return subprocess.Popen(
        [pipe, "run", "--quiet", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(run):
    error = run.communicate()[1].decode()
    if run.returncode != 0:
        sys.exit(f"a run ended with {run.returncode}:\n{error}")


def digests(pipe, folder, name):
    shown = [
        subprocess.run([pipe, "show", "--json", f"{name}/{output}"], cwd=folder, capture_output=True, check=True)
        for output in OUTPUTS
    ]
    return [json.loads(one.stdout)["digest"] for one in shown]


def workers(driver):
    found = subprocess.run(["pgrep", "-P", str(driver)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    pipe = os.path.abspath(sys.argv[2]) if len(sys.argv) > 2 else str(ROOT / "pipe")
    draws = random.Random(7)
    done = {name: 0 for name in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        wanted, taken = {}, {}
        for name in TASKS:
            whole = folder / f"{name}-whole"
            whole.mkdir()
            write(whole, name)
            finish(start(pipe, whole, f"{name}.toml", "--until", "base", "--until", "tokens"))
            shutil.copytree(whole, folder / f"{name}-begun", symlinks=True)
            began = time.monotonic()
            finish(start(pipe, whole, f"{name}.toml"))
            taken[name] = time.monotonic() - began
            wanted[name] = digests(pipe, whole, name)
            print(f"{name}: {taken[name]:.1f} s uninterrupted", flush=True)
        runs = 0
        while sum(done.values()) < kills:
            name = list(TASKS)[runs % len(TASKS)]
            torn = folder / f"run-{runs}"
            shutil.copytree(folder / f"{name}-begun", torn, symlinks=True)
            for _ in range(KILLS_A_RUN):
                run = start(pipe, torn, f"{name}.toml")
                time.sleep(draws.uniform(0.05, 0.5 * taken[name]))
                if run.poll() is not None:
                    finish(run)
                    break
                children, way = workers(run.pid), draws.randrange(3)
                for pid in (children if way != 1 else []) + ([run.pid] if way != 0 else []):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                run.communicate()
                done[name] += 1
            finish(start(pipe, torn, f"{name}.toml"))
            if digests(pipe, torn, name) != wanted[name]:
                sys.exit(f"{name}: run {runs} differs from the uninterrupted one; it lies in `{torn}`")
            subprocess.run(["chmod", "-R", "u+w", str(torn)], check=False)
            shutil.rmtree(torn)
            runs += 1
            print(f"run {runs}: {sum(done.values())} kills so far, every digest equal", flush=True)
        subprocess.run(["chmod", "-R", "u+w", str(folder)], check=False)
    print(f"{runs} runs, {sum(done.values())} kills ({', '.join(f'{n} {k}' for n, k in done.items())}): every digest equal")


if __name__ == "__main__":
    main()
