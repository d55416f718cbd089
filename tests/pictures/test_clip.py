"""Pictures as CLIP's image encoders take them, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nativesd.errors import UsageError
from nativesd.pictures.clip import clip_pixels

SIZES = [(224, 224), (640, 480), (333, 517), (225, 224), (100, 61), (37, 1000), (1, 1)]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_transformers(size: tuple[int, int]) -> None:
    picture = noise(*size)
    expected = CLIPImageProcessorPil()(picture, return_tensors="pt").pixel_values
    assert (clip_pixels([picture]) - expected).abs().max() <= 1e-6


def test_other_squares() -> None:
    picture = Image.new("RGB", (100, 300), "black")
    picture.paste("white", (0, 0, 100, 100))
    white, black = (clip_pixels([Image.new("RGB", (9, 9), colour)]) for colour in ("white", "black"))
    inside = np.s_[:, :, 4:-4, 4:-4]  # of the edges, bicubic takes both sides
    assert torch.equal(clip_pixels([picture], crop="top")[inside], white[inside])
    for crop in ("center", "left", "bottom"):
        assert torch.equal(clip_pixels([picture], crop=crop)[inside], black[inside])  # type: ignore[arg-type]
    padded = clip_pixels([picture], side=300, crop="pad")
    assert torch.equal(padded[0, :, 10, 150], white[0, :, 0, 0])
    assert torch.equal(padded[0, :, 10, 50], black[0, :, 0, 0])
    assert clip_pixels([picture, noise(9, 8)], side=28).shape == (2, 3, 28, 28)


def test_what_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"crop must be one of center, top, .*, not 'face'"):
        clip_pixels([noise(9, 9)], crop="face")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a picture of 9000x1 is too long"):
        clip_pixels([Image.new("RGB", (9000, 1))])
