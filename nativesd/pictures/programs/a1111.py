"""A1111's fields, and those of its forks and followers, as options; what a text leaves out is its maker's default."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from nativesd.errors import UsageError
from nativesd.pictures.embedded import Texts
from nativesd.pictures.infotext import (
    ONLY_MASKED,
    SAMPLING_FIELDS,
    SDXL_FIELDS,
    SOFT_INPAINT,
    SOFT_INPAINT_FIELDS,
    Infotext,
    parse_infotext,
    schedule_named,
)
from nativesd.pictures.programs.guided import about_guidance, guidance_of
from nativesd.pictures.programs.parts import merging, regions, tiles, tiling, unit
from nativesd.pictures.programs.recipe import Recipe, integer, json_object, real
from nativesd.pictures.programs.values import as_it_is, emphasis, masked_content, noise, schedule_type, size, truth

Maker = Literal["nativesd", "a1111", "comfyui", "other"]
"""Whose conventions hold for what a text does not say; "other" is a program whose conventions are not known."""


def read(texts: Texts) -> Recipe | None:
    """The recipe; None: there is no text, or it is JSON, or one without a single field."""
    text = texts.parameters
    if not text or json_object(text) is not None:
        return None
    info = parse_infotext(text)
    if not info.fields:
        return None
    options, unheeded = generation_options(info)
    return Recipe("A1111", info.prompt + str(options.pop("loras", "")), info.negative_prompt, options, unheeded)


_OPTIONS: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "steps": ("steps", integer),
    "sampler": ("sampler", as_it_is),
    "cfg scale": ("guidance_scale", real),
    "seed": ("seed", integer),
    "denoising strength": ("strength", real),
    "clip skip": ("clip_skip", integer),
    "cfg rescale": ("guidance_rescale", real),
    "cfg rescale φ": ("guidance_rescale", real),
    "guidance rescale": ("guidance_rescale", real),
    "denoising steps as": ("steps_as", as_it_is),
    "guidance": ("guidance", as_it_is),
    "savings": ("savings", as_it_is),
    "token merging ratio": ("savings", merging),
    "tiling": ("tiling", tiling),
    "tiles": ("tiles", tiles),
    "regions": ("regions", regions),
    "eta": ("eta", real),
    "eta ddim": ("eta", real),
    "rng": ("noise", noise),
    "image cfg scale": ("image_guidance_scale", real),
    "mask blur": ("mask_blur", integer),
    "masked area padding": ("only_masked", integer),
    "masked content": ("mask_fill", masked_content),
    "emphasis": ("emphasis", emphasis),
    "literal prompt": ("literal", truth),
    "model": ("model", as_it_is),
    "refiner switch at": ("refiner_at", real),
}
"""Fields, in lower case, that are one option."""

_HIRES: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "hires steps": ("steps", integer),
    "hires upscaler": ("upscaler", as_it_is),
    "hires sampler": ("sampler", as_it_is),
    "hires schedule type": ("schedule", schedule_type),
    "hires prompt": ("prompt", as_it_is),
    "hires negative prompt": ("negative_prompt", as_it_is),
    "hires cfg scale": ("guidance_scale", real),
}

_SDXL: dict[str, tuple[str, Callable[[str, str], object]]] = {
    name.lower(): (field, as_it_is if "prompt" in field else real if "score" in field else size)
    for field, name in SDXL_FIELDS.items()
}

_VARIATION: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "variation seed": ("seed", integer),
    "variation seed strength": ("strength", real),
    "seed resize from": ("resize_from", size),
    "ensd": ("ensd", integer),
}

_SAMPLING: dict[str, tuple[str, Callable[[str, str], object]]] = {
    name.lower(): (field, real) for field, name in SAMPLING_FIELDS.items()
}

_SOFT: dict[str, tuple[str, Callable[[str, str], object]]] = {
    SOFT_INPAINT.lower(): ("enabled", truth),
    **{name.lower(): (field, real) for field, name in SOFT_INPAINT_FIELDS.items()},
}

_RECORDS = {
    "hires": _HIRES, "variation": _VARIATION, "sdxl": _SDXL, "sampling": _SAMPLING, "soft_inpaint": _SOFT,
}  # fmt: skip
"""Fields that belong together, by the option that they are."""

_PASSED = {"image prompts": "--image-prompt", "control": "--control"}
"""Fields that name models which act by a picture, and where these are given."""

_HARMLESS = frozenset(
    {
        "app", "aspect ratio", "lora hashes", "pipeline", "backend", "operations", "parser", "comment",
        "batch pos", "batch size", "civitai metadata", "civitai resources", "created date",
        "hashes", "init image hash", "model hash", "negative template", "orientation", "template", "ti", "ti hashes",
        "user", "vae hash", "version",
    }
)  # fmt: skip
"""Fields that name things or tell circumstances, and do not change the picture."""

_NEUTRAL: dict[str, frozenset[str]] = {
    name: frozenset(values)
    for names, values in (
        (("ensd", "ngms", "token merging ratio", "token merging ratio hr", "variation seed strength"), ("0", "0.0")),
        (("schedule min sigma", "schedule max sigma", "schedule rho"), ("0", "0.0")),
        (("sigma churn", "sigma tmin", "sigma tmax", "skip early cfg"), ("0", "0.0")),
        (("sigma noise",), ("1", "1.0")),
        (("beta schedule alpha", "beta schedule beta"), ("0.6",)),
        (("tiling", "face restoration", "discard penultimate sigma", "sgm noise multiplier"), ("false", "none")),
        (("seed resize from",), ("0x0", "-1x-1")),
        (("inpaint area",), (ONLY_MASKED.lower(),)),  # "masked area padding" says so too
        (("fp8 weight",), ("disable",)),
        (("vae encoder", "vae decoder"), ("full",)),
        (("vae", "refiner"), ("none", "automatic")),
        (("hires sampler",), ("use same sampler",)),
        (("hires schedule type",), ("use same scheduler",)),
        (("hires checkpoint",), ("use same checkpoint",)),
        (("hires module 1",), ("use same choices", "built-in")),
        (("denoise",), ("1", "1.0", "1.00")),
    )
    for name in names
}
"""Values of other fields, in lower case, that mean no change (defaults of A1111's and Forge's shared_options.py)."""


def generation_options(info: Infotext) -> tuple[dict[str, Any], list[str]]:
    """The options that make the picture again, and the names of the fields that would change it but have no option.

    Options, each where the text says or implies it: steps, sampler, schedule, guidance_scale, seed, width, height,
    strength, clip_skip, guidance_rescale, eta, noise ("cpu", ...), emphasis, literal, mask_blur,
    image_guidance_scale, hires, variation, sdxl, sampling, soft_inpaint, guidance (a text) and model (a name, not a
    path). `variation` has fields of a `Variation`, `sdxl` of an `SDXL`, `sampling` of a `Sampling`, `soft_inpaint` of a
    `SoftInpaint`.
    `hires` is a dict with upscale or width and height (one of them may be 0: by the ratio), steps, upscaler and
    strength, which is what "Denoising strength" means beside it. Names of fields match in any case. A fused sampler
    such as "DPM++ 2M Karras" stays one name, without a schedule.

    What a text leaves out is its maker's default. A1111, and its forks: noise of the GPU; a schedule that is
    "Automatic" is the sampler's default there, and one that is not named at all is older than those defaults, so
    uniform. ComfyUI, whose samplers are spelt like "dpmpp_2m": noise of the CPU, and the normal schedule, which nodes
    do not write; Civitai's generator is taken for it. Pictures of this package: noise of the CPU. Other programs: as
    it stands there.

    Raises UsageError for steps, a seed, a scale or a size that cannot be; of another field that is named, and the
    default taken.
    """
    fields = {name.lower(): (name, value.strip()) for name, value in info.fields.items()}
    options: dict[str, Any] = {}
    records: dict[str, dict[str, object]] = {name: {} for name in _RECORDS}
    hires, variation, sdxl = records["hires"], records["variation"], records["sdxl"]
    unheeded: list[str] = []
    schedule: str | None = None
    for key, (name, value) in fields.items():
        if not value or key in _HARMLESS or value.lower() in _NEUTRAL.get(key, ()):
            continue
        try:
            if about_guidance(key):
                continue
            if key in _OPTIONS:
                option, convert = _OPTIONS[key]
                options[option] = convert(name, value)
            elif (record := next((r for r, known in _RECORDS.items() if key in known), None)) is not None:
                option, convert = _RECORDS[record][key]
                records[record][option] = convert(name, value)
            elif key == "hires upscale":
                hires |= _hires_upscale(value)
            elif key == "size":
                options["width"], options["height"] = size(name, value)
            elif key == "hires resize":
                hires["width"], hires["height"] = size(name, value)
            elif key in ("schedule type", "scheduler"):
                schedule = schedule_named(value)
            elif key == "refiner":
                unheeded.append(f"{name} {value}: pass it with --refiner")
            elif key in _PASSED:
                unheeded.append(f"{name} {value}: pass it again with its picture ({_PASSED[key]})")
            elif re.fullmatch(r"controlnet \d+", key):
                unheeded += [f"{name}: {words}"] if (words := unit(value)) else []
            elif key == "loras":
                tags = [tag for tag in value.split() if tag.rpartition(":")[0] not in info.prompt]
                options["loras"] = "".join(f" {tag}" for tag in tags)
            else:
                unheeded.append(name)
        except UsageError as error:
            if key in _CORE:
                raise
            unheeded.append(f"{error} (taken: the default)")
    guidance, unread = guidance_of({key: value for key, (_, value) in fields.items()}, int(options.get("steps", 20)))
    if guidance or "guidance" in options:
        options["guidance"] = " ".join(filter(None, (str(options.get("guidance", "")), guidance)))
    unheeded += unread
    _name_model(options, unheeded, {key: value for key, (_, value) in fields.items()})

    if "first pass size" in fields and "strength" in options:  # A1111's upscaling before "Hires" fields existed
        del options["strength"]
        unheeded.append(fields["denoising strength"][0])
    if hires:
        if "strength" in options:
            hires["strength"] = options.pop("strength")
        options["hires"] = hires
    if sdxl:
        options["sdxl"] = sdxl
    if records["soft_inpaint"].pop("enabled", False):
        options["soft_inpaint"] = records["soft_inpaint"]
    if records["sampling"]:
        options["sampling"] = records["sampling"]
    if variation.get("strength") or variation.keys() & {"resize_from", "ensd"}:
        options["variation"] = variation
    maker = _maker({key: value for key, (_, value) in fields.items()})
    if maker == "comfyui":
        options.setdefault("emphasis", "comfyui")
    if maker == "comfyui" and options.get("strength") == 1:  # all noise, so no picture to start from
        del options["strength"]
    if "strength" in options:
        options.setdefault("steps_as", {"a1111": "a1111", "comfyui": "all"}.get(maker, "diffusers"))
    schedule = _meant_schedule(str(options.get("sampler", "")), schedule, maker)
    if schedule is not None:
        options["schedule"] = schedule
    if maker != "other":
        options.setdefault("noise", {"a1111": "cuda", "comfyui": "comfyui"}.get(maker, "cpu"))
    place = fields.get("batch pos", ("", "0"))[1]
    if options.get("noise") == "comfyui" and place != "0":
        if place.isdecimal() and len(place) < 5:
            options["num_images"] = int(place) + 1  # one noise for all, of which the first are the same for fewer
            unheeded.append(f"Batch pos {place} (taken: the {place} before it too, as the noise is one for all)")
        else:
            unheeded.append(f"Batch pos {place}")
    return options, unheeded


_CORE = ("steps", "seed", "cfg scale", "size")
"""Fields without which there is no picture to repeat: what cannot be among them is an error."""


def _hires_upscale(value: str) -> dict[str, object]:
    """The scale of the second pass; some programs write the upscaler's name there."""
    try:
        return {"upscale": real("Hires upscale", value)}
    except UsageError:
        return {"upscaler": value}


