"""The UNet of SD1.5, SD2.x, SDXL, the SDXL refiner and their distilled kin, configured by data (`UNetConfig`).

Structure: CompVis/latent-diffusion ldm/modules/diffusionmodules/openaimodel.py (UNetModel), and for the added
conditioning Stability-AI/generative-models sgm/modules/diffusionmodules/openaimodel.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.config import Depth, UNetConfig
from nativesd.models.edits import Edits, Place, joined
from nativesd.models.layers import (
    Context,
    EmbeddingMLP,
    ResnetBlock,
    SpatialTransformer,
    Upsample,
    repeat_to,
    sinusoidal,
)
from nativesd.models.reuse import Reuse

EPS = 1e-5  # of the GroupNorms in residual blocks and before conv_out (`normalization` in the source above)


class Stage(nn.Module):
    """Residual blocks of one resolution, each followed by a transformer where its depth says so.

    `widths_in` has the input width of every block; `resample` adds a strided ("down") or a plain ("up") convolution.
    """

    def __init__(
        self,
        config: UNetConfig,
        widths_in: Sequence[int],
        width: int,
        heads: int,
        depths: Sequence[Depth],
        resample: str | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(width_in, width, time_width=config.time_width, groups=config.groups, eps=EPS)
            for width_in in widths_in
        )
        linear, groups = config.linear_projection, config.groups
        self.attentions = nn.ModuleDict(
            {
                str(j): SpatialTransformer(width, heads, depth, config.context, linear=linear, groups=groups)
                for j, depth in enumerate(depths)
                if depth is not None
            }
        )
        self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1) if resample == "down" else None
        self.upsample = Upsample(width) if resample == "up" else None

    def __len__(self) -> int:
        return len(self.resnets)

    def layer(
        self,
        j: int,
        x: Tensor,
        embedding: Tensor,
        context: Context,
        images: Sequence[Tensor | None] = (),
        edits: Edits = (),
        place: Place | None = None,
    ) -> Tensor:
        """Residual block `j` and its transformer: (B, widths_in[j], H, W) -> (B, width, H, W).

        `images` is what image prompts add in the transformer, as it takes it; (): nothing.
        """
        x = self.resnets[j](x, repeat_to(embedding, x.shape[0]))
        if str(j) in self.attentions:
            transformer, more = self.attentions[str(j)], {"edits": edits, "place": place} if edits else {}
            x = transformer(x, context, *images, **more)
        return x


@dataclass(frozen=True, eq=False)
class CachedTime:
    """Timesteps (B,), and what every network makes of them and of what else is one vector per picture, computed once.

    It is good for as long as the weights, and these vectors, stay the same.
    """

    values: Tensor
    embeddings: dict[UNetEncoder, Tensor] = field(default_factory=dict)


Time: TypeAlias = Tensor | float | CachedTime
Transformer: TypeAlias = tuple[str, int, int]
"""Where a transformer is: part ("down", "up", "mid"), level, and layer in it."""


@dataclass(frozen=True, eq=False)
class ImageContext:
    """The keys and values of image prompts for all cross-attentions: G groups of S tokens, see `ImageKeys`.

    keys, values  by width: those of the attentions of that width, in the order of `UNetConfig.cross_attentions`, (L, B,
                  G, S, width) for B rows of the context
    bias          (B, G, S), for all of them; None: all are tokens
    masks         by level that has attention: (B or 1, G, h, w), of its cells; None: everywhere
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    bias: Tensor | None = None
    masks: Mapping[int, Tensor] | None = None

    def places(self, config: UNetConfig) -> dict[Transformer, tuple[Tensor | None, ...]]:
        """What every transformer of a UNet takes."""
        out: dict[Transformer, tuple[Tensor | None, ...]] = {}
        taken = dict.fromkeys(self.keys, 0)
        for place, attentions in groupby(config.cross_attentions, key=lambda attention: attention.transformer):
            every = list(attentions)
            width = every[0].width
            own = slice(taken[width], taken[width] + len(every))
            taken[width] = own.stop
            mask = None if self.masks is None else self.masks[every[0].level]
            out[place] = (self.keys[width][own], self.values[width][own], self.bias, mask)
        return out


