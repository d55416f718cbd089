"""IP-Adapter: what an image encoder says of a picture to tokens, and keys and values of them for the UNet's attentions.

Source: tencent-ailab/IP-Adapter ip_adapter/ip_adapter.py (ImageProjModel, MLPProjModel), ip_adapter/resampler.py,
ip_adapter/ip_adapter_faceid.py (MLPProjModel, ProjPlusModel, FacePerceiverResampler). Ye et al. 2023, arXiv 2308.06721.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.config import IPAdapterConfig
from nativesd.models.layers import attention


class TokenProjection(nn.Module):
    """The base form: a linear layer to all tokens at once, and a layer norm."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.image or 0, config.tokens * config.context)
        self.norm = nn.LayerNorm(config.context)

    def forward(self, image: Tensor) -> Tensor:
        """The picture's embedding (B, image) -> (B, tokens, context)."""
        out: Tensor = self.norm(torch.unflatten(self.linear(image), 1, (-1, self.norm.normalized_shape[0])))
        return out


class StateProjection(nn.Module):
    """The full form: an MLP and a layer norm for every state of the picture."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.image or 0, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.context)
        self.state_norm = nn.LayerNorm(config.context)

    def forward(self, image: Tensor) -> Tensor:
        """States (B, T, image) -> (B, T, context)."""
        out: Tensor = self.state_norm(self.fc2(F.gelu(self.fc1(image))))
        return out


class Perceiver(nn.Module):
    """Attention of the tokens over the picture's states and themselves, and a feed-forward; each added to its input."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width, inner = config.width, config.heads * HEAD
        self.heads = config.heads
        self.norm_states = nn.LayerNorm(width)
        self.norm_tokens = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.hidden, bias=False)
        self.fc2 = nn.Linear(config.hidden, width, bias=False)

    def forward(self, tokens: Tensor, states: Tensor) -> Tensor:
        """(B, T, C), (B, S, C) -> (B, T, C)."""
        own = self.norm_tokens(tokens)
        seen = torch.cat([self.norm_states(states), own], dim=1)  # (B, S + T, C)
        tokens = tokens + self.to_out(attention(self.to_q(own), self.to_k(seen), self.to_v(seen), self.heads))
        out: Tensor = tokens + self.fc2(F.gelu(self.fc1(self.norm(tokens))))
        return out


HEAD = 64  # width of a resampler's heads in every published adapter


class Resampler(nn.Module):
    """Tokens that gather what they need from a picture's states, layer by layer."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.proj_in = nn.Linear(config.image or 0, config.width)
        self.layers = nn.ModuleList(Perceiver(config) for _ in range(config.depth))
        self.proj_out = nn.Linear(config.width, config.context)
        self.norm_out = nn.LayerNorm(config.context)

    def gather(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Tokens (B, T, width) and states (B, S, image) -> (B, T, context)."""
        states = self.proj_in(states)
        for layer in cast("Iterable[Perceiver]", self.layers):
            tokens = layer(tokens, states)
        out: Tensor = self.norm_out(self.proj_out(tokens))
        return out


class StateResampler(Resampler):
    """The plus form: a resampler whose tokens are learnt."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__(config)
        self.latents = nn.Parameter(torch.empty(1, config.tokens, config.width))

    def forward(self, image: Tensor) -> Tensor:
        """States (B, S, image) -> (B, tokens, context)."""
        return self.gather(self.latents.expand(image.shape[0], -1, -1), image)


class IdentityProjection(nn.Module):
    """The FaceID form: an MLP of a face's identity vector, and a layer norm."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width = config.width or config.context
        self.fc1 = nn.Linear(config.identity, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, identity: Tensor) -> Tensor:
        """(B, identity) -> (B, tokens, width or context)."""
        tokens = self.fc2(F.gelu(self.fc1(identity)))
        out: Tensor = self.norm(torch.unflatten(tokens, 1, (-1, self.norm.normalized_shape[0])))
        return out


class IdentityResampler(IdentityProjection):
    """The FaceID plus form: the identity's tokens gather from the picture's states.

    In its second version they are also added to what they gathered.
    """

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__(config)
        self.resampler = Resampler(config)
        self.shortcut = config.shortcut

    def forward(self, identity: Tensor, image: Tensor | None = None) -> Tensor:
        """(B, identity) and states (B, S, image) -> (B, tokens, context)."""
        tokens = super().forward(identity)
        if image is None:
            raise ValueError("FaceID plus takes a picture's states beside the identity: pass both")
        gathered = self.resampler.gather(tokens, image)
        return tokens + gathered if self.shortcut else gathered


class Loras(nn.Module):
    """FaceID's LoRA of one attention of the UNet: never called, as it is merged into the UNet's weights."""

    def __init__(self, rank: int, width: int, context: int) -> None:
        super().__init__()
        for name, width_in in (("q", width), ("k", context), ("v", context), ("out", width)):
            self.add_module(f"{name}_down", nn.Linear(width_in, rank, bias=False))
            self.add_module(f"{name}_up", nn.Linear(rank, width, bias=False))


class IPAdapter(nn.Module):
    """A picture to the keys and values that it adds to every cross-attention of a UNet."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = _PROJECTIONS[config.kind](config)
        self.to_k = nn.ModuleList(nn.Linear(config.context, width, bias=False) for width in config.widths)
        self.to_v = nn.ModuleList(nn.Linear(config.context, width, bias=False) for width in config.widths)
        self.loras = nn.ModuleList()
        for width in config.widths if config.lora is not None else ():
            self.loras.append(Loras(config.lora or 0, width, width))  # of the self-attention before it
            self.loras.append(Loras(config.lora or 0, width, config.context))

    def tokens(self, image: Tensor | None, identity: Tensor | None) -> Tensor:
        """(B, tokens, context) of what the kind takes.

        image     the image encoder's embedding (B, image) for "base", its hidden states (B, S, image) for the others
        identity  (B, identity), for FaceID's

        Raises ValueError where it takes another than is given.
        """
        faces = self.config.kind.startswith("faceid")
        if (identity is not None) != faces or (image is not None) != (self.config.image is not None):
            raise ValueError(f"an IP-Adapter of the kind {self.config.kind} takes other inputs than it was given")
        given = [each for each in (identity, image) if each is not None]
        out: Tensor = self.projection(*given)
        return out

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, T, context) -> for every cross-attention, in order, keys and values (B, T, width)."""
        return [(to_k(tokens), to_v(tokens)) for to_k, to_v in zip(self.to_k, self.to_v, strict=True)]


_PROJECTIONS: dict[str, type[nn.Module]] = {
    "base": TokenProjection, "plus": StateResampler, "full": StateProjection, "faceid": IdentityProjection,
    "faceid-plus": IdentityResampler,
}  # fmt: skip
