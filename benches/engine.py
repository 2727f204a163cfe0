"""What the engine costs, beside make, ninja, Snakemake, DVC and redun in one run: trivial stages, a run with nothing to do, and
100,000 stages.

usage: python3 benches/engine.py [STAGES ...] [--peers DIR] [--no-peers] [--large COUNT] [--full] [--pipe FILE] [--place DIR]

It builds nothing: run ./pipe --version first. A trivial stage is `sh -c "echo 7 > out"`, which leaves one small file: `fan`
are stages side by side, `chain` stages in a row, each with the one before it as its input. Every tool runs them through a
shell, `chain` with one job and `fan` with as many as there are cores. The bare loop is a shell that starts the same number of
`sh -c` and nothing else. Cold is one run in a fresh folder, durable publish included where a tool has one (`pipe` alone
syncs); nothing to do is the median of five runs after it.

The peers are pinned and installed by pip into a folder of their own when they are missing (`make` is the system's). What is
known to take many minutes is left out and shown as `-`: DVC beyond 100 stages (it writes the whole of dvc.lock after each).
A peer that fails shows how.

STAGES are 100 and 1000 unless given. `--large` (100000; 0 leaves it out) plans and checks a fan and a chain of that many
with an empty store, where nothing but reading and planning takes time; `--full` also runs the fan once, which takes minutes,
and then plans and runs it with every result there. Peak memory is that of the process, from the kernel.

An ext4 without a journal passes over every file deleted within the last minutes whenever it makes one, so there the second of
two runs of this script shows a multiple of the first: leave five minutes between them, or give another `--place`.
Nothing is removed before the end.

Predicted before it was measured: at most 2 ms a stage beyond the bare loop, cold; 50 ms for nothing to do over 1,000 stages;
3 s and 1 GB to plan 100,000.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = {"ninja": "1.13.0", "snakemake": "9.27.1", "dvc": "3.67.1", "redun": "0.44.1"}
CORES = os.cpu_count() or 1
PATIENCE = 600  # Seconds that a tool may take before it is given up.


@dataclass
class Taken:
    """What a command took: wall seconds and peak memory in MB, or how it failed."""

    seconds: float = 0.0
    memory: float = 0.0
    failure: str = ""


def run(command: list, folder: Path, repeat: int = 1) -> Taken:
    """The median wall time of a command, and its largest peak memory."""
    seconds, memory = [], 0.0
    for _ in range(repeat):
        with tempfile.TemporaryFile() as said:
            begin = time.perf_counter()
            # A group of its own, because redun ends its whole group when it is done.
            child = subprocess.Popen(
                command, cwd=folder, stdout=subprocess.DEVNULL, stderr=said, env=environment(), start_new_session=True
            )
            status, usage = wait(child, begin)
            seconds.append(time.perf_counter() - begin)
            memory = max(memory, usage.ru_maxrss / 1000) if usage else memory
            if status != 0:
                said.seek(0)
                return Taken(failure=reason(status, said.read().decode(errors="replace")))
    return Taken(statistics.median(seconds), memory)


def wait(child: subprocess.Popen, begin: float) -> tuple:
    """How the child ended and what it used; one that takes too long is ended. Short ones are waited for without a pause."""
    while True:
        is_short = time.perf_counter() - begin < 5
        pid, status, usage = os.wait4(child.pid, 0 if is_short and child.args[0] == PIPE else os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, usage
        if time.perf_counter() - begin > PATIENCE:
            child.kill()
            os.wait4(child.pid, 0)
            child.returncode = -9
            return "timeout", None
        time.sleep(0.0002 if is_short else 0.05)


def reason(status: object, said: str) -> str:
    """A failure in a word or two."""
    if status == "timeout":
        return f"> {PATIENCE} s"
    for word in ["RecursionError", "recursion depth"]:
        if word in said:
            return "RecursionError"
    return f"exit {status}"


def environment() -> dict:
    """The environment with the peers' programs first."""
    return os.environ | {"PATH": f"{PEERS / 'bin'}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1", "PYTHONWARNINGS": "ignore"}


