#!/usr/bin/env python3
"""A sweep of 64 trials that share data and one long stage: those run once, and after kills only what is missing runs.

    python3 benches/sweep64.py [--kills N] [--seed N] [--pipe PROGRAM]

A stage writes a line when it begins and one when it ends, into a file outside the store. Without kills every stage of
every trial must have begun exactly once. Then, in a store of its own, the driver is killed N times in the middle: what was
announced as done never begins again, nor does what another stage had begun to read; and no more stages begin twice than
were running when it was killed. Exits with 1 where that does not hold.
"""

import argparse
import json
import os
import random
import signal
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRIALS = 64

# The longest that anything may take on a busy machine, seconds.
PATIENCE = 300

EXPERIMENT = """
[params]
seed = 0
beta = 0
[stages.data]
kind = "command"
command = ["sh", "-c", "echo data begins >> RAN; seq 1 1000 > out; echo data ends >> RAN"]
outputs = ["out"]
[stages.sft]
kind = "command"
command = ["sh", "-c", "echo sft begins >> RAN; sleep 0.2; wc -l < {inputs.data}/out > out; echo sft ends >> RAN"]
inputs = { data = "data" }
outputs = ["out"]
[stages.grpo]
kind = "command"
command = ["sh", "-c", "echo grpo-${params.seed}-${params.beta} begins >> RAN; sleep 0.03; (cat {inputs.model}/out; echo ${params.seed} ${params.beta}) > out; echo grpo-${params.seed}-${params.beta} ends >> RAN"]
inputs = { model = "sft" }
outputs = ["out"]
[stages.evaluate]
kind = "command"
command = ["sh", "-c", "echo evaluate-${params.seed}-${params.beta} begins >> RAN; tr '\\\\n' ' ' < {inputs.model}/out > out; echo evaluate-${params.seed}-${params.beta} ends >> RAN"]
inputs = { model = "grpo" }
outputs = ["out"]
[sweep]
seeds = { path = "params.seed", values = [1, 2, 3, 4, 5, 6, 7, 8] }
[sweep.grid]
"params.beta" = [0, 1, 2, 3, 4, 5, 6, 7]
"""


class Sweep:
    def __init__(self, pipe, folder):
        self.pipe, self.folder, self.ran = pipe, folder, folder / "ran"
        folder.mkdir()
        self.ran.touch()
        (folder / "sweep.toml").write_text(EXPERIMENT.replace("RAN", str(self.ran)))

    def start(self):
        with open(self.folder / "events", "wb") as events:
            return subprocess.Popen(
                [self.pipe, "run", "--json", "sweep.toml"],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=events,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def lines(self, word):
        return Counter(line.split()[0] for line in self.ran.read_text().splitlines() if line.endswith(word))

    def announced(self):
        """The stages whose `done` was written before the end."""
        done = set()
        for line in (self.folder / "events").read_text(errors="replace").splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if event["type"] == "done":
                name = event["name"]
                swept = dict(part.split("=") for part in name["trial"].split(","))
                shared = name["stage"] in ("data", "sft")
                done.add(name["stage"] if shared else f"{name['stage']}-{swept['seed']}-{swept['beta']}")
        return done


def read_by_others(begun):
    """The stages whose result another stage has begun to read: they are safe, whether they were announced or not."""
    safe = {stage.replace("evaluate", "grpo") for stage in begun if stage.startswith("evaluate")}
    safe |= {"sft"} if any(stage.startswith("grpo") for stage in begun) else set()
    return safe | ({"data"} if "sft" in begun else set())


def is_over(session):
    """Whether nothing of a session runs any more; what waits to be reaped has ended."""
    found = subprocess.run(["ps", "-eo", "sid=,stat="], capture_output=True, text=True, check=True)
    rows = (line.split() for line in found.stdout.splitlines())
    return all(sid != str(session) or stat.startswith(("Z", "X")) for sid, stat in rows)


def until(done, what):
    began = time.monotonic()
    while not done():
        expect(time.monotonic() - began < PATIENCE, f"waited in vain: {what}")
        time.sleep(0.005)


def expect(holds, what):
    if not holds:
        print(f"FAIL  {what}")
        sys.exit(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--pipe", default=str(ROOT / "target" / "debug" / "pipe"))
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    draws, pipe = random.Random(seed), os.path.abspath(options.pipe)
    place = Path(tempfile.mkdtemp(prefix="sweep-"))
    stages = 2 + 2 * TRIALS

    whole = Sweep(pipe, place / "whole")
    began = time.monotonic()
    expect(whole.start().wait() == 0, "a run of the sweep does not end well")
    taken = time.monotonic() - began
    begun = whole.lines("begins")
    expect(len(begun) == stages and set(begun.values()) == {1}, f"not every stage began exactly once: {begun}")
    expect(whole.start().wait() == 0 and whole.lines("begins") == begun, "a second run ran something")

    torn = Sweep(pipe, place / "torn")
    jobs = os.cpu_count() or 1
    done, kills = {}, 0
    while kills < options.kills:
        # So many more stages end before the kill that there are some left for each that follows.
        ended = torn.lines("ends")
        wanted = sum(ended.values()) + draws.randrange(1 + (stages - len(ended)) // (options.kills - kills + 1))
        run = torn.start()
        until(lambda: sum(torn.lines("ends").values()) >= wanted or run.poll() is not None, "no more stages end")
        time.sleep(draws.uniform(0, 0.03))
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
        # What a killed driver leaves is ended by its watchdog a moment later.
        until(lambda: is_over(run.pid), "a program outlives its killed driver")
        begun, ended = torn.lines("begins"), torn.lines("ends")
        cut = sum(begun.values()) - sum(ended.values())
        expect(cut <= kills * jobs, f"{cut} stages were cut short by {kills} kills of {jobs} at a time: seed {seed}")
        for stage in torn.announced() | read_by_others(begun):
            done.setdefault(stage, begun[stage])
    expect(torn.start().wait() == 0, f"the run after {kills} kills does not end well: seed {seed}")
    begun, ended = torn.lines("begins"), torn.lines("ends")
    expect(len(ended) == stages, f"{len(ended)} of {stages} stages ended: seed {seed}")
    again = {stage: begun[stage] for stage, count in done.items() if begun[stage] != count}
    expect(not again, f"stages that were done began again: {again}: seed {seed}")
    spent = sum(begun.values()) - stages
    expect(spent <= kills * jobs, f"{spent} stages began twice after {kills} kills: seed {seed}")
    expect(torn.start().wait() == 0 and torn.lines("begins") == begun, "a second run ran something")

    subprocess.run(["chmod", "-R", "u+w", str(place)], check=False)
    shutil.rmtree(place)
    print(
        f"{TRIALS} trials, {stages} stages begun once each in {taken:.1f} s; {kills} kills: {len(done)} stages were done before, "
        f"none of them began again, {spent} were cut off and began anew (seed {seed})"
    )


if __name__ == "__main__":
    main()
