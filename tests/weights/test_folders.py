"""Folders as people have them: any variant, several side by side, an index for a path; and the .yaml beside a file."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import single

import nativesd
from nativesd.errors import NativesdWarning, SourceError
from nativesd.shipped import TINY
from nativesd.weights.files.folder import choose, component_file
from nativesd.weights.files.source import open_source

UNET, STEM = "unet", "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


@pytest.mark.parametrize("variant", ["fp16", "bf16", "fp32", "ema", "non_ema", "anything"])
def test_a_variant_alone(variant: str, folder: Path) -> None:
    """In a model's folder and in a component's, where the configuration counts, too."""
    file = folder / UNET / f"{STEM}.safetensors"
    file.rename(file.with_name(f"{STEM}.{variant}.safetensors"))
    expected = nativesd.load(device="cpu", fast=False).unet.state_dict()
    for found in (nativesd.load(folder, device="cpu", fast=False),
                  nativesd.load(device="cpu", unet=folder / UNET, fast=False)):  # fmt: skip
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.unet.state_dict().items())
    assert nativesd.audit(folder).ok
    assert nativesd.audit(folder / UNET).ok


def test_variants_side_by_side(folder: Path) -> None:
    """The plain file for full precision, fp16 for half, as in a model's folder."""
    plain = folder / UNET / f"{STEM}.safetensors"
    shutil.copy(plain, plain.with_name(f"{STEM}.fp16.safetensors"))
    save_file({key: tensor.float() for key, tensor in load_file(plain).items()}, plain)
    shutil.copy(plain, plain.with_name(f"{STEM}.non_ema.safetensors"))
    shutil.copy(plain, plain.with_name(f"{STEM}.bin"))
    for half, expected in ((False, "F32"), (True, "F16")):
        for path in (folder, folder / UNET):
            member = next(m for m in open_source(path, half=half) if m.name in ("", UNET))
            assert {info.dtype for info in member.tensors.values()} == {expected}
    assert nativesd.audit(folder / UNET).ok


@pytest.mark.parametrize(
    ("names", "full", "half"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], 0, 1),
        (["model.fp16.safetensors", "model.bf16.safetensors", "model.non_ema.safetensors"], 0, 0),
        (["model.bf16.safetensors", "model.non_ema.safetensors"], 0, 0),
        (["pytorch_model.fp16.bin", "pytorch_model.bin"], 1, 0),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"],
            0,
            2,
        ),
        (["model.fp16.safetensors.index.json", "model.fp16-00001-of-00002.safetensors"], 0, 0),
        (["model.mine.safetensors", "model.fp16.safetensors"], 1, 1),
        (["model.mine.safetensors"], 0, 0),
    ],
)
def test_which_variant(names: list[str], full: int, half: int) -> None:
    for wanted, index in ((False, full), (True, half)):
        assert choose(names, "model", half=wanted) == names[index]
        assert component_file(names, "here", half=wanted) == names[index]


def test_a_choice_that_is_open_is_not_made() -> None:
    with pytest.raises(SourceError, match=r"several variants of model: model.a.safetensors, model.b.safetensors; keep"):
        choose(["model.a.safetensors", "model.b.safetensors"], "model", half=False)
    with pytest.raises(SourceError, match=r"here holds 2 checkpoints: name one of a.safetensors, b.safetensors"):
        component_file(["a.safetensors", "b.safetensors"], "here", half=False)
    with pytest.raises(SourceError, match=r"neither model_index.json nor weights"):
        component_file(["model-00001-of-00002.safetensors", "config.json"], "here", half=False)


def test_the_index_is_the_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    assert nativesd.audit(index).ok
    pipe = nativesd.load(index, device="cpu")
    assert pipe.config.name == "model"
    nativesd.convert(index, folder.with_name("copy"), layout="diffusers")


# --- the .yaml beside a file

LDM = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "{parameterization}"
    unet_config:
      params: {{in_channels: 4, model_channels: {channels}, num_head_channels: 32, context_dim: 128}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The embedded model in a single file, which says neither heads nor prediction."""
    nativesd.convert("tiny", tmp_path / "a.safetensors", layout="ldm")
    tensors = load_file(tmp_path / "a.safetensors")
    path = tmp_path / "model.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if key != "v_pred"}, path)
    return path


def test_heads_and_prediction_beside_a_file(file: Path) -> None:
    tiny = nativesd.load(device="cpu")
    width, heads = tiny.config.unet.levels[0].width, [level.heads for level in tiny.config.unet.levels]
    text = LDM.format(parameterization="v", channels=width)
    each = {level.width // level.heads for level in tiny.config.unet.levels}
    text = text.replace("32", str(each.pop())).replace("128", str(tiny.config.unet.context))
    file.with_suffix(".yaml").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NativesdWarning)  # none that the heads are guessed
        pipe = nativesd.load(file, device="cpu")
    assert [level.heads for level in pipe.config.unet.levels] == heads
    assert pipe.config.prediction == "v"
    assert "prediction" not in pipe.config.inferred
    [unet] = [component for component in nativesd.audit(file).components if component.name == "unet"]
    said = {entry.what: entry for entry in unet.evidence}
    assert said["heads"].determined
    assert said["prediction"].why == said["heads"].why == "model.yaml beside the file"


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        (LDM.format(parameterization="eps", channels=64), "epsilon"),
        (LDM.format(parameterization="v", channels=64), "v"),
        (
            "model: {params: {network_config: {params: {model_channels: 64}}, denoiser_config: {params: "
            "{scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling}}}}}", "v",
        ),
        ("notes: this is no model", None),
        ("- 1", None),
        ("", None),
    ],
)  # fmt: skip
def test_what_is_read(text: str, prediction: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"emb_params": torch.zeros(1, 768)}, path)
    path.with_suffix(".yaml").write_text(text)
    [member] = open_source(path)
    assert (member.beside.prediction if member.beside else None) == prediction


def test_what_only_the_yaml_says_is_not_lost_in_silence(file: Path, tmp_path: Path) -> None:
    """A single file cannot say heads: who converts one to one is told, and copies the .yaml."""
    unet = nativesd.load(device="cpu").config.unet
    text = LDM.format(parameterization="v", channels=unet.levels[0].width)
    each = unet.levels[0].width // unet.levels[0].heads
    file.with_suffix(".yaml").write_text(text.replace("32", str(each)).replace("128", str(unet.context)))
    with pytest.warns(NativesdWarning, match=r"will not say the UNet's heads \[2, 4, 7\]: by the family's rule"):
        nativesd.convert(file, tmp_path / "b.safetensors", layout="ldm")


def test_one_of_another_model_is_not_used(file: Path) -> None:
    file.with_suffix(".yaml").write_text(LDM.format(parameterization="eps", channels=320))
    with pytest.warns(NativesdWarning) as caught:
        nativesd.load(file, device="cpu")
    assert any("model.yaml is not used: it says model_channels 320, the tensors have" in str(w.message) for w in caught)


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.system ['touch x']", "\x00", "a: &a [*a, *b]"])
def test_one_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    path = single("sd1", tmp_path / "model.safetensors")
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(SourceError, match=r"model\.yaml, beside the model, is no YAML"):
        nativesd.audit(path)
