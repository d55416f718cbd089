"""The process: listens, answers, and ends so that no client is left without an answer."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import uvicorn

from nativesd.errors import NativesdError
from nativesd.server.app import make_app, make_context
from nativesd.server.context import Context
from nativesd.server.settings import Settings

BACKLOG = 2048
"""uvicorn's own."""
GRACE = 10.0
"""Seconds that a running job gets at the end, before it is ended after its step."""
CLOSING = 5
"""Seconds more for the answers to be sent."""


class Server(uvicorn.Server):
    """uvicorn's, which at its end first lets the jobs end, so that their clients get an answer."""

    def __init__(self, config: uvicorn.Config, context: Context, grace: float) -> None:
        super().__init__(config)
        self.context = context
        self.grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, end the jobs, and then what is left of the connections."""
        for server in self.servers:
            server.close()
        for each in sockets or []:
            each.close()
        ending = asyncio.ensure_future(asyncio.to_thread(self.context.desk.close, self.grace))
        while not ending.done() and not self.force_exit:  # which a second signal asks for
            await asyncio.wait({ending}, timeout=0.1)
        await super().shutdown([])


def make_server(settings: Settings, *, grace: float = GRACE) -> Server:
    """A server with its model loaded, to be `run`. Raises what `nativesd.load` raises."""
    context = make_context(settings)
    config = uvicorn.Config(
        make_app(context),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=CLOSING,
        ws="websockets-sansio",
        ws_max_size=settings.limits.body,
        server_header=False,
        lifespan="off",
    )
    return Server(config, context, grace)


def serve(settings: Settings, ready: Callable[[str], object] = lambda address: None) -> None:
    """Load the model, listen, and answer until SIGTERM or SIGINT; `ready` is called with the address then.

    Raises what `nativesd.load` raises, and NativesdError where the address is taken.
    """
    bound = bind(settings)
    server = make_server(settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    bound.listen(BACKLOG)  # who reads the address may connect
    ready(f"http://{host}:{bound.getsockname()[1]}")
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done
    try:
        server.run([bound])
    finally:
        signal.signal(signal.SIGTERM, before)


def bind(settings: Settings) -> socket.socket:
    """The address, held before anything is loaded. Raises NativesdError where it is taken."""
    bound = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise NativesdError(
            f"{settings.host}:{settings.port} cannot be listened on: {error}; pass another --port"
        ) from error
    return bound
