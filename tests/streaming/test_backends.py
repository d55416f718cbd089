"""Streams by exported graphs against PyTorch's, and what is said where an engine does not have the rows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
from torch import Tensor

import nativesd
from nativesd.errors import UsageError
from nativesd.export.accelerate import AcceleratedControlNet, AcceleratedTinyVAE, AcceleratedUNet
from nativesd.export.slots import Request
from nativesd.export.tensorrt.profiles import ready_profile, within
from nativesd.pipeline import acceleration
from nativesd.shipped import TAESD
from oracles import difference
from pipeline.test_pipeline import save_model
from streaming.clips import clip

pytest.importorskip("onnxruntime", reason='needs pip install ".[onnx]"')
PROMPT = "a strawberry on a yellow background"
BOUND = 1e-3


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Path:
    return tiny_store


def pictures(stream: nativesd.Stream, frames: list[Any]) -> list[Tensor]:
    made = [frame for frame in map(stream, frames) if frame is not None] + stream.flush()
    return [cast("Tensor", frame.image) for frame in made]


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_backend_streams_as_pytorch_does(store: Path, backend: Any) -> None:
    """Every mode's rows, with the ControlNet; nothing falls back, which would warn."""
    if backend == "openvino":
        pytest.importorskip("openvino", reason='needs pip install ".[openvino]"')
    plain = nativesd.load("tiny", device="cpu", loras=["tiny-lcm"])
    fast = plain.accelerate(backend, engines=store, components=["unet", "controlnet", "vae"])
    frames = clip(4)
    for residual, rows in (("self", 2), ("initialize", 3), ("full", 4)):
        given: dict[str, Any] = {
            "prompt": PROMPT, "guidance_scale": 1.4, "residual": residual, "output": "tensor",
            "control": nativesd.Control("tiny", scale=0.5),
        }  # fmt: skip
        stream = fast.stream(**given)
        assert stream.rows == rows
        assert isinstance(stream.pipeline.unet, AcceleratedUNet)
        control = stream.asked.control[0].model
        assert isinstance(cast("Any", control).module, AcceleratedControlNet)
        with warnings.catch_warnings():
            warnings.simplefilter("error", nativesd.NativesdWarning)
            found = pictures(stream, frames)
        for one, other in zip(found, pictures(plain.stream(**given), frames), strict=True):
            assert difference(one, other) <= BOUND
        stream.update(prompt="a fox", steps=3)
        assert len(pictures(stream, frames)) == 4


def test_taesd_has_graphs(store: Path, tmp_path: Path) -> None:
    save_model("sd15", tmp_path)
    plain = nativesd.load(tmp_path, device="cpu", vae=TAESD / "taesd_decoder.safetensors")
    fast = plain.accelerate("onnx", engines=store, components=["vae"])
    assert isinstance(fast.vae, AcceleratedTinyVAE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", nativesd.NativesdWarning)
        found = pictures(fast.stream("a cat", output="tensor"), clip(3))
    for one, other in zip(found, pictures(plain.stream("a cat", output="tensor"), clip(3)), strict=True):
        assert difference(one, other) <= BOUND


def test_loras_that_are_not_in_the_graphs_are_refused(store: Path) -> None:
    fast = nativesd.load("tiny", device="cpu").accelerate("onnx", engines=store, components=["unet"])
    with pytest.raises(UsageError, match="other LoRAs are in the weights now than when its graph was made; load"):
        fast.stream(PROMPT, loras=["tiny-lcm"])


def test_adapters_are_refused(store: Path, tmp_path: Path) -> None:
    adapter = diffusers.T2IAdapter(channels=[32, 64], num_res_blocks=2, downscale_factor=8, adapter_type="full_adapter")
    adapter.save_pretrained(tmp_path)
    control = nativesd.Control(nativesd.load_control(tmp_path, device="cpu"))
    fast = nativesd.load("tiny", device="cpu").accelerate("onnx", engines=store, components=["unet"])
    with pytest.raises(UsageError, match="T2I-Adapter, for whose features exported UNets have no inputs"):
        fast.stream(PROMPT, control=control)


def test_an_engine_without_the_rows_is_the_command_that_builds_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but that the engine is recorded: which profiles it has, and what is asked of it."""
    fast = nativesd.load("tiny", device="cpu").accelerate("onnx", engines=store, components=["unet", "vae"])
    graphs = fast.acceleration
    assert isinstance(graphs, acceleration.Acceleration)
    assert isinstance(fast.unet, AcceleratedUNet)
    graphs.backend = "tensorrt-rtx"
    schema = fast.unet.delegate.runner.schema
    asked: list[Request] = []

    def engine(*profiles: str) -> None:
        ready = [ready_profile(name, "unet", native=64, factor=4) for name in profiles]

        def refusal(request: Request) -> str | None:
            asked.append(request)
            fits = any(within(schema, request, profile) for profile in ready)
            return None if fits else f"unet: {request} is outside of every profile of this engine"

        monkeypatch.setattr(fast.unet.delegate.runner, "refusal", refusal)

    engine("64")  # rows 1 and 2
    assert fast.stream(PROMPT, steps=2).rows == 2
    command = "nativesd export tensorrt tiny --component unet --profile 64x64 --stream 3"
    with pytest.raises(UsageError, match=f"the UNet for 3x16x16, 77 tokens: .* outside of every profile.*; {command}"):
        fast.stream(PROMPT, steps=3)
    stream = fast.stream(PROMPT, steps=2)
    with pytest.raises(UsageError, match="4x16x16"):
        stream.update(guidance_scale=2, residual="full")
    engine("64x64-s3")
    for residual, rows in (("none", 3), ("initialize", 4), ("full", 6)):
        assert fast.stream(PROMPT, steps=3, guidance_scale=2, residual=residual).rows == rows  # type: ignore[arg-type]
        assert asked[-1] == Request(rows, 16, 16)
    monkeypatch.setattr(fast, "unet", nativesd.load("tiny", device="cpu").unet)
    with pytest.raises(UsageError, match="there is no engine of it; nativesd export tensorrt"):
        fast.stream(PROMPT)


@pytest.mark.parametrize(
    ("component", "expected"),
    [("unet", (3, 3, 6)), ("controlnet", (3, 3, 6)), ("vae_decoder", (1, 1, 1)), ("vae_encoder", (1, 1, 1))],
)
def test_profiles_of_a_stream(component: Any, expected: tuple[int, int, int]) -> None:
    profile = ready_profile("512-s3-c1", component, native=512)
    assert (profile.min.batch, profile.opt.batch, profile.max.batch) == expected
    assert {profile.min.height, profile.max.width} == {64}
    assert profile.max.tokens == 77
    with pytest.raises(UsageError, match="is not a profile"):
        ready_profile("512-s3-b2", component, native=512)
