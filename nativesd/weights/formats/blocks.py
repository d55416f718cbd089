"""Numbers of GGUF's quantised dtypes: blocks of small integers with their scales, into float32 and back.

The layouts are those of ggml-common.h, the formulas those of ggml-quants.c (`dequantize_row_*`, `quantize_row_*_ref`),
in the same order of operations, so that results agree to the bit; what is searched for is in `kquants`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nativesd.weights.formats.gguf import BLOCKS
from nativesd.weights.formats.kquants import inverse, to_q4_k, to_q5_k, to_q6_k


def dequantise(raw: Tensor, dtype: str) -> Tensor:
    """The numbers (n,) float32 of the bytes (m,) uint8 of a quantised tensor."""
    return FORMULAS[dtype](raw.reshape(-1, BLOCKS[dtype][1])).flatten()


def _halves(blocks: Tensor) -> Tensor:
    """(n, 2 k) bytes -> (n, k) float32 of float16."""
    return blocks.contiguous().view(torch.float16).float()


def _nibbles(blocks: Tensor) -> Tensor:
    """(n, k) bytes -> (n, 2 k): the low halves of all, then the high ones."""
    return torch.cat([blocks & 15, blocks >> 4], 1)


def _bits(blocks: Tensor) -> Tensor:
    """(n, k) bytes -> (n, 8 k): the bits of each, the lowest first."""
    return (blocks[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def _q8_0(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, :2]) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    scale, least = torch.split(_halves(blocks[:, :4]), 1, 1)
    return scale * _nibbles(blocks[:, 4:]).float() + least


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return _halves(blocks[:, :2]) * (numbers.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    scale, least = torch.split(_halves(blocks[:, :4]), 1, 1)
    return scale * (_nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4).float() + least


def _scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the least value (n, 8, 1) of every group of 32: two halves, and six bits for each in 12 bytes."""
    scale, least = torch.split(_halves(blocks[:, :4]), 1, 1)
    low, high, rest = torch.split(blocks[:, 4:16], 4, 1)
    factors = torch.cat([low & 63, rest & 15 | low >> 2 & 48], 1)
    offsets = torch.cat([high & 63, rest >> 4 | high >> 2 & 48], 1)
    return (scale * factors.float())[:, :, None], (least * offsets.float())[:, :, None]


def _by_groups(blocks: Tensor) -> Tensor:
    """(n, 32 k) bytes -> (n, 2 k, 32): of every 32 bytes the low halves, then the high ones."""
    groups = blocks.reshape(len(blocks), -1, 32)
    return torch.stack([groups & 15, groups >> 4], 2).flatten(1, 2)


def _q4_k(blocks: Tensor) -> Tensor:
    scale, least = _scales(blocks)
    return (scale * _by_groups(blocks[:, 16:]).float() - least).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, least = _scales(blocks)
    fifth = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # (n, 8, 32)
    return (scale * (_by_groups(blocks[:, 48:]) | fifth << 4).float() - least).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    four = torch.stack([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    two = high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3  # (n, 2, 4, 32)
    numbers = (four | two << 4).view(torch.int8) - 32
    scale = _halves(blocks[:, 208:]) * blocks[:, 192:208].contiguous().view(torch.int8).float()  # (n, 16)
    return (scale[:, :, None] * numbers.reshape(-1, 16, 16).float()).flatten(1)


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}  # fmt: skip
"""Each from (n, bytes of a block) to (n, numbers of a block)."""


def quantise(numbers: Tensor, dtype: str) -> Tensor:
    """The bytes (m,) uint8 of float32 numbers, whole blocks of them, in a dtype of `WRITERS`."""
    return WRITERS[dtype](numbers.reshape(-1, BLOCKS[dtype][0])).flatten()


def _as_bytes(*parts: Tensor) -> Tensor:
    """Halves (n, k) of float32 scales, and bytes, one after the other."""
    halved = [part.half() if part.dtype == torch.float32 else part for part in parts]
    return torch.cat([part.contiguous().view(torch.uint8) for part in halved], 1)


def _largest(blocks: Tensor) -> Tensor:
    """The number (n, 1) of the largest magnitude of every block, with its sign."""
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True))


def _to_q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * inverse(scale)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    rounded = whole + (2 * (magnitude - whole)).floor()  # halves away from zero, as roundf
    return _as_bytes(scale, (scaled.sign() * rounded).to(torch.int8))


def _pairs(numbers: Tensor) -> Tensor:
    """(n, 32) of 4 bits -> (n, 16) bytes: the first half in the low bits."""
    low, high = numbers.chunk(2, 1)
    return low & 15 | high << 4


def _fifth(numbers: Tensor) -> Tensor:
    """(n, 32) of 5 bits -> (n, 4) bytes of their highest bits, the first one lowest."""
    bits = (numbers >> 4).reshape(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(2, dtype=torch.uint8)


def _signed(blocks: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The scale, by which the largest magnitude is -most, and the numbers from 0 to 2 most - 1."""
    scale = _largest(blocks) / -most
    numbers = (blocks * inverse(scale) + (most + 0.5)).to(torch.uint8)
    return scale, numbers.clamp(max=2 * most - 1)


def _from_least(blocks: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scale, the least number, and the numbers above it from 0 to most."""
    least, largest = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = (largest - least) / most
    numbers = ((blocks - least) * inverse(scale) + 0.5).to(torch.uint8)
    return scale, least, numbers.clamp(max=most)


def _to_q4_0(blocks: Tensor) -> Tensor:
    scale, numbers = _signed(blocks, 8)
    return _as_bytes(scale, _pairs(numbers))


def _to_q4_1(blocks: Tensor) -> Tensor:
    scale, least, numbers = _from_least(blocks, 15)
    return _as_bytes(scale, least, _pairs(numbers))


def _to_q5_0(blocks: Tensor) -> Tensor:
    scale, numbers = _signed(blocks, 16)
    return _as_bytes(scale, _fifth(numbers), _pairs(numbers))


def _to_q5_1(blocks: Tensor) -> Tensor:
    scale, least, numbers = _from_least(blocks, 31)
    return _as_bytes(scale, least, _fifth(numbers), _pairs(numbers))


WRITERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _to_q8_0, "Q6_K": to_q6_k, "Q5_K": to_q5_k, "Q5_0": _to_q5_0, "Q5_1": _to_q5_1, "Q4_K": to_q4_k,
    "Q4_0": _to_q4_0, "Q4_1": _to_q4_1,
}  # fmt: skip
"""Each from (n, numbers of a block) to (n, bytes of a block)."""
INSTEAD = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}
"""What rows get that are whole blocks of 32 and not of 256, as llama.cpp writes them (llama-quant.cpp)."""
