"""Verdicts on mazes, recomputed from the rules alone, and a look for test layouts in training data.

usage: verdicts.py FOLDER...             evaluations of mazes, or their `examples.parquet`
       verdicts.py --layouts FOLDER...   data sets and tokens: no layout of a `test` may stand in a `train` or an `rl`

Nothing here is shared with the program: the rules are those that docs/maze.md states. How completions are written (bare,
with lines, in words) is told from the prompts. Exits with 1 where a row or a layout disagrees.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet

SIDES = {"up": (1, -1, 0), "down": (2, 1, 0), "left": (4, 0, -1), "right": (8, 0, 1)}
ERRORS = ["out_of_tokens", "no_answer", "malformed", "wall", "overshoot", "stopped_short"]
TOKEN = re.compile(r"<think>|</think>|<\|[^<>]*\|>")


class Maze:
    """An instance: cells row by row, a mask of closed sides each."""

    def __init__(self, data: dict):
        self.rows, self.columns = data["rows"], data["columns"]
        self.walls, self.origin, self.target = data["walls"], data["origin"], data["target"]

    def step(self, cell: int, move: str) -> int | None:
        """The cell that a move leads to; None where a wall stands."""
        bit, down, right = SIDES[move]
        if self.walls[cell] & bit:
            return None
        return cell + down * self.columns + right

    def distances(self) -> dict[int, int]:
        """Moves to the target, from each cell from which there is a way."""
        found, border = {self.target: 0}, [self.target]
        while border:
            cell = border.pop(0)
            for move in SIDES:
                # A wall stands on both of its sides, so ways lead back.
                beyond = self.step(cell, move)
                if beyond is not None and beyond not in found:
                    found[beyond] = found[cell] + 1
                    border.append(beyond)
        return found


def form_of(prompt: str) -> str:
    """How texts are written: `bare` tokens, tokens with `lines`, or `words`."""
    if "\n" not in prompt:
        return "bare"
    return "lines" if "<|origin|>" in prompt.rsplit("MAZE:\n", 1)[-1] else "words"


def pieces_of(text: str) -> list[str]:
    """A text as tokens and what stands between them."""
    pieces, at = [], 0
    for token in TOKEN.finditer(text):
        pieces += [text[at : token.start()], token.group()]
        at = token.end()
    return [piece for piece in [*pieces, text[at:]] if piece]


def answer_of(form: str, completion: str) -> tuple[bool, list[str], bool]:
    """Whether the form holds, the moves up to the first thing that is none, and whether an attempt was given up."""
    specials = ["<think>", "<|pad|>", "<|bos|>", "<|eos|>"]
    if form == "bare":
        pieces = pieces_of(completion)
        # The first token stands where `<think>` should, whatever it is: a `</think>` there ends nothing.
        closed = "</think>" in pieces[1:]
        cut = pieces.index("</think>", 1) if closed else len(pieces)
        thoughts, answer = pieces[1:cut], pieces[cut + 1 :]
        holds = closed and pieces[0] == "<think>" and not set(thoughts) & set(specials)
        retried = "<|reset|>" in pieces[:cut]
    else:
        # The thoughts may be left out, or have begun in the prompt.
        begun = completion.lstrip().startswith("<think>")
        text = completion.lstrip()[len("<think>") :] if begun else completion
        if "</think>" in text:
            thoughts, answer = text.split("</think>", 1)
            holds = not any(special in thoughts for special in specials)
        else:
            thoughts, answer = (text, "") if begun else ("", text)
            holds = not begun
        retried = any(line.strip() == "RESET" for line in thoughts.splitlines())
        answer = answer.split() if form == "words" else [piece for piece in pieces_of(answer) if piece.strip()]
    names = {name if form == "words" else f"<|{name}|>": name for name in SIDES}
    moves = []
    for piece in answer:
        if piece not in names:
            break
        moves.append(names[piece])
    return holds and 0 < len(moves) == len(answer), moves, retried


def harness(maze: Maze, form: str, completion: str) -> bool:
    """The rule of AlphaMaze's evaluation."""
    parts = completion.split("</think>")
    if len(parts) < 2:
        return False
    found = re.split(r"[\W_]+", parts[1]) if form == "words" else re.findall(r"<\|(.*?)\|>?", parts[1])
    cell = maze.origin
    for name in found:
        if name in SIDES:
            cell = maze.step(cell, name)
            if cell is None:
                return False
    return cell == maze.target


