"""A model from one published layout into another: a folder as diffusers has it, or a single file as ldm has it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nativesd.checkpoints.layouts import check_target, write_model
from nativesd.checkpoints.loras.change import convert_lora
from nativesd.checkpoints.loras.merge import AVERAGE
from nativesd.checkpoints.sources import open_model
from nativesd.config import TinyVAEConfig
from nativesd.destination import fresh
from nativesd.errors import UsageError
from nativesd.models.build import expected
from nativesd.weights.entries import Entry, stored_parameters
from nativesd.weights.files.source import open_source
from nativesd.weights.identity.identify import identify_all
from nativesd.weights.lora.settings import has_adapters
from nativesd.weights.maps.keymap import load_tables
from nativesd.weights.model import Model, Part


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote: how many tensors, and what it left out with the reasons."""

    path: Path
    tensors: int
    ignored: Mapping[str, str]


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    layout: str,
    dtype: str | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoders: Sequence[str | Path] = (),
    prune: Sequence[str] = (),
    keep: Sequence[str] = (),
    fold_alpha: bool = False,
    base: str | Path | None = None,
    maps: str | Path | None = None,
) -> Converted:
    """Write a model, one component, or a LoRA in another layout, streamed: two tensors are in memory at a time.

    source  a file, a model folder, or a hub id: a whole model, one component, or a LoRA
    dest    the folder ("diffusers") or the .safetensors or .gguf file ("ldm"; sgm for SDXL) to write; it must not
            exist. Of a LoRA it is a .safetensors file, of layout "peft" also a folder, and layout "kohya", "diffusers"
            or "peft" (`loras.change.convert_lora`, which fold_alpha and base are of, too)
    dtype   "f16", "bf16" or "f32" for all floating-point tensors; for the matrices of a .gguf file also "q8_0", "q6_k",
            "q5_k", "q5_0", "q5_1", "q4_k", "q4_0" or "q4_1"; of a .safetensors file also "fp8": the UNet's matrices
            in scaled float8, as ComfyUI reads it; default: as they are, but quantised ones in float32
    unet, vae, text_encoders  sources of components that stand in for its own
    prune   what is left out: "text", "vae"; and "ema" and "duplicates", which always are
    keep    what alone is kept: "unet", "vae", "text"; with "ema" the UNet is the training's average

    Everything is checked before anything is written, and what is written is read again before it appears. What the
    source says of its sampling is written as the target says it: a scheduler's config, or marker tensors and metadata;
    a NativesdWarning names what it cannot say. Raises UsageError, SourceError, WeightsError, NetworkError.
    """
    path = Path(dest)
    given: Mapping[str, object] = {
        "dtype": dtype, "unet": unet, "vae": vae, "text_encoders": text_encoders, "prune": prune, "keep": keep,
    }  # fmt: skip
    if layout in ("kohya", "peft") or (layout == "diffusers" and _is_lora(source)):
        if said := [name for name, value in given.items() if value]:
            raise UsageError(f"{said[0]} is for models: {layout} is a layout of LoRAs here")
        done = convert_lora(source, path, layout=layout, fold_alpha=fold_alpha, base=base)
        return Converted(path, done.tensors, {})
    if fold_alpha or base is not None:
        option = "fold_alpha" if fold_alpha else "base"
        raise UsageError(f"{option} is for LoRAs: their layouts are kohya, diffusers and peft")
    check_target(path, layout, dtype)
    for name, values, known in (("prune", prune, PRUNED), ("keep", keep, KEPT)):
        if unknown := set(values) - set(known):
            raise UsageError(f"{name} must be of {', '.join(known)}, not {sorted(unknown)[0]!r}")
    with fresh(path) as temporary:
        tables = load_tables(None if maps is None else Path(maps))
        model, ignored, _ = open_model(
            source, tables, unet=unet, vae=vae, text_encoders=text_encoders, half=dtype == "f16"
        )
        model = _chosen(model, path, layout, prune, keep)
        named: dict[str, dict[str, Entry]] = {}
        for name, (member, component) in model.parts.items():
            assert component.config is not None  # a model's components have modules
            named[name], left_out = stored_parameters(member, component, expected(component.config))
            ignored = {**ignored, **left_out}
        model, named = _half(model, named, path, layout)
        marked, count = write_model(model, named, temporary, path, layout=layout, dtype=dtype)
    return Converted(path, count, {key: reason for key, reason in ignored.items() if key not in marked})


PRUNED = ("ema", "text", "vae", "duplicates")
KEPT = ("unet", "vae", "text", "ema")


def _is_lora(source: str | Path) -> bool:
    """Whether a local file is a LoRA, or a folder has peft's adapters."""
    path = Path(source)
    if has_adapters(path):
        return True
    if not os.path.isfile(path):  # False for a name that no file can have, too
        return False
    found = identify_all(open_source(path), load_tables())
    return {component.name for _, identity in found for component in identity.components} == {"lora"}


def _chosen(model: Model, dest: Path, layout: str, prune: Sequence[str], keep: Sequence[str]) -> Model:
    """The components that are to be written. Raises UsageError where there would be none, or no model of them."""
    if "ema" in keep:
        model = replace(model, parts={**model.parts, "unet": _averaged(model)})
    wanted = set(keep) - {"ema"}
    kinds = {name: "text" if name.startswith("text_encoder") else name for name in model.parts}
    kept = [name for name, kind in kinds.items() if kind not in prune and (not wanted or kind in wanted)]
    if not kept:
        raise UsageError(f"nothing would be left of {model.path}, which has {', '.join(model.parts)}")
    if 1 < len(kept) < len(model.parts) and layout == "diffusers":
        raise UsageError(
            f"{dest} would be a folder of {' and '.join(kept)}, which nothing loads: keep one, or write ldm"
        )
    return replace(model, parts={name: model.parts[name] for name in kept})


def _averaged(model: Model) -> Part:
    """The UNet of which every tensor is the average that ldm's training kept. Raises UsageError where there is none."""
    if "unet" not in model.parts:
        raise UsageError(f"{model.path} has no UNet, so there is no training average of one")
    member, component = model.parts["unet"]
    names = {key: f"{AVERAGE}{key.removeprefix('model.').replace('.', '')}" for key in component.found.keys}
    names = {key: name if name in member.tensors else "" for key, name in names.items()}
    if missing := [key for key, name in names.items() if not name]:
        raise UsageError(f"{model.path} has no training average of {missing[0]}, so the average cannot be kept")
    tensors = {**member.tensors, **{key: member.tensors[name] for key, name in names.items()}}
    files = {**member.files, **{key: member.files[name] for key, name in names.items()}}
    return replace(member, tensors=tensors, files=files), component


def _half(
    model: Model, named: dict[str, dict[str, Entry]], dest: Path, layout: str
) -> tuple[Model, dict[str, dict[str, Entry]]]:
    """Of a whole TAESD, whose original layout is two files, the half that the name of one says."""
    halves: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    half = next((half for half in halves if half in dest.stem), None)
    name = next(iter(model.parts))
    member, component = model.parts[name]
    config = component.config
    if layout != "ldm" or half is None or not isinstance(config, TinyVAEConfig) or config.half is not None:
        return model, named
    own = {key: entry for key, entry in named[name].items() if key.startswith(f"{half}.")}
    part = member, replace(component, config=replace(config, half=half))
    return replace(model, parts={name: part}), {name: own}
