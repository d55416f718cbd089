"""Whole pictures by exported graphs: the embedded model on ONNX Runtime and OpenVINO, and what PyTorch has to do."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

import nativesd
from nativesd.config import AdapterStage, Level, T2IAdapterConfig, TextTime, UNetConfig
from nativesd.diffusion.control import ControlModel
from nativesd.errors import SourceError, UsageError
from nativesd.export import library
from nativesd.export.accelerate import AcceleratedUNet, Delegate, accelerate_module, fetch
from nativesd.export.kept.store import Store
from nativesd.export.slots import Request, Schema, unet_schema
from nativesd.models.clip import TextEncoder
from nativesd.models.controlnet import ControlNet
from nativesd.models.t2i_adapter import T2IAdapter
from nativesd.models.unet import ImageContext, UNet
from nativesd.models.vae import VAE
from nativesd.pipeline import acceleration
from nativesd.pipeline.acceleration import accelerate
from nativesd.pipeline.asked.arguments import split
from oracles import draw, on_one_thread

pytest.importorskip("onnxruntime", reason='needs pip install ".[onnx]"')

PROMPT = "a fox on a yellow background"
BOUND = 2  # of 255


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Everything here is too small to share out; on a busy machine threads only wait for each other."""
    with on_one_thread():
        yield


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Path:
    return tiny_store


@pytest.fixture(scope="module")
def plain() -> nativesd.Pipeline:
    return nativesd.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def fast(store: Path) -> nativesd.Pipeline:
    """With everything accelerated; the graphs are made here."""
    out = nativesd.load("tiny", device="cpu", backend="onnx", engines=store)
    out(PROMPT, steps=1, control=[nativesd.Control("tiny", hint())])  # the ControlNet's, as it is named
    return out


