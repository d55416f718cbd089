"""Graphs of loaded modules, kept in a store: made once, checked, and found again by what they hold."""

from __future__ import annotations

import copy
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nativesd.cache import cache_folder
from nativesd.errors import SourceError, UsageError
from nativesd.export.check import SIZES, TOLERANCES, compare, require
from nativesd.export.graphs import FILE, OPSETS, Graph, graph_of
from nativesd.export.kept.entries import Entry, Key, verify
from nativesd.export.kept.store import Building, Store
from nativesd.export.runner import Runner
from nativesd.export.sessions import OnnxRunner, OpenVinoRunner
from nativesd.export.sessions import backend as package
from nativesd.export.slots import Component, Convention, Request
from nativesd.tuning.tune import untuned
from nativesd.version import __version__
from nativesd.weights.lora.file import LoraFile
from nativesd.weights.lora.merge import Merged

LOG = logging.getLogger(__name__)
BackendName = Literal["cudagraphs", "onnx", "openvino", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


def default_store() -> Path:
    """Where graphs and engines are kept when no folder is named."""
    return cache_folder() / "engines"


def weights_hash(module: nn.Module, own: Mapping[str, Callable[[], Tensor]] | None = None) -> str:
    """16 hexadecimal digits of a module's parameters: names, dtypes, shapes and values, as they are now.

    own  reads some of them as they were before
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if own is not None and name in own:
            tensor = own[name]().to(tensor.dtype)
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def weights_name(module: nn.Module, merged: Merged | None) -> str:
    """`weights_hash` without LoRAs; where some are merged in, a hash of that, of their files, and of the strengths.

    Not of the merged numbers: half precision rounds them differently on different devices.
    """
    component = None if merged is None else merged.component(module)
    if merged is None or component is None or not merged.merged_into(component):
        return weights_hash(module)
    host = merged.hosts[component]
    own = {name: partial(host.read, name) for name in merged.touched[component]}
    loras = sorted(f"{_file_hash(lora)} {strength!r}" for lora, strength in merged.merged_into(component))
    return hashlib.sha256("\n".join([weights_hash(module, own), *loras]).encode()).hexdigest()[:16]


def _file_hash(lora: LoraFile) -> str:
    digest = hashlib.sha256()
    for path in sorted(set(lora.member.files.values())):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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
    source: str = ""
    """The model's name."""
    merged: Merged | None = None
    """The LoRAs that may be in its weights."""
    images: bool = True
    """Whether a UNet's graph has inputs for image prompts."""

    @cached_property
    def weights(self) -> str:
        """What its weights are called."""
        return weights_name(self.module, self.merged)

    def graph(self, *, control: bool = True) -> Graph:
        """As a function of named tensors."""
        return graph_of(self.module, self.component, control=control, images=self.images)


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
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Export a graph and run it against PyTorch; returns what a manifest says of it.

    tolerance  max|difference| / max|float32's|; default: by the dtype, or twice what PyTorch's own is in that dtype

    ONNX Runtime's CPU provider does not compute in bfloat16: there, a float32 twin of the graph is checked. Graphs of
    one static shape are checked at that. Raises NativesdError where the results differ, UsageError where ONNX Runtime
    is not installed.
    """
    with untuned(graph.module):
        start = time.monotonic()
        export_onnx(graph, path, static=static, opset=opset, names=names, metadata=metadata)
        details: dict[str, Any] = {
            "export_seconds": round(time.monotonic() - start, 1),
            "opset": opset or OPSETS[graph.schema.component],
            "dtype": dtype_name(graph.dtype),
            **graph.schema.renamed(names).fields(dtype_name(graph.dtype), static),
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
            details["error"] = require(
                comparisons, TOLERANCES[twin.dtype], f"the exported {graph.schema.component}", tolerance=tolerance
            )
            details["torch_error"] = max(each.own for each in comparisons)
            details["checked_in"] = dtype_name(twin.dtype)
        return details


def onnx_entry(part: Part, store: Store) -> Entry:
    """The ONNX graph of a part, from the store, or exported to it now.

    Raises SourceError for one that is damaged, NativesdError where the new one does not compute what PyTorch does.
    """
    graph = part.graph()
    key = make_key(part, graph, "onnx", "any", "any", ["dynamic"], OPSETS[part.component])
    entry = store.find(key)
    if entry is None:

        def make(building: Building) -> None:
            LOG.info("exporting the %s once to %s", part.name, store.root)
            building.details["source"] = part.source
            building.details |= write_onnx(graph, building.folder / FILE, metadata={"source_hash": key.weights})

        entry, _ = store.obtain(key, make)
    problem = verify(entry, deep=False)
    if problem is not None:
        raise SourceError(f"{entry.path} is damaged ({problem}): remove it, or run nativesd engines prune")
    return entry


def make_key(
    part: Part, graph: Graph, backend: str, version: str, device: str, profiles: Sequence[str], opset: int
) -> Key:
    """What a graph or an engine of a part is called."""
    return Key(
        part.name, part.family, part.weights, backend, version, device, dtype_name(graph.dtype), tuple(profiles),
        graph.schema.digest, bool(graph.schema.control), __version__, f"opset{opset}",
    )  # fmt: skip


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
        part = replace(part, module=copy.deepcopy(part.module).float())
    graph = part.graph()
    path = onnx_entry(part, store).path / FILE
    return OpenVinoRunner(path, graph.schema, graph.dtype, precision)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 as float16."""
    return str(dtype).removeprefix("torch.")
