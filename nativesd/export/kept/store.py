"""A folder of built engines and exported graphs, each in a folder of its own whose name says everything about it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nativesd.destination import fresh, hold, leftovers, remove
from nativesd.errors import SourceError, UsageError
from nativesd.export.kept.entries import (
    MANIFEST,
    MANIFEST_SCHEMA,
    Entry,
    Key,
    files_in,
    is_entry_name,
    read_entry,
    this_platform,
    verify,
    why_not,
)
from nativesd.reading import list_folder
from nativesd.version import __version__


@dataclass
class Building:
    """An entry that is being made: files go into `folder`, and `details` into its manifest."""

    folder: Path
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    """A folder that `Store.prune` removes, and why."""

    path: Path
    reason: str
    size: int


class Store:
    """A folder of entries. It comes into being with its first entry."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, key: Key) -> Path:
        """Where an entry is, or would be."""
        return self.root / key.name

    def find(self, key: Key) -> Entry | None:
        """The entry of a key, whatever its state; None where there is none."""
        path = self.path(key)
        return read_entry(path) if path.is_dir() else None

    def entries(self) -> list[Entry]:
        """All, by name. Raises SourceError for a folder that cannot be read."""
        if not self.root.exists():
            return []
        return [read_entry(p) for p in list_folder(self.root) if p.is_dir() and not p.name.startswith(".")]

    def match(self, wanted: Key) -> tuple[Entry | None, list[str]]:
        """The newest entry that serves, and of the others of that component and backend the reasons why they do not."""
        serving, reasons = [], []
        for entry in self.entries():
            reason = why_not(entry, wanted)
            if reason is None:
                serving.append(entry)
            elif entry.key is None or (entry.key.component, entry.key.backend) == (wanted.component, wanted.backend):
                reasons.append(f"{entry.path.name}: {reason}")
        return max(serving, key=lambda entry: entry.created, default=None), reasons

    def obtain(self, key: Key, make: Callable[[Building], None], *, again: bool = False) -> tuple[Entry, bool]:
        """The entry of a key, and whether it was made now, by `make`: where it is not there, is damaged, or `again`.

        Where another process is making it, that is waited for, after a warning. Raises what `make` does, SourceError.
        """
        found = self.find(key)
        if found is not None and not again and verify(found, deep=False) is None:
            return found, False
        replaced = again or found is not None
        for wait in (0.0, math.inf):
            begun = False
            try:
                with self.building(key, again=replaced, wait=wait) as building:
                    begun = True
                    make(building)
                break
            except UsageError:
                if begun:
                    raise
                made = self.find(key)  # by another process meanwhile, if it is there
                if made is not None and not replaced:
                    return made, False
                if wait:
                    raise
                warnings.warn(f"another process is making {self.path(key)}: waiting for it", stacklevel=2)
        entry = self.find(key)
        assert entry is not None  # just written
        return entry, True

    @contextmanager
    def building(self, key: Key, *, again: bool = False, wait: float = 0) -> Iterator[Building]:
        """Make an entry: it appears, complete and with its manifest, when the block ends, and not at all if it raises.

        again  in place of the one that is there, which stays until then
        wait   seconds for another process that is making it

        Raises UsageError where the entry exists or another process is making it, SourceError where the folder cannot
        be written.
        """
        final = self.path(key)
        if final.exists() and not again:
            raise UsageError(f"{final} is there already: ask for it to be built again, or remove it")
        with fresh(final, replace=again, wait=wait) as folder:
            folder.mkdir()
            building = Building(folder)
            yield building
            _write_manifest(key, building)

    def prune(self, unwanted: Callable[[Entry], str | None] | None = None, *, dry_run: bool = False) -> list[Pruned]:
        """Remove entries that are damaged, leftovers of killed builders, and what `unwanted` gives a reason against.

        What another process is building is left alone, and so is every folder whose name is not an entry's. Returns
        what was removed, or with `dry_run` what would be.
        """
        removed = []
        for entry in self.entries():
            if not is_entry_name(entry.path.name) or _why_prune(entry.path, unwanted) is None:
                continue
            with suppress(UsageError), hold(entry.path):  # one that is being built anew is left alone
                if reason := _why_prune(entry.path, unwanted):
                    removed.append(_discard(entry.path, reason, dry_run))
        removed += [_discard(path, "left behind by an unfinished build", dry_run) for path in leftovers(self.root)]
        return removed


def unfinished(key: Key, building: Building) -> Entry:
    """What is being made, as the entry that it will be."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(building.folder, key, files_in(building.folder), building.details, created, this_platform())


def _write_manifest(key: Key, building: Building) -> None:
    """Beside the files, which it lists."""
    entry = unfinished(key, building)
    if not entry.files:
        raise SourceError(f"nothing was written for {key.name}")
    files = {name: {"bytes": file.size, "sha256": file.sha256} for name, file in entry.files.items()}
    manifest = {
        "schema": MANIFEST_SCHEMA, "key": asdict(key), "files": files, "nativesd": __version__,
        "created": entry.created, "platform": entry.platform, "details": building.details,
    }  # fmt: skip
    (building.folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _why_prune(path: Path, unwanted: Callable[[Entry], str | None] | None) -> str | None:
    entry = read_entry(path)
    return verify(entry, deep=False) or (unwanted(entry) if unwanted else None)


def _discard(path: Path, reason: str, dry_run: bool) -> Pruned:
    try:
        gone = Pruned(path, reason, _size(path))
        if not dry_run:
            remove(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be removed: {error.strerror or error}") from error
    return gone


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
