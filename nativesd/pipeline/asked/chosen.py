"""What a call leaves open, chosen by the model; and all of it, as a picture's parameters keep it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nativesd.config import UNetConfig
from nativesd.diffusion.config import EDITING, PipelineConfig
from nativesd.diffusion.control import Control
from nativesd.diffusion.images.layers import layers_text
from nativesd.diffusion.images.prompts import ImagePrompt, one_or_several
from nativesd.diffusion.regions import Region
from nativesd.diffusion.start import Start
from nativesd.errors import UsageError
from nativesd.pipeline.asked.arguments import Checked
from nativesd.pipeline.asked.inputs import Inputs, unheeded
from nativesd.pipeline.asked.worded import record_text
from nativesd.sampling.names import Choice, find_own, find_sampler, find_schedule
from nativesd.sampling.published import Kind
from nativesd.weights.files.hashes import known_hashes
from nativesd.weights.lora.resolve import Use


@dataclass(frozen=True)
class Chosen:
    """Steps, guidance, sampler and schedule of a call; `inferred` says of what was not asked for why it is so."""

    steps: int
    guidance_scale: float
    choice: Choice
    kind: Kind
    inferred: Mapping[str, str]


def choose(config: PipelineConfig, asked: Checked) -> Chosen:
    """What was asked for, and else what the model is used with. Raises UsageError where it names no known sampler."""
    inferred = dict(config.inferred)
    steps, guidance_scale = asked.steps, asked.guidance_scale
    if steps is None:
        steps = config.default_steps
        inferred.setdefault("steps", f"{steps}, the default of {'few-step ' if config.few_steps else ''}models")
    if guidance_scale is None:
        guidance_scale = config.default_guidance
        inferred.setdefault("guidance_scale", f"{guidance_scale:g}, the default of such models")
    choice, kind = choose_sampler(config, asked.sampler, asked.schedule)
    if asked.sampler is None:
        inferred.setdefault("sampler", f"{choice.sampler.name}, for the model's {config.scheduler.class_name}")
    return Chosen(steps, guidance_scale, choice, kind, inferred)


def choose_sampler(config: PipelineConfig, name: str | None, schedule: str | None) -> tuple[Choice, Kind]:
    """The sampler and the schedule: as asked for, else the model's own."""
    own = config.scheduler
    kind = None if schedule is None else find_schedule(schedule)
    published = find_own(own)
    if name is None and published is None:
        raise UsageError(f"{config.name} names the scheduler {own.class_name}, which is not supported: pass sampler=")
    choice = find_sampler(name or own.class_name, schedule)
    if choice.by_class and published is not None and choice.sampler is published.sampler and own.unsupported:
        raise UsageError(
            f"{config.name}: its scheduler_config.json has {', '.join(own.unsupported)}, with which "
            f"{own.class_name} cannot be run here: pass another sampler="
        )
    kind = choice.kind or kind or own.kind
    return choice, own.kind if kind == "automatic" else kind


