"""Headers of GGUF files, read and written, as stable-diffusion.cpp has them: names are those of the checkpoint.

A file is the magic, a version, two counts, so many keys with values, so many tensors' entries, and from the next
multiple of the alignment on the tensors' bytes (github.com/ggml-org/ggml, docs/gguf.md). Dimensions are written the
last first, and ones before the first are left out.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from nativesd.errors import SourceError, quote
from nativesd.weights.formats.header import AGAIN, MAX_COUNT, SOURCE, FormatError, Header, TensorInfo

MAGIC = b"GGUF"
MAX_BYTES = 8_000_000
"""Bytes of a header; SDXL's takes 0.3 MB."""
MAX_ENTRIES = 65536
"""Keys, and tensors, each."""
MAX_NAME = 1000
MAX_DIMENSIONS = 4
"""ggml.h, GGML_MAX_DIMS"""

BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
"""Quantised dtypes that are read: how many numbers a block has, and how many bytes (ggml-common.h)."""
PLAIN = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""ggml.h, enum ggml_type"""
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values but text and arrays, as `struct` calls them (docs/gguf.md, gguf_metadata_value_type)."""
TEXT, ARRAY = 8, 9
SHAPE = "comfy.gguf.orig_shape."
"""What ComfyUI-GGUF's converter puts before a tensor's name where it wrote another shape (its tools/convert.py)."""


def read_gguf(file: BinaryIO, size: int, name: str) -> Header:
    """The header of a file of `size` bytes that is open at its beginning and that messages call `name`.

    Raises SourceError.
    """
    try:
        return _Header(file.read(MAX_BYTES), size).read()
    except FormatError as error:
        raise SourceError(f"{name} {error}") from error


