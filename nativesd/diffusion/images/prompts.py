"""Pictures as prompts: IP-Adapters and image encoders, and from what a call names to the tokens that stand for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from nativesd.config import IPAdapterConfig, UNetConfig
from nativesd.destination import fresh
from nativesd.diffusion.images.layers import Layers, WeightType, layer_scales
from nativesd.diffusion.turns import Turns
from nativesd.errors import NativesdWarning, SourceError, UsageError
from nativesd.models.clip_vision import VisionEncoder
from nativesd.models.ip_adapter import IPAdapter
from nativesd.pictures.clip import Crop, clip_pixels
from nativesd.pictures.images import ImageSource, read_image
from nativesd.pictures.masks import read_mask
from nativesd.weights.entries import Entry
from nativesd.weights.files.source import Member, open_source
from nativesd.weights.files.tensors import read_tensor
from nativesd.weights.identity.adapters import EMBEDDINGS, VISION_ENCODERS
from nativesd.weights.identity.identify import CONTEXTS
from nativesd.weights.writing import write

PARTS = ("embedding", "states", "negative_states")
UNIT = 1.01
"""The longest that an identity of length 1 is after rounding; a mean of several is shorter."""


@dataclass(frozen=True, repr=False)
class ImageAdapter:
    """A loaded IP-Adapter, the name it is spoken of by, and the file it is from; `on_hub` is that file's name there."""

    name: str
    module: IPAdapter
    path: Path
    member: Member
    on_hub: str | None = None
    turns: Turns = field(default_factory=Turns, compare=False)
    """Of the calls that use it."""

    def __repr__(self) -> str:
        return f"<IPAdapter {self.name} ({self.module.config.kind})>"


@dataclass(frozen=True, repr=False)
class ImageEncoder:
    """A loaded CLIP image encoder, and the name it is spoken of by."""

    name: str
    module: VisionEncoder

    def __repr__(self) -> str:
        return f"<VisionEncoder {self.name}>"


Encoding = Callable[[ImageAdapter], AbstractContextManager[ImageEncoder]]
"""The image encoder for an adapter, which is where it can be asked within the context."""


@dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """What an image encoder says of N pictures, so that it need not be there when they are prompts.

    embedding        (N, P), what base adapters take
    states           (N, S, W), what all others take, and negative_states (1 or N, S, W) those of a picture of zeros
    """

    embedding: Tensor | None = None
    states: Tensor | None = None
    negative_states: Tensor | None = None

    def save(self, path: str | Path) -> Path:
        """Write a .safetensors file, from which `ImagePrompt` takes them again. Raises UsageError, as files do."""
        tensors = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        entries = {
            name: Entry(tensor.dtype, tuple(tensor.shape), tensor.detach().cpu().clone)
            for name, tensor in tensors.items()
        }
        with fresh(path, replace=True) as temporary:
            write(temporary, entries, {"nativesd": "image embeddings"})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ImageEmbeddings:
        """Read what `save` has written. Raises SourceError."""
        members = open_source(path)
        keys = set(members[0].tensors)
        if len(members) > 1 or not keys or not keys <= set(PARTS):
            raise SourceError(f"{path} holds no image embeddings: they have no other tensors than {', '.join(PARTS)}")
        return cls(**{key: read_tensor(members[0], key) for key in keys})

    def to(self, like: Tensor) -> ImageEmbeddings:
        """In the dtype and on the device of a tensor."""
        return ImageEmbeddings(*(None if each is None else each.to(like) for each in self._parts()))

    def check(self) -> None:
        """Raises UsageError for what is no tensor of the shapes above, or of no picture."""
        for name, tensor, axes in zip(PARTS, self._parts(), ("(N, P)", "(N, S, W)", "(1 or N, S, W)"), strict=True):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise UsageError(f"{name} of image embeddings must be a tensor {axes} of floating-point numbers")
            if tensor.ndim != axes.count(",") + 1 or not tensor.numel():
                raise UsageError(
                    f"{name} of image embeddings must be {axes} of one picture or more, not {_shape(tensor)}"
                )
        if self.states is None or self.negative_states is None:
            return
        states, negative = self.states.shape, self.negative_states.shape
        if negative[1:] != states[1:] or negative[0] not in (1, states[0]):
            raise UsageError(
                f"negative_states of image embeddings must be {(1, *states[1:])} or {tuple(states)}, as the states "
                f"are, not {tuple(negative)}"
            )

    def _parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.embedding, self.states, self.negative_states


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


