"""The architectures as data: frozen records, and the published families as named presets.

Nothing here knows about tensors or files. A model module is built from one of these records alone, and everything
that exporters and ControlNets need to know about shapes (`UNetConfig.residual_shapes`) is answered by the record. The
presets stand below the records in one file, as each is read beside what its fields mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Prediction = Literal["epsilon", "v", "sample"]
"""What the UNet's output means: the noise, the velocity (Salimans & Ho 2022, section 2.4), or the clean latents."""

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

Depth = int | None
"""Transformer blocks behind a residual block. None: no attention at all. 0: the attention's shell (norm, proj_in,
proj_out) without a block, which still computes (SDXL small and mid ControlNets)."""


@dataclass(frozen=True)
class Level:
    """One resolution of a UNet: its width, the attention's head count, and a `Depth` for every layer.

    `down` has one entry per layer of the down path, `up` one per layer of the up path (published models: one more).
    """

    width: int
    down: tuple[Depth, ...]
    up: tuple[Depth, ...]
    heads: int


@dataclass(frozen=True)
class TextTime:
    """SDXL's added conditioning: a pooled text embedding and `ids` integers, each as a sinusoid of `id_width`."""

    pooled: int
    ids: int
    id_width: int = 256

    @property
    def width(self) -> int:
        """Length of the vector that enters the embedding MLP: 2816 for SDXL base, 2560 for the refiner."""
        return self.pooled + self.ids * self.id_width


@dataclass(frozen=True)
class CrossAttention:
    """Where a UNet attends to its context: stage `stage` of a `part` ("down", "up", "mid"), layer, and block in it."""

    part: str
    stage: int
    layer: int
    block: int
    level: int
    width: int

    @property
    def transformer(self) -> tuple[str, int, int]:
        """The transformer that it is in: part, level, and layer."""
        return self.part, self.level, self.layer


