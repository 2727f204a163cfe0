"""Training, GRPO and evaluation beside what users would write without `pipe`; one table of medians.

usage: python3 benches/learning.py [rounds=3] [threads=2] [pipe=target/debug/pipe] [peers=.venv-peers/bin/python]
                                   [which=all] [steps=12]

`which` is `small` (0.9 M weights: all of the table), `large` (10 M weights: supervised training alone) or `all`; `steps` are those
of a supervised training, of which the first two warm up.

The peers need a Python of their own (once): python3 -m venv .venv-peers && .venv-peers/bin/pip install -r benches/peers.txt

Every round runs ours and theirs in turn on the same model, the same tokens and as many threads. `benches/learning.toml` says
what is run; predictions stand in `benches/RESULTS.md`. Ours is what `pipe run` records every step; theirs is `peers.py`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
arguments = sys.argv[1:] + [None] * 6
ROUNDS, THREADS = int(arguments[0] or 3), int(arguments[1] or 2)
PIPE = Path(arguments[2] or HERE.parent / "target/debug/pipe").resolve()
PEERS = Path(arguments[3] or HERE.parent / ".venv-peers/bin/python").absolute()
WHICH, SFT, GRPO = arguments[4] or "all", int(arguments[5] or 12), 5
# 8 layers of 320: 10.6 M weights in matrices.
LARGE = [
    f"stages.base.architecture.{name}={value}"
    for name, value in dict(hidden_size=320, layers=8, heads=5, intermediate_size=960).items()
]
# The bar of the large one: so many times the peer, or so much of what products of matrices reach; the lower is asked.
TIMES, SHARE = 1.5, 0.75


def pipe(store, *what):
    command = [PIPE, *what, "--store", store]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr}")
    return done.stdout


def run(store, stage, more=(), **sets):
    """Runs a stage anew and gives the records of its steps."""
    laid = [*more, *(f"stages.{stage}.{name}={value}" for name, value in sets.items())]
    laid += [f"stages.{stage}.run.cpus={THREADS}"]
    options = [part for one in laid for part in ("--set", one)]
    pipe(store, "run", "learning.toml", "--until", stage, "--again", stage, *options)
    key = json.loads(pipe(store, "show", f"learning.toml/{stage}", "--json", *options))["key"]
    lines = (Path(store) / "logs" / key / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def peer(what, tokens, checkpoint, steps):
    command = [PEERS, HERE / "peers.py", what, tokens, checkpoint, str(steps), str(THREADS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def middle(values):
    return statistics.median(values)


def large():
    """Supervised training of 10 M weights, beside plain PyTorch and beside the rate of matrix products that the stage measures."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        options = [part for one in LARGE for part in ("--set", one)]
        pipe(store, "run", "learning.toml", "--until", "base", "--until", "tokens", *options)
        path = lambda stage: json.loads(pipe(store, "show", f"learning.toml/{stage}", "--json", *options))["path"]
        tokens, base = path("tokens"), path("base")
        for _ in range(ROUNDS):
            steps = run(store, "sft", LARGE, steps=SFT)[2:]
            theirs = peer("sft", tokens, base, SFT)
            for name, value in {
                "rate": middle([line["tokens_per_second"] for line in steps]),
                "share": middle([line["mfu"] for line in steps]),
                "memory": steps[-1]["peak_memory_bytes"],
                "peer": theirs["tokens_per_second"],
                "peer memory": theirs["peak_memory_bytes"],
            }.items():
                found.setdefault(name, []).append(value)
    of = {name: middle(values) for name, values in found.items()}
    times = of["rate"] / of["peer"]
    holds = times >= TIMES or of["share"] >= SHARE
    print(f"\n10 M weights: medians of {ROUNDS} rounds, {THREADS} threads, {SFT} steps\n")
    print("| what | pipe | peer | ratio |\n|---|---|---|---|")
    print(f"| SFT, real tokens/s (peer: plain PyTorch) | {of['rate']:,.0f} | {of['peer']:,.0f} | {times:.2f} |")
    memory = [of[name] / (1 << 20) for name in ("memory", "peer memory")]
    print(f"| SFT, peak memory, MiB | {memory[0]:,.0f} | {memory[1]:,.0f} | {memory[1] / memory[0]:.2f} |")
    print(f"| share of the rate of fp32 matrix products | {of['share']:.2f} | | |")
    print(f"| {TIMES} x the peer, or {SHARE:.0%} of the products | {'holds' if holds else 'MISSED'} | | |")


