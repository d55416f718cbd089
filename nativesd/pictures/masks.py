"""Masks: what of a picture is painted anew, read from whatever they are and brought to latent cells."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor

from nativesd.errors import UsageError
from nativesd.pictures.images import ImageSource, open_image


class Mask(NamedTuple):
    """A mask in mode "L", and how it was understood in words (None: there was only one way)."""

    image: Image.Image
    note: str | None


def read_mask(source: ImageSource) -> Mask:
    """White is repainted, black is kept (diffusers, A1111); with an alpha channel that varies, one of two:

    - strokes on a transparent ground, black and white only: luminance times alpha (A1111's sketches, gradio's masks)
    - a picture with holes, any other: what is transparent is repainted (ComfyUI's LoadImage, OpenAI's edits)

    Of a mask whose values are 0 and 1 only, 1 is white. Raises what `read_image` raises, and UsageError for a mask that
    is black everywhere.
    """
    image = open_image(source)
    mask, note = image.convert("RGB").convert("L"), None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        darkest, brightest = alpha.getextrema()
        if darkest != brightest and _are_strokes(rgba):
            mask = ImageChops.multiply(mask, alpha)
            note = "mask: strokes on a transparent ground, what is white and opaque is repainted"
        elif darkest != brightest:
            mask = ImageOps.invert(alpha)
            note = "mask: a picture with holes, what is transparent is repainted"
    if mask.getextrema() == (0, 1):
        mask = mask.point(lambda value: value * 255)
        note = "mask: its values are 0 and 1, so what is 1 is repainted"
    if mask.getextrema()[1] == 0:
        raise UsageError("the mask is black everywhere, so there is nothing to repaint: paint it white there")
    return Mask(mask, note)


BLACK, WHITE = 32, 223
"""Up to which and from which grey on a pixel of a mask is black, or white."""
STROKES = 0.9
"""Share of the visible pixels that are black or white where strokes are drawn; soft brushes have some grey."""


def _are_strokes(rgba: Image.Image) -> bool:
    """Whether what is visible is black and white, with some white: a drawn mask, and not a picture."""
    pixels = np.asarray(rgba).astype(np.int16)
    colours = pixels[pixels[..., 3] >= 128][:, :3]  # (H, W, 4) -> (n, 3)
    if not len(colours):  # faint strokes only
        colours = pixels[pixels[..., 3] > 0][:, :3]
    low, high = colours.min(axis=1), colours.max(axis=1)
    plain = ((high <= BLACK) | (low >= WHITE)).mean()
    return bool(plain >= STROKES and (low >= WHITE).any())


def blur(mask: Image.Image, pixels: float) -> Image.Image:
    """The mask with soft edges: a Gaussian of this standard deviation (A1111's mask blur: 4); 0 leaves it as it is."""
    if pixels < 0:
        raise UsageError(f"the mask's blur must be 0 pixels or more, not {pixels:g}")
    return mask.filter(ImageFilter.GaussianBlur(pixels)) if pixels else mask


def mask_to_tensor(mask: Image.Image) -> Tensor:
    """The mask as (1, 1, H, W) float32 from 0, kept, to 1, repainted."""
    return torch.from_numpy(np.array(mask.convert("L"), np.float32))[None, None] / 255


def mask_to_latents(mask: Image.Image, factor: int) -> Tensor:
    """The mask at one value per latent cell of `factor` pixels a side, (1, 1, H / factor, W / factor) float32, 0 to 1.

    A cell has the value of its upper left pixel (`interpolate`'s nearest), so that, rounded, this is what diffusers'
    inpainting pipelines give to the UNet. Raises UsageError where that leaves nothing white.
    """
    cells = F.interpolate(mask_to_tensor(mask), size=(mask.height // factor, mask.width // factor))
    return _require_left(cells, 0.5, factor)


def greys_to_latents(mask: Image.Image, factor: int) -> Tensor:
    """The mask's greys at one value per latent cell, (1, 1, H / factor, W / factor) float32, 0 to 1.

    A cell has about the mean of its pixels: a bicubic reduction, as in A1111's modules/processing.py. Raises UsageError
    where that leaves only black.
    """
    small = mask.convert("L").resize((mask.width // factor, mask.height // factor), Image.Resampling.BICUBIC)
    return _require_left(mask_to_tensor(small), 1 / 255, factor)


def _require_left(cells: Tensor, least: float, factor: int) -> Tensor:
    if cells.max() < least:
        raise UsageError(f"nothing is left of the mask at {factor} pixels per latent cell: paint a larger area white")
    return cells


def add_border(mask: Image.Image, border: Image.Image, sides: tuple[int, int, int, int]) -> Image.Image:
    """A picture's `mask` on the canvas that `pad` made of it by `sides`, together with `border`, the mask of `pad`."""
    canvas = Image.new("L", border.size)
    canvas.paste(mask, corner(mask.size, border.size, sides))
    return ImageChops.lighter(canvas, border)


def corner(size: tuple[int, int], canvas: tuple[int, int], sides: tuple[int, int, int, int]) -> tuple[int, int]:
    """Where a picture of a size lies on the canvas that `pad` made of it by `sides`: left, right, top, bottom."""
    left, right, top, bottom = sides
    left = canvas[0] - size[0] if left and not right else left
    return left, canvas[1] - size[1] if top and not bottom else top
