"""Files that only save time: they may be missing, stale or removed at any moment."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from nativesd.destination import fresh
from nativesd.errors import NativesdError, SourceError


def cache_folder() -> Path:
    """nativesd's folder in the user's cache (XDG Base Directory Specification, which ignores relative paths).

    Raises SourceError where the user has no home folder.
    """
    stated = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    if not stated.is_absolute():
        try:
            stated = Path.home() / ".cache"
        except RuntimeError:
            stated = Path(".")
    if not stated.is_absolute():
        raise SourceError("there is no home folder to keep files in: set HOME, or XDG_CACHE_HOME to a folder")
    return stated / "nativesd"


def keep(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; where that is not possible, its work is done again next time."""
    with suppress(NativesdError), fresh(path, replace=True) as temporary:
        temporary.write_bytes(data)
