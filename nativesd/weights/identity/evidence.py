"""Conclusions about a component, and how they are drawn from names and shapes: by the majority's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nativesd.weights.maps.rules import Shape

Parameters = Mapping[str, Shape]


@dataclass(frozen=True)
class Evidence:
    """One conclusion about a component and why. `determined` is false for a default that the file neither supports
    nor contradicts; `override` says how to choose otherwise."""

    what: str
    value: str
    why: str
    determined: bool = True
    override: str = ""


def most(values: Iterable[int], default: int) -> int:
    """The commonest value (the first of equals), or `default` where there are none."""
    counts = Counter(values)
    return max(counts, key=counts.__getitem__) if counts else default


def present(parameters: Parameters, pattern: str, needed: int) -> set[tuple[int, ...]]:
    """The numbers that stand for the pattern's groups in at least `needed` names: fewer are a fault, no module."""
    counts: Counter[tuple[int, ...]] = Counter()
    compiled = re.compile(pattern)
    for name in parameters:
        if match := compiled.match(name):
            counts[tuple(int(group or 0) for group in match.groups())] += 1
    return {numbers for numbers, count in counts.items() if count >= needed}


def shapes_of(parameters: Parameters, pattern: str, rank: int) -> list[Shape]:
    """The shapes of that rank of all parameters whose name the pattern matches; not those without numbers, which tell
    nothing."""
    compiled = re.compile(pattern)
    named = (shape for name, shape in parameters.items() if compiled.fullmatch(name))
    return [shape for shape in named if len(shape) == rank and 0 not in shape]


def count(indices: Iterable[int]) -> int:
    """How many there are from 0 on without a gap."""
    present, count = set(indices), 0
    while count in present:
        count += 1
    return count
