"""What there is on this machine.

Nothing here needs torch to be importable: where it is not, that is what is found.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nativesd.errors import install_line
from nativesd.machine.needs import FAMILIES, Need, estimate
from nativesd.version import __version__
from nativesd.wheels import Capability


def architecture(capability: Capability) -> str:
    """(12, 0) as sm_120."""
    return f"sm_{capability[0]}{capability[1]}"


@dataclass(frozen=True)
class Device:
    """An NVIDIA card. Memory is in bytes; None: not known."""

    name: str
    capability: Capability | None
    total: int | None
    free: int | None
    uuid: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name if self.capability is None else f"{self.name} ({architecture(self.capability)})"


@dataclass(frozen=True)
class Backend:
    """An optional package. `version` is None where it cannot be used, and `missing` then says why."""

    name: str
    purpose: str
    install: str
    version: str | None = None
    missing: str = ""


@dataclass(frozen=True)
class Found:
    """A machine.

    torch          version; None where it cannot be imported, for the reason in `torch_error`
    cuda           CUDA version that torch was built with; None: without CUDA
    hip            ROCm's HIP version that it was built with, for AMD's cards; None: without
    architectures  what torch has kernels for: sm_90 (machine code), compute_90 (PTX)
    usable         whether torch says that CUDA can be used; `complaints` are its own words
    driver         version of NVIDIA's driver
    bus            how many NVIDIA graphics cards are on the PCI bus, with or without a driver
    visible        the environment's CUDA_VISIBLE_DEVICES
    free, total    main memory in bytes, where that can be known
    """

    python: tuple[int, ...]
    system: str
    torch: str | None
    torch_error: str = ""
    cuda: str | None = None
    hip: str | None = None
    architectures: tuple[str, ...] = ()
    usable: bool = False
    complaints: tuple[str, ...] = ()
    driver: str | None = None
    devices: tuple[Device, ...] = ()
    bus: int = 0
    visible: str | None = None
    free: int | None = None
    total: int | None = None
    needs: tuple[Need, ...] = ()
    backends: tuple[Backend, ...] = ()
    nativesd: str = __version__


# name -> module, distribution, purpose
OPTIONAL = {
    "scipy": ("scipy", "scipy", "the beta schedule"),
    "torchsde": ("torchsde", "torchsde", "the SDE samplers' noise"),
    "opencv": ("cv2", "opencv-python-headless", "the canny preprocessor"),
    "onnx": ("onnx", "onnx", "ONNX export"),
    "onnxruntime": ("onnxruntime", "onnxruntime", "running ONNX files"),
    "openvino": ("openvino", "openvino", "running ONNX files fast on CPUs"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx", "engines for consumer cards"),
    "tensorrt": ("tensorrt", "tensorrt", "engines for H100, H200 and other cards"),
}


def probe() -> Found:
    """Look at this machine: Python, torch, driver, cards, memory, optional packages. Nothing is computed on a card."""
    driver, devices = _nvidia()
    free, total = _main_memory()
    found: dict[str, Any] = {
        "python": tuple(sys.version_info[:3]),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "driver": driver,
        "devices": devices,
        "bus": _cards_on_bus(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "free": free,
        "total": total,
        "backends": tuple(_backend(name, *entry) for name, entry in OPTIONAL.items()),
    }
    try:
        import torch
    except (ImportError, OSError) as error:
        return Found(torch=None, torch_error=first_line(error), **found)
    usable, seen, complaints = _torch_devices(torch.cuda, devices)
    found["devices"] = seen or devices
    dtypes = ("float16",) if usable else ("float32", "bfloat16")
    return Found(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        architectures=tuple(torch.cuda.get_arch_list()),
        usable=usable,
        complaints=complaints,
        needs=tuple(estimate(name, family, dtype) for name, family in FAMILIES.items() for dtype in dtypes),
        **found,
    )


def _torch_devices(cuda: Any, smi: Sequence[Device] = ()) -> tuple[bool, tuple[Device, ...], tuple[str, ...]]:
    """Whether torch can use CUDA, the cards it sees, and what it complains of; `cuda` is torch.cuda.

    Their memory is what nvidia-smi says of the card: to ask the card itself makes a CUDA context, which takes some of
    it, and fails where it is full.
    """
    devices, complaints, usable = [], [], False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            usable = bool(cuda.is_available())
            count = cuda.device_count() if usable else 0
        except (RuntimeError, AssertionError) as error:
            return False, (), (first_line(error),)
        for index in range(count):
            try:
                found = cuda.get_device_properties(index)
                known = {each.uuid: each for each in smi}.get(f"GPU-{getattr(found, 'uuid', '')}")
                if known is None and len(smi) == count == 1:
                    known = smi[0]
                total, free = (None, None) if known is None else (known.total, known.free)
                devices.append(Device(found.name, (found.major, found.minor), total, free))
                if known is None and index == 0:  # where models go by default
                    free, total = cuda.mem_get_info(index)
                    devices[0] = replace(devices[0], total=total, free=free)
            except (RuntimeError, AssertionError) as error:
                complaints.append(f"card {index}: {first_line(error)}")
    said = (*(first_line(warning.message) for warning in caught), *complaints)
    return usable and bool(devices), tuple(devices), said


SMI_FIELDS = "name,compute_cap,memory.total,memory.free,driver_version,uuid"


def _nvidia() -> tuple[str | None, tuple[Device, ...]]:
    """Driver and cards by nvidia-smi, which needs no torch; the driver alone where only the kernel module answers."""
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        command = [smi, f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            return parse_smi(done.stdout)
    try:
        version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None, ()
    return (version[0] if version is not None else None), ()


def parse_smi(text: str) -> tuple[str | None, tuple[Device, ...]]:
    """Driver and cards from nvidia-smi's CSV of `SMI_FIELDS` without header and units; what is "[N/A]" is None."""
    driver, devices = None, []
    for line in text.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 5)]
        if len(fields) != 6:
            continue
        name, capability, total, free, driver, uuid = fields
        match = re.fullmatch(r"(\d+)\.(\d+)", capability)
        # a chip that shares the main memory (GB10) has no number here
        devices.append(
            Device(
                name,
                None if match is None else (int(match[1]), int(match[2])),
                int(total) << 20 if total.isdecimal() else None,
                int(free) << 20 if free.isdecimal() else None,
                uuid,
            )
        )
    return driver, tuple(devices)


