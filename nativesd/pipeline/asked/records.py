"""Options that are more than a number or a word: pictures, prompts, seeds, LoRAs and records, read and in range."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from os import fspath
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nativesd.diffusion.control import Control
from nativesd.diffusion.images.prompts import ImagePrompt
from nativesd.diffusion.model import Diffusion
from nativesd.diffusion.prompting import SDXL
from nativesd.diffusion.regions import Region
from nativesd.diffusion.tiles import Tiles
from nativesd.errors import UsageError
from nativesd.models.tiling import Tiling
from nativesd.pictures.soft import SoftInpaint
from nativesd.pipeline.asked.hires import UPSCALERS, Hires, Upscaler
from nativesd.pipeline.asked.readers import Reader, is_list, is_path, pixels, real, shown, text, to_whole, whole
from nativesd.pipeline.upscaling import is_upscaler_file
from nativesd.sampling.options import Sampling
from nativesd.sampling.variation import SEEDS, Variation

Record = TypeVar("Record", Hires, SDXL, Variation, Control, ImagePrompt, Sampling, Region, Tiles, SoftInpaint)
Border = tuple[int, int, int, int]
MOST_HIRES = 16
MOST_SIDE = 16_384
"""Pixels of a picture's width or height."""
MOST_PICTURES = 1000
"""Of one call."""
MOST_GUIDANCE = 1000
MOST_SCALE = 1000
"""Of a LoRA or a control, either way."""
SIGMAS = 1e6
"""More than any model's largest sigma."""
MOST_BLUR = 1000
"""Pixels."""


def record_of(kind: type[Record], name: str, value: Any) -> Record:
    """A record such as `Hires`, of its fields by their names, as JSON has them; null stands for a field's default.

    Raises UsageError for what is no object, for a field that is not there, and for one that has to be.
    """
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} must be an object, not {shown(value)}")
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    for each in value:
        if each not in known:
            raise UsageError(f"{name} has no field {each!r}: its fields are {', '.join(known)}")
    given = {each: field for each, field in value.items() if field is not None}
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in given:
            raise UsageError(f"{name} must have the field {field.name!r}")
    return kind(**given)


def read_picture(name: str, value: Any) -> Any:
    """Anything that is a picture, or its file, or the bytes of that."""
    if not isinstance(value, Image.Image | np.ndarray | torch.Tensor | str | Path | bytes):
        raise UsageError(f"{name} must be a picture (PIL, an array, a tensor) or its file, not {shown(value)}")
    return value


def read_pictures(name: str, value: Any) -> Any:
    """A picture, or a list with one for each prompt."""
    if isinstance(value, list | tuple):
        return [read_picture(name, each) for each in value]
    return read_picture(name, value)


def read_latents(name: str, value: Any) -> Tensor:
    """Latents, as results have them."""
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        raise UsageError(f"{name} must be a tensor (B, C, h, w), as results have them, not {shown(value)}")
    return value


def read_prompts(name: str, value: Any) -> list[str]:
    """One text, or several; None is the empty one."""
    texts = list(value) if is_list(value) else [value]
    if not texts:
        raise UsageError(f"there is no {name}: pass a text, or several")
    for each in texts:
        if not isinstance(each, str | None):
            raise UsageError(f"{name} must be a text, or a list of texts, not {shown(each)}")
    return [each or "" for each in texts]


def read_seed(value: Any) -> int:
    """A seed; None and -1 are a random one."""
    if isinstance(value, torch.Generator):
        raise UsageError("seed must be a whole number: pass the one that the generator was seeded with")
    number = -1 if value is None else to_whole("seed", value)
    if number == -1:
        return secrets.randbits(32)
    if not 0 <= number < SEEDS:
        raise UsageError(f"seeds must be between 0 and 2^64 - 1, or -1 for a random one, not {shown(value)}")
    return number


