"""What steers a call beside its prompts: controls and image prompts, as people pass them, read and in range."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

from nativesd.diffusion.control import Control, ControlModel
from nativesd.diffusion.images.layers import WeightType
from nativesd.diffusion.images.prompts import ImageAdapter, ImageEmbeddings, ImageEncoder, ImagePrompt
from nativesd.errors import UsageError
from nativesd.pictures.clip import Crop
from nativesd.pipeline.asked.readers import is_list, is_path, one_of, real, shown
from nativesd.pipeline.asked.records import MOST_SCALE, read_picture, read_pictures


def read_control(name: str, value: Any) -> list[Control]:
    """One control or several, each with a picture, or a list with one for each prompt."""
    given = list(value) if is_list(value) else [value]
    several = [isinstance(each, Control) and isinstance(each.image, list | tuple) for each in given]
    for each, listed in zip(given, several, strict=True):
        if listed:
            read_pictures(f"the picture of a {name}", each.image)
    controls = read_controls(name, [dataclasses.replace(each, image=None) if listed else each
                                    for each, listed in zip(given, several, strict=True)])  # fmt: skip
    controls = [dataclasses.replace(each, image=list(of.image)) if listed else each
                for each, of, listed in zip(controls, given, several, strict=True)]  # fmt: skip
    for control in controls:
        if control.image is None and control.preprocess != "inpaint":
            raise UsageError(f"a {name} steers by a picture: pass nativesd.Control(model, image)")
    return controls


def read_controls(name: str, value: Any) -> list[Control]:
    """One control or several, each with its numbers in range."""
    given = list(value) if is_list(value) else [value]
    for control in given:
        if not isinstance(control, Control):
            raise UsageError(f"{name} must be nativesd.Control(model, image), or several, not {shown(control)}")
        if isinstance(control.image, list | tuple):
            raise UsageError(f"a {name} has one picture here, not {len(control.image)}")
        if not isinstance(control.model, ControlModel) and not is_path(control.model):
            raise UsageError(f"the model of a {name} must be loaded, or a file, not {shown(control.model)}")
        if control.image is not None:
            read_picture(f"the picture of a {name}", control.image)
    return [dataclasses.replace(control, **_acting(f"a {name}", control)) for control in given]


def read_image_prompts(name: str, value: Any) -> list[ImagePrompt]:
    """One image prompt or several, each with something to see and its numbers in range."""
    given = list(value) if is_list(value) else [value]
    for prompt in given:
        if not isinstance(prompt, ImagePrompt):
            raise UsageError(f"{name} must be nativesd.ImagePrompt(adapter, picture), or several, not {shown(prompt)}")
        if not isinstance(prompt.adapter, ImageAdapter) and not is_path(prompt.adapter):
            raise UsageError(f"the adapter of {name} must be loaded, or a file, not {shown(prompt.adapter)}")
        stem = Path(str(getattr(prompt.adapter, "name", prompt.adapter))).stem
        needed = f"{name}: {stem} is prompted by a picture: pass one, or image embeddings"
        if prompt.picture is None and prompt.identity is None:
            raise UsageError(f"{needed}, or to a FaceID adapter identity=")
        if isinstance(prompt.picture, list | tuple) and not prompt.picture:
            raise UsageError(f"{needed}, not an empty list")
        if not isinstance(prompt.picture, ImageEmbeddings | None):
            read_pictures(f"a picture of {name}", prompt.picture)
        if prompt.mask is not None:
            read_pictures(f"a mask of {name}", prompt.mask)
    return [
        dataclasses.replace(
            prompt,
            **_acting(name, prompt),
            weight_type=one_of(*get_args(WeightType))(f"the weight_type of {name}", prompt.weight_type),
            crop=one_of(*get_args(Crop))(f"the crop of {name}", prompt.crop),
            lora_scale=real(-MOST_SCALE, MOST_SCALE)(f"the lora_scale of {name}", prompt.lora_scale),
        )
        for prompt in given
    ]


def read_image_encoder(name: str, value: Any) -> ImageEncoder | str | Path:
    """A loaded image encoder, or its file or folder."""
    if not isinstance(value, ImageEncoder | str | Path):
        raise UsageError(f"{name} must be a file, a folder, or nativesd.load_image_encoder(...), not {shown(value)}")
    return value


def _acting(name: str, given: Control | ImagePrompt) -> dict[str, float]:
    """How strongly and when it acts."""
    scale = real(-MOST_SCALE, MOST_SCALE)(f"the scale of {name}", given.scale)
    start, end = (real(0, 1)(f"the {end} of {name}", getattr(given, end)) for end in ("start", "end"))
    if start > end:
        raise UsageError(f"{name}: start and end must be 0 <= start <= end <= 1, not {start}, {end}")
    return {"scale": scale, "start": start, "end": end}
