"""Hints, regions and masks of a call, brought to the part and the frame in which its picture is painted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from PIL import Image, ImageDraw

from nativesd.diffusion.control import Control
from nativesd.diffusion.images.prompts import ImagePrompt, one_or_several
from nativesd.diffusion.regions import Region
from nativesd.errors import UsageError
from nativesd.pictures import images
from nativesd.pictures.masks import read_mask
from nativesd.pipeline.asked.arguments import Checked
from nativesd.pipeline.asked.inputs import Inputs, inpainting

ALIKE = 0.01
"""By which share shapes may differ that are the same: sides are whole pixels."""


@dataclass(frozen=True)
class Placed:
    """What a call asks for by pictures, as it lies on what is painted; `notes` say what does not."""

    control: list[Control]
    regions: list[Region]
    image_prompts: list[ImagePrompt]
    notes: tuple[str, ...]


def placed(asked: Checked, inputs: Inputs) -> Placed:
    """A call's hints, regions and masks. Raises UsageError for a mask of which nothing is left.

    Where only a part of the picture is painted, all of them are of the whole one and cut with it, as A1111's ControlNet
    extension and diffusers do. Where the picture is cropped, filled up or outpainted, pictures of its shape are so too,
    and those of the result's size are taken as they are.
    """
    regions: list[Region] = []
    notes: list[str] = []
    for region in asked.regions:
        own = _region(region, inputs)
        if own is None:
            notes.append(f"the region {region.prompt!r} is not used: it lies outside of what is repainted")
        else:
            regions.append(own)
    control = [_control(each, inputs) for each in asked.control]
    return Placed(control, regions, [_image_prompt(each, inputs) for each in asked.image_prompts], tuple(notes))


def _control(control: Control, inputs: Inputs) -> Control:
    if control.image is None:
        return inpainting(control, inputs)
    assert not isinstance(control.image, list)  # there is one prompt
    if control.preprocess == "inpaint":  # whose border is a hole
        return replace(control, image=on_painted(images.open_image(control.image).convert("RGBA"), inputs))
    picture = images.read_image(control.image)
    return replace(control, image=on_painted(picture, inputs, drawn_out=control.preprocess is not None))


def _region(region: Region, inputs: Inputs) -> Region | None:
    """A region on what is painted; None where nothing of it is."""
    if region.mask is not None:
        mask = read_mask(region.mask).image
    elif inputs.box is not None and inputs.whole is not None:
        left, top, right, bottom = region.box or (0, 0, 1, 1)
        width, height = inputs.whole
        mask = Image.new("L", inputs.whole)
        edges = (round(left * width), round(top * height), round(right * width) - 1, round(bottom * height) - 1)
        if edges[0] <= edges[2] and edges[1] <= edges[3]:
            ImageDraw.Draw(mask).rectangle(edges, fill=255)
    else:
        return region
    mask = on_painted(mask, inputs)
    return None if mask.getbbox() is None else replace(region, box=None, mask=mask)


def _image_prompt(prompt: ImagePrompt, inputs: Inputs) -> ImagePrompt:
    if prompt.mask is None:
        return prompt
    masks = [on_painted(read_mask(mask).image, inputs) for mask in one_or_several(prompt.mask)]
    if any(mask.getbbox() is None for mask in masks):
        raise UsageError("an image prompt's mask is white only outside of what is painted: leave that prompt out")
    return replace(prompt, mask=cast("images.ImageSource", masks[0]) if len(masks) == 1 else list(masks))


def on_painted(picture: Image.Image, inputs: Inputs, *, drawn_out: bool = False) -> Image.Image:
    """A picture of what is beside a call's picture, as it lies on what is painted.

    What an outpainted border has of it is black (transparent in RGBA), or the edges `drawn_out`.
    """
    if inputs.whole is None:
        return picture
    width, height = inputs.whole
    across, down = picture.width / width, picture.height / height
    if inputs.box is not None:
        left, top, right, bottom = inputs.box
        part = picture.crop((round(left * across), round(top * down), round(right * across), round(bottom * down)))
        return images.fit(part, inputs.width, inputs.height, "fill").image
    size = (inputs.width, inputs.height)
    if picture.size == size or abs(across - down) > ALIKE * max(across, down):
        return picture
    left, top, right, bottom = inputs.border
    fitted = images.fit(picture, size[0] - left - right, size[1] - top - bottom, inputs.resize).image
    if inputs.border == (0, 0, 0, 0):
        return fitted
    if drawn_out:
        return images.pad(fitted, left, right, top, bottom, factor=1).image
    canvas = Image.new(fitted.mode, size)
    canvas.paste(fitted, (left, top))
    return canvas
