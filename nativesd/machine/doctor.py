"""What will not work on this machine, said before it happens, and what mends it.

`findings` judges what `nativesd.machine.probe` found, and looks at nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from nativesd.machine.probe import Capability, Device, Found, Need, probe

SCHEMA = 1
"""Version of `Report.to_json`'s schema; it counts up when a name changes its meaning or goes away."""

# the oldest that pyproject.toml allows; torch 2.9's exporter ends UNets, ControlNets and VAEs in "NameError: name 'L'"
PYTHON, TORCH = (3, 11), (2, 10)

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


# pytorch/pytorch RELEASE.md, "PyTorch CUDA Support Matrix" of 2.10 to 2.14, best first. 12.8 was built up to 2.11, with
# Volta up to 2.10. 11.0 is built for aarch64 only, where its cards are.
WHEELS = (
    Wheels("cu130", 13, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_110", "sm_120")),
    Wheels("cu128", 12, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")),
    Wheels("cu126", 12, ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")),
)


Kind = Literal["python", "torch", "without CUDA", "driver", "kernels", "hidden", "unusable", "memory"]


@dataclass(frozen=True)
class Finding:
    """What will not work, and what mends it."""

    kind: Kind
    message: str
    remedy: str


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


def _version(text: str) -> tuple[int, ...]:
    """2.10.0+cu128 as (2, 10)."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _major(text: str) -> int:
    return _version(text)[0]


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
