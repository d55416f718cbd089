"""Pictures, masks and hints of their own for each prompt, and ControlNets that inpaint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nativesd
from nativesd import Control, Variation
from nativesd.diffusion.control import hint_pixels
from nativesd.errors import Interrupted, NativesdError, UsageError
from nativesd.shipped import LCM_LORA

OPTIONS: dict[str, Any] = {"steps": 3, "sampler": "Euler", "guidance_scale": 6.0, "strength": 0.7}


@pytest.fixture(scope="module")
def pipe() -> nativesd.Pipeline:
    """The embedded model, which has a ControlNet."""
    return nativesd.load(device="cpu")


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def half(left: bool) -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64) if left else (32, 0, 64, 64))
    return mask


def test_each_prompt_has_its_own(pipe: nativesd.Pipeline, tmp_path: Path) -> None:
    prompts, pictures, masks = ["a fox", "an owl"], [plain("red"), plain("blue")], [half(True), half(False)]
    control = Control("tiny", [plain("white"), plain("black")])
    options = OPTIONS | {"mask_blur": 0, "num_images": 2, "negative_prompt": ["yellow", "green"]}
    together = pipe(prompts, image=pictures, mask=masks, control=control, seed=5, **options)
    assert together.seeds == [5, 6, 7, 8]
    for i, prompt in enumerate(prompts):
        alone = pipe(
            prompt, image=pictures[i], mask=masks[i], control=Control("tiny", [plain("white"), plain("black")][i]),
            seed=5 + 2 * i, **(options | {"negative_prompt": ["yellow", "green"][i]}),
        )  # fmt: skip
        assert torch.equal(together.latents[2 * i : 2 * i + 2], alone.latents)
        assert together.images[2 * i].tobytes() == alone.images[0].tobytes()
        assert together.infotext(2 * i) == alone.infotext(0)
    assert len(together.save(tmp_path / "pair.png")) == 4
    shared = pipe(prompts, image=pictures[0], seed=5, **OPTIONS)
    assert len(shared.images) == 2


def test_what_does_not_fit_is_said(pipe: nativesd.Pipeline) -> None:
    with pytest.raises(UsageError, match="image must be one picture, or one for each of 2 prompts, not 3"):
        pipe(["a", "b"], image=[plain("red")] * 3, **OPTIONS)
    with pytest.raises(UsageError, match="of one size"):
        pipe(["a", "b"], image=[plain("red"), plain("red").resize((64, 96))], seed=1, **OPTIONS)
    with pytest.raises(UsageError, match="must be a picture"):
        pipe(["a", "b"], image=[plain("red"), 3], **OPTIONS)


def test_each_picture_has_the_noise_and_the_words_of_one_made_alone(pipe: nativesd.Pipeline) -> None:
    variation = Variation((1 << 64) - 2, 0.4)
    tagged = f"an owl <lora:{LCM_LORA.stem}:0.5>"
    prompts, pictures = [tagged, "a fox"], [plain("red"), plain("blue")]
    together = pipe(prompts, image=pictures, seed=5, num_images=2, variation=variation, **OPTIONS)
    for i, prompt in enumerate(prompts):
        seed = (variation.seed or 0) + 2 * i & (1 << 64) - 1
        own = replace(variation, seed=seed)
        alone = pipe(prompt, image=pictures[i], seed=5, num_images=2, variation=own, **OPTIONS)
        assert torch.equal(together.latents[2 * i : 2 * i + 2], alone.latents)
        assert [together.infotext(2 * i + k) for k in (0, 1)] == [alone.infotext(k) for k in (0, 1)]
    assert f"Variation seed: {(1 << 64) - 1}," in together.infotext(1)
    assert "Variation seed: 1," in together.infotext(3)
    assert "LoRAs" in together.infotext(0)
    assert "LoRAs" not in together.infotext(2)
    assert "loras" not in together.parameters
    assert together.parameters["variation"]["seed"] == variation.seed


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (["a", "b"], {"image": [plain("red"), "missing.png"]}, "missing.png"),
        (["a", "b"], {"control": Control("tiny", [plain("red"), "missing.png"])}, "missing.png"),
        (["a", "b <lora:unknown:1>"], {"image": [plain("red")] * 2}, "unknown"),
        (["a", "b"], {"image": [plain("red"), plain("red").resize((64, 96))]}, "of one size"),
    ],
)
def test_what_cannot_be_is_found_before_anything_is_painted(
    pipe: nativesd.Pipeline, prompts: Any, options: dict[str, Any], said: str
) -> None:
    painted: list[nativesd.Step] = []
    given = {name: value for name, value in OPTIONS.items() if name != "strength" or "image" in options}
    with pytest.raises(NativesdError, match=said):
        pipe(prompts, on_step=painted.append, **options, **given)
    assert not painted


def test_an_ended_call_has_what_was_made(pipe: nativesd.Pipeline) -> None:
    steps = iter(range(100))

    def stop(step: nativesd.Step) -> None:
        if next(steps) == 3:
            pipe.interrupt()

    with pytest.raises(Interrupted) as ended:
        pipe(["a", "b"], image=[plain("red"), plain("blue")], seed=1, on_step=stop, **OPTIONS)
    assert len(ended.value.result().images) == 2


def test_a_hint_for_inpainting_is_diffusers() -> None:
    """`make_inpaint_condition` of its documentation: the picture from 0 to 1, and -1 where the mask is white."""
    generator = np.random.default_rng(1)
    picture = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = half(True)
    image = np.array(picture.convert("RGB")).astype(np.float32) / 255.0
    image[np.array(mask.convert("L")).astype(np.float32) / 255.0 > 0.5] = -1.0
    expected = torch.from_numpy(np.expand_dims(image, 0).transpose(0, 3, 1, 2))
    holed = picture.convert("RGBA")
    holed.putalpha(mask.point(lambda value: 255 - value))
    found = hint_pixels(Control("tiny", preprocess="inpaint"), holed, (64, 64))
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_control_inpaints_the_call_s_picture(pipe: nativesd.Pipeline) -> None:
    picture, mask = plain("green"), half(False)
    holed = picture.convert("RGBA")
    holed.putalpha(mask.point(lambda value: 255 - value))
    options = OPTIONS | {"image": picture, "mask": mask, "mask_blur": 0, "seed": 3}
    found = pipe("a fox", control=Control("tiny", preprocess="inpaint"), **options)
    assert torch.equal(
        found.latents, pipe("a fox", control=Control("tiny", holed, preprocess="inpaint"), **options).latents
    )
    assert not torch.equal(found.latents, pipe("a fox", control=Control("tiny", picture), **options).latents)
    with pytest.raises(UsageError, match="image= and mask="):
        pipe("a fox", control=Control("tiny", preprocess="inpaint"), seed=1, steps=1)
