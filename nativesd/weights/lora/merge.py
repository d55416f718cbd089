"""LoRAs merged into the weights of a loaded model, and taken out again.

A weight becomes W + the sum over LoRAs of strength x change, in float32 and rounded once. What a change is stands in
`lora`; with DoRA it is m (W + D) / |W + D| - W for the product D, the norms along the axis of the magnitude m (Liu et
al. 2024, section 4.1; ComfyUI, comfy/weight_adapter/base.py, `weight_decompose`, which also says what strength does).
Every change is that of the model's own weights, so that the order of LoRAs does not matter.

Nothing is kept for taking LoRAs out: the weights are read from the model's files again, and are the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from nativesd.errors import SourceError, WeightsError
from nativesd.weights.checkpoint import apply, shapes_of, storing
from nativesd.weights.files.source import Member
from nativesd.weights.files.tensors import NAMES, read_tensor
from nativesd.weights.identity.identify import Component
from nativesd.weights.lora.file import LoraFile
from nativesd.weights.lora.parts import DORA, dora_axis
from nativesd.weights.lora.place import Change, Place
from nativesd.weights.lora.resolve import Resolution, Use, resolve
from nativesd.weights.maps.keymap import KeyMap, load_tables
from nativesd.weights.maps.plan import make_plan
from nativesd.weights.maps.rules import Source

Read = Callable[[str], Tensor]
"""A tensor of a LoRA by its key."""
Applied = tuple[Change, float, Read]
"""A change, its strength, and where its tensors come from."""


ROWS = 1 << 18  # elements of a weight that are merged at once: their float32 copy stays in the processor's cache


def merged(weight: Tensor, changes: Sequence[Applied]) -> Tensor:
    """`weight` with all changes, in float32, contiguous. Raises WeightsError where a LoRA's values are not finite."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    merge_into(out, weight, changes)
    return out


