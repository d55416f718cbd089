"""Files that others made, read so that nothing hangs or grows: regular files, of a bounded size, and strict JSON."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from nativesd.errors import SourceError, quote

MAX_JSON = 32_000_000
"""Bytes; a hundred times the largest index of shards, ten times the largest tokenizer."""
MAX_DEPTH = 64
"""Of lists and objects in each other; published files have less than 10."""


def open_regular(path: Path, what: str = "file") -> FileIO:
    """Open a file to read it, unbuffered; `what` says in messages what it should be. Raises SourceError.

    A pipe, a device or a folder is refused, and not opened; links are followed.
    """
    try:
        _require_regular(os.stat(path).st_mode, path, what)
        # it may have become a pipe in between, which would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            _require_regular(os.fstat(descriptor).st_mode, path, what)
            return os.fdopen(descriptor, "rb", buffering=0)
        except BaseException:
            os.close(descriptor)
            raise
    except FileNotFoundError as error:
        hint = "it is a link to nothing; download it again" if os.path.islink(path) else "check the name and the folder"
        raise SourceError(f"{path} is missing: {hint}") from error
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise SourceError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


class Stamp(NamedTuple):
    """What tells whether a file is still the one that was looked at."""

    device: int
    inode: int
    size: int
    written: int
    """Nanoseconds"""

    @classmethod
    def of(cls, stated: os.stat_result) -> Stamp:
        """Of what stat or fstat answers."""
        return cls(stated.st_dev, stated.st_ino, stated.st_size, stated.st_mtime_ns)


def read_bounded(path: Path, limit: int, what: str = "file") -> bytes:
    """All of a regular file of at most `limit` bytes. Raises SourceError."""
    with open_regular(path, what) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise SourceError(f"{path} has {size} bytes, more than the {limit} of any {what}: check the name")
            raw = bytearray()
            while piece := file.read(limit + 1 - len(raw)):
                raw += piece
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) > limit:
        raise SourceError(f"{path} grew while it was read, beyond the {limit} bytes that a {what} can have")
    return bytes(raw)


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder, by name. Raises SourceError for one that cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror or error}") from error


def read_json(path: Path, *, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file, by the rules of `parse_json`. Raises SourceError."""
    return parse_json(read_bounded(path, limit, "JSON file"), str(path))


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """A JSON object that names nothing twice, with finite numbers, not nested deeper than MAX_DEPTH.

    `name` is what messages call it. Raises SourceError.
    """
    try:
        data = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite
        )
    except RecursionError:
        raise SourceError(f"{name} cannot be read as JSON: it is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise SourceError(f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise SourceError(f"{name} holds {type(data).__name__}, not a JSON object: get it from its original source")
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise SourceError(f"{name} cannot be read as JSON: it is nested deeper than {MAX_DEPTH}")
    return data


def is_name(text: str) -> bool:
    """Whether a text that a file states can be the name of something in its folder, and of nothing elsewhere."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        return False
    return text not in ("", ".", "..") and not set(text) & set("/\\:") and text.isprintable() and length <= 255


def _require_regular(mode: int, path: Path, what: str) -> None:
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
        raise SourceError(f"{path} is {found}, not a {what}: name the file itself")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {quote(name)} twice")
    for name in out:
        name.encode()  # half of a surrogate pair passes json
    return out


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{quote(text)} is more than a number can hold")
    return number
