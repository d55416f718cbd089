"""The embedded image encoder and IP-Adapter: a picture says what is painted, and the text on what."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import nativesd
import tiny_scenes as scenes
from conftest import Run
from nativesd import ImagePrompt
from nativesd.shipped import IP_ADAPTER, TINY
from pipeline.test_image_modes import compare
from pipeline.test_tiny import judged
from tiny_image_prompts import WAYS, subjectless

PAIRS = 50
QUICK = {"steps": 10, "sampler": "DPM++ 2M"}


@pytest.fixture(scope="module")
def pipe() -> nativesd.Pipeline:
    return nativesd.load(device="cpu")


def pairs() -> list[tuple[scenes.Scene, scenes.Scene]]:
    """What is shown, on any background, and what is asked for: the subject where training never painted it,
    so that there no text ever stood beside any picture of it."""
    rng = np.random.default_rng(0)
    out = []
    for number, subject in enumerate(rng.choice(len(scenes.subjects()), PAIRS, replace=False).tolist()):
        asked = next(b for b in range(len(scenes.BACKGROUNDS)) if scenes.held_out(subject, b))
        other = (asked + int(rng.integers(1, len(scenes.BACKGROUNDS)))) % len(scenes.BACKGROUNDS)
        out.append((scenes.Scene(subject, other, *WAYS[number % len(WAYS)]), scenes.Scene(subject, asked)))
    return out


def drawn(scene: scenes.Scene) -> Image.Image:
    """The picture of a scene, as it is drawn."""
    large, small = (scenes.artworks(round(side * 64)) for side in (scenes.LARGE, scenes.SMALL))
    return Image.fromarray((scenes.render(scene, 64, large, small) * 255).round().astype(np.uint8))


def test_the_subject_of_the_picture_on_the_background_of_the_text(pipe: nativesd.Pipeline) -> None:
    every = pairs()
    images = [
        pipe(subjectless(asked), image_prompts=[ImagePrompt("tiny", drawn(shown))], seed=seed, **QUICK).images[0]  # type: ignore[arg-type]
        for seed, (shown, asked) in enumerate(every)
    ]
    backgrounds, subjects = judged(images, [asked for _, asked in every])
    assert backgrounds >= 0.90
    assert subjects >= 0.70


def test_diffusers_paints_the_same(pipe: nativesd.Pipeline) -> None:
    """The files as they travel: a model's folder with an adapter in it, and the encoder beside the adapter."""
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    oracle.load_ip_adapter(TINY, subfolder=IP_ADAPTER.parent.name, weight_name=IP_ADAPTER.name)
    prompt, picture = "a picture on a yellow background", drawn(scenes.Scene(8, 7))
    expected = oracle(
        prompt, ip_adapter_image=picture, num_inference_steps=5, guidance_scale=3.0, output_type="np",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    result = pipe(prompt, image_prompts=ImagePrompt("tiny", picture), steps=5, guidance_scale=3, seed=5)
    compare(pipe, result, expected)


def test_no_picture_leaves_the_text_alone(pipe: nativesd.Pipeline) -> None:
    """A picture of zeros, which the negative prompt is shown, changes what the text says far less than others do."""
    prompt = "a strawberry on a yellow background"
    states = pipe.encode_image(drawn(scenes.Scene(52, 7)), "tiny").negative_states
    zeros = nativesd.ImageEmbeddings(states=states, negative_states=states)
    alone = pipe(prompt, seed=3, **QUICK).latents  # type: ignore[arg-type]
    nothing, fox = (
        (pipe(prompt, image_prompts=ImagePrompt("tiny", shown), seed=3, **QUICK).latents - alone).abs().mean()  # type: ignore[arg-type]
        for shown in (zeros, drawn(scenes.Scene(52, 7)))
    )
    print(f"\nchanged by zeros {nothing:.3f}, by another subject {fox:.3f}")
    assert nothing < fox / 2


def test_the_name_in_every_place(pipe: nativesd.Pipeline, run: Run, tmp_path: Path) -> None:
    """Of the adapter and of the encoder: in Python and on the command line."""
    drawn(scenes.Scene(8, 7)).save(tmp_path / "first.png")
    prompt = "a picture on a yellow background"
    told = pipe.encode_image(tmp_path / "first.png", "tiny")
    result = pipe(prompt, image_prompts=ImagePrompt("tiny", told, 0.9), seed=3, steps=2)
    assert result.parameters["image_prompts"] == ["tiny"]
    done = run(
        "generate", prompt, "--image-prompt", "tiny", "first.png", "--image-prompt-scale", "0.9", "--image-encoder",
        "tiny", "--seed", "3", "--steps", "2", "--device", "cpu", "-o", "second.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "does not know" not in done.stderr
    made = np.asarray(Image.open(tmp_path / "second.png"), np.int16)
    assert np.abs(made - np.asarray(result.images[0], np.int16)).max() <= 1
