"""Samplers that lay out steps of their own: DPM fast, DPM adaptive, Restart.

What `onestep` says of its arguments holds here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from nativesd.sampling.methods.onestep import Denoiser, Noise, ancestral, sample_heun
from nativesd.sampling.schedule import karras_sigmas


class _Solver:
    """DPM-Solver's steps of order 1 to 3 from one state (Lu et al. 2022a, algorithms 1, 4 and 5), in t = -log sigma.

    They share the predicted noises, which are asked for once.
    """

    def __init__(self, denoise: Denoiser, x: Tensor, t: float) -> None:
        self._denoise, self._x, self._t = denoise, x, t
        self._noises: dict[tuple[float, int], Tensor] = {}

    def _noise(self, x: Tensor, t: float, order: int) -> Tensor:
        """The predicted noise; looked up by where it is and the order of the step that led there."""
        if (t, order) not in self._noises:
            sigma = math.exp(-t)
            self._noises[t, order] = (x - self._denoise(x, sigma)) / sigma
        return self._noises[t, order]

    def to(self, t_next: float, order: int, third: bool = False) -> Tensor:
        """The state at `t_next`. With `third` a step of second order looks at a third of the way, not at the half."""
        x, t, h = self._x, self._t, t_next - self._t
        first = self._noise(x, t, 0)
        end = math.exp(-t_next)
        out = x - first * (end * math.expm1(h))
        if order == 1:
            return out
        part = 1 / 3 if order == 3 or third else 1 / 2
        near = t + part * h
        at_near = x - first * (math.exp(-near) * math.expm1(part * h))
        second = self._noise(at_near, near, 1)
        if order == 2:
            return out - (second - first) * (end / (2 * part) * math.expm1(h))
        part = 2 / 3
        far, grown = t + part * h, math.expm1(part * h)
        at_far = (
            x - first * (math.exp(-far) * grown) - (second - first) * (math.exp(-far) * 2 * (grown / (part * h) - 1))
        )
        farther = self._noise(at_far, far, 2)
        return out - (farther - first) * (end / part * (math.expm1(h) / h - 1))


def _below(t: float, t_next: float, t_end: float, eta: float) -> tuple[float, float]:
    """To which t an ancestral step goes, and how much noise is added then."""
    if not eta:
        return t_next, 0.0
    down, _ = ancestral(math.exp(-t), math.exp(-t_next), eta)
    stepped = min(t_end, -math.log(down)) if down > 0 else t_end
    return stepped, math.sqrt(max(0.0, math.exp(-2 * t_next) - math.exp(-2 * stepped)))


def sample_dpm_fast(
    denoise: Denoiser,
    x: Tensor,
    sigma_max: float,
    sigma_min: float,
    evaluations: int,
    noise: Noise | None = None,
    eta: float = 1.0,
) -> Tensor:
    """DPM-Solver-fast (Lu et al. 2022a, appendix D.2): `evaluations` of the model, in steps of third order, even in log
    sigma, down to `sigma_min`, which stays in x; with `noise` ancestral (k-diffusion `sample_dpm_fast`).
    """
    eta = eta if noise is not None else 0.0
    start, end = -math.log(sigma_max), -math.log(sigma_min)
    count = evaluations // 3 + 1
    orders = [3] * (count - 2) + [2, 1] if evaluations % 3 == 0 else [3] * (count - 1) + [evaluations % 3]
    for i, order in enumerate(orders):
        t, t_next = (start + (end - start) * k / count for k in (i, i + 1))
        stepped, up = _below(t, t_next, end, eta)
        x = _Solver(denoise, x, t).to(stepped, order)
        if noise is not None:
            x = x + noise(math.exp(-t), math.exp(-t_next)) * up
    return x


def sample_dpm_adaptive(
    denoise: Denoiser,
    x: Tensor,
    sigma_max: float,
    sigma_min: float,
    noise: Noise | None = None,
    eta: float = 1.0,
    *,
    relative: float = 0.05,
    absolute: float = 0.0078,
) -> Tensor:
    """DPM-Solver-23 (Lu et al. 2022a, appendix C): steps so long that the second and the third order agree within
    `absolute`, or `relative` to x; with `noise` ancestral (k-diffusion `sample_dpm_adaptive`, and its defaults).
    """
    eta = eta if noise is not None else 0.0
    t, end = -math.log(sigma_max), -math.log(sigma_min)
    length, before = 0.05, x
    power = 1.5 if eta else 3.0
    while t < end - 1e-5:
        t_next = min(end, t + length)
        stepped, up = _below(t, t_next, end, eta)
        solver = _Solver(denoise, x, t)
        low, high = solver.to(stepped, 2, third=True), solver.to(stepped, 3)
        allowed = (relative * low.abs().maximum(before.abs())).clamp(min=absolute)
        error = float(((low - high) / allowed).norm()) / math.sqrt(x.numel())
        if not math.isfinite(error):
            return high
        # an integral controller: the step that would have had an error of 1, limited (Hairer et al., II.4)
        factor = 1 + math.atan((1 / (1e-8 + error)) ** (1 / power) - 1)
        if factor >= ACCEPTED:
            before, x = low, high
            if noise is not None:
                x = x + noise(math.exp(-t), math.exp(-t_next)) * up
            t = t_next
        length *= factor
    return x


ACCEPTED = 0.81  # of its length, which a step may be shortened to next and still count


def sample_restart(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Restart (Xu et al. 2023, algorithm 2): Heun's steps, and from sigma 0.1 back up to 2 by noise, once or twice.

    In as many steps as `sigmas` has, of which 9, or a quarter twice, are those of the restarts; under 20 steps there is
    none. From 20 on the sigmas are Karras's between the first and the last above zero (A1111's `restart_sampler` in
    modules/sd_samplers_extra.py).
    """
    steps = len(sigmas) - 1
    if steps < 20:
        return sample_heun(denoise, x, sigmas)
    again, times = (steps // 4, 2) if steps >= 36 else (9, 1)
    main: list[float] = [*karras_sigmas(steps - again * times, sigmas[-2], sigmas[0]).tolist(), 0.0]
    low, high = (min(range(len(main)), key=lambda i: abs(main[i] - wanted)) for wanted in (0.1, 2.0))
    if high >= low:
        return sample_heun(denoise, x, main)
    x = sample_heun(denoise, x, main[: low + 1])
    for _ in range(times):
        x = x + noise(main[low], main[high]) * math.sqrt(main[high] ** 2 - main[low] ** 2)
        x = sample_heun(denoise, x, karras_sigmas(again + 1, main[low], main[high]).tolist())
    return sample_heun(denoise, x, main[low:])
