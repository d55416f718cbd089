"""The inputs and outputs of exported graphs: names, dtypes and the shape of every one for every request.

Exporters, TensorRT profiles, the runtimes and the tests take them from here. The slots of control residuals follow
`UNetConfig.residual_shapes`: sides are halved rounding up, so that every size has slots that fit.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from nativesd.config import (
    ControlNetConfig,
    IPAdapterConfig,
    TextEncoderConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    VisionEncoderConfig,
)
from nativesd.errors import UsageError

CHUNK = 77  # tokens of one chunk of a prompt, begin and end included
MOST_ROWS = 2000  # for the pictures of one call, with guidance
MOST_CELLS = 4096  # along a side: of 16384 pixels, with the smallest factor there is
MOST_CHUNKS = 500  # that a prompt may have
MOST_GROUPS, MOST_IMAGE_TOKENS = 64, 1 << 16  # image prompts, and tokens of each: 255 pictures of 257 together
MIDDLE = "input_control_middle"
OUTPUT = "out_sample"

Component = Literal["unet", "controlnet", "vae_decoder", "vae_encoder", "text_encoder", "image_encoder", "ip_adapter"]
Kind = Literal["weights", "float32", "int64"]
"""A slot's dtype; "weights" is that of the parameters."""


@dataclass(frozen=True)
class Side:
    """A side of a feature map or picture: ceil(latents' side * times / parts)."""

    of: Literal["h", "w"]
    times: int = 1
    parts: int = 1

    def __str__(self) -> str:
        if self.parts > 1:
            return f"ceil({self.of}/{self.parts})"
        return f"{self.times}*{self.of}" if self.times > 1 else self.of


Axis = int | Literal["batch", "tokens", "groups", "image_tokens"] | Side


@dataclass(frozen=True)
class Request:
    """What one call asks of a graph: rows, the latents' sides in cells, and the length of the context.

    Where image prompts have inputs, also how many groups of tokens there are, and how long each is.
    """

    batch: int
    height: int
    width: int
    tokens: int = CHUNK
    groups: int = 1
    image_tokens: int = 1

    def __str__(self) -> str:
        images = "" if (self.groups, self.image_tokens) == (1, 1) else f", {self.groups}x{self.image_tokens} of images"
        return f"{self.batch}x{self.height}x{self.width}, {self.tokens} tokens{images}"

    def fields(self) -> dict[str, int]:
        """For a manifest: what of it there is; of image prompts nothing where there are none."""
        out = asdict(self)
        return out if (self.groups, self.image_tokens) != (1, 1) else dict(list(out.items())[:4])

    def require_possible(self, what: str) -> None:
        """Raises UsageError, which begins with `what`, for less than one or more than a call ever asks for."""
        for name, number, most in (
            ("rows", self.batch, MOST_ROWS),
            ("cells along a side", max(self.height, self.width), MOST_CELLS),
            ("chunks of a prompt", self.tokens // CHUNK, MOST_CHUNKS),
            ("image prompts", self.groups, MOST_GROUPS),
            ("tokens of an image prompt", self.image_tokens, MOST_IMAGE_TOKENS),
        ):
            if not 1 <= number <= most:
                raise UsageError(f"{what}: {number} {name}, which must be between 1 and {most}")


@dataclass(frozen=True)
class Slot:
    """One input or output."""

    name: str
    axes: tuple[Axis, ...]
    kind: Kind = "weights"
    is_control: bool = False
    """Whether it takes a control residual: zeros where there is no control."""
    is_image: bool = False
    """Whether it takes something of image prompts: zeros where there are none."""

    @property
    def is_optional(self) -> bool:
        """Whether zeros in it, and in all others of its kind, change nothing."""
        return self.is_control or self.is_image

    def shape(self, request: Request) -> tuple[int, ...]:
        """Its shape where `request` is made."""
        return tuple(_extent(axis, request) for axis in self.axes)

    def dtype(self, weights: str) -> str:
        """Its dtype's name where that of the weights is `weights`."""
        return weights if self.kind == "weights" else self.kind

    def fields(self, weights: str, static: Request | None = None) -> dict[str, Any]:
        """For a manifest: the name, the axes by their names or, where there is one request only, sizes, the dtype."""
        axes = self.shape(static) if static else [axis if isinstance(axis, int) else str(axis) for axis in self.axes]
        out = {"name": self.name, "shape": list(axes), "dtype": self.dtype(weights)}
        if self.is_image:
            return out | {"without_image_prompts": "zeros"}
        return out | {"without_control": "zeros"} if self.is_control else out

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(map(str, self.axes))}] {self.kind}"


