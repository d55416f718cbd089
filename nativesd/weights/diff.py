"""Two checkpoints compared through their maps: by the parameters they fill, not by the names they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from nativesd.errors import UsageError
from nativesd.weights.checkpoint import apply
from nativesd.weights.files.source import Member
from nativesd.weights.files.tensors import read_tensor
from nativesd.weights.identity.identify import Component, Identity
from nativesd.weights.maps.rules import Rule, Shape, Source
from nativesd.weights.report import as_json

SCHEMA = 1
"""Version of `DiffReport.to_json`'s schema."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of ours in a checkpoint."""

    member: Member
    source: Source

    @property
    def keys(self) -> tuple[str, ...]:
        """The names it has there."""
        return self.source.keys

    @property
    def shape(self) -> Shape | None:
        """The shape its keys give."""
        return self.source.shape({key: self.member.tensors[key].shape for key in self.keys})

    @property
    def dtype(self) -> str:
        """As the format names it."""
        return self.member.tensors[self.keys[0]].dtype


@dataclass(frozen=True)
class Difference:
    """A parameter that is not the same in both. `first` and `second` say what each has; `maximum` is
    max|first - second|, where values were compared."""

    parameter: str
    kind: str
    """only in first, only in second, shape, dtype, values"""
    first: str
    second: str
    maximum: float | None = None


@dataclass(frozen=True, repr=False)
class DiffReport:
    """What two checkpoints differ in; `same` parameters are equal in everything that was compared: shapes and dtypes,
    and `values` too, or not."""

    first: str
    second: str
    same: int
    values: bool
    differences: tuple[Difference, ...]
    unused: tuple[Difference, ...] = ()
    """Keys that only one of them has and no model needs, with the reasons: they count as no difference."""

    def __repr__(self) -> str:
        found = f"{self.same} parameters are the same, {len(self.differences)} differ"
        return f"<DiffReport {self.first}, {self.second}: {found}>"

    @property
    def ok(self) -> bool:
        """Whether they differ in nothing."""
        return not self.differences

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report under the names of its fields, with the schema's version."""
        return as_json({"schema": SCHEMA, "ok": self.ok, **asdict(self)}, indent=indent)


def parameters(member: Member, component: Component) -> dict[str, Parameter]:
    """Every parameter of ours that a component's keys give; for a layout without module, the keys themselves."""
    if component.config is None:
        table = component.found.table
        named = {key: table.describe(key) for key in component.found.keys}
        return {name or key: Parameter(member, Source((key,), NO_RULE)) for key, name in named.items()}
    return {
        name: Parameter(member, source)
        for key in component.found.keys
        for name, source in component.found.table.parameters(key)
        if len(source.rule.theirs) == 1
    }


NO_RULE = Rule("", 0, ("",), ("",), "copy")


def unmapped(member: Member, identity: Identity) -> tuple[dict[str, Parameter], dict[str, str]]:
    """The keys of a checkpoint that fill no parameter: those that nothing knows, and with reasons those not needed."""
    unused, unknown = dict(identity.ignored), list(identity.unrecognised)
    for component in identity.components:
        table = component.found.table
        for key in component.found.keys if component.config is not None else ():
            if not table.parameters(key):
                reason = table.reason_to_ignore(key)
                if reason is None:
                    unknown.append(key)
                else:
                    unused[key] = reason
    return {key: Parameter(member, Source((key,), NO_RULE)) for key in unknown}, unused


def compare_parameters(
    first: str,
    second: str,
    ours: Mapping[str, Parameter],
    theirs: Mapping[str, Parameter],
    *,
    values: bool,
    unused: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> DiffReport:
    """Compare two sets of parameters by name; `unused` are the keys of either with the reasons why none needs them.

    Raises UsageError where values are asked of a remote source.
    """
    if values and any(not side.member.files for side in (*ours.values(), *theirs.values())):
        raise UsageError("values can be compared of local checkpoints only: download the other one first")
    differences, same = [], 0
    for name in sorted(ours.keys() | theirs.keys()):
        found = _difference(name, ours.get(name), theirs.get(name), values=values)
        same += not found
        differences += found
    one, two = unused
    alone = [Difference(key, "only in first", key, one[key]) for key in one if key not in two]
    alone += [Difference(key, "only in second", two[key], key) for key in two if key not in one]
    return DiffReport(first, second, same, values, tuple(differences), tuple(alone))


def _difference(name: str, a: Parameter | None, b: Parameter | None, *, values: bool) -> list[Difference]:
    if a is None or b is None:
        kind = "only in second" if a is None else "only in first"
        first, second = (" + ".join(side.keys) if side else "" for side in (a, b))
        return [Difference(name, kind, first, second)]
    if a.shape != b.shape:
        return [Difference(name, "shape", str(list(a.shape or ())), str(list(b.shape or ())))]
    out = []
    if a.dtype != b.dtype:
        out.append(Difference(name, "dtype", a.dtype, b.dtype))
    if values:
        one, two = (apply([read_tensor(s.member, key) for key in s.keys], s.source).double() for s in (a, b))
        maximum = float((one - two).abs().max()) if one.numel() else 0.0
        if maximum != 0:  # NaN is a difference too
            out.append(Difference(name, "values", " + ".join(a.keys), " + ".join(b.keys), maximum))
    return out
