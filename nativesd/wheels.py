"""Which published torch runs on which NVIDIA card, with which driver."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Capability = tuple[int, int]
"""A GPU's compute capability: (12, 0) is sm_120."""

# the oldest that pyproject.toml allows; torch 2.9's exporter ends UNets, ControlNets and VAEs in "NameError: name 'L'"
TORCH = (2, 10)

# NVIDIA CUDA Compatibility, table "CUDA Toolkit 11.x, 12.x, and 13.x Driver Version Ranges": a program built with any
# release of a CUDA major version runs with at least this driver (docs.nvidia.com/deploy/cuda-compatibility)
DRIVERS = {11: 450, 12: 525, 13: 580}


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


def install_torch(capabilities: Iterable[Capability | None], driver: str | None) -> str | None:
    """The command that installs a torch with kernels for all of some cards, which the driver runs; None: there is none.

    What is not known, a card's generation or the driver's version, is taken to be new.
    """
    known = [capability for capability in capabilities if capability is not None]
    for wheels in WHEELS:
        fits = all(kernels(wheels.architectures, capability) is not None for capability in known)
        if fits and (driver is None or major(driver) >= DRIVERS[wheels.cuda]):
            return pip(wheels.index)
    return None


def no_kernels(torch: str, card: str, architectures: Sequence[str]) -> str:
    """What is said of a torch that cannot compute on a card."""
    return (
        f"torch {torch} has no kernels for {card}, only for {' '.join(architectures)}: the first operation on it would "
        'end in "no kernel image is available for execution on the device"'
    )


def pip(index: str) -> str:
    """The command that installs torch from an index of pytorch.org's."""
    url = f"https://download.pytorch.org/whl/{index}"
    return f'pip install --force-reinstall "torch>={dotted(TORCH)}" --index-url {url}'


def version(text: str) -> tuple[int, ...]:
    """2.10.0+cu128 as (2, 10)."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def major(text: str) -> int:
    """The first number of a version."""
    return version(text)[0]


def dotted(numbers: Sequence[int]) -> str:
    """(2, 10) as 2.10."""
    return ".".join(map(str, numbers))
