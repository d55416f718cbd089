"""The embedded model paints what a prompt says, on pairs of subject and background that training never saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nativesd
import tiny_scenes as scenes
from nativesd.loading.settle import probe_prediction
from nativesd.sampling.published import SchedulerConfig
from nativesd.sampling.schedule import alphas_cumprod
from nativesd.shipped import LCM_LORA

PICTURES = 200
PALETTE = np.array(list(scenes.BACKGROUNDS.values()), np.float32) / 255


@pytest.fixture(scope="module")
def pipe() -> nativesd.Pipeline:
    return nativesd.load(device="cpu")


def unseen_scenes() -> list[scenes.Scene]:
    """Every pair of subject and background that was held out, and the first of them once more."""
    pairs = [(s, b) for s in range(len(scenes.subjects())) for b in range(len(PALETTE)) if scenes.held_out(s, b)]
    return [scenes.Scene(*pairs[i % len(pairs)]) for i in range(PICTURES)]


def drawings(background: int, size: int) -> tuple[np.ndarray, list[int]]:
    """Every subject in every size and place as it was trained, on one background, (N, pixels); and which it is.

    Training has no picture of a held-out pair, so among its own pictures the backgrounds would decide what is nearest.
    """
    every = [
        scenes.Scene(subject, background, small=small, place=place)
        for subject in range(len(scenes.subjects()))
        for small, place in [(False, 0), *((True, place) for place in range(len(scenes.PLACES)))]
    ]
    large, small = (scenes.artworks(round(side * size)) for side in (scenes.LARGE, scenes.SMALL))
    pictures = np.stack([scenes.render(scene, size, large, small).ravel() for scene in every])
    return pictures, [scene.subject for scene in every]


def judged(images: Sequence[Image.Image], asked: Sequence[scenes.Scene]) -> tuple[float, float]:
    """The shares of pictures whose border has the background's colour that was asked for, and of those whose nearest
    drawing is the subject."""
    made = np.stack([np.asarray(image, np.float32) / 255 for image in images])  # (N, H, W, 3)
    border = np.concatenate([made[:, 0], made[:, -1], made[:, :, 0], made[:, :, -1]], axis=1)  # (N, pixels, 3)
    colours = np.median(border, axis=1)
    painted = np.linalg.norm(colours[:, None] - PALETTE, axis=-1).argmin(axis=1)
    backgrounds = float(np.mean(painted == [scene.background for scene in asked]))

    right = 0
    for background in range(len(PALETTE)):
        trained, subjects = drawings(background, made.shape[1])
        lengths = (trained**2).sum(axis=1)
        for i in np.flatnonzero(painted == background):
            nearest = (lengths - 2 * trained @ made[i].ravel()).argmin()  # the squared distance, but for made[i]'s own
            right += subjects[nearest] == asked[i].subject
    print(f"\nbackground right {backgrounds:.1%}, subject right {right / len(asked):.1%} of {len(asked)}")
    return backgrounds, right / len(asked)


def faithful(pipe: nativesd.Pipeline, **options: Any) -> tuple[float, float]:
    """What is right of the pictures of unseen scenes, as `judged`."""
    asked, images = unseen_scenes(), list[Image.Image]()
    for start in range(0, len(asked), 50):
        prompts = [scenes.caption(scene) for scene in asked[start : start + 50]]
        images += pipe(prompts, seed=1000 + start, **options).images
    return judged(images, asked)


def test_meaning(pipe: nativesd.Pipeline) -> None:
    backgrounds, subjects = faithful(pipe)
    assert backgrounds >= 0.95
    assert subjects >= 0.80


def test_four_steps_without_guidance(pipe: nativesd.Pipeline) -> None:
    """With the LCM-LoRA that travels with the model; and without it as before, once it is taken out again."""
    options = {"sampler": "LCM", "steps": 4, "guidance_scale": 1}
    [plain] = pipe("a fox on a green background", seed=5, **options).images  # type: ignore[arg-type]
    backgrounds, subjects = faithful(pipe, loras=[LCM_LORA], **options)
    assert backgrounds >= 0.95
    assert subjects >= 0.70
    [again] = pipe("a fox on a green background", seed=5, **options).images  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(plain), np.asarray(again))


def test_seeds_of_a_batch_are_those_of_single_pictures(pipe: nativesd.Pipeline) -> None:
    batch = pipe("a fox on a green background", seed=5, num_images=3, steps=4, sampler="Euler a")
    assert batch.seeds == [5, 6, 7]
    alone = pipe("a fox on a green background", seed=6, steps=4, sampler="Euler a")
    again = pipe("a fox on a green background", seed=6, steps=4, sampler="Euler a")
    assert (batch.latents[1] - alone.latents[0]).abs().max() < 1e-3 * alone.latents.abs().max()
    assert (alone.latents == again.latents).all()
    assert (batch.latents[0] - batch.latents[1]).abs().max() > 0.1


def strawberry(pipe: nativesd.Pipeline) -> Image.Image:
    return pipe("a strawberry on a yellow background", seed=3).images[0]


def test_image_to_image_keeps_less_and_less(pipe: nativesd.Pipeline) -> None:
    """The first changes little; the last has the asked background, the picture's own no more."""
    first = np.asarray(strawberry(pipe), np.float32)
    changes, backgrounds = [], []
    for strength in (0.1, 0.5, 0.9):
        result = pipe("a cactus on a blue background", image=strawberry(pipe), strength=strength, seed=5)
        made = np.asarray(result.images[0], np.float32)
        changes.append(np.abs(made - first).mean())
        backgrounds.append(np.linalg.norm(PALETTE * 255 - np.median(made[:4].reshape(-1, 3), axis=0), axis=1).argmin())
    names = list(scenes.BACKGROUNDS)
    assert changes[0] < 15 < 50 < changes[1] < changes[2]
    assert (names[backgrounds[0]], names[backgrounds[2]]) == ("yellow", "blue")


