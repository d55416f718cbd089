"""InvokeAI's three generations: a command ("Dream"), "sd-metadata" of 2.x, and "invokeai_metadata" of 3 and later."""

from __future__ import annotations

import re
import shlex
from typing import Any

from nativesd.pictures.embedded import Texts
from nativesd.pictures.programs.recipe import Recipe, integer, json_object, lora_tag, objects, real

SCHEDULERS = {
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "deis": "DEISMultistepScheduler", "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler", "kdpm_2": "KDPM2DiscreteScheduler", "kdpm_2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler[sde-dpmsolver++]", "dpmpp_sde": "DPMSolverSDEScheduler",
    "unipc": "UniPCMultistepScheduler", "lcm": "LCMScheduler", "tcd": "TCDScheduler",
    "k_dpmpp_2": "DPMSolverMultistepScheduler",
}  # fmt: skip
"""diffusers' class of each; with "_k" behind its name it has Karras sigmas (invokeai/backend/.../schedulers.py)."""
WEIGHTS = re.compile(r"[\w)\"'][+-]{1,8}(?=[\s,.)]|$)|\)\d")
"""compel's weights, such as "noisy++" and "(a cat)1.2"."""


def read(texts: Texts) -> Recipe | None:
    """The recipe, of the newest form that the picture has; None: it is not InvokeAI's."""
    if data := json_object(texts.chunks.get("invokeai_metadata", "")):
        return _newest(data)
    if data := json_object(texts.chunks.get("sd-metadata", "")):
        return _second(data)
    command = texts.chunks.get("Dream") or texts.chunks.get("dream")
    return _first(command) if command else None


def _newest(data: dict[str, Any]) -> Recipe:
    recipe = Recipe("InvokeAI", str(data.get("positive_prompt") or ""), str(data.get("negative_prompt") or ""))
    simple = {"width": "width", "height": "height", "seed": "seed", "cfg_scale": "guidance_scale", "steps": "steps"}
    handled = {
        "generation_mode", "positive_prompt", "negative_prompt", "rand_device", "cfg_rescale_multiplier", "scheduler",
        "model", "loras", "clip_skip", "strength", "init_image", "app_version", "created_by", "vae", "_canvas_objects",
        "positive_style_prompt", "negative_style_prompt", "canvas_v2_metadata",
    }  # fmt: skip
    recipe.take(data, simple, harmless=sorted(handled))
    if data.get("cfg_rescale_multiplier"):
        recipe.options["guidance_rescale"] = real("cfg_rescale_multiplier", data["cfg_rescale_multiplier"])
    if data.get("clip_skip"):  # layers that are left out
        recipe.options["clip_skip"] = integer("clip_skip", data["clip_skip"]) + 1
    if data.get("rand_device"):
        recipe.options["noise"] = "cpu" if data["rand_device"] == "cpu" else "cuda"
    if data.get("init_image") or "img2img" in str(data.get("generation_mode")):
        recipe.need_picture(data.get("strength", 0.75), "diffusers")
    model = data.get("model") or {}
    if isinstance(model, dict) and (name := model.get("name") or model.get("model_name")):
        recipe.options["model"] = str(name)
    vae = data.get("vae")
    if isinstance(vae, dict) and (name := vae.get("name") or vae.get("model_name")):
        recipe.unheeded.append(f"vae {name}: pass it with --vae")
    for each in objects(data.get("loras")):
        model = each.get("model") or each.get("lora") or {}
        name = model.get("name") or model.get("model_name") if isinstance(model, dict) else model
        recipe.prompt += f" {lora_tag(name, each.get('weight', 1.0))}"
    for side in ("positive", "negative"):
        if data.get(f"{side}_style_prompt"):
            recipe.unheeded.append(f"{side}_style_prompt (taken: the prompt for both encoders)")
    _scheduler(recipe, str(data.get("scheduler") or ""))
    return _weighed(recipe)


def _second(data: dict[str, Any]) -> Recipe:
    image = data.get("image")
    image = image if isinstance(image, dict) else {}
    prompt = image.get("prompt")
    parts = objects(prompt)
    recipe = _bracketed(str(parts[0].get("prompt", "")) if parts else str(prompt or ""))
    if len(parts) > 1:
        recipe.unheeded.append(f"{len(parts)} blended prompts (taken: the first)")
    simple = {"width": "width", "height": "height", "seed": "seed", "cfg_scale": "guidance_scale", "steps": "steps"}
    recipe.take(
        image, simple, harmless=["prompt", "sampler", "type", "strength", "init_image_path", "postprocessing", "fit"]
    )
    if image.get("type") == "img2img":
        recipe.need_picture(image.get("strength", 0.75), "diffusers")
    for each in objects(image.get("postprocessing")):
        recipe.unheeded.append(f"{each.get('type', 'postprocessing')}")
    if name := data.get("model_weights"):
        recipe.options["model"] = str(name)
    _scheduler(recipe, str(image.get("sampler") or ""))
    return _weighed(recipe)


_FLAGS = {"-s": "steps", "-S": "seed", "-W": "width", "-H": "height", "-C": "guidance_scale"}
_OF_FLAGS = {"-G": "gfpgan", "-cf": "codeformer", "-U": "upscaling", "-v": "variations", "-V": "variations"}


def _first(command: str) -> Recipe:
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    flags = [i for i, word in enumerate(words) if re.fullmatch(r"-[A-Za-z]{1,2}", word)]
    recipe = _bracketed(" ".join(words[: flags[0] if flags else len(words)]))
    for i, following in zip(flags, [*flags[1:], len(words)], strict=True):
        flag, values = words[i], words[i + 1 : following]
        value = values[0] if values else ""
        if flag in _FLAGS:
            recipe.options[_FLAGS[flag]] = value
        elif flag == "-A":
            _scheduler(recipe, value)
        elif flag == "-f":
            recipe.need_picture(value, "diffusers")
        elif flag != "-I":
            recipe.unheeded.append(_OF_FLAGS.get(flag, flag))
    return _weighed(recipe)


def _bracketed(prompt: str) -> Recipe:
    """In these generations [brackets] are the negative prompt."""
    negative = ", ".join(re.findall(r"\[([^\[\]]*)\]", prompt))
    recipe = Recipe("InvokeAI", re.sub(r"\s*\[[^\[\]]*\]", "", prompt).strip(), negative)
    recipe.unheeded.append("noise, which was the card's (taken: the CPU's; --noise cuda is an NVIDIA card's)")
    return recipe


def _scheduler(recipe: Recipe, name: str) -> None:
    bare = name.removesuffix("_k") if name.endswith("_k") else name
    if bare:
        recipe.options["sampler"] = SCHEDULERS.get(bare, bare)
    if bare != name:
        recipe.options["schedule"] = "karras"


def _weighed(recipe: Recipe) -> Recipe:
    if WEIGHTS.search(recipe.prompt) or WEIGHTS.search(recipe.negative_prompt):
        recipe.unheeded.append("weights in compel's spelling, such as noisy++ (taken: as text)")
    return recipe