@dataclass(frozen=True)
class UNetConfig:
    """A Stable Diffusion UNet. `mid` has a `Depth` per residual block of the middle; () means no middle block."""

    levels: tuple[Level, ...]
    mid: tuple[Depth, ...]
    context: int
    in_channels: int = 4
    out_channels: int = 4
    linear_projection: bool = False
    added: TextTime | None = None
    guidance: int | None = None
    """Width of the embedding of the guidance scale (LCM's `time_cond_proj_dim`: 256)."""
    groups: int = 32

    @property
    def time_width(self) -> int:
        """Width of the time embedding: four times the first level's (published models: 1280, refiner 1536)."""
        return 4 * self.levels[0].width

    @property
    def dims(self) -> dict[str, int | tuple[int, ...]]:
        """What layouts that count their blocks through all levels need to know. Raises ValueError where they cannot.

        levels and layers going down; per level going up, whether its last layer has attention.
        """
        layers = {len(level.down) for level in self.levels} | {len(level.up) - 1 for level in self.levels if level.up}
        if len(layers) != 1:
            raise ValueError("the UNet has levels with different numbers of layers, which the layout cannot state")
        attention = tuple(int(level.up[-1] is not None) if level.up else 0 for level in reversed(self.levels))
        return {"levels": len(self.levels), "layers": layers.pop(), "up_attention": attention}

    def residual_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Shapes (B, C, H, W) of the control residuals for `height` x `width` latent cells, down first, mid last.

        There is a residual for conv_in's output, for every layer of the down path, for every downsampling, and one
        for the middle. A stride-2 convolution with padding 1 rounds UP, so sizes that are no multiple of 2^levels
        are ceil of half the size above, not floor(size / 2^level).
        """
        shapes = [(batch, self.levels[0].width, height, width)]
        for i, level in enumerate(self.levels):
            shapes += [(batch, level.width, height, width)] * len(level.down)
            if i < len(self.levels) - 1:
                height, width = -(-height // 2), -(-width // 2)
                shapes.append((batch, level.width, height, width))
        return [*shapes, (batch, self.levels[-1].width, height, width)]

    @property
    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        """Every cross-attention in the order in which IP-Adapters count them: going down, going up, the middle."""
        out, last = [], len(self.levels) - 1
        stages = [("down", i, i, level.down) for i, level in enumerate(self.levels)]
        stages += [("up", i, last - i, level.up) for i, level in enumerate(reversed(self.levels))]
        stages += [("mid", 0, last, self.mid)]
        for part, stage, level, depths in stages:
            width = self.levels[level].width
            for layer, depth in enumerate(depths):
                out += [CrossAttention(part, stage, layer, block, level, width) for block in range(depth or 0)]
        return tuple(out)

    @property
    def attended_levels(self) -> tuple[int, ...]:
        """The levels that have cross-attention."""
        return tuple(sorted({place.level for place in self.cross_attentions}))

    def adapter_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Shapes (B, C, H, W) of the features of a T2I-Adapter for `height` x `width` latent cells.

        One per level, added where its attention ends, or behind its downsampling where it has none; and one for the
        middle, which adapters may leave out.
        """
        shapes = []
        for level in self.levels:
            halved = (height, width) if level is self.levels[-1] else (-(-height // 2), -(-width // 2))
            attention = any(depth is not None for depth in level.down)
            shapes.append((batch, level.width, *((height, width) if attention else halved)))
            height, width = halved
        return [*shapes, (batch, self.levels[-1].width, height, width)]


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder. `scaling` multiplies latents on their way into the diffusion; the pipeline applies it."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    scaling: float = 0.18215
    mean: tuple[float, ...] | None = None
    """Of the latents, per channel, with `std`: they are moved and stretched by these beside the scaling (published as
    latents_mean and latents_std)."""
    std: tuple[float, ...] | None = None
    groups: int = 32
    half: Literal["encoder", "decoder"] | None = None
    """The only half there is; None: both."""
    force_upcast: bool = False
    """The published weights overflow in float16, so the pipeline runs this VAE in float32 (SDXL's `force_upcast`)."""

    @property
    def dims(self) -> dict[str, int | tuple[int, ...]]:
        """What the layout needs to know that counts levels from the other end: how many there are."""
        return {"levels": len(self.widths)}

    @property
    def factor(self) -> int:
        """Image pixels per latent cell along one side (8 as published)."""
        return 1 << (len(self.widths) - 1)


@dataclass(frozen=True)
class TextEncoderConfig:
    """A CLIP text transformer, and what of it the UNet gets."""

    width: int
    layers: int
    heads: int
    mlp: int
    activation: Activation
    projection: int | None = None
    """Width of the pooled output's projection; None: the pooled output is not projected."""
    hidden: int = -1
    """Which layer's output is the context: -1 the last, -2 the one before."""
    hidden_norm: bool = True
    """Whether the final layer norm is applied to the context (SD1.x and 2.x) or not (SDXL)."""
    vocabulary: int = 49408
    length: int = 77


@dataclass(frozen=True)
class VisionEncoderConfig:
    """A CLIP vision transformer: pictures to hidden states, and the class token's to an embedding."""

    width: int
    layers: int
    heads: int
    mlp: int
    activation: Activation
    projection: int | None
    """Width of the picture's embedding; None: there is none, only hidden states."""
    image: int = 224
    """Side of the pictures, in pixels."""
    patch: int = 14
    """Side in pixels of the squares that become tokens."""
    image_channels: int = 3

    @property
    def tokens(self) -> int:
        """Of a picture: its squares, and the class token before them (224 pixels: 257)."""
        return (self.image // self.patch) ** 2 + 1


@dataclass(frozen=True)
class UnionConfig:
    """What a ControlNet for several kinds of hint has beside a plain one's layers (xinsir's ControlNet++)."""

    kinds: int = 6
    """How many kinds of hint it tells apart: 6 as first published, 8 in the promax version."""
    layers: int = 1
    """Transformer layers that mix the pooled hints with the pooled latents."""
    heads: int = 8
    id_width: int = 256
    """Length of the sinusoid that says of one kind whether it is used."""


@dataclass(frozen=True)
class ControlNetConfig:
    """A ControlNet. `unet` describes the encoder it shares with the UNet, with nothing going `up`."""

    unet: UNetConfig
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    """Widths of the hint's encoder, which halves the picture between them."""
    hint_channels: int = 3
    union: UnionConfig | None = None
    pooled: bool = False
    """Whether every residual is its mean over the picture ("shuffle", global_pool_conditions): what, but not where."""

    @property
    def dims(self) -> dict[str, int | tuple[int, ...]]:
        """What layouts that count their blocks through all levels need to know. Raises ValueError where they cannot."""
        return self.unet.dims


@dataclass(frozen=True)
class TinyVAEConfig:
    """TAESD, a small autoencoder of convolutions. Blocks per resolution, in the data's order in either half."""

    half: Literal["encoder", "decoder"] | None = None
    """The only half there is; None: both."""
    width: int = 64
    encoder: tuple[int, ...] = (1, 3, 3, 3)
    decoder: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    image_channels: int = 3
    scaling: float = 1.0
    """Its latents are those of the diffusion."""

    @property
    def factor(self) -> int:
        """Image pixels per latent cell along one side (8 as published)."""
        return 1 << (len(self.decoder) - 1)


@dataclass(frozen=True)
class AdapterStage:
    """One feature map of a T2I-Adapter: its width, and whether it is half the size of the one before."""

    width: int
    down: bool


@dataclass(frozen=True)
class T2IAdapterConfig:
    """A T2I-Adapter, full or light. Light: no first convolution, and every stage narrows to a quarter of its width."""

    stages: tuple[AdapterStage, ...]
    layers: int
    """Residual blocks per stage."""
    unshuffle: int = 8
    """Side of the square of pixels that becomes the channels of one cell."""
    image_channels: int = 3
    light: bool = False

    @property
    def dims(self) -> dict[str, int | tuple[int, ...]]:
        """What the original layout needs to know: how many blocks of the full form, and stages of the light one."""
        stages = len(self.stages)
        return {"blocks": 0 if self.light else stages * self.layers, "light": stages if self.light else 0}


IPAdapterKind = Literal["base", "plus", "full", "faceid", "faceid-plus"]


@dataclass(frozen=True)
class IPAdapterConfig:
    """An IP-Adapter: a projection of a picture to tokens, and keys and values of these for every cross-attention."""

    kind: IPAdapterKind
    widths: tuple[int, ...]
    """Of the UNet's cross-attentions, in the order of `UNetConfig.cross_attentions`."""
    context: int
    """Width of the tokens: that of the UNet's context."""
    image: int | None
    """Width of what an image encoder gives: the embedding (base), or the states; None: it takes none (FaceID)."""
    tokens: int
    """How many a picture becomes; with "full" as many as the encoder's states."""
    mlp: int = 0
    """Width between two linear layers: of the projection (full, FaceID) or of the identity vector (FaceID plus)."""
    width: int = 0
    """Of the resampler's layers, where there is one; `heads`, `depth` and `hidden` are its own, too."""
    heads: int = 0
    depth: int = 0
    hidden: int = 0
    identity: int = 512
    """Length of the vector of a face's identity, which FaceID takes."""
    lora: int | None = None
    """Rank of the LoRA of the UNet's attentions that is in the file (FaceID); None: there is none."""
    shortcut: bool = False
    """Whether the identity's own tokens are added to the resampler's (FaceID plus v2)."""


def _levels(widths: tuple[int, ...], heads: tuple[int, ...], down: tuple[Depth, ...], layers: int) -> tuple[Level, ...]:
    """Levels of the published regular form: one depth per level, `layers` going down and one more going up."""
    return tuple(
        Level(width, (depth,) * layers, (depth,) * (layers + 1), head)
        for width, head, depth in zip(widths, heads, down, strict=True)
    )


# runwayml/stable-diffusion-v1-5 unet/config.json
SD15_UNET = UNetConfig(
    levels=_levels((320, 640, 1280, 1280), (8, 8, 8, 8), (1, 1, 1, None), 2), mid=(1, None), context=768
)
# stabilityai/stable-diffusion-2-1 unet/config.json (2-1-base has the same names and shapes)
SD21_UNET = UNetConfig(
    levels=_levels((320, 640, 1280, 1280), (5, 10, 20, 20), (1, 1, 1, None), 2),
    mid=(1, None),
    context=1024,
    linear_projection=True,
)
# stabilityai/stable-diffusion-xl-base-1.0 unet/config.json
SDXL_UNET = UNetConfig(
    levels=_levels((320, 640, 1280), (5, 10, 20), (None, 2, 10), 2),
    mid=(10, None),
    context=2048,
    linear_projection=True,
    added=TextTime(1280, 6),
)
# stabilityai/stable-diffusion-xl-refiner-1.0 unet/config.json
REFINER_UNET = UNetConfig(
    levels=_levels((384, 768, 1536, 1536), (6, 12, 24, 24), (None, 4, 4, None), 2),
    mid=(4, None),
    context=1280,
    linear_projection=True,
    added=TextTime(1280, 5),
)


def _thinner(config: UNetConfig) -> UNetConfig:
    """One layer per level going down and two going up: block removal of BK-SDM (Kim et al. 2023, section 3.1)."""
    return replace(
        config, levels=tuple(replace(level, down=level.down[:1], up=level.up[:2]) for level in config.levels)
    )


def _without_middle(config: UNetConfig) -> UNetConfig:
    """Neither the middle nor the lowest level: BK-SDM tiny."""
    return replace(config, levels=config.levels[:-1], mid=())


# nota-ai/bk-sdm-{base,tiny}, bk-sdm-v2-{base,tiny} (segmind/small-sd and tiny-sd have the same form)
BK_SDM_BASE, BK_SDM_V2_BASE = _thinner(SD15_UNET), _thinner(SD21_UNET)
BK_SDM_TINY, BK_SDM_V2_TINY = _without_middle(BK_SDM_BASE), _without_middle(BK_SDM_V2_BASE)
# segmind/SSD-1B and segmind/Segmind-Vega unet/config.json
SSD_1B_UNET = replace(
    SDXL_UNET,
    levels=(
        SDXL_UNET.levels[0],
        replace(SDXL_UNET.levels[1], up=(2, 1, 1)),
        replace(SDXL_UNET.levels[2], down=(4, 4), up=(4, 4, 10)),
    ),
    mid=(None,),
)
VEGA_UNET = replace(
    SDXL_UNET,
    levels=(
        SDXL_UNET.levels[0],
        replace(SDXL_UNET.levels[1], down=(1, 1), up=(1, 1, 1)),
        replace(SDXL_UNET.levels[2], down=(2, 2), up=(2, 2, 2)),
    ),
    mid=(None,),
)

# vae/config.json of the same repositories
SD_VAE = VAEConfig()
SDXL_VAE = VAEConfig(scaling=0.13025, force_upcast=True)
# playgroundai/playground-v2.5-1024px-aesthetic vae/config.json
PLAYGROUND_VAE = replace(
    SDXL_VAE, scaling=0.5, mean=(-1.6574, 1.886, -1.383, 2.5155), std=(8.4927, 5.9022, 6.5498, 5.2299)
)

# openai/clip-vit-large-patch14, as in stable-diffusion-v1-5 text_encoder/config.json
CLIP_L = TextEncoderConfig(768, 12, 12, 3072, "quick_gelu")
# OpenCLIP ViT-H/14 without its last layer, as in stable-diffusion-2-1 text_encoder/config.json
OPENCLIP_H = TextEncoderConfig(1024, 23, 16, 4096, "gelu")
# stable-diffusion-xl-base-1.0 text_encoder and text_encoder_2 (OpenCLIP ViT-bigG/14)
SDXL_CLIP_L = replace(CLIP_L, hidden=-2, hidden_norm=False)
SDXL_BIGG = TextEncoderConfig(1280, 32, 20, 5120, "gelu", projection=1280, hidden=-2, hidden_norm=False)

# openai/clip-vit-large-patch14 vision_config; h94/IP-Adapter models/image_encoder and sdxl_models/image_encoder, which
# are OpenCLIP's ViT-H/14 and ViT-bigG/14 (laion2b)
CLIP_VISION_L = VisionEncoderConfig(1024, 24, 16, 4096, "quick_gelu", projection=768)
CLIP_VISION_H = VisionEncoderConfig(1280, 32, 16, 5120, "gelu", projection=1024)
CLIP_VISION_BIGG = VisionEncoderConfig(1664, 48, 16, 8192, "gelu", projection=1280)


def _ip_adapter(unet: UNetConfig, kind: IPAdapterKind, image: int | None, tokens: int, **more: Any) -> IPAdapterConfig:
    widths = tuple(place.width for place in unet.cross_attentions)
    return IPAdapterConfig(kind, widths, unet.context, image, tokens, **more)


# h94/IP-Adapter models/ip-adapter{,-plus,-full-face}_sd15 and sdxl_models/ip-adapter{,-plus}_sdxl{,_vit-h}; and
# h94/IP-Adapter-FaceID ip-adapter-faceid{,-plus}_{sd15,sdxl}
IP_ADAPTERS = {
    "sd15": _ip_adapter(SD15_UNET, "base", 1024, 4),
    "sd15-plus": _ip_adapter(SD15_UNET, "plus", 1280, 16, width=768, heads=12, depth=4, hidden=3072),
    "sd15-full": _ip_adapter(SD15_UNET, "full", 1280, 257, mlp=1280),
    "sd15-vit-g": _ip_adapter(SD15_UNET, "base", 1280, 4),
    "sdxl": _ip_adapter(SDXL_UNET, "base", 1280, 4),
    "sdxl-vit-h": _ip_adapter(SDXL_UNET, "base", 1024, 4),
    "sdxl-plus-vit-h": _ip_adapter(SDXL_UNET, "plus", 1280, 16, width=1280, heads=20, depth=4, hidden=5120),
    "sd15-faceid": _ip_adapter(SD15_UNET, "faceid", None, 4, mlp=1024, lora=128),
    "sdxl-faceid": _ip_adapter(SDXL_UNET, "faceid", None, 4, mlp=1024, lora=128),
    "sd15-faceid-plus": _ip_adapter(
        SD15_UNET, "faceid-plus", 1280, 4, mlp=1024, width=768, heads=12, depth=4, hidden=3072, lora=128
    ),
    "sdxl-faceid-plus": _ip_adapter(
        SDXL_UNET, "faceid-plus", 1280, 4, mlp=1024, width=2048, heads=32, depth=4, hidden=8192, lora=128
    ),
}


def _encoder(config: UNetConfig) -> UNetConfig:
    """The part of a UNet that a ControlNet copies: nothing going up."""
    return replace(config, levels=tuple(replace(level, up=()) for level in config.levels))


# lllyasviel/control_v11p_sd15_canny config.json, and its kin for SD2.1 and SDXL (diffusers/controlnet-canny-sdxl-1.0)
SD15_CONTROLNET = ControlNetConfig(_encoder(SD15_UNET))
SD21_CONTROLNET = ControlNetConfig(_encoder(SD21_UNET))
SDXL_CONTROLNET = ControlNetConfig(_encoder(SDXL_UNET))
# diffusers/controlnet-depth-sdxl-1.0-small config.json: the only attention is a shell in the middle
SDXL_SMALL_CONTROLNET = ControlNetConfig(
    replace(
        SDXL_CONTROLNET.unet,
        levels=tuple(replace(level, down=(None, None)) for level in SDXL_CONTROLNET.unet.levels),
        mid=(0, None),
    )
)
# xinsir/controlnet-union-sdxl-1.0 config.json and config_promax.json
SDXL_UNION = replace(SDXL_CONTROLNET, union=UnionConfig(kinds=6))
SDXL_PROMAX = replace(SDXL_CONTROLNET, union=UnionConfig(kinds=8))

# madebyollin/taesd config.json (taesdxl has the same form)
TAESD = TinyVAEConfig()


def _stages(*down: bool) -> tuple[AdapterStage, ...]:
    """The published widths, which are those of SD1.5's levels."""
    return tuple(AdapterStage(width, d) for width, d in zip((320, 640, 1280, 1280), down, strict=True))


# TencentARC/T2I-Adapter: Adapter, Adapter_light (ldm/modules/encoders/adapter.py), Adapter_XL (models/adapters.py)
SD15_ADAPTER = T2IAdapterConfig(_stages(False, True, True, True), layers=2)
SD15_LIGHT_ADAPTER = T2IAdapterConfig(_stages(False, True, True, True), layers=4, light=True)
SDXL_ADAPTER = T2IAdapterConfig(_stages(False, False, True, False), layers=2, unshuffle=16)

UNETS = {
    "sd15": SD15_UNET, "sd21": SD21_UNET, "sdxl": SDXL_UNET, "refiner": REFINER_UNET,
    "bk-sdm-base": BK_SDM_BASE, "bk-sdm-tiny": BK_SDM_TINY, "bk-sdm-v2-base": BK_SDM_V2_BASE,
    "bk-sdm-v2-tiny": BK_SDM_V2_TINY, "ssd-1b": SSD_1B_UNET, "vega": VEGA_UNET,
}  # fmt: skip
VAES = {"sd": SD_VAE, "sdxl": SDXL_VAE}
TEXT_ENCODERS = {"clip-l": CLIP_L, "openclip-h": OPENCLIP_H, "sdxl-clip-l": SDXL_CLIP_L, "bigg": SDXL_BIGG}
VISION_ENCODERS = {"clip-l": CLIP_VISION_L, "openclip-h": CLIP_VISION_H, "bigg": CLIP_VISION_BIGG}
CONTROLNETS = {
    "sd15": SD15_CONTROLNET, "sd21": SD21_CONTROLNET, "sdxl": SDXL_CONTROLNET, "sdxl-small": SDXL_SMALL_CONTROLNET,
    "sdxl-union": SDXL_UNION, "sdxl-promax": SDXL_PROMAX,
}  # fmt: skip
T2I_ADAPTERS = {"sd15": SD15_ADAPTER, "sd15-light": SD15_LIGHT_ADAPTER, "sdxl": SDXL_ADAPTER}

Config = (
    UNetConfig | VAEConfig | TextEncoderConfig | ControlNetConfig | TinyVAEConfig | T2IAdapterConfig
    | VisionEncoderConfig | IPAdapterConfig
)  # fmt: skip
"""The configuration of any component."""
