"""TensorRT-RTX engines, built without a GPU at small widths. Only the tests with the marker gpu execute any."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from nativesd.config import (
    Config,
    ControlNetConfig,
    Level,
    TextEncoderConfig,
    TextTime,
    UNetConfig,
    VAEConfig,
)
from nativesd.errors import SourceError, UsageError
from nativesd.export.capture import CudaQueue
from nativesd.export.graphs import graph_of
from nativesd.export.kept.entries import Key
from nativesd.export.kept.store import Store
from nativesd.export.onnx import export_onnx
from nativesd.export.slots import Component, Request, Schema, unet_schema
from nativesd.export.tensorrt import build as building_module
from nativesd.export.tensorrt import loading, product
from nativesd.export.tensorrt.build import Built, Progress, build_engine
from nativesd.export.tensorrt.engine import Arena
from nativesd.export.tensorrt.engines import opset_for
from nativesd.export.tensorrt.loading import load_engine
from nativesd.export.tensorrt.product import (
    DTYPES,
    ENGINE,
    MODULES,
    RTX_TARGETS,
    backend_for,
    backend_version,
    device_target,
    load_backend,
    parse_target,
    slot_dtype,
    targets_of,
    why_not_on,
)
from nativesd.export.tensorrt.profiles import Profile, ready_profile
from nativesd.models.build import build
from oracles import draw

rtx = pytest.importorskip("tensorrt_rtx", reason='needs TensorRT-RTX: pip install ".[tensorrt-rtx]"')


def encoder(config: UNetConfig) -> ControlNetConfig:
    levels = tuple(replace(level, up=()) for level in config.levels)
    return ControlNetConfig(replace(config, levels=levels), hint_widths=(8, 8, 16, 16))


# heads of 40, 80 and 160 as in SD1.5, 64 as in the others; two levels of three or four
UNETS = {
    "sd15": UNetConfig(
        (Level(80, (1,), (1, 1), 2), Level(160, (1,), (1, 1), 1)), mid=(1, None), context=64, groups=16
    ),
    "sd21": UNetConfig(
        (Level(64, (1,), (1, 1), 1), Level(128, (None,), (None, None), 2)), mid=(1, None), context=64,
        linear_projection=True,
    ),
    "sdxl": UNetConfig(
        (Level(64, (None,), (None, None), 1), Level(128, (2,), (2, 2), 2)), mid=(2, None), context=96,
        linear_projection=True, added=TextTime(48, 6, 16),
    ),
}  # fmt: skip
CONFIGS: dict[tuple[str, Component], Config] = {
    **{(family, "unet"): config for family, config in UNETS.items()},
    **{(family, "controlnet"): encoder(config) for family, config in UNETS.items()},
    ("sd", "vae_decoder"): VAEConfig(widths=(16, 16, 32, 32), layers=1, groups=8),
    ("sd", "vae_encoder"): VAEConfig(widths=(16, 16, 32, 32), layers=1, groups=8),
    ("sd15", "text_encoder"): TextEncoderConfig(128, 2, 2, 256, "quick_gelu"),
    ("sd21", "text_encoder"): TextEncoderConfig(128, 2, 2, 256, "gelu"),
    ("sdxl", "text_encoder"): TextEncoderConfig(
        128, 2, 2, 256, "gelu", projection=128, hidden=-2, hidden_norm=False
    ),
}  # fmt: skip
BY_DEFAULT = {
    ("sd21", "unet"),
    ("sd21", "controlnet"),
    ("sd", "vae_decoder"),
    ("sd", "vae_encoder"),
    ("sdxl", "text_encoder"),
}
FORMS = [form if form in BY_DEFAULT else pytest.param(*form, marks=pytest.mark.full) for form in CONFIGS]
SMALLEST: tuple[str, Component] = ("sd", "vae_encoder")

Export = Callable[[str, Component], tuple[Path, Schema]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Every component is exported once."""

    @functools.cache
    def export(family: str, component: Component) -> tuple[Path, Schema]:
        part = build(CONFIGS[family, component])
        draw(part, seed=0)
        graph = graph_of(part.half(), component)
        path = tmp_path_factory.mktemp(f"{family}-{component}") / "model.onnx"
        export_onnx(graph, path)
        return path, graph.schema

    return export


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the builder was given when it built: the network's tensors, and the profiles."""
    seen = SimpleNamespace(inputs={}, outputs={}, profiles=[], flags=set(), targets=[])

    class Spy(rtx.Builder):
        def create_optimization_profile(self) -> Any:
            seen.profiles.append(super().create_optimization_profile())
            return seen.profiles[-1]

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            for tensors, count, get in (
                (seen.inputs, network.num_inputs, network.get_input),
                (seen.outputs, network.num_outputs, network.get_output),
            ):
                tensors.update({get(i).name: (get(i).dtype.name, tuple(get(i).shape)) for i in range(count)})
            seen.flags = {
                name for name in rtx.BuilderFlag.__members__ if config.get_flag(getattr(rtx.BuilderFlag, name))
            }
            seen.targets = [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)]
            return super().build_serialized_network(network, config)

    monkeypatch.setattr(rtx, "Builder", Spy)
    return seen


