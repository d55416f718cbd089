"""What is in a checkpoint: which table reads which of its names, under which prefix. Names alone decide."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nativesd.weights.maps.keymap import BoundMap, KeyMap
from nativesd.weights.maps.rules import Shape


@dataclass(frozen=True)
class Found:
    """One component in a checkpoint: the table that reads it, bound to the prefix its names have."""

    table: BoundMap
    prefix: str
    keys: list[str]
    foreign_prefix: bool = False
    """The prefix is none that the table knows: no tool would load the component as it is."""

    @property
    def component(self) -> str:
        """What the table calls it: unet, vae, text_encoder, ..."""
        return self.table.keymap.component

    def parameters(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Our parameters that the names give, with the shapes they have in the checkpoint."""
        return {
            name: shape
            for key in self.keys
            for name, source in self.table.parameters(key)
            if len(source.rule.theirs) == 1 and (shape := source.shape(shapes)) is not None
        }


@dataclass
class Detection:
    """The components of a checkpoint; every key is in one of them, ignored, or unrecognised."""

    found: list[Found] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    """key -> reason, for keys beside the components (schedule buffers, training averages)"""
    unrecognised: list[str] = field(default_factory=list)


def detect(keys: Iterable[str], tables: Mapping[str, KeyMap]) -> Detection:
    """Assign every name of a checkpoint to the component it belongs to. Raises TableError for a faulty table."""
    detection = Detection()
    beside = [table.bind() for table in tables.values() if not table.rules and not table.is_named]
    left: dict[str, None] = {}
    for key in keys:
        reason = next((reason for table in beside if (reason := table.reason_to_ignore(key)) is not None), None)
        if reason is None:
            left[key] = None
        else:
            detection.ignored[key] = reason
    _take(detection, left, _known_prefixes(left, tables), foreign=False)
    while (found := _most_named(left, tables)) is not None:
        detection.found.append(found)
        for key in found.keys:
            del left[key]
    _take(detection, left, _foreign_prefixes(left, tables), foreign=True)
    for key in left:
        _adopt(key, detection)
    detection.found.sort(key=lambda found: ORDER.index(found.component) if found.component in ORDER else 99)
    return detection


FEW = 20  # names that must fit before a prefix which no table knows is taken for one
MANY = 20  # such prefixes of one file that are looked at

ORDER = ["text_encoder", "unet", "controlnet", "vae"]
"""Components in the order of the data's way through them."""


def _take(
    detection: Detection, left: dict[str, None], candidates: Mapping[str, list[KeyMap]], *, foreign: bool
) -> None:
    """Move the names of every component that stands under a candidate prefix from `left`.

    Among known prefixes the longest goes first, among foreign ones the shortest: the whole before its parts.
    """
    prefixes = sorted(candidates, key=len, reverse=not foreign)
    if foreign:  # a file can have as many as keys
        ordered = sorted(left)
        prefixes = [prefix for prefix in prefixes if _count(ordered, prefix) >= FEW][:MANY]
    for prefix in prefixes:
        found = _best(prefix, candidates[prefix], left, foreign)
        if found is not None:
            detection.found.append(found)
            for key in found.keys:
                del left[key]


def _count(ordered: Sequence[str], prefix: str) -> int:
    """How many of the names, which are in order, begin with a prefix."""
    return bisect_left(ordered, prefix + chr(sys.maxunicode)) - bisect_left(ordered, prefix)


def _known_prefixes(left: Mapping[str, None], tables: Mapping[str, KeyMap]) -> dict[str, list[KeyMap]]:
    """prefix -> the tables one of whose `detect` names stands under it."""
    out: dict[str, list[KeyMap]] = {}
    for table in tables.values():
        for prefix in table.prefixes:
            if any(prefix + name in left for name in table.detect):
                out.setdefault(prefix, []).append(table)
    return out


def _foreign_prefixes(left: Mapping[str, None], tables: Mapping[str, KeyMap]) -> dict[str, list[KeyMap]]:
    """The same for prefixes that no table knows: whatever stands before a `detect` name.

    None is what a table itself calls something else by that prefix: CLIP's image tower has the text tower's names.
    """
    out: dict[str, list[KeyMap]] = {}
    ends = tuple("." + name for table in tables.values() for name in table.detect)
    few = [key for key in left if key.endswith(ends)]
    for table in tables.values():
        for name in table.detect:
            for key in few:
                if key.endswith("." + name) and table.reason_to_ignore(key) is None:
                    known = out.setdefault(key.removesuffix(name), [])
                    if table not in known:
                        known.append(table)
    return out


def _best(prefix: str, tables: list[KeyMap], left: Mapping[str, None], foreign: bool) -> Found | None:
    """The table that knows most of the names under a prefix, and at least half of them."""
    inside = [key for key in left if key.startswith(prefix)]
    best, most = None, 0
    for table in (table.bind(table.probe(inside, prefix), prefix) for table in tables):
        mapped = sum(bool(table.parameters(key)) for key in inside)
        known = sum(bool(table.parameters(key)) or table.reason_to_ignore(key) is not None for key in inside)
        if mapped > most and 2 * known >= len(inside) and (mapped >= FEW or not foreign):
            best, most = table, mapped
    if best is None:
        return None
    return Found(best, prefix, [key for key in left if key.startswith(prefix) or best.parameters(key)], foreign)


def _most_named(left: Mapping[str, None], tables: Mapping[str, KeyMap]) -> Found | None:
    """What the table names that names most keys, of those without parameters of ours; its kin name the others."""
    bound = [table.bind() for table in tables.values() if table.is_named]
    named = {table: _named(table, left) for table in bound}
    best = max(named, key=lambda table: len(named[table]), default=None)
    if best is None or not named[best]:
        return None
    kin = set[str]().union(*(keys for table, keys in named.items() if table.keymap.component == best.keymap.component))
    return Found(best, "", [key for key in left if key in kin])


def _named(table: BoundMap, left: Iterable[str]) -> set[str]:
    """The keys that a table names; a LoRA is more than alphas, which any file may have."""
    named = {key for key in left if table.describe(key) is not None}
    lora = table.keymap.lora
    alphas = lora is not None and all((part := lora.part(key)) is not None and part.part == "alpha" for key in named)
    return set() if alphas else named


def _adopt(key: str, detection: Detection) -> None:
    """Give a key that no component claims to the one whose table ignores it, or to nobody."""
    for found in detection.found:
        if found.table.reason_to_ignore(key) is not None:
            found.keys.append(key)
            return
    detection.unrecognised.append(key)
