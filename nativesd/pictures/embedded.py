"""Where texts stand in picture files: PNG's chunks, EXIF, and the .txt file beside the picture."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from nativesd.errors import SourceError
from nativesd.pictures.opening import opened
from nativesd.reading import read_bounded

MOST_TEXT = 1 << 24
"""Bytes of a .txt file that are read: more is no picture's parameters."""


@dataclass(frozen=True)
class Texts:
    """What a picture says of itself: `chunks` by their names, EXIF's UserComment, and the file's own .txt ("")."""

    where: str
    """The file, for messages."""
    size: tuple[int, int] | None = None
    """Width and height of the picture; None: it is a text file."""
    chunks: Mapping[str, str] = field(default_factory=dict)
    comment: str = ""
    beside: str = ""

    @property
    def parameters(self) -> str:
        """The text that A1111 and those after it keep: PNG's "parameters" chunk, else the comment, else the file."""
        return self.chunks.get("parameters", "") or self.comment or self.beside


_USER_COMMENT, _UNDEFINED, _LONG = 0x9286, 7, 4  # EXIF 2.3: the tag, and TIFF's field types
_UNICODE, _ASCII, _UNKNOWN = b"UNICODE\0", b"ASCII\0\0\0", bytes(8)
_UNREADABLE = (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error, zlib.error)
"""What Pillow raises for a broken picture."""


def user_comment_exif(text: str) -> bytes:
    """EXIF whose only field is a UserComment, in UTF-16, big-endian like the whole: piexif's form, which A1111 writes.

    The layout is TIFF 6.0's: a directory that points to the EXIF directory, which points to the text.
    """
    comment = _UNICODE + text.encode("utf-16-be")
    exif_at = 8 + 18  # after the header and a directory of one entry
    header = struct.pack(">2sHI", b"MM", 42, 8)
    directory = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, _LONG, 1, exif_at, 0)
    exif = struct.pack(">HHHIII", 1, _USER_COMMENT, _UNDEFINED, len(comment), exif_at + 18, 0)
    return b"Exif\0\0" + header + directory + exif + comment


def read_texts(path: str | Path) -> Texts:
    """The texts of a picture, or of a .txt file. Raises SourceError for a file that is neither."""
    path = Path(path)
    if path.suffix.lower() == ".txt":
        return Texts(str(path), beside=_read_text_file(path))
    try:
        with opened(path) as image:
            found = texts_of(image, str(path))
    except _UNREADABLE as error:
        raise SourceError(f"{path} cannot be read as a picture: {error}") from error
    beside = path.with_suffix(".txt")
    if not found.chunks and not found.comment and beside.is_file():
        return Texts(str(path), found.size, beside=_read_text_file(beside))
    return found


def texts_of(image: Image.Image, where: str) -> Texts:
    """The texts of an open picture, which messages call `where`. Raises SourceError, and what Pillow raises."""
    chunks, exif = _png_texts(image), image.getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(_USER_COMMENT)
    for value in exif.values():  # ComfyUI's graphs in WebP (comfy_extras/nodes_images.py)
        name, _, graph = value.partition(":") if isinstance(value, str) else ("", "", "")
        if name in ("prompt", "workflow"):
            chunks.setdefault(name, graph)
    if (length := sum(map(len, chunks.values()))) > MOST_TEXT:
        raise SourceError(f"{where} carries texts of {length} characters, over the {MOST_TEXT} that are read")
    text = ""
    if isinstance(comment, str | bytes):
        text = comment if isinstance(comment, str) else _decode_user_comment(comment, where)
    return Texts(where, image.size, chunks, text)


def _read_text_file(path: Path) -> str:
    try:
        if not os.path.lexists(path):
            raise SourceError(f"{path} does not exist")
        return read_bounded(path, MOST_TEXT, "text").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} cannot be read as a text: {error}") from error


def _png_texts(image: Image.Image) -> dict[str, str]:
    """The text chunks of a PNG; those after the pixels only where none is before them."""
    if not isinstance(image, PngImageFile):
        return {}
    texts = image.info if "parameters" in image.info else image.text
    return {str(name): str(text) for name, text in texts.items() if isinstance(text, str)}


def _decode_user_comment(comment: bytes, path: str) -> str:
    """A UserComment's text. UTF-16 may be in either order, as the writers do not agree: its blanks and digits tell."""
    code, payload = comment[:8], comment[8:]
    if code not in (_UNICODE, _ASCII, _UNKNOWN):
        payload = comment
    zeros_first, zeros_last = payload[::2].count(0), payload[1::2].count(0)
    if payload.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif code == _UNICODE and zeros_first + zeros_last:
        encoding = "utf-16-be" if zeros_first >= zeros_last else "utf-16-le"
    else:
        encoding = "utf-8"
    try:
        return payload.decode(encoding).strip("\0")
    except UnicodeDecodeError:
        raise SourceError(f"{path}: its EXIF UserComment is not text in {encoding}") from None
