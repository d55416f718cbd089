"""The config.json of a component: the fields that are honoured, what each may hold, and the network that they describe.

Fields that would make another network than the one that is built are refused by `_require`; all others are left alone.
The readers of all networks are in one file, so that what each honours is read beside what the others do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nativesd.config import (
    Activation,
    AdapterStage,
    Config,
    ControlNetConfig,
    Depth,
    Level,
    T2IAdapterConfig,
    TextEncoderConfig,
    TextTime,
    UNetConfig,
    UnionConfig,
    VAEConfig,
    VisionEncoderConfig,
)
from nativesd.errors import SourceError, quote
from nativesd.reading import read_json
from nativesd.schema import REQUIRED, Field, either, many, number, one_of, read_fields, text, truth, whole

Json = Mapping[str, Any]

ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
CLASSES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip
"""The class of a component, by its folder, where config.json does not say."""

WIDTH, CHANNELS, LEVELS, LAYERS, DEPTH = whole(1, 16384), whole(1, 64), 8, whole(1, 16), whole(0, 32)
"""Several times what is published: SDXL's UNet has widths to 1280, 3 levels, 2 layers and a depth of 10."""
WIDTHS, TYPES = many(WIDTH, LEVELS), many(text(), LEVELS)

ANY = (Field("_class_name", text()), Field("architectures", many(text(), 8, least=0), ()))
UNET = (
    Field("block_out_channels", WIDTHS, REQUIRED),
    Field("down_block_types", TYPES, REQUIRED),
    Field("up_block_types", TYPES, REQUIRED),
    Field("cross_attention_dim", WIDTH, REQUIRED),
    Field("attention_head_dim", either(WIDTH, WIDTHS), 8),  # the number of heads, whatever its name says
    Field("num_attention_heads", either(WIDTH, WIDTHS)),
    Field("layers_per_block", either(LAYERS, many(LAYERS, LEVELS)), 2),
    Field("transformer_layers_per_block", either(DEPTH, many(either(DEPTH, many(DEPTH, 17)), LEVELS)), 1),
    Field("reverse_transformer_layers_per_block", many(either(DEPTH, many(DEPTH, 17)), LEVELS)),
    Field("in_channels", CHANNELS, 4),
    Field("out_channels", CHANNELS, 4),
    Field("norm_num_groups", WIDTH, 32),
    Field("use_linear_projection", truth(), False),
    Field("addition_embed_type", one_of("text_time")),
    Field("addition_time_embed_dim", WIDTH),
    Field("projection_class_embeddings_input_dim", WIDTH),
    Field("time_cond_proj_dim", WIDTH),
    Field("sample_size", either(whole(1, 2048), many(whole(1, 2048), 2))),
)
CONTROLNET = (
    Field("block_out_channels", WIDTHS, REQUIRED),
    Field("conditioning_embedding_out_channels", many(WIDTH, 8), (16, 32, 96, 256)),
    Field("conditioning_channels", CHANNELS, 3),
    Field("global_pool_conditions", truth(), False),
    Field("addition_embed_type", one_of("text_time")),
    Field("addition_time_embed_dim", WIDTH),
    Field("projection_class_embeddings_input_dim", WIDTH),
)
UNION = (
    Field("num_control_type", CHANNELS, REQUIRED),
    Field("num_trans_layer", LAYERS, REQUIRED),
    Field("num_trans_head", WIDTH, REQUIRED),
    Field("addition_time_embed_dim", WIDTH, REQUIRED),
)
T2I_ADAPTER = (
    Field("channels", WIDTHS, REQUIRED),
    Field("adapter_type", one_of("full_adapter", "full_adapter_xl", "light_adapter"), "full_adapter"),
    Field("num_res_blocks", LAYERS, 2),
    Field("downscale_factor", whole(1, 64), 8),
    Field("in_channels", CHANNELS, 3),
)
VAE = (
    Field("block_out_channels", WIDTHS, REQUIRED),
    Field("down_block_types", many(one_of("DownEncoderBlock2D"), LEVELS, least=0), ()),
    Field("up_block_types", many(one_of("UpDecoderBlock2D"), LEVELS, least=0), ()),
    Field("layers_per_block", LAYERS, 1),
    Field("latent_channels", CHANNELS, 4),
    Field("in_channels", CHANNELS, 3),
    Field("scaling_factor", number(1e-6, 1e6), 0.18215),  # SD1.x and SD2.x, which do not say it
    Field("latents_mean", many(number(-1e6, 1e6), 64)),
    Field("latents_std", many(number(1e-6, 1e6), 64)),
    Field("norm_num_groups", WIDTH, 32),
    Field("force_upcast", truth(), False),
)
TEXT = (
    Field("hidden_size", WIDTH, REQUIRED),
    Field("num_hidden_layers", whole(1, 128), REQUIRED),
    Field("num_attention_heads", WIDTH, REQUIRED),
    Field("intermediate_size", whole(1, 65536), REQUIRED),
    Field("hidden_act", one_of(*ACTIVATIONS), REQUIRED),
    Field("projection_dim", WIDTH),
    Field("vocab_size", whole(1, 1_000_000), 49408),
    Field("max_position_embeddings", whole(3, 4096), 77),
)
VISION = (
    Field("hidden_size", WIDTH, REQUIRED),
    Field("num_hidden_layers", whole(1, 128), REQUIRED),
    Field("num_attention_heads", WIDTH, REQUIRED),
    Field("intermediate_size", whole(1, 65536), REQUIRED),
    Field("hidden_act", one_of(*ACTIVATIONS), "quick_gelu"),  # transformers' default
    Field("projection_dim", WIDTH, 512),
    Field("image_size", whole(1, 4096), 224),
    Field("patch_size", whole(1, 1024), 32),
    Field("num_channels", CHANNELS, 3),
)


