"""What the UNet is told beside the latents, side by side, and in groups where texts differ in length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nativesd.models.edits import Edits
from nativesd.models.layers import CachedContext

Role = Literal["prompt", "negative", "picture", "nothing", "perturbed"]
"""What an answer is for: the prompt, the negative prompt; of a picture that is edited, it alone, and neither; or the
prompt, by a UNet that was made worse."""


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told beside the latents, for B pictures; what a UNet does not take is None.

    context: (B, T, C), or where the pictures' texts differ in length (T_i, C) for each. pooled (B, P) and time_ids
    (B, n): SDXL's; guidance (B, w): LCM's embedding of the guidance scale; channels (B, c, h, w): further input
    channels, of inpainting and of edited pictures. prompt (B,) is 1 where it is the prompt's conditioning, and 0 where
    it is the negative prompt's. share (B,) is the weight of a prompt that AND combines with others; None: 1. edits are
    those of the UNet that are made for this answer.
    """

    context: Tensor | tuple[Tensor, ...]
    prompt: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    guidance: Tensor | None = None
    channels: Tensor | None = None
    role: Role = "prompt"
    share: Tensor | None = None
    edits: Edits = ()
    idle: bool = False
    """No guidance now: several prompts are combined, and that is all."""

    @property
    def texts(self) -> Tensor:
        """The context where all texts have one length."""
        assert isinstance(self.context, Tensor)
        return self.context


def join(sides: Sequence[Conditioning]) -> Conditioning:
    """All of them, of the same edits, one after the other along the batch; they combine no more."""

    def cat(name: str) -> Tensor | None:
        tensors = [getattr(side, name) for side in sides]
        return None if tensors[0] is None else torch.cat(tensors)

    contexts = [side.context for side in sides]
    whole = [context for context in contexts if isinstance(context, Tensor)]
    if len(whole) == len(contexts) and len({context.shape[1] for context in whole}) == 1:
        context: Tensor | tuple[Tensor, ...] = torch.cat(whole)
    else:
        context = tuple(text for context in contexts for text in context)
    prompt = torch.cat([side.prompt for side in sides])
    return Conditioning(
        context, prompt, cat("pooled"), cat("time_ids"), cat("guidance"), cat("channels"), edits=sides[0].edits
    )


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one length: where they stand in the batch (None: they are all of it), what they are told, and a cache."""

    rows: Tensor | None
    side: Conditioning
    context: CachedContext


def groups(side: Conditioning, *, one: bool = False) -> list[Group]:
    """The rows of a conditioning in groups whose texts come to one length.

    Cross-attention is a mean over the context's tokens, weighted by a softmax. A context that is repeated k times has
    every token k times with a k-th of the weight, so the result is the same: texts go with one of a multiple of their
    length. Padding with other tokens would draw attention to them.

    one  make it one group, of the least common multiple, for what has to see a picture's rows together
    """
    if isinstance(side.context, Tensor):
        return [Group(None, side, CachedContext(side.context))]
    lengths = [len(text) for text in side.context]
    if one:
        common = math.lcm(*lengths)
        whole = replace(side, context=torch.stack([text.repeat(common // len(text), 1) for text in side.context]))
        return [Group(None, whole, CachedContext(whole.texts))]
    out = []
    left = sorted(set(lengths), reverse=True)
    while left:
        longest = left[0]
        members = [length for length in left if longest % length == 0]
        left = [length for length in left if length not in members]
        numbers = [i for i, length in enumerate(lengths) if length in members]
        context = torch.stack([side.context[i].repeat(longest // lengths[i], 1) for i in numbers])  # (n, T, C)
        rows = None if len(numbers) == len(lengths) else torch.tensor(numbers, device=context.device)
        part = replace(side, context=context) if rows is None else _rows(side, context, rows)
        out.append(Group(rows, part, CachedContext(context)))
    return out


def _rows(side: Conditioning, context: Tensor, rows: Tensor) -> Conditioning:
    """Some rows of a conditioning, with their context."""

    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    return Conditioning(
        context, side.prompt[rows], pick(side.pooled), pick(side.time_ids), pick(side.guidance), pick(side.channels),
        edits=side.edits,
    )  # fmt: skip
