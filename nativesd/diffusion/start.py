"""What a pass begins from when it is not noise alone, and over how many steps it goes then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image
from torch import Tensor

from nativesd.errors import UsageError
from nativesd.pictures.masks import greys_to_latents, mask_to_latents
from nativesd.pictures.soft import SoftMask

StepsAs = Literal["diffusers", "a1111", "all"]
"""How many of n steps a picture goes through that is to lose a share s of itself:

diffusers  int(n s)
a1111      int(n min(s, 0.999)) + 1
all        n, the last of int(n / min(s, 0.999)): A1111's second pass, and its option "do exactly the amount of steps"

Sources: diffusers' `get_timesteps`, A1111's modules/sd_samplers_common.py (`setup_img2img_steps`).
"""
MOST_STRENGTH = 0.999
MaskFill = Literal["original", "fill", "noise", "nothing"]
"""What is under a mask when the painting begins: the picture; the colours around it; noise, or nothing, as latents.

A1111's inpainting_fill 1, 0, 2 and 3 (modules/processing.py).
"""


@dataclass(frozen=True)
class Start:
    """A picture to begin from, (1 or B, 3, H, W) in [-1, 1], or its latents; `strength` of the noise is put on it.

    `mask` (of the picture's size, grey) is white where the picture is painted anew. Of `fill`, latents are put there by
    "noise" and "nothing"; what the others mean has been done to the picture. With `soft` the mask's greys are painted
    as that says.
    """

    strength: float
    image: Tensor | None = None
    latents: Tensor | None = None
    mask: Image.Image | None = None
    steps_as: StepsAs = "diffusers"
    fill: MaskFill = "original"
    soft: SoftMask | None = None

    def cells(self, factor: int) -> Tensor | None:
        """The mask (1, 1, h, w), 0 to 1, of cells of `factor` pixels; None: there is none. UsageError: none is left."""
        if self.mask is None:
            return None
        return (mask_to_latents if self.soft is None else greys_to_latents)(self.mask, factor)

    def pixels(self) -> Tensor:
        """The picture. Raises UsageError where there are latents only."""
        if self.image is None:
            raise UsageError("this model starts from pictures, not from latents")
        return self.image

    @property
    def all_noise(self) -> bool:
        """Nothing of the picture is left, so that a masked pass begins from noise; A1111 always leaves something."""
        return self.strength == 1 and self.steps_as == "diffusers"

    def steps(self, asked: int, *, editing: bool = False) -> tuple[int, int]:
        """How many steps the schedule has, and the one at which the picture comes in.

        A model that edits takes the picture as an input, and all steps. Raises UsageError if no step is left.
        """
        if editing:
            return asked, 0
        bounded = min(self.strength, MOST_STRENGTH)
        match self.steps_as:
            case "all":
                total = int(asked / bounded) if bounded > 0 else 0
                return total, total - asked
            case "a1111":
                return asked, asked - int(bounded * asked) - 1
        left = min(int(asked * self.strength), asked)
        if left < 1:
            raise UsageError(f"strength {self.strength:g} of {asked} steps leaves no step: raise either")
        return asked, asked - left