def merge_into(out: Tensor, weight: Tensor, changes: Sequence[Applied]) -> None:
    """Write `weight` with all changes to `out`, of its shape and any dtype; it may be `weight` itself.

    Raises WeightsError where a LoRA's values are not finite, and nothing is written then; or the changed weight.
    """
    gathered = [_gather(applied, weight.device) for applied in changes]
    if not out.is_contiguous() or not all(isinstance(parts, Factors) for parts in gathered):
        out.copy_(_whole(weight, gathered))
        _require_finite(out.sum(dtype=torch.float32), changes)
        return
    sums: list[Tensor] = []
    factors = [parts for parts in gathered if isinstance(parts, Factors)]
    source, target = weight.flatten(1), out.flatten(1)
    rows = max(1, ROWS // source.shape[1])
    blocks = zip(torch.split(source, rows), torch.split(target, rows), range(0, len(source), rows), strict=True)
    for block, result, start in blocks:
        total = block.float() if block.dtype != torch.float32 else block.clone()
        for each in factors:
            total.addmm_(each.up[start : start + rows], each.down, alpha=each.scale)
        result.copy_(total)
        sums.append(result.sum(dtype=torch.float32))  # while it is cached
    _require_finite(torch.stack(sums).sum(), changes)


def _require_finite(total: Tensor, changes: Sequence[Applied]) -> None:
    """Raises WeightsError where the sum of a changed weight says that a number in it is not finite."""
    if not total.isfinite():
        names = ", ".join(sorted({change.target.parameter for change, _, _ in changes}))
        raise WeightsError(f"{names} would not be finite with the LoRAs: an alpha or a strength is too large")


@dataclass(frozen=True)
class Factors:
    """A change that is scale * up @ down, of the weight as a matrix; float32."""

    up: Tensor
    down: Tensor
    scale: float


@dataclass(frozen=True)
class Parts:
    """Any other change, by the parts it is made of; float32."""

    change: Change
    parts: Mapping[str, Tensor]
    scale: float
    strength: float


def _gather(applied: Applied, device: torch.device) -> Factors | Parts:
    change, strength, read = applied
    parts = {part: _part(read, key, device) for part, key in change.keys.items()}
    alpha = parts.pop("alpha", None)
    scale = change.scale(None if alpha is None else float(alpha))
    if set(parts) == {"up", "down"} and change.target.source.rule.op in ("copy", "conv1x1"):
        return Factors(parts["up"].flatten(1), parts["down"].flatten(1), scale * strength)
    return Parts(change, parts, scale, strength)


def _whole(weight: Tensor, changes: Sequence[Factors | Parts]) -> Tensor:
    """`weight` with changes of any kind, in float32."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(weight)
    base = out.clone() if any(isinstance(each, Parts) and set(DORA) & set(each.parts) for each in changes) else out
    for each in changes:
        if isinstance(each, Factors):
            out.flatten(1).addmm_(each.up, each.down, alpha=each.scale)
            continue
        target = each.change.target
        difference = apply([_product(each.parts).reshape(target.published)], target.source)
        magnitude = next((part for part in DORA if part in each.parts), None)
        if magnitude is None:
            out.add_(difference, alpha=each.scale * each.strength)
        else:
            axis = dora_axis(magnitude, tuple(each.parts[magnitude].shape), tuple(weight.shape))
            turned = _decomposed(base, difference.mul_(each.scale), each.parts[magnitude], axis)
            out.add_(turned, alpha=each.strength)
    return out


def _part(read: Read, key: str, device: torch.device) -> Tensor:
    tensor = read(key).to(device=device, dtype=torch.float32)
    if tensor.numel() and not tensor.abs().amax().isfinite():
        raise WeightsError(f"{key} of a LoRA holds values that are not finite: get the file again")
    return tensor


def _decomposed(weight: Tensor, difference: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """What DoRA adds to a weight, for the product of its parts."""
    total = difference.add_(weight)
    others = [i for i in range(weight.ndim) if i != axis]
    norm = torch.linalg.vector_norm(total, dim=others, keepdim=True).clamp_min_(torch.finfo(torch.float32).eps)
    return total.mul_(magnitude.reshape(norm.shape) / norm).sub_(weight)


def _product(parts: Mapping[str, Tensor]) -> Tensor:
    """What the parts multiply to: a matrix (O, I * kernel), or (O, I, kernel), or a difference as it is."""
    match parts:
        case {"diff": whole} | {"w_norm": whole} | {"diff_b": whole} | {"b_norm": whole}:
            return whole
        case {"up": up, "down": down}:
            mid = parts.get("mid")
            return up.flatten(1) @ down.flatten(1) if mid is None else _tucker(up.flatten(1), down.flatten(1), mid)
        case {"hada_w1_a": _}:
            first = _low_rank(parts, "hada_w1", "hada_t1")
            return first.mul_(_low_rank(parts, "hada_w2", "hada_t2"))
        case _:
            small = _low_rank(parts, "lokr_w1", "")
            large = _low_rank(parts, "lokr_w2", "lokr_t2")
            return torch.kron(small.flatten(1), large.flatten(1))


def _low_rank(parts: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """A factor of LyCORIS: whole, or a product of two matrices, or of two and a core."""
    if name in parts:
        return parts[name]
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    return _tucker(left.T, right, parts[core]) if core in parts else left @ right


def _tucker(left: Tensor, right: Tensor, core: Tensor) -> Tensor:
    """sum over m, n of left[o, m] core[m, n, y, x] right[n, i]: (O, M), (N, I), (M, N, Y, X) -> (O, I, Y, X)."""
    return torch.einsum("om,mnyx,ni->oiyx", left, core, right)


@dataclass(frozen=True)
class Host:
    """A component of a loaded model: its module, the files that its weights are in, and where LoRAs find their place.

    Make it with `host`, when the module has been filled.
    """

    module: nn.Module
    member: Member
    component: Component
    place: Place
    written: Mapping[Path, int]
    """When each file was last written, in nanoseconds"""
    addresses: Mapping[str, int]
    """Where every parameter was in memory when it had been filled"""

    @cached_property
    def sources(self) -> Mapping[str, Source]:
        """Where in the files every parameter is."""
        keys = {key: self.member.tensors[key].shape for key in self.component.found.keys}
        return make_plan(self.component.table, keys, self.place.shapes).sources

    def mapped(self, parameter: str) -> bool:
        """Whether a parameter is still in the pages of its file, where `fill` left it."""
        tensor = self.module.get_parameter(parameter)
        same = all(self.member.tensors[key].dtype == NAMES[tensor.dtype] for key in self.sources[parameter].keys)
        unmoved = tensor.data_ptr() == self.addresses[parameter]
        return same and unmoved and tensor.device.type == "cpu"

    def read(self, parameter: str) -> Tensor:
        """A parameter as the file has it. Raises SourceError where the file is no longer the one that was loaded."""
        source = self.sources[parameter]
        for path in {self.member.files[key] for key in source.keys}:
            if not path.is_file() or path.stat().st_mtime_ns != self.written[path]:
                raise SourceError(f"{path} is not the file that was loaded any more: load the model again")
        return apply([read_tensor(self.member, key) for key in source.keys], source)


def host(module: nn.Module, member: Member, component: Component, tables: Mapping[str, KeyMap] | None = None) -> Host:
    """The component that `module` was filled from."""
    shapes = shapes_of(module)
    assert component.config is not None  # there is a module
    written = {path: path.stat().st_mtime_ns for path in set(member.files.values())}
    addresses = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    return Host(module, member, component, Place(component.config, shapes, tables or load_tables()), written, addresses)


def writes(module: nn.Module) -> Iterator[tuple[str, int]]:
    """How often each parameter was written to, by its name, as far as torch counts: not through `.data`.

    Those that were made or cast in inference mode have no count and are left out. Layers with packed weights
    (`nativesd.tuning.fast`) stay packed.
    """
    for prefix, part in module.named_modules():
        for name, parameter in part.__dict__["_parameters"].items():
            if parameter is not None and not parameter.is_inference():
                yield f"{prefix}.{name}" if prefix else name, parameter._version


@dataclass
class Merged:
    """The LoRAs that are in a model's weights now. `hosts`: unet, text_encoder, text_encoder_2, as far as there are."""

    hosts: Mapping[str, Host]
    uses: tuple[Use, ...] = ()
    resolutions: tuple[Resolution, ...] = ()
    touched: dict[str, set[str]] = field(default_factory=dict)
    """component -> parameters that are not as in the files"""
    writes: dict[str, dict[str, int]] = field(default_factory=dict)
    """component -> parameter -> how often it had been written to when it was last merged into, or put back"""

    def component(self, module: nn.Module) -> str | None:
        """What a module, or another with its parameters, is called here; None: nothing is merged into it."""
        first = next(module.parameters(), None)
        return next((name for name, each in self.hosts.items() if next(each.module.parameters()) is first), None)

    def merged_into(self, component: str | None) -> tuple[tuple[LoraFile, float], ...]:
        """The LoRAs that are in a component's weights, with their strengths."""
        if component is None or not self.touched.get(component):
            return ()
        return tuple((use.lora, strength) for use in self.uses if (strength := use.strength(component)))


@torch.no_grad()
def set_loras(state: Merged, uses: Sequence[Use], *, partial: bool = False) -> tuple[Resolution, ...]:
    """Make `uses` the LoRAs in the model's weights, whatever there were before; [] takes all out, to the bit.

    Nothing is touched before every LoRA has been found to fit; should merging fail then, all are taken out. A LoRA of
    which anything finds no place is refused, or with `partial` applied without, and the resolutions say what that is.
    Returns one for each use. Raises WeightsError, SourceError.
    """
    if uses and tuple(uses) == state.uses and (partial or not any(found.unplaced for found in state.resolutions)):
        return state.resolutions
    places = {name: host.place for name, host in state.hosts.items()}
    resolutions = tuple(resolve(use.lora, places, partial=partial) for use in uses)
    wanted = gather(uses, resolutions)
    state.uses = state.resolutions = ()
    try:
        for name in state.hosts:
            _set_component(state, name, wanted.get(name, {}))
    except BaseException:
        for name in state.hosts:
            _set_component(state, name, {})
        raise
    state.uses, state.resolutions = tuple(uses), resolutions
    return resolutions


def _set_component(state: Merged, name: str, wanted: Mapping[str, Sequence[Applied]]) -> None:
    """Change the weights of one component, and put those back that are not to be changed any more."""
    host, touched = state.hosts[name], state.touched.setdefault(name, set())
    stores = storing(host.module)
    for parameter in [*wanted, *sorted(touched - wanted.keys())]:
        tensor = host.module.get_parameter(parameter)
        if parameter in stores:
            stores[parameter].store(_changed(host.read(parameter).to(tensor.device), wanted.get(parameter, ())))
            (touched.add if parameter in wanted else touched.discard)(parameter)
            continue
        mapped = host.mapped(parameter)
        own = host.read(parameter).to(tensor.device, tensor.dtype) if mapped or parameter in touched else tensor
        if parameter in wanted:
            # a write to a mapped weight would have the system copy each page of it, far slower than memory of its own
            out = torch.empty_like(tensor) if mapped else tensor
            touched.add(parameter)
            merge_into(out, own, wanted[parameter])
            tensor.data = out
        else:
            tensor.copy_(own)
            touched.discard(parameter)
        if not tensor.is_inference():
            state.writes.setdefault(name, {})[parameter] = tensor._version


def _changed(weight: Tensor, changes: Sequence[Applied]) -> Tensor:
    return merged(weight, changes) if changes else weight


def gather(uses: Sequence[Use], resolutions: Sequence[Resolution]) -> dict[str, dict[str, list[Applied]]]:
    """component -> parameter -> what changes it, in an order that does not depend on that of the LoRAs."""
    out: dict[str, dict[str, list[Applied]]] = {}
    pairs = zip(uses, resolutions, strict=True)
    for use, resolution in sorted(pairs, key=lambda pair: (str(pair[0].lora.path), pair[0].unet, pair[0].text_encoder)):
        for change in resolution.changes:
            if strength := use.strength(change.component):
                changes = out.setdefault(change.component, {}).setdefault(change.target.parameter, [])
                changes.append((change, strength, functools.partial(read_tensor, use.lora.member)))
    return out