@pytest.fixture(scope="module")
def by_openvino(fast: nativesd.Pipeline, store: Path) -> nativesd.Pipeline:
    """From the files that ONNX Runtime has: nothing is exported."""
    pytest.importorskip("openvino", reason='needs pip install ".[openvino]"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "export_onnx", None)
        out = nativesd.load("tiny", device="cpu", backend="openvino", engines=store)
        out(PROMPT, steps=1, control=[nativesd.Control("tiny", hint())])
    return out


@contextmanager
def no_warning() -> Iterator[None]:
    """PyTorch running something instead would be warned of. What torch's exporter says of torch's own code may pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield


def hint() -> Image.Image:
    """Edges of a ball on a line."""
    out = Image.new("RGB", (64, 64))
    ImageDraw.Draw(out).ellipse((18, 14, 46, 42), outline="white")
    ImageDraw.Draw(out).line((0, 50, 63, 50), fill="white")
    return out


def apart(first: nativesd.Result, second: nativesd.Result) -> int:
    """The largest difference of any pixel of any picture, of 255."""
    pairs = zip(first.images, second.images, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)


CASES: dict[str, dict[str, Any]] = {
    "a prompt": {"steps": 5},
    "controlled": {"steps": 5, "control": [nativesd.Control("tiny", hint())]},
    "controlled twice, for a while": {
        "steps": 5,
        "control": [
            nativesd.Control("tiny", hint(), scale=0.8, end=0.7),
            nativesd.Control("tiny", hint().rotate(90), scale=0.3, start=0.3),
        ],
        "guess_mode": True,
    },
    "from a picture": {"steps": 5, "image": hint(), "strength": 0.6},
    "repainted": {"steps": 3, "image": hint(), "mask": Image.linear_gradient("L").resize((64, 64))},
    "odd cells": {"steps": 2, "width": 76, "height": 84},
    "clip skip": {"steps": 3, "clip_skip": 2},
    "several chunks": {"steps": 3, "prompt": f"{PROMPT} BREAK a small red ball", "negative_prompt": "blue"},
    "several pictures": {"steps": 3, "num_images": 3},
    "one at a time": {"steps": 3, "guidance_scale": 1.0},
    "a second pass": {"steps": 3, "hires": 1.5},
}


def both(
    plain: nativesd.Pipeline, other: nativesd.Pipeline, monkeypatch: pytest.MonkeyPatch, case: str
) -> tuple[nativesd.Result, nativesd.Result]:
    """A case's pictures by both; PyTorch's modules are not to run for the other."""
    options = {"prompt": PROMPT, "seed": 3, **CASES[case]}
    expected = plain(**options)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("PyTorch ran a module that has a graph")

    for kind, name in ((UNet, "forward"), (ControlNet, "forward"), (TextEncoder, "forward"), (VAE, "encode")):
        monkeypatch.setattr(kind, name, never)
    monkeypatch.setattr(VAE, "decode", never)
    with no_warning():
        return expected, other(**options)


@pytest.mark.parametrize("case", CASES)
def test_the_same_pictures(
    case: str, plain: nativesd.Pipeline, fast: nativesd.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = both(plain, fast, monkeypatch, case)
    assert all(np.asarray(picture).std() > 10 for picture in expected.images)
    assert apart(expected, found) <= BOUND


def test_control_steers_accelerated_pictures(fast: nativesd.Pipeline) -> None:
    """So that equality with PyTorch's is not that of two pictures without control."""
    control = [nativesd.Control("tiny", hint())]
    assert apart(fast(PROMPT, steps=5, seed=3), fast(PROMPT, steps=5, seed=3, control=control)) > 50


@pytest.mark.parametrize("case", ["a prompt", "controlled", "from a picture", "odd cells", "clip skip"])
def test_the_same_pictures_by_openvino(
    case: str, plain: nativesd.Pipeline, by_openvino: nativesd.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 only the order of sums differs: the same bound."""
    expected, found = both(plain, by_openvino, monkeypatch, case)
    assert apart(expected, found) <= BOUND


@pytest.mark.full
@pytest.mark.parametrize("case", ["a prompt", "controlled"])
def test_bfloat16_by_openvino(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """bfloat16 has 8 bits, and rounds at other places here and there: pictures are alike, no more."""
    pytest.importorskip("openvino", reason='needs pip install ".[openvino]"')
    half = nativesd.load("tiny", device="cpu", dtype="bfloat16")
    other = half.accelerate("openvino", engines=tmp_path)
    other(PROMPT, steps=1, control=[nativesd.Control("tiny", hint())])
    expected, found = both(half, other, monkeypatch, case)
    pairs = zip(expected.images, found.images, strict=True)
    means = [np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean() for a, b in pairs]
    assert max(means) <= 8


# --- what is kept


def test_graphs_are_made_once(fast: nativesd.Pipeline, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast(PROMPT, steps=1, control=[nativesd.Control("tiny", hint())])
    names = {path.name.partition("__")[0] for path in store.iterdir() if path.is_dir()}
    assert names == {"text_encoder", "unet", "controlnet", "vae_encoder", "vae_decoder"}
    monkeypatch.setattr(library, "export_onnx", None)
    again = nativesd.load("tiny", device="cpu", backend="onnx", engines=store)
    options: dict[str, Any] = {"seed": 1, "steps": 2, "control": [nativesd.Control("tiny", hint())]}
    assert apart(again(PROMPT, **options), fast(PROMPT, **options)) == 0


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_a_damaged_graph_is_refused(
    damage: str, plain: nativesd.Pipeline, fast: nativesd.Pipeline, store: Path, tmp_path: Path
) -> None:
    assert fast.acceleration is not None  # its graphs are in the store
    [entry] = store.glob("text_encoder__*")
    copy = tmp_path / entry.name
    shutil.copytree(entry, copy)
    weights = copy / "model.onnx.data"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "missing":
            weights.unlink()
        case _:
            (copy / "manifest.json").write_text("{")
    with pytest.raises(SourceError, match=r"is damaged \(.*remove it, or run nativesd engines prune") as refusal:
        plain.accelerate("onnx", engines=tmp_path, components=["text_encoder"])
    assert str(copy) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_given_pipeline_stays(plain: nativesd.Pipeline, store: Path) -> None:
    """The accelerated one has its weights, not copies."""
    before = plain(PROMPT, steps=2, seed=1)
    other = plain.accelerate("onnx", engines=store)
    assert (type(plain.unet), plain.acceleration) == (UNet, None)
    assert isinstance(other.unet, AcceleratedUNet)
    assert [p.data_ptr() for p in other.unet.parameters()] == [p.data_ptr() for p in plain.unet.parameters()]
    assert apart(before, plain(PROMPT, steps=2, seed=1)) == 0


def test_close(plain: nativesd.Pipeline, store: Path) -> None:
    """It gives the zeros of unused slots back, whose size is known; PyTorch's pipeline has nothing to give."""
    other = plain.accelerate("onnx", engines=store)
    other(PROMPT, steps=1, guidance_scale=1.0)
    slots = [slot for slot in unet_schema(plain.unet.config).inputs if slot.is_optional]
    assert other.close() == 4 * sum(int(np.prod(slot.shape(Request(1, 16, 16)))) for slot in slots)
    assert other.close() == 0
    with pytest.raises(UsageError, match="graph was closed: load it again"):
        other(PROMPT, steps=1)
    assert plain.close() == 0
    assert plain(PROMPT, steps=1).images


# --- what PyTorch runs


def part(pipe: nativesd.Pipeline, store: Path, *components: str) -> nativesd.Pipeline:
    """With these components accelerated alone, so that what PyTorch runs instead gives its very pictures."""
    return pipe.accelerate("onnx", engines=store, components=components)


def warned(call: Callable[[], nativesd.Result], *sentences: str) -> nativesd.Result:
    """What a call returns that warns with these sentences, in any order, and of nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = call()
    assert sorted(str(warning.message) for warning in caught) == sorted(sentences)
    return out


def test_t2i_adapters(plain: nativesd.Pipeline, store: Path) -> None:
    other = part(plain, store, "unet")
    stages = (AdapterStage(64, False), AdapterStage(144, False), AdapterStage(224, True))
    with torch.device("meta"):
        module = T2IAdapter(T2IAdapterConfig(stages, layers=1))
    draw(module, 0)
    options: dict[str, Any] = {"steps": 3, "seed": 1}
    adapted = {**options, "control": [nativesd.Control(ControlModel("adapter", module), hint(), scale=0.1)]}
    sentence = "unet: exported UNets have no inputs for a T2I-Adapter's features: PyTorch runs it instead"
    expected = plain(PROMPT, **adapted)
    assert apart(expected, warned(lambda: other(PROMPT, **adapted), sentence)) == 0
    assert apart(expected, warned(lambda: other(PROMPT, **adapted))) == 0  # warned of once
    with no_warning():
        without = other(PROMPT, **options)
    assert apart(plain(PROMPT, **adapted), without) > 0
    assert apart(plain(PROMPT, **options), without) <= BOUND


@pytest.mark.usefixtures("fast")
def test_tiling(plain: nativesd.Pipeline, store: Path) -> None:
    """Graphs do not go around: whatever has one is PyTorch's where a call asks for that, and says so."""
    other = part(plain, store, "vae", "controlnet")
    options: dict[str, Any] = {"steps": 2, "seed": 1, "image": hint(), "strength": 0.9, "tiling": "xy"}
    options["control"] = [nativesd.Control("tiny", hint(), scale=0.5)]
    said = "exported graphs do not go around, and tiling asks for it: PyTorch runs it instead"
    found = warned(
        lambda: other(PROMPT, **options), *(f"{name}: {said}" for name in ("vae_encoder", "vae_decoder", "controlnet"))
    )
    assert apart(plain(PROMPT, **options), found) == 0


def test_textual_inversions(plain: nativesd.Pipeline, store: Path, tmp_path: Path) -> None:
    width = plain.text_encoders[0].config.width
    save_file(
        {"emb_params": torch.randn(2, width, generator=torch.Generator().manual_seed(0))}, tmp_path / "it.safetensors"
    )
    pipe = nativesd.load("tiny", device="cpu")
    pipe.load_embedding(tmp_path / "it.safetensors")
    other = part(pipe, store, "text_encoder")
    options: dict[str, Any] = {"steps": 3, "seed": 1, "guidance_scale": 1.0}
    sentence = (
        "text_encoder: exported text encoders take tokens, and a textual inversion is none: PyTorch runs it instead"
    )
    expected = pipe("it on a yellow background", **options)
    assert apart(expected, warned(lambda: other("it on a yellow background", **options), sentence)) == 0
    with no_warning():
        assert apart(pipe(PROMPT, **options), other(PROMPT, **options)) <= BOUND


def lora_file(pipe: nativesd.Pipeline, path: Path, seed: int) -> Path:
    """Of the text encoder's first layer, in kohya's naming."""
    width, generator = pipe.text_encoders[0].config.width, torch.Generator().manual_seed(seed)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {
            f"{name}.lora_down.weight": torch.randn(4, width, generator=generator),
            f"{name}.lora_up.weight": torch.randn(pipe.text_encoders[0].config.mlp, 4, generator=generator) / 8,
        },
        path,
    )
    return path


CHANGED = "{}: other LoRAs are in the weights now than when its graph was made: PyTorch runs it instead"


def test_loras_after_acceleration(store: Path, tmp_path: Path) -> None:
    pipe = nativesd.load("tiny", device="cpu")
    first, second = (lora_file(pipe, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    other = part(pipe, store, "text_encoder", "unet")
    options: dict[str, Any] = {"steps": 3, "seed": 1}
    plainly = pipe(PROMPT, **options)
    expected = pipe(PROMPT, **options, loras=[first])
    sentence = CHANGED.format("text_encoder")  # the UNet's graph is still right
    assert apart(expected, warned(lambda: other(PROMPT, **options, loras=[first]), sentence)) <= BOUND
    assert apart(plainly, expected) > BOUND
    expected = pipe(PROMPT, **options, loras=[second])
    assert apart(expected, warned(lambda: other(PROMPT, **options, loras=[second]))) <= BOUND  # warned of once
    with no_warning():  # the graphs are right again
        assert apart(plainly, other(PROMPT, **options)) <= BOUND


def test_loras_before_acceleration(tmp_path: Path) -> None:
    """They are in the graph, which is another entry of the store."""
    pipe = nativesd.load("tiny", device="cpu")
    file = lora_file(pipe, tmp_path / "style.safetensors", 1)
    pipe.set_loras([file])
    other = part(pipe, tmp_path / "store", "text_encoder")
    options: dict[str, Any] = {"steps": 3, "seed": 1}
    expected = pipe(PROMPT, **options, loras=[file])
    with no_warning():
        assert apart(expected, other(PROMPT, **options, loras=[file])) <= BOUND
    plainly = pipe(PROMPT, **options)
    assert apart(plainly, expected) > BOUND
    assert apart(plainly, warned(lambda: other(PROMPT, **options), CHANGED.format("text_encoder"))) == 0


def test_loras_named_at_load_are_in_the_graph(store: Path, tmp_path: Path) -> None:
    """Of every call that names none, and by --lora too: the command line loads with them."""
    pipe = nativesd.load("tiny", device="cpu")
    file = lora_file(pipe, tmp_path / "style.safetensors", 1)
    options: dict[str, Any] = {"steps": 2, "seed": 1}
    expected = pipe(PROMPT, **options, loras=[(file, 0.8)])
    assert apart(expected, nativesd.load("tiny", device="cpu", loras=[(file, 0.8)])(PROMPT, **options)) == 0
    loading, asked = split({"loras": [(file, 0.8)], "backend": "onnx", "engines": store, "device": "cpu", **options})
    assert "loras" not in asked
    with no_warning():
        other = nativesd.load("tiny", **loading)
        assert apart(expected, other(PROMPT, **asked)) <= BOUND
    plainly = warned(lambda: other(PROMPT, **options, loras=[]), CHANGED.format("text_encoder"))
    assert apart(pipe(PROMPT, **options), plainly) <= BOUND
    assert plainly.parameters.get("loras") is None


def test_loras_later_with_refit(tmp_path: Path) -> None:
    """Their graphs are made, and found when they come again."""
    store = tmp_path / "graphs"
    pipe = nativesd.load("tiny", device="cpu")
    file = lora_file(pipe, tmp_path / "style.safetensors", 1)
    other = pipe.accelerate("onnx", engines=store, components=["text_encoder"], refit=True)
    options: dict[str, Any] = {"steps": 2, "seed": 1}
    graphs = len(list(store.glob("text_encoder__*")))
    for loras in ([(file, 0.8)], [], [(file, 0.8)]):
        expected = pipe(PROMPT, **options, loras=loras)
        with no_warning():
            assert apart(expected, other(PROMPT, **options, loras=loras)) <= BOUND
    assert len(list(store.glob("text_encoder__*"))) == graphs + 1
    assert other(PROMPT, **options).images
    with torch.no_grad():
        pipe.text_encoders[0].final_norm.weight.mul_(1.5)
    expected = pipe(PROMPT, **options)
    found = warned(lambda: other(PROMPT, **options), WRITTEN.format("text_encoder", "final_norm.weight"))
    assert apart(expected, found) == 0


WRITTEN = "{}: its weights were written to ({}) after its graph was made: accelerate it again: PyTorch runs it instead"


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_weights_that_are_written_to_are_noticed(component: str, store: Path, tmp_path: Path) -> None:
    pipe = nativesd.load("tiny", device="cpu", fast=False)
    file = lora_file(pipe, tmp_path / "style.safetensors", 1)
    other = part(pipe, store, component)
    options: dict[str, Any] = {"steps": 2, "seed": 1}
    pipe(PROMPT, **options, loras=[file])
    with no_warning():  # LoRAs that came and went leave the weights as they were
        assert apart(pipe(PROMPT, **options), other(PROMPT, **options)) <= BOUND
    module = {"text_encoder": pipe.text_encoders[0], "unet": pipe.unet, "vae": pipe.vae}[component]
    name, weight = list(module.named_parameters())[-1]
    with torch.no_grad():
        weight.add_(0.1)
    label = "vae_decoder" if component == "vae" else component
    expected = pipe(PROMPT, **options)
    found = warned(lambda: other(PROMPT, **options), WRITTEN.format(label, name))
    assert apart(expected, found) == 0


def test_what_weights_are_called_does_not_depend_on_merged_numbers(tmp_path: Path) -> None:
    """Half precision rounds a merge differently on different devices: the files and scales are what counts."""
    pipe = nativesd.load("tiny", device="cpu")
    encoder, merged = pipe.text_encoders[0], pipe.lora_state
    first, second = (lora_file(pipe, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    names = {}
    for label, loras in {"none": [], "one": [first], "weaker": [(first, 0.5)], "other": [second]}.items():
        pipe.set_loras(loras)
        names[label] = library.weights_name(encoder, merged)
        assert library.weights_name(pipe.unet, merged) == library.weights_hash(pipe.unet)  # none of them is in it
        if loras:
            assert merged is not None
            [touched] = merged.touched["text_encoder"]
            encoder.get_parameter(touched).data.view(torch.int32).add_(1)  # as if rounded elsewhere
            assert library.weights_name(encoder, merged) == names[label]
    assert len(set(names.values())) == 4
    pipe.set_loras([])
    assert library.weights_name(encoder, merged) == names["none"] == library.weights_hash(encoder)


def test_a_vae_that_goes_to_another_dtype(store: Path) -> None:
    """As one does that overflows in half precision."""
    pipe = nativesd.load("tiny", device="cpu")
    other = part(pipe, store, "vae")
    latents = torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with no_warning():
            graph = other.vae.decode(latents)
        other.vae.double()
        sentence = "its weights are torch.float64 now, and the graph's are torch.float32: PyTorch runs it instead"
        with pytest.warns(UserWarning, match=f"vae_decoder: {sentence}"):
            found = other.vae.decode(latents.double())
        assert torch.equal(found, pipe.vae.decode(latents.double()))
        assert torch.allclose(found, graph.double(), atol=1e-4)
        with pytest.warns(UserWarning, match=f"vae_encoder: {sentence}"):
            other.vae.encode(found)
        other.vae.float()
        with no_warning():
            assert torch.equal(other.vae.decode(latents), graph)


class Recorder:
    """A runner that notes what it is given, and refuses large requests."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.given: list[set[str]] = []

    def refusal(self, request: Request) -> str | None:
        return f"no profile has {request}" if request.height > 16 else None

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.given.append(set(given))
        return {"out_sample": torch.zeros(given["encoder_hidden_states"].shape[0], *given["sample"].shape[1:])}

    def close(self) -> int:
        return 0


def small_unet() -> UNet:
    levels = (Level(32, (1,), (1, 1), 2), Level(32, (None,), (None, None), 2))
    with torch.device("meta"):
        out = UNet(UNetConfig(levels, (1,), context=8, groups=8))
    draw(out, 0)
    return out


@torch.inference_mode()
def test_a_runner_is_asked_whether_it_can() -> None:
    """Every reason not to is warned of once, and another one again."""
    module = small_unet()
    runner, stale = Recorder(unet_schema(module.config)), [""]
    other = accelerate_module(module, {"unet": Delegate("unet", runner, lambda: stale[0] or None)})

    def run(side: int) -> Tensor:
        latents, context = torch.ones(1, 4, side, 8), torch.ones(2, 77, 8)
        out: Tensor = other(latents, 5.0, context)
        assert torch.equal(out, module(latents, 5.0, context)) == (len(runner.given) == 0)
        runner.given.clear()
        return out

    with no_warning():
        assert run(8).shape == (2, 4, 8, 8)
    with pytest.warns(UserWarning, match="unet: no profile has 2x24x8, 77 tokens: PyTorch runs it instead"):
        run(24)
    with no_warning():
        run(24)
    with pytest.warns(UserWarning, match="no profile has 2x32x8"):
        run(32)
    stale[0] = "the weather changed"
    with pytest.warns(UserWarning, match="unet: the weather changed: PyTorch runs it instead"):
        run(8)
    stale[0] = ""
    with no_warning():
        run(8)


@torch.inference_mode()
def test_graphs_without_slots_take_no_control() -> None:
    module = small_unet()
    runner = Recorder(unet_schema(module.config, control=False))
    other = accelerate_module(module, {"unet": Delegate("unet", runner, lambda: None)})
    latents, context = torch.ones(1, 4, 8, 8), torch.ones(1, 77, 8)
    residuals = [torch.ones(shape) for shape in module.residual_shapes(1, 8, 8)]
    with pytest.warns(UserWarning, match="this graph was exported without control slots: PyTorch runs it instead"):
        found = other(latents, 5.0, context, residuals=residuals)
    assert torch.equal(found, module(latents, 5.0, context, residuals=residuals))
    assert runner.given == []
    other(latents, 5.0, context)
    assert runner.given == [{"sample", "timestep", "encoder_hidden_states"}]


@torch.inference_mode()
def test_inputs_come_in_the_graphs_dtype() -> None:
    """LCM's guidance embedding and SDXL's pooled text come in float32, and half precision's engines refuse that."""
    levels = (Level(32, (1,), (1, 1), 2), Level(32, (None,), (None, None), 2))
    with torch.device("meta"):
        module = UNet(UNetConfig(levels, (1,), context=8, groups=8, guidance=16, added=TextTime(8, 6, 8)))
    draw(module, 0)
    module.half()
    seen: dict[str, torch.dtype] = {}

    class Runner(Recorder):
        def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
            seen.update({name: tensor.dtype for name, tensor in given.items()})
            return super().run(given)

    runner = Runner(unet_schema(module.config))
    other = accelerate_module(module, {"unet": Delegate("unet", runner, lambda: None, dtype=torch.float16)})
    rows = torch.ones(1, 4, 8, 8).half()
    residuals = [torch.ones(shape) for shape in module.residual_shapes(1, 8, 8)]
    keys = {32: torch.ones(len(module.config.cross_attentions), 1, 1, 4, 32)}
    added: dict[str, Any] = {"guidance": torch.ones(1, 16), "pooled": torch.ones(1, 8), "time_ids": torch.ones(1, 6)}
    other(rows, 5.0, torch.ones(1, 77, 8), residuals=residuals, images=ImageContext(keys, keys), **added)
    exact = {"timestep", "time_ids"}
    assert {name: torch.float32 if name in exact else torch.float16 for name in seen} == seen
    assert seen.keys() == {slot.name for slot in runner.schema.inputs}


def test_weights_stay_away_while_engines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go to main memory when all of a module has engines, and come back when PyTorch has to run it."""
    module, moves = small_unet(), list[str]()
    monkeypatch.setattr(UNet, "to", lambda self, device: moves.append(str(device)))
    monkeypatch.setattr(acceleration, "engine_runner", lambda *_, **__: Recorder(unet_schema(module.config)))
    monkeypatch.setattr(acceleration, "Arena", lambda queue: None)
    monkeypatch.setattr(acceleration, "CudaQueue", lambda device: None)
    graphs = acceleration.Acceleration("tensorrt-rtx", Store("nowhere"), torch.device("cuda"), "sd2")
    other = graphs.module("unet", module, ["unet"], away=True)
    assert moves == ["cpu"]
    with torch.inference_mode():
        other(torch.ones(1, 4, 8, 8), 5.0, torch.ones(1, 77, 8))
        assert moves == ["cpu"]
        fetch(module, torch.device("meta"))
    assert moves == ["cpu", "meta"]


# --- what cannot be


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "onyx"}, "backend must be one of cudagraphs, onnx, openvino, tensorrt, tensorrt-rtx, not 'onyx'"),
        ({"backend": "onnx", "offload": True}, "offload moves modules between devices"),
        ({"backend": "onnx", "dtype": "bfloat16"}, r"does not compute in bfloat16 on a CPU: load with dtype='float32'"),
        ({"backend": "tensorrt"}, "TensorRT engines run on a GPU, and the model is on cpu: load it with device='cuda'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_backends_that_cannot_be(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        nativesd.load("tiny", device="cpu", engines=tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_components_that_cannot_be(plain: nativesd.Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no component decoder: there are text_encoder, unet,"):
        accelerate(plain, "onnx", engines=tmp_path, components=["decoder"])
    with pytest.raises(UsageError, match="a Linear has no exported form"):
        accelerate_module(nn.Linear(1, 1), {})


def test_a_backend_that_is_not_installed(
    plain: nativesd.Pipeline, fast: nativesd.Pipeline, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fast.acceleration is not None  # its graphs are in the store
    for module, name in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(UsageError, match=rf'{module} is not installed .*: pip install "\.\[{name}\]"'):
            plain.accelerate(name, engines=store, components=["text_encoder"])  # type: ignore[arg-type]