@dataclass(frozen=True)
class ImagePrompt:
    """A picture as a prompt, by an IP-Adapter.

    adapter      a loaded `ImageAdapter`, or what `load_image_adapter` takes: "tiny", a file, a folder, a hub id
    picture      one picture or several, or what an image encoder says of them: an `ImageEmbeddings`, or its file
    scale        factor on all that the adapter adds
    start, end   from which and up to which part of the steps it acts
    layers       where in the UNet it acts: "style", "layout", "style and layout", or factors by layer; None: everywhere
    mask         where in the picture it acts: white; one mask, or one for each of several pictures; cut and
                 extended as hints are
    weight_type  how its scale changes from layer to layer, such as "ease in" (ComfyUI's weight types)
    identity     for FaceID: the vector of a face recogniser, of length 1, (512,), or (N, 512) of several pictures of a
                 face (InsightFace's `normed_embedding`)
    crop         which square of the picture is seen: "center", "top" (where faces are), ..., or "pad": all of it
    lora_scale   for FaceID: factor on the adapter's own LoRA

    Several pictures of one prompt are seen together; with a mask for each, each by itself.
    """

    adapter: ImageAdapter | str | Path
    picture: ImageSource | Sequence[ImageSource] | ImageEmbeddings | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    layers: Layers | None = None
    mask: ImageSource | Sequence[ImageSource] | None = None
    weight_type: WeightType = "linear"
    identity: Tensor | None = None
    crop: Crop = "center"
    lora_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image prompt made ready for a UNet.

    groups  (2, S, context) each: the tokens of the prompt and those of the negative prompt; every group is attended to
            by itself, and added where its mask is white ("L", of any size; None: everywhere)
    scales  of every cross-attention
    """

    adapter: ImageAdapter
    groups: Sequence[Tensor]
    masks: Sequence[Image.Image | None]
    scales: Sequence[float]
    start: float
    end: float


def prepare(prompt: ImagePrompt, unet: UNetConfig, encoder: Encoding) -> Prepared:
    """A prompt, whose adapter is loaded, for a UNet; `encoder` is asked for where pictures have to be encoded.

    Raises UsageError for an adapter of another family, an encoder of another size, and for what is missing.
    """
    adapter = prompt.adapter
    assert isinstance(adapter, ImageAdapter)  # the pipeline has loaded it
    check_family(adapter, unet)
    factors = layer_scales(unet, prompt.layers, prompt.weight_type)
    tokens, negative = _tokens(prompt, adapter, encoder)
    masks = _masks(prompt, adapter, len(tokens))
    if len(masks) > 1:
        groups = [torch.stack(pair) for pair in zip(tokens, negative, strict=True)]
    else:
        groups = [torch.stack([tokens.flatten(0, 1), negative.flatten(0, 1)])]  # N times (S, C) -> (2, N * S, C)
    scales = [prompt.scale * factor for factor in factors]
    return Prepared(adapter, groups, masks, scales, prompt.start, prompt.end)


def one_or_several(given: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """The pictures of an argument that takes one, or a list of them."""
    return cast("list[ImageSource]", list(given) if isinstance(given, list | tuple) else [given])


def encode_pictures(
    encoder: ImageEncoder, pictures: Sequence[Image.Image], crop: Crop, *, states: bool = True
) -> ImageEmbeddings:
    """What an encoder says of pictures; without `states` their embeddings alone, which is half the work of one."""
    module = encoder.module
    if module.config.image_channels != 3:
        raise UsageError(f"{encoder.name} takes pictures of {module.config.image_channels} channels, not of 3")
    pixels = clip_pixels(pictures, module.config.image, crop).to(module.class_embedding)
    out = module(pixels)
    if not states:
        return ImageEmbeddings(out.embedding)
    return ImageEmbeddings(out.embedding, out.hidden, module(torch.zeros_like(pixels[:1])).hidden)


def check_family(adapter: ImageAdapter, unet: UNetConfig) -> None:
    """Raises UsageError where an adapter is not for a UNet of this form."""
    config, widths = adapter.module.config, tuple(place.width for place in unet.cross_attentions)
    if config.context != unet.context:
        theirs, ours = CONTEXTS.get(config.context, "another model"), CONTEXTS.get(unet.context, "another")
        raise UsageError(
            f"{adapter.name} is an IP-Adapter for {theirs} (context {config.context}), and the model is {ours} "
            f"(context {unet.context})"
        )
    if config.widths != widths:
        raise UsageError(
            f"{adapter.name} is an IP-Adapter for a UNet with {len(config.widths)} attentions, and the model's has "
            f"{len(widths)}, or of other widths: it was made for another form of UNet"
        )


def _tokens(prompt: ImagePrompt, adapter: ImageAdapter, encoder: Encoding) -> tuple[Tensor, Tensor]:
    """The tokens (N, S, context) of N pictures, and as many of the negative prompt."""
    config, like = adapter.module.config, next(adapter.module.parameters())
    identity = _identity(prompt, adapter, config)
    image: Tensor | None = None
    nothing: Tensor | None = None
    if config.image is not None:
        told = _embeddings(prompt, adapter, encoder)
        told.check()
        image = told.embedding if config.kind == "base" else told.states
        nothing = None if image is None else torch.zeros_like(image)
        if config.kind != "base":
            nothing = told.negative_states
        if image is None or nothing is None:
            needed = "embedding" if config.kind == "base" else "states and negative_states"
            raise UsageError(f"{adapter.name} takes a picture's {needed}, which the image embeddings do not have")
        _require_width(adapter, image.shape[-1], "the image embeddings have")
        image, nothing = image.to(like), nothing.to(like).expand(image.shape)
    if identity is not None:
        identity = identity.to(like)
        if image is not None and len(image) != len(identity):
            raise UsageError(f"{adapter.name}: {len(image)} pictures and {len(identity)} identities: as many of each")
    tokens = adapter.module.tokens(image, identity)
    negative = adapter.module.tokens(nothing, None if identity is None else torch.zeros_like(identity))
    if not tokens.isfinite().all():
        raise UsageError(f"{adapter.name} makes no finite numbers of this picture: try dtype='float32'")
    return tokens, negative


def _identity(prompt: ImagePrompt, adapter: ImageAdapter, config: IPAdapterConfig) -> Tensor | None:
    """The identity vectors (N, identity), where the adapter takes such."""
    if not config.kind.startswith("faceid"):
        if prompt.identity is not None:
            raise UsageError(f"{adapter.name} takes no identity: it is no FaceID adapter")
        return None
    if prompt.identity is None:
        raise UsageError(
            f"{adapter.name} is a FaceID adapter: pass identity=, the {config.identity} numbers that a face recogniser "
            "gives for the face (InsightFace's normed_embedding)"
        )
    wanted = f"identity must be ({config.identity},) or (N, {config.identity}) floating-point numbers"
    try:
        identity = torch.as_tensor(prompt.identity)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{wanted}, not {type(prompt.identity).__name__}") from None
    if identity.ndim == 1:
        identity = identity[None]
    if identity.ndim != 2 or identity.shape[1] != config.identity or not len(identity):
        raise UsageError(f"{wanted}, not {_shape(identity)}")
    if not identity.is_floating_point() or not identity.isfinite().all():
        raise UsageError(f"{wanted}, all of them finite, not {str(identity.dtype).removeprefix('torch.')}")
    longest = float(identity.float().norm(dim=1).max())
    if longest > UNIT:
        warnings.warn(
            f"{adapter.name} was trained with identities of length 1 (InsightFace's normed_embedding), and this one is "
            f"{longest:.1f} long: divide it by its length",
            NativesdWarning,
            stacklevel=2,
        )
    if config.image is None and prompt.picture is not None:
        raise UsageError(f"{adapter.name} sees the identity alone: pass no picture with it")
    return identity


def _embeddings(prompt: ImagePrompt, adapter: ImageAdapter, encoder: Encoding) -> ImageEmbeddings:
    """What is known of the pictures, or what the encoder says of them."""
    given = prompt.picture
    if isinstance(given, str | Path) and str(given).lower().endswith(".safetensors"):
        given = ImageEmbeddings.load(given)
    if isinstance(given, ImageEmbeddings):
        if prompt.crop != ImagePrompt.crop:
            raise UsageError(f"{adapter.name}: crop is for pictures, and image embeddings are made of cropped ones")
        return given
    if given is None:
        raise UsageError(f"{adapter.name} is prompted by a picture: pass one, or image embeddings")
    pictures = [read_image(each) for each in one_or_several(given)]
    with encoder(adapter) as by:
        check_encoder(adapter, by)
        return encode_pictures(by, pictures, prompt.crop, states=adapter.module.config.kind != "base")


def check_encoder(adapter: ImageAdapter, encoder: ImageEncoder) -> None:
    """Raises UsageError where an adapter that is prompted by pictures takes another width than an encoder gives."""
    config, given = adapter.module.config, encoder.module.config
    if config.image is not None:
        gives = given.projection if config.kind == "base" else given.width
        _require_width(adapter, gives or 0, f"the image encoder {encoder.name} gives")


def _require_width(adapter: ImageAdapter, width: int, who: str) -> None:
    """Raises UsageError where what an encoder gives is of another width than an adapter takes."""
    config = adapter.module.config
    if width != config.image:
        what, names = ("an embedding", EMBEDDINGS) if config.kind == "base" else ("states", VISION_ENCODERS)
        takes, given = (names.get(each or 0, "another encoder") for each in (config.image, width))
        raise UsageError(
            f"{adapter.name} takes {what} {config.image} wide ({takes}), and {who} {what} {width} wide ({given})"
        )


def _masks(prompt: ImagePrompt, adapter: ImageAdapter, pictures: int) -> list[Image.Image | None]:
    """One mask for all pictures together, or one for each."""
    if prompt.mask is None:
        return [None]
    given = one_or_several(prompt.mask)
    if len(given) not in (1, pictures):
        raise UsageError(f"{adapter.name}: {len(given)} masks for {pictures} pictures: one for all, or one for each")
    return [read_mask(mask).image for mask in given]
