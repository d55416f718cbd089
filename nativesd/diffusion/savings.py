"""Time saved in the UNet for a little of the picture: off unless it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nativesd.config import UNetConfig
from nativesd.models.edits import Attend, Edit, Layer, Place

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Saving:
    """What all of these records have."""

    name: ClassVar[str]

    def edit(self, config: UNetConfig) -> Edit | None:
        """What every call of the UNet does otherwise."""
        return None


@dataclass(frozen=True)
class TokenMerging(Saving):
    """Token merging: of the cells, a share `ratio` is merged into those most like them while they attend.

    Every second cell of every second row stays. `depth` is how many levels below the first that has attention it acts
    at, too. Source: Bolya and Hoffman 2023, arXiv 2303.17604, section 4.
    """

    name: ClassVar[str] = "tome"
    ratio: float = 0.5
    depth: int = 0

    def edit(self, config: UNetConfig) -> Edit:
        """Self-attention over fewer cells."""
        return _Merged(_first(config) + self.depth, self.ratio)


@dataclass(frozen=True)
class HyperTile(Saving):
    """HyperTile: cells attend to those of their own tile only, which has at least `size` pixels a side.

    Tiles divide the feature map evenly, so a prime number of cells is one tile. `depth` is as in `TokenMerging`.
    Source: tfernd/HyperTile.
    """

    name: ClassVar[str] = "hypertile"
    size: int = 256
    depth: int = 0

    def edit(self, config: UNetConfig) -> Edit:
        """Self-attention tile by tile."""
        return _Split(_first(config) + self.depth, self.size)


@dataclass(frozen=True)
class DeepCache(Saving):
    """DeepCache: the levels below `level` are computed at every so many noise levels only, and kept in between.

    What is kept is of one prompt (and side): where that changes they are computed anew unless its own are young enough.

    Source: Ma et al. 2023, arXiv 2312.00858, with the whole level in place of one of its blocks.
    """

    name: ClassVar[str] = "deepcache"
    every: int = 2
    level: int = 0


SAVINGS: dict[str, type[Saving]] = {kind.name: kind for kind in (TokenMerging, HyperTile, DeepCache)}
CELL = 8  # pixels of a latent cell of published models


def _first(config: UNetConfig) -> int:
    """The level of the most cells that has attention: 0 of SD1.5, 1 of SDXL."""
    return next((i for i, level in enumerate(config.levels) if any(level.down) or any(level.up)), len(config.levels))


@dataclass(frozen=True)
class _Merged(Edit):
    deepest: int
    ratio: float

    def self_attention(self, place: Place, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
        if place.level > self.deepest:
            return attend(x)
        merge, unmerge = merging(x, place.size, self.ratio)
        return unmerge(attend(merge(x)))


def merging(metric: Tensor, size: tuple[int, int], ratio: float) -> tuple[Change, Change]:
    """How tokens (B, HW, C) of a feature map become fewer, by their likeness in `metric`, and as many again."""
    (height, width), batch = size, metric.shape[0]
    number = torch.arange(height * width, device=metric.device).view(height, width)
    stays = torch.zeros_like(number, dtype=torch.bool)
    stays[: height // 2 * 2 : 2, : width // 2 * 2 : 2] = True
    into, other = number[stays], number[~stays]
    count = min(int(height * width * ratio), len(other))
    if count == 0:
        return (lambda x: x), (lambda x: x)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    likeness, nearest = (unit[:, other] @ unit[:, into].mT).max(-1)  # (B, others)
    order = likeness.argsort(-1, descending=True)
    gone, kept = other[order[:, :count]], other[order[:, count:]]
    target = nearest.gather(1, order[:, :count])

    def pick(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

    def merge(x: Tensor) -> Tensor:
        most = x[:, into].scatter_reduce(1, target[..., None].expand(-1, -1, x.shape[2]), pick(x, gone), "mean")
        return torch.cat([pick(x, kept), most], dim=1)

    def unmerge(x: Tensor) -> Tensor:
        rest, most = x[:, : kept.shape[1]], x[:, kept.shape[1] :]
        places = torch.cat([kept, into.expand(batch, -1), gone], dim=1)
        return torch.empty_like(metric, dtype=x.dtype).scatter(
            1, places[..., None].expand(-1, -1, x.shape[2]), torch.cat([rest, most, pick(most, target)], dim=1)
        )

    return merge, unmerge


@dataclass(frozen=True)
class _Split(Edit):
    deepest: int
    size: int

    def self_attention(self, place: Place, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
        if place.level > self.deepest:
            return attend(x)
        (height, width), batch = place.size, x.shape[0]
        cells = max(self.size // (CELL << place.level), 1)
        down, across = tiles(height, cells), tiles(width, cells)
        if down * across == 1:
            return attend(x)
        # (B, HW, C) -> (B, down, h, across, w, C) -> (B * down * across, h * w, C), and back
        parts = x.view(batch, down, height // down, across, width // across, -1).transpose(2, 3)
        out = attend(parts.flatten(3, 4).flatten(0, 2))
        return out.view(*parts.shape[:5], -1).transpose(2, 3).reshape(batch, height * width, -1)


def tiles(length: int, least: int) -> int:
    """Into how many even tiles of at least so many cells a length is cut."""
    return length // min(
        (size for size in range(1, length + 1) if length % size == 0 and size >= least), default=length
    )
