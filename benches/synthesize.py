"""How fast mazes are drawn, beside the Python package maze-dataset in one run, and whether both have the same law of lengths.

usage: python3 benches/synthesize.py [--mazes COUNT] [--peer-mazes COUNT] [--pipe FILE] [--peers DIR] [--place DIR]

It builds nothing: run ./pipe --version first. `pipe` runs a `synthesize` stage of COUNT (1,000,000) 5 x 5 mazes by depth-first
search into an empty store: drawing, splitting by the hash of every layout, Parquet and the durable commit are in its time, and
peak memory is that of the process, from the kernel. The peer is `MazeDataset.generate` of maze-dataset 1.4.2 with `gen_dfs`, in
memory alone, once in one process and once with a pool of as many as there are cores; the faster one counts. Its turns stand before
and after that of `pipe`. The peer is installed by pip into a folder of its own when it is missing.

The lengths of the shortest paths are compared by chi-square in a table of two rows: with `start = "maze_dataset"` both draw by one
law. The peer draws fewer mazes, so its sample decides how small a difference would show.

Predicted before it was measured: at least 100 times the mazes a second, below 2 GB, p above 0.01.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = ["maze-dataset==1.4.2", "muutils<0.9", "pyarrow", "scipy"]

PEER = """
import json, sys, time
from collections import Counter
from maze_dataset import MazeDataset, MazeDatasetConfig
from maze_dataset.generation import LatticeMazeGenerators

def main():
    count, parallel, seed = int(sys.argv[1]), sys.argv[2] == "pool", int(sys.argv[3])
    config = MazeDatasetConfig(
        name="bench", grid_n=5, n_mazes=count, maze_ctor=LatticeMazeGenerators.gen_dfs, seed=seed,
        endpoint_kwargs=dict(endpoints_not_equal=True),
    )
    begin = time.perf_counter()
    data = MazeDataset.generate(config, gen_parallel=parallel)
    seconds = time.perf_counter() - begin
    lengths = Counter(len(maze.solution) - 1 for maze in data.mazes)
    print(json.dumps({"seconds": seconds, "mazes": len(data.mazes), "lengths": dict(lengths)}))

if __name__ == "__main__":
    main()
"""

COMPARE = """
import json, sys
from collections import Counter
import pyarrow.parquet
from scipy.stats import chi2_contingency

peer = Counter({int(length): count for length, count in json.load(open(sys.argv[1])).items()})
ours = Counter(pyarrow.parquet.read_table(sys.argv[2], columns=["length"])["length"].to_pylist())
# Lengths that are too rare for the test are taken together with the next shorter ones.
rows, rest = [], [0, 0]
for length in sorted(set(peer) | set(ours), reverse=True):
    rest = [rest[0] + peer[length], rest[1] + ours[length]]
    if rest[0] >= 10:
        rows.append(rest)
        rest = [0, 0]
test = chi2_contingency(list(zip(*rows)))
print(json.dumps({"chi2": test.statistic, "degrees": int(test.dof), "p": test.pvalue, "mazes": sum(ours.values()),
                  "mean": sum(n * count for n, count in ours.items()) / sum(ours.values()),
                  "peer_mean": sum(n * count for n, count in peer.items()) / sum(peer.values())}))
"""


def peer_python(folder: Path) -> Path:
    """The Python of an environment that has the peer; makes it where it is missing."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    there = subprocess.run([python, "-c", "import maze_dataset, pyarrow, scipy"], capture_output=True, check=False)
    if there.returncode != 0:
        subprocess.run([folder / "bin/pip", "install", "--quiet", *PINNED], check=True)
    return python


def run_peer(python: Path, count: int, how: str, seed: int) -> dict:
    """One run of the peer: seconds, mazes and how many there are of each length."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "peer.py"
        script.write_text(PEER)
        said = subprocess.run([python, script, str(count), how, str(seed)], capture_output=True, text=True, check=True)
    return json.loads(said.stdout.strip().splitlines()[-1])


def run_pipe(pipe: Path, place: Path, count: int, start: str) -> dict:
    """One run of a `synthesize` stage into an empty store: seconds, peak memory in MB and its file."""
    place.mkdir(parents=True)
    (place / "mazes.toml").write_text(
        f"""description = "benchmark"
[stages.mazes]
kind = "synthesize"
task = {{ kind = "maze", rows = 5, columns = 5, start = "{start}" }}
splits = {{ train = {count} }}
unique = false
run = {{ cpus = {os.cpu_count() or 1} }}
"""
    )
    begin = time.perf_counter()
    command = [pipe, "run", place / "mazes.toml", "--store", place / "store"]
    with open(place / "log", "wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit((place / "log").read_text())
    seconds = time.perf_counter() - begin
    files = list((place / "store").rglob("train.parquet"))
    return {"seconds": seconds, "mazes": count, "memory": usage.ru_maxrss / 1000, "file": files[0]}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--mazes", type=int, default=1_000_000)
    reader.add_argument("--peer-mazes", type=int, default=10_000)
    reader.add_argument("--pipe", type=Path, default=ROOT / "target/debug/pipe")
    reader.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "pipe-maze-dataset")
    reader.add_argument("--place", type=Path)
    asked = reader.parse_args()
    python = peer_python(asked.peers)
    place = Path(tempfile.mkdtemp(dir=asked.place))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")

    counts: dict[str, int] = {}
    speeds: dict[str, list[float]] = {"one process": [], "pool": []}

    def peers(seed: int) -> None:
        for how, speed in speeds.items():
            drawn = run_peer(python, asked.peer_mazes, how.split()[0], seed)
            speed.append(drawn["mazes"] / drawn["seconds"])
            # Both ways draw the same mazes from one seed: they are counted once.
            if how == "one process":
                for length, count in drawn["lengths"].items():
                    counts[length] = counts.get(length, 0) + count

    peers(1)
    ours = run_pipe(asked.pipe, place / "maze_dataset", asked.mazes, "maze_dataset")
    peers(2)
    speed = ours["mazes"] / ours["seconds"]
    best = max(max(found) for found in speeds.values())
    print("| what | mazes a second | peak memory |\n| --- | ---: | ---: |")
    print(f"| pipe, {ours['mazes']:,} mazes, {ours['seconds']:.2f} s | {speed:,.0f} | {ours['memory']:,.0f} MB |")
    for how, found in speeds.items():
        print(f"| maze-dataset 1.4.2, {how} | {', '.join(f'{value:,.0f}' for value in found)} | |")
    print(f"\n{speed / best:.0f} times the faster of the peer's\n")
    (place / "peer.json").write_text(json.dumps(counts))
    any_start = run_pipe(asked.pipe, place / "any", asked.mazes, "any")
    for start, run in [("maze_dataset", ours), ("any", any_start)]:
        command = [python, "-c", COMPARE, place / "peer.json", run["file"]]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f'start = "{start}": mean length {found["mean"]:.3f} beside {found["peer_mean"]:.3f}, chi-square '
            f"{found['chi2']:.1f} with {found['degrees']} degrees of freedom, p = {found['p']:.3f}"
        )
    print(f"\nload {os.getloadavg()[0]:.1f} at the end; the files lie in {place}")


if __name__ == "__main__":
    main()
