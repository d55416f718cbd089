"""Image encoders and IP-Adapters against transformers and diffusers: small, in float32, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.loaders import IPAdapterMixin
from PIL import Image, ImageDraw
from torch import Tensor

from nativesd.config import CLIP_VISION_BIGG, CLIP_VISION_H, CLIP_VISION_L, Level, TextTime, UNetConfig
from nativesd.diffusion.conditioning import Conditioning, groups
from nativesd.diffusion.images.keys import ImageKeyring, ImagePrompting
from nativesd.diffusion.images.prompts import ImageAdapter, ImageEmbeddings, ImagePrompt, prepare
from nativesd.models.ip_adapter import IPAdapter
from nativesd.models.unet import ImageContext, UNet
from nativesd.sampling.steps import Steps
from nativesd.tuning.tune import Tuning, tune
from nativesd.weights.files.source import Member
from oracles import (
    TOLERANCE,
    UNetInputs,
    adapter_of,
    difference,
    drawn_adapter,
    run_published_image_encoder,
    run_unet,
    unet_inputs,
    unet_pair,
    vision_pair,
)

NOTHING = Member("", {}, {}, {}, {})


@pytest.mark.parametrize("tower", [CLIP_VISION_L, CLIP_VISION_H, CLIP_VISION_BIGG], ids=["L", "H", "bigG"])
def test_image_encoders(tower: Any) -> None:
    """Of the published towers' patches and activations; bigG's heads are no power of two wide."""
    heads = 3 if tower is CLIP_VISION_BIGG else 2
    config = replace(tower, width=heads * 26, layers=3, heads=heads, mlp=96, projection=20, image=56)
    ours, reference = vision_pair(config)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = ours(pixels)
    embedding, states = run_published_image_encoder(reference, pixels)
    assert difference(found.embedding, embedding) <= TOLERANCE
    assert difference(found.hidden, states) <= TOLERANCE


# --- UNets of SD1.5's and SDXL's form, whose heads are as wide as the resampler's context asks


def unet(form: str) -> UNetConfig:
    if form == "sd15":
        levels = tuple(Level(32, (d,) * 2, (d,) * 3, 2) for d in (1, 1, 1, None))
        levels = (replace(levels[0], width=16), *levels[1:])
        return UNetConfig(levels, mid=(1, None), context=64, groups=8)
    levels = (Level(16, (None,) * 2, (None,) * 3, 2), Level(32, (2, 2), (2,) * 3, 4), Level(32, (3, 3), (3,) * 3, 4))
    return UNetConfig(levels, mid=(3, None), context=64, groups=8, linear_projection=True, added=TextTime(24, 6, 8))


UNETS = {form: unet(form) for form in ("sd15", "sdxl")}
HEIGHT, WIDTH = 16, 24


@cache
def pair(form: str) -> tuple[UNet, UNet2DConditionModel]:
    return unet_pair(UNETS[form])


@dataclass(frozen=True)
class Case:
    """One adapter: our prompt, and what diffusers is given for the negative and the prompt's row."""

    prompt: ImagePrompt
    halves: dict[str, dict[str, Tensor]]
    image: Tensor
    """(2, N, ...): embeddings or states, or identities."""
    states: Tensor | None = None
    """(2, N, S, W), for FaceID plus."""


def case(form: str, kind: Any, seed: int, *, pictures: int = 1, **fields: Any) -> Case:
    shortcut = fields.pop("shortcut", False)
    module, halves = drawn_adapter(replace(adapter_of(UNETS[form], kind), shortcut=shortcut), seed)
    generator = torch.Generator().manual_seed(seed + 100)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    adapter = ImageAdapter("adapter", module, Path("adapter"), NOTHING)
    if kind == "base":
        embedding = random(pictures, 40)
        given = ImageEmbeddings(embedding)
        return Case(ImagePrompt(adapter, given, **fields), halves, torch.stack([embedding * 0, embedding]))
    states, negative = random(pictures, 257 if kind == "full" else 9, 40), random(1, 257 if kind == "full" else 9, 40)
    both = torch.stack([negative.expand_as(states), states])
    given = ImageEmbeddings(None, states, negative)
    if kind in ("plus", "full"):
        return Case(ImagePrompt(adapter, given, **fields), halves, both)
    identity = torch.nn.functional.normalize(random(pictures, 12))
    ids = torch.stack([identity * 0, identity])
    if kind == "faceid":
        return Case(ImagePrompt(adapter, identity=identity, **fields), halves, ids)
    return Case(ImagePrompt(adapter, given, identity=identity, **fields), halves, ids, both)


