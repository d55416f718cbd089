"""The embedded model, as a user meets it."""

from __future__ import annotations

import pytest

import nativesd


@pytest.fixture(scope="module")
def pipe() -> nativesd.Pipeline:
    return nativesd.load(device="cpu")


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
