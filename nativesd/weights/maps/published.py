"""A model's configuration in the words of the published folders: every config.json, and the family's own defaults.

`folder` reads what this writes. The defaults are those of the repositories named in `nativesd.config`; nothing is
fetched, so a single file loads wherever its folder once was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nativesd.config import (
    ControlNetConfig,
    Depth,
    Prediction,
    T2IAdapterConfig,
    TextEncoderConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    VisionEncoderConfig,
)
from nativesd.errors import UsageError

DIFFUSERS_VERSION = "0.38.0"  # the oldest that the tests open these folders with


def unet_json(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    """UNet2DConditionModel's config.json. Raises UsageError where diffusers cannot express the UNet."""
    levels = config.levels
    if any(len(level.up) != len(level.down) + 1 for level in levels):
        raise UsageError("diffusers has one layer more going up than going down")
    data = _encoder(config) | {
        "_class_name": "UNet2DConditionModel",
        "up_block_types": [_block(level.up, "Up") for level in reversed(levels)],
        "out_channels": config.out_channels,
        "sample_size": sample_size,
    }
    if config.guidance is not None:
        data["time_cond_proj_dim"] = config.guidance
    up = [[1 if depth is None else depth for depth in level.up] for level in reversed(levels)]
    depths = data["transformer_layers_per_block"]
    if [_one(stage) for stage in up] != (depths[::-1] if isinstance(depths, list) else [depths] * len(levels)):
        data["reverse_transformer_layers_per_block"] = up
    return data


def _encoder(config: UNetConfig) -> dict[str, Any]:
    """What the configs of UNets and ControlNets have in common. Raises UsageError."""
    down: list[list[Depth]] = [list(level.down) for level in config.levels]
    match config.mid:
        case ():
            mid = None
        case (None,):
            mid = "UNetMidBlock2D"
        case (int(depth), None):
            mid = "UNetMidBlock2DCrossAttn"
            if down[-1][0] is None:  # the middle takes its depth from the last level's entry, used there or not
                down[-1] = [depth] * len(down[-1])
            elif down[-1][0] != depth:
                raise UsageError("diffusers ties the middle's depth to that of the last level")
        case _:
            raise UsageError(f"diffusers has no middle block of depths {config.mid}")
    added = config.added
    data: dict[str, Any] = {
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": [level.heads for level in config.levels],  # a misnomer: it is the number of heads
        "block_out_channels": [level.width for level in config.levels],
        "cross_attention_dim": config.context,
        "down_block_types": [_block(level.down, "Down") for level in config.levels],
        "mid_block_type": mid,
        "in_channels": config.in_channels,
        "layers_per_block": _one([len(level.down) for level in config.levels]),
        "transformer_layers_per_block": _one([_one([1 if d is None else d for d in stage]) for stage in down]),
        "norm_num_groups": config.groups,
        "use_linear_projection": config.linear_projection,
    }
    if added is not None:
        data["addition_embed_type"] = "text_time"
        data["addition_time_embed_dim"] = added.id_width
        data["projection_class_embeddings_input_dim"] = added.width
    return data


def controlnet_json(config: ControlNetConfig) -> dict[str, Any]:
    """ControlNetModel's config.json, or ControlNetUnionModel's. Raises UsageError where diffusers cannot express it."""
    data = _encoder(config.unet) | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": list(config.hint_widths),
    }
    if not isinstance(data["layers_per_block"], int):
        raise UsageError("diffusers has the same number of layers on every level of a ControlNet")
    if config.union is not None:
        width = config.unet.levels[0].width
        data |= {
            "_class_name": "ControlNetUnionModel",
            "num_control_type": config.union.kinds,
            "num_trans_channel": width,
            "num_trans_head": config.union.heads,
            "num_trans_layer": config.union.layers,
            "num_proj_channel": width,
        }
        del data["mid_block_type"]  # ControlNetUnionModel has no other and no such argument
    return data


def tiny_vae_json(config: TinyVAEConfig) -> dict[str, Any]:
    """AutoencoderTiny's config.json. Raises UsageError for one half alone, which diffusers has no class for."""
    if config.half is not None:
        raise UsageError(f"diffusers has no class for TAESD's {config.half} alone")
    return {
        "_class_name": "AutoencoderTiny",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "encoder_block_out_channels": [config.width] * len(config.encoder),
        "decoder_block_out_channels": [config.width] * len(config.decoder),
        "num_encoder_blocks": list(config.encoder),
        "num_decoder_blocks": list(config.decoder),
        "latent_channels": config.latent_channels,
        "scaling_factor": 1.0,
    }


def t2i_adapter_json(config: T2IAdapterConfig) -> dict[str, Any]:
    """T2IAdapter's config.json."""
    widths = [stage.width for stage in config.stages]
    kind = "light_adapter" if config.light else "full_adapter_xl" if config.unshuffle == 16 else "full_adapter"
    return {
        "_class_name": "T2IAdapter",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": config.image_channels,
        "channels": widths[:-1] if config.light else widths,  # the light one repeats its last width by itself
        "num_res_blocks": config.layers,
        "downscale_factor": config.unshuffle,
        "adapter_type": kind,
    }


