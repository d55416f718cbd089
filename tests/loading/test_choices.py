"""What loading decides by what a file says: its sigmas, its steps, and which autoencoder goes with it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import nativesd
from nativesd.checkpoints.convert import convert
from nativesd.errors import NativesdWarning, SourceError, UsageError
from nativesd.models.tiny_vae import TinyVAE
from nativesd.sampling.published import EDM
from nativesd.shipped import TAESD, TINY

pytestmark = pytest.mark.filterwarnings("ignore:.*no published form")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The embedded model's tensors in the ldm layout."""
    path = tmp_path_factory.mktemp("single") / "single.safetensors"
    convert("tiny", path, layout="ldm")
    return load_file(path)


def load(path: Path, **options: object) -> nativesd.Pipeline:
    return nativesd.load(path, device="cpu", fast=False, **options)  # type: ignore[arg-type]


def test_cosxls_sigmas_are_its_two_numbers(single: dict[str, Tensor], tmp_path: Path) -> None:
    markers = {"edm_vpred.sigma_max": torch.tensor(110.0), "edm_vpred.sigma_min": torch.tensor(0.25)}
    save_file(single | markers, tmp_path / "cos.safetensors")
    config = load(tmp_path / "cos.safetensors").config
    assert (config.prediction, config.scheduler.edm) == ("v", EDM(0.25, 110.0, 1.0, "exponential"))
    save_file(single | {"edm_vpred.sigma_max": torch.zeros(2)}, tmp_path / "bad.safetensors")
    with pytest.raises(SourceError, match="not one number"):
        load(tmp_path / "bad.safetensors")


def test_playground_is_sampled(single: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(single | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, tmp_path / "play.safetensors")
    pipeline = load(tmp_path / "play.safetensors")
    assert (pipeline.config.prediction, pipeline.config.scheduler.edm) == ("epsilon", EDM(0.002, 80.0, 0.5, "karras"))
    assert pipeline.config.scheduler.class_name == "DPMSolverMultistepScheduler"
    assert pipeline.config.vae.mean is not None
    assert pipeline("a red cat", steps=2, seed=1).images[0].size[0] > 0
    with pytest.raises(SourceError, match="not those that TAESD was trained on"):
        load(tmp_path / "play.safetensors", vae="taesd")


def test_few_steps_are_said(single: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("HyperRealism", "realCMix"):
        save_file(single, tmp_path / f"{name}.safetensors")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*few steps")
            assert load(tmp_path / f"{name}.safetensors").config.steps is None
    save_file(single, tmp_path / "model_lightning_8step.safetensors")
    with pytest.warns(NativesdWarning, match="model of few steps, as the file's name says lightning: 8 steps"):
        config = load(tmp_path / "model_lightning_8step.safetensors").config
    assert (config.steps, config.scheduler.class_name, config.scheduler.spacing) == (
        8,
        "EulerDiscreteScheduler",
        "trailing",
    )
    save_file(single, tmp_path / "plain.safetensors", metadata={"modelspec.title": "Something Turbo"})
    with pytest.warns(NativesdWarning, match="the file's title says turbo"):
        assert load(tmp_path / "plain.safetensors").config.steps == 4


def test_metadata_says_the_prediction(single: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(single, tmp_path / "v.safetensors", metadata={"modelspec.predict_key": "v"})
    config = load(tmp_path / "v.safetensors").config
    assert config.prediction == "v"
    assert "prediction" not in config.inferred


def test_latents_of_another_family_are_refused(tmp_path: Path) -> None:
    vae = load_file(TINY / "vae" / "diffusion_pytorch_model.safetensors")
    width = vae["decoder.conv_in.weight"].shape[0]
    vae["decoder.conv_in.weight"] = torch.zeros(width, 8, 3, 3)
    vae |= {"post_quant_conv.weight": torch.zeros(8, 8, 1, 1), "post_quant_conv.bias": torch.zeros(8)}
    vae |= {"quant_conv.weight": torch.zeros(16, 16, 1, 1), "quant_conv.bias": torch.zeros(16)}
    top = vae["encoder.conv_out.weight"].shape[1]
    vae |= {"encoder.conv_out.weight": torch.zeros(16, top, 3, 3), "encoder.conv_out.bias": torch.zeros(16)}
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(SourceError, match="latents have 4 channels, the VAE's 8"):
        load(TINY, vae=tmp_path / "vae.safetensors")


def photo() -> Tensor:
    """A picture (1, 3, 192, 256) in [-1, 1] with edges, gradients and noise."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 192), torch.linspace(0, 1, 256), indexing="ij")
    rings = torch.stack([(20 * x).sin(), (15 * y * x).cos(), ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float() * 2 - 1])
    noise = torch.randn(3, 192, 256, generator=torch.Generator().manual_seed(0))
    return (0.8 * rings + 0.1 * noise).clamp(-1, 1)[None]


@pytest.mark.parametrize("name", ["taesd", "taesdxl"])
@torch.inference_mode()
def test_the_published_taesd_computes_what_diffusers_does(name: str) -> None:
    pipeline = load(TINY, vae=TAESD / f"{name}_decoder.safetensors")
    ours, theirs = pipeline.vae, AutoencoderTiny().eval()
    assert isinstance(ours, TinyVAE)
    state = {}
    for half, shift in (("encoder", 0), ("decoder", 1)):  # the original's number 0 is the squeezing
        for key, tensor in load_file(TAESD / f"{name}_{half}.safetensors").items():
            number, _, rest = key.partition(".")
            state[f"{half}.layers.{int(number) - shift}.{rest}"] = tensor.float()
    theirs.load_state_dict(state)
    pixels = photo()
    latents = ours.encode(pixels)
    assert torch.equal(latents, theirs.encode(pixels).latents)
    assert torch.equal(ours.decode(latents), theirs.decode(latents).sample)
    assert (ours.decode(latents) - pixels).abs().mean() < 0.2  # it is the picture


def test_taesd_needs_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline = load(TINY, vae="taesd", preview="taesd")
    assert isinstance(pipeline.vae, TinyVAE)
    assert isinstance(pipeline.previewer, TinyVAE)
    assert pipeline.vae.config.half is None


def test_halves(tmp_path: Path) -> None:
    """An encoder and a decoder beside each other are one autoencoder; alone, each does what it can."""
    tensors = load_file(TINY / "vae" / "diffusion_pytorch_model.safetensors")
    parts = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
    for half, own in parts.items():
        save_file({k: t for k, t in tensors.items() if k.startswith(own)}, tmp_path / f"vae_{half}.safetensors")
    both = load(TINY, vae=tmp_path / "vae_encoder.safetensors").vae
    assert both.config.half is None
    whole = load(TINY).vae
    assert all(torch.equal(a, b) for a, b in zip(both.parameters(), whole.parameters(), strict=True))
    (tmp_path / "vae_decoder.safetensors").rename(tmp_path / "alone.safetensors")
    pipeline = load(TINY, vae=tmp_path / "alone.safetensors")
    picture = pipeline("a red cat", steps=2, seed=1).images[0]
    save_file(tensors, tmp_path / "whole.safetensors")
    expected = load(TINY, vae=tmp_path / "whole.safetensors")("a red cat", steps=2, seed=1).images[0]
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    with pytest.raises(UsageError, match="decoder alone, and this call needs the encoder"):
        pipeline("a red cat", image=Image.new("RGB", (64, 64)), steps=2, strength=0.5)
    with pytest.raises(SourceError, match="encoder alone"):
        load(TINY, vae=tmp_path / "vae_encoder.safetensors")
