"""Frames for the tests of streams: a disc that moves over a changing ground."""

from __future__ import annotations

import numpy as np
from PIL import Image


def clip(frames: int, side: int = 64) -> list[Image.Image]:
    """So many pictures, each another."""
    y, x = np.mgrid[:side, :side] / side
    out = []
    for number in range(frames):
        at = 0.2 + 0.6 * (number / max(frames - 1, 1))
        ground = np.stack([x, y, np.full_like(x, number / frames)], axis=-1)
        ground[(x - at) ** 2 + (y - 0.5) ** 2 < 0.04] = (0.9, 0.3, 0.1)
        out.append(Image.fromarray((ground * 255).round().astype(np.uint8)))
    return out
