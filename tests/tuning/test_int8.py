"""Weights in 8 bits, and products of 8 bits, against exact arithmetic on the rounded numbers, and in a model."""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nativesd
from models.test_models import UNETS
from nativesd.checkpoints.convert import convert
from nativesd.config import UNetConfig
from nativesd.errors import NativesdWarning, UsageError, WeightsError
from nativesd.loading import control as loading_control
from nativesd.loading import modules as loading_modules
from nativesd.loading.control import load_control
from nativesd.machine import smoke
from nativesd.machine.needs import FAMILIES
from nativesd.machine.smoke import picture_difference
from nativesd.models.build import build
from nativesd.models.layers import TransformerBlock
from nativesd.models.unet import UNet
from nativesd.shipped import TINY
from nativesd.tuning import fast, fast_int8, int8
from nativesd.tuning.fast_int8 import FastInt8Conv2d, FastInt8Linear, to_rows
from nativesd.tuning.int8 import Int8, Int8Conv2d, is_int8, to_int8, use_int8
from nativesd.tuning.tune import EVERYTHING, Tuning, products_of_8_bits, tune, untune
from oracles import draw, on_one_thread

BFLOAT16 = 2.0**-8
PROMPT = "a strawberry on a yellow background"
LORA = TINY / "lcm_lora" / "tiny-lcm.safetensors"
DTYPES = [torch.float32, torch.bfloat16]
products = pytest.mark.skipif(
    not all(map(products_of_8_bits, DTYPES)), reason="this processor has no products of 8 bits (VNNI)"
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And everything goes through several parts, however small."""
    monkeypatch.setattr(fast, "FEWEST", 64)
    monkeypatch.setattr(fast_int8, "TOKENS", 64)
    with on_one_thread():
        yield


def normal(*shape: int, seed: int = 10) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def layer(plain: nn.Module, *, after_silu: bool = False) -> nn.Module:
    """One layer in 8 bits, plain."""
    holder = nn.Sequential(plain.requires_grad_(False))
    use_int8(holder)
    if isinstance(holder[0], Int8Conv2d):
        holder[0].after_silu = after_silu
    return holder[0]


def quick(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    assert tune(other, Tuning(int8=True)).int8
    return other


def test_channels_fill_the_range_by_themselves() -> None:
    weight = normal(5, 64) * torch.tensor([1e-6, 1.0, 300.0, 1e6, 0.0])[:, None]
    rounded, steps = to_int8(weight)
    assert rounded.dtype == torch.int8
    assert rounded.int().abs().amax(1).tolist() == [127, 127, 127, 127, 0]
    assert ((rounded * steps[:, None] - weight).abs() <= 0.501 * steps[:, None]).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_plain_layers_compute_with_the_rounded_numbers(dtype: torch.dtype) -> None:
    linear, conv = nn.Linear(320, 64).to(dtype), nn.Conv2d(32, 64, 3, stride=2, padding=1).to(dtype)
    with torch.no_grad():
        for plain, x in ((linear, normal(2, 77, 320)), (conv, normal(2, 32, 9, 7))):
            eight = layer(copy.deepcopy(plain))
            assert isinstance(eight, Int8)
            wanted = copy.deepcopy(plain)
            wanted.weight.copy_(eight.numbers())
            assert torch.equal(eight(x.to(dtype)), wanted(x.to(dtype)))
            assert rms(eight.numbers() - plain.weight) < 0.009 * rms(plain.weight)


def exact_rows(x: Tensor) -> Tensor:
    rows = to_rows(x)
    return ((rows.numbers.double() - 128) * rows.steps.double()).reshape(x.shape)


@products
@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_multiplies_the_rounded_numbers(dtype: torch.dtype, bias: bool) -> None:
    plain = nn.Linear(320, 96, bias=bias).to(dtype)
    x = normal(2, 77, 320).to(dtype)
    eight = layer(copy.deepcopy(plain))
    found = quick(eight)(x)
    assert found.dtype == dtype
    product = exact_rows(x) @ eight.numbers().double().T
    wanted = product if plain.bias is None else product + plain.bias
    rounding = BFLOAT16 if dtype == torch.bfloat16 else 2e-7
    # the product, the step and the sum are rounded
    assert ((found - wanted).abs() <= rounding * (2 * product.abs() + wanted.abs()) + 1e-5).all()
    assert rms(found - plain(x)) < 0.016 * rms(plain(x))


@products
@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "after_silu"), [(3, 1, 1, True), (3, 2, 1, False), (1, 1, 0, False)]
)
def test_a_convolution_multiplies_rounded_numbers(
    dtype: torch.dtype, kernel: int, stride: int, padding: int, after_silu: bool
) -> None:
    plain = nn.Conv2d(128, 144, kernel, stride=stride, padding=padding).to(dtype)
    x = normal(2, 128, 9, 7).to(dtype) * torch.tensor([1.0, 30.0], dtype=dtype)[:, None, None, None]
    x = F.silu(x) if after_silu else x
    eight = layer(copy.deepcopy(plain), after_silu=after_silu)
    if dtype == torch.bfloat16:
        x = x.contiguous(memory_format=torch.channels_last)
    rough = quick(eight)
    found, wanted = rough(x), plain(x.float() if dtype == torch.float32 else x)
    assert found.shape == wanted.shape
    # with the zero among the numbers of a SiLU, steps are half as large
    for one, other in zip(found, wanted, strict=True):
        assert rms(one - other) < (0.016 if after_silu else 0.026) * rms(other)
    alone = torch.cat([rough(picture[None]) for picture in x])
    assert torch.equal(alone, found)  # a picture does not depend on the others


@products
@torch.inference_mode()
def test_rows_do_not_depend_on_one_another_and_nothing_is_lost() -> None:
    eight = quick(layer(nn.Linear(256, 64)))
    x = normal(5, 256) * torch.tensor([1.0, 1000.0, 0.001, 0.0, 1.0])[:, None]
    x[4, 7] = torch.nan
    found = eight(x)
    assert torch.equal(found[:4], torch.cat([eight(row[None]) for row in x[:4]]))
    assert found[4].isnan().all()
    assert torch.equal(found[3], eight.bias)


def unet(form: str = "sdxl") -> UNet:
    with torch.device("meta"):
        out = UNet(UNETS[form])
    draw(out, 0)
    return out


@torch.inference_mode()
def predict(network: UNet, dtype: torch.dtype = torch.float32) -> Tensor:
    config: UNetConfig = network.config
    more = {}
    if config.added is not None:
        more = {"pooled": normal(2, config.added.pooled, seed=3).to(dtype), "time_ids": torch.full((2, 6), 64.0)}
    latents, context = normal(2, 4, 16, 16, seed=1).to(dtype), normal(2, 77, config.context, seed=2).to(dtype)
    out: Tensor = network(latents, 500.0, context, **more)
    return out.float()


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@products
@pytest.mark.parametrize("form", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_unet(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "FEWEST", 1 << 10)
    network = unet(form).to(dtype)
    names, whole = {name for name, _ in network.named_parameters()}, bytes_of(network)
    exact, state = predict(network, dtype), network.state_dict()
    use_int8(network)
    assert is_int8(network)
    assert {name for name, _ in network.named_parameters()} == names
    kept = {name for name, parameter in network.named_parameters() if parameter.dtype != torch.int8}
    assert all(state[name].numel() < 1 << 10 or name.startswith(("conv_in", "conv_out")) for name in kept)
    assert bytes_of(network) < (0.56 if dtype == torch.bfloat16 else 0.31) * whole
    plain, before = predict(network, dtype), copy.deepcopy(network.state_dict())
    assert 0 < rms(plain - exact) < 0.05 * rms(exact)
    tune(network, EVERYTHING)
    rough = predict(network, dtype)
    assert not torch.equal(rough, plain)
    assert rms(rough - exact) < 0.1 * rms(exact)
    # packed while they are used, and themselves when asked for
    after = copy.deepcopy(network).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(predict(network, dtype), rough)
    untune(network)
    assert torch.equal(predict(network, dtype), plain)


@torch.inference_mode()
def test_blocks_compile() -> None:
    network = unet()
    use_int8(network)
    plain = predict(network)
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            block.compile(dynamic=True, fullgraph=True, backend="eager")
    assert torch.equal(predict(network), plain)


def numbers(network: nn.Module) -> dict[str, Tensor]:
    return {name: part.numbers() for name, part in network.named_modules() if isinstance(part, Int8)}


@products
def test_pictures_and_loras(tmp_path: Path) -> None:
    """What is loaded so is what `use_int8` makes; LoRAs go in before rounding, and out again to the bit."""
    plain, eight = (nativesd.load("tiny", device="cpu", quantize=kind) for kind in (None, "int8"))
    reference = nativesd.load("tiny", device="cpu", fast=False)
    use_int8(reference.unet)
    assert bytes_of(eight.unet) < 0.27 * bytes_of(plain.unet)
    before = numbers(eight.unet)
    assert before.keys() == numbers(reference.unet).keys()
    assert all(torch.equal(before[name], own) for name, own in numbers(reference.unet).items())
    for seed in range(2):
        first, second = (pipe(PROMPT, seed=seed).images[0] for pipe in (plain, eight))
        assert 0 < picture_difference(second, first) < 4e-3  # another seed moves it by 3e-2
    options = {"steps": 4, "guidance_scale": 1.0, "seed": 0, "sampler": "LCM"}
    first, second = (pipe(PROMPT, loras=[LORA], **options).images[0] for pipe in (plain, eight))
    assert picture_difference(second, first) < 4e-3
    merged, wanted = numbers(eight.unet), dict(plain.unet.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed
    for name in changed:
        rounded, steps = to_int8(wanted[f"{name}.weight"])
        assert torch.equal(merged[name].flatten(1), rounded.flatten(1) * steps[:, None])
    eight.set_loras([])
    assert all(torch.equal(own, before[name]) for name, own in numbers(eight.unet).items())


@pytest.mark.filterwarnings("ignore:the UNet's weights are in 8 bits")
def test_state_dicts_go_in_and_out_while_a_lora_is_in() -> None:
    pipe = nativesd.load("tiny", device="cpu", quantize="int8")
    options = {"steps": 1, "guidance_scale": 1.0, "seed": 0, "sampler": "LCM", "width": 64, "height": 64}
    own = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe(PROMPT, loras=[LORA], **options)
    merged = pipe.unet.state_dict()
    assert not any(tensor.is_inference() for tensor in merged.values())
    pipe.unet.load_state_dict(merged)
    pipe.unet.load_state_dict(own)
    assert all(torch.equal(tensor, own[name]) for name, tensor in pipe.unet.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_float_state_dicts_change_nothing(strict: bool) -> None:
    network = unet()
    state = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    use_int8(network)
    tune(network, EVERYTHING)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    lone = {name: tensor for name, tensor in before.items() if not name.endswith(".steps")}
    for other in (state, lone):
        with pytest.raises(WeightsError, match=r"^\S+\.weight is kept in 8 bits with its steps \(\S+\.steps\), and "):
            network.load_state_dict(other, strict=strict)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    network.load_state_dict({"conv_in.bias": state["conv_in.bias"]}, strict=False)
    assert torch.equal(network.conv_in.bias, state["conv_in.bias"])
    block = next(part for part in network.children() if is_int8(part))
    with pytest.raises(WeightsError, match="is kept in 8 bits"):
        block.load_state_dict({name: torch.zeros(tensor.shape) for name, tensor in block.state_dict().items()})


@pytest.mark.filterwarnings("ignore:.*of no published form", "ignore:the UNet's weights are in 8 bits")
def test_weights_of_a_gguf_file_are_rounded_again(tmp_path: Path) -> None:
    """Its blocks of 32 have steps of their own, which no product of 8 bits takes: that adds to the error."""
    convert("tiny", tmp_path / "tiny.gguf", layout="ldm", dtype="q8_0")
    reference = nativesd.load("tiny", device="cpu", fast=False)
    stored = nativesd.load(tmp_path / "tiny.gguf", device="cpu", fast=False)
    direct, again = (
        numbers(nativesd.load(source, device="cpu", fast=False, quantize="int8").unet)
        for source in ("tiny", tmp_path / "tiny.gguf")
    )
    errors = [0.0] * 3
    weights, blocks = (dict(pipe.unet.named_parameters()) for pipe in (reference, stored))
    for name in direct:
        key = f"{name}.weight"
        if torch.equal(weights[key], blocks[key]):  # a convolution, which such a file has in float16
            continue
        for i, found in enumerate((blocks[key], direct[name], again[name])):
            errors[i] += float((found - weights[key]).square().sum())
    assert errors[0] < errors[1] < errors[2] < 1.1 * (errors[0] + errors[1])


@pytest.mark.filterwarnings("ignore:the UNet's weights are in 8 bits")
def test_control_nets() -> None:
    """Theirs are in 8 bits too; a file that holds the difference from the UNet is added to what its weights are."""
    pipe = nativesd.load("tiny", device="cpu", fast=False, quantize="int8")
    assert pipe.load_control is not None
    own = pipe.load_control("tiny")
    plain = load_control("tiny", device="cpu", fast=False)
    assert is_int8(own.module)
    assert bytes_of(own.module) < 0.35 * bytes_of(plain.module)
    state = {name: tensor.clone() for name, tensor in plain.module.state_dict().items()}
    shared = pipe.unet.state_dict() | {f"{name}.weight": weight for name, weight in numbers(pipe.unet).items()}
    difference = {name: tensor - shared[name] if name in shared else tensor for name, tensor in state.items()}
    plain.module.load_state_dict(difference)
    loading_control._add(plain.module, pipe.unet, Path("control.safetensors"))
    for name, tensor in plain.module.state_dict().items():
        assert (tensor - state[name]).abs().max() < 1e-6, name


NO_TIME = "the UNet's weights are in 8 bits, which saves memory and no time: {}, so that every weight is made a number"


def test_what_is_said_where_no_time_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"device": "cpu", "quantize": "int8"}
    with pytest.warns(NativesdWarning, match=NO_TIME.format("fast=False was asked for")):
        nativesd.load("tiny", fast=False, **options)
    monkeypatch.setattr(loading_modules, "tune", lambda module: Tuning())
    if products_of_8_bits(torch.float32):
        reason = "a short probe of this processor found products of 8 bits no faster than those in float32"
        with pytest.warns(NativesdWarning, match=NO_TIME.format(reason)):
            nativesd.load("tiny", **options)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    reason = "torch has no fast products of 8 bits beside float32 on this processor"
    with pytest.warns(NativesdWarning, match=NO_TIME.format(reason)):
        pipe = nativesd.load("tiny", **options)
    assert not any(isinstance(part, FastInt8Linear | FastInt8Conv2d) for part in pipe.unet.modules())
    with pytest.raises(UsageError, match="a UNet in 8 bits has no form for onnx: load the model without quantize"):
        pipe.accelerate("onnx")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"quantize": "int4"}, "quantize must be int8 or left out, not 'int4'"),
        (
            {"quantize": "int8", "fp8": True},
            "fp8 and quantize='int8' are two ways to keep the same weights: choose one",
        ),
        (
            {"quantize": "int8", "compile": True},
            "on a CPU quantize saves time by products of 8 bits: leave one of them",
        ),
    ],
)
def test_what_does_not_go_together(options: Mapping[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        nativesd.load("tiny", device="cpu", **options)  # type: ignore[arg-type]


@products
@pytest.mark.full
@torch.inference_mode()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_published_widths(family: str) -> None:
    """What docs/performance.md says, by the rest in float32."""
    torch.set_num_threads(os.cpu_count() or 1)
    (subject,) = (each for each in smoke.subjects({family: FAMILIES[family]}, "small") if each.name == "UNet")
    network = build(subject.config)
    smoke.draw(network, zlib.crc32(repr(subject.config).encode()), smoke.RESIDUAL_GAIN)
    cases = list(smoke.cases(subject.config, subject.sizes))
    expected = [case.call(network, **case.inputs) for case in cases]
    whole = bytes_of(network)
    use_int8(network)
    print(f"\n{family}: {2 * bytes_of(network) / whole:.3f} of the bytes in bfloat16")
    for how in (Tuning(), EVERYTHING):
        tune(network, how)
        for case, outputs in zip(cases, expected, strict=True):
            found = case.call(network, **case.inputs)
            error = max(smoke.difference(ours, theirs) for ours, theirs in zip(found, outputs, strict=True))
            print(f"{family} {case.name}, {'products' if how.int8 else 'weights'} of 8 bits: {error:.1e}")
            assert error <= smoke.FP8.limit
