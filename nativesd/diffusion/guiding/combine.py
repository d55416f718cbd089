"""How the answers for several conditionings become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nativesd.diffusion.conditioning import Conditioning


@dataclass(frozen=True)
class At:
    """Where a sampler stands: at x (B, C, h, w) and sigma, where a model's output means the clean latents
    of_x * x + of_output * output (`nativesd.diffusion.denoiser.clean_shares`)."""

    x: Tensor
    sigma: float
    of_x: float
    of_output: float

    def clean(self, output: Tensor) -> Tensor:
        """The clean latents that an output means."""
        return self.of_x * self.x + self.of_output * output

    def noise(self, output: Tensor) -> Tensor:
        """The noise that an output means."""
        return (self.x - self.clean(output)) / self.sigma

    def of_clean(self, clean: Tensor) -> Tensor:
        """The output that means these clean latents."""
        return (clean - self.of_x * self.x) / self.of_output

    def of_noise(self, noise: Tensor) -> Tensor:
        """The output that means this noise."""
        return self.of_clean(self.x - self.sigma * noise)


@dataclass(frozen=True)
class Parts:
    """What guidance combines to start + factor * direction, all of it as the model's outputs.

    `positive` is the answer for the prompt, `base` that without it; `scale` is the guidance scale, of which the factor
    may differ by a constant.
    """

    positive: Tensor
    base: Tensor
    start: Tensor
    direction: Tensor
    factor: float
    scale: float
    at: At

    def combined(self, scale: float | None = None) -> Tensor:
        """The guided answer; at another scale than the one asked for."""
        factor = self.factor if scale is None else self.factor + scale - self.scale
        return self.start + factor * self.direction


class Combiner(Protocol):
    """What changes how answers are combined, over one pass: it may remember."""

    def change(self, parts: Parts) -> Parts:
        """Other parts for these."""

    def finish(self, parts: Parts, combined: Tensor) -> Tensor:
        """Another guided answer for this."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: how the answers for several conditionings become one.

    `scale` 1 is none. `rescale` pulls the contrast back to that of the unguided answer (Lin et al. 2023, section 3.4;
    0 to 1). `image_scale` weighs the picture that is edited (Brooks et al. 2022, equation 3). Several prompts add up by
    their shares (Liu et al. 2022, equation 11; A1111's `combine_denoised`).
    """

    scale: float
    rescale: float = 0.0
    image_scale: float = 1.5
    sequential: bool = False
    """One pass of the model per conditioning instead of one for all: half the memory, the same answer."""
    always: bool = False
    """The negative prompt is asked for whatever the scale is."""

    @property
    def guides(self) -> bool:
        """Whether the negative prompt is asked for."""
        return self.always or self.scale > 1

    def combine(
        self, outputs: Sequence[Tensor], sides: Sequence[Conditioning], at: At, combiners: Sequence[Combiner] = ()
    ) -> Tensor:
        """One answer (B, C, h, w) of one for each side."""
        if len(outputs) == 1:
            return outputs[0]
        pairs = list(zip(sides, outputs, strict=True))
        by_role = {side.role: output for side, output in pairs if side.role not in ("prompt", "perturbed")}
        prompts = [(output, side) for side, output in pairs if side.role == "prompt"]
        positive = combined = prompts[0][0]
        idle = sides[0].idle
        scale, combiners = (1.0, ()) if idle else (self.scale, combiners)
        if by_role:
            base = by_role["picture"] if "picture" in by_role else by_role["negative"]
            toward = prompts[0][0] - base
            if len(prompts) > 1:
                toward = sum_shares([(p - base, side) for p, side in prompts])
            start = base
            if "nothing" in by_role:
                start = by_role["nothing"] + self.image_scale * (base - by_role["nothing"])
            if combiners or self.rescale:
                positive = base + toward
            parts = Parts(positive, base, start, toward, scale, scale, at)
            for combiner in combiners:
                parts = combiner.change(parts)
            combined = parts.combined()
            for combiner in combiners:
                combined = combiner.finish(parts, combined)
        lost = [(prompts[0][0] - output, side) for side, output in pairs if side.role == "perturbed"]
        if lost:
            combined = combined + sum_shares(lost)
        if self.rescale and by_role and not idle:
            axes = tuple(range(1, combined.ndim))
            same_contrast = combined * (positive.std(axes, keepdim=True) / combined.std(axes, keepdim=True))
            combined = torch.lerp(combined, same_contrast, self.rescale)
        return combined


def sum_shares(parts: Sequence[tuple[Tensor, Conditioning]]) -> Tensor:
    """The sum of (B, C, h, w), each times its side's share."""
    total = torch.zeros_like(parts[0][0])
    for part, side in parts:
        total = total + (part if side.share is None else part * side.share.to(part)[:, None, None, None])
    return total


def moved(parts: Parts, base: Tensor) -> Parts:
    """Parts with another answer in place of the one without the prompt."""
    return replace(parts, base=base, start=parts.start + (base - parts.base), direction=parts.positive - base)
