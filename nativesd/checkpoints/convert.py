"""A model from one published layout into another: a folder as diffusers has it, or a single file as ldm has it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nativesd.checkpoints.marks import markers, not_said, spec
from nativesd.config import (
    Config,
    ControlNetConfig,
    T2IAdapterConfig,
    TextEncoderConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from nativesd.destination import copy_file, fresh
from nativesd.errors import NativesdWarning, UsageError
from nativesd.models.build import expected
from nativesd.text.tokenizer import FILES, ClipTokenizer, pad_token
from nativesd.weights.files.locate import Located, locate_model
from nativesd.weights.files.source import open_source
from nativesd.weights.maps.keymap import BoundMap, KeyMap, load_tables
from nativesd.weights.maps.published import (
    controlnet_json,
    model_index,
    t2i_adapter_json,
    text_json,
    tiny_vae_json,
    unet_json,
    vae_json,
)
from nativesd.weights.model import Model, choose, identify, identify_known
from nativesd.weights.writing import Entry, entries, write

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
LAYOUTS = ("diffusers", "ldm")
TEXT_TABLES = {
    "sd1": {"text_encoder": ("text_encoder.transformers", "cond_stage_model.transformer.text_model.")},
    "sd2": {"text_encoder": ("text_encoder.openclip", "cond_stage_model.model.")},
    "sdxl": {
        "text_encoder": ("text_encoder.transformers", "conditioner.embedders.0.transformer.text_model."),
        "text_encoder_2": ("text_encoder.openclip", "conditioner.embedders.1.model."),
    },
    "refiner": {"text_encoder_2": ("text_encoder.openclip", "conditioner.embedders.0.model.")},
}
"""family -> text encoder -> its table and prefix in a single file."""


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote: how many tensors, and what it left out with the reasons."""

    path: Path
    tensors: int
    ignored: Mapping[str, str]


