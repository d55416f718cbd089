"""What no card is needed for: which device, in which order, and how much at once, by what is asked of the runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import nativesd
from nativesd.errors import NativesdError
from nativesd.export import sessions
from nativesd.export.check import references
from nativesd.export.graphs import Graph, graph_of
from nativesd.export.slots import Request
from nativesd.export.tensorrt import engines
from nativesd.export.tensorrt.engine import NoRoomError


@pytest.mark.parametrize(
    ("device", "provider", "place"),
    [
        ("cuda:1", "CUDAExecutionProvider", {"device_id": "1"}),
        ("cuda", "CUDAExecutionProvider", {"device_id": "0"}),
        ("cpu", "CPUExecutionProvider", {}),
    ],
)
def test_onnx_runtime_runs_on_the_pipelines_card(
    device: str, provider: str, place: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def session(path: str, options: object, providers: object) -> object:
        asked.append(providers)
        raise RuntimeError("no card is here")

    runtime = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=SimpleNamespace, InferenceSession=session,
    )  # fmt: skip
    monkeypatch.setattr(sessions, "backend", lambda name, extra: runtime)
    with pytest.raises(NativesdError, match="no card is here"):
        sessions.OnnxRunner(Path("model.onnx"), tiny_graph().schema, torch.float32, torch.device(device))
    assert asked == [[(provider, place)]]


class Card:
    """A GPU that is the CPU, and writes down what is asked of it."""

    def __init__(self, patch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor] = lambda out: out) -> None:
        self.events: list[str] = []
        self.requests: list[Request] = []
        self.spoil = spoil
        patch.setattr(engines, "GPU", CPU)
        patch.setattr(engines, "CudaQueue", lambda device: None)
        patch.setattr(engines, "Arena", lambda queue: None)
        patch.setattr(engines.torch.cuda, "empty_cache", lambda: self.events.append("empty the cache"))
        patch.setattr(engines, "copy", SimpleNamespace(deepcopy=self.copy))
        patch.setattr(engines, "references", self.refer)
        patch.setattr(engines, "load_engine", self.load)

    def copy(self, module: torch.nn.Module) -> torch.nn.Module:
        self.events.append("copy the module")
        return module

    def refer(self, graph: Graph, requests: list[Request]) -> list[Any]:
        self.events.append("compute in PyTorch")
        self.requests += requests
        return references(graph, requests)

    def load(self, entry: object, schema: Any, **options: object) -> Any:
        self.events.append("load the engine")
        return SimpleNamespace(run=self.run, close=lambda: self.events.append("close the engine"), schema=schema)

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = tiny_graph()
        outputs = graph(*[given[slot.name] for slot in graph.schema.inputs])
        return {slot.name: self.spoil(out) for slot, out in zip(graph.schema.outputs, outputs, strict=True)}


@cache
def tiny_graph() -> Graph:
    return graph_of(nativesd.load("tiny", device="cpu", fast=False).vae, "vae_decoder")


CPU = torch.device("cpu")
OPT = Request(1, 8, 8)
PROFILES: Any = [SimpleNamespace(min=Request(1, 4, 4), opt=OPT, max=Request(8, 192, 192))]


def check() -> dict[str, Any]:
    return engines._check_engine(tiny_graph(), None, PROFILES, 1e-4, None)  # type: ignore[arg-type]


def test_an_engine_is_compared_where_it_is_fastest_and_after_torch_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    assert check()["error"] <= 1e-5
    assert card.requests == [OPT]
    assert card.events == [
        "copy the module", "compute in PyTorch", "empty the cache", "load the engine", "close the engine",
    ]  # fmt: skip


def test_an_engine_that_computes_something_else_is_refused_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, lambda out: out * 1.01)
    with pytest.raises(NativesdError, match="engine"):
        check()
    assert card.events[-1] == "close the engine"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), NoRoomError("full")])
@pytest.mark.parametrize("where", ["refer", "load"])
def test_an_engine_is_not_lost_where_the_memory_does_not_do(
    where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch)

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(engines, {"refer": "references", "load": "load_engine"}[where], full)
    assert check() == {"not_run": "there is too little memory on the GPU to compare it with PyTorch"}
