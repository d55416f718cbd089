"""The header of a file of weights of any kind: which kind it is, its first bytes say, not its name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from nativesd.errors import SourceError
from nativesd.reading import Stamp
from nativesd.weights.formats.archive import read_archive, read_pickles
from nativesd.weights.formats.gguf import MAGIC, read_gguf
from nativesd.weights.formats.header import MAX_HEADER, Header, opened, read_safetensors

SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf")
"""Of files that hold weights; where a folder has several kinds, the first counts."""
FIRST = 512
"""Bytes: a tar file is known by those from 257 on."""


def read_file(path: Path) -> Header:
    """The tensors of a file: safetensors, GGUF, what torch.save writes, or TorchScript. None is executed.

    Raises SourceError for what cannot be read.
    """
    with opened(path) as (file, size):
        stamp = Stamp.of(os.fstat(file.fileno()))
        header = _read(file, size, str(path))
        if Stamp.of(os.fstat(file.fileno())) != stamp:
            raise SourceError(f"{path} changed while it was read: wait until it is written, then try again")
        return replace(header, stamp=stamp)


def _read(file: BinaryIO, size: int, name: str) -> Header:
    head = file.read(FIRST)
    file.seek(0)
    safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER
    if not safetensors and head.startswith(b"PK\x03\x04"):
        return read_archive(file, size, name)
    if not safetensors and head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return read_pickles(file, size, name)
    if not safetensors and head.startswith(MAGIC):
        return read_gguf(file, size, name)
    if head[257:262] == b"ustar":
        raise SourceError(
            f"{name} is a tar file: unpack it; if torch.save of PyTorch 0.1 wrote it, save it anew with a newer one"
        )
    return read_safetensors(file, size, name)
