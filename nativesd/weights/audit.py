"""The audit: what every tensor of a checkpoint becomes and why it does not load, by the tables that the loader uses."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any

from nativesd.config import Config
from nativesd.weights.formats.header import TensorInfo
from nativesd.weights.maps.describe import Evidence
from nativesd.weights.maps.identify import Component, Identity
from nativesd.weights.maps.keymap import BoundMap
from nativesd.weights.maps.plan import make_plan
from nativesd.weights.maps.rules import Shape, Source
from nativesd.weights.maps.words import TABLE, find_words

SCHEMA = 1
"""Version of `AuditReport.to_json`'s schema; it counts up when a name changes its meaning or goes away."""

Expected = Callable[[Config], Mapping[str, Shape]]
"""The parameters of the module that a configuration describes, with their shapes."""


@dataclass(frozen=True)
class Mapped:
    """A parameter and the keys that fill it, by which rule of which table. `shape` is the parameter's."""

    parameter: str
    keys: tuple[str, ...]
    shape: Shape
    operation: str
    table: str
    rule: int


@dataclass(frozen=True)
class Ignored:
    """A key that nothing needs, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Missing:
    """A key that is not there, or several that one parameter is made of; `parameter` (several, joined by " + ", where
    the key is split) stays unfilled. `found` is an unexpected key that is near."""

    parameter: str
    shape: Shape
    expected: tuple[str, ...]
    found: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Unexpected:
    """A key that no parameter takes. `nearest` is the expected name that it resembles."""

    key: str
    shape: Shape
    dtype: str
    reason: str
    nearest: str = ""
    hint: str = ""


@dataclass(frozen=True)
class WrongShape:
    """A key of another shape than its parameter takes; both shapes as in the checkpoint's layout."""

    parameter: str
    keys: tuple[str, ...]
    shape: Shape
    expected: Shape
    table: str
    rule: int


@dataclass(frozen=True)
class Duplicate:
    """A parameter that several keys claim."""

    parameter: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ComponentReport:
    """One component: `tensors` keys with `parameters` numbers in them, `bytes` long; and what becomes of every key."""

    name: str
    family: str
    layout: str
    prefix: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    expected: int
    """How many parameters the component's module has."""
    mapped: tuple[Mapped, ...]
    ignored: tuple[Ignored, ...]
    missing: tuple[Missing, ...]
    unexpected: tuple[Unexpected, ...]
    wrong_shape: tuple[WrongShape, ...]
    duplicate: tuple[Duplicate, ...]
    evidence: tuple[Evidence, ...] = ()
    unsupported: str = ""
    """What it is, where it is recognised and not supported: a phrase behind "this is"."""

    @property
    def ok(self) -> bool:
        """Whether there is no finding."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.duplicate or self.unsupported)

    def problems(self) -> list[str]:
        """One sentence for every finding."""
        lines = [f"this is {self.unsupported}"] if self.unsupported else []
        lines += [
            f"missing {m.parameter}: expected as {' + '.join(m.expected) or 'nothing any rule names'}"
            + (f"; {m.found} is there: {m.hint}" if m.found else "")
            for m in self.missing
        ]
        lines += [f"unexpected {u.key}: {u.reason}" for u in self.unexpected]
        lines += [
            f"wrong shape {w.parameter}: the model takes {list(w.expected)}, {' + '.join(w.keys)} has {list(w.shape)} "
            f"({w.table} rule {w.rule})"
            for w in self.wrong_shape
        ]
        lines += [f"duplicate {d.parameter}: claimed by {', '.join(d.keys)}" for d in self.duplicate]
        return lines

    def short_problems(self, limit: int = 5) -> list[str]:
        """`problems`, but of a kind with more than `limit` findings the number, and their names by what they begin
        with."""
        every, out = self.problems(), []
        kinds: list[tuple[str, Sequence[tuple[str, ...]]]] = [
            ("", ((),) if self.unsupported else ()),
            ("missing", [m.expected or (m.parameter,) for m in self.missing]),
            ("unexpected", [(u.key,) for u in self.unexpected]),
            ("of a wrong shape", [w.keys for w in self.wrong_shape]),
            ("claimed twice", [d.keys for d in self.duplicate]),
        ]
        for kind, findings in kinds:
            own, every = every[: len(findings)], every[len(findings) :]
            if len(findings) > limit:
                names = ", ".join(grouped((name for names in findings for name in names), limit))
                own = [f"{len(findings)} {kind}: {names}"]
            out += own
        return out


@dataclass(frozen=True, repr=False)
class AuditReport:
    """What is in a source. `ok`: no component has a finding."""

    source: str
    family: str
    components: tuple[ComponentReport, ...]

    def __repr__(self) -> str:
        names = ", ".join(component.name for component in self.components)
        return f"<AuditReport {self.source}: {names}; {'ok' if self.ok else 'with findings'}>"

    @property
    def ok(self) -> bool:
        """Whether there is no finding."""
        return all(component.ok for component in self.components)

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report under the names of its fields, with the schema's version. Mapped, ignored and findings are lists
        of objects; shapes are lists of integers."""
        data: dict[str, Any] = {"schema": SCHEMA, "source": self.source, "ok": self.ok, "family": self.family}
        data["components"] = [asdict(component) | {"ok": component.ok} for component in self.components]
        return json.dumps(data, indent=indent, ensure_ascii=False)

    def trace(self, name: str) -> list[str]:
        """How a key or a parameter of ours is mapped, one line for each way in which the name occurs."""
        return [line for component in self.components for line in _trace(component, name)]


