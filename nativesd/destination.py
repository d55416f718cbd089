"""Where files and folders come into being: beside their place, under a name of their own, and then whole or not at all.

Everything that writes goes through `fresh`. While it lasts it holds a lock on the place, `.nativesd-ID.lock`, and
writes to `.nativesd-ID-RANDOM.partial`, both in the same folder; ID is a hash of the place's name. The system releases
the lock of a process that dies, so a `.partial` whose lock is free was left behind, and the next writer in that folder
removes both. This holds for killed processes; what a power cut keeps is the file system's matter.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nativesd.errors import NativesdError, SourceError, UsageError
from nativesd.reading import MAX_JSON, read_bounded

LEFTOVER = re.compile(r"\.nativesd-([0-9a-f]{16})(?:-[0-9a-f]{16}\.partial|\.lock)")
POLL = 0.05
"""Seconds between two looks at a lock that another process holds."""
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}
"""What file systems without hard links answer."""


@contextmanager
def fresh(dest: str | Path, *, replace: bool = False, parents: bool = True, wait: float = 0) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `dest` when the block ends, and is gone if it raises.

    Nothing is there yet, and nobody else knows the name. What is at `dest` (a link too) is never written through: it
    stays until its successor is whole, and without `replace` for good.

    replace  whether `dest` may exist
    parents  whether the folders above are made where they are missing; with a failure they go again
    wait     seconds to wait for another process that writes `dest`

    Raises UsageError where `dest` exists or is being written, and SourceError, with path and reason, where it cannot be
    written; an OSError of the block becomes one too.
    """
    place = _place(Path(dest))
    temporary = place.with_name(f".nativesd-{_identity(place)}-{secrets.token_hex(8)}.partial")
    made: list[Path] = []
    try:
        _require_free(place, dest, replace)
        if parents:
            made = _make_parents(place.parent)
        place.parent.stat()  # which the lock would make
        with hold(place, max(wait, 2 * POLL)):
            _require_free(place, dest, replace)
            for path in _partials(place.parent).get(_identity(place), []):
                remove(path)
            try:
                yield temporary
                _settle(temporary, place, replace=replace)
                made = []
            finally:
                remove(temporary)
        for path in leftovers(place.parent):
            remove(path)
    except OSError as error:
        shown = str(dest) if len(str(dest)) <= 500 else f"{str(dest)[:500]}..."
        raise SourceError(f"{shown} cannot be written: {_reason(error, place, temporary)}") from error
    finally:
        for folder in made:
            with suppress(OSError):  # somebody else has written there
                folder.rmdir()


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """A folder beside a place for what it is made of, which goes when the block ends; as with `fresh`, nothing stays.

    Another process that wants it waits. Raises SourceError where it cannot be written.
    """
    place = _place(place)
    folder = place.with_name(f".nativesd-{_identity(place)}-{secrets.token_hex(8)}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with hold(place, math.inf):
            for path in _partials(place.parent).get(_identity(place), []):
                remove(path)
            folder.mkdir()
            try:
                yield folder
            finally:
                remove(folder)
    except OSError as error:
        raise SourceError(f"{place.parent} cannot be written: {error.strerror or error}") from error


@contextmanager
def hold(place: Path, wait: float = 0) -> Iterator[None]:
    """Keep every other process, and thread, from writing a place. Raises UsageError where one does after `wait` s."""
    with _lock(place.parent, _identity(place), wait, f"another process is writing {place}: wait for it to finish"):
        yield


def leftovers(folder: Path) -> Iterator[Path]:
    """What writers that died have left in a folder; each is locked until the next one is asked for.

    Locks that they have left go at once.
    """
    with suppress(OSError):
        for identity, paths in _partials(folder).items():
            with suppress(NativesdError), _lock(folder, identity, 0, "not left over"):
                yield from (path for path in paths if os.path.lexists(path))


def remove(path: Path) -> None:
    """A file, a link (not what it leads to), or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def inside(folder: Path, name: str) -> Path:
    """The path in `folder` of what a file calls `name`. Raises SourceError where that is not in it."""
    path, parts = folder / name, Path(name).parts
    if not parts or ".." in parts or not _real(path).is_relative_to(_real(folder)):
        raise SourceError(f"{name!r} is no name of a file in {folder}: nothing is written")
    return path


def copy_file(source: Path, name: str, dest: Path) -> bool:
    """Copy the file `name` of the folder `source`, no weights, into the folder `dest`; False where there is none.

    It must be a regular file in that folder, or, as in the hub's cache, a link to the store beside it. Raises
    SourceError.
    """
    path, root = source / name, _real(source)
    if not os.path.lexists(path):
        return False
    store = [root.parents[1] / "blobs"] if root.parent.name == "snapshots" else []
    real = _real(path)
    if not any(real.is_relative_to(allowed) for allowed in (root, *store)):
        raise SourceError(f"{path} leads out of {source}, to {real}, and is not copied: put the file itself there")
    out = inside(dest, name)
    data = read_bounded(real, MAX_JSON, "file beside the weights")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("xb") as copy:
        copy.write(data)
    return True


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _place(dest: Path) -> Path:
    """`dest` in its real folder; what is there itself is not followed. Raises UsageError for what names no file."""
    try:
        os.fsencode(dest)
        if "\0" in str(dest):
            raise ValueError
    except ValueError:
        raise UsageError(f"{str(dest)!r} cannot be a file's name") from None
    if dest.name in ("", ".."):
        raise UsageError(f"{dest} exists: remove it, or name another")
    return _real(dest.parent) / dest.name


def _identity(place: Path) -> str:
    return hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]


def _require_free(place: Path, dest: str | Path, replace: bool) -> None:
    """Raises UsageError where something is at `dest` that must stay, OSError where nothing can be."""
    with suppress(FileNotFoundError):
        place.lstat()
        if not replace:
            raise UsageError(f"{dest} exists: remove it, or name another")


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder with those above it; returns the new ones, the lowest first."""
    missing = []
    for each in (folder, *folder.parents):
        if each.exists():
            break
        missing.append(each)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _lock(folder: Path, identity: str, wait: float, held: str) -> Iterator[None]:
    """The lock on a place. Raises UsageError, which says `held`, where another one has it for longer than `wait`."""
    from filelock import FileLock, Timeout  # 40 ms, which a command that writes nothing need not wait

    path = folder / f".nativesd-{identity}.lock"
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=wait, poll_interval=POLL)
        except Timeout:  # which some reasons end in that have nothing to do with another process
            os.close(os.open(path, os.O_RDWR | os.O_CREAT))
            raise UsageError(held) from None
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps what is open; whoever waits here sees that this file is gone
            path.unlink()
        lock.release()


