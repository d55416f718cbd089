"""CFG++: samplers that step to the guided clean latents along the noise that is there without guidance.

What `onestep` says of its arguments holds here. The paper's guidance scale is from 0 to 1, where 0.6 is like 7.5 of
the plain samplers. Source: Chung et al. 2024, arXiv 2406.08070, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from nativesd.sampling.methods.onestep import Denoiser, Noise, Unguided, ancestral


def sample_euler_plusplus(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    unguided: Unguided,
    noise: Noise | None = None,
    eta: float = 1.0,
) -> Tensor:
    """Euler's and DDIM's step; with `noise` the ancestral one (ComfyUI's `sample_euler_ancestral_cfg_pp`)."""
    for sigma, sigma_next in pairwise(sigmas):
        down, up = ancestral(sigma, sigma_next, eta if noise is not None else 0.0)
        denoised = denoise(x, sigma)
        x = denoised + (x - unguided()) * (down / sigma)
        if noise is not None:
            x = x + noise(sigma, sigma_next) * up
    return x


def sample_dpmpp_2m_plusplus(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], unguided: Unguided) -> Tensor:
    """DPM-Solver++(2M), whose correction goes from the unguided latents before to the guided ones.

    The paper's appendix has it; the weights are those of ComfyUI's `sample_dpmpp_2m_cfg_pp`.
    """
    previous: tuple[Tensor, float] | None = None  # the last step's unguided latents, and the log-sigma it stepped over
    for sigma, sigma_next in pairwise(sigmas):
        denoised, plain = denoise(x, sigma), unguided()
        x = denoised + (x - plain) * (sigma_next / sigma)
        if sigma_next == 0:
            return x
        step = math.log(sigma / sigma_next)
        if previous is not None:
            older, older_step = previous
            x = x + (denoised - older) * (step / older_step * (1 - sigma_next / sigma) / 2)
        previous = plain, step
    return x
