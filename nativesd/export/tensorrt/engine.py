"""TensorRT engines as runners: torch tensors bound where they are, on one queue, with shared activation memory."""

# ruff: noqa: D102 (the methods of Engine and Context are TensorRT's)

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nativesd.errors import SourceError, UsageError
from nativesd.export.capture import GRAPHS, Capture, Captures, Queue
from nativesd.export.slots import Request, Schema, Slot
from nativesd.export.tensorrt.product import DTYPES, reason, slot_dtype
from nativesd.export.tensorrt.profiles import Profile, distance, within

ALIGNMENT = 256  # bytes, of every address that is bound: NvInferRuntime.h, IExecutionContext::setInputTensorAddress


class Engine(Protocol):
    """What is used of TensorRT's ICudaEngine."""

    @property
    def num_io_tensors(self) -> int: ...
    @property
    def num_optimization_profiles(self) -> int: ...
    def get_tensor_name(self, index: int, /) -> str: ...
    def get_tensor_dtype(self, name: str, /) -> Any: ...
    def get_tensor_shape(self, name: str, /) -> Sequence[int]: ...
    def get_tensor_profile_shape(self, name: str, profile: int, /) -> Sequence[Sequence[int]]: ...
    @property
    def device_memory_size_v2(self) -> int: ...


class Context(Protocol):
    """What is used of TensorRT's IExecutionContext."""

    def set_optimization_profile_async(self, profile: int, stream: int, /) -> bool: ...
    def set_input_shape(self, name: str, shape: tuple[int, ...], /) -> bool: ...
    def set_tensor_address(self, name: str, address: int, /) -> bool: ...
    def update_device_memory_size_for_shapes(self) -> int: ...
    def set_device_memory(self, address: int, size: int, /) -> None: ...
    def execute_async_v3(self, stream: int, /) -> bool: ...


class NoRoomError(UsageError):
    """An engine that needs more memory than the GPU has free."""