def _trace(component: ComponentReport, name: str) -> Iterable[str]:
    for m in component.mapped:
        if name == m.parameter or name in m.keys:
            rule = f"{m.table} rule {m.rule}" if m.rule else m.table
            yield f"{' + '.join(m.keys)} -> {rule} -> {m.operation} -> {component.name} {m.parameter} {list(m.shape)}"
    for i in component.ignored:
        if name == i.key:
            yield f"{i.key} -> ignored: {i.reason}"
    for line, names in zip(component.problems(), _problem_names(component), strict=True):
        if name in names:
            yield line


def _problem_names(component: ComponentReport) -> list[tuple[str, ...]]:
    """Every name that each of `problems()` is about, in the same order."""
    return [
        *([()] if component.unsupported else []),
        *((m.parameter, *m.expected) for m in component.missing),
        *((u.key,) for u in component.unexpected),
        *((w.parameter, *w.keys) for w in component.wrong_shape),
        *((d.parameter, *d.keys) for d in component.duplicate),
    ]


def report_components(
    identity: Identity, tensors: Mapping[str, TensorInfo], expected: Expected
) -> list[ComponentReport]:
    """Compare every component of a checkpoint with its module, and account for every other key."""
    reports = [_report(component, tensors, expected) for component in identity.components]
    unknown = identity.unrecognised
    if identity.unsupported is not None:
        what = identity.unsupported
        reports.append(_beside(what.name, _sums(unknown, tensors), (), (), what.says))
        unknown = []
    if identity.ignored or unknown:
        unexpected = tuple(
            Unexpected(key, tensors[key].shape, tensors[key].dtype, "no component of any known layout has this name")
            for key in unknown
        )
        name = "beside the components" if reports else "unrecognised"
        ignored = tuple(Ignored(key, reason) for key, reason in identity.ignored.items())
        keys = [key for key in (*identity.ignored, *unknown) if key in tensors]  # a pickle's leavings are no tensors
        reports.append(_beside(name, _sums(keys, tensors), ignored, unexpected))
    return reports


