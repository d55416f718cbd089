"""Pictures that join with themselves: convolutions that go around, along one axis or both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.models.edits import Edit

Tiling = Literal["xy", "x", "y"]
"""Along which axes a picture joins with itself: x left to right, y top to bottom."""
AROUND = "around"
"""What convolutions have meanwhile that go around: along which axes."""


class Circular(Edit):
    """Says that a call's convolutions go around, which `circular` sees to; exported graphs have none that do."""


@contextmanager
def circular(modules: Sequence[nn.Module], tiling: Tiling) -> Iterator[None]:
    """Within, the padding of all convolutions along these axes is what is at the other end. They have to be plain."""
    changed: list[nn.Module] = []
    try:
        for part in (part for module in modules for part in module.modules()):
            if isinstance(part, nn.Conv2d):
                part.__dict__[AROUND] = tiling
                if any(part.padding):
                    part.__dict__["_conv_forward"] = partial(_around, part, tiling)
                changed.append(part)
        yield
    finally:
        for part in changed:
            part.__dict__.pop("_conv_forward", None)
            part.__dict__.pop(AROUND, None)


def goes_around(module: nn.Module) -> bool:
    """Whether a module's convolutions go around now."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    return hasattr(first, AROUND)


def pad_end(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """x (B, C, H, W) with one cell more at the right and the bottom, of zeros or from the other end, as `conv` pads."""
    tiling: str = getattr(conv, AROUND, "")
    if not tiling:
        return F.pad(x, (0, 1, 0, 1))
    x = F.pad(x, (0, 1, 0, 0), mode="circular" if "x" in tiling else "constant")
    return F.pad(x, (0, 0, 0, 1), mode="circular" if "y" in tiling else "constant")


def _around(conv: nn.Conv2d, tiling: Tiling, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`nn.Conv2d._conv_forward` of x (B, C, H, W)."""
    down, across = (int(size) for size in conv.padding)
    x = F.pad(x, (across, across, 0, 0), mode="circular" if "x" in tiling else "constant")
    x = F.pad(x, (0, 0, down, down), mode="circular" if "y" in tiling else "constant")
    return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)
