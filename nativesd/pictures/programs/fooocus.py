"""Fooocus: JSON in "parameters" or the EXIF comment, with the chunk "fooocus_scheme" or "metadata_scheme"."""

from __future__ import annotations

import re
from typing import Any

from nativesd.errors import UsageError
from nativesd.pictures.embedded import Texts
from nativesd.pictures.programs.recipe import Recipe, integer, json_object, lora_tag

SIMPLE = {
    "guidance_scale": "guidance_scale", "steps": "steps", "sampler": "sampler", "scheduler": "schedule",
    "clip_skip": "clip_skip",
}  # fmt: skip
HANDLED = (
    "prompt", "negative_prompt", "full_prompt", "full_negative_prompt", "resolution", "seed", "base_model", "loras",
    "refiner_model", "refiner_switch", "vae", "base_model_hash", "metadata_scheme", "performance", "prompt_expansion",
    "styles", "version", "created_by", "adm_guidance", "freeu",
)  # fmt: skip


def read(texts: Texts) -> Recipe | None:
    """The recipe; None: the picture is not Fooocus's."""
    data = json_object(texts.parameters)
    if data is None or not ("fooocus_scheme" in texts.chunks or str(data.get("version")).startswith("Fooocus")):
        return None
    recipe = Recipe("Fooocus", _joined(data, "prompt"), _joined(data, "negative_prompt"))
    recipe.take(data, SIMPLE, harmless=[*HANDLED, *(name for name in data if name.startswith("lora_combined"))])
    recipe.options |= {"seed": integer("seed", data.get("seed", 0)), "noise": "cpu"}
    sides = re.findall(r"\d+", str(data.get("resolution", "")))
    if len(sides) == 2:
        recipe.options |= {"width": int(sides[0]), "height": int(sides[1])}
    if data.get("base_model"):
        recipe.options["model"] = str(data["base_model"])
    if data.get("refiner_model") not in (None, "None", ""):
        recipe.options["refiner_at"] = float(data.get("refiner_switch", 0.5))
        recipe.unheeded.append(f"refiner {data['refiner_model']}: pass it with --refiner")
    if data.get("vae") not in (None, "", "Default (model)"):
        recipe.unheeded.append(f"vae {data['vae']}: pass it with --vae")
    if data.get("adm_guidance"):
        recipe.unheeded.append(f"adm_guidance {data['adm_guidance']} (taken: SDXL's own sizes)")
    for name, scale in _loras(data):
        recipe.prompt += f" {lora_tag(name, scale)}"
    return recipe


def _joined(data: dict[str, Any], side: str) -> str:
    """What was encoded: Fooocus encodes every style's text on its own and joins them, which is BREAK."""
    full = data.get(f"full_{side}")
    if isinstance(full, list) and full:
        return " BREAK ".join(str(each) for each in full if each)
    return str(full or data.get(side) or "")


def _loras(data: dict[str, Any]) -> list[tuple[str, float]]:
    given = data.get("loras")
    listed = [each for each in given if isinstance(each, list) and len(each) > 1] if isinstance(given, list) else []
    found = [(str(each[0]), _scale(each[1])) for each in listed]
    for name, value in data.items():
        if name.startswith("lora_combined"):
            lora, _, scale = str(value).rpartition(" : ")
            found.append((lora, _scale(scale)))
    return found


def _scale(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise UsageError(f"loras: {value!r} is not a number") from None
