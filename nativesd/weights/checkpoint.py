"""Checkpoints into a module: checked against the weight map, then assigned tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nativesd.errors import WeightsError
from nativesd.weights.audit import compare
from nativesd.weights.files.source import Member
from nativesd.weights.files.tensors import DTYPES, map_file, map_tensor, open_tensors, read_as, read_into, read_tensor
from nativesd.weights.identity.identify import Component
from nativesd.weights.maps.keymap import BoundMap
from nativesd.weights.maps.plan import make_plan
from nativesd.weights.maps.rules import Shape, Source


@runtime_checkable
class Stores(Protocol):
    """A layer that keeps its `weight` in another form than the published one, and what that takes in buffers."""

    def store(self, weight: Tensor) -> None:
        """Take the weight over, as it is published, and keep it where the layer is."""


def storing(module: nn.Module) -> dict[str, Stores]:
    """The layers of a module that keep their weights in another form, by the names of their weights."""
    return {f"{name}.weight": part for name, part in module.named_modules() if isinstance(part, Stores)}


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """The parameters that a module takes, with their shapes."""
    own: set[str] = set()
    for name, part in module.named_modules():
        buffers = [buffer for buffer, _ in part.named_buffers(recurse=False)]
        if isinstance(part, Stores):
            own.update(f"{name}.{buffer}" for buffer in buffers)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in own}


def fill(
    module: nn.Module,
    member: Member,
    component: Component,
    *,
    device: torch.device,
    dtype: torch.dtype,
    mapped: bool = True,
) -> None:
    """Fill `module`, built on the meta device, with one component of a checkpoint.

    Tensors whose dtype, device and place in the file already fit are mapped, not read; others are read one by one, on a
    CPU piece by piece, into the same buffer and converted from there, so that one copy of the weights is in memory at
    most. Layers that store them otherwise (`Stores`) are given them one by one. Without `mapped` all are read: a file
    that is cut short under mapped tensors ends the process (SIGBUS), and one that is written over changes them.

    Raises SourceError for a file that cannot be read and WeightsError, naming every tensor and the rule concerned,
    before anything is assigned.
    """
    expected, stores = shapes_of(module), storing(module)
    table, tensors = component.table, {key: member.tensors[key] for key in component.found.keys}
    head = (component.name, component.family, component.layout, component.found.prefix)
    plan = make_plan(table, {key: info.shape for key, info in tensors.items()}, expected)
    if problems := compare(table, tensors, expected, head).short_problems():
        where = " and ".join(sorted({str(member.files[key]) for key in tensors}))
        raise WeightsError(
            f"{where} does not fit the {component.name} ({len(plan.sources)} of {len(expected)} parameters found):\n  "
            + "\n  ".join(problems)
        )
    with ExitStack() as stack:
        paths = {member.files[key] for key in tensors}
        files = {path: stack.enter_context(open_tensors(member, path)) for path in paths}
        maps = {path: map_file(path) for path in paths} if mapped else {}
        largest = max((info.nbytes for info in tensors.values()), default=0)
        buffer = torch.empty(largest, dtype=torch.uint8, pin_memory=device.type == "cuda")

        def get(key: str, source: Source, dtype: torch.dtype) -> Tensor:
            """A tensor, in the buffer only where it is alone and about to be copied."""
            path = member.files[key]
            if device.type == "cpu" and path in maps:
                tensor = map_tensor(maps[path], member, key, dtype)
                if tensor is not None:
                    return tensor
            alike = DTYPES.get(tensors[key].dtype) == dtype  # nothing would copy it out of the buffer
            if len(source.keys) > 1 or (device.type == "cpu" and alike):
                return read_tensor(member, key)
            if device.type == "cpu" and source.rule.op != "split":  # of which a part would keep the whole
                return read_as(dtype, buffer, member, key, files[path])
            return read_into(buffer, member, key, files[path])

        filled: dict[str, Tensor] = {}
        for name, source in plan.sources.items():
            kind = torch.float32 if name in stores else dtype
            tensor = apply([get(key, source, kind) for key in source.keys], source).to(device=device, dtype=kind)
            if name in stores:
                stores[name].store(tensor)
            else:
                filled[name] = tensor
    module.requires_grad_(False)
    module.load_state_dict(filled, assign=True, strict=not stores)


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