def _partials(folder: Path) -> dict[str, list[Path]]:
    """identity -> the temporary files and folders of its writers, alive or dead; of one may be nothing but its lock."""
    found: dict[str, list[Path]] = {}
    with suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            if match := LEFTOVER.fullmatch(entry.name):
                paths = found.setdefault(match[1], [])
                if not entry.name.endswith(".lock"):
                    paths.append(folder / entry.name)
    return found


def _settle(temporary: Path, place: Path, *, replace: bool) -> None:
    """Give what is written its name, which must be free but for `replace`."""
    if not temporary.is_dir():
        if replace:
            temporary.replace(place)
        else:
            _link(temporary, place)
        return
    if not replace:
        temporary.rename(place)  # refused by the system where anything is there but an empty folder
        return
    old = place.with_name(f".nativesd-{_identity(place)}-{secrets.token_hex(8)}.partial")
    with suppress(FileNotFoundError):
        place.rename(old)
    try:
        temporary.rename(place)
    except BaseException:
        with suppress(FileNotFoundError):
            old.rename(place)
        raise
    remove(old)


def _link(temporary: Path, place: Path) -> None:
    """Rename a file to a name that is free: a rename would replace what appeared there meanwhile, a link does not."""
    try:
        os.link(temporary, place)
    except OSError as error:
        if error.errno not in NO_LINKS or os.path.lexists(place):
            raise
        temporary.rename(place)


def _reason(error: OSError, place: Path, temporary: Path) -> str:
    """Why, and of which file where it is neither the destination nor a part of it."""
    why = error.strerror or str(error)
    named = error.filename if isinstance(error.filename, str | os.PathLike) else None
    if named is None or Path(named) == place or Path(named).is_relative_to(temporary) or ".nativesd-" in str(named):
        return why
    return f"{named}: {why}"