def _name_model(options: dict[str, Any], unheeded: list[str], fields: Mapping[str, str]) -> None:
    """A hash alone is a model, too; and so is one among Civitai's resources."""
    if "model" in options:
        return
    if resource := re.search(
        r'"type": ?"checkpoint"[^}]*?"modelName": ?"([^"]+)"', fields.get("civitai resources", "")
    ):
        options["model"] = resource[1]
    elif fields.get("model hash"):
        options["model"] = f"of hash {fields['model hash']}"
    else:
        unheeded.append("the model, which is not named (taken: the one that is asked for)")


def _maker(fields: Mapping[str, str]) -> Maker:
    """Who wrote the fields (names in lower case), by the version's form and the sampler's spelling."""
    version = fields.get("version", "")
    civitai = not version and ("civitai resources" in fields or "civitai metadata" in fields)
    if version.startswith("nativesd"):
        return "nativesd"
    if "comfyui" in version.lower() or civitai or re.fullmatch(r"[a-z0-9_]+", fields.get("sampler", "")):
        return "comfyui"
    if "app" in fields or (version and not _A1111_VERSION.match(version)):
        return "other"
    return "a1111"


_A1111_VERSION = re.compile(r"(f|neo-?|v)?\d|[0-9a-f]{7,40}$")
"""A1111's such as v1.10.1, Forge's such as f2.0.1v1.10.1 or neo-2.2, and commits."""

