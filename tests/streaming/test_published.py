"""Streams against the published ones: same weights, prompt, noise and frames."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import nativesd
from nativesd.streaming.similar import SimilarFilter
from nativesd.weights import model as weights_model
from oracles import TOLERANCE, difference
from pipeline.test_image_modes import theirs
from pipeline.test_pipeline import save_model
from streaming.clips import clip
from streaming.published import Published, published_module

FRAMES = 8
PROMPT, NEGATIVE = "a red cat", "a dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "sd15"
    save_model("sd15", path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> nativesd.Pipeline:
    return nativesd.load(folder, device="cpu")


def compare(stream: nativesd.Stream, oracle: Published, frames: list[Any]) -> None:
    """Every picture, from the first that is one."""
    for number, frame in enumerate(frames):
        expected, found = oracle(frame), stream(frame)
        assert (found is None) == (number < stream.slots - 1)
        if found is not None:
            assert isinstance(found.image, Tensor)
            assert difference(found.image, expected) <= TOLERANCE, number


@pytest.mark.parametrize("frames", ["pictures", "noise"])
@pytest.mark.parametrize("renoise", [True, False], ids=["renoised", "not renoised"])
@pytest.mark.parametrize("indices", [[32], [32, 45], [0, 16, 32, 45]], ids=["1", "2", "4"])
@pytest.mark.parametrize("residual", ["self", "initialize", "full", "none"])
def test_every_mode(
    folder: Path, ours: nativesd.Pipeline, residual: str, indices: list[int], renoise: bool, frames: str
) -> None:
    given = {"negative_prompt": NEGATIVE, "guidance_scale": 1.4, "delta": 0.8}
    oracle = Published(
        theirs(diffusers.StableDiffusionPipeline, folder), indices, residual, PROMPT, renoise=renoise, seed=2, **given
    )
    stream = ours.stream(PROMPT, t_index_list=indices, residual=residual, renoise=renoise, output="tensor", **given)  # type: ignore[misc]
    compare(stream, oracle, clip(FRAMES) if frames == "pictures" else [None] * FRAMES)


def test_without_guidance(folder: Path, ours: nativesd.Pipeline) -> None:
    oracle = Published(
        theirs(diffusers.StableDiffusionPipeline, folder), [20, 35, 45], "self", PROMPT, guidance_scale=1.0
    )
    compare(ours.stream(PROMPT, t_index_list=[20, 35, 45], output="tensor"), oracle, clip(FRAMES))


def test_another_prompt_holds_for_all_slots(folder: Path, ours: nativesd.Pipeline) -> None:
    oracle = Published(
        theirs(diffusers.StableDiffusionPipeline, folder), [20, 35, 45], "self", PROMPT, guidance_scale=1.3
    )
    stream = ours.stream(PROMPT, t_index_list=[20, 35, 45], guidance_scale=1.3, output="tensor")
    compare(stream, oracle, clip(5))
    oracle.stream.update_prompt("a green tree")
    stream.update(prompt="a green tree")
    for frame in clip(FRAMES):
        found = stream(frame)
        assert found is not None
        assert isinstance(found.image, Tensor)
        assert difference(found.image, oracle(frame)) <= TOLERANCE


def test_taesd(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    tiny = diffusers.AutoencoderTiny()
    tiny.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    monkeypatch.setattr(weights_model, "locate_taesd", lambda family: file)
    pipe = theirs(diffusers.StableDiffusionPipeline, folder)
    pipe.vae = tiny
    oracle = Published(pipe, [32, 45], "self", PROMPT, guidance_scale=1.2)
    stream = nativesd.load(folder, device="cpu", vae="taesd").stream(
        PROMPT, t_index_list=[32, 45], guidance_scale=1.2, output="tensor"
    )
    compare(stream, oracle, clip(FRAMES))


def test_the_boundary_condition(folder: Path, tmp_path: Path) -> None:
    """At the published scale of 10 it is below rounding, so here it is larger."""
    pipe = theirs(diffusers.StableDiffusionPipeline, folder)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config, timestep_scaling=0.01)
    pipe.save_pretrained(tmp_path)
    oracle = Published(pipe, [20, 35, 45], "self", PROMPT, guidance_scale=1.3)
    stream = nativesd.load(tmp_path, device="cpu").stream(
        PROMPT, t_index_list=[20, 35, 45], guidance_scale=1.3, output="tensor"
    )
    compare(stream, oracle, clip(FRAMES))


def test_turbo_from_noise(folder: Path, ours: nativesd.Pipeline) -> None:
    """The published one leaves the boundary condition out, which at 999 is 1 to 3e-9."""
    oracle = Published(theirs(diffusers.StableDiffusionPipeline, folder), [0], "none", PROMPT, guidance_scale=1.0)
    stream = ours.stream(PROMPT, t_index_list=[0], output="tensor")
    for _ in range(FRAMES):
        expected, found = oracle.turbo(), stream()
        assert found is not None
        assert isinstance(found.image, Tensor)
        assert difference(found.image, expected) <= TOLERANCE


@pytest.mark.parametrize(("threshold", "most"), [(0.98, 10), (0.9, 2), (1.0, 10), (-1.0, 3)])
def test_the_published_filter(threshold: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chance makes the same choice, over frames that are like each other and such that are not."""
    module = published_module("image_filter")
    oracle = module.SimilarImageFilter(threshold, most)
    monkeypatch.setattr(module.random, "uniform", random.Random(3).uniform)
    ours = SimilarFilter(nativesd.Similar(threshold=threshold, max_skip=most, measure="cosine", seed=3))
    generator = torch.Generator().manual_seed(0)
    frame = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    skipped = 0
    for number in range(200):
        wild = 1.0 if number % 17 == 0 else 0.05
        frame = (frame + wild * torch.randn(frame.shape, generator=generator)).clamp(-1, 1)
        expected = oracle(frame) is None
        assert ours.skips(frame) == expected, number
        skipped += expected
    assert (skipped > 0) == (threshold < 1)
