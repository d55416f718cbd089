"""Graphs and engines of loaded modules, kept in a store: made once, checked, and found again by what they hold."""

from __future__ import annotations

import copy
import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from nativesd.cache import cache_folder
from nativesd.errors import SourceError, UsageError
from nativesd.export.capture import CudaQueue
from nativesd.export.check import SIZES, compare, require
from nativesd.export.graphs import FILE, OPSETS, Graph, graph_of
from nativesd.export.runner import Runner
from nativesd.export.sessions import OnnxRunner, OpenVinoRunner
from nativesd.export.sessions import backend as package
from nativesd.export.slots import Component, Convention, Request
from nativesd.export.store import Entry, Key, Store, unfinished, verify
from nativesd.export.tensorrt.build import Progress, build_engine
from nativesd.export.tensorrt.engine import Arena
from nativesd.export.tensorrt.loading import load_engine
from nativesd.export.tensorrt.product import ENGINE, Backend, backend_for, backend_version, device_target
from nativesd.export.tensorrt.profiles import Profile
from nativesd.tuning.tune import untuned

BackendName = Literal["cudagraphs", "onnx", "openvino", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


def default_store() -> Path:
    """Where graphs and engines are kept when no folder is named."""
    return cache_folder() / "engines"


def weights_hash(module: nn.Module) -> str:
    """16 hexadecimal digits of a module's parameters as they are now: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def numbered(name: str, number: int) -> str:
    """What the components of a kind are called: text_encoder, text_encoder_2, ..."""
    return name if number == 1 else f"{name}_{number}"


@dataclass(frozen=True)
class Part:
    """A component of a loaded model, ready to be exported: `name` tells an SDXL's two text encoders apart."""

    name: str
    component: Component
    module: nn.Module
    family: str

    def graph(self, *, control: bool = True) -> Graph:
        """As a function of named tensors."""
        return graph_of(self.module, self.component, control=control)


def export_onnx(graph: Graph, path: Path, **options: Any) -> None:
    """`nativesd.export.onnx.export_onnx`. Raises UsageError where what it needs is not installed."""
    for needed in ("onnx_ir", "onnxscript"):
        package(needed, "onnx")
    from nativesd.export.onnx import export_onnx

    export_onnx(graph, path, **options)


def write_onnx(
    graph: Graph,
    path: Path,
    *,
    static: Request | None = None,
    opset: int | None = None,
    names: Convention = "nativesd",
    metadata: Mapping[str, str] | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Export a graph and run it against PyTorch; returns what a manifest says of it.

    ONNX Runtime's CPU provider does not compute in bfloat16: there, a float32 twin of the graph is checked. Graphs of
    one static shape are checked at that. Raises NativesdError where the results differ, UsageError where ONNX Runtime
    is not installed.
    """
    with untuned(graph.module):
        start = time.monotonic()
        export_onnx(graph, path, static=static, opset=opset, names=names, metadata=metadata)
        details: dict[str, Any] = {
            "export_seconds": round(time.monotonic() - start, 1),
            "opset": opset or _opset(graph),
            "dtype": _name(graph.dtype),
            "weights": weights_hash(graph.module),
            **graph.schema.renamed(names).fields(_name(graph.dtype), static),
        }
        if check:
            requests = [static] if static else SIZES
            if graph.dtype == torch.bfloat16:
                twin = Graph(copy.deepcopy(graph.module).float(), graph.schema)
                with tempfile.TemporaryDirectory(dir=path.parent, prefix=".twin-") as folder:
                    file = Path(folder) / FILE
                    export_onnx(twin, file, static=static, opset=opset)
                    runner = OnnxRunner(file, twin.schema, torch.float32, torch.device("cpu"))
                    comparisons = compare(twin, runner, requests)
            else:
                twin = graph
                runner = OnnxRunner(path, graph.schema.renamed(names), graph.dtype, torch.device("cpu"))
                comparisons = compare(twin, runner, requests)
            details["error"] = require(comparisons, twin.dtype, f"the exported {graph.schema.component}")
            details["checked_in"] = _name(twin.dtype)
        return details


def onnx_entry(part: Part, store: Store) -> Entry:
    """The ONNX graph of a part, from the store, or exported to it now.

    Raises SourceError for one that is damaged, NativesdError where the new one does not compute what PyTorch does.
    """
    graph = part.graph()
    key = Key(
        part.name, part.family, weights_hash(part.module), "onnx", f"opset{_opset(graph)}", "any",
        _name(graph.dtype), ("dynamic",), graph.schema.digest, bool(graph.schema.control),
    )  # fmt: skip
    entry = store.find(key)
    if entry is None:
        with store.building(key) as building:
            building.details.update(write_onnx(graph, building.folder / FILE, metadata={"source_hash": key.weights}))
        entry = store.find(key)
        assert entry is not None  # just written
    problem = verify(entry, deep=False)
    if problem is not None:
        raise SourceError(f"{entry.path} is damaged ({problem}): remove it, or run nativesd engines prune")
    return entry


def onnx_runner(part: Part, store: Store, device: torch.device) -> Runner:
    """A part in ONNX Runtime."""
    graph = part.graph()
    if graph.dtype == torch.bfloat16 and device.type == "cpu":
        raise UsageError(
            "ONNX Runtime does not compute in bfloat16 on a CPU: load with dtype='float32', or use openvino"
        )
    return OnnxRunner(onnx_entry(part, store).path / FILE, graph.schema, graph.dtype, device)


def openvino_runner(part: Part, store: Store) -> Runner:
    """A part in OpenVINO. A bfloat16 model's graph is exported in float32, and computed in bfloat16."""
    precision = part.graph().dtype
    if precision == torch.bfloat16:
        part = Part(part.name, part.component, copy.deepcopy(part.module).float(), part.family)
    graph = part.graph()
    path = onnx_entry(part, store).path / FILE
    return OpenVinoRunner(path, graph.schema, graph.dtype, precision)


def engine_key(part: Part, graph: Graph, backend: Backend, targets: Sequence[str], profiles: Sequence[str]) -> Key:
    """What an engine of a part is called."""
    return Key(
        part.name, part.family, weights_hash(part.module), backend, backend_version(backend), "+".join(targets),
        _name(graph.dtype), tuple(profiles), graph.schema.digest, bool(graph.schema.control),
    )  # fmt: skip


def build(
    part: Part,
    store: Store,
    profiles: Sequence[Profile],
    *,
    backend: Backend,
    targets: Sequence[str],
    control: bool = True,
    weight_streaming: bool = False,
    again: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Entry:
    """Build an engine of a part into the store, by way of an ONNX file that is checked and then removed.

    Where the GPU that it is for is here, the engine is run against PyTorch too. Raises UsageError for an engine that is
    there already (but for `again`) or cannot be built, NativesdError for one that computes something else.
    """
    graph = part.graph(control=control)
    key = engine_key(part, graph, backend, targets, [profile.name for profile in profiles])
    with store.building(key, again=again) as building:
        with tempfile.TemporaryDirectory(dir=building.folder, prefix=".onnx-") as folder:
            onnx = Path(folder) / FILE
            # TensorRT-RTX has no fused attention in float32
            opset = min(_opset(graph), 22) if graph.dtype == torch.float32 else None
            details = write_onnx(graph, onnx, opset=opset, metadata={"source_hash": key.weights})
            cache = store.root / f"timing-{key.version}-{key.device}.cache" if backend == "tensorrt" else None
            built = build_engine(
                onnx, building.folder / ENGINE, graph.schema, profiles, backend=backend, dtype=graph.dtype,
                targets=targets, weight_streaming=weight_streaming, timing_cache=cache,
                on_progress=on_progress,
            )  # fmt: skip
        building.details.update({"onnx": details, "weight_streaming": weight_streaming, **built.details()})
        if torch.cuda.is_available() and device_target(torch.device("cuda")) in targets:
            building.details["error"] = _check_engine(graph, unfinished(key, building), profiles)
    entry = store.find(key)
    assert entry is not None  # just written
    return entry


def _check_engine(graph: Graph, entry: Entry, profiles: Sequence[Profile]) -> float:
    """The largest difference of an engine to PyTorch on this GPU, at the ends and the middle of every profile.

    Raises NativesdError where it is above the tolerance.
    """
    device = torch.device("cuda")
    there = Graph(copy.deepcopy(graph.module).to(device), graph.schema)
    runner = load_engine(entry, graph.schema, dtype=graph.dtype, arena=Arena(CudaQueue(device)))
    try:
        requests = [request for profile in profiles for request in (profile.min, profile.opt, profile.max)]
        return require(compare(there, runner, requests), graph.dtype, f"the {graph.schema.component}'s engine")
    finally:
        runner.close()


def engine_runner(part: Part, store: Store, device: torch.device, arena: Arena, backend: Backend | None) -> Runner:
    """A part's engine for this GPU from the store. Raises UsageError where there is none, with the reasons."""
    target = device_target(device)
    kind = backend or backend_for(target)
    reasons: list[str] = []
    for control in (True, False) if part.component == "unet" else (True,):
        graph = part.graph(control=control)
        entry, reasons = store.match(engine_key(part, graph, kind, [target], []))
        if entry is not None:
            return load_engine(entry, graph.schema, dtype=graph.dtype, arena=arena)
    found = "; ".join(reasons) or "none of this component"
    raise UsageError(f"{store.root} has no engine of the {part.name} for {target} ({found})")


def _name(dtype: torch.dtype) -> str:
    """torch.float16 as float16."""
    return str(dtype).removeprefix("torch.")


def _opset(graph: Graph) -> int:
    return OPSETS[graph.schema.component]
