"""From the options of `nativesd generate` to those of the library, whose records several of them make up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from nativesd.pipeline.asked.readers import lora_use

if TYPE_CHECKING:
    from nativesd.diffusion.control import Control
    from nativesd.diffusion.images.prompts import ImagePrompt
    from nativesd.diffusion.regions import Region


RECORDS: Mapping[str, Mapping[str, str]] = {
    "sdxl": {"prompt_2": "prompt_2", "negative_prompt_2": "negative_prompt_2", "original_size": "original",
             "crop_top_left": "crop", "target_size": "target"},
    "sampling": {"churn": "churn", "churn_min": "churn_min", "churn_max": "churn_max", "noise_scale": "noise",
                 "sigma_min": "sigma_min", "sigma_max": "sigma_max", "rho": "rho"},
    "variation": {"variation_seed": "seed", "variation_strength": "strength", "seed_resize": "resize_from",
                  "ensd": "ensd"},
}  # fmt: skip
"""The library's records, and the options that are their fields."""


def for_python(options: dict[str, Any], repeated: Mapping[str, Any]) -> dict[str, Any]:
    """What was given on the command line, as the library takes it.

    `repeated` are the options of a picture to make again: what its records say and nothing on the command line does
    stays as it was.
    """
    if "loras" in options:
        options["loras"] = [lora_use(text) for text in options["loras"]]
    if "regions" in options:
        options["regions"] = [_region(where, prompt) for where, prompt in options["regions"]]
    if control := _controls(options):
        options["control"] = control
    if prompts := image_prompts(options):
        options["image_prompts"] = prompts
    for name, fields in RECORDS.items():
        if told := {field: options.pop(flag) for flag, field in fields.items() if flag in options}:
            options[name] = _record(name, repeated.get(name), told)
    passes = {name.removeprefix("hires_"): options.pop(name) for name in list(options) if name.startswith("hires_")}
    if "hires" in options:
        passes |= {"scale": options.pop("hires"), "width": None, "height": None}
    if passes:
        options["hires"] = _record("hires", repeated.get("hires"), passes)
    if "tiles" in options and "tiles" in repeated:
        size = options["tiles"]
        told = {"size": size, "overlap": min(repeated["tiles"].overlap, size // 2)}
        options["tiles"] = replace(repeated["tiles"], **told)
    return options


def said_by(repeated: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the library, with the fields of their records under the names they have on the command line."""
    said = dict(repeated)
    for name, fields in RECORDS.items():
        if name in repeated:
            said |= {flag: value for flag, field in fields.items() if (value := getattr(repeated[name], field))}
    return said


def _record(name: str, repeated: Any, told: dict[str, Any]) -> Any:
    """One of the library's records, of what was told and else of the one that is repeated."""
    from nativesd.diffusion.prompting import SDXL
    from nativesd.pipeline.asked.hires import Hires
    from nativesd.sampling.options import Sampling
    from nativesd.sampling.variation import Variation

    kinds = {"sdxl": SDXL, "sampling": Sampling, "variation": Variation, "hires": Hires}
    return replace(kinds[name]() if repeated is None else repeated, **told)


def _region(where: str, prompt: str) -> Region:
    """A region of what was given for it: four shares, else a file."""
    from nativesd.diffusion.regions import Region

    try:
        left, top, right, bottom = map(float, where.split(","))
    except ValueError:
        return Region(prompt, mask=where)
    return Region(prompt, (left, top, right, bottom))


def _controls(options: dict[str, Any]) -> list[Control]:
    """The --control options, taken out of `options`; those that go with them are matched by their order."""
    from nativesd.diffusion.control import Control

    controls = options.pop("control", ())
    chosen = _by_order(options, "control", len(controls), ("scale", "start", "end", "preprocess", "kind"))
    return [Control(model, image, **each) for (model, image), each in zip(controls, chosen, strict=True)]


def image_prompts(options: dict[str, Any]) -> list[ImagePrompt]:
    """The --image-prompt options, in the same way."""
    from nativesd.diffusion.images.prompts import ImagePrompt

    prompts = options.pop("image_prompts", ())
    settings = ("scale", "start", "end", "layers", "weight_type", "mask", "crop")
    chosen = _by_order(options, "image-prompt", len(prompts), settings)
    return [ImagePrompt(adapter, picture, **each) for (adapter, picture), each in zip(prompts, chosen, strict=True)]


def _by_order(options: dict[str, Any], of: str, count: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """The settings --OF-NAME that go with a repeated option --OF, taken out of `options`, for each of its `count`."""
    settings: dict[str, tuple[Any, ...]] = {name: options.pop(f"{of}_{name}".replace("-", "_"), ()) for name in names}
    for name, values in settings.items():
        if len(values) > count:
            raise click.UsageError(f"{len(values)} --{of}-{name.replace('_', '-')} for {count} --{of}")
    return [
        {name: values[i] for name, values in settings.items() if i < len(values) and values[i] != "none"}
        for i in range(count)
    ]
