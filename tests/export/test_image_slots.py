"""Inputs for image prompts in exported UNets: the schema, and ONNX Runtime and OpenVINO against PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import nativesd
from nativesd import ImageEmbeddings, ImagePrompt
from nativesd.checkpoints import export
from nativesd.checkpoints.export import Static
from nativesd.checkpoints.export import export_onnx as onnx_folder
from nativesd.cli import main
from nativesd.config import (
    SD15_UNET,
    SDXL_UNET,
    IPAdapterKind,
    Level,
    TextTime,
    UNetConfig,
    VisionEncoderConfig,
)
from nativesd.errors import NativesdError, NativesdWarning, UsageError
from nativesd.export.accelerate import Delegate, accelerate_module
from nativesd.export.check import TOLERANCES, compare, difference
from nativesd.export.graphs import FILE, Graph, graph_of, image_inputs
from nativesd.export.library import write_onnx
from nativesd.export.onnx import export_onnx
from nativesd.export.sessions import OnnxRunner, OpenVinoRunner
from nativesd.export.slots import Request, unet_schema
from nativesd.export.tensorrt.profiles import check_profiles, ready_profile, within
from nativesd.models.clip_vision import VisionEncoder
from nativesd.models.unet import ImageContext, UNet
from oracles import adapter_of, draw, drawn_adapter, on_one_thread, save_adapter, vision_pair
from streaming.clips import clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with on_one_thread():
        yield


def test_the_schema_is_read_off_the_attentions() -> None:
    sd15 = unet_schema(SD15_UNET)
    assert [str(slot) for slot in sd15.images] == [
        "ip_keys_320 [5, batch, groups, image_tokens, 320] weights",
        "ip_keys_640 [5, batch, groups, image_tokens, 640] weights",
        "ip_keys_1280 [6, batch, groups, image_tokens, 1280] weights",
        "ip_values_320 [5, batch, groups, image_tokens, 320] weights",
        "ip_values_640 [5, batch, groups, image_tokens, 640] weights",
        "ip_values_1280 [6, batch, groups, image_tokens, 1280] weights",
        "ip_bias [batch, groups, image_tokens] weights",
        "ip_mask_0 [batch, groups, h, w] weights",
        "ip_mask_1 [batch, groups, ceil(h/2), ceil(w/2)] weights",
        "ip_mask_2 [batch, groups, ceil(h/4), ceil(w/4)] weights",
        "ip_mask_3 [batch, groups, ceil(h/8), ceil(w/8)] weights",
    ]
    sdxl = unet_schema(SDXL_UNET)
    assert [slot.axes[0] for slot in sdxl.images if slot.name.startswith("ip_keys")] == [10, 60]
    assert [slot.name for slot in sdxl.images if "mask" in slot.name] == ["ip_mask_1", "ip_mask_2"]
    plain = unet_schema(SD15_UNET, images=False)
    assert sd15.inputs[: len(plain.inputs)] == plain.inputs
    assert not plain.images
    assert sd15.given({slot.name for slot in plain.inputs}).inputs == plain.inputs
    assert sd15.digest != plain.digest
    assert sd15.images[0].fields("float16")["without_image_prompts"] == "zeros"
    request = Request(2, 9, 11, 154, 3, 20)
    assert sd15.request({slot.name: slot.shape(request) for slot in sd15.inputs}) == request
    with pytest.raises(UsageError, match=r"ip_mask_0 was given nothing, and .*3x20 of images needs"):
        sd15.request({slot.name: slot.shape(request) for slot in sd15.inputs if slot.name != "ip_mask_0"})


def test_profiles_take_no_image_and_several() -> None:
    schema = unet_schema(SD15_UNET)
    profile = ready_profile("512", "unet", native=512)
    check_profiles(schema, [profile])
    assert within(schema, Request(2, 64, 64), profile)
    assert within(schema, Request(2, 64, 64, groups=4, image_tokens=257), profile)
    assert not within(schema, Request(2, 64, 64, groups=9), profile)
    without = ready_profile("512", "unet", native=512, image_prompts=False)
    assert not within(schema, Request(2, 64, 64, groups=2), without)
    assert profile.max.fields() == {
        "batch": 2, "height": 64, "width": 64, "tokens": 231, "groups": 4, "image_tokens": 1028,
    }  # fmt: skip
    assert set(profile.min.fields()) == {"batch", "height", "width", "tokens"}


def unet(form: str) -> UNetConfig:
    if form == "sd15":
        levels = (Level(32, (1,), (1, 1), 2), Level(64, (1,), (1, 1), 2), Level(64, (None,), (None, None), 2))
        return UNetConfig(levels, mid=(1, None), context=24, groups=16)
    return UNetConfig(
        (Level(32, (None,), (None, None), 1), Level(64, (2,), (2, 2), 2)), mid=(2, None), context=24, groups=16,
        linear_projection=True, added=TextTime(40, 6, 32),
    )  # fmt: skip


@dataclass(frozen=True)
class File:
    graph: Graph
    path: Path

    def runner(self, backend: str) -> Any:
        if backend == "onnx":
            return OnnxRunner(self.path, self.graph.schema, torch.float32, CPU)
        return OpenVinoRunner(self.path, self.graph.schema, torch.float32, torch.float32)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> File:
    torch.manual_seed(0)
    graph = graph_of(UNet(unet(request.param)).eval().requires_grad_(False), "unet")
    path = tmp_path_factory.mktemp(request.param) / FILE
    export_onnx(graph, path)
    return File(graph, path)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_one_graph_takes_every_image_prompt(file: File, backend: str) -> None:
    """Idle and filled, with control and without; one and several groups of any length."""
    requests = [Request(1, 16, 16), Request(2, 17, 24, 154, 2, 5), Request(4, 24, 9, 77, 3, 16)]
    found = compare(file.graph, file.runner(backend), requests)
    assert {(each.request, each.control) for each in found} == {(r, c) for r in requests for c in ("zero", "random")}
    worst = max(found, key=lambda each: each.error)
    assert worst.error <= (TOLERANCES[torch.float32] if backend == "onnx" else 1e-3), worst


def test_half_precision(tmp_path: Path) -> None:
    """Of the smaller form; bounded as every export is."""
    torch.manual_seed(0)
    graph = graph_of(UNet(unet("sdxl")).half().eval().requires_grad_(False), "unet")
    assert write_onnx(graph, tmp_path / FILE)["checked_in"] == "float16"


@torch.inference_mode()
def test_what_is_idle_changes_no_bit(file: File) -> None:
    """In PyTorch to the bit; and each input reaches its place in the exported graph."""
    generator, request = torch.Generator().manual_seed(1), Request(2, 9, 11, 77, 2, 5)
    given = dict(zip((s.name for s in file.graph.schema.inputs), file.graph.inputs(request, generator), strict=True))
    names = {slot.name for slot in file.graph.schema.images}
    idle = {name: tensor * 0 if name in names else tensor for name, tensor in given.items()}
    plain = Graph(file.graph.module, unet_schema(file.graph.module.config, images=False))  # type: ignore[arg-type]
    without = plain(*(given[slot.name] for slot in plain.schema.inputs))[0]
    assert torch.equal(file.graph(*idle.values())[0], without)
    runner = file.runner("onnx")
    for name in sorted(names - {"ip_bias"}):
        other = given[name] * 0 if name.startswith("ip_mask") else given[name].flip(0)
        changed = given | {name: other}
        expected, found = file.graph(*changed.values())[0], runner.run(changed)["out_sample"]
        assert not torch.equal(expected, file.graph(*given.values())[0]), name
        assert difference(found, expected) <= 1e-5, name
    padded = given["ip_bias"].clone()
    padded[:, 0, 3:] = -1e4
    expected = file.graph(*(given | {"ip_bias": padded}).values())[0]
    assert difference(runner.run(given | {"ip_bias": padded})["out_sample"], expected) <= 1e-5


def test_a_context_as_inputs() -> None:
    config = unet("sd15")
    keys = {32: torch.randn(3, 2, 1, 4, 32), 64: torch.randn(4, 2, 1, 4, 64)}
    schema = unet_schema(config)
    given = image_inputs(ImageContext(keys, keys), torch.zeros(2, 4, 9, 11), schema)
    assert set(given) == {slot.name for slot in schema.images}
    assert not given["ip_bias"].any()
    assert given["ip_mask_2"].shape == (2, 1, 3, 3)
    assert given["ip_mask_2"].all()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, config = tmp_path_factory.mktemp("adapters"), nativesd.load("tiny", device="cpu").config.unet
    out = {}
    for number, kind in enumerate(("base", "plus")):
        _, halves = drawn_adapter(adapter_of(config, kind), number)  # type: ignore[arg-type]
        out[kind] = save_adapter(halves, root / f"{kind}.safetensors")
    return out


def told(seed: int) -> ImageEmbeddings:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return ImageEmbeddings(random(1, 40), random(1, 9, 40), random(1, 9, 40))


def test_an_accelerated_pipeline(adapters: dict[str, Path], tiny_store: Path) -> None:
    """One graph for every adapter, scale, layer and part of the steps, and for a stream."""
    pipe = nativesd.load("tiny", device="cpu", fast=False)
    fast = pipe.accelerate("onnx", engines=tiny_store, components=["unet"])
    base, plus = (ImagePrompt(adapters[kind], told(number)) for number, kind in enumerate(("base", "plus")))
    options: dict[str, Any] = {"steps": 3, "seed": 3}
    mask = torch.zeros(64, 64)
    mask[:, 20:] = 1
    for prompts in (
        (), [base], [ImagePrompt(adapters["plus"], told(2), 0.5, end=0.7)], [base, plus],
        [ImagePrompt(adapters["base"], told(3), layers={0: 1.0, 2: 0.5}, mask=mask)],
    ):  # fmt: skip
        expected, found = (each("a strawberry", image_prompts=prompts, **options) for each in (pipe, fast))
        assert (expected.latents - found.latents).abs().max() < 1e-3
    streams = [each.stream("a strawberry", image_prompts=[base, plus], output="tensor") for each in (pipe, fast)]
    for frame in clip(2):
        one, other = (stream(frame) for stream in streams)
    assert one is not None
    assert other is not None
    assert difference(cast("Tensor", other.image), cast("Tensor", one.image)) <= 1e-3
    listed = CliRunner().invoke(main, ["engines", "list", "--engines", str(tiny_store)], env={"COLUMNS": "250"})
    assert "control, image prompts" in next(row for row in listed.output.splitlines() if row.startswith("unet"))


def test_of_image_prompts_that_are_left_out_nothing_is_asked(tmp_path: Path) -> None:
    command = ["export", "onnx", "tiny", str(tmp_path / "no"), "--static", "64x64", "--groups", "2"]
    refused = CliRunner().invoke(main, [*command, "--no-image-prompts"])
    assert refused.exit_code == 2
    assert "leave out --no-image-prompts" in refused.output


def test_without_inputs_for_them_pytorch_answers() -> None:
    module = UNet(unet("sd15")).eval().requires_grad_(False)
    runner = SimpleNamespace(schema=unet_schema(module.config, images=False))
    fast = accelerate_module(module, {"unet": Delegate("unet", runner, lambda: None)})  # type: ignore[arg-type]
    keys = {32: torch.randn(3, 2, 1, 4, 32), 64: torch.randn(4, 2, 1, 4, 64)}
    given = torch.randn(2, 4, 8, 8), 481.0, torch.randn(2, 7, 24)
    with pytest.warns(NativesdWarning, match="exported without slots for image prompts: PyTorch runs it instead"):
        found = fast(*given, images=ImageContext(keys, keys))
    assert torch.equal(found, module(*given, images=ImageContext(keys, keys)))


ENCODER = VisionEncoderConfig(40, 3, 2, 64, "gelu", projection=40, image=42)
KINDS: tuple[IPAdapterKind, ...] = ("base", "plus", "full", "faceid-plus")


@pytest.mark.parametrize("config", [ENCODER, replace(ENCODER, projection=None, activation="quick_gelu")])
def test_an_image_encoder_as_a_graph(config: VisionEncoderConfig, tmp_path: Path) -> None:
    with torch.device("meta"):
        module = VisionEncoder(config).eval()
    draw(module, 0)
    graph = graph_of(module.requires_grad_(False), "image_encoder")
    assert [str(slot) for slot in (*graph.schema.inputs, *graph.schema.outputs)] == [
        "pixel_values [batch, 3, 42, 42] weights", *["image_embeds [batch, 40] weights"] * (config.projection == 40),
        "image_states [batch, 10, 40] weights",
    ]  # fmt: skip
    export_onnx(graph, tmp_path / FILE)
    assert all(each.error <= 1e-5 for each in compare(graph, File(graph, tmp_path / FILE).runner("onnx")))


@pytest.mark.parametrize("kind", KINDS, ids=[f"kind-{kind}" for kind in KINDS])
@torch.inference_mode()
def test_an_adapter_as_a_graph_gives_the_unets_inputs(kind: IPAdapterKind, tmp_path: Path) -> None:
    config = unet("sd15")
    module = drawn_adapter(adapter_of(config, kind))[0].eval()
    graph = graph_of(module, "ip_adapter")
    export_onnx(graph, tmp_path / FILE)
    runner = File(graph, tmp_path / FILE).runner("onnx")
    requests = [Request(1, 1, 1, image_tokens=9), Request(2, 1, 1), Request(4, 1, 1, image_tokens=20)]
    assert all(each.error <= 1e-5 for each in compare(graph, runner, requests))
    slots = [slot for slot in unet_schema(config).images if slot.name.startswith(("ip_keys", "ip_values"))]
    request = Request(2, 1, 1, groups=1, image_tokens=20)
    inputs = dict(zip((slot.name for slot in graph.schema.inputs), graph.inputs(request), strict=True))
    made = runner.run(inputs)
    tokens = made["ip_keys_32"].shape[3]
    assert tokens == {"plus": 5, "full": 20}.get(kind, 4)
    takes = {slot.name: slot.shape(replace(request, image_tokens=tokens)) for slot in slots}
    assert {name: each.shape for name, each in made.items()} == takes
    image = inputs.get("image_embeds", inputs.get("image_states"))
    layers = module.keys_values(module.tokens(image, inputs.get("identity")))
    at = dict.fromkeys((32, 64), 0)
    for place, (keys, values) in zip(config.cross_attentions, layers, strict=True):
        for name, expected in ((f"ip_keys_{place.width}", keys), (f"ip_values_{place.width}", values)):
            assert difference(made[name][at[place.width], :, 0], expected) <= 1e-5
        at[place.width] += 1


def test_encoder_and_adapters_are_exported_beside_a_model(tmp_path: Path) -> None:
    """By the command line; FaceID's LoRA is merged into what it belongs to."""
    config = nativesd.load("tiny", device="cpu").config.unet
    vision_pair(ENCODER)[1].save_pretrained(tmp_path / "encoder")
    vision_pair(replace(ENCODER, width=56, projection=56))[1].save_pretrained(tmp_path / "other")
    kinds: dict[IPAdapterKind, int | None] = {"plus": None, "faceid": 4}
    files = [
        save_adapter(drawn_adapter(adapter_of(config, kind, lora=lora))[1], tmp_path / f"{kind}.safetensors")
        for kind, lora in kinds.items()
    ]
    arguments = ["export", "onnx", "tiny", tmp_path / "made", "--image-encoder", tmp_path / "encoder"]
    for name in ("image_encoder", "ip_adapter"):
        arguments += ["--component", name]
    for file in files:
        arguments += ["--image-adapter", file]
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text("utf-8"))
    assert [*manifest["components"]] == ["image_encoder", "ip_adapter", "ip_adapter_2"]
    assert all(each["error"] <= 1e-5 for each in manifest["components"].values())
    assert manifest["components"]["image_encoder"]["pixel_values"]["mean"][0] == pytest.approx(0.4815, abs=1e-4)
    assert [each["name"] for each in manifest["components"]["ip_adapter_2"]["inputs"]] == ["identity"]
    assert [each["name"] for each in manifest["loras"]] == ["faceid"]
    with pytest.raises(UsageError, match=r"plus takes states 40 wide .*image encoder other gives states 56 wide"):
        onnx_folder(
            "tiny", tmp_path / "no", components=["image_encoder"], image_encoder=tmp_path / "other",
            image_adapters=files,
        )  # fmt: skip
    with pytest.raises(UsageError, match=r"nothing to export: .*--image-encoder.*--image-adapter"):
        onnx_folder("tiny", tmp_path / "no", components=["ip_adapter"])
    with pytest.raises(UsageError, match=r"IP-Adapter's own graph has no static size"):
        onnx_folder("tiny", tmp_path / "no", static=Static(64, 64), image_adapters=files)
    with pytest.raises(UsageError, match=r"comfyui's runtime has nothing for inputs for image prompts"):
        onnx_folder("tiny", tmp_path / "no", components=["unet"], image_prompts=True, names="comfyui")


