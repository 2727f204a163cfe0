"""What the thoughts of solved mazes are: searches, shortest ways, ways with cells left out, or nothing.

usage: python3 benches/thoughts.py FOLDER...

FOLDER is the `path` that `pipe show PLACE --json` tells of an evaluation in the format `fused`. Needs `pyarrow`.
Of each: moves named in a thought and of a shortest way, means over all mazes; then the shares of the solved ones whose thought
walks from the origin to the target by more moves than a shortest way (`longer`) or by as many (`shortest`), leaves cells out or is no
such walk (`gaps`), or names no move (`none`); last, the share whose thought ends on the target.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as parquet

MOVE = re.compile(r"<\|(up|down|left|right)_(\d+)-(\d+)\|>")
FIRST = re.compile(r"<think><\|(\d+)-(\d+)\|>")
STEP = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def thought(row):
    """Its kind, its moves and whether it ends on the target."""
    maze = json.loads(row["data"])
    origin, target = (divmod(maze[name], maze["columns"]) for name in ("origin", "target"))
    text = row["completion"].partition("</think>")[0]
    first = FIRST.match(text)
    moves = [(STEP[move], (int(line), int(column))) for move, line, column in MOVE.findall(text)]
    if not moves:
        return "none", 0, False
    cell, walks = origin, first is not None and tuple(map(int, first.groups())) == origin
    for (down, right), to in moves:
        walks, cell = walks and (cell[0] + down, cell[1] + right) == to, to
    ends = cell == target
    kind = "gaps" if not (walks and ends) else "longer" if len(moves) > row["shortest"] else "shortest"
    return kind, len(moves), ends


def main():
    for folder in map(Path, sys.argv[1:]):
        rows = parquet.read_table(folder / "examples.parquet", columns=["completion", "data", "shortest", "solved"]).to_pylist()
        found = [thought(row) for row in rows]
        moves, shortest = sum(moves for _, moves, _ in found) / len(rows), sum(row["shortest"] for row in rows) / len(rows)
        solved = [one for one, row in zip(found, rows) if row["solved"]]
        kinds = Counter(kind for kind, _, _ in solved)
        shares = ", ".join(f"{kind} {kinds[kind] / max(len(solved), 1):.1%}" for kind in ("longer", "shortest", "gaps", "none"))
        ends = sum(ends for _, _, ends in solved) / max(len(solved), 1)
        print(f"{folder.name[-8:]}: {moves:.2f} moves named, shortest way {shortest:.2f}; {len(solved)} solved: {shares}; on the target {ends:.1%}")


if __name__ == "__main__":
    main()
