"""Samplers on the reverse SDE that remember: ER-SDE and SA-Solver.

What `onestep` says of its arguments holds here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from nativesd.sampling.methods.multistep import through_zeros
from nativesd.sampling.methods.onestep import Denoiser, Noise

POINTS = 200
"""At which ER-SDE's integrals are summed up, as ComfyUI does."""


def er_scale(sigma: float) -> float:
    """phi of the paper's ER SDE 5 (table 1), by which noise is added faster where there is much."""
    return sigma * (math.exp(sigma**0.3) + 10)


def sample_er_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    scale: Callable[[float], float] = er_scale,
    stages: int = 3,
    points: int = POINTS,
) -> Tensor:
    """Extended reverse-time SDE solver (Cui et al. 2023, arXiv 2309.06169, algorithm 3), up to `stages` predictions.

    With the identity as `scale` it is the ODE's. Integrals are sums over `points`.
    """
    older: list[tuple[float, Tensor]] = []  # sigma, prediction; newest first
    slope_before: Tensor | None = None
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        end = scale(sigma_next)
        ratio = end / scale(sigma)
        out = x * ratio + denoised * (1 - ratio)
        if older and stages > 1:
            change = sigma_next - sigma
            width = -change / points
            places = [sigma_next + i * width for i in range(points)]
            slope = (denoised - older[0][1]) / (sigma - older[0][0])
            out = out + slope * (change + end * width * sum(1 / scale(place) for place in places))
            if slope_before is not None and stages > 2:
                curve = (slope - slope_before) / ((sigma - older[1][0]) / 2)
                weight = sum((place - sigma) / scale(place) for place in places)
                out = out + curve * (change**2 / 2 + end * width * weight)
            slope_before = slope
        spread = math.sqrt(max(0.0, sigma_next**2 - (sigma * ratio) ** 2))
        x = out + noise(sigma, sigma_next) * spread
        older = [(sigma, denoised), *older[:1]]
    return x


def sample_sa_solver(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    taus: Sequence[float],
    *,
    predictor: int = 2,
    corrector: int = 2,
    low_end: bool = True,
) -> Tensor:
    """SA-Solver (Xue et al. 2023, arXiv 2309.05019, algorithm 1): Adams's predictor and corrector on the SDE.

    `taus` has for every step how much noise it adds, 0 to 1. The corrector takes the next step's prediction and the
    same noise, and asks for nothing more. `low_end`: the last steps are of lower order.
    """
    steps = len(sigmas) - 1
    history: list[tuple[float, Tensor]] = []  # -log sigma, prediction; newest first
    begun: tuple[Tensor, Tensor, int] | None = None  # the last step's start and noise, and the order of its correction
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        here = (-math.log(sigma), denoised)
        if begun is not None:
            start, drawn, order = begun
            x = _adams(start, sigmas[i - 1], sigma, [here, *history][:order], taus[i - 1], drawn)
        history = [here, *history[:3]]
        if sigma_next == 0:
            return denoised
        left = steps - i if low_end else steps
        drawn = noise(sigma, sigma_next)
        begun = x, drawn, min(corrector, left + 1, i + 2)
        x = _adams(x, sigma, sigma_next, history[: min(predictor, left, i + 1)], taus[i], drawn)
    return x


def _adams(
    x: Tensor, sigma: float, sigma_next: float, points: Sequence[tuple[float, Tensor]], tau: float, noise: Tensor
) -> Tensor:
    """One step over the polynomial through predictions at `points` of -log sigma, integrated exactly."""
    t, t_next = -math.log(sigma), -math.log(sigma_next)
    h, power = t_next - t, 1 + tau**2
    decay = math.exp(-power * h)
    moments = [(1 - decay) / power]  # the integrals of u^k e^(power u) from -h to 0
    for k in range(1, len(points)):
        moments.append((-((-h) ** k) * decay - k * moments[-1]) / power)
    places = [place - t_next for place, _ in points]
    weights = []
    for i, place in enumerate(places):
        others = places[:i] + places[i + 1 :]
        divisor = math.prod(place - other for other in others)
        weights.append(sum(c * m for c, m in zip(through_zeros(others), moments, strict=True)) / divisor)
    if len(points) == 2:
        # the authors' change of third order, for few steps (`stochastic_adams_bashforth_update` of diffusers)
        more = (h**2 / 2 - (h * power - 1 + decay) / power**2) / (places[0] - places[1])
        weights = [weights[0] + more, weights[1] - more]
    out = x * (math.exp(-(tau**2) * h) * sigma_next / sigma)
    for weight, (_, prediction) in zip(weights, points, strict=True):
        out = out + prediction * (power * weight)
    return out + noise * (sigma_next * math.sqrt(-math.expm1(-2 * tau**2 * h)))
