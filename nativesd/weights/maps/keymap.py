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

import ast
import operator
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast, get_args

from nativesd.errors import NativesdError
from nativesd.shipped import TABLES
from nativesd.weights.maps.lora_names import LoraNames

Shape = tuple[int, ...]
Op = Literal["copy", "transpose", "conv1x1", "split", "concat"]
Dims = Mapping[str, int | tuple[int, ...]]

SIGNATURES = "signatures.toml"
"""The table beside the others that says what is recognised and not supported."""

MAX_DIM = 64
"""The largest dimension that is read off a checkpoint's names: what says more is no model but a fault."""


class TableError(NativesdError):
    """A weight map that contradicts itself; the message names the table and the rule."""


@dataclass(frozen=True)
class Rule:
    """One [[rule]] of a table (`number` counts from 1), after its leaf was filled in."""

    table: str
    number: int
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op
    written: bool = True

    def __str__(self) -> str:
        return f"{self.table} rule {self.number}: {' + '.join(self.theirs)} <-> {' + '.join(self.ours)}"


@dataclass(frozen=True)
class Source:
    """What fills one parameter of ours: the published keys, in order, and what is done to them.

    With op "split" the parameter is part `part` of `parts` equal parts of the key, along the first axis.
    """

    keys: tuple[str, ...]
    rule: Rule
    part: int = 0
    parts: int = 1

    def shape(self, shapes: Mapping[str, Shape]) -> Shape | None:
        """The parameter's shape that the keys' `shapes` give, or None where the operation does not apply to them."""
        first, *rest = (shapes[key] for key in self.keys)
        match self.rule.op:
            case "transpose":
                return first[::-1] if len(first) == 2 else None
            case "conv1x1":
                plain = first if len(first) in (1, 2) else None
                return first[:2] if len(first) == 4 and first[2:] == (1, 1) else plain
            case "split":
                return (first[0] // self.parts, *first[1:]) if first and first[0] % self.parts == 0 else None
            case "concat":
                same = first and all(other and other[1:] == first[1:] for other in rest)
                return (sum(shapes[key][0] for key in self.keys), *first[1:]) if same else None
            case "copy":
                return first

    def published_shape(self, shape: Shape) -> Shape:
        """The shape of a key that gives a parameter of `shape`; of a concatenation, of all its keys together."""
        match self.rule.op:
            case "transpose":
                return shape[::-1]
            case "conv1x1":
                return (*shape, 1, 1) if len(shape) == 2 else shape
            case "split":
                return (shape[0] * self.parts, *shape[1:])
            case "concat" | "copy":
                return shape


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
    probes: tuple[Probe, ...]
    rules: tuple[LoopedRule, ...]
    lora: LoraNames | None = None
    """How a layout of LoRA files names its tensors"""

    @property
    def is_named(self) -> bool:
        """Whether the table says what keys are, and not what fills parameters of ours."""
        return bool(self.names) or self.lora is not None

    @cached_property
    def _ignored(self) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(pattern), reason) for pattern, reason in self.ignore.items()]

    def reason_to_ignore(self, key: str) -> str | None:
        """Why the key is not needed, or None where the table does not say so."""
        return next((reason for pattern, reason in self._ignored if pattern.fullmatch(key)), None)

    @classmethod
    def load(cls, path: Path) -> KeyMap:
        """Read a table. Raises TableError."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TableError(f"{path} cannot be read as a table: {error}") from error
        return cls.parse(text, path.name)

    @classmethod
    def parse(cls, text: str, name: str) -> KeyMap:
        """Parse a table's text; `name` stands in messages. Raises TableError."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise TableError(f"{name} is not TOML: {error}") from error
        if unknown := set(data) - {"map", "dims", "leaf", "also", "rule", "names", "lora"}:
            raise TableError(f"{name}: unknown section {', '.join(sorted(unknown))}")
        head, leaves = data.get("map", {}), data.get("leaf", {})
        if not {"component", "layout"} <= set(head) <= {"component", "layout", "prefix", "detect", "ignore"}:
            raise TableError(f"{name}: [map] takes component and layout, and may have prefix, detect and ignore")
        if not (data.get("rule") or data.get("names") or data.get("lora") or head.get("ignore")):
            raise TableError(f"{name} has no [[rule]]")
        if unknown := set(data.get("also", {})) - set(leaves):
            raise TableError(f"{name}: [also] without [leaf] of the same name: {', '.join(sorted(unknown))}")
        for pattern in (*head.get("ignore", {}), *data.get("names", {})):
            try:
                re.compile(pattern)
            except re.error as error:
                raise TableError(f"{name}: {pattern!r} is not a regular expression: {error}") from error
        try:
            lora = LoraNames.parse(data["lora"]) if "lora" in data else None
        except ValueError as error:
            raise TableError(f"{name}: {error}") from error
        return cls(
            name=name,
            component=head["component"],
            layout=head["layout"],
            prefixes=_as_tuple(head.get("prefix", "")),
            detect=_as_tuple(head.get("detect", ())),
            ignore=head.get("ignore", {}),
            names=data.get("names", {}),
            probes=tuple(_probe(name, dim, probe) for dim, probe in data.get("dims", {}).items()),
            rules=tuple(
                entry
                for number, rule in enumerate(data.get("rule", ()), 1)
                for entry in _fill_leaf(name, number, rule, data)
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
                patterns = [_pattern(_expand(where, probe.template, {**dims, "i": i})) for i in range(each)]
                dims[probe.dim] = tuple(int(any(map(pattern.fullmatch, keys))) for pattern in patterns)
                continue
            pattern = _pattern(_expand(where, probe.template, dims))
            numbers = {int(match.group(1)) for match in map(pattern.fullmatch, keys) if match}
            if probe.kind == "count":
                value = len(numbers) + probe.plus
            else:
                value = min(numbers) + probe.plus if numbers else probe.default
            dims[probe.dim] = max(0, min(value, MAX_DIM))
        return dims


def _probe(table: str, dim: str, data: dict[str, Any]) -> Probe:
    """One entry of [dims]. Raises TableError."""
    for kind in ("count", "first", "exists"):
        if kind in data and set(data) <= {kind, "plus", "default", "each"}:
            return Probe(dim, kind, data[kind], data.get("plus", 0), data.get("default", 0), data.get("each", ""))
    raise TableError(f"{table}: dims.{dim} needs count, first or exists, and may have plus, default and each")


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
        tables |= {path.stem: KeyMap.load(path) for path in own}
    return tables


def _fill_leaf(table: str, number: int, rule: dict[str, Any], data: dict[str, Any]) -> Iterator[LoopedRule]:
    """The rules that one [[rule]] stands for: itself, or one for every entry of its leaf, and its `also` spellings."""
    if unknown := set(rule) - {"theirs", "ours", "for", "leaf", "also", "op", "write"}:
        raise TableError(f"{table} rule {number}: unknown field {', '.join(sorted(unknown))}")
    if not {"theirs", "ours"} <= set(rule):
        raise TableError(f"{table} rule {number}: needs both theirs and ours")
    if {"leaf", "also"} <= set(rule):
        raise TableError(f"{table} rule {number}: other spellings of a leaf's rule belong into [also.{rule['leaf']}]")
    loops, written = rule.get("for", {}), rule.get("write", True)
    ours, theirs = (_as_tuple(rule[side]) for side in ("ours", "theirs"))
    name = rule.get("op") or ("split" if len(ours) > 1 else "concat" if len(theirs) > 1 else "copy")
    if name not in get_args(Op):
        raise TableError(f"{table} rule {number}: unknown op {name!r}")
    op = cast(Op, name)
    if len(ours) > 1 and len(theirs) > 1:
        raise TableError(f"{table} rule {number}: both sides are lists")
    if (len(ours) > 1) != (op == "split") or (len(theirs) > 1 and op != "concat"):
        raise TableError(f"{table} rule {number}: op {op!r} does not fit {len(theirs)} to {len(ours)} names")
    leaf = rule.get("leaf")
    if leaf is None:
        yield Rule(table, number, theirs, ours, op, written), loops
        for spelling in _as_tuple(rule.get("also", ())):
            yield Rule(table, number, (spelling,), ours, op, written=False), loops
        return
    if leaf not in data.get("leaf", {}):
        raise TableError(f"{table} rule {number}: there is no [leaf.{leaf}]")
    for group, group_written in (("leaf", written), ("also", False)):
        for theirs_leaf, ours_leaf in data.get(group, {}).get(leaf, {}).items():
            theirs_names = tuple(f"{side}.{theirs_leaf}.{{p}}" for side in theirs)
            ours_names = tuple(f"{side}.{ours_leaf}.{{p}}" for side in ours)
            yield Rule(table, number, theirs_names, ours_names, op, group_written), loops


def _as_tuple(value: str | list[str] | tuple[()]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip


def evaluate(expression: str, values: Dims) -> int:
    """An integer expression over `values`: + - * // %, names, and an element of a list by name[index].

    Raises KeyError for a name that has no value, ValueError for anything else.
    """

    def visit(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name):
                bound = values[name]
                if isinstance(bound, int):
                    return bound
                raise ValueError(f"{name} is a list in {expression!r}: one of it is {name}[i]")
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                items = values[name]
                place = visit(index)
                if isinstance(items, int) or not 0 <= place < len(items):
                    raise ValueError(f"{name}[{place}] in {expression!r} is not there")
                return items[place]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                try:
                    result: int = _OPERATORS[type(op)](visit(left), visit(right))
                except ZeroDivisionError as error:
                    raise ValueError(f"{expression!r} divides by zero") from error
                return result
        raise ValueError(f"{expression!r} is not an integer expression")

    return visit(ast.parse(expression, mode="eval").body)


_HOLE = re.compile(r"\{([^{}]+)\}")


class BoundMap:
    """A table with its loops expanded: names can be looked up from either side."""

    def __init__(self, keymap: KeyMap, dims: Dims, prefixes: Sequence[str]) -> None:
        self.keymap = keymap
        self.dims = dims
        self._found: dict[str, list[tuple[str, Source]]] = {}
        self._names = [(re.compile(pattern), meaning) for pattern, meaning in keymap.names.items()]
        self._theirs, self._ours, self._read_only = _Trie(), _Trie(), _Trie()
        for rule, loops in keymap.rules:
            for values in _loop(rule, loops, dims):
                theirs = tuple(_expand(str(rule), template, values) for template in rule.theirs)
                ours = tuple(_expand(str(rule), template, values) for template in rule.ours)
                holes = {frozenset(_HOLE.findall(template)) for template in (*theirs, *ours)}
                if any(
                    len(set(part)) < len(part) for t in (*theirs, *ours) for part in map(_HOLE.findall, t.split("."))
                ):
                    raise TableError(f"{rule}: a capture stands twice between two dots")
                if len(holes) > 1:
                    raise TableError(f"{rule}: the two sides have different captures")
                for index, template in enumerate(theirs):
                    for full in dict.fromkeys(_join(prefix, template) for prefix in prefixes):
                        self._theirs.add(full, (rule, index, ours))
                for index, template in enumerate(ours):
                    side = self._ours if rule.written else self._read_only
                    side.add(template, (rule, index, tuple(_join(prefixes[0], t) for t in theirs)))

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
                    _substitute(name, captures),
                    Source((key,), rule, part if rule.op == "split" else index, max(len(ours), len(rule.theirs))),
                )
                for (rule, index, ours), captures in found[:1]
                for part, name in enumerate(ours)
            ]
        return self._found[key]

    def source(self, name: str) -> Source | None:
        """The published keys of one of our parameters, or None where no rule produces it. Raises TableError."""
        found = self._ours.find(name)
        if len(found) > 1:
            raise TableError(f"two rules produce {name}: " + "; ".join(str(rule) for (rule, _, _), _ in found))
        for (rule, part, theirs), captures in found:
            return Source(tuple(_substitute(t, captures) for t in theirs), rule, part, len(rule.ours))
        return None

    def old_spelling(self, name: str) -> Source | None:
        """The published keys of one of our parameters in a spelling that is read and never written, if it has one."""
        for (rule, part, theirs), captures in self._read_only.find(name):
            return Source(tuple(_substitute(t, captures) for t in theirs), rule, part, len(rule.ours))
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
        for pattern, meaning in self._names:
            if match := pattern.fullmatch(key):
                return meaning.format(**match.groupdict("")).strip()
        return None


Entry = tuple[Rule, int, tuple[str, ...]]
"""A rule, the place of a template among those of its side, and the other side's templates."""


class _Trie:
    """Templates by their dot-separated parts: a name is matched in one walk, however many templates there are."""

    def __init__(self) -> None:
        self.literal: dict[str, _Trie] = {}
        self.pattern: dict[str, tuple[re.Pattern[str], _Trie]] = {}
        self.values: list[Entry] = []

    def add(self, template: str, value: Entry) -> None:
        """Store `value` under a template whose holes are captures."""
        node = self
        for part in template.split("."):
            if "{" not in part:
                node = node.literal.setdefault(part, _Trie())
                continue
            pattern = _capturing(part)
            _, node = node.pattern.setdefault(pattern, (re.compile(pattern), _Trie()))
        node.values.append(value)

    def find(self, name: str) -> list[tuple[Entry, dict[str, str]]]:
        """Every value whose template matches, with its captures."""
        out: list[tuple[Entry, dict[str, str]]] = []

        def walk(node: _Trie, parts: list[str], captures: dict[str, str]) -> None:
            if not parts:
                out.extend((value, captures) for value in node.values)
                return
            if parts[0] in node.literal:
                walk(node.literal[parts[0]], parts[1:], captures)
            for pattern, child in node.pattern.values():
                match = pattern.fullmatch(parts[0])
                if match and all(captures.get(k, v) == v for k, v in match.groupdict().items()):
                    walk(child, parts[1:], captures | match.groupdict())

        walk(self, name.split("."), {})
        return out


def _capturing(template: str) -> str:
    """The regular expression of a template whose holes are captures."""
    pieces = _HOLE.split(template)  # literal, capture, literal, capture, ..., literal
    return "".join(
        f"(?P<{piece}>{'weight|bias' if piece == 'p' else '[0-9]{1,9}'})" if i % 2 else re.escape(piece)
        for i, piece in enumerate(pieces)
    )


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(_capturing(template))


def _join(prefix: str, template: str) -> str:
    """The full name; "../" at a template's start goes one part of the prefix up."""
    return re.sub(r"([^.]+\.)?\.\./", "", prefix + template)


def _loop(rule: Rule, loops: Mapping[str, str | int], dims: Dims) -> Iterator[Dims]:
    """Every assignment of the rule's loop variables, on top of the map's dimensions."""
    try:
        bounds = [evaluate(str(bound), dims) for bound in loops.values()]
    except (KeyError, ValueError, SyntaxError) as error:
        raise TableError(f"{rule}: a loop's bound cannot be computed: {error}") from error
    for values in product(*(range(bound) for bound in bounds)):
        yield {**dims, **dict(zip(loops, values, strict=True))}


def _expand(where: str, template: str, values: Dims) -> str:
    """Replace the holes whose variables are bound; leave the captures. Raises TableError, beginning with `where`."""

    def fill(match: re.Match[str]) -> str:
        expression = match.group(1)
        if expression.isidentifier() and expression not in values:
            return match.group(0)
        try:
            return str(evaluate(expression, values))
        except (KeyError, ValueError, SyntaxError) as error:
            raise TableError(f"{where}: cannot compute {{{expression}}}: {error}") from error

    return _HOLE.sub(fill, template)


def _substitute(template: str, captures: Mapping[str, str]) -> str:
    return _HOLE.sub(lambda match: captures[match.group(1)], template)
