"""Noise that departs from the seed's, by what A1111's modules/rng.py says of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nativesd.sampling.noise import NoiseKind, noise_source
from nativesd.sampling.variation import Variation, slerp, varied_noise

SHAPE = (4, 8, 10)
KINDS: tuple[NoiseKind, ...] = ("cpu", "cuda")


def plain(kind: NoiseKind, seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return noise_source(kind, [seed]).draw(shape)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_another_seeds_noise_is_mixed_in(kind: NoiseKind) -> None:
    for strength, end in ((1.0, 7), (1e-6, 3)):
        first = varied_noise(kind, [3, 3], [7, 8], Variation(7, strength), 8).first(SHAPE)
        assert (first[0] - plain(kind, end)).abs().max() < 1e-4
    half = varied_noise(kind, [3, 3], [7, 8], Variation(7, 0.5), 8).first(SHAPE)
    for other, found in zip((7, 8), half, strict=True):
        one, two = plain(kind, 3), plain(kind, other)
        cosine = (one * two).sum(1) / one.norm(dim=1) / two.norm(dim=1)  # of each row of cells downwards
        expected = (one + two) / (2 * ((1 + cosine) / 2).sqrt())[:, None]  # half way along the circle
        assert (found - expected).abs().max() < 1e-4


def test_noises_of_one_direction_are_mixed_as_there() -> None:
    """Straight, and the wrong way round."""
    low = plain("cpu", 1)
    assert torch.allclose(slerp(0.25, low, low * 1.5), low * 0.25 + low * 1.5 * 0.75)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_another_size_stands_in_the_middle(kind: NoiseKind) -> None:
    smaller = varied_noise(kind, [3], [], Variation(resize_from=(48, 40)), 8).first(SHAPE)[0]  # 5x6 cells
    around, inner = plain(kind, 3), plain(kind, 3, (4, 5, 6))
    assert torch.equal(smaller[:, 1:6, 2:8], inner)
    outside = torch.ones(SHAPE, dtype=torch.bool)
    outside[:, 1:6, 2:8] = False
    assert torch.equal(smaller[outside], around[outside])
    larger = varied_noise(kind, [3], [], Variation(resize_from=(128, 72)), 8).first(SHAPE)[0]  # 9x16 cells
    wide = plain(kind, 3, (4, 9, 16))
    assert torch.equal(larger[:, :7], wide[:, 1:8, 3:13])  # (8 - 9) // 2 is -1: seven rows of it
    assert torch.equal(larger[:, 7:], around[:, 7:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_have_another_seeds_noise(kind: NoiseKind) -> None:
    source = varied_noise(kind, [3, 4], [], Variation(ensd=31337), 8)
    assert torch.equal(source.first(SHAPE)[1], plain(kind, 4))
    again = noise_source(kind, [3 + 31337, 4 + 31337])
    assert all(torch.equal(source.draw(SHAPE), again.draw(SHAPE)) for _ in range(2))
