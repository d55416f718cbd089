"""One engine or graph in a folder of its own: what its name says, its manifest, and whether its files are whole."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nativesd.errors import SourceError, UsageError, quote
from nativesd.reading import is_name, open_regular, read_json
from nativesd.schema import REQUIRED, Field, Kind, mapping, read_fields, text, whole


@dataclass
class Building:
    """An entry that is being made: files go into `folder`, and `details` into its manifest."""

    folder: Path
    details: dict[str, Any] = field(default_factory=dict)


MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 2
RUNTIME_CACHE = "runtime.cache"
"""A file that a runtime may add to an entry and change at any time, so no manifest lists it."""
SEPARATOR = "__"  # between the parts of a name
EARLIER_PARTS = 10  # that names had with schema 1, whose entries serve no more
LONGEST_NAME = 255  # bytes, as file systems allow
_PART = re.compile(r"[A-Za-z0-9.+-]+(_[A-Za-z0-9.+-]+)*")


@dataclass(frozen=True)
class Key:
    """What tells one engine, or one exported graph, from all others."""

    component: str
    family: str
    weights: str
    """A hash of what they were before LoRAs, and of the LoRAs with their scales."""
    backend: str
    """onnx, tensorrt or tensorrt-rtx."""
    version: str
    """The backend's."""
    device: str
    """What it runs on: "sm120", "sm86+sm89", "any"."""
    precision: str
    profiles: tuple[str, ...]
    slots: str
    """The schema's digest."""
    control: bool
    nativesd: str
    """The version that made it."""
    opset: str
    """Of its ONNX graph: "opset23"."""

    @property
    def name(self) -> str:
        """The name of its folder. Raises UsageError where a part has characters that no name can hold."""
        parts = {f.name: _text(getattr(self, f.name), f.name) for f in fields(self)}
        for part, value in parts.items():
            if not _PART.fullmatch(value):
                raise UsageError(
                    f"{value!r} cannot be the {part} of an engine: letters, digits and . + - are allowed, and single _"
                )
        name = SEPARATOR.join(parts.values())
        if len(name) > LONGEST_NAME:
            raise UsageError(f"{name} is longer than {LONGEST_NAME} characters: build fewer profiles into one engine")
        return name

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Key:
        """Of a manifest. Raises SourceError where a part is missing, too much, or of another type."""
        types = {f.name: bool if f.name == "control" else list if f.name == "profiles" else str for f in fields(cls)}
        wrong = sorted(data.keys() ^ types.keys()) or [n for n, kind in types.items() if not isinstance(data[n], kind)]
        if wrong:
            raise SourceError(f"the manifest's key is not one of this version: see {', '.join(wrong)}")
        if not all(isinstance(each, str) for each in data["profiles"]):
            raise SourceError("the manifest's key has a profile that is no text")
        return cls(**{**data, "profiles": tuple(data["profiles"])})


@dataclass(frozen=True)
class File:
    """One file of an entry."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A folder of the store. `problem` says what is wrong with it as far as its manifest shows; `verify` reads all."""

    path: Path
    key: Key | None = None
    files: Mapping[str, File] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever the builder noted: profiles, times, error figures."""
    created: str = ""
    platform: str = ""
    problem: str | None = None

    @property
    def size(self) -> int:
        """Bytes of its files, as the manifest states them."""
        return sum(file.size for file in self.files.values())


def read_entry(path: Path) -> Entry:
    """The entry in a folder, by its manifest."""
    try:
        if not os.path.lexists(path / MANIFEST):
            return Entry(path, problem=f"it has no {MANIFEST}, so it is not known what it is")
        data = read_json(path / MANIFEST)
        if data.get("schema") != MANIFEST_SCHEMA:
            has = quote(data.get("schema"))
            return Entry(path, problem=f"its manifest has schema {has}, and this version reads {MANIFEST_SCHEMA}")
        stated = read_fields(data, _MANIFEST, f"its {MANIFEST}")
        key = Key.from_json(stated["key"])
        same = key.name == path.name
    except (SourceError, UsageError) as error:
        return Entry(path, problem=str(error))
    entry = Entry(path, key, stated["files"], stated["details"], stated["created"], stated["platform"])
    return entry if same else replace(entry, problem="its name is not what its manifest says")


def _file(value: Any) -> File:
    if not isinstance(value, dict):
        raise ValueError
    return File(_SIZE.read(value.get("bytes")), _TEXT.read(value.get("sha256")))


def _inside(value: Any) -> str:
    """A file's path in its entry."""
    if not isinstance(value, str) or not all(map(is_name, value.split("/"))):
        raise ValueError
    return value


