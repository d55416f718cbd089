"""Samplers: pure functions of a denoiser, a start and descending sigmas.

`x` is latents + sigma * noise (B, C, H, W) in float32; `denoise(x, sigma)` answers the predicted clean latents. The
sigmas end at zero or, for DDIM and PNDM as published, at the smallest trained one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from nativesd.config import Prediction
from nativesd.errors import UsageError
from nativesd.sampling.schedule import SamplerRule

Denoiser = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


def sample_euler(denoise: Denoiser, x: Tensor, sigmas: list[float]) -> Tensor:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1, no churn). DDIM is the same step."""
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (x - denoise(x, sigma)) / sigma * (sigma_next - sigma)
    return x


def sample_euler_ancestral(denoise: Denoiser, x: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
    """Euler steps to below the next sigma, and noise back up to it (k-diffusion `sample_euler_ancestral`, eta 1)."""
    for sigma, sigma_next in pairwise(sigmas):
        up = sigma_next * (1 - sigma_next**2 / sigma**2) ** 0.5
        down = (sigma_next**2 - up**2) ** 0.5
        x = x + (x - denoise(x, sigma)) / sigma * (down - sigma) + noise() * up
    return x


def sample_dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: list[float]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); the last step to zero is of first order."""
    previous: tuple[Tensor, float] | None = None  # the last step's prediction, and the log-sigma it stepped over
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        ratio = torch.tensor(sigma_next / sigma, dtype=torch.float64)
        step = -float(ratio.log())
        estimate = denoised
        if previous is not None:
            older, older_step = previous
            estimate = denoised + (denoised - older) * (step / (2 * older_step))
        x = float(ratio) * x + (1 - float(ratio)) * estimate
        previous = denoised, step
    return x


def sample_plms(denoise: Denoiser, x: Tensor, sigmas: list[float], prediction: Prediction = "epsilon") -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022; PNDM without its Runge-Kutta start, as published models skip it).

    The first step is done twice, the second time with the mean of both slopes. The multistep formula combines the
    model's own outputs, so for v-prediction it combines velocities, like the published scheduler.
    """

    def output(x: Tensor, sigma: float) -> Tensor:
        denoised = denoise(x, sigma)
        if prediction != "v":
            return (x - denoised) / sigma
        velocity: Tensor = (x / (1 + sigma**2) - denoised) * ((1 + sigma**2) ** 0.5 / sigma)
        return velocity

    def step(x: Tensor, combined: Tensor, sigma: float, sigma_next: float) -> Tensor:
        slope = combined if prediction != "v" else (combined * (1 + sigma**2) ** 0.5 + x * sigma) / (1 + sigma**2)
        return x + slope * (sigma_next - sigma)

    history = [output(x, sigmas[0])]
    guess = step(x, history[0], sigmas[0], sigmas[1])
    if len(sigmas) == 2:
        return guess
    x = step(x, (history[0] + output(guess, sigmas[1])) / 2, sigmas[0], sigmas[1])
    for sigma, sigma_next in pairwise(sigmas[1:]):
        history = [*history[-3:], output(x, sigma)]
        weights = _ADAMS_BASHFORTH[len(history)]
        combined = sum((w * h for w, h in zip(weights, history, strict=True)), torch.zeros_like(x))
        x = step(x, combined, sigma, sigma_next)
    return x


# Adams-Bashforth coefficients by order, oldest slope first
_ADAMS_BASHFORTH = {
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
}


class Run(Protocol):
    """How the pipeline calls any sampler: each takes of this what it needs."""

    def __call__(
        self, denoise: Denoiser, x: Tensor, sigmas: list[float], noise: Noise, prediction: Prediction
    ) -> Tensor:
        """Sample."""


@dataclass(frozen=True)
class Sampler:
    """A sampler under the name that A1111 shows, with the names that it is also known by (published class first)."""

    name: str
    aliases: tuple[str, ...]
    rule: SamplerRule
    run: Run


_VP = SamplerRule("leading", True, False, ends_at_trained=True, unit_variance=True, karras_full_range=False)
_KARRAS = SamplerRule("linspace", False, False, ends_at_trained=False, unit_variance=False, karras_full_range=False)
_DPM = SamplerRule("linspace", True, True, ends_at_trained=False, unit_variance=True, karras_full_range=True)

SAMPLERS = (
    Sampler("DDIM", ("DDIMScheduler",), _VP, lambda d, x, s, noise, prediction: sample_euler(d, x, s)),
    Sampler(
        "PLMS", ("PNDMScheduler", "PNDM"), _VP, lambda d, x, s, noise, prediction: sample_plms(d, x, s, prediction)
    ),
    Sampler("Euler", ("EulerDiscreteScheduler",), _KARRAS, lambda d, x, s, noise, prediction: sample_euler(d, x, s)),
    Sampler(
        "Euler a",
        ("EulerAncestralDiscreteScheduler", "Euler ancestral"),
        _KARRAS,
        lambda d, x, s, noise, prediction: sample_euler_ancestral(d, x, s, noise),
    ),
    Sampler(
        "DPM++ 2M",
        ("DPMSolverMultistepScheduler", "dpmpp 2m"),
        _DPM,
        lambda d, x, s, noise, prediction: sample_dpmpp_2m(d, x, s),
    ),
)
SCHEDULES = ("automatic", "karras")


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())


_BY_NAME = {_key(name): sampler for sampler in SAMPLERS for name in (sampler.name, *sampler.aliases)}


def find_sampler(name: str, schedule: str | None) -> tuple[Sampler, str | None]:
    """The sampler of a name, in any case, and its schedule: fused ("DPM++ 2M Karras") or split. Raises UsageError."""
    sampler = _BY_NAME.get(_key(name))
    if sampler is None:
        for fused in SCHEDULES:
            key = _key(name)
            if key.endswith(fused) and (sampler := _BY_NAME.get(key.removesuffix(fused))) is not None:
                if schedule is not None and _key(schedule) != fused:
                    raise UsageError(f"sampler {name!r} and schedule {schedule!r} contradict each other")
                schedule = fused
                break
    if sampler is None:
        raise UsageError(f"there is no sampler {name!r}: choose one of {', '.join(s.name for s in SAMPLERS)}")
    if schedule is not None and _key(schedule) not in SCHEDULES:
        raise UsageError(f"there is no schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    return sampler, None if schedule is None else _key(schedule)
