"""What the engine costs: trivial stages, a run with nothing to do, planning, starting.

usage: python3 benches/engine.py [STAGES]        (builds nothing: run ./pipe --version first)

Each figure is the median of several runs of the binary. A trivial stage is `command = ["true"]`-like: it spawns one
`sh` that writes one small file; the cost of the spawn itself is measured beside it and not subtracted.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIPE = ROOT / "target" / "debug" / "pipe"


def seconds(command: list, repeat: int = 5, **options) -> float:
    """The median wall time of a command that must succeed."""
    taken = []
    for _ in range(repeat):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def stages(count: int, chained: bool) -> str:
    """A pipeline of trivial stages, side by side or in a row."""
    lines = []
    for index in range(count):
        lines += [f"[stages.s{index:05}]", 'kind = "command"', 'outputs = ["out"]']
        lines += [f'command = ["sh", "-c", "echo {index} > out"]']
        if chained and index:
            lines += [f'inputs = {{ before = "s{index - 1:05}" }}']
    return "\n".join(lines) + "\n"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn = seconds(["sh", "-c", "for i in $(seq 200); do sh -c 'echo 1 > out'; done"], cwd=folder) / 200
        rows.append(("spawning `sh` and writing a file, a time", spawn))
        for shape in ["fan", "chain"]:
            file = folder / f"{shape}.toml"
            file.write_text(stages(count, shape == "chain"))
            cold = []
            for attempt in range(3):
                store = folder / f"store-{shape}-{attempt}"
                cold.append(seconds([PIPE, "--store", store, "run", file], repeat=1, cwd=folder) / count)
            rows.append((f"{count} stages, {shape}, a stage", statistics.median(cold)))
            rows.append((f"{count} stages, {shape}, nothing to run", seconds([PIPE, "--store", store, "run", file])))
            rows.append((f"{count} stages, {shape}, plan", seconds([PIPE, "--store", store, "plan", file])))
    quickstart = ROOT / "experiments" / "quickstart.toml"
    rows.append(("pipe --help", seconds([PIPE, "--help"], repeat=11)))
    rows.append(("pipe plan experiments/quickstart.toml", seconds([PIPE, "plan", quickstart], repeat=11)))
    rows.append(("./pipe --help, through the launcher", seconds([ROOT / "pipe", "--help"], repeat=11)))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value * 1000:8.2f} ms")
    print(json.dumps({"machine": platform.processor() or platform.machine(), "kernel": platform.release()}))


if __name__ == "__main__":
    main()
