"""Models in the published folder layout: model_index.json, and a folder with config and weights for every component."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

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
)
from nativesd.errors import SourceError
from nativesd.weights.files.container import read_file
from nativesd.weights.files.header import merge_headers, quote, read_index

Json = Mapping[str, Any]
T = TypeVar("T")

ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


CLASSES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip
"""The class of a component, by its folder, where config.json does not say."""


def component_config(path: Path) -> Config | None:
    """What a component's config.json says; None for a class that has no reader here.

    The folders beside it are asked for what it does not say itself (whether the model is an SDXL, how wide its pooled
    embedding is). Raises SourceError.
    """
    data, model = read_json(path), path.parents[1]
    stated = data.get("_class_name") or next(iter(data.get("architectures") or ()), None)
    match stated or CLASSES.get(path.parent.name):
        case "UNet2DConditionModel":
            encoder = model / "text_encoder_2" / "config.json"
            pooled = read_json(encoder).get("projection_dim") if encoder.is_file() else None
            return _parse(lambda data: unet_config(data, pooled=pooled or 1280), data, path)
        case "ControlNetModel" | "ControlNetUnionModel":
            return _parse(controlnet_config, data, path)
        case "T2IAdapter":
            return _parse(t2i_adapter_config, data, path)
        case "AutoencoderKL":
            return _parse(vae_config, data, path)
        case "CLIPTextModel" | "CLIPTextModelWithProjection" as name:
            sdxl = name == "CLIPTextModelWithProjection" or (model / "text_encoder_2").is_dir()
            return _parse(lambda data: text_config(data, sdxl=sdxl), data, path)
    return None


def read_json(path: Path) -> Json:
    """A JSON object from a file. Raises SourceError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing: a model folder in the published layout has it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise SourceError(f"{path} holds {type(data).__name__}, not a JSON object")
    return data


def _parse(parse: Callable[[Json], T], data: Json, path: Path) -> T:
    try:
        return parse(data)
    except KeyError as error:
        raise SourceError(f"{path} lacks the field {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: {error}") from error


def _per_level(value: Any, count: int) -> list[Any]:
    """A config field that is one value for all levels or a list with one for each."""
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{value} has {len(values)} entries for {count} levels")
    return values


def _require(data: Json, **expected: Any) -> None:
    """Refuse values that would make another network than the one that is built."""
    for name, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if data.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} = {data[name]!r} is not supported (only {' or '.join(map(repr, allowed))})")


