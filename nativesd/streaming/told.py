"""What the networks are told of every row of a stream beside the latents: encoded once, kept until an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal

import torch
from torch import Tensor

from nativesd.diffusion.conditioning import Conditioning
from nativesd.diffusion.denoiser import guidance_embedding
from nativesd.diffusion.model import Diffusion
from nativesd.diffusion.prompting import Frame, Texts, negative_side, over_steps, prompt_sides
from nativesd.errors import UsageError
from nativesd.models.layers import CachedContext
from nativesd.models.unet import CachedTime
from nativesd.sampling.steps import Steps
from nativesd.streaming.ladder import Ladder

Blend = Literal["linear", "slerp"]
"""How several texts or seeds become one: their weighted mean, or along the arc between them."""
Weighted = tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Told:
    """What is said of every row: the slots' own, then those of the negative prompt.

    The time and the context keep what the networks make of them. pooled (rows, P), time_ids (rows, n) and guidance
    (rows, w) are None where a UNet takes none. prompt (rows, 1, 1, 1) is 1 for the slots' own rows, else 0.
    """

    time: CachedTime
    context: CachedContext
    pooled: Tensor | None
    time_ids: Tensor | None
    guidance: Tensor | None
    prompt: Tensor

    def part(self, rows: Sequence[int]) -> Told:
        """Of some rows, with a memory of their own."""
        at = torch.tensor(rows, device=self.prompt.device)

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[at]

        return Told(
            CachedTime(self.time.values[at]), CachedContext(self.context.states[at]), pick(self.pooled),
            pick(self.time_ids), pick(self.guidance), self.prompt[at],
        )  # fmt: skip


def tell(
    model: Diffusion,
    texts: Weighted,
    negative: str,
    ladder: Ladder,
    size: tuple[int, int],
    *,
    extra: int,
    guidance_scale: float,
    blend: Blend,
) -> Told:
    """The prompts' conditioning for every slot, and the negative prompt's for the first `extra` of them.

    A prompt that changes between steps changes from slot to slot. Raises UsageError for prompts that AND combines.
    """
    slots = len(ladder)
    sides = [_one_side(prompt_sides([text], 1, slots, None, syntax="original")) for text, _ in texts]
    if extra:
        sides.append(negative_side([negative], 1, slots, None, "negative", syntax="original"))
    unet = model.config.unet
    frame = Frame(
        pictures=1,
        size=size,
        ids=None if unet.added is None else unet.added.ids,
        guidance=None if unet.guidance is None else guidance_embedding(guidance_scale, unet.guidance),
        device=model.device,
        zero_empty=model.config.zero_empty_negative,
    )
    at = over_steps(sides, partial(model.encode_each, syntax="original"), frame, Steps(ladder.sigmas))
    weights = [weight for _, weight in texts]
    rows = [_blend_sides(at(sigma)[: len(texts)], weights, blend) for sigma in ladder.sigmas]
    rows += [at(sigma)[-1] for sigma in ladder.sigmas[:extra]]

    def column(name: str) -> Tensor | None:
        parts = [getattr(row, name) for row in rows]
        return None if parts[0] is None else torch.cat(parts)

    longest = math.lcm(*(row.texts.shape[1] for row in rows))
    context = torch.cat([_repeated(row.texts, longest) for row in rows])
    times = torch.tensor([*ladder.timesteps, *ladder.timesteps[:extra]], dtype=torch.float32, device=model.device)
    prompt = torch.cat([row.prompt for row in rows])
    return Told(
        CachedTime(times), CachedContext(context), column("pooled"), column("time_ids"), column("guidance"),
        prompt.to(model.dtype).reshape(-1, 1, 1, 1),
    )  # fmt: skip


def _one_side(sides: Sequence[Texts]) -> Texts:
    if len(sides) > 1:
        raise UsageError("AND is not for streams: blend the prompts with prompts=[(text, weight), ...]")
    return sides[0]


def _blend_sides(sides: Sequence[Conditioning], weights: Sequence[float], blend: Blend) -> Conditioning:
    """One conditioning of those of several prompts."""
    if len(sides) == 1:
        return sides[0]
    longest = math.lcm(*(side.texts.shape[1] for side in sides))
    context = blended([_repeated(side.texts, longest) for side in sides], weights, blend)
    first = sides[0]
    pooled = None
    if first.pooled is not None:
        pooled = blended([side.pooled for side in sides if side.pooled is not None], weights, blend)
    return Conditioning(context, first.prompt, pooled, first.time_ids, first.guidance, role=first.role)


def _repeated(context: Tensor, length: int) -> Tensor:
    """A context (1, T, C) at a multiple of its length, which says the same (see `conditioning.groups`)."""
    return context.repeat(1, length // context.shape[1], 1)


def blended(tensors: Sequence[Tensor], weights: Sequence[float], blend: Blend) -> Tensor:
    """One tensor of several of one shape, by weights of which the sum is above 0.

    linear  their mean; slerp  along the arc between them, in one vector after the other (Shoemake 1985): the last axis
            is a vector. Several go one after the other, each to its share of what is there so far.
    """
    total = sum(weights)
    if blend == "linear":
        return sum((tensor * (weight / total) for tensor, weight in zip(tensors, weights, strict=True)), 0 * tensors[0])
    pairs = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight]

    def further(so_far: tuple[Tensor, float], pair: tuple[Tensor, float]) -> tuple[Tensor, float]:
        whole = so_far[1] + pair[1]
        return slerp(so_far[0], pair[0], pair[1] / whole), whole

    return reduce(further, pairs)[0]


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From vectors (..., C) to others along the arc between; where they are parallel, along the line."""
    x, y = a.float(), b.float()
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1)[..., None]
    angle = cosine.acos()
    sine = angle.sin()
    arc = (x * ((1 - share) * angle).sin() + y * (share * angle).sin()) / sine
    return torch.where(sine.abs() > 1e-4, arc, torch.lerp(x, y, share)).to(a)
