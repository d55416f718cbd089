"""Nodes that change the size of pictures and latents, as ComfyUI's nodes.py and comfy/utils.py (`common_upscale`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nativesd.errors import UsageError
from nativesd.server.apis.comfy.carried import Picture
from nativesd.server.jobs.order import require_enlarging

if TYPE_CHECKING:
    from nativesd.server.jobs.turn import Turn

METHODS = ("nearest-exact", "bilinear", "area", "bicubic")
PICTURE_METHODS = (*METHODS, "lanczos")


def margins(old: tuple[int, int], new: tuple[int, int], crop: str) -> tuple[int, int]:
    """What "center" cuts off of a width and a height at both ends of each, so that they have the ratio of others."""
    (width, height), ratio = old, new[0] / new[1]
    if crop != "center":
        return 0, 0
    if width / height > ratio:
        return min(round((width - height * ratio) / 2), (width - 1) // 2), 0
    return 0, min(round((height - width / ratio) / 2), (height - 1) // 2)


def interpolated(tensor: Tensor, size: tuple[int, int], method: str, crop: str) -> Tensor:
    """A tensor (B, C, h, w) of another height and width."""
    rows, columns = tensor.shape[2:]
    x, y = margins((columns, rows), (size[1], size[0]), crop)
    return F.interpolate(tensor[:, :, y : rows - y, x : columns - x], size=size, mode=method)


def followed(size: tuple[int, int], width: int, height: int, least: int) -> tuple[int, int]:
    """A width and a height, of which one may be 0: it follows from the other by the shape of `size`."""
    width = width or max(least, round(size[0] * height / size[1]))
    return width, height or max(least, round(size[1] * width / size[0]))


def times(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """A size so many times as large."""
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def require_within(size: tuple[int, int], most: int) -> None:
    """Raise UsageError for a size with a side of more pixels."""
    if max(size) > most:
        raise UsageError(f"what is made must have at most {most} pixels a side on this server, not {size[0]}x{size[1]}")


def by_model(turn: Turn, upscale_model: str, image: Sequence[Picture]) -> list[Picture]:
    """Pictures enlarged by a model. Raises UsageError where they would be larger than the server makes them."""
    model = turn.shelf.upscaler(upscale_model)
    for each in image:
        require_enlarging(model, each.image, turn.shelf.limits)
    return [replace(each, image=model(each.image.convert("RGB"))) for each in image]


def resized(turn: Turn, picture: Picture, method: str, size: tuple[int, int], crop: str) -> Picture:
    """A picture of a size. Raises UsageError for one that is larger than the server makes them."""
    from nativesd.pictures.images import to_pictures, to_tensor

    require_within(size, 4 * turn.shelf.limits.side)
    image = picture.image.convert("RGB")
    if method != "lanczos":
        pixels = to_tensor([image]) / 2 + 0.5  # (1, 3, H, W) in [0, 1]
        made = to_pictures(interpolated(pixels, (size[1], size[0]), method, crop).clamp(0, 1))[0]
        return replace(picture, image=made)
    left, top = margins(image.size, size, crop)
    box = (left, top, image.width - left, image.height - top)
    return replace(picture, image=image.resize(size, Image.Resampling.LANCZOS, box))
