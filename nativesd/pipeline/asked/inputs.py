"""What a call asks for, against the model that it is asked of."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from nativesd.diffusion.config import EDITING, INPAINTING, PLAIN, PipelineConfig
from nativesd.diffusion.control import Control
from nativesd.diffusion.guiding.guiders import Combined, Interval
from nativesd.diffusion.savings import DeepCache
from nativesd.errors import UsageError
from nativesd.pictures import images, masks
from nativesd.pictures.region import Box, cut_out, fill_masked, placed, put_back
from nativesd.pipeline.asked.arguments import Checked
from nativesd.sampling.names import find_sampler
from nativesd.sampling.published import Kind
from nativesd.sampling.table import Sampler
from nativesd.text.editing import split_and
from nativesd.text.syntax import ONE_TEXT
from nativesd.text.tags import take_tags
from nativesd.text.words import FILE as WORDS
from nativesd.text.words import unknown_words

TOLD = "the UNet of {} takes the guidance scale as an input and is asked for the prompt alone"
BENT = ("karras", "polyexponential")
"""Schedules that have a `rho`."""
BY_FORMULA = (*BENT, "exponential", "lu", "beta", "kl optimal")
"""Those between two sigmas of any size."""


@dataclass(frozen=True)
class Inputs:
    """The size of the pictures to make, and the picture and mask to begin from, brought to it; `notes` say how.

    ground  the picture and its mask as they are outside of what is painted, and the box of that in them; None: all
    whole   width and height of the picture as it was given; None: there is none
    resize  how it came to its size without the border
    border  pixels added to it on the left, top, right and bottom
    """

    width: int
    height: int
    picture: Image.Image | None = None
    mask: Image.Image | None = None
    notes: tuple[str, ...] = ()
    ground: tuple[Image.Image, Image.Image, Box | None] | None = None
    whole: tuple[int, int] | None = None
    resize: images.Fit = "resize"
    border: Box = (0, 0, 0, 0)

    @property
    def box(self) -> Box | None:
        """What of the whole picture is painted, where that is a part."""
        return None if self.ground is None else self.ground[2]

    def finished(self, painted: Image.Image, cover: Image.Image | None = None) -> Image.Image:
        """What was painted, with what lies outside of the mask as it was, or of what it is to `cover`, of its size."""
        if self.ground is None:
            return painted
        picture, mask, box = self.ground
        if cover is not None:
            mask = cover if box is None else placed(cover, box, picture.size)
        return images.paste(picture, painted, mask) if box is None else put_back(picture, painted, mask, box)


def require_together(asked: Checked) -> None:
    """Raise UsageError for options that lack another one, or do not go with one, whatever the model is."""
    given = {"mask": asked.mask, "outpaint": asked.outpaint, "strength": asked.strength}
    needing = [name for name, value in given.items() if value is not None]
    if needing and asked.image is None and asked.latents is None:
        raise UsageError(f"{needing[0]} is for a picture to begin from: pass image= too")
    masked = asked.mask is not None or asked.outpaint is not None
    if asked.mask is None and asked.only_masked is not None:
        raise UsageError("only_masked is for a mask: pass mask= too")
    if not masked and asked.mask_fill != Checked.mask_fill:
        raise UsageError("mask_fill is for a mask: pass mask= too")
    if not masked and asked.soft_inpaint is not None:
        raise UsageError("soft_inpaint is for a mask: pass mask= too")
    if asked.only_masked is not None and asked.outpaint is not None:
        raise UsageError("only_masked repaints a part of a picture: pass no outpaint with it")
    if asked.image is not None and asked.hires is not None:
        raise UsageError("hires makes a picture larger that was made from a prompt: pass no image with it")
    if not masked and any(each.image is None for each in asked.control):
        raise UsageError('a control with preprocess="inpaint" and no picture is for calls with image= and mask=')
    if asked.tiles is not None and asked.tiling is not None:
        raise UsageError("tiles are windows with borders, and tiling has none: pass one of the two")
    if asked.tiles is not None and asked.regions:
        raise UsageError("regions are parts of the whole picture, which tiles do not show: pass one of the two")
    if asked.tiles is not None and any(each.mask is not None for each in asked.image_prompts):
        raise UsageError("an image prompt's mask is of the whole picture, which tiles do not show: pass one of the two")


def require_combined(config: PipelineConfig, asked: Checked, sampler: Sampler) -> None:
    """Raise UsageError for answers that a call wants to combine and this model does not give."""
    one_text = asked.syntax in ONE_TEXT
    several = [each.prompt for each in asked.regions if not one_text and len(split_and(each.prompt)) > 1]
    if several:
        raise UsageError(f"a region has one prompt: write no AND in {several[0]!r}, or a region for each part of it")
    if config.unet.guidance is not None:  # there is one answer, for the prompt
        again = asked.hires
        prompts = [*asked.prompts, *([] if again is None or again.prompt is None else [again.prompt])]
        samplers = [sampler, *([] if again is None or again.sampler is None else [find_sampler(again.sampler).sampler])]
        if not one_text and any(len(split_and(prompt)) > 1 for prompt in prompts):
            raise UsageError(f"AND combines answers by guidance, and {TOLD.format(config.name)}: write one prompt")
        for each in samplers:
            if each.plus_plus:
                raise UsageError(
                    f"{each.name} needs an answer without the prompt, and {TOLD.format(config.name)}: "
                    "pass another sampler="
                )


def read_inputs(config: PipelineConfig, asked: Checked) -> Inputs:
    """The picture to begin from and its mask, brought to one size. Raises UsageError for what cannot be."""
    require_together(asked)
    width, height, image, mask, outpaint = asked.width, asked.height, asked.image, asked.mask, asked.outpaint
    factor, channels = config.vae.factor, config.unet.in_channels
    for pixels in (width, height):
        if pixels is not None and (pixels < factor or pixels % factor):
            raise UsageError(
                f"width and height must be positive multiples of {factor} pixels for this model, not {pixels}"
            )
    if asked.sdxl is not None and config.unet.added is None:
        raise UsageError(f"sdxl is for SDXL's UNets, and {config.name} has none: leave it out")
    if asked.tiles is not None and asked.tiles.size < config.smallest:
        raise UsageError(f"{config.name} needs tiles of {config.smallest} pixels and more, not of {asked.tiles.size}")
    for saving in asked.savings:
        if isinstance(saving, DeepCache) and saving.level >= len(config.unet.levels):
            raise UsageError(
                f"savings: {config.name} has levels 0 to {len(config.unet.levels) - 1}, not {saving.level}"
            )
    if asked.latents is not None:
        return _size_of_latents(config, asked, asked.latents)
    if image is None:
        if channels != PLAIN:
            kind = {INPAINTING: "image= and mask= (inpainting)", EDITING: "image= (a picture to edit)"}
            raise UsageError(
                f"{config.name} takes {channels} input channels: "
                f"{'pass ' + kind[channels] if channels in kind else 'such models are not supported'}"
            )
        return Inputs(width or config.size, height or config.size)
    if channels not in (PLAIN, INPAINTING, EDITING):
        raise UsageError(f"{config.name} takes {channels} input channels: such models are not supported")
    if channels == INPAINTING and mask is None and outpaint is None:
        raise UsageError(f"{config.name} is an inpainting model: pass mask= with image=")
    if channels == EDITING and (mask is not None or outpaint is not None):
        raise UsageError(f"{config.name} edits whole pictures by instruction: it takes no mask")
    if asked.only_masked is not None:
        return _part(config, asked, asked.only_masked)
    notes = []
    given_picture = images.read_image(image)
    picture, note = images.fit(given_picture, width, height, asked.resize, factor=factor)
    fitted = picture.size
    added = (0, 0, 0, 0)
    notes += [note] if note else []
    painted: Image.Image | None = None
    if mask is not None:
        painted, note = masks.read_mask(mask)
        painted = images.fit(painted, picture.width, picture.height, asked.resize, factor=factor).image
        notes += [note] if note else []
    if outpaint is not None:
        left, top, right, bottom = outpaint
        picture, border, note = images.pad(picture, left, right, top, bottom, factor=factor)
        notes.append(note)
        at = masks.corner(fitted, border.size, (left, right, top, bottom))
        added = (*at, border.width - fitted[0] - at[0], border.height - fitted[1] - at[1])
        painted = border if painted is None else masks.add_border(painted, border, (left, right, top, bottom))
    if painted is None:
        return Inputs(*picture.size, picture, None, tuple(notes), None, given_picture.size, asked.resize, added)
    painted = masks.blur(painted, asked.mask_blur)
    begin = picture if asked.mask_fill == "original" else fill_masked(picture, painted)
    ground = (picture, painted, None)
    return Inputs(*picture.size, begin, painted, tuple(notes), ground, given_picture.size, asked.resize, added)


def inpainting(control: Control, inputs: Inputs) -> Control:
    """A control that is given no picture but says "inpaint": it is steered by the call's, with a hole at its mask."""
    if control.preprocess != "inpaint" or control.image is not None:
        return control
    assert inputs.picture is not None  # `require_together` has seen to it
    assert inputs.mask is not None
    holed = inputs.picture.convert("RGBA")
    holed.putalpha(inputs.mask.point(lambda value: 0 if value > 127 else 255))
    return replace(control, image=holed)


