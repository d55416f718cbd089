"""Hints, regions and masks lie on what is painted as they lie on the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nativesd
from nativesd import Control, Region
from nativesd.errors import UsageError
from nativesd.pipeline.asked.arguments import check
from nativesd.pipeline.asked.inputs import Inputs, read_inputs
from nativesd.pipeline.asked.placed import on_painted, placed

OPTIONS: dict[str, Any] = {"steps": 2, "sampler": "Euler", "guidance_scale": 6.0, "seed": 3}


@pytest.fixture(scope="module")
def pipe() -> nativesd.Pipeline:
    """The embedded model, which has a ControlNet."""
    return nativesd.load(device="cpu")


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)


def spot(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


PART = {"mask": spot(160, 96, (20, 30, 50, 60)), "only_masked": 8, "width": 64, "height": 64, "mask_blur": 0}
WAYS: list[dict[str, Any]] = [
    PART,
    {"width": 64, "height": 64, "resize": "crop"},
    {"width": 64, "height": 64, "resize": "fill"},
    {"outpaint": (0, 16, 32, 0)},
    {"outpaint": (5, 0, 0, 3), "width": 80, "height": 64, "resize": "crop"},
]


def inputs_of(pipe: nativesd.Pipeline, **options: Any) -> Inputs:
    return read_inputs(pipe.config, check("a", {"image": noise(160, 96), **options}))


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_lies_on_itself(pipe: nativesd.Pipeline, way: dict[str, Any]) -> None:
    inputs = inputs_of(pipe, **way)
    assert inputs.picture is not None
    found = on_painted(noise(160, 96), inputs, drawn_out=True)
    assert found.tobytes() == inputs.picture.tobytes()
    small = Image.linear_gradient("L").resize((80, 48))
    large = on_painted(small.resize((160, 96)), inputs)
    apart = np.abs(np.asarray(on_painted(small, inputs), np.int16) - np.asarray(large, np.int16))
    assert apart.mean() < 3  # one of half the size lies there too


def test_what_has_the_result_s_size_or_another_shape_stays(pipe: nativesd.Pipeline) -> None:
    inputs = inputs_of(pipe, outpaint=(0, 16, 32, 0))
    for size in ((inputs.width, inputs.height), (50, 50)):
        assert on_painted(noise(*size), inputs).tobytes() == noise(*size).tobytes()
    border = np.asarray(on_painted(Image.new("L", (160, 96), 255), inputs))
    assert border[:16].max() == border[:, 160:].max() == 0
    assert border[16:, :160].min() == 255


def test_only_what_is_masked_is_steered_by_its_part(pipe: nativesd.Pipeline) -> None:
    picture, hint = noise(160, 96), Image.linear_gradient("L").resize((160, 96)).convert("RGB")
    inputs = inputs_of(pipe, **PART)
    left = Region("an owl", (0, 0, 0.5, 1))
    options = OPTIONS | {"strength": 0.7}
    found = pipe("a fox", image=picture, control=Control("tiny", hint), regions=left, **PART, **options)
    alone = pipe("a fox", image=inputs.picture, mask=inputs.mask, mask_blur=0, regions=Region("an owl", (0, 0, 1, 1)),
                 control=Control("tiny", on_painted(hint, inputs)), **options)  # fmt: skip
    assert torch.equal(found.latents, alone.latents)
    squeezed = pipe("a fox", image=inputs.picture, mask=inputs.mask, mask_blur=0, control=Control("tiny", hint),
                    regions=Region("an owl", (0, 0, 1, 1)), **options)  # fmt: skip
    assert not torch.equal(found.latents, squeezed.latents)


def test_what_lies_outside_is_said(pipe: nativesd.Pipeline) -> None:
    right = Region("an owl", (0.75, 0, 1, 1))
    found = pipe("a fox", image=noise(160, 96), regions=right, **PART, **OPTIONS)
    assert "the region 'an owl' is not used: it lies outside of what is repainted" in found.parameters["notes"]
    masked = nativesd.ImagePrompt("adapter", noise(8, 8), mask=spot(160, 96, (100, 0, 160, 96)))
    asked = check("a", {"image": noise(160, 96), "image_prompts": masked, **PART})  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="only outside of what is painted"):
        placed(asked, read_inputs(pipe.config, asked))
