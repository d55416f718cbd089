"""The layers once more, as oneDNN's fused operators compute them on a CPU: float32 and bfloat16, without gradients.

Every class here has the state and the results of the one it inherits from, so that a loaded module changes over and
back by its `__class__` (`nativesd.tuning`). Nothing is there twice, and all weights may be read and written to at any
time, though they are packed while they are used. Other dtypes and devices take the plain path, and so do gradients.

torch.ops.mkldnn is what torch.compile lowers linears and convolutions to (pytorch/pytorch,
aten/src/ATen/native/mkldnn/Linear.cpp, `mkldnn_linear_pointwise` and `mkldnn_linear_pointwise_binary`).
"""

from __future__ import annotations

import math
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.models.layers import GEGLU, Attention, ResnetBlock, attention
from nativesd.models.vae import PixelAttention

DTYPES = (torch.bfloat16, torch.float32)
BLOCK_BYTES = {torch.bfloat16: 2 << 20, torch.float32: 4 << 20}  # of softmax weights: 256 queries of 4096 keys
FEWEST = 512  # queries and keys, below which the calls for every head cost more than they gain
LARGE = 16 << 20  # bytes of a convolution's weights in float32, above which packing them pays
TOKENS = 1024  # of which GEGLU keeps the hidden states: of 819, oneDNN's products take a tenth longer each
# What weights are packed for: pictures, height and width, and tokens. The order that oneDNN prefers for 1x1
# convolutions of 4x4 cells takes 50 times as long at 8x8, while that for 64x64 is within a few percent of the best at
# 8x8 as well.
PICTURES, HEIGHT, WIDTH = 2, 64, 64
ROWS = 2048
SAMPLE = 64  # keys, at least, and one of every 16, from which a query's largest logit is guessed
# how far below zero logits are shifted: the largest may be 50 above its guess, and e^-17 of it is a normal number still
SHIFT = 70.0
# exp(x) is sigmoid(x) / (1 - sigmoid(x)): the most that a query's weights may add up to for these to be the same
MOST = {torch.bfloat16: math.exp(-8), torch.float32: math.exp(-16)}

PACKING = RLock()  # several threads may use one model