def small():
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        pipe(store, "run", "learning.toml", "--until", "sft")
        path = lambda stage: json.loads(pipe(store, "show", f"learning.toml/{stage}", "--json"))["path"]
        tokens, base, trained = path("tokens"), path("base"), path("sft")
        found = {}

        def note(name, value):
            found.setdefault(name, []).append(value)

        for _ in range(ROUNDS):
            steps = run(store, "sft", steps=SFT)[2:]
            note("sft", middle([line["tokens_per_second"] for line in steps]))
            note("sft memory", steps[-1]["peak_memory_bytes"])
            theirs = peer("sft", tokens, base, SFT)
            note("sft peer", theirs["tokens_per_second"])
            note("sft peer memory", theirs["peak_memory_bytes"])
            # The model of the stage as the file has it, which is in the store.
            steps = run(store, "grpo", steps=GRPO)[1:]
            for phase in ("step", "prefill", "decode", "sampling", "reward", "forward", "backward", "optimizer"):
                note(f"grpo {phase}", middle([line[f"seconds/{phase}"] for line in steps]))
            note("grpo length", middle([line["completions/mean_length"] for line in steps]))
            note("grpo memory", steps[-1]["peak_memory_bytes"])
            theirs = peer("grpo", tokens, trained, GRPO)
            note("grpo peer step", theirs["step_seconds"])
            note("grpo peer generation", theirs["generation_seconds"])
            note("grpo peer length", theirs["mean_length"])
            note("grpo peer memory", theirs["peak_memory_bytes"])
            evaluated = run(store, "evaluate")
            note("evaluation", sum(line["seconds/step"] for line in evaluated))

    of = {name: middle(values) for name, values in found.items()}
    generation = of["grpo prefill"] + of["grpo decode"] + of["grpo sampling"]
    learning = of["grpo forward"] + of["grpo backward"] + of["grpo optimizer"]
    mebi = 1 << 20
    print(f"medians of {ROUNDS} rounds, {THREADS} threads\n")
    print("| what | pipe | peer | ratio |\n|---|---|---|---|")

    def line(what, ours, theirs, ratio, form="{:,.2f}"):
        print(f"| {what} | {form.format(ours)} | {form.format(theirs)} | {ratio:.2f} |")

    line("SFT, real tokens/s (peer: plain PyTorch)", of["sft"], of["sft peer"], of["sft"] / of["sft peer"], "{:,.0f}")
    line("SFT, peak memory, MiB", of["sft memory"] / mebi, of["sft peer memory"] / mebi,
         of["sft peer memory"] / of["sft memory"], "{:,.0f}")
    line("GRPO, seconds a step (peer: TRL)", of["grpo step"], of["grpo peer step"], of["grpo peer step"] / of["grpo step"])
    line("- generation", generation, of["grpo peer generation"], of["grpo peer generation"] / generation)
    rest = of["grpo peer step"] - of["grpo peer generation"]
    line("- forward, backward, optimizer", learning, rest, rest / learning)
    line("- mean length of a completion", of["grpo length"], of["grpo peer length"], 1.0)
    line("GRPO, peak memory, MiB", of["grpo memory"] / mebi, of["grpo peer memory"] / mebi,
         of["grpo peer memory"] / of["grpo memory"], "{:,.0f}")
    print(f"| evaluation of 10,000 mazes, greedy, s | {of['evaluation']:.1f} | | |")
    print("\nGRPO by phase, s: " + ", ".join(
        f"{phase} {of[f'grpo {phase}']:.3f}"
        for phase in ("prefill", "decode", "sampling", "reward", "forward", "backward", "optimizer")
    ))


if __name__ == "__main__":
    if WHICH not in ("small", "large", "all"):
        sys.exit(__doc__)
    if WHICH != "large":
        small()
    if WHICH != "small":
        large()
