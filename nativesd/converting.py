"""A model from one published layout into another: a folder as diffusers has it, or a single file as ldm has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nativesd.build import expected
from nativesd.config import Config, TextEncoderConfig, UNetConfig, VAEConfig
from nativesd.errors import UsageError
from nativesd.loading import Model, describe, locate
from nativesd.text.tokenizer import DEFAULT, END_OF_TEXT, pad_token
from nativesd.weights.convert import Entry, entries, fresh, write
from nativesd.weights.folder import STEMS
from nativesd.weights.keymap import BoundMap, load_tables
from nativesd.weights.published import model_index, text_json, tokenizer_json, unet_json, vae_json

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

    source  a safetensors file, a model folder, or a hub id
    dest    the folder ("diffusers") or the .safetensors file ("ldm"; sgm for SDXL) to write; it must not exist
    dtype   "f16", "bf16" or "f32" for all floating-point tensors; default: as they are

    Everything is checked before anything is written. Raises UsageError, SourceError, WeightsError, NetworkError.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    path = Path(dest)
    if (path.suffix == ".safetensors") != (layout == "ldm"):
        kind = "a .safetensors file" if layout == "ldm" else "a folder"
        raise UsageError(f"{layout} is {kind}: {dest} is not")
    if path.exists():
        raise UsageError(f"{dest} exists: remove it, or name another")
    tables = load_tables(None if maps is None else Path(maps))
    model = describe(locate(source, half=dtype == "f16"), tables)
    cast_to = DTYPES[dtype] if dtype is not None else None
    tensors: dict[str, dict[str, Entry]] = {}
    ignored: dict[str, str] = dict(model.ignored)
    for name, (member, component) in model.parts.items():
        assert component.config is not None  # `describe` takes components with a module only
        target = _target(layout, model.family, name, component.config)
        tensors[name], left_out = entries(member, component, expected(component.config), target, cast_to)
        ignored |= left_out
    metadata = {key: value for member, _ in model.parts.values() for key, value in member.metadata.items()}
    metadata.setdefault("format", "pt")
    if layout == "ldm":
        joined = {key: entry for part in tensors.values() for key, entry in part.items()}
        with fresh(path) as temporary:
            write(temporary, joined, metadata)
        return Converted(path, len(joined), ignored)
    jsons = _jsons(model)
    with fresh(path) as temporary:
        for name, part in tensors.items():
            (temporary / name).mkdir(parents=True)
            write(temporary / name / f"{STEMS.get(name, 'model')}.safetensors", part, metadata)
        for file, data in jsons.items():
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            (temporary / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        for name in model.text_encoders:
            _copy_tokenizer(model, name, temporary / name.replace("text_encoder", "tokenizer"))
    return Converted(path, sum(map(len, tensors.values())), ignored)


def _target(layout: str, family: str, name: str, config: Config) -> BoundMap:
    """The table that writes a component. Raises UsageError where the layout cannot state it."""
    tables = load_tables()
    if layout == "diffusers":
        table = {"unet": "unet.diffusers", "vae": "vae.diffusers"}.get(name, "text_encoder.transformers")
        return tables[table].bind()
    try:
        dims = config.dims if isinstance(config, UNetConfig | VAEConfig) else {}
    except ValueError as error:
        raise UsageError(f"the {name} cannot be converted: {error}") from error
    singles = {"unet": ("unet.ldm", "model.diffusion_model."), "vae": ("vae.ldm", "first_stage_model.")}
    table, prefix = (singles | TEXT_TABLES[family])[name]
    return tables[table].bind(dims, prefix)


def _jsons(model: Model) -> dict[str, Any]:
    """Every config file of the folder. Raises UsageError where diffusers cannot express a component."""
    out: dict[str, Any] = {"scheduler/scheduler_config.json": dict(model.scheduler)}
    encoders: dict[str, TextEncoderConfig] = {}
    for name, (_, component) in model.parts.items():
        match component.config:
            case UNetConfig() as config:
                out["unet/config.json"] = unet_json(config, model.size)
            case VAEConfig() as config:
                out["vae/config.json"] = vae_json(config, model.size * config.factor)
            case TextEncoderConfig() as config:
                encoders[name] = config
                out[f"{name}/config.json"] = text_json(config)
    out["model_index.json"] = model_index(model.family, encoders, str(model.scheduler.get("_class_name")))
    return out


def _copy_tokenizer(model: Model, name: str, folder: Path) -> None:
    """The model's own tokenizer, or the vocabulary in the package with the family's padding."""
    own = model.path / name.replace("text_encoder", "tokenizer")
    if own.is_dir():
        shutil.copytree(own, folder)
        return
    config = model.parts[name][1].config
    assert isinstance(config, TextEncoderConfig)
    folder.mkdir()
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(DEFAULT / file, folder / file)
    pad = "<|endoftext|>" if pad_token(config) == END_OF_TEXT else "!"
    for file, data in tokenizer_json(pad, config.length).items():
        (folder / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