class Arena:
    """Activation memory for all engines of one queue: they run one after another, so the largest need is enough."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.generation = 0
        """Changes when the memory is another, which makes CUDA graphs that were captured before stale."""
        self._memory: Tensor | None = None
        self._users = 0

    @property
    def size(self) -> int:
        """Bytes held."""
        return 0 if self._memory is None else self._memory.numel()

    def attach(self) -> None:
        """Count a user."""
        self._users += 1

    def detach(self) -> int:
        """Count a user less; the last one frees the memory. Returns how many bytes."""
        self._users -= 1
        freed = 0 if self._users else self.size
        if freed:
            self._replace(None)
        return freed

    def reserve(self, size: int) -> int:
        """The address of at least `size` bytes, until the next call that needs more."""
        if self._memory is None or self.size < size:
            self._replace(None)  # before the new one is made, so that both are never held
            try:
                self._replace(torch.empty(size, dtype=torch.uint8, device=self.queue.device))
            except torch.OutOfMemoryError:
                raise NoRoomError(
                    f"an engine needs {size / 1e9:.1f} GB of activation memory for this size, which are not free"
                ) from None
        assert self._memory is not None
        return self._memory.data_ptr()

    def _replace(self, memory: Tensor | None) -> None:
        self.queue.wait()
        self._memory = memory
        self.generation += 1


class Cache(Protocol):
    """What an engine compiles when it first sees a shape, kept for the next process."""

    def save(self) -> None:
        """Write it, if there is anything new."""


class EngineRunner:
    """An engine behind `Runner`'s call, for one thread. Tensors are bound where they are, every binding at every call.

    new_context  makes execution contexts without memory of their own; each profile gets one, and each CUDA graph, as
                 NVIDIA's "Working with CUDA Graphs" advises
    dtype        of the weights
    graphs       how many CUDA graphs are kept; one is captured when a shape comes for the second time
    names        of the profiles, as far as they have any
    weights      bytes that the engine holds on the device, for what `close` returns
    errors       TensorRT's messages, to which it adds
    """

    def __init__(
        self,
        engine: Engine,
        new_context: Callable[[], Context],
        schema: Schema,
        arena: Arena,
        *,
        dtype: torch.dtype,
        graphs: int = GRAPHS,
        names: Sequence[str] = (),
        weights: int = 0,
        cache: Cache | None = None,
        errors: Sequence[str] = (),
    ) -> None:
        self.schema = schema
        self.profiles = _profiles(engine, schema, dtype, names)
        self._engine: Engine | None = engine
        self._new_context = new_context
        self._dtype = dtype
        self._arena = arena
        self._queue = arena.queue
        self._weights = weights
        self._cache = cache
        self._errors = errors
        self._contexts: dict[int, Context] = {}
        self._zeros: Tensor | None = None
        self._captures = Captures(arena.queue, graphs, name=f"the {schema.component} engine")
        self._generation = arena.generation
        arena.attach()

    def refusal(self, request: Request) -> str | None:
        """See `Runner`."""
        if self._fitting(request):
            return None
        ranges = "; ".join(f"{p.name} ({p.min} to {p.max})" for p in self.profiles)
        return f"{self.schema.component}: {request} is outside of every profile of this engine: {ranges}"

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Runner`. The tensors have to be on the engine's device, of the slots' dtypes."""
        if self._engine is None:
            raise UsageError(f"this {self.schema.component} engine was closed: load it again")
        inputs = self._checked(given)
        present = replace(self.schema, inputs=tuple(slot for slot in self.schema.inputs if slot.name in inputs))
        request = present.request({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        fitting = self._fitting(request)
        if not fitting:
            raise UsageError(str(self.refusal(request)))
        profile = min(fitting, key=lambda index: distance(self.schema, request, self.profiles[index]))
        self._follow_arena()
        key = (request, frozenset(inputs))

        def call() -> dict[str, Tensor]:
            outputs = self._outputs(request)
            if profile not in self._contexts:
                self._contexts[profile] = self._context(profile)
            context = self._contexts[profile]
            self._bind(context, request, profile, inputs, outputs)
            with self._queue.use():
                self._execute(context)
            if key not in self._captures.seen and self._cache is not None:
                self._cache.save()
            return outputs

        return self._captures.run(key, inputs, call, lambda: self._capture(request, profile, inputs))

    def close(self) -> int:
        """See `Runner`. The arena's memory goes with the last of its engines."""
        if self._engine is None:
            return 0
        self._queue.wait()
        freed = self._weights + self._captures.forget() + (0 if self._zeros is None else self._zeros.nbytes)
        if self._cache is not None:
            self._cache.save()
        self._contexts.clear()
        self._zeros = self._engine = self._cache = None
        self._new_context = _closed
        return freed + self._arena.detach()

    def _checked(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they can be bound. Raises UsageError for names, dtypes and devices that are not the slots'."""
        slots = {slot.name: slot for slot in self.schema.inputs}
        unknown = sorted(given.keys() - slots.keys())
        if unknown:
            raise UsageError(f"{self.schema.component}: there is no input {', '.join(unknown)}")
        inputs = {}
        for name, slot in slots.items():
            if name not in given:
                if not slot.is_optional:
                    raise UsageError(f"{self.schema.component}: {name} was not given")
                continue
            tensor, dtype = given[name], slot_dtype(slot, self._dtype)
            if tensor.dtype != dtype or tensor.device != self._queue.device:
                raise UsageError(
                    f"{self.schema.component}: {name} was given as {tensor.dtype} on {tensor.device}, and the engine "
                    f"takes {dtype} on {self._queue.device}"
                )
            tensor = tensor.contiguous()
            inputs[name] = tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
        return inputs

    def _fitting(self, request: Request) -> list[int]:
        """The profiles that a request is within."""
        return [i for i, profile in enumerate(self.profiles) if within(self.schema, request, profile)]

    def _context(self, profile: int) -> Context:
        """A new context, which keeps its profile."""
        with self._queue.use():  # which makes its device the current one: contexts are made on that
            context = self._new_context()
            self._must(context.set_optimization_profile_async(profile, self._queue.handle), "the profile")
        return context

    def _bind(
        self,
        context: Context,
        request: Request,
        profile: int,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Every shape, every address and the activation memory: nothing of an earlier call stays bound."""
        zeros = self._zeros_for(request, (slot for slot in self.schema.inputs if slot.name not in inputs))
        for slot in self.schema.inputs:
            self._must(context.set_input_shape(slot.name, slot.shape(request)), f"{slot.name}'s shape")
            address = inputs[slot.name].data_ptr() if slot.name in inputs else zeros
            self._must(context.set_tensor_address(slot.name, address), f"{slot.name}'s address")
        for name, tensor in outputs.items():
            self._must(context.set_tensor_address(name, tensor.data_ptr()), f"{name}'s address")
        assert self._engine is not None
        size = context.update_device_memory_size_for_shapes()  # 0 where it is not known
        # not of the profile alone: TensorRT 10.7 crashes when asked (NVIDIA/TensorRT#4302)
        size = size or self._engine.device_memory_size_v2
        address = self._arena.reserve(size)
        self._follow_arena()
        context.set_device_memory(address, self._arena.size)

    def _follow_arena(self) -> None:
        """Forget graphs that hold the address of memory that was too small for another call, or another engine."""
        if self._arena.generation != self._generation:
            self._captures.forget()
            self._generation = self._arena.generation

    def _zeros_for(self, request: Request, slots: Iterable[Slot]) -> int:
        """The address of as many zeros as the largest of these slots needs: inputs are only read, so all share it."""
        size = max((math.prod(slot.shape(request)) for slot in slots), default=0) * self._dtype.itemsize
        if self._zeros is None or self._zeros.nbytes < size:
            self._captures.forget()  # which hold the address of the smaller ones
            self._zeros = torch.zeros(size, dtype=torch.uint8, device=self._queue.device)
        return self._zeros.data_ptr()

    def _outputs(self, request: Request) -> dict[str, Tensor]:
        return {
            slot.name: torch.empty(
                slot.shape(request), dtype=slot_dtype(slot, self._dtype), device=self._queue.device
            )
            for slot in self.schema.outputs
        }  # fmt: skip

    def _execute(self, context: Context) -> None:
        self._must(context.execute_async_v3(self._queue.handle), "the call")

    def _capture(self, request: Request, profile: int, inputs: Mapping[str, Tensor]) -> Capture:
        """A graph with tensors of its own, for requests of this shape with these inputs."""
        mine = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
        outputs = self._outputs(request)
        context = self._context(profile)
        self._bind(context, request, profile, mine, outputs)
        with self._queue.use():
            for name, tensor in inputs.items():
                mine[name].copy_(tensor)
            self._execute(context)  # whatever is done once for a shape is not to be captured
            capturable = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX's own
            if capturable is not None and not capturable(self._queue.handle):
                raise RuntimeError("TensorRT-RTX says that this engine allocates while it runs")
        replay = self._queue.capture(lambda: self._execute(context))
        return Capture(mine, outputs, replay, needs=context)

    def _must(self, done: bool, what: str) -> None:
        """TensorRT answers False, and says why in its log."""
        if not done:
            raise SourceError(f"TensorRT did not take {what}: {reason(self._errors[-1:])}")


def _profiles(engine: Engine, schema: Schema, dtype: torch.dtype, names: Sequence[str]) -> tuple[Profile, ...]:
    """The profiles of an engine. Raises SourceError where its inputs, outputs or profiles are not the schema's."""
    wanted = {slot.name: DTYPES[slot_dtype(slot, dtype)] for slot in (*schema.inputs, *schema.outputs)}
    found = {
        name: str(engine.get_tensor_dtype(name)).rpartition(".")[2]
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
    }
    if found != wanted:
        wrong = sorted({name for name, _ in found.items() ^ wanted.items()})
        raise SourceError(f"the engine is not this {schema.component}'s: it differs in {', '.join(wrong)}")
    profiles = []
    for index in range(engine.num_optimization_profiles):
        shapes = {slot.name: _bounds(engine, slot.name, index) for slot in schema.inputs}
        try:
            least, best, most = (
                schema.request({name: tuple(three[i]) for name, three in shapes.items()}) for i in range(3)
            )
        except UsageError as error:
            raise SourceError(f"profile {index} of the engine does not fit this {schema.component}: {error}") from error
        profiles.append(Profile(names[index] if index < len(names) else str(index), least, best, most))
    return tuple(profiles)


def _bounds(engine: Engine, name: str, profile: int) -> Sequence[Sequence[int]]:
    """The smallest, best and largest shape of an input, which has only one where no axis is dynamic."""
    shape = tuple(engine.get_tensor_shape(name))
    return engine.get_tensor_profile_shape(name, profile) if -1 in shape else (shape,) * 3


def _closed() -> Context:
    raise UsageError("this engine was closed: load it again")