def test_inpainting_follows_the_prompt_and_keeps_the_rest(pipe: nativesd.Pipeline) -> None:
    """Half a picture on ten backgrounds: the other half stays, the seam's fade aside."""
    first = strawberry(pipe)
    mask = Image.new("L", first.size)
    mask.paste(255, (0, 32, 64, 64))
    right = 0
    for index, colour in enumerate(scenes.BACKGROUNDS):
        result = pipe(f"a strawberry on a {colour} background", image=first, mask=mask, seed=5)
        made = np.asarray(result.images[0], np.float32)
        assert np.abs(made[:16] - np.asarray(first, np.float32)[:16]).max() <= 2
        corners = np.concatenate(
            [made[-6:].reshape(-1, 3), made[48:, :4].reshape(-1, 3), made[48:, -4:].reshape(-1, 3)]
        )
        right += np.linalg.norm(PALETTE * 255 - np.median(corners, axis=0), axis=1).argmin() == index
    print(f"\nrepainted in the asked colour: {right} of {len(PALETTE)}")
    assert right >= 7


def test_weights_move_the_background(pipe: nativesd.Pipeline) -> None:
    """The more the colour word weighs, the nearer its colour is; no more than a little, as the embedded model reads
    most of a prompt from the tokens after its end, which weights leave alone."""
    distances = []
    for weight in (0, 1, 1.5):
        prompts = [f"a strawberry on a ({colour}:{weight}) background" for colour in scenes.BACKGROUNDS]
        images = [np.asarray(image, np.float32) / 255 for image in pipe(prompts, seed=11, steps=10).images]
        borders = np.stack([np.concatenate([image[0], image[-1]]).mean(axis=0) for image in images])
        distances.append(np.linalg.norm(borders - PALETTE, axis=1).mean())
    print(f"\ndistance from the asked colour at weights 0, 1, 1.5: {[round(float(d), 4) for d in distances]}")
    assert distances[0] > distances[1] > distances[2]


