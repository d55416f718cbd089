"""The VAE over strips of a picture, with the whole picture's result.

Tiles that are decoded on their own, and blended, differ from the whole picture: every GroupNorm takes its statistics
from its tile, and the attention sees its tile only. Here a picture is worked on in strips of rows that share both, so
that the result is the whole picture's up to rounding and has no seams. The low resolutions, with the attention, run
whole. From there on a feature map is a list of strips; what a layer reads beyond a strip are rows of its neighbours.
A residual block goes over the strips twice: once for the second norm's statistics, once for the output, where a strip
is let go of as soon as nothing reads it any more. So there is about one feature map of full size at a time, where a
plain decode has four of twice the width, for half as many operations again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.models.layers import ResnetBlock, Upsample
from nativesd.models.vae import VAE, Stage

MAPS = 4  # live feature maps at the peak of a plain run: a convolution's input and output, and a reordered copy of each


class Window(NamedTuple):
    """A strip's rows (B, C, H, W), the first `above` and the last `below` of which are its neighbours'."""

    rows: Tensor
    above: int
    below: int

    def own(self, x: Tensor) -> Tensor:
        """Of `x`, which has the rows of this window, those of the strip itself."""
        return x[:, :, self.above : x.shape[2] - self.below]


class Source(Protocol):
    """A feature map that is read in windows."""

    def __len__(self) -> int: ...
    def window(self, index: int, halo: int) -> Window:
        """Strip `index` with `halo` rows on either side, none beyond the picture."""
        ...

    def release(self, index: int) -> None:
        """Strip `index` is not read any more."""
        ...


class Strips:
    """A feature map in memory, strip by strip from top to bottom. Every strip has at least as many rows as a halo."""

    def __init__(self, strips: Iterable[Tensor]) -> None:
        self.strips = dict(enumerate(strips))
        self.count = len(self.strips)

    def __len__(self) -> int:
        return self.count

    def window(self, index: int, halo: int) -> Window:
        """See `Source`."""
        above = halo if index else 0
        below = halo if index < self.count - 1 else 0
        parts = [self.strips[index]]
        if above:
            parts.insert(0, self.strips[index - 1][:, :, -above:])
        if below:
            parts.append(self.strips[index + 1][:, :, :below])
        return Window(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0], above, below)

    def release(self, index: int) -> None:
        """See `Source`."""
        self.strips.pop(index, None)


@dataclass(frozen=True)
class Upsampled:
    """A feature map of twice the size, computed whenever it is read: nearest neighbours, then a 3x3 convolution."""

    source: Source
    upsample: Upsample

    def __len__(self) -> int:
        return len(self.source)

    def window(self, index: int, halo: int) -> Window:
        """See `Source`."""
        small = self.source.window(index, halo // 2 + 1)  # a row more than `halo`, as the convolution spoils the last
        above, below = (min(rows, halo) for rows in (2 * small.above, 2 * small.below))
        rows = self.upsample(small.rows)
        rows = rows[:, :, 2 * small.above - above : rows.shape[2] - 2 * small.below + below]
        return Window(rows, above, below)

    def release(self, index: int) -> None:
        """See `Source`."""
        self.source.release(index)


def _windows(source: Source, halo: int, *, consume: bool = False) -> Iterator[Window]:
    """All windows from top to bottom. With `consume`, strips are released when no later window needs them."""
    for index in range(len(source)):
        yield source.window(index, halo)
        if consume:
            source.release(index - 1)


def _convolve(conv: nn.Conv2d, source: Source) -> Strips:
    """A 3x3 convolution with padding 1."""
    return Strips(window.own(conv(window.rows)).clone() for window in _windows(source, 1, consume=True))


def _downsample(conv: nn.Conv2d, source: Source) -> Strips:
    """The encoder's 3x3 convolution of stride 2, padded at the right and at the bottom only."""

    def halve(window: Window) -> Tensor:
        rows = window.rows[:, :, window.above :]
        out: Tensor = conv(F.pad(rows, (0, 1, 0, 1 - window.below)))
        return out

    return Strips(halve(window) for window in _windows(source, 1, consume=True))


class Moments(NamedTuple):
    """A GroupNorm's statistics over a whole feature map, each (B, groups) float32."""

    mean: Tensor
    rstd: Tensor


def _moments(norm: nn.GroupNorm, strips: Iterable[Tensor]) -> Moments:
    """The statistics of a feature map from those of its strips."""
    sizes, means, variances = [], [], []
    for rows in strips:
        groups = rows.float().reshape(len(rows), norm.num_groups, -1)  # (B, C, H, W) -> (B, groups, C / groups * HW)
        variance, mean = torch.var_mean(groups, dim=-1, correction=0)
        sizes.append(groups.shape[-1])
        means.append(mean)
        variances.append(variance)
    weights = (torch.tensor(sizes) / sum(sizes))[:, None, None].to(means[0])
    stacked = torch.stack(means)  # (strips, B, groups)
    mean = (weights * stacked).sum(0)
    variance = (weights * (torch.stack(variances) + (stacked - mean) ** 2)).sum(0)
    return Moments(mean, (variance + norm.eps).rsqrt())


def _activate(norm: nn.GroupNorm, rows: Tensor, moments: Moments) -> Tensor:
    """SiLU of the group norm of `rows` (B, C, H, W) with the whole feature map's statistics."""
    per_group = norm.num_channels // norm.num_groups
    # (B, groups) -> (B, C)
    mean, rstd = (moment.repeat_interleave(per_group, dim=1) for moment in moments)
    scale = rstd * norm.weight.float()
    shift = norm.bias.float() - mean * scale
    out = torch.addcmul(shift[..., None, None], rows.float(), scale[..., None, None])  # (B, C) -> (B, C, 1, 1)
    return F.silu(out, inplace=True).to(rows.dtype)


