"""Which parameters of a model the modules of a LoRA are: their names come out of the tables that load checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from nativesd.config import Config, TextEncoderConfig, UNetConfig
from nativesd.errors import WeightsError
from nativesd.weights.formats.header import TensorInfo
from nativesd.weights.lora.file import Group
from nativesd.weights.lora.parts import BIAS, DORA, dora_axis, product
from nativesd.weights.maps.keymap import KeyMap
from nativesd.weights.maps.lora_names import PARTS
from nativesd.weights.maps.plan import unfit
from nativesd.weights.maps.rules import Shape, Source
from nativesd.weights.maps.templates import TableError


@dataclass(frozen=True)
class Target:
    """A parameter of ours that a module's weight or bias fills, or that is a part of it."""

    parameter: str
    shape: Shape
    source: Source

    @property
    def published(self) -> Shape:
        """The shape of the module's tensor."""
        return self.source.published_shape(self.shape)


MAX_ALPHA = 65504.0
"""The largest number in half precision, in which most files keep it."""
Module = Mapping[str, Sequence[Target]]
""""weight" and "bias" -> what they fill."""


@dataclass(frozen=True)
class Place:
    """A component that LoRAs can change: the shapes of its parameters, and the tables that name them."""

    config: Config
    shapes: Mapping[str, Shape]
    tables: Mapping[str, KeyMap]

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """Every module by every name that a layout has for it, with dots and with underscores.

        Raises TableError where two modules get one name.
        """
        kind = "text_encoder" if isinstance(self.config, TextEncoderConfig) else "unet"
        out: dict[str, Module] = {}
        for table in self.tables.values():
            dims = _dims(self.config)
            if table.component != kind or not table.rules or (table.probes and dims is None):
                continue
            for name, module in _modules(table, dims or {}, self.shapes):
                for spelling in {name, name.replace(".", "_")}:
                    known = out.setdefault(spelling, module)
                    if known is not module and _filled(known) != _filled(module):
                        raise TableError(f"{table.name} and another table call two modules {spelling}")
        return out


def _dims(config: Config) -> Mapping[str, int | tuple[int, ...]] | None:
    """What counting layouts need to know; None where they cannot state the model."""
    try:
        return config.dims if isinstance(config, UNetConfig) else None
    except ValueError:
        return None


def _modules(
    table: KeyMap, dims: Mapping[str, int | tuple[int, ...]], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Module]]:
    """The modules of one layout, in its words: under each of its prefixes."""
    first, *others = table.prefixes
    own = _prefixed(table, dims, first, shapes)
    yield from own.items()
    for prefix in others:
        if all(name.startswith(first) for name in own):  # a tenth of the time of looking them all up again
            yield from ((prefix + name[len(first) :], module) for name, module in own.items())
        else:  # some stand beside the prefix
            yield from _prefixed(table, dims, prefix, shapes).items()


def _prefixed(
    table: KeyMap, dims: Mapping[str, int | tuple[int, ...]], prefix: str, shapes: Mapping[str, Shape]
) -> dict[str, dict[str, list[Target]]]:
    """The modules of one layout under one prefix."""
    bound = table.bind(dims, prefix)
    out: dict[str, dict[str, list[Target]]] = {}
    for name, shape in shapes.items():
        source = bound.source(name)
        match = _TENSOR.fullmatch(source.keys[0]) if source is not None and len(source.keys) == 1 else None
        if source is not None and match is not None:
            out.setdefault(match[1], {}).setdefault(match[2], []).append(Target(name, shape, source))
    return out


_TENSOR = re.compile(r"(.+)[._](weight|bias)")


def _filled(module: Module) -> set[tuple[str, str, int]]:
    """What a module's tensors fill, and how."""
    return {(t.parameter, t.source.rule.op, t.source.part) for targets in module.values() for t in targets}


@dataclass(frozen=True)
class Change:
    """What a LoRA does to one parameter: `kind` in words, and its keys by the part they play."""

    component: str
    target: Target
    kind: str
    keys: Mapping[str, str]
    rank: int | None
    stated: float | None = None
    """The scale by peft's settings"""

    @property
    def unscaled(self) -> bool:
        """Whether nothing says its scale, which is 1 then."""
        return "alpha" not in self.keys and self.stated is None

    def scale(self, alpha: float | None) -> float:
        """What the product of the parts is multiplied with. Raises WeightsError for an alpha that none can be."""
        if alpha is not None:
            if not is_alpha(alpha):
                raise WeightsError(f"{self.keys['alpha']} of a LoRA is {alpha:g}: get the file again")
            return 1.0 if self.rank is None else alpha / self.rank
        return 1.0 if self.stated is None else self.stated


