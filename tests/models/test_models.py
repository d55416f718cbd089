"""Our modules against diffusers and transformers at small widths, in float32, with every parameter drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from nativesd.config import (
    SD15_UNET,
    SDXL_UNET,
    Activation,
    Depth,
    Level,
    TextEncoderConfig,
    TextTime,
    UNetConfig,
    VAEConfig,
)
from nativesd.models.layers import sinusoidal
from nativesd.models.unet import UNet
from oracles import (
    TOLERANCE,
    UNetInputs,
    difference,
    on_one_thread,
    published_unet,
    random_residuals,
    run_published_decode,
    run_published_encode,
    run_published_text_encoder,
    run_published_unet,
    run_unet,
    text_pair,
    unet_inputs,
    unet_kwargs,
    unet_pair,
    vae_pair,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Everything here is too small to share out; on a busy machine threads only wait for each other."""
    with on_one_thread():
        yield


def small(
    down: tuple[Depth, ...],
    mid: tuple[Depth, ...],
    *,
    widths: tuple[int, ...] = (48, 64, 64, 64),
    heads: tuple[int, ...] = (2, 4, 8, 4),
    layers: int = 2,
    linear: bool = False,
    added: TextTime | None = None,
) -> UNetConfig:
    """A narrow UNet of the regular form, with as many levels as `down` has depths."""
    levels = tuple(
        Level(widths[i], (depth,) * layers, (depth,) * (layers + 1), heads[i]) for i, depth in enumerate(down)
    )
    return UNetConfig(levels, mid, context=24, linear_projection=linear, added=added, groups=16)


SD15 = small((1, 1, None), (1, None))
UNETS = {
    "sd15": SD15,
    "sd15, four levels": small((1, 1, 1, None), (1, None), widths=(32, 32, 64, 64)),
    "sd15, 32 groups": replace(small((1, None), (1, None), widths=(32, 64)), groups=32),
    "sd15-inpainting": replace(SD15, in_channels=9),
    "lcm": replace(SD15, guidance=40),
    "sd21": small((1, 1, None), (1, None), linear=True),
    "sdxl": small((None, 2, 3), (3, None), linear=True, added=TextTime(40, 6, 32)),
    "refiner": small((None, 2, 2, None), (2, None), linear=True, added=TextTime(40, 5, 32)),
    "bk-sdm base": small((1, 1, 1, None), (1, None), layers=1),
    "bk-sdm tiny": small((1, 1, 1), (), layers=1),
    "ssd-1b": UNetConfig(
        levels=(
            Level(32, (None, None), (None, None, None), heads=2),
            Level(48, (2, 2), (2, 1, 1), heads=4),
            Level(64, (4, 4), (2, 2, 5), heads=8),
        ),
        mid=(None,),
        context=24,
        linear_projection=True,
        added=TextTime(40, 6, 32),
        groups=16,
    ),
    "layers differ by level": UNetConfig(
        levels=(
            Level(32, (1,), (1, 1), heads=2),
            Level(48, (None, None, None), (None, None, None, None), heads=4),
            Level(64, (2, 2), (1, 2, 3), heads=8),
        ),
        mid=(2, None),
        context=24,
        groups=16,
    ),
    "attention without blocks": small((None, 0), (0, None), linear=True),
}

SIZES = [(8, 16), (13, 11), (9, 14)]
TIMESTEPS: dict[str, Tensor | float] = {
    "integer": 981,
    "fractional": 333.25,
    "tensor": torch.tensor(17),
    "per sample": torch.tensor([999.0, 0.5]),
}


@cache
def pair(form: str) -> tuple[UNet, UNet2DConditionModel]:
    """The two UNets of a form, built once."""
    return unet_pair(UNETS[form])


def inputs_for(form: str, size: tuple[int, int], timestep: Tensor | float = 481.5) -> UNetInputs:
    """A batch of two."""
    return unet_inputs(UNETS[form], 2, *size, timestep=timestep, tokens=7)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", UNETS)
