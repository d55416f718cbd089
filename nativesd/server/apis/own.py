"""The jobs of the server's own API: `POST /jobs` in the library's words, to be polled, followed and cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nativesd.diffusion.control import Control
from nativesd.diffusion.images.prompts import ImagePrompt
from nativesd.diffusion.prompting import SDXL
from nativesd.diffusion.regions import Region
from nativesd.diffusion.tiles import Tiles
from nativesd.errors import UsageError
from nativesd.pictures.soft import SoftInpaint
from nativesd.pipeline.asked.arguments import CallOptions
from nativesd.pipeline.asked.hires import UPSCALERS, Hires
from nativesd.pipeline.asked.readers import real, text
from nativesd.pipeline.asked.records import record_of
from nativesd.sampling.options import Sampling
from nativesd.sampling.table import SAMPLERS, SCHEDULES
from nativesd.sampling.variation import Variation
from nativesd.server.context import Context, context_of
from nativesd.server.jobs.job import Event, Job
from nativesd.server.jobs.order import Call, Order
from nativesd.server.wire.answers import Refusal, answering, json_answer, plain
from nativesd.server.wire.bodies import Intake, data_of, read_object
from nativesd.server.wire.fields import listed
from nativesd.server.wire.waiting import events_of, sent, server_sent

NOT_OVER_HTTP = ("on_step", "lora_dirs")
PREVIEW_QUALITY = 80


def routes() -> list[Route]:
    """The API's addresses."""
    return [
        Route("/jobs", post_job, methods=["POST"]),
        Route("/jobs", list_jobs),
        Route("/jobs/{id}", get_job),
        Route("/jobs/{id}", delete_job, methods=["DELETE"]),
        Route("/jobs/{id}/events", get_events),
        Route("/jobs/{id}/pictures/{number:int}", get_picture),
        Route("/catalogue", get_catalogue),
    ]


@answering(plain)
async def post_job(request: Request) -> Response:
    """Have pictures made: 202, with the address to ask how it goes."""
    context = context_of(request)
    body = await read_object(request)
    order = await run_in_threadpool(read_order, body, context)
    job = context.desk.submit(Job("jobs", order))
    answer = shown(job, context)
    return json_answer(answer, 202, {"Location": answer["poll_url"]})


