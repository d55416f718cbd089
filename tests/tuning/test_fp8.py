"""Float8 linear layers against exact arithmetic on their rounded values, and what they do to a model."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nativesd
from models.test_models import UNETS
from nativesd.config import UNetConfig
from nativesd.errors import UsageError
from nativesd.loading import control as loading_control
from nativesd.loading import placement
from nativesd.machine import smoke
from nativesd.machine.needs import FAMILIES
from nativesd.machine.smoke import picture_difference
from nativesd.models.build import build
from nativesd.models.layers import TransformerBlock
from nativesd.models.unet import UNet
from nativesd.tuning.fp8 import Fp8Linear, is_fp8, to_fp8, use_fp8, why_not_fp8
from oracles import draw, on_one_thread

STEP = 2.0**-4  # half a unit in the last of e4m3's three places, relative
BFLOAT16 = 2.0**-8
PROMPT = "a strawberry on a yellow background"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with on_one_thread():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def exact(rows: Tensor) -> Tensor:
    """What is left of rows in float8."""
    values, scales = to_fp8(rows.flatten(0, -2))
    return (values.double() * scales.double()).reshape(rows.shape)


def test_rows_fill_the_range_by_themselves() -> None:
    x = normal(5, 64) * torch.tensor([1e-6, 1.0, 300.0, 1e6, 0.0])[:, None]
    values, scales = to_fp8(x)
    assert values.dtype == torch.float8_e4m3fn
    assert values.float().abs().amax(1).tolist() == [448, 448, 448, 448, 0]
    back = values.float() * scales
    largest = x.abs().amax(1, keepdim=True)
    assert ((back - x).abs() <= STEP * x.abs() + largest * 2.0**-9 / 448).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_the_rounded_values(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(320, 640, bias=bias).to(dtype).requires_grad_(False)
    x = normal(2, 77, 320).to(dtype)
    found = Fp8Linear(linear)(x)
    assert found.dtype == dtype
    expected = exact(x) @ exact(linear.weight.detach()).T
    added = torch.zeros(640) if linear.bias is None else linear.bias.detach()
    # the product is rounded to bfloat16, the sum with the bias to the layer's dtype
    bound = BFLOAT16 * (expected.abs() + (expected + added).abs()) + 1e-6
    assert ((found - (expected + added)).abs() <= bound).all()
    assert rms(found - linear(x)) < 0.04 * rms(linear(x))


def test_rows_do_not_depend_on_one_another() -> None:
    layer = Fp8Linear(nn.Linear(64, 32))
    x = normal(3, 64) * torch.tensor([1.0, 1000.0, 0.001])[:, None]
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@pytest.fixture
def unet() -> UNet:
    with torch.device("meta"):
        out = UNet(UNETS["sdxl"])
    draw(out, 0)
    return out


def predict(unet: UNet) -> Tensor:
    config: UNetConfig = unet.config
    assert config.added is not None
    more = {"pooled": normal(2, config.added.pooled, seed=3), "time_ids": torch.full((2, 6), 64.0)}
    out: Tensor = unet(normal(2, 4, 16, 16, seed=1), 500.0, normal(2, 77, config.context, seed=2), **more)
    return out


@torch.inference_mode()
def test_blocks_of_a_unet(unet: UNet) -> None:
    plain, names = predict(unet), {name for name, _ in unet.named_parameters()}
    before = {name: parameter.nbytes for name, parameter in unet.named_parameters() if parameter.ndim == 2}
    assert not is_fp8(unet)
    use_fp8(unet)
    assert is_fp8(unet)
    assert {name for name, _ in unet.named_parameters()} == names
    inside = tuple(name for name, part in unet.named_modules() if isinstance(part, TransformerBlock))
    for name, parameter in unet.named_parameters():
        small = name in before and name.startswith(inside) and not any(side % 16 for side in parameter.shape)
        assert (parameter.dtype == torch.float8_e4m3fn) == small
        assert not small or parameter.nbytes == before[name] / 4
    assert 0 < rms(predict(unet) - plain) < 0.1 * rms(plain)


@torch.inference_mode()
def test_blocks_compile(unet: UNet) -> None:
    use_fp8(unet)
    plain = predict(unet)
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            block.compile(dynamic=True, fullgraph=True, backend="eager")
    assert torch.equal(predict(unet), plain)


def test_layers_of_odd_sides_stay() -> None:
    block = TransformerBlock(24, 2, 32)
    use_fp8(block)
    assert not is_fp8(block)


def test_pictures() -> None:
    plain = nativesd.load("tiny", device="cpu", fast=False)
    rounded = nativesd.load("tiny", device="cpu", fast=False)
    use_fp8(rounded.unet)
    for seed in range(3):
        first, second = (pipe(PROMPT, seed=seed).images[0] for pipe in (plain, rounded))
        assert 0 < picture_difference(second, first) < 1e-2  # another seed moves it by 3e-2


def test_what_needs_other_weights_says_so() -> None:
    pipe = nativesd.load("tiny", device="cpu", fast=False)
    use_fp8(pipe.unet)
    with pytest.raises(UsageError, match="LoRAs cannot be merged into float8 weights: load the model without fp8=True"):
        pipe(PROMPT, loras=["style.safetensors"])
    with pytest.raises(UsageError, match="a UNet in float8 has no form for onnx: load the model without fp8=True"):
        pipe.accelerate("onnx")


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"for NVIDIA GPUs \(RTX 40, H100 and newer\), and the device is cpu"):
        nativesd.load("tiny", device="cpu", fp8=True)
    card = torch.device("cuda", 0)
    monkeypatch.setattr(placement, "find_device", lambda device: card)
    monkeypatch.setattr(placement, "why_not_fp8", lambda device: "Rowwise scaling is not supported")
    for dtype, sentence in (
        (None, "fp8=True needs an RTX 40, an H100 or newer, .* cuda:0 says Rowwise scaling is not supported"),
        ("float32", "saves memory where the rest is float16 or bfloat16: pass one of them as dtype"),
    ):
        with pytest.raises(UsageError, match=sentence):
            nativesd.load("tiny", fp8=True, dtype=dtype)


def test_what_the_device_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_fp8(torch.device("cpu")) is None

    def refuse(*given: object, **more: object) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0.\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    found = why_not_fp8(torch.device("cpu"))
    assert found == "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0"


def test_a_control_net_that_is_a_difference_needs_the_weights(unet: UNet) -> None:
    use_fp8(unet)
    with pytest.raises(UsageError, match="difference from a UNet, and the model's is in float8: load it without fp8"):
        loading_control._add(nn.Linear(2, 2), unet, Path("control.safetensors"))


@pytest.mark.full
@torch.inference_mode()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_published_widths(family: str) -> None:
    """What docs/performance.md and smoke's limit say, by the rest in float32."""
    torch.set_num_threads(os.cpu_count() or 1)
    (subject,) = (each for each in smoke.subjects({family: FAMILIES[family]}, "small") if each.name == "UNet")
    reference = build(subject.config)
    smoke.draw(reference, zlib.crc32(repr(subject.config).encode()), smoke.RESIDUAL_GAIN)
    cases = list(smoke.cases(subject.config, subject.sizes))
    expected = [case.call(reference, **case.inputs) for case in cases]
    use_fp8(reference)
    sizes = [(parameter.numel(), parameter.dtype == torch.float8_e4m3fn) for parameter in reference.parameters()]
    share = sum(size for size, small in sizes if small) / sum(size for size, _ in sizes)
    print(f"\n{family}: {share:.2f} of the weights")
    for case, outputs in zip(cases, expected, strict=True):
        found = case.call(reference, **case.inputs)
        error = max(smoke.difference(ours, theirs) for ours, theirs in zip(found, outputs, strict=True))
        print(f"{family} {case.name}: {error:.1e}")
        assert error <= smoke.FP8.limit