def unet_config(data: Json, *, pooled: int | None) -> UNetConfig:
    """UNet2DConditionModel's config.json; `attention_head_dim` is its number of heads. Raises ValueError, KeyError.

    `pooled` is the width of the pooled text embedding, for UNets that are conditioned on it: the rest of
    `projection_class_embeddings_input_dim` are the time ids.
    """
    _require(
        data, act_fn="silu", flip_sin_to_cos=True, freq_shift=0, center_input_sample=False, downsample_padding=1,
        class_embed_type=None, num_class_embeds=None, encoder_hid_dim=None, encoder_hid_dim_type=None,
        resnet_time_scale_shift="default", time_embedding_type="positional", time_embedding_dim=None,
        only_cross_attention=False, dual_cross_attention=False, conv_in_kernel=3, conv_out_kernel=3,
        addition_embed_type=(None, "text_time"), norm_eps=1e-5, mid_block_scale_factor=1, timestep_post_act=None,
        attention_type="default", mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    )  # fmt: skip
    widths = data["block_out_channels"]
    count = len(widths)
    heads = _per_level(data.get("num_attention_heads") or data.get("attention_head_dim", 8), count)
    layers = _per_level(data.get("layers_per_block", 2), count)
    depths = _per_level(data.get("transformer_layers_per_block", 1), count)
    up_depths = data.get("reverse_transformer_layers_per_block") or depths[::-1]
    down_types, up_types = data["down_block_types"], data["up_block_types"]
    for types, plain in ((down_types, "DownBlock2D"), (up_types, "UpBlock2D")):
        for name in types:
            if name not in (plain, "CrossAttn" + plain):
                raise ValueError(f"block type {name!r} is not supported (only {plain!r} and 'CrossAttn{plain}')")

    def per_layer(depth: Any, layer_count: int, block_type: str) -> tuple[Depth, ...]:
        if not block_type.startswith("CrossAttn"):
            return (None,) * layer_count
        return tuple(_per_level(depth, layer_count))

    levels = tuple(
        Level(
            width=widths[i],
            down=per_layer(depths[i], layers[i], down_types[i]),
            up=per_layer(up_depths[-1 - i], layers[i] + 1, up_types[-1 - i]),
            heads=heads[i],
        )
        for i in range(count)
    )
    added = None
    if data.get("addition_embed_type") == "text_time":
        id_width, total = data["addition_time_embed_dim"], data["projection_class_embeddings_input_dim"]
        if pooled is None or total <= pooled or (total - pooled) % id_width:
            raise ValueError(
                f"the added conditioning of width {total} does not fit a pooled embedding of width {pooled}"
            )
        added = TextTime(pooled, (total - pooled) // id_width, id_width)
    mid_type = data.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    last = depths[-1][-1] if isinstance(depths[-1], list) else depths[-1]
    mids: dict[str | None, tuple[Depth, ...]] = {
        "UNetMidBlock2DCrossAttn": (last, None),
        "UNetMidBlock2D": (None,),
        None: (),
    }
    return UNetConfig(
        levels=levels,
        mid=mids[mid_type],
        context=data["cross_attention_dim"],
        in_channels=data.get("in_channels", 4),
        out_channels=data.get("out_channels", 4),
        linear_projection=bool(data.get("use_linear_projection", False)),
        added=added,
        guidance=data.get("time_cond_proj_dim"),
        groups=data.get("norm_num_groups", 32),
    )


def controlnet_config(data: Json) -> ControlNetConfig:
    """ControlNetModel's config.json, or ControlNetUnionModel's. Raises ValueError, KeyError."""
    _require(data, controlnet_conditioning_channel_order="rgb")
    pooled = None
    if data.get("addition_embed_type") == "text_time":  # six time ids: there is no ControlNet for the refiner
        pooled = data["projection_class_embeddings_input_dim"] - 6 * data["addition_time_embed_dim"]
    count = len(data["block_out_channels"])
    unet = unet_config({**data, "up_block_types": ["UpBlock2D"] * count}, pooled=pooled)
    union = None
    if data.get("_class_name") == "ControlNetUnionModel":
        union = UnionConfig(
            data["num_control_type"], data["num_trans_layer"], data["num_trans_head"], data["addition_time_embed_dim"]
        )
    return ControlNetConfig(
        unet=replace(unet, levels=tuple(replace(level, up=()) for level in unet.levels)),
        hint_widths=tuple(data.get("conditioning_embedding_out_channels", (16, 32, 96, 256))),
        hint_channels=data.get("conditioning_channels", 3),
        union=union,
        pooled=bool(data.get("global_pool_conditions", False)),
    )


def t2i_adapter_config(data: Json) -> T2IAdapterConfig:
    """T2IAdapter's config.json. Raises ValueError, KeyError."""
    _require(data, adapter_type=("full_adapter", "full_adapter_xl", "light_adapter"))
    widths, kind = list(data["channels"]), data.get("adapter_type", "full_adapter")
    if kind == "light_adapter":
        widths.append(widths[-1])
    # the published forms halve at every stage but the first, SDXL's at the third alone
    down = [i == 2 if kind == "full_adapter_xl" else i > 0 for i in range(len(widths))]
    return T2IAdapterConfig(
        stages=tuple(AdapterStage(width, halves) for width, halves in zip(widths, down, strict=True)),
        layers=data.get("num_res_blocks", 2),
        unshuffle=data.get("downscale_factor", 8),
        image_channels=data.get("in_channels", 3),
        light=kind == "light_adapter",
    )


def vae_config(data: Json) -> VAEConfig:
    """AutoencoderKL's config.json; scaling_factor is 0.18215 where absent (SD1.x, SD2.x). Raises ValueError."""
    down, up = data.get("down_block_types", ()), data.get("up_block_types", ())
    if set(down) > {"DownEncoderBlock2D"} or set(up) > {"UpDecoderBlock2D"}:
        raise ValueError(f"block types {down} / {up} are not supported (only DownEncoderBlock2D / UpDecoderBlock2D)")
    _require(
        data, act_fn="silu", shift_factor=(None, 0), use_quant_conv=True,
        use_post_quant_conv=True, mid_block_add_attention=True,
    )  # fmt: skip
    return VAEConfig(
        widths=tuple(data["block_out_channels"]),
        layers=data.get("layers_per_block", 1),
        latent_channels=data.get("latent_channels", 4),
        image_channels=data.get("in_channels", 3),
        scaling=data.get("scaling_factor", 0.18215),
        mean=_per_channel(data, "latents_mean"),
        std=_per_channel(data, "latents_std"),
        groups=data.get("norm_num_groups", 32),
        force_upcast=bool(data.get("force_upcast", False)),
    )


def _per_channel(data: Json, name: str) -> tuple[float, ...] | None:
    """A field that is absent or has a number for each of the latents' channels. Raises ValueError."""
    values = data.get(name)
    if values is not None and len(values) != data.get("latent_channels", 4):
        raise ValueError(f"{name} has {len(values)} numbers for {data.get('latent_channels', 4)} latent channels")
    return None if values is None else tuple(float(value) for value in values)


def text_config(data: Json, *, sdxl: bool) -> TextEncoderConfig:
    """transformers' CLIPTextConfig. What the UNet gets of it is the family's rule: SDXL takes the penultimate layer
    without the final norm. The token ids in the file are meaningless in published models and not used.
    Raises ValueError, KeyError.
    """
    _require(data, layer_norm_eps=1e-5)
    if data["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act = {data['hidden_act']!r} is not supported (only {', '.join(ACTIVATIONS)})")
    projected = "CLIPTextModelWithProjection" in (data.get("architectures") or ())
    return TextEncoderConfig(
        width=data["hidden_size"],
        layers=data["num_hidden_layers"],
        heads=data["num_attention_heads"],
        mlp=data["intermediate_size"],
        activation=ACTIVATIONS[data["hidden_act"]],
        projection=data["projection_dim"] if projected else None,
        hidden=-2 if sdxl else -1,
        hidden_norm=not sdxl,
        vocabulary=data.get("vocab_size", 49408),
        length=data.get("max_position_embeddings", 77),
    )


STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def weight_files(names: Collection[str], component: str, *, half: bool) -> list[str] | None:
    """Which of a model's files (`names`, relative to its folder) hold a component's weights; None where none do.

    An index stands for its shards and is the only entry then. Plain files are preferred, or, for `half` precision,
    the fp16 variant; the other is taken where there is only that.
    """
    stem = STEMS.get(component, "model")
    plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    fp16 = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors.index.json"]
    for name in fp16 + plain if half else plain + fp16:
        if f"{component}/{name}" in names:
            return [f"{component}/{name}"]
    return None


def local_weights(path: Path, component: str, *, half: bool) -> list[Path]:
    """The safetensors files of one component of a model folder, shards resolved. Raises SourceError."""
    folder = path / component
    names = {f"{component}/{file.name}" for file in folder.glob("*")} if folder.is_dir() else set()
    chosen = weight_files(names, component, half=half)
    if chosen is None:
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        hint = (
            f"; {pickles[0]} is a pickle, which can run code when opened: convert it to safetensors where it came from"
            if pickles
            else ""
        )
        raise SourceError(
            f"{folder} holds no safetensors weights (expected {STEMS.get(component, 'model')}.safetensors){hint}"
        )
    first = path / chosen[0]
    return shards(first) if first.suffix == ".json" else [first]


def shards(index: Path) -> list[Path]:
    """The files that a safetensors index names, which must lie beside it and hold what it says. Raises SourceError."""
    weight_map = read_index(index)
    files = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    for name, path in files.items():
        if not path.is_file():
            raise SourceError(f"{index} names the shard {name}, which is missing: download it too, into {index.parent}")
    tensors = merge_headers({path: read_file(path) for path in files.values()})
    for key, name in weight_map.items():
        if key not in tensors or tensors[key][0] != files[name]:
            raise SourceError(f"{index} places {quote(key)} in {name}, which lacks it: download index and shards anew")
    return list(files.values())
