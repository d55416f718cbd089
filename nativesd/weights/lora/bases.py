"""The published bases, and which of them a LoRA fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nativesd.config import CLIP_L, OPENCLIP_H, SDXL_BIGG, SDXL_CLIP_L, UNETS, Config, UNetConfig
from nativesd.weights.audit import Expected
from nativesd.weights.formats.header import TensorInfo
from nativesd.weights.identity.describe import DISTILLED, FAMILIES, unet_family
from nativesd.weights.lora.file import Group
from nativesd.weights.lora.place import Change, Place, context, place
from nativesd.weights.maps.keymap import KeyMap

ENCODERS: Mapping[str, Mapping[str, Config]] = {
    "sd1": {"text_encoder": CLIP_L}, "sd2": {"text_encoder": OPENCLIP_H},
    "sdxl": {"text_encoder": SDXL_CLIP_L, "text_encoder_2": SDXL_BIGG}, "refiner": {"text_encoder_2": SDXL_BIGG},
}  # fmt: skip
"""family -> its published text encoders."""


MANY = 20_000
"""Modules; no base has a quarter of them, in all its components."""


@dataclass(frozen=True)
class Fit:
    """How a LoRA fits a published base."""

    label: str
    places: Mapping[str, Place]
    changes: Sequence[Change]
    unplaced: Mapping[str, str]


def bases(unets: Mapping[str, UNetConfig] = UNETS) -> dict[str, dict[str, Config]]:
    """The published bases, by the names that people use: the families' own models first."""
    out: dict[str, dict[str, Config]] = {}
    for name, unet in unets.items():
        family = unet_family(unet)[0]
        label = f"{FAMILIES[family]} {DISTILLED[name]}" if name in DISTILLED else FAMILIES[family]
        out[label] = {"unet": unet, **ENCODERS[family]}
    return out


def fits(
    groups: Sequence[Group],
    tensors: Mapping[str, TensorInfo],
    tables: Mapping[str, KeyMap],
    expected: Expected,
    known: dict[Config, Place] | None = None,
) -> list[Fit]:
    """The published bases that a LoRA fits in every module, or else the one that it fits best.

    `known` keeps the bases' places for the next LoRA.
    """
    kept = {} if known is None else known

    def place_of(config: Config) -> Place:
        return kept.setdefault(config, Place(config, expected(config), tables))

    width = context(groups, tensors)
    out: list[Fit] = []
    for label, configs in bases().items():
        unet = configs["unet"]
        if width is None or not isinstance(unet, UNetConfig) or unet.context == width:
            places = {name: place_of(config) for name, config in configs.items()}
            out.append(Fit(label, places, *place(groups, tensors, places)))
            if len(groups) > MANY:  # it fits none, and one says why
                break
    whole = [fit for fit in out if not fit.unplaced]
    return whole or sorted(out, key=lambda fit: len(fit.unplaced))[:1]