def shown(form: str, cases: Sequence[Case]) -> ImageContext:
    """What our UNet is shown for two rows: the negative prompt's and the prompt's."""
    config = UNETS[form]

    def encoder(adapter: ImageAdapter) -> Any:
        raise AssertionError("nothing has to be encoded")

    prepared = [prepare(each.prompt, config, encoder) for each in cases]
    keyring = ImageKeyring(prepared, config, (HEIGHT, WIDTH), device=torch.device("cpu"), dtype=torch.float32)
    side = Conditioning(torch.zeros(2, 7, 64), prompt=torch.tensor([0.0, 1.0]))
    found = ImagePrompting(keyring, Steps([10.0, 5.0])).at(10.0, groups(side)[0])
    assert found is not None
    return found


@torch.inference_mode()
def ours(form: str, inputs: UNetInputs, images: ImageContext | None) -> Tensor:
    out: Tensor = pair(form)[0](
        inputs.latents, inputs.timestep, inputs.context, pooled=inputs.pooled, time_ids=inputs.time_ids, images=images
    )
    return out


@torch.inference_mode()
def theirs(
    form: str, inputs: UNetInputs, cases: Sequence[Case], scales: Sequence[Any], masks: list[Tensor] | None = None
) -> Tensor:
    """diffusers' prediction, with the adapters in the processors of a copy of its UNet."""
    reference = copy.deepcopy(pair(form)[1])
    reference._load_ip_adapter_weights([each.halves for each in cases], low_cpu_mem_usage=False)
    for layer, each in zip(reference.encoder_hid_proj.image_projection_layers, cases, strict=True):
        if each.states is not None:
            layer.clip_embeds = each.states
            layer.shortcut = each.prompt.adapter.module.config.shortcut  # type: ignore[union-attr]
    IPAdapterMixin.set_ip_adapter_scale(SimpleNamespace(unet=reference, unet_name="unet"), list(scales))
    told = {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids, "image_embeds": [each.image for each in cases]}
    out: Tensor = reference(
        inputs.latents, inputs.timestep, inputs.context, added_cond_kwargs=told,
        cross_attention_kwargs=None if masks is None else {"ip_adapter_masks": masks},
    ).sample  # fmt: skip
    return out


def inputs_for(form: str) -> UNetInputs:
    return unet_inputs(UNETS[form], 2, HEIGHT, WIDTH, timestep=481.5, tokens=7)


KINDS: list[tuple[Any, dict[str, Any]]] = [
    ("base", {}), ("plus", {}), ("full", {}), ("faceid", {}), ("faceid-plus", {}), ("faceid-plus", {"shortcut": True}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), KINDS, ids=lambda each: each if isinstance(each, str) else "".join(each))
@pytest.mark.parametrize("form", UNETS)
def test_every_kind_in_the_unet(form: str, kind: Any, fields: dict[str, Any]) -> None:
    inputs, each = inputs_for(form), case(form, kind, 1, scale=0.8, **fields)
    found, expected = ours(form, inputs, shown(form, [each])), theirs(form, inputs, [each], [0.8])
    assert difference(found, expected) <= TOLERANCE
    assert difference(found, ours(form, inputs, None)) > 1e-3, "the adapter has to matter"


@pytest.mark.parametrize("form", UNETS)
def test_two_adapters_of_different_lengths(form: str) -> None:
    inputs = inputs_for(form)
    cases = [case(form, "base", 1, scale=0.6), case(form, "plus", 2, pictures=3, scale=-0.7)]
    assert difference(ours(form, inputs, shown(form, cases)), theirs(form, inputs, cases, [0.6, -0.7])) <= TOLERANCE


def half(side: str) -> Image.Image:
    """A mask of the picture's size that is white on one side, along a slant."""
    mask = Image.new("L", (WIDTH * 8, HEIGHT * 8))
    edge = [(WIDTH * 3, 0), (WIDTH * 5, HEIGHT * 8)]
    corners = [(0, 0), (0, HEIGHT * 8)] if side == "left" else [(WIDTH * 8, 0), (WIDTH * 8, HEIGHT * 8)]
    ImageDraw.Draw(mask).polygon([*edge, corners[1], corners[0]], fill=255)
    return mask


