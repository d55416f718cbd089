"""The embedded model paints what a prompt says, on pairs of subject and background that training never saw."""

from __future__ import annotations

import numpy as np
import pytest

import nativesd
import tiny_scenes as scenes

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


def test_meaning(pipe: nativesd.Pipeline) -> None:
    """The border's colour is the background that was asked for, and the nearest drawing the subject."""
    asked = unseen_scenes()
    pictures = []
    for start in range(0, len(asked), 50):
        prompts = [scenes.caption(scene) for scene in asked[start : start + 50]]
        pictures += [np.asarray(image, np.float32) / 255 for image in pipe(prompts, seed=1000 + start).images]
    made = np.stack(pictures)  # (N, H, W, 3)

    border = np.concatenate([made[:, 0], made[:, -1], made[:, :, 0], made[:, :, -1]], axis=1)  # (N, pixels, 3)
    colours = np.median(border, axis=1)
    painted = np.linalg.norm(colours[:, None] - PALETTE, axis=-1).argmin(axis=1)
    backgrounds = float(np.mean(painted == [scene.background for scene in asked]))

    right = 0
    for background in range(len(PALETTE)):
        trained, subjects = drawings(background, made.shape[1])
        for i in np.flatnonzero(painted == background):
            nearest = ((trained - made[i].ravel()) ** 2).sum(axis=1).argmin()
            right += subjects[nearest] == asked[i].subject

    print(f"\nbackground right {backgrounds:.1%}, subject right {right / len(asked):.1%} of {len(asked)}")
    assert backgrounds >= 0.95
    assert right >= 0.80 * len(asked)


def test_seeds_of_a_batch_are_those_of_single_pictures(pipe: nativesd.Pipeline) -> None:
    batch = pipe("a fox on a green background", seed=5, num_images=3, steps=4, sampler="Euler a")
    assert batch.seeds == [5, 6, 7]
    alone = pipe("a fox on a green background", seed=6, steps=4, sampler="Euler a")
    again = pipe("a fox on a green background", seed=6, steps=4, sampler="Euler a")
    assert (batch.latents[1] - alone.latents[0]).abs().max() < 1e-3 * alone.latents.abs().max()
    assert (alone.latents == again.latents).all()
    assert (batch.latents[0] - batch.latents[1]).abs().max() > 0.1


def test_an_empty_prompt_is_the_unconditional_picture(pipe: nativesd.Pipeline) -> None:
    result = pipe("", seed=1, steps=2)
    assert result.images[0].size == (64, 64)
