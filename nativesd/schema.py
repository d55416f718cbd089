"""What a file's fields may hold: for every field its kind, range and default, checked before anything is made of them.

A schema is a tuple of `Field`s; it also documents which fields of a published file are honoured. Fields that a schema
does not name are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nativesd.errors import NativesdError, SourceError, quote

REQUIRED: Any = object()
MAX_TEXT = 200
"""Characters of a name in a config."""


@dataclass(frozen=True)
class Kind:
    """What a value can be: `says` completes "must be ...", `read` gives the value, or raises ValueError."""

    says: str
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class Field:
    """One field of a file: null and absent mean its default."""

    name: str
    kind: Kind
    default: Any = None


def read_fields(
    data: Mapping[str, Any], schema: Sequence[Field], where: str, error: type[NativesdError] = SourceError
) -> dict[str, Any]:
    """Every field of a schema with its value or default.

    where  what messages call the file
    error  what is raised, which names the file, the field, its value, and what is allowed
    """
    out = {}
    for field in schema:
        value = data.get(field.name)
        if value is None:
            if field.default is REQUIRED:
                raise error(f"{where} lacks the field {field.name!r}, which must be {field.kind.says}")
            out[field.name] = field.default
            continue
        try:
            out[field.name] = field.kind.read(value)
        except ValueError:
            raise error(f"{where}: {field.name} = {quote(value)} must be {field.kind.says}") from None
    return out


def whole(least: int, most: int) -> Kind:
    """A whole number."""

    def read(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise ValueError
        return value

    return Kind(f"a whole number from {least} to {most}", read)


def number(least: float, most: float) -> Kind:
    """Any number, as a float."""

    def read(value: Any) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise ValueError
        return float(value)

    return Kind(f"a number from {least:g} to {most:g}", read)


def text(most: int = MAX_TEXT) -> Kind:
    """A printable text."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            raise ValueError
        return value

    return Kind(f"a text of at most {most} characters", read)


def one_of(*allowed: Any) -> Kind:
    """One of a few texts, numbers or truth values; 1 is not true."""

    def read(value: Any) -> Any:
        for each in allowed:
            if type(value) is type(each) and value == each:
                return each
            if type(each) is float and type(value) is int and value == each:
                return each
        raise ValueError

    return Kind(" or ".join("true" if a is True else "false" if a is False else repr(a) for a in allowed), read)


def truth() -> Kind:
    """True or false."""
    return one_of(True, False)


def many(kind: Kind, most: int, least: int = 1) -> Kind:
    """A list of values of one kind, as a tuple."""

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise ValueError
        return tuple(kind.read(each) for each in value)

    return Kind(f"a list of {least} to {most}, each {kind.says}", read)


def mapping(kind: Kind, most: int, names: Kind | None = None) -> Kind:
    """Names, printable texts or of a kind of their own, each with a value of one kind."""
    named = names or text()

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > most:
            raise ValueError
        return {named.read(name): kind.read(each) for name, each in value.items()}

    return Kind(f"at most {most} names, each with {kind.says}", read)


def either(*kinds: Kind) -> Kind:
    """The first kind that fits."""

    def read(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(value)
            except ValueError:
                continue
        raise ValueError

    return Kind(", or ".join(kind.says for kind in kinds), read)
