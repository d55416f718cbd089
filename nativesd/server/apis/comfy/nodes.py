"""The nodes: their inputs, ranges and outputs, as in ComfyUI's nodes.py (and cubiq/ComfyUI_IPAdapter_plus), and as
`/object_info` tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nativesd.sampling.table import SAMPLERS, SCHEDULES
from nativesd.server.apis.comfy import adapters
from nativesd.server.apis.comfy.enlarging import METHODS, PICTURE_METHODS
from nativesd.server.jobs.shelf import Catalogue
from nativesd.server.settings import Limits

BIG = (1 << 64) - 1
SCHEDULERS = tuple(schedule.name.replace(" ", "_") for schedule in SCHEDULES)


def sampler_names() -> tuple[str, ...]:
    """Samplers in ComfyUI's spelling."""
    spelt = [alias for sampler in SAMPLERS for alias in sampler.aliases if alias.islower() and " " not in alias]
    plain = ["euler", "euler_ancestral", "heun", "lms", "ddim", "ddpm", "lcm"]
    return tuple(dict.fromkeys([*plain, *spelt]))


@dataclass(frozen=True)
class Input:
    """An input: `kind` is INT, FLOAT, STRING, BOOLEAN, COMBO, or what links carry; `names` is what a COMBO offers."""

    kind: str
    default: Any = None
    low: float = 0
    high: float = 0
    names: str = ""
    """Of a COMBO: the list, of `choices`."""
    required: bool = True

    @property
    def linked(self) -> bool:
        """Whether it comes from another node always."""
        return self.kind not in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass(frozen=True)
class Node:
    """A class of nodes."""

    inputs: Mapping[str, Input]
    outputs: Sequence[str]
    words: str
    category: str
    ends: bool = False
    """Whether it is an output of a graph."""
    output_names: Sequence[str] = field(default_factory=tuple)