def verdict(data: dict, prompt: str, completion: str, finish: str) -> dict[str, float]:
    """Every measurement and diagnosis of a completion."""
    maze, form = Maze(data), form_of(prompt)
    holds, moves, retried = answer_of(form, completion)
    finished = finish == "stop"
    distances = maze.distances()
    shortest = distances[maze.origin]
    # The walk, standing still at walls; what comes first tells the error.
    cell, hits, valid, best = maze.origin, 0, 0, maze.origin
    reached = passed = False  # The target was come to freely; and something followed.
    for move in moves:
        passed |= reached
        beyond = maze.step(cell, move)
        if beyond is None:
            hits += 1
        else:
            cell = beyond
        if hits == 0:
            valid, best = valid + 1, cell
            reached |= cell == maze.target
    if not finished:
        error = "out_of_tokens"
    elif not moves:
        error = "no_answer"
    elif not holds:
        error = "malformed"
    elif passed:
        error = "overshoot"
    elif hits:
        error = "wall"
    elif not reached:
        error = "stopped_short"
    else:
        error = None
    solved = error is None
    flags = {f"error_{name}": error == name for name in ERRORS} | {
        "solved": solved,
        "format": holds,
        "finished": finished,
        "first_attempt": solved and not retried,
        "optimal": solved and len(moves) == shortest,
        "harness": harness(maze, form, completion),
    }
    return {name: float(flag) for name, flag in flags.items()} | {
        "valid_moves": float(valid),
        "steps": float(len(moves)),
        "shortest": float(shortest),
        "wall_hits": float(hits),
        "progress": min(max((shortest - distances[best]) / shortest, 0.0), 1.0),
    }


def disagreements(path: Path) -> tuple[int, list[str], Counter]:
    """How many rows an `examples.parquet` has, those on which something differs, and how often each outcome occurs."""
    rows = pyarrow.parquet.read_table(path).to_pylist()
    ones = ["solved", *(f"error_{name}" for name in ERRORS)]
    wrong, outcomes = [], Counter()
    for number, row in enumerate(rows):
        mine = verdict(json.loads(row["data"]), row["prompt"], row["completion"], row["finish"])
        # What is not there differs, too.
        differ = sorted(name for name in mine if abs(row.get(name, float("inf")) - mine[name]) > 1e-12)
        if sum(mine[name] for name in ones) != 1 or sum(row.get(name, 0.0) for name in ones) != 1:
            differ.append("not exactly one outcome")
        if differ:
            wrong.append(f"row {number} ({row['instance']}): {', '.join(differ)}")
        outcomes.update(name for name in ones if mine[name])
        outcomes.update(name for name in ["harness", "first_attempt", "optimal"] if mine[name])
        if mine["harness"] and not mine["solved"]:
            outcomes["harness only"] += 1
    return len(rows), wrong, outcomes


def images(data: dict) -> list[tuple]:
    """The layout turned by every quarter and mirrored: rows, columns and masks."""
    rows, columns = data["rows"], data["columns"]
    grid = [data["walls"][row * columns : (row + 1) * columns] for row in range(rows)]
    turned_side = {1: 8, 8: 2, 2: 4, 4: 1}  # Clockwise: what was up is on the right.
    mirrored_side = {1: 1, 2: 2, 4: 8, 8: 4}

    def moved(mask: int, sides: dict) -> int:
        return sum(to for side, to in sides.items() if mask & side)

    found = []
    for _ in range(4):
        grid = [[moved(mask, turned_side) for mask in row] for row in zip(*grid[::-1])]
        for one in (grid, [[moved(mask, mirrored_side) for mask in row[::-1]] for row in grid]):
            found.append((len(one), len(one[0]), tuple(mask for row in one for mask in row)))
    return found


def shared_layouts(folders: list[Path]) -> list[str]:
    """What stands in a `test` and in a `train` or an `rl`, of all folders together."""
    where: dict[tuple, dict[str, str]] = {}
    counts = Counter()
    for folder in folders:
        tokens = folder / "rows.parquet"
        for path in [tokens] if tokens.exists() else sorted(folder.glob("*.parquet")):
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["split", "data", "instance"]):
                for row in batch.to_pylist():
                    canonical = min(images(json.loads(row["data"])))
                    where.setdefault(canonical, {}).setdefault(row["split"], f"{row['instance']} of {path}")
                    counts[row["split"]] += 1
    told = ", ".join(f"{split}: {rows} rows" for split, rows in sorted(counts.items()))
    for needed in [["test"], ["train", "rl"]]:
        assert any(counts[split] for split in needed), f"there is no `{'` and no `'.join(needed)}` in {told or 'no row'}"
    shared = [
        f"{splits['test']} is {splits[other]}"
        for splits in where.values()
        for other in ["train", "rl"]
        if "test" in splits and other in splits
    ]
    tests = sum("test" in splits for splits in where.values())
    print(f"{len(where)} layouts ({told}), {tests} of them in test: {len(shared)} stand in train or rl")
    return shared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", action="store_true", help="look for test layouts in training data")
    parser.add_argument("folders", nargs="+", type=Path)
    asked = parser.parse_args()
    if asked.layouts:
        wrong = shared_layouts(asked.folders)
    else:
        wrong, rows, outcomes = [], 0, Counter()
        for folder in asked.folders:
            path = folder / "examples.parquet" if folder.is_dir() else folder
            count, differ, seen = disagreements(path)
            print(f"{path}: {count - len(differ)} of {count} rows agree; {dict(sorted(seen.items()))}")
            wrong += [f"{path}: {one}" for one in differ]
            rows, outcomes = rows + count, outcomes + seen
        print(f"{rows - len(wrong)} of {rows} rows agree in every verdict; {dict(sorted(outcomes.items()))}")
    for one in wrong[:20]:
        print(one, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
