"""Scaled float8: written as ComfyUI reads it, read in all its forms, and its faults found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import single
from torch import Tensor

import nativesd
from nativesd.checkpoints.convert import convert
from nativesd.errors import UsageError, WeightsError
from nativesd.weights.files.source import open_source
from nativesd.weights.files.tensors import read_tensor
from nativesd.weights.formats import scaled as formats

UNET = "model.diffusion_model."
MARK = f"{UNET}scaled_fp8"
NAME = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
STEP = 2.0**-4  # half a unit in the last of e4m3's three places, relative
pytestmark = pytest.mark.filterwarnings("ignore:.*of no published form", "ignore:.* will not say ")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return single("sd1", tmp_path_factory.mktemp("plain") / "plain.safetensors")


@pytest.fixture(scope="module")
def scaled(plain: Path) -> Path:
    path = plain.with_name("scaled.safetensors")
    done = convert(plain, path, layout="ldm", dtype="fp8")
    assert done.tensors == len(load_file(path))
    return path


def numbers(tensors: dict[str, Tensor], key: str) -> Tensor:
    """As ComfyUI has them."""
    return tensors[key].float() * tensors[key.removesuffix("weight") + "scale_weight"]


def test_what_is_written(plain: Path, scaled: Path) -> None:
    source, found = load_file(plain), load_file(scaled)
    matrices = {key for key, tensor in source.items() if key.startswith(UNET) and tensor.ndim == 2}
    scales = {key.removesuffix("weight") + "scale_weight" for key in matrices}
    assert found.keys() == source.keys() - {"betas", "model_ema.decay"} | scales | {MARK}
    assert (found[MARK].dtype, found[MARK].shape) == (torch.float8_e4m3fn, (2,))
    for key in scales:
        assert (found[key].dtype, found[key].shape) == (torch.float32, ())
    for key in found.keys() - scales - {MARK}:
        if key in matrices:
            assert found[key].dtype == torch.float8_e4m3fn
            assert found[key].float().abs().max() == 448
            most = STEP * source[key].abs() + source[key].abs().max() * 2.0**-9 / 448
            assert ((numbers(found, key) - source[key]).abs() <= most).all()
        else:
            wanted = source[key].half() if source[key].ndim > 1 else source[key]
            assert torch.equal(found[key], wanted)


def test_what_is_read(scaled: Path) -> None:
    written = load_file(scaled)
    [member] = open_source(scaled)
    assert torch.equal(read_tensor(member, f"{NAME}.weight"), numbers(written, f"{NAME}.weight"))
    report = nativesd.audit(scaled)
    assert report.ok
    unet = report.components[0]
    assert unet.dtypes["F8_E4M3 scaled"] == sum(key.endswith("scale_weight") for key in written)
    [line] = report.trace(f"{NAME}.weight")
    assert line.startswith(f"{NAME}.weight + {NAME}.scale_weight -> ")
    assert "copy, scaled" in line
    assert any("the mark of scaled float8" in line for line in report.trace(MARK))
    convert(scaled, scaled.with_name("again.safetensors"), layout="ldm", dtype="f32")
    ours = nativesd.load(scaled, device="cpu", fast=False).unet.state_dict()
    theirs = nativesd.load(scaled.with_name("again.safetensors"), device="cpu", fast=False).unet.state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("dtype", [None, "fp8"])
def test_what_is_written_of_scaled_float8(dtype: str | None, scaled: Path, tmp_path: Path) -> None:
    """Without a dtype it becomes float32, and in float8 again its mark is not said to be left out."""
    done = convert(scaled, tmp_path / "again.safetensors", layout="ldm", dtype=dtype)
    found = load_file(done.path)
    assert (MARK in found) == (dtype == "fp8") == (MARK not in done.ignored)
    assert found[f"{NAME}.weight"].dtype == (torch.float32 if dtype is None else torch.float8_e4m3fn)


def edited(scaled: Path, path: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(scaled)
    edit(tensors)
    save_file(tensors, path)
    return path


def newer(tensors: dict[str, Tensor]) -> None:
    """ComfyUI's newer names, one scale a row, and scales of inputs."""
    del tensors[MARK]
    for key in [key for key in tensors if key.endswith("scale_weight")]:
        layer, scale = key.removesuffix(".scale_weight"), tensors.pop(key)
        rows = len(tensors[f"{layer}.weight"])
        tensors[f"{layer}.weight_scale"] = scale.expand(rows, 1).contiguous()
        tensors[f"{layer}.input_scale"] = torch.tensor(0.5)
        tensors[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)


