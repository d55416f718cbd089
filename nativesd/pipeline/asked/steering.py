"""What steers a call beside its prompts: controls and image prompts, as people pass them, read and in range."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

from nativesd.diffusion.control import Control, ControlModel
from nativesd.diffusion.images.layers import WeightType
from nativesd.diffusion.images.prompts import ImageAdapter, ImageEncoder, ImagePrompt
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
    return [
        dataclasses.replace(
            control,
            scale=real(-MOST_SCALE, MOST_SCALE)(f"the scale of a {name}", control.scale),
            start=real(0, 1)(f"the start of a {name}", control.start),
            end=real(0, 1)(f"the end of a {name}", control.end),
        )
        for control in given
    ]


def read_image_prompts(name: str, value: Any) -> list[ImagePrompt]:
    """One image prompt or several, each with its numbers in range."""
    given = list(value) if is_list(value) else [value]
    for prompt in given:
        if not isinstance(prompt, ImagePrompt):
            raise UsageError(f"{name} must be nativesd.ImagePrompt(adapter, picture), or several, not {shown(prompt)}")
        if not isinstance(prompt.adapter, ImageAdapter) and not is_path(prompt.adapter):
            raise UsageError(f"the adapter of {name} must be loaded, or a file, not {shown(prompt.adapter)}")
    return [
        dataclasses.replace(
            prompt,
            scale=real(-MOST_SCALE, MOST_SCALE)(f"the scale of {name}", prompt.scale),
            start=real(0, 1)(f"the start of {name}", prompt.start),
            end=real(0, 1)(f"the end of {name}", prompt.end),
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