@dataclass(frozen=True)
class Schema:
    """All inputs and outputs of a component's graph, in order."""

    component: Component
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]

    @property
    def control(self) -> tuple[Slot, ...]:
        """The slots of the control residuals, in `residual_shapes` order."""
        return tuple(slot for slot in self.inputs if slot.is_control)

    @property
    def images(self) -> tuple[Slot, ...]:
        """The slots of image prompts."""
        return tuple(slot for slot in self.inputs if slot.is_image)

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that change when anything here does."""
        return hashlib.sha256("\n".join(map(str, (*self.inputs, "->", *self.outputs))).encode()).hexdigest()[:8]

    def fields(self, weights: str, static: Request | None = None) -> dict[str, list[dict[str, Any]]]:
        """`Slot.fields` of all."""
        return {
            "inputs": [slot.fields(weights, static) for slot in self.inputs],
            "outputs": [slot.fields(weights, static) for slot in self.outputs],
        }

    def given(self, names: Set[str]) -> Schema:
        """Without the optional slots that are not among `names`."""
        kept = tuple(slot for slot in self.inputs if slot.name in names or not slot.is_optional)
        return replace(self, inputs=kept)

    def request(self, shapes: Mapping[str, tuple[int, ...]]) -> Request:
        """The request that inputs of these shapes make. Raises UsageError where they belong to no single one."""
        found: dict[str, int] = {}
        for slot in self.inputs:
            for axis, size in zip(slot.axes, shapes.get(slot.name, ()), strict=False):
                name = axis.of if isinstance(axis, Side) else axis
                if isinstance(name, str) and name not in found and (not isinstance(axis, Side) or axis.parts == 1):
                    found[name] = size // (axis.times if isinstance(axis, Side) else 1)
        request = Request(
            found.get("batch", 1), found.get("h", 1), found.get("w", 1), found.get("tokens", CHUNK),
            found.get("groups", 1), found.get("image_tokens", 1),
        )  # fmt: skip
        for slot in self.inputs:
            wanted = slot.shape(request)
            if shapes.get(slot.name) != wanted:
                given = "nothing" if slot.name not in shapes else f"shape {tuple(shapes[slot.name])}"
                raise UsageError(f"{self.component}: {slot.name} was given {given}, and {request} needs {wanted}")
        return request

    def renamed(self, convention: Convention) -> Schema:
        """The same graph under the names that another project's runtime binds.

        Raises UsageError where that project's graph differs by more than names.
        """
        if convention == "nativesd":
            return self
        if self.component != "unet":
            raise UsageError(f"the names of {convention} are those of a UNet, not of a {self.component}")
        if self.images:
            raise UsageError(f"{convention}'s runtime has nothing for inputs for image prompts: leave them out")
        if convention == "comfyui" and any(slot.name == "time_ids" for slot in self.inputs):
            raise UsageError(
                "ComfyUI_TensorRT gives SDXL one vector y in place of text_embeds and time_ids, which is another graph"
            )
        names = _NAMES[convention]

        def rename(slot: Slot) -> Slot:
            if convention == "comfyui" and slot.is_control:
                index = slot.name.removeprefix("input_control_")
                return replace(slot, name="middle_control_0" if slot.name == MIDDLE else f"output_control_{int(index)}")
            return replace(slot, name=names.get(slot.name, slot.name))

        return Schema(self.component, tuple(map(rename, self.inputs)), tuple(map(rename, self.outputs)))


Convention = Literal["nativesd", "comfyui", "streamdiffusion"]
# comfyanonymous/ComfyUI_TensorRT tensorrt_convert.py, its control names by pull request 90 (models/sd_unet.py); and
# livepeer/StreamDiffusion acceleration/tensorrt/models.py, whose slots have the names used here
_NAMES: dict[str, dict[str, str]] = {
    "comfyui": {"sample": "x", "timestep": "timesteps", "encoder_hidden_states": "context", OUTPUT: "h"},
    "streamdiffusion": {OUTPUT: "latent"},
}


def unet_schema(config: UNetConfig, *, control: bool = True, images: bool = True) -> Schema:
    """Of a UNet, with inputs for control residuals and image prompts; SDXL's and LCM's are there where it has them."""
    residuals = _residuals(config, "input_control_") if control else ()
    shown = _image_slots(config) if images else ()
    out = Slot(OUTPUT, ("batch", config.out_channels, Side("h"), Side("w")))
    return Schema("unet", (*_unet_inputs(config), *residuals, *shown), (out,))


IP_KEYS, IP_VALUES, IP_BIAS, IP_MASK = "ip_keys_{}", "ip_values_{}", "ip_bias", "ip_mask_{}"
IMAGE_EMBEDS, IMAGE_STATES, IDENTITY = "image_embeds", "image_states", "identity"


def _image_slots(config: UNetConfig) -> tuple[Slot, ...]:
    """What `ImageContext` has: keys and values by the width of the attentions, a bias, and masks by level."""
    tokens: tuple[Axis, ...] = ("batch", "groups", "image_tokens")
    widths = [place.width for place in config.cross_attentions]
    slots = [replace(slot, is_image=True) for slot in _keys_values(widths, tokens)]
    slots.append(Slot(IP_BIAS, tokens, is_image=True))
    for level in config.attended_levels:
        sides = (Side("h", parts=2**level), Side("w", parts=2**level))
        slots.append(Slot(IP_MASK.format(level), ("batch", "groups", *sides), is_image=True))
    return tuple(slots)


def _keys_values(widths: Sequence[int], tokens: tuple[Axis, ...]) -> list[Slot]:
    """Keys, then values, of all attentions of a width."""
    return [
        Slot(name.format(width), (count, *tokens, width))
        for name in (IP_KEYS, IP_VALUES)
        for width, count in sorted(Counter(widths).items())
    ]


def image_encoder_schema(config: VisionEncoderConfig) -> Schema:
    """Of a CLIP image encoder: normalised pixels to the embedding, where there is one, and the states."""
    pixels = Slot("pixel_values", ("batch", config.image_channels, config.image, config.image))
    states = Slot(IMAGE_STATES, ("batch", config.tokens, config.width))
    embeds = [] if config.projection is None else [Slot(IMAGE_EMBEDS, ("batch", config.projection))]
    return Schema("image_encoder", (pixels,), (*embeds, states))


def ip_adapter_schema(config: IPAdapterConfig) -> Schema:
    """Of an IP-Adapter: what its kind takes, to the inputs of one group of a UNet's, before scales."""
    inputs = []
    if config.kind.startswith("faceid"):
        inputs.append(Slot(IDENTITY, ("batch", config.identity)))
    if config.image is not None and config.kind == "base":
        inputs.append(Slot(IMAGE_EMBEDS, ("batch", config.image)))
    elif config.image is not None:
        inputs.append(Slot(IMAGE_STATES, ("batch", "image_tokens", config.image)))
    tokens: Axis = "image_tokens" if config.kind == "full" else config.tokens
    return Schema("ip_adapter", tuple(inputs), tuple(_keys_values(config.widths, ("batch", 1, tokens))))