def _one(values: Sequence[Any]) -> Any:
    """The value that all share, or the list of them."""
    return values[0] if all(value == values[0] for value in values) else list(values)


def _block(depths: Sequence[Depth], direction: str) -> str:
    if all(depth is None for depth in depths):
        return f"{direction}Block2D"
    if any(depth is None for depth in depths):
        raise UsageError(f"diffusers has attention behind every layer of a block or behind none, not {depths}")
    return f"CrossAttn{direction}Block2D"


def vae_json(config: VAEConfig, sample_size: int) -> dict[str, Any]:
    """AutoencoderKL's config.json."""
    levels = len(config.widths)
    spread = (
        {}
        if config.mean is None or config.std is None
        else {"latents_mean": list(config.mean), "latents_std": list(config.std)}
    )
    return spread | {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "norm_num_groups": config.groups,
        "sample_size": sample_size,
        "scaling_factor": config.scaling,
        "force_upcast": config.force_upcast,
    }


ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Ours to transformers' names."""


def text_json(config: TextEncoderConfig) -> dict[str, Any]:
    """CLIPTextModel's (or ...WithProjection's) config.json. The token ids in it are the published, meaningless ones."""
    data = {
        "architectures": ["CLIPTextModel" if config.projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "hidden_act": ACTIVATIONS[config.activation],
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.length,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return data if config.projection is None else data | {"projection_dim": config.projection}


def vision_json(config: VisionEncoderConfig) -> dict[str, Any]:
    """CLIPVisionModel's (or ...WithProjection's) config.json."""
    data = {
        "architectures": ["CLIPVisionModel" if config.projection is None else "CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": ACTIVATIONS[config.activation],
        "hidden_size": config.width,
        "image_size": config.image,
        "intermediate_size": config.mlp,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": config.heads,
        "num_channels": config.image_channels,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch,
    }
    return data if config.projection is None else data | {"projection_dim": config.projection}


SCHEDULERS = {"sd1": "PNDMScheduler", "sd2": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}
"""What the families were published with; the refiner as SDXL."""


def edm_json(prediction: Prediction, smallest: float, largest: float) -> dict[str, Any]:
    """scheduler_config.json of a model of continuous sigmas: CosXL's where it predicts v, else Playground 2.5's.

    CosXL has data of deviation 1 (EDMEulerScheduler in diffusers' documentation of CosXL), Playground 0.5
    (playgroundai/playground-v2.5-1024px-aesthetic scheduler/scheduler_config.json).
    """
    v = prediction == "v"
    return {
        "_class_name": "EDMEulerScheduler" if v else "EDMDPMSolverMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v else "epsilon",
        "rho": 7.0,
        "sigma_data": 1.0 if v else 0.5,
        "sigma_max": largest,
        "sigma_min": smallest,
        "sigma_schedule": "exponential" if v else "karras",
    }


def scheduler_json(
    family: str, prediction: Prediction, *, turbo: bool = False, zero_snr: bool = False
) -> dict[str, Any]:
    """scheduler_config.json of a family; `turbo`: few steps, trailing; `zero_snr`: betas rescaled (Lin et al. 2024)."""
    name = "EulerAncestralDiscreteScheduler" if turbo else SCHEDULERS.get(family, "EulerDiscreteScheduler")
    data = {
        "_class_name": name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if prediction == "v" else prediction,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    if turbo or zero_snr:
        data["timestep_spacing"] = "trailing"
    elif family in ("sdxl", "refiner"):
        data["timestep_spacing"] = "leading"
    if zero_snr:
        data["rescale_betas_zero_snr"] = True
    return data


def picture_size(family: str, prediction: Prediction, config: UNetConfig) -> int:
    """Side, in latent cells, of the pictures a family was trained on: 64; 96 for SD2.1-768; 128 for SDXL."""
    if config.added is not None:
        return 128
    return 96 if family == "sd2" and prediction == "v" else 64


def model_index(family: str, encoders: Mapping[str, TextEncoderConfig], scheduler: str) -> dict[str, Any]:
    """model_index.json of a text-to-image pipeline."""
    sdxl = family in ("sdxl", "refiner")
    kind = {"sdxl": "StableDiffusionXLPipeline", "refiner": "StableDiffusionXLImg2ImgPipeline"}
    data: dict[str, Any] = {
        "_class_name": kind.get(family, "StableDiffusionPipeline"),
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for name in ("text_encoder", "text_encoder_2") if sdxl else ("text_encoder",):
        config = encoders.get(name)
        suffix = "" if config is None or config.projection is None else "WithProjection"
        data[name] = [None, None] if config is None else ["transformers", f"CLIPTextModel{suffix}"]
        tokenizer = name.replace("text_encoder", "tokenizer")
        data[tokenizer] = [None, None] if config is None else ["transformers", "CLIPTokenizer"]
    if sdxl:
        data["force_zeros_for_empty_prompt"] = family == "sdxl"
    else:
        data |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    if family == "refiner":
        data["requires_aesthetics_score"] = True
    return data
