"""Models that enlarge pictures, and large pictures by windows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_pipeline import save_model
from torch import Tensor

import nativesd
from conftest import Run
from nativesd import Hires, Pipeline, Tiles
from nativesd.diffusion.tiles import Tiled, Window
from nativesd.errors import SourceError, UsageError
from nativesd.models.layers import CachedContext
from nativesd.pictures.embedded import read_texts
from nativesd.pipeline.upscaling import load_upscaler, resized
from upscalers import esrgan, spandrel_alone

OPTIONS: dict[str, Any] = {"steps": 3, "seed": 5, "sampler": "Euler", "guidance_scale": 6.0}


@pytest.fixture(autouse=True)
def without_torchvision() -> Iterator[None]:
    with spandrel_alone():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upscaling") / "sd15"
    save_model("sd15", folder)
    return folder


def picture(width: int = 70, height: int = 50) -> Image.Image:
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(1, 3, 8, 8, generator=generator)
    pixels = torch.nn.functional.interpolate(small, (height, width), mode="bicubic")
    return Image.fromarray((pixels[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped"])
def test_a_model_is_what_spandrel_makes_of_it(tmp_path: Path, form: str) -> None:
    import spandrel

    state = esrgan()
    path = tmp_path / ("small.safetensors" if form == "safetensors" else "small.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"params_ema": state} if form == "wrapped" else state, path)
    model = load_upscaler(path, device="cpu")
    reference = spandrel.ModelLoader().load_from_state_dict(state).eval()
    assert (model.scale, model.name) == (2, "small")
    pixels = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = reference(pixels).clamp(0, 1)
    assert torch.allclose(model.enlarge(pixels), expected, atol=1e-6)
    assert model(picture(30, 20)).size == (60, 40)


def test_tiles_of_a_model_are_the_whole(tmp_path: Path) -> None:
    """Where neighbours share twice what the network sees, the faded sum is the answer for the whole picture."""
    torch.save(esrgan(), tmp_path / "small.pth")
    model = load_upscaler(tmp_path / "small.pth", device="cpu")
    pixels = torch.rand(1, 3, 90, 130, generator=torch.Generator().manual_seed(3))
    whole = model.enlarge(pixels)
    model.tile, model.overlap = 64, 60
    tiled = model.enlarge(pixels)
    assert tiled.shape == whole.shape
    inside = (tiled - whole).abs()
    assert inside.max() < 0.02, "no seam"
    model.overlap = 0
    assert (model.enlarge(pixels) - whole).abs().max() > 0.02, "without an overlap there is one"


@pytest.mark.parametrize("tile", [32, 16])
def test_tiles_that_share_all_are_refused(tmp_path: Path, tile: int) -> None:
    file = tmp_path / "x2.safetensors"
    save_file(esrgan(), file)
    model = load_upscaler(file, device="cpu")
    model.tile = tile
    with pytest.raises(UsageError, match="below tile"):
        model(picture())


def test_an_upscaler_that_returns_no_picture_is_refused(folder: Path) -> None:
    pipe = nativesd.load(folder, device="cpu")
    with pytest.raises(UsageError, match="must return a PIL image"):
        pipe("a fox", hires=Hires(1.5, upscaler=lambda picture: None), **OPTIONS)  # type: ignore[arg-type,return-value]


def test_any_scale(tmp_path: Path) -> None:
    torch.save(esrgan(), tmp_path / "small.pth")
    model = load_upscaler(tmp_path / "small.pth", device="cpu")
    assert resized(picture(20, 10), model, 3).size == (60, 30)
    assert resized(picture(20, 10), model, 1.5).size == (30, 15)
    clear = picture(20, 10)
    clear.putalpha(Image.linear_gradient("L").resize((20, 10)))
    assert model(clear).mode == "RGBA"


def test_hires_by_a_model(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.pth"
    torch.save(esrgan(), path)
    pipe = nativesd.load(folder, device="cpu")
    by_file = pipe("a fox", hires=Hires(1.5, upscaler=str(path)), **OPTIONS)
    by_model = pipe("a fox", hires=Hires(1.5, upscaler=load_upscaler(path, device="cpu")), **OPTIONS)
    assert torch.equal(by_file.latents, by_model.latents)
    assert not torch.equal(by_file.latents, pipe("a fox", hires=Hires(1.5, upscaler="lanczos"), **OPTIONS).latents)
    assert "Hires upscaler: small," in by_file.infotext()
    painted: list[nativesd.Step] = []
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="broken"):
        pipe("a fox", hires=Hires(1.5, upscaler=str(tmp_path / "broken.pth")), on_step=painted.append, **OPTIONS)
    assert not painted
    with pytest.raises(UsageError, match="there is no file"):
        pipe("a fox", hires=Hires(1.5, upscaler="other.pth"), **OPTIONS)


def test_the_command(run: Run, tmp_path: Path) -> None:
    torch.save(esrgan(), tmp_path / "small.pth")
    nativesd.generate("a fox", steps=1, seed=1).save(tmp_path / "fox.png")
    done = run("upscale", "fox.png", "--model", "small.pth", "--scale", "3")
    assert done.returncode == 0, done.stderr
    made = tmp_path / done.stdout.strip()
    assert Image.open(made).size == (192, 192)
    assert read_texts(made).parameters.startswith("a fox\n")
    assert "Postprocess upscale by: 3, Postprocess upscaler: small" in read_texts(made).parameters
    (tmp_path / "not.pth").write_bytes(b"nothing")
    assert run("upscale", "fox.png", "--model", "not.pth").returncode == 3
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match="no model that enlarges pictures"):
        load_upscaler(tmp_path / "other.safetensors")


def test_without_spandrel_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(UsageError, match="upscale"):
        load_upscaler("model.pth")


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def test_windows_cover_evenly() -> None:
    assert Tiles(64, 16).windows(8, 8, 8) == [Window(0, 0, 8, 8)]
    assert Tiles(64, 16).windows(8, 14, 8) == [Window(0, 0, 8, 8), Window(0, 6, 8, 14)]
    for height, width in ((9, 30), (25, 8)):
        seen = torch.zeros(height, width)
        for window in Tiles(64, 16).windows(height, width, 8):
            assert (window.bottom - window.top, window.right - window.left) == (8, 8)
            window.of(seen).add_(1)
        assert seen.min() >= 1


def test_one_window_is_the_call_without(folder: Path) -> None:
    pipe = nativesd.load(folder, device="cpu")
    plain = pipe("a fox", width=64, height=48, **OPTIONS).latents
    assert torch.equal(pipe("a fox", width=64, height=48, tiles=64, **OPTIONS).latents, plain)
    wide = {"width": 128, "height": 48, **OPTIONS}
    assert not close(pipe("a fox", tiles=64, **wide).latents, pipe("a fox", **wide).latents)


class Answers:
    """What is asked of a window, and constant answers."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return x + self.value * sigma

    def unguided(self) -> Tensor:
        return torch.full((1, 4, 8, 8), -self.value)


