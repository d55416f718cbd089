"""LoRAs merged into a checkpoint: the same files in the same layout, tensor by tensor."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nativesd.config import TextEncoderConfig, UNetConfig
from nativesd.destination import copy_file, fresh, inside
from nativesd.errors import UsageError, WeightsError
from nativesd.models.build import expected
from nativesd.text.tokenizer import FILES
from nativesd.weights.checkpoint import apply, revert
from nativesd.weights.entries import Entry, as_it_is, cast_finite, stored_dtype
from nativesd.weights.files.locate import locate_model
from nativesd.weights.files.source import Member, components, open_source
from nativesd.weights.files.tensors import read_tensor
from nativesd.weights.identity.identify import Component
from nativesd.weights.lora.merge import Applied, gather, merged
from nativesd.weights.lora.place import Place
from nativesd.weights.lora.resolve import Use, resolve
from nativesd.weights.maps.keymap import KeyMap, load_tables
from nativesd.weights.maps.plan import make_plan
from nativesd.weights.maps.rules import Source
from nativesd.weights.model import identify_known
from nativesd.weights.writing import write

AVERAGE = "model_ema."
"""What the training averages in ldm's checkpoints begin with: without the LoRA they would be another model."""
ABOUT = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_checkpoint` wrote: how many tensors, how many of them changed, and what was left out, with reasons.

    `unplaced`: per LoRA, the keys that found no place (with `partial`).
    """

    path: Path
    tensors: int
    changed: int
    ignored: Mapping[str, str]
    unplaced: tuple[Mapping[str, str], ...]


def merge_checkpoint(
    source: str | Path, uses: Sequence[Use], dest: str | Path, *, partial: bool = False, maps: str | Path | None = None
) -> MergedCheckpoint:
    """Write a model with LoRAs merged into it, in its own layout, names and dtypes: tensor by tensor.

    source  a file, a model folder, or a hub id
    uses    the LoRAs with their strengths; one of which anything finds no place is refused
    partial  apply such a LoRA without what finds no place
    dest    the .safetensors file, for a source that is one, or the folder to write; it must not exist
    maps    a folder of weight maps (*.toml) that add to the shipped ones or replace those of the same name

    DEST appears when it is complete. Raises UsageError, SourceError, WeightsError, NetworkError.
    """
    place, path = locate_model(source, half=False), Path(dest)
    if not uses:
        raise UsageError("there is no LoRA to merge")
    if (path.suffix == ".safetensors") != place.is_file():
        raise UsageError(f"{source} is {'one file' if place.is_file() else 'a folder'}: {dest} is not")
    tables = load_tables(None if maps is None else Path(maps))
    with fresh(path) as temporary:
        return replace(_merge(source, place, uses, temporary, tables, partial=partial), path=path)


def _merge(
    source: str | Path, place: Path, uses: Sequence[Use], dest: Path, tables: Mapping[str, KeyMap], *, partial: bool
) -> MergedCheckpoint:
    """`merge_checkpoint` of the model in `place`, written to `dest`."""
    identities = identify_known(place, open_source(place), tables)
    parts = {
        component.name: (member, component)
        for member, identity in identities
        for component in identity.components
        if isinstance(component.config, UNetConfig | TextEncoderConfig)
    }
    places = {name: Place(c.config, expected(c.config), tables) for name, (_, c) in parts.items() if c.config}
    if not places:
        raise UsageError(f"{source} has neither a UNet nor a text encoder, so there is nothing to merge a LoRA into")
    resolutions = [resolve(use.lora, places, partial=partial) for use in uses]
    changes = gather(uses, resolutions)
    ignored = {
        key: "a training average, which would not have the LoRA"
        for member, _ in identities
        for key in member.tensors
        if key.startswith(AVERAGE)
    }
    ignored |= {key: reason for member, _ in identities for key, reason in member.left_out.items()}
    ignored |= {
        key: f"a learnt word, which a checkpoint cannot hold: load it from {use.lora.path.name} as an embedding"
        for use in uses
        for key in use.lora.words
    }
    changed: dict[int, dict[str, Entry]] = {}
    for name, (member, component) in parts.items():
        changed.setdefault(id(member), {}).update(_changed(member, component, changes.get(name, {})))
    note = {use.lora.path.name: {"unet": use.unet, "text_encoder": use.text_encoder} for use in uses}
    count = 0
    if place.is_dir():
        for name in others(place):
            copy_file(place, name, dest)
    for member, _ in identities:
        shards: dict[str, str] = {}
        for file in member.data_starts:
            kept = [key for key in member.tensors if member.files[key] == file and key not in ignored]
            tensors = {key: changed.get(id(member), {}).get(key) or as_it_is(member, key) for key in kept}
            out = inside(dest, str(renamed(file.relative_to(place)))) if place.is_dir() else dest
            out.parent.mkdir(parents=True, exist_ok=True)
            write(out, tensors, {**member.metadata, "merged_loras": json.dumps(note)})
            shards |= dict.fromkeys(kept, out.name)
            count += len(tensors)
        if len(member.data_starts) > 1:
            index = out.with_name(re.sub(r"-\d+-of-\d+$", "", out.stem) + ".safetensors.index.json")
            index.write_text(json.dumps({"metadata": {}, "weight_map": shards}, indent=2) + "\n", encoding="utf-8")
    return MergedCheckpoint(
        dest, count, sum(map(len, changed.values())), ignored, tuple(found.unplaced for found in resolutions)
    )


def _changed(member: Member, component: Component, changes: Mapping[str, Sequence[Applied]]) -> dict[str, Entry]:
    """The keys of a component that LoRAs change."""
    assert component.config is not None  # it is a UNet or a text encoder
    own = {key: member.tensors[key] for key in component.found.keys}
    shapes, dtypes = {key: info.shape for key, info in own.items()}, {key: info.dtype for key, info in own.items()}
    plan = make_plan(component.table, shapes, expected(component.config), dtypes)
    if plan.quantised:
        raise WeightsError(
            f"the {component.name} is quantised ({next(iter(plan.quantised))}): nothing is merged into it"
        )
    groups: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    for name, source in plan.sources.items():
        groups.setdefault(source.keys, []).append((source.part, name))
    out = {}
    for keys, named in groups.items():
        names = [name for _, name in sorted(named)]
        if any(name in changes for name in names):
            sources = [(plan.sources[name], changes.get(name, ())) for name in names]
            for index, key in enumerate(keys):
                kind = stored_dtype(member, key)
                out[key] = Entry(kind, member.shapes[key], functools.partial(_make, member, sources, index, kind))
    return out


@torch.no_grad()
def _make(
    member: Member, sources: Sequence[tuple[Source, Sequence[Applied]]], index: int, dtype: torch.dtype
) -> Tensor:
    """One published tensor, of those that the parameters of one rule are stored as."""
    parameters = []
    for source, changes in sources:
        tensor = apply([read_tensor(member, key) for key in source.keys], source)
        parameters.append(merged(tensor, changes) if changes else tensor.float())
    source = sources[0][0]
    return cast_finite(revert(parameters, source)[index], dtype, source.keys[index])


def others(folder: Path) -> list[str]:
    """What a model folder may have beside weights, by name: configs, the scheduler, tokenizers, and what is said of it.

    Everything else in the folder is left where it is.
    """
    listed = [*components(folder), "feature_extractor"] if (folder / "model_index.json").is_file() else []
    configs = [f"{name}/{file}" for name in listed for file in ("config.json", "preprocessor_config.json")]
    tokenizers = [f"{name}/{file}" for name in ("tokenizer", "tokenizer_2") for file in FILES]
    return [*ABOUT, "model_index.json", "config.json", "scheduler/scheduler_config.json", *configs, *tokenizers]


def renamed(file: Path) -> Path:
    """What a file of weights is called when it is written: as safetensors files of diffusers and transformers are."""
    stem = file.stem
    if file.suffix != ".safetensors" and stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")
    return file.with_name(f"{stem}.safetensors")
