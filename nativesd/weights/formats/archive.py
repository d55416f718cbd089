"""Files that torch.save writes, and TorchScript's, read as data: where every tensor lies in them.

Since PyTorch 1.6 they are zip archives: `data.pkl` describes an object, `data/KEY` are its storages, stored as they are
(caffe2/serialize/inline_container.h). Before, they were pickles one after another (a magic number, a protocol, the
machine, the object, the keys of its storages), then the storages, each with its length (torch/serialization.py,
`_legacy_load`). Checksums of the storages are not read: torch.save can leave them out.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from nativesd.errors import SourceError, quote
from nativesd.weights.formats.header import AGAIN, BITS, SOURCE, FormatError, Header, TensorInfo
from nativesd.weights.formats.pickles import MAX_BYTES, Pairs, Storage, Stored, Value, walk
from nativesd.weights.formats.state import State, state_of

MAX_DIRECTORY = 4_000_000
"""Bytes of a zip archive's directory; that of SDXL with its training state has 1 MB."""
LOCAL = struct.Struct("<4s5H3I2H")
"""What stands before an entry's name (APPNOTE.TXT 6.3.10, 4.3.7)."""
ENCRYPTED, SIZES_FOLLOW = 0x1, 0x8  # bits of an entry's flags

MAGIC = 0x1950A86A20F9469CFC6C
"""torch/serialization.py, MAGIC_NUMBER"""
PROTOCOL = 1001

Place = Callable[[Storage], int]
"""Where in the file a storage begins. Raises FormatError where it is not as the pickle says."""


def read_archive(file: BinaryIO, size: int, name: str) -> Header:
    """The tensors of a zip archive that torch.save wrote, or TorchScript; `file` is open at its beginning.

    `size` is the file's in bytes, and `name` what messages call it. Raises SourceError.
    """
    try:
        archive = _Archive(file, size)
        described = walk(BytesIO(archive.pickle()))
        state = state_of(described.value, described.called)
        if archive.constants and not state.tensors:
            raise FormatError("is a frozen TorchScript module, in which tensors have no names: export it unfrozen")
        if archive.constants:
            state.left_out["constants.pkl"] = "constants of TorchScript code, which have no names"
        return _header(state, archive.place, size)
    except FormatError as error:
        raise SourceError(f"{name} {error}") from error


def read_pickles(file: BinaryIO, size: int, name: str) -> Header:
    """The tensors of a file that torch.save wrote as pickles and storages, as `read_archive`. Raises SourceError."""
    stream = BytesIO(file.read(MAX_BYTES))
    try:
        if walk(stream).value != MAGIC:
            raise FormatError("is a pickle, but none that torch.save wrote: there is no way to tell its tensors")
        if walk(stream).value != PROTOCOL:
            raise FormatError(f"has a protocol of torch.save other than {PROTOCOL}: save it anew with a newer PyTorch")
        machine = walk(stream).value
        if isinstance(machine, Pairs) and any(key == "little_endian" and not value for key, value in machine.items):
            raise FormatError("was written on a big-endian machine: save it anew on another")
        described = walk(stream)
        keys = walk(stream).value
        starts = _storages(file, size, stream.tell(), keys, described.storages)

        def place(storage: Storage) -> int:
            if storage.key not in starts:
                raise FormatError(f"lacks the storage {quote(storage.key)}: {AGAIN}")
            return starts[storage.key]

        return _header(state_of(described.value, described.called), place, size)
    except FormatError as error:
        raise SourceError(f"{name} {error}") from error


def _header(state: State, place: Place, size: int) -> Header:
    """The entries of the state's tensors, each checked to lie in its storage."""
    starts: dict[Storage, int] = {}
    tensors: dict[str, TensorInfo] = {}
    for key, stored in state.tensors.items():
        if stored.storage not in starts:
            starts[stored.storage] = place(stored.storage)
        tensors[key] = _info(key, stored, starts[stored.storage], size)
    if not tensors:
        why = "; ".join(f"{key}: {reason}" for key, reason in list(state.left_out.items())[:3])
        raise FormatError(f"holds no tensors{f' ({why})' if why else ''}")
    end = 0
    for start, length in sorted({(start, storage.count * _width(storage)) for storage, start in starts.items()}):
        if start < end:
            raise FormatError(f"gives the bytes from {start} on to two storages: {SOURCE}")
        end = start + length
    return Header(tensors, state.metadata, 0, size, state.left_out)


def _info(key: str, stored: Stored, start: int, size: int) -> TensorInfo:
    """A tensor's entry; its storage begins at byte `start` of the file. Raises FormatError where it leaves that."""
    width = BITS[stored.dtype] // 8
    whole = stored.storage.count * _width(stored.storage)
    shape, strides = stored.shape, stored.strides
    count = math.prod(shape)
    begin = stored.offset * width
    span = width * (1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))) if count else 0
    if begin + span > whole:
        raise FormatError(f"places {quote(key)} outside its storage of {whole} bytes: {SOURCE}")
    if count * width > size:  # strides of 0 could make anything of one number
        raise FormatError(f"makes {count * width} bytes of {quote(key)}, more than there are in the file: {SOURCE}")
    apart, dense = 1, True
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        dense = dense and (n == 1 or step == apart)
        apart *= n
    return TensorInfo(stored.dtype, shape, start + begin, start + begin + span, None if dense or not count else strides)


def _width(storage: Storage) -> int:
    """Bytes of one element."""
    return BITS[storage.dtype] // 8 if storage.dtype else 1


