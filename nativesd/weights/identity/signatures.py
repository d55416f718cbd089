"""What is recognised and not supported: other models, adapters and quantisations, each by a few of its names.

The table (weightmaps/signatures.toml) says it; the order of its entries decides where several fit.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from nativesd.shipped import TABLES
from nativesd.weights.maps.keymap import SIGNATURES
from nativesd.weights.maps.rules import Shape
from nativesd.weights.maps.templates import LONGEST, TableError


@dataclass(frozen=True)
class Signature:
    """One entry of the table: its conditions (see there), and what it `says` of what fulfils them."""

    name: str
    says: str
    all: tuple[str, ...] = ()
    any: tuple[str, ...] = ()
    none: tuple[str, ...] = ()
    shape: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)

    def fits(self, text: str, shapes: Mapping[str, Shape]) -> bool:
        """Whether the names, one a line in `text` with a break before the first, fulfil the conditions."""
        if not all(part in text for part in self.all) or any(part in text for part in self.none):
            return False
        if self.any and not any(part in text for part in self.any):
            return False
        return all(
            f"{end}\n" in text
            and any(_is_shape(shapes[key], shape) for key in shapes if key == end or key.endswith(f".{end}"))
            for end, shape in self.shape.items()
        )


def _is_shape(shape: Shape, pattern: tuple[int | str, ...]) -> bool:
    return len(shape) == len(pattern) and all(
        wanted in ("*", size) for size, wanted in zip(shape, pattern, strict=True)
    )


@cache
def load_signatures(path: Path = TABLES / SIGNATURES) -> tuple[Signature, ...]:
    """The table of a file. Raises TableError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TableError(f"{path} cannot be read as a table of signatures: {error}") from error
    return tuple(_signature(path.name, number, entry) for number, entry in enumerate(data.get("signature", ()), 1))


def _signature(table: str, number: int, data: Mapping[str, Any]) -> Signature:
    """One entry. Raises TableError."""
    if unknown := set(data) - {"name", "says", "all", "any", "none", "shape"}:
        raise TableError(f"{table} signature {number}: unknown field {', '.join(sorted(unknown))}")
    if not {"name", "says"} <= set(data) or not set(data) & {"all", "any", "shape"}:
        raise TableError(f"{table} signature {number}: needs name and says, and one of all, any and shape")
    return Signature(
        name=data["name"],
        says=data["says"],
        all=_parts(data.get("all", ())),
        any=_parts(data.get("any", ())),
        none=_parts(data.get("none", ())),
        shape={end: tuple(shape) for end, shape in data.get("shape", {}).items()},
    )


def _parts(names: Iterable[str]) -> tuple[str, ...]:
    """Parts of names as parts of a text with one name a line."""
    return tuple(name.replace("^", "\n").replace("$", "\n") for name in names)


def recognise(shapes: Mapping[str, Shape]) -> Signature | None:
    """What that is not supported a checkpoint is, by its names and shapes."""
    text = "\n" + "\n".join(name for name in shapes if len(name) <= LONGEST) + "\n"
    return next((signature for signature in load_signatures() if signature.fits(text, shapes)), None)
