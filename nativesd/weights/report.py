"""What an audit says of a source: a record for every component, with what becomes of each of its keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nativesd.errors import printable
from nativesd.weights.identity.evidence import Evidence
from nativesd.weights.maps.rules import Shape
from nativesd.weights.names import grouped

SCHEMA = 2
"""Version of `AuditReport.to_json`'s schema; it counts up when a name changes its meaning or goes away."""


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
    unused: str = ""
    """What is said where nothing loads it yet."""
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
        return [printable(line) for line in lines]

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
                own = [printable(f"{len(findings)} {kind}: {names}")]
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

    @property
    def lacks(self) -> tuple[str, ...]:
        """What a model lacks for a picture, as the options of `load` that bring it."""
        return lacking([component.name for component in self.components], self.family)

    def to_json(self, *, mapped: bool = False, indent: int | None = 2) -> str:
        """The report under the names of its fields, with the schema's version. Ignored and findings are lists of
        objects; shapes are lists of integers. How many parameters are found is a number, `found`; with `mapped` they
        are listed too.
        """
        data: dict[str, Any] = {"schema": SCHEMA, "source": self.source, "ok": self.ok, "family": self.family}
        data["components"] = [_fields(component, mapped=mapped) for component in self.components]
        return as_json(data, indent=indent)

    def trace(self, name: str) -> list[str]:
        """How keys and parameters of ours are mapped, one line for each: those of that name, else those that have it
        in theirs."""
        exact = [line for component in self.components for line in _trace(component, name.__eq__)]
        return exact or [line for component in self.components for line in _trace(component, lambda n: name in n)]


def as_json(data: Mapping[str, Any], *, indent: int | None) -> str:
    """JSON that is readable in any language, and in which what is not printable is escaped."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def lacking(names: Sequence[str], family: str) -> tuple[str, ...]:
    """The options that bring what components with a UNet among them lack for a picture."""
    if "unet" not in names:
        return ()
    encoders = 2 if family.startswith("SDXL") and "refiner" not in family else 1
    out = [] if {"vae", "tiny_vae"} & set(names) else ["vae"]
    return (*out, *(["text_encoders"] if sum(name.startswith("text_encoder") for name in names) < encoders else []))


def _fields(component: ComponentReport, *, mapped: bool) -> dict[str, Any]:
    """A component for JSON."""
    fields = asdict(component if mapped else replace(component, mapped=()))
    if not mapped:
        del fields["mapped"]
    return {**fields, "found": len(component.mapped), "ok": component.ok}


def _trace(component: ComponentReport, is_meant: Callable[[str], bool]) -> Iterable[str]:
    for m in component.mapped:
        if any(map(is_meant, (m.parameter, *m.keys))):
            rule = f"{m.table} rule {m.rule}" if m.rule else m.table
            yield f"{' + '.join(m.keys)} -> {rule} -> {m.operation} -> {component.name} {m.parameter} {list(m.shape)}"
    for i in component.ignored:
        if is_meant(i.key):
            yield f"{i.key} -> ignored: {i.reason}"
    for line, names in zip(component.problems(), _problem_names(component), strict=True):
        if any(map(is_meant, names)):
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