def read_border(name: str, value: Any) -> Border:
    """Left, top, right, bottom."""
    sides = [whole(0, MOST_SIDE)(name, side) for side in value] if is_list(value) else []
    if len(sides) != 4:
        raise UsageError(f"{name} must be four numbers of pixels (left, top, right, bottom), not {shown(value)}")
    left, top, right, bottom = sides
    return left, top, right, bottom


def read_hires(name: str, value: Any) -> Hires:
    """A `Hires`, or its scale."""
    given = value if isinstance(value, Hires) else Hires(value)
    of = f"{name}.{{}}" if isinstance(value, Hires) else name
    readers: dict[str, Reader] = {
        "scale": real(0, MOST_HIRES, above=True), "strength": real(0, 1, above=True), "steps": whole(1, 999),
        "upscaler": _upscaler, "width": whole(1, MOST_SIDE), "height": whole(1, MOST_SIDE), "sampler": text,
        "schedule": text, "prompt": text, "negative_prompt": text, "guidance_scale": real(0, MOST_GUIDANCE),
    }  # fmt: skip
    values: dict[str, Any] = {field: getattr(given, field) for field in readers}
    for field, each in values.items():
        if each is not None:
            values[field] = readers[field](of.format(field), each)
    return Hires(**values)


def read_sdxl(name: str, value: Any) -> SDXL:
    """An `SDXL`, its fields read."""
    if not isinstance(value, SDXL):
        raise UsageError(f"{name} must be an SDXL, not {shown(value)}")
    size, corner = pixels(1, "a width and a height"), pixels(0, "a left and a top margin")
    readers: dict[str, Reader] = {
        "prompt_2": text, "negative_prompt_2": text, "original": size, "crop": corner, "target": size,
        "negative_original": size, "negative_crop": corner, "negative_target": size,
        "aesthetic_score": real(0, 10), "negative_aesthetic_score": real(0, 10),
    }  # fmt: skip
    given = {field: getattr(value, field) for field in readers}
    read: dict[str, Any] = {n: v if v is None else readers[n](f"{name}.{n}", v) for n, v in given.items()}
    return SDXL(**read)


def read_sampling(name: str, value: Any) -> Sampling:
    """A `Sampling`, its numbers in range."""
    if not isinstance(value, Sampling):
        raise UsageError(f"{name} must be a Sampling, not {shown(value)}")
    sigma = real(0, SIGMAS, above=True)
    readers: dict[str, Reader] = {
        "churn": real(0, 1000), "churn_min": real(0, SIGMAS), "churn_max": real(0, SIGMAS), "noise": real(0, 10),
        "sigma_min": sigma, "sigma_max": sigma, "rho": real(0.25, 100),
    }  # fmt: skip
    given = {f: v for f, v in value.chosen().items() if v is not None}
    read: dict[str, Any] = {f: readers[f](f"{name}.{f}", v) for f, v in given.items()}
    return Sampling(**read)


def read_regions(name: str, value: Any) -> list[Region]:
    """One region or several, each with a box or a mask."""
    given = list(value) if is_list(value) else [value]
    for region in given:
        if not isinstance(region, Region):
            raise UsageError(f"{name} must be nativesd.Region(prompt, box), or several, not {shown(region)}")
    return [_region(name, region) for region in given]


def _region(name: str, region: Region) -> Region:
    if not isinstance(region.prompt, str):
        raise UsageError(f"{name}: a prompt must be a text, not {shown(region.prompt)}")
    if (region.box is None) == (region.mask is None):
        raise UsageError(f"{name}: {shown(region.prompt)} needs a box or a mask, and only one of them")
    box = None
    if region.box is not None:
        sides = [real(0, 1)(f"{name}: a side of a box", side) for side in region.box] if is_list(region.box) else []
        if len(sides) != 4 or sides[0] >= sides[2] or sides[1] >= sides[3]:
            what = "left, top, right and bottom, as shares of the picture"
            raise UsageError(f"{name}: a box must be {what}, not {shown(region.box)}")
        box = (sides[0], sides[1], sides[2], sides[3])
    mask = None if region.mask is None else read_picture(f"{name}: a mask", region.mask)
    return Region(region.prompt, box, mask, real(0, 10)(f"{name}: a weight", region.weight))


