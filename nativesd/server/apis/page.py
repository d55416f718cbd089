"""The page, one static file, and what only it asks: what a picture was made with, and what a model's file holds."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

import nativesd
from nativesd.errors import UsageError
from nativesd.pictures.embedded import texts_of
from nativesd.pictures.programs.find import recipe_of
from nativesd.pipeline.asked.repeat import options_of
from nativesd.server.context import context_of
from nativesd.server.wire.answers import answering, json_answer, plain
from nativesd.server.wire.bodies import read_object

FILE = Path(__file__).with_name("page.html")


def routes() -> list[Route]:
    """The addresses."""
    return [
        Route("/", get_page),
        Route("/recipe", post_recipe, methods=["POST"]),
        Route("/audit", get_audit),
    ]


@cache
def _page() -> tuple[str, str]:
    """The page, and the policy that lets a browser run what stands in it and nothing else."""
    text = FILE.read_text(encoding="utf-8")
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
            for inside in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return text, (
        f"default-src 'self'; script-src {hashes['script']}; style-src {hashes['style']}; img-src 'self' blob: data:; "
        "media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


async def get_page(_request: Request) -> Response:
    """The page."""
    text, policy = _page()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer",
                                       "Cache-Control": "no-cache"})  # fmt: skip


@answering(plain)
async def post_recipe(request: Request) -> Response:
    """The options that a picture carries, whichever program made it, and what of its text is not among them."""
    body, intake = await read_object(request), context_of(request).intake()

    def read() -> dict[str, Any]:
        options, unheeded = options_of(recipe_of(texts_of(intake.picture("image", body.get("image")), "the picture")))
        return {"options": {name: _plain(value) for name, value in options.items()}, "unheeded": unheeded}

    return json_answer(await run_in_threadpool(read))


def _plain(value: Any) -> Any:
    """A value as JSON: records as objects of what they say."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: each for name, each in asdict(value).items() if each is not None}
    return value


@answering(plain)
async def get_audit(request: Request) -> Response:
    """What is in a model's file and what becomes of it, for a model by its name."""
    catalogue, name = context_of(request).catalogue, request.query_params.get("model")
    if not name:
        raise UsageError("model must be the name of one")
    report = await run_in_threadpool(nativesd.audit, catalogue.models[catalogue.model(name)])
    return Response(report.to_json(), media_type="application/json")
