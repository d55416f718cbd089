"""LoRA files: their keys by the modules that they change.

A key of a LoRA is a module's name in some layout with a prefix and a suffix (`lora_names`). Here are names and shapes
only: which parameters of a model the modules are is in `place`, what the parts of a change multiply to in `parts`, the
arithmetic in `merge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nativesd.errors import WeightsError, quote
from nativesd.shipped import LCM_LORA
from nativesd.weights.files.locate import locate_weights
from nativesd.weights.files.source import Member, join, open_source
from nativesd.weights.identity.signatures import recognise
from nativesd.weights.identity.words import BUNDLED
from nativesd.weights.lora.settings import Stated, adapter_folders, stated_by
from nativesd.weights.maps.keymap import KeyMap, load_tables


@dataclass(frozen=True)
class Group:
    """What a LoRA does to one module, of one of `components`: part -> key."""

    components: tuple[str, ...]
    module: str
    keys: Mapping[str, str]
    stated: Stated | None = None
    """What peft's settings say of it, where the file has any"""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file: its header, grouped by modules. `unplaced`: keys that no naming has or that cannot be merged."""

    path: Path
    member: Member
    groups: tuple[Group, ...]
    unplaced: Mapping[str, str]
    written: int
    """When the file was last written, in nanoseconds"""
    words: tuple[str, ...] = ()
    """The keys of textual inversions that come with it: nothing of the weights"""


def read_lora(path: str | Path, tables: Mapping[str, KeyMap] | None = None) -> LoraFile:
    """Read the header of a LoRA: a file, or a folder with one, and peft's settings in or beside it; or "tiny-lcm".

    A folder may have one of peft's adapters for each component, in folders of the components' names. On the hub it is a
    file in a repository (org/name/file), or the only one with weights there (org/name).

    Raises SourceError for what cannot be read, NetworkError for the hub, WeightsError for a file without any change of
    a LoRA.
    """
    path = LCM_LORA if path == "tiny-lcm" else locate_weights(path)[0]
    member, stated = _opened(path)
    if (signature := recognise(member.shapes)) is not None:
        raise WeightsError(f"{path} is {signature.says}")
    [*files] = member.data_starts
    words = tuple(key for key in member.tensors if key.startswith(BUNDLED))
    keys = [key for key in member.tensors if key not in words]
    groups, unplaced = group(keys, tables or load_tables(), stated)
    if not groups:
        some = ", ".join(map(quote, list(member.tensors)[:3]))
        raise WeightsError(f"{path} is no LoRA: it has no key named like a LoRA's, but {some}; see its audit")
    return LoraFile(path, member, tuple(groups), unplaced, max(file.stat().st_mtime_ns for file in files), words)


def _opened(path: Path) -> tuple[Member, dict[str, Stated]]:
    """A LoRA as one checkpoint, and peft's settings."""
    adapters = adapter_folders(path)
    if not adapters:
        members = open_source(path)
        if len(members) > 1:
            raise WeightsError(f"{path} is a model, not a LoRA: a LoRA is one file")
        [member] = members
        return member, stated_by(member.metadata, next(iter(member.data_starts)))
    each = {name: open_source(path / name)[0] for name in adapters}  # a folder without an index has one
    own = {name: stated_by(member.metadata, next(iter(member.data_starts))) for name, member in each.items()}
    joined = join([(f"{name}.", member) for name, member in each.items()])
    return joined, {name: stated[""] for name, stated in own.items() if "" in stated}


def group(
    keys: Iterable[str], tables: Mapping[str, KeyMap], stated: Mapping[str, Stated] | None = None
) -> tuple[list[Group], dict[str, str]]:
    """The keys of a LoRA by the modules they are of, and the rest with the reasons.

    `stated` are peft's settings by the component, or under "" for any.
    """
    keys = list(keys)
    names = [(table.lora, list(map(table.lora.part, keys))) for table in tables.values() if table.lora is not None]
    names.sort(key=lambda named: named[1].count(None))
    groups: dict[tuple[tuple[str, ...], str, str], dict[str, str]] = {}
    unplaced: dict[str, str] = {}
    for i, key in enumerate(keys):
        # a name that says its component means it, also to a naming that knows names without
        parts = [part for _, named in names if (part := named[i]) is not None]
        part = max(parts, key=lambda part: len(part.prefix), default=None)
        if part is None:
            reasons = (reason for naming, _ in names if (reason := naming.refusal(key)) is not None)
            unplaced[key] = next(reasons, "no naming of LoRA files has such a key")
            continue
        known = groups.setdefault((part.components, part.module, part.adapter), {})
        if part.part in known:
            unplaced[key] = f"{known[part.part]} is the same part of the same module"
        else:
            known[part.part] = key
    stated = stated or {}
    return [
        Group(components, module, parts, stated.get(components[0], stated.get("")))
        for (components, module, _), parts in groups.items()
    ], unplaced
