"""CUDA graphs: calls that came before are recorded, and launched as one from then on; and PyTorch's modules so run."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from nativesd.errors import NativesdWarning, UsageError
from nativesd.export.graphs import Graph
from nativesd.export.slots import Request

T = TypeVar("T")
GRAPHS = 8  # that a runner keeps at most, one for each shape


class Queue(Protocol):
    """Where graphs run, one after another: a CUDA stream."""

    @property
    def device(self) -> torch.device:
        """Where tensors have to be."""

    @property
    def handle(self) -> int:
        """What TensorRT calls it."""

    def use(self) -> AbstractContextManager[None]:
        """Work that is queued in the block runs after what the caller has queued so far, and before what follows."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work as one launch, which the result makes. What it leaves must be in memory from before."""

    def wait(self) -> None:
        """Until all work is done."""


class CudaQueue:
    """A stream of its own: on the default one, TensorRT synchronizes the device. Raises UsageError without a GPU."""

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise UsageError("TensorRT engines and CUDA graphs run on an NVIDIA GPU, and PyTorch finds none here")
        self.device = torch.empty(0, device=device).device  # with its index, as tensors have it
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.handle = int(self._stream.cuda_stream)
        self._pool = torch.cuda.graph_pool_handle()  # one memory for all graphs, which run one after another

    @contextmanager
    def use(self) -> Iterator[None]:
        """See `Queue`. Tensors of either stream outlive the other's work, as each waits for the other."""
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Queue`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def wait(self) -> None:
        """See `Queue`."""
        self._stream.synchronize()


@dataclass(frozen=True)
class Capture:
    """A recorded call: the tensors that it reads and writes, its launch, and what has to live as long."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    replay: Callable[[], None]
    needs: object = None

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in (*self.inputs.values(), *self.outputs.values()))


class Captures:
    """The recorded calls of one runner, by what tells them apart: the last used ones, `limit` at most.

    `seen` has what came at least once.
    """

    def __init__(self, queue: Queue, limit: int = GRAPHS, *, name: str = "") -> None:
        self.seen: set[Hashable] = set()
        self._name = name
        self._queue = queue
        self._limit = limit
        self._kept: OrderedDict[Hashable, Capture] = OrderedDict()
        self._too_large: set[Hashable] = set()

    def run(
        self,
        key: Hashable,
        inputs: Mapping[str, Tensor],
        call: Callable[[], dict[str, Tensor]],
        capture: Callable[[], Capture],
    ) -> dict[str, Tensor]:
        """The outputs for `inputs`: by the `call` itself where its key is new, else by its graph, recorded if need be.

        What is computed once for a shape is thus done in a call, and never recorded. Graphs hold on to the memory that
        they work in: where there is too little, all of them are given up, and a key for which that is not enough is not
        recorded. Where recording fails otherwise, nothing is recorded from then on, and a warning says why.
        """
        if key not in self._kept:
            if key not in self.seen or key in self._too_large or not self._limit:
                outputs = self._within_memory(call)
                self.seen.add(key)
                return outputs
            try:
                self._kept[key] = self._within_memory(capture)
            except torch.OutOfMemoryError:
                self._too_large.add(key)
                return call()
            except RuntimeError as error:
                self.forget()
                self._limit = 0
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(
                    f"{self._name} runs without CUDA graphs, which is slower: recording one fails ({reason})",
                    NativesdWarning,
                    stacklevel=2,
                )
                return call()
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        graph = self._kept[key]
        out = {name: torch.empty_like(tensor) for name, tensor in graph.outputs.items()}
        with self._queue.use():
            for name, tensor in inputs.items():
                graph.inputs[name].copy_(tensor)
            graph.replay()
            for name, tensor in graph.outputs.items():
                out[name].copy_(tensor)
        return out

    def _within_memory(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self._kept:
                raise
        self.forget()
        return work()

    def forget(self) -> int:
        """Drop all graphs; returns the bytes of their tensors."""
        if not self._kept:
            return 0
        self._queue.wait()
        freed = sum(graph.size for graph in self._kept.values())
        self._kept.clear()
        torch.cuda.empty_cache()  # the memory that they worked in
        return freed


class CapturedRunner:
    """A module of PyTorch's behind `Runner`'s call, for one thread: no launches but one, from a shape's second call on.

    Weights may be written to. Where a weight is in other memory than it was, everything is recorded again. It pays
    where launches take longer than what they launch, which is where models and pictures are small: the keys and values
    of the text, and what prompt and negative prompt have in common, are computed anew at every step here.
    """

    def __init__(self, graph: Graph, queue: Queue, *, graphs: int = GRAPHS) -> None:
        self.schema = graph.schema
        self._module = graph.module
        self._queue = queue
        self._captures = Captures(queue, graphs, name=graph.schema.component)
        self._addresses: tuple[int, ...] = ()

    def refusal(self, request: Request) -> str | None:
        """See `Runner`: any size will do."""

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Runner`. The tensors have to be on the queue's device."""
        graph = Graph(self._module, self.schema.given(given.keys()))
        request = graph.schema.request({name: tuple(tensor.shape) for name, tensor in given.items()})
        addresses = tuple(parameter.data_ptr() for parameter in self._module.parameters())
        if addresses != self._addresses:
            self._captures.forget()
            self._addresses = addresses

        def compute(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            results = graph(*(inputs[slot.name] for slot in graph.schema.inputs))
            return {slot.name: result for slot, result in zip(graph.schema.outputs, results, strict=True)}

        def capture() -> Capture:
            mine = {name: tensor.clone() for name, tensor in given.items()}
            with self._queue.use():
                # in the queue's stream too, things are done once; what views share cannot be written to
                outputs = {name: result.contiguous() for name, result in compute(mine).items()}

            def work() -> None:
                for name, result in compute(mine).items():
                    outputs[name].copy_(result)

            return Capture(mine, outputs, self._queue.capture(work))

        return self._captures.run((request, frozenset(given)), given, lambda: compute(given), capture)

    def close(self) -> int:
        """See `Runner`. From then on the module is called."""
        freed = self._captures.forget()
        self._captures = Captures(self._queue, 0)
        return freed
