"""Exported graphs against PyTorch, at small widths: one dynamic file per component, run by ONNX Runtime.

The wider matrix of forms, dtypes and sizes runs with -m full.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import nativesd
from nativesd.config import Config, ControlNetConfig, Depth, Level, TextEncoderConfig, TextTime, UNetConfig, VAEConfig
from nativesd.errors import NativesdError, SourceError, UsageError
from nativesd.export.check import TOLERANCES, Comparison, compare, references, require
from nativesd.export.graphs import Graph, graph_of
from nativesd.export.library import write_onnx
from nativesd.export.onnx import export_onnx
from nativesd.export.runner import Runner
from nativesd.export.sessions import OnnxRunner, OpenVinoRunner
from nativesd.export.slots import CHUNK, Component, Convention, Request, Schema
from nativesd.models.build import build
from nativesd.models.layers import Attention
from oracles import difference, draw, on_one_thread

onnx = pytest.importorskip("onnx", reason='needs pip install ".[onnx]"')
ort = pytest.importorskip("onnxruntime", reason='needs pip install ".[onnx]"')

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
XL = TextTime(40, 6, 32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Everything here is too small to share out; on a busy machine threads only wait for each other."""
    with on_one_thread():
        yield


def unet(
    depths: tuple[Depth, ...], mid: tuple[Depth, ...], heads: tuple[int, ...], *, linear: bool = False, **other: Any
) -> UNetConfig:
    """A narrow UNet with one layer going down at every level, all but the first of one width.

    Levels of one width and head count have the same blocks at different sizes, as the published ones do.
    """
    levels = tuple(Level(64 if i else 32, (depth,), (depth,) * 2, heads[i]) for i, depth in enumerate(depths))
    return UNetConfig(levels, mid, context=24, linear_projection=linear, groups=16, **other)


def controlnet(config: UNetConfig) -> ControlNetConfig:
    levels = tuple(replace(level, up=()) for level in config.levels)
    return ControlNetConfig(replace(config, levels=levels), hint_widths=(4, 8, 8, 16))


SD15 = unet((1, 1, None), (1, None), (1, 2, 2))
SD21 = unet((1, 1, None), (1, None), (1, 2, 4), linear=True)
SDXL = unet((None, 2), (2, None), (1, 2), linear=True, added=XL)
CONFIGS: dict[str, tuple[Component, Config]] = {
    "sd15": ("unet", SD15),
    "sd21": ("unet", SD21),
    "sdxl": ("unet", SDXL),
    "sd21, two levels": ("unet", unet((1, None), (1, None), (1, 2), linear=True)),
    "sd15-inpainting": ("unet", replace(SD15, in_channels=9)),
    "lcm": ("unet", replace(SD15, guidance=40)),
    "refiner": ("unet", unet((None, 2, 2, None), (2, None), (1, 2, 2, 2), linear=True, added=replace(XL, ids=5))),
    "bk-sdm tiny": ("unet", unet((1, 1, 1), (), (1, 2, 2))),
    "attention without blocks": ("unet", unet((None, 0), (0, None), (1, 2), linear=True)),
    "controlnet": ("controlnet", controlnet(SDXL)),
    "sd15 controlnet": ("controlnet", controlnet(SD15)),
    "sd21 controlnet": ("controlnet", controlnet(SD21)),
    "vae_decoder": ("vae_decoder", VAEConfig(widths=(16, 32, 32), layers=1, groups=8)),
    "vae_encoder": ("vae_encoder", VAEConfig(widths=(16, 32, 32), layers=1, groups=8)),
    "clip": ("text_encoder", TextEncoderConfig(32, 3, 2, 64, "quick_gelu", vocabulary=500)),
    "openclip": (
        "text_encoder",
        TextEncoderConfig(32, 3, 2, 64, "gelu", projection=48, hidden=-2, hidden_norm=False, vocabulary=500),
    ),
}


def module(name: str, dtype: torch.dtype = torch.float32) -> Graph:
    """A component whose parameters are all drawn at random."""
    component, config = CONFIGS[name]
    with torch.device("meta"):
        out = build(config)
    draw(out, 0)
    return graph_of(out.to(dtype), component, images=False)  # test_image_slots.py has UNets with these


@dataclass(frozen=True)
class Exported:
    graph: Graph
    path: Path
    names: Convention

    @property
    def schema(self) -> Schema:
        """Of the file, by its own names."""
        return self.graph.schema.renamed(self.names)

    def runner(self) -> OnnxRunner:
        return OnnxRunner(self.path, self.schema, self.graph.dtype, CPU)

    def model(self) -> Any:
        """The file without its weights."""
        return onnx.load(self.path, load_external_data=False)


