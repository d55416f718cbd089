"""Nodes that change the size of pictures and latents, as ComfyUI's nodes.py and comfy/utils.py (`common_upscale`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nativesd.errors import UsageError
from nativesd.server.apis.comfy.carried import Picture

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
        return round((width - height * ratio) / 2), 0
    return 0, round((height - width / ratio) / 2)


def interpolated(tensor: Tensor, size: tuple[int, int], method: str, crop: str) -> Tensor:
    """A tensor (B, C, h, w) of another height and width."""
    rows, columns = tensor.shape[2:]
    x, y = margins((columns, rows), (size[1], size[0]), crop)
    return F.interpolate(tensor[:, :, y : rows - y, x : columns - x], size=size, mode=method)


def by_model(turn: Turn, upscale_model: str, image: Sequence[Picture]) -> list[Picture]:
    """Pictures enlarged by a model. Raises UsageError where they would be larger than the server makes them."""
    model, most = turn.shelf.upscaler(upscale_model), 4 * turn.shelf.limits.side
    for each in image:
        if max(each.image.size) * model.scale > most:
            side = most // model.scale
            raise UsageError(f"image must have at most {side} pixels a side for {model.name} on this server")
    return [Picture(model(each.image.convert("RGB")), each.infotext, each.seed) for each in image]


def to_size(image: Sequence[Picture], method: str, width: int, height: int, crop: str) -> list[Picture]:
    """Pictures of a size; a side of 0 follows the other, and both are none at all."""
    if not width and not height:
        return list(image)
    return [Picture(_resized(each.image, method, width, height, crop), each.infotext, each.seed) for each in image]


def by_factor(turn: Turn, image: Sequence[Picture], method: str, factor: float) -> list[Picture]:
    """Pictures `factor` times as large. Raises UsageError where they would be larger than the server makes them."""
    made, most = [], 4 * turn.shelf.limits.side
    for each in image:
        width, height = (max(round(side * factor), 1) for side in each.image.size)
        if max(width, height) > most:
            raise UsageError(f"scale_by must give at most {most} pixels a side, not {max(width, height)}")
        made.append(Picture(_resized(each.image, method, width, height, "disabled"), each.infotext, each.seed))
    return made


def _resized(image: Image.Image, method: str, width: int, height: int, crop: str) -> Image.Image:
    from nativesd.pictures.images import to_pictures, to_tensor

    image = image.convert("RGB")
    width = width or max(1, round(image.width * height / image.height))
    height = height or max(1, round(image.height * width / image.width))
    if method != "lanczos":
        pixels = to_tensor([image]) / 2 + 0.5  # (1, 3, H, W) in [0, 1]
        return to_pictures(interpolated(pixels, (height, width), method, crop).clamp(0, 1))[0]
    left, top = margins(image.size, (width, height), crop)
    box = (left, top, image.width - left, image.height - top)
    return image.resize((width, height), Image.Resampling.LANCZOS, box)
