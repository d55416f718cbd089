"""TAESD, the tiny autoencoder: latents here are those of the diffusion, already scaled (its scaling factor is 1).

Structure and constants: madebyollin/taesd taesd.py (Encoder, Decoder). Either half is a module of its own, as the
original files hold one half each.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.config import TinyVAEConfig

LATENT_MAGNITUDE = 3.0  # latents are squeezed to +-3 on their way into the decoder (`Clamp` in the source above)


class Block(nn.Module):
    """Three convolutions with ReLUs between, added to their input, and a ReLU: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.relu(x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))


class TinyEncoder(nn.Module):
    """Images to latents: (B, 3, H, W) in [-1, 1] -> (B, latent channels, ceil(H / f), ceil(W / f))."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        layers: list[nn.Module] = [nn.Conv2d(config.image_channels, width, 3, padding=1)]
        for i, blocks in enumerate(config.encoder):
            if i:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [Block(width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """See the class. The layers themselves take [0, 1]."""
        out: Tensor = self.layers((images + 1) / 2)
        return out


class TinyDecoder(nn.Module):
    """Latents to images: (B, latent channels, h, w) -> (B, 3, f * h, f * w), about [-1, 1] and not clamped."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for i, blocks in enumerate(config.decoder):
            if i:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers += [Block(width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.image_channels, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        """See the class. The layers themselves give [0, 1]."""
        squeezed = (latents / LATENT_MAGNITUDE).tanh() * LATENT_MAGNITUDE
        out: Tensor = self.layers(squeezed) * 2 - 1
        return out


class TinyVAE(nn.Module):
    """Both halves, or the one that `config.half` names, with the ranges of the full autoencoder's images."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config) if config.half != "decoder" else None
        self.decoder = TinyDecoder(config) if config.half != "encoder" else None

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, channels, ceil(H / f), ceil(W / f)) of `images` (B, 3, H, W) in [-1, 1]: no distribution.

        Raises ValueError where there is no encoder.
        """
        if self.encoder is None:
            raise ValueError("this is the decoder alone: it encodes nothing")
        out: Tensor = self.encoder(images)
        return out

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, f * h, f * w), about [-1, 1] and not clamped, of `latents` (B, channels, h, w).

        Raises ValueError where there is no decoder.
        """
        if self.decoder is None:
            raise ValueError("this is the encoder alone: it decodes nothing")
        out: Tensor = self.decoder(latents)
        return out
