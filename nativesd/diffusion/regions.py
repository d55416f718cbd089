"""Prompts for parts of a picture, by attention to the text that is weighed cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nativesd.diffusion.conditioning import Conditioning
from nativesd.diffusion.prompting import Sides
from nativesd.models.edits import Attend, Edit, Layer, Place
from nativesd.models.layers import CachedContext
from nativesd.pictures.images import ImageSource
from nativesd.pictures.masks import mask_to_tensor, read_mask

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Region:
    """What one part of a picture shows; the call's own prompt is for the rest, and for all where parts weigh less.

    prompt  of the part
    box     left, top, right and bottom, as shares of the result's width and height, 0 to 1
    mask    instead of the box: a picture that is white there, of any size; it is cut and extended as hints are
    weight  of the prompt there. The call's has what is left of 1, and where parts come to more they share

    Every cell attends to each prompt by itself, and what it finds is weighed: half masks of one prompt are that prompt.
    Image prompts act beside all of them, undivided.
    """

    prompt: str
    box: Box | None = None
    mask: ImageSource | None = None
    weight: float = 1.0

    def weights(self, size: tuple[int, int]) -> Tensor:
        """Of its prompt at every cell of a feature map, height and width: (h, w) float32, by how much of it it covers.

        Raises what `read_mask` does.
        """
        height, width = size
        if self.mask is not None:
            mask = mask_to_tensor(read_mask(self.mask).image)
            cells: Tensor = F.interpolate(mask, size, mode="area")[0, 0]
            return cells * self.weight
        assert self.box is not None
        left, top, right, bottom = self.box
        across, down = _covered(left, right, width), _covered(top, bottom, height)
        return down[:, None] * across * self.weight


def _covered(low: float, high: float, count: int) -> Tensor:
    """How much of each of `count` cells lies between two shares of them all: (count,)."""
    edges = torch.arange(count, dtype=torch.float32)
    return ((edges + 1).clamp(max=high * count) - edges.clamp(min=low * count)).clamp(min=0)


def shares(regions: Sequence[Region], size: tuple[int, int]) -> Tensor:
    """The weights of the call's prompt and of every region's at every cell, which come to 1: (1 + n, h, w)."""
    parts = torch.stack([region.weights(size) for region in regions])
    total = parts.sum(0)
    return torch.cat([(1 - total).clamp(min=0)[None], parts]) / total.clamp(min=1)


def with_regions(sides: Sides, regional: Sides, regions: Sequence[Region]) -> Sides:
    """Sides whose prompts are those of regions too; `regional` has what each of these is told, in their order."""
    made: dict[tuple[int, int], tuple[Sequence[Conditioning], Sequence[Conditioning], list[Conditioning]]] = {}

    def at(sigma: float) -> Sequence[Conditioning]:
        now, parts = sides(sigma), regional(sigma)
        key = id(now), id(parts)
        if key not in made:
            edit = _Weighed([CachedContext(part.texts[:1]) for part in parts], regions)
            out = [replace(side, edits=(*side.edits, edit)) if side.role == "prompt" else side for side in now]
            made[key] = now, parts, out  # the first two are kept, so that their ids stay their own
        return made[key][2]

    return at


@dataclass(frozen=True, eq=False)
class _Weighed(Edit):
    """Attention to several texts, (1, T, C) each beside the call's own, weighed cell by cell.

    Every text is attended to with the image prompts; as the weights come to 1, what these add is there once.
    """

    contexts: Sequence[CachedContext]
    regions: Sequence[Region]
    _shares: dict[tuple[tuple[int, int], torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def cross_attention(self, place: Place, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
        key = place.size, x.device, x.dtype
        if key not in self._shares:
            self._shares[key] = shares(self.regions, place.size).flatten(1)[..., None].to(x)  # (1 + n, HW, 1)
        own, *parts = self._shares[key]
        out: Tensor = attend(x) * own
        for context, share in zip(self.contexts, parts, strict=True):
            k, v = (each.expand(x.shape[0], -1, -1) for each in layer.keys_values(context))
            out = out + layer.over(x, k, v) * share
        return out
