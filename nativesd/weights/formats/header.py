"""Headers of safetensors files, validated before anything trusts them: the tensors' names, dtypes, shapes and places.

A file is the header's length N (8 bytes, little-endian), N bytes of JSON, then the tensors' bytes without gaps
(github.com/huggingface/safetensors, README, "Format"). What passes here also passes the safetensors library (0.8);
refused beyond it are repeated keys, unknown or escaped fields, __metadata__ that is null, space before the header,
numbers from 2^63 on and more than 64 dimensions.

Grammar, limits and checks are one walk over the bytes, and so one file.

The JSON is matched member by member, so that depth costs nothing and what is refused is never built. The worst headers
of 100 MB (8 million entries of metadata, 2 million empty tensors) take 0.9 GB beyond themselves, and 16 s on one core.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nativesd.errors import SourceError, WeightsError, quote
from nativesd.reading import Stamp, is_name, read_json

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element of every dtype of the format (safetensors 0.8, enum Dtype)."""

MAX_HEADER = 100_000_000
"""Bytes; the format's limit (safetensors, MAX_HEADER_SIZE)."""
MAX_DIMENSIONS = 64
MAX_COUNT = 2**63 - 1
HEAD = 256
"""Bytes at a file's beginning that tell what it is if it is no safetensors file."""

FIELDS = {"dtype", "shape", "data_offsets"}
SOURCE = "the program that wrote it is at fault, or it was tampered with; get it from its original source"
AGAIN = "the download or copy was interrupted; download it again"


class FormatError(ValueError):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its dtype as the format names it, its shape, and the bytes [start, end) of the file's data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...] | None = None
    """How many elements apart the numbers of each dimension lie, where the tensor is not contiguous"""
    scale: str = ""
    """The tensor that it is to be multiplied with (`scaled.fold`)"""

    @property
    def elements(self) -> int:
        """How many numbers it has: 1 for shape ()."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the file that it spans."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a file says of itself. The tensors' offsets count from byte `data_start` of the file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What the file has beside tensors and metadata, and why it is not read"""
    stamp: Stamp | None = None
    """Which file it was; what reads its tensors later compares"""


def read_header(path: Path) -> Header:
    """The header of a safetensors file; of its data, no more than the first 256 bytes are read. Raises SourceError."""
    with opened(path) as (file, size):
        return read_safetensors(file, size, str(path))


def read_safetensors(file: BinaryIO, size: int, name: str) -> Header:
    """`read_header` of a file of `size` bytes that is open at its beginning and that messages call `name`."""
    head = file.read(HEAD)
    length = header_length(head, size, name)
    raw = head[8 : 8 + length] + file.read(max(0, 8 + length - len(head)))
    if len(raw) != length:
        raise SourceError(f"{name} changed while it was read: wait until it is written, then try again")
    return parse_header(raw, size, name)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file of weights, open to be read, and its size. Raises SourceError for what cannot be read, then or later."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
            raise SourceError(f"{path} is {what}, not a file of weights: name the file itself")
        with path.open("rb", buffering=0) as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        hint = "it is a link to nothing; download it again" if path.is_symlink() else "check the name and the folder"
        raise SourceError(f"{path} is missing: {hint}") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def header_length(head: bytes, file_size: int, name: str) -> int:
    """How many bytes of JSON follow the first 8 bytes of a file: 1 to MAX_HEADER, all of them in the file.

    `head` is the file's first HEAD bytes (all, if it has fewer) and `name` what messages call it. Raises SourceError,
    saying what the file is where that can be seen.
    """
    if file_size == 0:
        raise SourceError(f"{name} is empty: {AGAIN}")
    length = int.from_bytes(head[:8], "little")
    begun = head[8:9] == b"{" and length <= MAX_HEADER
    if not begun and (other := _other_format(head)):
        raise SourceError(f"{name} is {other}")
    if file_size < 8:
        raise SourceError(
            f"{name} has {file_size} bytes, fewer than the 8 that a safetensors file begins with: {AGAIN}"
        )
    if not any(head):
        raise SourceError(f"{name} begins with zeros, where the header should be: {AGAIN}")
    if length == 0:
        raise SourceError(f"{name} has a header of no bytes: {SOURCE}")
    if length > MAX_HEADER:
        raise SourceError(
            f"{name} is not a safetensors file: its first 8 bytes, read as the header's length, give {length} bytes, "
            f"over the format's limit of {MAX_HEADER}; convert it where it came from, or check the download"
        )
    if 8 + length > file_size:
        raise SourceError(
            f"{name} is cut short: its header should end at byte {8 + length}, but the file has {file_size}: {AGAIN}"
        )
    return length


