"""What a call can be asked for: every option with its type, range and default, read from whatever plainly means it.

`CallOptions` is what callers may pass, `Checked` what a call works with; a field of it is a row of the table: name,
type, default, and the reader that takes a value or says why it cannot be. What depends on the model is checked by the
pipeline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from inspect import Parameter, Signature
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypedDict,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

from nativesd.config import Prediction
from nativesd.diffusion.control import Control
from nativesd.diffusion.guiding.guiders import Guider
from nativesd.diffusion.images.prompts import ImageEncoder, ImagePrompt
from nativesd.diffusion.model import Diffusion
from nativesd.diffusion.prompting import SDXL
from nativesd.diffusion.regions import Region
from nativesd.diffusion.savings import Saving
from nativesd.diffusion.start import MaskFill, StepsAs
from nativesd.diffusion.tiles import Tiles
from nativesd.errors import UsageError
from nativesd.latents.preview import Step
from nativesd.models.tiling import Tiling
from nativesd.pictures.images import Fit, ImageSource
from nativesd.pictures.soft import SoftInpaint
from nativesd.pipeline.asked.elsewhere import ELSEWHERE
from nativesd.pipeline.asked.hires import Hires
from nativesd.pipeline.asked.readers import Reader, flag, folded, is_list, one_of, read_emphasis, real, text, whole
from nativesd.pipeline.asked.records import (
    MOST_BLUR,
    MOST_GUIDANCE,
    MOST_PICTURES,
    MOST_SIDE,
    Border,
    read_border,
    read_callable,
    read_folders,
    read_hires,
    read_latents,
    read_loras,
    read_pictures,
    read_prompts,
    read_refiner,
    read_regions,
    read_sampling,
    read_sdxl,
    read_seed,
    read_tiles,
    read_tiling,
    read_variation,
)
from nativesd.pipeline.asked.steering import read_control, read_image_encoder, read_image_prompts
from nativesd.pipeline.asked.worded import read_guidance, read_savings, read_soft_inpaint
from nativesd.sampling.names import find_sampler, find_schedule
from nativesd.sampling.noise import NoiseKind
from nativesd.sampling.options import PLAIN, Sampling
from nativesd.sampling.variation import SEEDS, Variation
from nativesd.text.syntax import Emphasis, Syntax

if TYPE_CHECKING:
    from nativesd.export.library import BackendName

Prompt = str | Sequence[str | None] | None
Lora = str | Path | tuple[str | Path, float] | tuple[str | Path, float, float]
Function = TypeVar("Function", bound=Callable[..., object])

SEEDING = ("seed", "num_images")  # the options that together are a seed for every picture


class LoadOptions(TypedDict, total=False):
    """The options of `nativesd.load`, where they are explained."""

    device: str | torch.device | None
    dtype: str | torch.dtype | None
    prediction: Prediction | None
    unet: str | Path | None
    vae: str | Path | None
    text_encoders: Sequence[str | Path]
    preview: str | Path | None
    loras: Lora | Sequence[Lora] | None
    partial: bool | None
    offload: bool
    maps: str | Path | None
    backend: Literal["torch"] | BackendName
    engines: str | Path | None
    fast: bool
    compile: bool | Literal["auto"]
    fp8: bool
    quantize: Literal["int8"] | None
    mapped: bool


class CallOptions(TypedDict, total=False):
    """The options of `Pipeline.__call__`, where they are explained; None is the default of each."""

    negative_prompt: Prompt
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    guidance: Guider | str | Sequence[Guider | str] | None
    savings: Saving | str | Sequence[Saving | str] | None
    sampler: str | None
    schedule: str | None
    regions: Region | Sequence[Region] | None
    tiling: Tiling | None
    tiles: Tiles | int | None
    seed: int | Sequence[int] | None
    num_images: int | None
    image: ImageSource | Sequence[ImageSource] | None
    latents: Tensor | None
    mask: ImageSource | Sequence[ImageSource] | None
    strength: float | None
    steps_as: StepsAs | None
    image_guidance_scale: float | None
    resize: Fit | None
    outpaint: Border | None
    mask_blur: int | None
    mask_fill: MaskFill | None
    only_masked: int | None
    soft_inpaint: SoftInpaint | bool | str | None
    hires: Hires | float | None
    refiner: Diffusion | None
    refiner_at: float | None
    loras: Lora | Sequence[Lora] | None
    lora_dirs: str | Path | Sequence[str | Path] | None
    partial: bool | None
    control: Control | Sequence[Control] | None
    guess_mode: bool | None
    image_prompts: ImagePrompt | Sequence[ImagePrompt] | None
    image_encoder: ImageEncoder | str | Path | None
    guidance_rescale: float | None
    eta: float | None
    sampling: Sampling | None
    clip_skip: int | None
    emphasis: Emphasis | None
    literal: bool | None
    force: bool | None
    sdxl: SDXL | None
    noise: NoiseKind | None
    variation: Variation | None
    on_step: Callable[[Step], object] | None


class GenerateOptions(LoadOptions, CallOptions, total=False):
    """The options of `nativesd.generate`."""


def check(prompt: Prompt, options: CallOptions) -> Checked:
    """What is asked of a call, read and in its ranges. Raises UsageError for what cannot be, naming the argument."""
    rows = readers_of(Checked)
    refuse_unknown(options, [*rows, *SEEDING], ELSEWHERE)
    given = {name: value for name, value in options.items() if value is not None}
    prompts = read_prompts("prompt", prompt)
    seeds = _seeds(given.pop("seed", None), given.pop("num_images", None), len(prompts))
    checked = Checked(
        prompts=prompts, one_prompt=not is_list(prompt), seeds=seeds,
        one_negative=not is_list(given.get("negative_prompt")),
        **{name: rows[name](name, value) for name, value in given.items()},
    )  # fmt: skip
    varied = checked.variation is not None and checked.variation.strength > 0  # its seeds count up instead
    if (varied or checked.noise == "comfyui") and not is_list(options.get("seed")):
        checked = dataclasses.replace(checked, seeds=[seeds[0]] * len(seeds))
    if checked.schedule is not None:
        find_schedule(checked.schedule)
    if checked.sampler is not None:
        find_sampler(checked.sampler, checked.schedule)
    if checked.hires is not None and checked.hires.sampler is not None:
        find_sampler(checked.hires.sampler, checked.hires.schedule)
    if len(checked.negative_prompt) not in (1, len(prompts)):
        raise UsageError(
            f"negative_prompt must be one text, or one for each of {len(prompts)} prompts, not "
            f"{len(checked.negative_prompt)}"
        )
    return checked


@cache
def readers_of(checked: type) -> Mapping[str, Reader]:
    """What reads each option of a record such as `Checked`, whose fields are annotated with it."""
    hints = get_type_hints(checked, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}


def split(options: Mapping[str, Any]) -> tuple[LoadOptions, Any]:
    """The options of `nativesd.load`, and all others."""
    loading = {name: value for name, value in options.items() if name in LoadOptions.__annotations__}
    asked = {name: value for name, value in options.items() if name not in loading}
    return cast("LoadOptions", loading), asked


def refuse_unknown(given: Iterable[str], known: Sequence[str], elsewhere: Mapping[str, str]) -> None:
    """Raise UsageError for a name that is no option, with ours where it is another tool's, which `elsewhere` says."""
    for name in given:
        if name in known:
            continue
        if name in LoadOptions.__annotations__:
            raise UsageError(f"{name} is an option of nativesd.load(), not of a call: pass {name}= there")
        if name in elsewhere:
            raise UsageError(f"there is no option {name!r}: here it is {elsewhere[name]}")
        close = get_close_matches(name, known, 1)
        raise UsageError(f"there is no option {name!r}" + (f": did you mean {close[0]}?" if close else ""))