def install() -> None:
    """Installs the peers that are missing."""
    marker = PEERS / "versions"
    wanted = "\n".join(f"{name}=={version}" for name, version in PINNED.items())
    if marker.exists() and marker.read_text() == wanted:
        return
    print(f"installing peers into {PEERS}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
    subprocess.run([PEERS / "bin/pip", "install", "-q", *wanted.split("\n")], check=True)
    marker.write_text(wanted)


# The same work for every tool: files in a folder, the command of a cold run, and that of one with nothing to do.


def for_pipe(folder: Path, count: int, chained: bool) -> tuple:
    lines = []
    for index in range(count):
        lines += [f"[stages.s{index:06}]", 'kind = "command"', 'outputs = ["out"]']
        lines += [f'command = ["sh", "-c", "echo {index} > out"]']
        if chained and index:
            lines += [f'inputs = {{ before = "s{index - 1:06}" }}']
    (folder / "bench.toml").write_text("\n".join(lines) + "\n")
    jobs = ["--jobs", "1"] if chained else []
    return ([PIPE, "--store", "store", "run", *jobs, "bench.toml"],) * 2


def for_make(folder: Path, count: int, chained: bool) -> tuple:
    lines = ["all: " + (f"out_{count - 1}" if chained else " ".join(f"out_{index}" for index in range(count)))]
    for index in range(count):
        before = f"out_{index - 1}" if chained and index else ""
        # The redirection makes `make` take a shell, as the others do.
        lines += [f"out_{index}: {before}", f"\t@echo {index} > out_{index}"]
    (folder / "Makefile").write_text("\n".join(lines) + "\n")
    return (["make", "-s", f"-j{1 if chained else CORES}"],) * 2


def for_ninja(folder: Path, count: int, chained: bool) -> tuple:
    lines = ["rule stage", '  command = sh -c "echo $number > $out"']
    for index in range(count):
        before = f"out_{index - 1}" if chained and index else ""
        lines += [f"build out_{index}: stage {before}", f"  number = {index}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    return (["ninja", "--quiet", f"-j{1 if chained else CORES}"],) * 2


def for_snakemake(folder: Path, count: int, chained: bool) -> tuple:
    last = f'"out_{count - 1}"' if chained else f'expand("out_{{i}}", i=range({count}))'
    before = 'lambda w: [f"out_{int(w.i) - 1}"] if int(w.i) else []' if chained else "[]"
    text = f'rule all:\n    input: {last}\nrule stage:\n    input: {before}\n    output: "out_{{i}}"\n'
    (folder / "Snakefile").write_text(text + '    shell: "echo {wildcards.i} > {output}"\n')
    return (["snakemake", "--quiet", "all", "--cores", str(1 if chained else CORES)],) * 2


def for_dvc(folder: Path, count: int, chained: bool) -> tuple:
    lines = ["stages:"]
    for index in range(count):
        lines += [f"  s{index}:", f"    cmd: echo {index} > out_{index}", f"    outs: [out_{index}]"]
        if chained and index:
            lines += [f"    deps: [out_{index - 1}]"]
    (folder / "dvc.yaml").write_text("\n".join(lines) + "\n")
    subprocess.run(["dvc", "init", "--no-scm", "-q"], cwd=folder, env=environment(), check=True)
    return (["dvc", "repro", "-q"],) * 2


def for_redun(folder: Path, count: int, chained: bool) -> tuple:
    body = "value = None\n    for i in range({0}):\n        value = stage(i, value)\n    return value"
    body = body if chained else "return [stage(i) for i in range({0})]"
    (folder / "flow.py").write_text(
        "import subprocess\nfrom redun import File, task\n\nredun_namespace = 'bench'\n\n@task()\n"
        "def stage(i, before=None):\n    subprocess.run(f'echo {i} > out_{i}', shell=True, check=True)\n"
        f"    return File(f'out_{{i}}')\n\n@task()\ndef main():\n    {body.format(count)}\n"
    )
    return (["redun", "run", "flow.py", "main"],) * 2


PEER_TOOLS = {"make": for_make, "ninja": for_ninja, "snakemake": for_snakemake, "dvc": for_dvc, "redun": for_redun}
LARGEST = {"dvc": 100}  # Beyond that many stages a tool is left out.


def bare_loop(place: Path, count: int) -> Taken:
    """The same number of `sh -c`, started one after the other by a shell."""
    folder = fresh(place, "bare")
    loop = f"i=0; while [ $i -lt {count} ]; do sh -c \"echo $i > out_$i\"; i=$((i+1)); done"
    return run(["sh", "-c", loop], folder, repeat=3)


def fresh(place: Path, name: str) -> Path:
    folder = place / name
    clear(folder)
    folder.mkdir(parents=True)
    return folder


def clear(folder: Path) -> None:
    """Removes a folder; stored objects are read-only."""
    if folder.exists():
        subprocess.run(["chmod", "-R", "u+w", folder], check=False)
        shutil.rmtree(folder)


def side_by_side(place: Path, counts: list, peers: bool) -> list:
    """The rows of the table of tools."""
    tools = {"pipe": for_pipe} | (PEER_TOOLS if peers else {})
    bare = {count: bare_loop(place, count) for count in counts}
    rows = [["bare loop of `sh -c`"] + [cell for count in counts for cell in per_stage(bare[count], count, 2) + ["-", "-"]]]
    beyond = ["pipe, beyond the bare loop"]
    for name, prepare in tools.items():
        cells = []
        for count in counts:
            if count > LARGEST.get(name, count):
                cells += ["-"] * 4
                continue
            cold, idle = [], []
            for shape in ["chain", "fan"]:
                print(f"{name}, {count} stages, {shape}", file=sys.stderr)
                folder = fresh(place, f"{name}-{shape}-{count}")
                begin, again = prepare(folder, count, shape == "chain")
                cold.append(run(begin, folder))
                idle.append(cold[-1] if cold[-1].failure else run(again, folder, repeat=5 if name == "pipe" else 3))
            if name == "pipe":
                beyond += [shown(taken.failure, (taken.seconds - bare[count].seconds) / count) for taken in cold] + ["", ""]
            cells += [cell for taken in cold for cell in per_stage(taken, count, 1)]
            cells += [shown(taken.failure, taken.seconds) for taken in idle]
        rows.append([f"{name} {PINNED.get(name, '')}".strip()] + cells)
        if name == "pipe":
            rows.append(beyond)
    return rows


def per_stage(taken: Taken, count: int, times: int) -> list:
    return [shown(taken.failure, taken.seconds / count)] * times


def shown(failure: str, seconds: float) -> str:
    """Milliseconds, or how it failed."""
    return failure or (f"{seconds * 1000:.2f} ms" if seconds < 0.01 else f"{seconds * 1000:,.0f} ms")


def large(place: Path, count: int, full: bool) -> list:
    """The rows of the table of many stages."""
    rows = []

    def row(name: str, command: list, folder: Path, repeat: int = 3) -> None:
        print(f"pipe, {count} stages, {name}", file=sys.stderr)
        taken = run(command, folder, repeat)
        rows.append([name, shown(taken.failure, taken.seconds), f"{taken.memory:,.0f} MB"])

    for shape in ["fan", "chain"]:
        folder = fresh(place, f"large-{shape}")
        begin, again = for_pipe(folder, count, shape == "chain")
        row(f"{shape}, check", [PIPE, "check", "bench.toml"], folder)
        row(f"{shape}, plan with an empty store", [PIPE, "--store", "store", "plan", "bench.toml"], folder)
        if full and shape == "fan":
            row(f"{shape}, run", begin, folder, repeat=1)
            row(f"{shape}, plan with a full store", [PIPE, "--store", "store", "plan", "bench.toml"], folder)
            row(f"{shape}, nothing to run", again, folder)
            os.remove(folder / "store/cache/index")
            row(f"{shape}, plan with a full store and no index", [PIPE, "--store", "store", "plan", "bench.toml"], folder, 1)
        clear(folder)
    return rows


def table(header: list, rows: list) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)] + rows
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    disk = subprocess.run(["stat", "-f", "-c", "%T", str(PLACE)], capture_output=True, text=True, check=False).stdout.strip()
    load = os.getloadavg()[0]
    return f"{CORES} cores, {model}, {disk}, Linux {platform.release()}, Python {platform.python_version()}, load {load:.1f}"


