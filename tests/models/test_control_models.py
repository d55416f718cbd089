"""ControlNet, ControlNetUnion, TAESD and T2I-Adapter against diffusers, at small widths in float32 and by name.

Every parameter of ours is drawn at random, and diffusers' module gets the tensors through the weight map, read
backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, ControlNetUnionModel
from diffusers import T2IAdapter as PublishedT2IAdapter
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from torch import Tensor

from nativesd.config import (
    CONTROLNETS,
    T2I_ADAPTERS,
    AdapterStage,
    ControlNetConfig,
    Depth,
    Level,
    T2IAdapterConfig,
    TextTime,
    TinyVAEConfig,
    UNetConfig,
    UnionConfig,
)
from nativesd.models.build import build
from nativesd.models.controlnet import ControlNet, ControlNetUnion
from nativesd.models.t2i_adapter import T2IAdapter
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.unet import UNet
from nativesd.weights.maps.keymap import load_table
from nativesd.weights.maps.published import t2i_adapter_json, tiny_vae_json
from oracles import (
    TOLERANCE,
    UNetInputs,
    arguments,
    difference,
    draw,
    fits,
    lend,
    on_one_thread,
    published_controlnet,
    published_manifests,
    run_controlnet,
    run_published_controlnet,
    shapes,
    unet_inputs,
    worst,
)

DIFFERENT = 10 * TOLERANCE
"""The least `difference` that counts as another result."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Everything here is too small to share out; on a busy machine threads only wait for each other."""
    with on_one_thread():
        yield


