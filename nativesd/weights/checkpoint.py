"""Safetensors files into a module: checked against the weight map, then assigned tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nativesd.errors import SourceError, WeightsError
from nativesd.weights.keymap import BoundMap, Shape, Source


def fill(
    module: nn.Module, files: Sequence[Path], table: BoundMap, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Fill `module`, built on the meta device, from safetensors `files` through a weight map.

    Tensors whose dtype and device already fit are mapped from the file, not read; others are converted one by one, so
    one copy of the weights is in memory at most. Raises SourceError for a file that cannot be read and WeightsError,
    naming every tensor and the rule concerned, before anything is assigned.
    """
    with ExitStack() as stack:
        handles = {}
        shapes: dict[str, Shape] = {}
        for path in files:
            handle = stack.enter_context(_open(path))
            for key in handle.keys():  # noqa: SIM118 - not a dict
                if key in handles:
                    raise WeightsError(f"{key} is in two files: {path} and another shard")
                handles[key] = handle
                shapes[key] = tuple(handle.get_slice(key).get_shape())
        state = module.state_dict()
        plan = table.plan(shapes, {name: tuple(tensor.shape) for name, tensor in state.items()})
        if problems := plan.problems():
            where = files[0] if len(files) == 1 else files[0].parent
            raise WeightsError(
                f"{where} does not fit the {table.keymap.component} that its config describes "
                f"({len(plan.sources)} of {len(state)} parameters found):\n  " + "\n  ".join(problems)
            )
        filled = {
            name: apply([handles[key].get_tensor(key) for key in source.keys], source).to(device=device, dtype=dtype)
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
            return first[:, :, 0, 0]
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
        out |= zip(keys, _revert([tensor for _, tensor in members], members[0][0]), strict=True)
    return out


def _revert(parameters: Sequence[Tensor], source: Source) -> list[Tensor]:
    """The published tensors that the `parameters` of one rule are stored as: the inverse of `apply`."""
    first = parameters[0]
    match source.rule.op:
        case "transpose":
            return [first.T.contiguous()]
        case "conv1x1":
            return [first[:, :, None, None]]
        case "split":
            return [torch.cat(list(parameters))]
        case "concat":
            return list(first.chunk(len(source.keys)))
        case "copy":
            return [first]


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path} is not a readable safetensors file: {error}") from error
