"""Fields about parts of a picture, and of the time for it. All raise UsageError that names the field."""

from __future__ import annotations

import json
import re
from typing import Any

from nativesd.errors import UsageError
from nativesd.pictures.programs.recipe import objects, real


def merging(name: str, value: str) -> str:
    """A1111's ratio of token merging, as the option `savings` has it."""
    ratio = real(name, value)
    if not 0 <= ratio <= 0.75:
        raise UsageError(f"{name}: {value!r} is not between 0 and 0.75")
    return f"tome:{ratio:g}"


def tiling(name: str, value: str) -> str:
    """The axes along which a picture joins with itself: A1111's True is both."""
    axes = "xy" if value == "True" else value
    if axes not in ("xy", "x", "y"):
        raise UsageError(f"{name}: {value!r} is none of True, x, y")
    return axes


def tiles(name: str, value: str) -> tuple[int, int]:
    """Size and overlap of windows."""
    match = re.fullmatch(r"(\d{1,6}) overlap (\d{1,6})", value)
    if match is None:
        raise UsageError(f"{name}: {value!r} is not such as 512 overlap 64")
    return int(match[1]), int(match[2])


def regions(name: str, value: str) -> list[dict[str, Any]]:
    """The fields of regions, each with a box."""
    try:
        parts = objects(json.loads(value))
    except ValueError:
        parts = []
    if not parts or not all(isinstance(part.get("box"), list) for part in parts):
        raise UsageError(f"{name}: what has a mask, or is no list of boxes, is not repeated")
    fields = ("prompt", "box", "weight")
    return [{f: tuple(part[f]) if f == "box" else part[f] for f in fields if f in part} for part in parts]