def recorded(
    config: PipelineConfig,
    asked: Checked,
    inputs: Inputs,
    chosen: Chosen,
    start: Start | None,
    loras: Sequence[Use],
    words: Collection[str],
) -> dict[str, Any]:
    """A result's parameters: what made its pictures, as far as it is not None, and the notes on it."""
    unused = unheeded(config, asked, chosen.steps, chosen.guidance_scale, chosen.choice.sampler, chosen.kind, words)
    parameters = {
        "prompt": asked.prompts[0] if asked.one_prompt else asked.each(asked.prompts),
        "negative_prompt": (asked.negative_prompt[0] if asked.one_negative else asked.each(asked.negative_prompt)),
        "steps": chosen.steps,
        "sampler": chosen.choice.shown,
        "schedule": chosen.kind,
        "guidance_scale": chosen.guidance_scale,
        "seed": asked.seeds[0],
        "width": inputs.width,
        "height": inputs.height,
        "model": config.name,
        "model_hash": None if config.file is None or (known := known_hashes(config.file)) is None else known.auto_v2,
        "noise": asked.noise,
        "sdxl": None if asked.sdxl is None else asked.sdxl.chosen(),
        "variation": None if asked.variation is None else asdict(asked.variation),
        "regions": [_region(region) for region in asked.regions] or None,
        "tiling": asked.tiling,
        "tiles": None if asked.tiles is None else (asked.tiles.size, asked.tiles.overlap),
        "strength": None if start is None else start.strength,
        "steps_as": None if start is None or asked.steps_as == "diffusers" else asked.steps_as,
        "guidance": " ".join(map(record_text, asked.guidance)) or None,
        "savings": " ".join(map(record_text, asked.savings)) or None,
        "guidance_rescale": asked.guidance_rescale or None,
        "eta": asked.eta,
        "sampling": asked.sampling.chosen() or None,
        "clip_skip": asked.clip_skip,
        "emphasis": None if asked.emphasis == "original" else asked.emphasis,
        "literal": asked.literal or None,
        "mask_blur": None if inputs.mask is None else asked.mask_blur,
        "mask_fill": None if asked.mask_fill == "original" else asked.mask_fill,
        "only_masked": asked.only_masked,
        "soft_inpaint": None if asked.soft_inpaint is None else asdict(asked.soft_inpaint),
        "image_guidance_scale": asked.image_guidance_scale if config.unet.in_channels == EDITING else None,
        "hires": None if asked.hires is None else asked.hires.fields(),
        "refiner": None if asked.refiner is None else asked.refiner.config.name,
        "refiner_at": None if asked.refiner is None else asked.refiner_at,
        "loras": {use.lora.path.stem: (use.unet, use.text_encoder) for use in loras} or None,
        "image_prompts": [Path(str(getattr(each.adapter, "name", each.adapter))).stem for each in asked.image_prompts]
        or None,
        "image_prompt_scales": [each.scale for each in asked.image_prompts] or None,
        "image_prompt_settings": [_prompted(each, config.unet) for each in asked.image_prompts] or None,
        "control": [str(getattr(each.model, "name", each.model)) for each in asked.control] or None,
        "control_scales": [each.scale for each in asked.control] or None,
        "control_settings": [_steered(each) for each in asked.control] or None,
        "guess_mode": (asked.guess_mode and bool(asked.control)) or None,
        "inferred": dict(chosen.inferred),
        "notes": [*inputs.notes, *unused],
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _steered(control: Control) -> dict[str, Any]:
    """What a control was asked for beside its model, picture and scale."""
    said = {"preprocess": control.preprocess, "kind": control.kind}
    return {"start": control.start, "end": control.end, **{name: value for name, value in said.items() if value}}


def _prompted(prompt: ImagePrompt, unet: UNetConfig) -> dict[str, Any]:
    """The same of an image prompt; of several pictures and masks how many they were."""
    counts = {
        "pictures": len(prompt.picture) if isinstance(prompt.picture, list | tuple) else 1,
        "masks": 0 if prompt.mask is None else len(one_or_several(prompt.mask)),
    }
    said = {
        "layers": layers_text(unet, prompt.layers),
        "weight_type": prompt.weight_type,
        "crop": prompt.crop,
        "lora_scale": prompt.lora_scale,
        "identity": prompt.identity is not None,
        **counts,
    }
    usual = {"layers": None, "weight_type": "linear", "crop": "center", "lora_scale": 1.0, "identity": False,
             "pictures": 1, "masks": 0}  # fmt: skip
    unusual = {name: value for name, value in said.items() if value != usual[name]}
    return {"start": prompt.start, "end": prompt.end, **unusual}


def _region(region: Region) -> dict[str, Any]:
    """A region as a picture's parameters keep it, which have no room for a mask."""
    where: dict[str, Any] = {"mask": True} if region.box is None else {"box": list(region.box)}
    return {"prompt": region.prompt, **where, "weight": region.weight}