def _resnet(block: ResnetBlock, source: Source) -> Strips:
    """What `ResnetBlock.forward` computes, strip by strip; it lets go of its source."""
    first = _moments(block.norm1, (window.rows for window in _windows(source, 0)))

    def hidden(rows: Tensor) -> Tensor:
        out: Tensor = block.conv1(_activate(block.norm1, rows, first))
        return out

    second = _moments(block.norm2, (window.own(hidden(window.rows)) for window in _windows(source, 1)))

    def output(window: Window) -> Tensor:
        h = block.conv2(_activate(block.norm2, hidden(window.rows), second))
        x = window.own(window.rows)
        out: Tensor = (x if block.shortcut is None else block.shortcut(x)) + window.own(h)
        return out

    return Strips(output(window) for window in _windows(source, 2, consume=True))


def _resnets(stage: Stage, source: Source) -> Source:
    for block in stage.resnets:
        source = _resnet(cast(ResnetBlock, block), source)
    return source


def _cut(x: Tensor, pixels: int, tile: int, multiple: int = 1) -> Strips:
    """Strips of `x` (1, C, H, W), a map of a picture of `pixels`, of whole multiples of rows, two at the least."""
    units = x.shape[2] // multiple
    count = max(1, min(math.ceil(pixels / tile**2), units // 2))
    sizes = [len(part) * multiple for part in torch.arange(units).tensor_split(count)]
    return Strips(torch.split(x, sizes, dim=2))


def decode_strips(vae: VAE, latents: Tensor, tile: int) -> Tensor:
    """Images (1, 3, f * h, f * w) of unscaled latents (1, C, h, w)."""
    pixels = latents.shape[2] * latents.shape[3] * vae.config.factor**2
    room = vae.config.widths[0] * pixels  # elements of the last feature map, which has to be there anyway
    decoder = vae.decoder
    x: Tensor = decoder.mid(decoder.conv_in(vae.post_quant_conv(latents)))
    stages = cast(list[Stage], list(decoder.up))
    while len(stages) > 1 and MAPS * 4 * x.numel() <= room:  # upsampled, it has four times the elements
        x = stages.pop(0)(x)
    for block in stages[0].resnets:
        x = block(x)

    source: Source = _cut(x, pixels, tile)
    del x
    for i, stage in enumerate(stages):
        if i:
            source = _resnets(stage, source)
        if stage.upsample is not None:
            source = Upsampled(source, stage.upsample)
            if stage.upsample.out_channels * pixels <= room * 4 ** (len(stages) - 2 - i):  # kept where there is room
                source = Strips(window.rows.clone() for window in _windows(source, 0, consume=True))
    moments = _moments(decoder.norm_out, (window.rows for window in _windows(source, 0)))
    return torch.cat(
        [
            window.own(decoder.conv_out(_activate(decoder.norm_out, window.rows, moments)))
            for window in _windows(source, 1, consume=True)
        ],
        dim=2,
    )


def encode_strips(vae: VAE, images: Tensor, tile: int) -> Tensor:
    """Mean and log-variance (1, 2 * C, h, w) of images (1, 3, f * h, f * w)."""
    pixels = images.shape[2] * images.shape[3]
    widths = vae.config.widths
    room = widths[0] * pixels
    encoder = vae.encoder
    stages = cast(list[Stage], list(encoder.down))
    source: Source = _convolve(encoder.conv_in, _cut(images, pixels, tile, vae.config.factor))
    level = 0
    while level < len(stages) and MAPS * max(widths[max(level - 1, 0) : level + 1]) * pixels > room * 4**level:
        source = _resnets(stages[level], source)
        downsample = stages[level].downsample
        if downsample is not None:
            source = _downsample(downsample, source)
        level += 1
    x = torch.cat([window.rows for window in _windows(source, 0, consume=True)], dim=2)
    for stage in stages[level:]:
        x = stage(x)
    x = encoder.conv_out(F.silu(encoder.norm_out(encoder.mid(x))))
    return torch.cat(vae.distribution(x), dim=1)


def tiny_strips(
    run: Callable[[Tensor], Tensor], x: Tensor, tile: int, blocks: tuple[int, ...], rows_in: int, rows_out: int
) -> Tensor:
    """TAESD's half `run` of `x` (1, C, H, W), in strips with all the rows that their own depend on.

    blocks            per resolution, the latents' own first
    rows_in, rows_out of `x` and of the result per row of latents
    """
    # every convolution reads one row on either side; a resolution has 3 per block and one that leads to it
    reach = sum((1 + 3 * count) / 2**i for i, count in enumerate(blocks)) + 1 / 2 ** (len(blocks) - 1)
    halo = math.ceil(reach) + 1
    height, factor = x.shape[2] // rows_in, max(rows_in, rows_out)
    step = max(halo, tile**2 // (factor * factor * (x.shape[3] // rows_in)))
    out = []
    for start in range(0, height, step):
        stop = min(start + step, height)
        first, last = max(start - halo, 0), min(stop + halo, height)
        y = run(x[:, :, first * rows_in : last * rows_in])
        out.append(y[:, :, (start - first) * rows_out : (stop - first) * rows_out].clone())
    return torch.cat(out, dim=2)
