"""A loaded model: its modules on their device, prompts to what the UNet takes, and pictures to latents and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from nativesd.diffusion.config import PipelineConfig
from nativesd.diffusion.control import ControlModel
from nativesd.diffusion.images.prompts import ImageAdapter, ImageEncoder
from nativesd.diffusion.turns import Turns
from nativesd.errors import NoMemoryError
from nativesd.latents import autoencoder
from nativesd.latents.preview import LatentPreview
from nativesd.models.clip import TextEncoder
from nativesd.models.tiling import Tiling, circular
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.pictures.images import to_pictures
from nativesd.text.embedding import Embedding
from nativesd.text.encode import Text, encode_each, encode_prompts
from nativesd.text.syntax import Emphasis, Syntax
from nativesd.text.tokenizer import ClipTokenizer
from nativesd.tuning.memory import free_bytes, memory_explained, unet_bytes
from nativesd.tuning.tune import untuned
from nativesd.weights.lora.file import LoraFile
from nativesd.weights.lora.merge import Merged


class Closes(Protocol):
    """What holds memory that can be given back."""

    def close(self) -> int:
        """Free it; returns how many bytes that was, as far as it is known."""


PIXEL = 40
"""Bytes of memory for a decoded picture's pixel: three float32 numbers, and copies on their way to bytes."""


