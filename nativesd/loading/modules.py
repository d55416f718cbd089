"""The modules of a model: built without memory, then filled with its tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from nativesd.config import VAEConfig
from nativesd.errors import NativesdWarning
from nativesd.loading.placement import Placement, compiles
from nativesd.models.build import build
from nativesd.models.clip import TextEncoder
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.tuning.fp8 import use_fp8
from nativesd.tuning.int8 import use_int8
from nativesd.tuning.tune import compile_blocks, products_of_8_bits, tune
from nativesd.weights.checkpoint import fill
from nativesd.weights.model import Model, Part


@dataclass(frozen=True)
class Modules:
    """A model's networks; the text encoders in the UNet's order."""

    unet: UNet
    vae: VAE | TinyVAE
    text_encoders: tuple[TextEncoder, ...]
    previewer: TinyVAE | None


def build_modules(model: Model) -> Modules:
    """The modules that the configurations describe, without memory for their parameters. Raises WeightsError."""
    unet, vae = _build(model.parts["unet"]), _build(model.parts["vae"])
    encoders = tuple(_build(model.parts[name]) for name in model.text_encoders)
    previewer = None if model.preview is None else _build(model.preview)
    assert isinstance(unet, UNet)
    assert isinstance(vae, VAE | TinyVAE)
    assert previewer is None or isinstance(previewer, TinyVAE)
    return Modules(unet, vae, tuple(encoder for encoder in encoders if isinstance(encoder, TextEncoder)), previewer)


def fill_modules(modules: Modules, model: Model, placement: Placement, *, mapped: bool = True) -> None:
    """Assign every tensor, straight to its dtype and the place where weights stay; `mapped` as `load` has it.

    Raises WeightsError, SourceError.
    """
    config = modules.vae.config
    upcast = isinstance(config, VAEConfig) and config.force_upcast and placement.dtype == torch.float16
    put = partial(_fill, mapped=mapped)
    if placement.int8:
        use_int8(modules.unet)
    put(modules.unet, model.parts["unet"], placement.home, placement.dtype)
    put(modules.vae, model.parts["vae"], placement.home, torch.float32 if upcast else placement.dtype)
    for name, encoder in zip(model.text_encoders, modules.text_encoders, strict=True):
        put(encoder, model.parts[name], placement.home, placement.dtype)
    if modules.previewer is not None and model.preview is not None:
        put(modules.previewer, model.preview, placement.home, placement.dtype)


def speed_up(modules: Modules, placement: Placement, *, fast: bool, compile: bool | Literal["auto"]) -> None:
    """Exchange layers for faster ones that compute the same, as `load` was asked to. Raises UsageError."""
    products = False
    if placement.fp8:
        use_fp8(modules.unet)
        torch.cuda.empty_cache()  # what its weights took before
    if fast and placement.stays:
        products = tune(modules.unet).int8
        tune(modules.vae)
    if placement.int8 and not products:
        warnings.warn(
            f"the UNet's weights are in 8 bits, which saves memory and no time: {_why(placement, fast=fast)}",
            NativesdWarning,
            stacklevel=4,
        )
    if compiles(compile, placement.device):
        compile_blocks(modules.unet)


def _why(placement: Placement, *, fast: bool) -> str:
    """Why products of 8 bits are not used, and what is."""
    kind = str(placement.dtype).removeprefix("torch.")
    if not placement.stays or placement.device.type != "cpu":
        reason = f"products of 8 bits are there for CPUs, and the model runs on {placement.device}"
    elif not fast:
        reason = "fast=False was asked for"
    elif not products_of_8_bits(placement.dtype):
        reason = f"torch has no fast products of 8 bits beside {kind} on this processor"
    else:
        reason = f"a short probe of this processor found products of 8 bits no faster than those in {kind}"
    return f"{reason}, so that every weight is made a number again when it is used"


def by_name(modules: Modules, model: Model) -> Mapping[str, UNet | TextEncoder]:
    """The modules that LoRAs change, by their names in the model."""
    return {"unet": modules.unet, **dict(zip(model.text_encoders, modules.text_encoders, strict=True))}


def _build(part: Part) -> nn.Module:
    _, component = part
    assert component.config is not None  # a model is chosen from components with a module
    return build(component.config)


def _fill(module: nn.Module, part: Part, device: torch.device, dtype: torch.dtype, *, mapped: bool) -> None:
    fill(module, *part, device=device, dtype=dtype, mapped=mapped)
    module.eval()
