"""Prompts for parts of a picture, and pictures that join with themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from test_pipeline import save_model
from torch import Tensor, nn

import nativesd
from nativesd import PAG, Control, Region
from nativesd.config import ControlNetConfig
from nativesd.diffusion.control import ControlModel
from nativesd.diffusion.regions import shares
from nativesd.errors import UsageError
from nativesd.models.controlnet import ControlNet
from nativesd.models.tiling import Tiling, goes_around
from oracles import draw

OPTIONS: dict[str, Any] = {"steps": 4, "seed": 5, "sampler": "Euler", "width": 64, "height": 48, "guidance_scale": 6.0}
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("regions")
    for form in ("sd15", "sdxl"):
        save_model(form, root / form)
    return {path.name: path for path in root.iterdir()}


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_half_masks_of_one_prompt_are_no_mask(folders: dict[str, Path], form: str, tmp_path: Path) -> None:
    pipe = nativesd.load(folders[form], device="cpu")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (32, 0, 64, 48))
    mask.save(tmp_path / "right.png")
    plain = pipe("a fox", negative_prompt="fog", **OPTIONS).latents
    halves = [Region("a fox", LEFT), Region("a fox", mask=tmp_path / "right.png")]
    assert close(pipe("a fox", negative_prompt="fog", regions=halves, **OPTIONS).latents, plain)
    assert close(
        pipe("a fox", negative_prompt="fog", regions=Region("an owl", LEFT, weight=0), **OPTIONS).latents, plain
    )
    pair = [Region("a fox", LEFT), Region("an owl BREAK at night", RIGHT)]
    assert not close(pipe("a fox", negative_prompt="fog", regions=pair, **OPTIONS).latents, plain)
    whole = Region("an owl", (0, 0, 1, 1))
    if form == "sd15":  # SDXL's pooled embedding is the call's prompt's
        assert close(
            pipe("a fox", negative_prompt="fog", regions=whole, **OPTIONS).latents,
            pipe("an owl", negative_prompt="fog", **OPTIONS).latents,
        )


def test_each_cell_attends_to_its_own_prompt(folders: dict[str, Path]) -> None:
    """One attention, against two that are weighed: A1111's and ComfyUI's "attention couple" in a few lines."""
    pipe = nativesd.load(folders["sd15"], device="cpu")
    regions = [Region("", (0.2, 0.0, 0.7, 0.6)), Region("", (0.5, 0.3, 1.0, 1.0), weight=0.5)]
    weights = shares(regions, (6, 8))
    assert torch.allclose(weights.sum(0), torch.ones(6, 8))
    cell = [[max(0.0, min(x + 1, 5.6) - max(x, 1.6)) * max(0.0, min(y + 1, 3.6) - max(y, 0)) for x in range(8)]
            for y in range(6)]  # fmt: skip
    assert torch.allclose(regions[0].weights((6, 8)), torch.tensor(cell))
    over = torch.tensor(cell) + regions[1].weights((6, 8))
    assert torch.allclose(weights[0], (1 - over).clamp(min=0) / over.clamp(min=1))
    pipe("a fox", regions=regions, **OPTIONS)


def test_regions_of_a_batch_are_those_of_each_picture(folders: dict[str, Path]) -> None:
    """Beside prompts of other lengths, combined prompts, perturbed guidance and a second pass."""
    pipe = nativesd.load(folders["sd15"], device="cpu")
    prompts = ["a fox", "an owl BREAK at night BREAK in rain", "a fox AND an owl"]
    options = OPTIONS | {"regions": [Region("a [penguin:cat:0.5]", LEFT)], "guidance": PAG(2.0)}
    together = pipe(prompts, **options).latents
    for i, prompt in enumerate(prompts[:2]):
        assert close(together[i : i + 1], pipe(prompt, **(options | {"seed": 5 + i})).latents)
    pipe.sequential = True
    assert close(pipe(prompts, **options).latents, together)
    pipe("a fox", hires=1.5, **options)


def test_regions_are_kept_in_the_picture(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = nativesd.load(folders["sd15"], device="cpu")
    regions = [Region("a fox, running", LEFT, weight=0.7), Region('an "owl"', RIGHT)]
    first = pipe("a field", regions=regions, tiling="x", **OPTIONS)
    options, unheeded = nativesd.options_from(first.save(tmp_path / "pair.png")[0])
    assert options["regions"] == regions
    assert options["tiling"] == "x"
    assert not unheeded
    again = pipe(**{name: value for name, value in options.items() if name != "model"})
    assert close(again.latents, first.latents)
    masked = pipe("a field", regions=Region("a fox", mask=Image.new("L", (8, 8), 255)), **OPTIONS)
    options, unheeded = nativesd.options_from(masked.save(tmp_path / "masked.png")[0])
    assert "regions" not in options
    assert any("mask" in each for each in unheeded)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regions": "a fox"}, "must be nativesd.Region"), ({"regions": Region("a fox")}, "a box or a mask"),
        ({"regions": Region("a fox", (0.5, 0, 0.5, 1))}, "left, top, right and bottom"),
        ({"regions": Region("a fox AND a dog", (0, 0, 0.5, 1))}, "a region has one prompt"),
        ({"regions": Region("a fox", (0, 0, 512, 512))}, "between 0 and 1"), ({"tiling": "z"}, "xy"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(folders: dict[str, Path], options: dict[str, Any], said: str) -> None:
    pipe = nativesd.load(folders["sd15"], device="cpu")
    with pytest.raises(UsageError, match=said):
        pipe("a fox", **(OPTIONS | options))


def around(pipe: diffusers.DiffusionPipeline) -> None:
    for module in (pipe.unet, pipe.vae):
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                part.padding_mode = "circular"
                part._reversed_padding_repeated_twice = [p for size in reversed(part.padding) for p in (size, size)]


def test_tiling_is_diffusers_with_circular_padding(folders: dict[str, Path]) -> None:
    reference = diffusers.StableDiffusionPipeline.from_pretrained(
        folders["sd15"], safety_checker=None, requires_safety_checker=False, feature_extractor=None
    )
    reference.scheduler = diffusers.EulerDiscreteScheduler.from_config(reference.scheduler.config)
    around(reference)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        "a fox", num_inference_steps=4, width=64, height=48, guidance_scale=6.0, output_type="pt",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    pipe = nativesd.load(folders["sd15"], device="cpu")
    found = pipe.decode_tensor(pipe("a fox", tiling="xy", **OPTIONS).latents, tiling="xy")
    assert (found - expected).abs().max() < 2e-3
    plain = pipe("a fox", **OPTIONS).latents
    assert (pipe.decode_tensor(plain) - expected).abs().max() > 0.02
    assert close(pipe("a fox", **OPTIONS).latents, plain), "what was changed is put back"


@pytest.mark.parametrize("tiling", ["x", "y", "xy"])
def test_a_tiled_picture_may_be_rolled(folders: dict[str, Path], tiling: str) -> None:
    """Along its axes: latents that are rolled by cells of the deepest level make the picture that is rolled so."""
    pipe = nativesd.load(folders["sd15"], device="cpu")
    options = {**OPTIONS, "strength": 0.7, "seed": 5}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options |= {"width": None, "height": None}
    noise: dict[str, Tensor] = {}

    def rolled(shift: tuple[int, int]) -> Tensor:
        from nativesd.sampling import noise as drawn

        original = drawn.CpuNoise.draw
        with pytest.MonkeyPatch.context() as patch:
            for name in ("draw", "first"):
                patch.setattr(drawn.CpuNoise, name, lambda self, shape: original(self, shape).roll(shift, (2, 3)))
            result = pipe("a fox", latents=latents.roll(shift, (2, 3)), tiling=tiling, **options).latents
        noise["last"] = result
        return pipe.decode_tensor(result, tiling=tiling)  # type: ignore[arg-type]

    straight = rolled((0, 0))
    for axis, shift in (("y", (2, 0)), ("x", (0, 2))):
        turned = straight.roll((shift[0] * 8, shift[1] * 8), (2, 3))
        same = (rolled(shift) - turned).abs().max() < 2e-3
        assert same == (axis in tiling)


@pytest.mark.parametrize("tiling", ["x", "y", "xy"])
def test_the_encoder_goes_around(folders: dict[str, Path], tiling: Tiling) -> None:
    """A picture that is rolled by cells is encoded to latents that are rolled so, along the axes of tiling alone."""
    pipe = nativesd.load(folders["sd15"], device="cpu")
    pixels = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    straight = pipe.encode_tensor(pixels, tiling=tiling)[0]
    for axis, shift in (("y", (2, 0)), ("x", (0, 2))):
        turned = pipe.encode_tensor(pixels.roll((shift[0] * 8, shift[1] * 8), (2, 3)), tiling=tiling)[0]
        assert close(turned, straight.roll(shift, (2, 3))) == (axis in tiling)


def test_both_controlnets_of_one_name_go_around(folders: dict[str, Path]) -> None:
    pipe = nativesd.load(folders["sd15"], device="cpu")
    networks = []
    unet = pipe.config.unet
    encoder = replace(unet, levels=tuple(replace(level, up=()) for level in unet.levels))
    for seed in (0, 1):
        with torch.device("meta"):
            module = ControlNet(ControlNetConfig(encoder))
        draw(module, seed)
        networks.append(ControlModel("same", module))
    seen: list[bool] = []
    for network in networks:
        network.module.register_forward_hook(lambda module, *_: seen.append(goes_around(module)))
    hint = Image.linear_gradient("L").resize((64, 48))
    pipe(
        "a fox", tiling="xy", control=[Control(each, hint, scale=0.1) for each in networks], **(OPTIONS | {"steps": 1})
    )
    assert seen
    assert all(seen)


def test_tuned_layers_are_put_aside(folders: dict[str, Path]) -> None:
    """The fast layers of a loaded model do not go around: the plain ones do, and are as before afterwards."""
    fast = nativesd.load(folders["sd15"], device="cpu", fast=True)
    kinds = [type(part) for part in fast.unet.modules()]
    found = fast("a fox", tiling="xy", **OPTIONS).latents
    assert [type(part) for part in fast.unet.modules()] == kinds
    assert close(
        found, nativesd.load(folders["sd15"], device="cpu", fast=False)("a fox", tiling="xy", **OPTIONS).latents
    )
