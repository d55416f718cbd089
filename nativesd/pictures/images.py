"""Pictures that come in: read from whatever they are, fitted, extended, and put back together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from nativesd.errors import NativesdError, SourceError, UsageError
from nativesd.pictures.opening import named, opened

ImageSource = Image.Image | NDArray[np.generic] | Tensor | str | Path | bytes
"""A picture as it may be given: a PIL image, an array (H, W[, channels]), a tensor ([1, ][channels, ]H, W), a file, or
a file's bytes.

Arrays and tensors have 1, 3 or 4 channels, and are bool, uint8, uint16, other integers from 0 to 255, or floating
point from 0 to 1.
"""
Fit = Literal["resize", "crop", "fill"]
Fill = Literal["edge", "noise", "gray"]

LANCZOS = Image.Resampling.LANCZOS
MOST_SCALED = 1 << 26
"""Pixels of a whole picture that is scaled before it is cropped, as A1111 does; of more, the middle alone is."""
FEATHER = 40  # default of ComfyUI's ImagePadForOutpaint (nodes.py), in pixels


class Fitted(NamedTuple):
    """A picture, and what was done to it in words (None: nothing)."""

    image: Image.Image
    note: str | None


class Padded(NamedTuple):
    """A picture on a larger canvas, the mask of what is new ("L", white), and what was added in words."""

    image: Image.Image
    mask: Image.Image
    note: str


def read_image(source: ImageSource) -> Image.Image:
    """The picture in RGB: turned as its EXIF data say, transparency on white (A1111's default), an animation's first.

    Raises SourceError for a file that cannot be read, UsageError for an array or tensor that is no picture.
    """
    image = open_image(source)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def fit(
    image: Image.Image,
    width: int | None = None,
    height: int | None = None,
    mode: Fit = "resize",
    *,
    factor: int = 8,
) -> Fitted:
    """The picture (or mask) at `width` x `height`, and what was done in words, such as "1023x770 resized to 1016x768".

    width, height  where one is missing it follows from the picture's shape, where both are they are the picture's own;
                   what is not given is rounded down to a multiple of `factor`
    mode           "resize" to that size, whatever the shape (A1111's and diffusers' default); "crop": scaled to cover
                   it, the rest cut off on either side; "fill": scaled to fit in, the rest filled with the edges'
                   colours. Sizes between are those of A1111's modules/images.py (resize_image).

    Raises UsageError for another mode, or sizes below 1.
    """
    if mode not in get_args(Fit):
        raise UsageError(f"the resize mode must be one of {', '.join(get_args(Fit))}, not {mode!r}")
    if any(side is not None and side < 1 for side in (width, height)):
        raise UsageError(f"a picture cannot be fitted into {width}x{height} pixels")
    own_width, own_height = image.size
    width, height = fitted_size(image, width, height, factor)
    if (width, height) == image.size:
        return Fitted(image, None)

    done = {"resize": "resized", "crop": "scaled and cropped", "fill": "scaled and filled up"}[mode]
    note = f"{own_width}x{own_height} {done} to {width}x{height}"
    if mode == "resize":
        return Fitted(image.resize((width, height), LANCZOS), note)
    wider = width * own_height > height * own_width  # than the picture is
    follow_width = wider if mode == "crop" else not wider
    inner = (width, own_height * width // own_width) if follow_width else (own_width * height // own_height, height)
    inner = (max(inner[0], 1), max(inner[1], 1))
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    if mode == "crop" and inner[0] * inner[1] > MOST_SCALED:
        return Fitted(image.resize((width, height), LANCZOS, middle(image.size, (width, height))), note)
    scaled = image.resize(inner, LANCZOS)
    if mode == "crop":
        return Fitted(scaled.crop((-left, -top, width - left, height - top)), note)
    return Fitted(_extend(scaled, left, width - inner[0] - left, top, height - inner[1] - top), note)


def middle(size: tuple[int, int], shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) around the middle of a size that is as large as it can be and of a shape."""
    scale = min(size[0] / shape[0], size[1] / shape[1])
    left, top = (size[0] - shape[0] * scale) / 2, (size[1] - shape[1] * scale) / 2
    return left, top, size[0] - left, size[1] - top


def fitted_size(image: Image.Image, width: int | None, height: int | None, factor: int) -> tuple[int, int]:
    """Width and height as `fit` takes them: what is not given follows from the picture, in multiples of `factor`."""
    own_width, own_height = image.size
    if width is None:
        width = _floor(own_width if height is None else own_width * height / own_height, factor)
        height = height or _floor(own_height, factor)
    return width, height or _floor(own_height * width / own_width, factor)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (B, 3, H, W) float32 in [-1, 1]. Raises UsageError where the sizes differ."""
    if not images:
        raise UsageError("a batch needs at least one picture")
    if len({image.size for image in images}) > 1:
        sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
        raise UsageError(f"the pictures of a batch must have one size, not {sizes}")
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, H, W, 3) -> (B, 3, H, W)


def pad(
    image: Image.Image,
    left: int,
    right: int,
    top: int,
    bottom: int,
    *,
    fill: Fill = "edge",
    feather: int = FEATHER,
    factor: int = 8,
) -> Padded:
    """The picture (RGB) on a canvas that is larger by these pixels, and the mask for painting what is new.

    fill      what is there at first: the "edge" pixels drawn out, "noise" of the picture's colours, or "gray"
    feather   pixels of the picture along the new area that are repainted less and less, a quarter of its shorter side
              at most; the mask falls with the square, as in ComfyUI's ImagePadForOutpaint
    factor    the canvas is enlarged until its sides are multiples; the note says by how much

    Raises UsageError where nothing is added, or for another `fill`.
    """
    if fill not in get_args(Fill):
        raise UsageError(f"the new area can be filled with {', '.join(get_args(Fill))}, not {fill!r}")
    asked = (left, right, top, bottom)
    if min(asked) < 0 or max(asked) == 0:
        raise UsageError(f"the canvas cannot be extended by {asked} pixels (left, right, top, bottom)")
    if feather < 0:
        raise UsageError(f"feather must be 0 pixels or more, not {feather}")
    left, right = _whole(image.width, left, right, factor)
    top, bottom = _whole(image.height, top, bottom, factor)

    image = image.convert("RGB")
    canvas = _extend(image, left, right, top, bottom)
    if fill != "edge":
        flat = np.full((canvas.height, canvas.width, 3), 127.5)
        if fill == "noise":
            pixels = np.asarray(image, np.float64).reshape(-1, 3)
            flat = np.random.default_rng(0).normal(pixels.mean(axis=0), pixels.std(axis=0), flat.shape)
        canvas = Image.fromarray(flat.clip(0, 255).astype(np.uint8))
        canvas.paste(image, (left, top))

    mask = np.full((canvas.height, canvas.width), 255, np.uint8)
    depth = min(feather, min(image.size) // 4)
    along_x = _inwards(image.width, left, right, depth)
    along_y = _inwards(image.height, top, bottom, depth)
    new = np.maximum(along_x[None, :], along_y[:, None]) ** 2
    mask[top : top + image.height, left : left + image.width] = (new * 255).round()
    added = {"left": left, "right": right, "top": top, "bottom": bottom}
    words = ", ".join(f"{pixels} {side}" for side, pixels in added.items() if pixels)
    note = f"{image.width}x{image.height} extended to {canvas.width}x{canvas.height} ({words})"
    return Padded(canvas, Image.fromarray(mask), note)


def paste(original: Image.Image, generated: Image.Image, mask: Image.Image) -> Image.Image:
    """`generated` where the mask is white, `original` exactly where it is black, a mixture between.

    Raises UsageError where the three differ in size.
    """
    if not original.size == generated.size == mask.size:
        sizes = ", ".join(f"{image.width}x{image.height}" for image in (original, generated, mask))
        raise UsageError(f"original, generated picture and mask must have one size, not {sizes}")
    return Image.composite(generated.convert("RGB"), original.convert("RGB"), mask.convert("L"))


def open_image(source: ImageSource) -> Image.Image:
    """A PIL image whose mode has 8 bits per channel, turned upright."""
    if isinstance(source, Tensor):
        return _from_array(_channels_last(source), tuple(source.shape))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, str | Path | bytes):
        try:
            with opened(source) as image:
                return _eight_bits(image)
        except NativesdError:
            raise
        except Exception as error:  # what decoders raise for a damaged file is of many kinds
            raise SourceError(f"{named(source)} is not a picture that can be read: {error}") from error
    if isinstance(source, Image.Image):
        return _eight_bits(source)
    raise UsageError(f"a picture is a PIL image, an array, a tensor or a file, not {type(source).__name__}")


def _eight_bits(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        numbers = np.asarray(upright).clip(0, 65535)
        # 16 bits, also where Pillow's mode has 32; but whoever made such a picture of bytes has nothing above 255
        short = upright.mode == "I" and image.format is None and numbers.max(initial=0) <= 255
        return _from_array(numbers.astype(np.uint8 if short else np.uint16))
    return _from_array(np.asarray(upright)) if upright.mode == "F" else upright


def _channels_last(tensor: Tensor) -> NDArray[np.generic]:
    array = tensor.detach().cpu()
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3:
        array = array.permute(1, 2, 0)  # (C, H, W) -> (H, W, C)
    result: NDArray[np.generic] = (array.float() if array.is_floating_point() else array).numpy()
    return result


def _from_array(array: NDArray[np.generic], shape: tuple[int, ...] | None = None) -> Image.Image:
    """(H, W) or (H, W, 1, 3 or 4) to mode L, RGB or RGBA. Raises UsageError, with the `shape` given, for another."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UsageError(
            f"a picture cannot have the shape {shape or array.shape}: arrays are (H, W, C), tensors (C, H, W)"
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.integer) and array.dtype not in (np.uint8, np.uint16):
        low, high = array.min(), array.max()
        if low < 0 or high > 255:
            raise UsageError(f"a picture of {array.dtype} must be within 0 and 255, not {low} and {high}")
        array = array.astype(np.uint8)
    elif array.dtype == np.uint16:
        scale = 257 if array.max() > 1 else 1  # 65535 -> 255; but a mask may have 0 and 1
        array = (array.astype(np.float64) / scale).round().astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        values = array.astype(np.float64)
        low, high = values.min(), values.max()
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise UsageError(f"a picture of floating point must be within 0 and 1, not {low:g} and {high:g}")
        array = (values.clip(0, 1) * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UsageError(f"a picture cannot be of {array.dtype}: use uint8, or floating point from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(array))


def _floor(side: float, multiple: int) -> int:
    """Down to a multiple, but never to nothing."""
    return max(int(side) // multiple, 1) * multiple


def _extend(image: Image.Image, left: int, right: int, top: int, bottom: int) -> Image.Image:
    """The edge pixels drawn out."""
    around = [(top, bottom), (left, right), (0, 0)][: 2 if image.mode == "L" else 3]
    return Image.fromarray(np.pad(np.asarray(image), around, mode="edge"))


def _whole(side: int, before: int, after: int, multiple: int) -> tuple[int, int]:
    """`before` and `after` such that the whole is a multiple; what is missing goes where something is added."""
    missing = -(side + before + after) % multiple
    return (before + missing, after) if before and not after else (before, after + missing)


def _inwards(side: int, before: int, after: int, depth: int) -> NDArray[np.float64]:
    """From 1 at an end with something new beside it to 0 at `depth` pixels from it: (side,)."""
    position = np.arange(side)
    nearest = np.full(side, side)
    if before:
        nearest = np.minimum(nearest, position)
    if after:
        nearest = np.minimum(nearest, position[::-1])
    return (1 - nearest / depth).clip(0, 1) if depth else np.zeros(side)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [0, 1] as pictures."""
    array = (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, 3, H, W) -> (B, H, W, 3)
    return [Image.fromarray(picture) for picture in array]
