"""The weight-map engine: tables of name templates, read in either direction.

A table (weightmaps/*.toml) pairs a published name (`theirs`) with ours. Both sides are templates with the same holes:

    {i}, {1+3*i+j}   variables bound by the rule's `for` (and the map's dimensions): expanded to numbers
    {p}              a capture that matches "weight" or "bias"
    {n}              any other name: a capture that matches a number

Because both sides are templates, either can be compiled to a pattern, and swapping them inverts the table. A list on
one side is a split or a concatenation along the first axis. `op` is "transpose" or "conv1x1" (theirs is [O, I, 1, 1],
ours [O, I]; what has that shape already, and a bias, pass as they are). `also` spellings, and rules with
`write = false`, are read and never written.

Layouts whose names count through all levels need to know how many there are: [dims] says how to read that off the
names, and a model's config says it for writing. Nothing here knows about tensors: shapes are tuples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from math import prod
from pathlib import Path
from re import Pattern
from typing import Any, Literal

from nativesd.errors import quote
from nativesd.shipped import TABLES
from nativesd.weights.maps.grammar import DIM, HEAD, LORA, RULE, TABLE, Op, parse_toml, read_section, read_table
from nativesd.weights.maps.lora_names import LoraNames
from nativesd.weights.maps.rules import Rule, Source
from nativesd.weights.maps.templates import (
    LONGEST,
    Dims,
    TableError,
    Trie,
    captures,
    counting,
    evaluate,
    expand,
    expression,
    holes,
    join,
    matching,
    substitute,
)

SIGNATURES = "signatures.toml"
"""The table beside the others that says what is recognised and not supported."""

MAX_DIM = 8
"""The largest dimension that is read off a checkpoint's names: what says more is no model but a fault."""
MAX_TABLES = 100
"""Of one's own."""
MAX_NAMES = 50_000
"""Templates that a table may stand for when its loops are expanded; the most of ours, with MAX_DIM of everything, is
12,172."""


LoopedRule = tuple[Rule, Mapping[str, str | int]]
"""A rule and its loops."""


@dataclass(frozen=True)
class Probe:
    """How one dimension is read off a checkpoint's names, where no config says it.

    count   how many numbers stand for the first capture of `template`, plus `plus`
    first   the least number that does, plus `plus`; `default` where there is none
    exists  for every i below the dimension `each`: 1 where a name matches, else 0
    """

    dim: str
    kind: Literal["count", "first", "exists"]
    template: str
    plus: int = 0
    default: int = 0
    each: str = ""


@dataclass(frozen=True)
class KeyMap:
    """A table, parsed. `bind` makes it usable for one model."""

    name: str
    component: str
    layout: str
    prefixes: tuple[str, ...]
    detect: tuple[str, ...]
    """Names, any of which is a reason to try this table on a checkpoint."""
    ignore: Mapping[str, str]
    names: Mapping[str, str]
    """pattern -> what such a key is, for layouts that are recognised and have no parameters of ours"""
    unused: str
    """What is said of such a file where nothing loads it yet; empty: something does"""
    probes: tuple[Probe, ...]
    rules: tuple[LoopedRule, ...]
    lora: LoraNames | None = None
    """How a layout of LoRA files names its tensors"""

    @property
    def is_named(self) -> bool:
        """Whether the table says what keys are, and not what fills parameters of ours."""
        return bool(self.names) or self.lora is not None

    @cached_property
    def _ignored(self) -> list[tuple[Pattern[str], str]]:
        return [(expression(pattern), reason) for pattern, reason in self.ignore.items()]

    def reason_to_ignore(self, key: str) -> str | None:
        """Why the key is not needed, or None where the table does not say so."""
        if len(key) > LONGEST:
            return None
        return next((reason for pattern, reason in self._ignored if pattern.fullmatch(key)), None)

    @classmethod
    def load(cls, path: Path) -> KeyMap:
        """Read a table. Raises TableError."""
        return cls.parse(read_table(path), path.name)

    @classmethod
    def parse(cls, text: str, name: str) -> KeyMap:
        """Parse a table's text; `name` stands in messages. Raises TableError."""
        data = read_section(parse_toml(text, name), TABLE, name)
        head = read_section(data["map"], HEAD, f"{name} [map]")
        if not (data["rule"] or data["names"] or data["lora"] or head["ignore"]):
            raise TableError(f"{name} has no [[rule]]")
        if unknown := set(data["also"]) - set(data["leaf"]):
            raise TableError(f"{name}: [also] without [leaf] of the same name: {', '.join(sorted(unknown)[:5])}")
        try:
            for pattern in head["ignore"]:
                expression(pattern)
            for pattern, meaning in data["names"].items():
                if unknown := set(holes(meaning)) - set(expression(pattern).groupindex):
                    raise ValueError(f"[names] says {{{unknown.pop()}}}, which is no group of {quote(pattern)}")
            lora = LoraNames.parse(read_section(data["lora"], LORA, f"{name} [lora]")) if data["lora"] else None
        except ValueError as error:
            raise TableError(f"{name}: {error}") from error
        return cls(
            name=name,
            component=head["component"],
            layout=head["layout"],
            prefixes=head["prefix"] or ("",),
            detect=head["detect"],
            ignore=head["ignore"],
            names=data["names"],
            unused=head["unused"],
            probes=tuple(_probe(name, dim, probe) for dim, probe in data["dims"].items()),
            rules=tuple(
                entry for number, rule in enumerate(data["rule"], 1) for entry in _fill_leaf(name, number, rule, data)
            ),
            lora=lora,
        )

    def bind(self, dims: Dims | None = None, prefix: str | None = None) -> BoundMap:
        """Expand the loops, whose bounds may name `dims` (such as the number of levels), for one prefix or for all.

        Raises TableError.
        """
        return BoundMap(self, dims or {}, self.prefixes if prefix is None else (prefix,))

    def probe(self, keys: Iterable[str], prefix: str) -> Dims:
        """The dimensions that a checkpoint's names under `prefix` show. Raises TableError."""
        keys = [key[len(prefix) :] for key in keys if key.startswith(prefix)]
        dims: dict[str, int | tuple[int, ...]] = {}
        for probe in self.probes:
            where = f"{self.name} dims.{probe.dim}"
            if probe.kind == "exists":
                each = dims.get(probe.each)
                if not isinstance(each, int):
                    raise TableError(f"{where}: {probe.each!r} is not a dimension that stands before it")
                patterns = [matching(where, expand(where, probe.template, {**dims, "i": i})) for i in range(each)]
                dims[probe.dim] = tuple(int(any(map(pattern.fullmatch, keys))) for pattern in patterns)
                continue
            pattern = counting(where, expand(where, probe.template, dims))
            numbers = {int(match.group(1)) for match in map(pattern.fullmatch, keys) if match}
            if probe.kind == "count":
                value = len(numbers) + probe.plus
            else:
                value = min(numbers) + probe.plus if numbers else probe.default
            dims[probe.dim] = max(0, min(value, MAX_DIM))
        return dims