def _size_of_latents(config: PipelineConfig, asked: Checked, latents: Tensor) -> Inputs:
    """The size of the pictures that begin from latents."""
    count, channels, rows, columns = latents.shape
    factor, wanted = config.vae.factor, config.vae.latent_channels
    given = {"image": asked.image, "mask": asked.mask, "outpaint": asked.outpaint, "hires": asked.hires}
    if beside := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"latents are what a picture begins from: pass no {beside[0]} with them")
    if config.unet.in_channels != PLAIN or channels != wanted or count not in (1, len(asked.seeds)):
        raise UsageError(
            f"latents must be (1 or {len(asked.seeds)}, {wanted}, h, w) for a model that paints, not "
            f"{tuple(latents.shape)} for {config.name}"
        )
    width, height = columns * factor, rows * factor
    if (asked.width or width, asked.height or height) != (width, height):
        raise UsageError(f"latents are of {width}x{height} pixels: pass no other width and height")
    return Inputs(width, height)


def _part(config: PipelineConfig, asked: Checked, padding: int) -> Inputs:
    """The part of a picture around its mask, at a size of its own."""
    assert asked.image is not None
    assert asked.mask is not None
    picture = images.read_image(asked.image)
    mask, note = masks.read_mask(asked.mask)
    mask = masks.blur(images.fit(mask, *picture.size).image, asked.mask_blur)
    width, height = images.fitted_size(picture, asked.width, asked.height, config.vae.factor)
    part, part_mask, box = cut_out(picture, mask, padding, width, height)
    if asked.mask_fill != "original":
        part = fill_masked(part, part_mask)
    left, top, right, bottom = box
    notes = [*([note] if note else []), f"only {right - left}x{bottom - top} pixels at {left}, {top} are repainted"]
    return Inputs(width, height, part, part_mask, tuple(notes), (picture, mask, box), picture.size)