def header_bytes(
    tensors: Mapping[str, tuple[str, Sequence[int], int, int]], metadata: Mapping[str, str], *, always: bool = False
) -> bytes:
    """The JSON of a header, as the safetensors library writes it; its length stands before it in a file.

    tensors  name -> its dtype, as the format names it, its shape, and the bytes [start, end) of the data
    always   write metadata that says nothing, too
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata or always else {}
    for name, (dtype, shape, start, end) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-len(raw) % 8)


def _other_format(head: bytes) -> str | None:
    """What a file is that begins with `head` and no safetensors header, with what to do, as the end of a sentence."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    local = "which is read from a local file only: download it, and name the file"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights: run 'git lfs pull' in its folder, or download the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body", b"<!--")):
        return "a web page (a sign-in or error page under this name), not weights: sign in and download it again"
    if text.startswith((b'{"', b"{'", b"[")):
        return "plain JSON (an error answer or a config under this name), not weights: download it again"
    if head.startswith(b"PK\x03\x04"):
        return f"a zip archive as torch.save writes it, {local}"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and any(head[2:8]):
        return f"a pickle as torch.save writes it, {local}"
    if head.startswith(b"GGUF"):
        return f"a GGUF file, {local}"
    return None


# One member of the header each, with what ends it. Possessive throughout, so no text makes them try a second way.
_W = r"[ \t\n\r]*+"
_STRING = r'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_NUMBER = r"(?:0|[1-9][0-9]{0,18}+)"
_LIST = rf"\[{_W}(?:{_NUMBER}{_W}(?:,{_W}{_NUMBER}{_W}){{0,{MAX_DIMENSIONS - 1}}}+)?+\]"
_FIELD = rf'"(dtype|shape|data_offsets)"{_W}:{_W}("[A-Z0-9_]*+"|{_LIST}){_W}'
_PAIR = rf"{_STRING}{_W}:{_W}{_STRING}{_W}"
_PAIRS = rf"(?:{_PAIR}(?:,{_W}{_PAIR})*+)?+"
PAIR = re.compile(rf"({_STRING}){_W}:{_W}({_STRING})".encode())
KEY = re.compile(rf"({_STRING}){_W}:{_W}".encode())
TENSOR = re.compile(rf"({_STRING}){_W}:{_W}{{{_W}{_FIELD},{_W}{_FIELD},{_W}{_FIELD}}}{_W}([,}}]){_W}".encode())
METADATA = re.compile(rf'"__metadata__"{_W}:{_W}{{{_W}({_PAIRS})}}{_W}([,}}]){_W}'.encode())
BEGIN = re.compile(rf"{{{_W}(}}{_W})?+".encode())


def parse_header(raw: bytes, file_size: int, name: str) -> Header:
    """The header whose JSON is `raw`, of a file of `file_size` bytes that messages call `name`. Raises SourceError."""
    try:
        tensors, metadata = _members(raw)
        _check_cover(tensors)
    except ValueError as error:
        raise SourceError(f"{name} {error}: {SOURCE}") from error
    described = max((info.end for info in tensors.values()), default=0)
    there = file_size - 8 - len(raw)
    if described > there:
        raise SourceError(f"{name} is cut short: its tensors take {described} bytes, {there} are there: {AGAIN}")
    if described < there:
        raise SourceError(f"{name} has {there - described} bytes after its last tensor: {SOURCE}")
    return Header(tensors, metadata, 8 + len(raw), file_size)


