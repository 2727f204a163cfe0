#!/usr/bin/env python3
"""What must hold on a device: parity with the CPU, the laws of the presets, resume to tolerance; then what it costs.

    python3 benches/device.py [DEVICE=cuda] [PIPE=./pipe] [PART=all]

DEVICE is `cuda` or `cpu`; `cpu` checks the script itself, at toy sizes and against no bar of speed. PIPE is the program
(`pipe-worker` lies beside it). PART is `checks`, `bars` or `all`. Correctness comes first and ends the script where it fails;
one table is printed at the end. What the bars should show was written into `benches/RESULTS.md` before they were measured.

A binary that was built elsewhere finds the libtorch of a wheel of the same version by
    LD_LIBRARY_PATH=$(python3 -c 'import torch; print(torch.__path__[0] + "/lib")')
On one H200 all of it is meant to take less than ten minutes.
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
from concurrent.futures import ThreadPoolExecutor
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

# What one GPU's product of two large matrices in bf16 reaches, operations a second: 769 to 798 T on an H200. On a CPU any
# number serves: nothing is judged there.
PEAK = {"cuda": 790e12, "cpu": 0.2e12}

# A decoder of the width of Qwen2-0.5B. A task's vocabulary is small, so 33 layers in place of 24 stand for the weights that
# Qwen2-0.5B has in its embedding: 0.49 G in matrices.
HALF_BILLION = {
    "cuda": dict(hidden_size=896, layers=33, heads=14, kv_heads=2, intermediate_size=4864),
    "cpu": dict(hidden_size=64, layers=2, heads=4, kv_heads=2, intermediate_size=128),
}
# Rows and micro-batches of a supervised step; prompts, samples and tokens of a step of GRPO; steps of each.
SIZES = {
    "cuda": dict(mazes=6_000, side=8, rows=256, micro=64, prompts=64, samples=8, new=512, update=32, sft=14, grpo=4),
    "cpu": dict(mazes=300, side=3, rows=16, micro=8, prompts=4, samples=4, new=24, update=8, sft=4, grpo=3),
}

BARS = """
[stages.data]
kind = "synthesize"
task = { kind = "maze", rows = SIDE, columns = SIDE }
splits = { train = MAZES, rl = MAZES, validation = 20, test = 30 }
unique = false
[stages.tokenizer]
kind = "tokenizer"
task = { kind = "maze", rows = SIDE, columns = SIDE }
format = { kind = "alphamaze", trace = "path" }
[stages.tokens]
kind = "tokenize"
dataset = "data"
tokenizer = "tokenizer"
format = { kind = "alphamaze", trace = "path" }
[stages.base]
kind = "model"
tokenizer = "tokenizer"
architecture = { kind = "qwen2", max_position_embeddings = 4096, ARCHITECTURE }
[stages.sft]
kind = "sft"
model = "base"
data = "tokens"
steps = SFT_STEPS
batch_size = ROWS
micro_batch_size = MICRO
learning_rate = 1e-5
PRECISION
run = { cpus = 2, device = "DEVICE" }
[stages.grpo]
kind = "grpo"
model = "base"
prompts = "tokens"
split = "rl"
preset = "dapo"
dynamic_sampling = { enabled = false }
steps = GRPO_STEPS
prompts_per_step = PROMPTS
group_size = SAMPLES
generation_chunk = PROMPTS
micro_batch_size = UPDATE
max_new_tokens = NEW
learning_rate = 1e-6
PRECISION
rewards = { correct = { kind = "correct" }, shaped = { kind = "expression", expression = "progress" } }
run = { cpus = 2, device = "DEVICE" }
"""

TABLE = []


def row(what, value, bar, holds, ends=True):
    """Notes a line of the table; one that does not hold ends the script, unless it is a bar of speed."""
    TABLE.append((what, value, bar, "ok" if holds else "FAILED"))
    print(f"{'ok' if holds else 'FAILED':7} {what}: {value} (bar {bar})", flush=True)
    if not holds and ends:
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


def run(pipe, folder, *arguments, **environment):
    began = time.monotonic()
    done = subprocess.run(
        [pipe, "run", "--quiet", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode != 0:
        sys.exit(f"pipe run {arguments} ended with {done.returncode}:\n{done.stderr}")
    return time.monotonic() - began


def presets(pipe, device, work):
    """Law 1 on every preset, on tasks of one turn and of several. Several at a time: nothing is timed."""

    def one(name, preset):
        folder = work / f"{name}-{preset}"
        folder.mkdir()
        path = flow(folder, name, preset, device)
        # One supervised model for both devices, so that the first step has the same weights.
        run(pipe, folder, path.name, "--set", "stages.sft.run.device=cpu")
        return name, preset, lines(folder, show(pipe, folder, f"{path.stem}/grpo"))

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 4)) as pool:
        pending = [pool.submit(one, name, preset) for name in TASKS for preset in PRESETS]
        for name, preset, there in (done.result() for done in pending):
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


def bars_flow(folder, device, precision):
    """The pipeline of the bars; `precision` is a line of TOML, or nothing for fp32."""
    sizes = SIZES[device]
    values = {
        "SIDE": sizes["side"],
        "MAZES": sizes["mazes"],
        "ARCHITECTURE": ", ".join(f"{name} = {value}" for name, value in HALF_BILLION[device].items()),
        "SFT_STEPS": sizes["sft"],
        "ROWS": sizes["rows"],
        "MICRO": sizes["micro"],
        "GRPO_STEPS": sizes["grpo"],
        "PROMPTS": sizes["prompts"],
        "SAMPLES": sizes["samples"],
        "UPDATE": sizes["update"],
        "NEW": sizes["new"],
        "PRECISION": precision,
        "DEVICE": device,
    }
    text = BARS
    for key, value in values.items():
        text = text.replace(key, str(value))
    path = folder / "bars.toml"
    path.write_text(text)
    return path


def median(logged, name, skip=2):
    """The median over the steps but the first, in which libraries warm up."""
    values = sorted(line[name] for line in logged[min(skip, len(logged) - 1) :] if name in line)
    return values[len(values) // 2] if values else math.nan


def takes_precision(pipe, folder, path):
    """Whether this build knows the parameter `precision`."""
    return subprocess.run([pipe, "check", path.name], cwd=folder, capture_output=True).returncode == 0


def matrices(device, vocabulary):
    """Weights that a token is multiplied with."""
    shape = HALF_BILLION[device]
    width, head = shape["hidden_size"], shape["hidden_size"] // shape["heads"]
    layer = width * (2 * width + 2 * shape["kv_heads"] * head + 3 * shape["intermediate_size"])
    return shape["layers"] * layer + vocabulary * width


def bars(pipe, device, work):
    """The bars of speed, from what the stages log of every step; none of them ends the script."""
    folder = work / "bars"
    folder.mkdir()
    path = bars_flow(folder, device, 'precision = "bf16"')
    kind = "bf16"
    if not takes_precision(pipe, folder, path):
        path, kind = bars_flow(folder, device, ""), "fp32"
    judged = device == "cuda" and kind == "bf16"

    def bar(what, value, at_least, form="{:.1%}"):
        shown = form.format(value)
        row(what, shown, f">= {form.format(at_least)}" if judged else "none", not judged or value >= at_least, ends=False)

    def note(what, value, form="{:,.1f}"):
        row(what, form.format(value), "none", True)

    # 1. Supervised training. By the stage: operations of forward and backward pass over the seconds of forward, backward and
    #    optimizer, over the product that it measured. By the script: tokens a second of the whole step, 6 operations a
    #    weight and token, over PEAK; attention is left out, and so is what the last layer spares.
    run(pipe, folder, path.name, "--until", "sft")
    shown = show(pipe, folder, "bars/sft")
    steps = lines(folder, shown)
    config = json.loads((Path(show(pipe, folder, "bars/base")["path"]) / "config.json").read_text())
    weights_ = matrices(device, config["vocab_size"])
    rate = median(steps, "tokens_per_second")
    note(f"weights in matrices, M ({kind})", weights_ / 1e6)
    note(f"SFT, {kind}: tokens a second", rate, "{:,.0f}")
    bar(f"SFT, {kind}: MFU, by the stage", median(steps, "mfu"), 0.40)
    note(f"SFT, {kind}: MFU, tokens/s x 6 x weights / {PEAK[device] / 1e12:.1f} T", rate * 6 * weights_ / PEAK[device], "{:.1%}")
    note(f"SFT, {kind}: peak memory, GiB", max(line["peak_memory_bytes"] for line in steps) / 2**30)

    # 2. A step of GRPO with and without CUDA graphs: the update, and decoding.
    found = {}
    for graphs in ["auto", "none"]:
        run(pipe, folder, path.name, "--until", "grpo", "--again", "grpo", PIPE_GRAPHS=graphs)
        found[graphs] = lines(folder, show(pipe, folder, "bars/grpo"))
    with_graphs, without = found["auto"], found["none"]
    sizes = SIZES[device]
    bar(f"GRPO, {kind}: MFU of the update, by the stage", median(with_graphs, "mfu", 1), 0.25)
    rows_ = sizes["prompts"] * sizes["samples"]
    share = "decode_bandwidth_share"
    bar(f"decode at batch {rows_}, {kind}: share of a copy's bandwidth", median(with_graphs, share, 1), 0.50)
    note(f"decode at batch {rows_}, {kind}, without graphs: share", median(without, share, 1), "{:.1%}")
    for name, steps in [("with graphs", with_graphs), ("without", without)]:
        note(f"decode {name}: tokens a second, with drawing", median(steps, "tokens_per_second/decode", 1), "{:,.0f}")
        phases = ", ".join(
            f"{phase} {median(steps, f'seconds/{phase}', 1):.2f}"
            for phase in ["prefill", "decode", "sampling", "reward", "forward", "backward", "optimizer", "step"]
        )
        row(f"GRPO {name}, seconds", phases, "none", True)


def quickstart(pipe, device, work):
    """Training of the quickstart on the device beside two cores of the CPU: a part of its steps, whole steps compared."""
    steps = {"sft": 100, "grpo": 30} if device == "cuda" else {"sft": 2, "grpo": 1}
    seconds, folder = {}, work / "quickstart"
    folder.mkdir()
    for where in ["cpu", device]:
        store = folder / f"store-{where}"
        sets = [f"stages.{stage}.steps={count}" for stage, count in steps.items()]
        # Nothing is validated within: evaluation is no training.
        sets += [f"stages.{stage}.{name}" for stage in steps for name in [f"run.device={where}", "run.cpus=2"]]
        sets += [f"stages.{stage}.validate.{name}" for stage in steps for name in ["every=10000", "samples=8"]]
        laid = [part for one in sets for part in ("--set", one)]
        file = ROOT / "experiments/quickstart.toml"
        run(pipe, folder, str(file), "--until", "grpo", "--store", str(store), *laid)
        total = 0.0
        for stage, count in steps.items():
            command = [pipe, "show", "--json", f"{file}/{stage}", "--store", str(store), *laid]
            key = json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)["key"]
            logged = [json.loads(line) for line in (store / "logs" / key / "metrics.jsonl").read_text().splitlines()]
            for line in logged:
                line["training"] = line["seconds/step"] - line.get("seconds/evaluation", 0.0)
            each = median(logged, "training")
            row(f"quickstart, {stage} on {where}: seconds a step", f"{each:.3f}", "none", True)
            # As many steps as the quickstart has.
            total += each * {"sft": 750, "grpo": 400}[stage]
        seconds[where] = total
        row(f"quickstart on {where}: seconds of training", f"{total:.0f}", "none", True)
    if device != "cpu":
        ratio = seconds["cpu"] / seconds[device]
        row("quickstart: the device beside two cores", f"{ratio:.2f} x", ">= 1.00 x", ratio >= 1.0, ends=False)


def main():
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    pipe = os.path.abspath(sys.argv[2]) if len(sys.argv) > 2 else str(ROOT / "pipe")
    part = sys.argv[3] if len(sys.argv) > 3 else "all"
    parts = {"checks": [parity, gradients, presets, resume], "bars": [bars, quickstart]}
    if device not in PEAK or part not in [*parts, "all"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        for check in parts.get(part) or [*parts["checks"], *parts["bars"]]:
            began = time.monotonic()
            check(pipe, device, Path(work))
            print(f"        {check.__name__} took {time.monotonic() - began:.0f} s", flush=True)
    finish(int(any(line[3] != "ok" for line in TABLE)))


if __name__ == "__main__":
    main()
