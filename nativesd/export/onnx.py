"""Components as ONNX graphs, traced by torch.export."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from nativesd.errors import UsageError
from nativesd.export.graphs import OPSETS, Graph, typical
from nativesd.export.repeated import as_operators, insert
from nativesd.export.slots import Convention, Request, Slot
from nativesd.version import __version__

LOWEST_OPSET, HIGHEST_OPSET = 18, 25  # that torch's exporter and onnx-ir write


def export_onnx(
    graph: Graph,
    path: Path,
    *,
    static: Request | None = None,
    opset: int | None = None,
    names: Convention = "nativesd",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a component as ONNX, with the weights in `path` + ".data", in their own dtype.

    static    the one request that it is for; without, batch, sides and the length of the context are dynamic, and
              `graph.schema` says which shapes belong together
    names     the names of the inputs and outputs: this project's, or another's
    metadata  more entries for the file's

    Raises UsageError for names that do not fit and opsets that the exporter does not write.
    """
    schema = graph.schema.renamed(names)
    opset = opset or OPSETS[schema.component]
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise UsageError(
            f"opset {opset}: {LOWEST_OPSET} is the lowest, {HIGHEST_OPSET} the highest, and {OPSETS[schema.component]} "
            "is meant for this graph"
        )
    inputs = graph.inputs(static or typical(schema))
    dynamic = None if static else (tuple(_dynamic(slot) for slot in schema.inputs),)
    graph.eval()
    convert = partial(_convert, opset=opset)
    with torch.no_grad(), _quiet(), _no_collection():
        with as_operators(graph, residual=opset >= 21, images=bool(schema.images)) as blocks:
            program = torch.export.export(graph, tuple(inputs), dynamic_shapes=dynamic, strict=False)
        model = convert(program)
        if blocks:
            insert(model, blocks, convert)
    for value, slot in zip([*model.graph.inputs, *model.graph.outputs], [*schema.inputs, *schema.outputs], strict=True):
        value.name = slot.name
        _state_axes(value, slot, static)
    model.producer_name, model.producer_version = "nativesd", __version__
    model.metadata_props.update(
        {
            "nativesd": __version__,
            "component": schema.component,
            "schema": schema.digest,
            "slots": json.dumps({"inputs": [*map(str, schema.inputs)], "outputs": [*map(str, schema.outputs)]}),
            **({"static": str(static)} if static else {}),
            **(metadata or {}),
        }
    )
    ir.save(model, path, external_data=f"{path.name}.data")


def _convert(program: torch.export.ExportedProgram, *, opset: int) -> ir.Model:
    converted = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    assert converted is not None  # as it is without dynamo
    return converted.model


def _dynamic(slot: Slot) -> dict[int, Any]:
    return {i: Dim.AUTO for i, axis in enumerate(slot.axes) if not isinstance(axis, int)}


def _state_axes(value: Any, slot: Slot, static: Request | None) -> None:
    """Write what the schema calls an axis in place of the tracer's symbol, which is another for every slot's side."""
    axes = slot.shape(static) if static else [axis if isinstance(axis, int) else str(axis) for axis in slot.axes]
    value.shape = type(value.shape)(axes)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Tracing makes millions of objects and little garbage: looking for it took a seventh of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not installed; its warnings stay."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
