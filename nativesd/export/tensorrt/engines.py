"""TensorRT engines of loaded modules: built into a store for one card or many, checked, and found again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nativesd.config import TextEncoderConfig, UNetConfig
from nativesd.destination import scratch
from nativesd.errors import UsageError
from nativesd.export.capture import CudaQueue
from nativesd.export.check import judge, references, require
from nativesd.export.graphs import FILE, OPSETS, Graph
from nativesd.export.kept.entries import Entry, Key
from nativesd.export.kept.store import Building, Store, unfinished
from nativesd.export.library import Part, make_key, write_onnx
from nativesd.export.runner import Runner
from nativesd.export.tensorrt.build import Progress, build_engine
from nativesd.export.tensorrt.engine import Arena, NoRoomError
from nativesd.export.tensorrt.loading import load_engine
from nativesd.export.tensorrt.product import ENGINE, Backend, backend_for, backend_version, device_target, why_not_on
from nativesd.export.tensorrt.profiles import Profile
from nativesd.tuning.tune import untuned

SMALLEST_HEAD = 8  # of attention, and all smaller ones, for which TensorRT-RTX 1.7 has no kernel of its own
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""max|difference| / max|float32's| on a GPU, as `nativesd.machine.smoke` has them."""
TF32_TOLERANCE = 3e-3

GPU = torch.device("cuda")
"""Where engines are compared with PyTorch."""


@dataclass(frozen=True)
class Made:
    """What became of one engine: for which cards, its entry, or why there is none."""

    target: str
    state: Literal["built", "there", "skipped"]
    entry: Entry | None = None
    reason: str = ""


@dataclass(frozen=True)
class Wish:
    """How engines are to be built.

    groups     the cards: of each group one engine
    control    whether a UNet's has inputs for control residuals
    check      run the graph, and the engine where its GPU is here, against PyTorch
    tolerance  for both, instead of the usual ones
    again      build in place of what is there
    """

    groups: Sequence[Sequence[str]]
    backend: Backend | None = None
    control: bool = True
    weight_streaming: bool = False
    check: bool = True
    tolerance: float | None = None
    again: bool = False
    on_progress: Callable[[Progress], None] | None = field(default=None, repr=False)


def build(part: Part, store: Store, profiles: Sequence[Profile], wish: Wish) -> list[Made]:
    """Build a part's engines into the store, by way of an ONNX file that is checked and then removed.

    What is there is left, and what a card cannot have is skipped, each with a word. Raises UsageError for what cannot
    be built otherwise, NativesdError for a graph or an engine that computes something else.
    """
    graph = part.graph(control=wish.control)
    names = [profile.name for profile in profiles]
    out = []
    with ExitStack() as stack:
        made: list[tuple[Path, dict[str, Any]]] = []

        def onnx() -> tuple[Path, dict[str, Any]]:
            """The graph and what is said of it, made when the first engine needs it."""
            if not made:
                made.append(stack.enter_context(_graph(part, graph, store, wish)))
            return made[0]

        for group in wish.groups:
            backend = wish.backend or backend_for(group[0])
            target = "+".join(group)
            reasons = [reason for each in group if (reason := why_not_on(each, backend, graph.dtype))]
            if reasons:
                out.append(Made(target, "skipped", reason=reasons[0]))
                continue
            key = engine_key(part, graph, backend, group, names)

            def make(
                building: Building, key: Key = key, backend: Backend = backend, group: Sequence[str] = group
            ) -> None:
                _build(part, graph, building, key, backend, group, profiles, wish, onnx(), store)

            entry, new = store.obtain(key, make, again=wish.again)
            out.append(Made(target, "built" if new else "there", entry))
    return out


@contextmanager
def _graph(part: Part, graph: Graph, store: Store, wish: Wish) -> Iterator[tuple[Path, dict[str, Any]]]:
    with scratch(store.root / f"graph-{part.name}-{part.weights}-{graph.schema.digest}") as folder:
        details = write_onnx(
            graph, folder / FILE, opset=opset_for(graph), metadata={"source_hash": part.weights}, check=wish.check,
            tolerance=wish.tolerance,
        )  # fmt: skip
        yield folder / FILE, details


