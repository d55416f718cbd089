"""What runs an exported graph: ONNX Runtime, OpenVINO or a TensorRT engine, behind one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from nativesd.export.slots import Request, Schema


class Runner(Protocol):
    """A graph that is ready to run. Control slots that are not given are zero."""

    @property
    def schema(self) -> Schema:
        """The inputs and outputs."""

    def refusal(self, request: Request) -> str | None:
        """Why this runner cannot serve a request, in one sentence; None where it can."""

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name. Raises UsageError where inputs do not fit each other or the runner."""

    def close(self) -> int:
        """Free what is held; returns how many bytes that was, as far as it is known."""
