"""Bytes of files into tensors: the one place that knows how the numbers of every container are laid out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from nativesd.errors import SourceError
from nativesd.reading import Stamp
from nativesd.weights.files.source import Member
from nativesd.weights.formats.blocks import dequantise
from nativesd.weights.formats.gguf import BLOCKS
from nativesd.weights.formats.header import TensorInfo
from nativesd.weights.formats.scaled import FLOAT8, SCALED

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""The format's names of torch's dtypes."""
DTYPES = {name: dtype for dtype, name in NAMES.items()} | dict.fromkeys((*BLOCKS, *SCALED), torch.float32)
"""What reading gives, by the dtype's name in a header."""

PIECE = 4 << 20  # bytes: many enough for the calls, few enough for the cache


@contextmanager
def open_tensors(member: Member, path: Path) -> Iterator[BufferedReader]:
    """A file of a checkpoint, which must be the one whose header was read, to the end. Raises SourceError."""
    try:
        with path.open("rb") as file:
            _require_same(member, path, os.fstat(file.fileno()))
            yield file
            _require_same(member, path, os.fstat(file.fileno()))
        _require_same(member, path, path.stat())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _require_same(member: Member, path: Path, stated: os.stat_result) -> None:
    if Stamp.of(stated) != member.stamps.get(path, Stamp.of(stated)):
        raise SourceError(f"{path} is not the file any more that was looked at: wait until it is written, then load it")


def read_tensor(member: Member, key: str) -> Tensor:
    """One tensor of a checkpoint, read into memory of its own: nothing of the file stays mapped. Raises SourceError."""
    with open_tensors(member, member.files[key]) as file:
        return read_into(torch.empty(member.tensors[key].nbytes, dtype=torch.uint8), member, key, file)


def read_into(memory: Tensor, member: Member, key: str, file: BufferedReader) -> Tensor:
    """A tensor in the first bytes of `memory` (n,) uint8. Raises SourceError."""
    info = member.tensors[key]
    kind, raw = _seek(member, key, file), memory[: info.nbytes]
    _read_bytes(raw, member, key, file)
    if info.dtype in BLOCKS:
        return dequantise(raw, info.dtype).reshape(info.shape)
    if info.scale:
        numbers = raw.view(DTYPES[FLOAT8[SCALED.index(info.dtype)]]).reshape(info.shape).float()
        return numbers.mul_(_read_scale(member, info.scale).reshape(-1, *[1] * (len(info.shape) - 1)))
    return _shaped(raw.view(kind), info)


def _read_scale(member: Member, key: str) -> Tensor:
    """What a tensor is multiplied with, in float32."""
    return read_tensor(replace(member, tensors=member.scales), key).float()


def read_as(dtype: torch.dtype, memory: Tensor, member: Member, key: str, file: BufferedReader) -> Tensor:
    """A tensor in another dtype, by pieces in the first bytes of `memory` (n,) uint8, cast while they are cached.

    Raises SourceError.
    """
    info = member.tensors[key]
    if not flows(info):
        return read_into(memory, member, key, file).to(dtype)
    kind, out = _seek(member, key, file), torch.empty(info.shape, dtype=dtype)
    count = PIECE // kind.itemsize
    for piece, raw in zip(torch.split(out.view(-1), count), _pieces(memory, member, key, file, count), strict=True):
        piece.copy_(raw)
    return out


def flow_tensor(member: Member, key: str, count: int, part: int = 0, parts: int = 1) -> Iterator[Tensor]:
    """A tensor's numbers, or those of one of its equal `parts` along the first axis, (n,) in pieces of `count`.

    They are read into one memory: a piece is good until the next is asked for. Not for what `flows` refuses.
    Raises SourceError.
    """
    with open_tensors(member, member.files[key]) as file:
        kind = _seek(member, key, file)
        size = min(count, member.tensors[key].elements) * kind.itemsize
        yield from _pieces(torch.empty(size, dtype=torch.uint8), member, key, file, count, part, parts)


def flows(info: TensorInfo) -> bool:
    """Whether a tensor's numbers lie in the file one after the other, each by itself."""
    return info.strides is None and info.dtype not in BLOCKS and not info.scale


def _pieces(
    memory: Tensor, member: Member, key: str, file: BufferedReader, count: int, part: int = 0, parts: int = 1
) -> Iterator[Tensor]:
    """`flow_tensor` in the first bytes of a memory (n,) uint8, of a file that is open."""
    kind = _seek(member, key, file)
    own = member.tensors[key].elements // parts
    file.seek(part * own * kind.itemsize, os.SEEK_CUR)
    for start in range(0, max(own, 1), count):  # of no numbers, one piece of none
        raw = memory[: min(count, own - start) * kind.itemsize]
        _read_bytes(raw, member, key, file)
        yield raw.view(kind)


def map_file(path: Path) -> torch.UntypedStorage:
    """A file's bytes, mapped: writing to them changes memory alone. Raises SourceError."""
    try:
        size = path.stat().st_size
        return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size))
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist") from error
    except (RuntimeError, OSError) as error:
        raise SourceError(f"{path} cannot be mapped into memory: {error}") from error


def map_tensor(storage: torch.UntypedStorage, member: Member, key: str, dtype: torch.dtype) -> Tensor | None:
    """A tensor in the pages of its mapped file; None where it does not lie there as a `dtype` tensor should."""
    info = member.tensors[key]
    start = member.data_starts[member.files[key]] + info.start
    if info.strides is not None or info.dtype != NAMES[dtype] or start % dtype.itemsize:
        return None
    if start + info.nbytes > storage.nbytes():
        raise SourceError(f"{member.files[key]} ends inside {key}: it changed while it was read")
    raw = torch.empty(0, dtype=torch.uint8)
    raw.set_(storage, start, (info.nbytes,))  # type: ignore[call-overload]
    return raw.view(dtype).reshape(info.shape)


def _shaped(flat: Tensor, info: TensorInfo) -> Tensor:
    """The numbers that were read (n,) in the tensor's shape: in the same memory, or a copy where they lie apart."""
    return flat.reshape(info.shape) if info.strides is None else flat.as_strided(info.shape, info.strides).contiguous()


def _seek(member: Member, key: str, file: BufferedReader) -> torch.dtype:
    """Go to where a tensor is; returns its dtype."""
    info, path = member.tensors[key], member.files[key]
    if info.dtype not in DTYPES:
        raise SourceError(f"{path}: {key} has the dtype {info.dtype}, which torch cannot hold")
    file.seek(member.data_starts[path] + info.start)
    return DTYPES[info.dtype]


def _read_bytes(raw: Tensor, member: Member, key: str, file: BufferedReader) -> None:
    if file.readinto(raw.numpy().data) != raw.nbytes:
        raise SourceError(f"{member.files[key]} ends inside {key}: it changed while it was read")
