"""Tensors to be written, in any published layout, each made when its turn comes: a file's size does not matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nativesd.errors import WeightsError
from nativesd.weights.checkpoint import apply, revert
from nativesd.weights.files.source import Member
from nativesd.weights.files.tensors import DTYPES, flow_tensor, flows, read_tensor
from nativesd.weights.formats.scaled import MARK, SCALE, WEIGHT
from nativesd.weights.identity.identify import Component
from nativesd.weights.maps.keymap import BoundMap
from nativesd.weights.maps.plan import make_plan
from nativesd.weights.maps.rules import Shape, Source

PIECE = 1 << 20  # numbers that are computed at once: few enough for the processor's caches, many enough for threads
Flow = Callable[[], Iterator[Tensor]]
"""Makes a tensor's numbers (n,) in pieces of PIECE (fewer at an end), each good until the next is asked for."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its dtype and shape, known beforehand, and the function that makes it.

    flow  makes the same piece by piece, where that can be: memory that is used again and again costs a fraction of new
    """

    dtype: torch.dtype
    shape: Shape
    make: Callable[[], Tensor]
    flow: Flow | None = None

    @classmethod
    def of(cls, dtype: torch.dtype, shape: Shape, flow: Flow) -> Entry:
        """A tensor that is made by its flow alone."""

        def make() -> Tensor:
            out, at = torch.empty(shape, dtype=dtype), 0
            for piece in flow():
                out.view(-1)[at : at + len(piece)] = piece
                at += len(piece)
            return out

        return cls(dtype, shape, make, flow)

    def pieces(self) -> Iterator[Tensor]:
        """Its numbers (n,), by its flow or of the whole."""
        return iter(torch.split(self.make().flatten(), PIECE)) if self.flow is None else self.flow()


def each(
    dtype: torch.dtype, shape: Shape, entries: Sequence[Entry], function: Callable[[Sequence[Tensor]], Tensor]
) -> Entry:
    """A tensor whose every number comes of those in its place in others of as many numbers."""

    def flow() -> Iterator[Tensor]:
        return map(function, zip(*(entry.pieces() for entry in entries), strict=True))

    return Entry.of(dtype, shape, flow)


def stored_parameters(
    member: Member, component: Component, expected: Mapping[str, Shape]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """A component's parameters under our names, as they are stored, and the keys left out with their reasons.

    Raises WeightsError where the component is not whole, or torch cannot hold a tensor of it.
    """
    own = {key: member.tensors[key] for key in component.found.keys}
    shapes, dtypes = {key: info.shape for key, info in own.items()}, {key: info.dtype for key, info in own.items()}
    plan = make_plan(component.table, shapes, expected, dtypes)
    if not plan.whole:
        raise WeightsError(f"the {component.name} does not load as it is, so it cannot be converted: see its audit")
    return {name: _stored(member, source, expected[name]) for name, source in plan.sources.items()}, plan.ignored


def _stored(member: Member, source: Source, shape: Shape) -> Entry:
    first, op, flow = source.keys[0], source.rule.op, None
    if op in ("copy", "conv1x1", "split") and flows(member.tensors[first]):
        flow = partial(flow_tensor, member, first, PIECE, source.part, source.parts)
    return Entry(stored_dtype(member, first), shape, partial(_read, member, source), flow)


def as_it_is(member: Member, key: str) -> Entry:
    """A tensor of a checkpoint. Raises WeightsError for what torch cannot hold."""
    flow = partial(flow_tensor, member, key, PIECE) if flows(member.tensors[key]) else None
    return Entry(stored_dtype(member, key), member.shapes[key], partial(read_tensor, member, key), flow)


def stored_dtype(member: Member, key: str) -> torch.dtype:
    """The dtype in which a tensor is read. Raises WeightsError for what torch cannot hold."""
    info = member.tensors[key]
    if info.dtype not in DTYPES:
        raise WeightsError(f"{key} has the dtype {info.dtype}, which torch cannot hold: nothing is written")
    return DTYPES[info.dtype]


def _read(member: Member, source: Source) -> Tensor:
    return apply([read_tensor(member, key) for key in source.keys], source)


def laid_out(
    named: Mapping[str, Entry], component: str, target: BoundMap, dtype: torch.dtype | None = None
) -> dict[str, Entry]:
    """What parameters under our names are in the target's layout.

    Floating-point tensors become `dtype`, where one is given. Raises WeightsError where the target's layout has no name
    for a part of the `component`.
    """
    groups: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    for name in named:
        source = target.source(name)
        if source is None:
            raise WeightsError(f"the {component}'s {name} has no name in {target.keymap.name}: nothing is written")
        groups.setdefault(source.keys, []).append((source.part, name))
    out: dict[str, Entry] = {}
    for (key,), parts in groups.items():  # no table writes several keys from one parameter
        entries = [named[name] for _, name in sorted(parts)]
        source = target.source(parts[0][1])
        assert source is not None  # found above
        first = entries[0]
        kind = dtype if dtype is not None and first.dtype.is_floating_point else first.dtype
        flow = None if source.rule.op in ("transpose", "concat") else partial(_flow, entries, kind, key)
        out[key] = Entry(kind, source.published_shape(first.shape), partial(_make, entries, source, kind), flow)
    return out


def _make(entries: list[Entry], target: Source, dtype: torch.dtype) -> Tensor:
    """One published tensor from the parameters that it is made of."""
    [tensor] = revert([entry.make() for entry in entries], target)
    return cast_finite(tensor, dtype, target.keys[0])


def _flow(entries: list[Entry], dtype: torch.dtype, key: str) -> Iterator[Tensor]:
    """The same of parameters that stand in it one after the other."""
    for entry in entries:
        for piece in entry.pieces():
            out = piece.to(dtype)
            if out is not piece and not is_finite(out):
                cast_finite(entry.make(), dtype, key)  # refuses, or the numbers were not finite before
            yield out


def is_finite(tensor: Tensor) -> bool:
    """Whether all its numbers are."""
    if tensor.dtype not in SUMMED:
        tensor = tensor.float()
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())  # a sum is cheaper, and may be inf


SUMMED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""What torch sums up in float32 or more, without a copy."""