def test_noise_is_the_same_twice_and_in_a_batch(pipe: nativesd.Pipeline) -> None:
    for sampler, kind in (("Euler a", "cpu"), ("DPM++ SDE", "cpu"), ("DPM++ 2M SDE", "cuda"), ("LCM", "cuda")):
        options = {"steps": 4, "sampler": sampler, "noise": kind}
        batch = pipe("a fox on a green background", seed=5, num_images=2, **options)  # type: ignore[arg-type]
        alone = pipe("a fox on a green background", seed=6, **options)  # type: ignore[arg-type]
        again = pipe("a fox on a green background", seed=6, **options)  # type: ignore[arg-type]
        assert (alone.latents == again.latents).all()
        assert (batch.latents[1] - alone.latents[0]).abs().max() < 1e-3 * alone.latents.abs().max()


def test_what_a_unet_predicts_is_seen_in_its_answer(pipe: nativesd.Pipeline) -> None:
    """The embedded model was trained for v; made to answer with the noise, it is taken for an epsilon model."""
    assert probe_prediction(pipe.unet)[0] == "v"

    class Epsilon(torch.nn.Module):
        """epsilon = sqrt(alpha) v + sqrt(1 - alpha) x (Salimans & Ho 2022, appendix D)."""

        config, conv_in = pipe.unet.config, pipe.unet.conv_in

        def forward(self, x: torch.Tensor, timestep: float, context: torch.Tensor) -> torch.Tensor:
            alpha = float(alphas_cumprod(SchedulerConfig())[int(timestep)])
            return alpha**0.5 * pipe.unet(x, timestep, context) + (1 - alpha) ** 0.5 * x

    assert probe_prediction(Epsilon())[0] == "epsilon"  # type: ignore[arg-type]


def test_an_empty_prompt_is_the_unconditional_picture(pipe: nativesd.Pipeline) -> None:
    result = pipe("", seed=1, steps=2)
    assert result.images[0].size == (64, 64)


def outline(image: Image.Image) -> np.ndarray:
    """The edges of a picture, (H, W) bool."""
    return np.asarray(nativesd.canny(image))[..., 0] > 0


def overlap(found: np.ndarray, wanted: np.ndarray, reach: int = 2) -> float:
    """F1 of two sets of edges, (H, W) bool, where an edge within `reach` pixels counts as met."""

    def near(edges: np.ndarray) -> np.ndarray:
        padded = np.pad(edges, reach)
        shifts = range(2 * reach + 1)
        height, width = edges.shape
        return np.any([padded[i : i + height, j : j + width] for i in shifts for j in shifts], axis=0)

    precision = (found & near(wanted)).sum() / max(found.sum(), 1)
    recall = (wanted & near(found)).sum() / max(wanted.sum(), 1)
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def test_edges_give_the_outline_and_the_prompt_the_colours(pipe: nativesd.Pipeline) -> None:
    """The edges of one scene and the prompt of another, with and without the embedded ControlNet."""
    rng, every = np.random.default_rng(0), scenes.scenes()
    large, small = (scenes.artworks(round(side * 64)) for side in (scenes.LARGE, scenes.SMALL))
    pairs = [[every[i] for i in rng.choice(len(every), 2, replace=False)] for _ in range(50)]
    options = {"steps": 10, "sampler": "DPM++ 2M"}
    free = pipe([scenes.caption(asked) for _, asked in pairs], seed=0, **options).images  # type: ignore[arg-type]
    steered, unsteered, backgrounds = [], [], 0
    for seed, ((shown, asked), plain) in enumerate(zip(pairs, free, strict=True)):
        picture = scenes.render(shown, 64, large, small)
        edges = nativesd.canny(Image.fromarray((picture * 255).round().astype(np.uint8)))
        control = nativesd.Control("tiny", edges)
        made = pipe(scenes.caption(asked), control=[control], seed=seed, **options).images[0]  # type: ignore[arg-type]
        wanted = np.asarray(edges)[..., 0] > 0
        steered.append(overlap(outline(made), wanted))
        unsteered.append(overlap(outline(plain), wanted))
        pixels = np.asarray(made, np.float32) / 255
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        backgrounds += np.linalg.norm(PALETTE - np.median(border, axis=0), axis=1).argmin() == asked.background
    with_control, without = np.mean(steered), np.mean(unsteered)
    print(f"\nedges' F1 {with_control:.3f}, without control {without:.3f}; background right in {backgrounds} of 50")
    assert with_control >= 2 * without
    assert backgrounds >= 45
