"""What a row of `nativesd batch` costs beside its picture, and how the memory grows: with a stub instead of a model.

    python tools/bench_batch.py                  # 100,000 rows
    python tools/bench_batch.py --rows 10000 --side 512

The pictures of the stub are made before; all else is as in a real run: the file is checked, rows are put
together by shape, pictures are encoded, hashed, written, and written down. A second run then looks at all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nativesd.batch import studio
from nativesd.batch.columns import Columns
from nativesd.batch.plan import Plan
from nativesd.batch.run import Run
from nativesd.pictures.result import Result

KINDS = 16


class Stub:
    """In place of a pipeline: pictures that cost nothing."""

    def __init__(self, side: int) -> None:
        rng = np.random.default_rng(0)
        low = rng.integers(0, 256, (KINDS, 16, 16, 3), dtype=np.uint8)  # as compressible as a drawing
        self._pictures = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in low]
        self._fixed = {
            "negative_prompt": "", "steps": 1, "sampler": "Euler", "schedule": "normal", "guidance_scale": 1.0,
            "width": side, "height": side, "model": "stub",
        }  # fmt: skip

    def __call__(self, prompts: Sequence[str], *, seed: Sequence[int], **_: Any) -> Result:
        """As many pictures as prompts."""
        images = [self._pictures[each % KINDS] for each in seed]
        return Result(images, list(seed), {"prompt": list(prompts), **self._fixed}, torch.zeros(1))

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Cost:
    """Of one part of a run: milliseconds a row, on the clock and of all threads, and by how many MB the peak rose."""

    milliseconds: float
    computed: float
    grown: float


@contextmanager
def stubbed(side: int) -> Iterator[None]:
    """Meanwhile models are stubs."""
    load = studio.load
    studio.load = lambda *_, **__: Stub(side)  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        studio.load = load


def write_jobs(path: Path, rows: int) -> None:
    """Rows of eight shapes, mixed."""
    with path.open("w") as file:
        for i in range(rows):
            row = {
                "prompt": f"a picture of number {i}, in oil",
                "steps": 20 + i % 8,
                "source": f"row {i}",
                "score": i / 7,
            }
            file.write(json.dumps(row) + "\n")


def measured(rows: int, side: int, size: int, folder: Path) -> dict[str, Cost]:
    """What checking, painting and looking again cost."""
    costs = {}
    write_jobs(folder / "jobs.jsonl", rows)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        before, begun, computed = peak(), time.perf_counter(), time.process_time()
        yield
        seconds = time.perf_counter() - begun, time.process_time() - computed
        costs[name] = Cost(seconds[0] * 1000 / rows, seconds[1] * 1000 / rows, peak() - before)

    with stubbed(side):
        for turn in ("first", "second"):
            with timed(f"check, {turn} run"):
                plan = Plan.of(folder / "jobs.jsonl", Columns())
            with timed(f"paint, {turn} run"), plan:
                tally = Run(plan, folder / "out", size=size)()
            done = tally.painted if turn == "first" else tally.skipped
            if done != rows:
                raise SystemExit(f"{done} of {rows} rows are done")
    return costs


def peak() -> float:
    """The most memory that this process has had, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument("--size", type=int, default=8, help="rows that are painted together")
    given = parser.parse_args()
    print(f"{given.rows} rows, pictures of {given.side}x{given.side}; {peak():.0f} MB before")
    with tempfile.TemporaryDirectory(prefix="bench-batch-") as folder:
        for name, cost in measured(given.rows, given.side, given.size, Path(folder)).items():
            times = f"{cost.milliseconds:8.3f} ms a row, {cost.computed:8.3f} ms of threads"
            print(f"{name:<20} {times}, {cost.grown:6.0f} MB more at the peak")


if __name__ == "__main__":
    main()