def make(path: Path, schema: Schema, folder: Path, names: tuple[str, ...] = ("512",), **options: Any) -> Built:
    profiles = [ready_profile(name, schema.component, native=512) for name in names]
    defaults = {"backend": "tensorrt-rtx", "dtype": torch.float16, "targets": ("sm120",)}
    return build_engine(path, folder / ENGINE, schema, profiles, **(defaults | options))


def check_read_back(seen: SimpleNamespace, schema: Schema, built: Built) -> None:
    assert [name.lower() for name in seen.targets] == list(built.targets)
    for slots, found in ((schema.inputs, seen.inputs), (schema.outputs, seen.outputs)):
        assert found == {
            slot.name: (
                DTYPES[slot_dtype(slot, torch.float16)],
                tuple(axis if isinstance(axis, int) else -1 for axis in slot.axes),
            )
            for slot in slots
        }
    assert len(seen.profiles) == len(built.profiles)
    for theirs, profile in zip(seen.profiles, built.profiles, strict=True):
        for slot in schema.inputs:
            shapes = [tuple(shape) for shape in theirs.get_shape(slot.name)]
            assert shapes == [slot.shape(request) for request in (profile.min, profile.opt, profile.max)]


@pytest.mark.parametrize(("family", "component"), FORMS)
def test_components_build_for_a_card_that_is_not_here(
    family: str, component: Component, exported: Export, seen: SimpleNamespace, tmp_path: Path
) -> None:
    path, schema = exported(family, component)
    built = make(path, schema, tmp_path)
    assert (built.size, built.targets) == ((tmp_path / ENGINE).stat().st_size, ("sm120",))
    check_read_back(seen, schema, built)


def test_one_engine_for_several_cards_and_profiles(exported: Export, seen: SimpleNamespace, tmp_path: Path) -> None:
    path, schema = exported(*SMALLEST)
    built = make(path, schema, tmp_path, ("512", "256to768-b2", "768x512"), targets=("sm89", "sm86"))
    assert (built.targets, len(built.profiles)) == (("sm86", "sm89"), 3)
    check_read_back(seen, schema, built)
    assert built.details()["profiles"][2]["max"] == {"batch": 1, "height": 64, "width": 96, "tokens": 231}


def test_a_unet_that_is_shown_pictures_builds_for_every_card(
    exported: Export, seen: SimpleNamespace, tmp_path: Path
) -> None:
    """Its inputs for image prompts are read back, from none to the most."""
    path, schema = exported("sd21", "unet")
    built = make(path, schema, tmp_path, targets=("sm86", "sm89", "sm120"))
    check_read_back(seen, schema, built)
    assert built.profiles[0].max.groups == 4
    assert seen.inputs["ip_keys_64"] == ("HALF", (3, -1, -1, -1, 64))


def test_weights_can_stay_on_the_host(exported: Export, seen: SimpleNamespace, tmp_path: Path) -> None:
    make(*exported(*SMALLEST), tmp_path, weight_streaming=True)
    assert "WEIGHT_STREAMING" in seen.flags
    assert "REQUIRE_USER_ALLOCATION" not in seen.flags  # TensorRT-RTX refuses both


def test_graphs_can_be_captured_and_float32_is_exact_unless_asked(
    exported: Export, seen: SimpleNamespace, tmp_path: Path
) -> None:
    """Nothing is allocated while an engine runs; and TF32, which the builder allows by default, is not used."""
    make(*exported(*SMALLEST), tmp_path)
    assert "REQUIRE_USER_ALLOCATION" in seen.flags
    assert not seen.flags & {"TF32", "WEIGHT_STREAMING"}
    make(*exported(*SMALLEST), tmp_path, tf32=True)
    assert "TF32" in seen.flags


