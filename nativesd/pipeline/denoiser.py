"""From a UNet to the function that samplers call: guidance, prediction, and what is known of the picture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nativesd.config import Prediction
from nativesd.errors import NativesdWarning
from nativesd.models.layers import CachedContext
from nativesd.models.unet import UNet
from nativesd.sampling.published import EDM
from nativesd.sampling.samplers import Denoiser


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told beside the latents, for B pictures; what a UNet does not take is None.

    context (B, T, C); pooled (B, P) and time_ids (B, n): SDXL's; guidance (B, w): LCM's embedding of the guidance
    scale; channels (B, c, h, w): further input channels, of inpainting and of edited pictures. prompt (B,) is 1 where
    it is the prompt's conditioning, and 0 where it is the negative prompt's.
    """

    context: Tensor
    prompt: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    guidance: Tensor | None = None
    channels: Tensor | None = None


def join(sides: Sequence[Conditioning]) -> Conditioning:
    """All of them, one after the other along the batch."""

    def cat(name: str) -> Tensor | None:
        tensors = [getattr(side, name) for side in sides]
        return None if tensors[0] is None else torch.cat(tensors)

    context, prompt = (torch.cat([getattr(side, name) for side in sides]) for name in ("context", "prompt"))
    return Conditioning(context, prompt, cat("pooled"), cat("time_ids"), cat("guidance"), cat("channels"))


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: how the answers for several conditionings become one.

    `scale` 1 is none. `rescale` pulls the contrast back to that of the unguided answer (Lin et al. 2023, section 3.4;
    0 to 1). `image_scale` weighs the picture that is edited (Brooks et al. 2022, equation 3).
    """

    scale: float
    rescale: float = 0.0
    image_scale: float = 1.5
    sequential: bool = False
    """One pass of the model per conditioning instead of one for all: half the memory, the same answer."""

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """One answer of (positive), (negative, positive) or (prompt and picture, picture alone, neither)."""
        if len(outputs) == 1:
            return outputs[0]
        if len(outputs) == 2:
            negative, positive = outputs
            combined = negative + self.scale * (positive - negative)
        else:
            positive, picture, nothing = outputs
            combined = nothing + self.scale * (positive - picture) + self.image_scale * (picture - nothing)
        if self.rescale:
            axes = tuple(range(1, combined.ndim))
            same_contrast = combined * (positive.std(axes, keepdim=True) / combined.std(axes, keepdim=True))
            combined = torch.lerp(combined, same_contrast, self.rescale)
        return combined


class Steers(Protocol):
    """What adds to the UNet's features: ControlNets and adapters (`nativesd.pipeline.control.Steering`)."""

    def residuals(self, latents: Tensor, time: float, sigma: float, side: Conditioning) -> list[Tensor] | None:
        """For noisy latents of unit variance (B, C, h, w), what the UNet takes as `residuals`."""

    def adapter(self, sigma: float, copies: int) -> list[Tensor]:
        """What the UNet takes as `adapter`, `copies` rows of each."""


def make_denoiser(
    unet: UNet,
    sides: Sequence[Conditioning],
    guidance: Guidance,
    timestep: Callable[[float], float],
    prediction: Prediction,
    dtype: torch.dtype,
    steering: Steers | None = None,
    edm: EDM | None = None,
) -> Denoiser:
    """The function that samplers call: noisy latents (B, C, h, w) and sigma to the predicted clean latents, float32.

    `sides` are the conditionings that `guidance` combines, each for all B pictures. `edm` is the scheduler's.
    """
    spread = 1.0 if edm is None else edm.data  # of clean latents
    together = join(sides)
    sequential = guidance.sequential
    # the UNet's answers begin to differ where the text comes in
    shared = steering is None and together.channels is together.pooled is together.guidance is None
    contexts = {id(side): CachedContext(side.context) for side in (together, *sides)}

    def answer(scaled: Tensor, time: float, sigma: float, side: Conditioning) -> Tensor:
        inputs = scaled if side.channels is None else torch.cat([scaled, side.channels], dim=1)
        output: Tensor = unet(
            inputs.to(dtype), time, contexts[id(side)],
            pooled=side.pooled, time_ids=side.time_ids, guidance=side.guidance,
            residuals=None if steering is None else steering.residuals(scaled.to(dtype), time, sigma, side),
            adapter=() if steering is None else steering.adapter(sigma, len(scaled)),
        )  # fmt: skip
        return output.float()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal sequential
        scaled, time = x / math.hypot(spread, sigma), timestep(sigma)
        outputs: Sequence[Tensor] = ()
        if not sequential:
            try:
                every = scaled if shared else torch.cat([scaled] * len(sides))
                outputs = answer(every, time, sigma, together).chunk(len(sides))
            except torch.cuda.OutOfMemoryError:
                if len(sides) == 1:
                    raise
                warnings.warn(
                    "not enough memory for prompt and negative prompt at once: one by one now",
                    NativesdWarning,
                    stacklevel=2,
                )
                sequential = True
        if sequential:
            outputs = [answer(scaled, time, sigma, side) for side in sides]
        return to_clean(guidance.combine(outputs), x, sigma, prediction, edm)

    return denoise


def to_clean(output: Tensor, x: Tensor, sigma: float, prediction: Prediction, edm: EDM | None = None) -> Tensor:
    """The clean latents that a UNet's output means at x = clean + sigma * noise (Karras et al. 2022, table 1).

    EDM's "epsilon" is no noise but the table's last column: what is left to add to the share of x.
    """
    if edm is not None and prediction != "sample":
        share, rest = edm.data**2 / (sigma**2 + edm.data**2), sigma * edm.data / math.hypot(sigma, edm.data)
        return share * x + (rest if prediction == "epsilon" else -rest) * output
    match prediction:
        case "epsilon":
            return x - sigma * output
        case "v":
            return x / (1 + sigma**2) - output * (sigma / math.hypot(1, sigma))
        case "sample":
            return output


def guidance_embedding(guidance_scale: float, width: int) -> Tensor:
    """LCM's embedding (1, width) of the guidance scale, sines first (Luo et al. 2023, `w_embedding`)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = (guidance_scale - 1) * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos()])[None]


def keep_known(denoise: Denoiser, known: Tensor, noise: Tensor, mask: Tensor) -> Denoiser:
    """A denoiser that paints where `mask` (B or 1, 1, h, w) is 1 and keeps `known` (B, C, h, w) where it is 0.

    The model sees the known part as its clean latents with the picture's own noise at every sigma (Lugmayr et al.
    2022, equation 8, without resampling), and its answer there is replaced by them.
    """

    def inpaint(x: Tensor, sigma: float) -> Tensor:
        x = torch.lerp(known + sigma * noise, x, mask)
        return torch.lerp(known, denoise(x, sigma), mask)

    return inpaint


def watch(denoise: Denoiser, sigmas: Sequence[float], report: Callable[[int, float, Tensor, Tensor], None]) -> Denoiser:
    """A denoiser that reports (index, sigma, x, denoised) once for every one of `sigmas` that a sampler asks for."""
    waiting = {sigma: index for index, sigma in enumerate(sigmas)}

    def watched(x: Tensor, sigma: float) -> Tensor:
        denoised = denoise(x, sigma)
        index = waiting.pop(sigma, None)
        if index is not None:
            report(index, sigma, x, denoised)
        return denoised

    return watched