@pytest.mark.parametrize("form", UNETS)
def test_masks(form: str) -> None:
    """Two pictures of one adapter, each with a mask of its own, beside another adapter that is everywhere."""
    inputs, halves = inputs_for(form), [half("left"), half("right")]
    cases = [case(form, "plus", 1, pictures=2, mask=halves), case(form, "base", 2, scale=0.5)]
    masks = IPAdapterMaskProcessor().preprocess(halves)  # (2, 1, H, W)
    everywhere = torch.ones(1, 1, HEIGHT * 8, WIDTH * 8)
    expected = theirs(form, inputs, cases, [1.0, 0.5], [masks.transpose(0, 1), everywhere])
    assert difference(ours(form, inputs, shown(form, cases)), expected) <= TOLERANCE
    one_mask = [case(form, "base", 3, mask=halves[0])]
    expected = theirs(form, inputs, one_mask, [1.0], [masks[:1].transpose(0, 1)])
    assert difference(ours(form, inputs, shown(form, one_mask)), expected) <= TOLERANCE


@pytest.mark.parametrize("form", UNETS)
def test_scales_by_layer(form: str) -> None:
    inputs = inputs_for(form)
    layers = {"down": {"block_1": [0.3, 1.0]}, "mid": 0.5, "up": {"block_1": [0.0, 1.0, 0.2]}}
    each = case(form, "base", 1, layers=layers)
    assert difference(ours(form, inputs, shown(form, [each])), theirs(form, inputs, [each], [layers])) <= TOLERANCE


@pytest.mark.parametrize("form", UNETS)
def test_style_and_layout_are_those_of_diffusers_documentation(form: str) -> None:
    """SDXL's by its words; SD1.5's numbers are ComfyUI's, whose transformers are counted as the data goes."""
    inputs = inputs_for(form)
    if form == "sdxl":
        named = {
            "style": {"up": {"block_0": [0.0, 1.0, 0.0]}}, "layout": {"down": {"block_2": [0.0, 1.0]}},
            "style and layout": {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
        }  # fmt: skip
    else:
        named = {
            "layout": {"down": {"block_2": [0.25, 1.0]}},
            "style transfer": {"down": {"block_0": 1.0, "block_1": 1.0}, "up": {"block_2": 1.0, "block_3": 1.0}}
            | {"up": {"block_1": [0.0, 0.0, 1.0], "block_2": 1.0, "block_3": 1.0}},
        }  # fmt: skip
    for name, places in named.items():
        each = case(form, "base", 1, layers=name)
        assert difference(ours(form, inputs, shown(form, [each])), theirs(form, inputs, [each], [places])) <= TOLERANCE


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("form", UNETS)
def test_a_zero_slot_changes_no_bit(form: str, fast: bool) -> None:
    inputs, each = inputs_for(form), case(form, "plus", 1, scale=0.0)
    config = UNETS[form]
    keys = shown(form, [case(form, "plus", 1)])
    zero = ImageContext(keys.keys, {width: values * 0 for width, values in keys.values.items()})
    module = copy.deepcopy(pair(form)[0])
    if fast:
        tune(module, Tuning(linear=True, attention=True, convolution=True))
    with torch.inference_mode():
        told = {"pooled": inputs.pooled, "time_ids": inputs.time_ids}
        plain = module(inputs.latents, inputs.timestep, inputs.context, **told)
        idle = module(inputs.latents, inputs.timestep, inputs.context, **told, images=zero)
    assert torch.equal(plain, idle)
    assert each.prompt.scale == 0
    assert {place.width for place in config.cross_attentions} == set(zero.keys)
    assert torch.equal(run_unet(pair(form)[0], inputs), ours(form, inputs, zero))


def test_an_adapter_takes_what_its_kind_takes() -> None:
    module = IPAdapter(adapter_of(UNETS["sd15"], "faceid-plus"))
    for image, identity in ((None, torch.zeros(1, 12)), (torch.zeros(1, 9, 40), None), (None, None)):
        with pytest.raises(ValueError, match="takes other inputs"):
            module.tokens(image, identity)