def read_order(body: Mapping[str, Any], context: Context) -> Order:
    """The options of a call, as JSON has them. Raises UsageError that names the field.

    Pictures are base64; `model`, `refiner`, LoRAs, ControlNets, IP-Adapters and image encoders are names of the
    catalogue.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name in NOT_OVER_HTTP:
            raise UsageError(f"there is no option {name!r} over HTTP")
    model, refiner = (text(name, given.pop(name)) if name in given else None for name in ("model", "refiner"))
    catalogue, intake = context.catalogue, context.intake()
    catalogue.model(model)
    if refiner is not None:
        catalogue.model(refiner)
    prompt = text("prompt", given.pop("prompt", ""))
    for name in ("image", "mask"):
        if name in given:
            given[name] = intake.picture(name, given[name])
    if isinstance(given.get("hires"), dict):
        given["hires"] = record_of(Hires, "hires", given["hires"])
        upscaler = catalogue.upscaler(text("hires.upscaler", given["hires"].upscaler), UPSCALERS)
        given["hires"] = replace(given["hires"], upscaler=upscaler)
    if isinstance(given.get("tiles"), dict):
        given["tiles"] = record_of(Tiles, "tiles", given["tiles"])
    if "variation" in given:
        given["variation"] = record_of(Variation, "variation", given["variation"])
    if "sdxl" in given:
        given["sdxl"] = record_of(SDXL, "sdxl", given["sdxl"])
    if "sampling" in given:
        given["sampling"] = record_of(Sampling, "sampling", given["sampling"])
    if isinstance(given.get("soft_inpaint"), dict):
        given["soft_inpaint"] = record_of(SoftInpaint, "soft_inpaint", given["soft_inpaint"])
    if "regions" in given:
        given["regions"] = [_region(value, intake) for value in listed("regions", given["regions"])]
    if "loras" in given:
        given["loras"] = [named_lora(value, context) for value in listed("loras", given["loras"])]
    if "control" in given:
        given["control"] = [named_control(value, context, intake) for value in listed("control", given["control"])]
        if not all(control.image for control in given["control"]):
            raise UsageError("control must have a model and an image")
    given |= named_image_prompts(given, context, intake)
    if isinstance(given.get("seed"), list) and len(given["seed"]) > context.settings.limits.batch:
        raise UsageError(f"seed must be at most {context.settings.limits.batch} numbers on this server")
    order = Order(model, [Call(prompt, {**given, **with_loras(context)})], refiner)
    context.require_bounded(order)
    return order


def with_loras(context: Context) -> CallOptions:
    """The options of every call: where LoRAs are that prompts name."""
    return {"lora_dirs": list(context.settings.lora_dirs)}


def named_lora(value: Any, context: Context) -> tuple[str, float, float]:
    """A name, or [name, scale], or [name, scale of the UNet's part, scale of the text encoders']."""
    name, *scales = value if isinstance(value, list) and value else [value]
    if len(scales) > 2:
        raise UsageError("loras must be names, or [name, scale], or [name, scale, scale]")
    unet, encoders = [real(-100, 100)("loras", scale) for scale in scales or [1.0]] * (1 if len(scales) == 2 else 2)
    return context.catalogue.lora(text("loras", name)), unet, encoders


def _region(value: Any, intake: Intake) -> Region:
    region = record_of(Region, "regions", value)
    return region if region.mask is None else replace(region, mask=intake.picture("regions.mask", region.mask))


def named_control(value: Any, context: Context, intake: Intake) -> Control:
    """A `Control` from JSON, whose model is a name of the catalogue and whose image, where it has one, is base64."""
    control = record_of(Control, "control", value)
    if control.preprocess not in (None, "canny"):
        raise UsageError("control must be preprocessed by canny or not at all")
    return replace(
        control,
        model=context.catalogue.control(text("control", control.model)),
        image=None if control.image is None else intake.picture("control", control.image),
    )


def named_image_prompts(given: Mapping[str, Any], context: Context, intake: Intake) -> dict[str, Any]:
    """The options `image_prompts` and `image_encoder` of what JSON says of them, where it does.

    Adapters and encoders are names of the catalogue, pictures and masks base64, or lists of it.
    """
    catalogue, out = context.catalogue, dict[str, Any]()
    if (encoder := given.get("image_encoder")) is not None:
        out["image_encoder"] = catalogue.image_encoder(text("image_encoder", encoder))
    if (prompts := given.get("image_prompts")) is None:
        return out
    out["image_prompts"] = []
    for value in listed("image_prompts", prompts):
        prompt = record_of(ImagePrompt, "image_prompts", value)
        pictures = {
            name: _pictures(f"image_prompts.{name}", each, intake)
            for name in ("picture", "mask")
            if (each := getattr(prompt, name)) is not None
        }
        adapter = catalogue.image_adapter(text("image_prompts.adapter", prompt.adapter))
        out["image_prompts"].append(replace(prompt, adapter=adapter, **pictures))
    return out


def _pictures(name: str, value: Any, intake: Intake) -> Any:
    """A picture, or several."""
    return [intake.picture(name, each) for each in value] if isinstance(value, list) else intake.picture(name, value)


def _found(request: Request) -> Job:
    job = context_of(request).desk.find(request.path_params["id"])
    if job is None:
        raise Refusal(404, "there is no such job; those that ended are kept for an hour", field="id", code="not_found")
    return job


@answering(plain)
async def list_jobs(request: Request) -> Response:
    """All jobs that are known: those that run, wait, and ended."""
    context = context_of(request)
    desk = context.desk
    return json_answer({"jobs": [shown(job, context) for job in (*desk.running, *desk.waiting, *reversed(desk.ended))]})


@answering(plain)
async def get_job(request: Request) -> Response:
    """How a job goes."""
    return json_answer(shown(_found(request), context_of(request)))


@answering(plain)
async def delete_job(request: Request) -> Response:
    """Cancel a job: at once where it waits (200), after its step where it runs (202); 409 where it is over."""
    job, context = _found(request), context_of(request)
    if not context.desk.cancel(job):
        raise Refusal(409, f"the job is over: {job.status}", code=job.status)
    return json_answer(shown(job, context), 200 if job.over else 202)


@answering(plain)
async def get_picture(request: Request) -> Response:
    """A picture's file."""
    job, number = _found(request), request.path_params["number"]
    if not 0 <= number < len(job.pictures):
        raise Refusal(404, f"the job has {len(job.pictures)} pictures, counted from 0", code="not_found")
    made = job.pictures[number]
    return Response(made.data, media_type=made.type, headers={"Cache-Control": "private, max-age=3600"})


