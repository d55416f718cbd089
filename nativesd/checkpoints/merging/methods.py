"""What becomes of one parameter of several models: the methods, each a formula over tensors in float32.

A, B, C, ... are the models in the order they are named. Trimming, signs and norms are a parameter's own, not those of
the whole model, so that one parameter at a time is in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 15  # numbers that are computed at once: they stay in the processor's cache, and torch starts no threads


@dataclass(frozen=True)
class How:
    """What a method is told, for one parameter."""

    alpha: float
    weights: tuple[float, ...] = ()
    """One for each model"""
    density: float = 1.0
    """The part of the differences that is kept, above 0 and at most 1"""
    seed: int = 0
    name: str = ""
    """The parameter's, by which what is drawn at random differs"""


@dataclass(frozen=True)
class Method:
    """One way to merge. `combine` takes the models' tensors, all of one shape, in float32."""

    formula: str
    """As help and docs show it"""
    least: int
    """Models that it needs"""
    most: int | None
    """Models that it takes; None: any number"""
    combine: Callable[[Sequence[Tensor], How], Tensor]
    alpha: float | None = None
    """The usual one; None: it has none"""
    density: float | None = None
    """The usual one; None: it has none"""
    by_element: bool = False
    """Whether every number comes of the numbers in its place alone, so that pieces can be computed one by one"""
    ends_in_b: bool = False
    """Whether alpha 1 is B"""
    any_dtype: bool = False
    """Whether `combine` computes in float32 and rounds once, whatever the dtype of its tensors, if they have one"""

    @property
    def begins_with_a(self) -> bool:
        """Whether alpha 0 is A."""
        return self.alpha is not None


def _weighted_sum(models: Sequence[Tensor], how: How) -> Tensor:
    a, b = models
    return torch.lerp(a, b, how.alpha)


def _add_difference(models: Sequence[Tensor], how: How) -> Tensor:
    a, b, c = models
    return a + (b - c) * how.alpha


def _sum(models: Sequence[Tensor], how: How) -> Tensor:
    out = models[0] * how.weights[0]
    for model, weight in zip(models[1:], how.weights[1:], strict=True):
        out.add_(model, alpha=weight)
    return out


def _slerp(models: Sequence[Tensor], how: How) -> Tensor:
    """Shoemake 1985: along the arc between the directions, by alpha between the lengths; a line where they are one."""
    a, b = models
    lengths = math.sqrt(_dot(a, a)), math.sqrt(_dot(b, b))
    cosine = _dot(a, b) / (lengths[0] * lengths[1]) if all(lengths) else math.nan
    angle = math.acos(max(-1.0, min(1.0, cosine))) if math.isfinite(cosine) else 0.0
    if math.sin(angle) < 1e-6:  # where float64 cannot tell the arc from the line
        return torch.lerp(a, b, how.alpha)
    length = (lengths[0] + (lengths[1] - lengths[0]) * how.alpha) / math.sin(angle)
    shares = [
        math.sin(part * angle) * length / own
        for part, own in zip((1 - how.alpha, how.alpha), lengths, strict=True)
    ]  # fmt: skip
    out = torch.empty(a.shape)
    for piece, one, other in zip(*(torch.split(each.reshape(-1), PIECE) for each in (out, a, b)), strict=True):
        piece.copy_(one.double() * shares[0] + other.double() * shares[1])
    return out


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of the products, in float64: in float32 the millions of a matrix lose their last digits."""
    pieces = zip(torch.split(a.reshape(-1), PIECE), torch.split(b.reshape(-1), PIECE), strict=True)
    return math.fsum(float(one.double() @ other.double()) for one, other in pieces)


def _train_difference(models: Sequence[Tensor], how: How) -> Tensor:
    """SuperMerger's calcmode "trainDifference" (hako-mikan/sd-webui-supermerger, scripts/mergers/mergers.py)."""
    a, b, c = models
    far = (b - a).abs()
    share = (far / (far + (b - c).abs())).nan_to_num_(0)
    return a + (b - c) * share * (1.8 * how.alpha)


