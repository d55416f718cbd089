"""A model written in a published layout: a folder as diffusers has it, or a single file as ldm has it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nativesd.checkpoints.marks import markers, not_said, spec
from nativesd.config import (
    Config,
    ControlNetConfig,
    IPAdapterConfig,
    T2IAdapterConfig,
    TextEncoderConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    VisionEncoderConfig,
)
from nativesd.destination import copy_file
from nativesd.errors import NativesdWarning, SourceError, UsageError, WeightsError
from nativesd.models.build import expected
from nativesd.text.tokenizer import FILES, ClipTokenizer, pad_token
from nativesd.weights.entries import Entry, in_scaled_float8, laid_out
from nativesd.weights.files.source import open_source
from nativesd.weights.formats.blocks import WRITERS
from nativesd.weights.formats.container import SUFFIXES
from nativesd.weights.formats.scaled import MARK
from nativesd.weights.maps.keymap import BoundMap, load_tables
from nativesd.weights.maps.published import (
    controlnet_json,
    model_index,
    t2i_adapter_json,
    text_json,
    tiny_vae_json,
    unet_json,
    vae_json,
    vision_json,
)
from nativesd.weights.model import Model, identify_known
from nativesd.weights.writing import write, write_gguf

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
LAYOUTS = ("diffusers", "ldm")
SINGLE = (".safetensors", ".gguf")
"""Of the layout ldm."""
QUANTISED = {kind.lower(): kind for kind in WRITERS}
"""dtype of a GGUF file -> as the format calls it"""
FP8 = "fp8"
"""The dtype of a .safetensors file whose UNet is in scaled float8."""
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


OF_BYTES = (
    "modelspec.hash_sha256", "sshs_", "general.architecture", "general.file_type", "general.quantization_version",
)  # fmt: skip
"""Metadata of the tensors' bytes, which another file has in another order or kind (github.com/Stability-AI/ModelSpec;
GGUF's own, which every such file has)."""
OF_ONE = (
    "modelspec.title", "modelspec.author", "modelspec.date", "modelspec.description", "modelspec.thumbnail", "ss_",
)  # fmt: skip
"""Metadata of one model, its author and its training, which is no merge's."""


def check_target(dest: Path, layout: str, dtype: str | None) -> None:
    """Raises UsageError where a model cannot be written so."""
    if layout not in LAYOUTS:
        raise UsageError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    known = (*DTYPES, FP8, *QUANTISED)
    if dtype is not None and dtype not in known:
        raise UsageError(f"dtype must be one of {', '.join(known)}, not {dtype!r}")
    if dest.suffix in SUFFIXES and dest.suffix not in SINGLE:
        raise UsageError(f"a model is written as a .safetensors or .gguf file, or a folder: {dest} is neither")
    if (dest.suffix in SINGLE) != (layout == "ldm"):
        kind = "a .safetensors or .gguf file" if layout == "ldm" else "a folder"
        raise UsageError(f"{layout} is {kind}: {dest} is not")
    if dtype in QUANTISED and dest.suffix != ".gguf":
        raise UsageError(f"{dtype} is a dtype of .gguf files: {dest} is none")
    if dtype == FP8 and dest.suffix != ".safetensors":
        raise UsageError(f"fp8 is a dtype of .safetensors files in the layout ldm: {dest} is none")


