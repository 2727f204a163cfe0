#!/usr/bin/env python3
"""Kills runs with SIGKILL at random moments while up to eight of them share one store, and holds what must always hold.

    python3 benches/stress.py [KILLS] [--seed N] [--pipe PROGRAM] [--folder DIR]

Experiments that overlap (shared stages, sweeps of different values, an output of two megabytes, one of many files) are
run by 1 to 8 processes at a time. Each is killed after a random while: the driver alone, with its whole family (the
watchdog of its programs included), or it is asked to stop; one of its programs is killed instead; `pipe verify
--repair` and `pipe gc`, where there is one, run beside them and are killed too. After each round:

- a run right after it ends well and waits for nobody, since nobody is left: no lock is stuck;
- no stage whose `done` event was read ever runs again: stages count their runs in a file of their own, outside the store;
- where everything has finished, the bytes of every output are those that a function in this file computes.

Prints one line at the end; exits with 1 at the first violation, naming the seed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The longest that a run of a handful of short stages may take on a busy machine, seconds.
PATIENCE = 120

PIPELINE = """
[params]
salt = "0"
n = 0
[stages.numbers]
kind = "command"
files = ["numbers.txt"]
command = ["sh", "-c", "echo numbers-${params.salt} >> RAN; sleep 0.02; (sort -n numbers.txt; echo ${params.salt}) > out"]
outputs = ["out"]
[stages.big]
kind = "command"
command = ["sh", "-c", "echo big-${params.salt} >> RAN; (seq 1 300000; echo ${params.salt}) > out"]
outputs = ["out"]
[stages.tree]
kind = "command"
command = ["sh", "-c", "echo tree-${params.salt} >> RAN; mkdir -p out/a/b; for i in 1 2 3 4 5 6 7 8 9; do echo $i ${params.salt} > out/a/b/$i; done; sleep 0.01; echo ${params.salt} > second"]
outputs = ["out", "second"]
[stages.join]
kind = "command"
command = ["sh", "-c", "echo join-${params.salt} >> RAN; cat {inputs.a}/out {inputs.b}/out {inputs.c}/second | sha256sum > out"]
inputs = { a = "numbers", b = "big", c = "tree.second" }
outputs = ["out"]
[stages.train]
kind = "command"
command = ["sh", "-c", "echo train-${params.n}-${params.salt} >> RAN; sleep 0.0${params.n}; (cat {inputs.j}/out {inputs.t}/out/a/b/7; echo ${params.n}) | sha256sum > out"]
inputs = { j = "join", t = "tree" }
outputs = ["out"]
[stages.evaluate]
kind = "command"
command = ["sh", "-c", "echo evaluate-${params.n}-${params.salt} >> RAN; cut -c1-20 {inputs.m}/out > out"]
inputs = { m = "train" }
outputs = ["out"]
"""

SWEEPS = [[1, 2, 3], [2, 3, 4], [1, 4, 5], [5], [1, 2, 3, 4, 5]]


def computed(salt, n):
    """Every output of a trial, as a function of its two parameters: stage -> file -> bytes."""
    line = f"{salt}\n".encode()
    numbers = b"1\n2\n3\n10\n" + line
    big = b"".join(b"%d\n" % number for number in range(1, 300_001)) + line
    tree = {f"out/a/b/{number}": f"{number} {salt}\n".encode() for number in range(1, 10)}

    def sum_of(content):
        return hashlib.sha256(content).hexdigest().encode() + b"  -\n"

    join = sum_of(numbers + big + line)
    train = sum_of(join + tree["out/a/b/7"] + f"{n}\n".encode())
    return {
        "numbers": {"out": numbers},
        "big": {"out": big},
        "tree": tree,
        "tree.second": {"second": line},
        "join": {"out": join},
        "train": {"out": train},
        "evaluate": {"out": train[:20] + b"\n"},
    }


def family(pid):
    """The processes below a process, as far as they can be seen at the moment."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    children = {}
    for line in found.stdout.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    below, open_ = [], [pid]
    while open_:
        new = children.get(open_.pop(), [])
        below += new
        open_ += new
    return below


