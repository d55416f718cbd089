"""SwarmUI: JSON with "sui_image_params" in "parameters" or the EXIF comment."""

from __future__ import annotations

from nativesd.pictures.embedded import Texts
from nativesd.pictures.programs.recipe import Recipe, integer, json_object, lora_tag

SIMPLE = {
    "seed": "seed", "steps": "steps", "cfgscale": "guidance_scale", "width": "width", "height": "height",
    "sampler": "sampler", "scheduler": "schedule", "model": "model",
}  # fmt: skip
HARMLESS = (
    "prompt", "negativeprompt", "aspectratio", "sidelength", "swarm_version", "date", "generation_time", "images",
    "personalnote", "initimagecreativity", "initimage", "loras", "loraweights", "clipstopatlayer", "vae",
    "automaticvae", "donotsave", "batchsize",
)  # fmt: skip


def read(texts: Texts) -> Recipe | None:
    """The recipe; None: the picture is not SwarmUI's."""
    data = json_object(texts.parameters)
    params = None if data is None else data.get("sui_image_params")
    if not isinstance(params, dict):
        return None
    recipe = Recipe("SwarmUI", str(params.get("prompt") or ""), str(params.get("negativeprompt") or ""))
    recipe.options |= {
        "sampler": "euler",
        "schedule": "normal",
        "noise": "comfyui",
        "emphasis": "comfyui",
    }  # its defaults, which it does not write
    recipe.take(params, SIMPLE, harmless=HARMLESS)
    if params.get("clipstopatlayer"):
        recipe.options["clip_skip"] = -integer("clipstopatlayer", params["clipstopatlayer"])
    if params.get("initimage") or params.get("initimagecreativity") is not None:
        recipe.need_picture(params.get("initimagecreativity", 0.6), "all")
    if params.get("vae") not in (None, "", "None", "Automatic"):
        recipe.unheeded.append(f"vae {params['vae']}: pass it with --vae")
    loras, scales = (
        value.split(",") if isinstance(value, str) else list(value or [])
        for value in (params.get("loras"), params.get("loraweights"))
    )
    for i, name in enumerate(loras):
        recipe.prompt += f" {lora_tag(name, scales[i] if i < len(scales) else 1.0)}"
    return recipe
