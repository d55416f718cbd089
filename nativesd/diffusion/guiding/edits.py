"""What guidance changes in the UNet; the records of `guiders` say what for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fft import fftn, fftshift, ifftn, ifftshift

from nativesd.models.edits import Attend, Edit, Layer, Place
from nativesd.models.layers import attention

FLAT = 9999.0
"""Cells of a blur from which on all is its mean (SusungHong/SEG-SDXL)."""


@dataclass(frozen=True)
class Somewhere(Edit):
    """An edit of some layers."""

    layers: frozenset[str]

    def here(self, place: Place) -> bool:
        """Whether a place is one of them."""
        return not self.layers.isdisjoint(place.names)


class Alone(Somewhere):
    """Self-attention whose weights are the identity."""

    def self_attention(self, place: Place, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
        """As `Edit.self_attention`."""
        if not self.here(place):
            return attend(x)
        out: Tensor = layer.to_out(layer.keys_values(x)[1])
        return out


@dataclass(frozen=True)
class Blurred(Somewhere):
    """Self-attention whose queries are behind a Gaussian of `blur` cells, or are their mean."""

    blur: float

    def self_attention(self, place: Place, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
        """As `Edit.self_attention`."""
        if not self.here(place):
            return attend(x)
        k, v = layer.keys_values(x)
        q: Tensor = layer.to_q(x)
        if self.blur >= FLAT:
            q = q.mean(1, keepdim=True).expand_as(q)
        else:
            maps = torch.unflatten(q.transpose(1, 2), 2, place.size)  # (B, HW, C) -> (B, C, H, W)
            q = blurred(maps, self.blur).flatten(2).transpose(1, 2)
        out: Tensor = layer.to_out(attention(q, k, v, layer.heads))
        return out


class Skipped(Somewhere):
    """Transformer blocks that are passed by."""

    def skips(self, place: Place) -> bool:
        """As `Edit.skips`."""
        return self.here(place)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Feature maps (B, C, H, W) behind a Gaussian of `sigma` cells, reflected at the borders."""
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    size = min(size, min(x.shape[2:]) - (min(x.shape[2:]) % 2 - 1))
    at = torch.arange(size, device=x.device, dtype=torch.float32) - size // 2
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype).expand(x.shape[1], 1, -1)  # (C, 1, size)
    half = size // 2
    x = F.conv2d(F.pad(x, (0, 0, half, half), mode="reflect"), kernel[..., None], groups=x.shape[1])
    return F.conv2d(F.pad(x, (half, half, 0, 0), mode="reflect"), kernel[:, :, None], groups=x.shape[1])


@dataclass(frozen=True)
class Scaled(Edit):
    """Features and skips of some levels, scaled on the way up."""

    factors: dict[int, tuple[float, float]]
    """Level -> on the features, on the skip's low frequencies."""

    def join(self, place: Place, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """As `Edit.join`."""
        if place.level not in self.factors:
            return x, skip
        more, less = self.factors[place.level]
        half = x.shape[1] // 2
        return torch.cat([x[:, :half] * more, x[:, half:]], dim=1), _scale_low(skip, less)


def _scale_low(x: Tensor, factor: float) -> Tensor:
    """Feature maps (B, C, H, W) with their two by two lowest frequencies times a factor."""
    spectrum = fftshift(fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    row, column = x.shape[2] // 2, x.shape[3] // 2
    mask = torch.ones(x.shape[2:], device=x.device)
    mask[max(row - 1, 0) : row + 1, max(column - 1, 0) : column + 1] = factor
    out: Tensor = ifftn(ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1)).real
    return out.to(x.dtype)
