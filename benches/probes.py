#!/usr/bin/env python3
"""Ten questions to an engine, each with its ideal answer, asked of this one and, with --peers, of others the same way.

    python3 benches/probes.py [--pipe PROGRAM] [--peers FOLDER]

Three stages in a row, a -> b -> c; b keeps only the first line of a. Stages count their runs in a file of their own, so the
answers are not the engine's own words. `--peers` makes a virtual environment in FOLDER with dvc, snakemake and redun. Exits
with 1 where this engine's answer is not the ideal one.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ["dvc", "snakemake", "redun"]

# What each stage does, as a shell program that reads `input` and `tail` and writes `output`.
A = "echo a >> {ran}; (cat {input}; echo {tail}) > {output}"
B = "echo b >> {ran}; {hold}head -n 1 {input} > {output}"
C = "echo c >> {ran}; (cat {input}; echo end) > {output}"


# What may hold up b: its first run stays in it, or every run until there is a file `go`.
HOLDS = {
    "": "",
    "first": "if mkdir {folder}/first; then sleep 60; fi; ",
    "go": "while [ ! -e {folder}/go ]; do sleep 0.05; done; ",
}


class Engine:
    """One project in a folder of its own. `tail` is a parameter of a that leaves its first line alone."""

    name = ""
    # How long a second run is given to come to where the first is, where it does not say that it waits, seconds.
    pause = 15.0

    def __init__(self, folder, hold=""):
        self.folder, self.ran, self.hold, self.tail = folder, folder / "ran", hold, "tail"
        folder.mkdir()
        (folder / "in.txt").write_text("one\ntwo\n")
        self.prepare()
        self.write()

    def prepare(self):
        pass

    def script(self, stage, source, target):
        template = {"a": A, "b": B, "c": C}[stage]
        hold = HOLDS[self.hold].format(folder=self.folder)
        return template.format(ran=self.ran, input=source, output=target, tail=self.tail, hold=hold)

    def command(self):
        raise NotImplementedError

    def environment(self):
        return {**os.environ, "NO_COLOR": "1"}

    def start(self, said=subprocess.PIPE):
        return subprocess.Popen(
            self.command(),
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self):
        """The exit code, the stages that ran, and what was said."""
        self.ran.unlink(missing_ok=True)
        process = self.start()
        said = process.communicate(timeout=300)[0]
        return process.returncode, self.has_run(), said

    def has_run(self):
        return " ".join(self.ran.read_text().split()) if self.ran.exists() else ""

    def output(self, stage):
        """The file that holds a stage's output."""
        return self.folder / f"{stage}.txt"

    def result(self):
        """What the user is given of c."""
        path = self.output("c")
        return path.read_text() if path.exists() else None

    def stored(self, stage):
        """The file in which the engine itself keeps a stage's output, if it does."""
        return None

    def is_waiting(self, said):
        """Whether a run tells in what it has `said` that it waits for another; None where it never does."""
        return None

    def misspell(self):
        raise NotImplementedError

    def release(self):
        """Lets later processes work in the folder, where an engine asks for that."""


class Pipe(Engine):
    name = "pipe"
    program = ""

    def write(self):
        stage = '[stages.{name}]\nkind = "command"\noutputs = ["out"]\ncommand = ["sh", "-c", {script}]\n{rest}\n'
        rows = [
            ("a", self.script("a", "in.txt", "out"), 'files = ["in.txt"]'),
            ("b", self.script("b", "{inputs.x}/out", "out"), 'inputs = { x = "a" }'),
            ("c", self.script("c", "{inputs.x}/out", "out"), 'inputs = { x = "b" }'),
        ]
        text = "".join(stage.format(name=name, script=json.dumps(script), rest=rest) for name, script, rest in rows)
        (self.folder / "project.toml").write_text(text)

    def command(self):
        return [self.program, "run", "--json", "project.toml"]

    def output(self, stage):
        shown = subprocess.run(
            [self.program, "show", "--json", f"project/{stage}"], cwd=self.folder, capture_output=True, check=False
        )
        return Path(json.loads(shown.stdout)["path"]) / "out" if shown.returncode == 0 else self.folder / "nothing"

    stored = output

    def is_waiting(self, said):
        return '"waiting"' in said

    def misspell(self):
        path = self.folder / "project.toml"
        path.write_text(path.read_text().replace("outputs", "outputz", 1))


