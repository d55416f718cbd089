"""Engines of a store, loaded onto a GPU."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from nativesd.cache import keep
from nativesd.errors import SourceError, UsageError
from nativesd.export.capture import GRAPHS
from nativesd.export.kept.entries import RUNTIME_CACHE, Entry, verify, why_not
from nativesd.export.slots import Schema
from nativesd.export.tensorrt.engine import Arena, Context, EngineRunner
from nativesd.export.tensorrt.product import (
    ENGINE,
    PRODUCTS,
    Backend,
    device_target,
    load_backend,
    make_log,
    reason,
)
from nativesd.reading import read_bounded

MOST_CACHE = 2_000_000_000
"""Bytes."""


class RuntimeCache:
    """TensorRT-RTX's cache of the kernels that it compiled, in a file beside the engine."""

    def __init__(self, cache: Any, path: Path) -> None:
        self._cache = cache
        self._path = path
        self._size = -1
        with suppress(SourceError):  # it is made anew, as where there is none, or one of another GPU or driver
            cache.deserialize(read_bounded(path, MOST_CACHE))

    def save(self) -> None:
        """See `Cache`. A folder that cannot be written means compiling again next time, not a failed picture."""
        data = bytes(self._cache.serialize() or b"")
        if len(data) in (0, self._size):
            return
        keep(self._path, data)
        self._size = len(data)


def load_engine(
    entry: Entry,
    schema: Schema,
    *,
    dtype: torch.dtype,
    arena: Arena,
    graphs: int = GRAPHS,
    weight_budget: int | None = None,
) -> EngineRunner:
    """An engine of the store on the arena's GPU.

    schema         its inputs and outputs
    arena          its activation memory, and the queue that it runs on; engines that take turns share one
    weight_budget  bytes of weights that stay on the GPU, for an engine that was built with weight streaming; default:
                   what TensorRT finds room for

    Raises SourceError for an engine that is damaged, of another version or for another GPU, and says which; UsageError
    where its backend is not installed.
    """
    problem = verify(entry)
    if problem is not None or entry.key is None:
        raise SourceError(f"{entry.path} cannot be used: {problem}")
    backend = cast("Backend", entry.key.backend)
    if backend not in PRODUCTS or ENGINE not in entry.files:
        raise SourceError(f"{entry.path} has no {ENGINE}: it is for {backend}")
    trt = load_backend(backend)
    target = device_target(arena.queue.device)
    here = replace(entry.key, version=str(trt.__version__), device=target, slots=schema.digest)
    problem = why_not(entry, here)
    if problem is not None:
        raise SourceError(f"{entry.path} cannot be used: {problem}")
    if entry.details.get("weight_streaming"):
        graphs = 0  # weights come while it runs
    torch.cuda.empty_cache()  # TensorRT allocates by itself, and cannot have what torch holds in reserve
    with arena.queue.use():  # which makes its device the current one: engines are loaded onto that
        engine, log = _deserialize(trt, entry.path / ENGINE)
        weights = _stream(engine, weight_budget, entry)
        cache, config = _runtime_config(trt, engine, entry, graphs) if backend == "tensorrt-rtx" else (None, None)

    def new_context() -> Context:
        context = engine.create_execution_context(config or trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise SourceError(f"{entry.path} cannot be run by {PRODUCTS[backend]}: {reason(log.errors[-1:])}")
        return cast("Context", context)

    return EngineRunner(
        engine, new_context, schema, arena, dtype=dtype, graphs=graphs, names=entry.key.profiles, weights=weights,
        cache=cache, errors=log.errors,
    )  # fmt: skip


def _stream(engine: Any, budget: int | None, entry: Entry) -> int:
    """Have an engine stream what of its weights does not fit a budget; returns the bytes that stay on the GPU.

    Raises UsageError for a budget where the engine cannot stream.
    """
    size = entry.files[ENGINE].size
    if not entry.details.get("weight_streaming"):
        if budget is not None:
            raise UsageError(
                f"{entry.path} cannot stream its weights, so no weight_budget: build it with --weight-streaming"
            )
        return size
    streamable = int(engine.streamable_weights_size)
    kept = min(streamable, engine.get_weight_streaming_automatic_budget() if budget is None else budget)
    engine.weight_streaming_budget_v2 = kept
    return size - streamable + kept


def _runtime_config(trt: Any, engine: Any, entry: Entry, graphs: int) -> tuple[RuntimeCache, Any]:
    """TensorRT-RTX's settings of an engine's contexts, and its cache of compiled kernels."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if graphs:  # which would keep the slower kernels that are used until those for the shape are ready
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    theirs = config.create_runtime_cache()
    cache = RuntimeCache(theirs, entry.path / RUNTIME_CACHE)
    config.set_runtime_cache(theirs)
    return cache, config


def _deserialize(trt: Any, path: Path) -> tuple[Any, Any]:
    """An engine and its log. Raises SourceError where TensorRT does not take it."""
    log = make_log(trt)
    runtime = trt.Runtime(log)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise SourceError(f"{path} cannot be loaded by {trt.__name__} {trt.__version__}: {reason(log.errors)}")
    return engine, log
