"""The weight-map engine: tables of name templates, read in either direction.

A table (weightmaps/*.toml) pairs a published name (`theirs`) with ours. Both sides are templates with the same holes:

    {i}, {1+3*i+j}   variables bound by the rule's `for` (and the map's dimensions): expanded to numbers
    {p}              a capture that matches "weight" or "bias"
    {n}              any other name: a capture that matches a number

Because both sides are templates, either can be compiled to a pattern, and swapping them inverts the table. A list on
one side is a split or a concatenation along the first axis. `op` is "transpose" or "conv1x1" (theirs is [O, I, 1, 1],
ours [O, I]). `also` spellings are read and never written. Nothing here knows about tensors: shapes are tuples.
"""

from __future__ import annotations

import ast
import operator
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast, get_args

from nativesd.errors import NativesdError

Shape = tuple[int, ...]
Op = Literal["copy", "transpose", "conv1x1", "split", "concat"]
Dims = Mapping[str, int]

TABLES = next(
    path
    for path in (Path(__file__).parents[1] / "weightmaps", Path(__file__).parents[2] / "weightmaps")
    if path.is_dir()
)
"""The shipped tables: beside the modules in an installed package, at the repository's top in a checkout."""


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
                return first[:2] if len(first) == 4 and first[2:] == (1, 1) else None
            case "split":
                return (first[0] // self.parts, *first[1:]) if first and first[0] % self.parts == 0 else None
            case "concat":
                same = first and all(other and other[1:] == first[1:] for other in rest)
                return (sum(shapes[key][0] for key in self.keys), *first[1:]) if same else None
            case "copy":
                return first


@dataclass
class Plan:
    """What becomes of a checkpoint's keys, and where each of the model's parameters comes from."""

    sources: dict[str, Source] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    """key -> reason"""
    unexpected: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """key -> the parameters it would be, which this model does not have; () where no rule knows the key"""
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """parameter -> the keys expected for it; () where no rule produces it"""
    duplicate: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """parameter -> the keys that all claim it"""
    wrong_shape: dict[str, tuple[Source, Shape | None, Shape]] = field(default_factory=dict)
    """parameter -> its source, the shape that gives (None: not even of the right rank), the shape the model has"""

    def problems(self) -> list[str]:
        """One sentence for every key and parameter that stands in the way of loading."""
        lines = [
            f"missing {name}: expected as {' + '.join(keys) or 'nothing any rule names'}"
            for name, keys in self.missing.items()
        ]
        lines += [
            f"unexpected {key}: "
            + (f"would be {', '.join(names)}, which this model lacks" if names else "no rule names it")
            for key, names in self.unexpected.items()
        ]
        lines += [f"duplicate {name}: claimed by {', '.join(keys)}" for name, keys in self.duplicate.items()]
        lines += [
            f"wrong shape {name}: the model has {list(expected)}, {' + '.join(source.keys)} gives "
            f"{'no such rank' if found is None else list(found)} ({source.rule})"
            for name, (source, found, expected) in self.wrong_shape.items()
        ]
        return lines


LoopedRule = tuple[Rule, Mapping[str, str | int], bool]
"""A rule, its loops, and whether the table's prefix applies to it."""


@dataclass(frozen=True)
class KeyMap:
    """A table, parsed. `bind` makes it usable for one model."""

    name: str
    component: str
    layout: str
    prefixes: tuple[str, ...]
    ignore: Mapping[str, str]
    rules: tuple[LoopedRule, ...]

    @classmethod
    def load(cls, path: Path) -> KeyMap:
        """Read a table. Raises TableError."""
        return cls.parse(path.read_text(encoding="utf-8"), path.name)

    @classmethod
    def parse(cls, text: str, name: str) -> KeyMap:
        """Parse a table's text; `name` stands in messages. Raises TableError."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise TableError(f"{name} is not TOML: {error}") from error
        head, leaves = data.get("map", {}), data.get("leaf", {})
        if not {"component", "layout"} <= set(head) <= {"component", "layout", "prefix", "ignore"}:
            raise TableError(f"{name}: [map] takes component and layout, and may have prefix and ignore")
        if not data.get("rule"):
            raise TableError(f"{name} has no [[rule]]")
        if unknown := set(data.get("also", {})) - set(leaves):
            raise TableError(f"{name}: [also] without [leaf] of the same name: {', '.join(sorted(unknown))}")
        for pattern in head.get("ignore", {}):
            try:
                re.compile(pattern)
            except re.error as error:
                raise TableError(f"{name}: ignore {pattern!r} is not a regular expression: {error}") from error
        prefix = head.get("prefix", "")
        rules = [entry for number, rule in enumerate(data["rule"], 1) for entry in _fill_leaf(name, number, rule, data)]
        return cls(
            name=name,
            component=head["component"],
            layout=head["layout"],
            prefixes=tuple(prefix) if isinstance(prefix, list) else (prefix,),
            ignore=head.get("ignore", {}),
            rules=tuple(rules),
        )

    def bind(self, dims: Dims | None = None) -> BoundMap:
        """Expand the loops, whose bounds may name `dims` (such as the number of levels). Raises TableError."""
        return BoundMap(self, dims or {})


def load_table(name: str) -> KeyMap:
    """A shipped table by its file's stem, such as "unet.diffusers"."""
    return KeyMap.load(TABLES / f"{name}.toml")


def _fill_leaf(table: str, number: int, rule: dict[str, Any], data: dict[str, Any]) -> Iterator[LoopedRule]:
    """The rules that one [[rule]] stands for: itself, or one for every entry of its leaf, and its `also` spellings."""
    if unknown := set(rule) - {"theirs", "ours", "for", "leaf", "also", "op", "prefix"}:
        raise TableError(f"{table} rule {number}: unknown field {', '.join(sorted(unknown))}")
    if not {"theirs", "ours"} <= set(rule):
        raise TableError(f"{table} rule {number}: needs both theirs and ours")
    if {"leaf", "also"} <= set(rule):
        raise TableError(f"{table} rule {number}: other spellings of a leaf's rule belong into [also.{rule['leaf']}]")
    loops, prefixed = rule.get("for", {}), rule.get("prefix", True)
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
        yield Rule(table, number, theirs, ours, op), loops, prefixed
        for spelling in _as_tuple(rule.get("also", ())):
            yield Rule(table, number, (spelling,), ours, op, written=False), loops, prefixed
        return
    if leaf not in data.get("leaf", {}):
        raise TableError(f"{table} rule {number}: there is no [leaf.{leaf}]")
    for group, written in (("leaf", True), ("also", False)):
        for theirs_leaf, ours_leaf in data.get(group, {}).get(leaf, {}).items():
            theirs_names = tuple(f"{side}.{theirs_leaf}.{{p}}" for side in theirs)
            ours_names = tuple(f"{side}.{ours_leaf}.{{p}}" for side in ours)
            yield Rule(table, number, theirs_names, ours_names, op, written), loops, prefixed


def _as_tuple(value: str | list[str] | tuple[()]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip


def evaluate(expression: str, values: Mapping[str, int]) -> int:
    """An integer expression over `values`: + - * // % and names. Raises KeyError for a name that has no value."""

    def visit(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name):
                return values[name]
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

    def __init__(self, keymap: KeyMap, dims: Dims) -> None:
        self.keymap = keymap
        self._ignore = [(re.compile(pattern), reason) for pattern, reason in keymap.ignore.items()]
        self._theirs, self._ours = _Trie(), _Trie()
        for rule, loops, prefixed in keymap.rules:
            for values in _loop(rule, loops, dims):
                theirs = tuple(_expand(rule, template, values) for template in rule.theirs)
                ours = tuple(_expand(rule, template, values) for template in rule.ours)
                holes = {frozenset(_HOLE.findall(template)) for template in (*theirs, *ours)}
                if any(
                    len(set(part)) < len(part) for t in (*theirs, *ours) for part in map(_HOLE.findall, t.split("."))
                ):
                    raise TableError(f"{rule}: a capture stands twice between two dots")
                if len(holes) > 1:
                    raise TableError(f"{rule}: the two sides have different captures")
                prefixes = keymap.prefixes if prefixed else ("",)
                for index, template in enumerate(theirs):
                    for prefix in prefixes:
                        self._theirs.add(prefix + template, (rule, index, ours))
                if rule.written:
                    for index, template in enumerate(ours):
                        self._ours.add(template, (rule, index, tuple(prefixes[0] + t for t in theirs)))

    def parameters(self, key: str) -> list[tuple[str, Source]]:
        """Our parameters that a published key fills, each with the part it plays; [] where no rule names the key.

        For a concatenation the source holds this key alone. Raises TableError where two rules claim the key.
        """
        found = self._theirs.find(key)
        if len(found) > 1:
            raise TableError(f"two rules claim {key}: " + "; ".join(str(rule) for (rule, _, _), _ in found))
        return [
            (
                _substitute(name, captures),
                Source((key,), rule, part if rule.op == "split" else index, max(len(ours), len(rule.theirs))),
            )
            for (rule, index, ours), captures in found[:1]
            for part, name in enumerate(ours)
        ]

    def source(self, name: str) -> Source | None:
        """The published keys of one of our parameters, or None where no rule produces it. Raises TableError."""
        found = self._ours.find(name)
        if len(found) > 1:
            raise TableError(f"two rules produce {name}: " + "; ".join(str(rule) for (rule, _, _), _ in found))
        for (rule, part, theirs), captures in found:
            return Source(tuple(_substitute(t, captures) for t in theirs), rule, part, len(rule.ours))
        return None

    def reason_to_ignore(self, key: str) -> str | None:
        """Why the key is not needed, or None where the table does not say so."""
        return next((reason for pattern, reason in self._ignore if pattern.fullmatch(key)), None)

    def plan(self, theirs: Mapping[str, Shape], ours: Mapping[str, Shape]) -> Plan:
        """Assign a checkpoint's keys to a model's parameters, both given as name -> shape. Raises TableError."""
        plan = Plan()
        claims: dict[str, dict[int, list[tuple[str, Source]]]] = {}
        for key in theirs:
            found = self.parameters(key)
            if found and all(name in ours for name, _ in found):
                for name, source in found:
                    index = source.part if source.rule.op == "concat" else 0
                    claims.setdefault(name, {}).setdefault(index, []).append((key, source))
            elif (reason := self.reason_to_ignore(key)) is not None:
                plan.ignored[key] = reason
            else:
                plan.unexpected[key] = tuple(name for name, _ in found)
        for name, expected in ours.items():
            self._settle(plan, name, expected, claims.get(name, {}), theirs)
        return plan

    def _settle(
        self,
        plan: Plan,
        name: str,
        expected: Shape,
        claims: Mapping[int, list[tuple[str, Source]]],
        theirs: Mapping[str, Shape],
    ) -> None:
        """Put one parameter into the plan: filled, missing, claimed twice, or of the wrong shape."""
        every = [source for index in sorted(claims) for _, source in claims[index]]
        needed = len(every[0].rule.theirs) if every else 1
        if len(claims) < needed:
            known = self.source(name)
            plan.missing[name] = () if known is None else tuple(key for key in known.keys if key not in theirs)
        elif len(every) > needed:
            plan.duplicate[name] = tuple(key for source in every for key in source.keys)
        else:
            first = every[0]
            source = Source(tuple(s.keys[0] for s in every), first.rule, first.part if needed == 1 else 0, first.parts)
            found = source.shape(theirs)
            if found != expected:
                plan.wrong_shape[name] = (source, found, expected)
            else:
                plan.sources[name] = source


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
            pieces = _HOLE.split(part)  # literal, capture, literal, capture, ..., literal
            pattern = "".join(
                f"(?P<{piece}>{'weight|bias' if piece == 'p' else '[0-9]+'})" if i % 2 else re.escape(piece)
                for i, piece in enumerate(pieces)
            )
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


def _loop(rule: Rule, loops: Mapping[str, str | int], dims: Dims) -> Iterator[dict[str, int]]:
    """Every assignment of the rule's loop variables, on top of the map's dimensions."""
    try:
        bounds = [evaluate(str(bound), dims) for bound in loops.values()]
    except (KeyError, ValueError, SyntaxError) as error:
        raise TableError(f"{rule}: a loop's bound cannot be computed: {error}") from error
    for values in product(*(range(bound) for bound in bounds)):
        yield {**dims, **dict(zip(loops, values, strict=True))}


def _expand(rule: Rule, template: str, values: Mapping[str, int]) -> str:
    """Replace the holes whose variables are bound; leave the captures."""

    def fill(match: re.Match[str]) -> str:
        expression = match.group(1)
        if expression.isidentifier() and expression not in values:
            return match.group(0)
        try:
            return str(evaluate(expression, values))
        except (KeyError, ValueError, SyntaxError) as error:
            raise TableError(f"{rule}: cannot compute {{{expression}}}: {error}") from error

    return _HOLE.sub(fill, template)


def _substitute(template: str, captures: Mapping[str, str]) -> str:
    return _HOLE.sub(lambda match: captures[match.group(1)], template)
