#!/usr/bin/env python3
"""What must hold on a device: parity with the CPU, the laws of the presets, resume to tolerance; then what they cost.

    python3 benches/device.py [DEVICE] [PIPE]

DEVICE is `cuda` (the default) or `cpu`, which checks the script itself. PIPE is the program (`pipe-worker` lies beside it).
Correctness comes first and ends the script where it fails; one table is printed at the end.
"""

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ROOT / "learn/tests/fixtures/models"
PRESETS = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "maxrl"]

# Largest absolute difference of a log-probability, fp32.
PARITY = 1e-4
# Relative difference of the norm of a step's gradient between device and CPU.
GRADIENT = 1e-3
# Relative distance of the final weights of a run that was killed from those of one that was not.
RESUME = 1e-3

FLOW = """
[stages.data]
kind = "synthesize"
task = TASK
unique = false
splits = { train = 400, rl = 60, validation = 20, test = 30 }
LIMIT
[stages.tokenizer]
kind = "tokenizer"
task = TASK
format = FORMAT
[stages.tokens]
kind = "tokenize"
dataset = "data"
tokenizer = "tokenizer"
format = FORMAT
[stages.base]
kind = "model"
tokenizer = "tokenizer"
architecture = { kind = "qwen2", hidden_size = 64, layers = 2, heads = 4, kv_heads = 2 }
[stages.sft]
kind = "sft"
model = "base"
data = "tokens"
steps = 80
batch_size = 32
learning_rate = 3e-3
run = { cpus = 2, save_every = "1s", device = "DEVICE" }
[stages.grpo]
kind = "grpo"
model = "sft"
prompts = "tokens"
preset = "PRESET"
steps = 6
prompts_per_step = 8
group_size = 4
max_new_tokens = 40
updates_per_step = 2
rewards = { correct = { kind = "correct" }, shaped = { kind = "expression", expression = "SHAPED", weight = 0.5 } }
run = { cpus = 2, save_every = "1s", device = "DEVICE" }
"""

TASKS = {
    "maze": {
        "TASK": '{ kind = "maze", rows = 3, columns = 3 }',
        "FORMAT": '{ kind = "compact", trace = "path" }',
        "SHAPED": "progress",
        "LIMIT": "",
    },
    "number_line": {
        "TASK": '{ kind = "number_line", max_position = 9, max_turns = 5 }',
        "FORMAT": '{ kind = "json", thoughts = false }',
        "SHAPED": "valid",
        "LIMIT": "max_length = 4",
    },
}

TABLE = []


def row(what, value, bar, holds):
    TABLE.append((what, value, bar, "ok" if holds else "FAILED"))
    print(f"{'ok' if holds else 'FAILED':7} {what}: {value} (bar {bar})", flush=True)
    if not holds:
        finish(1)


def finish(code):
    print("\n| what | measured | bar | |\n|---|---|---|---|")
    for line in TABLE:
        print("| " + " | ".join(line) + " |")
    sys.exit(code)


def score(pipe, folder, rows, device):
    command = [pipe, "score", "--device", device, str(folder), str(rows)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line)["logprobs"][1:] for line in lines]


def parity(pipe, device, work):
    """The log-probabilities of every kind of folder on the device are those on the CPU."""
    draws = random.Random(3)
    for folder in sorted(FOLDERS.iterdir()):
        config = json.loads((folder / "config.json").read_text())
        rows = work / "rows.jsonl"
        lengths = [draws.randrange(2, 33) for _ in range(24)]
        ids = [[draws.randrange(config["vocab_size"]) for _ in range(length)] for length in lengths]
        rows.write_text("".join(json.dumps({"ids": one}) + "\n" for one in ids))
        here, there = score(pipe, folder, rows, "cpu"), score(pipe, folder, rows, device)
        worst = max(abs(a - b) for one, other in zip(here, there) for a, b in zip(one, other))
        row(f"parity of {folder.name}", f"{worst:.1e}", f"{PARITY:.0e}", worst <= PARITY)


def flow(folder, name, preset, device):
    text = FLOW
    for key, value in {**TASKS[name], "PRESET": preset, "DEVICE": device}.items():
        text = text.replace(key, value)
    path = folder / f"{name}_{preset}.toml"
    path.write_text(text)
    return path


