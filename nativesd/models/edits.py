"""How a call of the UNet may go otherwise than it was trained to: the one seam, by place. No edits cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from torch import Tensor

Attend = Callable[[Tensor], Tensor]
"""What a block's attention adds to its input: normed tokens (B, T, C) -> (B, T, C)."""


class Layer(Protocol):
    """What an edit may know of an attention (`nativesd.models.layers.Attention`)."""

    heads: int
    to_q: Any
    to_out: Any

    def keys_values(self, context: Any) -> tuple[Tensor, Tensor]:
        """(B, S, context width) -> keys and values, each (B, S, C)."""

    def over(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What normed tokens (B, T, C) find in keys and values (B, S, C): (B, T, C).

        In an attention to texts that is with what image prompts add, so that texts weighed to 1 have it once.
        """


@dataclass(frozen=True)
class Place:
    """Where in a UNet something is: level 0 is the one of the most cells; `size` is the feature map's height and width.

    `layer` counts the residual blocks of a level, `block` the transformer blocks behind one of them.
    """

    part: Literal["down", "mid", "up"]
    level: int
    layer: int = 0
    block: int = 0
    size: tuple[int, int] = (0, 0)

    @property
    def names(self) -> tuple[str, str, str]:
        """How people name it: by its part, its level and its layer, such as "down", "down.1" and "down.1.0"."""
        if self.part == "mid":
            return "mid", "mid.0", f"mid.0.{self.layer}"
        return self.part, f"{self.part}.{self.level}", f"{self.part}.{self.level}.{self.layer}"

    def within(self, size: tuple[int, int]) -> Place:
        """The same place of a feature map of a size."""
        return replace(self, size=size)


class Edit:
    """What is done otherwise in a call; this one changes nothing. All of a call's edits are applied, one on another."""

    def skips(self, place: Place) -> bool:
        """Whether a transformer block is passed by."""
        return False

    def self_attention(self, place: Place, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
        """What a block's self-attention makes of its normed input (B, T, C); `attend` is what it does else."""
        return attend(x)

    def cross_attention(self, place: Place, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
        """The same of the attention to the context."""
        return attend(x)

    def join(self, place: Place, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """What the up path's features (B, C, H, W) and the skip beside them become, before they are joined."""
        return x, skip


Edits = Sequence[Edit]


def joined(edits: Edits, place: Place, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """What all edits make of features and skip."""
    for edit in edits:
        x, skip = edit.join(place, x, skip)
    return x, skip


def self_attended(edits: Edits, place: Place, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
    """What all edits make of a self-attention, the first one outermost."""
    if not edits:
        return attend(x)
    first, *others = edits
    return first.self_attention(place, layer, x, lambda y: self_attended(others, place, layer, y, attend))


def cross_attended(edits: Edits, place: Place, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
    """The same of an attention to the context."""
    if not edits:
        return attend(x)
    first, *others = edits
    return first.cross_attention(place, layer, x, lambda y: cross_attended(others, place, layer, y, attend))
