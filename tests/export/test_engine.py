"""The engine runtime's own logic, against an engine that records and computes on the CPU. No engine is executed here.

The context reads and writes at the addresses that it was given, so a stale or wrong binding gives a wrong result.
"""

from __future__ import annotations

import ctypes
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nativesd.config import Level, UNetConfig
from nativesd.errors import SourceError, UsageError
from nativesd.export.capture import CudaQueue
from nativesd.export.kept.entries import RUNTIME_CACHE, Entry, Key
from nativesd.export.kept.store import Store
from nativesd.export.slots import Request, Schema, unet_schema
from nativesd.export.tensorrt import loading as module
from nativesd.export.tensorrt.engine import Arena, EngineRunner
from nativesd.export.tensorrt.loading import RuntimeCache, load_engine
from nativesd.export.tensorrt.product import DTYPES, ENGINE, slot_dtype
from nativesd.export.tensorrt.profiles import Profile

SCHEMA = unet_schema(
    UNetConfig((Level(8, (1,), (1, 1), 2), Level(16, (None,), (None, None), 2)), mid=(1, None), context=12)
)
PROFILES = (
    Profile("small", Request(1, 4, 4, 77), Request(2, 8, 8, 77), Request(2, 9, 9, 154)),
    Profile("large", Request(1, 8, 8, 77), Request(2, 16, 16, 77), Request(4, 17, 17, 231)),
)
ODD = Request(2, 9, 7, 77)
DTYPE = torch.float16


def read(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor at an address."""
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).reshape(shape)


@dataclass
class FakeEngine:
    """ICudaEngine with a schema's inputs and outputs."""

    schema: Schema = SCHEMA
    profiles: tuple[Profile, ...] = PROFILES

    def __post_init__(self) -> None:
        self.slots = {slot.name: slot for slot in (*self.schema.inputs, *self.schema.outputs)}
        self.num_io_tensors = len(self.slots)
        self.num_optimization_profiles = len(self.profiles)
        self.device_memory_size_v2 = 2000
        self.contexts: list[FakeContext] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.slots)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return f"DataType.{DTYPES[slot_dtype(self.slots[name], DTYPE)]}"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else -1 for axis in self.slots[name].axes)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return list(self.profiles[profile].shapes(self.slots[name]))

    def context(self) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


@dataclass
class FakeContext:
    """IExecutionContext: out_sample is the sample, plus what every control slot holds on average."""

    engine: FakeEngine
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    profiles: list[int] = field(default_factory=list)
    memory: tuple[int, int] = (0, 0)
    works: bool = True
    known: bool = True
    """Whether it says how much memory a shape needs"""

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profiles.append(profile)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 10 * math.prod(self.shapes["sample"]) if self.known else 0

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        assert set(self.addresses) == set(self.engine.slots)
        total = read(self.addresses["sample"], self.shapes["sample"], DTYPE).float()
        for slot in self.engine.schema.control:
            total = total + read(self.addresses[slot.name], self.shapes[slot.name], DTYPE).float().mean()
        read(self.addresses["out_sample"], tuple(total.shape), DTYPE).copy_(total)
        return self.works


class FakeQueue:
    """A stream on which work is done at once. `captured` counts the graphs."""

    device = torch.device("cpu")
    handle = 7
    captured = 0
    works = True

    used = False

    @contextmanager
    def use(self) -> Iterator[None]:
        self.used = True  # and its device is the current one
        try:
            yield
        finally:
            self.used = False

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if not self.works:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured += 1
        return work

    def wait(self) -> None:
        pass


@dataclass
class Rig:
    """A runner over a recording engine."""

    graphs: int = 0
    engine: FakeEngine = field(default_factory=FakeEngine)
    queue: FakeQueue = field(default_factory=FakeQueue)

    def __post_init__(self) -> None:
        self.arena = Arena(self.queue)
        self.runner = self.another(SCHEMA)

    def another(self, schema: Schema, **options: Any) -> EngineRunner:
        return EngineRunner(
            self.engine, self.engine.context, schema, self.arena, dtype=DTYPE, graphs=self.graphs,
            names=[profile.name for profile in PROFILES], weights=5000, **options,
        )  # fmt: skip