SIDE = Input("INT", 512, 16, 16384)
SAMPLING = {
    "model": Input("MODEL"), "steps": Input("INT", 20, 1, 10000), "cfg": Input("FLOAT", 8.0, 0, 100),
    "sampler_name": Input("COMBO", names="samplers"), "scheduler": Input("COMBO", names="schedulers"),
    "positive": Input("CONDITIONING"), "negative": Input("CONDITIONING"), "latent_image": Input("LATENT"),
}  # fmt: skip
ENABLED = Input("COMBO", "enable", names="switch")
SHARE = {"start_at": Input("FLOAT", 0.0, 0, 1), "end_at": Input("FLOAT", 1.0, 0, 1)}
SHOWN = {"model": Input("MODEL"), "ipadapter": Input("IPADAPTER"), "image": Input("IMAGE")}
MASK = Input("MASK", required=False)
NODES: Mapping[str, Node] = {
    "CheckpointLoaderSimple": Node(
        {"ckpt_name": Input("COMBO", names="models")}, ("MODEL", "CLIP", "VAE"), "A model by its name.", "loaders"
    ),
    "CLIPTextEncode": Node(
        {"text": Input("STRING", ""), "clip": Input("CLIP")}, ("CONDITIONING",), "A prompt.", "conditioning"
    ),
    "EmptyLatentImage": Node(
        {"width": SIDE, "height": SIDE, "batch_size": Input("INT", 1, 1, 4096)}, ("LATENT",),
        "The size of pictures to make. The pictures of a batch have one noise, as there.", "latent",
    ),
    "KSampler": Node(
        {**SAMPLING, "seed": Input("INT", 0, 0, BIG), "denoise": Input("FLOAT", 1.0, 0, 1)}, ("LATENT",),
        "Makes pictures.", "sampling",
    ),
    "KSamplerAdvanced": Node(
        {
            **SAMPLING, "add_noise": ENABLED, "noise_seed": Input("INT", 0, 0, BIG),
            "start_at_step": Input("INT", 0, 0, 10000), "end_at_step": Input("INT", 10000, 0, 10000),
            "return_with_leftover_noise": Input("COMBO", "disable", names="switch"),
        },
        ("LATENT",), "Makes pictures from a step on, to the last one, and with noise of its own.", "sampling",
    ),
    "VAEDecode": Node(
        {"samples": Input("LATENT"), "vae": Input("VAE")}, ("IMAGE",), "Pictures of latents.", "latent"
    ),
    "VAEEncode": Node(
        {"pixels": Input("IMAGE"), "vae": Input("VAE")}, ("LATENT",), "Latents of a picture.", "latent"
    ),
    "LoadImage": Node(
        {"image": Input("COMBO", names="uploads")}, ("IMAGE", "MASK"), "An uploaded picture.", "image"
    ),
    "LoadImageMask": Node(
        {"image": Input("COMBO", names="uploads"), "channel": Input("COMBO", "alpha", names="channels")}, ("MASK",),
        "A channel of an uploaded picture, or where it is transparent.", "mask",
    ),
    "SaveImage": Node(
        {"images": Input("IMAGE"), "filename_prefix": Input("STRING", "ComfyUI")}, (),
        "Pictures to be fetched, for an hour.", "image", ends=True,
    ),
    "PreviewImage": Node({"images": Input("IMAGE")}, (), "The same.", "image", ends=True),
    "LoraLoader": Node(
        {
            "model": Input("MODEL"), "clip": Input("CLIP"), "lora_name": Input("COMBO", names="loras"),
            "strength_model": Input("FLOAT", 1.0, -100, 100), "strength_clip": Input("FLOAT", 1.0, -100, 100),
        },
        ("MODEL", "CLIP"), "A LoRA.", "loaders",
    ),
    "ControlNetLoader": Node(
        {"control_net_name": Input("COMBO", names="controls")}, ("CONTROL_NET",), "A ControlNet.", "loaders"
    ),
    "ControlNetApplyAdvanced": Node(
        {
            "positive": Input("CONDITIONING"), "negative": Input("CONDITIONING"), "control_net": Input("CONTROL_NET"),
            "image": Input("IMAGE"), "strength": Input("FLOAT", 1.0, 0, 10), "vae": Input("VAE", required=False),
            "start_percent": Input("FLOAT", 0.0, 0, 1), "end_percent": Input("FLOAT", 1.0, 0, 1),
        },
        ("CONDITIONING", "CONDITIONING"), "Steering by a picture.", "conditioning",
        output_names=("positive", "negative"),
    ),
    "CLIPVisionLoader": Node(
        {"clip_name": Input("COMBO", names="image_encoders")}, ("CLIP_VISION",), "An image encoder.", "loaders"
    ),
    "IPAdapterModelLoader": Node(
        {"ipadapter_file": Input("COMBO", names="image_adapters")}, ("IPADAPTER",), "An IP-Adapter.",
        "ipadapter/loaders",
    ),
    "IPAdapterUnifiedLoader": Node(
        {
            "model": Input("MODEL"), "preset": Input("COMBO", names="presets"),
            "ipadapter": Input("IPADAPTER", required=False),
        },
        ("MODEL", "IPADAPTER"), "The IP-Adapter of a strength for the model's family.", "ipadapter",
        output_names=("model", "ipadapter"),
    ),
    "IPAdapter": Node(
        {
            **SHOWN, "weight": Input("FLOAT", 1.0, -1, 3), **SHARE,
            "weight_type": Input("COMBO", "standard", names="simple_weight_types"), "attn_mask": MASK,
        },
        ("MODEL",), "A picture as a prompt.", "ipadapter",
    ),
    "IPAdapterAdvanced": Node(
        {
            **SHOWN, "weight": Input("FLOAT", 1.0, -1, 5),
            "weight_type": Input("COMBO", "linear", names="weight_types"),
            "combine_embeds": Input("COMBO", "concat", names="combined"), **SHARE,
            "embeds_scaling": Input("COMBO", "V only", names="scaling"), "attn_mask": MASK,
            "image_negative": Input("IMAGE", required=False), "clip_vision": Input("CLIP_VISION", required=False),
        },
        ("MODEL",), "A picture as a prompt. What acts against it is not asked: image_negative is refused.", "ipadapter",
    ),
    "PrepImageForClipVision": Node(
        {
            "image": Input("IMAGE"), "interpolation": Input("COMBO", "LANCZOS", names="filters"),
            "crop_position": Input("COMBO", "center", names="clip_crops"), "sharpening": Input("FLOAT", 0.0, 0, 0),
        },
        ("IMAGE",), "A square of a picture, as image encoders see it.", "ipadapter/utils",
    ),
    "VAEEncodeForInpaint": Node(
        {
            "pixels": Input("IMAGE"), "vae": Input("VAE"), "mask": Input("MASK"),
            "grow_mask_by": Input("INT", 6, 0, 64),
        },
        ("LATENT",), "Latents of a picture with a hole, which is painted.", "latent/inpaint",
    ),
    "SetLatentNoiseMask": Node(
        {"samples": Input("LATENT"), "mask": Input("MASK")}, ("LATENT",),
        "A mask of what of a picture is painted anew.", "latent/inpaint",
    ),
    "InpaintModelConditioning": Node(
        {
            "positive": Input("CONDITIONING"), "negative": Input("CONDITIONING"), "vae": Input("VAE"),
            "pixels": Input("IMAGE"), "mask": Input("MASK"), "noise_mask": Input("BOOLEAN", True, required=False),
        },
        ("CONDITIONING", "CONDITIONING", "LATENT"), "A picture and its mask, for models that inpaint.", "conditioning",
        output_names=("positive", "negative", "latent"),
    ),
    "LoraLoaderModelOnly": Node(
        {
            "model": Input("MODEL"), "lora_name": Input("COMBO", names="loras"),
            "strength_model": Input("FLOAT", 1.0, -100, 100),
        },
        ("MODEL",), "A LoRA for the UNet alone.", "loaders",
    ),
    "CLIPSetLastLayer": Node(
        {"clip": Input("CLIP"), "stop_at_clip_layer": Input("INT", -1, -24, -1)}, ("CLIP",),
        "The layer whose states the prompt's are.", "conditioning",
    ),
    "UpscaleModelLoader": Node(
        {"model_name": Input("COMBO", names="upscalers")}, ("UPSCALE_MODEL",), "A model such as ESRGAN.", "loaders"
    ),
    "ImageUpscaleWithModel": Node(
        {"upscale_model": Input("UPSCALE_MODEL"), "image": Input("IMAGE")}, ("IMAGE",),
        "Pictures made larger by a model.", "image/upscaling",
    ),
    "ImageScale": Node(
        {
            "image": Input("IMAGE"), "upscale_method": Input("COMBO", names="picture_methods"),
            "width": Input("INT", 512, 0, 16384), "height": Input("INT", 512, 0, 16384),
            "crop": Input("COMBO", "disabled", names="crops"),
        },
        ("IMAGE",), "Pictures of a size.", "image/upscaling",
    ),
    "ImageScaleBy": Node(
        {
            "image": Input("IMAGE"), "upscale_method": Input("COMBO", names="picture_methods"),
            "scale_by": Input("FLOAT", 1.0, 0.01, 8),
        },
        ("IMAGE",), "Pictures so many times as large.", "image/upscaling",
    ),
    "LatentUpscaleBy": Node(
        {
            "samples": Input("LATENT"), "upscale_method": Input("COMBO", names="methods"),
            "scale_by": Input("FLOAT", 1.5, 0.01, 8),
        },
        ("LATENT",), "Latents so many times as large.", "latent",
    ),
    "LatentUpscale": Node(
        {
            "samples": Input("LATENT"), "upscale_method": Input("COMBO", names="methods"),
            "width": Input("INT", 512, 0, 16384), "height": Input("INT", 512, 0, 16384),
            "crop": Input("COMBO", "disabled", names="crops"),
        },
        ("LATENT",), "Larger latents.", "latent",
    ),
}  # fmt: skip