class Dvc(Engine):
    name = "dvc"

    def prepare(self):
        quiet = {"cwd": self.folder, "check": True, "capture_output": True, "env": self.environment()}
        subprocess.run(["git", "init", "-q"], **quiet)
        subprocess.run([self.program, "init", "-q"], **quiet)

    def write(self):
        above = {"a": "in.txt", "b": "a.txt", "c": "b.txt"}
        lines = ["stages:"]
        for stage, source in above.items():
            script = json.dumps(self.script(stage, source, f"{stage}.txt"))
            lines += [f"  {stage}:", f"    cmd: {script}", f"    deps: [{source}]", f"    outs: [{stage}.txt]"]
        (self.folder / "dvc.yaml").write_text("\n".join(lines) + "\n")

    def command(self):
        return [self.program, "repro"]

    def environment(self):
        return {**super().environment(), "DVC_NO_ANALYTICS": "1", "DVC_TEST": "true"}

    def stored(self, stage):
        import hashlib

        digest = hashlib.md5(self.output(stage).read_bytes()).hexdigest()
        return self.folder / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]

    def misspell(self):
        path = self.folder / "dvc.yaml"
        path.write_text(path.read_text().replace("outs", "outz", 1))


class Snakemake(Engine):
    name = "snakemake"

    def write(self):
        above = {"a": "in.txt", "b": "a.txt", "c": "b.txt"}
        rules = ['rule all:\n    input: "c.txt"\n']
        for stage, source in above.items():
            script = json.dumps(self.script(stage, source, f"{stage}.txt"))
            rules.append(f'rule {stage}:\n    input: "{source}"\n    output: "{stage}.txt"\n    shell: {script}\n')
        (self.folder / "Snakefile").write_text("\n".join(rules))

    def command(self):
        return [self.program, "--cores", "2", "--quiet"]

    def misspell(self):
        path = self.folder / "Snakefile"
        path.write_text(path.read_text().replace('output: "a.txt"', 'outputz: "a.txt"'))


class Redun(Engine):
    name = "redun"

    def write(self):
        tasks = ["from redun import File, task", "import subprocess", 'redun_namespace = "probe"']
        for stage in "abc":
            script = json.dumps(self.script(stage, "{source}", f"{stage}.txt"))
            tasks += [
                "@task()",
                f"def {stage}(source: File) -> File:",
                f"    script = {script}.replace('{{source}}', source.path)",
                "    subprocess.run(['sh', '-c', script], check=True)",
                f"    return File('{stage}.txt')",
            ]
        tasks += ["@task()", "def main() -> File:", "    return c(b(a(File('in.txt'))))"]
        (self.folder / "project.py").write_text("\n".join(tasks) + "\n")

    def command(self):
        return [self.program, "run", "project.py", "main"]

    def misspell(self):
        path = self.folder / "project.py"
        path.write_text(path.read_text().replace("@task()", "@task(versoin='1')", 1))


def overwrite(path, text):
    """Changes a file as by a failing disk or a careless hand: its mode and mtime stay."""
    stat = path.stat()
    path.chmod(0o644)
    path.write_text(text)
    path.chmod(stat.st_mode)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


RESULT = "one\nend\n"


def fresh(engine, place, **options):
    place.mkdir(exist_ok=True)
    project = engine(place / f"{engine.name}-{len(list(place.iterdir()))}", **options)
    code, ran, said = project.run() if not options else (0, "a b c", "")
    if (code, ran) != (0, "a b c"):
        raise RuntimeError(f"{engine.name} does not begin: {code} {ran}\n{said}")
    return project


def parameter(engine, place):
    project = fresh(engine, place)
    project.tail = "other"
    project.write()
    return project.run()[1] or "nothing"


def set_back(engine, place):
    project = fresh(engine, place)
    project.tail = "other"
    project.write()
    project.run()
    project.tail = "tail"
    project.write()
    ran = project.run()[1] or "nothing"
    return ran if project.output("a").read_text() == "one\ntwo\ntail\n" else f"{ran}, and a is another"


def touched(engine, place):
    project = fresh(engine, place)
    os.utime(project.folder / "in.txt")
    return project.run()[1] or "nothing"


def same_stat(engine, place):
    project = fresh(engine, place)
    # A cache of digests is there to be fooled only once it trusts what it has seen.
    time.sleep(2.2)
    project.run()
    overwrite(project.folder / "in.txt", "ONE\ntwo\n")
    ran = project.run()[1]
    return ran or "missed"


def deleted(engine, place):
    project = fresh(engine, place)
    path = project.output("c")
    path.parent.chmod(0o755)
    path.unlink()
    ran = project.run()[1]
    exact = "restored" if project.result() == RESULT else "not restored"
    return exact if not ran else f"{ran} runs, {exact}"


def overwritten(engine, place):
    project = fresh(engine, place)
    path = project.output("b")
    overwrite(path, "garbage\n")
    os.utime(path)
    ran = project.run()[1]
    exact = project.output("b").read_text() == "one\n" and project.result() == RESULT
    return ("restored" if exact else "garbage accepted") + (f", {ran} runs" if ran else "")