def unheeded(
    config: PipelineConfig,
    asked: Checked,
    steps: int,
    guidance_scale: float,
    sampler: Sampler,
    kind: Kind,
    embeddings: Collection[str],
) -> Iterator[str]:
    """What of a call changes nothing with this model."""
    alone = None  # why the prompt alone is asked for
    if config.unet.guidance is not None:
        alone = TOLD.format(config.name)
    elif guidance_scale <= 1 and not sampler.plus_plus:
        alone = f"a guidance_scale of {guidance_scale:g} is no guidance"
    if alone is not None:
        given = {"negative_prompt": any(asked.negative_prompt), "guidance_rescale": asked.guidance_rescale}
        given |= {f"guidance {each.name}": isinstance(each, Combined | Interval) for each in asked.guidance}
        yield from (f"{name} is not used: {alone}" for name, value in given.items() if value)
    if asked.image is None and asked.latents is None:  # these begin later, with fewer steps
        for guider in asked.guidance:
            if not any(guider.acts(step, steps) for step in range(steps)):
                yield f"guidance {guider.name} is not used: none of {steps} steps begins between its start and its end"
    if sampler.shared_steps and len(asked.seeds) > 1:
        yield f"{sampler.name} takes the same steps for all pictures of a batch: alone, each may come out otherwise"
    yield from _unheeded_sampling(config, asked, sampler, kind)
    if asked.hires is not None and asked.hires.prompt is not None and not asked.literal:
        named = {tag for prompt in asked.prompts for tag in take_tags(prompt)[1]}
        for tag in take_tags(asked.hires.prompt)[1]:
            if tag not in named:
                yield f"<lora:{tag.name}> in hires.prompt is not used: both passes have the LoRAs of the first"
    edits = config.unet.in_channels == EDITING
    if edits and asked.strength is not None:
        yield f"strength is not used: {config.name} edits by instruction"
    if not edits and asked.image_guidance_scale != Checked.image_guidance_scale:
        yield f"image_guidance_scale is not used: {config.name} does not edit by instruction"
    if config.words is not None:
        unknown = unknown_words(
            asked.prompts,
            {*config.words, *embeddings},
            syntax=asked.syntax,
            beside_pictures=bool(asked.image_prompts),
        )
        if unknown:
            yield (
                f"the embedded model does not know {', '.join(unknown)}: it was taught drawings such as "
                f'"a strawberry on a yellow background", and the words in {WORDS}'
            )


def _unheeded_sampling(config: PipelineConfig, asked: Checked, sampler: Sampler, kind: Kind) -> Iterator[str]:
    """What of `sampling` changes nothing with a sampler and a schedule."""
    options, edm = asked.sampling, config.scheduler.edm
    if options.churn and not sampler.churns:
        yield f"sampling.churn is not used: {sampler.name} adds no noise before its steps"
    if options.noise != 1 and not (sampler.noisy or asked.eta or (options.churn and sampler.churns)):
        yield f"sampling.noise is not used: {sampler.name} adds no noise"
    shape = edm.kind if edm is not None and kind == "automatic" else kind
    if options.rho is not None and shape not in BENT:
        yield f"sampling.rho is not used: it is of the schedules {' and '.join(BENT)}"
    ends = {"sigma_min": options.sigma_min, "sigma_max": options.sigma_max}
    for name, value in ends.items():
        fixed = kind == "align your steps" if edm is not None else kind not in BY_FORMULA
        if kind == "linear quadratic":
            fixed = name == "sigma_min"
        if value is not None and fixed:
            yield f"sampling.{name} is not used: the schedule {kind} has ends of its own"
