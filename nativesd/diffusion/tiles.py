"""Large pictures by windows: the model answers for each, and where windows overlap the answers' mean counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nativesd.diffusion.denoiser import Guided


class Window(NamedTuple):
    """A part of latents, in cells."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, x: Tensor, factor: int = 1) -> Tensor:
        """What of (..., h * factor, w * factor) lies in it."""
        rows = slice(self.top * factor, self.bottom * factor)
        return x[..., rows, self.left * factor : self.right * factor]


@dataclass(frozen=True)
class Tiles:
    """Windows of so many pixels a side, of which neighbours share at least `overlap` (Bar-Tal et al. 2023, arXiv
    2302.08113, section 4.1: MultiDiffusion, with equal weights). A picture that is no larger is one window."""

    size: int = 512
    overlap: int = 64

    def windows(self, height: int, width: int, factor: int) -> list[Window]:
        """Those of latents of `height` x `width` cells of `factor` pixels a side: as few as cover them, evenly."""
        size, overlap = max(self.size // factor, 1), self.overlap // factor
        down, across = (_starts(length, size, overlap) for length in (height, width))
        return [Window(y, x, min(y + size, height), min(x + size, width)) for y in down for x in across]


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Where windows of a size begin that cover a length with this overlap at least."""
    if length <= size:
        return [0]
    count = 1 + -(-(length - size) // max(size - overlap, 1))
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


class Tiled:
    """A denoiser over windows, each with its own: noisy latents (B, C, h, w) and sigma to the clean ones."""

    def __init__(self, parts: Sequence[tuple[Window, Guided]]) -> None:
        self._parts = parts
        self._shape: torch.Size | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The mean of the windows' answers."""
        self._shape = x.shape
        return self._mean(lambda window, guided: guided(window.of(x), sigma))

    def unguided(self) -> Tensor:
        """The same of what the last call's negative prompt alone means."""
        return self._mean(lambda window, guided: guided.unguided())

    def broken(self) -> list[str]:
        """The ControlNets that have made numbers which are not finite of such that are."""
        return [name for _, guided in self._parts for name in guided.broken()]

    def _mean(self, answer: Callable[[Window, Guided], Tensor]) -> Tensor:
        assert self._shape is not None
        if len(self._parts) == 1:
            return answer(*self._parts[0])
        total = count = torch.zeros(())
        for number, (window, guided) in enumerate(self._parts):
            part = answer(window, guided)
            if number == 0:
                total, count = part.new_zeros(self._shape), part.new_zeros(self._shape[2:])
            window.of(total).add_(part)
            window.of(count).add_(1)
        return total / count