def is_alpha(number: float) -> bool:
    """Whether a number can be an alpha: published ones are of the size of the rank."""
    return abs(number) <= MAX_ALPHA


def place(
    groups: Sequence[Group], tensors: Mapping[str, TensorInfo], places: Mapping[str, Place]
) -> tuple[list[Change], dict[str, str]]:
    """The changes that the groups make in a model's components, and the keys without a place, with the reasons."""
    out: list[Change] = []
    unplaced: dict[str, str] = {}
    claimed: dict[tuple[str, str], str] = {}
    scaled = {group.components for group in groups if "alpha" in group.keys}
    for group in groups:
        try:
            changes = _changes(group, tensors, places)
            for change in changes:
                if first := claimed.get((change.component, change.target.parameter)):
                    raise ValueError(f"{first} already changes {change.component} {change.target.parameter}")
                if change.rank is not None and change.unscaled and group.components in scaled:
                    raise ValueError("it has no alpha, which others have: its scale is not known")
        except ValueError as error:
            unplaced |= dict.fromkeys(group.keys.values(), str(error))
            continue
        out += changes
        for change in changes:
            claimed[change.component, change.target.parameter] = next(iter(change.keys.values()))
    return out, unplaced


def _changes(group: Group, tensors: Mapping[str, TensorInfo], places: Mapping[str, Place]) -> list[Change]:
    """The changes of one group, in the first component whose module of this name it fits. Raises ValueError."""
    there = [name for name in group.components if name in places]
    if not there:
        raise ValueError(f"the model has no {' and no '.join(group.components)}")
    named = [name for name in there if group.module in places[name].modules]
    if not named:
        raise ValueError(f"the {' or the '.join(there)} has no module of this name")
    faults: list[ValueError] = []
    for name in named:
        try:
            return _fit(group, tensors, name, places[name].modules[group.module])
        except ValueError as error:
            faults.append(error)
    raise faults[0]


def _fit(group: Group, tensors: Mapping[str, TensorInfo], component: str, module: Module) -> list[Change]:
    """The changes of one group in its module. Raises ValueError where its parts do not fit it or each other."""
    keys, out = dict(group.keys), []
    for part, key in keys.items():
        if (part != "alpha" or tensors[key].dtype == "BOOL") and (reason := unfit(tensors[key].dtype)):
            raise ValueError(f"its {PARTS[part]} is {tensors[key].dtype}: {reason}")
    shapes = {key: tensors[key].shape for key in keys.values()}
    for part in [part for part in BIAS if part in keys]:
        key = keys.pop(part)
        if not module.get("bias"):
            raise ValueError("the module has no bias")
        for target in module["bias"]:
            _same(shapes[key], target.published)
            out.append(Change(component, target, BIAS[part], {part: key}, None))
    if not keys:
        return out
    if not module.get("weight"):
        raise ValueError("the module has no weight")
    kind, rows, columns, rank = product({part: shapes[key] for part, key in keys.items()})
    stated = None if group.stated is None else group.stated.scale(group.module, rank)
    for target in module["weight"]:
        published = target.published
        if kind.endswith("difference"):
            [whole] = keys.values()
            _same(shapes[whole], published)
        elif len(published) < 2 or (rows, columns) != (published[0], math.prod(published[1:])):
            raise ValueError(f"its parts make a matrix {rows} x {columns}, the module's weight is {list(published)}")
        elif kind == "LoRA" and (math.prod(published[2:]) > 1 or "mid" in keys):
            kind = "LoCon"
        for part in DORA:
            if part in keys and target.source.rule.op not in ("copy", "conv1x1"):
                raise ValueError("DoRA of a matrix that is several in one here, or transposed")
            if part in keys:
                dora_axis(part, shapes[keys[part]], published)
        full = f"DoRA on {kind}" if set(DORA) & set(keys) else kind
        out.append(Change(component, target, full, keys, rank, stated))
    return out


def _same(shape: Shape, published: Shape) -> None:
    """Check that two shapes differ by trailing ones at most. Raises ValueError."""
    if math.prod(shape) != math.prod(published) or shape[: len(published)] != published[: len(shape)]:
        raise ValueError(f"it is {list(shape)}, the module's tensor is {list(published)}")


def context(groups: Iterable[Group], tensors: Mapping[str, TensorInfo]) -> int | None:
    """The width of the text's embedding that a LoRA was made for, by its cross-attentions; None where it has none."""
    for group in groups:
        if re.fullmatch(r".*attn2[._]to_[kv]", group.module):
            try:
                return product({part: tensors[key].shape for part, key in group.keys.items() if part not in BIAS})[2]
            except ValueError:
                continue
    return None
