"""The second pass over a larger picture ("hires fix"): what it can be asked for, and A1111's arithmetic of its sizes.

The arithmetic is that of A1111's modules/processing.py (`calculate_target_resolution`, `sample_hr_pass`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nativesd.errors import UsageError

LATENT: dict[str, tuple[str, bool]] = {
    "latent": ("bilinear", False),
    "latent (antialiased)": ("bilinear", True),
    "latent (bicubic)": ("bicubic", False),
    "latent (bicubic antialiased)": ("bicubic", True),
    "latent (nearest)": ("nearest", False),
    "latent (nearest-exact)": ("nearest-exact", False),
}
"""Upscalers of latents: torch's mode, and whether with antialiasing (`latent_upscale_modes` of A1111's
modules/shared_items.py)."""
PIXELS = {
    "lanczos": Image.Resampling.LANCZOS,
    "none": Image.Resampling.LANCZOS,  # A1111's upscaler of that name leaves the picture to the final resizing
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
}
"""Upscalers of decoded pictures."""
UPSCALERS = (*LATENT, *PIXELS)
Upscaler = str | Callable[[Image.Image], Image.Image]
"""One of `UPSCALERS`, in any case; the file of a model that `load_upscaler` takes; or a function that makes a picture
larger, by whatever factor, such as a loaded model."""


class Enlarged(NamedTuple):
    """A second pass's sizes: the pixels to scale to, and the latent cells to cut off then, on both sides together."""

    width: int
    height: int
    cut_x: int = 0
    cut_y: int = 0

    def size(self, factor: int) -> tuple[int, int]:
        """Width and height in pixels of the pictures of the second pass, for `factor` pixels to a latent cell."""
        return (self.width // factor - self.cut_x) * factor, (self.height // factor - self.cut_y) * factor

    def cut(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of the scaled size without what is cut off: the odd cell at the right and the bottom."""
        height, width = latents.shape[2:]
        rows = slice(self.cut_y // 2, height - (self.cut_y + 1) // 2)
        return latents[:, :, rows, self.cut_x // 2 : width - (self.cut_x + 1) // 2]


@dataclass(frozen=True)
class Hires:
    """A second pass at `scale` times the size ("hires fix"), over all of `steps` (None: the same number).

    strength       how much of the noise the enlarged picture gets, and so how much of it is painted anew
    upscaler       how it is enlarged: one of `UPSCALERS`, such as "latent" (bilinear, on the latents) or "lanczos" (on
                   the decoded pictures), a file of a model such as ESRGAN, or a function from a picture to a larger one
    width, height  the size to reach, instead of `scale`: with one of them the other follows from the picture's shape,
                   with both the picture covers them and is cropped
    sampler, schedule, prompt, negative_prompt, guidance_scale   of the second pass; None: those of the first. A sampler
                   whose name says a schedule ("DPM++ 2M Karras") brings that
    """

    scale: float = 2.0
    strength: float = 0.7
    steps: int | None = None
    upscaler: Upscaler = "latent"
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None

    def fields(self) -> dict[str, Any]:
        """In the words of a picture's parameters; what is None is left out."""
        fixed = self.width is not None or self.height is not None
        size = {"width": self.width or 0, "height": self.height or 0} if fixed else {"upscale": self.scale}
        named = getattr(self.upscaler, "name", getattr(self.upscaler, "__name__", "own"))
        if isinstance(self.upscaler, str):
            named = self.upscaler.title() if self.upscaler.lower() in UPSCALERS else Path(self.upscaler).stem
        fields = {
            **size,
            "strength": self.strength,
            "upscaler": named,
            "steps": self.steps,
            "sampler": self.sampler,
            "schedule": self.schedule,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "guidance_scale": self.guidance_scale,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def enlarged(self, width: int, height: int, factor: int) -> Enlarged:
        """The sizes for a first pass of `width` x `height` pixels, with `factor` of them to a latent cell."""
        if not self.width and not self.height:
            return Enlarged(int(width * self.scale), int(height * self.scale))
        wide = self.width is not None and (not self.height or width / height < self.width / self.height)
        if wide:
            assert self.width is not None
            across, down = self.width, self.width * height // width
        else:
            assert self.height is not None
            across, down = self.height * width // height, self.height
        cut_x = (across - self.width) // factor if self.width else 0
        cut_y = (down - self.height) // factor if self.height else 0
        return Enlarged(across, down, cut_x, cut_y)


def enlarge_latents(latents: Tensor, size: Enlarged, factor: int, upscaler: str) -> Tensor:
    """Latents (B, C, h, w) at the scaled size, by one of `LATENT`."""
    mode, antialias = LATENT[upscaler]
    return F.interpolate(latents, size=(size.height // factor, size.width // factor), mode=mode, antialias=antialias)


def enlarge_picture(picture: Image.Image, size: Enlarged, factor: int, upscaler: Upscaler) -> Image.Image:
    """A picture at the scaled size, rounded down to whole latent cells, by one of `PIXELS` or a function.

    Raises UsageError where that returns no picture.
    """
    if isinstance(upscaler, str):
        larger = picture.resize((size.width, size.height), PIXELS[upscaler])
    else:
        larger = upscaler(picture)
        if not isinstance(larger, Image.Image):
            raise UsageError(f"hires.upscaler must return a PIL image, and what was passed returns {larger!r:.60}")
        larger = larger.convert("RGB").resize((size.width, size.height), Image.Resampling.LANCZOS)
    return larger.crop((0, 0, size.width // factor * factor, size.height // factor * factor))