Export = Callable[..., Exported]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Files by form, dtype and names, each of them written once."""
    done: dict[tuple[str, torch.dtype, Convention], Exported] = {}

    def export(name: str, dtype: torch.dtype = torch.float32, names: Convention = "nativesd") -> Exported:
        if (name, dtype, names) not in done:
            graph = module(name, dtype)
            path = tmp_path_factory.mktemp("graph") / "model.onnx"
            export_onnx(graph, path, names=names, metadata={"source_hash": "0123"})
            done[name, dtype, names] = Exported(graph, path, names)
        return done[name, dtype, names]

    return export


# --- results

HALF = torch.float16
SLOW = {"512x512": Request(2, 64, 64), "768x512": Request(1, 64, 96)}
"""In float16, which ONNX Runtime's CPU provider converts to and fro."""
PIXELS = {
    **SLOW,
    "544x544": Request(1, 68, 68, 2 * CHUNK),
    "odd cells": Request(4, 17, 23, 2 * CHUNK),
    "hardly any cells": Request(3, 3, 2),
}
LARGE = {"1000x1016": Request(1, 127, 125)}
"""Minutes and gigabytes for forms with attention over every cell."""
DEFAULT: list[tuple[str, torch.dtype, Convention, list[Request]]] = [
    ("sd15", torch.float32, "nativesd", [*PIXELS.values()]),
    ("sd15", HALF, "comfyui", [request for size, request in PIXELS.items() if size not in SLOW]),
    ("sdxl", torch.float32, "nativesd", [*PIXELS.values(), *LARGE.values()]),
]
HALVED = DEFAULT[1]
"""SD2.1's form, which the embedded model has, is exported and checked in test_acceleration.py."""


def errors(file: Exported, requests: list[Request]) -> list[Comparison]:
    """Of ONNX Runtime against PyTorch; the session is closed again, so that its memory goes."""
    runner = file.runner()
    found = compare(file.graph, runner, requests)
    runner.close()
    return found


@pytest.mark.parametrize(("name", "dtype", "names", "requests"), DEFAULT, ids=str)
def test_one_file_serves_every_request(
    name: str, dtype: torch.dtype, names: Convention, requests: list[Request], exported: Export
) -> None:
    """Sizes, batches, lengths of the prompt; control residuals not given, which means zeros, and random."""
    file = exported(name, dtype, names)
    found = errors(file, requests)
    assert [(each.request, each.control) for each in found] == [
        (request, control) for request in requests for control in ("zero", "random")
    ]
    worst = max(found, key=lambda each: each.error)
    assert worst.error <= TOLERANCES[dtype], worst


# of the change; elsewhere, a residual would make quite another one
@pytest.mark.parametrize(
    ("form", "tolerance"), [(DEFAULT[0], 1e-4), (HALVED, 0.02), (DEFAULT[2], 1e-4)], ids=["sd15", "half", "sdxl"]
)
def test_every_slot_reaches_its_place(form: tuple[Any, ...], tolerance: float, exported: Export) -> None:
    """Each control slot alone changes the answer as it does in PyTorch."""
    file = exported(*form[:3])
    drawn = file.graph.inputs(Request(2, 9, 11), torch.Generator().manual_seed(1))
    inputs = {
        slot: 10 * tensor if slot.is_control else tensor for slot, tensor in zip(file.schema.inputs, drawn, strict=True)
    }  # of order one
    zeros = {slot: torch.zeros_like(tensor) for slot, tensor in inputs.items() if slot.is_control}
    plain = {slot.name: tensor for slot, tensor in inputs.items() if not slot.is_control}
    [output], runner = file.schema.outputs, file.runner()
    with torch.inference_mode():
        without = file.graph(*(inputs | zeros).values())[0]
        for slot in file.schema.control:
            expected = file.graph(*(inputs | zeros | {slot: inputs[slot]}).values())[0] - without
            found = runner.run(plain | {slot.name: inputs[slot]})[output.name] - runner.run(plain)[output.name]
            assert expected.abs().max() > 0.05 * without.abs().max(), slot
            assert difference(found, expected) <= tolerance, slot


