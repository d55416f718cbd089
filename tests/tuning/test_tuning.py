"""The fast path against the plain one, in every dtype, and its way in and out of a module."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import nativesd
from models.test_models import UNETS
from nativesd.config import UNetConfig, VAEConfig
from nativesd.diffusion.conditioning import Conditioning
from nativesd.diffusion.denoiser import Guided
from nativesd.diffusion.guiding.combine import Guidance
from nativesd.errors import UsageError
from nativesd.loading.placement import compiles
from nativesd.models.layers import GEGLU, Attention, CachedContext, ImageKeys, TransformerBlock, Upsample, attention
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.tuning import fast
from nativesd.tuning import tune as tuning
from nativesd.tuning.tune import (
    EVERYTHING,
    PLAIN,
    Tuning,
    _pays,
    best_tuning,
    compile_blocks,
    supported,
    tune,
    untune,
    untuned,
)
from oracles import TOLERANCE, difference, draw, on_one_thread

CPU = torch.device("cpu")
WORSE = 1.2  # times the plain path's error that the fast one's may be in half precision
SIZES = [(2, 16, 16), (1, 11, 13), (3, 8, 12)]
bfloat16 = pytest.mark.skipif(not supported(torch.bfloat16), reason="this processor has no bfloat16")
pytestmark = pytest.mark.skipif(not supported(torch.float32), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything goes through several blocks or parts, however small; one thread."""
    monkeypatch.setattr(fast, "FEWEST", 1)
    monkeypatch.setattr(fast, "BLOCK_BYTES", dict.fromkeys(fast.DTYPES, 32 << 10))
    monkeypatch.setattr(fast, "LARGE", 32 << 10)
    monkeypatch.setattr(fast, "TOKENS", 64)
    monkeypatch.setattr(fast, "CELLS", 64)
    with on_one_thread():
        yield


