"""Pictures as CLIP's image encoders take them: a square of the picture, scaled and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nativesd.errors import UsageError

Crop = Literal["center", "top", "bottom", "left", "right", "pad"]
# openai/CLIP clip/clip.py, `_transform`: the mean and standard deviation of the pictures that it was trained on
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

LONGEST = 64
"""How many times as long as wide a picture may be: nothing is left of longer ones in a square."""


def clip_pixels(pictures: Sequence[Image.Image], side: int = 224, crop: Crop = "center") -> Tensor:
    """RGB pictures of any sizes to (B, 3, side, side) float32, normalised.

    The shorter side is scaled to `side` (bicubic), and a square is cut out of the rest: its middle, as CLIP was trained
    and as transformers' CLIPImageProcessor does, or what is at one end (a face is often at the "top"). "pad" keeps the
    whole picture, scaled to fit in, with black beside it. Raises UsageError for another `crop`, and for pictures that
    are far too long.
    """
    if crop not in get_args(Crop):
        raise UsageError(f"crop must be one of {', '.join(get_args(Crop))}, not {crop!r}")
    squares = torch.stack([torch.from_numpy(np.array(_square(picture, side, crop))) for picture in pictures])
    pixels = squares.permute(0, 3, 1, 2).float() / 255  # (B, H, W, 3) -> (B, 3, H, W)
    mean, std = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in (MEAN, STD))
    return (pixels - mean) / std


def _square(picture: Image.Image, side: int, crop: Crop) -> Image.Image:
    width, height = picture.size
    if max(width, height) > LONGEST * min(width, height):
        raise UsageError(f"a picture of {width}x{height} is too long for an image encoder, which sees squares: crop it")
    limit = max(picture.size) if crop == "pad" else min(picture.size)
    size = (max(side * width // limit, 1), max(side * height // limit, 1))
    scaled = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    places = {"left": 0, "top": 0, "right": size[0] - side, "bottom": size[1] - side}
    left = places[crop] if crop in ("left", "right") else (size[0] - side) // 2
    top = places[crop] if crop in ("top", "bottom") else (size[1] - side) // 2
    return scaled.crop((left, top, left + side, top + side))  # outside of the picture it is black
