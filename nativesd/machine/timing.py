"""How long calls take, how much memory, and how fast a matrix product is meanwhile."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
PEAK_SIZE = 2048  # of the square matrices whose product is the peak


Way = Callable[[], object]  # one way to run a case


@dataclass(frozen=True)
class Timing:
    """How one way did. `peak` are the bytes at the height of a call beyond those before it; None where unknown."""

    case: str
    way: str
    first: float
    """Seconds of the first call, in which torch.compile compiles."""
    seconds: tuple[float, ...]
    peak: int | None
    flops: float
    """Of one call, as the plain modules compute it."""
    ceiling: float
    """FLOP/s of a large matrix product in the same dtype."""

    @property
    def median(self) -> float:
        """Of the seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median; 0 for a single call."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / 2 / self.median

    @property
    def share(self) -> float:
        """Of the ceiling."""
        return self.flops / self.median / self.ceiling

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"median": self.median, "spread": self.spread, "share": self.share}


@dataclass
class Report:
    """All timings of a run, and what it ran on."""

    machine: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)

    def ratio(self, timing: Timing, to: str) -> float:
        """A way's median over that of way `to` in the same case; NaN where there is none."""
        others = [other for other in self.timings if (other.case, other.way) == (timing.case, to)]
        return timing.median / others[0].median if others else math.nan

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return {"machine": self.machine, "timings": [timing.fields() for timing in self.timings]}


@cache
def ceiling(dtype: torch.dtype, device: torch.device, clock: Clock, rounds: int = 7) -> float:
    """FLOP/s of the product of two square matrices: the best of several."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device).to(dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, device, CLOCKS[clock]) for _ in range(rounds))
    return 2 * PEAK_SIZE**3 / best


def timed(run: Callable[[], object], device: torch.device, now: Callable[[], float]) -> float:
    """Seconds of a call by the clock `now`, with what it left a GPU to do."""
    start = now()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that says, afterwards, by how many bytes the most memory was above what there was before."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: found[0]
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        yield lambda: None
        return
    reset.write_text("5")  # proc(5): the high-water mark starts again at what there is
    before = _status("VmRSS")
    yield lambda: found[0]
    found.append(_status("VmHWM") - before)


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