def normal(*shape: int, seed: int = 10) -> Tensor:
    """Standard normal values, not those that weights are drawn from (seed 0)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def drawn(module: nn.Module) -> nn.Module:
    draw(module, 0)
    return module


def unet(form: str) -> UNet:
    with torch.device("meta"):
        network = UNet(UNETS[form])
    draw(network, 0)
    return network


def vae() -> VAE:
    with torch.device("meta"):
        network = VAE(VAEConfig(widths=(32, 64), layers=1, scaling=1.0))
    draw(network, 0)
    return network


@torch.inference_mode()
def predict(network: UNet, size: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    config: UNetConfig = network.config
    batch, height, width = size
    added = config.added
    out: Tensor = network(
        normal(batch, config.in_channels, height, width).to(dtype),
        481.5,
        normal(batch, 77, config.context, seed=1).to(dtype),
        pooled=None if added is None else normal(batch, added.pooled, seed=2).to(dtype),
        time_ids=None if added is None else torch.full((batch, added.ids), 512.0),
    )
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["sd15", "sd21", "sdxl"])
def test_unet_in_float32(form: str, size: tuple[int, int, int]) -> None:
    network = unet(form)
    plain = predict(network, size, torch.float32)
    tune(network, EVERYTHING)
    assert difference(predict(network, size, torch.float32), plain) <= TOLERANCE


@bfloat16
@pytest.mark.parametrize("form", ["sd15", "sd21", "sdxl"])
def test_unet_in_bfloat16(form: str) -> None:
    network = unet(form)
    network.bfloat16()
    size = (2, 32, 32)
    exact = predict(copy.deepcopy(network).double(), size, torch.float64)
    plain = rms(predict(network, size, torch.bfloat16), exact)
    tune(network, EVERYTHING)
    quick = rms(predict(network, size, torch.bfloat16), exact)
    assert 0 < quick <= WORSE * plain


@torch.inference_mode()
def test_vae_in_float32() -> None:
    network, latents = vae(), normal(2, 4, 12, 20)
    plain, (mean, _) = network.decode(latents), network.encode(normal(1, 3, 24, 40))
    tune(network, EVERYTHING)
    assert difference(network.decode(latents), plain) <= TOLERANCE
    assert difference(network.encode(normal(1, 3, 24, 40))[0], mean) <= TOLERANCE


@bfloat16
@torch.inference_mode()
def test_vae_in_bfloat16() -> None:
    network, latents = vae().bfloat16(), normal(2, 4, 24, 24).bfloat16()
    exact = copy.deepcopy(network).double().decode(latents.double())
    plain = rms(network.decode(latents), exact)
    tune(network, EVERYTHING)
    assert 0 < rms(network.decode(latents), exact) <= WORSE * plain


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bfloat16)])
def test_a_trained_vae(dtype: torch.dtype) -> None:
    """Feature maps of trained weights are far from zero, unlike those of random ones."""
    network = nativesd.load(device="cpu", dtype=dtype).vae
    untune(network)
    latents = network.encode(normal(1, 3, 128, 192).clamp(-1, 1).to(dtype))[0]
    exact = copy.deepcopy(network).double().decode(latents.double())
    plain = rms(network.decode(latents), exact)
    tune(network, EVERYTHING)
    assert rms(network.decode(latents), exact) <= (TOLERANCE if dtype == torch.float32 else WORSE * plain)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bfloat16)])
@pytest.mark.parametrize(("heads", "width"), [(5, 64), (8, 40), (4, 80), (1, 512)])
@pytest.mark.parametrize("gain", [0.1, 1.0, 3.0])  # of the logits
def test_attention(heads: int, width: int, gain: float, dtype: torch.dtype) -> None:
    layer = drawn(Attention(heads * width, heads)).to(dtype)
    layer.to_q.weight *= gain
    x = normal(2, 300, heads * width).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    plain = rms(layer(x), exact)
    tune(layer, Tuning(attention=True))
    quick = rms(layer(x), exact)
    assert quick <= (TOLERANCE if dtype == torch.float32 else WORSE * plain)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bfloat16)])
def test_attention_to_a_text(dtype: torch.dtype) -> None:
    layer = drawn(Attention(64, 2, context=24)).to(dtype)
    x, text = normal(3, 90, 64).to(dtype), normal(3, 77, 24).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double(), text.double())
    plain = rms(layer(x, text), exact)
    tune(layer, EVERYTHING)
    assert rms(layer(x, text), exact) <= (TOLERANCE if dtype == torch.float32 else WORSE * plain)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The fast path, and what it should be."""
    found = fast.blockwise_attention(q / 8, k, v, 1)
    return found.double(), attention(q.double(), k.double(), v.double(), 1)


@bfloat16
@torch.inference_mode()
@pytest.mark.parametrize("gain", [0.1, 1.0, 3.0, 6.0])  # of the logits
@pytest.mark.parametrize("tokens", [160, 1000])
@pytest.mark.parametrize("width", [16, 64, 256])
def test_attention_alone_in_bfloat16(width: int, tokens: int, gain: float) -> None:
    q, k, v = (normal(1, tokens, 2 * width, seed=seed).bfloat16() for seed in (1, 2, 3))
    q *= gain
    exact = attention(q.double(), k.double(), v.double(), 2)
    plain = rms(attention(q, k, v, 2), exact)
    assert rms(fast.blockwise_attention(q * width**-0.5, k, v, 2), exact) <= WORSE * plain


@torch.inference_mode()
@pytest.mark.parametrize("keys", [2000, 77, 1])
def test_attention_of_queries_far_shorter_than_the_longest(keys: int) -> None:
    q, k, v = normal(1, 200, 64, seed=1), normal(1, keys, 64, seed=2), normal(1, keys, 64, seed=3)
    q[:, ::2] *= 1e-3
    k += 20 * normal(64, seed=4)  # a common part, which a softmax does not see
    found, expected = attend(q, k, v)
    for row in (0, 1):
        assert difference(found[:, row::2], expected[:, row::2]) <= TOLERANCE


