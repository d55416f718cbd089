"""Pictures without a model: what is written in a PNG, and making one larger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nativesd.errors import UsageError
from nativesd.pictures.embedded import texts_of
from nativesd.pictures.images import fit, read_image
from nativesd.pictures.infotext import parse_infotext
from nativesd.pipeline.asked.hires import PIXELS
from nativesd.pipeline.asked.readers import flag, real, whole
from nativesd.pipeline.upscaling import UpscaleModel, enlarged
from nativesd.server.apis.sd.style import answered
from nativesd.server.context import context_of
from nativesd.server.jobs.job import Job
from nativesd.server.jobs.order import require_enlarging
from nativesd.server.settings import Limits
from nativesd.server.wire.answers import answering, json_answer, require_done
from nativesd.server.wire.bodies import Intake, data_of, read_object
from nativesd.server.wire.fields import listed, mapping, words
from nativesd.server.wire.waiting import wait_for

FACES = ("gfpgan_visibility", "codeformer_visibility", "extras_upscaler_2_visibility")


def routes() -> list[Route]:
    """The API's addresses."""
    return [
        Route("/sdapi/v1/png-info", png_info, methods=["POST"]),
        Route("/sdapi/v1/extra-single-image", extra_single_image, methods=["POST"]),
        Route("/sdapi/v1/extra-batch-images", extra_batch_images, methods=["POST"]),
    ]


@answering(answered)
async def png_info(request: Request) -> Response:
    """The parameters that a picture carries: the text, its fields, and all texts of the file."""
    body, intake = await read_object(request), context_of(request).intake()

    def read() -> dict[str, Any]:
        texts = texts_of(intake.picture("image", body.get("image")), "the picture")
        info = parse_infotext(texts.parameters)
        fields = {} if not texts.parameters else {
            "Prompt": info.prompt, "Negative prompt": info.negative_prompt, **info.fields
        }  # fmt: skip
        return {"info": texts.parameters, "items": dict(texts.chunks), "parameters": fields}

    return json_answer(await run_in_threadpool(read))


@answering(answered)
async def extra_single_image(request: Request) -> Response:
    """A picture made larger."""
    body, context = await read_object(request), context_of(request)
    [made], note = await _enlarged(request, body, [body.get("image")], "image", context.intake())
    return json_answer({"html_info": note, "image": made})


@answering(answered)
async def extra_batch_images(request: Request) -> Response:
    """The same for several."""
    body, context = await read_object(request), context_of(request)
    limits = context.settings.limits
    given = [mapping("imageList", each).get("data") for each in listed("imageList", body.get("imageList", []))]
    if len(given) > limits.batch:
        raise UsageError(f"imageList must have at most {limits.batch} pictures on this server")
    made, note = await _enlarged(request, body, given, "imageList", context.intake())
    return json_answer({"html_info": note, "images": made})


async def _enlarged(
    request: Request, body: Mapping[str, Any], values: Sequence[Any], name: str, intake: Intake
) -> tuple[list[str], str]:
    """Pictures in base64, enlarged, and what of the request was not heeded. A model enlarges them in a job's turn."""
    context = context_of(request)
    said = {each: content for each, content in body.items() if content is not None}
    upscaler = context.catalogue.upscaler(words("upscaler_1", said.get("upscaler_1", "None")), tuple(PIXELS))
    ignored = [each for each in FACES if real(0, 1)(each, said.get(each, 0))]
    note = f"not used: {', '.join(ignored)}" if ignored else ""

    def made(model: UpscaleModel | None) -> list[str]:
        limits = context.settings.limits
        method = Image.Resampling.LANCZOS if model is not None else PIXELS[upscaler]
        return [_larger(said, read_image(intake.picture(name, value)), model, method, limits) for value in values]

    if upscaler in PIXELS:
        return await run_in_threadpool(made, None), note
    job = Job("sd", lambda turn: made(turn.shelf.upscaler(upscaler)), private=True)
    await wait_for(request, context.desk, job)
    require_done(job)
    return job.value, note


def _larger(
    said: Mapping[str, Any],
    picture: Image.Image,
    model: UpscaleModel | None,
    method: Image.Resampling,
    limits: Limits,
) -> str:
    if whole(0, 1)("resize_mode", said.get("resize_mode", 0)) == 0:
        scale = real(0, 16, above=True)("upscaling_resize", said.get("upscaling_resize", 2))
        size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    else:
        width, height = (whole(1)(side, said.get(side, 512)) for side in ("upscaling_resize_w", "upscaling_resize_h"))
        size = (width, height)
    if max(size) > 4 * limits.side:
        raise UsageError(f"upscaling_resize must give at most {4 * limits.side} pixels a side, not {max(size)}")
    crop = flag("upscaling_crop", said.get("upscaling_crop", True)) and said.get("resize_mode", 0) == 1
    if model is not None:
        require_enlarging(model, picture, limits)
        picture = enlarged(picture, model, *size, most=4 * limits.side)
    larger = fit(picture, *size, "crop").image if crop else picture.resize(size, method)
    data = BytesIO()
    larger.save(data, format="PNG")
    return data_of(data.getvalue())