def test_unet(form: str, size: tuple[int, int]) -> None:
    ours, reference = pair(form)
    inputs = inputs_for(form, size)
    assert difference(run_unet(ours, inputs), run_published_unet(reference, inputs)) <= TOLERANCE


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", UNETS)
def test_unet_with_control_residuals(form: str, size: tuple[int, int]) -> None:
    ours, reference = pair(form)
    inputs = inputs_for(form, size)
    residuals = random_residuals(UNETS[form], inputs)
    controlled = run_unet(ours, inputs, residuals)
    assert difference(controlled, run_published_unet(reference, inputs, residuals)) <= TOLERANCE
    assert difference(controlled, run_unet(ours, inputs)) > 0.01


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_every_control_residual_counts(form: str) -> None:
    ours, _ = pair(form)
    inputs = inputs_for(form, (8, 8))
    plain = run_unet(ours, inputs)
    residuals = random_residuals(UNETS[form], inputs)
    nothing = [torch.zeros_like(residual) for residual in residuals]
    assert torch.equal(run_unet(ours, inputs, nothing), plain)
    for i, residual in enumerate(residuals):
        one = [*nothing[:i], residual, *nothing[i + 1 :]]
        assert difference(run_unet(ours, inputs, one), plain) > 100 * TOLERANCE, f"residual {i}"


@pytest.mark.parametrize("timestep", TIMESTEPS.values(), ids=TIMESTEPS.keys())
@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_timesteps(form: str, timestep: Tensor | float) -> None:
    ours, reference = pair(form)
    inputs = inputs_for(form, (8, 8), timestep)
    found = run_unet(ours, inputs)
    assert difference(found, run_published_unet(reference, inputs)) <= TOLERANCE
    assert difference(found, run_unet(ours, inputs_for(form, (8, 8), 700))) > 100 * TOLERANCE


def test_an_integer_timestep_is_no_other_than_its_float() -> None:
    ours, _ = pair("sd15")
    assert torch.equal(run_unet(ours, inputs_for("sd15", (8, 8), 7)), run_unet(ours, inputs_for("sd15", (8, 8), 7.0)))


