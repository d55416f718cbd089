"""How the answers for several conditionings become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nativesd.diffusion.conditioning import Conditioning


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

    def combine(self, outputs: Sequence[Tensor], sides: Sequence[Conditioning]) -> Tensor:
        """One answer (B, C, h, w) of one for each side."""
        if len(outputs) == 1:
            return outputs[0]
        by_role = {side.role: output for side, output in zip(sides, outputs, strict=True) if side.role != "prompt"}
        prompts = [(output, side) for output, side in zip(outputs, sides, strict=True) if side.role == "prompt"]
        base = by_role["picture"] if "picture" in by_role else by_role["negative"]
        toward = prompts[0][0] - base if len(prompts) == 1 else sum_shares([(p - base, side) for p, side in prompts])
        combined = base + self.scale * toward
        if "nothing" in by_role:
            combined = by_role["nothing"] + self.scale * toward + self.image_scale * (base - by_role["nothing"])
        if self.rescale:
            axes = tuple(range(1, combined.ndim))
            positive = base + toward
            same_contrast = combined * (positive.std(axes, keepdim=True) / combined.std(axes, keepdim=True))
            combined = torch.lerp(combined, same_contrast, self.rescale)
        return combined


def sum_shares(parts: Sequence[tuple[Tensor, Conditioning]]) -> Tensor:
    """The sum of (B, C, h, w), each times its side's share."""
    total = torch.zeros_like(parts[0][0])
    for part, side in parts:
        total = total + (part if side.share is None else part * side.share.to(part)[:, None, None, None])
    return total