class _Bounded:
    """A file of which no more than MAX_DIRECTORY bytes are read at once, so that a directory cannot fill memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.seekable, self._file = file.seek, file.tell, file.seekable, file

    def read(self, count: int = -1) -> bytes:
        """As a file's."""
        raw = self._file.read(min(count, MAX_DIRECTORY + 1) if count >= 0 else MAX_DIRECTORY + 1)
        if len(raw) > MAX_DIRECTORY:
            raise BadZipFile(f"a directory of over {MAX_DIRECTORY} bytes")
        return raw


class _Archive:
    """The entries of a zip archive, as far as they are those of torch. Raises FormatError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        try:
            infos = ZipFile(_Bounded(file)).infolist()
        except (BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
            raise FormatError(f"is no readable zip archive ({error}): {AGAIN}") from error
        self.entries = {info.filename: info for info in infos}
        if len(self.entries) != len(infos):
            raise FormatError(f"is a zip archive with two entries of the same name: {SOURCE}")
        for info in infos:
            if not 0 <= info.header_offset <= size:
                raise FormatError(f"is a zip archive with a directory that points beside the file: {SOURCE}")
            parts = info.filename.split("/")
            if info.filename != info.orig_filename or ".." in parts or "\\" in info.filename or not parts[0]:
                raise FormatError(f"is a zip archive with an entry called {quote(info.orig_filename)}: {SOURCE}")
        self.prefix = self._find()
        self.constants = f"{self.prefix}constants.pkl" in self.entries and any(
            entry.startswith(f"{self.prefix}constants/") for entry in self.entries
        )
        order = self.entries.get(f"{self.prefix}byteorder")
        if order is not None and self._read(order, 16) != b"little":
            raise FormatError("was written on a big-endian machine: save it anew on another")

    def _find(self) -> str:
        """What stands before `data.pkl`: the name of a folder."""
        found = [entry[: -len("data.pkl")] for entry in self.entries if entry.split("/")[1:] == ["data.pkl"]]
        if len(found) == 1:
            return found[0]
        if any(entry.endswith("/model.json") for entry in self.entries):
            raise FormatError("is TorchScript of PyTorch before 1.4, or a program of torch.export: export it anew")
        raise FormatError("is a zip archive, but none that torch.save wrote: unpack it, if the weights are inside")

    def pickle(self) -> bytes:
        """The bytes of data.pkl."""
        return self._read(self.entries[f"{self.prefix}data.pkl"], MAX_BYTES)

    def _read(self, info: ZipInfo, most: int) -> bytes:
        if info.file_size > most:
            raise FormatError(
                f"has {info.file_size} bytes in {info.filename}, over the {most} that can be needed: {SOURCE}"
            )
        self.file.seek(self._start(info))
        raw = self.file.read(info.file_size)
        if info.CRC and zlib.crc32(raw) != info.CRC:  # 0 where torch.save was told to write none
            raise FormatError(f"is damaged: the checksum of {info.filename} is wrong; {AGAIN}")
        return raw

    def place(self, storage: Storage) -> int:
        """See `Place`."""
        info = self.entries.get(f"{self.prefix}data/{storage.key}")
        needed = storage.count * _width(storage)
        if info is None or info.file_size != needed:
            there = "is missing" if info is None else f"has {info.file_size} bytes, not {needed}"
            raise FormatError(f"describes tensors in data/{quote(storage.key)[1:-1]}, which {there}: {AGAIN}")
        return self._start(info)

    def _start(self, info: ZipInfo) -> int:
        """Where an entry's bytes begin. Raises FormatError where it is packed, or its own header disagrees."""
        entry = info.filename
        if info.compress_type != ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & ENCRYPTED:
            raise FormatError(f"is a zip archive with packed entries ({quote(entry)}): save it anew with torch.save")
        self.file.seek(info.header_offset)
        raw = self.file.read(LOCAL.size)
        if len(raw) < LOCAL.size:
            raise FormatError(f"ends before {quote(entry)}: {AGAIN}")
        mark, _, flags, packing, _, _, _, packed, size, name_length, extra_length = LOCAL.unpack(raw)
        own = self.file.read(name_length)
        known = packed == size and size in (info.file_size, 0xFFFFFFFF)
        if flags & SIZES_FOLLOW:
            known = known or packed == size == 0
        encoded = entry.encode() if info.flag_bits & 0x800 else entry.encode("cp437")
        if mark != b"PK\x03\x04" or packing != ZIP_STORED or flags & ENCRYPTED or own != encoded or not known:
            raise FormatError(f"is a zip archive whose directory and entries disagree, at {quote(entry)}: {SOURCE}")
        start: int = info.header_offset + LOCAL.size + name_length + extra_length
        if start + info.file_size > self.size:
            raise FormatError(f"is cut short inside {quote(entry)}: {AGAIN}")
        return start


def _storages(file: BinaryIO, size: int, start: int, keys: Value, known: Mapping[str, Storage]) -> dict[str, int]:
    """Where each storage after the pickles begins: they lie in the order of `keys`, from byte `start` of the file on,
    each after its length in elements. Raises FormatError."""
    if not isinstance(keys, list):
        raise FormatError(f"lists its storages by what is no list: {SOURCE}")
    starts: dict[str, int] = {}
    for key in keys:
        if not isinstance(key, str) or key not in known or key in starts:
            raise FormatError(f"lists the storage {quote(key)}, which its tensors do not have, or twice: {SOURCE}")
        file.seek(start)
        count = int.from_bytes(file.read(8), "little")
        starts[key], start = start + 8, start + 8 + known[key].count * _width(known[key])
        if start > size:
            raise FormatError(f"is cut short inside the storage {quote(key)}: {AGAIN}")
        if count != known[key].count:
            raise FormatError(f"has {count} numbers in the storage {quote(key)}, not {known[key].count}: {SOURCE}")
    return starts
