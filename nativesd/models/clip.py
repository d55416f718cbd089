"""CLIP's text transformer: ViT-L (OpenAI), ViT-H and ViT-bigG (OpenCLIP), by configuration.

Source: openai/CLIP clip/model.py and mlfoundations/open_clip src/open_clip/transformer.py (pre-norm, causal).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nativesd.config import TextEncoderConfig
from nativesd.models.clip_layers import CLIPLayer
from nativesd.models.layers import embedding


class TextOutput(NamedTuple):
    """`hidden` (B, T, width): the UNet's context. `pooled` (B, projection or width): the end-of-text embedding."""

    hidden: Tensor
    pooled: Tensor


class TextEncoder(nn.Module):
    """Token ids to the UNet's context and the pooled embedding."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = embedding(config.vocabulary, config.width)
        self.position_embedding = embedding(config.length, config.width)
        self.layers = nn.ModuleList(
            CLIPLayer(config.width, config.heads, config.mlp, config.activation, causal=True)
            for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(config.width)
        self.text_projection = (
            nn.Linear(config.width, config.projection, bias=False) if config.projection is not None else None
        )

    def forward(self, tokens: Tensor, *, embedded: Tensor | None = None, hidden: int | None = None) -> TextOutput:
        """(B, T) int64, T <= `config.length` -> `TextOutput`.

        embedded  (B, T, width) in place of the tokens' embeddings, for textual inversion
        hidden    the layer whose output is the context, in place of `config.hidden`

        Pooling takes the last layer at the first end-of-text token, which has the vocabulary's highest id (argmax, as
        in openai/CLIP `encode_text`), so it is right whatever the padding is.
        """
        states = self.states(tokens, embedded)
        return TextOutput(
            self.context(states[self.config.hidden if hidden is None else hidden]), self.pooled(tokens, states[-1])
        )

    def states(self, tokens: Tensor, embedded: Tensor | None = None) -> list[Tensor]:
        """Every layer's output (B, T, width)."""
        x = self.token_embedding(tokens) if embedded is None else embedded
        x = x + self.position_embedding.weight[: tokens.shape[1]]
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return states

    def context(self, state: Tensor) -> Tensor:
        """What the UNet takes of a layer's output."""
        return self.final_norm(state) if self.config.hidden_norm else state

    def pooled(self, tokens: Tensor, last: Tensor) -> Tensor:
        """The embedding (B, projection or width) at the end-of-text token, of the last layer's output."""
        pooled: Tensor = self.final_norm(last)[
            torch.arange(tokens.shape[0], device=tokens.device), tokens.argmax(dim=-1)
        ]
        return pooled if self.text_projection is None else self.text_projection(pooled)