def choices(catalogue: Catalogue, uploads: Sequence[str]) -> dict[str, list[str]]:
    """What COMBOs offer."""
    return {
        "models": list(catalogue.models), "loras": list(catalogue.loras), "controls": list(catalogue.controls),
        "uploads": list(uploads), "samplers": list(sampler_names()), "schedulers": list(SCHEDULERS),
        "methods": list(METHODS), "picture_methods": list(PICTURE_METHODS), "upscalers": list(catalogue.upscalers),
        "crops": ["disabled", "center"], "switch": ["enable", "disable"],
        "image_adapters": list(catalogue.image_adapters), "image_encoders": list(catalogue.image_encoders),
        "presets": list(adapters.PRESETS), "weight_types": list(adapters.ADVANCED),
        "simple_weight_types": list(adapters.SIMPLE), "combined": list(adapters.COMBINED),
        "scaling": list(adapters.SCALING), "filters": list(adapters.FILTERS), "clip_crops": list(adapters.CROPS),
        "channels": list(adapters.CHANNELS),
    }  # fmt: skip


def bounded(name: str, each: Input, limits: Limits) -> Input:
    """An input within this server's bounds."""
    most = {"steps": limits.steps, "width": limits.side, "height": limits.side, "batch_size": limits.batch}.get(name)
    return each if most is None else Input(each.kind, each.default, each.low, min(each.high, most))


def object_info(names: Sequence[str], lists: Mapping[str, list[str]], limits: Limits) -> dict[str, Any]:
    """The nodes as ComfyUI's server.py tells them (node_info)."""
    return {name: _info(name, NODES[name], lists, limits) for name in names}


def _info(name: str, node: Node, lists: Mapping[str, list[str]], limits: Limits) -> dict[str, Any]:
    told: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for key, given in node.inputs.items():
        each = bounded(key, given, limits)
        extra = {} if each.default is None else {"default": each.default}
        if each.kind in ("INT", "FLOAT"):
            extra |= {"min": each.low, "max": each.high}
        told[each.required][key] = [lists[each.names] if each.kind == "COMBO" else each.kind, extra]
    return {
        "input": {"required": told[True], "optional": told[False]},
        "input_order": {"required": list(told[True]), "optional": list(told[False])},
        "output": list(node.outputs), "output_is_list": [False] * len(node.outputs),
        "output_name": list(node.output_names or node.outputs), "name": name, "display_name": name,
        "description": node.words, "python_module": "nodes", "category": node.category, "output_node": node.ends,
    }  # fmt: skip