def with_inputs(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.scale_input"] = torch.ones(1)
    tensors[f"{NAME}.scale_weight"] = tensors[f"{NAME}.scale_weight"].reshape(1)
    tensors[MARK] = torch.zeros(0).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("edit", [newer, with_inputs])
def test_other_forms(edit: Callable[[dict[str, Tensor]], object], scaled: Path, tmp_path: Path) -> None:
    path = edited(scaled, tmp_path / "other.safetensors", edit)
    assert nativesd.audit(path).ok
    [one], [other] = open_source(scaled), open_source(path)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(read_tensor(one, key), read_tensor(other, key)) for key in one.tensors)


def test_float8_without_scales_is_read_as_it_is(plain: Path, tmp_path: Path) -> None:
    tensors = {key: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for key, t in load_file(plain).items()}
    save_file(tensors, tmp_path / "plain8.safetensors")
    assert nativesd.audit(tmp_path / "plain8.safetensors").ok
    [member] = open_source(tmp_path / "plain8.safetensors")
    assert read_tensor(member, f"{NAME}.weight").dtype == torch.float8_e4m3fn


def a_row_of_zeros(tensors: dict[str, Tensor]) -> None:
    """The second row, and its scale; of float8's two zeros both."""
    newer(tensors)
    tensors[f"{NAME}.weight"].view(torch.uint8)[1] = torch.tensor([0, 128]).repeat(
        tensors[f"{NAME}.weight"].shape[1] // 2
    )
    tensors[f"{NAME}.weight_scale"][1] = 0


