"""Fields about parts of a picture, and of the time for it. All raise UsageError that names the field."""

from __future__ import annotations

import json
import re
from typing import Any

from nativesd.errors import UsageError
from nativesd.pictures.infotext import GUESS, parse_unit
from nativesd.pictures.programs.recipe import objects, real


def merging(name: str, value: str) -> str:
    """A1111's ratio of token merging, as the option `savings` has it."""
    ratio = real(name, value)
    if not 0 <= ratio <= 0.75:
        raise UsageError(f"{name}: {value!r} is not between 0 and 0.75")
    return f"tome:{ratio:g}"


_SETTINGS = {
    "weight": ("scale", 1.0), "guidance start": ("start", 0.0), "guidance end": ("end", 1.0),
    "layers": ("layers", None), "weight type": ("weight-type", None), "crop": ("crop", None), "kind": ("kind", None),
}  # fmt: skip
"""Fields of a unit, as options of the command line, with what is not worth saying."""


def unit(value: str) -> str:
    """What has to be passed again of a unit of A1111's ControlNet extension; empty where it names no model."""
    fields = {name.lower(): each for name, each in parse_unit(value).items()}
    model = fields.get("model", "None").partition(" [")[0]
    if model in ("None", "none"):
        return ""
    module = fields.get("module", "none")
    shown = "ip-adapter" in module.lower() or "ipadapter" in module.lower()
    of = "--image-prompt" if shown else "--control"
    words = [of, _quoted(model), "PICTURE"]
    for name, (option, usual) in _SETTINGS.items():
        if name in fields and fields[name] != (None if usual is None else f"{usual:g}"):
            words += [f"{of}-{option}", _quoted(fields[name])]
    if not shown and module != "none":
        words += [f"{of}-preprocess", module]
    if fields.get("control mode") == GUESS:
        words.append("--guess-mode")
    words += [f"{of}-mask MASK"] * (fields.get("masks", "0") != "0")
    more = [f"{fields[name]} {name}" for name in ("pictures", "masks") if fields.get(name, "1") not in ("0", "1")]
    more += [f"{name.replace(' ', '_')}={fields[name]}" for name in ("lora scale",) if name in fields]
    more += ["the identity"] if fields.get("identity") == "True" else []
    return f"pass it again: {' '.join(words)}" + (f" (and in Python {', '.join(more)})" if more else "")


def _quoted(value: str) -> str:
    """As a shell takes it."""
    return f'"{value}"' if " " in value else value


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
