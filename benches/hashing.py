"""What hashing costs: an input and an output of 1 GiB.

usage: python3 benches/hashing.py [MIB] [--pipe PROGRAM]        (builds nothing: run ./pipe --version first)

Wall seconds, processor seconds and bytes per processor second of: the first look at an input, the next one with nothing
changed, the one after a touch; and of a stage that makes such a file, beside the same command without the engine. The
file is read once before, so that it is the hashing that is measured and not the disk.
"""

import argparse
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LOOK = """
[stages.look]
kind = "command"
outputs = ["out"]
files = ["input.bin"]
command = ["sh", "-c", "wc -c < input.bin > out"]
"""

MAKE = """
[stages.make]
kind = "command"
outputs = ["made.bin"]
command = ["sh", "-c", "head -c {size} /dev/zero > made.bin"]
"""


def measured(command: list, folder: Path) -> tuple[float, float]:
    """Wall and processor seconds of a command that must succeed."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mib", nargs="?", type=int, default=1024)
    parser.add_argument("--pipe", type=Path, default=ROOT / "target" / "debug" / "pipe")
    arguments = parser.parse_args()
    size = arguments.mib << 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "look.toml").write_text(LOOK)
        (folder / "make.toml").write_text(MAKE.format(size=size))
        (folder / "tiny.toml").write_text(MAKE.format(size=1))
        block = os.urandom(1 << 20)
        with (folder / "input.bin").open("wb") as file:
            for _ in range(arguments.mib):
                file.write(block)
            os.fsync(file.fileno())
        pipe = [arguments.pipe, "--store", "store"]
        # A store of its own, so that the first look below is one; and what starting and planning cost without a file.
        measured([*pipe, "run", "tiny.toml"], folder)
        idle = min(measured([*pipe, "plan", "tiny.toml"], folder)[1] for _ in range(5))
        # What was changed this moment is hashed again each time, because it could change again unseen.
        time.sleep(3)
        rows = []
        read_only = measured([*pipe, "plan", "look.toml"], folder)
        rows.append(("input, first look", *read_only, size))
        measured([*pipe, "run", "look.toml"], folder)
        rows.append(("input, unchanged", *measured([*pipe, "plan", "look.toml"], folder), None))
        os.utime(folder / "input.bin")
        rows.append(("input, touched", *measured([*pipe, "plan", "look.toml"], folder), size))
        plain = measured(["sh", "-c", f"head -c {size} /dev/zero > plain.bin && sync plain.bin"], folder)
        rows.append(("output, the command alone, synced", *plain, None))
        made = measured([*pipe, "run", "make.toml"], folder)
        rows.append(("output, as a stage", *made, None))
        rows.append(("output, what the engine adds", made[0] - plain[0], made[1] - plain[1], size))
        for what, wall, processor, hashed in rows:
            rate = f"  {hashed / max(processor - idle, 1e-9) / 1e9:5.2f} GB/s a core" if hashed else ""
            print(f"{what:<36}{wall:8.3f} s wall{processor:8.3f} s processor{rate}")
        subprocess.run(["chmod", "-R", "u+w", folder / "store"], check=True)


if __name__ == "__main__":
    main()
