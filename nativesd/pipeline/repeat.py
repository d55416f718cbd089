"""From a picture that carries its parameters to the options that make it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from nativesd.pictures.infotext import generation_options, parse_infotext, read_infotext
from nativesd.pipeline.arguments import Hires, Upscaler


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
        if "upscale" not in hires:
            sides = [hires.get(name, 0) / options[name] for name in ("width", "height") if options.get(name)]
            hires["upscale"] = max(sides, default=1.0)
        names = {upscaler: upscaler for upscaler in get_args(Upscaler)}
        upscaler = names.get(str(hires.get("upscaler", "latent")).lower())
        if upscaler is None:
            unheeded.append(f"Hires upscaler {hires['upscaler']}")
        options["hires"] = Hires(
            hires["upscale"], hires.get("strength", Hires.strength), hires.get("steps") or None, upscaler or "latent"
        )
    return options, unheeded
