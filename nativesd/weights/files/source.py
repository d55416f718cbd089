"""The checkpoints of a local file or folder: which tensors are there, read from headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nativesd.config import Config
from nativesd.errors import SourceError, quote
from nativesd.reading import Stamp, is_name, list_folder, read_json
from nativesd.weights.files.beside import Beside, read_beside
from nativesd.weights.files.configs import component_config
from nativesd.weights.files.folder import INDEX, component_file, folder_of, local_weights, located, shards
from nativesd.weights.formats.container import read_file
from nativesd.weights.formats.header import Header, TensorInfo, merge_headers, opened
from nativesd.weights.formats.scaled import fold


@dataclass(frozen=True)
class Member:
    """One checkpoint of a source: a file, a sharded file, or a model folder's component.

    `name` is the component's folder, "" for a file that stands alone; `config` what the folder's config.json says.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]
    """key -> the file that holds it; empty for a remote source"""
    data_starts: Mapping[Path, int]
    """file -> where its tensors' offsets count from"""
    metadata: Mapping[str, str]
    config: Config | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What the files have beside tensors and metadata, and why it is not read"""
    beside: Beside | None = None
    """What the .yaml beside a single file says"""
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    """file -> which one it was when its header was read"""
    scales: Mapping[str, TensorInfo] = field(default_factory=dict)
    """What tensors are multiplied with (`TensorInfo.scale`), and which are no weights themselves"""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """key -> shape."""
        return {key: info.shape for key, info in self.tensors.items()}


PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
UNUSED = {
    "safety_checker": "the safety checker, which classifies pictures and makes none",
    "image_encoder": "encodes a picture for IP-Adapters and variations, which text-to-image does not need",
}
"""Components of model folders that have no module here, and why."""


def open_source(source: str | Path, *, half: bool = False) -> list[Member]:
    """The checkpoints of a local file or folder; `half` prefers fp16 variants. Raises SourceError."""
    path = folder_of(Path(source))
    if os.path.isdir(path):
        return list(_folder(path, half=half))
    if path.name.endswith(".json"):
        return [member("", shards(path))]
    return [replace(member("", [path]), beside=read_beside(path))]


def member(name: str, files: list[Path], config: Config | None = None) -> Member:
    """A checkpoint from its file, or its shards. Raises SourceError."""
    headers = {path: read_file(path) for path in files}
    return from_headers(name, headers, config)


def from_headers(
    name: str, headers: Mapping[Path, Header], config: Config | None = None, *, local: bool = True
) -> Member:
    """A checkpoint from the headers of its files. Raises WeightsError where two hold the same name.

    Of a `local` one the values of scales are looked at, too; raises SourceError where they cannot be read.
    """
    merged = merge_headers(headers)
    metadata = {key: value for header in headers.values() for key, value in header.metadata.items()}
    starts = {path: header.data_start for path, header in headers.items()}

    def read(key: str) -> bytes:
        path, info = merged[key]
        return _bytes(path, starts[path] + info.start, info.nbytes)

    folded = fold({key: info for key, (_, info) in merged.items()}, read if local else None)
    return Member(
        name=name,
        tensors=folded.tensors,
        files={key: path for key, (path, _) in merged.items()} if local else {},
        data_starts=starts,
        metadata=metadata,
        config=config,
        left_out={key: reason for header in headers.values() for key, reason in header.left_out.items()}
        | folded.left_out,
        scales=folded.scales,
        stamps={path: header.stamp for path, header in headers.items() if header.stamp is not None},
    )


def _bytes(path: Path, start: int, count: int) -> bytes:
    """Some bytes of a file. Raises SourceError."""
    with opened(path) as (file, _):
        file.seek(start)
        raw = file.read(count)
    if len(raw) != count:
        raise SourceError(f"{path} changed while it was read: wait until it is written, then try again")
    return raw


def join(members: Sequence[tuple[str, Member]]) -> Member:
    """Several checkpoints as one, each with a prefix before its names, which must not meet."""
    return Member(
        name="",
        tensors={
            prefix + key: replace(info, scale=prefix + info.scale) if info.scale else info
            for prefix, member in members
            for key, info in member.tensors.items()
        },
        scales={prefix + key: info for prefix, member in members for key, info in member.scales.items()},
        files={prefix + key: path for prefix, member in members for key, path in member.files.items()},
        data_starts={path: start for _, member in members for path, start in member.data_starts.items()},
        metadata={key: value for _, member in members for key, value in member.metadata.items()},
        stamps={path: stamp for _, member in members for path, stamp in member.stamps.items()},
    )


def _folder(path: Path, *, half: bool) -> Iterator[Member]:
    """The components of a model folder, or of a folder that is one component."""
    if not (path / INDEX).is_file():
        yield _component_folder(path, half=half)
        return
    for name in components(path):
        if name in UNUSED:  # of no use, so it may as well be absent, or a pickle
            if files := sorted((path / name).glob("*.safetensors"))[:1]:
                yield member(name, files)
        else:
            yield member(name, local_weights(path, name, half=half), component_config(path / name / "config.json"))


def components(path: Path) -> list[str]:
    """The components with weights that a folder's model_index.json lists. Raises SourceError.

    A name that would lead out of the folder is refused.
    """
    index = path / INDEX
    listed = [
        name
        for name, entry in read_json(index).items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    ]
    if wrong := [name for name in listed if not is_name(name)]:
        raise SourceError(f"{index} lists the component {quote(wrong[0])}, no folder's name or outside of its folder")
    return [name for name in listed if name in PARTS or (path / name / "config.json").is_file()]


def _component_folder(path: Path, *, half: bool) -> Member:
    """A folder that holds one checkpoint, maybe in several variants, with or without its config.json."""
    config = component_config(path / "config.json") if (path / "config.json").is_file() else None
    names = [file.name for file in list_folder(path) if file.is_file()]
    return member("", located(path / component_file(names, str(path), half=half)), config)