def applies(x: Tensor) -> bool:
    """Whether the operators here take `x`."""
    return x.dtype in DTYPES and x.device.type == "cpu" and not torch.is_grad_enabled()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(x weight^T + bias), the activation ("none", "gelu", "sigmoid") in float32: (..., I) -> (..., O)."""
    algorithm = "none" if activation == "gelu" else ""  # the exact gelu
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return out


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T) v by blocks of queries, each with all keys: (B, T, C), (B, S, C), (B, S, C) -> (B, T, C).

    The queries are scaled already. The exponentials are computed in the matrix product's own epilogue, on its float32
    sums: as sigmoid(s - c) for logits s far below c, which is exp(s - c). Only differences count in a softmax, so any c
    will do that is large enough and not much too large: a query's largest logit for some of the keys, and `SHIFT`. It
    is one more component of the query. The few queries for which the guess was wrong are computed once more.
    """
    width = q.shape[2] // heads
    block = max(BLOCK_BYTES[k.dtype] // (k.shape[1] * k.element_size()), 1)
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            _attend_head(q[i, :, part], k[i, :, part], v[i, :, part], out[i, :, part], block)
    return out


def _attend_head(q: Tensor, k: Tensor, v: Tensor, out: Tensor, block: int) -> None:
    """One head of one picture: (T, D), (S, D), (S, D) into `out` (T, D)."""
    sample = k[:: min(max(k.shape[0] // SAMPLE, 1), 16)]
    shifts = (q @ sample.T).amax(dim=1, keepdim=True) + SHIFT
    q = torch.cat([q, -shifts], dim=1)  # (T, D) -> (T, D + 1)
    k = torch.cat([k, k.new_ones(k.shape[0], 1)], dim=1)
    v = v.T.contiguous()  # (S, D) -> (D, S)
    for queries, result in zip(torch.split(q, block), torch.split(out, block), strict=True):
        weights = linear(queries, k, activation="sigmoid")  # (block, D + 1), (S, D + 1) -> (block, S)
        total = weights.sum(dim=1, keepdim=True, dtype=torch.float32)
        torch.div(_weighted(weights, v), total, out=result)
        if not total.max().item() < MOST[q.dtype]:  # so it is where something is not finite
            wrong = (~(total < MOST[q.dtype])).flatten().nonzero().flatten()
            logits = queries[wrong].float() @ k.float().T
            result[wrong] = (torch.softmax(logits, dim=1) @ v.float().T).to(out.dtype)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    """weights v^T, (T, S), (D, S) -> (T, D) float32.

    In bfloat16 the product is rounded, and so is its quotient by the weights' sum, where torch's attention rounds once.
    So what the rounding took away is computed as well, by the same product.
    """
    rounded = linear(weights, v)
    if rounded.dtype == torch.float32:
        return rounded
    rest = torch.ops.mkldnn._linear_pointwise.binary(weights, rounded.neg(), v, None, "add")
    return rounded.float().add_(rest)


def attend(module: Attention, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Attention.attend`, blockwise where that is faster."""
    if not applies(x) or min(x.shape[1], k.shape[1]) < FEWEST:
        return attention(module.to_q(x), k, v, module.heads)
    width = x.shape[2] // module.heads
    scale = x.new_tensor(width**-0.5).expand(x.shape)  # times the float32 sums: the product is rounded once
    weight = module.to_q.pack()[0] if isinstance(module.to_q, Packed) else module.to_q.weight
    q = torch.ops.mkldnn._linear_pointwise.binary(x, scale, weight, module.to_q.bias, "mul")
    return blockwise_attention(q, k, v, module.heads)


class FastAttention(Attention):
    """Attention with few reads and writes of its weights."""

    attend = attend


class FastPixelAttention(PixelAttention):
    """The VAE's attention with few reads and writes of its weights."""

    attend = attend


class Packed(nn.Module):
    """A layer whose `weight` oneDNN need not reorder into new memory at every call.

    It is packed at the first call. From then on the parameter is a single NaN in its shape, which cannot be written to,
    until someone asks for it, by its name or through `parameters` or `state_dict`: it is the same object then, with its
    own values, and packed again at the next call, which another thread must not make meanwhile.
    """

    def reorder(self, weight: Tensor) -> Tensor:
        """`weight` in oneDNN's order: one for inputs of any size."""
        raise NotImplementedError

    def pack(self, parts: int = 1) -> tuple[Tensor, ...]:
        """The packed weights, in so many `parts` along their first axis."""
        weight = self.__dict__["_parameters"]["weight"]
        with PACKING, torch.inference_mode(weight.is_inference()):  # the mode that it was made in
            packed: tuple[Tensor, ...] = self.__dict__.get("packed", ())
            if len(packed) != parts:
                self.unpack()
                packed = tuple(self.reorder(part) for part in weight.detach().chunk(parts))
                self.packed, weight.data = packed, weight.new_tensor(math.nan).expand(weight.shape)
        return packed

    def unpack(self) -> None:
        """Have the weights in their parameter."""
        weight = self.__dict__["_parameters"]["weight"]
        with PACKING, torch.inference_mode(weight.is_inference()):
            packed: tuple[Tensor, ...] = self.__dict__.pop("packed", ())
            if packed:
                weight.data = torch.cat([part.to_dense() for part in packed])

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:  # type: ignore[override]  # what nn.Module looks at
        self.unpack()
        parameters: dict[str, nn.Parameter | None] = self.__dict__["_parameters"]
        return parameters

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.unpack()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return self.__dict__


class FastLinear(Packed, nn.Linear):
    """A linear layer that leaves out torch's choice of a math library."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(input, self.pack()[0], self.bias) if applies(input) else super().forward(input)

    def reorder(self, weight: Tensor) -> Tensor:
        """`Packed.reorder`."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return packed


class FastConv2d(Packed, nn.Conv2d):
    """A convolution with the channels of feature maps last in bfloat16, and where they were in float32.

    Of maps with channels last torch's group norm takes the variance in float32 for the mean square less the squared
    mean, summed up one by one (pytorch/pytorch, aten/src/ATen/native/cpu/group_norm_kernel.cpp), which loses 1e-4 where
    the mean is ten times the deviation. In bfloat16 the rounding of the values is always more than that.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H', W')."""
        small = self.out_channels * self.in_channels // self.groups * math.prod(self.kernel_size) * 4 <= LARGE
        if not applies(input) or (small and input.dtype == torch.float32):
            return super().forward(input)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            input.contiguous(memory_format=torch.channels_last), self.pack()[0], self.bias,
            self.padding, self.stride, self.dilation, self.groups, "none", [], "",
        )  # fmt: skip
        return out.contiguous() if input.dtype == torch.float32 else out

    def reorder(self, weight: Tensor) -> Tensor:
        """`Packed.reorder`."""
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, (PICTURES, self.in_channels, HEIGHT, WIDTH)
        )
        return packed


class FastGEGLU(GEGLU):
    """GEGLU whose gelu and product are computed as the matrix products are written, for some tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if not applies(x) or not isinstance(self.proj, FastLinear):
            return super().forward(x)
        (hidden, gate), (hidden_bias, gate_bias) = self.proj.pack(2), self.proj.bias.chunk(2)
        out = torch.empty_like(x)
        for tokens, result in zip(
            torch.split(x.flatten(0, -2), TOKENS), torch.split(out.flatten(0, -2), TOKENS), strict=True
        ):
            gated = torch.ops.mkldnn._linear_pointwise.binary(
                tokens, linear(tokens, gate, gate_bias, "gelu"), hidden, hidden_bias, "mul"
            )
            result.copy_(self.out(gated))
        return out


class FastResnetBlock(ResnetBlock):
    """A residual block that reuses its own memory."""

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, width_in, H, W)[, (B, time_width)] -> (B, width, H, W)."""
        if not applies(x):
            return super().forward(x, embedding)
        h: Tensor = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time_emb_proj is not None and embedding is not None:
            h += self.time_emb_proj(F.silu(embedding))[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        h += x if self.shortcut is None else self.shortcut(x)
        return h
