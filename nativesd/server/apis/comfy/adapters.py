"""IP-Adapters as the nodes of cubiq/ComfyUI_IPAdapter_plus have them: their words, and what these are in the library's.

Names, presets and weight types are those of its IPAdapterPlus.py and utils.py (get_ipadapter_file).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from PIL import Image, ImageOps

from nativesd.diffusion.images.layers import PUBLISHED, WeightType
from nativesd.diffusion.images.prompts import ImagePrompt
from nativesd.errors import UsageError

if TYPE_CHECKING:
    from nativesd.pipeline.pipeline import Pipeline

Meaning = tuple[WeightType, str | None]
"""A weight type, and the layers at which the prompt acts."""
SIMPLE: Mapping[str, Meaning] = {
    "standard": ("linear", None), "prompt is more important": ("ease out", None), "style transfer": ("linear", "style"),
}  # fmt: skip
"""Weight types of the node IPAdapter."""
BOTH = "style and composition"
ADVANCED = PUBLISHED
"""Those of IPAdapterAdvanced."""
COMBINED = ("concat", "add", "subtract", "average", "norm average")
SCALING = ("V only",)
CROPS = ("top", "bottom", "left", "right", "center", "pad")
FILTERS = ("LANCZOS", "BICUBIC", "HAMMING", "BILINEAR", "BOX", "NEAREST")
CHANNELS = ("alpha", "red", "green", "blue")
SIDE = 224
"""Pixels of the pictures that PrepImageForClipVision makes."""
PRESETS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "LIGHT - SD1.5 only (low strength)": (("ip-adapter_sd15_light_v11", "ip-adapter_sd15_light"), ()),
    "STANDARD (medium strength)": (("ip-adapter_sd15",), ("ip-adapter_sdxl_vit-h",)),
    "VIT-G (medium strength)": (("ip-adapter_sd15_vit-G",), ("ip-adapter_sdxl",)),
    "PLUS (high strength)": (("ip-adapter-plus_sd15",), ("ip-adapter-plus_sdxl_vit-h",)),
    "PLUS FACE (portraits)": (("ip-adapter-plus-face_sd15",), ("ip-adapter-plus-face_sdxl_vit-h",)),
    "FULL FACE - SD1.5 only (portraits stronger)": (("ip-adapter-full-face_sd15",), ()),
}
"""The published adapters, for SD1.x and for SDXL, that each stands for."""


def preset_name(preset: str, names: Sequence[str], *, sdxl: bool) -> str:
    """The name, among those that there are, of a preset's adapter. Raises UsageError where there is none."""
    wanted = PRESETS[preset][sdxl]
    if not wanted:
        raise UsageError(f"preset {preset!r} has no adapter for SDXL")
    there = {_plain(name): name for name in names}
    found = next((there[plain] for each in wanted if (plain := _plain(each)) in there), None)
    if found is None:
        raise UsageError(
            f"preset {preset!r} stands for {' or '.join(wanted)}, which is not here: there is "
            f"{', '.join(names) or 'no IP-Adapter'}"
        )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def image_prompt(
    adapter: str,
    pictures: Sequence[Image.Image],
    weight: float,
    start: float,
    end: float,
    meaning: Meaning,
    mask: Image.Image | None,
) -> ImagePrompt:
    """An image prompt of a node's inputs. Raises UsageError for what has no such form here."""
    if start > end:
        raise UsageError("start_at must be at most end_at")
    weight_type, layers = meaning
    if layers == ADVANCED[BOTH][1] and weight != 1:  # there weight_composition, which is 1, weighs the layout
        raise UsageError(f"weight must be 1 with the weight type {BOTH!r}")
    return ImagePrompt(
        adapter, pictures[0] if len(pictures) == 1 else list(pictures), weight, start, end, layers, mask, weight_type
    )


def square(picture: Image.Image, crop: str, interpolation: str) -> Image.Image:
    """What PrepImageForClipVision makes of a picture: a square of it, or with "pad" all of it and black, scaled."""
    width, height = picture.size
    side = max(picture.size) if crop == "pad" else min(picture.size)
    left = {"left": 0, "right": width - side}.get(crop, (width - side) // 2)
    top = {"top": 0, "bottom": height - side}.get(crop, (height - side) // 2)
    box = (left, top, left + side, top + side)
    return picture.convert("RGB").crop(box).resize((SIDE, SIDE), Image.Resampling[interpolation])


def channel(picture: Image.Image, name: str) -> Image.Image:
    """A mask "L": a channel of a picture, or white where that is transparent."""
    if name == "alpha":
        return ImageOps.invert(picture.convert("RGBA").getchannel("A"))
    return picture.convert("RGB").getchannel(name[0].upper())


def options_of(pipeline: Pipeline, prompts: Sequence[tuple[ImagePrompt, str | None]]) -> dict[str, Any]:
    """The options of a call for image prompts, with the encoder that was named for each; several are asked before."""
    encoders = {encoder for _, encoder in prompts if encoder is not None}
    asked = [prompt for prompt, _ in prompts]
    if len(encoders) > 1:
        for number, (prompt, encoder) in enumerate(prompts):
            if encoder is not None:
                told = pipeline.encode_image(cast("Any", prompt.picture), encoder, crop=prompt.crop)
                asked[number] = replace(prompt, picture=told)
        return {"image_prompts": asked}
    return {"image_prompts": asked, **({"image_encoder": encoders.pop()} if encoders else {})} if asked else {}