@answering(plain)
async def get_events(request: Request) -> Response:
    """A job's events as they come: "started", "step", "preview" (a JPEG in base64), and "ended" with the whole job."""
    job, context = _found(request), context_of(request)
    return server_sent(_told(job, context))


async def _told(job: Job, context: Context) -> AsyncIterator[str]:
    yield sent("job", shown(job, context))
    async for event in events_of(job, previews=True):
        if event is None:
            yield ": still there\n\n"
        else:
            yield sent(event.kind, await run_in_threadpool(_event, event, context))


def _event(event: Event, context: Context) -> dict[str, Any]:
    if event.kind == "preview":
        data = {**event.data, "picture": data_of(jpeg(event.data["picture"]))}
        return {**data, "type": "image/jpeg"}
    return dict(event.data) if event.kind == "step" else shown(event.job, context)


def jpeg(picture: Image.Image, quality: int = PREVIEW_QUALITY) -> bytes:
    """A picture as a JPEG file."""
    data = BytesIO()
    picture.save(data, format="JPEG", quality=quality)
    return data.getvalue()


def shown(job: Job, context: Context) -> dict[str, Any]:
    """A job as JSON."""
    position = context.desk.position(job)
    return {
        "id": job.id,
        "status": job.status,
        "position": position,
        "progress": round(job.progress, 4),
        "step": job.step,
        "steps": job.steps,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "interrupted": job.interrupted,
        "poll_url": f"/jobs/{job.id}",
        "events_url": f"/jobs/{job.id}/events",
        "pictures": [
            {
                "url": f"/jobs/{job.id}/pictures/{number}",
                "seed": made.seed,
                "width": made.width,
                "height": made.height,
                "infotext": made.infotext,
            }
            for number, made in enumerate(job.pictures)
        ],
        "notes": job.notes,
        "error": None if job.failure is None else {"message": job.failure.message, "code": job.failure.kind},
    }


@answering(plain)
async def get_catalogue(request: Request) -> Response:
    """What there is by name, and the server's bounds."""
    context = context_of(request)
    catalogue, limits = context.catalogue, context.settings.limits
    return json_answer(
        {
            "model": catalogue.current,
            "models": list(catalogue.models),
            "loras": list(catalogue.loras),
            "controls": list(catalogue.controls),
            "image_adapters": list(catalogue.image_adapters),
            "image_encoders": list(catalogue.image_encoders),
            "embeddings": list(catalogue.embeddings),
            "samplers": [sampler.name for sampler in SAMPLERS],
            "schedules": [schedule.name for schedule in SCHEDULES],
            "apis": list(context.settings.apis),
            "limits": {"side": limits.side, "steps": limits.steps, "batch": limits.batch, "pixels": limits.pixels},
        }
    )