def read_tiles(name: str, value: Any) -> Tiles:
    """`Tiles`, or a window's size."""
    given = value if isinstance(value, Tiles) else Tiles(value)
    size = whole(64, MOST_SIDE)(f"{name}.size" if given is value else name, given.size)
    overlap = whole(0, MOST_SIDE)(
        f"{name}.overlap", min(given.overlap, size // 2) if given is not value else given.overlap
    )
    if overlap >= size:
        raise UsageError(f"{name}.overlap must be below the size of {size} pixels, not {overlap}")
    return Tiles(size, overlap)


def read_tiling(name: str, value: Any) -> Tiling:
    """Axes, in any order; True is both."""
    axes = "xy" if value is True else "".join(sorted(value.lower())) if isinstance(value, str) else ""
    if axes not in get_args(Tiling):
        raise UsageError(f'{name} must be "xy", "x" or "y", not {shown(value)}')
    return cast("Tiling", axes)


def read_variation(name: str, value: Any) -> Variation:
    """A `Variation`, with its seed chosen."""
    if not isinstance(value, Variation):
        raise UsageError(f"{name} must be a Variation, not {shown(value)}")
    strength, size = real(0, 1)(f"{name}.strength", value.strength), value.resize_from
    if size is not None:
        size = pixels(1, "a width and a height")(f"{name}.resize_from", size)
    seed = read_seed(value.seed)
    return Variation(seed if strength else None, strength, size, to_whole(f"{name}.ensd", value.ensd))


def _upscaler(name: str, value: Any) -> Upscaler:
    """One of `UPSCALERS`, a file of a model, or a function."""
    if not isinstance(value, str) and callable(value):
        return cast("Upscaler", value)
    if isinstance(value, str | Path) and is_upscaler_file(str(value)):
        if not Path(value).is_file():
            raise UsageError(f"{name}: there is no file {value}")
        return str(value)
    if not isinstance(value, str) or value.lower() not in UPSCALERS:
        raise UsageError(f"{name} must be {', '.join(UPSCALERS)}, a model's file, or a function, not {shown(value)}")
    return value.lower()


def read_loras(name: str, value: Any) -> list[tuple[str, float, float]]:
    """One LoRA or several: (file, scale of the UNet's part, scale of the text encoders')."""
    numbered = isinstance(value, tuple) and len(value) in (2, 3) and not is_path(value[1])
    given = [value] if is_path(value) or numbered else value
    if not is_list(given):
        raise UsageError(f"{name} must be files, or (file, scale), or (file, scale, scale), not {shown(value)}")
    out = []
    for lora in given:
        file, *scales = (lora,) if is_path(lora) or not is_list(lora) or not len(lora) else lora
        if not is_path(file) or len(scales) > 2:
            raise UsageError(f"{name} must be files, or (file, scale), or (file, scale, scale), not {shown(lora)}")
        unet, encoders = [_scale(name, scale) for scale in scales or (1.0,)] * (1 if len(scales) == 2 else 2)
        out.append((fspath(file), unet, encoders))
    return out


def read_folders(name: str, value: Any) -> list[Path]:
    """One folder or several."""
    given = [value] if is_path(value) else value
    if not is_list(given) or not all(map(is_path, given)):
        raise UsageError(f"{name} must be folders, not {shown(value)}")
    return [Path(folder) for folder in given]


def _scale(name: str, value: Any) -> float:
    return float(real(-MOST_SCALE, MOST_SCALE)(f"a scale of {name}", value))


def read_refiner(name: str, value: Any) -> Diffusion:
    """A loaded model."""
    if not isinstance(value, Diffusion):
        raise UsageError(f"{name} must be a loaded model: pass {name}=nativesd.load(...), not {shown(value)}")
    return value


def read_callable(name: str, value: Any) -> Any:
    """What takes a `Step`."""
    if not callable(value):
        raise UsageError(f"{name} must be a function that takes a Step, not {shown(value)}")
    return value