def component_config(path: Path) -> Config | None:
    """What a component's config.json says; None for a class that has no reader here.

    The folders beside it are asked for what it does not say itself (whether the model is an SDXL, how wide its pooled
    embedding is). Raises SourceError.
    """
    data, model, where = read_json(path), path.parents[1], str(path)
    about = read_fields(data, ANY, where)
    stated = about["_class_name"] or next(iter(about["architectures"]), None)
    try:
        match stated or CLASSES.get(path.parent.name):
            case "UNet2DConditionModel":
                return unet_config(data, where, pooled=_projection(model / "text_encoder_2" / "config.json") or 1280)
            case "ControlNetModel" | "ControlNetUnionModel":
                return controlnet_config(data, where)
            case "T2IAdapter":
                return t2i_adapter_config(data, where)
            case "AutoencoderKL":
                return vae_config(data, where)
            case "CLIPTextModel" | "CLIPTextModelWithProjection" as name:
                sdxl = name == "CLIPTextModelWithProjection" or (model / "text_encoder_2").is_dir()
                return text_config(data, where, sdxl=sdxl)
            case "CLIPVisionModel" | "CLIPVisionModelWithProjection" as name:
                return vision_config(data, where, projected=name == "CLIPVisionModelWithProjection")
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error
    return None


def sample_size(path: Path) -> int | None:
    """The side of the pictures a UNet was trained on, in latent cells, where its config.json says it."""
    fields = [field for field in UNET if field.name == "sample_size"]
    size = read_fields(read_json(path), fields, str(path))["sample_size"]
    return size if isinstance(size, int) else None


def _projection(path: Path) -> int | None:
    """The projection_dim of another component's config.json, where there is one."""
    fields = [field for field in TEXT if field.name == "projection_dim"]
    return read_fields(read_json(path), fields, str(path))["projection_dim"] if path.is_file() else None


def _per_level(value: Any, count: int, name: str = "") -> list[Any]:
    """A config field that is one value for all levels or a list with one for each."""
    values = list(value) if isinstance(value, tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} {quote(value)} has {len(values)} entries for {count}".strip())
    return values


def _require(data: Json, **expected: Any) -> None:
    """Refuse values that would make another network than the one that is built."""
    for name, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if data.get(name, allowed[0]) not in allowed:
            only = " or ".join(map(repr, allowed))
            raise ValueError(f"{name} = {quote(data[name])} is not supported (only {only})")


def _require_divisible(name: str, width: int, by: int, what: str) -> None:
    if width % by:
        raise ValueError(f"{name} has {width}, which {by} {what} do not divide")


