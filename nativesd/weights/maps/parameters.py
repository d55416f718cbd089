"""The parameters of the published models' modules, by name and shape, without torch: what an audit compares with.

parameters.json.gz holds them for every published configuration; tools/parameters.py writes it from the modules.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from functools import cache
from typing import Literal

from nativesd.config import (
    CONTROLNETS,
    IP_ADAPTERS,
    T2I_ADAPTERS,
    TAESD,
    TEXT_ENCODERS,
    UNETS,
    VAES,
    VISION_ENCODERS,
    Config,
    ControlNetConfig,
    IPAdapterConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    VisionEncoderConfig,
)
from nativesd.shipped import PARAMETERS
from nativesd.weights.maps.rules import Shape


def plain(config: Config) -> Config:
    """A configuration without what no parameter's name or shape depends on."""
    match config:
        case UNetConfig():
            levels = tuple(replace(level, heads=1) for level in config.levels)
            return replace(config, levels=levels, groups=32, in_channels=4)
        case VAEConfig():
            return replace(config, scaling=1.0, mean=None, std=None, force_upcast=False, groups=32)
        case TextEncoderConfig():
            return replace(config, heads=1, activation="gelu", hidden=-1, hidden_norm=True)
        case IPAdapterConfig():
            return replace(config, shortcut=False)
        case VisionEncoderConfig():
            return replace(config, heads=1, activation="gelu")
        case ControlNetConfig():
            unet = plain(config.unet)
            assert isinstance(unet, UNetConfig)
            return replace(config, unet=replace(unet, in_channels=config.unet.in_channels), pooled=False)
    return config


def published() -> dict[str, Config]:
    """Every configuration whose parameters are kept, by the name they are kept under."""
    vae = VAES["sd"]
    every: list[Config] = [
        *UNETS.values(), *TEXT_ENCODERS.values(), *CONTROLNETS.values(), *T2I_ADAPTERS.values(),
        *VISION_ENCODERS.values(), *IP_ADAPTERS.values(), vae, TAESD,
        replace(UNETS["sd15"], guidance=256), replace(UNETS["sdxl"], guidance=256),
        *(replace(vae, half=half) for half in HALVES), *(replace(TAESD, half=half) for half in HALVES),
    ]  # fmt: skip
    return {repr(plain(config)): config for config in every}


HALVES: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")


def known_parameters(config: Config) -> dict[str, Shape] | None:
    """The parameters and shapes of a configuration's module, where it is published; else None."""
    found = _kept().get(repr(plain(config)))
    if found is None:
        return None
    out = {name: tuple(shape) for name, shape in found.items()}
    if isinstance(config, UNetConfig):
        out["conv_in.weight"] = (config.levels[0].width, config.in_channels, 3, 3)
    return out


@cache
def _kept() -> dict[str, dict[str, list[int]]]:
    kept: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress(PARAMETERS.read_bytes()))
    return kept
