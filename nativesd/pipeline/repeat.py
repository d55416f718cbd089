"""From a picture that carries its parameters to the options that make it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nativesd.pictures.infotext import generation_options, parse_infotext, read_infotext
from nativesd.pipeline.hires import UPSCALERS, Hires

_HIRES = {"upscale": "scale"}


def options_from(picture: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The options that make a picture again, out of its own parameters, and the fields among these that are not heeded.

    `model` among the options is a name, not a path. Raises SourceError for a picture without parameters, UsageError
    for a value that cannot be.
    """
    info = parse_infotext(read_infotext(picture))
    options, unheeded = generation_options(info)
    options |= {"prompt": info.prompt, "negative_prompt": info.negative_prompt}
    hires: Any = options.pop("hires", None)
    if hires is not None:
        if str(hires.get("upscaler", "latent")).lower() not in UPSCALERS:
            unheeded.append(f"Hires upscaler {hires['upscaler']} (taken: latent)")
            del hires["upscaler"]
        given: dict[str, Any] = {_HIRES.get(name, name): value for name, value in hires.items() if value}
        options["hires"] = Hires(**given)
    return options, unheeded