@pytest.mark.parametrize(
    ("arguments", "has"),
    [([], True), (["--no-image-prompts"], False), (["--names", "comfyui"], False), (["--static", "64x64"], True)],
)
def test_exported_unets_have_inputs_for_them(
    arguments: list[str], has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are left out, or another project's runtime has none."""
    asked: list[Graph] = []

    def write(graph: Graph, path: Path, **options: Any) -> dict[str, Any]:
        asked.append(graph)
        path.write_bytes(b"")
        return {"inputs": [], "outputs": []}

    monkeypatch.setattr(export, "write_onnx", write)
    command = ["export", "onnx", "tiny", str(tmp_path / "made"), "--component", "unet", *arguments]
    done = CliRunner().invoke(main, command)
    assert not isinstance(done.exception, NativesdError), done.output
    assert [bool(graph.schema.images) for graph in asked] == [has]


@torch.inference_mode()
def test_a_graph_of_one_size_takes_fewer_tokens_by_its_bias(tmp_path: Path) -> None:
    """A base adapter's 4 in a place for 16, and an idle second place."""
    config = UNetConfig((Level(32, (1,), (1, None), 2), Level(32, (None,), (None, None), 2)), (None,), context=8)
    graph = graph_of(UNet(config).eval().requires_grad_(False), "unet")
    request = Static(72, 88, batch=2, groups=2).request(8)
    assert (request.groups, request.image_tokens) == (2, 16)
    export_onnx(graph, tmp_path / FILE, static=request)
    short = replace(request, groups=1, image_tokens=4)
    given = dict(zip((s.name for s in graph.schema.inputs), graph.inputs(short), strict=True))
    given["ip_bias"] = torch.zeros(2, 1, 4)
    expected = graph(*given.values())[0]
    padded = dict(given)
    for slot in graph.schema.images:
        there = slot.shape(request)
        padded[slot.name] = torch.full(there, -1e4) if slot.name == "ip_bias" else torch.zeros(there)
        padded[slot.name][tuple(slice(size) for size in given[slot.name].shape)] = given[slot.name]
    found = OnnxRunner(tmp_path / FILE, graph.schema, torch.float32, CPU).run(padded)["out_sample"]
    assert difference(found, expected) <= 1e-5