def inputs(request: Request = ODD, *, control: float | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs; control slots, where asked for, hold one number throughout."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for slot in SCHEMA.inputs:
        dtype = slot_dtype(slot, DTYPE)
        if not slot.is_control:
            out[slot.name] = torch.randn(slot.shape(request), generator=generator).to(dtype)
        elif control is not None:
            out[slot.name] = torch.full(slot.shape(request), control, dtype=dtype)
    return out


def expected(given: Mapping[str, Tensor]) -> Tensor:
    control = [given[slot.name].float().mean() for slot in SCHEMA.control if slot.name in given]
    return (given["sample"].float() + sum(control)).to(DTYPE)


@pytest.mark.parametrize("graphs", [0, 8])
def test_control_is_switched_on_and_off_between_calls_and_sizes(graphs: int) -> None:
    rig = Rig(graphs)
    seed = 0
    for request in (ODD, Request(1, 16, 17, 154), ODD, Request(4, 17, 17, 231), ODD):
        for control in (None, 0.5, None, -0.25, None, 0.5):
            seed += 1
            given = inputs(request, control=control, seed=seed)
            out = rig.runner.run(given)["out_sample"]
            torch.testing.assert_close(out, expected(given), msg=f"{request}, control {control}")
    assert (rig.queue.captured > 0) == (graphs > 0)


def test_slots_that_are_not_given_share_one_buffer_of_zeros_of_the_largest_size() -> None:
    rig = Rig()
    rig.runner.run(inputs(control=1.0))
    rig.runner.run(inputs())
    [context] = rig.engine.contexts
    [address] = {context.addresses[slot.name] for slot in SCHEMA.control}
    assert {name: context.shapes[name] for name in ("input_control_00", "input_control_middle")} == {
        "input_control_00": (2, 8, 9, 7),
        "input_control_middle": (2, 16, 5, 4),  # halved rounding up
    }
    rig.runner.run(inputs(Request(1, 4, 4, 77)))
    assert {context.addresses[slot.name] for slot in SCHEMA.control} == {address}  # it persists


def test_some_slots_may_be_given() -> None:
    rig = Rig()
    given = inputs(control=0.5)
    del given["input_control_01"]
    torch.testing.assert_close(rig.runner.run(given)["out_sample"], expected(given))


def test_tensors_are_bound_where_they_are_unless_they_cannot_be() -> None:
    rig = Rig()
    given = inputs()
    storage = torch.zeros(given["sample"].numel() + 256, dtype=DTYPE)
    skip = (-storage.data_ptr() % 256) // DTYPE.itemsize
    shape = given["sample"].shape
    aligned = storage[skip : skip + given["sample"].numel()].view(shape).copy_(given["sample"])
    rig.runner.run(given | {"sample": aligned})
    [context] = rig.engine.contexts
    assert context.addresses["sample"] == aligned.data_ptr()
    last = given["sample"].to(memory_format=torch.channels_last)
    unaligned = torch.zeros(last.numel() + 1, dtype=DTYPE)[1:].view(shape).copy_(last)
    for tensor in (last, unaligned):
        out = rig.runner.run(given | {"sample": tensor})["out_sample"]
        torch.testing.assert_close(out, expected(given))
        assert context.addresses["sample"] != tensor.data_ptr()


@pytest.mark.parametrize("order", [1, -1])
def test_the_profile_is_the_one_that_is_fastest_nearest_to_the_request(order: int) -> None:
    rig = Rig(engine=FakeEngine(profiles=PROFILES[::order]))
    for request, profile in (
        (Request(2, 8, 8, 77), 0), (Request(2, 9, 9, 154), 0), (Request(2, 9, 9, 231), 1), (Request(1, 4, 4, 77), 0),
        (Request(4, 8, 8, 77), 1),
    ):  # fmt: skip
        assert rig.runner.refusal(request) is None
        rig.runner.run(inputs(request))
        used = [context for context in rig.engine.contexts if context.shapes["sample"] == (
            request.batch, 4, request.height, request.width
        ) and context.shapes["encoder_hidden_states"][1] == request.tokens]  # fmt: skip
        assert [context.profiles for context in used] == [[profile if order == 1 else 1 - profile]]
    assert len(rig.engine.contexts) == 2  # each keeps its profile: none is ever switched


@pytest.mark.parametrize(
    "request_", [Request(1, 3, 4, 77), Request(4, 4, 4, 77), Request(1, 18, 17, 77), Request(2, 9, 9, 308)]
)
def test_what_no_profile_takes_is_refused_before_anything_is_bound(request_: Request) -> None:
    rig = Rig()
    refusal = rig.runner.refusal(request_)
    assert refusal == (
        f"unet: {request_} is outside of every profile of this engine: small (1x4x4, 77 tokens to 2x9x9, 154 tokens); "
        "large (1x8x8, 77 tokens to 4x17x17, 231 tokens)"
    )
    with pytest.raises(UsageError, match="outside of every profile"):
        rig.runner.run(inputs(request_))
    assert rig.engine.contexts == []


def wrong_dtype(given: dict[str, Tensor]) -> None:
    given["timestep"] = given["timestep"].half()


def wrong_device(given: dict[str, Tensor]) -> None:
    given["sample"] = given["sample"].to("meta")


def wrong_shape(given: dict[str, Tensor]) -> None:
    given["input_control_02"] = given["input_control_02"][:, :, :-1]


def wrong_name(given: dict[str, Tensor]) -> None:
    given["input_control_99"] = given["input_control_02"]


def missing(given: dict[str, Tensor]) -> None:
    del given["encoder_hidden_states"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_dtype, r"timestep was given as torch.float16 on cpu, and the engine takes torch.float32 on cpu"),
        (wrong_device, r"sample was given as torch.float16 on meta"),
        (wrong_shape, r"input_control_02 was given shape \(2, 8, 4, 4\), and .* needs \(2, 8, 5, 4\)"),
        (wrong_name, r"there is no input input_control_99"), (missing, r"encoder_hidden_states was not given"),
    ],
)  # fmt: skip
def test_bindings_are_checked_at_every_call(spoil: Callable[[dict[str, Tensor]], None], reason: str) -> None:
    rig = Rig()
    rig.runner.run(inputs(control=0.5))
    given = inputs(control=0.5)
    spoil(given)
    with pytest.raises(UsageError, match=reason):
        rig.runner.run(given)


