"""The application: the APIs that were asked for, behind one door."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from nativesd.server.apis import openai, own, page, state
from nativesd.server.apis.comfy import routes as comfy
from nativesd.server.apis.sd import controlnet, extras, generation, lists, options, progress
from nativesd.server.apis.streams import routes as streams
from nativesd.server.context import Context
from nativesd.server.jobs.desk import Desk
from nativesd.server.jobs.shelf import Catalogue, Shelf
from nativesd.server.settings import Settings
from nativesd.server.wire.answers import Refusal, json_answer, plain
from nativesd.server.wire.guard import Guard

APIS: Mapping[str, Sequence[Callable[[], Sequence[BaseRoute]]]] = {
    "sd": (generation.routes, progress.routes, lists.routes, options.routes, extras.routes, controlnet.routes),
    "openai": (openai.routes,),
    "comfy": (comfy.routes,),
    "stream": (streams.routes,),
}
"""The addresses of each API by its name."""


def make_context(settings: Settings) -> Context:
    """The parts of a server, with the first model loaded on every device. Raises what `nativesd.load` raises."""
    catalogue = Catalogue(settings)
    shelves = [Shelf(catalogue, settings, device) for device in settings.devices]
    for shelf in shelves:
        shelf.pipeline(None)
    return Context(settings, catalogue, Desk(shelves, settings.queue))


def make_app(context: Context) -> Starlette:
    """The ASGI application of these parts."""
    routes: list[BaseRoute] = [*page.routes(), *state.routes(), *own.routes()]
    for name in context.settings.apis:
        routes += [route for part in APIS[name] for route in part()]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, settings=context.settings)],
        exception_handlers={HTTPException: _not_found, Refusal: _refused, Exception: _fault},
    )
    app.state.context = context
    return app


async def _not_found(_request: Request, error: Exception) -> Response:
    """404 and 405, as FastAPI says them, which A1111's clients read."""
    assert isinstance(error, HTTPException)
    return json_answer({"detail": error.detail}, error.status_code, error.headers)


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return plain(error)


async def _fault(_request: Request, error: Exception) -> Response:
    return plain(Refusal(500, f"a fault of nativesd: {type(error).__name__}", code="InternalError"))
