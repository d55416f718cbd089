"""Frames that are like the last one that was worked on are skipped, by chance and within bounds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Measure = Literal["difference", "cosine"]


@dataclass(frozen=True)
class Similar:
    """Which frames to skip.

    threshold  how similar, up to 1, a frame has to be to the last one that was worked on to be skipped at all; between
               there and 1 the chance grows evenly to 1. 1 skips none
    max_skip   after one skip more than so many since a frame was last taken for that reason, the next is taken
    measure    "difference": 1 less the root mean square difference of the pixels, of black and white being 1.
               "cosine": as published, of the pixels in [-1, 1] as one vector, which does not see a change of contrast
               or brightness
    seed       of the chance

    Source of all but the first measure: cumulo-autumn/StreamDiffusion, src/streamdiffusion/image_filter.py.
    """

    threshold: float = 0.98
    max_skip: int = 10
    measure: Measure = "difference"
    seed: int = 0


class SimilarFilter:
    """A `Similar` at work."""

    def __init__(self, similar: Similar) -> None:
        self.similar = similar
        self._chance = random.Random(similar.seed)
        self._last: Tensor | None = None
        self._skipped = 0

    def skips(self, frame: Tensor) -> bool:
        """Whether to skip a frame, pixels in [-1, 1] of the shape of those before; keeps those that are not."""
        if self._last is None:
            self.keep(frame)
            return False
        threshold = self.similar.threshold
        chance = 0.0 if threshold >= 1 else max(0.0, 1 - (1 - self._similarity(frame, self._last)) / (1 - threshold))
        if chance >= self._chance.uniform(0, 1):
            if self._skipped <= self.similar.max_skip:
                self._skipped += 1
                return True
            self._skipped = 0
        self.keep(frame)
        return False

    def keep(self, frame: Tensor) -> None:
        """Have it be the last frame that was worked on."""
        self._last = frame.clone() if self._last is None else self._last.copy_(frame)

    def _similarity(self, frame: Tensor, last: Tensor) -> float:
        if self.similar.measure == "cosine":
            return float(F.cosine_similarity(last.flatten(), frame.flatten(), dim=0, eps=1e-6))
        return 1 - float((frame - last).square().mean().sqrt()) / 2
