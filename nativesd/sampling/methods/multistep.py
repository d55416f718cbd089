"""Samplers that remember: each step takes the predictions of steps before it along, and asks the model once.

What `onestep` says of its arguments holds here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from nativesd.config import Prediction
from nativesd.sampling.methods.onestep import Denoiser, Noise, ancestral, toward


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


def final_orders(steps: int, order: int, *, low_end: bool, euler_end: bool) -> list[int]:
    """The order of every step of a multistep method: rising at the start, and falling at the end where it is asked to.

    low_end    the last two steps are of first and at most second order (`lower_order_final` of diffusers' schedulers)
    euler_end  the last step is of first order, as a step to zero has to be
    """
    orders = [min(order, i + 1) for i in range(steps)]
    if low_end and steps > 1:
        orders[-2] = min(orders[-2], 2)
    if low_end or euler_end:
        orders[-1] = 1
    return orders


def sample_dpm_multistep(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    orders: Sequence[int],
    *,
    solver: str = "midpoint",
    of: Literal["clean", "noise"] = "clean",
) -> Tensor:
    """DPM-Solver++ (Lu et al. 2022b) of the clean prediction, or DPM-Solver (Lu et al. 2022a) of the noise; multistep.

    `orders` has 1 to 3 for every step, as `final_orders` gives them; `solver` ("midpoint", "heun") is that of order 2.
    """
    history: list[tuple[float, Tensor]] = []  # (log sigma, prediction), newest first
    for (sigma, sigma_next), order in zip(pairwise(sigmas), orders, strict=True):
        history = [(math.log(sigma), _predicted(denoise(x, sigma), x, sigma, of)), *history[:2]]
        if sigma_next == 0:
            return toward(x, history[0][1], sigma, 0.0) if of == "clean" else x - sigma * history[0][1]
        log, newest = history[0]
        step = log - math.log(sigma_next)
        slope = curve = None
        if order > 1:
            ratio = (history[1][0] - log) / step
            slope = (newest - history[1][1]) / ratio
        if order > 2 and slope is not None:
            older_ratio = (history[2][0] - history[1][0]) / step
            change = (slope - (history[1][1] - history[2][1]) / older_ratio) / (ratio + older_ratio)
            slope, curve = slope + ratio * change, change
        x = _dpm_step(x, sigma, sigma_next, newest, slope, curve, of, halved=order == 2 and solver == "midpoint")
    return x


def sample_dpm_singlestep(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    order: int,
    *,
    solver: str = "midpoint",
    of: Literal["clean", "noise"] = "clean",
    low_end: bool = True,
) -> Tensor:
    """DPM-Solver and DPM-Solver++ in blocks of `order` steps, each from the block's first sigma (Lu et al. 2022a, b).

    A block's steps are of order 1, 2, 3: the earlier ones are where the later ones look. `low_end`: what is left over
    at the end is of lower order (`lower_order_final` of diffusers' DPMSolverSinglestepScheduler); a step to zero is of
    first.
    """
    steps = len(sigmas) - 1
    orders = [1 + i % order for i in range(steps)]
    if (low_end and steps % order == 0) or sigmas[-1] == 0:
        orders[-1] = 1
    block: list[tuple[float, Tensor]] = []  # (log sigma, prediction) of the block, oldest first
    start = x
    for (sigma, sigma_next), reach in zip(pairwise(sigmas), orders, strict=True):
        predicted = _predicted(denoise(x, sigma), x, sigma, of)
        if reach == 1:
            block, start = [], x
        block.append((math.log(sigma), predicted))
        if sigma_next == 0:
            return toward(x, predicted, sigma, 0.0) if of == "clean" else x - sigma * predicted
        log, first = block[0]
        step = log - math.log(sigma_next)
        slope = curve = None
        if reach > 1:
            ratio = (log - block[-1][0]) / step
            slope = (block[-1][1] - first) / ratio
        if reach > 2 and solver == "heun" and slope is not None:
            near = (log - block[1][0]) / step
            near_slope = (block[1][1] - first) / near
            curve = 2 * (slope - near_slope) / (ratio - near)
            slope = (ratio * near_slope - near * slope) / (ratio - near)
        x = _dpm_step(
            start, math.exp(log), sigma_next, first, slope, curve, of, halved=reach == 2 and solver == "midpoint"
        )
    return x


def _predicted(denoised: Tensor, x: Tensor, sigma: float, of: Literal["clean", "noise"]) -> Tensor:
    return denoised if of == "clean" else (x - denoised) / sigma


def _dpm_step(
    x: Tensor,
    sigma: float,
    sigma_next: float,
    value: Tensor,
    slope: Tensor | None,
    curve: Tensor | None,
    of: Literal["clean", "noise"],
    *,
    halved: bool,
) -> Tensor:
    """Integrates the prediction, as `value`, `slope` and `curve` in log sigma give it, with the exponential's weight.

    `halved`: the slope counts half of the value's weight ("midpoint"), else as the integral has it ("heun").
    """
    h = math.log(sigma / sigma_next)
    if h == 0:
        return x
    a, scale = (-h, 1.0) if of == "clean" else (h, sigma_next)
    out = (x * math.exp(-h) if of == "clean" else x) - value * (scale * math.expm1(a))
    if slope is not None:
        out = out - slope * (scale * (math.expm1(a) / 2 if halved else math.expm1(a) / a - 1))
    if curve is not None:
        out = out - curve * (scale * ((math.expm1(a) - a) / a**2 - 0.5))
    return out


def sample_deis(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], orders: Sequence[int]) -> Tensor:
    """DEIS (Zhang and Chen 2023), multistep in log rho: the polynomial through the last noises, integrated exactly.

    `orders` has 1 to 3 for every step, as `final_orders` gives them.
    """
    history: list[tuple[float, Tensor]] = []  # (log sigma, noise), newest first
    for (sigma, sigma_next), order in zip(pairwise(sigmas), orders, strict=True):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        history = [(math.log(sigma), (x - denoised) / sigma), *history[:2]]
        h = math.log(sigma_next / sigma)
        # the integrals of u^k e^u from 0 to h, u being log(rho / sigma)
        moments = [math.expm1(h)]
        moments += [h * math.exp(h) - moments[0]]
        moments += [h**2 * math.exp(h) - 2 * moments[1]]
        places = [log - history[0][0] for log, _ in history[:order]]
        for i, (place, (_, noise)) in enumerate(zip(places, history, strict=False)):
            others = places[:i] + places[i + 1 :]
            weights = through_zeros(others)
            divisor = math.prod(place - other for other in others)
            x = x + noise * (sigma * sum(w * m for w, m in zip(weights, moments, strict=False)) / divisor)
    return x


def through_zeros(zeros: Sequence[float]) -> list[float]:
    """The coefficients of the product of (u - zero), the constant first."""
    coefficients = [1.0]
    for zero in zeros:
        raised, scaled = [0.0, *coefficients], [-zero * c for c in coefficients] + [0.0]
        coefficients = [a + b for a, b in zip(raised, scaled, strict=True)]
    return coefficients


def sample_ipndm(denoise: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Improved pseudo linear multistep (Zhang and Chen 2023, section 3.3, iPNDM): Adams-Bashforth over the last four
    slopes, as if sigmas were even; it begins with fewer instead of a Runge-Kutta step.

    A step to zero takes the clean prediction's straight line like all others.
    """
    history: list[Tensor] = []
    for sigma, sigma_next in pairwise(sigmas):
        history = [*history[-3:], (x - denoise(x, sigma)) / sigma]
        weights = _ADAMS_BASHFORTH[len(history)]
        for weight, slope in zip(weights, history, strict=True):
            x = x + slope * (weight * (sigma_next - sigma))
    return x


def sample_res(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise | None = None, eta: float = 1.0
) -> Tensor:
    """RES multistep (Zhang et al. 2023, arXiv 2308.02157): an exponential integrator of second order over the last two
    predictions; with `noise` its ancestral form (ComfyUI's `res_multistep_ancestral`).
    """
    previous: tuple[Tensor, float, float] | None = None  # prediction, where it was, and to where it stepped down
    for sigma, sigma_next in pairwise(sigmas):
        down, up = ancestral(sigma, sigma_next, eta if noise is not None else 0.0)
        denoised = denoise(x, sigma)
        if previous is None or down == 0:
            x = toward(x, denoised, sigma, down)
        else:
            older, at, stepped = previous
            h = math.log(sigma / down)
            ratio = math.log(stepped / at) / h  # below zero
            first = math.expm1(-h) / -h
            second = (first - 1) / -h
            x = x * (down / sigma) + (denoised * (first - second / ratio) + older * (second / ratio)) * h
        if noise is not None:
            x = x + noise(sigma, sigma_next) * up
        previous = denoised, sigma, down
    return x


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
    1: (1.0,),
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
}