def _beside(
    name: str,
    sums: dict[str, Any],
    ignored: tuple[Ignored, ...],
    unexpected: tuple[Unexpected, ...],
    unsupported: str = "",
) -> ComponentReport:
    """A report of keys that are no component."""
    return ComponentReport(
        name, "", "", "", **sums, expected=0, mapped=(), ignored=ignored, missing=(), unexpected=unexpected,
        wrong_shape=(), duplicate=(), unsupported=unsupported,
    )  # fmt: skip


def _sums(keys: Iterable[str], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The totals over some keys."""
    infos = [tensors[key] for key in keys]
    return {
        "tensors": len(infos),
        "parameters": sum(info.elements for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(Counter(info.dtype for info in infos).most_common()),
    }


def _report(component: Component, tensors: Mapping[str, TensorInfo], expected: Expected) -> ComponentReport:
    found, table = component.found, component.table
    sums = _sums(found.keys, tensors)
    head = (component.name, component.family, component.layout, found.prefix)
    if component.config is None:
        return _named(component, tensors, ComponentReport(
            *head, **sums, expected=0, mapped=(), ignored=(), missing=(), unexpected=(), wrong_shape=(), duplicate=(),
            evidence=component.evidence,
        ))  # fmt: skip
    return compare(
        table, {key: tensors[key] for key in found.keys}, expected(component.config), head, component.evidence
    )


def _named(component: Component, tensors: Mapping[str, TensorInfo], report: ComponentReport) -> ComponentReport:
    """The report of what has names and no module: what each key is, and of a textual inversion what cannot be read."""
    found, table = component.found, component.table
    words = None
    if component.name == TABLE:
        own = {key: tensors[key] for key in found.keys}
        shapes, dtypes = ({key: getattr(info, part) for key, info in own.items()} for part in ("shape", "dtype"))
        words = find_words(shapes, table.keymap, dtypes)
    faults = words.faults if words is not None else {}
    mapped = tuple(
        Mapped(meaning, (key,), tensors[key].shape, "name", table.keymap.name, 0)
        for key in found.keys
        if key not in faults and (meaning := table.describe(key)) is not None
    )
    ignored = {key: reason for key in found.keys if (reason := table.reason_to_ignore(key)) is not None}
    return replace(
        report,
        expected=len(mapped) + len(faults),
        mapped=mapped,
        ignored=tuple(Ignored(key, reason) for key, reason in ignored.items()),
        unexpected=tuple(
            Unexpected(key, tensors[key].shape, tensors[key].dtype, reason) for key, reason in faults.items()
        ),
    )


def compare(
    table: BoundMap,
    tensors: Mapping[str, TensorInfo],
    parameters: Mapping[str, Shape],
    head: tuple[str, str, str, str],
    evidence: tuple[Evidence, ...] = (),
) -> ComponentReport:
    """Account for every tensor and every parameter of one component; `head` is its name, family, layout and prefix."""
    shapes, dtypes = ({key: getattr(info, part) for key, info in tensors.items()} for part in ("shape", "dtype"))
    plan = make_plan(table, shapes, parameters, dtypes)
    near = nearest({key for keys in plan.missing.values() for key in keys}, plan.unexpected, table.words)
    back = {key: (name, hint) for name, (key, hint) in near.items()}
    missing: dict[tuple[str, ...], Missing] = {}
    for name, keys in plan.missing.items():
        found, hint = next((near[key] for key in keys if key in near), ("", ""))
        known = missing.get(keys) if keys else None
        joined = f"{known.parameter} + {name}" if known else name
        missing[keys or (name,)] = Missing(joined, parameters[name], keys, found, hint)
    wrong: dict[tuple[str, ...], WrongShape] = {}
    for name, source in plan.wrong_shape.items():
        joined = f"{wrong[source.keys].parameter} + {name}" if source.keys in wrong else name
        shape, wanted = tensors[source.keys[0]].shape, source.published_shape(parameters[name])
        wrong[source.keys] = WrongShape(joined, source.keys, shape, wanted, source.rule.table, source.rule.number)
    return ComponentReport(
        *head,
        **_sums(tensors, tensors),
        expected=len(parameters),
        mapped=tuple(_mapped(name, source, parameters[name]) for name, source in plan.sources.items()),
        ignored=tuple(Ignored(key, reason) for key, reason in plan.ignored.items()),
        missing=tuple(missing.values()),
        unexpected=tuple(
            Unexpected(
                key,
                tensors[key].shape,
                tensors[key].dtype,
                f"would be {', '.join(names)}, which this model lacks" if names else "no rule names it",
                *back.get(key, ("", "")),
            )
            for key, names in plan.unexpected.items()
        )
        + tuple(
            Unexpected(key, tensors[key].shape, tensors[key].dtype, "a quantised weight, whose scale is not known")
            for key in plan.quantised
        ),
        wrong_shape=tuple(wrong.values()),
        duplicate=tuple(Duplicate(name, keys) for name, keys in plan.duplicate.items()),
        evidence=evidence,
    )


def _mapped(name: str, source: Source, shape: Shape) -> Mapped:
    operation = source.rule.op
    part = f" {source.part + 1} of {source.parts}" if operation == "split" else ""
    return Mapped(name, source.keys, shape, operation + part, source.rule.table, source.rule.number)


def grouped(keys: Iterable[str], limit: int = 5) -> list[str]:
    """Names as few lines: each where there are few, else by what they begin with, as "prefix* (number)"."""
    keys = list(keys)
    if len(keys) <= limit:
        return keys
    pieces = {key: _PIECE.findall(key) for key in keys}
    for depth in range(1, 8):
        finer: dict[str, list[str]] = {}
        for key in keys:
            finer.setdefault("".join(pieces[key][:depth]), []).append(key)
        if depth > 1 and len(finer) > limit:
            break
        groups = finer
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    lines = [f"{start}* ({len(members)})" if len(members) > 1 else members[0] for start, members in ordered]
    if len(lines) > limit:
        rest = sum(len(members) for _, members in ordered[limit - 1 :])
        lines = [*lines[: limit - 1], f"{rest} others"]
    return lines


_PIECE = re.compile(r"[^._:/]*[._:/]?|.+")
"""A part of a name, with what ends it."""


def nearest(
    expected: Iterable[str], unexpected: Iterable[str], words: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """expected name -> (the unexpected one that is probably meant, in which way); each is used once.

    A name with something before it is told from a misspelt one; misspellings are looked for among names that have most
    of their parts in common. A number, or one of the layout's own `words`, is no misspelling of another: `to_v` is not
    meant where `proj_out` is missing.
    """
    out: dict[str, tuple[str, str]] = {}
    left = dict.fromkeys(unexpected)
    by_tail: dict[str, list[str]] = {}
    for key in left:
        by_tail.setdefault(_tail(key), []).append(key)
    for name in expected:
        for key in by_tail.get(_tail(name), ()):
            if key in left and (key.endswith("." + name) or name.endswith("." + key)):
                extra = key.removesuffix(name) or name.removesuffix(key)
                out[name] = key, f"{'an additional' if len(key) > len(name) else 'without the'} prefix {extra}"
                del left[key]
                break
    parts = {key: _parts(key) for key in left}
    for name in sorted(set(expected) - set(out)):
        own = _parts(name)
        similar = [key for key in left if len(parts[key] ^ own) <= 2 and not _other(parts[key] - own, words)]
        for key in get_close_matches(name, similar, n=1, cutoff=0.8):
            out[name] = key, "a misspelling?"
            del left[key]
    return out


def _other(parts: Iterable[tuple[int, str]], words: Collection[str]) -> bool:
    """Whether what a name differs by says something else, and is not misspelt."""
    return any(word in words or word.isdecimal() for _, word in parts)


def _tail(name: str) -> str:
    return name.rpartition(".")[2] if name.count(".") < 1 else ".".join(name.rsplit(".", 2)[-2:])


def _parts(name: str) -> frozenset[tuple[int, str]]:
    return frozenset(enumerate(name.split(".")))
