"""OpenAI's images API: generations, edits and models (https://platform.openai.com/docs/api-reference/images).

Fields beside OpenAI's, which clients send as `extra_body`, are the library's options: `EXTRA`. Addresses of pictures
are those of the job that made them, which is kept for an hour.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Mapping
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nativesd.errors import UsageError
from nativesd.pictures.embedded import user_comment_exif
from nativesd.pipeline.asked.readers import Reader, one_of, real, shown, to_whole, whole
from nativesd.server.apis.own import jpeg, with_loras
from nativesd.server.context import Context, context_of
from nativesd.server.jobs.job import Job, Made
from nativesd.server.jobs.order import Call, Order
from nativesd.server.wire.answers import Refusal, answering, json_answer, plain, require_done
from nativesd.server.wire.bodies import Intake, data_of, read_object
from nativesd.server.wire.waiting import events_of, sent, server_sent, wait_for

EXTRA = ("seed", "steps", "negative_prompt", "guidance_scale", "sampler", "schedule", "clip_skip")
EXTRA_EDIT = (*EXTRA, "strength", "mask_blur", "mask_fill", "only_masked", "soft_inpaint")
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
NEUTRAL = ("auto", "standard", "opaque", "low")
"""Values of fields that are about OpenAI's models only; others are named in the answer's `notes`."""
NAMES = {"num_images": "n", "width": "size", "height": "size"}
MOST_PARTIAL = 3


def routes() -> list[Route]:
    """The API's addresses."""
    return [
        Route("/v1/images/generations", generations, methods=["POST"]),
        Route("/v1/images/edits", edits, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def style(refusal: Refusal) -> Response:
    """OpenAI says 400 where others say 422."""
    if refusal.status == 422:
        refusal.status = 400
    return plain(refusal)


@answering(style)
async def generations(request: Request) -> Response:
    """Pictures of a prompt."""
    body = await read_object(request)
    return await _answer(request, body, {}, EXTRA, "image_generation")


@answering(style)
async def edits(request: Request) -> Response:
    """A picture painted anew: where a mask is transparent, or as a whole."""
    context = context_of(request)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UsageError("image must be a file of multipart/form-data")
    async with request.form(max_files=20, max_fields=100) as form:
        files = [file for name in ("image", "image[]") for file in form.getlist(name)]
        pictures = await run_in_threadpool(_pictures, files, form, context.intake())
        body = {name: value for name, value in form.items() if isinstance(value, str) and name != "image"}
    return await _answer(request, body, pictures, EXTRA_EDIT, "image_edit")


def _pictures(files: list[Any], form: FormData, intake: Intake) -> dict[str, Any]:
    """The options `image` and `mask`."""
    if not files:
        raise UsageError("image must be a file")
    image = _file("image", files[0], intake)
    options: dict[str, Any] = {"image": image}
    if "mask" in form:
        mask = _file("mask", form["mask"], intake)
        options["mask"] = _holes(mask) or mask
    elif (holes := _holes(image)) is not None:
        options["mask"] = holes
    return options


def _file(name: str, value: Any, intake: Intake) -> Image.Image:
    if not isinstance(value, UploadFile):
        raise UsageError(f"{name} must be a file, not a text: addresses are not fetched")
    return intake.decoded(name, value.file.read())


def _holes(image: Image.Image) -> Image.Image | None:
    """White where a picture is transparent; None: it is nowhere."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else ImageOps.invert(alpha)


async def _answer(
    request: Request, body: Mapping[str, Any], pictures: Mapping[str, Any], extra: tuple[str, ...], event: str
) -> Response:
    context = context_of(request)
    given = {name: value for name, value in body.items() if value is not None}
    order, notes = _order(given, pictures, extra, context)
    form = one_of(*FORMATS)("output_format", given.get("output_format", "png"))
    quality = whole(0, 100)("output_compression", given.get("output_compression", 100))
    wanted = one_of("url", "b64_json", "both")("response_format", given.get("response_format", "both"))
    streams = str(given.get("stream", False)).lower() == "true"
    partial = whole(0, MOST_PARTIAL)("partial_images", given.get("partial_images", 0))
    job = Job("openai", order, private=wanted == "b64_json" or streams)
    if streams:
        context.desk.submit(job)
        return server_sent(_streamed(job, context, partial, event, form, quality))
    await wait_for(request, context.desk, job)
    require_done(job)
    await run_in_threadpool(_convert, job, form, quality)
    base = f"{request.url.scheme}://{request.headers.get('host', '')}"
    return json_answer(
        {
            "created": int(job.created),
            "data": [_datum(made, f"{base}/jobs/{job.id}/pictures/{i}", wanted) for i, made in enumerate(job.pictures)],
            "output_format": form,
            "size": f"{job.pictures[0].width}x{job.pictures[0].height}",
            "notes": [*notes, *job.notes],
        }
    )


def _order(
    given: Mapping[str, Any], pictures: Mapping[str, Any], extra: tuple[str, ...], context: Context
) -> tuple[Order, list[str]]:
    """The job's work, and what of the request is not heeded. Raises UsageError, and Refusal for an unknown model."""
    if not isinstance(given.get("prompt"), str):
        raise UsageError("prompt must be a text")
    name = given.get("model") or None
    try:
        context.catalogue.model(name if name is None else str(name))
    except UsageError as error:
        raise Refusal(404, str(error), field="model", code="model_not_found") from None
    options: dict[str, Any] = {**pictures, **with_loras(context)}
    options |= {each: _as_read(each, given[each]) for each in extra if each in given}
    options["num_images"] = whole(1)("n", given.get("n", 1))
    size = given.get("size", "auto")
    if size != "auto":
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", str(size))
        if match is None:
            raise UsageError(f"size must be auto, or such as 512x768, not {shown(size)}")
        options["width"], options["height"] = int(match[1]), int(match[2])
    known = {"prompt", "model", "n", "size", "output_format", "output_compression", "response_format", "stream",
             "partial_images", "user", *extra}  # fmt: skip
    notes = [f"{each} is not used" for each, value in given.items() if each not in known and value not in NEUTRAL]
    order = Order(name, [Call(given["prompt"], options)])
    context.require_bounded(order, NAMES)
    return order, notes


def _as_read(name: str, value: Any) -> Any:
    """An option as the library takes it: multipart has only texts."""
    reader: Reader | None = {"seed": to_whole, "strength": real(0, 1)}.get(name)
    return value if reader is None else reader(name, value)


def _datum(made: Made, url: str, wanted: str) -> dict[str, str]:
    datum = {"b64_json": data_of(made.data), "url": url}
    return datum if wanted == "both" else {wanted: datum[wanted]}


def _convert(job: Job, form: str, quality: int) -> None:
    """A job's pictures in the format that was asked for, with their parameters."""
    if form != "png":
        job.pictures = [_converted(made, form, quality) for made in job.pictures]


def _converted(made: Made, form: str, quality: int) -> Made:
    data = BytesIO()
    exif = user_comment_exif(made.infotext)
    Image.open(BytesIO(made.data)).save(data, format=FORMATS[form], quality=quality, exif=exif)
    return Made(data.getvalue(), made.infotext, made.seed, made.width, made.height, f"image/{form}")


async def _streamed(
    job: Job, context: Context, partial: int, event: str, form: str, quality: int
) -> AsyncIterator[str]:
    """Partial pictures, evenly over the steps, and then the whole ones. A client that goes away ends the job."""
    sent_already = 0
    try:
        async for happened in events_of(job, previews=partial > 0):
            if happened is None:
                yield ": still there\n\n"
            elif happened.kind == "preview":
                due = int(job.progress * (partial + 1))
                if sent_already < min(due, partial):
                    data = await run_in_threadpool(jpeg, happened.data["picture"])
                    yield sent(
                        f"{event}.partial_image",
                        {"type": f"{event}.partial_image", "partial_image_index": sent_already,
                         "b64_json": data_of(data), "output_format": "jpeg", "created_at": int(time.time())},
                    )  # fmt: skip
                    sent_already += 1
        try:
            require_done(job)
        except Refusal as refusal:
            error = {"message": refusal.message, "code": refusal.code, "param": refusal.field, "type": "server_error"}
            yield sent("error", {"type": "error", "error": error})
            return
        await run_in_threadpool(_convert, job, form, quality)
        for made in job.pictures:
            yield sent(
                f"{event}.completed",
                {"type": f"{event}.completed", "b64_json": data_of(made.data), "output_format": form,
                 "size": f"{made.width}x{made.height}", "created_at": int(job.created)},
            )  # fmt: skip
    finally:
        if not job.over:
            context.desk.cancel(job)


def _model(context: Context, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(context.started), "owned_by": "nativesd"}


@answering(style)
async def models(request: Request) -> Response:
    """All models."""
    context = context_of(request)
    return json_answer({"object": "list", "data": [_model(context, name) for name in context.catalogue.models]})


@answering(style)
async def model(request: Request) -> Response:
    """One of them."""
    context, name = context_of(request), request.path_params["name"]
    if name not in context.catalogue.models:
        raise Refusal(404, f"there is no model {name[:100]!r}", field="model", code="model_not_found")
    return json_answer(_model(context, name))
