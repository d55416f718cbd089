"""Whether an exported graph computes what PyTorch does: compared with float32, whatever its own dtype."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nativesd.errors import NativesdError
from nativesd.export.graphs import Graph
from nativesd.export.runner import Runner
from nativesd.export.slots import CHUNK, Request

TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""max|difference| / max|float32's|, by the graph's dtype, on a CPU."""
MULTIPLE = 2.0
"""Of the error that PyTorch itself has in that dtype, which a graph may have where that is more: sharp attention."""
SIZES = (Request(1, 16, 16), Request(2, 17, 24, 2 * CHUNK, 2, 5), Request(4, 24, 9, CHUNK, 1, 16))
"""Even, odd and oblong; one and two chunks of tokens; one and two groups of image prompts, where there are slots."""


@dataclass(frozen=True)
class Reference:
    """A call with what PyTorch makes of it in float32, all on the CPU."""

    request: Request
    control: str
    """"zero", "random", or "" for a graph without slots for control or image prompts"""
    inputs: Sequence[Tensor]
    """Of every slot; what is zero in the optional ones is not given to a runner"""
    expected: Sequence[Tensor]
    own: float
    """PyTorch's error in the graph's dtype: the largest of any output"""


@dataclass(frozen=True)
class Comparison:
    """The largest relative difference of any output from float32 at one request, and PyTorch's in the graph's dtype."""

    request: Request
    control: str
    error: float
    own: float = 0.0


@torch.inference_mode()
def references(graph: Graph, requests: Sequence[Request] = SIZES, *, seed: int = 0) -> list[Reference]:
    """Random calls of a graph with their results; control residuals are zero, then random.

    In half precision a float32 copy of the module is made for as long as this takes.
    """
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for request in requests:
        inputs = graph.inputs(request, generator)
        for control in ("zero", "random") if graph.schema.control or graph.schema.images else ("",):
            silent = [slot.is_optional and control == "zero" for slot in graph.schema.inputs]
            zeroed = [torch.zeros_like(each) if zero else each for each, zero in zip(inputs, silent, strict=True)]
            calls.append((request, control, zeroed))
    with tf32(allowed=False):
        own = [_call(graph, inputs) for _, _, inputs in calls]
        exact = own
        if graph.dtype != torch.float32:
            twin = Graph(copy.deepcopy(graph.module).float(), graph.schema)
            exact = [
                _call(twin, [each.float() if each.is_floating_point() else each for each in inputs])
                for _, _, inputs in calls
            ]
    return [
        Reference(request, control, inputs, right, _worst(found, right))
        for (request, control, inputs), found, right in zip(calls, own, exact, strict=True)
    ]


def _call(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [out.cpu() for out in graph(*(tensor.to(graph.device) for tensor in inputs))]


def _worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(difference(one, other) for one, other in zip(found, expected, strict=True))


def judge(references: Sequence[Reference], runner: Runner, device: torch.device | None = None) -> list[Comparison]:
    """Run what the references call, on a device (default: the CPU); the runner's graph may have other names."""
    out = []
    for reference in references:
        given = {
            slot.name: tensor.to(device or "cpu")
            for slot, tensor in zip(runner.schema.inputs, reference.inputs, strict=True)
            if not (slot.is_optional and reference.control == "zero")
        }
        found = runner.run(given)
        error = _worst([found[slot.name] for slot in runner.schema.outputs], reference.expected)
        out.append(Comparison(reference.request, reference.control, error, reference.own))
    return out


def compare(graph: Graph, runner: Runner, requests: Sequence[Request] = SIZES, *, seed: int = 0) -> list[Comparison]:
    """`judge` a runner by the `references` of a graph, on the graph's device."""
    return judge(references(graph, requests, seed=seed), runner, graph.device)


def difference(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected|, in float32; infinite where that is not finite or all is zero."""
    found, expected = found.float().cpu(), expected.float().cpu()
    scale = float(expected.abs().max())
    error = float((found - expected).abs().max()) / scale if scale > 0 else math.inf
    return error if math.isfinite(error) and found.any() else math.inf


def require(comparisons: Sequence[Comparison], usual: float, what: str, *, tolerance: float | None = None) -> float:
    """The largest error. Raises NativesdError where one is too large, or an output is broken.

    usual      how large one may be, or `MULTIPLE` times PyTorch's own where that is more
    tolerance  how large one may be instead, whatever PyTorch's is
    """

    def allowed(each: Comparison) -> float:
        return max(usual, MULTIPLE * each.own) if tolerance is None else tolerance

    worst = max(comparisons, key=lambda comparison: comparison.error - allowed(comparison))
    where = f"{worst.request}{f', {worst.control} control' if worst.control else ''}"
    if math.isinf(worst.error):
        raise NativesdError(f"{what} gives NaN or nothing but zeros at {where}: do not use it")
    if worst.error > allowed(worst):
        raise NativesdError(
            f"{what} is off from float32 by {worst.error:.1e} at {where}, and {allowed(worst):.0e} is the tolerance "
            f"(PyTorch's own error is {worst.own:.1e}): do not use it, or allow more with --tolerance"
        )
    return max(comparison.error for comparison in comparisons)


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Whether float32 products on CUDA may be computed in TF32, meanwhile."""
    cuda, cudnn = cast("tuple[Any, Any]", (torch.backends.cuda, torch.backends.cudnn))
    settings = (cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