def cast_finite(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """`tensor` in another dtype. Raises WeightsError where finite numbers would become infinite."""
    out = tensor.to(dtype)
    if out is not tensor and not is_finite(out) and is_finite(tensor):
        largest = float(tensor.abs().max())
        raise WeightsError(
            f"{key} has numbers up to {largest:.3g}, which {str(dtype)[6:]} cannot hold: nothing is written; choose "
            "another dtype"
        )
    return out


def to_quantise(entry: Entry, key: str) -> Tensor:
    """A tensor that becomes few bits. Raises WeightsError for numbers that are not finite: integers have no such, and a
    scale made of them spoils or hides all that share it."""
    tensor = entry.make()
    if not is_finite(tensor):
        raise WeightsError(
            f"{key} has numbers that are not finite (NaN or infinite), of which nothing can be quantised: nothing is "
            "written; get the file again, or take another"
        )
    return tensor


def in_scaled_float8(tensors: Mapping[str, Entry], part: str) -> dict[str, Entry]:
    """What a file has whose matrices below the prefix `part` are in float8 (e4m3fn), as ComfyUI writes it.

    Each has a scale beside it, by which its largest number becomes float8's largest, and the part has its mark, which
    asks for products in full precision. Other tensors of more than one dimension are float16, vectors as they are.
    Making one raises WeightsError for numbers that are not finite.
    """
    out: dict[str, Entry] = {}
    for key, entry in tensors.items():
        if not entry.dtype.is_floating_point or len(entry.shape) < 2:
            out[key] = entry
        elif len(entry.shape) == 2 and key.startswith(part) and key.endswith(WEIGHT):
            out[key] = Entry(torch.float8_e4m3fn, entry.shape, partial(_scaled, entry, key))
            out[key.removesuffix(WEIGHT) + SCALE] = Entry(torch.float32, (), partial(_scale, entry, key))
        else:
            out[key] = Entry(torch.float16, entry.shape, partial(_halved, entry, key))
    out[part + MARK] = Entry(torch.float8_e4m3fn, (2,), partial(torch.zeros, 2, dtype=torch.float8_e4m3fn))
    return out


def _scale(entry: Entry, key: str) -> Tensor:
    return _scale_of(to_quantise(entry, key))


def _scaled(entry: Entry, key: str) -> Tensor:
    tensor = to_quantise(entry, key)
    return (tensor.float() / _scale_of(tensor)).to(torch.float8_e4m3fn)


def _scale_of(tensor: Tensor) -> Tensor:
    largest = tensor.abs().amax().float()
    return torch.where(largest == 0, 1.0, largest / torch.finfo(torch.float8_e4m3fn).max)


def _halved(entry: Entry, key: str) -> Tensor:
    return cast_finite(entry.make(), torch.float16, key)
