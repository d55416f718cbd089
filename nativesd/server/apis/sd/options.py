"""A1111's settings: which are there, and what setting them does."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nativesd.errors import UsageError
from nativesd.pictures.infotext import EMPHASIS
from nativesd.pictures.programs.values import noise
from nativesd.pipeline.asked.readers import read_emphasis, whole
from nativesd.server.apis.sd.style import answered
from nativesd.server.context import Context, context_of
from nativesd.server.jobs.job import Job
from nativesd.server.wire.answers import answering, json_answer, require_done
from nativesd.server.wire.bodies import read_object
from nativesd.server.wire.fields import words
from nativesd.server.wire.waiting import wait_for

DEFAULTS: dict[str, Any] = {
    "CLIP_stop_at_last_layers": 1, "randn_source": "CPU", "eta_noise_seed_delta": 0,
    "emphasis": "Original",
}  # fmt: skip
"""Settings that can be changed, but for the model. In A1111 randn_source is GPU at first; here seeds are diffusers'."""
FIXED: dict[str, Any] = {
    "sd_vae": "Automatic", "sd_checkpoint_hash": "", "samples_format": "png",
    "show_progress_every_n_steps": 1, "live_previews_enable": True, "enable_pnginfo": True, "img2img_fix_steps": False,
}  # fmt: skip


def routes() -> list[Route]:
    """The API's addresses."""
    return [
        Route("/sdapi/v1/options", get_options),
        Route("/sdapi/v1/options", set_options, methods=["POST"]),
    ]


@answering(answered)
async def get_options(request: Request) -> Response:
    """All settings."""
    context = context_of(request)
    return json_answer({**DEFAULTS, **FIXED, **context.options, "sd_model_checkpoint": context.catalogue.current})


@answering(answered)
async def set_options(request: Request) -> Response:
    """Change settings, for all clients. Others than `DEFAULTS` and the model are taken and do nothing.

    Another model is loaded before the answer; where that fails, the one before stays.
    """
    context, body = context_of(request), await read_object(request)
    changed = _read(body)
    wanted = body.get("sd_model_checkpoint")
    if wanted is not None and not isinstance(wanted, str):
        raise UsageError("sd_model_checkpoint must be a name")
    if wanted and context.catalogue.model(wanted) != context.catalogue.current:
        await _load(request, context, context.catalogue.model(wanted))
    context.options.update(changed)
    return json_answer({})


def _read(body: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    if (skip := body.get("CLIP_stop_at_last_layers")) is not None:
        changed["CLIP_stop_at_last_layers"] = whole(1, 12)("CLIP_stop_at_last_layers", skip)
    if (delta := body.get("eta_noise_seed_delta")) is not None:
        changed["eta_noise_seed_delta"] = whole(0, 1 << 32)("eta_noise_seed_delta", delta)
    if (source := body.get("randn_source")) is not None:
        noise("randn_source", words("randn_source", source))
        changed["randn_source"] = source
    if (emphasis := body.get("emphasis")) is not None:
        changed["emphasis"] = EMPHASIS[read_emphasis("emphasis", emphasis)]
    return changed


async def _load(request: Request, context: Context, name: str) -> None:
    job = Job("sd", lambda turn: turn.load(name) and None, private=True)
    await wait_for(request, context.desk, job)
    require_done(job)
    context.catalogue.current = name