def _probe(table: str, dim: str, data: dict[str, Any]) -> Probe:
    """One entry of [dims]. Raises TableError."""
    found = read_section(data, DIM, f"{table} dims.{dim}")
    kinds: tuple[Literal["count", "first", "exists"], ...] = ("count", "first", "exists")
    given = [kind for kind in kinds if found[kind] is not None]
    if len(given) != 1:
        raise TableError(f"{table}: dims.{dim} needs count, first or exists, and may have plus, default and each")
    return Probe(dim, given[0], found[given[0]], found["plus"], found["default"], found["each"])


@cache
def load_table(name: str) -> KeyMap:
    """A shipped table by its file's stem, such as "unet.diffusers"."""
    return KeyMap.load(TABLES / f"{name}.toml")


def load_tables(extra: Path | None = None) -> dict[str, KeyMap]:
    """Every shipped table by its stem, with those of the folder `extra` added or in their place. Raises TableError."""
    tables = {path.stem: load_table(path.stem) for path in sorted(TABLES.glob("*.toml")) if path.name != SIGNATURES}
    if extra is not None:
        own = sorted(extra.glob("*.toml"))
        if not own:
            raise TableError(f"{extra} holds no tables (*.toml)")
        if len(own) > MAX_TABLES:
            raise TableError(f"{extra} holds {len(own)} tables, over the {MAX_TABLES} that are read: name their folder")
        tables |= {path.stem: KeyMap.load(path) for path in own}
    return tables


def _fill_leaf(table: str, number: int, data: dict[str, Any], sections: dict[str, Any]) -> Iterator[LoopedRule]:
    """The rules that one [[rule]] stands for: itself, or one for every entry of its leaf, and its `also` spellings."""
    where = f"{table} rule {number}"
    rule = read_section(data, RULE, where)
    theirs, ours, leaf, loops, written = (rule[name] for name in ("theirs", "ours", "leaf", "for", "write"))
    if leaf is not None and rule["also"]:
        raise TableError(f"{where}: other spellings of a leaf's rule belong into [also.{leaf}]")
    op: Op = rule["op"] or ("split" if len(ours) > 1 else "concat" if len(theirs) > 1 else "copy")
    if not (theirs and ours):
        raise TableError(f"{where}: needs both theirs and ours")
    if len(ours) > 1 and len(theirs) > 1:
        raise TableError(f"{where}: both sides are lists")
    if (len(ours) > 1) != (op == "split") or (len(theirs) > 1 and op != "concat"):
        raise TableError(f"{where}: op {op!r} does not fit {len(theirs)} to {len(ours)} names")
    if leaf is None:
        yield Rule(table, number, theirs, ours, op, written), loops
        for spelling in rule["also"]:
            yield Rule(table, number, (spelling,), ours, op, written=False), loops
        return
    if leaf not in sections["leaf"]:
        raise TableError(f"{where}: there is no [leaf.{leaf}]")
    for group, group_written in (("leaf", written), ("also", False)):
        for theirs_leaf, ours_leaf in sections[group].get(leaf, {}).items():
            theirs_names = tuple(f"{side}.{theirs_leaf}.{{p}}" for side in theirs)
            ours_names = tuple(f"{side}.{ours_leaf}.{{p}}" for side in ours)
            yield Rule(table, number, theirs_names, ours_names, op, group_written), loops


