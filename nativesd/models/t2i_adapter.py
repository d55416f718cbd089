"""T2I-Adapter: a hint's picture to feature maps that are added to the UNet's encoder, full or light.

Structure: TencentARC/T2I-Adapter ldm/modules/encoders/adapter.py (Adapter, Adapter_light) and, for SDXL,
Adapter/models/adapters.py (Adapter_XL).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.config import AdapterStage, T2IAdapterConfig


class Block(nn.Module):
    """Two convolutions with a ReLU between, added to their input: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return out


class Stage(nn.Module):
    """Residual blocks of one resolution, behind an average over 2x2 cells where the stage goes down.

    In the light form they stand between two projections, at a quarter of the width, and their second kernel is 3x3.
    """

    def __init__(self, width_in: int, stage: AdapterStage, layers: int, *, light: bool) -> None:
        super().__init__()
        width = stage.width // 4 if light else stage.width
        self.down = stage.down
        self.conv_in = nn.Conv2d(width_in, width, 1) if light or width_in != width else None
        self.resnets = nn.ModuleList(Block(width, 3 if light else 1) for _ in range(layers))
        self.conv_out = nn.Conv2d(width, stage.width, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, stage width, H, W), or ceil of half of H and W."""
        if self.down:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        if self.conv_in is not None:
            x = self.conv_in(x)
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.conv_out is None else self.conv_out(x)


class T2IAdapter(nn.Module):
    """A hint to one feature map per stage."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.image_channels * config.unshuffle**2
        self.conv_in = None
        if not config.light:
            self.conv_in = nn.Conv2d(width, config.stages[0].width, 3, padding=1)
            width = config.stages[0].width
        self.stages = nn.ModuleList()
        for stage in config.stages:
            self.stages.append(Stage(width, stage, config.layers, light=config.light))
            width = stage.width

    def forward(self, hint: Tensor) -> list[Tensor]:
        """(B, image channels, H, W) in [0, 1] -> for every stage (B, width, h, w), beginning at H / unshuffle.

        Raises RuntimeError where `unshuffle` does not divide H and W.
        """
        x = F.pixel_unshuffle(hint, self.config.unshuffle)
        if self.conv_in is not None:
            x = self.conv_in(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features
