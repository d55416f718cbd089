"""Safetensors files into a module: checked against the weight map, then assigned tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nativesd.errors import SourceError, WeightsError
from nativesd.weights.audit import compare
from nativesd.weights.files.source import Member
from nativesd.weights.maps.identify import Component
from nativesd.weights.maps.keymap import BoundMap, Shape, Source
from nativesd.weights.maps.plan import make_plan

PIECE = 4 << 20  # bytes: many enough for the calls, few enough for the cache


def fill(module: nn.Module, member: Member, component: Component, *, device: torch.device, dtype: torch.dtype) -> None:
    """Fill `module`, built on the meta device, with one component of a checkpoint.

    Tensors whose dtype and device already fit are mapped from the file, not read; others are read one by one, on a CPU
    piece by piece, into the same buffer and converted from there, so that one copy of the weights is in memory at most.
    Raises SourceError for a file that cannot be read and WeightsError, naming every tensor and the rule concerned,
    before anything is assigned.
    """
    expected: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    table, tensors = component.table, {key: member.tensors[key] for key in component.found.keys}
    head = (component.name, component.family, component.layout, component.found.prefix)
    plan = make_plan(table, {key: info.shape for key, info in tensors.items()}, expected)
    if problems := compare(table, tensors, expected, head).problems():
        where = " and ".join(sorted({str(member.files[key]) for key in tensors}))
        raise WeightsError(
            f"{where} does not fit the {component.name} ({len(plan.sources)} of {len(expected)} parameters found):\n  "
            + "\n  ".join(problems)
        )
    with ExitStack() as stack:
        paths = {member.files[key] for key in tensors}
        mapped = {path: stack.enter_context(open_tensors(path)) for path in paths}
        files = {path: stack.enter_context(path.open("rb")) for path in paths}
        largest = max((info.nbytes for info in tensors.values()), default=0)
        buffer = torch.empty(largest, dtype=torch.uint8, pin_memory=device.type == "cuda")

        def get(key: str, source: Source) -> Tensor:
            """A tensor, in the buffer only where it is alone and about to be copied."""
            path = member.files[key]
            if device.type == "cpu" and tensors[key].dtype == NAMES[dtype]:
                return cast(Tensor, mapped[path].get_tensor(key))
            if len(source.keys) > 1:
                return read_tensor(member, key)
            if device.type == "cpu" and source.rule.op != "split":  # of which a part would keep the whole
                return _read_as(dtype, member, key, files[path], buffer)
            return _read(member, key, files[path], buffer)

        filled = {
            name: apply([get(key, source) for key in source.keys], source).to(device=device, dtype=dtype)
            for name, source in plan.sources.items()
        }
    module.requires_grad_(False)
    module.load_state_dict(filled, assign=True)


def apply(tensors: Sequence[Tensor], source: Source) -> Tensor:
    """The parameter that `source` makes of the published `tensors`."""
    first = tensors[0]
    match source.rule.op:
        case "transpose":
            return first.T.contiguous()
        case "conv1x1":
            return first[:, :, 0, 0] if first.ndim == 4 else first
        case "split":
            return first.chunk(source.parts)[source.part]
        case "concat":
            return torch.cat(list(tensors))
        case "copy":
            return first


def unmap(state: Mapping[str, Tensor], table: BoundMap) -> dict[str, Tensor]:
    """A module's state dict under its published names, the inverse of `fill`. Raises WeightsError."""
    groups: dict[tuple[str, ...], list[tuple[Source, Tensor]]] = {}
    for name, tensor in state.items():
        source = table.source(name)
        if source is None:
            raise WeightsError(f"{table.keymap.name} has no published name for {name}")
        groups.setdefault(source.keys, []).append((source, tensor))
    out: dict[str, Tensor] = {}
    for keys, members in groups.items():
        members.sort(key=lambda member: member[0].part)
        out |= zip(keys, revert([tensor for _, tensor in members], members[0][0]), strict=True)
    return out


def revert(parameters: Sequence[Tensor], source: Source) -> list[Tensor]:
    """The published tensors that the `parameters` of one rule are stored as: the inverse of `apply`."""
    first = parameters[0]
    match source.rule.op:
        case "transpose":
            return [first.T.contiguous()]
        case "conv1x1":
            return [first[:, :, None, None] if first.ndim == 2 else first]
        case "split":
            return [torch.cat(list(parameters))]
        case "concat":
            return list(first.chunk(len(source.keys)))
        case "copy":
            return [first]


NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""The format's names of torch's dtypes."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def read_tensor(member: Member, key: str) -> Tensor:
    """One tensor of a checkpoint, read into memory of its own: nothing of the file stays mapped. Raises SourceError."""
    with member.files[key].open("rb") as file:
        return _read(member, key, file, torch.empty(member.tensors[key].nbytes, dtype=torch.uint8))


def _read(member: Member, key: str, file: BufferedReader, memory: Tensor) -> Tensor:
    """A tensor in the first bytes of `memory` (n,) uint8."""
    info = member.tensors[key]
    kind, raw = _seek(member, key, file), memory[: info.nbytes]
    _read_bytes(raw, member, key, file)
    return raw.view(kind).reshape(info.shape)


def _read_as(dtype: torch.dtype, member: Member, key: str, file: BufferedReader, memory: Tensor) -> Tensor:
    """A tensor in another dtype, by pieces in the first bytes of `memory` (n,) uint8, cast while they are cached."""
    kind, out = _seek(member, key, file), torch.empty(member.tensors[key].shape, dtype=dtype)
    for piece in torch.split(out.view(-1), PIECE // kind.itemsize):
        raw = memory[: piece.numel() * kind.itemsize]
        _read_bytes(raw, member, key, file)
        piece.copy_(raw.view(kind))
    return out


def _seek(member: Member, key: str, file: BufferedReader) -> torch.dtype:
    """Go to where a tensor is; returns its dtype."""
    info, path = member.tensors[key], member.files[key]
    if info.dtype not in DTYPES:
        raise SourceError(f"{path}: {key} has the dtype {info.dtype}, which torch cannot hold")
    file.seek(member.data_starts[path] + info.start)
    return DTYPES[info.dtype]


def _read_bytes(raw: Tensor, member: Member, key: str, file: BufferedReader) -> None:
    if file.readinto(raw.numpy().data) != raw.nbytes:
        raise SourceError(f"{member.files[key]} ends inside {key}: it changed while it was read")


def open_tensors(path: Path) -> safe_open:
    """The file's tensors, mapped. Raises SourceError."""
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path} is not a readable safetensors file: {error}") from error
