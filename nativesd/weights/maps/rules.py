"""What a table's rule says: which published names fill which parameter of ours, and how. Shapes are tuples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nativesd.weights.maps.grammar import Op

Shape = tuple[int, ...]


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
        sides = f"{' + '.join(self.theirs)} <-> {' + '.join(self.ours)}"
        return f"{self.table} rule {self.number}: {sides if len(sides) <= 250 else f'{sides[:250]}...'}"


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
