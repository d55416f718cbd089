"""Matrices as products of two smaller ones: the singular value decomposition, and how many of its values are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nativesd.errors import UsageError

ZERO = 1e-6
"""The largest singular value of a matrix that counts as zero; of it one is kept (kohya's MIN_SV)."""


@dataclass(frozen=True)
class Rule:
    """How many singular values are kept: at most `rank`, and with one of the others no more than it asks for.

    ratio       those above the largest divided by it (kohya's sv_ratio)
    cumulative  the fewest whose sum is this part of the sum of all, above 0 and at most 1 (sv_cumulative)
    frobenius   the fewest whose root of the sum of squares is this part of that of all (sv_fro)
    energy      the fewest whose sum of squares is this part of that of all: frobenius squared

    (kohya-ss/sd-scripts, networks/resize_lora.py.)
    """

    rank: int | None = None
    ratio: float | None = None
    cumulative: float | None = None
    frobenius: float | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        given = {name: v for name, v in vars(self).items() if v is not None and name != "rank"}
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} are two rules for one rank: pass one")
        if self.rank is None and not given:
            raise UsageError("say how large it may be: rank=, ratio=, cumulative=, frobenius= or energy=")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank must be a whole number above 0, not {self.rank}")
        for name, value in given.items():
            if not (math.isfinite(value) and (value >= 1 if name == "ratio" else 0 < value <= 1)):
                allowed = "from 1 on" if name == "ratio" else "above 0 and at most 1"
                raise UsageError(f"{name} must be a number {allowed}, not {value}")

    @property
    def is_dynamic(self) -> bool:
        """Whether ranks differ from layer to layer."""
        return bool({self.ratio, self.cumulative, self.frobenius, self.energy} - {None})

    def says(self) -> str:
        """In words."""
        return ", ".join(f"{name} {value:g}" for name, value in vars(self).items() if value is not None)

    def count(self, values: Tensor) -> int:
        """How many of the singular values (n,), the largest first, are kept: 1 at least."""
        most = len(values) if self.rank is None else min(self.rank, len(values))
        if float(values[0]) <= ZERO:
            return 1
        if self.ratio is not None:
            return max(1, min(most, int((values > values[0] / self.ratio).sum())))
        squares = values.double().square()
        if self.cumulative is not None:
            wanted, sums = self.cumulative, values.double().cumsum(0) / values.double().sum()
        elif self.frobenius is not None:
            wanted, sums = self.frobenius**2, squares.cumsum(0) / squares.sum()
        elif self.energy is not None:
            wanted, sums = self.energy, squares.cumsum(0) / squares.sum()
        else:
            return most
        return max(1, min(most, int(torch.searchsorted(sums, torch.tensor(wanted, dtype=sums.dtype))) + 1))


def split(matrix: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """The factors (O, r) and (r, I) of a matrix (O, I), and all its singular values, which the left one has."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    count = rule.count(values)
    return left[:, :count] * values[:count], right[:count], values


def shrink(up: Tensor, down: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """`split` of the product of (O, n) and (n, I), whose matrix is never made: it has n singular values at most."""
    if min(up.shape[0], down.shape[1]) <= up.shape[1]:
        return split(up @ down, rule)
    (left, one), (right, other) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    inner, outer, values = split(one @ other.T, rule)
    return left @ inner, outer @ right.T, values


def clamp(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both factors within plus and minus the quantile of their numbers (kohya's clamp_quantile)."""
    numbers = torch.cat([up.flatten(), down.flatten()]).numpy()
    most = float(np.quantile(numbers, quantile))
    return up.clamp(-most, most), down.clamp(-most, most)
