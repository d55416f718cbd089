"""The layers of `nativesd.tuning.int8` as a CPU with VNNI computes them: products of 8 bits, summed up in 32.

Inputs are rounded to 8 bits at every call: of a linear layer each row in steps of its own, of a convolution each
picture, so that a picture does not depend on what else is in its batch. oneDNN multiplies unsigned numbers with signed
ones (of two signed ones it has a plain loop), so that 128 is added to inputs, and taken off again by the sums of the
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nativesd.models.layers import Context
from nativesd.tuning.fast import HEIGHT, PICTURES, WIDTH, FastAttention, Packed, applies, attend_queries
from nativesd.tuning.int8 import Int8Attention, Int8Conv2d, Int8GEGLU, Int8Linear, Int8Upsample

ZERO = 128
"""What 0 is among unsigned numbers."""
MOST = 126
"""Steps of the largest input: bfloat16 may round one up to 127."""
MASKS = {torch.bfloat16: (torch.int16, 0x7FFF), torch.float32: (torch.int32, 0x7FFFFFFF)}
"""Floats without their signs have the order of integers, which are compared eight times as fast."""
LOWEST, BELOW = 0.28, 16
"""A SiLU is nowhere below -0.2785, which takes 16 of 255 steps at most."""
TOKENS = 512
"""Of which GEGLU keeps the hidden states."""


@dataclass(frozen=True)
class Rows:
    """Rows (M, K) of unsigned 8 bits, the step (M, 1) of each, and the shape that they had."""

    numbers: Tensor
    steps: Tensor
    shape: torch.Size


def largest(x: Tensor) -> Tensor:
    """The largest magnitude (M, 1) of rows (M, K), at least the smallest normal number."""
    kind, mask = MASKS[x.dtype]
    return (x.view(kind) & mask).amax(dim=1, keepdim=True).view(x.dtype).clamp_(min=torch.finfo(torch.float32).tiny)


def to_rows(x: Tensor) -> Rows:
    """(..., K) bfloat16 or float32, each row rounded to steps of its own."""
    rows = x.reshape(-1, x.shape[-1])
    up = MOST / largest(rows)
    numbers = (rows * up).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO)
    return Rows(numbers, up.reciprocal_(), x.shape)


def product(rows: Rows, weight: Tensor, steps: Tensor, bias: Tensor | None) -> Tensor:
    """rows weight^T + bias: (M, K) and the packed (K, N) with its steps (N,) -> (M, N)."""
    zeros = torch.zeros_like(steps, dtype=torch.int32)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows.numbers, 1.0, ZERO, weight, steps, zeros, None, 1.0, 0, rows.steps.dtype, "none", [], ""
    )
    return out.mul_(rows.steps) if bias is None else torch.addcmul(bias, out, rows.steps)


class FastInt8Linear(Packed, Int8Linear):
    """A linear layer by products of 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return self.of(to_rows(input)) if applies(input) else super().forward(input)

    def of(self, rows: Rows) -> Tensor:
        """`forward`, of an input that has been rounded."""
        return product(rows, self.pack()[0], self.steps, self.bias).reshape(*rows.shape[:-1], -1)

    def reorder(self, weight: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`Packed.reorder`, in parts along the first axis."""
        return tuple(torch.ops.onednn.qlinear_prepack(part, None) for part in weight.chunk(parts))

    def restore(self, packed: tuple[Tensor, ...]) -> Tensor:
        """`Packed.restore`."""
        return torch.cat([part.to_dense().T for part in packed])


class FastInt8Conv2d(Packed, Int8Conv2d):
    """A convolution by products of 8 bits, with the channels of feature maps last in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        if not applies(input):
            return super().forward(input)
        numbers, steps, zero = self.rounded(input.permute(0, 2, 3, 1).contiguous())
        weight, sums = self.pack(2)
        out = torch.ops.onednn.qconv2d_pointwise(
            numbers.permute(0, 3, 1, 2), 1.0, 0, weight, self.steps, torch.zeros_like(self.steps, dtype=torch.int32),
            sums * -zero, self.stride, (0, 0), self.dilation, self.groups, 1.0, 0, input.dtype, "none", [], "",
        )  # fmt: skip
        steps = steps[:, :, None, None]  # (B, 1) -> (B, 1, 1, 1)
        out = out.mul_(steps) if self.bias is None else torch.addcmul(self.bias[:, None, None], out, steps)
        return out.contiguous() if input.dtype == torch.float32 else out

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """(B, H, W, I) in unsigned 8 bits with its padding, the step (B, 1) of each picture, and what 0 is.

        oneDNN's own padding with another number than 0 takes three times as long for small maps.
        """
        pictures, height, width, channels = x.shape
        (down, right), flat = cast("tuple[int, int]", self.padding), x.flatten(1)
        most = largest(flat)
        if self.after_silu:
            zero, steps = BELOW + 1, torch.maximum(most / (MOST + ZERO - BELOW - 1), most.new_tensor(LOWEST / BELOW))
            numbers = (flat * steps.reciprocal()).sub_(ZERO - zero).round_()
        else:
            zero, steps = ZERO, most / MOST
            numbers = (flat * steps.reciprocal()).round_()
        out = x.new_full((pictures, height + 2 * down, width + 2 * right, channels), zero - ZERO, dtype=torch.int8)
        out[:, down : down + height, right : right + width] = numbers.view(x.shape)
        return out.view(torch.uint8).bitwise_xor_(ZERO), steps, zero

    def reorder(self, weight: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`Packed.reorder`: the weight, and the sum (O,) of every output channel of what it stands for."""
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            weight, self.steps, 1.0, 0, self.stride, (0, 0), self.dilation, self.groups,
            (PICTURES, self.in_channels, HEIGHT, WIDTH),
        )  # fmt: skip
        return packed, weight.sum((1, 2, 3)) * self.steps

    def restore(self, packed: tuple[Tensor, ...]) -> Tensor:
        """`Packed.restore`."""
        return packed[0].to_dense()


class FastInt8Upsample(Int8Upsample, FastInt8Conv2d):
    """An upsampling convolution by products of 8 bits."""


class FastInt8Attention(FastAttention, Int8Attention):
    """Attention that rounds what it attends to itself once for the three projections."""

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(B, T, C)[, (B, S, context width)] -> (B, T, C)."""
        if context is not None or not applies(x):
            return super().forward(x, context)
        rows = to_rows(x)
        q, k, v = (cast("FastInt8Linear", layer).of(rows) for layer in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out(attend_queries(q, k, v, self.heads))
        return out


class FastInt8GEGLU(Int8GEGLU):
    """GEGLU for some tokens at a time, whose hidden states stay in the processor's caches."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if not applies(x):
            return super().forward(x)
        proj, out = cast("FastInt8Linear", self.proj), torch.empty_like(x)
        weights = tuple(zip(proj.pack(2), proj.steps.chunk(2), proj.bias.chunk(2), strict=True))
        for tokens, result in zip(
            torch.split(x.flatten(0, -2), TOKENS), torch.split(out.flatten(0, -2), TOKENS), strict=True
        ):
            rows = to_rows(tokens)
            hidden, gate = (product(rows, *each) for each in weights)
            result.copy_(self.out(hidden.mul_(F.gelu(gate))))
        return out