def main() -> None:
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        place, counts = Path(name), ARGUMENTS.stages or [100, 1000]
        print(machine(), end="\n\n")
        header = ["tool"]
        for count in counts:
            header += [f"{count} cold, chain, a stage", f"{count} cold, fan, a stage"]
            header += [f"{count} nothing to do, chain", f"{count} nothing to do, fan"]
        print(table(header, side_by_side(place, counts, not ARGUMENTS.no_peers)), end="\n\n", flush=True)
        rows = [[f"pipe {name}", shown(taken.failure, taken.seconds), f"{taken.memory:.0f} MB"] for name, taken in [
            ("--help", run([PIPE, "--help"], place, 11)),
            ("plan experiments/quickstart.toml", run([PIPE, "--store", "none", "plan", ROOT / "experiments/quickstart.toml"], place, 11)),
        ]]
        if ARGUMENTS.large:
            rows += [[f"{ARGUMENTS.large:,} stages: {row[0]}", *row[1:]] for row in large(place, ARGUMENTS.large, ARGUMENTS.full)]
        print(table(["pipe", "time", "peak memory"], rows))
        for folder in place.iterdir():
            if folder.is_dir():
                clear(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stages", nargs="*", type=int, help="numbers of stages [default: 100 1000]")
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache/pipe-bench-peers", help="where peers are installed")
    parser.add_argument("--no-peers", action="store_true", help="measure pipe alone")
    parser.add_argument("--large", type=int, default=100_000, help="stages of the large plans; 0 leaves them out")
    parser.add_argument("--full", action="store_true", help="also fill a store with the large fan, which takes minutes")
    parser.add_argument("--pipe", type=Path, default=ROOT / "target/debug/pipe", help="the program to measure")
    parser.add_argument("--place", type=Path, default=None, help="where to work, on the disk to be measured")
    ARGUMENTS = parser.parse_args()
    PEERS, PIPE, PLACE = ARGUMENTS.peers.absolute(), str(ARGUMENTS.pipe.absolute()), ARGUMENTS.place or Path(tempfile.gettempdir())
    if not ARGUMENTS.no_peers:
        install()
    main()