@pytest.mark.parametrize("width", [32, 256, 320, 384])
def test_sinusoidal(width: int) -> None:
    times = torch.cat([torch.arange(1000.0), torch.linspace(0, 999, 333)])
    expected = get_timestep_embedding(times, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert difference(sinusoidal(times, width), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("form", "field"), [("lcm", "guidance"), ("sdxl", "pooled"), ("sdxl", "time_ids"), ("sd15", "context")]
)
def test_every_condition_counts(form: str, field: str) -> None:
    ours, reference = pair(form)
    inputs = inputs_for(form, (8, 8))
    other = replace(inputs, **{field: getattr(inputs, field).flip(0)})
    found = run_unet(ours, other)
    assert difference(found, run_published_unet(reference, other)) <= TOLERANCE
    assert difference(found, run_unet(ours, inputs)) > 100 * TOLERANCE


def test_a_guidance_embedding_may_be_left_out() -> None:
    ours, reference = pair("lcm")
    inputs = replace(inputs_for("lcm", (8, 8)), guidance=None)
    assert difference(run_unet(ours, inputs), run_published_unet(reference, inputs)) <= TOLERANCE


def test_added_conditions_may_not_be_left_out() -> None:
    ours, _ = pair("sdxl")
    inputs = inputs_for("sdxl", (8, 8))
    for incomplete in (replace(inputs, pooled=None), replace(inputs, time_ids=None)):
        with pytest.raises(ValueError, match="pass both"):
            run_unet(ours, incomplete)


def norm_settings(module: nn.Module) -> dict[int, tuple[int, float]]:
    """Address of a norm's weight -> groups (0: a layer norm) and eps. The two of a pair share their weights."""
    return {
        part.weight.data_ptr(): (part.num_groups if isinstance(part, nn.GroupNorm) else 0, part.eps)
        for part in module.modules()
        if isinstance(part, nn.GroupNorm | nn.LayerNorm)
    }


def test_norms_are_the_published_ones() -> None:
    """Activations of order one hardly feel an eps, so it is compared as it is written."""
    unets, vaes = pair("sdxl"), vae_pair(VAES["sd"])
    texts = text_pair(text_config("gelu", -1, True, None))
    for ours, reference in (unets, vaes, texts):
        found = norm_settings(ours)
        assert found == norm_settings(reference)
        assert found
    assert {eps for _, eps in norm_settings(unets[0]).values()} == {1e-5, 1e-6}


def test_the_oracle_shares_its_tensors() -> None:
    ours, reference = unet_pair(SD15)
    assert sorted(t.data_ptr() for t in ours.parameters()) == sorted(t.data_ptr() for t in reference.parameters())


def test_the_oracle_refuses_what_diffusers_cannot_express() -> None:
    for mid in ((None, 1), (1, None, None), (2, None)):
        with pytest.raises(ValueError, match="diffusers"):
            unet_kwargs(small((1, 1), mid))
    with pytest.raises(ValueError, match="diffusers"):
        unet_kwargs(UNetConfig((Level(32, (1, None), (1, 1, 1), 2),), (), context=24))


FAMILIES = {"sd15": SD15_UNET, "sdxl": SDXL_UNET}
COUNTS = {"sd15": 12, "sdxl": 9}
MORE_SIZES = [(64, 64), (96, 128), (8, 8), (1, 1), (2, 3), (5, 7), (13, 11), (9, 14), (33, 27), (97, 120), (63, 65)]


@cache
def on_meta(family: str) -> UNet2DConditionModel:
    """diffusers' UNet of the published size, without memory: it can tell shapes."""
    return published_unet(FAMILIES[family])


def skip_shapes(reference: UNet2DConditionModel, config: UNetConfig, size: tuple[int, int]) -> list[tuple[int, ...]]:
    """The shapes of the skips and of the middle's output that occur inside diffusers' UNet."""
    found: list[tuple[int, ...]] = []
    handles = [reference.conv_in.register_forward_hook(lambda _m, _i, out: found.append(tuple(out.shape)))]
    handles += [
        block.register_forward_hook(lambda _m, _i, out: found.extend(tuple(skip.shape) for skip in out[1]))
        for block in reference.down_blocks
    ]
    handles.append(reference.mid_block.register_forward_hook(lambda _m, _i, out: found.append(tuple(out.shape))))
    inputs = unet_inputs(config, 3, *size, timestep=1.0)
    values = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in vars(inputs).items()}
    run_published_unet(reference, UNetInputs(**values))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("size", MORE_SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_residual_shapes(family: str, size: tuple[int, int]) -> None:
    config = FAMILIES[family]
    shapes = config.residual_shapes(3, *size)
    assert shapes == skip_shapes(on_meta(family), config, size)
    assert len(shapes) == COUNTS[family] + 1


def test_residual_shapes_of_the_module_are_those_of_its_config() -> None:
    ours, _ = pair("sdxl")
    assert ours.residual_shapes(2, 13, 11) == UNETS["sdxl"].residual_shapes(2, 13, 11)


def test_wrong_control_residuals_are_refused() -> None:
    ours, _ = pair("sd15")
    inputs = inputs_for("sd15", (13, 11))
    residuals = random_residuals(UNETS["sd15"], inputs)
    narrow = [*residuals[:-1], residuals[-1][..., :-1]]
    one_sample = [residual[:1] for residual in residuals]
    for wrong in (residuals[:-1], [*residuals, residuals[-1]], residuals[::-1], narrow, one_sample, []):
        with pytest.raises(ValueError, match="control residuals"):
            run_unet(ours, inputs, wrong)


VAES = {
    "sd": VAEConfig((32, 48, 64, 64), groups=16),
    "sdxl": VAEConfig((32, 48, 64, 64), scaling=0.13025, groups=16, force_upcast=True),
    "32 groups, one layer, more channels": VAEConfig((32, 64), layers=1, latent_channels=16, image_channels=4),
}


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (27, 46)], ids=str)
@pytest.mark.parametrize("form", VAES)
def test_vae_encode(form: str, size: tuple[int, int]) -> None:
    config = VAES[form]
    ours, reference = vae_pair(config)
    images = torch.rand(2, config.image_channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        found = ours.encode(images)
    for value, expected in zip(found, run_published_encode(reference, images), strict=True):
        assert value.shape == (2, config.latent_channels, size[0] // config.factor, size[1] // config.factor)
        assert difference(value, expected) <= TOLERANCE
    assert difference(*found) > 0.1


def test_vae_clamps_the_log_variance() -> None:
    ours, reference = vae_pair(VAES["sd"])
    with torch.inference_mode():
        reference.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 0.0])  # ours has the same tensor
        images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        _, logvar = ours.encode(images)
    assert (logvar[:, 0] == -30).all()
    assert (logvar[:, 1] == 20).all()
    assert difference(logvar, run_published_encode(reference, images)[1]) <= TOLERANCE


