"""Repainting only a part of a picture, at a size of its own ("only masked"), and what is under a mask before it begins.

The geometry and the filling are those of A1111's modules/masking.py (get_crop_region_v2, expand_crop_region, fill) and
modules/processing.py (uncrop).
"""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image, ImageFilter, ImageOps

from nativesd.errors import UsageError
from nativesd.pictures.images import fit, paste

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""


class Cutout(NamedTuple):
    """A part of a picture and of its mask, at the size at which it is painted; `box` is where it was."""

    picture: Image.Image
    mask: Image.Image
    box: Box


def cut_out(picture: Image.Image, mask: Image.Image, padding: int, width: int, height: int) -> Cutout:
    """What a mask ("L") covers of a picture of its size, with so many pixels around it, at `width` x `height`.

    Raises UsageError for a mask that is black everywhere.
    """
    bounds = mask.getbbox()
    if bounds is None:
        raise UsageError("the mask is black everywhere, so there is nothing to repaint: paint it white there")
    left, top, right, bottom = bounds
    padded = (
        max(left - padding, 0), max(top - padding, 0),
        min(right + padding, mask.width), min(bottom + padding, mask.height),
    )  # fmt: skip
    box = widened(padded, width / height, picture.size)
    part, part_mask = (fit(each.crop(box), width, height, "fill").image for each in (picture, mask))
    return Cutout(part, part_mask, box)


def widened(box: Box, ratio: float, size: tuple[int, int]) -> Box:
    """A box grown to a ratio of width to height, as far as the picture of a size has room for it."""
    left, top, right, bottom = box
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grown(top, bottom, int((right - left) / ratio), size[1])
    else:
        left, right = _grown(left, right, int((bottom - top) * ratio), size[0])
    return left, top, right, bottom


def _grown(low: int, high: int, length: int, most: int) -> tuple[int, int]:
    """A stretch made `length` long, on both sides alike, and moved or cut to lie between 0 and `most`."""
    more = length - (high - low)
    low, high = low - more // 2, high + more - more // 2
    if high >= most:
        low, high = low - (high - most), most
    if low < 0:
        low, high = 0, high - low
    return low, min(high, most)


def put_back(picture: Image.Image, painted: Image.Image, mask: Image.Image, box: Box) -> Image.Image:
    """The picture with what was painted of the part in a box, where the picture's mask is white."""
    left, top, right, bottom = box
    whole = picture.convert("RGB")
    whole.paste(fit(painted.convert("RGB"), right - left, bottom - top, "crop").image, (left, top))
    return paste(picture, whole, mask)


def placed(mask: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """A mask of the part in a box as one of the whole picture, of a size, black around the part."""
    left, top, right, bottom = box
    whole = Image.new("L", size)
    whole.paste(fit(mask, right - left, bottom - top, "crop").image, (left, top))
    return whole


RADII = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""The radius of a blur, and how often its result is laid over the one before."""


def fill_masked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with the colours around a mask of its size drawn into it, ever finer towards its edge."""
    kept = Image.new("RGBa", picture.size)
    kept.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    filled = Image.new("RGBA", picture.size)
    for radius, times in RADII:
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            filled.alpha_composite(blurred)
    return filled.convert("RGB")
