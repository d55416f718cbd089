"""The hashes by which web UIs and model pages name files of weights, kept in the user's cache by size and time.

    sha256         of the whole file: its first ten digits are A1111's model hash and Civitai's AutoV2
    short          eight digits of the SHA-256 of the 64 KiB from 1 MiB on: A1111's first model hash, AutoV1
    tensors        the SHA-256 of what is behind a safetensors file's header: its first twelve digits are A1111's hash
                   of a LoRA and AutoV3; kohya's sd-scripts keep the whole as `sshs_model_hash`
    legacy         `sshs_legacy_hash`: as `short`, of the file as it would be with the training's metadata (`ss_`) alone
    crc32          of the whole file

(A1111, modules/hashes.py and modules/sd_models.py, `model_hash`; kohya-ss/sd-scripts, library/train_util.py,
`precalculate_safetensors_hashes`.)
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from nativesd.cache import cache_folder, keep
from nativesd.errors import NativesdError, SourceError
from nativesd.reading import Stamp, read_json
from nativesd.weights.formats.header import Header, TensorInfo, header_bytes, opened, read_safetensors

PIECE = 1 << 22  # bytes
SHORT = (0x100000, 0x110000)
"""The bytes that old hashes are of."""
MOST = 5000
"""Files whose hashes are kept."""


@dataclass(frozen=True)
class Hashes:
    """A file's hashes in hexadecimal digits; `tensors` and `legacy` are "" for what is no safetensors file."""

    sha256: str
    short: str
    crc32: str
    tensors: str = ""
    legacy: str = ""

    @property
    def auto_v2(self) -> str:
        """A1111's model hash."""
        return self.sha256[:10]

    @property
    def auto_v3(self) -> str:
        """A1111's hash of a LoRA."""
        return self.tensors[:12]


def hash_file(path: str | Path) -> Hashes:
    """A file's hashes: from the cache while its size and time are the same, else it is read once.

    Raises SourceError for what cannot be read, or changes meanwhile.
    """
    path = Path(path)
    if (known := known_hashes(path)) is not None:
        return known
    with opened(path) as (file, size):
        stamp = Stamp.of(os.fstat(file.fileno()))
        header = _header(file, size, str(path))
        file.seek(0)
        found = _hash(file, size, header)
        if Stamp.of(os.fstat(file.fileno())) != stamp:
            raise SourceError(f"{path} changed while it was read: wait until it is written, then try again")
    _keep(path, stamp, found)
    return found


def known_hashes(path: Path) -> Hashes | None:
    """A file's hashes where the cache has them, and the file is still the one that was read."""
    try:
        stamp = Stamp.of(path.stat())
    except OSError:
        return None
    entry = _kept().get(os.path.realpath(path))
    if not isinstance(entry, dict) or entry.get("stamp") != list(stamp):
        return None
    names = [field.name for field in fields(Hashes)]
    if not all(isinstance(entry.get(name), str) for name in names):
        return None
    return Hashes(**{name: entry[name] for name in names})


def _header(file: BinaryIO, size: int, name: str) -> Header | None:
    """The header of a safetensors file; None of any other, or a damaged one."""
    try:
        return read_safetensors(file, size, name)
    except SourceError:
        return None


def _hash(file: BinaryIO, size: int, header: Header | None) -> Hashes:
    whole, short, crc, at = hashlib.sha256(), hashlib.sha256(), 0, 0
    tensors, legacy = hashlib.sha256(), hashlib.sha256()
    start = size if header is None else header.data_start
    trained = 0 if header is None else training_start(header.tensors, header.metadata)
    with ThreadPoolExecutor(1) as beside:  # half of the work, where there is a second core
        while piece := file.read(PIECE):
            done = beside.submit(tensors.update, between(piece, at, start, size))
            whole.update(piece)
            crc = zlib.crc32(piece, crc)
            short.update(between(piece, at, *SHORT))
            legacy.update(between(piece, at, *(start - trained + place for place in SHORT)))
            at += len(piece)
            done.result()
    out = Hashes(whole.hexdigest(), short.hexdigest()[:8], f"{crc:08x}")
    if header is None:
        return out
    return replace(out, tensors=tensors.hexdigest(), legacy=legacy.hexdigest()[:8] if trained <= SHORT[0] else "")


def between(piece: bytes | memoryview, at: int, first: int, end: int) -> memoryview:
    """What a piece that begins at byte `at` has of the bytes [first, end)."""
    return memoryview(piece)[max(first - at, 0) : max(end - at, 0)]


def training_start(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> int:
    """Where the tensors would begin in a file that has the training's metadata (`ss_`) alone, as it is written."""
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    placed = {key: (t.dtype, t.shape, t.start, t.end) for key, t in tensors.items()}
    return 8 + len(header_bytes(placed, kept, always=True))  # kohya's code passes {} where there is none


def _place() -> Path:
    return cache_folder() / "hashes.json"


def _kept() -> dict[str, Any]:
    """What is known of every file, by its real path."""
    try:
        return read_json(_place())
    except NativesdError:  # missing, or damaged: made again
        return {}


def _keep(path: Path, stamp: Stamp, found: Hashes) -> None:
    """Put a file's hashes into the cache, and drop those of files that are gone."""
    try:
        place = _place()
    except NativesdError:
        return
    kept = {name: entry for name, entry in _kept().items() if os.path.exists(name)}
    kept[os.path.realpath(path)] = {"stamp": list(stamp), **asdict(found)}
    keep(place, json.dumps(dict(list(kept.items())[-MOST:]), indent=1).encode())