def kill(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
        return True
    except ProcessLookupError:
        return False


class Violation(Exception):
    pass


class Stress:
    def __init__(self, pipe, folder, draws):
        self.pipe, self.folder, self.draws = pipe, folder, draws
        self.ran = folder / "ran"
        self.ran.touch()
        (folder / "numbers.txt").write_text("3\n1\n10\n2\n")
        (folder / "pipeline.toml").write_text(PIPELINE.replace("RAN", str(self.ran)))
        for index, values in enumerate(SWEEPS):
            sweep = f'pipeline = "pipeline.toml"\n[sweep.grid]\n"params.n" = {values}\n'
            (folder / f"e{index}.toml").write_text(sweep)
        self.salt = 0
        self.kills = Counter()
        self.rounds = self.checked = 0
        # Runs of a stage at the time when it was known to be done.
        self.done = {}
        helped = subprocess.run([pipe, "gc", "--help"], capture_output=True, check=False)
        self.has_gc = helped.returncode == 0

    def start(self, arguments, out):
        with open(out, "wb") as stdout, open(f"{out}.err", "wb") as stderr:
            return subprocess.Popen(
                [self.pipe, *arguments], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )

    def run_arguments(self, experiments):
        files = [f"e{index}.toml" for index in experiments]
        return ["run", "--json", "--set", f"params.salt=\"{self.salt}\"", *files]

    def counted(self):
        return Counter(self.ran.read_text().split())

    def events(self, out):
        """The events that were read; the last line may be cut by a kill."""
        events = []
        for line in out.read_text(errors="replace").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                pass
        return events

    def line(self, event):
        """The line that a stage leaves for each of its runs."""
        name = event["name"]
        swept = dict(part.split("=") for part in name["trial"].split(",")) if name["trial"] else {}
        numbered = name["stage"] in ("train", "evaluate")
        middle = f"{swept['n']}-" if numbered else ""
        return f"{name['stage']}-{middle}{self.salt}"

    def round(self):
        """Some runs of fresh work at a time; whoever is killed is followed by another, until a few have been."""
        self.rounds += 1
        self.salt += 1
        drivers, beside, survivors, hurt = [], [], set(), False
        at_once, wanted = self.draws.randint(1, 8), self.draws.randint(2, 12)
        killed = 0
        for _ in range(4 * wanted):
            alive = [process for process, _ in drivers if process.poll() is None]
            if killed >= wanted:
                break
            if len(alive) < at_once:
                experiments = self.draws.sample(range(len(SWEEPS)), self.draws.randint(1, 2))
                out = self.folder / f"events-{len(drivers)}"
                drivers.append((self.start(self.run_arguments(experiments), out), out))
                if self.draws.random() < 0.7:
                    continue
            is_there = (self.folder / "artifacts" / "FORMAT").exists()
            if is_there and not any(process.poll() is None for process in beside) and self.draws.random() < 0.25:
                # What the newest run of a stage made is never garbage, whatever else goes.
                collecting = [["gc", "--yes"], ["gc", "--yes", "--keep-last", "1"]] if self.has_gc else []
                others = [["verify", "--repair"], *collecting]
                beside.append(self.start(self.draws.choice(others), self.folder / f"beside-{len(beside)}"))
            time.sleep(max(0.0, self.draws.gauss(0.04, 0.05)))
            alive = [process for process, _ in drivers if process.poll() is None]
            alive += [process for process in beside if process.poll() is None]
            if not alive:
                continue
            process = self.draws.choice(alive)
            way = self.draws.choice(["driver"] * 5 + ["family", "family", "program", "stop"])
            below = family(process.pid) if way in ("family", "program") else []
            if process in beside:
                way = "other"
            if way == "program":
                hurt = True
                for pid in below[:1]:
                    self.kills["programs"] += kill(pid)
            elif way == "stop":
                kill(process.pid, signal.SIGTERM)
            else:
                sort = {"driver": "drivers", "family": "families", "other": "others"}[way]
                self.kills[sort] += kill(process.pid)
                killed += 1
                for pid in below:
                    kill(pid)
                process.wait()
        ending = [process for process, _ in drivers] + beside
        survivors = {process for process in ending if process.returncode != -signal.SIGKILL}
        for process in ending:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                raise Violation(f"a run did not end in {PATIENCE} s") from None
        for process, out in drivers:
            # One that was asked to stop before it could listen ends by the signal itself.
            allowed = [0, 130, -signal.SIGTERM] + ([1] if hurt else [])
            if process in survivors and process.returncode not in allowed:
                error = Path(f"{out}.err").read_text()
                raise Violation(f"a run that nobody killed ended with {process.returncode}:\n{error}")
        for process in beside:
            if process in survivors and process.returncode != 0:
                said = (self.folder / f"beside-{beside.index(process)}.err").read_text()
                raise Violation(f"`{process.args[1]}` ended with {process.returncode}: {said}")
        counted = self.counted()
        for _, out in drivers:
            for event in self.events(out):
                if event["type"] == "done":
                    line = self.line(event)
                    self.done.setdefault(line, counted[line])
        self.check_counts(counted)

    def check_counts(self, counted):
        for line, count in self.done.items():
            if counted[line] != count:
                raise Violation(f"`{line}` was done and ran again: {count} runs then, {counted[line]} now")

    def plain_run(self, experiments):
        out = self.folder / "events-after"
        process = self.start(self.run_arguments(experiments), out)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Violation("a run after all others did not end: a lock is stuck") from None
        if process.returncode != 0:
            error = Path(f"{out}.err").read_text()
            raise Violation(f"a run after all others ended with {process.returncode}:\n{error}\n{out.read_text()}")
        counted = self.counted()
        for event in self.events(out):
            if event["type"] == "waiting":
                raise Violation(f"a run waits for {event['name']} though nobody else is left")
            if event["type"] in ("done", "cached"):
                line = self.line(event)
                self.done.setdefault(line, counted[line])
        self.check_counts(counted)

    def finish(self):
        """Runs what is left, one experiment before all, and compares every byte of one of them."""
        self.plain_run([self.draws.randrange(len(SWEEPS))])
        self.plain_run(range(len(SWEEPS)))
        before = self.counted()
        chosen = self.draws.randrange(len(SWEEPS))
        self.plain_run([chosen])
        if self.counted() != before:
            raise Violation("a run with nothing to do ran something")
        trial = self.draws.choice(SWEEPS[chosen])
        for stage, files in computed(self.salt, trial).items():
            self.compare(f"e{chosen}/n={trial}/{stage}" if len(SWEEPS[chosen]) > 1 else f"e{chosen}/{stage}", files)

    def verify(self):
        """Reads every byte of the store again."""
        verified = subprocess.run([self.pipe, "verify"], cwd=self.folder, capture_output=True, text=True, check=False)
        if verified.returncode != 0:
            raise Violation(f"`pipe verify` ended with {verified.returncode}:\n{verified.stdout}{verified.stderr}")

    def compare(self, result, files):
        shown = subprocess.run(
            [self.pipe, "show", "--json", result], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if shown.returncode != 0:
            raise Violation(f"`pipe show {result}` ended with {shown.returncode}: {shown.stderr}")
        folder = Path(json.loads(shown.stdout)["path"])
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        if found != files:
            raise Violation(f"`{result}` has other bytes than computed: {sorted(found)} in `{folder}`")
        self.checked += 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", nargs="?", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--pipe", default=str(ROOT / "target" / "debug" / "pipe"))
    parser.add_argument("--folder", default=None, help="where the temporary store lies")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="stress-", dir=options.folder))
    stress = Stress(os.path.abspath(options.pipe), folder, random.Random(seed))
    began = told = time.monotonic()
    try:
        while sum(stress.kills.values()) < options.kills:
            stress.round()
            stress.finish()
            if stress.rounds % 20 == 0:
                stress.verify()
            kills, now = sum(stress.kills.values()), time.monotonic()
            if now - told > 5 and kills:
                told = now
                left = (now - began) / kills * max(0, options.kills - kills)
                print(f"{kills} kills in {stress.rounds} rounds, about {left:.0f} s left", file=sys.stderr, flush=True)
        stress.verify()
    except Violation as violation:
        print(f"seed {seed}, round {stress.rounds}, {dict(stress.kills)}: {violation}\nthe store lies in `{folder}`")
        sys.exit(1)
    subprocess.run(["chmod", "-R", "u+w", str(folder)], check=False)
    shutil.rmtree(folder)
    sorts = ", ".join(f"{count} {sort}" for sort, count in sorted(stress.kills.items()))
    print(
        f"{sum(stress.kills.values())} kills ({sorts}) in {stress.rounds} rounds of 1 to 8 runs, {time.monotonic() - began:.0f} s, "
        f"seed {seed}: {stress.checked} outputs compared, {len(stress.done)} finished stages never ran again, no lock stuck"
    )


if __name__ == "__main__":
    main()
