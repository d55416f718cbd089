"""What the links of a graph carry from node to node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from nativesd.diffusion.control import Control
from nativesd.diffusion.images.prompts import ImagePrompt

if TYPE_CHECKING:
    from nativesd.pictures.result import Result


@dataclass(frozen=True)
class Picture:
    """A picture, and the text of how it was made."""

    image: Image.Image
    infotext: str = ""
    seed: int = 0


@dataclass(frozen=True)
class ModelRef:
    """A model, its text encoders or its VAE, with LoRAs: file to scale; and image prompts, each with the image encoder
    that was named for it."""

    name: str
    loras: Mapping[str, float] = field(default_factory=dict)
    image_prompts: tuple[tuple[ImagePrompt, str | None], ...] = ()
    clip_skip: int | None = None


@dataclass(frozen=True)
class Conditioning:
    """A prompt, and what steers it."""

    text: str
    clip: ModelRef
    controls: tuple[Control, ...] = ()


@dataclass(frozen=True)
class Latents:
    """A size in pixels and a number of pictures; maybe latents (B, C, h, w), a picture, a mask of what
    of it is painted anew, or what a sampler made."""

    width: int
    height: int
    count: int = 1
    tensor: Tensor | None = None
    picture: Image.Image | None = None
    mask: Image.Image | None = None
    result: Result | None = None
