"""The folder of results: pictures under their ids, and a file of lines that says of every row what came of it.

OUT/xx/ID.png            xx: the first two hex digits of the id's SHA-256
OUT/results.I-of-N.jsonl one line for every row that is finished, by the process that paints shard I of N
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import Image

from nativesd.batch.jobs import Job
from nativesd.batch.shards import Shard
from nativesd.destination import fresh
from nativesd.errors import NativesdError, SourceError
from nativesd.pictures.opening import opened
from nativesd.reading import open_regular

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
"""Suffix -> Pillow's name."""
LOSSLESS = ("png",)
Found = Literal["as it was", "missing", "damaged"]


@dataclass(frozen=True)
class Outcome:
    """What came of a job: a picture (a file's bytes, its size, the SHA-256 of its pixels), or an error."""

    job: Job
    seconds: float
    """Its share of the time that its batch took."""
    data: bytes = b""
    width: int = 0
    height: int = 0
    sha256: str = ""
    error: str | None = None

    def line(self, suffix: str) -> dict[str, Any]:
        """What the results say of it."""
        made = self.error is None
        return {
            "id": self.job.id,
            "file": self.job.file(suffix) if made else None,
            "seed": self.job.seed,
            "width": self.width if made else None,
            "height": self.height if made else None,
            "sha256": self.sha256 if made else None,
            "bytes": len(self.data) if made else None,
            "seconds": round(self.seconds, 4),
            "error": self.error,
            "parameters": self.job.parameters,
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **self.job.extra,
        }


def pixel_hash(image: Image.Image) -> str:
    """The SHA-256 of a picture's pixels: its RGB bytes, row after row."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def save(out: Path, outcome: Outcome, suffix: str) -> None:
    """Write a picture, whole or not at all, over what is there. Raises SourceError where it cannot be.

    Earlier pictures of the row go: those of other formats, and where it failed all, as no line tells of them any more.
    """
    made = outcome.error is None
    if made:
        with fresh(out / outcome.job.file(suffix), replace=True) as temporary:
            temporary.write_bytes(outcome.data)
    for each in FORMATS:
        if (each != suffix or not made) and os.path.lexists(path := out / outcome.job.file(each)):
            with suppress(OSError):
                path.unlink()


def look_at(out: Path, line: Mapping[str, Any]) -> Found:
    """Whether the picture of a line of the results is what it was: as long, readable, and of a PNG the same pixels."""
    path = out / str(line["file"])
    try:
        if path.stat().st_size != line.get("bytes"):  # decoders forgive an end that is missing
            return "damaged"
        with opened(path) as image:
            image.load()
            same = image.size == (line.get("width"), line.get("height"))
            if same and path.suffix[1:] in LOSSLESS:
                same = pixel_hash(image) == line.get("sha256")
    except FileNotFoundError:
        return "missing"
    except (NativesdError, OSError, SyntaxError, ValueError):  # what decoders raise for a damaged file
        same = False
    return "as it was" if same else "damaged"


def read_results(out: Path) -> Iterator[dict[str, Any]]:
    """The lines of all shards' results, of whatever number of shards; those that are not whole are left out.

    Raises SourceError for what has such a name and is no file.
    """
    for path in sorted(out.glob("results.*-of-*.jsonl")):
        with _opened(path) as file:
            yield from filter(None, map(_read, file))


def _opened(path: Path) -> BinaryIO:
    return io.BufferedReader(open_regular(path, "file of results"))


def _read(raw: bytes) -> dict[str, Any] | None:
    """A line, where it is one of the results, and whole."""
    try:
        line = json.loads(raw)
        json.dumps(line, ensure_ascii=False).encode()  # half of a surrogate pair passes json
    except (ValueError, RecursionError):
        return None
    whole = raw.endswith(b"\n") and isinstance(line, dict) and isinstance(line.get("id"), str)
    return line if whole else None


class Results:
    """The results of one shard: lines are added at the end, each batch's in one go."""

    def __init__(self, out: Path, shard: Shard) -> None:
        self.path = out / f"results.{shard.name}.jsonl"
        self._file: BinaryIO | None = None

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Leave out the lines that are not wanted, and what a killed process left unfinished at the end.

        The file is written anew where something is left out. Raises SourceError.
        """
        if not os.path.lexists(self.path):
            return
        with _opened(self.path) as file:
            stale = any((line := _read(raw)) is None or not wanted(line) for raw in file)
        if stale:
            with fresh(self.path, replace=True) as temporary, _opened(self.path) as old, temporary.open("wb") as new:
                for raw in old:
                    if (line := _read(raw)) is not None and wanted(line):
                        new.write(raw)

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines at the end. Raises SourceError."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            if self._file is None:
                self._file = self.path.open("ab")
            self._file.write(text.encode())
            self._file.flush()
        except OSError as error:
            raise SourceError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """No more lines."""
        if self._file is not None:
            with suppress(OSError):  # where the disk is full, `add` has said so
                os.fsync(self._file.fileno())
                self._file.close()