Entry = tuple[Rule, int, tuple[str, ...]]
"""A rule, the place of a template among those of its side, and the other side's templates."""


class BoundMap:
    """A table with its loops expanded: names can be looked up from either side."""

    def __init__(self, keymap: KeyMap, dims: Dims, prefixes: Sequence[str]) -> None:
        self.keymap = keymap
        self.dims = dims
        self._found: dict[str, list[tuple[str, Source]]] = {}
        self._names = [(expression(pattern), meaning) for pattern, meaning in keymap.names.items()]
        self._theirs, self._ours, self._read_only = Trie[Entry](), Trie[Entry](), Trie[Entry]()
        left = MAX_NAMES
        for rule, loops in keymap.rules:
            where = str(rule)
            bounds = _bounds(where, loops, dims)
            left -= prod(bounds) * (len(rule.theirs) * len(prefixes) + len(rule.ours))
            if left < 0:
                raise TableError(f"{where}: with this rule the table stands for over {MAX_NAMES} names")
            for values in product(*map(range, bounds)):
                known = {**dims, **dict(zip(loops, values, strict=True))}
                theirs = tuple(expand(where, template, known) for template in rule.theirs)
                ours = tuple(expand(where, template, known) for template in rule.ours)
                if len({captures(where, template) for template in (*theirs, *ours)}) > 1:
                    raise TableError(f"{where}: the two sides have different captures")
                for index, template in enumerate(theirs):
                    for full in dict.fromkeys(join(prefix, template) for prefix in prefixes):
                        self._theirs.add(where, full, (rule, index, ours))
                for index, template in enumerate(ours):
                    side = self._ours if rule.written else self._read_only
                    side.add(where, template, (rule, index, tuple(join(prefixes[0], t) for t in theirs)))

    def parameters(self, key: str) -> list[tuple[str, Source]]:
        """Our parameters that a published key fills, each with the part it plays; [] where no rule names the key.

        For a concatenation the source holds this key alone. Raises TableError where two rules claim the key.
        """
        if key not in self._found:
            found = self._theirs.find(key)
            if len(found) > 1:
                raise TableError(f"two rules claim {key}: " + "; ".join(str(rule) for (rule, _, _), _ in found))
            self._found[key] = [
                (
                    substitute(name, values),
                    Source((key,), rule, part if rule.op == "split" else index, max(len(ours), len(rule.theirs))),
                )
                for (rule, index, ours), values in found[:1]
                for part, name in enumerate(ours)
            ]
        return self._found[key]

    def source(self, name: str) -> Source | None:
        """The published keys of one of our parameters, or None where no rule produces it. Raises TableError."""
        found = self._ours.find(name)
        if len(found) > 1:
            raise TableError(f"two rules produce {name}: " + "; ".join(str(rule) for (rule, _, _), _ in found))
        for (rule, part, theirs), values in found:
            return Source(tuple(substitute(t, values) for t in theirs), rule, part, len(rule.ours))
        return None

    def old_spelling(self, name: str) -> Source | None:
        """The published keys of one of our parameters in a spelling that is read and never written, if it has one."""
        for (rule, part, theirs), values in self._read_only.find(name):
            return Source(tuple(substitute(t, values) for t in theirs), rule, part, len(rule.ours))
        return None

    @cached_property
    def words(self) -> frozenset[str]:
        """The parts of its names that stand in the rules as they are."""
        names = (name for rule, _ in self.keymap.rules for name in rule.theirs)
        return frozenset(part for name in names for part in name.split(".") if "{" not in part) | {"weight", "bias"}

    def reason_to_ignore(self, key: str) -> str | None:
        """See `KeyMap.reason_to_ignore`."""
        return self.keymap.reason_to_ignore(key)

    def describe(self, key: str) -> str | None:
        """What the key is, by the table's [lora], or its [names], whose pattern's groups may stand in it; else None."""
        if self.keymap.lora is not None and (meaning := self.keymap.lora.describe(key)) is not None:
            return meaning
        if len(key) > LONGEST:
            return None
        for pattern, meaning in self._names:
            if match := pattern.fullmatch(key):
                return substitute(meaning, match.groupdict("")).strip()
        return None


def _bounds(where: str, loops: Mapping[str, str | int], dims: Dims) -> list[int]:
    """How often each of a rule's loops goes round; bounds may name the map's dimensions. Raises TableError."""
    try:
        return [max(0, evaluate(str(bound), dims)) for bound in loops.values()]
    except (KeyError, ValueError, SyntaxError) as error:
        raise TableError(f"{where}: a loop's bound cannot be computed: {error}") from error
