"""About what a picture of each model family needs of a machine, in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nativesd.config import (
    CLIP_L,
    OPENCLIP_H,
    SD15_CONTROLNET,
    SD15_UNET,
    SD21_CONTROLNET,
    SD21_UNET,
    SD_VAE,
    SDXL_BIGG,
    SDXL_CLIP_L,
    SDXL_CONTROLNET,
    SDXL_UNET,
    SDXL_VAE,
    Config,
    ControlNetConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Family:
    """The published components of a model family, and the side in pixels of the pictures it was trained on."""

    unet: UNetConfig
    vae: VAEConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    controlnet: ControlNetConfig
    side: int


FAMILIES: Mapping[str, Family] = {
    "sd15": Family(SD15_UNET, SD_VAE, (CLIP_L,), SD15_CONTROLNET, 512),
    "sd21": Family(SD21_UNET, SD_VAE, (OPENCLIP_H,), SD21_CONTROLNET, 768),
    "sdxl": Family(SDXL_UNET, SDXL_VAE, (SDXL_CLIP_L, SDXL_BIGG), SDXL_CONTROLNET, 1024),
}


@dataclass(frozen=True)
class Need:
    """About what a picture of a family takes, in bytes.

    step      for prompt and negative prompt at once, beside the weights
    decode    of the whole picture, and `strips` in strips
    visiting  the least with `offload`: a component at a time, and its work in parts
    """

    family: str
    side: int
    dtype: str
    weights: int
    step: int
    decode: int
    strips: int
    visiting: int

    @property
    def whole(self) -> int:
        """With everything in memory, and nothing done in parts."""
        return self.weights + max(self.step, self.decode)

    @property
    def parts(self) -> int:
        """With everything in memory; prompt and negative prompt one by one, and the decode in strips."""
        return self.weights + max(self.step // 2, self.strips)


def estimate(name: str, family: Family, dtype: str) -> Need:
    """What a family takes in a dtype, by its parameters' sizes and `unet_bytes` and `decode_bytes`.

    A VAE marked `force_upcast` is float32 beside a float16 UNet.
    """
    import torch

    from nativesd.latents.autoencoder import decode_bytes
    from nativesd.latents.strips import MAPS
    from nativesd.tuning.memory import unet_bytes

    kind: torch.dtype = getattr(torch, dtype)
    vae_kind = torch.float32 if family.vae.force_upcast and kind == torch.float16 else kind
    cells = family.side // family.vae.factor
    unet = weight_bytes(family.unet, kind)
    vae = weight_bytes(family.vae, vae_kind)
    text = sum(weight_bytes(config, kind) for config in family.text_encoders)
    step = unet_bytes(family.unet, 2, cells, cells, kind)
    decode = decode_bytes(family.vae, family.side, family.side, vae_kind)
    strips = decode // MAPS  # at most: one feature map of full size in place of so many
    visiting = max(text, unet + step // 2, vae + strips)
    return Need(name, family.side, dtype, unet + vae + text, step, decode, strips, visiting)


def weight_bytes(config: Config, dtype: torch.dtype) -> int:
    """What a component's parameters take in a dtype."""
    from nativesd.models.build import expected

    return sum(math.prod(shape) for shape in expected(config).values()) * dtype.itemsize
