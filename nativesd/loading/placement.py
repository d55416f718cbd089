"""Where a model's tensors go, and in which dtype: what the caller asks for, checked against what there is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from nativesd.errors import UsageError
from nativesd.tuning.fp8 import why_not_fp8
from nativesd.wheels import install_torch, kernels, no_kernels

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """The device that computes, the dtype, and where weights stay meanwhile (main memory with `offload`)."""

    device: torch.device
    dtype: torch.dtype
    offload: bool = False
    fp8: bool = False
    int8: bool = False

    @property
    def home(self) -> torch.device:
        """Where the weights are between their uses."""
        return torch.device("cpu") if self.offload else self.device

    @property
    def stays(self) -> bool:
        """Whether weights are computed with where they are: `offload` onto a CPU moves nothing."""
        return self.home == self.device

    @property
    def half(self) -> bool:
        """Whether fp16 variants of files will do."""
        return self.dtype != torch.float32


def find_placement(
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    *,
    offload: bool = False,
    fp8: bool = False,
    quantize: Literal["int8"] | None = None,
) -> Placement:
    """What was asked for, or the defaults: CUDA where there is one, float16 there, float32 elsewhere.

    Raises UsageError for what cannot be.
    """
    place = find_device(device)
    kind = find_dtype(dtype, place)
    if quantize not in (None, "int8"):
        raise UsageError(f"quantize must be int8 or left out, not {quantize!r}")
    if fp8:
        if quantize is not None:
            raise UsageError(f"fp8 and quantize={quantize!r} are two ways to keep the same weights: choose one")
        _require_fp8(place, kind)
    return Placement(place, kind, offload, fp8, quantize == "int8")


def find_device(device: str | torch.device | None) -> torch.device:
    """The device, or CUDA where there is one. Raises UsageError where it cannot be used, which is tried."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.ones(1, device=place).add_(1)  # the first launch, at which a torch without kernels for the card fails
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        if sentence := _no_kernels(device):
            raise UsageError(sentence) from error
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"device {str(device)!r} cannot be used: {reason}") from error
    return place


def _no_kernels(device: str | torch.device) -> str | None:
    """What the doctor says of a card that torch was not built for; None where that is not it."""
    try:
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        architectures = torch.cuda.get_arch_list()
    except (RuntimeError, AssertionError, ValueError):
        return None
    if torch.version.hip is not None or kernels(architectures, capability) is not None:
        return None
    install = install_torch([capability], None) or "pass device='cpu' (--device cpu)"
    card = f"{name} (sm_{capability[0]}{capability[1]})"
    return f"{no_kernels(torch.__version__, card, architectures)}: {install}"


def find_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype by any of its names; by default the device's. Raises UsageError."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise UsageError(f"dtype must be float16, bfloat16 or float32, not {dtype}")
    return found


def compiles(asked: bool | Literal["auto"], device: torch.device) -> bool:
    """Whether torch.compile is to be used: as asked, "auto" on CUDA with Triton. Raises UsageError without Triton."""
    triton = find_spec("triton") is not None
    if asked is True and device.type == "cuda" and not triton:
        raise UsageError("compile=True needs Triton on CUDA: pip install triton (on Windows triton-windows)")
    return triton and device.type == "cuda" if asked == "auto" else asked


def _require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        raise UsageError(f"fp8=True is for NVIDIA GPUs (RTX 40, H100 and newer), and the device is {device}")
    if dtype == torch.float32:
        raise UsageError("fp8=True saves memory where the rest is float16 or bfloat16: pass one of them as dtype")
    if reason := why_not_fp8(device):
        raise UsageError(f"fp8=True needs an RTX 40, an H100 or newer, and torch's support: {device} says {reason}")
