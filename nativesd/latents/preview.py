"""What is seen of a sampler at work: its steps, and quick pictures of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nativesd.config import SD_VAE, SDXL_VAE
from nativesd.latents.autoencoder import decode, decode_bytes
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.vae import VAE

PREVIEW_BYTES = 32 << 20  # of a decode that serves as a preview: 64x64 pixels of the embedded model many times over
# scaling factor -> weights (latent channel, RGB) and bias of RGB in [-1, 1]: Comfy-Org/ComfyUI comfy/latent_formats.py
# (SD15 and SDXL: latent_rgb_factors, latent_rgb_factors_bias)
RGB_FACTORS = {
    SD_VAE.scaling: (
        ((0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350), (-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177)),
        (0.0, 0.0, 0.0),
    ),
    SDXL_VAE.scaling: (
        ((0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068), (0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188)),
        (0.1084, -0.0175, -0.0011),
    ),
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Step:
    """What `on_step` receives, once for every step, after the model has answered.

    `latents` (B, C, h, w) are the sampler's, noise included, at `sigma`; `denoised` the clean latents it predicts.
    `preview()` makes a quick picture of these, maybe smaller, a batch side by side. In another thread than `on_step`'s
    it waits for the end of the call.
    """

    index: int
    total: int
    sigma: float
    latents: Tensor
    denoised: Tensor
    preview: Callable[[], Image.Image]

    def __repr__(self) -> str:
        return f"<Step {self.index + 1} of {self.total}, sigma {self.sigma:.3g}>"


@dataclass(frozen=True)
class LatentPreview:
    """Quick pictures of what a sampler is at. The latents' kind is told by the VAE's scaling factor.

    A TAESD decodes where there is one, as `tiny` or as `vae`. Else the published linear map from latents to RGB does, a
    pixel per cell. Latents of another kind are decoded by `vae` itself, shrunk first as far as that is costly.
    """

    vae: VAE | TinyVAE
    scaling: float
    tiny: TinyVAE | None = None

    @torch.inference_mode()
    def preview(self, denoised: Tensor) -> Image.Image:
        """One picture of clean scaled latents (B, C, h, w), a batch side by side."""
        quick = self.vae if self.tiny is None else self.tiny
        if isinstance(quick, TinyVAE):
            pixels = decode(quick, denoised, scaling=1)
        elif self.scaling in RGB_FACTORS and denoised.shape[1] == 4:
            weights, bias = (torch.tensor(values).to(denoised) for values in RGB_FACTORS[self.scaling])
            rgb = torch.einsum("bchw,cr->brhw", denoised, weights) + bias[:, None, None]
            pixels = (rgb / 2 + 0.5).clamp(0, 1)
        else:
            pixels = decode(self.vae, self._shrunk(denoised), scaling=self.scaling)
        array = (pixels.float() * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2)  # (B, 3, H, W) -> (H, BW, 3)
        return Image.fromarray(array.cpu().numpy())

    def _shrunk(self, latents: Tensor) -> Tensor:
        config, (height, width) = self.vae.config, latents.shape[2:]
        needed = decode_bytes(config, height * config.factor, width * config.factor, torch.float32)
        shrink = math.sqrt(PREVIEW_BYTES / needed)
        if shrink >= 1:
            return latents
        return F.interpolate(latents, size=[max(1, int(side * shrink)) for side in (height, width)], mode="area")