@pytest.mark.parametrize("size", [(8, 8), (5, 9)], ids=str)
@pytest.mark.parametrize("form", VAES)
def test_vae_decode(form: str, size: tuple[int, int]) -> None:
    config = VAES[form]
    ours, reference = vae_pair(config)
    latents = torch.randn(2, config.latent_channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = ours.decode(latents)
    assert found.shape == (2, config.image_channels, size[0] * config.factor, size[1] * config.factor)
    assert difference(found, run_published_decode(reference, latents)) <= TOLERANCE


CONTEXTS = {
    "last, normed (sd15, sd21)": (-1, True),
    "last, raw": (-1, False),
    "penultimate, raw (sdxl)": (-2, False),
    "penultimate, normed (sd15 with clip skip)": (-2, True),
}


def text_config(activation: Activation, hidden: int, norm: bool, projection: int | None) -> TextEncoderConfig:
    """A narrow text encoder of the published length."""
    return TextEncoderConfig(48, 3, 4, 96, activation, projection, hidden, norm, vocabulary=100)


def prompts(padding: int) -> Tensor:
    """Token ids (2, 77) of two lengths: 98 begins, 99 ends, as the two highest ids do in the published vocabulary."""
    tokens = torch.full((2, 77), padding)
    for row, length in zip(tokens, (5, 40), strict=True):
        row[:length] = torch.randint(1, 98, (length,), generator=torch.Generator().manual_seed(length))
        row[0], row[length] = 98, 99
    return tokens


@pytest.mark.parametrize("padding", [99, 0], ids=["padded with the end", "padded with 0"])
@pytest.mark.parametrize("projection", [None, 40], ids=["unprojected", "projected"])
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
def test_text_encoder(activation: Activation, context: tuple[int, bool], projection: int | None, padding: int) -> None:
    config = text_config(activation, *context, projection)
    ours, reference = text_pair(config)
    tokens = prompts(padding)
    with torch.inference_mode():
        found = ours(tokens)
    expected = run_published_text_encoder(reference, config, tokens)
    assert difference(found.hidden, expected.hidden) <= TOLERANCE
    assert difference(found.pooled, expected.pooled) <= TOLERANCE
    assert found.pooled.shape == (2, projection or 48)


def test_text_encoder_settings_differ() -> None:
    """The choices above would not be told apart if they gave the same result."""
    tokens = prompts(99)
    with torch.inference_mode():
        outputs = [text_pair(text_config("gelu", *context, None))[0](tokens).hidden for context in CONTEXTS.values()]
        outputs += [text_pair(text_config(a, -1, True, None))[0](tokens).hidden for a in ("quick_gelu", "gelu_tanh")]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert difference(one, other) > TOLERANCE


def test_text_encoder_is_causal_and_takes_short_prompts() -> None:
    ours, _ = text_pair(text_config("gelu", -1, True, None))
    tokens = prompts(99)
    with torch.inference_mode():
        long, short = ours(tokens).hidden, ours(tokens[:, :9]).hidden
    assert difference(short, long[:, :9]) <= TOLERANCE
