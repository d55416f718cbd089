"""Single files and conversion: small models of every family, there and back, in nativesd and in diffusers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import nativesd
from nativesd.checkpoints.layouts import TEXT_TABLES
from nativesd.config import (
    SDXL_VAE,
    T2I_ADAPTERS,
    TAESD,
    Config,
    ControlNetConfig,
    Level,
    TextEncoderConfig,
    TextTime,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    VisionEncoderConfig,
)
from nativesd.errors import SourceError, UsageError, WeightsError
from nativesd.models.build import build
from nativesd.shipped import TINY
from nativesd.weights import entries
from nativesd.weights.checkpoint import unmap
from nativesd.weights.formats.header import read_header
from nativesd.weights.maps.keymap import load_table
from oracles import draw, published_manifests, sparse, vision_pair

pytestmark = pytest.mark.filterwarnings("ignore:.* of no published form")

WIDE = (Level(64, (1, 1), (1, 1, 1), 1), Level(128, (1, 1), (1, 1, 1), 2), Level(128, (None,) * 2, (None,) * 3, 2))
NARROW = (Level(32, (1, 1), (1, 1, 1), 8), Level(64, (1, 1), (1, 1, 1), 8), Level(64, (None,) * 2, (None,) * 3, 8))
XL = (Level(64, (None,) * 2, (None,) * 3, 1), Level(128, (1, 1), (1, 1, 1), 2), Level(128, (2, 2), (2, 2, 2), 2))
VAE = VAEConfig(widths=(32, 32, 64, 64), layers=1)
CLIP = TextEncoderConfig(64, 3, 1, 128, "quick_gelu")
XL_CLIP = TextEncoderConfig(64, 3, 1, 128, "quick_gelu", hidden=-2, hidden_norm=False)
BIGG = TextEncoderConfig(128, 3, 2, 256, "gelu", projection=128, hidden=-2, hidden_norm=False)
XL_VAE = VAEConfig((32, 32, 64, 64), 1, scaling=SDXL_VAE.scaling, force_upcast=True)
SD1 = UNetConfig(NARROW, (1, None), 64)
MODELS: dict[str, dict[str, Config]] = {
    "sd1": {"unet": SD1, "vae": VAE, "text_encoder": CLIP},
    "sd2": {
        "unet": UNetConfig(WIDE, (1, None), 64, linear_projection=True),
        "vae": VAE,
        "text_encoder": TextEncoderConfig(64, 3, 1, 128, "gelu"),
    },
    "sdxl": {
        "unet": UNetConfig(XL, (2, None), 192, linear_projection=True, added=TextTime(128, 6)),
        "vae": XL_VAE,
        "text_encoder": XL_CLIP,
        "text_encoder_2": BIGG,
    },
    "refiner": {
        "unet": UNetConfig(WIDE, (1, None), 128, linear_projection=True, added=TextTime(128, 5)),
        "vae": XL_VAE,
        "text_encoder_2": BIGG,
    },
}


@cache
def tensors(family: str, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random weights of a family's components, under our names."""
    out = {}
    for number, (name, config) in enumerate(MODELS[family].items()):
        module = build(config).to_empty(device="cpu")
        draw(module, 10 * seed + number)
        out[name] = {key: tensor.detach().half() for key, tensor in module.state_dict().items()}
    return out


def single(family: str, path: Path, *, without: str = "", seed: int = 0) -> Path:
    """The family's single file, as ldm or sgm would have written it."""
    named: dict[str, Tensor] = {}
    for name, config in MODELS[family].items():
        if name == without:
            continue
        table, prefix = {
            "unet": ("unet.ldm", "model.diffusion_model."), "vae": ("vae.ldm", "first_stage_model."),
        }.get(name) or TEXT_TABLES[family][name]  # fmt: skip
        dims = config.dims if isinstance(config, UNetConfig | VAEConfig) else {}
        named |= unmap(tensors(family, seed)[name], load_table(table).bind(dims, prefix))
    extra = {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.5)}
    save_file({key: t.contiguous() for key, t in (named | extra).items()}, path, {"format": "pt", "note": "kept"})
    return path


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder."""
    return {
        f"{file.parent.name}/{key}": tensor
        for file in folder.glob("*/*.safetensors")
        for key, tensor in load_file(file).items()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's folder, converted from its single file, which lies beside it."""
    base = tmp_path_factory.mktemp(family)
    done = nativesd.convert(single(family, base / "model.safetensors"), base / "folder", layout="diffusers")
    assert done.ignored.keys() == {"betas", "model_ema.decay"}
    return base / "folder"


