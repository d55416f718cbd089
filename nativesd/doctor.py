"""What will keep nativesd from working on this machine, said before it happens, and what mends it.

`probe` looks at the machine, `findings` judges what was found and looks at nothing else. Neither needs torch to be
importable.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nativesd.config import (
    CLIP_L,
    OPENCLIP_H,
    SD15_CONTROLNET,
    SD15_UNET,
    SD21_CONTROLNET,
    SD21_UNET,
    SD_VAE,
    SDXL_BIGG,
    SDXL_CLIP_L,
    SDXL_CONTROLNET,
    SDXL_UNET,
    SDXL_VAE,
    Config,
    ControlNetConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from nativesd.version import __version__

if TYPE_CHECKING:
    import torch

Capability = tuple[int, int]
"""A GPU's compute capability: (12, 0) is sm_120."""

SCHEMA = 1
"""Version of `Report.to_json`'s schema; it counts up when a name changes its meaning or goes away."""

PYTHON, TORCH = (3, 11), (2, 9)  # the oldest that pyproject.toml allows

# NVIDIA CUDA Compatibility, table "CUDA Toolkit 11.x, 12.x, and 13.x Driver Version Ranges": a program built with any
# release of a CUDA major version runs with at least this driver (docs.nvidia.com/deploy/cuda-compatibility)
DRIVERS = {11: 450, 12: 525, 13: 580}

# tensorrt_rtx.ComputeCapability of TensorRT-RTX 1.7
TENSORRT_RTX: frozenset[Capability] = frozenset({(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)})
TENSORRT: Capability = (7, 5)  # and newer: support matrix of TensorRT 10.10


@dataclass(frozen=True)
class Wheels:
    """Builds of torch on pytorch.org: the index, the CUDA major version, and the arch list."""

    index: str
    cuda: int
    architectures: tuple[str, ...]