class UNetEncoder(nn.Module):
    """The UNet's embeddings, down path and middle: the part that a ControlNet has in common with it."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, last = config.levels[0], config.levels[-1]
        self.conv_in = nn.Conv2d(config.in_channels, first.width, 3, padding=1)
        self.time_embedding = EmbeddingMLP(first.width, config.time_width, config.guidance)
        self.add_embedding = EmbeddingMLP(config.added.width, config.time_width) if config.added is not None else None
        self.down = nn.ModuleList()
        width = first.width
        for level in config.levels:
            widths_in = [width] + [level.width] * (len(level.down) - 1)
            resample = None if level is last else "down"
            self.down.append(Stage(config, widths_in, level.width, level.heads, level.down, resample))
            width = level.width
        self.mid = Stage(config, [last.width] * len(config.mid), last.width, last.heads, config.mid, None)

    def embed(
        self,
        latents: Tensor,
        timestep: Time,
        pooled: Tensor | None,
        time_ids: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """The embedding (B, time width) of the timestep and of everything else that is one vector per picture."""
        if isinstance(timestep, CachedTime):
            if self not in timestep.embeddings:
                timestep.embeddings[self] = self.embed(latents, timestep.values, pooled, time_ids, guidance)
            return timestep.embeddings[self]
        batch, dtype, config = latents.shape[0], latents.dtype, self.config
        # a number is filled in on the device, which need not be waited for; () or (B,) -> (B,)
        times = timestep if isinstance(timestep, Tensor) else torch.full((), timestep, device=latents.device)
        times = times.to(latents.device).expand(batch)
        embedding: Tensor = self.time_embedding(
            sinusoidal(times, config.levels[0].width).to(dtype), None if guidance is None else guidance.to(dtype)
        )
        if self.add_embedding is not None and config.added is not None:
            if pooled is None or time_ids is None:
                raise ValueError("this UNet is conditioned on pooled and time_ids: pass both")
            ids = sinusoidal(time_ids.flatten(), config.added.id_width).reshape(batch, -1)  # (B * n, w) -> (B, n * w)
            embedding = embedding + self.add_embedding(torch.cat([pooled.to(dtype), ids.to(dtype)], dim=-1))
        return embedding

    def encode(
        self,
        x: Tensor,
        embedding: Tensor,
        context: Context,
        adapter: Sequence[Tensor] = (),
        images: Mapping[Transformer, Sequence[Tensor | None]] = MappingProxyType({}),
        edits: Edits = (),
        deepest: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """conv_in's output through down path and middle: (B, C, h, w), and the skips in `residual_shapes` order.

        The features of `adapter` are added as `adapter_shapes` says; `images` are those of `ImageContext.places`. With
        `deepest` it goes down to the end of that level only.
        """
        skips, features = [x], list(adapter)
        for level, stage in enumerate(cast("Iterable[Stage]", self.down)):
            for j in range(len(stage)):
                shown, place = images.get(("down", level, j), ()), Place("down", level, j)
                x = stage.layer(j, x, embedding, context, shown, edits, place)
                skips.append(x)
            if features and len(stage.attentions):
                skips[-1] = x = x + features.pop(0)
            if level == deepest:
                return x, skips
            if stage.downsample is not None:
                x = stage.downsample(x)
                skips.append(x)
            if features and not len(stage.attentions):
                skips[-1] = x = x + features.pop(0)
        for j in range(len(self.mid)):
            level = len(self.down) - 1
            shown, place = images.get(("mid", level, j), ()), Place("mid", level, j)
            x = self.mid.layer(j, x, embedding, context, shown, edits, place)
        if features:
            x = x + features.pop(0)
        return x, skips

    def residual_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """`UNetConfig.residual_shapes` of this network."""
        return self.config.residual_shapes(batch, height, width)


class UNet(UNetEncoder):
    """Noisy latents to the model's prediction, which is the noise, the velocity or the clean latents."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        first, last = config.levels[0], config.levels[-1]
        skips = [shape[1] for shape in config.residual_shapes(1, 1, 1)[:-1]]  # channels
        self.up = nn.ModuleList()
        width = last.width
        for level in reversed(config.levels):
            widths_in = []
            for _ in level.up:
                widths_in.append(width + skips.pop())
                width = level.width
            resample = None if level is first else "up"
            self.up.append(Stage(config, widths_in, width, level.heads, level.up, resample))
        self.norm_out = nn.GroupNorm(config.groups, width, EPS)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        timestep: Time,
        context: Context,
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        residuals: Sequence[Tensor] | None = None,
        adapter: Sequence[Tensor] = (),
        images: ImageContext | None = None,
        edits: Edits = (),
        reuse: Reuse | None = None,
    ) -> Tensor:
        """Predict from `latents` (B, in_channels, H, W) at `timestep` (a number, () or (B,); 0..999 or between).

        context    (B, T, context width): the text encoder's hidden states. (n * B, T, context width): n texts for every
                   one of the latents, and n * B predictions; up to the first attention to the text they are the same,
                   and computed once. Without `pooled`, `residuals` and `adapter` only
        pooled     (B, added.pooled), time_ids (B, added.ids): SDXL's added conditioning
        guidance   (B, config.guidance): LCM's embedding of the guidance scale
        residuals  tensors of `residual_shapes(B, H, W)`, in that order: added to the skips, and to the middle's output
        adapter    tensors of `config.adapter_shapes(B, H, W)`, in that order, the last one optional: a T2I-Adapter's
        images     what image prompts add, for the rows of the context
        reuse      features of the deep levels, to be left for other calls, or taken
        edits      what is done otherwise than the network was trained to (`nativesd.models.edits`)

        Returns (B, out_channels, H, W). Raises ValueError where residuals have other shapes.
        """
        embedding = self.embed(latents, timestep, pooled, time_ids, guidance)
        shown = {} if images is None else images.places(self.config)
        deepest = reuse.level if reuse is not None and reuse.ready else None
        x, skips = self.encode(self.conv_in(latents), embedding, context, adapter, shown, edits, deepest)
        if residuals is not None:
            expected = self.residual_shapes(latents.shape[0], latents.shape[2], latents.shape[3])
            found = [tuple(residual.shape) for residual in residuals]
            if found != expected:
                raise ValueError(f"control residuals of shapes {found} do not fit: this UNet takes {expected}")
            *down, middle = residuals
            skips = [skip + residual for skip, residual in zip(skips, down, strict=deepest is None)]
            x = x + middle if deepest is None else x
        for level, stage in zip(reversed(range(len(self.up))), cast("Iterable[Stage]", self.up), strict=True):
            if deepest is not None and level > deepest:
                continue
            if reuse is not None and level == reuse.level:
                x = reuse.features = reuse.features if reuse.ready and reuse.features is not None else x
            for j in range(len(stage)):
                place, skip = Place("up", level, j), repeat_to(skips.pop(), x.shape[0])
                if edits:
                    x, skip = joined(edits, place.within((x.shape[2], x.shape[3])), x, skip)
                x = torch.cat([x, skip], dim=1)
                x = stage.layer(j, x, embedding, context, shown.get(("up", level, j), ()), edits, place)
            if stage.upsample is not None:
                x = stage.upsample(x, skips[-1].shape[-2:])
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out
