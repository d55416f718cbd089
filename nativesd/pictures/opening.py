"""Picture files of strangers: regular files of a few formats, whose pixels are counted before any is decoded."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from nativesd.errors import SourceError, UsageError
from nativesd.reading import open_regular

PIXELS = 50_000_000
"""Of a picture that is read, where NATIVESD_MAX_PIXELS says no other number: 8,000 x 6,000."""
USUAL = ("PNG", "JPEG", "GIF", "BMP", "PPM")
OTHERS = ("WEBP", "AVIF", "TIFF", "MPO", "JPEG2000", "TGA", "ICO", "DDS", "QOI")
"""The formats that are looked for next; none whose reader runs a program, as that of EPS does."""


@contextmanager
def opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """A picture file, or its bytes, opened and not yet decoded.

    Raises SourceError for what is none, or has too many pixels.
    """
    path = named(source)
    if not isinstance(source, bytes) and not os.path.lexists(source):
        raise SourceError(f"{path} does not exist")
    with _file(source) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours comes before
        try:
            with _identified(file) as image:
                _require_few(image.size, path)
                yield image
        except UnidentifiedImageError as error:
            raise SourceError(f"{path} is not a picture that can be read: its format is none of those known") from error
        except Image.DecompressionBombError as error:
            raise SourceError(f"{path} is not a picture that can be read: {error}") from error


def named(source: object) -> str:
    """What messages call a picture: its path, or what it is instead."""
    return f"a picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _file(source: str | Path | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return io.BufferedReader(open_regular(Path(source), "picture"))


def _identified(file: IO[bytes]) -> Image.Image:
    try:
        return Image.open(file, formats=USUAL)
    except UnidentifiedImageError:
        Image.init()
        file.seek(0)
        return Image.open(file, formats=[name for name in OTHERS if name in Image.OPEN])


def _require_few(size: tuple[int, int], path: str) -> None:
    stated = os.environ.get("NATIVESD_MAX_PIXELS", str(PIXELS))
    if not stated.isdecimal() or len(stated) > 12:
        raise UsageError(f"NATIVESD_MAX_PIXELS must be a whole number, not {stated!r}")
    if size[0] * size[1] > int(stated):
        raise SourceError(
            f"{path} has {size[0]}x{size[1]} pixels, over the {stated} that are read: make it smaller, or set"
            f" NATIVESD_MAX_PIXELS={size[0] * size[1]}"
        )
