"""What becomes of every tensor of a checkpoint: the plan that the loader executes and the audit prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nativesd.weights.formats.scaled import FAULTS
from nativesd.weights.maps.keymap import BoundMap
from nativesd.weights.maps.rules import Shape, Source


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
    wrong_shape: dict[str, Source] = field(default_factory=dict)
    """parameter -> its source, which gives another shape than the model has"""
    quantised: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """key -> the parameters that it would be, were its dtype one of weights (`unfit`)"""

    @property
    def whole(self) -> bool:
        """Whether every key and every parameter has its place."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.duplicate or self.quantised)


INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}
QUANTISED = INTEGERS | {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
"""The dtypes of quantised weights, whose numbers mean nothing without a scale."""


def unfit(dtype: str) -> str | None:
    """Why numbers of a dtype, as the format names it, are no weights; None where they are."""
    if dtype == "C64":
        return "complex numbers, which no weight has"
    if (fault := FAULTS.get(dtype.partition(" ")[2])) is not None:
        return fault
    return "a quantised weight, whose scale is not known" if dtype in QUANTISED else None


def make_plan(
    table: BoundMap, theirs: Mapping[str, Shape], ours: Mapping[str, Shape], dtypes: Mapping[str, str] | None = None
) -> Plan:
    """Assign a checkpoint's keys to a model's parameters, both given as name -> shape.

    `dtypes` of the keys, by the format's names: those that are `unfit` fill no parameter. Raises TableError.
    """
    plan = Plan()
    claims: dict[str, dict[int, list[tuple[str, Source]]]] = {}
    for key in theirs:
        found = table.parameters(key)
        if found and all(name in ours for name, _ in found):
            for name, source in found:
                index = source.part if source.rule.op == "concat" else 0
                claims.setdefault(name, {}).setdefault(index, []).append((key, source))
        elif (reason := table.reason_to_ignore(key)) is not None:
            plan.ignored[key] = reason
        else:
            plan.unexpected[key] = tuple(name for name, _ in found)
    for name, expected in ours.items():
        _settle(table, plan, name, expected, claims.get(name, {}), theirs)
    known = dtypes or {}
    for name, source in list(plan.sources.items()):
        for key in source.keys:
            if key in known and unfit(known[key]):
                plan.quantised[key] = (*plan.quantised.get(key, ()), name)
                plan.sources.pop(name, None)
    if any(not source.rule.written for source in plan.sources.values()):  # a file keeps to one spelling
        for name in plan.missing:
            if old := table.old_spelling(name):
                plan.missing[name] = old.keys
    return plan


def _settle(
    table: BoundMap,
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
        known = table.source(name)
        plan.missing[name] = () if known is None else tuple(key for key in known.keys if key not in theirs)
    elif len(every) > needed:
        plan.duplicate[name] = tuple(key for source in every for key in source.keys)
    else:
        first = every[0]
        source = Source(tuple(s.keys[0] for s in every), first.rule, first.part if needed == 1 else 0, first.parts)
        if source.shape(theirs) != expected:
            plan.wrong_shape[name] = source
        else:
            plan.sources[name] = source
