"""The layers once more, as oneDNN's fused operators compute them on a CPU: float32 and bfloat16, without gradients.

Every class here has the state and the results of the one it inherits from, so that a loaded module changes over and
back by its `__class__` (`nativesd.tuning.tune`). All weights may be read and written to at any time, though they are
packed while they are used; only those of upsampling convolutions in float32 are there twice then. Other dtypes and
devices take the plain path, and so do gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.models.layers import GEGLU, Attention, ResnetBlock, Upsample, attention
from nativesd.models.vae import PixelAttention
from nativesd.tuning.int8 import Int8

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
CELLS = 4096  # that are upsampled at a time: the products for so many stay in the caches
KERNEL = 9  # products of an upsampling convolution
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


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, exact: bool = True) -> Tensor:
    """softmax(q k^T) v by blocks of queries, each with all keys: (B, T, C), (B, S, C), (B, S, C) -> (B, T, C).

    The queries are scaled already. The exponentials are computed in the matrix product's own epilogue, on its float32
    sums: as sigmoid(s - c) for logits s far below c, which is exp(s - c). Only differences count in a softmax, so any c
    will do that is large enough and not much too large: a query's largest logit for some of the keys, and `SHIFT`. It
    is one more component of the query. The few queries for which the guess was wrong are computed once more.

    exact  round once, as torch's attention does, and not the weighted sums and their quotients each
    """
    width = q.shape[2] // heads
    block = max(BLOCK_BYTES[k.dtype] // (k.shape[1] * k.element_size()), 1)
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            _attend_head(q[i, :, part], k[i, :, part], v[i, :, part], out[i, :, part], block, exact=exact)
    return out


def _attend_head(q: Tensor, k: Tensor, v: Tensor, out: Tensor, block: int, *, exact: bool) -> None:
    """One head of one picture: (T, D), (S, D), (S, D) into `out` (T, D)."""
    sample = k[:: min(max(k.shape[0] // SAMPLE, 1), 16)]
    shifts = (q @ sample.T).amax(dim=1, keepdim=True) + SHIFT
    q = torch.cat([q, -shifts], dim=1)  # (T, D) -> (T, D + 1)
    k = torch.cat([k, k.new_ones(k.shape[0], 1)], dim=1)
    v = v.T.contiguous()  # (S, D) -> (D, S)
    for queries, result in zip(torch.split(q, block), torch.split(out, block), strict=True):
        weights = linear(queries, k, activation="sigmoid")  # (block, D + 1), (S, D + 1) -> (block, S)
        total = weights.sum(dim=1, keepdim=True, dtype=torch.float32)
        torch.div(_weighted(weights, v) if exact else linear(weights, v), total, out=result)
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
    if not applies(x):
        return attention(module.to_q(x), k, v, module.heads)
    if isinstance(module.to_q, Int8):
        return attend_queries(module.to_q(x), k, v, module.heads)
    weight = module.to_q.pack()[0] if isinstance(module.to_q, Packed) else module.to_q.weight
    run = torch.ops.nativesd.attend if torch.compiler.is_compiling() else _attend
    out: Tensor = run(x, k, v, weight, module.to_q.bias, module.heads)
    return out


def attend_queries(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`attend` for projections by products of 8 bits, (B, T, C), (B, S, C), (B, S, C) -> (B, T, C).

    Beside what those round, another rounding of the sums is nothing, and so their third product is left out.
    """
    if min(q.shape[1], k.shape[1]) < FEWEST:
        return attention(q, k, v, heads)
    return blockwise_attention(q * (q.shape[2] // heads) ** -0.5, k, v, heads, exact=False)


def _attend(x: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """(B, T, C), (B, S, C), (B, S, C) -> (B, T, C), with the projection to queries, `weight` (C, C) and `bias` (C,)."""
    if min(x.shape[1], k.shape[1]) < FEWEST:
        return attention((linear if weight.is_mkldnn else F.linear)(x, weight, bias), k, v, heads)
    scale = x.new_tensor((x.shape[2] // heads) ** -0.5).expand(x.shape)  # times float32 sums: they are rounded once
    q = torch.ops.mkldnn._linear_pointwise.binary(x, scale, weight, bias, "mul")
    return blockwise_attention(q, k, v, heads)


@torch.library.custom_op("nativesd::attend", mutates_args=())
def _opaque(x: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """`_attend` for torch.compile, which need not know what is in it."""
    return _attend(x, k, v, weight, bias, heads).contiguous()


@_opaque.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class FastAttention(Attention):
    """Attention with few reads and writes of its weights."""

    attend = attend


class FastPixelAttention(PixelAttention):
    """The VAE's attention with few reads and writes of its weights."""

    attend = attend


class Packed(nn.Module, ABC):
    """A layer whose `weight` oneDNN need not reorder into new memory at every call.

    It is packed at the first call. From then on the parameter is a single NaN (0 in 8 bits) in its shape, which cannot
    be written to, until someone asks for it, by its name or through `parameters` or `state_dict`: it is the same object
    then, with its own values, and packed again at the next call, which another thread must not make meanwhile.
    """

    @abstractmethod
    def reorder(self, weight: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`weight` in oneDNN's order: one for inputs of any size."""

    def restore(self, packed: tuple[Tensor, ...]) -> Tensor:
        """The weight that `reorder` was given."""
        return torch.cat([part.to_dense() for part in packed])

    def pack(self, parts: int = 1) -> tuple[Tensor, ...]:
        """The packed weights, in so many `parts`."""
        weight = self.__dict__["_parameters"]["weight"]
        with PACKING, torch.inference_mode(weight.is_inference()):  # the mode that it was made in
            packed: tuple[Tensor, ...] = self.__dict__.get("packed", ())
            if len(packed) != parts:
                self.unpack()
                packed = self.reorder(weight.detach(), parts)
                nothing = math.nan if weight.is_floating_point() else 0
                self.packed, weight.data = packed, weight.new_tensor(nothing).expand(weight.shape)
        return packed

    def unpack(self) -> None:
        """Have the weights in their parameter."""
        weight = self.__dict__["_parameters"]["weight"]
        with PACKING, torch.inference_mode(weight.is_inference()):
            packed: tuple[Tensor, ...] = self.__dict__.pop("packed", ())
            if packed:
                weight.data = self.restore(packed)

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

    def reorder(self, weight: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`Packed.reorder`, in parts along the first axis."""
        return tuple(torch.ops.mkldnn._reorder_linear_weight(part, ROWS) for part in weight.chunk(parts))


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

    def reorder(self, weight: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`Packed.reorder`, in one part."""
        size = (PICTURES, self.in_channels, HEIGHT, WIDTH)
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, size
        )
        return (packed,)


class FastUpsample(Upsample, FastConv2d):
    """An upsampling convolution that, in float32, multiplies for every cell nine times in place of 36.

    Upsampled, neighbours are equal. Along one axis, a kernel (a, b, c) makes of the cells x two pixels each,

        a x[i-1] + (b + c) x[i] = (a + b + c) x[i] + a (x[i-1] - x[i]),
        (a + b) x[i] + c x[i+1] = (a + b + c) x[i] - c (x[i] - x[i+1]),

    so that three products do for two pixels, with the kernel (a, a + b + c, -c) and differences of cells. Along both,
    nine do for four. In bfloat16 the differences and sums would have to be rounded, and the error would be thrice as
    large.
    """

    def forward(self, input: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or of `size`."""
        pictures, _, height, width = input.shape
        doubled = (2 * height, 2 * width)
        if not applies(input) or input.dtype != torch.float32 or tuple(size or doubled) != doubled:
            return super().forward(input, size)
        # (B, C, H, W) -> (H + 2, B, W + 2, C): some rows of all pictures lie in one piece
        cells = F.pad(input, (1, 1, 1, 1)).permute(2, 0, 3, 1).contiguous()
        out = input.new_empty(2 * height, pictures, 2 * width, self.out_channels)
        rows = max(CELLS // (pictures * width), 1)
        for start in range(0, height, rows):
            self._double(cells[start : start + rows + 2], out[2 * start : 2 * (start + rows)])
        return out.permute(1, 3, 0, 2).contiguous()  # (2H, B, 2W, C) -> (B, C, 2H, 2W)

    def _double(self, cells: Tensor, out: Tensor) -> None:
        """Some rows of cells, with one more on every side (H + 2, B, W + 2, C), into pixels `out` (2H, B, 2W, C)."""
        _, *kernel = self.pack(1 + KERNEL)
        down = cells[:-1] - cells[1:]  # (H + 1, B, W + 2, C)
        right, across = (x[:, :, :-1] - x[:, :, 1:] for x in (cells[1:-1], down))  # (H or H + 1, B, W + 1, C)
        cells, down = cells[1:-1, :, 1:-1].contiguous(), down[:, :, 1:-1].contiguous()
        middle = linear(cells, kernel[4], self.bias)
        left, right = linear(right, kernel[3])[:, :, :-1], linear(right, kernel[5])[:, :, 1:]
        for odd, part in enumerate((slice(None, -1), slice(1, None))):
            row = kernel[6:] if odd else kernel[:3]
            own = middle + linear(down[part], row[1])
            torch.add(own + left, linear(across[part], row[0])[:, :, :-1], out=out[odd::2, :, ::2])
            torch.add(own + right, linear(across[part], row[2])[:, :, 1:], out=out[odd::2, :, 1::2])

    def reorder(self, weight: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`Packed.reorder`: in one part, or the weight itself and the kernel of products."""
        if parts == 1:
            return super().reorder(weight, parts)
        columns = torch.stack([weight[:, :, 0], weight.sum(dim=2), -weight[:, :, 2]])  # (3, O, I, 3)
        kernel = torch.stack([columns[..., 0], columns.sum(dim=3), -columns[..., 2]], dim=1)  # (3, 3, O, I)
        return weight, *(torch.ops.mkldnn._reorder_linear_weight(part, CELLS) for part in kernel.flatten(0, 1))

    def restore(self, packed: tuple[Tensor, ...]) -> Tensor:
        """`Packed.restore`."""
        return super().restore(packed) if len(packed) == 1 else packed[0]


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
