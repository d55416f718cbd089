"""CLIP's text transformer: ViT-L (OpenAI), ViT-H and ViT-bigG (OpenCLIP), by configuration.

Source: openai/CLIP clip/model.py and mlfoundations/open_clip src/open_clip/transformer.py (pre-norm, causal).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.config import Activation, TextEncoderConfig
from nativesd.models.layers import attention


class TextOutput(NamedTuple):
    """`hidden` (B, T, width): the UNet's context. `pooled` (B, projection or width): the end-of-text embedding."""

    hidden: Tensor
    pooled: Tensor


def activate(x: Tensor, activation: Activation) -> Tensor:
    """quick_gelu is x * sigmoid(1.702 x) (OpenAI's CLIP), gelu the exact one (OpenCLIP)."""
    match activation:
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")


class CausalAttention(nn.Module):
    """Self-attention in which a token sees itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.out(attention(self.q(x), self.k(x), self.v(x), self.heads, causal=True))
        return out


class MLP(nn.Module):
    """The transformer's feed-forward: width -> hidden -> width."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.fc2(activate(self.fc1(x), self.activation))
        return out


class TextLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = CausalAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TextEncoder(nn.Module):
    """Token ids to the UNet's context and the pooled embedding."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        self.text_projection = (
            nn.Linear(config.width, config.projection, bias=False) if config.projection is not None else None
        )

    def forward(self, tokens: Tensor) -> TextOutput:
        """(B, T) int64, T <= `config.length` -> `TextOutput`.

        Pooling takes the last layer at the first end-of-text token, which has the vocabulary's highest id (argmax, as
        in openai/CLIP `encode_text`), so it is right whatever the padding is.
        """
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        last = self.final_norm(x)
        hidden = states[self.config.hidden]
        if self.config.hidden_norm:
            hidden = last if hidden is x else self.final_norm(hidden)
        pooled = last[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=-1)]
        return TextOutput(hidden, pooled if self.text_projection is None else self.text_projection(pooled))
