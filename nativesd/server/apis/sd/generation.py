"""txt2img and img2img: from A1111's fields to the calls of a job, and from these to its answer."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nativesd.errors import UsageError
from nativesd.pictures.infotext import schedule_named
from nativesd.pictures.programs.a1111 import automatic_schedule
from nativesd.pictures.programs.values import noise
from nativesd.pipeline.asked.hires import UPSCALERS, Hires
from nativesd.pipeline.asked.readers import read_emphasis, whole
from nativesd.sampling.names import find_sampler, find_schedule
from nativesd.sampling.options import Sampling
from nativesd.sampling.variation import Variation
from nativesd.server.apis.sd.controlnet import read_units
from nativesd.server.apis.sd.fields import IMG2IMG, TXT2IMG, read_fields
from nativesd.server.apis.sd.info import infotext_info
from nativesd.server.apis.sd.soft import SOFT, read_soft
from nativesd.server.apis.sd.style import answered
from nativesd.server.context import Context, context_of
from nativesd.server.jobs.job import Job
from nativesd.server.jobs.order import Call, Order, Part
from nativesd.server.wire.answers import Refusal, answering, json_answer, require_done
from nativesd.server.wire.bodies import data_of, read_object
from nativesd.server.wire.fields import words
from nativesd.server.wire.waiting import wait_for

NAMES = {"num_images": "batch_size times n_iter"}
PLAIN = ("steps", "negative_prompt", "width", "height", "eta")
RESIZE = ("resize", "crop", "fill")
FILLS = ("fill", "original", "noise", "nothing")
SCRIPTS = ("controlnet", SOFT)
OFF: Mapping[str, Any] = {
    "adetailer": False, "animatediff": False, "refiner": False, "seed": False, "sampler": False, "hypertile": False,
    "comments": False, "extra options": False, "never oom integrated": False,
}  # fmt: skip
"""Scripts that clients send switched off: their first argument is this then. Switched on they are 422."""


def routes() -> list[Route]:
    """The API's addresses."""
    return [
        Route("/sdapi/v1/txt2img", txt2img, methods=["POST"]),
        Route("/sdapi/v1/img2img", img2img, methods=["POST"]),
    ]


