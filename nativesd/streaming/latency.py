"""How long the stages of a frame take, measured without waiting for the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import torch

KEPT = 64
"""Frames of which the times are kept."""


@dataclass(frozen=True)
class Latency:
    """Of the last frames, up to 64, in seconds.

    stages    the median of each: "input" (the frame's pixels and latents), "control" (hints and ControlNets), "unet",
              "slots" (the stream's own arithmetic), "output" (decoding, and the picture's copy)
    median    of whole frames; p95 the longest of all but a twentieth of them
    frames    how many were measured
    """

    stages: dict[str, float]
    median: float
    p95: float
    frames: int

    @property
    def fps(self) -> float:
        """Frames per second at the median."""
        return 1 / self.median if self.median else 0.0


class Moment(Protocol):
    """A moment on the device."""

    def since(self, earlier: Moment) -> float:
        """Seconds between the two."""


class _Host:
    """A moment on the CPU."""

    def __init__(self) -> None:
        self.at = perf_counter()

    def since(self, earlier: Moment) -> float:
        """See `Moment`."""
        assert isinstance(earlier, _Host)
        return self.at - earlier.at


class _Device:
    """A moment in a GPU's queue; it is waited for when somebody asks."""

    def __init__(self) -> None:
        self.event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def since(self, earlier: Moment) -> float:
        """See `Moment`."""
        assert isinstance(earlier, _Device)
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1000


class Clock:
    """The moments of the last frames. What lies between two marks is the later one's stage; a stage may come again."""

    def __init__(self, device: torch.device) -> None:
        self._moment = _Device if device.type == "cuda" else _Host
        self._frames: deque[list[tuple[str, Moment]]] = deque(maxlen=KEPT)
        self._current: list[tuple[str, Moment]] = []

    def start(self) -> None:
        """A frame begins."""
        self._current = [("", self._moment())]

    def mark(self, stage: str) -> None:
        """A stage has ended."""
        self._current.append((stage, self._moment()))

    def end(self) -> None:
        """The frame has ended."""
        self._frames.append(self._current)

    def latency(self) -> Latency:
        """What the frames say."""
        stages: dict[str, list[float]] = {}
        totals = []
        for number, moments in enumerate(self._frames):
            for (_, before), (stage, after) in pairwise(moments):
                times = stages.setdefault(stage, [0.0] * len(self._frames))
                times[number] += after.since(before)
            totals.append(moments[-1][1].since(moments[0][1]))
        if not totals:
            return Latency({}, 0.0, 0.0, 0)
        ordered = sorted(totals)
        return Latency(
            {stage: median(times) for stage, times in stages.items()},
            median(totals), ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)], len(ordered),
        )  # fmt: skip
