"""TensorRT engines from ONNX graphs, for the GPU that is here (TensorRT) or for any (TensorRT-RTX)."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nativesd.cache import keep
from nativesd.errors import SourceError, UsageError
from nativesd.export.slots import Schema, Slot
from nativesd.export.tensorrt.product import (
    DTYPES,
    PRODUCTS,
    Backend,
    device_target,
    load_backend,
    make_log,
    reason,
    slot_dtype,
    targets_of,
)
from nativesd.export.tensorrt.profiles import Profile, check_profiles


@dataclass(frozen=True)
class Progress:
    """How far a build is: the phase with the phases around it, outermost first, and its steps."""

    phases: tuple[str, ...]
    step: int
    steps: int


@dataclass(frozen=True)
class Built:
    """An engine that was built, for its manifest."""

    path: Path
    size: int
    seconds: float
    version: str
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]

    def details(self) -> dict[str, Any]:
        """As JSON."""
        profiles = [
            {"name": each.name, "min": each.min.fields(), "opt": each.opt.fields(), "max": each.max.fields()}
            for each in self.profiles
        ]
        return {"build_seconds": round(self.seconds, 1), "profiles": profiles}


def build_engine(
    onnx: Path,
    destination: Path,
    schema: Schema,
    profiles: Sequence[Profile],
    *,
    backend: Backend,
    dtype: torch.dtype,
    targets: Sequence[str] = (),
    weight_streaming: bool = False,
    tf32: bool = False,
    timing_cache: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Built:
    """Build an engine of an ONNX file with `schema`'s inputs and outputs, one optimization profile for each of ours.

    dtype             of the weights, and of the slots that have it
    targets           compute capabilities, such as "sm120"; TensorRT-RTX takes several and needs no GPU, TensorRT
                      builds for the one that is here, which is the default of both
    weight_streaming  the weights may stay in the host's memory when it runs, which no CUDA graph can record then
    tf32              products of float32 may be computed in TF32, with 10 bits of each factor
    timing_cache      a file that is read, where it is there, and written (TensorRT)
    on_progress       called from the builder's threads; what it raises stops the build

    The network's inputs, outputs and profiles are read back from the builder and have to be the schema's. Raises
    UsageError for what cannot be built, SourceError for files that cannot be read or written.
    """
    trt = load_backend(backend)
    product = PRODUCTS[backend]
    targets = _checked_targets(backend, targets)
    check_profiles(schema, profiles)
    if timing_cache is not None and backend == "tensorrt-rtx":
        raise UsageError("TensorRT-RTX times nothing when it builds, so it has no timing cache: leave it out")
    _check_space(onnx, destination)
    began = time.monotonic()
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise SourceError(f"{onnx} cannot be parsed by {product} {trt.__version__}: {_parser_error(parser, log)}")
    _check_network(trt, network, schema, dtype, profiles, onnx)
    config = builder.create_builder_config()
    if backend == "tensorrt-rtx":
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    if weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # which is on by default
    # without it TensorRT-RTX may allocate while it runs, which no CUDA graph can record (release notes of 1.2); engines
    # that stream their weights have to
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") and not weight_streaming:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    _add_profiles(builder, config, schema, profiles, log)
    cache = None
    if timing_cache is not None:
        cache = config.create_timing_cache(_read(timing_cache) if timing_cache.exists() else b"")
        config.set_timing_cache(cache, False)
    monitor = _make_monitor(trt, on_progress)
    config.progress_monitor = monitor
    try:
        plan = builder.build_serialized_network(network, config)
    except MemoryError:
        plan = None
        log.errors.append("bad_alloc")
    if monitor.raised is not None:
        raise monitor.raised
    if plan is None:
        raise UsageError(f"{product} could not build {onnx.name} for {'+'.join(targets)}: {_build_error(log)}")
    with _writing(destination):
        destination.write_bytes(plan)
    if timing_cache is not None and cache is not None:
        keep(timing_cache, bytes(cache.serialize()))
    size, seconds = plan.nbytes, time.monotonic() - began
    return Built(destination, size, seconds, str(trt.__version__), targets, tuple(profiles))


def _make_monitor(trt: Any, on_progress: Callable[[Progress], None] | None) -> Any:
    """Reports steps. What the callback raises is kept in `raised`: the builder would print it and go on."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            self._phases: dict[str, tuple[tuple[str, ...], int]] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            around = self._phases[parent][0] if parent in self._phases else ()
            self._phases[name] = ((*around, name), steps)
            self._report(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self._report(name, step + 1)
            return self.raised is None

        def phase_finish(self, name: str) -> None:
            self._phases.pop(name, None)

        def _report(self, name: str, step: int) -> None:
            if on_progress is None or self.raised is not None or name not in self._phases:
                return
            try:
                on_progress(Progress(self._phases[name][0], step, self._phases[name][1]))
            except BaseException as error:
                self.raised = error  # raised again when the builder has returned

    return Monitor()


def _checked_targets(backend: Backend, targets: Sequence[str]) -> tuple[str, ...]:
    """What to build for. Raises UsageError for what this backend cannot build here."""
    known = targets_of(backend)
    if backend == "tensorrt" and not known:
        raise UsageError(
            "TensorRT builds engines on the GPU that they are for, and there is none here (TensorRT-RTX needs none: "
            "--engine tensorrt-rtx)"
        )
    if not targets:
        if not torch.cuda.is_available():
            raise UsageError(f"there is no GPU here to build for: say for which, of {', '.join(known)}")
        targets = (device_target(torch.device("cuda")),)
    for target in targets:
        if target not in known:
            raise UsageError(f"{PRODUCTS[backend]} cannot build for {target} here, only for {', '.join(known)}")
    return tuple(sorted(set(targets), key=lambda name: int(name[2:])))


def _check_space(onnx: Path, destination: Path) -> None:
    """Raises SourceError where there is not even room for the weights: a build takes minutes."""
    data = onnx.with_name(f"{onnx.name}.data")
    try:
        weights = (data if data.exists() else onnx).stat().st_size
        free = shutil.disk_usage(destination.parent).free
    except OSError as error:
        raise SourceError(f"{error.filename or onnx} cannot be read: {error.strerror or error}") from error
    if free < weights:
        raise SourceError(
            f"{destination} cannot be written: {free / 1e9:.1f} GB are free there, and the weights alone have "
            f"{weights / 1e9:.1f}"
        )


def _check_network(
    trt: Any, network: Any, schema: Schema, dtype: torch.dtype, profiles: Sequence[Profile], onnx: Path
) -> None:
    """Raises SourceError where a parsed network's inputs and outputs are not those of the schema.

    Axes that are the same for every request of the profiles may be fixed in the network, as those of a static export.
    """
    for what, slots, tensors in (
        ("inputs", schema.inputs, [network.get_input(i) for i in range(network.num_inputs)]),
        ("outputs", schema.outputs, [network.get_output(i) for i in range(network.num_outputs)]),
    ):
        names = [tensor.name for tensor in tensors]
        wanted = [slot.name for slot in slots]
        if names != wanted:
            raise SourceError(f"{onnx} has the {what} {', '.join(names) or 'none'}, and not {', '.join(wanted)}")
        for slot, tensor in zip(slots, tensors, strict=True):
            found, expected = str(tensor.dtype).rpartition(".")[2], DTYPES[slot_dtype(slot, dtype)]
            if found != expected:
                raise SourceError(f"{onnx}: {slot.name} is {found}, and not {expected}")
            _check_axes(slot, tuple(tensor.shape), profiles, onnx)


def _check_axes(slot: Slot, shape: tuple[int, ...], profiles: Sequence[Profile], onnx: Path) -> None:
    """Raises SourceError where a network's tensor is not of a slot's rank, or fixes what is dynamic."""
    dynamic = tuple(axis if isinstance(axis, int) else -1 for axis in slot.axes)
    fixed = {size for profile in profiles for size in profile.shapes(slot)}
    if shape != dynamic and fixed != {shape}:
        raise SourceError(f"{onnx}: {slot.name} is {list(shape)}, and not {list(dynamic)}")


def _add_profiles(builder: Any, config: Any, schema: Schema, profiles: Sequence[Profile], log: Any) -> None:
    """Give the builder the profiles, and read them back. Raises UsageError where it does not take one as it is."""
    for i, profile in enumerate(profiles):
        theirs = builder.create_optimization_profile()
        for slot in schema.inputs:
            theirs.set_shape(slot.name, *profile.shapes(slot))
        if config.add_optimization_profile(theirs) != i:
            raise UsageError(f"profile {profile.name} was not accepted: {reason(log.errors)}")
        for slot in schema.inputs:
            found = tuple(tuple(shape) for shape in theirs.get_shape(slot.name))
            if found != profile.shapes(slot):
                raise UsageError(f"profile {profile.name}: {slot.name} became {found}, not {profile.shapes(slot)}")


def _parser_error(parser: Any, log: Any) -> str:
    """The first thing that a parser did not like, with the node's name where there is one."""
    if not parser.num_errors:
        return reason(log.errors)
    error = parser.get_error(0)
    where = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    return where + reason([error.desc().removeprefix(f"Invalid Node - {error.node_name()}")])


def _build_error(log: Any) -> str:
    """Why a build failed."""
    if re.search("bad_alloc|out ?of ?memory", " ".join(log.errors), re.IGNORECASE):
        return "it ran out of memory, so free some, or build fewer profiles"
    return reason(log.errors)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Nothing stays where a file could not be written as a whole."""
    try:
        yield
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SourceError(f"{path} cannot be written: {error.strerror or error}") from error
        raise