@dataclass
class Asked:
    """A request as it was understood."""

    fields: Mapping[str, Any]
    order: Order
    unheeded: list[str] = field(default_factory=list)

    def echo(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The request, as A1111 repeats it; without pictures, unless they are asked for."""
        keep = self.fields.get("include_init_images", False)
        return {**body, **({} if keep or "init_images" not in body else {"init_images": None, "mask": None})}


@answering(answered)
async def txt2img(request: Request) -> Response:
    """Pictures of a prompt."""
    return await _answer(request, from_text=True)


@answering(answered)
async def img2img(request: Request) -> Response:
    """Pictures of a prompt and a picture."""
    return await _answer(request, from_text=False)


async def _answer(request: Request, *, from_text: bool) -> Response:
    context = context_of(request)
    body = await read_object(request)
    asked = await run_in_threadpool(read_request, body, context, from_text=from_text)
    job = Job("sd", asked.order, name=asked.fields.get("force_task_id") or None, private=True)
    await wait_for(request, context.desk, job)
    require_done(job)
    parts = cast("list[Part]", job.value)
    info = infotext_info(parts, asked.fields, [*asked.unheeded, *job.notes])
    images = [data_of(made.data) for made in job.pictures] if asked.fields.get("send_images", True) else []
    return json_answer({"images": images, "parameters": asked.echo(body), "info": json.dumps(info)})


def read_request(body: Mapping[str, Any], context: Context, *, from_text: bool) -> Asked:
    """From A1111's fields to calls. Raises UsageError that names the field, Refusal for a sampler or script."""
    fields, unheeded = read_fields(body, TXT2IMG if from_text else IMG2IMG)
    settings = {**context.options, **fields.get("override_settings", {})}
    options, model = _from_settings(settings, unheeded, context)
    options |= _sampling(fields) | _noise(fields)
    if fields.get("tiling"):
        options["tiling"] = "xy"
    options |= {
        name: fields[theirs]
        for name, theirs in {**{name: name for name in PLAIN}, "guidance_scale": "cfg_scale"}.items()
        if theirs in fields
    }  # fmt: skip
    intake = context.intake()
    if from_text:
        if fields.get("enable_hr"):
            upscaler = context.catalogue.upscaler(fields.get("hr_upscaler") or "Latent", UPSCALERS)
            options["hires"] = _hires(fields, upscaler)
    else:
        options |= _picture(fields, intake, unheeded)
    refiner = fields.get("refiner_checkpoint", "")
    if refiner in ("", "None"):
        refiner = None
    else:
        refiner = context.catalogue.model(refiner)
        options["refiner_at"] = fields.get("refiner_switch_at", 0.8)
    if any(fields.get("styles", ())):
        unheeded.append("styles")
    options["lora_dirs"] = list(context.settings.lora_dirs)
    varied = _variation(fields, options.pop("ensd", 0))
    prompt = fields.get("prompt", "")
    context.require_bounded(Order(model, [Call(prompt, options)], refiner), NAMES)  # hints are made in the size next
    cut = "only_masked" in options  # hints are of the whole picture then, and are cut with it
    size = (None, None) if cut else (options.get("width"), options.get("height"))
    scripts = _scripts(fields)
    options |= read_units(scripts["controlnet"], context, intake, size, unheeded)
    options |= read_soft(scripts[SOFT], masked="mask" in options, unheeded=unheeded)

    seed = fields.get("seed", -1)
    seed = secrets.randbits(32) if seed == -1 else seed
    batch, rounds = fields.get("batch_size", 1), fields.get("n_iter", 1)
    if batch * rounds > context.settings.limits.batch:
        raise UsageError(f"batch_size times n_iter must be at most {context.settings.limits.batch} on this server")
    calls = [Call(prompt, {**options, **_seeds(seed, varied, i * batch), "num_images": batch}) for i in range(rounds)]
    order = Order(model, calls, refiner)
    context.require_bounded(order, NAMES)
    return Asked(fields, order, unheeded)


def _from_settings(
    settings: Mapping[str, Any], unheeded: list[str], context: Context
) -> tuple[dict[str, Any], str | None]:
    """Options of A1111's settings, and the model."""
    options: dict[str, Any] = {}
    model = None
    for name, value in settings.items():
        match name:
            case "sd_model_checkpoint":
                model = context.catalogue.model(value) if isinstance(value, str) and value else None
            case "CLIP_stop_at_last_layers":
                skip = whole(1, 12)(name, value)
                options |= {"clip_skip": skip} if skip > 1 else {}
            case "randn_source":
                options["noise"] = noise(name, words(name, value))
            case "emphasis":
                options["emphasis"] = read_emphasis(name, value)
            case "eta_noise_seed_delta":
                options["ensd"] = whole(0, 1 << 32)(name, value)
            case "sd_vae" if value in ("Automatic", "None", None, ""):
                pass
            case _:
                unheeded.append(f"override_settings.{name}")
    return options, model


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler and the schedule.

    "Automatic" is what A1111 takes for the sampler where that is Karras' or the exponential one, else the model's own,
    which for the models that A1111 knows is the uniform one that it takes.
    """
    name = fields.get("sampler_name") or fields.get("sampler_index") or None
    scheduler = fields.get("scheduler") or None
    if name is None:
        return {} if scheduler is None or scheduler.lower() == "automatic" else {"schedule": _schedule(scheduler)}
    if name.lower() == "automatic":
        return {}
    try:
        choice = find_sampler(name)
    except UsageError:
        raise Refusal(404, "Sampler not found", field="sampler_name") from None
    options: dict[str, Any] = {"sampler": name}
    if scheduler is not None and scheduler.lower() != "automatic":
        options["schedule"] = _schedule(scheduler)
    elif choice.kind is None and (automatic := automatic_schedule(name)) != "normal":
        options["schedule"] = automatic
    find_sampler(name, options.get("schedule"))
    return options


def _noise(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Churn and the noise's factor; an s_tmax of 0 is no bound."""
    most = fields.get("s_tmax") or math.inf
    asked = Sampling(fields.get("s_churn", 0.0), fields.get("s_tmin", 0.0), most, fields.get("s_noise", 1.0))
    return {} if asked == Sampling() else {"sampling": asked}


def _schedule(name: str) -> str:
    try:
        return find_schedule(schedule_named(name))
    except UsageError:
        raise Refusal(404, "Scheduler not found", field="scheduler") from None


def _variation(fields: Mapping[str, Any], ensd: int) -> Variation:
    """How the noise departs from that of the seeds."""
    width, height = (max(fields.get(f"seed_resize_from_{side}", 0), 0) for side in "wh")
    strength, seed = fields.get("subseed_strength", 0.0), fields.get("subseed", -1)
    seed = secrets.randbits(32) if seed == -1 else seed
    return Variation(seed, strength, (width, height) if width and height else None, ensd)


def _seeds(seed: int, varied: Variation, before: int) -> dict[str, Any]:
    """The seed of a batch that comes after so many pictures; where it is varied, the other one counts up instead.

    As A1111's modules/processing.py, process_images_inner.
    """
    if varied == Variation(varied.seed):
        return {"seed": seed + before}
    if not varied.strength:
        return {"seed": seed + before, "variation": varied}
    return {"seed": seed, "variation": dataclasses.replace(varied, seed=(varied.seed or 0) + before)}


def _hires(fields: Mapping[str, Any], upscaler: str) -> Hires:
    """The second pass.

    "Use same scheduler", and none, is what the first pass was asked for; where that is "Automatic", every sampler has
    its own (`hr_scheduler` in modules/processing.py, get_sigmas in modules/sd_samplers_kdiffusion.py).
    """
    first = fields.get("sampler_name") or fields.get("sampler_index") or ""
    sampler, schedule = fields.get("hr_sampler_name") or None, fields.get("hr_scheduler") or None
    if sampler == "Use same sampler":
        sampler = None
    if schedule is None or schedule.lower() == "use same scheduler":
        schedule = fields.get("scheduler") or "automatic"
        if sampler is None or _says_schedule(first):
            schedule = None
    if sampler is not None and _says_schedule(sampler):
        schedule = None
    elif schedule is not None:
        schedule = _schedule(schedule) if schedule.lower() != "automatic" else _automatic(sampler or first)
    return Hires(
        scale=fields.get("hr_scale", 2.0),
        strength=fields.get("denoising_strength", 0.75),
        steps=fields.get("hr_second_pass_steps") or None,
        upscaler=upscaler,
        width=fields.get("hr_resize_x") or None,
        height=fields.get("hr_resize_y") or None,
        sampler=sampler,
        schedule=schedule,
        prompt=fields.get("hr_prompt") or None,
        negative_prompt=fields.get("hr_negative_prompt") or None,
    )


def _automatic(sampler: str) -> str | None:
    """The schedule that A1111 takes for a sampler; None where none is named, for the model's own."""
    return None if sampler.lower() in ("", "automatic") else automatic_schedule(find_sampler(sampler).sampler.name)


def _says_schedule(sampler: str) -> bool:
    """Whether a sampler's name says a schedule, such as "DPM++ 2M Karras"."""
    return bool(sampler) and sampler.lower() != "automatic" and find_sampler(sampler).kind is not None


def _picture(fields: Mapping[str, Any], intake: Any, unheeded: list[str]) -> dict[str, Any]:
    """The picture to begin from, and its mask."""
    given = fields.get("init_images", [])
    if not given:
        raise Refusal(404, "Init image not found", field="init_images")
    if len(given) > 1:
        unheeded.append(f"init_images (taken: the first of {len(given)})")
    options: dict[str, Any] = {
        "image": intake.picture("init_images", given[0]),
        "strength": fields.get("denoising_strength", 0.75),
        "steps_as": "a1111",
    }
    if "image_cfg_scale" in fields:
        options["image_guidance_scale"] = fields["image_cfg_scale"]
    if (mode := fields.get("resize_mode", 0)) == 3:
        unheeded.append("resize_mode 3, on latents (taken: 0)")
    else:
        options["resize"] = RESIZE[mode]
    if fields.get("mask"):
        mask = binary_mask(intake.picture("mask", fields["mask"]))
        options["mask"] = ImageOps.invert(mask) if fields.get("inpainting_mask_invert") else mask
        options["mask_blur"] = fields.get("mask_blur", 4)
        options["mask_fill"] = FILLS[fields.get("inpainting_fill", 0)]
        if fields.get("inpaint_full_res", True):
            options["only_masked"] = fields.get("inpaint_full_res_padding", 0)
    return options


def binary_mask(mask: Image.Image) -> Image.Image:
    """A mask as A1111 reads it (create_binary_mask of modules/processing.py): by its alpha where that varies."""
    if mask.has_transparency_data:
        alpha = mask.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha.point(lambda value: 255 if value > 128 else 0)
    return mask.convert("L")


def _scripts(fields: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The arguments of the scripts that are here. Raises Refusal for a script that is not here."""
    if fields.get("script_name"):
        raise Refusal(422, f"Script '{fields['script_name']}' not found", field="script_name")
    given: dict[str, list[Any]] = {name: [] for name in SCRIPTS}
    for name, script in fields.get("alwayson_scripts", {}).items():
        arguments = script.get("args", []) if isinstance(script, dict) else script
        if name.lower() == SOFT and isinstance(arguments, dict):
            arguments = [arguments]
        if not isinstance(arguments, list):
            raise UsageError(f"alwayson_scripts.{name}.args must be a list")
        if name.lower() in SCRIPTS:
            given[name.lower()] += arguments
        elif name.lower() not in OFF or arguments[:1] not in ([], [OFF[name.lower()]]):
            raise Refusal(422, f"always on script {name} not found", field="alwayson_scripts")
    return given