def test_what_the_engine_does_not_do_is_said_with_its_reason() -> None:
    rig = Rig()
    runner = rig.another(SCHEMA, errors=["CUDA error 700"])
    runner.run(inputs())
    rig.engine.contexts[0].works = False
    with pytest.raises(SourceError, match="did not take the call: CUDA error 700"):
        runner.run(inputs())


def test_graphs_are_kept_by_shape_and_by_the_slots_that_are_given() -> None:
    rig = Rig(graphs=2)
    captured = []
    for request, control in [(ODD, None)] * 3 + [(ODD, 0.5)] * 3 + [(ODD, None), (Request(1, 4, 4, 77), None)]:
        given = inputs(request, control=control)
        torch.testing.assert_close(rig.runner.run(given)["out_sample"], expected(given))
        captured.append(rig.queue.captured)
    assert captured == [0, 1, 1, 1, 2, 2, 2, 2]  # a shape's second call captures
    contexts = len(rig.engine.contexts)
    rig.runner.run(inputs(Request(1, 4, 4, 77)))  # a third graph, and two are kept: the one with control goes
    assert (rig.queue.captured, len(rig.engine.contexts)) == (3, contexts + 1)
    rig.runner.run(inputs())
    assert rig.queue.captured == 3
    rig.runner.run(inputs(control=0.5))
    assert rig.queue.captured == 4


def test_results_of_graphs_are_the_callers_own() -> None:
    rig = Rig(graphs=1)
    rig.runner.run(inputs())
    first = rig.runner.run(inputs(seed=1))["out_sample"]
    kept = first.clone()
    rig.runner.run(inputs(seed=2))
    torch.testing.assert_close(first, kept)


def test_graphs_are_captured_again_when_memory_that_they_hold_is_another() -> None:
    rig = Rig(graphs=8)
    other = rig.another(SCHEMA)
    for _ in range(3):
        rig.runner.run(inputs(control=0.5))
    assert rig.queue.captured == 1
    other.run(inputs(Request(4, 17, 17, 77)))  # another engine needs more: the arena's memory moves
    given = inputs(control=0.25)
    torch.testing.assert_close(rig.runner.run(given)["out_sample"], expected(given))
    assert rig.queue.captured == 2
    address, size = rig.engine.contexts[-1].memory
    assert size == rig.arena.size == 10 * 4 * 4 * 17 * 17
    assert address == rig.arena.reserve(0)


def test_graphs_are_captured_again_when_their_zeros_are_too_few_for_another() -> None:
    rig = Rig(graphs=8)
    rig.arena.reserve(1_000_000)
    for request in (ODD, ODD, Request(4, 17, 17, 77), ODD):
        rig.runner.run(inputs(request))
    assert rig.queue.captured == 2
    assert {context.addresses["input_control_00"] for context in rig.engine.contexts[2:]} == {
        rig.engine.contexts[-1].addresses["input_control_01"]
    }