def test_windows_are_multidiffusion() -> None:
    """Every window's answer, and the mean where two overlap."""
    tiled = Tiled([(Window(0, 0, 8, 8), Answers(1.0)), (Window(0, 4, 8, 12), Answers(3.0))])  # type: ignore[list-item]
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    added = torch.tensor([2.0] * 4 + [4.0] * 4 + [6.0] * 4)
    assert torch.allclose(tiled(x, 2.0), x + added)
    assert torch.allclose(tiled.unguided(), (-added / 2).expand(1, 4, 8, 12))


def test_windows_see_their_part_of_hints_and_masks(folder: Path, tmp_path: Path) -> None:
    """A second pass, a mask and CFG++ over windows; nothing is left out between them."""
    pipe = nativesd.load(folder, device="cpu")
    first = pipe("a fox", width=64, height=64, **OPTIONS).images[0].resize((128, 64))
    mask = Image.new("L", (128, 64))
    mask.paste(255, (64, 0, 128, 64))
    options = OPTIONS | {"sampler": "Euler CFG++", "tiles": Tiles(64, 32), "strength": 0.6}
    result = pipe("a fox", image=first, mask=mask, mask_blur=0, **options)
    assert result.latents.shape == (1, 4, 8, 16)
    assert result.images[0].crop((0, 0, 64, 64)).tobytes() == first.crop((0, 0, 64, 64)).tobytes()
    repeated, _ = nativesd.options_from(result.save(tmp_path / "wide.png")[0])
    assert repeated["tiles"] == Tiles(64, 32)
    pipe("a fox", hires=Hires(2, 0.5), width=64, height=64, **(OPTIONS | {"tiles": 64}))


def test_windows_share_what_they_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, asked = nativesd.load(folder, device="cpu"), list[int]()
    encode = Pipeline.encode_each

    def counted(self: Pipeline, *texts: Any, **options: Any) -> Any:
        asked.append(1)
        return encode(self, *texts, **options)

    monkeypatch.setattr(Pipeline, "encode_each", counted)
    contexts: set[int] = set()
    made = CachedContext.__init__

    def kept(self: CachedContext, *given: Any) -> None:
        made(self, *given)
        contexts.add(id(self))

    monkeypatch.setattr(CachedContext, "__init__", kept)
    counts = []
    for width in (64, 192):
        asked.clear()
        contexts.clear()
        pipe("a fox", negative_prompt="fog", width=width, height=64, **(OPTIONS | {"tiles": 64}))
        counts.append((len(asked), len(contexts)))
    assert counts[0] == counts[1]
    assert counts[0][0] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [({"tiles": 8}, "between 64"), ({"tiles": Tiles(64, 64)}, "below the size"),
     ({"tiles": 64, "tiling": "x"}, "pass one"),
     ({"tiles": 64, "regions": nativesd.Region("a", (0, 0, 1, 1))}, "pass one")],
)  # fmt: skip
def test_what_cannot_be_is_said(folder: Path, options: dict[str, Any], said: str) -> None:
    pipe = nativesd.load(folder, device="cpu")
    with pytest.raises(UsageError, match=said):
        pipe("a fox", **(OPTIONS | options))
