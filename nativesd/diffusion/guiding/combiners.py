"""Other ways in which answers become one; the records of `guiders` say what each does, and where it is from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nativesd.diffusion.guiding.combine import Parts, moved


class Unchanged:
    """A combiner that changes nothing."""

    def change(self, parts: Parts) -> Parts:
        """Other parts for these."""
        return parts

    def finish(self, parts: Parts, combined: Tensor) -> Tensor:
        """Another guided answer for this."""
        return combined


class Projecting(Unchanged):
    """What `APG` says."""

    def __init__(self, eta: float, threshold: float, momentum: float) -> None:
        self._eta, self._threshold, self._momentum = eta, threshold, momentum
        self._average: Tensor | None = None

    def change(self, parts: Parts) -> Parts:
        """Other parts for these."""
        share = parts.at.of_output
        axes = tuple(range(1, parts.direction.ndim))
        added = parts.direction * share  # between clean latents
        if self._momentum and self._average is not None:
            added = added + self._momentum * self._average
        self._average = added
        if self._threshold > 0:
            added = added * (self._threshold / _norm(added)).clamp(max=1)
        along = parts.at.clean(parts.positive)
        along = along / _norm(along)
        parallel = (added * along).sum(axes, keepdim=True) * along
        direction = (added - parallel + self._eta * parallel) / share
        return replace(parts, start=parts.start + (parts.positive - parts.base), direction=direction,
                       factor=parts.factor - 1)  # fmt: skip


def _norm(x: Tensor) -> Tensor:
    """Of each picture (B, ...): (B, 1, ...)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
    return norm.clamp(min=1e-12)


class Damping(Unchanged):
    """What `TCFG` says."""

    def change(self, parts: Parts) -> Parts:
        """Other parts for these."""
        noises = [parts.at.noise(output).flatten(1).double() for output in (parts.positive, parts.base)]
        pair = torch.stack(noises, dim=1)  # (B, 2, CHW)
        weights = torch.linalg.eigh(pair @ pair.mT).eigenvectors[:, :, -1:]  # (B, 2, 1), of the larger eigenvalue
        shared = (pair * weights).sum(1)
        shared = shared / shared.norm(dim=1, keepdim=True).clamp(min=1e-12)
        damped = (noises[1] * shared).sum(1, keepdim=True) * shared  # (B, CHW)
        return moved(parts, parts.at.of_noise(damped.to(parts.base).view_as(parts.base)))


class Limiting(Unchanged):
    """What `DynamicThreshold` says."""

    def __init__(self, mimic: float, percentile: float, phi: float) -> None:
        self._mimic, self._percentile, self._phi = mimic, percentile, phi

    def finish(self, parts: Parts, combined: Tensor) -> Tensor:
        """Another guided answer for this."""
        clean, mimicked = (parts.at.clean(output).flatten(2) for output in (combined, parts.combined(self._mimic)))
        mean = clean.mean(2, keepdim=True)  # (B, C, 1)
        centered = clean - mean
        wanted = (mimicked - mimicked.mean(2, keepdim=True)).abs().amax(2, keepdim=True)
        reached = torch.quantile(centered.abs(), self._percentile, dim=2, keepdim=True)
        most = torch.maximum(wanted, reached).clamp(min=1e-12)
        limited = centered.clamp(-most, most) / most * wanted + mean
        return parts.at.of_clean(torch.lerp(clean, limited, self._phi).view_as(combined))
