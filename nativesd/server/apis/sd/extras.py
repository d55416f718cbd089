"""Pictures without a model: what is written in a PNG, and making one larger."""

from __future__ import annotations

from collections.abc import Mapping
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
from nativesd.server.apis.sd.style import answered
from nativesd.server.context import context_of
from nativesd.server.settings import Limits
from nativesd.server.wire.answers import answering, json_answer
from nativesd.server.wire.bodies import Intake, data_of, read_object
from nativesd.server.wire.fields import listed, mapping, words

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
    made, note = await run_in_threadpool(
        _enlarged, body, "image", body.get("image"), context.intake(), context.settings.limits
    )
    return json_answer({"html_info": note, "image": made})


@answering(answered)
async def extra_batch_images(request: Request) -> Response:
    """The same for several."""
    body, context = await read_object(request), context_of(request)
    intake, limits = context.intake(), context.settings.limits
    given = [mapping("imageList", each).get("data") for each in listed("imageList", body.get("imageList", []))]
    if len(given) > limits.batch:
        raise UsageError(f"imageList must have at most {limits.batch} pictures on this server")
    made = await run_in_threadpool(lambda: [_enlarged(body, "imageList", each, intake, limits) for each in given])
    return json_answer({"html_info": made[0][1] if made else "", "images": [image for image, _ in made]})


def _enlarged(body: Mapping[str, Any], name: str, value: Any, intake: Intake, limits: Limits) -> tuple[str, str]:
    """A picture in base64, enlarged, and what of the request was not heeded."""
    said = {each: content for each, content in body.items() if content is not None}
    upscaler = words("upscaler_1", said.get("upscaler_1", "None"))
    if upscaler.lower() not in PIXELS:
        raise UsageError(f"upscaler_1 must be one of {', '.join(each.title() for each in PIXELS)}, not {upscaler!r}")
    picture = read_image(intake.picture(name, value))
    if whole(0, 1)("resize_mode", said.get("resize_mode", 0)) == 0:
        scale = real(0, 16, above=True)("upscaling_resize", said.get("upscaling_resize", 2))
        size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    else:
        width, height = (whole(1)(side, said.get(side, 512)) for side in ("upscaling_resize_w", "upscaling_resize_h"))
        size = (width, height)
    if max(size) > 4 * limits.side:
        raise UsageError(f"upscaling_resize must give at most {4 * limits.side} pixels a side, not {max(size)}")
    crop = flag("upscaling_crop", said.get("upscaling_crop", True)) and said.get("resize_mode", 0) == 1
    larger = fit(picture, *size, "crop").image if crop else picture.resize(size, PIXELS[upscaler.lower()])
    ignored = [each for each in FACES if real(0, 1)(each, said.get(each, 0))]
    return _png(larger), f"not used: {', '.join(ignored)}" if ignored else ""


def _png(picture: Image.Image) -> str:
    data = BytesIO()
    picture.save(data, format="PNG")
    return data_of(data.getvalue())
