"""Samplers of distilled models, whose every answer is meant to be the picture: LCM's and TCD's.

What `onestep` says of its arguments holds here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from nativesd.sampling.methods.onestep import Denoiser, Noise, toward


def sample_lcm(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, skips: Sequence[float] | None = None
) -> Tensor:
    """Latent consistency (Luo et al. 2023, algorithm 3): to the clean latents at once, and noise back up.

    `skips` has the share of every step's input in its answer, c_skip of the paper (appendix: boundary condition).
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if skips is not None:  # c_skip * x + c_out * denoised with x of unit variance; c_out^2 = 1 - c_skip
            denoised = denoised * math.sqrt(1 - skips[i]) + x * (skips[i] / math.hypot(1, sigma))
        x = denoised if sigma_next == 0 else denoised + noise(sigma, sigma_next) * sigma_next
    return x


def sample_tcd(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    between: Sequence[float],
) -> Tensor:
    """Trajectory consistency (Zheng et al. 2024, section 4.2): to a sigma of `between`, and noise back up.

    `between` has for every step the sigma at (1 - eta) times the next timestep.
    """
    for (sigma, sigma_next), low in zip(pairwise(sigmas), between, strict=True):
        x = toward(x, denoise(x, sigma), sigma, low)
        if sigma_next > 0:
            x = x + noise(sigma, sigma_next) * math.sqrt(max(0.0, sigma_next**2 - low**2))
    return x
