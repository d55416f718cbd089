"""What a stream can be asked for, read and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_args

from nativesd.diffusion.control import Control
from nativesd.diffusion.images.prompts import ImageEncoder, ImagePrompt
from nativesd.errors import UsageError
from nativesd.pipeline.asked.arguments import LoadOptions, Lora, readers_of, refuse_unknown
from nativesd.pipeline.asked.elsewhere import ELSEWHERE
from nativesd.pipeline.asked.readers import Reader, flag, is_list, one_of, real, shown, to_whole, whole
from nativesd.pipeline.asked.records import read_loras
from nativesd.pipeline.asked.steering import read_controls, read_image_encoder, read_image_prompts
from nativesd.sampling.published import SchedulerConfig
from nativesd.streaming.batch import Residual
from nativesd.streaming.frames import OUTPUTS, Output
from nativesd.streaming.ladder import Ladder, make_ladder, timesteps_of_indices, timesteps_of_strength
from nativesd.streaming.similar import Measure, Similar
from nativesd.streaming.told import Blend, Weighted

STEPS, STRENGTH = 2, 0.5
WAYS = (("timesteps",), ("t_index_list",), ("steps", "strength"))
"""Of saying which noise levels the slots have: any one of them."""
Prompts = Sequence[tuple[str, float]]
Seeds = Sequence[tuple[int, float]]


class Changeable(TypedDict, total=False):
    """What a stream is opened with and an update can change."""

    prompts: Prompts | None
    negative_prompt: str | None
    timesteps: Sequence[int] | None
    t_index_list: Sequence[int] | None
    steps: int | None
    strength: float | None
    guidance_scale: float | None
    residual: Residual | None
    delta: float | None
    seed: int | None
    seeds: Seeds | None
    blend: Blend | None
    renoise: bool | None
    control_scales: Sequence[float] | None
    image_prompts: ImagePrompt | Sequence[ImagePrompt] | None
    image_encoder: ImageEncoder | str | Path | None
    skip_similar: Similar | bool | None


class UpdateOptions(Changeable, total=False):
    """The options of `Stream.update`; None leaves what it is."""

    prompt: str | None


class StreamOptions(Changeable, total=False):
    """The options of `Pipeline.stream`, where they are explained; None is the default of each."""

    width: int | None
    height: int | None
    control: Control | Sequence[Control] | None
    loras: Lora | Sequence[Lora] | None
    output: Output | None


class OpenOptions(LoadOptions, StreamOptions, total=False):
    """The options of `nativesd.stream`."""


ELSEWHERE_TOO = {
    **ELSEWHERE,
    "guidance": "guidance_scale", "cfg_type": "residual", "num_inference_steps": "steps, or timesteps",
    "do_add_noise": "renoise",
    "prompt_list": "prompts", "seed_list": "seeds", "output_type": "output", "lora_dict": "loras",
    "similar_image_filter_threshold": "skip_similar, with nativesd.Similar(threshold)",
    "ipadapter_config": "image_prompts, with nativesd.ImagePrompt(adapter, picture)",
    "controlnet_config": "control, with nativesd.Control(model, image)",
    "enable_similar_image_filter": "skip_similar", "prompt_interpolation_method": "blend",
}  # fmt: skip
"""The names that StreamDiffusion and its forks have for what is called otherwise here."""
ELSEWHERE_TOO.pop("prompts")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a text, not {shown(value)}")
    return value


def _weighted_texts(name: str, value: Any) -> Weighted:
    return tuple((_text(name, text), weight) for text, weight in _weighted(name, value, "text"))


def _seed(name: str, value: Any) -> int:
    number = to_whole(name, value)
    if not 0 <= number < 2**63:  # what a torch generator of the CPU takes
        raise UsageError(f"{name} must be between 0 and 2^63 - 1, not {shown(value)}")
    return number


ONE: Mapping[str, tuple[str, Reader]] = {"prompt": ("prompts", _text), "seed": ("seeds", _seed)}
"""Options that say one, where others say several with their weights."""


def _weighted_seeds(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    return tuple((_seed(name, seed), weight) for seed, weight in _weighted(name, value, "seed"))


def _weighted(name: str, value: Any, what: str) -> list[tuple[Any, float]]:
    """Pairs of something and its weight, of which the sum is above 0."""
    pairs = [tuple(pair) if is_list(pair) else () for pair in value] if is_list(value) else []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"{name} must be pairs of a {what} and its weight, not {shown(value)}")
    out = [(thing, float(real(0)(f"a weight of {name}", weight))) for thing, weight in pairs]
    if sum(weight for _, weight in out) <= 0:
        raise UsageError(f"the weights of {name} must not all be 0")
    return out


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    if not is_list(value):
        raise UsageError(f"{name} must be whole numbers, one for each slot, not {shown(value)}")
    return tuple(to_whole(name, each) for each in value)


def _scales(name: str, value: Any) -> tuple[float, ...]:
    if not is_list(value):
        raise UsageError(f"{name} must be numbers, one for each control, not {shown(value)}")
    return tuple(float(real(-math.inf)(name, each)) for each in value)


def _similar(name: str, value: Any) -> Similar | None:
    """A `Similar`; True is one with its defaults, False none."""
    if isinstance(value, bool):
        return Similar() if value else None
    if not isinstance(value, Similar):
        raise UsageError(f"{name} must be nativesd.Similar(threshold, max_skip), or True or False, not {shown(value)}")
    return Similar(
        threshold=real(-1, 1)(f"the threshold of {name}", value.threshold),
        max_skip=whole(0)(f"the max_skip of {name}", value.max_skip),
        measure=one_of(*get_args(Measure))(f"the measure of {name}", value.measure),
        seed=to_whole(f"the seed of {name}", value.seed),
    )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Everything that a stream is asked for: a field's type, what reads it (None aside), and its default."""

    prompts: Annotated[Weighted, _weighted_texts] = (("", 1.0),)
    negative_prompt: Annotated[str, _text] = ""
    timesteps: Annotated[tuple[int, ...] | None, _numbers] = None
    t_index_list: Annotated[tuple[int, ...] | None, _numbers] = None
    steps: Annotated[int | None, whole(1)] = None
    strength: Annotated[float | None, real(0, 1, above=True)] = None
    width: Annotated[int | None, whole(1)] = None
    height: Annotated[int | None, whole(1)] = None
    guidance_scale: Annotated[float, real(0)] = 1.0
    residual: Annotated[Residual, one_of(*get_args(Residual))] = "self"
    delta: Annotated[float, real(0)] = 1.0
    seeds: Annotated[tuple[tuple[int, float], ...], _weighted_seeds] = ((2, 1.0),)
    blend: Annotated[Blend, one_of(*get_args(Blend))] = "linear"
    renoise: Annotated[bool, flag] = True
    control: Annotated[Sequence[Control], read_controls] = ()
    control_scales: Annotated[tuple[float, ...] | None, _scales] = None
    image_prompts: Annotated[Sequence[ImagePrompt], read_image_prompts] = ()
    image_encoder: Annotated[ImageEncoder | str | Path | None, read_image_encoder] = None
    skip_similar: Annotated[Similar | None, _similar] = None
    loras: Annotated[Sequence[tuple[str, float, float]] | None, read_loras] = None
    output: Annotated[Output, one_of(*OUTPUTS)] = "pil"

    def ladder(self, config: SchedulerConfig) -> Ladder:
        """The noise levels of the slots. Raises UsageError for such as cannot be."""
        if self.timesteps is not None:
            return make_ladder(config, self.timesteps)
        if self.t_index_list is not None:
            return make_ladder(config, timesteps_of_indices(config, self.t_index_list))
        steps = STEPS if self.steps is None else self.steps
        strength = STRENGTH if self.strength is None else self.strength
        return make_ladder(config, timesteps_of_strength(config, steps, strength))