# modules/sd_samplers_kdiffusion.py of A1111 1.9 and 1.10, the option "scheduler", names without blanks in lower case
_AUTOMATIC_IS = {
    **dict.fromkeys(("dpm++2m", "dpm++sde", "dpm++2sa", "dpm2", "dpm2a", "restart"), "karras"),
    **dict.fromkeys(("dpm++2msde", "dpm++2msdeheun", "dpm++3msde"), "exponential"),
    # timesteps of their own: modules/sd_samplers_timesteps.py, sd_samplers_lcm.py
    **dict.fromkeys(("ddim", "ddimcfg++", "plms", "unipc", "lcm"), "automatic"),
}
_FUSED = re.compile(
    r".[ _](karras|(poly)?exponential|((sgm|ddim)[ _]?)?uniform|simple|beta|normal"
    r"|linear[ _]quadratic|kl[ _]optimal|align[ _]your[ _]steps)$",
    re.IGNORECASE,
)


def automatic_schedule(sampler: str) -> str:
    """The schedule that A1111 takes for a sampler where "Automatic" is asked for."""
    return _AUTOMATIC_IS.get(re.sub(r"\s+", "", sampler.lower()), "normal")


def _meant_schedule(sampler: str, schedule: str | None, maker: Maker) -> str | None:
    """The schedule that a sampler ran with; None where its own name says it, or nothing does."""
    own = automatic_schedule(sampler)
    match maker:
        case "a1111" | "comfyui" if schedule in (None, "automatic") and _FUSED.search(sampler):
            return None
        case "a1111" if schedule == "automatic":
            return own
        case "a1111" | "comfyui" if schedule is None and sampler:
            return own if own == "automatic" and not sampler.islower() else "normal"
        case _:
            return schedule
