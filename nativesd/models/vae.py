"""The autoencoder of Stable Diffusion (AutoencoderKL), bare: latents here are unscaled.

Structure and constants: CompVis/latent-diffusion ldm/modules/diffusionmodules/model.py (Encoder, Decoder).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.config import VAEConfig
from nativesd.models.layers import Attention, Context, ResnetBlock, Upsample
from nativesd.models.tiling import pad_end

EPS = 1e-6  # of every GroupNorm in the VAE (`Normalize` in the source above)


class PixelAttention(Attention):
    """Single-head self-attention over the pixels of a feature map, behind a group norm, added to its input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__(width, heads=1, bias=True)
        self.norm = nn.GroupNorm(groups, width, EPS)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h: Tensor = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        return x + super().forward(h).transpose(1, 2).reshape(x.shape)  # (B, HW, C) -> (B, C, H, W)


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(width, width, time_width=None, groups=groups, eps=EPS) for _ in range(2)
        )
        self.attention = PixelAttention(width, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        out: Tensor = self.resnets[1](self.attention(self.resnets[0](x)))
        return out


class Stage(nn.Module):
    """One resolution: residual blocks, then a change of resolution (or none)."""

    def __init__(self, width_in: int, width: int, layers: int, groups: int, resample: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(width if j else width_in, width, time_width=None, groups=groups, eps=EPS) for j in range(layers)
        )
        self.downsample = nn.Conv2d(width, width, 3, stride=2) if resample == "down" else None
        self.upsample = Upsample(width) if resample == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W), halved or doubled."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.downsample is not None:
            x = self.downsample(pad_end(x, self.downsample))  # asymmetric: right and bottom only
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    """Images to the moments of the latents: (B, 3, H, W) in [-1, 1] -> (B, 2 * latent channels, H / f, W / f)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], width, config.layers, config.groups, "down" if i < last else None)
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Latents to images: (B, latent channels, h, w) -> (B, 3, f * h, f * w), about [-1, 1]. `up` starts lowest."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, last = config.widths[::-1], len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = Middle(widths[0], config.groups)
        self.up = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], width, config.layers + 1, config.groups, "up" if i < last else None)
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.mid(self.conv_in(x))
        for stage in self.up:
            x = stage(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class VAE(nn.Module):
    """Encoder and decoder with the 1x1 convolutions on the latents' side of each, or the half that `config` names."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        if config.half != "decoder":
            self.encoder = Encoder(config)
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        if config.half != "encoder":
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)
            self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of `images` (B, 3, H, W) in [-1, 1], (B, channels, H / f, W / f)."""
        return self.distribution(self.encoder(images))

    def distribution(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, channels, h, w), of the encoder's output (B, 2 * channels, h, w).

        The log-variance is clamped to [-30, 20] (`DiagonalGaussianDistribution` of CompVis/latent-diffusion).
        """
        mean, logvar = self.quant_conv(moments).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, f * h, f * w), about [-1, 1] and not clamped, of unscaled `latents` (B, channels, h, w)."""
        out: Tensor = self.decoder(self.post_quant_conv(latents))
        return out
