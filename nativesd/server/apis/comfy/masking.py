"""Masks of latents: white is painted anew, as in ComfyUI's nodes.py (`VAEEncodeForInpaint`, `SetLatentNoiseMask`)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image

from nativesd.pictures.masks import mask_to_tensor

GRAY = (128, 128, 128)


def grown(mask: Image.Image, size: tuple[int, int], by: int) -> Image.Image:
    """A mask "L" of a picture's size, hard, and larger by so many pixels."""
    hard = mask_to_tensor(mask.resize(size, Image.Resampling.BILINEAR)).round()  # (1, 1, H, W)
    if by > 1:
        hard = F.conv2d(hard, torch.ones(1, 1, by, by), padding=math.ceil((by - 1) / 2)).clamp(0, 1)
    pixels = (hard[0, 0, : size[1], : size[0]] * 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def holed(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture with gray where a mask is white."""
    return Image.composite(Image.new("RGB", picture.size, GRAY), picture, grown(mask, picture.size, 0))