def _members(raw: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of a header. Raises ValueError with the fault."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    begin = BEGIN.match(raw)
    if begin is None:
        raise ValueError("has a header that is no JSON object, as it does not begin with '{'")
    at, more = begin.end(), begin[1] is None
    while more:
        if found := TENSOR.match(raw, at):
            key = _text(found[1], at)
            if key in tensors:
                raise ValueError(f"names the tensor {quote(key)} twice")
            if key == "__metadata__":
                raise ValueError("has a __metadata__ that is not strings alone")
            tensors[key] = _tensor(key, found)
        elif found := METADATA.match(raw, at):
            if metadata is not None:
                raise ValueError("has __metadata__ twice")
            metadata = _metadata(found, at)
        else:
            raise ValueError(_fault(raw, at))
        at, more = found.end(), found[found.re.groups] == b","
    if at != len(raw):
        raise ValueError(f"has a header that goes on after its closing '}}', at byte {8 + at}")
    return tensors, metadata or {}


def _text(literal: bytes, at: int) -> str:
    """The text of a JSON string that stands at byte `at` of the header. Raises ValueError where it is not Unicode."""
    try:
        text: str = json.loads(literal) if b"\\" in literal else literal[1:-1].decode()
        text.encode()  # half of a surrogate pair passes json
    except ValueError as error:
        raise ValueError(f"has a text that is not valid UTF-8 or JSON, at byte {8 + at}") from error
    return text


def _tensor(key: str, entry: re.Match[bytes]) -> TensorInfo:
    """A tensor's entry, checked by itself. Raises ValueError with the fault."""
    fields = {entry[2]: entry[3], entry[4]: entry[5], entry[6]: entry[7]}
    dtype_text, shape_text = fields.get(b"dtype", b""), fields.get(b"shape", b"")
    offsets_text = fields.get(b"data_offsets", b"")
    if dtype_text[:1] != b'"' or shape_text[:1] != b"[" or offsets_text.count(b",") != 1:
        raise ValueError(_fault(entry.string, entry.start()))
    dtype, shape, (start, end) = dtype_text[1:-1].decode(), _integers(shape_text), _integers(offsets_text)
    if dtype not in BITS:
        raise ValueError(f"gives the tensor {quote(key)} the dtype {quote(dtype)}, which the format does not have")
    bits = math.prod(shape) * BITS[dtype]
    if bits > MAX_COUNT or (bits == 0 and math.prod(filter(None, shape)) > MAX_COUNT):
        raise ValueError(f"gives the tensor {quote(key)} the shape {quote(shape)}, which no memory holds")
    if end < start:
        raise ValueError(f"gives the tensor {quote(key)} data_offsets in reverse, {start} to {end}")
    if bits != 8 * (end - start):
        needs = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, no whole bytes"
        raise ValueError(f"gives the tensor {quote(key)} {end - start} bytes, but {dtype} {quote(shape)} takes {needs}")
    return TensorInfo(dtype, shape, start, end)


def _integers(text: bytes) -> tuple[int, ...]:
    """The integers of a JSON list that the grammar above has matched."""
    inner = text[1:-1].strip()
    return tuple(map(int, inner.split(b","))) if inner else ()


def _metadata(found: re.Match[bytes], at: int) -> dict[str, str]:
    """The strings of __metadata__. Raises ValueError with the fault."""
    out: dict[str, str] = {}
    for pair in PAIR.finditer(found[1]):
        key = _text(pair[1], at)
        if key in out:
            raise ValueError(f"has {quote(key)} twice in its __metadata__")
        out[key] = _text(pair[2], at)
    return out


def _check_cover(tensors: Mapping[str, TensorInfo]) -> None:
    """Check that the tensors lie end to end from 0 on. Raises ValueError with the first fault."""
    before, end = "", 0
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < end:
            raise ValueError(f"gives bytes {info.start} to {end} to two tensors, {quote(before)} and {quote(key)}")
        if info.start > end:
            raise ValueError(f"gives bytes {end} to {info.start} to no tensor, before {quote(key)}")
        before, end = key, info.end


WINDOW = 4096
"""Bytes of a member that are looked at to say what is wrong with it."""


def _fault(raw: bytes, at: int) -> str:
    """What is wrong with the member of a header that begins at `at` and does not match the grammar."""
    found = KEY.match(raw, at)
    if found is None:
        return f"has a header that is not JSON at byte {8 + at}"
    key = _text(found[1], at)
    if key == "__metadata__":
        return "has a __metadata__ that is not an object of strings"
    tensor = f"describes the tensor {quote(key)}"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw[found.end() : found.end() + WINDOW])
        value, _ = json.JSONDecoder(object_pairs_hook=tuple).raw_decode(text)  # objects as tuples, lists as lists
    except (ValueError, RecursionError):
        return f"{tensor} with text that is not JSON, or is nested or too long, from byte {8 + found.end()} on"
    if not isinstance(value, tuple):
        return f"{tensor} by {quote(value)}, not an object"
    names = [name for name, _ in value]
    for name in ("dtype", "shape", "data_offsets"):
        if names.count(name) != 1:
            return f"{tensor} with {names.count(name) or 'no'} {name}"
    if len(names) != 3:
        return f"{tensor} with a field that the format does not have, {quote((set(names) - FIELDS).pop())}"
    fields = dict(value)
    if not isinstance(fields["dtype"], str):
        return f"{tensor} with the dtype {quote(fields['dtype'])}, not a string"
    for name in ("shape", "data_offsets"):
        numbers = fields[name]
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            return f"{tensor} with the {name} {quote(numbers)}, not a list of integers"
        if any(number < 0 or number > MAX_COUNT for number in numbers):
            return f"{tensor} with the {name} {quote(numbers)}, not all from 0 to 2^63 - 1"
    if len(fields["data_offsets"]) != 2:
        return f"{tensor} with {len(fields['data_offsets'])} data_offsets, not 2"
    if len(fields["shape"]) > MAX_DIMENSIONS:
        return f"{tensor} with {len(fields['shape'])} dimensions, over the {MAX_DIMENSIONS} that there can be"
    return f"{tensor} in a way of writing that the format does not have, at byte {8 + found.end()}"


def merge_headers(headers: Mapping[Path, Header]) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of some files, with the file that holds it. Raises WeightsError where two hold the same name."""
    out: dict[str, tuple[Path, TensorInfo]] = {}
    for path, header in headers.items():
        for key, info in header.tensors.items():
            if key in out:
                raise WeightsError(
                    f"{quote(key)} is in two files, {out[key][0]} and {path}: name one of them, or one model's shards"
                )
            out[key] = path, info
    return out


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index of shards: tensor -> the file beside the index that holds it. Raises SourceError."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path} names no shards in its weight_map: it is no index of shards; name one, or a file")
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise SourceError(f"{path} places {quote(key)} in {quote(name)}, not a file's name: {SOURCE}")
        if not is_name(name):
            raise SourceError(f"{path} names the shard {quote(name)}, no file's name or outside its folder: {SOURCE}")
    return weight_map