# pytorch/pytorch RELEASE.md, "PyTorch CUDA Support Matrix" of 2.9 to 2.14, best first. 12.8 was built up to 2.11, with
# Volta up to 2.10. 11.0 is built for aarch64 only, where its cards are.
WHEELS = (
    Wheels("cu130", 13, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_110", "sm_120")),
    Wheels("cu128", 12, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")),
    Wheels("cu126", 12, ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")),
)


@dataclass(frozen=True)
class Family:
    """The published components of a model family, and the side in pixels of the pictures it was trained on."""

    unet: UNetConfig
    vae: VAEConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    controlnet: ControlNetConfig
    side: int


FAMILIES: Mapping[str, Family] = {
    "sd15": Family(SD15_UNET, SD_VAE, (CLIP_L,), SD15_CONTROLNET, 512),
    "sd21": Family(SD21_UNET, SD_VAE, (OPENCLIP_H,), SD21_CONTROLNET, 768),
    "sdxl": Family(SDXL_UNET, SDXL_VAE, (SDXL_CLIP_L, SDXL_BIGG), SDXL_CONTROLNET, 1024),
}


@dataclass(frozen=True)
class Device:
    """An NVIDIA card. Memory is in bytes; None: not known."""

    name: str
    capability: Capability | None
    total: int | None
    free: int | None

    def __str__(self) -> str:
        return self.name if self.capability is None else f"{self.name} ({architecture(self.capability)})"


@dataclass(frozen=True)
class Need:
    """About what a picture of a family takes, in bytes.

    step      for prompt and negative prompt at once, beside the weights
    decode    of the whole picture, and `strips` in strips
    visiting  the least with `offload`: a component at a time, and its work in parts
    """

    family: str
    side: int
    dtype: str
    weights: int
    step: int
    decode: int
    strips: int
    visiting: int

    @property
    def whole(self) -> int:
        """With everything in memory, and nothing done in parts."""
        return self.weights + max(self.step, self.decode)

    @property
    def parts(self) -> int:
        """With everything in memory; prompt and negative prompt one by one, and the decode in strips."""
        return self.weights + max(self.step // 2, self.strips)


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


Kind = Literal["python", "torch", "without CUDA", "driver", "kernels", "hidden", "unusable", "memory"]


@dataclass(frozen=True)
class Finding:
    """What will not work, and what mends it."""

    kind: Kind
    message: str
    remedy: str


def architecture(capability: Capability) -> str:
    """(12, 0) as sm_120."""
    return f"sm_{capability[0]}{capability[1]}"


def kernels(architectures: Sequence[str], capability: Capability) -> Literal["compiled", "PTX"] | None:
    """What a card of a compute capability can run of a build for `architectures`; None: nothing.

    Machine code runs on cards of the same major version and the same or a higher minor one; PTX is compiled by the
    driver for the same or any later card (CUDA programming guide, "Binary Compatibility", "PTX Compatibility"). With
    the suffix a (architecture-specific) either runs on that card alone, with f (family-specific) within the major
    version ("Feature Set Compiler Targets").
    """
    found: Literal["PTX"] | None = None
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        kind, major, minor, suffix = match[1], int(match[2]), int(match[3]), match[4]
        same_major = major == capability[0] and minor <= capability[1]
        if suffix == "a":
            runs = (major, minor) == capability
        elif kind == "sm" or suffix == "f":
            runs = same_major
        else:
            runs = (major, minor) <= capability
        if runs and kind == "sm":
            return "compiled"
        if runs:
            found = "PTX"
    return found


def tensorrt_engine(capability: Capability) -> Literal["tensorrt-rtx", "tensorrt"] | None:
    """Which TensorRT builds engines for a card: RTX where it can, as its engines are portable; None: neither."""
    if capability in TENSORRT_RTX:
        return "tensorrt-rtx"
    return "tensorrt" if capability >= TENSORRT else None


def install_torch(capability: Capability | None, driver: str | None) -> str | None:
    """The command that installs a torch with kernels for a card, which its driver can run; None: there is no such.

    What is not known, the card's generation or the driver's version, is taken to be new.
    """
    for wheels in WHEELS:
        fits_card = capability is None or kernels(wheels.architectures, capability) is not None
        if fits_card and (driver is None or _major(driver) >= DRIVERS[wheels.cuda]):
            return _pip(wheels.index)
    return None


def _pip(index: str) -> str:
    url = f"https://download.pytorch.org/whl/{index}"
    return f'pip install --force-reinstall "torch>={_dotted(TORCH)}" --index-url {url}'


def findings(found: Found) -> list[Finding]:
    """All that will not work on a machine. A missing optional package is none."""
    return [*_versions(found), *_cuda(found), *_memory(found)]


def _versions(found: Found) -> Iterator[Finding]:
    if found.python[:2] < PYTHON:
        yield Finding(
            "python", f"Python {_dotted(found.python)} is older than {_dotted(PYTHON)}", "install a newer Python"
        )
    newest = found.devices[0] if found.devices else None
    install = install_torch(newest.capability, found.driver) if newest is not None else None
    remedy = install or _pip("cpu")
    if found.torch is None:
        yield Finding("torch", f"torch cannot be imported: {found.torch_error}", remedy)
    elif _version(found.torch) < TORCH:
        yield Finding("torch", f"torch {found.torch} is older than {_dotted(TORCH)}", remedy)


def _cuda(found: Found) -> Iterator[Finding]:
    """Why the cards cannot be used. Without a card there is nothing to say."""
    if found.bus and not found.devices:
        yield Finding(
            "driver",
            "there is an NVIDIA card on the PCI bus, but no driver answers",
            "install NVIDIA's driver and restart; a container needs the NVIDIA Container Toolkit and --gpus all",
        )
    if not found.devices or found.torch is None:
        return
    names = ", ".join(map(str, found.devices))
    if found.cuda is None:
        yield _without_cuda(found, names)
        return
    faults = [*_driver(found), *_kernels(found)]
    yield from faults
    if found.usable or faults:
        return
    if found.visible is not None and _hides(found.visible, len(found.devices)):
        yield Finding(
            "hidden", f"torch sees no card, as CUDA_VISIBLE_DEVICES is {found.visible!r}; there is {names}",
            "unset CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
        return
    reason = f": {'; '.join(found.complaints)}" if found.complaints else ""
    yield Finding("unusable", f"torch cannot use {names}{reason}", "restart the machine, or install the driver again")


def _hides(visible: str, count: int) -> bool:
    """Whether a CUDA_VISIBLE_DEVICES hides all of `count` cards: it is read up to the first number that is none's."""
    first = visible.split(",")[0].strip()
    return not first or (first.lstrip("-").isdecimal() and not 0 <= int(first) < count)


def _without_cuda(found: Found, names: str) -> Finding:
    message = f"{names} lies idle, as torch {found.torch} was built without CUDA"
    install = install_torch(found.devices[0].capability, found.driver)
    return Finding("without CUDA", message, install or _no_wheel(found.devices[0], found.driver))


def _driver(found: Found) -> Iterator[Finding]:
    if found.driver is None or found.cuda is None:
        return
    least = DRIVERS.get(_major(found.cuda), 0)
    if _major(found.driver) >= least:
        return
    install = install_torch(found.devices[0].capability, found.driver)
    other = f", or a torch for this one: {install}" if install is not None else ""
    yield Finding(
        "driver",
        f"torch {found.torch} was built with CUDA {found.cuda}, which needs NVIDIA driver {least} or newer; this is "
        f"{found.driver}",
        f"install driver {least} or newer{other}",
    )


def _kernels(found: Found) -> Iterator[Finding]:
    """Cards that torch has nothing to run on. Cards of one kind are named once."""
    if not found.architectures:
        return
    for device in dict.fromkeys(found.devices):
        if device.capability is None or kernels(found.architectures, device.capability) is not None:
            continue
        yield Finding(
            "kernels",
            f"torch {found.torch} has no kernels for {device}, only for {' '.join(found.architectures)}: the first "
            'operation on it would end in "no kernel image is available for execution on the device"',
            install_torch(device.capability, found.driver) or _no_wheel(device, found.driver),
        )


def _no_wheel(device: Device, driver: str | None) -> str:
    """What to do where no published torch runs on a card with its driver."""
    capability = device.capability
    for wheels in WHEELS:
        if capability is None or kernels(wheels.architectures, capability) is not None:
            least = DRIVERS[wheels.cuda]
            return f"install NVIDIA driver {least} or newer (this is {driver}), then: {_pip(wheels.index)}"
    return f"no torch from pytorch.org has kernels for {device}: pass device='cpu' (--device cpu)"


Fit = Literal["as a whole", "in parts", "with offload"]


def fit(need: Need, free: int, *, offload: bool) -> Fit | None:
    """How a family gets along with `free` bytes; None: not at all.

    The pipeline works in parts by itself where it has to; offload has to be asked for.
    """
    if need.whole <= free:
        return "as a whole"
    if need.parts <= free:
        return "in parts"
    return "with offload" if offload and need.visiting <= free else None


def _memory(found: Found) -> Iterator[Finding]:
    device, free, total = _room(found)
    if free is None:
        return
    where = "in main memory" if device is None else f"on {device.name}"
    for family in dict.fromkeys(need.family for need in found.needs):
        needs = [need for need in found.needs if need.family == family]
        if any(fit(need, free, offload=device is not None) for need in needs):
            continue
        least = min(needs, key=lambda need: need.weights)
        wanted = least.visiting if device is not None else least.weights
        others = total is not None and any(fit(need, total, offload=device is not None) for need in needs)
        yield Finding(
            "memory",
            f"{family} does not fit: it needs {_gigabytes(wanted)} in {least.dtype}"
            f"{' with offload' if device is not None else ''}, and {_gigabytes(free)} are free {where}",
            f"end what uses the other {_gigabytes((total or free) - free)}" if others else "use a smaller model",
        )


def _room(found: Found) -> tuple[Device | None, int | None, int | None]:
    """Where a model goes by default: the first card that torch can use, else main memory; free and total bytes."""
    if found.usable and found.devices:
        device = found.devices[0]
        return device, device.free, device.total
    return None, found.free, found.total


# --- the report --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What was found on a machine, and what will not work there."""

    found: Found
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    def to_json(self) -> str:
        """`schema`, `ok`, `found` and `findings`, named as in `Found` and `Finding`."""
        fields = {"schema": SCHEMA, "ok": self.ok, "found": asdict(self.found)}
        return json.dumps({**fields, "findings": [asdict(finding) for finding in self.findings]}, indent=2)

    def rows(self) -> list[tuple[str, str]]:
        """What was found, as (label, text)."""
        found = self.found
        rows = [
            ("nativesd", f"{found.nativesd}, Python {_dotted(found.python)}, {found.system}"),
            ("torch", _torch_text(found)),
            ("driver", found.driver or "no NVIDIA driver found"),
            *(("GPU", _device_text(found, device)) for device in found.devices),
        ]
        if found.total is not None and found.free is not None:
            rows.append(("memory", f"{_gigabytes(found.free)} free of {_gigabytes(found.total)}"))
        device, free, _ = _room(found)
        if free is not None:
            rows += [(need.family, _need_text(need, free, on_card=device is not None)) for need in found.needs]
        for backend in found.backends:
            state = backend.version or f"{backend.missing} ({backend.install})"
            rows.append((backend.name, f"{state}: {backend.purpose}"))
        return rows

    def to_text(self) -> str:
        """The rows, then the findings with their remedies."""
        lines = [f"{label:<14}{text}" for label, text in self.rows()]
        lines += [f"\n{finding.message}\n  {finding.remedy}" for finding in self.findings]
        return "\n".join(lines)


def _torch_text(found: Found) -> str:
    if found.torch is None:
        return f"cannot be imported: {found.torch_error}"
    if found.cuda is None:
        return f"{found.torch}, without CUDA"
    return f"{found.torch}, CUDA {found.cuda}, kernels for {' '.join(found.architectures) or 'unknown cards'}"


def _device_text(found: Found, device: Device) -> str:
    parts = [str(device)]
    if device.total is not None:
        free = "" if device.free is None else f"{_gigabytes(device.free)} free of "
        parts.append(f"{free}{_gigabytes(device.total)}")
    if device.capability is not None:
        if found.architectures:
            parts.append(
                {"compiled": "torch has kernels for it", "PTX": "torch has PTX for it, compiled at the first use"}.get(
                    kernels(found.architectures, device.capability) or "", "torch has no kernels for it"
                )
            )
        parts.append(f"engines by {tensorrt_engine(device.capability) or 'neither TensorRT'}")
    return ", ".join(parts)


def _need_text(need: Need, free: int, *, on_card: bool) -> str:
    how = fit(need, free, offload=on_card)
    verdict = {"as a whole": "fits", "in parts": "fits, step and decode in parts", "with offload": "fits with offload"}
    return (
        f"{need.side}x{need.side} in {need.dtype}: about {_gigabytes(need.whole)}, {_gigabytes(need.weights)} of it "
        f"weights: {verdict[how] if how is not None else 'does not fit'}"
    )


def examine() -> Report:
    """Probe this machine and judge it."""
    found = probe()
    return Report(found, tuple(findings(found)))


# --- looking at the machine --------------------------------------------------------------------------------------

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
        return Found(torch=None, torch_error=_first_line(error), **found)
    usable, seen, complaints = _torch_devices(torch.cuda)
    found["devices"] = seen or devices
    dtypes = ("float16",) if usable else ("float32", "bfloat16")
    return Found(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()),
        usable=usable,
        complaints=complaints,
        needs=tuple(estimate(name, family, dtype) for name, family in FAMILIES.items() for dtype in dtypes),
        **found,
    )


def estimate(name: str, family: Family, dtype: str) -> Need:
    """What a family takes in a dtype, by its parameters' sizes and `unet_bytes` and `decode_bytes`.

    A VAE marked `force_upcast` is float32 beside a float16 UNet.
    """
    import torch

    from nativesd.autoencoder import MAPS, decode_bytes
    from nativesd.diffusion import unet_bytes

    kind: torch.dtype = getattr(torch, dtype)
    vae_kind = torch.float32 if family.vae.force_upcast and kind == torch.float16 else kind
    cells = family.side // family.vae.factor
    unet = weight_bytes(family.unet, kind)
    vae = weight_bytes(family.vae, vae_kind)
    text = sum(weight_bytes(config, kind) for config in family.text_encoders)
    step = unet_bytes(family.unet, 2, cells, cells, kind)
    decode = decode_bytes(family.vae, family.side, family.side, vae_kind)
    strips = decode // MAPS  # at most: one feature map of full size in place of so many
    visiting = max(text, unet + step // 2, vae + strips)
    return Need(name, family.side, dtype, unet + vae + text, step, decode, strips, visiting)


def weight_bytes(config: Config, dtype: torch.dtype) -> int:
    """What a component's parameters take in a dtype."""
    from nativesd.build import expected

    return sum(math.prod(shape) for shape in expected(config).values()) * dtype.itemsize


def _torch_devices(cuda: Any) -> tuple[bool, tuple[Device, ...], tuple[str, ...]]:
    """Whether torch can use CUDA, the cards it sees, and what it complains of; `cuda` is torch.cuda."""
    devices = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            usable = bool(cuda.is_available())
            for index in range(cuda.device_count() if usable else 0):
                properties = cuda.get_device_properties(index)
                free, total = cuda.mem_get_info(index)
                devices.append(Device(properties.name, (properties.major, properties.minor), total, free))
        except (RuntimeError, AssertionError) as error:
            return False, (), (_first_line(error),)
    return usable, tuple(devices), tuple(_first_line(warning.message) for warning in caught)


SMI_FIELDS = "name,compute_cap,memory.total,memory.free,driver_version"


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
        fields = [field.strip() for field in line.rsplit(",", 4)]
        if len(fields) != 5:
            continue
        name, capability, total, free, driver = fields
        match = re.fullmatch(r"(\d+)\.(\d+)", capability)
        # a chip that shares the main memory (GB10) has no number here
        devices.append(
            Device(
                name,
                None if match is None else (int(match[1]), int(match[2])),
                int(total) << 20 if total.isdecimal() else None,
                int(free) << 20 if free.isdecimal() else None,
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
        return Backend(name, purpose, install, missing=f"its import fails: {_first_line(error)}")
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
            return f'pip install "nativesd[{match[2]}]"'
    return f"pip install {distribution}"


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _version(text: str) -> tuple[int, ...]:
    """2.9.0+cu128 as (2, 9)."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _major(text: str) -> int:
    return _version(text)[0]


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