def test_control_comes_and_goes(exported: Export) -> None:
    """No residual of an earlier call is left behind, at the same size or another."""
    file = exported("sdxl")
    runner = file.runner()

    def run(request: Request, *, control: bool) -> Tensor:
        inputs = zip(file.schema.inputs, file.graph.inputs(request, torch.Generator().manual_seed(1)), strict=True)
        return runner.run({slot.name: each for slot, each in inputs if control or not slot.is_control})["out_sample"]

    small, large = Request(1, 8, 8), Request(2, 13, 8)
    before = {request: run(request, control=False).clone() for request in (small, large)}
    for request in (small, large, small):
        assert not torch.equal(run(request, control=True), before[request])
        assert torch.equal(run(request, control=False), before[request])


@pytest.mark.full
def test_controlnet_and_unet_in_a_row(exported: Export) -> None:
    """What the ControlNet's graph gives is what the UNet's takes, scaled in between.

    The embedded model's are in every run of test_acceleration.py.
    """
    control, main = exported("controlnet"), exported("sdxl")
    assert max(each.error for each in errors(control, [Request(2, 16, 24), Request(3, 9, 13, 2 * CHUNK)])) <= 1e-5
    request = Request(2, 17, 12)
    given = dict(zip([slot.name for slot in control.schema.inputs], control.graph.inputs(request), strict=True))
    residuals = control.runner().run(given)
    given.pop("controlnet_cond")
    scaled = {f"input_{name}": 0.7 * residual for name, residual in residuals.items()}
    found = main.runner().run(given | scaled)["out_sample"]
    with torch.inference_mode():
        expected = main.graph(*given.values(), *scaled.values())[0]
    assert difference(found, expected) <= 1e-5


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder"])
def test_vae(name: str, exported: Export) -> None:
    requests = [Request(1, 64, 64), Request(2, 17, 9), Request(4, 5, 24)]
    assert max(each.error for each in errors(exported(name), requests)) <= 1e-5


@pytest.mark.parametrize("name", ["clip", "openclip"])
def test_text_encoders(name: str, exported: Export) -> None:
    """Every layer, for any clip skip, and the pooled embedding, wherever the text ends."""
    file = exported(name)
    encoder: Any = file.graph.module
    tokens = torch.randint(0, 498, (4, CHUNK), generator=torch.Generator().manual_seed(1))
    for row, end in zip(tokens, (3, 40, 75, 76), strict=True):
        row[end:] = 499
    found = file.runner().run({"input_ids": tokens})
    assert len(found["hidden_states"]) == 3
    with torch.inference_mode():
        for skip in (1, 2, 3):
            expected = encoder(tokens, hidden=-skip)
            assert difference(found["hidden_states"][-skip], expected.hidden) <= 1e-5
            assert difference(found["pooled"], expected.pooled) <= 1e-5


def test_a_graph_of_one_size(tmp_path: Path) -> None:
    graph, path, request = module("vae_decoder"), tmp_path / "model.onnx", Request(1, 6, 10)
    details = write_onnx(graph, path, static=request)
    assert details["error"] <= 1e-5
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(path, full_check=True)
    assert sizes(model.graph.input) == [[1, 4, 6, 10]]
    assert sizes(model.graph.output) == [[1, 3, 24, 40]]
    runner = OnnxRunner(path, graph.schema, torch.float32, CPU)
    sentence = r"vae_decoder: this graph was exported for latent_sample of shape \(1, 4, 6, 10\) alone, and .* 6, 11\)"
    with pytest.raises(UsageError, match=sentence):
        runner.run({"latent_sample": torch.zeros(1, 4, 6, 11)})


