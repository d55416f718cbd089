"""Soft inpainting: how much of a picture stays under the greys of its mask, while it is painted and afterwards.

The formulas are those of A1111's extension, by its author CodeHatchling:
https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/v1.10.1/extensions-builtin/soft-inpainting/scripts/soft_inpainting.py
(latent_blend, get_modified_nmask, apply_adaptive_masks, weighted_histogram_filter, get_gaussian_kernel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from nativesd.pictures.images import LANCZOS


@dataclass(frozen=True)
class SoftInpaint:
    """How a mask's greys are painted. Beside each number what A1111 calls it.

    mask_blend_power                Schedule bias, 0 to 8: above 1 the picture is kept early, below 1 late
    mask_blend_scale                Preservation strength, 0 to 8: how much of the picture the greys keep
    inpaint_detail_preservation     Transition contrast boost, 1 to 32: against the contrast that mixing loses
    composite_mask_influence        Mask influence, 0 to 1: how much the mask says which pixels are the picture's own
    composite_difference_threshold  Difference threshold, 0 to 8: of latents, up to which pixels are its own
    composite_difference_contrast   Difference contrast, 0 to 8: how sharp that border is
    """

    mask_blend_power: float = 1.0
    mask_blend_scale: float = 0.5
    inpaint_detail_preservation: float = 4.0
    composite_mask_influence: float = 0.0
    composite_difference_threshold: float = 0.5
    composite_difference_contrast: float = 2.0


class SoftMask:
    """One call's: its settings and, from the pass on, the picture that it began from."""

    def __init__(self, settings: SoftInpaint) -> None:
        self.settings = settings
        self._known: Tensor | None = None
        self._cells: Tensor | None = None

    def begin(self, known: Tensor, cells: Tensor) -> None:
        """Take the picture's latents (B or 1, C, h, w), and the mask's greys (1, 1, h, w), 1 where it is painted."""
        self._known, self._cells = known, cells

    def blended(self, denoised: Tensor, sigma: float) -> Tensor:
        """What was painted (B, C, h, w) at a sigma, with what the picture has there."""
        known, cells = self._begun()
        return blend(known, denoised, painted_share(cells, sigma, self.settings), self.settings)

    def composites(self, latents: Tensor, factor: int) -> list[Image.Image]:
        """For each of the finished latents (B, C, h, w) a mask ("L") in pixels, white where it covers the picture."""
        known, cells = self._begun()
        distances = torch.linalg.vector_norm((latents - known).float(), dim=1).cpu()  # (B, C, h, w) -> (B, h, w)
        size = (latents.shape[3] * factor, latents.shape[2] * factor)
        return [_in_pixels(coverage(each, cells[0, 0].cpu(), self.settings), size) for each in distances]

    def _begun(self) -> tuple[Tensor, Tensor]:
        assert self._known is not None
        assert self._cells is not None
        return self._known, self._cells


def painted_share(cells: Tensor, sigma: float, settings: SoftInpaint) -> Tensor:
    """How much of each cell, whose mask is 0 to 1, is painted at a sigma: the smaller that is, the more."""
    return torch.pow(cells, sigma**settings.mask_blend_power * settings.mask_blend_scale)


def blend(known: Tensor, denoised: Tensor, share: Tensor, settings: SoftInpaint) -> Tensor:
    """Of `known` and `denoised` (B or 1, C, h, w) the mixture by a share (1, 1, h, w), of the mixture's length.

    The length of a cell's vector is the power mean of both lengths, with `inpaint_detail_preservation` as the power:
    linear mixing makes it shorter than either where they differ, and so takes contrast away.
    """
    power = settings.inpaint_detail_preservation
    mixed = torch.lerp(known, denoised, share)
    # 64 bits, which powers up to 32 need
    own, other, now = (torch.linalg.vector_norm(x.double(), dim=1, keepdim=True) for x in (known, denoised, mixed))
    length: Tensor = (own**power * (1 - share) + other**power * share) ** (1 / power)
    return mixed.mul((length / (now + 1e-5)).to(mixed.dtype))


def coverage(distance: Tensor, cells: Tensor, settings: SoftInpaint) -> Tensor:
    """From how far painted latents are from the picture's (h, w), and the mask (h, w), how far they cover it, 0 to 1.

    Single cells are evened out: first each has the greatest of those around it, then their middle.
    """
    kept = 1 - cells.double().clamp(0, 1) ** (settings.mask_blend_scale / 2)
    influence = settings.composite_mask_influence
    kept = 0.5 * (1 - influence) + kept * influence
    half = settings.composite_difference_threshold * kept / (1.00001 - kept)  # where half of the picture is covered
    evened = _percentiles(_percentiles(distance.double(), 0.9, 1.0), 0.25, 0.75)
    ratio = (evened / half).nan_to_num(nan=0.0)  # no distance is within no threshold
    own = 1 / (1 + ratio**settings.composite_difference_contrast)
    return (1 - own**3 * (own * (6 * own - 15) + 10)).clamp(0, 1)  # Perlin's smootherstep, but for rounding


RADIUS, DEVIATION = 2, 1.5
"""Cells of the window, on each side, and of its Gaussian exp(-r^2 / deviation^2)."""
LEAST = 1.0
"""Weight of the neighbours that count at the least, where that of the nearest is 1."""


def _percentiles(values: Tensor, low: float, high: float) -> Tensor:
    """Of each of (h, w) the mean of its window's values between two percentiles of the window's weights."""
    height, width = values.shape
    steps = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    end = math.exp(-((RADIUS + 1) ** 2) / DEVIATION**2)  # 0 one cell beyond the window
    gauss = torch.exp(-(steps[:, None] ** 2 + steps[None] ** 2) / DEVIATION**2)
    kernel = ((gauss - end) / (1 - end)).clamp(min=0)

    both = torch.stack([values, torch.ones_like(values)])[:, None]  # those outside weigh nothing
    windows = F.unfold(F.pad(both, [RADIUS] * 4), 2 * RADIUS + 1)  # (2, 1, h, w) -> (2, 25, h * w)
    weights = windows[1] * kernel.reshape(-1, 1)
    ordered, order = windows[0].sort(dim=0)
    weights = weights.gather(0, order)
    above = weights.cumsum(0)
    total = above[-1]
    first, last = total * low, total * high
    middle, narrow = (first + last) / 2, last - first < LEAST
    first, last = torch.where(narrow, middle - LEAST / 2, first), torch.where(narrow, middle + LEAST / 2, last)
    over = (last - total).clamp(min=0)
    first, last = first - over, last - over
    parts = (torch.minimum(above, last) - torch.maximum(above - weights, first)).clamp(min=0)
    return ((ordered * parts).sum(0) / parts.sum(0)).reshape(height, width)


EDGE = 4
"""Pixels of the blur that takes the cells' steps out of a mask."""


def _in_pixels(share: Tensor, size: tuple[int, int]) -> Image.Image:
    cells = Image.fromarray((share * 255).byte().numpy())
    return cells.resize(size, LANCZOS).filter(ImageFilter.GaussianBlur(EDGE))