def convert(
    source: str | Path, dest: str | Path, *, layout: str, dtype: str | None = None, maps: str | Path | None = None
) -> Converted:
    """Write a model in another layout, streamed: one tensor is in memory at a time.

    source  a file, a model folder, or a hub id: a whole model, or one component
    dest    the folder ("diffusers") or the .safetensors file ("ldm"; sgm for SDXL) to write; it must not exist
    dtype   "f16", "bf16" or "f32" for all floating-point tensors; default: as they are

    Everything is checked before anything is written. What the source says of its sampling is written as the target says
    it: a scheduler's config, or marker tensors and metadata; a NativesdWarning names what it cannot say. Raises
    UsageError, SourceError, WeightsError, NetworkError.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    path = Path(dest)
    if (path.suffix == ".safetensors") != (layout == "ldm"):
        kind = "a .safetensors file" if layout == "ldm" else "a folder"
        raise UsageError(f"{layout} is {kind}: {dest} is not")
    with fresh(path) as temporary:
        tables = load_tables(None if maps is None else Path(maps))
        count, ignored = _convert(source, temporary, path, layout, dtype, tables)
    return Converted(path, count, ignored)


def _convert(
    source: str | Path, out: Path, dest: Path, layout: str, dtype: str | None, tables: Mapping[str, KeyMap]
) -> tuple[int, dict[str, str]]:
    """Write to `out`, which becomes `dest`; returns how many tensors, and what was left out with the reasons."""
    place = locate_model(source, half=dtype == "f16")
    identities = identify_known(place, open_source(place, half=dtype == "f16"), tables)
    parts = {c.name: (member, c) for member, identity in identities for c in identity.components}
    for name, (_, component) in parts.items():
        if component.config is None:
            raise UsageError(
                f"{source} is a {name.replace('_', ' ')} ({component.layout}), which has no other layout here"
            )
    if len(parts) == 1:
        [(name, (member, component))] = parts.items()
        model = Model.of(place, name, member, component)
    else:
        model = choose(identify(Located(place), tables, half=dtype == "f16"))
    cast_to = DTYPES[dtype] if dtype is not None else None
    tensors: dict[str, dict[str, Entry]] = {}
    ignored = {key: reason for _, identity in identities for key, reason in identity.ignored.items()}
    for name, (member, component) in model.parts.items():
        assert component.config is not None  # checked above
        table = target(layout, model.family, name, component.config, alone=len(model.parts) == 1)
        tensors[name], left_out = entries(member, component, expected(component.config), table, cast_to)
        ignored |= left_out
    metadata = {key: value for member, _ in model.parts.values() for key, value in member.metadata.items()}
    metadata.setdefault("format", "pt")
    if "unet" in model.parts and len(model.parts) > 1:
        for lost in not_said(model, layout, dest.stem):
            warnings.warn(f"{dest} will not say {lost}", NativesdWarning, stacklevel=3)
        if layout == "ldm":
            tensors["markers"] = markers(model)
            metadata |= {key: value for key, value in spec(model).items() if key not in metadata}
            ignored = {key: reason for key, reason in ignored.items() if key not in tensors["markers"]}
    if layout == "ldm":
        write(out, {key: entry for part in tensors.values() for key, entry in part.items()}, metadata)
    else:
        _write_folder(model, tensors, metadata, out)
    return sum(map(len, tensors.values())), ignored


def _write_folder(
    model: Model, tensors: Mapping[str, Mapping[str, Entry]], metadata: Mapping[str, str], out: Path
) -> None:
    jsons = _jsons(model)
    for name, part in tensors.items():
        folder = out / name if len(tensors) > 1 else out
        folder.mkdir(parents=True)
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        write(folder / f"{stem}.safetensors", part, metadata)
    for file, data in jsons.items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if len(tensors) > 1:
        for name in model.text_encoders:
            _copy_tokenizer(model, name, out / name.replace("text_encoder", "tokenizer"))


SINGLES = {
    "unet": ("unet.ldm", "model.diffusion_model."), "vae": ("vae.ldm", "first_stage_model."),
    "controlnet": ("controlnet.ldm", "control_model."), "t2i_adapter": ("t2i_adapter.original", ""),
}  # fmt: skip
"""component -> its table and prefix in a single file."""


def target(layout: str, family: str, name: str, config: Config, *, alone: bool) -> BoundMap:
    """The table that writes a component. Raises UsageError where the layout cannot state it."""
    tables = load_tables()
    if layout == "diffusers":
        table = "text_encoder.transformers" if name.startswith("text_encoder") else f"{name}.diffusers"
        return tables[table].bind(prefix=tables[table].prefixes[0])
    if isinstance(config, TinyVAEConfig):
        if config.half is None:
            raise UsageError("TAESD's original layout is two files, encoder and decoder: there is no single one")
        return tables[f"tiny_{config.half}.original"].bind()
    if alone and isinstance(config, TextEncoderConfig):
        raise UsageError("a text encoder alone has no ldm layout: convert the whole model")
    try:
        dims = {} if isinstance(config, TextEncoderConfig) else config.dims
    except ValueError as error:
        raise UsageError(f"the {name} cannot be converted: {error}") from error
    table, prefix = (SINGLES | TEXT_TABLES.get(family, {}))[name]
    return tables[table].bind(dims, "" if alone and name == "vae" else prefix)


def _component_json(config: Config, size: int) -> dict[str, Any]:
    """The config.json of a component; `size` is the side of the pictures in latent cells. Raises UsageError."""
    match config:
        case UNetConfig():
            return unet_json(config, size)
        case VAEConfig():
            return vae_json(config, size * config.factor)
        case TextEncoderConfig():
            return text_json(config)
        case ControlNetConfig():
            return controlnet_json(config)
        case TinyVAEConfig():
            return tiny_vae_json(config)
        case T2IAdapterConfig():
            return t2i_adapter_json(config)


def _jsons(model: Model) -> dict[str, Any]:
    """Every config file of the folder. Raises UsageError where diffusers cannot express a component."""
    configs = {name: component.config for name, (_, component) in model.parts.items() if component.config is not None}
    if len(configs) == 1:
        [config] = configs.values()
        return {"config.json": _component_json(config, model.size)}
    out = {f"{name}/config.json": _component_json(config, model.size) for name, config in configs.items()}
    encoders = {name: config for name, config in configs.items() if isinstance(config, TextEncoderConfig)}
    out["scheduler/scheduler_config.json"] = dict(model.scheduler)
    out["model_index.json"] = model_index(model.family, encoders, str(model.scheduler.get("_class_name")))
    return out


def _copy_tokenizer(model: Model, name: str, folder: Path) -> None:
    """The model's own tokenizer, or the vocabulary in the package with the family's padding."""
    own = model.path / name.replace("text_encoder", "tokenizer")
    if sum(copy_file(own, file, folder) for file in FILES):
        return
    config = model.parts[name][1].config
    assert isinstance(config, TextEncoderConfig)
    ClipTokenizer(pad=pad_token(config), length=config.length).save(folder)