def _cards_on_bus() -> int:
    """NVIDIA's (vendor 0x10de) display controllers (class 0x03) that Linux sees on the PCI bus, driver or not."""
    count = 0
    for folder in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((folder / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        count += vendor == "0x10de" and kind.startswith("0x03")
    return count


def _main_memory() -> tuple[int | None, int | None]:
    """Free and total main memory in bytes, where /proc tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return sizes.get("MemAvailable"), sizes.get("MemTotal")


def _backend(name: str, module: str, distribution: str, purpose: str) -> Backend:
    """Import an optional package and see."""
    install = _install_line(distribution)
    if importlib.util.find_spec(module) is None:
        return Backend(name, purpose, install, missing="not installed")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a package whose libraries do not load raises whatever it likes
        return Backend(name, purpose, install, missing=f"its import fails: {first_line(error)}")
    return Backend(name, purpose, install, version=str(getattr(imported, "__version__", "installed")).split("-")[0])


def _install_line(distribution: str) -> str:
    """By the extra of nativesd that names the package, where one does."""
    try:
        requirements = importlib.metadata.requires("nativesd") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if match is not None and match[1].lower().replace("_", "-") == distribution and match[2] != "test":
            return install_line(match[2])
    return f"pip install {distribution}"


def first_line(error: object) -> str:
    """What an exception or a warning says in one line, without a full stop; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