@dataclass(repr=False)
class Loaded:
    """A loaded model. The modules are bare: the VAE's scaling factor is applied here.

    tile        side in pixels of the tiles in which the VAE works, None: none, "auto": where a picture is large
    slicing     the VAE takes a batch one picture at a time
    sequential  prompt and negative prompt go through the UNet one by one: less memory (on CUDA, a batch that does not
                fit switches to it by itself)
    offload     modules stay in main memory and visit the device while they are used
    previewer   a small autoencoder (TAESD) for the previews of `on_step`
    """

    config: PipelineConfig
    unet: UNet
    vae: VAE | TinyVAE
    text_encoders: tuple[TextEncoder, ...]
    tokenizers: tuple[ClipTokenizer, ...]
    device: torch.device
    dtype: torch.dtype
    embeddings: dict[str, Embedding] = field(default_factory=dict)
    tile: int | Literal["auto"] | None = "auto"
    slicing: bool = False
    sequential: bool = False
    offload: bool = False
    previewer: TinyVAE | None = None
    acceleration: Closes | None = None
    """The graphs that run in place of modules (`nativesd.pipeline.acceleration`)."""
    own_loras: Sequence[tuple[str, float, float]] = ()
    """Those of every call that names none: file, the UNet's scale, the text encoders'."""
    own_partial: bool = False
    """Whether LoRAs are applied of which a part does not fit."""
    lora_state: Merged | None = None
    """What LoRAs are merged into, and which are in it now."""
    load_control: Callable[[str | Path], ControlModel] | None = None
    """Loads the models of a `Control` that names one."""
    load_image_adapter: Callable[[str | Path], ImageAdapter] | None = None
    """Loads the adapter of an `ImagePrompt` that names one."""
    load_image_encoder: Callable[[str | Path], ImageEncoder] | None = None
    find_image_encoder: Callable[[ImageAdapter], Path | None] | None = None
    """The image encoder that lies where an adapter is published with it."""
    turns: Turns = field(default_factory=Turns)
    """Of the calls on these weights; pipelines that share the weights share them too."""
    _controls: dict[str, ControlModel] = field(default_factory=dict)
    _image_adapters: dict[str, ImageAdapter] = field(default_factory=dict)
    _image_encoders: dict[str, ImageEncoder] = field(default_factory=dict)
    _loras: dict[str, LoraFile] = field(default_factory=dict)
    _lora_words: dict[str, Embedding] = field(default_factory=dict)
    """Learnt words that came with the LoRAs which are merged now"""

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{type(self).__name__} {self.config.name} ({self.config.family}) on {self.device} in {dtype}>"

    @property
    def words(self) -> Mapping[str, Embedding]:
        """The learnt words that a prompt can say: those that were loaded, and those of the LoRAs that are merged."""
        own = {name.casefold() for name in self.embeddings}
        return {**{n: word for n, word in self._lora_words.items() if n.casefold() not in own}, **self.embeddings}

    @memory_explained()
    def encode_prompt(
        self,
        prompts: Sequence[str],
        *,
        emphasis: Emphasis = "original",
        literal: bool = False,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Context (B, T, C), both encoders' side by side, and the last encoder's pooled embedding (B, P)."""
        with self.turns.wait(), self._visiting(*self.text_encoders):
            return encode_prompts(
                prompts, self.text_encoders, self.tokenizers, syntax="literal" if literal else emphasis,
                clip_skip=clip_skip, embeddings=self.words, device=self.device,
            )  # fmt: skip

    @torch.inference_mode()
    def decode(self, latents: Tensor, *, tiling: Tiling | None = None) -> list[Image.Image]:
        """Pictures of scaled latents (B, C, h, w). Raises NativesdError where the VAE gives no finite picture."""
        return to_pictures(self.decode_tensor(latents, tiling=tiling))

    @memory_explained()
    @torch.inference_mode()
    def decode_tensor(self, latents: Tensor, *, tiling: Tiling | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) to pixels (B, 3, H, W) in [0, 1], float32. Raises NativesdError.

        tiling  along which axes the picture joins with itself; it is decoded as a whole then
        """
        config = self.config.vae
        side = (latents.shape[2] * config.factor, latents.shape[3] * config.factor)
        room = self.room(side, len(latents)) | ({} if tiling is None else {"tile": None})
        with self.turns.wait(), self._visiting(self.vae), going_around([self.vae], tiling):
            return autoencoder.decode(self.vae, latents, scaling=config.scaling, name=self.config.name, **room)

    @memory_explained()
    @torch.inference_mode()
    def encode_tensor(self, pixels: Tensor, *, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] to mean and standard deviation of the scaled latents, float32.

        tiling  along which axes the picture joins with itself; it is encoded as a whole then
        """
        options = self.room((pixels.shape[2], pixels.shape[3]), len(pixels))
        options |= {} if tiling is None else {"tile": None}
        with self.turns.wait(), self._visiting(self.vae), going_around([self.vae], tiling):
            return autoencoder.encode(
                self.vae, pixels.to(self.device), scaling=self.config.vae.scaling, name=self.config.name, **options
            )

    def encode_each(
        self, prompts: Sequence[Text], *, syntax: Syntax, clip_skip: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Contexts (T_i, C), each of its own length, and the last encoder's pooled embedding (B, P)."""
        with self._visiting(*self.text_encoders):
            return encode_each(
                prompts, self.text_encoders, self.tokenizers, syntax=syntax, clip_skip=clip_skip,
                embeddings=self.words, device=self.device,
            )  # fmt: skip

    def preview(self, latents: Tensor) -> Image.Image:
        """A quick picture of clean latents (B, C, h, w), maybe smaller, a batch side by side."""
        with self.turns.wait(), self._visiting(self.vae):
            return LatentPreview(self.vae, self.config.vae.scaling, self.previewer).preview(latents)

    def room(self, side: tuple[int, int], batch: int) -> dict[str, Any]:
        """How the VAE is to work on `batch` pictures of a size, height and width, in the memory there is."""
        needed = autoencoder.decode_bytes(self.config.vae, *side, dtype=next(self.vae.parameters()).dtype, batch=1)
        free = free_bytes(self.device)
        tile = autoencoder.tile_size(self.tile, *side, needed=needed, free=free)
        return {"tile": tile, "slicing": self.slicing or (free is not None and needed * batch > free)}

    def require_room(self, pictures: int, size: tuple[int, int], window: int | None = None) -> None:
        """Raise NoMemoryError where so many pictures of a size, width and height, cannot be made in the free memory.

        window  of how many pixels a side the UNet sees at a time; None: all
        """
        free, (width, height) = free_bytes(self.device), size
        step = self._step_bytes(pictures, size if window is None else (min(width, window), min(height, window)))
        needed = max(step, pictures * width * height * PIXEL)
        if free is not None and needed > free:
            raise NoMemoryError(
                f"{pictures} picture{'s' * (pictures > 1)} of {width}x{height} cannot fit: that takes about"
                f" {needed / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} GB are free; make fewer at a time, or"
                " smaller ones, or try it all the same with force=True (--force)"
            )

    @contextmanager
    def _visiting(self, *modules: nn.Module) -> Iterator[None]:
        """With `offload`, the modules are on the device meanwhile, and in main memory before and after."""
        if not self.offload:
            yield
            return
        try:
            for module in modules:
                module.to(self.device)
            yield
        finally:
            for module in modules:
                module.to("cpu")

    def fits(self, rows: int, size: tuple[int, int]) -> bool:
        """Whether a step of so many rows, of a size, width and height in pixels, fits in the free memory."""
        free = free_bytes(self.device)
        return free is None or self._step_bytes(rows, size) <= free

    def _step_bytes(self, rows: int, size: tuple[int, int]) -> int:
        width, height = (side // self.config.vae.factor for side in size)
        return unet_bytes(self.config.unet, rows, height, width, self.dtype)


@contextmanager
def going_around(modules: Sequence[nn.Module], tiling: Tiling | None) -> Iterator[None]:
    """Within, the convolutions of modules go around along these axes; their fast layers are put aside for it."""
    if tiling is None:
        yield
        return
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(untuned(module))
        stack.enter_context(circular(modules, tiling))
        yield