def unet_config(data: Json, where: str, *, pooled: int | None) -> UNetConfig:
    """UNet2DConditionModel's config.json; `attention_head_dim` is its number of heads.

    `pooled` is the width of the pooled text embedding, for UNets that are conditioned on it: the rest of
    `projection_class_embeddings_input_dim` are the time ids. Raises SourceError, ValueError.
    """
    _require(
        data, act_fn="silu", flip_sin_to_cos=True, freq_shift=0, center_input_sample=False, downsample_padding=1,
        class_embed_type=None, num_class_embeds=None, encoder_hid_dim=None, encoder_hid_dim_type=None,
        resnet_time_scale_shift="default", time_embedding_type="positional", time_embedding_dim=None,
        only_cross_attention=False, dual_cross_attention=False, conv_in_kernel=3, conv_out_kernel=3,
        addition_embed_type=(None, "text_time"), norm_eps=1e-5, mid_block_scale_factor=1, timestep_post_act=None,
        attention_type="default", mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    )  # fmt: skip
    said = read_fields(data, UNET, where)
    widths, down_types, up_types = said["block_out_channels"], said["down_block_types"], said["up_block_types"]
    count = len(widths)
    heads = _per_level(said["num_attention_heads"] or said["attention_head_dim"], count, "the number of heads")
    layers = _per_level(said["layers_per_block"], count, "layers_per_block")
    depths = _per_level(said["transformer_layers_per_block"], count, "transformer_layers_per_block")
    reverse = said["reverse_transformer_layers_per_block"] or tuple(depths[::-1])
    up_depths = _per_level(reverse, count, "reverse_transformer_layers_per_block")
    for name, types, plain in (
        ("down_block_types", down_types, "DownBlock2D"), ("up_block_types", up_types, "UpBlock2D")
    ):  # fmt: skip
        _per_level(types, count, name)
        for kind in types:
            if kind not in (plain, "CrossAttn" + plain):
                raise ValueError(f"block type {kind!r} is not supported (only {plain!r} and 'CrossAttn{plain}')")

    def per_layer(depth: Any, layer_count: int, block_type: str) -> tuple[Depth, ...]:
        if not block_type.startswith("CrossAttn"):
            return (None,) * layer_count
        return tuple(_per_level(depth, layer_count, "transformer_layers_per_block"))

    levels = tuple(
        Level(
            width=widths[i],
            down=per_layer(depths[i], layers[i], down_types[i]),
            up=per_layer(up_depths[-1 - i], layers[i] + 1, up_types[-1 - i]),
            heads=heads[i],
        )
        for i in range(count)
    )
    mid_type = data.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    last = depths[-1][-1] if isinstance(depths[-1], tuple) else depths[-1]
    mids: dict[str | None, tuple[Depth, ...]] = {
        "UNetMidBlock2DCrossAttn": (last, None),
        "UNetMidBlock2D": (None,),
        None: (),
    }
    for i, level in enumerate(levels):
        _require_divisible(f"level {i}", level.width, said["norm_num_groups"], "groups")
        attention = {*level.down, *level.up, *(mids[mid_type] if i == count - 1 else ())} != {None}
        if attention:
            _require_divisible(f"level {i}", level.width, level.heads, "heads")
    added = None
    if said["addition_embed_type"] == "text_time":
        id_width, total = said["addition_time_embed_dim"], said["projection_class_embeddings_input_dim"]
        if None in (id_width, total):
            raise ValueError("addition_time_embed_dim and projection_class_embeddings_input_dim are missing")
        if pooled is None or total <= pooled or (total - pooled) % id_width:
            raise ValueError(
                f"the added conditioning of width {total} does not fit a pooled embedding of width {pooled}"
            )
        added = TextTime(pooled, (total - pooled) // id_width, id_width)
    return UNetConfig(
        levels=levels,
        mid=mids[mid_type],
        context=said["cross_attention_dim"],
        in_channels=said["in_channels"],
        out_channels=said["out_channels"],
        linear_projection=said["use_linear_projection"],
        added=added,
        guidance=said["time_cond_proj_dim"],
        groups=said["norm_num_groups"],
    )


def controlnet_config(data: Json, where: str) -> ControlNetConfig:
    """ControlNetModel's config.json, or ControlNetUnionModel's. Raises SourceError, ValueError."""
    _require(data, controlnet_conditioning_channel_order="rgb")
    said = read_fields(data, CONTROLNET, where)
    pooled = None
    if said["addition_embed_type"] == "text_time":  # six time ids: there is no ControlNet for the refiner
        total, id_width = said["projection_class_embeddings_input_dim"], said["addition_time_embed_dim"]
        pooled = None if None in (total, id_width) else total - 6 * id_width
        if pooled is not None and pooled < 1:
            raise ValueError(f"the added conditioning of width {total} does not hold six ids of width {id_width}")
    count = len(said["block_out_channels"])
    unet = unet_config({**data, "up_block_types": ["UpBlock2D"] * count}, where, pooled=pooled)
    union = None
    if data.get("_class_name") == "ControlNetUnionModel":
        of_union = read_fields(data, UNION, where)
        _require_divisible("level 0", unet.levels[0].width, of_union["num_trans_head"], "heads")
        union = UnionConfig(*(of_union[field.name] for field in UNION))
    return ControlNetConfig(
        unet=replace(unet, levels=tuple(replace(level, up=()) for level in unet.levels)),
        hint_widths=said["conditioning_embedding_out_channels"],
        hint_channels=said["conditioning_channels"],
        union=union,
        pooled=said["global_pool_conditions"],
    )


def t2i_adapter_config(data: Json, where: str) -> T2IAdapterConfig:
    """T2IAdapter's config.json. Raises SourceError."""
    said = read_fields(data, T2I_ADAPTER, where)
    widths, kind = list(said["channels"]), said["adapter_type"]
    if kind == "light_adapter":
        widths.append(widths[-1])
    # the published forms halve at every stage but the first, SDXL's at the third alone
    down = [i == 2 if kind == "full_adapter_xl" else i > 0 for i in range(len(widths))]
    return T2IAdapterConfig(
        stages=tuple(AdapterStage(width, halves) for width, halves in zip(widths, down, strict=True)),
        layers=said["num_res_blocks"],
        unshuffle=said["downscale_factor"],
        image_channels=said["in_channels"],
        light=kind == "light_adapter",
    )


def vae_config(data: Json, where: str) -> VAEConfig:
    """AutoencoderKL's config.json. Raises SourceError, ValueError."""
    _require(
        data, act_fn="silu", shift_factor=(None, 0), use_quant_conv=True,
        use_post_quant_conv=True, mid_block_add_attention=True,
    )  # fmt: skip
    said = read_fields(data, VAE, where)
    for name in ("latents_mean", "latents_std"):
        if said[name] is not None:
            _per_level(said[name], said["latent_channels"], name)
    for i, width in enumerate(said["block_out_channels"]):
        _require_divisible(f"level {i}", width, said["norm_num_groups"], "groups")
    return VAEConfig(
        widths=said["block_out_channels"],
        layers=said["layers_per_block"],
        latent_channels=said["latent_channels"],
        image_channels=said["in_channels"],
        scaling=said["scaling_factor"],
        mean=said["latents_mean"],
        std=said["latents_std"],
        groups=said["norm_num_groups"],
        force_upcast=said["force_upcast"],
    )


def text_config(data: Json, where: str, *, sdxl: bool) -> TextEncoderConfig:
    """transformers' CLIPTextConfig. What the UNet gets of it is the family's rule: SDXL takes the penultimate layer
    without the final norm. The token ids in the file are meaningless in published models and not used.
    Raises SourceError, ValueError.
    """
    _require(data, layer_norm_eps=1e-5)
    said = read_fields(data, TEXT, where)
    projected = "CLIPTextModelWithProjection" in read_fields(data, ANY, where)["architectures"]
    if projected and said["projection_dim"] is None:
        raise ValueError("projection_dim is missing")
    if sdxl and said["num_hidden_layers"] < 2:
        raise ValueError("num_hidden_layers = 1, and SDXL takes the layer before the last one")
    _require_divisible("hidden_size", said["hidden_size"], said["num_attention_heads"], "heads")
    return TextEncoderConfig(
        width=said["hidden_size"],
        layers=said["num_hidden_layers"],
        heads=said["num_attention_heads"],
        mlp=said["intermediate_size"],
        activation=ACTIVATIONS[said["hidden_act"]],
        projection=said["projection_dim"] if projected else None,
        hidden=-2 if sdxl else -1,
        hidden_norm=not sdxl,
        vocabulary=said["vocab_size"],
        length=said["max_position_embeddings"],
    )


def vision_config(data: Json, where: str, *, projected: bool) -> VisionEncoderConfig:
    """transformers' CLIPVisionConfig. Raises SourceError, ValueError."""
    _require(data, layer_norm_eps=1e-5)
    said = read_fields(data, VISION, where)
    _require_divisible("hidden_size", said["hidden_size"], said["num_attention_heads"], "heads")
    return VisionEncoderConfig(
        width=said["hidden_size"],
        layers=said["num_hidden_layers"],
        heads=said["num_attention_heads"],
        mlp=said["intermediate_size"],
        activation=ACTIVATIONS[said["hidden_act"]],
        projection=said["projection_dim"] if projected else None,
        image=said["image_size"],
        patch=said["patch_size"],
        image_channels=said["num_channels"],
    )
