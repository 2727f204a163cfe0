#!/usr/bin/env python3
"""Does harm to one file of a finished store at a time, and holds that no wrong byte is ever delivered.

    python3 benches/flips.py [COUNT] [--seed N] [--pipe PROGRAM] [--folder DIR]

A small pipeline (command stages, a synthesized dataset, a tokenizer, tokens) is run once. Then, COUNT times: any file of
the store has one bit flipped, is cut short, deleted, grows by a byte or changes its mode; its mode and mtime are set back.
Half of the time that is done to a copy of the store (every inode is new), half of the time in place, where only ctime
tells. What `pipe show` then delivers must be exact or refused, `pipe run` must end with 0 (or refuse a harmed FORMAT with
2), and after it every output must have the bytes of the clean run, for `pipe run` with nothing left to do.

Prints what happened by sort of file; exits with 1 at the first violation, naming the seed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PIPELINE = """
[stages.numbers]
kind = "command"
files = ["numbers.txt"]
command = ["sh", "-c", "sort -n numbers.txt > out"]
outputs = ["out"]
[stages.tree]
kind = "command"
command = ["sh", "-c", "mkdir -p out/a/b out/c; for i in 1 2 3 4 5; do echo $i > out/a/b/$i; done; echo x > out/c/x; seq 1 40000 > second"]
outputs = ["out", "second"]
[stages.join]
kind = "command"
command = ["sh", "-c", "cat {inputs.a}/out {inputs.b}/out/a/b/3 {inputs.c}/second | sha256sum > out"]
inputs = { a = "numbers", b = "tree", c = "tree.second" }
outputs = ["out"]
[stages.mazes]
kind = "synthesize"
task = { kind = "maze", rows = 3, columns = 3 }
splits = { train = 20, test = 5 }
unique = false
[stages.tokenizer]
kind = "tokenizer"
task = { kind = "maze", rows = 3, columns = 3 }
[stages.tokens]
kind = "tokenize"
dataset = "mazes"
tokenizer = "tokenizer"
format = { kind = "alphamaze", trace = "path" }
"""

FAILS = """
[stages.fails]
kind = "command"
command = ["sh", "-c", "echo a part > out; exit 3"]
outputs = ["out"]
"""

OUTPUTS = ["numbers", "tree", "tree.second", "join", "mazes", "tokenizer", "tokens"]
HARMS = ["flip", "flip", "truncate", "delete", "append", "mode"]


class Violation(Exception):
    pass


class Flips:
    def __init__(self, pipe, folder, draws):
        self.pipe, self.folder, self.draws = pipe, folder, draws
        self.store = folder / "store"
        (folder / "numbers.txt").write_text("3\n1\n10\n2\n")
        (folder / "small.toml").write_text(PIPELINE)
        (folder / "fails.toml").write_text(FAILS)
        self.must(self.call(self.store, "run", "small.toml"), 0)
        self.must(self.call(self.store, "run", "fails.toml"), 1)
        self.wanted = {output: self.delivered(self.store, output) for output in OUTPUTS}
        if None in self.wanted.values():
            raise Violation(f"a clean run delivers {self.wanted}")
        self.clean = folder / "clean"
        shutil.copytree(self.store, self.clean, symlinks=True)
        self.happened = defaultdict(Counter)

    def call(self, store, *arguments):
        return subprocess.run(
            [self.pipe, "--store", store, *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )

    def must(self, ended, *codes):
        if ended.returncode not in codes:
            raise Violation(f"`{' '.join(map(str, ended.args))}` ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")

    def delivered(self, store, output):
        """The digest and the files of an output, or nothing where it is refused."""
        shown = self.call(store, "show", "--json", f"small/{output}")
        self.must(shown, 0, 1, 2)
        if shown.returncode != 0:
            return None
        shown = json.loads(shown.stdout)
        folder = Path(shown["path"])
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
        return shown["digest"], files

    def choose(self, store):
        """Any file, each sort of them as likely as another."""
        sorts = defaultdict(list)
        for path in sorted(store.rglob("*")):
            if path.is_file() or path.is_symlink():
                sorts[path.relative_to(store).parts[0]].append(path)
        sort = self.draws.choice(sorted(sorts) + ["objects", "manifests"])
        return sort, self.draws.choice(sorts[sort])

    def harm(self, path, how):
        if how == "delete" or path.is_symlink():
            path.unlink()
            return
        stat = path.stat()
        content = bytearray(path.read_bytes())
        if how == "flip" and content:
            content[self.draws.randrange(len(content))] ^= 1 << self.draws.randrange(8)
        elif how == "truncate" and content:
            del content[self.draws.randrange(len(content)) :]
        elif how == "append":
            content += b"x"
        path.chmod(0o644)
        with open(path, "r+b") as file:
            file.write(content)
            file.truncate()
        path.chmod(stat.st_mode ^ (0o111 if how == "mode" else 0))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def sample(self):
        in_place = self.draws.random() < 0.5
        store = self.store if in_place else self.folder / "copy"
        if not in_place:
            shutil.copytree(self.clean, store, symlinks=True)
        sort, path = self.choose(store)
        how = self.draws.choice(HARMS)
        kept = path.read_bytes() if sort == "FORMAT" else b""
        self.harm(path, how)
        where = f"{how} of {path.relative_to(store)}, {'in place' if in_place else 'in a copy'}"
        try:
            came = self.check(store, sort)
        except Violation as violation:
            raise Violation(f"{where}: {violation}") from None
        if came == "refused":
            path.write_bytes(kept)
            self.must(self.call(store, "run", "--quiet", "small.toml"), 0)
        self.happened[sort][came] += 1
        if not in_place:
            remove(store)

    def check(self, store, sort):
        for output in OUTPUTS:
            found = self.delivered(store, output)
            if found is not None and found != self.wanted[output]:
                raise Violation(f"`pipe show small/{output}` delivers other bytes")
        run = self.call(store, "run", "--json", "small.toml")
        if sort == "FORMAT" and run.returncode == 2:
            if "store" not in run.stderr:
                raise Violation(f"it is refused without a word of the store: {run.stderr}")
            return "refused"
        self.must(run, 0)
        outcome = json.loads(run.stdout.splitlines()[-1])
        for output in OUTPUTS:
            found = self.delivered(store, output)
            if found != self.wanted[output]:
                raise Violation(f"after a run `small/{output}` has other bytes than the clean run's, or none")
        again = self.call(store, "run", "--json", "small.toml")
        self.must(again, 0)
        if json.loads(again.stdout.splitlines()[-1])["run"] != 0:
            raise Violation("a second run ran something")
        if sort in ("work", "logs", "locks"):
            self.must(self.call(store, "run", "fails.toml"), 1)
        return f"{outcome['run']} run again" if outcome["run"] else "nothing to run"


def remove(folder):
    subprocess.run(["chmod", "-R", "u+w", str(folder)], check=False)
    shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("count", nargs="?", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--pipe", default=str(ROOT / "target" / "debug" / "pipe"))
    parser.add_argument("--folder", default=None, help="where the temporary store lies")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="flips-", dir=options.folder))
    began = told = time.monotonic()
    done = 0
    try:
        flips = Flips(os.path.abspath(options.pipe), folder, random.Random(seed))
        for done in range(options.count):
            flips.sample()
            now = time.monotonic()
            if now - told > 5:
                told = now
                left = (now - began) / (done + 1) * (options.count - done - 1)
                print(f"{done + 1} of {options.count}, about {left:.0f} s left", file=sys.stderr, flush=True)
    except Violation as violation:
        print(f"seed {seed}, sample {done}: {violation}\nthe store lies in `{folder}`")
        sys.exit(1)
    remove(folder)
    for sort, counts in sorted(flips.happened.items()):
        print(f"{sort:<12} " + ", ".join(f"{count} x {came}" for came, count in sorted(counts.items())))
    print(f"{options.count} harmed files, {time.monotonic() - began:.0f} s, seed {seed}: every output exact, never a wrong hit")


if __name__ == "__main__":
    main()