def write_model(
    model: Model,
    named: Mapping[str, Mapping[str, Entry]],
    out: Path,
    dest: Path,
    *,
    layout: str,
    dtype: str | None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[set[str], int]:
    """Write a model's parameters to `out`, which becomes `dest`; returns the markers' keys and the number of tensors.

    named     component -> its parameters under our names
    metadata  what is said of it beside what its files say; where it is said, the model is another than theirs

    What the layout cannot say is named in a NativesdWarning. Raises UsageError, WeightsError.
    """
    cast_to = None if dtype is None else DTYPES.get(dtype)
    tensors: dict[str, dict[str, Entry]] = {}
    for name, (_, component) in model.parts.items():
        assert component.config is not None  # a model's components have modules
        table = target(layout, model.family, name, component.config, alone=len(model.parts) == 1)
        tensors[name] = laid_out(named[name], component.name, table, cast_to)
    said = {"format": "pt"}
    for member, _ in reversed(list(model.parts.values())):  # what the UNet's file says counts
        said |= member.metadata
    gone = (*OF_BYTES, *(OF_ONE if metadata is not None else ()))
    said = {key: value for key, value in said.items() if not key.startswith(gone)}
    said |= metadata or {}
    marked: set[str] = set()
    if "unet" in model.parts and model.scheduler:
        for lost in not_said(model, layout, dest.stem):
            warnings.warn(f"{dest} will not say {lost}", NativesdWarning, stacklevel=4)
        if layout == "ldm":
            tensors["markers"] = markers(model)
            marked = set(tensors["markers"])
            said |= {key: value for key, value in spec(model).items() if key not in said}
    every = {key: entry for part in tensors.values() for key, entry in part.items()}
    if dtype == FP8:
        every = in_scaled_float8(every, SINGLES["unet"][1])
        marked |= {MARK, SINGLES["unet"][1] + MARK}  # of a UNet alone, or not
    if dest.suffix == ".gguf":
        write_gguf(out, every, said, QUANTISED.get(dtype or ""))
    elif layout == "ldm":
        write(out, every, said)
    else:
        _write_folder(model, tensors, said, out)
    _check_loads(model, out, dest)
    return marked, len(every) if layout == "ldm" else sum(map(len, tensors.values()))


def _check_loads(model: Model, out: Path, dest: Path) -> None:
    """Raises WeightsError where what was written would not be read as the model that it is: its form may be one that a
    single file's names and shapes cannot say."""
    try:
        identities = identify_known(out, open_source(out), load_tables(), family=model.family)
    except SourceError as error:
        raise WeightsError(f"{dest} would not load again, so nothing is written: {error}") from error
    found = {c.name: (member, c) for member, identity in identities for c in identity.components}
    for name, (_, component) in model.parts.items():
        assert component.config is not None  # a model's components have modules
        wanted = expected(component.config)
        there = found.get(component.name)
        if there is None or there[1].config is None or expected(there[1].config) != wanted:
            raise WeightsError(
                f"{dest} would not load again, so nothing is written: its {name} would be taken for another form, as "
                "its layout cannot say the one that it has; write a folder, with its configs"
            )


def _write_folder(
    model: Model, tensors: Mapping[str, Mapping[str, Entry]], metadata: Mapping[str, str], out: Path
) -> None:
    jsons = _jsons(model)
    for name, part in tensors.items():
        folder = out / name if len(tensors) > 1 else out
        folder.mkdir(parents=True)
        stem = "model" if name in TRANSFORMERS else "diffusion_pytorch_model"
        write(folder / f"{stem}.safetensors", part, metadata)
    for file, data in jsons.items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if len(tensors) > 1:
        for name in model.text_encoders:
            _copy_tokenizer(model, name, out / name.replace("text_encoder", "tokenizer"))


TRANSFORMERS = ("text_encoder", "text_encoder_2", "image_encoder")
"""The components whose folders are transformers', not diffusers'."""
SINGLES = {
    "unet": ("unet.ldm", "model.diffusion_model."), "vae": ("vae.ldm", "first_stage_model."),
    "controlnet": ("controlnet.ldm", "control_model."), "t2i_adapter": ("t2i_adapter.original", ""),
}  # fmt: skip
"""component -> its table and prefix in a single file."""


def target(layout: str, family: str, name: str, config: Config, *, alone: bool) -> BoundMap:
    """The table that writes a component. Raises UsageError where the layout cannot state it."""
    tables = load_tables()
    if name == "vae" and isinstance(config, TinyVAEConfig):
        raise UsageError(
            'a model is written with a whole VAE: TAESD stands in for it when it is loaded, with vae="taesd"'
        )
    if layout == "diffusers":
        table = f"{name.removesuffix('_2')}.{'transformers' if name in TRANSFORMERS else 'diffusers'}"
        return tables[table].bind(prefix=tables[table].prefixes[0])
    if isinstance(config, TinyVAEConfig):
        if config.half is None:
            raise UsageError(
                "TAESD's original layout is two files: say encoder or decoder in the name of what is written"
            )
        return tables[f"tiny_{config.half}.original"].bind()
    if isinstance(config, VisionEncoderConfig | IPAdapterConfig):
        raise UsageError(f"there is no ldm layout of an {name.replace('_', ' ')}: pass layout='diffusers'")
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
        case VisionEncoderConfig():
            return vision_json(config)
        case IPAdapterConfig():
            raise UsageError("an IP-Adapter has no config.json: it is a file")


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
