"""NovelAI: the prompt in the chunk "Description", the rest in "Comment" as JSON."""

from __future__ import annotations

from nativesd.pictures.embedded import Texts
from nativesd.pictures.programs.recipe import Recipe, json_object


def read(texts: Texts) -> Recipe | None:
    """The recipe; None: the picture is not NovelAI's."""
    data = json_object(texts.chunks.get("Comment", ""))
    if texts.chunks.get("Software") != "NovelAI" or data is None:
        return None
    prompt = data.get("prompt") or texts.chunks.get("Description", "")
    recipe = Recipe("NovelAI", str(prompt), str(data.get("uc") or ""))
    simple = {
        "steps": "steps", "sampler": "sampler", "seed": "seed", "scale": "guidance_scale", "width": "width",
        "height": "height", "cfg_rescale": "guidance_rescale", "noise_schedule": "schedule",
    }  # fmt: skip
    harmless = ["prompt", "uc", "strength", "noise", "request_type", "signed_hash", "n_samples", "version"]
    recipe.take(data, simple, harmless=harmless)
    if recipe.options.get("schedule") == "native":
        del recipe.options["schedule"]
    if "width" not in recipe.options and texts.size is not None and min(texts.size) >= 64:
        recipe.options |= {"width": texts.size[0] // 8 * 8, "height": texts.size[1] // 8 * 8}
    if "Img2Img" in str(data.get("request_type")) or "Infill" in str(data.get("request_type")):
        recipe.need_picture(data.get("strength", 0.7), "a1111")
    elif data.get("strength") is not None:
        recipe.unheeded.append("strength, which stands there with and without a picture (taken: made from the prompt)")
    if any(bracket in recipe.prompt + recipe.negative_prompt for bracket in "{}"):
        recipe.unheeded.append("weights in NovelAI's spelling, such as {word} (taken: as text)")
    recipe.options["model"] = f"NovelAI's {texts.chunks.get('Source', 'own')}"
    return recipe
