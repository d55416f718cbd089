"""UniPC: a predictor, and a corrector that costs no further call of the model.

What `onestep` says of its arguments holds here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nativesd.sampling.methods.onestep import Denoiser


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