@torch.inference_mode()
def test_attention_to_a_key_whose_logit_was_not_guessed() -> None:
    q, k, v = (normal(1, 2000, 64, seed=seed) for seed in (1, 2, 3))
    q = 30 * torch.nn.functional.normalize(q, dim=-1)
    k[:, 7] = q[:, 3]  # logits of 112 for query 3, where those of the others are below 20
    k[:, 9] = q[:, 5] / 2.5  # and of 45 for query 5: within what a guess may be wrong by
    found, expected = attend(q, k, v)
    assert difference(found[:, 3], v[:, 7].double()) <= TOLERANCE
    assert difference(found, expected) <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_where_it_is(broken: float) -> None:
    q, k, v = (normal(1, 300, 64, seed=seed) for seed in (1, 2, 3))
    q[0, 7, 0] = broken
    found, expected = attend(q, k, v)
    assert found[0, 7].isnan().all()
    others = torch.arange(300) != 7
    assert difference(found[:, others], expected[:, others]) <= TOLERANCE


@torch.inference_mode()
@bfloat16
def test_geglu_in_bfloat16() -> None:
    layer = drawn(GEGLU(64)).bfloat16()
    x = normal(2, 50, 64).bfloat16()
    exact = copy.deepcopy(layer).double()(x.double())
    plain = rms(layer(x), exact)
    tune(layer, EVERYTHING)
    assert 0 < rms(layer(x), exact) <= WORSE * plain


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bfloat16)])
@pytest.mark.parametrize("size", [(2, 8, 8), (1, 13, 5), (3, 1, 1), (1, 2, 90)])
def test_upsampling(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Twice the size, or a row or column less; all rows at once and some at a time."""
    batch, height, width = size
    layer, x = drawn(Upsample(48)).to(dtype), normal(batch, 48, height, width).to(dtype) + 1
    for target in (None, (2 * height, 2 * width), (2 * height - 1, 2 * width), (2 * height, 2 * width - 1)):
        exact = copy.deepcopy(layer).double()(x.double(), target)
        plain = rms(layer(x, target), exact)
        tune(layer, EVERYTHING)
        found = layer(x, target)
        assert rms(found, exact) <= (TOLERANCE if dtype == torch.float32 else WORSE * plain)
        untune(layer)


def test_float16_takes_the_plain_path() -> None:
    network = unet("sd21").half()
    plain = predict(network, (1, 8, 8), torch.float16)
    tune(network, EVERYTHING)
    assert torch.equal(predict(network, (1, 8, 8), torch.float16), plain)
    assert tune(network) == Tuning()


def test_gradients_take_the_plain_path() -> None:
    layer, x = drawn(Attention(64, 2)), normal(1, 40, 64)
    layer(x).sum().backward()
    expected = layer.to_k.weight.grad
    layer.zero_grad()
    tune(layer, EVERYTHING)
    layer(x).sum().backward()
    assert layer.to_k.weight.grad is not None
    torch.testing.assert_close(layer.to_k.weight.grad, expected)


def test_in_and_out() -> None:
    network = unet("sd21")
    classes = [type(part) for part in network.modules()]
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    tune(network, EVERYTHING)
    assert [type(part) for part in network.modules()] != classes
    assert list(network.state_dict()) == list(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
    untune(network)
    assert [type(part) for part in network.modules()] == classes
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())


@bfloat16
def test_in_and_out_when_weights_are_packed() -> None:
    network = unet("sd21").bfloat16()
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    tune(network, EVERYTHING)
    predict(network, (1, 8, 8), torch.bfloat16)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
    predict(network, (1, 8, 8), torch.bfloat16)
    with untuned(network):
        predict(network, (1, 8, 8), torch.bfloat16)
    predict(network, (1, 8, 8), torch.bfloat16)
    untune(network)
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bfloat16)])
def test_weights_may_be_written_to(dtype: torch.dtype) -> None:
    network, other = unet("sd21").to(dtype), unet("sd21").to(dtype)
    tune(network, EVERYTHING)
    tune(other, EVERYTHING)
    before = predict(network, (1, 8, 8), dtype)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.mul_(1.25)
            network.get_parameter(name).copy_(parameter)
    after = predict(network, (1, 8, 8), dtype)
    assert torch.equal(after, predict(other, (1, 8, 8), dtype))
    assert difference(after, before) > 0.1


LOOKS: dict[str, Callable[[nn.Module], Tensor]] = {
    "attribute": lambda layer: layer.weight,
    "get_parameter": lambda layer: layer.get_parameter("weight"),
    "parameters": lambda layer: next(layer.parameters()),
    "named_parameters": lambda layer: dict(layer.named_parameters())["weight"],
    "state_dict": lambda layer: layer.state_dict()["weight"],
    "to": lambda layer: layer.to("cpu").weight,
    "deepcopy": lambda layer: copy.deepcopy(layer).weight,
    "untune": lambda layer: [untune(layer), layer.weight][1],
}


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # and the shape of an input
    "convolution": (lambda: nn.Conv2d(24, 40, 3, padding=1), (2, 24, 8, 8)),
    "linear": (lambda: nn.Linear(24, 40), (2, 7, 24)),
    "upsampling": (lambda: Upsample(24), (2, 24, 8, 8)),
}
KINDS = [
    pytest.param(kind, dtype, id=f"{kind} {dtype}", marks=marks)
    for kind in LAYERS
    for dtype, marks in ((torch.float32, ()), (torch.bfloat16, bfloat16))
]


def held(layer: nn.Module) -> Tensor:
    """The weight as someone has it who asked for it before."""
    weight: Tensor = layer.__dict__["_parameters"]["weight"]
    return weight


def packed_layer(kind: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """A tuned layer that has been called, its weights, and the input."""
    make, shape = LAYERS[kind]
    layer, x = make().to(dtype), normal(*shape).to(dtype)
    values = layer.weight.detach().clone()
    tune(layer, EVERYTHING)
    with torch.inference_mode():
        layer(x)
    assert held(layer).untyped_storage().nbytes() == dtype.itemsize  # there are no two copies
    return layer, values, x


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_at_packed_weights_finds_them(look: str, kind: str, dtype: torch.dtype) -> None:
    layer, values, _ = packed_layer(kind, dtype)
    assert torch.equal(LOOKS[look](layer), values)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_packed_weight_held_from_before_is_not_mistaken_for_its_values(kind: str, dtype: torch.dtype) -> None:
    layer, values, _ = packed_layer(kind, dtype)
    weight = held(layer)
    assert weight.shape == values.shape
    assert weight.isnan().all()
    with torch.no_grad(), pytest.raises(RuntimeError, match="single memory location"):
        weight.mul_(2)
    assert layer.weight is weight
    assert torch.equal(weight, values)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bfloat16)])
def test_weights_packed_in_two_parts(dtype: torch.dtype) -> None:
    """As GEGLU packs its first layer."""
    gated, x = GEGLU(64).to(dtype), normal(2, 7, 64).to(dtype)
    values = gated.proj.weight.detach().clone()
    tune(gated, EVERYTHING)
    with torch.inference_mode():
        before, whole = gated(x), gated.proj(x)
        assert torch.equal(gated(x), before)
        assert held(gated.proj).isnan().all()
        assert torch.equal(gated.proj.weight, values)
        assert torch.equal(gated.proj(x), whole)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_packed_weights_that_were_made_in_inference_mode(kind: str, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        layer, values, x = packed_layer(kind, dtype)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer.weight, values)
        assert torch.equal(layer.weight[3:].sum(dim=0), values[3:].sum(dim=0))
        assert torch.equal(layer(x), before)
    with torch.inference_mode():
        untune(layer)
        assert (layer(x) - before).abs().max() <= 0.02 * before.abs().max()


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_loaded_where_weights_are_packed(assign: bool, kind: str, dtype: torch.dtype) -> None:
    layer, values, x = packed_layer(kind, dtype)
    bias = layer.bias.detach().clone()
    with torch.inference_mode():
        before = layer(x)
        layer.load_state_dict({"weight": 2 * values, "bias": 2 * bias}, assign=assign)
        assert torch.equal(layer(x), 2 * before)


@bfloat16
def test_weights_are_packed_once_and_used_at_every_size() -> None:
    layer, values, _ = packed_layer("convolution", torch.bfloat16)
    packed = layer.packed
    plain = nn.Conv2d(24, 40, 3, padding=1).bfloat16()
    plain.load_state_dict({"weight": values, "bias": layer.bias})
    with torch.inference_mode():
        for batch, height, width in ((1, 1, 1), (2, 8, 8), (5, 33, 17)):
            x = normal(batch, 24, height, width).bfloat16()
            exact = copy.deepcopy(plain).double()(x.double())
            assert 0 < rms(layer(x), exact) <= WORSE * rms(plain(x), exact)
    assert layer.packed is packed


@bfloat16
def test_how_weights_are_packed_does_not_hang_on_the_first_input() -> None:
    """The order that suits 4x4 cells takes 50 times as long at 8x8."""
    orders = []
    for side in (4, 64):
        layer = nn.Conv2d(2560, 1280, 1).bfloat16()
        tune(layer, EVERYTHING)
        with torch.inference_mode():
            layer(normal(1, 2560, side, side).bfloat16())
        orders.append(torch.ops.mkldnn._get_mkldnn_serialized_md(layer.packed[0]))
    assert torch.equal(*orders)


def test_what_cannot_be_packed_is_no_layer() -> None:
    class Unordered(fast.Packed, nn.Linear):
        pass

    with pytest.raises(TypeError, match="abstract method"):
        Unordered(2, 2)  # type: ignore[abstract]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_threads_share_what_is_packed(kind: str, dtype: torch.dtype) -> None:
    layer, _, x = packed_layer(kind, dtype)
    assert isinstance(layer, fast.Packed)
    with torch.inference_mode():
        expected = layer(x)

    def use(number: int) -> bool:
        if number % 3 == 0:
            layer.unpack()
        with torch.inference_mode():
            return torch.equal(layer(x), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(600)))


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs torch.compile has made since."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@torch.inference_mode()
@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_blocks_are_compiled_once_for_every_width(
    form: str, graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = unet(form)
    config = network.config
    sizes = [(2, 8, 12), (2, 17, 9), (3, 8, 8)]
    expected = [predict(network, size, torch.float32) for size in sizes]
    tune(network, EVERYTHING)
    compile_blocks(network, backend="eager")
    attended: list[int] = []
    blockwise = fast.blockwise_attention
    monkeypatch.setattr(fast, "blockwise_attention", lambda *given: attended.append(1) or blockwise(*given))  # type: ignore[func-returns-value]
    for size, plain in zip(sizes, expected, strict=True):
        assert difference(predict(network, size, torch.float32), plain) <= TOLERANCE
    blocks = [part for part in network.modules() if isinstance(part, TransformerBlock)]
    assert len(attended) == 2 * len(blocks) * len(sizes)  # to itself and to the text
    widths = {block.norm1.normalized_shape for block in blocks}
    assert (len(widths), graphs()) == (1 if form == "sdxl" else 2, 1)
    text = normal(2, 2 * 77, config.context)
    more = {} if config.added is None else {"pooled": normal(2, config.added.pooled), "time_ids": torch.ones(2, 6)}
    found = [network(normal(2, 4, 8, 8), 3.0, context, **more) for context in (text, CachedContext(text))]
    assert torch.equal(*found)
    assert graphs() == 1
    predict(network, (1, 8, 8), torch.float32)
    assert graphs() == 2  # of a batch of 1


@torch.inference_mode()
def test_compiled_blocks_are_shown_image_prompts(graphs: Callable[[], int]) -> None:
    network = unet("sd15")
    block = next(part for part in network.modules() if isinstance(part, TransformerBlock))
    [width] = block.norm1.normalized_shape
    given = [normal(2, size, width, seed=size) for size in (12, 7, 7)]
    images = ImageKeys(normal(2, 1, 4, width, seed=3), normal(2, 1, 4, width, seed=4))
    expected = block(*given, images)
    assert not torch.equal(expected, block(*given))
    compile_blocks(network, backend="eager")
    assert difference(block(*given, images), expected) <= TOLERANCE
    assert graphs() == 0


@torch.inference_mode()
def test_compiled_blocks_are_left_out_of_what_is_untuned(graphs: Callable[[], int]) -> None:
    network = unet("sd15")
    compile_blocks(network, backend="eager")
    with untuned(network):
        predict(network, (2, 8, 8), torch.float32)
    assert graphs() == 0
    predict(network, (2, 8, 8), torch.float32)
    assert graphs() > 0


@pytest.mark.full
@torch.inference_mode()
def test_compiled_pictures(graphs: Callable[[], int]) -> None:
    """By a real compiler, which takes half a minute."""
    plain, compiled = (nativesd.load(device="cpu", compile=compile, fast=compile) for compile in (False, True))
    first, second = (pipe("a red apple on a blue background", seed=3, steps=6) for pipe in (plain, compiled))
    assert graphs() > 0
    assert difference(second.latents, first.latents) <= 1e-4


def test_compiling_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nativesd.loading.placement.find_spec", lambda _: None)
    for asked, device, does in ((True, "cpu", True), ("auto", "cpu", False), ("auto", "cuda", False)):
        assert compiles(asked, torch.device(device)) is does  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="compile=True needs Triton on CUDA: pip install triton"):
        compiles(True, torch.device("cuda"))
    monkeypatch.setattr("nativesd.loading.placement.find_spec", lambda _: True)
    assert compiles("auto", torch.device("cuda"))


def test_nothing_is_chosen_for_what_has_no_fast_path() -> None:
    assert tune(nn.Linear(2, 2, device="meta")) == Tuning()
    assert tune(nn.Linear(2, 2).double()) == Tuning()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bfloat16)])
@pytest.mark.parametrize("form", ["sd15", "sd21"])
def test_channels_stay_last_in_bfloat16_only(form: str, dtype: torch.dtype) -> None:
    """Also where two texts share latents. In float32 group norms lose digits of such maps."""
    network = unet(form).to(dtype)
    tune(network, EVERYTHING)
    strides: list[bool] = []
    for part in network.modules():
        if isinstance(part, nn.GroupNorm):
            part.register_forward_hook(
                lambda _, inputs, __: strides.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    network(normal(1, 4, 8, 12).to(dtype), 3.0, normal(2, 7, network.config.context).to(dtype))
    assert strides
    assert set(strides) == {dtype == torch.bfloat16}


@pytest.mark.parametrize("spoilt", [b"", b"[]", b'{"torn', b'{"%s": {"lineal": true}}', b'{"%s": {"linear": true}}'])
def test_a_choice_is_kept_for_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: bytes) -> None:
    probed: list[torch.dtype] = []

    def probe(dtype: torch.dtype) -> Tuning:
        probed.append(dtype)
        return EVERYTHING

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_probe", probe)
    for _ in range(2):
        assert best_tuning.__wrapped__(torch.float32, CPU, 1) == EVERYTHING
    assert len(probed) == 1
    assert best_tuning.__wrapped__(torch.float32, CPU, 2) == EVERYTHING
    assert len(probed) == 2
    (kept,) = (tmp_path / "nativesd").iterdir()
    keys = list(json.loads(kept.read_text()))
    assert len(keys) == 2
    kept.write_bytes(spoilt.replace(b"%s", keys[0].encode()))
    assert best_tuning.__wrapped__(torch.float32, CPU, 1) == EVERYTHING
    assert len(probed) == 3
    monkeypatch.setattr(tuning, "PROBE", tuning.PROBE + 1)
    assert best_tuning.__wrapped__(torch.float32, CPU, 1) == EVERYTHING
    assert len(probed) == 4


def test_the_layout_for_cuda_is_probed_once_and_for_every_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a probe that computes on the CPU here."""
    probed: list[str] = []

    def probe(dtype: torch.dtype, device: torch.device) -> Tuning:
        probed.append(str(device))
        return Tuning(channels_last=True)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_probe_layout", probe)
    cards = {"cuda:0": "A", "cuda:1": "B", "cuda:2": "A"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cards[str(device)])
    for card in cards:
        assert best_tuning.__wrapped__(torch.float16, torch.device(card), 1) == Tuning(channels_last=True)
    assert probed == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("wins", [True, False])
def test_the_layout_that_is_faster_is_taken(wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[bool] = []

    def pays(plain: Callable[[], object], quick: Callable[[], object], *, most: float) -> bool:
        plain()
        quick()
        return wins

    def forward(self: nn.Conv2d, input: Tensor) -> Tensor:
        last.append(self.weight.is_contiguous(memory_format=torch.channels_last))
        return convolution(self, input)

    convolution = nn.Conv2d.forward
    monkeypatch.setattr(tuning, "_pays", pays)
    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    assert tuning._probe_layout(torch.float32, CPU) == Tuning(channels_last=wins)
    assert last == [False] * 2 * tuning.CALLS + [True] * 2 * tuning.CALLS


@torch.inference_mode()
def test_channels_last_changes_no_result() -> None:
    network = unet("sdxl")
    before = predict(network, (2, 9, 8), torch.float32)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tune(network, Tuning(channels_last=True))
    assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert difference(predict(network, (2, 9, 8), torch.float32), before) <= TOLERANCE


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nativesd").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert best_tuning.__wrapped__(torch.float32, CPU, 1).attention in (True, False)


@bfloat16
def test_models_are_tuned_when_they_are_loaded() -> None:
    def quick(**options: Any) -> set[str]:
        pipeline = nativesd.load(device="cpu", dtype="bfloat16", **options)
        control = nativesd.load_control(device="cpu", dtype="bfloat16", **options)
        modules = (pipeline.unet, pipeline.vae, control.module)
        return {type(part).__name__ for module in modules for part in module.modules() if type(part) in PLAIN}

    assert "FastResnetBlock" in quick()
    assert not quick(fast=False)


def test_the_faster_one_is_chosen() -> None:
    def slow() -> Tensor:
        time.sleep(0.004)
        return torch.zeros(())

    def quick() -> Tensor:
        time.sleep(0.001)
        return torch.zeros(())

    assert _pays(slow, quick, most=0.97)
    assert not _pays(quick, slow, most=1.0)


@torch.inference_mode()
@pytest.mark.parametrize("form", ["sd15", "sd21", "sdxl"])
def test_a_cached_context_changes_nothing_and_is_used_once(form: str) -> None:
    network, calls = unet(form), []
    for part in network.modules():
        if isinstance(part, Attention):
            part.to_k.register_forward_hook(lambda *_: calls.append(1))
    config, latents, text = network.config, normal(2, 4, 8, 8), normal(2, 7, network.config.context)
    added = config.added
    more = {} if added is None else {"pooled": normal(2, added.pooled), "time_ids": torch.ones(2, added.ids)}
    expected = network(latents, 3.0, text, **more)
    every, context = len(calls), CachedContext(text)
    for _ in range(2):
        assert torch.equal(network(latents, 3.0, context, **more), expected)
    assert len(calls) == every + every + every // 2  # half of the attentions are to the text


@torch.inference_mode()
@pytest.mark.parametrize("form", ["sd15", "sd21"])
@pytest.mark.parametrize("batch", [1, 2])
def test_latents_shared_by_several_texts(form: str, batch: int) -> None:
    network = unet(form)
    latents, texts = normal(batch, 4, 8, 12), normal(3 * batch, 7, network.config.context)
    first: list[int] = []
    network.conv_in.register_forward_hook(lambda _, inputs, __: first.append(inputs[0].shape[0]))
    expected = network(torch.cat([latents] * 3), 3.0, texts)
    assert difference(network(latents, 3.0, texts), expected) <= TOLERANCE
    assert first == [3 * batch, batch]


@torch.inference_mode()
@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_guidance_computes_both_sides_as_if_alone(form: str) -> None:
    network = unet(form)
    added = network.config.added
    sides = [
        Conditioning(
            normal(2, 7, network.config.context, seed=seed),
            torch.ones(2),
            None if added is None else normal(2, added.pooled, seed=seed),
            None if added is None else torch.ones(2, added.ids),
            role="negative" if seed == 1 else "prompt",
        )
        for seed in (1, 2)
    ]
    latents = normal(2, 4, 8, 8)
    together, alone = (
        Guided(
            network, lambda sigma: sides, replace(Guidance(7.0), sequential=sequential), float, "epsilon", torch.float32
        )
        for sequential in (False, True)
    )
    for sigma in (3.0, 1.0):
        assert difference(together(latents, sigma), alone(latents, sigma)) <= TOLERANCE