def show(pipe, folder, name):
    out = subprocess.run([pipe, "show", "--json", name], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def lines(folder, shown):
    path = folder / "artifacts/logs" / shown["key"] / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(path):
    """All fp32 numbers of a safetensors file, in the order of their names."""
    data = (Path(path) / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    numbers = []
    for name in sorted(key for key in header if key != "__metadata__"):
        begin, end = header[name]["data_offsets"]
        numbers.extend(struct.unpack(f"<{(end - begin) // 4}f", data[8 + length + begin : 8 + length + end]))
    return numbers


def run(pipe, folder, *arguments):
    began = time.monotonic()
    done = subprocess.run([pipe, "run", "--quiet", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"pipe run {arguments} ended with {done.returncode}:\n{done.stderr}")
    return time.monotonic() - began


def presets(pipe, device, work):
    """Law 1 on every preset, on tasks of one turn and of several; the first gradients are those of the CPU."""
    for name in TASKS:
        for preset in PRESETS:
            folder = work / f"{name}-{preset}"
            folder.mkdir()
            path = flow(folder, name, preset, device)
            # One supervised model for both devices, so that the first step has the same weights.
            run(pipe, folder, path.name, "--until", "sft", "--set", "stages.sft.run.device=cpu")
            run(pipe, folder, path.name, "--set", "stages.sft.run.device=cpu")
            there = lines(folder, show(pipe, folder, f"{path.stem}/grpo"))
            worst = max(line.get("sampling/logprob_difference_max", 0.0) for line in there[:1])
            row(f"{name}, {preset}: sampler against trainer", f"{worst:.1e}", f"{PARITY:.0e}", worst <= PARITY)
            finite = all(math.isfinite(v) for line in there for v in line.values() if isinstance(v, float))
            row(f"{name}, {preset}: every metric is finite", str(finite), "True", finite)


def gradients(pipe, device, work):
    """The gradient of the first supervised step is that of the CPU."""
    for name in TASKS:
        norms = {}
        for where in ["cpu", device]:
            folder = work / f"{name}-gradient-{where}"
            folder.mkdir()
            path = flow(folder, name, "dapo", where)
            run(pipe, folder, path.name, "--until", "sft", "--set", "stages.sft.steps=3")
            norms[where] = [line["gradient_norm"] for line in lines(folder, show(pipe, folder, f"{path.stem}/sft"))]
        worst = max(abs(a / b - 1.0) for a, b in zip(norms["cpu"], norms[device]))
        row(f"{name}: gradient norms of three steps", f"{worst:.1e}", f"{GRADIENT:.0e}", worst <= GRADIENT)


def resume(pipe, device, work):
    """A run that is killed three times ends where the uninterrupted one does, to tolerance."""
    for name in TASKS:
        ends = []
        for kills in [0, 3]:
            folder = work / f"{name}-killed-{kills}"
            folder.mkdir()
            path = flow(folder, name, "dapo", device)
            run(pipe, folder, path.name, "--until", "base", "--until", "tokens")
            for _ in range(kills):
                going = subprocess.Popen(
                    [pipe, "run", "--quiet", path.name],
                    cwd=folder,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                time.sleep(5)
                if going.poll() is None:
                    os.killpg(going.pid, signal.SIGKILL)
                going.wait()
            run(pipe, folder, path.name)
            ends.append(weights(show(pipe, folder, f"{path.stem}/grpo")["path"]))
        distance = math.dist(*ends) / math.hypot(*ends[0])
        row(f"{name}: killed and resumed", f"{distance:.1e}", f"{RESUME:.0e}", distance <= RESUME)


def costs(pipe, device, work):
    """Tokens a second of the two halves, as the stages log them."""
    folder = work / "costs"
    folder.mkdir()
    path = flow(folder, "maze", "dapo", device)
    run(pipe, folder, path.name)
    for stage, names in {
        "sft": ["tokens_per_second"],
        "grpo": ["tokens_per_second/generate", "tokens_per_second/train"],
    }.items():
        logged = lines(folder, show(pipe, folder, f"{path.stem}/{stage}"))
        for name in names:
            values = sorted(line[name] for line in logged if name in line)
            row(f"{stage}: {name}, median", f"{values[len(values) // 2]:,.0f}", "none", True)


def main():
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    pipe = os.path.abspath(sys.argv[2]) if len(sys.argv) > 2 else str(ROOT / "pipe")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        for check in [parity, gradients, presets, resume, costs]:
            check(pipe, device, Path(work))
    finish(0)


if __name__ == "__main__":
    main()
