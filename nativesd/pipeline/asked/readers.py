"""Values as people pass them to those that are meant: numbers in ranges, words, flags; a sentence for all others."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, get_args

from nativesd.errors import UsageError
from nativesd.text.syntax import Emphasis

Reader = Callable[[str, Any], Any]
"""From an argument's name and value to the value that a call works with; UsageError names the argument."""


def whole(low: int, high: int | None = None) -> Reader:
    """A whole number in a range: of any type that is one, 2.0 and "2" included."""

    def read(name: str, value: Any) -> int:
        number = to_whole(name, value)
        if number < low or (high is not None and number > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UsageError(f"{name} must be {bounds}, not {shown(value)}")
        return number

    return read


def real(low: float, high: float = math.inf, *, above: bool = False) -> Reader:
    """A finite number in a range, without `low` itself where it has to be `above` that: 7 and "7" included."""

    def read(name: str, value: Any) -> float:
        number = to_real(name, value)
        if not math.isfinite(number) or number < low or number > high or (above and number == low):
            least = f"above {low:g}" if above else f"of at least {low:g}"
            bounds = f"a finite number {least}" if math.isinf(high) else f"between {low:g} and {high:g}"
            if above and not math.isinf(high):
                bounds = f"above {low:g} and at most {high:g}"
            raise UsageError(f"{name} must be {bounds}, not {shown(value)}")
        return number

    return read


def one_of(*words: str) -> Reader:
    """One of several words."""

    def read(name: str, value: Any) -> str:
        if value not in words:
            raise UsageError(f"{name} must be {' or '.join(words)}, not {shown(value)}")
        return str(value)

    return read


def folded(*words: str) -> Reader:
    """One of several words, in any case."""
    read = one_of(*words)
    return lambda name, value: read(name, value.lower() if isinstance(value, str) else value)


read_emphasis = folded(*get_args(Emphasis))
"""How prompts weigh their words."""


def shown(value: object) -> str:
    """A value in a sentence: short, whatever it is."""
    if isinstance(value, str | int | float | complex | bytes | list | tuple | dict | None):
        return reprlib.repr(value)
    return f"a {type(value).__name__}" if getattr(value, "ndim", None) != 0 else str(value)


def to_whole(name: str, value: Any) -> int:
    """A whole number of any size, of any type that is one, 2.0 and "2" included."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    number = to_real(name, value, "a whole number")
    if not math.isfinite(number) or number != int(number):
        raise UsageError(f"{name} must be a whole number, not {shown(value)}")
    return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else int(number)


def to_real(name: str, value: Any, what: str = "a number") -> float:
    """A number, of any type that is one, "7" included; maybe not finite."""
    try:
        if not isinstance(value, bool | bytes) and getattr(value, "ndim", 0) == 0:
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{name} must be {what}, not {shown(value)}")


def flag(name: str, value: Any) -> bool:
    """A bool, or numpy's, or 0 or 1; a text such as "false" is not guessed at."""
    if isinstance(value, str) or getattr(value, "ndim", 0) != 0 or value not in (False, True):
        raise UsageError(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def text(name: str, value: Any) -> str:
    """A name."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a name, not {shown(value)}")
    return value


def pixels(low: int, what: str) -> Reader:
    """Two whole numbers of pixels, `what` they are, such as "a width and a height"."""

    def read(name: str, value: Any) -> tuple[int, int]:
        sides = [whole(low)(name, side) for side in value] if is_list(value) else []
        if len(sides) != 2:
            raise UsageError(f"{name} must be {what} in pixels, not {shown(value)}")
        return sides[0], sides[1]

    return read


def is_list(value: object) -> bool:
    """Whether a value is several: no text and no mapping."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def is_path(value: object) -> bool:
    """Whether a value is a file's path."""
    return isinstance(value, str | PathLike)


def lora_use(text: str) -> tuple[str, float, float]:
    """FILE, FILE:SCALE or FILE:SCALE:TEXT, where the file's own name may have colons."""
    file, scales = text, list[float]()
    while len(scales) < 2 and ":" in file:
        head, _, tail = file.rpartition(":")
        try:
            scales.insert(0, float(tail))
        except ValueError:
            break
        file = head
    unet = scales[0] if scales else 1.0
    return file, unet, scales[1] if len(scales) > 1 else unet