def controlnet_schema(config: ControlNetConfig) -> Schema:
    """Of a ControlNet for one kind of hint. Its outputs are what the UNet's slots take, before scales and sums.

    Raises UsageError for a union: which kinds it is given changes its graph.
    """
    if config.union is not None:
        raise UsageError("a ControlNet union chooses among its kinds of hints in Python, so it has no single graph")
    factor = 2 ** (len(config.hint_widths) - 1)
    hint = Slot("controlnet_cond", ("batch", config.hint_channels, Side("h", factor), Side("w", factor)))
    return Schema("controlnet", (*_unet_inputs(config.unet), hint), _residuals(config.unet, "control_"))


def vae_schema(config: VAEConfig | TinyVAEConfig, part: Literal["vae_decoder", "vae_encoder"]) -> Schema:
    """Of the VAE's decoder, unscaled latents to [-1, 1], or its encoder, to mean and log-variance side by side.

    TAESD's encoder gives latents, which are no distribution.
    """
    channels, factor = config.latent_channels, config.factor
    pixels: tuple[Axis, ...] = ("batch", config.image_channels, Side("h", factor), Side("w", factor))
    latents = Slot("latent_sample", ("batch", channels, Side("h"), Side("w")))
    if part == "vae_decoder":
        return Schema(part, (latents,), (Slot("sample", pixels),))
    if isinstance(config, TinyVAEConfig):
        return Schema(part, (Slot("sample", pixels),), (latents,))
    moments = Slot("latent_parameters", ("batch", 2 * channels, Side("h"), Side("w")))
    return Schema(part, (Slot("sample", pixels),), (moments,))


