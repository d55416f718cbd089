"""`nativesd batch` killed with SIGKILL again and again: every row is painted once, and nothing is ever half there.

    python tools/kill_batch.py                        # 200 rows, 20 kills
    python tools/kill_batch.py --rows 12 --moments 3

One run is left alone. Another one is killed at random moments (a point of time, or the n-th operation on files), each
time started again over what is there, and at last left to end. After every kill the results must be readable up to a
line that was being written, each of their pictures must be there with the pixels that its line states, no file may be
half written, and nothing that a line tells of may have been painted again; pictures without a line are at most those of
the batch in flight. At the end every row must have one line and one picture, that of the run that was left alone but
for the rounding of other batches, and nothing may lie beside them. Exit code 1: something failed, said with its moment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kill import SECONDS, Kind, finish, start
from nativesd.batch import painter, plan, run  # noqa: F401  # what the commands import while they run

SUBJECTS = ("a strawberry", "a fox", "a small cactus")
COLOURS = ("yellow", "green", "pink", "blue")
ROUNDING = 1
"""Levels of 255 by which a picture may differ in another batch."""


@dataclass(frozen=True)
class State:
    """What is in a folder of results: lines by ids, and of every picture's file when it was written."""

    lines: dict[str, dict[str, Any]]
    files: dict[str, int]
    torn: int
    """Lines that cannot be read."""


def write_jobs(path: Path, rows: int) -> None:
    """Rows of two shapes, that differ in their prompts."""
    with path.open("w") as file:
        for i in range(rows):
            prompt = f"{SUBJECTS[i % 3]} on a {COLOURS[i // 3 % 4]} background"
            row = {"id": i, "prompt": prompt, "steps": 1, "width": 96 if i % 5 == 0 else 64}
            file.write(json.dumps(row) + "\n")


def look(out: Path) -> State:
    """The folder as it is."""
    lines, torn = dict[str, dict[str, Any]](), 0
    for path in out.glob("results.*.jsonl"):
        for raw in path.read_bytes().splitlines(keepends=True):
            try:
                line = json.loads(raw)
            except ValueError:
                torn += 1
                continue
            if line["id"] in lines:
                raise SystemExit(f"{line['id']} has two lines")
            lines[line["id"]] = line
    files = {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.glob("*/*.png")}
    return State(lines, files, torn)


def wrong(out: Path, before: State, now: State, size: int) -> list[str]:
    """What breaks a promise after a kill, or at the end."""
    found = []
    if now.torn > 1:
        found.append(f"{now.torn} lines of the results cannot be read")
    for name, line in now.lines.items():
        path = out / str(line["file"])
        if line["file"] not in now.files:
            found.append(f"{name} has a line, and no picture")
        elif hashlib.sha256(Image.open(path).convert("RGB").tobytes()).hexdigest() != line["sha256"]:
            found.append(f"{name} is not the picture of its line")
    for name, line in before.lines.items():
        if now.lines.get(name) != line:
            found.append(f"{name} had a line, and has another one or none")
        elif now.files.get(line["file"]) != before.files[line["file"]]:
            found.append(f"{name} was painted again")
    unsaid = now.files.keys() - {line["file"] for line in now.lines.values()}
    if len(unsaid) > size:
        found.append(f"{len(unsaid)} pictures have no line, and a batch has {size}")
    for name in unsaid:
        try:
            Image.open(out / name).load()
        except OSError as error:
            found.append(f"{name} is half written: {error}")
    return found


def differs(out: Path, whole: Path, state: State, size: int) -> list[str]:
    """Pictures that are not those of the run that was left alone; painted one by one, they are the same to the bit."""
    rounding = ROUNDING if size > 1 else 0
    found = []
    for name, line in state.lines.items():
        one, other = (np.asarray(Image.open(root / line["file"])).astype(int) for root in (out, whole))
        if np.abs(one - other).max() > rounding:
            found.append(f"{name} is another picture than that of the run that was left alone")
    return found


def trial(folder: Path, rows: int, moments: int, size: int, seed: int) -> bool:
    """One run left alone, one killed; prints what happened, and returns whether all held."""
    rng = random.Random(seed)
    kind = Kind(f"batch jobs.jsonl out --batch-size {size}", ())
    costs = []
    for name, count in (("short", size), ("whole", rows), ("killed", rows)):
        for inner in ("work", "cache", "temp"):
            (folder / name / inner).mkdir(parents=True)
        write_jobs(folder / name / "work" / "jobs.jsonl", count)
        if name != "killed":
            begun = time.monotonic()
            if finish(start(kind, folder / name), SECONDS):
                raise SystemExit((folder / name / "log").read_text())
            costs.append((time.monotonic() - begun, int((folder / name / "operations").read_text())))
    # a run's beginning, and in the mean of two kills one's share of the rest
    seconds, operations = (begin + 2 * (whole - begin) / moments for begin, whole in zip(*costs, strict=True))

    home, out = folder / "killed", folder / "killed" / "work" / "out"
    state, failures, kills = look(out), list[str](), 0
    painted = set[tuple[str, int]]()
    for moment in range(moments):
        at, after = rng.choice(((rng.randint(1, int(operations)), SECONDS), (0, rng.uniform(0, seconds))))
        code = finish(start(kind, home, at), after)
        kills += code == -signal.SIGKILL
        before, state = state, look(out)
        painted.update(state.files.items())
        unsaid = len(state.files) - len(state.lines)
        when = f"kill {moment + 1}, " + (f"before operation {at}" if at else f"after {after:.3f} s")
        print(f"{when}: {len(state.lines)} lines, {unsaid} pictures without one, {state.torn} torn", flush=True)
        failures += [f"{when}: {each}" for each in wrong(out, before, state, size)]
    if code := finish(start(kind, home), SECONDS):
        failures.append(f"the last run ended with {code}: {(home / 'log').read_text()[-500:]}")
    before, state = state, look(out)
    failures += wrong(out, before, state, 0) + differs(out, folder / "whole" / "work" / "out", state, size)
    painted.update(state.files.items())
    failures += [f"{path} is left" for path in out.rglob(".nativesd-*")]
    if state.lines.keys() != {str(i) for i in range(rows)} or state.torn:
        failures.append(f"{len(state.lines)} rows of {rows} are there, and {state.torn} lines cannot be read")
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{rows} rows, {kills} kills: {len(painted)} pictures painted, {len(failures)} failures")
    return not failures


def main() -> int:
    """Run, and say by the exit code whether all held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--size", type=int, default=4, help="rows that are painted together")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory(prefix="kill-batch-") as folder:
        return 0 if trial(Path(folder), given.rows, given.moments, given.size, given.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