def corrupted(engine, place):
    project = fresh(engine, place)
    stored = project.stored("c")
    if stored is None:
        return "n/a"
    given = project.output("c")
    overwrite(stored, "ONE\nend\n")
    if given != stored:
        given.unlink()
    code, ran, _ = project.run()
    return f"detected, {ran} runs" if project.result() == RESULT and ran else f"garbage delivered, rc {code}"


def typo(engine, place):
    project = fresh(engine, place)
    project.misspell()
    code, _, said = project.run()
    said = said or ""
    words = []
    if any(f"{name}:" in said for name in ("project.toml", "dvc.yaml", "Snakefile", "project.py")) or "line " in said:
        words.append("file:line")
    if "did you mean" in said.lower() or "expected one of" in said:
        words.append("hint")
    return " + ".join(words or ["no place"]) + (", nothing runs" if code else ", accepted")


def killed(engine, place):
    project = fresh(engine, place, hold="first")
    process = project.start()
    until((project.folder / "first").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: is_over(process.pid))
    code, ran, _ = project.run()
    return ran if code == 0 else f"rc {code}"


def second(engine, place):
    project = fresh(engine, place, hold="go")
    first = project.start()
    path, began = project.folder / "other", time.monotonic()

    def is_there():
        waiting = project.is_waiting(path.read_text())
        late = waiting is None and time.monotonic() - began > engine.pause
        return other.poll() is not None or waiting or late

    try:
        until(lambda: "b" in project.has_run())
        with open(path, "w") as said:
            other, began = project.start(said), time.monotonic()
        until(is_there)
    finally:
        (project.folder / "go").touch()
    other.communicate(timeout=300)
    first.communicate(timeout=300)
    if other.returncode != 0:
        return f"rc {other.returncode}"
    ran = project.has_run()
    return "waits, reuses" if ran == "a b c" else f"ran {ran}"


def is_over(session):
    """Whether nothing of a session runs any more; what waits to be reaped has ended."""
    found = subprocess.run(["ps", "-eo", "sid=,stat="], capture_output=True, text=True, check=True)
    rows = (line.split() for line in found.stdout.splitlines())
    return all(sid != str(session) or stat.startswith(("Z", "X")) for sid, stat in rows)


def until(done):
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > 120:
            raise RuntimeError("waited in vain")
        time.sleep(0.01)


PROBES = [
    ("a parameter changes, b's output does not", parameter, {"a b"}),
    ("the parameter is set back", set_back, {"nothing"}),
    ("the input is touched", touched, {"nothing"}),
    ("its content changes; size and mtime do not", same_stat, {"a b c"}),
    # Where outputs lie in the store alone, making one again is how it is restored.
    ("the final output is deleted", deleted, {"restored", "c runs, restored"}),
    ("an intermediate output is overwritten", overwritten, {"restored", "restored, b runs"}),
    ("a stored object is corrupted", corrupted, {"detected, c runs"}),
    ("a key is misspelt", typo, {"file:line + hint, nothing runs"}),
    ("the engine is killed inside b", killed, {"b c"}),
    ("a second run while the first is inside b", second, {"waits, reuses"}),
]


def install(folder):
    """The peers' programs in a virtual environment."""
    programs = {name: Path(folder) / "bin" / name for name in PEERS}
    if not all(path.exists() for path in programs.values()):
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([Path(folder) / "bin" / "pip", "install", "--quiet", *PEERS], check=True)
    return programs


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipe", default=str(ROOT / "target" / "debug" / "pipe"))
    parser.add_argument("--peers", default=None, metavar="FOLDER")
    options = parser.parse_args()
    Pipe.program = os.path.abspath(options.pipe)
    engines = [Pipe]
    if options.peers:
        programs = install(os.path.abspath(options.peers))
        for engine in [Dvc, Snakemake, Redun]:
            engine.program = str(programs[engine.name])
            engines.append(engine)
    place = Path(tempfile.mkdtemp(prefix="probes-"))
    failed = 0
    for what, probe, ideal in PROBES:
        answers = []
        for engine in engines:
            try:
                answers.append(probe(engine, place / probe.__name__))
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                answers.append(f"breaks: {str(error).splitlines()[0][:60]}")
        passes = answers[0] in ideal
        failed += not passes
        others = "".join(f" | {engine.name}: {answer}" for engine, answer in zip(engines[1:], answers[1:]))
        print(f"{'pass' if passes else 'FAIL'}  {what:<44} {answers[0]} (ideal: {min(ideal, key=len)}){others}", flush=True)
    subprocess.run(["chmod", "-R", "u+w", str(place)], check=False)
    shutil.rmtree(place)
    print(f"{len(PROBES) - failed} of {len(PROBES)} as they should be")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
