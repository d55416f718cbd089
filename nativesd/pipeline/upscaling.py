"""Models that enlarge pictures (ESRGAN and its kin), read by nativesd and run by spandrel, tile by tile."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nativesd.errors import SourceError, UsageError, install_line
from nativesd.pictures.images import to_pictures, to_tensor
from nativesd.tuning.memory import memory_explained
from nativesd.weights.files.source import open_source
from nativesd.weights.files.tensors import read_tensor

SUFFIXES = (".pth", ".pt", ".safetensors", ".ckpt")
TILE, OVERLAP = 512, 32  # pixels of the small picture
WRAPPERS = ("model_state_dict.", "state_dict.", "params_ema.", "params-ema.", "params.", "model.", "net.", "module.",
            "netG.")  # fmt: skip
"""What training programs put before the names of all tensors."""


@dataclass(repr=False)
class UpscaleModel:
    """A loaded model that makes pictures `scale` times as large: call it with one.

    tile, overlap  of what it sees at a time, in pixels of the small picture, and what neighbours share; where they do,
                   the answers fade into each other, so that there is no seam
    """

    name: str
    scale: int
    network: Any
    device: torch.device
    dtype: torch.dtype
    tile: int = TILE
    overlap: int = OVERLAP

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, {self.scale} times>"

    @memory_explained()
    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Image.Image:
        """The picture, `scale` times as large. Its transparency is enlarged plainly."""
        pixels = to_tensor([picture.convert("RGB")]) / 2 + 0.5  # (1, 3, H, W)
        larger = to_pictures(self.enlarge(pixels))[0]
        if picture.has_transparency_data:
            larger.putalpha(picture.convert("RGBA").getchannel("A").resize(larger.size, Image.Resampling.LANCZOS))
        return larger

    def enlarge(self, pixels: Tensor) -> Tensor:
        """(1, 3, H, W) in [0, 1] to (1, 3, scale * H, scale * W), float32, tile by tile.

        Raises UsageError where tiles do not lie further apart than they share.
        """
        if not 0 <= self.overlap < self.tile:
            raise UsageError(
                f"{self.name}: overlap must be 0 or more and below tile, not {self.overlap} of {self.tile}"
            )
        _, _, height, width = pixels.shape
        scale, total = self.scale, torch.zeros(1, 3, height * self.scale, width * self.scale)
        count = torch.zeros(total.shape[2:])
        for top, bottom in self._spans(height):
            for left, right in self._spans(width):
                part = pixels[:, :, top:bottom, left:right].to(self.device, self.dtype)
                out = self._run(part).float().cpu()[:, :, : (bottom - top) * scale, : (right - left) * scale]
                weight = self._fade(top, bottom, height)[:, None] * self._fade(left, right, width)
                area = (..., slice(top * scale, bottom * scale), slice(left * scale, right * scale))
                total[area] += out * weight
                count[area] += weight
        return (total / count).clamp(0, 1)

    def _run(self, pixels: Tensor) -> Tensor:
        channels = self.network.input_channels
        given = pixels.mean(1, keepdim=True) if channels == 1 else pixels
        out: Tensor = self.network(given)
        return out.expand(-1, 3, -1, -1) if out.shape[1] == 1 else out[:, :3]

    def _spans(self, length: int) -> list[tuple[int, int]]:
        """Beginnings and ends of tiles over a length."""
        if length <= self.tile:
            return [(0, length)]
        count = 1 + -(-(length - self.tile) // (self.tile - self.overlap))
        starts = [round(i * (length - self.tile) / (count - 1)) for i in range(count)]
        return [(start, start + self.tile) for start in starts]

    def _fade(self, start: int, end: int, length: int) -> Tensor:
        """How much a tile counts along one axis: less towards its ends, but not at the picture's own."""
        size, over = (end - start) * self.scale, self.overlap * self.scale
        at = torch.arange(size, dtype=torch.float32) + 0.5
        low = at / over if start else torch.ones(size)
        high = (size - at) / over if end < length else torch.ones(size)
        return torch.minimum(low, high).clamp(max=1)


def load_upscaler(
    source: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> UpscaleModel:
    """Load a model that enlarges pictures, from a file of any architecture that spandrel knows.

    The file is read by nativesd, which runs nothing in it. `dtype` is float32 by default, on CUDA float16 where the
    model can. Raises SourceError for what cannot be read or is no such model, UsageError where spandrel is missing.
    """
    try:
        spandrel: Any = importlib.import_module("spandrel")
    except ImportError as error:
        raise UsageError(f"models that enlarge pictures need spandrel: {install_line('upscale')}") from error
    path = Path(source)
    if not path.is_file():
        raise SourceError(f"{path} does not exist")
    (member,) = open_source(path)
    state = {key: read_tensor(member, key) for key in member.tensors}
    network, said = None, ""
    for names in _unwrapped(state):
        try:
            network = spandrel.ModelLoader().load_from_state_dict(names)
            break
        except Exception as error:  # of whatever the architecture's code trips over
            said = str(error)[:200]
    if network is None:
        raise SourceError(f"{path} is no model that enlarges pictures: spandrel says {said!r}")
    if not isinstance(network, spandrel.ImageModelDescriptor) or network.input_channels not in (1, 3):
        raise SourceError(f"{path} is no model that enlarges pictures, but of {network.architecture.name}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = place.type == "cuda" and network.supports_half
    kind = dtype or (torch.float16 if half else torch.float32)
    network.to(place).to(kind).eval()
    return UpscaleModel(path.stem, network.scale, network, place, kind)


def _unwrapped(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors by their names, and by what is left of these without a wrapper that all have."""
    yield state
    for prefix in WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            yield from _unwrapped({key.removeprefix(prefix): tensor for key, tensor in state.items()})


def is_upscaler_file(value: str) -> bool:
    """Whether a text names a file of such a model."""
    return value.lower().endswith(SUFFIXES)


def resized(picture: Image.Image, model: UpscaleModel, scale: float) -> Image.Image:
    """A picture `scale` times as large: the model as often as it takes, and then down to size."""
    size = round(picture.width * scale), round(picture.height * scale)
    larger = enlarged(picture, model, *size)
    return larger if larger.size == size else larger.resize(size, Image.Resampling.LANCZOS)


def enlarged(
    picture: Image.Image, model: UpscaleModel, width: int, height: int, most: int | None = None
) -> Image.Image:
    """A picture of at least a size: the model as often as it takes, while no side comes over `most` pixels."""
    while model.scale > 1 and (picture.width < width or picture.height < height):
        if most is not None and max(picture.size) * model.scale > most:
            break
        picture = model(picture)
    return picture