def test_bfloat16_is_checked_by_a_twin(tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider does not compute in it."""
    graph, path = module("clip", torch.bfloat16), tmp_path / "model.onnx"
    details = write_onnx(graph, path)
    assert details["checked_in"] == "float32"
    assert details["error"] <= 1e-5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    weights = onnx.load(path, load_external_data=False).graph.initializer
    kinds = {weight.data_type for weight in weights if weight.name.endswith(("weight", "bias"))}
    assert kinds == {onnx.TensorProto.BFLOAT16}
    with pytest.raises(UsageError, match=r"ONNX Runtime does not compute in .*bfloat16: load with dtype='float32'"):
        OnnxRunner(path, graph.schema, torch.bfloat16, CPU)


def test_loras_are_merged_before(tmp_path: Path) -> None:
    from nativesd.checkpoints.export import export_onnx as export_model

    width = nativesd.load("tiny", device="cpu").text_encoders[0].config.width
    name, generator = "lora_te_text_model_encoder_layers_0_mlp_fc1", torch.Generator().manual_seed(0)
    file = tmp_path / "style.safetensors"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, width, generator=generator),
        f"{name}.lora_up.weight": torch.randn(4 * width, 4, generator=generator) / 8,
    }
    save_file(tensors, file)
    [done] = export_model("tiny", tmp_path / "out", components=["text_encoder"], loras=[(file, 0.5)])
    pipe = nativesd.load("tiny", device="cpu")
    encoder = pipe.text_encoders[0]
    graph = graph_of(encoder, "text_encoder")
    runner = OnnxRunner(done.path, graph.schema, torch.float32, CPU)
    [without] = compare(graph, runner, [Request(2, 1, 1)])
    assert without.error > 0.01
    pipe.set_loras([(file, 0.5)])
    [merged] = compare(graph, runner, [Request(2, 1, 1)])
    assert merged.error <= 1e-5


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_form(name: str, dtype: torch.dtype, exported: Export) -> None:
    file = exported(name, dtype)
    requests = [Request(2, 1, 1)] if "input_ids" in {slot.name for slot in file.schema.inputs} else [*PIXELS.values()]
    if name in ("sd15", "sd21", "sdxl"):
        requests += LARGE.values()
    worst = max(errors(file, requests), key=lambda each: each.error)
    assert worst.error <= TOLERANCES[dtype], worst


def test_transformers_without_blocks(exported: Export) -> None:
    file = exported("attention without blocks", torch.float32)
    worst = max(errors(file, PIXELS.values()), key=lambda each: each.error)
    assert worst.error <= TOLERANCES[torch.float32], worst


@pytest.mark.full
def test_group_norms_split_in_older_opsets(tmp_path: Path) -> None:
    """Opset 18 to 22 can be asked for, and compute the same."""
    for name, opset in (("sdxl", 22), ("vae_decoder", 18)):
        graph, path = module(name), tmp_path / f"{name}.onnx"
        assert write_onnx(graph, path, opset=opset)["error"] <= 1e-5
        assert [each.version for each in onnx.load(path, load_external_data=False).opset_import] == [opset]


# --- files

CHECKED = ["sdxl", pytest.param("controlnet", marks=pytest.mark.full), "vae_decoder", "vae_encoder", "clip", "openclip"]


def sizes(values: Any) -> list[list[int | str]]:
    """Shapes as a file states them."""
    return [[axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in values]


@pytest.mark.parametrize("name", CHECKED)
def test_the_checker_finds_nothing(name: str, exported: Export) -> None:
    onnx.checker.check_model(exported(name).path, full_check=True)


def test_halves_of_halves(exported: Export) -> None:
    """As the file states them, and as the checker infers them."""
    file = exported(*HALVED[:3])
    onnx.checker.check_model(file.path, full_check=True)
    assert sizes(file.model().graph.input)[-1] == ["batch", 64, "ceil(h/4)", "ceil(w/4)"]


@pytest.mark.parametrize("name", CHECKED)
def test_inputs_and_outputs_are_the_schemas(name: str, exported: Export) -> None:
    file = exported(name)
    graph, schema = file.model().graph, file.schema
    for values, slots in ((graph.input, schema.inputs), (graph.output, schema.outputs)):
        assert [value.name for value in values] == [slot.name for slot in slots]
        assert sizes(values) == [[axis if isinstance(axis, int) else str(axis) for axis in slot.axes] for slot in slots]


def test_dtypes_are_the_weights(exported: Export) -> None:
    """Strongly typed: all weights of matrices are in the dtype asked for, and so are the inputs but for the times."""
    file = exported(*HALVED[:3])
    graph, kinds = file.model().graph, onnx.TensorProto
    weights = [weight for weight in graph.initializer if weight.name.endswith(("weight", "bias"))]
    assert len(weights) == len(file.graph.module.state_dict())
    assert {weight.data_type for weight in weights} == {kinds.FLOAT16}
    found = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert found.pop("timesteps") == kinds.FLOAT
    assert set(found.values()) == {kinds.FLOAT16}


@pytest.mark.parametrize("name", CHECKED)
def test_nodes(name: str, exported: Export) -> None:
    """Attention and group norms are one node each, where the opset has them; nothing but standard operators is left."""
    file = exported(name)
    model, parts = file.model(), list(file.graph.module.modules())
    count = Counter(node.op_type for node in model.graph.node)
    is_vae = name.startswith("vae")
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 21 if is_vae else 23)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    half = {"vae_decoder": "decoder", "vae_encoder": "encoder"}.get(name, "")
    within = parts if not half else [p for n, p in file.graph.module.named_modules() if n.startswith(half)]
    assert count["GroupNormalization"] == sum(isinstance(part, nn.GroupNorm) for part in within)
    assert count["InstanceNormalization"] == 0
    if name in ("sdxl", "controlnet"):
        assert count["Attention"] == sum(isinstance(part, Attention) for part in parts)
        assert count["Softmax"] == 0
    elif not is_vae:
        assert count["Attention"] == 3


def test_metadata(exported: Export) -> None:
    file = exported("sdxl")
    model = file.model()
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert (model.producer_name, model.producer_version) == ("nativesd", nativesd.__version__)
    assert found["nativesd"] == nativesd.__version__
    assert found["component"] == "unet"
    assert found["schema"] == file.schema.digest
    assert found["source_hash"] == "0123"
    slots = json.loads(found["slots"])
    assert slots["inputs"] == [str(slot) for slot in file.schema.inputs]
    assert "input_control_middle [batch, 64, ceil(h/2), ceil(w/2)] weights" in slots["inputs"]
    assert slots["outputs"] == ["out_sample [batch, 4, h, w] weights"]


# --- how they are made


def test_no_other_exporter_is_used() -> None:
    """Neither TorchScript nor the exporter built on it."""
    sources = [*(ROOT / "nativesd").rglob("*.py"), *(ROOT / "weightmaps").rglob("*.toml")]
    assert len(sources) > 60
    found = [path for path in sources if re.search(r"torch\.jit|dynamo=False", path.read_text())]
    assert found == []


def test_no_warning_is_hidden(exported: Export) -> None:
    """But for one logger's notes on packages that are not installed, and that only while an export runs."""
    silencers = r"filterwarnings|simplefilter|catch_warnings|logging\.disable|setLevel|NullHandler|redirect_std"
    export = (ROOT / "nativesd" / "export").glob("*.py")
    found = {path.name: re.findall(silencers, path.read_text()) for path in export}
    assert {name: hits for name, hits in found.items() if hits} == {"onnx.py": ["setLevel", "setLevel"]}
    exported("clip")
    assert logging.getLogger("torch.onnx._internal.exporter._registration").level == logging.NOTSET


def test_the_modules_are_as_before(exported: Export) -> None:
    """An export leaves nothing behind in what it traced."""
    graph, untouched = exported("sdxl").graph, module("sdxl")
    inputs = untouched.inputs(Request(1, 8, 8), torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(graph(*inputs)[0], untouched(*inputs)[0])
    assert not any("forward" in vars(part) for part in graph.modules())


# --- what cannot be


def test_opsets_and_names_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match="opset 17: 18 is the lowest, 25 the highest, and 23 is meant for this graph"):
        export_onnx(module("clip"), path, opset=17)
    with pytest.raises(UsageError, match="one vector y in place of text_embeds"):
        export_onnx(module("sdxl"), path, names="comfyui")
    with pytest.raises(UsageError, match="names of streamdiffusion are those of a UNet"):
        export_onnx(module("clip"), path, names="streamdiffusion")
    assert not any(tmp_path.iterdir())


def test_inputs_that_do_not_fit(exported: Export) -> None:
    file = exported("sdxl")
    runner = file.runner()
    given = dict(zip([slot.name for slot in file.schema.inputs], file.graph.inputs(Request(2, 9, 8)), strict=True))
    with pytest.raises(UsageError, match="unet: there is no input hint"):
        runner.run(given | {"hint": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"middle was given shape \(2, 64, 4, 4\), and .* needs \(2, 64, 5, 4\)"):
        runner.run(given | {"input_control_middle": torch.zeros(2, 64, 4, 4)})
    with pytest.raises(UsageError, match="unet: time_ids was given nothing"):
        runner.run({name: tensor for name, tensor in given.items() if name != "time_ids"})


def copy(file: Exported, folder: Path) -> Path:
    for path in (file.path, Path(f"{file.path}.data")):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / file.path.name


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


BROKEN: dict[str, Callable[[Path], object]] = {
    "not there": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("an error page"),
    "truncated": cut,
    "weights not there": lambda path: Path(f"{path}.data").unlink(),
    "weights truncated": lambda path: cut(Path(f"{path}.data")),
}
Open = Callable[[Path, Schema], Runner]


def by_openvino(path: Path, schema: Schema) -> Runner:
    pytest.importorskip("openvino", reason='needs pip install ".[openvino]"')
    return OpenVinoRunner(path, schema, torch.float32, torch.float32)


BACKENDS: dict[str, Open] = {
    "onnx": lambda path, schema: OnnxRunner(path, schema, torch.float32, CPU),
    "openvino": by_openvino,
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_files(backend: str, damage: str, exported: Export, tmp_path: Path) -> None:
    file = exported("clip")
    path = copy(file, tmp_path)
    BROKEN[damage](path)
    with pytest.raises(SourceError) as refusal:
        BACKENDS[backend](path, file.schema)
    message = str(refusal.value)
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_another_component(backend: str, exported: Export) -> None:
    for name, other in (("clip", "openclip"), ("vae_decoder", "vae_encoder"), ("sdxl", "controlnet")):
        with pytest.raises(SourceError, match=r"model.onnx is not a graph of this \w+: .*; export it again"):
            BACKENDS[backend](exported(name).path, module(other).schema)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_another_dtype(backend: str, exported: Export) -> None:
    """The schema is the same, so that the file's own types have to be looked at."""
    file = exported(*HALVED[:3])
    with pytest.raises(SourceError, match=r"model.onnx computes in float16, not in float32: export it again"):
        BACKENDS[backend](file.path, file.schema)


class Answers:
    """A runner whose outputs are what a function makes of PyTorch's."""

    def __init__(self, graph: Graph, change: Callable[[Tensor], Tensor]) -> None:
        self.graph = graph
        self.schema = graph.schema
        self.change = change

    def refusal(self, request: Request) -> str | None:
        return None

    @torch.inference_mode()
    def run(self, given: Any) -> dict[str, Tensor]:
        outputs = self.graph(*(given[slot.name] for slot in self.schema.inputs))
        return {slot.name: self.change(each) for slot, each in zip(self.schema.outputs, outputs, strict=True)}

    def close(self) -> int:
        return 0


VERDICTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda x: x * torch.nan, "the text encoder gives NaN or nothing but zeros at 2x1x1, 77 tokens: do not use"),
    "infinite": (lambda x: x / 0, "gives NaN or nothing but zeros"),
    "black": (torch.zeros_like, "gives NaN or nothing but zeros"),
    "off": (
        lambda x: x * 1.001,
        r"the text encoder is off from float32 by 1\.0e-03 at .*, "
        r"and 1e-05 is the tolerance \(PyTorch's own error is 0\.0e\+00\)",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_check_finds_what_is_wrong(case: str) -> None:
    change, sentence = VERDICTS[case]
    graph = module("clip")
    with pytest.raises(NativesdError, match=sentence):
        require(compare(graph, Answers(graph, change), [Request(2, 1, 1)]), 1e-5, "the text encoder")
    assert require(compare(graph, Answers(graph, torch.clone), [Request(2, 1, 1)]), 1e-5, "it") == 0.0


def test_a_half_precision_graph_may_be_off_as_far_as_torch_is() -> None:
    """Where attention is sharp, torch's own half precision is further from float32 than the usual tolerance."""
    fine, off = (Comparison(Request(1, 8, 8), "", error, own) for error, own in ((1.5e-2, 1.9e-2), (1.5e-2, 1e-3)))
    assert require([fine], TOLERANCES[HALF], "it") == 1.5e-2
    with pytest.raises(NativesdError, match=r"off from float32 by 1.5e-02 .* 5e-03 is the tolerance .* 1.0e-03\)"):
        require([off], TOLERANCES[HALF], "it")
    assert require([off], TOLERANCES[HALF], "it", tolerance=2e-2) == 1.5e-2
    with pytest.raises(NativesdError, match="1e-03 is the tolerance"):
        require([fine], TOLERANCES[HALF], "it", tolerance=1e-3)


def test_half_precision_is_compared_with_float32() -> None:
    graph = module("sd21", HALF)
    with torch.no_grad():
        for part in graph.module.modules():
            if isinstance(part, Attention):
                part.to_q.weight.mul_(30)
    request = Request(1, 9, 7)
    exact = Graph(deepcopy(graph.module).float(), graph.schema)
    for reference in references(graph, [request]):
        inputs = [tensor.float() for tensor in reference.inputs]
        with torch.inference_mode():
            [expected], [own] = exact(*inputs), graph(*reference.inputs)
        assert torch.equal(reference.expected[0], expected)
        assert reference.own == difference(own.float(), expected) > TOLERANCES[HALF]