def test_there_and_back_is_bit_exact(
    family: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a tensor is copied at once or in several pieces."""
    back = tmp_path / "back.safetensors"
    nativesd.convert(folder, back, layout="ldm")
    original = load_file(folder.with_name("model.safetensors"))
    del original["betas"], original["model_ema.decay"]
    assert same(load_file(back), original)
    monkeypatch.setattr(entries, "PIECE", 1000)
    nativesd.convert(back, tmp_path / "again", layout="diffusers")
    assert same(read_folder(tmp_path / "again"), read_folder(folder))


def test_both_layouts_are_clean(folder: Path) -> None:
    for source in (folder, folder.with_name("model.safetensors")):
        report = nativesd.audit(source)
        assert report.ok
        assert {c.name for c in report.components if c.expected} <= {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert nativesd.diff(folder, folder.with_name("model.safetensors"), values=True).ok


def test_diffusers_opens_the_folder(family: str, folder: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    for name in MODELS[family]:
        state = {f"{name}/{key}": tensor for key, tensor in getattr(pipe, name).state_dict().items()}
        published = {key: t for key, t in read_folder(folder).items() if key.startswith(f"{name}/")}
        if not name.startswith("text_encoder"):  # transformers 5 renames on opening
            assert same(state, published)
        assert len(state) == len(published)


def test_diffusers_opens_the_single_file(family: str, folder: Path) -> None:
    file = folder.with_name("model.safetensors")
    unet = diffusers.UNet2DConditionModel.from_single_file(
        str(file), config=str(folder), subfolder="unet", torch_dtype=torch.float16, local_files_only=True
    )
    vae = diffusers.AutoencoderKL.from_single_file(
        str(file), config=str(folder), subfolder="vae", torch_dtype=torch.float16, local_files_only=True
    )
    for name, module in (("unet", unet), ("vae", vae)):
        state = {f"{name}/{key}": tensor for key, tensor in module.state_dict().items()}
        assert same(state, {key: t for key, t in read_folder(folder).items() if key.startswith(f"{name}/")})


def test_a_single_file_makes_the_folders_picture(family: str, folder: Path) -> None:
    # what an SD2.x file's UNet predicts is read off its answer to noise, which random weights do not give
    stated = nativesd.load(folder, device="cpu").config.prediction if family == "sd2" else None
    files = (folder, folder.with_name("model.safetensors"))
    pipes = [nativesd.load(source, device="cpu", prediction=stated) for source in files]
    options = {"steps": 2, "seed": 1, "width": 64, "height": 64}
    pictures = [pipe("a cat", **options).latents for pipe in pipes]
    assert torch.equal(*pictures)
    for mine, theirs in zip(*(pipe.tokenizers for pipe in pipes), strict=True):
        assert mine.encode(["a cat"]) == theirs.encode(["a cat"])
    configs = [pipe.config for pipe in pipes]
    assert configs[0].scheduler == configs[1].scheduler
    assert (configs[0].family, configs[0].size) == (configs[1].family, configs[1].size)
    assert configs[0].zero_empty_negative == configs[1].zero_empty_negative


def test_casting(folder: Path, tmp_path: Path) -> None:
    nativesd.convert(folder, tmp_path / "f32.safetensors", layout="ldm", dtype="f32")
    wide, half = load_file(tmp_path / "f32.safetensors"), load_file(folder.with_name("model.safetensors"))
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor.half(), half[key]) for key, tensor in wide.items())


def test_parts_from_other_files(tmp_path: Path) -> None:
    whole = single("sd1", tmp_path / "whole.safetensors")
    without = single("sd1", tmp_path / "without.safetensors", without="vae")
    with pytest.raises(SourceError, match="has no vae: pass vae="):
        nativesd.load(without, device="cpu")
    pipe = nativesd.load(without, device="cpu", vae=whole)
    assert torch.equal(pipe.vae.quant_conv.bias, tensors("sd1")["vae"]["quant_conv.bias"].float())


def test_a_form_of_ones_own_is_loaded_with_a_warning(tmp_path: Path) -> None:
    nativesd.convert("tiny", tmp_path / "tiny.safetensors", layout="ldm")
    with pytest.warns(UserWarning, match="head counts"):
        pipe = nativesd.load(tmp_path / "tiny.safetensors", device="cpu")
    assert pipe.config.prediction == "v"  # the marker that the conversion wrote
    assert pipe("a fox", steps=1, seed=0).images[0].size == (384, 384)  # as SD2.x with v: 96 cells


def test_metadata_is_kept_and_nothing_half_written_left(tmp_path: Path) -> None:
    file = single("sd1", tmp_path / "model.safetensors")
    nativesd.convert(file, tmp_path / "copy.safetensors", layout="ldm")
    with pytest.raises(UsageError, match="exists"):
        nativesd.convert(file, tmp_path / "copy.safetensors", layout="ldm")
    with pytest.raises(UsageError, match="is a folder"):
        nativesd.convert(file, tmp_path / "x.safetensors", layout="diffusers")
    assert read_header(tmp_path / "copy.safetensors").metadata["note"] == "kept"
    data = load_file(file)
    del data["model.diffusion_model.out.2.bias"]
    save_file(data, tmp_path / "broken.safetensors")
    with pytest.raises(WeightsError, match="does not load as it is"):
        nativesd.convert(tmp_path / "broken.safetensors", tmp_path / "folder", layout="diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken.safetensors", "copy.safetensors", "model.safetensors",
    ]  # fmt: skip


ALONE: dict[str, tuple[Config, str, type[torch.nn.Module] | None]] = {
    "unet": (MODELS["sd1"]["unet"], "unet.ldm", diffusers.UNet2DConditionModel),
    "vae": (VAE, "vae.ldm", diffusers.AutoencoderKL),
    "controlnet": (
        ControlNetConfig(replace(SD1, levels=tuple(replace(level, up=()) for level in SD1.levels))),
        "controlnet.ldm",
        diffusers.ControlNetModel,
    ),
    "t2i_adapter": (T2I_ADAPTERS["sd15-light"], "t2i_adapter.original", diffusers.T2IAdapter),
    "taesd_decoder": (replace(TAESD, half="decoder"), "tiny_decoder.original", None),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_component_alone(name: str, tmp_path: Path) -> None:
    config, table, cls = ALONE[name]
    module = build(config).to_empty(device="cpu")
    draw(module, 0)
    dims = {} if isinstance(config, TinyVAEConfig | TextEncoderConfig) else config.dims
    bound = load_table(table).bind(dims, load_table(table).prefixes[-1])
    original = {key: t.detach().contiguous() for key, t in unmap(module.state_dict(), bound).items()}
    save_file(original, tmp_path / "alone.safetensors")
    if cls is None:
        with pytest.raises(UsageError, match="no class"):
            nativesd.convert(tmp_path / "alone.safetensors", tmp_path / "folder", layout="diffusers")
        assert not (tmp_path / "folder").exists()
        return
    nativesd.convert(tmp_path / "alone.safetensors", tmp_path / "folder", layout="diffusers")
    opened = cls.from_pretrained(tmp_path / "folder")
    assert same(dict(opened.state_dict()), load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors"))
    nativesd.convert(tmp_path / "folder", tmp_path / "back.safetensors", layout="ldm")
    back = load_file(tmp_path / "back.safetensors")
    prefix = next(iter(back)).removesuffix(next(iter(sorted(original))))
    assert same({key.removeprefix(prefix): tensor for key, tensor in back.items()}, original)


def test_an_image_encoder_alone(tmp_path: Path) -> None:
    """From OpenCLIP's names to the folder that transformers opens; there is no way back."""
    ours, reference = vision_pair(VisionEncoderConfig(128, 2, 2, 256, "gelu", projection=1024, image=56))
    table = load_table("image_encoder.openclip")
    tensors = unmap(ours.state_dict(), table.bind({}, table.prefixes[0]))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "alone.safetensors")
    nativesd.convert(tmp_path / "alone.safetensors", tmp_path / "folder", layout="diffusers")
    assert same(load_file(tmp_path / "folder" / "model.safetensors"), dict(reference.state_dict()))
    opened = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "folder")
    assert same(dict(opened.state_dict()), dict(reference.state_dict()))
    with pytest.raises(UsageError, match="there is no ldm layout of an image encoder: pass layout='diffusers'"):
        nativesd.convert(tmp_path / "folder", tmp_path / "back.safetensors", layout="ldm")


