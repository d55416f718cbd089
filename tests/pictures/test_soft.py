"""Soft inpainting against the formulas of A1111's extension, restated here cell by cell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from nativesd.pictures.masks import greys_to_latents
from nativesd.pictures.soft import SoftInpaint, SoftMask, blend, coverage, painted_share

ODD = SoftInpaint(1.5, 2.0, 8.0, 0.4, 1.25, 3.0)


def histogram(values: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
    """The extension's weighted_histogram_filter as its words have it: a stack of values, a window of its height."""
    tail = math.exp(-9 / 2.25)
    out = np.zeros_like(values)
    for y, x in np.ndindex(values.shape):
        stack = []
        for v in range(max(y - 2, 0), min(y + 3, values.shape[0])):
            for u in range(max(x - 2, 0), min(x + 3, values.shape[1])):
                weight = math.exp(-((v - y) ** 2 + (u - x) ** 2) / 2.25)
                stack.append((values[v, u], max(0.0, (weight - tail) / (1 - tail))))
        stack.sort()
        height = sum(weight for _, weight in stack)
        begin, end = height * low, height * high
        if end - begin < 1:
            begin, end = (begin + end) / 2 - 0.5, (begin + end) / 2 + 0.5
            if end > height:
                begin, end = height - 1, height
        reached, total, share = 0.0, 0.0, 0.0
        for value, weight in stack:
            part = max(0.0, min(end, reached + weight) - max(begin, reached))
            total, share, reached = total + value * part, share + part, reached + weight
        out[y, x] = total / share
    return out


@pytest.mark.parametrize("settings", [SoftInpaint(), ODD])
def test_what_is_mixed_keeps_its_length(settings: SoftInpaint) -> None:
    torch.manual_seed(0)
    known, denoised, cells = torch.randn(1, 4, 3, 5), torch.randn(2, 4, 3, 5) * 2, torch.rand(1, 1, 3, 5)
    sigma = 2.5
    share = painted_share(cells, sigma, settings)
    found = blend(known, denoised, share, settings)
    power = settings.inpaint_detail_preservation
    for b, y, x in np.ndindex(2, 3, 5):
        t = cells[0, 0, y, x].item() ** (sigma**settings.mask_blend_power * settings.mask_blend_scale)
        a, c = known[0, :, y, x].double().numpy(), denoised[b, :, y, x].double().numpy()
        mixed = a * (1 - t) + c * t
        length = (np.linalg.norm(a) ** power * (1 - t) + np.linalg.norm(c) ** power * t) ** (1 / power)
        wanted = mixed / (np.linalg.norm(mixed) + 0.00001) * length
        np.testing.assert_allclose(found[b, :, y, x].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_black_is_kept_and_white_is_painted_at_every_sigma() -> None:
    known, denoised = torch.randn(1, 4, 1, 2), torch.randn(1, 4, 1, 2)
    cells = torch.tensor([[[[0.0, 1.0]]]])
    for sigma in (14.6, 1.0, 0.03):
        mixed = blend(known, denoised, painted_share(cells, sigma, SoftInpaint()), SoftInpaint())
        torch.testing.assert_close(mixed, torch.lerp(known, denoised, cells), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [SoftInpaint(), ODD, SoftInpaint(composite_mask_influence=1)])
def test_what_covers_the_picture_afterwards(settings: SoftInpaint) -> None:
    generator = np.random.default_rng(0)
    distance, cells = generator.random((6, 9)) * 3, generator.random((6, 9))
    kept = 1 - cells ** (settings.mask_blend_scale / 2)
    kept = 0.5 * (1 - settings.composite_mask_influence) + kept * settings.composite_mask_influence
    half = settings.composite_difference_threshold * kept / (1.00001 - kept)
    opacity = 1 / (
        1 + (histogram(histogram(distance, 0.9, 1), 0.25, 0.75) / half) ** settings.composite_difference_contrast
    )
    wanted = 1 - opacity * opacity * opacity * (opacity * (6 * opacity - 15) + 10)
    found = coverage(torch.from_numpy(distance), torch.from_numpy(cells), settings)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("field", ["mask_blend_power", "mask_blend_scale", "composite_difference_threshold",
                                   "composite_difference_contrast", "composite_mask_influence"])  # fmt: skip
@pytest.mark.parametrize("influence", [0.0, 1.0])
def test_the_ends_of_the_ranges_are_finite(field: str, influence: float) -> None:
    distance, cells = torch.tensor([[0.0, 0.0, 2.0, 3.0]]), torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    settings = SoftInpaint(**{"composite_mask_influence": influence, field: 0.0})
    found = coverage(distance, cells, settings)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_call_s_mask_in_pixels() -> None:
    """Latents that have not moved leave the picture, those that have cover it, and each picture has its own."""
    mask = Image.new("L", (128, 64))
    mask.paste(255, (0, 0, 64, 64))
    mask = mask.filter(ImageFilter.GaussianBlur(16))
    cells = greys_to_latents(mask, 8)
    means = np.asarray(mask, np.float64).reshape(8, 8, 16, 8).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(cells[0, 0].numpy(), means, atol=0.02)
    soft = SoftMask(SoftInpaint())
    known = torch.zeros(1, 4, 8, 16)
    soft.begin(known, cells)
    latents = torch.zeros(2, 4, 8, 16)
    latents[0, :, :, :8] = 5
    moved, same = soft.composites(latents, 8)
    assert moved.size == same.size == mask.size
    assert same.getextrema() == (0, 0)
    assert np.asarray(moved)[:, :48].min() == 254  # of the cells, whose values are cut to whole numbers
    assert np.asarray(moved)[:, 104:].max() <= 1  # Lanczos rings
