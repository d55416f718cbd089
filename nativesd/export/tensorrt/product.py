"""The two TensorRT products: their modules, what they build for, and what they log."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from nativesd.errors import UsageError, install_line
from nativesd.export.slots import Slot

Backend = Literal["tensorrt", "tensorrt-rtx"]
PRODUCTS: Mapping[Backend, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
MODULES: Mapping[Backend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX 1.7 builds for: its enumeration ComputeCapability, which is asked when it is installed."""
DTYPES = {torch.float16: "HALF", torch.bfloat16: "BF16", torch.float32: "FLOAT", torch.int64: "INT64"}
"""dtype -> its name in TensorRT's enumeration DataType."""
ENGINE = "model.engine"  # the file in an entry of the store
_DRIVER = "checkMacros.cpp::catchCudaError"  # TensorRT-RTX looks for a GPU after every other error, and logs that too


def load_backend(backend: Backend) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises UsageError where it, or what it consists of, is not installed."""
    try:
        return importlib.import_module(MODULES[backend])
    except Exception as error:  # of whatever kind: the packages look for their libraries in several ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == MODULES[backend]
        problem = "is not installed" if missing else f"cannot be imported ({reason([str(error)])})"
        raise UsageError(f"{PRODUCTS[backend]} {problem}: {install_line(backend)}") from error


def backend_version(backend: Backend) -> str:
    """The installed version, which an engine's has to equal. Raises UsageError where it is not installed."""
    return str(load_backend(backend).__version__)


def targets_of(backend: Backend) -> tuple[str, ...]:
    """The compute capabilities that engines can be built for here: all that TensorRT-RTX knows, or the GPU's own."""
    if backend == "tensorrt-rtx":
        names = load_backend(backend).ComputeCapability.__members__
        return tuple(sorted((name.lower() for name in names if name.startswith("SM")), key=lambda name: int(name[2:])))
    return (device_target(torch.device("cuda")),) if torch.cuda.is_available() else ()


def device_target(device: torch.device) -> str:
    """A GPU's compute capability: "sm120"."""
    return "sm{}{}".format(*torch.cuda.get_device_capability(device))


def parse_target(text: str) -> str:
    """A compute capability in any of its usual forms, sm_120, SM120, sm120 or 12.0, as "sm120". Raises UsageError."""
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if found is None:
        raise UsageError(f"{text!r} is not a compute capability: such as sm120, sm_120 or 12.0")
    return f"sm{found[1]}{found[2]}"


def why_not_on(target: str, backend: Backend, dtype: torch.dtype) -> str | None:
    """Why a card cannot have engines in a dtype, known before anything is built; None: nothing is known against it."""
    if backend == "tensorrt-rtx" and target == "sm75" and dtype != torch.float16:
        kind = str(dtype).removeprefix("torch.")
        return f"TensorRT-RTX has no products in {kind} for sm75 (RTX 20), only in float16: PyTorch runs it there"
    return None


def backend_for(target: str) -> Backend:
    """The module for a GPU: TensorRT-RTX for the consumer cards that it knows, TensorRT for the others."""
    return "tensorrt-rtx" if target in RTX_TARGETS else "tensorrt"


def make_log(trt: Any) -> Any:
    """A logger that keeps what went wrong in `errors`, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]  # one of two modules', neither of which has types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and _DRIVER not in message:
                self.errors.append(message)

    return Log()


def slot_dtype(slot: Slot, weights: torch.dtype) -> torch.dtype:
    """A slot's dtype where the weights have that one."""
    return {"weights": weights, "float32": torch.float32, "int64": torch.int64}[slot.kind]


def reason(errors: Sequence[str]) -> str:
    """The first line of the first of a library's messages, without the source file that it ends with."""
    lines = "\n".join(errors).strip().splitlines() or ["it gives no reason"]
    return re.sub(r" In \w+ at /_src/\S+", "", lines[0]).rstrip(". ")[:300]