def test_what_cannot_be_captured_runs_plainly_and_is_said_once() -> None:
    """Where the capture fails, and where TensorRT-RTX's context says beforehand that it would."""

    class Unable(FakeContext):
        def is_stream_capturable(self, stream: int) -> bool:
            return False

    for reason in ("operation not permitted when stream is capturing", "this engine allocates while it runs"):
        rig = Rig(graphs=8)
        rig.queue.works = "allocates" in reason
        if rig.queue.works:
            rig.engine.context = lambda engine=rig.engine: Unable(engine)  # type: ignore[method-assign]
            rig.runner = rig.another(SCHEMA)
        sentence = rf"the unet engine runs without CUDA graphs, which is slower: recording one fails \(.*{reason}\)"
        rig.runner.run(inputs())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seed in range(4):
                given = inputs(ODD if seed else Request(1, 4, 4, 77), seed=seed)
                torch.testing.assert_close(rig.runner.run(given)["out_sample"], expected(given))
        assert re.search(sentence, str(caught[0].message))
        assert (len(caught), rig.queue.captured) == (1, 0)


def test_contexts_that_do_not_know_their_need_get_the_engines() -> None:
    """What TensorRT 10.7 crashes at (get_device_memory_size_for_profile_v2) is not called: the engine has no such."""
    rig = Rig()
    context = FakeContext(rig.engine, known=False)
    rig.engine.context = lambda: context  # type: ignore[method-assign]
    rig.another(SCHEMA).run(inputs())
    assert context.memory[1] == rig.engine.device_memory_size_v2


def test_contexts_are_made_on_the_queues_device() -> None:
    rig, made = Rig(graphs=1), []
    plainly = rig.engine.context

    def context() -> FakeContext:
        made.append(rig.queue.used)
        return plainly()

    rig.engine.context = context  # type: ignore[method-assign]
    runner = rig.another(SCHEMA)
    for _ in range(2):
        runner.run(inputs())
    assert made == [True, True]  # one for calls, one for the graph


def test_engines_share_activation_memory_and_the_last_one_frees_it() -> None:
    rig = Rig(graphs=8)
    other = rig.another(SCHEMA)
    rig.runner.run(inputs(Request(4, 17, 17, 77)))
    size = rig.arena.size
    other.run(inputs())
    assert rig.arena.size == size  # enough for both
    assert {context.memory for context in rig.engine.contexts} == {(rig.arena.reserve(0), size)}
    zeros = 2 * 8 * 9 * 7 * DTYPE.itemsize
    assert other.close() == 5000 + zeros
    assert rig.arena.size == size
    assert rig.runner.close() == 5000 + 4 * 8 * 17 * 17 * DTYPE.itemsize + size
    assert (rig.arena.size, rig.runner.close()) == (0, 0)
    with pytest.raises(UsageError, match="was closed"):
        rig.runner.run(inputs())


def test_closing_counts_the_graphs() -> None:
    rig = Rig(graphs=8)
    given = inputs(control=0.5)
    rig.runner.run(given)
    [out] = rig.runner.run(given).values()
    held = sum(tensor.nbytes for tensor in given.values()) + out.nbytes
    assert rig.runner.close() == 5000 + held + 10 * given["sample"].numel()


@pytest.mark.parametrize("change", ["dtype", "name", "profile"])
def test_the_engine_of_another_model_is_refused(change: str) -> None:
    control = replace(SCHEMA.control[0], name="input_control_77") if change == "name" else SCHEMA.control[0]
    slots = [control if slot == SCHEMA.control[0] else slot for slot in SCHEMA.inputs]
    if change == "dtype":
        slots[1] = replace(slots[1], kind="weights")
    if change == "profile":
        slots[-1] = replace(slots[-1], axes=slots[0].axes)  # not halved
    rig = Rig()
    rig.engine = FakeEngine(replace(SCHEMA, inputs=tuple(slots)))
    reason = {"dtype": "differs in timestep", "name": "differs in input_control_00, input_control_77"}
    with pytest.raises(SourceError, match=reason.get(change, "profile 0 of the engine does not fit this unet")):
        rig.another(SCHEMA)


def test_an_engine_for_one_size_has_one_profile() -> None:
    engine = FakeEngine(profiles=(Profile("512", ODD, ODD, ODD),))
    engine.get_tensor_shape = lambda name: engine.slots[name].shape(ODD)
    rig = Rig(engine=engine)
    assert rig.runner.refusal(ODD) is None
    assert rig.runner.refusal(replace(ODD, width=8)) is not None


class FakeCache:
    """IRuntimeCache."""

    def __init__(self) -> None:
        self.data, self.taken = b"", b""

    def serialize(self) -> bytes:
        return self.data

    def deserialize(self, data: bytes) -> bool:
        self.taken = data
        return False


