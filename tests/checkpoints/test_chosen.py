"""Converted models with other components, or with fewer; and nothing is written that would not load again."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import same, single

import nativesd
from conftest import Run
from nativesd import shipped
from nativesd.errors import UsageError, WeightsError

pytestmark = pytest.mark.filterwarnings("ignore:.* of no published form", "ignore:.* will not say ")
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model."}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return single("sd1", tmp_path_factory.mktemp("model") / "model.safetensors")


def parts_of(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    state = load_file(path)
    return {kind: {key: t for key, t in state.items() if key.startswith(p)} for kind, p in PREFIXES.items()}


def test_components_are_baked_in(file: Path, tmp_path: Path) -> None:
    """From another layout; what the model lacks may come so, too."""
    other = single("sd1", tmp_path / "other.safetensors", seed=1)
    nativesd.convert(other, tmp_path / "folder", layout="diffusers")
    out = tmp_path / "out.safetensors"
    nativesd.convert(file, out, layout="ldm", vae=tmp_path / "folder" / "vae", text_encoders=[other])
    own, theirs, found = parts_of(file), parts_of(other), parts_of(out)
    assert same(found["unet"], own["unet"])
    assert same(found["vae"], theirs["vae"])
    assert same(found["text"], theirs["text"])
    assert not same(found["vae"], own["vae"])
    unet = tmp_path / "folder" / "unet"
    nativesd.convert(unet, tmp_path / "whole.safetensors", layout="ldm", vae=file, text_encoders=[file])
    found = parts_of(tmp_path / "whole.safetensors")
    assert same(found["unet"], theirs["unet"])
    assert same(found["vae"], own["vae"])


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"prune": ["text", "ema"]}, {"unet", "vae"}),
        ({"prune": ["vae"]}, {"unet", "text"}),
        ({"keep": ["unet"]}, {"unet"}),
        ({"keep": ["unet", "text"]}, {"unet", "text"}),
        ({"keep": ["unet", "vae"], "prune": ["vae"]}, {"unet"}),
    ],
)
def test_pruned_and_kept(options: dict[str, list[str]], left: set[str], file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    nativesd.convert(file, out, layout="ldm", **options)
    own, found = parts_of(file), parts_of(out)
    assert {kind for kind, part in found.items() if part} == left
    assert all(same(found[kind], own[kind]) for kind in left)
    assert nativesd.audit(out).ok
    if len(left) == 1:
        nativesd.convert(file, tmp_path / "folder", layout="diffusers", **options)
        assert (tmp_path / "folder" / "config.json").is_file()
    else:
        with pytest.raises(UsageError, match="which nothing loads"):
            nativesd.convert(file, tmp_path / "folder", layout="diffusers", **options)


def test_the_training_average_is_kept(file: Path, tmp_path: Path) -> None:
    """Under ldm's names for it: the UNet's, without their dots."""
    state = load_file(file)
    with pytest.raises(UsageError, match="has no training average of"):
        nativesd.convert(file, tmp_path / "out.safetensors", layout="ldm", keep=["ema"])
    averages = {key: t + 1 for key, t in state.items() if key.startswith(PREFIXES["unet"])}
    named = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": t for key, t in averages.items()}
    save_file(state | named, tmp_path / "full.safetensors")
    out = tmp_path / "out.safetensors"
    nativesd.convert(tmp_path / "full.safetensors", out, layout="ldm", keep=["ema"])
    found, own = parts_of(out), parts_of(file)
    assert same(found["unet"], averages)
    assert same(found["vae"], own["vae"])
    assert not any(key.startswith("model_ema") for key in load_file(out))


@pytest.mark.parametrize(("dest", "layout"), [("out.safetensors", "ldm"), ("out", "diffusers")])
def test_taesd_is_no_models_own_vae(dest: str, layout: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a model is written with a whole VAE: TAESD stands in for it when"):
        nativesd.convert(file, tmp_path / dest, layout=layout, vae="taesd")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left(file: Path, tmp_path: Path) -> None:
    unet = tmp_path / "unet.safetensors"
    nativesd.convert(file, unet, layout="ldm", keep=["unet"])
    for options, message in (
        ({"keep": ["vae"]}, "nothing would be left"),
        ({"keep": ["lora"]}, "keep must be of unet, vae, text, ema, not 'lora'"),
        ({"prune": ["unet"]}, "prune must be of"),
    ):
        with pytest.raises(UsageError, match=message):
            nativesd.convert(unet, tmp_path / "out.safetensors", layout="ldm", **options)
    assert list(tmp_path.iterdir()) == [unet]


def test_what_would_not_load_again_is_not_written(tmp_path: Path) -> None:
    """A small SDXL whose pooled embedding is narrower than its text encoder: a folder's configs say so, and nothing in
    a single file does."""
    folder = tmp_path / "folder"
    nativesd.convert(single("sdxl", tmp_path / "model.safetensors"), folder, layout="diffusers")
    file, key = folder / "text_encoder_2" / "model.safetensors", "text_projection.weight"
    state = load_file(file)
    save_file({**state, key: state[key][:100].contiguous()}, file)
    change_json(folder / "text_encoder_2" / "config.json", projection_dim=100)
    file, key = folder / "unet" / "diffusion_pytorch_model.safetensors", "add_embedding.linear_1.weight"
    state = load_file(file)
    width = state[key].shape[1] - 28
    save_file({**state, key: state[key][:, :width].contiguous()}, file)
    change_json(folder / "unet" / "config.json", projection_class_embeddings_input_dim=width)
    nativesd.load(folder, device="cpu")
    with pytest.raises(WeightsError, match="would not load again, so nothing is written"):
        nativesd.convert(folder, tmp_path / "out.safetensors", layout="ldm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.safetensors"]


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_taesds_halves_to_one_folder_and_back(tmp_path: Path) -> None:
    """The halves of the package's own, which lie beside each other; diffusers opens the folder."""
    decoder = shipped.TAESD / "taesd_decoder.safetensors"
    nativesd.convert(decoder, tmp_path / "taesd", layout="diffusers")
    diffusers.AutoencoderTiny.from_pretrained(tmp_path / "taesd")
    for half in ("encoder", "decoder"):
        nativesd.convert(tmp_path / "taesd", tmp_path / f"my_{half}.safetensors", layout="ldm")
        found, wanted = tmp_path / f"my_{half}.safetensors", shipped.TAESD / f"taesd_{half}.safetensors"
        assert same(load_file(found), load_file(wanted))
    with pytest.raises(UsageError, match="say encoder or decoder in the name"):
        nativesd.convert(tmp_path / "taesd", tmp_path / "mine.safetensors", layout="ldm")


def test_the_command(file: Path, run: Run, tmp_path: Path) -> None:
    done = run("convert", str(file), "out.safetensors", "--layout", "ldm", "--prune", "text", "--vae", str(file))
    assert (done.returncode, done.stdout) == (0, "out.safetensors\n"), done.stderr
    assert not parts_of(tmp_path / "out.safetensors")["text"]
    done = run("convert", str(file), "lora.safetensors", "--layout", "peft")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