def random(*shape: int, seed: int = 3) -> Tensor:
    """Uniform in [0, 1), as hints are."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def encoder(
    down: tuple[Depth, ...], mid: tuple[Depth, ...], *, linear: bool = False, added: TextTime | None = None
) -> UNetConfig:
    """A narrow encoder of the regular form, with as many levels as `down` has depths."""
    widths, heads = (32, 48, 64, 64), (2, 4, 8, 4)
    levels = tuple(Level(widths[i], (depth,) * 2, (), heads[i]) for i, depth in enumerate(down))
    return UNetConfig(levels, mid, context=24, linear_projection=linear, added=added, groups=16)


def control(unet: UNetConfig, kinds: int | None = None) -> ControlNetConfig:
    """A ControlNet with a narrow hint encoder."""
    union = None if kinds is None else UnionConfig(kinds, layers=2, heads=4, id_width=32)
    return ControlNetConfig(unet, hint_widths=(4, 6, 8, 10), union=union)


XL = TextTime(40, 6, 32)
SD15 = control(encoder((1, 1, 1, None), (1, None)))
SDXL = control(encoder((None, 2, 3), (3, None), linear=True, added=XL))
FORMS = {
    "sd15": SD15,
    "sd15, one channel": replace(SD15, hint_channels=1),
    "sd21": control(encoder((1, 1, None), (1, None), linear=True)),
    "sdxl": SDXL,
    "sdxl small": control(encoder((None, None, None), (0, None), linear=True, added=XL)),
    "sdxl mid": control(encoder((None, 0, 1), (1, None), linear=True, added=XL)),
}
UNIONS = {
    "union": replace(SDXL, union=UnionConfig(6, layers=1, heads=8, id_width=32)),
    "promax": control(SDXL.unet, kinds=8),
}
SIZES = [(8, 16), (13, 11), (9, 14)]


@cache
def pair(form: str) -> tuple[ControlNet, ControlNetModel]:
    """The two ControlNets of a form, built once."""
    with torch.device("meta"):
        ours = ControlNet(FORMS[form])
    reference = published_controlnet(FORMS[form])
    lend(ours, reference, "controlnet.diffusers")
    return ours, reference


@cache
def union_pair(form: str) -> tuple[ControlNetUnion, ControlNetUnionModel]:
    """The two ControlNets for several kinds of hint, built once."""
    with torch.device("meta"):
        ours = ControlNetUnion(UNIONS[form])
    reference = published_controlnet(UNIONS[form])
    lend(ours, reference, "controlnet.diffusers")
    return ours, reference


def inputs_for(config: ControlNetConfig, size: tuple[int, int]) -> UNetInputs:
    """A batch of two."""
    return unet_inputs(config.unet, 2, *size, timestep=481.5, tokens=7)


def hint_for(config: ControlNetConfig, size: tuple[int, int], seed: int = 3) -> Tensor:
    """Hints of different brightness for a batch of two, of 8 pixels to a latent cell."""
    brightness = random(2, 1, 1, 1, seed=seed)
    return random(2, config.hint_channels, 8 * size[0], 8 * size[1], seed=seed + 100) * brightness


@torch.inference_mode()
def run_union(
    ours: ControlNetUnion,
    inputs: UNetInputs,
    hints: Sequence[Tensor],
    kinds: Sequence[int],
    scale: float | Sequence[float] = 1.0,
) -> list[Tensor]:
    """Our residuals for several hints."""
    found: list[Tensor] = ours(
        inputs.latents,
        inputs.timestep,
        inputs.context,
        hints,
        kinds,
        pooled=inputs.pooled,
        time_ids=inputs.time_ids,
        scale=scale,
    )
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_controlnet(form: str, size: tuple[int, int]) -> None:
    ours, reference = pair(form)
    inputs, hint = inputs_for(FORMS[form], size), hint_for(FORMS[form], size)
    found = run_controlnet(ours, inputs, hint)
    assert [tuple(residual.shape) for residual in found] == ours.residual_shapes(2, *size)
    assert worst(found, run_published_controlnet(reference, inputs, hint)) <= TOLERANCE


@pytest.mark.parametrize("form", ["sd15", "sdxl small"])
def test_scale_multiplies_every_residual(form: str) -> None:
    ours, reference = pair(form)
    inputs, hint = inputs_for(FORMS[form], (8, 8)), hint_for(FORMS[form], (8, 8))
    found, full = run_controlnet(ours, inputs, hint, 0.35), run_controlnet(ours, inputs, hint)
    assert worst(found, run_published_controlnet(reference, inputs, hint, 0.35)) <= TOLERANCE
    assert worst(found, [residual * 0.35 for residual in full]) <= TOLERANCE


@pytest.mark.parametrize("form", ["sd15", "sdxl", "sdxl small"])
def test_every_input_counts(form: str) -> None:
    ours, _ = pair(form)
    inputs, hint = inputs_for(FORMS[form], (8, 8)), hint_for(FORMS[form], (8, 8))
    plain = run_controlnet(ours, inputs, hint)
    assert min(map(difference, run_controlnet(ours, inputs, 1 - hint), plain)) > DIFFERENT
    for field in ("latents", "timestep", "pooled", "time_ids", "context"):
        value = getattr(inputs, field)
        if value is not None:
            change: dict[str, Any] = {field: value.flip(0) if isinstance(value, Tensor) else 20.0}
            other = replace(inputs, **change)
            changed = difference(run_controlnet(ours, other, hint)[-1], plain[-1]) > DIFFERENT
            assert changed == (field != "context" or form != "sdxl small"), field


def test_an_attention_without_blocks_computes() -> None:
    ours, _ = pair("sdxl small")
    inputs, hint = inputs_for(FORMS["sdxl small"], (8, 8)), hint_for(FORMS["sdxl small"], (8, 8))
    bare = control(replace(FORMS["sdxl small"].unet, mid=(None, None)))
    with torch.device("meta"):
        without = ControlNet(bare)
    without.load_state_dict({name: ours.state_dict()[name] for name in without.state_dict()}, assign=True)
    found, plain = run_controlnet(ours, inputs, hint), run_controlnet(without, inputs, hint)
    assert worst(found[:-1], plain[:-1]) == 0
    assert difference(found[-1], plain[-1]) > DIFFERENT


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_a_unet_takes_the_residuals_as_they_are(form: str) -> None:
    ours, _ = pair(form)
    config = FORMS[form].unet
    levels = tuple(replace(level, up=(*level.down, level.down[0])) for level in config.levels)
    with torch.device("meta"):
        unet = UNet(replace(config, levels=levels))
    draw(unet, 1)
    inputs = inputs_for(FORMS[form], (13, 11))
    residuals = run_controlnet(ours, inputs, hint_for(FORMS[form], (13, 11)))
    with torch.inference_mode():
        plain, controlled = (
            unet(
                inputs.latents,
                inputs.timestep,
                inputs.context,
                pooled=inputs.pooled,
                time_ids=inputs.time_ids,
                residuals=given,
            )
            for given in (None, residuals)
        )
    assert difference(controlled, plain) > DIFFERENT


def test_a_hint_that_does_not_fit_is_refused() -> None:
    ours, _ = pair("sd15")
    inputs = inputs_for(SD15, (8, 8))
    for wrong in (random(2, 3, 64, 72), random(2, 3, 8, 8), random(1, 3, 64, 64)):
        with pytest.raises(ValueError, match="hint"):
            run_controlnet(ours, inputs, wrong)


CASES: dict[str, tuple[list[int], float | list[float]]] = {
    "one kind": ([3], 1.0),
    "one kind, scaled": ([0], 0.35),
    "one kind, scaled in a list": ([0], [0.35]),
    "two kinds": ([1, 4], 1.0),
    "two kinds, scaled": ([4, 1], 0.6),
    "three kinds, each scaled": ([5, 0, 2], [0.9, 0.3, 1.4]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", UNIONS)
def test_union(form: str, case: str) -> None:
    ours, reference = union_pair(form)
    config = UNIONS[form]
    assert config.union is not None
    kinds, scale = CASES[case]
    inputs = inputs_for(config, (9, 14))
    hints = [hint_for(config, (9, 14), seed) for seed in range(len(kinds))]
    used = torch.zeros(2, config.union.kinds)
    used[:, kinds] = 1
    found = run_union(ours, inputs, hints, kinds, scale)
    expected = run_published_controlnet(reference, inputs, hints, scale, control_type=used, control_type_idx=kinds)
    assert [tuple(residual.shape) for residual in found] == ours.residual_shapes(2, 9, 14)
    assert worst(found, expected) <= TOLERANCE


def test_union_inputs_count() -> None:
    ours, _ = union_pair("union")
    inputs = inputs_for(UNIONS["union"], (8, 8))
    hints = [hint_for(UNIONS["union"], (8, 8), seed) for seed in range(2)]
    plain = run_union(ours, inputs, hints, [0, 1])
    assert worst(run_union(ours, inputs, hints[::-1], [1, 0]), plain) <= TOLERANCE
    for other in (
        run_union(ours, inputs, hints, [0, 2]),
        run_union(ours, inputs, hints[::-1], [0, 1]),
        run_union(ours, inputs, hints[:1], [0]),
        run_union(ours, inputs, hints, [0, 1], [1.0, 0.5]),
    ):
        assert min(map(difference, other, plain)) > DIFFERENT


def test_a_picture_does_not_depend_on_its_equals_in_a_union_batch() -> None:
    """The published attention across the batch changes nothing where a guided picture stands in it twice."""
    ours, _ = union_pair("union")
    inputs, hint = inputs_for(UNIONS["union"], (8, 8)), hint_for(UNIONS["union"], (8, 8))
    twice = replace(inputs, latents=inputs.latents[:1].expand(2, -1, -1, -1))
    pooled, time_ids = inputs.pooled, inputs.time_ids
    assert pooled is not None
    assert time_ids is not None
    once = replace(
        inputs, latents=inputs.latents[:1], context=inputs.context[:1], pooled=pooled[:1], time_ids=time_ids[:1]
    )
    both = run_union(ours, twice, [hint[:1].expand(2, -1, -1, -1)], [2])
    assert worst([residual[:1] for residual in both], run_union(ours, once, [hint[:1]], [2])) <= TOLERANCE


def test_union_refuses_what_does_not_fit() -> None:
    ours, _ = union_pair("union")
    inputs, hint = inputs_for(UNIONS["union"], (8, 8)), hint_for(UNIONS["union"], (8, 8))
    for hints, kinds, scale in (([hint], [0, 1], 1.0), ([], [], 1.0), ([hint, hint], [0, 1], [1.0])):
        with pytest.raises(ValueError, match="equally many"):
            run_union(ours, inputs, hints, kinds, scale)
    for kind in (-1, 6):
        with pytest.raises(ValueError, match="0 to 5"):
            run_union(ours, inputs, [hint], [kind])
    with pytest.raises(ValueError, match="one kind"):
        ControlNetUnion(FORMS["sdxl"])


TINY_VAES = {
    "taesd": TinyVAEConfig(width=12),
    "16 channels": TinyVAEConfig(width=12, latent_channels=16),
    "less": TinyVAEConfig(width=8, encoder=(2, 1), decoder=(1, 2)),
}


@cache
def tiny_pair(form: str) -> tuple[TinyVAE, AutoencoderTiny]:
    """The two tiny autoencoders of a form, built once."""
    config = TINY_VAES[form]
    with torch.device("meta"):
        ours = TinyVAE(config)
        reference = AutoencoderTiny(**arguments(tiny_vae_json(config)))
    lend(ours, reference, "tiny_vae.diffusers")
    return ours, reference


@pytest.mark.parametrize("size", [(32, 48), (27, 46)], ids=str)
@pytest.mark.parametrize("form", TINY_VAES)
def test_tiny_vae_encode(form: str, size: tuple[int, int]) -> None:
    ours, reference = tiny_pair(form)
    factor = TINY_VAES[form].factor
    images = random(2, 3, *size) * 2 - 1
    with torch.inference_mode():
        found, expected = ours.encode(images), reference.encode(images).latents
    assert found.shape == (2, TINY_VAES[form].latent_channels, -(-size[0] // factor), -(-size[1] // factor))
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("size", [(4, 6), (3, 5)], ids=str)
@pytest.mark.parametrize("form", TINY_VAES)
def test_tiny_vae_decode(form: str, size: tuple[int, int]) -> None:
    ours, reference = tiny_pair(form)
    factor = TINY_VAES[form].factor
    latents = random(2, TINY_VAES[form].latent_channels, *size) * 20 - 10
    with torch.inference_mode():
        found, expected = ours.decode(latents), reference.decode(latents).sample
        squeezed = ours.decode(3 * (latents / 3).tanh())
    assert found.shape == (2, 3, size[0] * factor, size[1] * factor)
    assert difference(found, expected) <= TOLERANCE
    assert difference(squeezed, expected) > DIFFERENT  # the squeezing counts at this scale


ADAPTERS = {
    "full": T2IAdapterConfig((AdapterStage(16, False), AdapterStage(24, True), AdapterStage(24, True)), layers=2),
    "full, one channel": T2IAdapterConfig((AdapterStage(16, False), AdapterStage(24, True)), 2, image_channels=1),
    "xl": replace(
        T2I_ADAPTERS["sdxl"],
        stages=tuple(replace(stage, width=stage.width // 20) for stage in T2I_ADAPTERS["sdxl"].stages),
    ),
    "light": replace(
        T2I_ADAPTERS["sd15-light"],
        stages=tuple(replace(stage, width=stage.width // 20) for stage in T2I_ADAPTERS["sd15-light"].stages),
    ),
}
ADAPTER_TYPES = {"full": "full_adapter", "full, one channel": "full_adapter", "xl": "full_adapter_xl"}


@pytest.mark.parametrize("size", [(64, 96), (48, 80), (80, 112)], ids=str)
@pytest.mark.parametrize("form", ADAPTERS)
def test_t2i_adapter(form: str, size: tuple[int, int]) -> None:
    config = ADAPTERS[form]
    widths = [stage.width for stage in config.stages]
    with torch.device("meta"):
        ours = T2IAdapter(config)
        reference = PublishedT2IAdapter(**arguments(t2i_adapter_json(config)))
    lend(ours, reference, "t2i_adapter.diffusers")
    hint = random(2, config.image_channels, *size)
    with torch.inference_mode():
        found, expected = ours(hint), reference(hint)
    assert [features.shape[1] for features in found] == widths
    assert worst(found, expected) <= TOLERANCE


MANIFESTS = published_manifests()


@pytest.mark.parametrize("name", ["sd21", "sdxl-promax"])
def test_presets_without_a_manifest(name: str) -> None:
    config = CONTROLNETS[name]
    ours = build(config)
    fits(load_table("controlnet.diffusers").bind(), shapes(published_controlnet(config)), shapes(ours))


def test_ldm_names_mean_what_diffusers_says() -> None:
    theirs = {
        name: torch.empty(shape, device="meta")
        for name, shape in MANIFESTS["controlnet-sd15.controlnet-ldm"].shapes.items()
    }
    origin = {id(tensor): name for name, tensor in theirs.items()}
    manifest = MANIFESTS["controlnet-sd15.diffusers"]
    converted = convert_controlnet_checkpoint(dict(theirs), manifest.config)
    assert converted.keys() == manifest.shapes.keys()
    ldm = load_table("controlnet.ldm").bind(CONTROLNETS["sd15"].dims)
    diffusers = load_table("controlnet.diffusers").bind()
    for name, tensor in converted.items():
        assert [parameter for parameter, _ in ldm.parameters(origin[id(tensor)])] == [
            parameter for parameter, _ in diffusers.parameters(name)
        ]


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_halves_of_the_tiny_vae(half: Literal["encoder", "decoder"]) -> None:
    ours, _ = tiny_pair("taesd")
    alone = TinyVAE(replace(ours.config, half=half))
    alone.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if name.startswith(half)})
    latents, images = random(1, 4, 3, 5), random(1, 3, 24, 40)
    with torch.inference_mode():
        if half == "encoder":
            assert torch.equal(alone.encode(images), ours.encode(images))
            with pytest.raises(ValueError, match="encoder alone"):
                alone.decode(latents)
        else:
            assert torch.equal(alone.decode(latents), ours.decode(latents))
            with pytest.raises(ValueError, match="decoder alone"):
                alone.encode(images)
