"""CLIP's vision transformer: ViT-L (OpenAI), ViT-H and ViT-bigG (OpenCLIP), by configuration.

Source: openai/CLIP clip/model.py (VisionTransformer) and mlfoundations/open_clip src/open_clip/transformer.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nativesd.config import VisionEncoderConfig
from nativesd.models.clip_layers import CLIPLayer
from nativesd.models.layers import embedding


class VisionOutput(NamedTuple):
    """`embedding` (B, projection), None without a projection; `hidden` (B, T, width): of the last layer but one."""

    embedding: Tensor | None
    hidden: Tensor


class VisionEncoder(nn.Module):
    """Pictures to what image adapters take: the picture's embedding, or the states of all tokens."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = nn.Conv2d(config.image_channels, config.width, config.patch, config.patch, bias=False)
        self.position_embedding = embedding(config.tokens, config.width)
        self.norm_in = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(
            CLIPLayer(config.width, config.heads, config.mlp, config.activation, causal=False)
            for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(config.width)
        self.projection = (
            nn.Linear(config.width, config.projection, bias=False) if config.projection is not None else None
        )

    def forward(self, pixels: Tensor) -> VisionOutput:
        """Normalised `pixels` (B, channels, image, image) -> `VisionOutput`.

        The hidden states are without the final norm, as IP-Adapter takes them (`hidden_states[-2]`); the embedding is
        the projection of the class token behind it.
        """
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, hw, C)
        first = self.class_embedding.expand(x.shape[0], 1, -1)  # (C,) -> (B, 1, C)
        x = self.norm_in(torch.cat([first, x], dim=1) + self.position_embedding.weight)
        hidden = x
        for layer in self.layers:
            hidden, x = x, layer(x)
        if self.projection is None:
            return VisionOutput(None, hidden)
        return VisionOutput(self.projection(self.final_norm(x[:, 0])), hidden)
