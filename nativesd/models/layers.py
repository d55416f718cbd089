"""Layers that the UNet, the VAE, the text encoders and ControlNets share. No files, no device decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.models.edits import Edits, Place, cross_attended, self_attended


def sinusoidal(values: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first: (N,) -> (N, width), computed in float32.

    Source: `timestep_embedding` of CompVis/latent-diffusion (ldm/modules/diffusionmodules/util.py), which the
    published configs state as flip_sin_to_cos = true, freq_shift = 0.
    """
    half = width // 2
    exponents = -math.log(max_period) * torch.arange(half, device=values.device, dtype=torch.float32) / half
    frequencies = exponents.exp()
    angles = values.float()[:, None] * frequencies[None]  # (N, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embedding(count: int, width: int) -> nn.Embedding:
    """An embedding (count, width), not initialised: on the meta device, normal_ alone would import all of dynamo."""
    return nn.Embedding(count, width, _weight=torch.empty(count, width))


class EmbeddingMLP(nn.Module):
    """The two-layer SiLU MLP behind a timestep, guidance or added-conditioning embedding.

    `condition` is the width of a second input that is projected onto the first (LCM's guidance embedding).
    """

    def __init__(self, width_in: int, width: int, condition: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)
        self.cond_proj = nn.Linear(condition, width_in, bias=False) if condition is not None else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, width_in)[, (B, condition)] -> (B, width)."""
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, with a shortcut; the time embedding is added between (UNet) or absent (VAE)."""

    def __init__(self, width_in: int, width: int, *, time_width: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, width) if time_width is not None else None
        self.norm2 = nn.GroupNorm(groups, width, eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, width_in, H, W)[, (B, time_width)] -> (B, width, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and embedding is not None:
            h = h + self.time_emb_proj(F.silu(embedding))[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = (x if self.shortcut is None else self.shortcut(x)) + h
        return out


class Upsample(nn.Conv2d):
    """Twice the height and width: nearest neighbours, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, input: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or of `size`: 2H - 1 or 2W - 1 where a downsampling had rounded up."""
        scale = 2.0 if size is None else None
        return super().forward(F.interpolate(input, size, scale, mode="nearest"))


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Multi-head scaled dot-product attention: (B, T, C), (B, S, C), (B, S, C) -> (B, T, C).

    `bias` (B, S) is added to the logits of all queries.
    """
    added = None
    if bias is not None:
        added = bias[:, None, None].expand(-1, 1, q.shape[1], -1)  # (B, S) -> (B, 1, T, S), which ONNX Runtime needs
    # (B, T, C) -> (B, H, T, D)
    q, k, v = (torch.unflatten(t, 2, (heads, t.shape[2] // heads)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=causal)
    return out.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)


def repeat_to(x: Tensor, batch: int) -> Tensor:
    """`x` as often, one after the other along the first axis, as `batch` rows need; itself where it has as many.

    Channels that are last stay so, which `Tensor.repeat` does not do.
    """
    return x if x.shape[0] == batch else torch.cat([x] * (batch // x.shape[0]))


@dataclass(frozen=True, eq=False)
class CachedContext:
    """Hidden states (B, S, context width), and what every attention makes of them, computed once.

    It is good for as long as the weights stay the same.
    """

    states: Tensor
    projected: dict[Attention, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        """That of the hidden states."""
        return self.states.shape

    def keys_values(self, layer: Attention) -> tuple[Tensor, Tensor]:
        """`layer`'s keys and values of the hidden states, each (B, S, C)."""
        if layer not in self.projected:
            self.projected[layer] = layer.keys_values(self.states)
        return self.projected[layer]


Context: TypeAlias = Tensor | CachedContext


class ImageKeys(NamedTuple):
    """What image prompts add at one cross-attention: G groups of S tokens, each with a softmax of its own.

    keys, values  (B, G, S, C); a prompt's scale is in its values
    bias          (B, G, S), added to the logits: 0 for a token, far below for what only fills a group up
    mask          (B or 1, G, T, 1): how much of a group is added at every cell; None: all of it
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None

    def found(self, q: Tensor, heads: int) -> Tensor:
        """What queries (B, T, C) find, summed over the groups: (B, T, C)."""
        groups = self.keys.shape[1]
        queries = q[:, None].expand(-1, groups, -1, -1).flatten(0, 1)  # (B, T, C) -> (B * G, T, C)
        bias = None if self.bias is None else self.bias.flatten(0, 1)  # (B, G, S) -> (B * G, S)
        each = attention(queries, self.keys.flatten(0, 1), self.values.flatten(0, 1), heads, bias=bias)
        each = torch.unflatten(each, 0, (q.shape[0], groups))  # (B * G, T, C) -> (B, G, T, C)
        return (each if self.mask is None else each * self.mask).sum(1)


class Attention(nn.Module):
    """Attention of (B, T, C) over `context` (B, S, context width), or over itself when no context is given.

    `bias` is that of the q, k and v projections; `to_out` always has one.
    """

    def __init__(self, width: int, heads: int, context: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context or width, width, bias=bias)
        self.to_v = nn.Linear(context or width, width, bias=bias)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(B, T, C)[, (B, S, context width)] -> (B, T, C)."""
        return self.over(x, *self.keys_values(x if context is None else context))

    def keys_values(self, context: Context) -> tuple[Tensor, Tensor]:
        """(B, S, context width) -> keys and values, each (B, S, C)."""
        if isinstance(context, CachedContext):
            return context.keys_values(self)
        return self.to_k(context), self.to_v(context)

    def over(self, x: Tensor, k: Tensor, v: Tensor, images: ImageKeys | None = None) -> Tensor:
        """(B, T, C) and keys and values (B, S, C) -> (B, T, C); what `images` add is added before `to_out`."""
        if images is None:
            found = self.attend(x, k, v)
        else:
            q = self.to_q(x)
            found = attention(q, k, v, self.heads) + images.found(q, self.heads)
        out: Tensor = self.to_out(found)
        return out

    def shown(self, images: ImageKeys | None) -> Attention | Shown:
        """This attention, in which what image prompts add is added to every text's."""
        return self if images is None else Shown(self, images)

    def attend(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the queries of `x` (B, T, C) find in keys and values (B, S, C): (B, T, C)."""
        return attention(self.to_q(x), k, v, self.heads)


class Shown:
    """An attention to texts beside image prompts, as edits see it (`nativesd.models.edits.Layer`)."""

    def __init__(self, attention: Attention, images: ImageKeys) -> None:
        self.heads, self.to_q, self.to_out = attention.heads, attention.to_q, attention.to_out
        self.keys_values = attention.keys_values
        self._attention, self._images = attention, images

    def over(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What `Attention.over` finds with the image prompts: (B, T, C)."""
        return self._attention.over(x, k, v, self._images)


class GEGLU(nn.Module):
    """Feed-forward with a gated exact GELU (Shazeer 2020): width -> 2 x 4 width -> width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = self.out(hidden * F.gelu(gate))
        return out


class LayerNorm(nn.LayerNorm):
    """Over the last axis. The width is that of the input, so that what is compiled for one width does for others."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return F.layer_norm(input, input.shape[-1:], self.weight, self.bias, self.eps)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each behind a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, context)
        self.norm3 = LayerNorm(width)
        self.ff = GEGLU(width)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, images: ImageKeys | None = None) -> Tensor:
        """(B, T, C) -> (n * B, T, C), for `attn2`'s keys and values (n * B, S, C) of the context.

        All n parts see the same `x` up to the attention to the context.
        """
        x = repeat_to(x + self.attn1(self.norm1(x)), k.shape[0])
        x = x + self.attn2.over(self.norm2(x), k, v, images)
        out: Tensor = x + self.ff(self.norm3(x))
        return out

    def edited(
        self, x: Tensor, k: Tensor, v: Tensor, edits: Edits, place: Place, images: ImageKeys | None = None
    ) -> Tensor:
        """`forward` with edits; never compiled."""
        if any(edit.skips(place) for edit in edits):
            return repeat_to(x, k.shape[0])
        x = x + self_attended(edits, place, self.attn1, self.norm1(x), self.attn1)
        x = repeat_to(x, k.shape[0])
        shown = self.attn2.shown(images)
        x = x + cross_attended(edits, place, shown, self.norm2(x), lambda y: shown.over(y, k, v))
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map, between two projections (1x1 convolution or linear).

    GroupNorm's eps is 1e-6 here, 1e-5 in the UNet's residual blocks (`Normalize` of CompVis ldm/modules/attention.py).
    """

    def __init__(self, width: int, heads: int, depth: int, context: int, *, linear: bool, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in: nn.Module = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, context) for _ in range(depth))
        self.proj_out: nn.Module = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.linear = linear

    def forward(
        self,
        x: Tensor,
        context: Context,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        edits: Edits = (),
        place: Place | None = None,
    ) -> Tensor:
        """(B, C, H, W), (n * B, S, context width) -> (n * B, C, H, W). Edits are told the place that this is.

        keys, values  those of image prompts, as `ImageKeys` has them, for every block: (blocks, n * B, G, S, C)
        bias, mask    (n * B, G, S) and (n * B or 1, G, H, W), for all of them
        """
        h: Tensor = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        if self.linear:
            h = self.proj_in(h)
        if mask is not None:
            mask = mask.flatten(2)[..., None]  # (B, G, H, W) -> (B, G, HW, 1)
        for number, block in enumerate(cast("Iterable[TransformerBlock]", self.blocks)):
            images, keys_values = None, block.attn2.keys_values(context)
            if keys is not None and values is not None:
                images = ImageKeys(keys[number], values[number], bias, mask)
            if edits and place is not None:
                here = replace(place, block=number, size=(x.shape[2], x.shape[3]))
                h = block.edited(h, *keys_values, edits, here, images)
            else:
                h = block(h, *keys_values, images)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).reshape(-1, *x.shape[1:])  # (n * B, HW, C) -> (n * B, C, H, W)
        if not self.linear:
            h = self.proj_out(h)
        return repeat_to(x, h.shape[0]) + h
