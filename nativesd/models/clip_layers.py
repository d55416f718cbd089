"""The transformer layer that CLIP's text and image encoders have, and a ControlNet for several kinds of hint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.config import Activation
from nativesd.models.layers import attention


def activate(x: Tensor, activation: Activation) -> Tensor:
    """quick_gelu is x * sigmoid(1.702 x) (OpenAI's CLIP), gelu the exact one (OpenCLIP)."""
    match activation:
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")


class SelfAttention(nn.Module):
    """CLIP's self-attention; with `causal` a token sees only itself and those before it."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.out(attention(self.q(x), self.k(x), self.v(x), self.heads, causal=self.causal))
        return out


class MLP(nn.Module):
    """CLIP's feed-forward: width -> hidden -> width."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.fc2(activate(self.fc1(x), self.activation))
        return out


class CLIPLayer(nn.Module):
    """CLIP's pre-norm transformer layer (`ResidualAttentionBlock` of openai/CLIP clip/model.py)."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Activation, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