def a_layer_of_zeros(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.weight"].view(torch.uint8).zero_()
    tensors[f"{NAME}.scale_weight"].zero_()


@pytest.mark.parametrize("edit", [a_row_of_zeros, a_layer_of_zeros])
def test_a_scale_of_0_is_of_zeros(
    edit: Callable[[dict[str, Tensor]], object], scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As quantisers write it, who divide by the largest number: 0 times 0 is 0."""
    path = edited(scaled, tmp_path / "zeros.safetensors", edit)
    assert nativesd.audit(path).ok
    [member], [before] = open_source(path), open_source(scaled)
    found, wanted = (read_tensor(each, f"{NAME}.weight") for each in (member, before))
    rows = [1] if edit is a_row_of_zeros else list(range(len(wanted)))
    wanted[rows] = 0
    assert torch.equal(found, wanted)
    monkeypatch.setattr(formats, "MAX_ZEROS", 100)  # a file may say any size
    assert not nativesd.audit(path).ok


def a_zero_too_many(tensors: dict[str, Tensor]) -> None:
    """The scale of the second row is 0, and its last number is another."""
    a_row_of_zeros(tensors)
    tensors[f"{NAME}.weight"].view(torch.uint8)[1, -1] = 1


def of_another_row(tensors: dict[str, Tensor]) -> None:
    a_row_of_zeros(tensors)
    tensors[f"{NAME}.weight_scale"][:2] = tensors[f"{NAME}.weight_scale"][:2].flip(0)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a scale is missing": (
        lambda tensors: tensors.pop(f"{NAME}.scale_weight"),
        f"unexpected {NAME}.weight: in float8 without a scale that fits it, which this file has for such weights",
    ),
    "a scale of another shape": (
        lambda tensors: tensors.update({f"{NAME}.scale_weight": torch.ones(3)}), f"unexpected {NAME}.scale_weight: no"
    ),
    "a scale without a weight": (
        lambda tensors: tensors.update({f"{NAME}2.scale_weight": torch.ones(())}),
        f"unexpected {NAME}2.scale_weight: no",
    ),
    "a scale of a weight in float16": (
        lambda tensors: tensors.update({f"{NAME}.weight": tensors[f"{NAME}.weight"].half()}),
        f"unexpected {NAME}.scale_weight: no",
    ),
}  # fmt: skip


def planted(**tensors: Tensor | None) -> Callable[[dict[str, Tensor]], object]:
    """Puts tensors beside the weight of a layer in the newer form, or takes them away."""

    def edit(own: dict[str, Tensor]) -> None:
        newer(own)
        for end, tensor in tensors.items():
            own.pop(f"{NAME}.{end}", None)
            if tensor is not None:
                own[f"{NAME}.{end}"] = tensor

    return edit


def says(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unmarked(tensors: dict[str, Tensor]) -> None:
    del tensors[MARK], tensors[f"{NAME}.scale_weight"]


LONE = f"unexpected {NAME}.weight: in float8 without a scale that fits it, which this file has for such weights: "
BAD = f"unexpected {NAME}.weight: in float8 with a scale that is not finite, below 0, or 0 of other numbers than 0: "
OTHER = f"unexpected {NAME}.weight: in float8, though its comfy_quant says another format: "
FAULTS |= {
    "newer, a scale is missing": (planted(weight_scale=None), LONE),
    "newer, a scale of another shape": (planted(weight_scale=torch.ones(3)), LONE),
    "no mark, a scale is missing": (unmarked, LONE),
    "two scales": (
        lambda tensors: tensors.update({f"{NAME}.weight_scale": torch.ones(())}),
        f"unexpected {NAME}.weight: in float8 with two scales, scale_weight and weight_scale: ",
    ),
    "newer, a weight in float16": (
        lambda tensors: [newer(tensors), tensors.update({f"{NAME}.weight": tensors[f"{NAME}.weight"].half()})],
        f"unexpected {NAME}.weight: no float8, though it has a scale for such beside it: ",
    ),
    "nvfp4": (planted(comfy_quant=says('{"format": "nvfp4"}')), OTHER),
    "e5m2, and it is e4m3": (planted(comfy_quant=says('{"format": "float8_e5m2"}')), OTHER),
    "no format": (planted(comfy_quant=says("[")), OTHER),
    "a scale of 0 with one other number": (a_zero_too_many, BAD),
    "a scale of 0 of another row": (of_another_row, BAD),
    "a long format": (planted(comfy_quant=torch.zeros(100_000, dtype=torch.uint8)), OTHER),
} | {
    f"a scale of {number} in {dtype}": (planted(weight_scale=torch.tensor(number, dtype=dtype)), BAD)
    for number in (0.0, -1.0, float("nan"), float("inf"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault: str, scaled: Path, tmp_path: Path) -> None:
    edit, words = FAULTS[fault]
    path = edited(scaled, tmp_path / "faulty.safetensors", edit)
    report = nativesd.audit(path)
    assert not report.ok
    assert any(line.startswith(words) for component in report.components for line in component.problems())
    with pytest.raises(WeightsError, match="does not fit"):
        nativesd.load(path, device="cpu")


def test_files_that_have_no_scaled_float8(tmp_path: Path) -> None:
    for name, layout in (("out.gguf", "ldm"), ("out", "diffusers")):
        with pytest.raises(
            UsageError, match=r"fp8 is a dtype of \.safetensors files in the layout ldm: .*out.* is none"
        ):
            convert("tiny", tmp_path / name, layout=layout, dtype="fp8")
