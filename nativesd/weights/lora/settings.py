"""What peft's settings say of a LoRA's scale, where its tensors do not: in the file's metadata, or beside the file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nativesd.errors import SourceError, WeightsError, quote
from nativesd.reading import parse_json, read_json

METADATA = "lora_adapter_metadata"
"""Where diffusers writes peft's settings: `LORA_ADAPTER_METADATA_KEY` of its loaders/lora_base.py."""
CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
"""PeftModel.save_pretrained's files, whose settings are in CONFIG beside them."""


MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""What init_lora_weights begins with where the base is changed when training begins (peft, tuners/lora/layer.py)."""
KINDS = ("LORA", "LOHA", "LOKR")
"""The peft_type of what is read (peft, utils/peft_types.py)."""
SAYING = {"r", "lora_alpha", "alpha", "alpha_pattern", "peft_type"}
"""Settings of which one says that there are some."""
RANK = 8
"""peft's `r` where none is given (tuners/{lora,loha,lokr}/config.py)."""
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def adapter_folders(path: Path) -> list[str]:
    """The components of which a folder has an adapter of peft's in a folder of its own."""
    if not os.path.isdir(path) or (path / CONFIG).exists():
        return []
    return [name for name in COMPONENTS if (path / name / CONFIG).is_file()]


def has_adapters(path: Path) -> bool:
    """Whether a folder is an adapter of peft's, or has some in folders of their own."""
    return os.path.isdir(path) and ((path / CONFIG).is_file() or bool(adapter_folders(path)))


@dataclass(frozen=True)
class Stated:
    """The alpha and rank of all modules, but for those whose names end as `alphas` says.

    `root`: the scale is alpha / sqrt(rank) (rank-stabilised LoRA, Kalajdzievski 2023), not alpha / rank.
    """

    alpha: float
    rank: int
    root: bool = False
    alphas: Mapping[str, float] | None = None

    def scale(self, module: str, rank: int | None) -> float:
        """The scale of a change of that rank, or of one that is no product."""
        rank = rank or self.rank
        own = (alpha for end, alpha in (self.alphas or {}).items() if f".{module}".endswith(f".{end}"))
        return next(own, self.alpha) / (math.sqrt(rank) if self.root else rank)


def stated_by(metadata: Mapping[str, str], path: Path) -> dict[str, Stated]:
    """peft's settings for each component, or under "" for any; {} where a file has none.

    Raises WeightsError, SourceError for settings that cannot be read.
    """
    if METADATA in metadata:
        where = f"{path}, {METADATA}"
        try:
            data = parse_json(metadata[METADATA].encode(), where)
        except SourceError as error:
            raise WeightsError(str(error)) from error
    elif path.name in ADAPTERS and (path.parent / CONFIG).is_file():
        where, data = str(path.parent / CONFIG), read_json(path.parent / CONFIG)
    else:
        return {}
    out = {}
    for component in ("", *COMPONENTS):
        prefix = f"{component}." if component else ""
        own = {name.removeprefix(prefix): value for name, value in data.items() if name.startswith(prefix)}
        if own.keys() & SAYING:
            out[component] = _stated(own, where)
    return out


def _stated(data: Mapping[str, Any], where: str) -> Stated:
    """The settings of one component. Raises WeightsError."""
    begun = data.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(MOVING):
        raise WeightsError(
            f"{where}: init_lora_weights is {quote(begun)}, which changes the base too: save the adapter anew "
            "with peft's path_initial_model_for_weight_conversion, which makes a LoRA of the base of it"
        )
    kind = data.get("peft_type", "LORA")
    if kind not in KINDS:
        raise WeightsError(
            f"{where} has the peft_type {quote(kind)}, of which nothing is read here: {', '.join(KINDS)} are; train or "
            "convert it to one of them"
        )
    alpha, rank = data.get("lora_alpha", data.get("alpha")), data.get("r", RANK)
    patterns = data.get("alpha_pattern") or {}
    numbers = isinstance(patterns, dict) and all(map(_is_number, (alpha, rank, *patterns.values())))
    if not numbers:
        raise WeightsError(f"{where} has no lora_alpha, r and alpha_pattern that are numbers")
    if not isinstance(rank, int) or rank < 1:
        raise WeightsError(f"{where} has the rank r = {quote(rank)}, which must be a whole number from 1 on")
    if strange := [end for end in patterns if not re.fullmatch(r"\^?[\w.-]+", end)]:
        raise WeightsError(f"{where}: the alpha_pattern {strange[0]!r} is no module's name, so no scale can be told")
    alphas = {end.removeprefix("^"): float(value) for end, value in patterns.items()}
    return Stated(float(alpha), rank, bool(data.get("use_rslora")), alphas)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
