"""Numbers into GGUF's K types: blocks of 256 in groups, whose scales and least values are small integers themselves.

The search is that of ggml-quants.c (`make_qkx2_quants`, `make_qx_quants`, `quantize_row_q4_K_ref` and its kin), for all
groups of a tensor at once: of some scales around the plain one, the best by least squares. Sums are added up in another
order than there, so that where two scales are as good as one another, the other may be taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-15
"""Magnitude below which a group is zero (ggml-quants.c, GROUP_MAX_EPS)."""


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale == 0, 0, 1 / scale)


def to_q4_k(blocks: Tensor) -> Tensor:
    """(n, 256) float32 -> (n, 144) bytes."""
    head, numbers = _with_least(blocks, 15, first=-1.0, steps=21)
    return torch.cat([*head, _pairs_of_groups(numbers)], 1)


def to_q5_k(blocks: Tensor) -> Tensor:
    """(n, 256) float32 -> (n, 176) bytes."""
    head, numbers = _with_least(blocks, 31, first=-0.5, steps=16)
    fifth = (numbers >> 4) << torch.arange(8, dtype=torch.uint8)[:, None]  # (n, 8, 32): a bit for every group
    return torch.cat([*head, fifth.sum(1, dtype=torch.uint8), _pairs_of_groups(numbers & 15)], 1)


def to_q6_k(blocks: Tensor) -> Tensor:
    """(n, 256) float32 -> (n, 210) bytes."""
    groups = blocks.reshape(-1, 16, 16)
    scales, numbers = _signed(groups, 32)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))  # (n, 1), with its sign
    up = torch.where(largest.abs() < LEAST, 0.0, -128 / largest)
    scale = inverse(up).half()
    factors = (up * scales).round().clamp(max=127)  # (n, 16)
    step = (scale.float() * factors)[..., None]
    numbers = torch.where(step == 0, numbers, (groups * inverse(step)).round().clamp(-32, 31))
    numbers = torch.where(largest.abs()[..., None] < LEAST, -32.0, numbers)
    bits = (numbers + 32).to(torch.uint8).reshape(-1, 2, 4, 32)
    low = (bits[:, :, :2] & 15) | (bits[:, :, 2:] << 4)  # (n, 2, 2, 32): the third and fourth 32 in the high halves
    high = ((bits >> 4) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]).sum(2, dtype=torch.uint8)
    return torch.cat(
        [low.flatten(1), high.flatten(1), factors.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], 1
    )


def _pairs_of_groups(numbers: Tensor) -> Tensor:
    """(n, 8, 32) of 4 bits -> (n, 128) bytes: of every two groups the first in the low halves."""
    return ((numbers[:, ::2] & 15) | (numbers[:, 1::2] << 4)).flatten(1)


def _with_least(blocks: Tensor, most: int, *, first: float, steps: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The two scales and the packed factors of a block, as bytes, and its numbers (n, 8, 32) from 0 to most."""
    groups = blocks.reshape(-1, 8, 32)
    weights = groups.square().mean(2, keepdim=True).sqrt() + groups.abs()
    scales, leasts, numbers = _search(groups, weights, most, first, steps)
    halves, factors = [], []
    for each in (scales, leasts):  # (n, 8), none below 0
        largest = each.amax(1, keepdim=True)
        factors.append((63 * inverse(largest) * each).round().clamp(max=63))
        halves.append((largest / 63).half())
    step, least = (half.float() * factor for half, factor in zip(halves, factors, strict=True))
    exact = ((groups + least[..., None]) * inverse(step[..., None])).round().clamp(0, most)
    numbers = torch.where(step[..., None] == 0, numbers, exact).to(torch.uint8)
    return (torch.cat(halves, 1).view(torch.uint8), _packed(*(each.to(torch.uint8) for each in factors))), numbers


def _packed(scales: Tensor, leasts: Tensor) -> Tensor:
    """Twice (n, 8) of 6 bits -> (n, 12) bytes: the first four whole, whose last bits are of the others."""
    (scale, scale_rest), (least, least_rest) = scales.chunk(2, 1), leasts.chunk(2, 1)
    return torch.cat(
        [
            scale | (scale_rest >> 4 << 6),
            least | (least_rest >> 4 << 6),
            (scale_rest & 15) | ((least_rest & 15) << 4),
        ],
        1,
    )


def _search(groups: Tensor, weights: Tensor, most: int, first: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scale and what is subtracted (n, 8), and the numbers (n, 8, 32), whose weighted squared error is least.

    That of `most` steps from the least number (at most 0) to the largest is compared with `steps` others, a tenth of a
    step apart from `first` steps more on, each with the best straight line through its numbers; they begin where the
    best line so far does.
    """
    least, largest = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True)
    total, offset = weights.sum(2, keepdim=True), (weights * groups).sum(2, keepdim=True)
    scale = (largest - least) / most
    numbers = ((groups - least) * inverse(scale)).round().clamp(0, most)
    error = (weights * (scale * numbers + least - groups).square()).sum(2, keepdim=True)
    for step in range(steps):
        up = (first + 0.1 * step + most) * inverse(largest - least)
        tried = ((groups - least) * up).round().clamp(0, most)
        weighted = weights * tried
        one, two = weighted.sum(2, keepdim=True), (weighted * tried).sum(2, keepdim=True)
        product = (weighted * groups).sum(2, keepdim=True)
        spread = total * two - one * one
        slope = (total * product - offset * one) / spread
        start = (two * offset - one * product) / spread
        above = start > 0
        slope, start = torch.where(above, product / two, slope), start.clamp(max=0)
        now = (weights * (slope * tried + start - groups).square()).sum(2, keepdim=True)
        better = (spread > 0) & (now < error)
        error = torch.where(better, now, error)
        scale, least = torch.where(better, slope, scale), torch.where(better, start, least)
        numbers = torch.where(better, tried, numbers)
    return scale.squeeze(2), -least.squeeze(2), numbers


def _signed(groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The scale (n, 16) and the numbers (n, 16, 16), from -most to most - 1, with the least error.

    Errors are weighted with the squared number. The largest magnitude becomes -most, or up to a tenth of nine more or
    less. A scale may be below 0.
    """
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    up = torch.where(largest.abs() < LEAST, 0.0, 1 / largest)
    weights = groups.square()
    best = scale = torch.zeros_like(largest)
    numbers = torch.zeros_like(groups)
    for step in (0, *range(-9, 0), *range(1, 10)):
        tried = (groups * (-(most + 0.1 * step) * up)).round().clamp(-most, most - 1)
        weighted = weights * tried
        product, two = (weighted * groups).sum(2, keepdim=True), (weighted * tried).sum(2, keepdim=True)
        better = (two > 0) & (product * product > best * two)
        scale = torch.where(better, product / two, scale)
        best = torch.where(better, scale * product, best)
        numbers = torch.where(better, tried, numbers)
    return scale.squeeze(2), numbers
