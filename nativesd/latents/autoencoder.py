"""Between latents and pixels, within the memory there is: whole, picture by picture, or strip by strip."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from nativesd.config import TinyVAEConfig, VAEConfig
from nativesd.errors import NativesdError, NativesdWarning, UsageError
from nativesd.latents.strips import MAPS, decode_strips, encode_strips, tiny_strips
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.vae import VAE
from nativesd.tuning.tune import untune

TILE = 384
"""In pixels. With less, strips of the published VAE in float32 are below 32 MiB, and what glibc allocates below that it
keeps when it is freed (mallopt(3), M_MMAP_THRESHOLD); with more, a strip's own work takes more than is saved."""
AUTO_SIDE = 1536  # pictures with a longer side are worked on in strips where nothing else is asked for


def tile_size(
    tile: int | str | None, height: int, width: int, *, needed: int = 0, free: int | None = None
) -> int | None:
    """The `tile` for `decode` and `encode` of a picture of `height` x `width` pixels; None: the picture as a whole.

    tile    pixels; None: whole; "auto": whole up to 1536 pixels a side and where `needed` bytes are within `free`

    Raises UsageError for anything else.
    """
    if tile == "auto":
        return TILE if max(height, width) > AUTO_SIDE or (free is not None and needed > free) else None
    if tile is None or (isinstance(tile, int) and not isinstance(tile, bool) and tile > 0):
        return tile
    raise UsageError(f'tile must be a positive number of pixels, "auto" or None, not {tile!r}')


def decode_bytes(config: VAEConfig | TinyVAEConfig, height: int, width: int, dtype: torch.dtype, batch: int = 1) -> int:
    """Bytes that a plain decode of `batch` pictures of `height` x `width` pixels needs beside the weights, at most.

    That is `MAPS` feature maps of full size. They are as wide as the level below, whose channels the upsampling keeps.
    """
    channels = config.width if isinstance(config, TinyVAEConfig) else max(config.widths[:2])
    return MAPS * channels * height * width * dtype.itemsize * batch


@torch.inference_mode()
def decode(
    vae: VAE | TinyVAE,
    latents: Tensor,
    *,
    scaling: float,
    tile: int | None = None,
    slicing: bool = False,
    name: str = "the model",
    checked: bool = True,
) -> Tensor:
    """Scaled latents (B, C, h, w) to pixels (B, 3, f * h, f * w) in [0, 1], float32.

    scaling  the VAE's scaling factor, by which the latents are divided (TAESD: 1)
    tile     work on strips of at most tile x tile pixels; the result is the same up to rounding
    slicing  one picture at a time, as tiles always are
    name     of the model, for the error's sentence
    checked  whether to look if the picture is finite, for which a GPU has to be waited for

    A VAE that overflows in half precision is said to, and stays in float32 from then on. Raises NativesdError where
    the picture is not finite in float32 either, UsageError where the VAE is an encoder alone.
    """
    _require(vae, "decoder", name)
    latents = latents / scaling
    if (spread := _spread(vae, latents)) is not None:
        latents = latents * spread[1] + spread[0]

    def run(dtype: torch.dtype) -> Tensor:
        return _run(lambda z: _decode_one(vae, z, tile), latents.to(dtype), one_by_one=slicing or tile is not None)

    pixels = _finite(vae, run, f"{name}: the picture is") if checked else run(_dtype(vae)).float()
    return (pixels / 2 + 0.5).clamp(0, 1)


@torch.inference_mode()
def encode(
    vae: VAE | TinyVAE,
    images: Tensor,
    *,
    scaling: float,
    tile: int | None = None,
    slicing: bool = False,
    name: str = "the model",
    checked: bool = True,
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [-1, 1] to mean and standard deviation of their scaled latents, each (B, C, h, w) float32.

    H and W are multiples of the VAE's factor. The options are those of `decode`. TAESD's latents have no distribution:
    the standard deviation is 0. Raises NativesdError where the latents are not finite, UsageError where the VAE is a
    decoder alone.
    """
    _require(vae, "encoder", name)

    def run(dtype: torch.dtype) -> Tensor:
        return _run(lambda x: _encode_one(vae, x, tile), images.to(dtype), one_by_one=slicing or tile is not None)

    encoded = _finite(vae, run, f"{name}: the encoded picture is") if checked else run(_dtype(vae)).float()
    if isinstance(vae, TinyVAE):
        return encoded * scaling, torch.zeros_like(encoded)
    mean, logvar = encoded.chunk(2, dim=1)
    deviation = torch.exp(0.5 * logvar)
    if (spread := _spread(vae, mean)) is not None:
        mean, deviation = (mean - spread[0]) / spread[1], deviation / spread[1]
    return mean * scaling, deviation * scaling


def _require(vae: VAE | TinyVAE, half: Literal["encoder", "decoder"], name: str) -> None:
    if vae.config.half not in (None, half):
        raise UsageError(
            f"{name}: its VAE is the {vae.config.half} alone, and this call needs the {half}: load a whole VAE, or put "
            f"the file of the other half beside this one"
        )


def _spread(vae: VAE | TinyVAE, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """The mean and standard deviation (1, C, 1, 1) of a VAE's latents, where its config says them."""
    config = vae.config
    if isinstance(config, TinyVAEConfig) or config.mean is None or config.std is None:
        return None
    mean, std = (latents.new_tensor(values).reshape(1, -1, 1, 1) for values in (config.mean, config.std))
    return mean, std


def _run(module: Callable[[Tensor], Tensor], batch: Tensor, *, one_by_one: bool) -> Tensor:
    return torch.cat([module(item) for item in torch.split(batch, 1)]) if one_by_one else module(batch)


def _dtype(vae: VAE | TinyVAE) -> torch.dtype:
    return next(vae.parameters()).dtype


def _finite(vae: VAE | TinyVAE, run: Callable[[torch.dtype], Tensor], what: str) -> Tensor:
    """`run` in the VAE's dtype, and in float32 where that overflows."""
    dtype = _dtype(vae)
    out = run(dtype).float()
    if not out.isfinite().all() and dtype != torch.float32:
        warnings.warn(
            "the VAE overflowed in half precision: it runs in float32 from now on", NativesdWarning, stacklevel=3
        )
        untune(vae)  # what is fast in half precision is not all exact enough
        vae.float()
        out = run(torch.float32)
    if not out.isfinite().all():
        raise NativesdError(f"{what} not finite (NaN), so the model's weights are broken")
    return out


def _decode_one(vae: VAE | TinyVAE, latents: Tensor, tile: int | None) -> Tensor:
    if tile is None:
        return vae.decode(latents)
    if isinstance(vae, TinyVAE):
        return tiny_strips(vae.decode, latents, tile, vae.config.decoder, 1, vae.config.factor)
    return decode_strips(vae, latents, tile)


def _encode_one(vae: VAE | TinyVAE, images: Tensor, tile: int | None) -> Tensor:
    if isinstance(vae, TinyVAE):
        if tile is None:
            return vae.encode(images)
        return tiny_strips(vae.encode, images, tile, vae.config.encoder[::-1], vae.config.factor, 1)
    return torch.cat(vae.encode(images), dim=1) if tile is None else encode_strips(vae, images, tile)