def test_a_static_export_builds_for_its_one_size(seen: SimpleNamespace, tmp_path: Path) -> None:
    part = build(CONFIGS[SMALLEST])
    draw(part, seed=0)
    graph, request = graph_of(part.half(), "vae_encoder"), Request(1, 32, 24)
    export_onnx(graph, tmp_path / "model.onnx", static=request)
    options: dict[str, Any] = {"backend": "tensorrt-rtx", "dtype": torch.float16, "targets": ("sm120",)}
    files = (tmp_path / "model.onnx", tmp_path / ENGINE, graph.schema)
    build_engine(*files, [Profile("192x256", request, request, request)], **options)
    assert seen.inputs["sample"] == ("HALF", (1, 3, 256, 192))
    with pytest.raises(SourceError, match=r"sample is \[1, 3, 256, 192\], and not \[-1, 3, -1, -1\]"):
        build_engine(*files, [ready_profile("512", "vae_encoder", native=512)], **options)


def test_progress_is_nested_and_complete(exported: Export, tmp_path: Path) -> None:
    seen: list[Progress] = []
    make(*exported(*SMALLEST), tmp_path, on_progress=seen.append)
    outermost = [progress for progress in seen if len(progress.phases) == 1]
    assert [progress.step for progress in outermost] == list(range(len(outermost)))
    assert all(0 <= progress.step <= progress.steps for progress in seen)
    assert max(len(progress.phases) for progress in seen) > 2


