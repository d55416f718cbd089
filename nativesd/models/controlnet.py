"""ControlNet and ControlNetUnion: the UNet's encoder with a hint added, whose skips become control residuals.

Structure: lllyasviel/ControlNet cldm/cldm.py (ControlNet), and for several kinds of hint in one network
xinsir6/ControlNetPlus models/controlnet_union.py (ControlNetModel_Union).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.config import ControlNetConfig
from nativesd.models.clip_layers import CLIPLayer
from nativesd.models.layers import Context, EmbeddingMLP, embedding, sinusoidal
from nativesd.models.unet import Time, UNetEncoder


class HintEncoder(nn.Module):
    """A hint's picture to features of the latents' size, by strided convolutions."""

    def __init__(self, channels: int, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width_in, width_out in pairwise(widths):
            self.blocks.append(nn.Conv2d(width_in, width_in, 3, padding=1))
            self.blocks.append(nn.Conv2d(width_in, width_out, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], width, 3, padding=1)

    def forward(self, hint: Tensor) -> Tensor:
        """(B, channels, 8h, 8w) -> (B, width, h, w), for four widths."""
        x = F.silu(self.conv_in(hint))
        for block in self.blocks:
            x = F.silu(block(x))
        out: Tensor = self.conv_out(x)
        return out


class ControlEncoder(UNetEncoder):
    """The UNet's encoder, with a hint's encoder before it and a 1x1 convolution behind every skip and the middle."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.control_config = config
        *down, mid = (shape[1] for shape in config.unet.residual_shapes(1, 1, 1))  # channels
        self.hint = HintEncoder(config.hint_channels, config.hint_widths, config.unet.levels[0].width)
        self.control_down = nn.ModuleList(nn.Conv2d(width, width, 1) for width in down)
        self.control_mid = nn.Conv2d(mid, mid, 1)

    def features(self, hint: Tensor, x: Tensor) -> Tensor:
        """A hint's features, of the shape of conv_in's output `x`. Raises ValueError where the hint gives another."""
        features: Tensor = self.hint(hint)
        if features.shape != x.shape:
            raise ValueError(
                f"a hint of shape {tuple(hint.shape)} does not fit: it gives features of shape "
                f"{tuple(features.shape)}, and the latents need {tuple(x.shape)}"
            )
        return features

    def residuals(self, x: Tensor, embedding: Tensor, context: Context, scale: float | Tensor) -> list[Tensor]:
        """conv_in's output with the hint added -> `scale` times the residuals, in `residual_shapes` order."""
        middle, skips = self.encode(x, embedding, context)
        down = [conv(skip) for conv, skip in zip(self.control_down, skips, strict=True)]
        residuals = [residual * scale for residual in (*down, self.control_mid(middle))]
        if self.control_config.pooled:
            residuals = [residual.mean((2, 3), keepdim=True).expand_as(residual) for residual in residuals]
        return residuals


class ControlNet(ControlEncoder):
    """Noisy latents and one hint to control residuals."""

    def forward(
        self,
        latents: Tensor,
        timestep: Time,
        context: Context,
        hint: Tensor,
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> list[Tensor]:
        """The residuals that steer a UNet towards `hint`; the other inputs are those of the UNet.

        hint   (B, hint_channels, 8H, 8W) in [0, 1], for latents of H x W
        scale  factor on every residual

        Returns tensors of `residual_shapes(B, H, W)`, as the UNet takes them. Raises ValueError where the hint does
        not fit the latents.
        """
        embedding = self.embed(latents, timestep, pooled, time_ids, None)
        x: Tensor = self.conv_in(latents)
        return self.residuals(x + self.features(hint, x), embedding, context, scale)


class ControlNetUnion(ControlEncoder):
    """Noisy latents and hints of one kind or several to control residuals. Raises ValueError without `config.union`."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        if config.union is None:
            raise ValueError("this configuration is that of a ControlNet for one kind of hint")
        union, width = config.union, config.unet.levels[0].width
        self.union = union
        self.task_embedding = embedding(union.kinds, width)
        self.transformer = nn.ModuleList(
            CLIPLayer(width, union.heads, 4 * width, "quick_gelu", causal=False) for _ in range(union.layers)
        )
        self.shift = nn.Linear(width, width)
        self.kinds_embedding = EmbeddingMLP(union.kinds * union.id_width, config.unet.time_width)

    def forward(
        self,
        latents: Tensor,
        timestep: Time,
        context: Context,
        hints: Sequence[Tensor],
        kinds: Sequence[int],
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        scale: float | Sequence[float] = 1.0,
    ) -> list[Tensor]:
        """The residuals that steer a UNet towards all of `hints`; the other inputs are those of the UNet.

        hints  each (B, hint_channels, 8H, 8W) in [0, 1], for latents of H x W
        kinds  what each hint is: a number below `union.kinds`
        scale  one factor per hint or one for all: of the residuals for a single hint, of its features for several

        Returns tensors of `residual_shapes(B, H, W)`, as the UNet takes them. Raises ValueError where a hint does not
        fit the latents, hints, kinds and scales are not equally many, or a kind does not exist.
        """
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(hints)
        if not len(hints) == len(kinds) == len(scales) > 0:
            raise ValueError(f"{len(hints)} hints, {len(kinds)} kinds and {len(scales)} scales: need equally many")
        if not all(0 <= kind < self.union.kinds for kind in kinds):
            raise ValueError(f"kinds {list(kinds)}: this ControlNet has 0 to {self.union.kinds - 1}")
        outer, inner = (scales[0], [1.0]) if len(hints) == 1 else (1.0, scales)
        embedding = self.embed(latents, timestep, pooled, time_ids, None) + self.embed_kinds(kinds, latents)
        x: Tensor = self.conv_in(latents)
        features = [self.features(hint, x) * factor for hint, factor in zip(hints, inner, strict=True)]
        shifts = self.mix(x, features, kinds, inner)
        fused = sum((f + s for f, s in zip(features, shifts, strict=True)), start=x)
        return self.residuals(fused, embedding, context, outer)

    def embed_kinds(self, kinds: Sequence[int], like: Tensor) -> Tensor:
        """The embedding (1, time width) of which kinds are used."""
        used = torch.zeros(self.union.kinds, device=like.device)
        for kind in kinds:
            used[kind].fill_(1.0)  # on the device; an assignment would copy
        ids = sinusoidal(used, self.union.id_width).reshape(1, -1)  # (kinds, w) -> (1, kinds * w)
        out: Tensor = self.kinds_embedding(ids.to(like.dtype))
        return out

    def mix(self, x: Tensor, features: Sequence[Tensor], kinds: Sequence[int], scales: Sequence[float]) -> list[Tensor]:
        """For every hint's `features` (B, C, h, w) a shift of its channels, (B, C, 1, 1), by the transformer.

        As published, the transformer is fed (tokens, batch, C) the wrong way round (`nn.MultiheadAttention` without
        batch_first on a tensor with the batch first): every token attends to its like in the other pictures of the
        batch, not to the other tokens.
        """
        tasks = self.task_embedding.weight
        tokens = [
            f.mean(dim=(2, 3)) + tasks[kind] * scale for f, kind, scale in zip(features, kinds, scales, strict=True)
        ]
        h = torch.stack([*tokens, x.mean(dim=(2, 3))])  # n + 1 times (B, C) -> (n + 1, B, C)
        for layer in self.transformer:
            h = layer(h)
        return [
            self.shift(token)[:, :, None, None] * scale  # (B, C) -> (B, C, 1, 1)
            for token, scale in zip(h[:-1], scales, strict=True)
        ]
