"""Files that others made, opened so that nothing hangs: regular files only, whatever the name leads to."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from nativesd.errors import SourceError


def open_regular(path: Path, what: str = "file") -> BinaryIO:
    """Open a file to read it, unbuffered; `what` says in messages what it should be. Raises SourceError.

    A pipe, a device or a folder is refused, and not opened; links are followed.
    """
    try:
        _require_regular(os.stat(path).st_mode, path, what)
        # it may have become a pipe in between, which would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            _require_regular(os.fstat(descriptor).st_mode, path, what)
            return os.fdopen(descriptor, "rb", buffering=0)
        except BaseException:
            os.close(descriptor)
            raise
    except FileNotFoundError as error:
        hint = "it is a link to nothing; download it again" if path.is_symlink() else "check the name and the folder"
        raise SourceError(f"{path} is missing: {hint}") from error
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise SourceError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _require_regular(mode: int, path: Path, what: str) -> None:
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
        raise SourceError(f"{path} is {found}, not a {what}: name the file itself")
