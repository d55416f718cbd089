"""From a configuration to its module, on the meta device: the one source of every expected name and shape."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

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
from nativesd.errors import WeightsError
from nativesd.models.clip import TextEncoder
from nativesd.models.clip_vision import VisionEncoder
from nativesd.models.controlnet import ControlNet, ControlNetUnion
from nativesd.models.ip_adapter import IPAdapter
from nativesd.models.t2i_adapter import T2IAdapter
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE


def build(config: Config) -> nn.Module:
    """The module that a configuration describes, without memory for its parameters. Raises WeightsError for none."""
    try:
        return _build(config)
    except (RuntimeError, ValueError, ArithmeticError, IndexError, TypeError) as error:
        raise WeightsError(f"no module can be built of the shapes that were found, {config}: {error}") from error


def _build(config: Config) -> nn.Module:
    with torch.device("meta"):
        match config:
            case UNetConfig():
                return UNet(config)
            case VAEConfig():
                return VAE(config)
            case TextEncoderConfig():
                return TextEncoder(config)
            case ControlNetConfig():
                return ControlNet(config) if config.union is None else ControlNetUnion(config)
            case TinyVAEConfig():
                return TinyVAE(config)
            case T2IAdapterConfig():
                return T2IAdapter(config)
            case VisionEncoderConfig():
                return VisionEncoder(config)
            case IPAdapterConfig():
                return IPAdapter(config)


@cache
def expected(config: Config) -> dict[str, tuple[int, ...]]:
    """The module's parameters and their shapes."""
    return {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