def test_interrupting_a_build_leaves_nothing(
    exported: Export, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(*exported(*SMALLEST), tmp_path, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err


def test_the_targets_are_those_of_the_installed_version() -> None:
    assert targets_of("tensorrt-rtx") == RTX_TARGETS
    assert [backend_for(target) for target in ("sm120", "sm86", "sm90", "sm100")] == [
        "tensorrt-rtx", "tensorrt-rtx", "tensorrt", "tensorrt",
    ]  # fmt: skip


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such card": (
        {"targets": ("sm90",)},
        "cannot build for sm90 here, only for sm75, sm80, sm86, sm89, sm120, sm121",
    ),
    "no timing": ({"timing_cache": Path("cache")}, "has no timing cache"),
    "other dtype": ({"dtype": torch.float32}, "sample is HALF, and not FLOAT"),
    "other profile": ({"names": ("513",)}, "multiples of 8 pixels, and 513 is not"),
    "same profile": ({"names": ("512", "512")}, "profiles with names of their own, not 512, 512"),
    "no profile": ({"names": ()}, "profiles with names of their own, not none"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_built_is_one_sentence(case: str, exported: Export, tmp_path: Path) -> None:
    options, reason = BAD[case]
    with pytest.raises((UsageError, SourceError), match=reason):
        make(*exported(*SMALLEST), tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is refused where there is no GPU")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"targets": ()}, "no GPU here to build for: say for which, of sm75"),
    ],
)
def test_what_needs_a_gpu_says_so(options: dict[str, Any], reason: str, exported: Export, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        make(*exported(*SMALLEST), tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_profiles_have_to_be_in_order(exported: Export, tmp_path: Path) -> None:
    path, schema = exported(*SMALLEST)
    profile = Profile("odd", Request(1, 64, 64), Request(1, 32, 64), Request(1, 64, 64))
    with pytest.raises(UsageError, match="profile odd: sample would be from 512 to 512 and best at 256"):
        build_engine(
            path, tmp_path / ENGINE, schema, [profile], backend="tensorrt-rtx", dtype=torch.float16, targets=("sm120",)
        )


def test_the_graph_of_another_component_is_refused(exported: Export, tmp_path: Path) -> None:
    path, _ = exported(*SMALLEST)
    with pytest.raises(SourceError, match="has the inputs sample, and not sample, timestep, encoder_hidden_states"):
        make(path, unet_schema(UNETS["sd15"], control=False), tmp_path)


def test_what_the_parser_does_not_know_is_named(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Untold", ["x"], ["y"], name="the_node", domain="org.example")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([node], "graph", [x], [y])
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("org.example", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports), tmp_path / "model.onnx")
    with pytest.raises(SourceError, match=r"cannot be parsed by TensorRT-RTX .*: node the_node \(Untold\): "):
        make(tmp_path / "model.onnx", unet_schema(UNETS["sd15"]), tmp_path)


def test_files_that_are_missing_or_cut_off_are_named(exported: Export, tmp_path: Path) -> None:
    path, schema = exported(*SMALLEST)
    with pytest.raises(SourceError, match=r"nowhere.onnx cannot be read: No such file"):
        make(tmp_path / "nowhere.onnx", schema, tmp_path)
    shutil.copy(path, tmp_path / path.name)
    data = path.with_name(f"{path.name}.data").read_bytes()
    (tmp_path / f"{path.name}.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=r"cannot be parsed by TensorRT-RTX .*Failed to import initializer"):
        make(tmp_path / path.name, schema, tmp_path)
    (tmp_path / path.name).write_bytes(b"not a graph")
    with pytest.raises(SourceError, match=r"model.onnx"):
        make(tmp_path / path.name, schema, tmp_path)


def test_a_full_disk_is_one_sentence(exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ENGINE).symlink_to("/dev/full")
    with pytest.raises(SourceError, match="cannot be written: No space left on device"):
        make(*exported(*SMALLEST), tmp_path)
    assert list(tmp_path.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(building_module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(rtx, "Builder", None)  # it is said before anything is built
    with pytest.raises(SourceError, match=r"0.0 GB are free there, and the weights alone have 0.0"):
        make(*exported(*SMALLEST), tmp_path)


def test_too_little_memory_is_one_sentence(exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poor(rtx.Builder):
        def build_serialized_network(self, network: Any, config: Any) -> None:
            self.logger.log(rtx.ILogger.ERROR, "Error Code 1: Myelin (Unexpected exception std::bad_alloc In x at y)")

    monkeypatch.setattr(rtx, "Builder", Poor)
    with pytest.raises(UsageError, match=r"could not build model.onnx for sm120: it ran out of memory, so free some"):
        make(*exported(*SMALLEST), tmp_path)
    assert list(tmp_path.iterdir()) == []


KEY = Key(
    "unet", "sd21", "0123456789ab", "tensorrt-rtx", rtx.__version__, "sm120", "fp16", ("512",), "00000000", True,
    "0.1.0", "opset23",
)  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is refused where there is no driver")
def test_what_tensorrt_does_not_load_is_one_sentence(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, schema = exported(*SMALLEST)
    store = Store(tmp_path / "engines")
    with store.building(replace(KEY, slots=schema.digest)) as building:
        building.details |= make(path, schema, building.folder).details()
    [entry] = store.entries()
    monkeypatch.setattr(loading, "device_target", lambda device: "sm120")
    queue = SimpleNamespace(device=torch.device("cpu"), handle=0, use=nullcontext)
    with pytest.raises(
        SourceError, match=r"model.engine cannot be loaded by tensorrt_rtx .*CUDA driver version is insuff"
    ):
        load_engine(entry, schema, dtype=torch.float16, arena=Arena(queue))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [0, 8])
def test_engines_compute_what_torch_does(graphs: int, exported: Export, tmp_path: Path) -> None:
    """On any GPU whose backend is installed: control on and off, an odd size, results of the same call again."""
    queue = CudaQueue(torch.device("cuda"))
    target = device_target(queue.device)
    backend = backend_for(target)
    pytest.importorskip(MODULES[backend], reason=f"needs {backend} for {target}")
    path, schema = exported("sd21", "unet")
    store = Store(tmp_path / "engines")
    key = replace(KEY, slots=schema.digest, backend=backend, version=backend_version(backend), device=target)
    with store.building(replace(key, profiles=("128to512",))) as building:
        make(path, schema, building.folder, ("128to512",), backend=backend, targets=())
    [entry] = store.entries()
    runner = load_engine(entry, schema, dtype=torch.float16, arena=Arena(queue), graphs=graphs)
    part = build(CONFIGS["sd21", "unet"])
    draw(part, seed=0)
    graph = graph_of(part.half(), "unet").to(queue.device)
    generator = torch.Generator().manual_seed(0)
    for request in (Request(2, 32, 32), Request(1, 33, 27, 154)):
        for _ in range(3):
            drawn = [tensor.to(queue.device) for tensor in graph.inputs(request, generator)]
            for on in (1, 0):
                inputs = [x * on if slot.is_control else x for slot, x in zip(schema.inputs, drawn, strict=True)]
                given = {
                    slot.name: x for slot, x in zip(schema.inputs, inputs, strict=True) if on or not slot.is_control
                }
                with torch.no_grad():
                    [expected] = graph(*inputs)
                found = runner.run(given)["out_sample"]
                assert float((found - expected).abs().max() / expected.abs().max()) < 2e-2
    assert runner.close() > entry.size
    assert torch.isfinite(found).all()


def test_packages_that_are_not_there_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UsageError, match=r'^TensorRT is not installed: pip install "\.\[tensorrt\]"$'):
        load_backend("tensorrt")

    def broken(name: str) -> None:
        raise RuntimeError("libnvinfer.so.10: cannot open shared object file\nmore")

    monkeypatch.setattr(product.importlib, "import_module", broken)
    with pytest.raises(
        UsageError, match=r"cannot be imported \(libnvinfer.so.10: cannot open shared object file\): pip"
    ):
        load_backend("tensorrt")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TensorRT-RTX in TensorRT's place, whose builder has the same calls, and a GPU of the right kind."""
    monkeypatch.setattr(building_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(building_module, "load_backend", lambda backend: rtx)
    for each in (building_module, product):
        monkeypatch.setattr(each, "device_target", lambda device: "sm90")
    with pytest.warns(DeprecationWarning, match="Timing cache"):
        yield


def test_tensorrt_builds_for_the_gpu_that_is_here_and_keeps_its_timings(
    stand_in: None, exported: Export, tmp_path: Path
) -> None:
    cache = tmp_path / "timings"
    built = make(*exported(*SMALLEST), tmp_path, backend="tensorrt", targets=(), timing_cache=cache)
    assert built.targets == ("sm90",)
    assert cache.exists()
    with pytest.raises(UsageError, match="TensorRT cannot build for sm120 here, only for sm90"):
        make(*exported(*SMALLEST), tmp_path, backend="tensorrt", timing_cache=cache)


@pytest.mark.parametrize(
    ("name", "component", "least", "best", "most"),
    [
        ("512", "unet", Request(1, 64, 64), Request(2, 64, 64), Request(2, 64, 64, 231)),
        ("768x512-b2-c1", "controlnet", Request(1, 64, 96), Request(2, 64, 96), Request(4, 64, 96, 77)),
        ("dynamic", "unet", Request(1, 64, 64), Request(2, 128, 128), Request(2, 192, 192, 231)),
        ("256to768-b4", "vae_decoder", Request(1, 32, 32, 77), Request(2, 96, 96, 77), Request(4, 96, 96, 231)),
        ("512", "text_encoder", Request(1, 64, 64), Request(2, 64, 64), Request(6, 64, 64, 77)),
    ],
)
def test_ready_profiles(name: str, component: Component, least: Request, best: Request, most: Request) -> None:
    assert ready_profile(name, component, native=1024, image_prompts=False) == Profile(name, least, best, most)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("big", "'big' is not a profile"), ("512-c0", "at least one picture and one chunk"),
        ("512x513", "multiples of 8 pixels"), ("0", "multiples of 8 pixels"), ("512-b1-x", "is not a profile"),
        ("768to512", "from 768 to 512"),
    ],
)  # fmt: skip
def test_names_that_are_no_profiles(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        ready_profile(name, "unet", native=512)


@pytest.mark.parametrize("text", ["sm120", "sm_120", "SM120", "SM_120", "12.0", " 120 "])
def test_compute_capabilities_have_many_forms(text: str) -> None:
    assert parse_target(text) == "sm120"


@pytest.mark.parametrize("text", ["", "sm", "blackwell", "sm12.0.1", "sm1200"])
def test_what_is_no_compute_capability(text: str) -> None:
    with pytest.raises(UsageError, match="is not a compute capability: such as sm120, sm_120 or"):
        parse_target(text)


@pytest.mark.parametrize(
    ("config", "dtype", "opset"),
    [
        (UNETS["sd15"], torch.float16, 23), (UNETS["sd15"], torch.float32, 22), (CONFIGS[SMALLEST], torch.float32, 21),
        (replace(UNETS["sd21"], levels=(replace(UNETS["sd21"].levels[0], heads=8), UNETS["sd21"].levels[1])),
         torch.float16, 22),
    ],
)  # fmt: skip
def test_small_heads_and_float32_get_the_older_opset(config: Config, dtype: torch.dtype, opset: int) -> None:
    """For neither has TensorRT-RTX a fused attention: `Attention operation was not supported by a dedicated kernel`."""
    component: Component = "unet" if isinstance(config, UNetConfig) else "vae_encoder"
    assert opset_for(graph_of(build(config).to(dtype), component)) == opset


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_known_of_turing(dtype: torch.dtype, tmp_path: Path) -> None:
    """TensorRT-RTX itself refuses what is skipped without asking it."""
    part = build(CONFIGS[SMALLEST])
    draw(part, seed=0)
    graph = graph_of(part.to(dtype), "vae_encoder")
    export_onnx(graph, tmp_path / "model.onnx")
    assert why_not_on("sm75", "tensorrt-rtx", dtype) is not None
    assert why_not_on("sm75", "tensorrt-rtx", torch.float16) is why_not_on("sm80", "tensorrt-rtx", dtype) is None
    with pytest.raises(UsageError, match=r"FP32 GEMM is not supported|HW-specific datatypes"):
        make(tmp_path / "model.onnx", graph.schema, tmp_path, dtype=dtype, targets=("sm75",))
