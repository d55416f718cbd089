"""Whether an exported graph computes what PyTorch does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nativesd.errors import NativesdError
from nativesd.export.graphs import Graph
from nativesd.export.runner import Runner
from nativesd.export.slots import CHUNK, Request

TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""max|difference| / max|PyTorch's|, by dtype."""
SIZES = (Request(1, 16, 16), Request(2, 17, 24, 2 * CHUNK), Request(4, 24, 9))
"""Even, odd and oblong; one and two chunks of tokens."""


@dataclass(frozen=True)
class Comparison:
    """The largest relative difference of any output at one request."""

    request: Request
    control: str
    """"zero", "random", or "" for a graph without control slots"""
    error: float


def compare(graph: Graph, runner: Runner, requests: Sequence[Request] = SIZES, *, seed: int = 0) -> list[Comparison]:
    """Run `runner` and PyTorch on the same random inputs; the runner's graph may have other names.

    Control residuals are zero (not given), then random.
    """
    ours, theirs = graph.schema, runner.schema
    generator = torch.Generator().manual_seed(seed)
    out = []
    for request in requests:
        inputs = [tensor.to(graph.device) for tensor in graph.inputs(request, generator)]
        for control in ("zero", "random") if ours.control else ("",):
            given = {
                slot.name: tensor
                for slot, tensor in zip(theirs.inputs, inputs, strict=True)
                if not (slot.is_control and control == "zero")
            }
            zeroed = [
                torch.zeros_like(tensor) if slot.is_control and control == "zero" else tensor
                for slot, tensor in zip(ours.inputs, inputs, strict=True)
            ]
            with torch.inference_mode():
                expected = graph(*zeroed)
            found = runner.run(given)
            pairs = zip(theirs.outputs, expected, strict=True)
            out.append(Comparison(request, control, max(difference(found[slot.name], e) for slot, e in pairs)))
    return out


def difference(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected|, in float32; infinite where that is not finite or all is zero."""
    found, expected = found.float().cpu(), expected.float().cpu()
    scale = float(expected.abs().max())
    error = float((found - expected).abs().max()) / scale if scale > 0 else math.inf
    return error if math.isfinite(error) and found.any() else math.inf


def require(comparisons: Sequence[Comparison], dtype: torch.dtype, what: str) -> float:
    """The largest error. Raises NativesdError where it is above the tolerance of `dtype`, or an output is broken."""
    worst = max(comparisons, key=lambda comparison: comparison.error)
    control = f", {worst.control} control" if worst.control else ""
    if math.isinf(worst.error):
        raise NativesdError(f"{what} gives NaN or nothing but zeros at {worst.request}{control}: do not use it")
    if worst.error > TOLERANCES[dtype]:
        raise NativesdError(
            f"{what} is off by {worst.error:.1e} at {worst.request}{control}, and {TOLERANCES[dtype]:.0e} is the "
            f"tolerance for {str(dtype).removeprefix('torch.')}: do not use it"
        )
    return worst.error
