"""Matrices as products of two smaller ones: the singular value decomposition, and how many of its values are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nativesd.errors import UsageError
from nativesd.pipeline.asked.readers import Reader, real, whole

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

    @classmethod
    def of(cls, **given: Any) -> Rule:
        """A rule of what a caller passes. Raises UsageError."""
        said = {name: READERS[name](name, value) for name, value in given.items() if value is not None}
        others = [name for name in said if name != "rank"]
        if len(others) > 1:
            raise UsageError(f"{' and '.join(others)} are two rules for one rank: pass one")
        if not said:
            raise UsageError("say how large it may be: rank=, ratio=, cumulative=, frobenius= or energy=")
        return cls(**said)

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


_PART = real(0, 1, above=True)
READERS: Mapping[str, Reader] = {
    "rank": whole(1), "ratio": real(1), "cumulative": _PART, "frobenius": _PART, "energy": _PART,
}  # fmt: skip
"""How the fields of a `Rule` are read."""


SPARE, SWEEPS = 32, 4
"""Directions beside those that are kept, and passes over the matrix: then what is lost is within 0.5 percent of the
least that can be, of a matrix of noise; of one whose singular values fall, as a training's, it is the least."""


def split(matrix: Tensor, rule: Rule) -> tuple[Tensor, Tensor, float]:
    """The factors (O, r) and (r, I) of a matrix (O, I), the left one with its singular values, and what they lack of
    it: |matrix - product| / |matrix| in the Frobenius norm.

    Where nothing but a rank is asked for, far below the matrix's own, the largest values are looked for alone (Halko,
    Martinsson and Tropp 2011, algorithm 4.4), which takes a tenth of the time of all of them.
    """
    if rule == Rule(rule.rank) and rule.rank is not None and 4 * (rule.rank + SPARE) <= min(matrix.shape):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same every time
            left, values, right = torch.svd_lowrank(matrix, rule.rank + SPARE, SWEEPS)
        up, down = left[:, : rule.rank] * values[: rule.rank], right.T[: rule.rank]
        return up, down, _lost(matrix, up, down)
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK takes four times as long for a wide matrix as for a tall one
        right, values, left = torch.linalg.svd(matrix.T, full_matrices=False)
        left, right = left.T, right.T
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    count = rule.count(values)
    squares = values.double().square()
    return left[:, :count] * values[:count], right[:count], math.sqrt(squares[count:].sum() / (squares.sum() or 1.0))


ROWS = 64  # that are compared at once


def _lost(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    """|matrix - up @ down| / |matrix|, with no second matrix of that size."""
    whole = lost = 0.0
    for rows, own in zip(torch.split(matrix, ROWS), torch.split(up, ROWS), strict=True):
        whole += float(rows.square().sum(dtype=torch.float64))
        lost += float(torch.addmm(rows, own, down, alpha=-1).square().sum(dtype=torch.float64))
    return math.sqrt(lost / (whole or 1.0))


def shrink(up: Tensor, down: Tensor, rule: Rule) -> tuple[Tensor, Tensor, float]:
    """`split` of the product of (O, n) and (n, I), whose matrix is never made: it has n singular values at most."""
    if min(up.shape[0], down.shape[1]) <= up.shape[1]:
        return split(up @ down, rule)
    (left, one), (right, other) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    inner, outer, error = split(one @ other.T, rule)
    return left @ inner, outer @ right.T, error


def clamp(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both factors within plus and minus the quantile of their numbers (kohya's clamp_quantile)."""
    numbers = torch.cat([up.flatten(), down.flatten()]).double().numpy()
    most = float(np.quantile(numbers, quantile))
    return up.clamp(-most, most), down.clamp(-most, most)