def _build(
    part: Part,
    graph: Graph,
    building: Building,
    key: Key,
    backend: Backend,
    group: Sequence[str],
    profiles: Sequence[Profile],
    wish: Wish,
    onnx: tuple[Path, dict[str, Any]],
    store: Store,
) -> None:
    """Build one engine into its place in the store, and run it where its GPU is here."""
    cache = store.root / f"timing-{key.version}-{key.device}.cache" if backend == "tensorrt" else None
    exact = not _in_tf32(graph)
    built = build_engine(
        onnx[0], building.folder / ENGINE, graph.schema, profiles, backend=backend, dtype=graph.dtype, targets=group,
        weight_streaming=wish.weight_streaming, tf32=not exact, timing_cache=cache, on_progress=wish.on_progress,
    )  # fmt: skip
    slots = graph.schema.fields(key.precision)
    building.details |= {
        "source": part.source, **slots, "weight_streaming": wish.weight_streaming, "tf32": not exact,
        "onnx": {name: value for name, value in onnx[1].items() if name not in slots}, **built.details(),
    }  # fmt: skip
    if wish.check and torch.cuda.is_available() and device_target(torch.device("cuda")) in group:
        usual = TF32_TOLERANCE if not exact else TOLERANCES[graph.dtype]
        building.details |= _check_engine(graph, unfinished(key, building), profiles, usual, wish.tolerance)


def opset_for(graph: Graph) -> int:
    """The opset of the graphs that engines are built from: before 23, attention is several nodes, which always build.

    TensorRT-RTX has no fused attention in float32, nor for heads of 8 and fewer.
    """
    usual = OPSETS[graph.schema.component]
    config = getattr(graph.module, "config", None)
    heads = []
    if isinstance(config, UNetConfig):
        heads = [level.width // level.heads for level in config.levels]
    elif isinstance(config, TextEncoderConfig):
        heads = [config.width // config.heads]
    if graph.dtype == torch.float32 or any(head <= SMALLEST_HEAD for head in heads):
        return min(usual, 22)
    return usual


def _in_tf32(graph: Graph) -> bool:
    """Whether a float32 engine may use TF32: the VAE's, which is of convolutions, for which PyTorch does so too."""
    return graph.dtype == torch.float32 and graph.schema.component in ("vae_encoder", "vae_decoder")


def engine_key(part: Part, graph: Graph, backend: Backend, targets: Sequence[str], profiles: Sequence[str]) -> Key:
    """What an engine of a part is called."""
    return make_key(
        part, graph, backend, backend_version(backend), "+".join(targets), profiles, opset_for(graph)
    )  # fmt: skip


def _check_engine(
    graph: Graph, entry: Entry, profiles: Sequence[Profile], usual: float, tolerance: float | None
) -> dict[str, Any]:
    """How far an engine is from float32 on this GPU, where every profile is fastest: {"error": ...}.

    PyTorch computes first, and its copy of the module is gone when the engine is loaded. Where the memory does not do
    for either, that is what is said: {"not_run": ...}. Raises NativesdError where the difference is too large.
    """
    runner: Runner | None = None
    try:
        with untuned(graph.module):
            there = Graph(copy.deepcopy(graph.module).to(GPU), graph.schema)
        wanted = references(there, [profile.opt for profile in profiles])
        del there
        torch.cuda.empty_cache()
        runner = load_engine(entry, graph.schema, dtype=graph.dtype, arena=Arena(CudaQueue(GPU)))
        comparisons = judge(wanted, runner, GPU)
    except (torch.OutOfMemoryError, NoRoomError):
        return {"not_run": "there is too little memory on the GPU to compare it with PyTorch"}
    finally:
        if runner is not None:
            runner.close()
    what = f"the {graph.schema.component}'s engine"
    return {"error": require(comparisons, usual, what, tolerance=tolerance)}


def engine_runner(
    part: Part,
    store: Store,
    device: torch.device,
    arena: Arena,
    backend: Backend | None,
    *,
    weight_budget: int | None = None,
) -> Runner:
    """A part's engine for this GPU from the store. Raises UsageError where there is none, with the reasons."""
    target = device_target(device)
    kind = backend or backend_for(target)
    reasons: list[str] = []
    either = (True, False) if part.component == "unet" else (True,)
    for each, control in [(each, control) for each in _with_images(part) for control in either]:
        graph = each.graph(control=control)
        entry, reasons = store.match(engine_key(each, graph, kind, [target], []))
        if entry is not None:
            return load_engine(entry, graph.schema, dtype=graph.dtype, arena=arena, weight_budget=weight_budget)
    found = "; ".join(reasons) or "none of this component"
    raise UsageError(f"{store.root} has no engine of the {part.name} for {target} ({found})")


def _with_images(part: Part) -> tuple[Part, ...]:
    """A part, and the same with or without inputs for image prompts: an engine of either kind serves."""
    return (part, replace(part, images=not part.images)) if part.component == "unet" else (part,)
