"""Frames as they come in and pictures as they go out, each in one of three forms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nativesd.errors import UsageError
from nativesd.pictures.images import fit, read_image, to_pictures, to_tensor
from nativesd.pictures.preprocess import preprocess
from nativesd.sampling.noise import move_noise

FrameSource = Image.Image | NDArray[np.generic] | Tensor
"""A frame as it may be given: a PIL picture, an array (H, W, 3) of uint8, or a tensor ([1, ]3, H, W) of uint8, or of
floating point from 0 to 1, which stays on its device."""
Output = Literal["pil", "array", "tensor"]
Picture = Image.Image | NDArray[np.uint8] | Tensor
"""As it goes out: PIL, an array (H, W, 3) of uint8, or a tensor (3, H, W) float32 in [0, 1] on the device."""
OUTPUTS = get_args(Output)


class Incoming:
    """A frame at a stream's size, width and height; what it is needed as is made when it is asked for."""

    def __init__(self, frame: FrameSource, size: tuple[int, int], device: torch.device) -> None:
        self._frame, self._size, self._device = frame, size, device

    @cached_property
    def compared(self) -> Tensor:
        """Pixels (1, 3, H, W) in [-1, 1], float32, where the frame is: nothing is waited for to look at them."""
        if isinstance(self._frame, Tensor):
            return _pixels(self._frame, self._size) * 2 - 1
        return to_tensor([self.picture])

    @cached_property
    def pixels(self) -> Tensor:
        """The same on the stream's device."""
        return move_noise(self.compared, self._device)

    @cached_property
    def picture(self) -> Image.Image:
        """The same as a picture."""
        if isinstance(self._frame, Tensor):
            return to_pictures(self.compared / 2 + 0.5)[0]
        return fit(read_image(self._frame), *self._size).image

    def hint(self, preprocessor: str | None) -> Tensor:
        """The frame as a control's hint, (1, 3, H, W) in [0, 1]."""
        if preprocessor is None:
            return self.pixels / 2 + 0.5
        return to_tensor([preprocess(self.picture, preprocessor)]) / 2 + 0.5


def check_frame(frame: object) -> FrameSource:
    """A frame. Raises UsageError for what is none."""
    if isinstance(frame, Tensor):
        whole = frame[0] if frame.ndim == 4 and len(frame) == 1 else frame
        kind = frame.dtype == torch.uint8 or frame.is_floating_point()
        if whole.ndim == 3 and whole.shape[0] == 3 and whole.numel() and kind:
            return whole
        found = f"{str(frame.dtype).removeprefix('torch.')} of shape {tuple(frame.shape)}"
        raise UsageError(f"a frame's tensor is (3, H, W), of uint8 or of floating point from 0 to 1, not {found}")
    if isinstance(frame, np.ndarray):
        if frame.ndim == 3 and frame.shape[2] == 3 and frame.size and frame.dtype == np.uint8:
            return frame
        raise UsageError(f"a frame's array is (H, W, 3) of uint8, not {frame.dtype} of shape {frame.shape}")
    if isinstance(frame, Image.Image):
        return frame
    raise UsageError(f"a frame is a PIL picture, an array or a tensor, not a {type(frame).__name__}")


def _pixels(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """A tensor (3, H, W) as (1, 3, height, width) float32 in [0, 1]."""
    whole = frame[None].float() / 255 if frame.dtype == torch.uint8 else frame[None].float()
    width, height = size
    if whole.shape[2:] == (height, width):
        return whole
    return F.interpolate(whole, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def outgoing(pixels: Tensor, output: Output) -> Picture:
    """Pixels (1, 3, H, W) in [0, 1] in the form asked for; what is not a tensor is waited for and copied here."""
    if output == "tensor":
        return pixels[0]
    picture = to_pictures(pixels)[0]
    return picture if output == "pil" else np.asarray(picture)


@dataclass(frozen=True, repr=False)
class Frame:
    """What a stream gives for a frame.

    image    the picture: PIL, an array (H, W, 3) of uint8, or a tensor (3, H, W) float32 in [0, 1], as was asked for
    index    of the frame that it was made of, in the order in which they came, from 0
    age      how many frames came after that one: the slots less one, and the frames that were skipped since
    skipped  whether the frame that came was skipped, so that the picture is the last one again
    """

    image: Picture
    index: int
    age: int
    skipped: bool = False

    def __repr__(self) -> str:
        return f"<Frame {self.index}, {self.age} frames old{', skipped' if self.skipped else ''}>"
