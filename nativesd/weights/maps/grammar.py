"""What a table may say: every section's fields, their kinds and bounds, checked before anything is made of them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nativesd.errors import SourceError, quote
from nativesd.reading import read_bounded
from nativesd.schema import REQUIRED, Field, Kind, either, many, mapping, one_of, read_fields, text, truth, whole
from nativesd.weights.maps.templates import TableError

Op = Literal["copy", "transpose", "conv1x1", "split", "concat"]
OPS: tuple[Op, ...] = ("copy", "transpose", "conv1x1", "split", "concat")

MAX_TABLE = 200_000
"""Bytes of a table; the largest that is shipped has 3,200."""
MAX_RULES = 300
MAX_LEAVES = 100
MAX_LOOPS = 4
MAX_EXPRESSIONS = 64
MAX_SENTENCE = 500

_NAME = text()


def _variable() -> Kind:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not value.isidentifier() or len(value) > 40:
            raise ValueError
        return value

    return Kind("a name of letters, digits and _", read)


def _texts(most: int, *, plain: bool = False) -> Kind:
    """One text, or a list of them, as a tuple; `plain` ones have no holes."""
    one, several = text(), many(text(), most, 0)

    def read(value: Any) -> tuple[str, ...]:
        out: tuple[str, ...] = (one.read(value),) if isinstance(value, str) else several.read(value)
        if plain and any("{" in each for each in out):
            raise ValueError
        return out

    return Kind(f"a text, or a list of at most {most}, each of at most 200 characters{' without {' * plain}", read)


_REASONS = mapping(text(MAX_SENTENCE), MAX_EXPRESSIONS)
_LEAVES = mapping(mapping(_NAME, MAX_LEAVES), MAX_LEAVES)
TABLE = (
    Field("map", mapping(Kind("a value", lambda value: value), 20), {}),
    Field("dims", mapping(mapping(Kind("a value", lambda value: value), 20), 20, _variable()), {}),
    Field("leaf", _LEAVES, {}),
    Field("also", _LEAVES, {}),
    Field("rule", many(mapping(Kind("a value", lambda value: value), 20), MAX_RULES, 0), ()),
    Field("names", _REASONS, {}),
    Field("lora", mapping(Kind("a value", lambda value: value), 20)),
)
HEAD = (
    Field("component", _NAME, REQUIRED),
    Field("layout", _NAME, REQUIRED),
    Field("prefix", _texts(20, plain=True), ("",)),
    Field("detect", _texts(50), ()),
    Field("ignore", _REASONS, {}),
    Field("unused", text(MAX_SENTENCE), ""),
)
RULE = (
    Field("theirs", _texts(8), REQUIRED),
    Field("ours", _texts(8), REQUIRED),
    Field("for", mapping(either(whole(0, 10_000), _NAME), MAX_LOOPS, _variable()), {}),
    Field("leaf", _NAME),
    Field("also", _texts(8), ()),
    Field("op", one_of(*OPS)),
    Field("write", truth(), True),
)
DIM = (
    Field("count", _NAME),
    Field("first", _NAME),
    Field("exists", _NAME),
    Field("plus", whole(-64, 64), 0),
    Field("default", whole(0, 64), 0),
    Field("each", _NAME, ""),
)
LORA = (
    Field("prefix", mapping(_texts(8), 50), {}),
    Field("suffix", mapping(_NAME, 100), {}),
    Field("parts", _texts(100), ()),
    Field("ending", mapping(_NAME, 100), {}),
    Field("refused", _REASONS, {}),
)


def read_table(path: Path) -> str:
    """The text of a table's file. Raises TableError."""
    try:
        return read_bounded(path, MAX_TABLE, "table").decode()
    except (SourceError, UnicodeDecodeError) as error:
        raise TableError(f"{path} cannot be read as a table: {error}") from error


def parse_toml(raw: str, name: str) -> dict[str, Any]:
    """What the text of a table says; `name` is what messages call it. Raises TableError."""
    if len(raw) > MAX_TABLE:
        raise TableError(f"{name} has {len(raw)} characters, over the {MAX_TABLE} of any table")
    try:
        return tomllib.loads(raw)
    except RecursionError:
        raise TableError(f"{name} is not TOML that can be read: it is nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number of too many digits
        raise TableError(f"{name} is not TOML: {error}") from error


def read_section(data: Mapping[str, Any], schema: Sequence[Field], where: str) -> dict[str, Any]:
    """The fields of a section, and no others. Raises TableError, beginning with `where`."""
    if unknown := set(data) - {field.name for field in schema}:
        kind = "section" if schema is TABLE else "field"
        raise TableError(
            f"{where}: unknown {kind} {', '.join(quote(name).strip(chr(39)) for name in sorted(unknown)[:5])}"
        )
    return read_fields(data, schema, where, TableError)
