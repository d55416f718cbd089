"""LoRAs of which a part has no place in the model: refused, or applied on request, and named."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nativesd
from conftest import Run
from nativesd.errors import NativesdWarning, WeightsError
from nativesd.shipped import TINY

HERE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PROMPT = "a fox on a green background"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A change that the embedded model has a place for, and twelve keys that it has none for."""
    weight = load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors")[f"{HERE}.weight"]
    rows, columns = weight.shape[:2]
    path = tmp_path / "style.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"unet.{HERE}.lora_A.weight": torch.randn(2, columns, generator=generator),
               f"unet.{HERE}.lora_B.weight": torch.randn(rows, 2, generator=generator)}  # fmt: skip
    for i in range(6):
        tensors[f"unet.mid_block.nowhere.{i}.lora_A.weight"] = torch.zeros(2, columns)
        tensors[f"unet.mid_block.nowhere.{i}.lora_B.weight"] = torch.zeros(rows, 2)
    save_file(tensors, path)
    return path


NAMED = r"12 of its 14 keys found no place.*\n  unet.mid_block.nowhere.* \(12\).*: the unet has no module of this name"


def test_in_a_call_at_load_and_by_hand(lora: Path) -> None:
    pipe = nativesd.load(device="cpu")
    with pytest.raises(WeightsError, match=r"partial=True applies the others"):
        pipe(PROMPT, loras=[lora], steps=1)
    plain = pipe(PROMPT, steps=2, seed=1).latents
    with pytest.warns(NativesdWarning, match=NAMED):
        changed = pipe(PROMPT, loras=[lora], partial=True, steps=2, seed=1).latents
    assert not torch.equal(plain, changed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NativesdWarning)
        assert torch.equal(pipe(PROMPT, loras=[lora], partial=True, steps=2, seed=1).latents, changed)  # said once
    with pytest.raises(WeightsError):
        pipe.set_loras([lora])
    pipe.set_loras([])
    with pytest.warns(NativesdWarning, match=NAMED):
        pipe.set_loras([lora], partial=True)
    with pytest.warns(NativesdWarning, match=NAMED):
        loaded = nativesd.load(device="cpu", loras=[lora], partial=True)
    assert torch.equal(loaded(PROMPT, steps=2, seed=1).latents, changed)


@pytest.mark.filterwarnings("default::nativesd.NativesdWarning")
def test_on_the_command_line(run: Run, lora: Path, tmp_path: Path) -> None:
    refused = run("generate", PROMPT, "--lora", str(lora), "--steps", "1", "-o", str(tmp_path / "a.png"))
    assert refused.returncode == 3
    assert "--lora-partial applies the others" in refused.stderr
    done = run("generate", PROMPT, "--lora", str(lora), "--lora-partial", "--steps", "1", "-o", str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert "unet.mid_block.nowhere" in done.stderr
    refused = run("lora", "merge", str(TINY), str(lora), str(tmp_path / "merged"))
    assert refused.returncode == 3
    assert "--lora-partial applies the others" in refused.stderr
    done = run("lora", "merge", str(TINY), str(lora), str(tmp_path / "merged"), "--lora-partial")
    assert done.returncode == 0, done.stderr
    assert "not applied of style.safetensors: unet.mid_block.nowhere" in done.stderr
    assert "1 of " in done.stderr
