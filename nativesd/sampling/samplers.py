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

import torch
from torch import Tensor

from nativesd.config import Prediction

Denoiser = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]


def toward(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """From `sigma` to `sigma_next` as if `denoised` were the clean latents."""
    return denoised + (x - denoised) * (sigma_next / sigma)


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """To which sigma to step, and how much noise to add, to arrive at `sigma_next` (k-diffusion `get_ancestral_step`).

    With eta 1 it is DDPM's posterior (Ho et al. 2020, equation 7), with eta 0 no noise.
    """
    up = min(sigma_next, eta * sigma_next * math.sqrt(max(0.0, 1 - sigma_next**2 / sigma**2)))
    return math.sqrt(sigma_next**2 - up**2), up


def sample_euler(denoise: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1, no churn). DDIM is the same step."""
    for sigma, sigma_next in pairwise(sigmas):
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


def sample_heun(denoise: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1, no churn); the step to zero is Euler's."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        guess = toward(x, denoised, sigma, sigma_next)
        if sigma_next == 0:
            return guess
        slope, slope_next = (x - denoised) / sigma, (guess - denoise(guess, sigma_next)) / sigma_next
        x = x + (slope + slope_next) / 2 * (sigma_next - sigma)
    return x


def sample_dpm_2(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise | None = None, eta: float = 1.0
) -> Tensor:
    """The midpoint method in log sigma (Karras et al. 2022; k-diffusion `sample_dpm_2`), with `noise` its ancestral."""
    for sigma, sigma_next in pairwise(sigmas):
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


def sample_lms(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], order: int = 4) -> Tensor:
    """Linear multistep: the polynomial through the last slopes, integrated (Adams-Bashforth for uneven sigmas)."""
    slopes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        slopes = [*slopes[1 - order :], (x - denoise(x, sigma)) / sigma]
        places = sigmas[i + 1 - len(slopes) : i + 1]
        for place, slope in zip(places, slopes, strict=True):
            x = x + slope * _lagrange_integral(place, [other for other in places if other != place], sigma, sigma_next)
    return x


def _lagrange_integral(place: float, others: Sequence[float], start: float, end: float) -> float:
    """The integral from `start` to `end` of the polynomial that is 1 at `place` and 0 at up to three `others`.

    Gauss-Legendre with two points is exact for a cubic.
    """
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return half * sum(math.prod((point - other) / (place - other) for other in others) for point in points)


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


def sample_dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    solver: str = "midpoint",
    noise: Noise | None = None,
    eta: float = 1.0,
    final_order: int = 2,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); with `noise` its SDE form (k-diffusion `sample_dpmpp_2m_sde`).

    solver       "midpoint" or "heun": how the last two predictions are combined
    final_order  1: the last step takes the last prediction alone. A step to zero always does.
    """
    eta = eta if noise is not None else 0.0
    previous: tuple[Tensor, float] | None = None  # the last step's prediction, and the log-sigma it stepped over
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        step = math.log(sigma / sigma_next)
        decay = math.expm1(-(1 + eta) * step)
        x_next = x * (decay + 1) - denoised * decay
        if previous is not None and not (final_order == 1 and i == len(sigmas) - 2):
            older, older_step = previous
            change = (denoised - older) * (step / older_step)
            weight = -decay / 2 if solver == "midpoint" or step == 0 else 1 + decay / ((1 + eta) * step)
            x_next = x_next + change * weight
        if noise is not None:
            x_next = x_next + noise(sigma, sigma_next) * (sigma_next * math.sqrt(-math.expm1(-2 * eta * step)))
        x, previous = x_next, (denoised, step)
    return x


def sample_dpmpp_3m_sde(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise | None = None, eta: float = 1.0
) -> Tensor:
    """DPM-Solver++(3M) on the reverse SDE (k-diffusion `sample_dpmpp_3m_sde`); without `noise` on the ODE.

    As everybody has it, the curvature has half the weight that Taylor's series gives it, so the order is 2, not 3.
    """
    eta = eta if noise is not None else 0.0
    history: list[tuple[Tensor, float]] = []  # the last two predictions, newest first, with the step after each
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        step = math.log(sigma / sigma_next)
        length = (1 + eta) * step
        decay = math.expm1(-length)
        x = x * (decay + 1) - denoised * decay
        phi_2 = decay / length + 1
        if history:
            ratio = history[0][1] / step
            slope = (denoised - history[0][0]) / ratio
            if len(history) == 2:
                older_ratio = history[1][1] / step
                older_slope = (history[0][0] - history[1][0]) / older_ratio
                curve = (slope - older_slope) / (ratio + older_ratio)
                slope = slope + curve * ratio
                x = x - curve * (phi_2 / length - 0.5)
            x = x + slope * phi_2
        if noise is not None:
            x = x + noise(sigma, sigma_next) * (sigma_next * math.sqrt(-math.expm1(-2 * eta * step)))
        history = [(denoised, step), *history[:1]]
    return x


def sample_unipc(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, order: int = 2, solver: str = "bh2"
) -> Tensor:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2, data prediction): a predictor, corrected by the next prediction.

    solver  "bh1" (B(h) = h) or "bh2" (B(h) = e^h - 1). The last steps have lower orders, the very last none but one.
    """
    lambdas = [-math.log(sigma) if sigma > 0 else math.inf for sigma in sigmas]
    history: list[Tensor] = []  # predictions of the steps before this one, newest first
    start, start_order = x, 0  # where the last step began, and its order
    count = len(sigmas) - 1
    for i in range(count):
        denoised = denoise(x, sigmas[i])
        if history:
            x = _unipc_step(start, history, denoised, lambdas[: i + 1], start_order, solver)
        history = [denoised, *history[: order - 1]]
        start, start_order = x, min(order, count - i, i + 1)
        x = _unipc_step(start, history, None, lambdas[: i + 2], start_order, solver) if sigmas[i + 1] > 0 else denoised
    return x


def _unipc_step(
    x: Tensor, history: Sequence[Tensor], arrived: Tensor | None, lambdas: Sequence[float], order: int, solver: str
) -> Tensor:
    """One step to the last of `lambdas` (-log sigma): the predictor, or the corrector where `arrived` is known."""
    h = lambdas[-1] - lambdas[-2]
    decay = math.expm1(-h)
    scale = -h if solver == "bh1" else decay
    ratios = [(lambdas[-2 - k] - lambdas[-2]) / h for k in range(1, order)]
    changes = [(older - history[0]) / ratio for older, ratio in zip(history[1:], ratios, strict=False)]
    if arrived is not None:
        ratios, changes = [*ratios, 1.0], [*changes, arrived - history[0]]
    out = x * (decay + 1) - history[0] * decay
    if len(ratios) == 1:
        weights = [0.5]  # as published, instead of the solution of the one equation
    elif ratios:
        phi, targets, factorial = decay / -h - 1, [], 1.0
        for k in range(1, len(ratios) + 1):
            targets.append(phi * factorial / scale)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        matrix = torch.tensor([[ratio**k for ratio in ratios] for k in range(len(ratios))], dtype=torch.float64)
        weights = torch.linalg.solve(matrix, torch.tensor(targets, dtype=torch.float64)).tolist()
    else:
        weights = []
    for weight, change in zip(weights, changes, strict=True):
        out = out - change * (scale * weight)
    return out


def sample_plms(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], prediction: Prediction = "epsilon") -> Tensor:
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