def signed(options: type) -> Callable[[Function], Function]:
    """Have a function that takes `**options` show each of them to `help`, and to what completes names."""

    def sign(function: Function) -> Function:
        positional = list(Signature.from_callable(function).parameters.values())[:-1]
        keywords = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation.__forward_arg__)
            for name, annotation in options.__annotations__.items()
        ]
        function.__signature__ = Signature([*positional, *keywords])  # type: ignore[attr-defined]
        return function

    return sign


def _seeds(value: Any, num_images: Any, prompts: int) -> list[int]:
    """Every picture's seed, as they were listed or counting up from the one given; `num_images` of each prompt."""
    listed = [read_seed(each) for each in value] if is_list(value) and getattr(value, "ndim", 1) == 1 else None
    if num_images is None:
        num_images = 1 if listed is None else max(len(listed) // prompts, 1)
    total = whole(1, MOST_PICTURES)("num_images", num_images) * prompts
    if total > MOST_PICTURES:
        raise UsageError(f"{total} pictures are over the {MOST_PICTURES} of one call: make them in several")
    if listed is None:
        first = read_seed(value)
        if first + total > SEEDS:
            raise UsageError(f"seeds must be between 0 and 2^64 - 1, not {first + total - 1}")
        return [first + i for i in range(total)]
    if len(listed) != total:
        raise UsageError(f"seed must be one number, or one for each of {total} pictures, not {len(listed)}")
    return listed


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Everything that a call is asked for: a field's type, what reads it (None aside), and its default.

    `one_prompt` and `one_negative` say that it was a text, not a list.
    """

    prompts: Sequence[str]
    one_prompt: bool
    one_negative: bool
    seeds: Sequence[int]
    """Of every picture: of those of the first prompt, of the second, ..."""
    negative_prompt: Annotated[Sequence[str], read_prompts] = ("",)
    width: Annotated[int | None, whole(1, MOST_SIDE)] = None
    height: Annotated[int | None, whole(1, MOST_SIDE)] = None
    steps: Annotated[int | None, whole(1, 999)] = None  # of the 1000 noise levels that all models are trained on
    guidance_scale: Annotated[float | None, real(0, MOST_GUIDANCE)] = None
    guidance: Annotated[Sequence[Guider], read_guidance] = ()
    savings: Annotated[Sequence[Saving], read_savings] = ()
    sampler: Annotated[str | None, text] = None
    schedule: Annotated[str | None, text] = None
    regions: Annotated[Sequence[Region], read_regions] = ()
    tiling: Annotated[Tiling | None, read_tiling] = None
    tiles: Annotated[Tiles | None, read_tiles] = None
    image: Annotated[Any, read_pictures] = None  # an ImageSource, or a list of them, of which `each` makes one
    latents: Annotated[Tensor | None, read_latents] = None
    mask: Annotated[Any, read_pictures] = None
    strength: Annotated[float | None, real(0, 1)] = None
    steps_as: Annotated[StepsAs, one_of(*get_args(StepsAs))] = "diffusers"
    image_guidance_scale: Annotated[float, real(0, MOST_GUIDANCE)] = 1.5
    resize: Annotated[Fit, one_of(*get_args(Fit))] = "resize"
    outpaint: Annotated[Border | None, read_border] = None
    mask_blur: Annotated[int, whole(0, MOST_BLUR)] = 4
    mask_fill: Annotated[MaskFill, one_of(*get_args(MaskFill))] = "original"
    only_masked: Annotated[int | None, whole(0, MOST_SIDE)] = None
    soft_inpaint: Annotated[SoftInpaint | None, read_soft_inpaint] = None
    hires: Annotated[Hires | None, read_hires] = None
    refiner: Annotated[Diffusion | None, read_refiner] = None
    refiner_at: Annotated[float, real(0, 1)] = 0.8
    loras: Annotated[Sequence[tuple[str, float, float]] | None, read_loras] = None
    lora_dirs: Annotated[Sequence[Path], read_folders] = ()
    partial: Annotated[bool, flag] = False
    control: Annotated[Sequence[Control], read_control] = ()
    guess_mode: Annotated[bool, flag] = False
    image_prompts: Annotated[Sequence[ImagePrompt], read_image_prompts] = ()
    image_encoder: Annotated[ImageEncoder | str | Path | None, read_image_encoder] = None
    guidance_rescale: Annotated[float, real(0, 1)] = 0.0
    eta: Annotated[float | None, real(0, 1)] = None
    sampling: Annotated[Sampling, read_sampling] = PLAIN
    clip_skip: Annotated[int | None, whole(1, 100)] = None
    emphasis: Annotated[Emphasis, read_emphasis] = "original"
    literal: Annotated[bool, flag] = False
    force: Annotated[bool, flag] = False
    sdxl: Annotated[SDXL | None, read_sdxl] = None
    noise: Annotated[NoiseKind, folded(*get_args(NoiseKind))] = "cpu"
    variation: Annotated[Variation | None, read_variation] = None
    on_step: Annotated[Callable[[Step], object] | None, read_callable] = None

    @property
    def syntax(self) -> Syntax:
        """How the prompts are read."""
        return "literal" if self.literal else self.emphasis

    @property
    def variation_seeds(self) -> list[int]:
        """Of every picture, those of the noise that is mixed in: counting up."""
        first = None if self.variation is None else self.variation.seed
        return [] if first is None else [(first + i) % SEEDS for i in range(len(self.seeds))]

    def each(self, texts: Sequence[str]) -> list[str]:
        """For every picture its own of one text, or of one for each prompt."""
        return [texts[i * len(texts) // len(self.seeds)] for i in range(len(self.seeds))]
