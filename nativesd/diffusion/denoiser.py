"""From a UNet to the function that samplers call: guidance, prediction, and what is known of the picture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nativesd.config import Prediction
from nativesd.diffusion.conditioning import Conditioning, Group, groups, join
from nativesd.diffusion.guidance import Guidance
from nativesd.diffusion.prompting import Sides
from nativesd.errors import NativesdWarning
from nativesd.models.unet import UNet
from nativesd.sampling.published import EDM
from nativesd.sampling.samplers import Denoiser


class Steers(Protocol):
    """What adds to the UNet's features: ControlNets and adapters (`nativesd.diffusion.control.Steering`)."""

    @property
    def mixes(self) -> bool:
        """Whether a picture's rows see each other, and so have to stay together."""

    def residuals(self, latents: Tensor, time: float, sigma: float, side: Conditioning) -> list[Tensor] | None:
        """For noisy latents of unit variance (B, C, h, w), what the UNet takes as `residuals`."""

    def adapter(self, sigma: float, copies: int) -> list[Tensor]:
        """What the UNet takes as `adapter`, `copies` rows of each."""


def make_denoiser(
    unet: UNet,
    sides: Sides,
    guidance: Guidance,
    timestep: Callable[[float], float],
    prediction: Prediction,
    dtype: torch.dtype,
    steering: Steers | None = None,
    edm: EDM | None = None,
) -> Denoiser:
    """The function that samplers call: noisy latents (B, C, h, w) and sigma to the predicted clean latents, float32.

    `sides` gives the conditionings that `guidance` combines, each for all B pictures. `edm` is the scheduler's.
    """
    spread = 1.0 if edm is None else edm.data  # of clean latents
    sequential = guidance.sequential
    prepared: dict[int, _Prepared] = {}

    def answer(scaled: Tensor, time: float, sigma: float, group: Group) -> Tensor:
        side = group.side
        inputs = scaled if side.channels is None else torch.cat([scaled, side.channels], dim=1)
        output: Tensor = unet(
            inputs.to(dtype), time, group.context,
            pooled=side.pooled, time_ids=side.time_ids, guidance=side.guidance,
            residuals=None if steering is None else steering.residuals(scaled.to(dtype), time, sigma, side),
            adapter=() if steering is None else steering.adapter(sigma, len(scaled)),
        )  # fmt: skip
        return output.float()

    def answers(scaled: Tensor, time: float, sigma: float, parts: Sequence[Group]) -> Tensor:
        if len(parts) == 1:
            return answer(scaled, time, sigma, parts[0])
        out = torch.empty_like(scaled, dtype=torch.float32)
        for part in parts:
            out[part.rows] = answer(scaled[part.rows], time, sigma, part)
        return out

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal sequential
        scaled, time = x / math.hypot(spread, sigma), timestep(sigma)
        now = sides(sigma)
        if id(now) not in prepared:
            prepared[id(now)] = _Prepared(now, steering)
        told = prepared[id(now)]
        outputs: Sequence[Tensor] = ()
        if not sequential:
            try:
                every = scaled if told.shared else torch.cat([scaled] * len(now))
                outputs = answers(every, time, sigma, told.together).chunk(len(now))
            except torch.cuda.OutOfMemoryError:
                if len(now) == 1:
                    raise
                warnings.warn(
                    "not enough memory for prompt and negative prompt at once: one by one now",
                    NativesdWarning,
                    stacklevel=2,
                )
                sequential = True
        if sequential:
            outputs = [answers(scaled, time, sigma, side) for side in told.each]
        return to_clean(guidance.combine(outputs, now), x, sigma, prediction, edm)

    return denoise


class _Prepared:
    """Sides ready to be asked together, or each alone."""

    def __init__(self, sides: Sequence[Conditioning], steering: Steers | None) -> None:
        one = steering is not None and steering.mixes
        self.sides = sides  # kept, so that its id stays its own
        self.together = groups(join(sides), one=one)
        self.each = [groups(side, one=one) for side in sides]
        whole = self.together[0].side
        # the UNet's answers begin to differ where the text comes in
        self.shared = (
            len(self.together) == 1 and steering is None and whole.channels is whole.pooled is whole.guidance is None
        )


def to_clean(output: Tensor, x: Tensor, sigma: float, prediction: Prediction, edm: EDM | None = None) -> Tensor:
    """The clean latents that a UNet's output means at x = clean + sigma * noise."""
    of_x, of_output = clean_shares(sigma, prediction, edm)
    return of_x * x + of_output * output


def clean_shares(sigma: float, prediction: Prediction, edm: EDM | None = None) -> tuple[float, float]:
    """How much of x = clean + sigma * noise, and of a UNet's output, is in the clean latents that the output means.

    Source: Karras et al. 2022, table 1. EDM's "epsilon" is no noise but the table's last column: what is left to add to
    the share of x.
    """
    if edm is not None and prediction != "sample":
        rest = sigma * edm.data / math.hypot(sigma, edm.data)
        return edm.data**2 / (sigma**2 + edm.data**2), rest if prediction == "epsilon" else -rest
    match prediction:
        case "epsilon":
            return 1.0, -sigma
        case "v":
            return 1 / (1 + sigma**2), -sigma / math.hypot(1, sigma)
        case "sample":
            return 0.0, 1.0


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
