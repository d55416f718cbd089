"""From a picture that carries its parameters to the options that make it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nativesd.diffusion.prompting import SDXL
from nativesd.diffusion.regions import Region
from nativesd.diffusion.tiles import Tiles
from nativesd.errors import UsageError
from nativesd.pictures.programs.find import read_recipe
from nativesd.pictures.programs.recipe import Recipe
from nativesd.pictures.soft import SoftInpaint
from nativesd.pipeline.asked.hires import UPSCALERS, Hires
from nativesd.pipeline.asked.records import MOST_PICTURES
from nativesd.pipeline.asked.worded import read_guidance, read_savings
from nativesd.sampling.names import find_sampler, find_schedule
from nativesd.sampling.options import Sampling
from nativesd.sampling.variation import Variation

_NUMBERS = {"steps": int, "seed": int, "width": int, "height": int, "guidance_scale": float, "clip_skip": int}
_HIRES = {"upscale": "scale"}


def options_from(picture: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The options that make a picture again, out of its own parameters, and what among these is not heeded.

    `picture` is one of A1111 and its forks, ComfyUI, InvokeAI, NovelAI, Fooocus, SwarmUI or nativesd, or a .txt file
    with A1111's text; a picture without any has the .txt file beside it. What is not heeded is named with what is taken
    instead. `model` among the options is a name, not a path; `strength` says that it was made from a picture, which has
    to be passed. Raises SourceError for a picture without parameters, UsageError for a value that cannot be.
    """
    return options_of(read_recipe(picture))


def options_of(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """What `options_from` gives, of a recipe that was read already. Raises UsageError for a value that cannot be."""
    options, unheeded = dict(recipe.options), list(recipe.unheeded)
    for name, kind in _NUMBERS.items():
        if name in options:
            options[name] = _read(kind, name, options[name])
    if isinstance(options.get("seed"), int) and not 0 <= options["seed"] < 1 << 64:
        unheeded.append(f"seed {options.pop('seed')} (taken: a random one)")
    for name, read in (("guidance", read_guidance), ("savings", read_savings)):
        if name in options:
            try:
                read(name, options[name])
            except UsageError as error:
                del options[name]
                unheeded.append(f"{error} (taken: none)")
    if (pictures := options.get("num_images", 1)) > MOST_PICTURES:
        del options["num_images"]
        unheeded.append(f"{pictures} pictures of a batch (taken: 1)")
    _name_unknown(options, unheeded, "")
    hires: Any = options.pop("hires", None)
    if hires is not None:
        if str(hires.get("upscaler", "latent")).lower() not in UPSCALERS:
            unheeded.append(f"Hires upscaler {hires.pop('upscaler')} (taken: latent)")
        _name_unknown(hires, unheeded, "Hires ")
        given: dict[str, Any] = {_HIRES.get(name, name): value for name, value in hires.items() if value}
        options["hires"] = Hires(**given)
    if "sdxl" in options:
        options["sdxl"] = SDXL(**options["sdxl"])
    if "tiles" in options:
        options["tiles"] = Tiles(*options["tiles"])
    if "regions" in options:
        options["regions"] = [Region(**{"prompt": "", **region}) for region in options["regions"]]
    if "soft_inpaint" in options:
        options["soft_inpaint"] = SoftInpaint(**options["soft_inpaint"])
    if "sampling" in options:
        options["sampling"] = Sampling(**options["sampling"])
    if "variation" in options:
        options["variation"] = Variation(**options["variation"])
    return {**options, "prompt": recipe.prompt, "negative_prompt": recipe.negative_prompt}, unheeded


def _read(kind: type[int] | type[float], name: str, value: object) -> int | float:
    try:
        return kind(str(value)) if kind is float else int(float(str(value))) if "." in str(value) else int(str(value))
    except (ValueError, OverflowError):
        raise UsageError(f"{name}: {value!r} is not a number") from None


def _name_unknown(options: dict[str, Any], unheeded: list[str], of: str) -> None:
    """Take out a sampler and a schedule that are not here, and name them."""
    if "schedule" in options:
        try:
            options["schedule"] = find_schedule(str(options["schedule"]))
        except UsageError:
            unheeded.append(f"{of}schedule {options.pop('schedule')} (taken: the model's own)")
    if "sampler" in options:
        try:
            find_sampler(str(options["sampler"]), options.get("schedule"))
        except UsageError:
            unheeded.append(f"{of}sampler {options.pop('sampler')} (taken: the model's own)")
