"""How a picture's noise departs from that of its seed: by another seed, another size, or other noise for the steps.

As A1111 does it, in modules/rng.py (`ImageRNG`, `slerp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nativesd.sampling.noise import NoiseKind, NoiseSource, noise_source

PARALLEL = 0.9995  # cosine, beyond which A1111 goes straight from one noise to the other
SEEDS = 1 << 64


@dataclass(frozen=True)
class Variation:
    """How the noise of pictures departs from that of their seeds.

    seed         of the noise that is mixed in; picture i of a call has seed + i, and all have the same own seed, where
                 no seeds are listed. None and -1: random
    strength     how much of it, 0 to 1
    resize_from  width and height in pixels of the picture whose noise is to stand in the middle: about its composition
                 at another size
    ensd         added to the seed for the noise of the steps (A1111's "eta noise seed delta")
    """

    seed: int | None = None
    strength: float = 0.0
    resize_from: tuple[int, int] | None = None
    ensd: int = 0

    def after(self, pictures: int) -> Variation:
        """That of the pictures of a call which come after so many."""
        return self if self.seed is None else replace(self, seed=(self.seed + pictures) % SEEDS)


class VariedNoise:
    """A source whose first noise and later ones are as a `Variation` says. `seeds` are the pictures' own, `others` the
    variation's; `cells` is `resize_from` in latent cells, height and width."""

    def __init__(
        self,
        kind: NoiseKind,
        seeds: Sequence[int],
        others: Sequence[int],
        variation: Variation,
        cells: tuple[int, int] | None,
    ) -> None:
        self._kind, self._seeds, self._others, self._variation = kind, seeds, others, variation
        self._cells = cells
        self._source = noise_source(kind, seeds)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise of each picture: (B, *shape), float32."""
        return self._source.draw(shape)

    def first(self, shape: Sequence[int]) -> Tensor:
        """The noise that pictures (C, h, w) begin from: (B, *shape), float32."""
        inner = shape if self._cells is None else (shape[0], *self._cells)
        resized = tuple(inner) != tuple(shape)
        noise = (noise_source(self._kind, self._seeds) if resized else self._source).draw(inner)
        strength = self._variation.strength
        if strength != 0:
            others = noise_source(self._kind, self._others).draw(inner)
            noise = torch.stack([slerp(strength, own, other) for own, other in zip(noise, others, strict=True)])
        if resized:
            noise = _in_the_middle(noise, self._source.draw(shape))
        if self._variation.ensd:
            self._source = noise_source(self._kind, [(seed + self._variation.ensd) % SEEDS for seed in self._seeds])
        return noise


def varied_noise(
    kind: NoiseKind, seeds: Sequence[int], others: Sequence[int], variation: Variation | None, factor: int
) -> NoiseSource:
    """The noise of pictures, of whose pixels a latent cell has `factor` a side."""
    if variation is None:
        return noise_source(kind, seeds)
    size = variation.resize_from
    cells = None if size is None else (size[1] // factor, size[0] // factor)
    return VariedNoise(kind, seeds, others, variation, cells)


def slerp(share: float, low: Tensor, high: Tensor) -> Tensor:
    """Between two noises (C, h, w), along the sphere; A1111 takes the angles of each row of cells downwards."""
    dot = (low / low.norm(dim=1, keepdim=True) * (high / high.norm(dim=1, keepdim=True))).sum(1)
    if dot.mean() > PARALLEL:
        return low * share + high * (1 - share)  # the wrong way round, as there
    angle = dot.acos()
    sine = angle.sin()
    out: Tensor = (((1 - share) * angle).sin() / sine)[:, None] * low + ((share * angle).sin() / sine)[:, None] * high
    return out


def _in_the_middle(noise: Tensor, around: Tensor) -> Tensor:
    """The middle of `noise` (B, C, h, w) over the middle of `around` (B, C, H, W)."""
    target, source = [slice(None)] * 2, [slice(None)] * 2
    for inner, outer in zip(noise.shape[2:], around.shape[2:], strict=True):
        margin = (outer - inner) // 2  # rounded downwards, so that odd differences come out as there
        length = inner if margin >= 0 else inner + 2 * margin
        target.append(slice(max(margin, 0), max(margin, 0) + length))
        source.append(slice(max(-margin, 0), max(-margin, 0) + length))
    out = around.clone()
    out[tuple(target)] = noise[tuple(source)]
    return out