def check_option(name: str, value: Any, called: str) -> None:
    """Raise UsageError for a value that an option of a stream cannot have; the message calls the option `called`."""
    read = ONE[name][1] if name in ONE else readers_of(Asked)[name]
    read(called, value)


def check_stream(options: Mapping[str, Any]) -> Asked:
    """What is asked of a new stream. Raises UsageError for what cannot be, naming the argument."""
    refuse_unknown(options, ["prompt", *StreamOptions.__annotations__], ELSEWHERE_TOO)
    return _replace(Asked(), options)


def check_update(asked: Asked, options: Mapping[str, Any]) -> Asked:
    """`asked` with the changes of an update. Raises UsageError for what cannot be, or not after the beginning."""
    for name in options:
        if name in StreamOptions.__annotations__ and name not in UpdateOptions.__annotations__:
            raise UsageError(f"{name} is what a stream begins with, and cannot change: open another stream")
    refuse_unknown(options, list(UpdateOptions.__annotations__), ELSEWHERE_TOO)
    return _replace(asked, options)


def _replace(asked: Asked, options: Mapping[str, Any]) -> Asked:
    given = {name: value for name, value in options.items() if value is not None}
    for one, (several, read) in ONE.items():
        if one in given:
            if several in given:
                raise UsageError(f"pass {one} or {several}, not both")
            given[several] = ((read(one, given.pop(one)), 1.0),)
    ways = [way for way in WAYS if any(name in given for name in way)]
    if len(ways) > 1:
        both = " and ".join(name for way in ways for name in way if name in given)
        raise UsageError(f"pass one of timesteps, t_index_list, or steps and strength, not {both}")
    rows = readers_of(Asked)
    read_options = {name: rows[name](name, value) for name, value in given.items()}
    if ways:
        others = {name: None for way in WAYS if way not in ways for name in way}
        read_options = others | read_options
    return dataclasses.replace(asked, **read_options)
