"""Samplers: pure functions of a denoiser, a start and descending sigmas.

`x` is latents + sigma * noise (B, C, H, W) in float32; `denoise(x, sigma)` answers the predicted clean latents. The
sigmas end at zero or, for DDIM and PNDM as published, at the smallest trained one. `noise(sigma, sigma_next)` answers
standard normal noise for the step between the two (Brownian for the SDE samplers, else independent of both).

The step that all of them share is `toward`: on the straight line from x to a clean prediction, sigma falls in
proportion. It is Euler's step, DDIM's, and DPM-Solver++'s of first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]
Unguided = Callable[[], Tensor]
"""What the last call of a denoiser would have answered without guidance."""
Churn = Callable[[Tensor, float], tuple[Tensor, float]]
"""Noise put on x before a step from a sigma: x, and the sigma that it is at then."""


def toward(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """From `sigma` to `sigma_next` as if `denoised` were the clean latents."""
    return denoised + (x - denoised) * (sigma_next / sigma)


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """To which sigma to step, and how much noise to add, to arrive at `sigma_next` (k-diffusion `get_ancestral_step`).

    With eta 1 it is DDPM's posterior (Ho et al. 2020, equation 7), with eta 0 no noise.
    """
    up = min(sigma_next, eta * sigma_next * math.sqrt(max(0.0, 1 - sigma_next**2 / sigma**2)))
    return math.sqrt(sigma_next**2 - up**2), up


def no_churn(x: Tensor, sigma: float) -> tuple[Tensor, float]:
    """No noise."""
    return x, sigma


def sample_euler(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], churn: Churn = no_churn) -> Tensor:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 2). DDIM is the same step."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma = churn(x, sigma)
        x = toward(x, denoise(x, sigma), sigma, sigma_next)
    return x


def sample_euler_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float = 1.0
) -> Tensor:
    """Euler steps to below the next sigma, and noise back up to it (k-diffusion `sample_euler_ancestral`).

    DDPM's step, and DDIM's with an eta, are the same.
    """
    for sigma, sigma_next in pairwise(sigmas):
        down, up = ancestral(sigma, sigma_next, eta)
        x = toward(x, denoise(x, sigma), sigma, down) + noise(sigma, sigma_next) * up
    return x


def sample_heun(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], churn: Churn = no_churn) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 2); the step to zero is Euler's."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma = churn(x, sigma)
        denoised = denoise(x, sigma)
        guess = toward(x, denoised, sigma, sigma_next)
        if sigma_next == 0:
            return guess
        slope, slope_next = (x - denoised) / sigma, (guess - denoise(guess, sigma_next)) / sigma_next
        x = x + (slope + slope_next) / 2 * (sigma_next - sigma)
    return x


def sample_heun_plusplus(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], churn: Churn = no_churn) -> Tensor:
    """Heun++ 2: the slopes at three sigmas, weighed by these, so that high noise has plain Euler's.

    Its order is 1. As Carzit/sd-webui-samplers-scheduler states it, which ComfyUI's `heunpp2` follows.
    """
    steps = len(sigmas) - 1
    for i in range(steps):
        x, sigma = churn(x, sigmas[i])
        change = sigmas[i + 1] - sigma
        first = (x - denoise(x, sigma)) / sigma
        places, slopes, guess, at = [0.0], [first], x, sigma
        for place in sigmas[i + 1 : min(i + 3, steps)]:
            guess, at = guess + slopes[-1] * (place - at), place
            slopes.append((guess - denoise(guess, at)) / at)
            places.append(place)
        weights = [place / (len(places) * sigmas[0]) for place in places]
        weights[0] = 1 - sum(weights)
        x = x + sum((w * slope for w, slope in zip(weights, slopes, strict=True)), x * 0) * change
    return x


def sample_dpm_2(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise | None = None,
    eta: float = 1.0,
    churn: Churn = no_churn,
) -> Tensor:
    """The midpoint method in log sigma (Karras et al. 2022; k-diffusion `sample_dpm_2`), with `noise` its ancestral."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma = churn(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta if noise is not None else 0.0)
        denoised = denoise(x, sigma)
        if down == 0:
            x = toward(x, denoised, sigma, down)
        else:
            middle = math.sqrt(sigma * down)
            halfway = toward(x, denoised, sigma, middle)
            x = x + (halfway - denoise(halfway, middle)) / middle * (down - sigma)
        if noise is not None:
            x = x + noise(sigma, sigma_next) * up
    return x


def sample_dpmpp_2s_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float = 1.0
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1), ancestral (k-diffusion `sample_dpmpp_2s_ancestral`)."""
    for sigma, sigma_next in pairwise(sigmas):
        down, up = ancestral(sigma, sigma_next, eta)
        denoised = denoise(x, sigma)
        if down > 0:
            middle = math.sqrt(sigma * down)
            denoised = denoise(toward(x, denoised, sigma, middle), middle)
        x = toward(x, denoised, sigma, down) + noise(sigma, sigma_next) * up
    return x


def sample_dpmpp_sde(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float = 1.0) -> Tensor:
    """DPM-Solver++ (2S) on the reverse SDE (k-diffusion `sample_dpmpp_sde`, r = 1/2)."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        middle = math.sqrt(sigma * sigma_next)
        down, up = ancestral(sigma, middle, eta)
        halfway = toward(x, denoised, sigma, down) + noise(sigma, middle) * up
        denoised = denoise(halfway, middle)
        down, up = ancestral(sigma, sigma_next, eta)
        x = toward(x, denoised, sigma, down) + noise(sigma, sigma_next) * up
    return x