def text_encoder_schema(config: TextEncoderConfig) -> Schema:
    """Of a text encoder: every layer's hidden states as the UNet takes them (for any clip skip), and the pooled one."""
    ids = Slot("input_ids", ("batch", config.length), "int64")
    states = Slot("hidden_states", (config.layers, "batch", config.length, config.width))
    pooled = Slot("pooled", ("batch", config.projection or config.width))
    return Schema("text_encoder", (ids,), (states, pooled))


def _unet_inputs(config: UNetConfig) -> tuple[Slot, ...]:
    """What a UNet and its ControlNets take alike."""
    slots = [
        Slot("sample", ("batch", config.in_channels, Side("h"), Side("w"))),
        Slot("timestep", ("batch",), "float32"),
        Slot("encoder_hidden_states", ("batch", "tokens", config.context)),
    ]
    if config.added is not None:
        slots.append(Slot("text_embeds", ("batch", config.added.pooled)))
        slots.append(Slot("time_ids", ("batch", config.added.ids), "float32"))
    if config.guidance is not None:
        slots.append(Slot("timestep_cond", ("batch", config.guidance)))
    return tuple(slots)


def _residuals(config: UNetConfig, prefix: str) -> tuple[Slot, ...]:
    """The residuals: their channels and how often their sides are halved, read off `residual_shapes`."""
    side = 2 ** len(config.levels)
    out = []
    shapes = config.residual_shapes(1, side, side)
    for i, (_, channels, height, _) in enumerate(shapes):
        name = "middle" if i == len(shapes) - 1 else f"{i:02d}"
        sides = (Side("h", parts=side // height), Side("w", parts=side // height))
        out.append(Slot(f"{prefix}{name}", ("batch", channels, *sides), is_control=prefix == "input_control_"))
    return tuple(out)


def _extent(axis: Axis, request: Request) -> int:
    match axis:
        case int():
            return axis
        case "batch":
            return request.batch
        case "tokens":
            return request.tokens
        case "groups":
            return request.groups
        case "image_tokens":
            return request.image_tokens
        case Side():
            side = request.height if axis.of == "h" else request.width
            return -(-side * axis.times // axis.parts)  # rounded up, as every halving is