def test_left_over_tensors_stop_loading_and_conversion(tmp_path: Path) -> None:
    file = single("sd1", tmp_path / "model.safetensors")
    save_file(load_file(file) | {"foo.bar": torch.zeros(1)}, file)
    for act in (nativesd.load, lambda path: nativesd.convert(path, tmp_path / "folder", layout="diffusers")):
        with pytest.raises(WeightsError, match=r"unexpected foo\.bar"):
            act(file)
    save_file({"lora_unet_mid_block.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match="no other layout"):
        nativesd.convert(tmp_path / "lora.safetensors", tmp_path / "x.safetensors", layout="ldm")


LOAD = """
import sys, threading, time, torch, diffusers, nativesd
from nativesd.loading import load
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
peak, who, source, dtype = [0], sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.02)
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
if who == "ours":
    pipe = nativesd.load(source, device="cpu", dtype=dtype)
    modules = [pipe.unet, pipe.vae, *pipe.text_encoders]
else:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(source, torch_dtype=dtype)
    modules = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
seconds = time.perf_counter() - start
size = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
print(seconds, (max(peak[0], anonymous()) - before) / size)
"""


@pytest.mark.full
def test_cost_of_loading_a_full_size_sdxl(tmp_path: Path) -> None:
    """From one file, within 1.3 of the time that diffusers takes from its folder; one copy of the weights at most."""
    file = sparse(published_manifests()["sdxl-base.checkpoint.sgm"], tmp_path / "sdxl.safetensors")
    nativesd.convert(file, tmp_path / "folder", layout="diffusers")

    def measure(*arguments: object) -> tuple[float, float]:
        command = [sys.executable, "-c", LOAD, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak = done.stdout.split()
        return float(seconds), float(peak)

    runs = [(measure("theirs", tmp_path / "folder", "float16"), measure("ours", file, "float16")) for _ in range(3)]
    theirs, ours = (median(run[side][0] for run in runs) for side in (0, 1))
    _, cast_peak = measure("ours", file, "bfloat16")
    peak = runs[0][1][1]
    print(f"\nload: {ours:.2f} s, diffusers {theirs:.2f} s; peak {peak:.2f}, cast {cast_peak:.2f} of the weights")
    assert ours <= 1.3 * theirs
    assert max(peak, cast_peak) <= 1.15


@pytest.mark.full
def test_cost_of_a_full_size_sdxl(tmp_path: Path) -> None:
    """A sparse file of SDXL's size: audited in a second beyond torch's import, converted in under 1 GB."""
    file = sparse(published_manifests()["sdxl-base.checkpoint.sgm"], tmp_path / "sdxl.safetensors")
    code = (
        "import sys, time, torch; start = time.perf_counter(); import nativesd; "
        "report = nativesd.audit(sys.argv[1]); print(report.ok, time.perf_counter() - start, *PEAK)"
    )
    ok, seconds, peak = measure_peak(code, file)
    size = os.path.getsize(file) / 1e9
    print(f"\naudit of {size:.2f} GB: {float(seconds):.2f} s beyond torch, peak {int(peak) >> 10} MB")
    assert ok == "True"
    assert float(seconds) <= 1.0
    assert int(peak) < 450 << 10
    code = "import sys, nativesd; nativesd.convert(sys.argv[1], sys.argv[2], layout='diffusers'); print(*PEAK)"
    [peak] = measure_peak(code, file, tmp_path / "folder")
    print(f"convert: peak {int(peak) >> 10} MB")
    assert int(peak) < 1 << 20


def measure_peak(code: str, *arguments: Path) -> list[str]:
    """What a process prints; PEAK is the most memory it had, in KB (ru_maxrss would count the parent's too)."""
    peak = "[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]"
    command = [sys.executable, "-c", code.replace("PEAK", peak), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(("dtype", "holds"), [("f16", False), ("bf16", True), (None, True)])
def test_a_cast_that_makes_infinities_is_refused(dtype: str | None, holds: bool, tmp_path: Path) -> None:
    folder, out = tmp_path / "vae", tmp_path / "out.safetensors"
    folder.mkdir()
    (folder / "config.json").write_bytes((TINY / "vae" / "config.json").read_bytes())
    tensors = {
        key: tensor.float() for key, tensor in load_file(TINY / "vae" / "diffusion_pytorch_model.safetensors").items()
    }
    tensors["decoder.conv_in.weight"][0, 0, 0, 0] = 1e6
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    if holds:
        nativesd.convert(folder, out, layout="ldm", dtype=dtype)
        return
    with pytest.raises(WeightsError, match=r"has numbers up to 1e\+06, which float16 cannot hold"):
        nativesd.convert(folder, out, layout="ldm", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
