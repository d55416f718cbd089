"""From the options of `nativesd generate` to those of the library, whose records several of them make up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nativesd.cli.common import lora_use

if TYPE_CHECKING:
    from nativesd.diffusion.control import Control
    from nativesd.diffusion.images.prompts import ImagePrompt
    from nativesd.diffusion.regions import Region


def for_python(options: dict[str, Any]) -> dict[str, Any]:
    """What was given on the command line, as the library takes it."""
    if "loras" in options:
        options["loras"] = [lora_use(text) for text in options["loras"]]
    if "regions" in options:
        options["regions"] = [_region(where, prompt) for where, prompt in options["regions"]]
    if control := _controls(options):
        options["control"] = control
    if prompts := _image_prompts(options):
        options["image_prompts"] = prompts
    told = {
        "prompt_2": "prompt_2", "negative_prompt_2": "negative_prompt_2", "original_size": "original",
        "crop_top_left": "crop", "target_size": "target",
    }  # fmt: skip
    if sdxl := {field: options.pop(name) for name, field in told.items() if name in options}:
        from nativesd.diffusion.prompting import SDXL

        options["sdxl"] = SDXL(**sdxl)
    told = {"churn": "churn", "churn_min": "churn_min", "churn_max": "churn_max", "noise_scale": "noise",
            "sigma_min": "sigma_min", "sigma_max": "sigma_max", "rho": "rho"}  # fmt: skip
    if sampling := {field: options.pop(name) for name, field in told.items() if name in options}:
        from nativesd.sampling.options import Sampling

        options["sampling"] = Sampling(**sampling)
    names = {"variation_seed": "seed", "variation_strength": "strength", "seed_resize": "resize_from", "ensd": "ensd"}
    if variation := {field: options.pop(name) for name, field in names.items() if name in options}:
        from nativesd.sampling.variation import Variation

        options["variation"] = Variation(**variation)
    passes = {name.removeprefix("hires_"): options.pop(name) for name in list(options) if name.startswith("hires_")}
    if "hires" in options:
        from nativesd.pipeline.asked.hires import Hires

        options["hires"] = Hires(options["hires"], **passes)
    return options


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


def _image_prompts(options: dict[str, Any]) -> list[ImagePrompt]:
    """The --image-prompt options, in the same way."""
    from nativesd.diffusion.images.prompts import ImagePrompt

    prompts = options.pop("image_prompts", ())
    settings = ("scale", "start", "end", "layers", "mask", "crop")
    chosen = _by_order(options, "image-prompt", len(prompts), settings)
    return [ImagePrompt(adapter, picture, **each) for (adapter, picture), each in zip(prompts, chosen, strict=True)]


def _by_order(options: dict[str, Any], of: str, count: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """The settings --OF-NAME that go with a repeated option --OF, taken out of `options`, for each of its `count`."""
    settings: dict[str, tuple[Any, ...]] = {name: options.pop(f"{of}_{name}".replace("-", "_"), ()) for name in names}
    for name, values in settings.items():
        if len(values) > count:
            raise click.UsageError(f"{len(values)} --{of}-{name} for {count} --{of}")
    return [
        {name: values[i] for name, values in settings.items() if i < len(values) and values[i] != "none"}
        for i in range(count)
    ]
