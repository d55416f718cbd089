"""What will not work on this machine, said before it happens, and what mends it.

`findings` judges what `nativesd.machine.probe` found, and looks at nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from nativesd.machine.needs import Need
from nativesd.machine.probe import Device, Found, probe
from nativesd.wheels import (
    DRIVERS,
    TORCH,
    WHEELS,
    Capability,
    dotted,
    install_torch,
    kernels,
    major,
    no_kernels,
    pip,
    version,
)

SCHEMA = 1
"""Version of `Report.to_json`'s schema; it counts up when a name changes its meaning or goes away."""

PYTHON = (3, 11)  # the oldest that pyproject.toml allows

# tensorrt_rtx.ComputeCapability of TensorRT-RTX 1.7
TENSORRT_RTX: frozenset[Capability] = frozenset({(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)})
TENSORRT: Capability = (7, 5)  # and newer: support matrix of TensorRT 10.10


Kind = Literal["python", "torch", "without CUDA", "driver", "kernels", "hidden", "unusable", "memory"]


@dataclass(frozen=True)
class Finding:
    """What will not work, and what mends it."""

    kind: Kind
    message: str
    remedy: str


def tensorrt_engine(capability: Capability) -> Literal["tensorrt-rtx", "tensorrt"] | None:
    """Which TensorRT builds engines for a card: RTX where it can, as its engines are portable; None: neither."""
    if capability in TENSORRT_RTX:
        return "tensorrt-rtx"
    return "tensorrt" if capability >= TENSORRT else None


def findings(found: Found) -> list[Finding]:
    """All that will not work on a machine. A missing optional package is none."""
    return [*_versions(found), *_cuda(found), *_memory(found)]


def _versions(found: Found) -> Iterator[Finding]:
    if found.python[:2] < PYTHON:
        yield Finding(
            "python", f"Python {dotted(found.python)} is older than {dotted(PYTHON)}", "install a newer Python"
        )
    remedy = (_install(found) if found.devices and found.hip is None else None) or pip("cpu")
    if found.hip is not None:
        remedy = f"install torch {dotted(TORCH)} or newer for ROCm: https://pytorch.org/get-started/locally"
    if found.torch is None:
        yield Finding("torch", f"torch cannot be imported: {found.torch_error}", remedy)
    elif version(found.torch) < TORCH:
        yield Finding("torch", f"torch {found.torch} is older than {dotted(TORCH)}", remedy)


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
        if found.hip is None or not found.usable:
            yield _without_cuda(found, names)
        return
    faults = [*_driver(found), *_kernels(found)]
    yield from faults
    for complaint in found.complaints if found.usable else ():
        if complaint.startswith("card "):  # the others are torch's remarks
            yield Finding("unusable", f"torch cannot use {complaint}", "restart the machine, or leave that card out")
    if found.usable or faults:
        return
    if found.visible is not None and _hides(found.visible, len(found.devices)):
        yield Finding(
            "hidden", f"torch sees no card, as CUDA_VISIBLE_DEVICES is {found.visible!r}; there is {names}",
            "unset CUDA_VISIBLE_DEVICES, or name the cards by their numbers, from 0 on",
        )  # fmt: skip
        return
    reason = f": {'; '.join(found.complaints)}" if found.complaints else ""
    full = "out of memory" in reason.lower()
    yield Finding(
        "unusable",
        f"torch cannot use {names}{reason}",
        "end what else uses the card: nvidia-smi names it"
        if full
        else "restart the machine, or install the driver again",
    )


def _hides(visible: str, count: int) -> bool:
    """Whether a CUDA_VISIBLE_DEVICES may hide all of `count` cards.

    It is read up to the first number that is none's; a card's UUID has to be one of this machine's, which torch says
    by seeing none.
    """
    first = visible.split(",")[0].strip()
    return not first.isdecimal() or int(first) >= count


def _install(found: Found) -> str | None:
    """A torch for all cards, or for as many of the newest ones as one torch has kernels for."""
    known = sorted({device.capability for device in found.devices if device.capability is not None}, reverse=True)
    for count in range(len(known), 0, -1):
        if install := install_torch(known[:count], found.driver):
            return install
    return install_torch([None], found.driver) if not known else None


def _without_cuda(found: Found, names: str) -> Finding:
    built = "without CUDA" if found.hip is None else f"for AMD's cards (ROCm {found.hip})"
    message = f"{names} lies idle, as torch {found.torch} was built {built}"
    return Finding("without CUDA", message, _install(found) or _no_wheel(found.devices[0], found.driver))


def _driver(found: Found) -> Iterator[Finding]:
    if found.driver is None or found.cuda is None:
        return
    least = DRIVERS.get(major(found.cuda), 0)
    if major(found.driver) >= least:
        return
    install = _install(found)
    other = f", or a torch for this one: {install}" if install is not None else ""
    yield Finding(
        "driver",
        f"torch {found.torch} was built with CUDA {found.cuda}, which needs NVIDIA driver {least} or newer; this is "
        f"{found.driver}",
        f"install driver {least} or newer{other}",
    )


def _kernels(found: Found) -> Iterator[Finding]:
    """Cards that torch has nothing to run on. Cards of one kind are named once."""
    if not found.architectures or found.hip is not None:
        return
    lacking = [
        device for device in found.devices
        if device.capability is not None and kernels(found.architectures, device.capability) is None
    ]  # fmt: skip
    for device in dict.fromkeys(lacking):
        yield Finding(
            "kernels", no_kernels(str(found.torch), str(device), found.architectures), _with_kernels(found, device)
        )


def _with_kernels(found: Found, device: Device) -> str:
    """How a card gets kernels without another one losing its own."""
    everywhere = install_torch([each.capability for each in found.devices], found.driver)
    if everywhere is not None:
        return everywhere
    newer = [each for each in found.devices if (each.capability or (99, 0)) > (device.capability or (0, 0))]
    served = [
        str(i) for i, each in enumerate(found.devices)
        if each.capability is None or kernels(found.architectures, each.capability) is not None
    ]  # fmt: skip
    if newer and served:
        return (
            f"no torch from pytorch.org has kernels for all of these cards: leave {device.name} out with "
            f"CUDA_VISIBLE_DEVICES={','.join(served)}"
        )
    install = install_torch([device.capability], found.driver)
    if install is None:
        return _no_wheel(device, found.driver)
    others = ", ".join(dict.fromkeys(each.name for each in found.devices if each.capability != device.capability))
    return f"{install} (no torch has kernels for all of these cards: {others} may lie idle then)" if others else install


def _no_wheel(device: Device, driver: str | None) -> str:
    """What to do where no published torch runs on a card with its driver."""
    capability = device.capability
    for wheels in WHEELS:
        if capability is None or kernels(wheels.architectures, capability) is not None:
            least = DRIVERS[wheels.cuda]
            return f"install NVIDIA driver {least} or newer (this is {driver}), then: {pip(wheels.index)}"
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
            ("nativesd", f"{found.nativesd}, Python {dotted(found.python)}, {found.system}"),
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


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