def test_what_is_compiled_for_a_shape_is_kept_for_the_next_process(tmp_path: Path) -> None:
    theirs, path = FakeCache(), tmp_path / RUNTIME_CACHE
    runner = Rig().another(SCHEMA, cache=RuntimeCache(theirs, path))
    theirs.data = b"kernels"
    runner.run(inputs())
    assert path.read_bytes() == b"kernels"
    theirs.data = b"more kernels"
    runner.run(inputs())  # nothing is compiled for a shape that was seen
    assert path.read_bytes() == b"kernels"
    runner.close()
    assert path.read_bytes() == b"more kernels"
    again = FakeCache()
    RuntimeCache(again, path)
    assert again.taken == b"more kernels"
    assert list(tmp_path.iterdir()) == [path]


KEY = Key(
    "unet", "sd15", "0123456789ab", "tensorrt-rtx", "1.7.1.116", "sm120", "fp16", ("512",), SCHEMA.digest, True,
    "0.1.0", "opset23",
)  # fmt: skip


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    store = Store(tmp_path)
    with store.building(KEY) as building:
        (building.folder / ENGINE).write_bytes(b"not really an engine")
    [found] = store.entries()
    return found


def load(entry: Entry, monkeypatch: pytest.MonkeyPatch, *, target: str = "sm120", version: str = "1.7.1.116") -> str:
    """What `load_engine` says where the GPU and the installed version are these, and TensorRT takes no engine."""
    trt = SimpleNamespace(
        __name__="tensorrt_rtx", __version__=version, ILogger=type("ILogger", (), {"ERROR": 1}),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: log.log(1, "the magic is wrong")),
    )  # fmt: skip
    monkeypatch.setattr(module, "load_backend", lambda backend: trt)
    monkeypatch.setattr(module, "device_target", lambda device: target)
    with pytest.raises(SourceError) as error:
        load_engine(entry, SCHEMA, dtype=DTYPE, arena=Arena(FakeQueue()))
    return str(error.value)


class StreamingEngine(FakeEngine):
    """An engine of 20 bytes, of which 12 can be streamed."""

    streamable_weights_size = 12
    weight_streaming_budget_v2 = 12

    def get_weight_streaming_automatic_budget(self) -> int:
        return 5

    def create_execution_context(self, strategy: object) -> FakeContext:
        return self.context()


def test_an_engine_is_loaded_on_its_device_and_within_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, engine, used = FakeQueue(), StreamingEngine(), []

    def deserialize(plan: object) -> StreamingEngine:
        used.append(queue.used)
        return engine

    trt = SimpleNamespace(
        __name__="tensorrt", __version__="10.14.1", ILogger=type("ILogger", (), {"ERROR": 1}),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=1),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=deserialize),
    )  # fmt: skip
    monkeypatch.setattr(module, "load_backend", lambda backend: trt)
    monkeypatch.setattr(module, "device_target", lambda device: "sm120")
    for streams in (True, False):
        store = Store(tmp_path / str(streams))
        with store.building(replace(KEY, backend="tensorrt", version="10.14.1")) as building:
            (building.folder / ENGINE).write_bytes(b"not really an engine")
            building.details["weight_streaming"] = streams
        [entry] = store.entries()
        for budget, kept in ((None, 5), (7, 7), (100, 12)) if streams else ((None, 12),):
            engine.weight_streaming_budget_v2 = 12
            runner = load_engine(entry, SCHEMA, dtype=DTYPE, arena=Arena(queue), weight_budget=budget)
            assert engine.weight_streaming_budget_v2 == kept
            for _ in range(3):
                runner.run(inputs())
            assert queue.captured == 0 or not streams
            assert runner.close() >= 20 - 12 + kept
    with pytest.raises(UsageError, match=r"cannot stream its weights, .* build it with --weight-streaming"):
        load_engine(entry, SCHEMA, dtype=DTYPE, arena=Arena(queue), weight_budget=7)
    assert used == [True] * 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is refused where there is no GPU")
def test_without_a_gpu_there_is_no_queue() -> None:
    with pytest.raises(UsageError, match="run on an NVIDIA GPU, and PyTorch finds none here"):
        CudaQueue(torch.device("cuda"))


def test_engines_that_do_not_serve_are_named_with_the_reason(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(entry, monkeypatch, target="sm90").endswith("cannot be used: it was built for sm120, not sm90")
    assert load(entry, monkeypatch, version="1.8.0").endswith("it was built by version 1.7.1.116, not 1.8.0")
    assert load(entry, monkeypatch).endswith("cannot be loaded by tensorrt_rtx 1.7.1.116: the magic is wrong")


def test_a_truncated_engine_is_named_with_the_reason(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    with (entry.path / ENGINE).open("rb+") as file:
        file.truncate(10)
    assert load(entry, monkeypatch).endswith("model.engine has 10 bytes and was written with 20")