_SIZE, _TEXT = whole(0, 10**15), text()
_ANY = Kind("a value", lambda value: value)
_MANIFEST = (
    Field("key", mapping(_ANY, 100), REQUIRED),
    Field("files", mapping(Kind("its size and sha256", _file), 10_000, Kind("a path", _inside)), REQUIRED),
    Field("details", mapping(_ANY, 10_000), REQUIRED),
    Field("created", _TEXT, REQUIRED),
    Field("platform", _TEXT, REQUIRED),
)
"""What is read of a manifest."""


def files_in(folder: Path) -> dict[str, File]:
    """All files below a folder, by their paths in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): File(path.stat().st_size, _sha256(path)) for path in paths}


def verify(entry: Entry, *, deep: bool = True) -> str | None:
    """What is wrong with an entry, in one clause; None where its files are those that were written.

    deep  compare the files' sha256 too, not only their sizes
    """
    if entry.problem is not None:
        return entry.problem
    for name, file in entry.files.items():
        path = entry.path / name
        try:
            size = path.stat().st_size
            if size != file.size:
                return f"{name} has {size} bytes and was written with {file.size}"
            if deep and _sha256(path) != file.sha256:
                return f"{name} is not the file that was written (its sha256 differs)"
        except SourceError as error:
            return str(error)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def why_not(entry: Entry, wanted: Key) -> str | None:
    """Why an entry does not serve, in one clause; None where it does. Its files are looked at by `verify`.

    It serves with more devices and more profiles than are wanted.
    """
    if entry.problem is not None or entry.key is None:
        return entry.problem
    if entry.key.backend != "onnx" and entry.platform != this_platform():
        return f"it was built for {entry.platform}, and this is {this_platform()}"
    if entry.key.control != wanted.control:
        return f"it has {'' if entry.key.control else 'no '}control slots"
    for name, words in _COMPARED.items():
        has, wants = getattr(entry.key, name), getattr(wanted, name)
        if has != wants:
            return f"{words} {has}, not {wants}"
    if not {*wanted.device.split("+")} <= {*entry.key.device.split("+")}:
        return f"it was built for {entry.key.device}, not {wanted.device}"
    missing = [name for name in wanted.profiles if name not in entry.key.profiles]
    return f"it has no profile {', '.join(missing)}, only {', '.join(entry.key.profiles)}" if missing else None


_COMPARED = {
    "component": "its component is", "family": "its family is", "weights": "it was made of the weights",
    "backend": "it is for", "version": "it was built by version", "precision": "its precision is",
    "slots": "the digest of its inputs and outputs is", "nativesd": "it was made by nativesd", "opset": "its graph has",
}  # fmt: skip


def this_platform() -> str:
    """The system and processor, such as "linux-x86_64": engines run where they were built."""
    return f"{platform.system()}-{platform.machine()}".lower()


def _text(value: object, part: str) -> str:
    """A part of a key as it stands in a name."""
    if part == "control":
        return "control" if value else "plain"
    return "+".join(value) if isinstance(value, tuple) else str(value)


def is_entry_name(name: str) -> bool:
    """Whether a folder's name can be an entry's."""
    parts = name.split(SEPARATOR)
    return len(parts) in (len(fields(Key)), EARLIER_PARTS) and all(map(_PART.fullmatch, parts))


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