class _Header:
    """A header's bytes, read from front to back. Raises FormatError."""

    def __init__(self, raw: bytes, size: int) -> None:
        self.raw, self.size, self.at = raw, size, 0

    def read(self) -> Header:
        """All of it."""
        self.take(len(MAGIC))
        version = self.number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise FormatError(
                "is a GGUF file of a big-endian machine: convert it to the other order"
                if swapped
                else f"is a GGUF file of version {version}, not 2 or 3: convert it with a newer program"
            )
        tensors, keys = self.number("Q"), self.number("Q")
        if max(tensors, keys) > MAX_ENTRIES:
            raise FormatError(f"has {keys} keys and {tensors} tensors, over the {MAX_ENTRIES} there can be: {SOURCE}")
        values: dict[str, object] = {}
        for _ in range(keys):
            key = self.text()
            if key in values:
                raise FormatError(f"names {quote(key)} twice: {SOURCE}")
            values[key] = self.value(self.number("I"))
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 65536 or alignment % 8:
            raise FormatError(f"has the alignment {quote(alignment)}, not a multiple of 8: {SOURCE}")
        infos = [self.tensor(values) for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        return Header(self.checked(infos, alignment, start), _metadata(values), start, self.size)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        end = self.at + count
        if end > len(self.raw):
            what = f"has a header of over {MAX_BYTES} bytes" if end <= self.size else "is cut short in its header"
            raise FormatError(f"{what}: {AGAIN}")
        self.at = end
        return self.raw[end - count : end]

    def number(self, kind: str) -> int:
        """The next number."""
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def text(self, most: int = MAX_NAME) -> str:
        """The next text: a name, if it is no longer than `most` bytes."""
        length = self.number("Q")
        if length > most:
            raise FormatError(f"has a name or text of {length} bytes, over the {most} there can be: {SOURCE}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"has a name or text that is not UTF-8, before byte {self.at}: {SOURCE}") from error

    def value(self, kind: int, *, inside: bool = False) -> object:
        """The next value: a number, a text, or a list of at most 64 numbers; None for other arrays."""
        if kind == TEXT:
            return self.text(MAX_BYTES)
        if kind in VALUES:
            return struct.unpack(f"<{VALUES[kind]}", self.take(struct.calcsize(f"<{VALUES[kind]}")))[0]
        if kind != ARRAY or inside:
            raise FormatError(f"has a value of the type {kind}, which the format does not have: {SOURCE}")
        inner, count = self.number("I"), self.number("Q")
        if inner in VALUES:
            if count > MAX_BYTES:
                raise FormatError(f"has an array of {count} values: {SOURCE}")
            raw = self.take(count * struct.calcsize(f"<{VALUES[inner]}"))
            return list(struct.unpack(f"<{count}{VALUES[inner]}", raw)) if count <= 64 else None
        for _ in range(count):
            self.value(inner, inside=True)
        return None

    def tensor(self, values: dict[str, object]) -> tuple[str, TensorInfo]:
        """The next tensor's entry, with its offset as the start."""
        name = self.text()
        dimensions = self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise FormatError(f"gives {quote(name)} {dimensions} dimensions, over the {MAX_DIMENSIONS}: {SOURCE}")
        sizes = [self.number("Q") for _ in range(dimensions)]
        kind, offset = self.number("I"), self.number("Q")
        dtype = TYPES.get(kind, str(kind))
        if dtype not in BLOCKS and dtype not in PLAIN:
            raise FormatError(f"has {quote(name)} in {dtype}, which is not read here: take the model in Q8_0 or Q4_K")
        numbers, width = BLOCKS.get(dtype) or (1, PLAIN[dtype])
        count, row = math.prod(sizes), sizes[0] if sizes else 1
        if count * width > MAX_COUNT or offset > MAX_COUNT or row % numbers:
            raise FormatError(f"gives {quote(name)} the sizes {sizes}, which no {dtype} has: {SOURCE}")
        shape = tuple(reversed(sizes))
        stated = values.get(SHAPE + name)
        if isinstance(stated, list):
            if math.prod(stated) != count or not all(type(n) is int and n >= 0 for n in stated):
                raise FormatError(f"gives {quote(name)} the sizes {sizes} and the shape {stated}: {SOURCE}")
            shape = tuple(stated)
        return name, TensorInfo(dtype, shape, offset, offset + count // numbers * width)

    def checked(self, infos: list[tuple[str, TensorInfo]], alignment: int, start: int) -> dict[str, TensorInfo]:
        """The entries by their names, each aligned, inside the file, and by itself."""
        tensors = dict(infos)
        if len(tensors) != len(infos):
            raise FormatError(f"names a tensor twice: {SOURCE}")
        end = 0
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if info.start < end or info.start % alignment:
                raise FormatError(f"places {quote(name)} over another tensor, or between two places: {SOURCE}")
            end = info.end
        if start + end > self.size:
            raise FormatError(f"is cut short: its tensors end at byte {start + end}, the file at {self.size}: {AGAIN}")
        return tensors


def _metadata(values: dict[str, object]) -> dict[str, str]:
    """The keys with a number or a short text, as text."""
    return {
        key: str(value)
        for key, value in values.items()
        if isinstance(value, str | int | float) and len(str(value)) <= MAX_NAME
    }


ALIGNMENT = 32
"""Of tensors in files that are written here; the format's default."""
VERSION = 3
TYPE_NUMBERS = {name: number for number, name in TYPES.items()}
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
    "BF16": 32,
}  # fmt: skip
"""general.file_type, by the dtype that most tensors have (docs/gguf.md; llama.h, enum llama_ftype)."""


def gguf_bytes(kind: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor."""
    numbers, width = BLOCKS.get(kind) or (1, PLAIN[kind])
    return math.prod(shape) // numbers * width


def gguf_header(metadata: Mapping[str, str], tensors: Sequence[tuple[str, str, Sequence[int], int]]) -> bytes:
    """A header, not padded; what begins behind its padding is where the tensors' offsets count from.

    tensors  name, dtype, shape and offset
    """
    kinds = Counter(kind for _, kind, _, _ in tensors)
    most = max(kinds, key=lambda kind: (kind in BLOCKS, kinds[kind]), default="F32")
    own = _text("general.architecture") + _number("I", TEXT) + _text("sd")
    own += _text("general.file_type") + _number("I", 4) + _number("I", FILE_TYPES[most])
    own += _text("general.quantization_version") + _number("I", 4) + _number("I", 2)
    for key, value in metadata.items():
        own += _text(key) + _number("I", TEXT) + _text(value)
    out = MAGIC + _number("I", VERSION) + _number("Q", len(tensors)) + _number("Q", 3 + len(metadata)) + own
    for name, kind, shape, offset in tensors:
        sizes = list(reversed(shape)) or [1]
        out += _text(name) + _number("I", len(sizes)) + b"".join(_number("Q", size) for size in sizes)
        out += _number("I", TYPE_NUMBERS[kind]) + _number("Q", offset)
    return out


def _text(text: str) -> bytes:
    raw = text.encode()
    return _number("Q", len(raw)) + raw


def _number(kind: str, number: int) -> bytes:
    return struct.pack(f"<{kind}", number)