def _ties(models: Sequence[Tensor], how: How) -> Tensor:
    """Yadav et al. 2023, section 4: trim, elect the signs by the sums, and the mean of those that agree."""
    base, *tuned = models
    differences = torch.stack([_largest(model - base, how.density) for model in tuned])
    agree = differences.sign() == differences.sum(0).sign()
    mean = differences.mul_(agree).sum(0) / agree.sum(0).clamp_(min=1)
    return base + mean * how.alpha


def _dare(models: Sequence[Tensor], how: How) -> Tensor:
    """Yu et al. 2023, section 3.2: of the differences a random part is dropped, and the rest made larger for it; here
    their mean."""
    base, *tuned = models
    total = torch.zeros_like(base)
    for number, model in enumerate(tuned):
        drawn = torch.rand(base.shape, generator=_generator(how.seed, how.name, number))
        total += (model - base) * (drawn < how.density)
    return base + total * (how.alpha / (how.density * len(tuned)))


def _magnitude(models: Sequence[Tensor], how: How) -> Tensor:
    base, tuned, *origin = models
    return base + _largest(tuned - (origin[0] if origin else base), how.density) * how.alpha


def _largest(difference: Tensor, density: float) -> Tensor:
    """The numbers of the largest magnitude, `density` of all, and zeros: from the k-th smallest on, k the whole part of
    n (1 - density), as TIES's own code counts (prateeky2806/ties-merging, `topk_values_mask`)."""
    count = int(difference.numel() * (1 - density))
    if count < 1:
        return difference
    magnitude = difference.abs()
    threshold = magnitude.flatten().kthvalue(count).values
    return difference * (magnitude >= threshold)


def _generator(seed: int, name: str, number: int) -> torch.Generator:
    """What is drawn at random depends on the seed, the parameter and the model, and on nothing else."""
    digest = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


METHODS: Mapping[str, Method] = {
    "weighted-sum": Method(
        "A + alpha (B - A)", 2, 2, _weighted_sum, alpha=0.5, by_element=True, ends_in_b=True,
        any_dtype=True,
    ),
    "add-difference": Method("A + alpha (B - C)", 3, 3, _add_difference, alpha=1.0, by_element=True),
    "sum": Method("the sum of weight x model, the weights adding up to 1", 2, None, _sum, by_element=True),
    "slerp": Method("from A to B by alpha along the arc", 2, 2, _slerp, alpha=0.5, ends_in_b=True),
    "train-difference": Method(
        "A + 1.8 alpha (B - C) |B - A| / (|B - A| + |B - C|)", 3, 3, _train_difference, alpha=1.0, by_element=True
    ),
    "ties": Method(
        "A + alpha x the mean of the largest differences from A that agree in sign", 2, None, _ties,
        alpha=1.0, density=0.2,
    ),
    "dare": Method(
        "A + alpha x the mean of the differences from A, of which a random part is kept, divided by density",
        2, None, _dare, alpha=1.0, density=0.1,
    ),
    "magnitude": Method(
        "A + alpha x the largest of B - C (of B - A, without C)", 2, 3, _magnitude, alpha=1.0, density=0.2
    ),
}  # fmt: skip
"""The densities are the papers': TIES keeps a fifth, DARE drops nine tenths."""


IN_FLOAT32 = {torch.float16, torch.bfloat16, torch.float32}
"""The dtypes whose numbers torch's own lerp takes, computing in float32, as numbers of a dtype of their own."""


@torch.no_grad()
def combine(method: Method, models: Sequence[Tensor], how: How, dtype: torch.dtype) -> Tensor:
    """The merged tensor in `dtype`, of the models' tensors (all of one shape, of any dtypes); computed in float32."""
    if not (method.any_dtype and dtype in IN_FLOAT32 and all(model.dtype == dtype for model in models)):
        models = [model.float() for model in models]
    return method.combine(models, how).to(dtype)
