"""The stream, in the protocol of StreamDiffusion's webcam demo (its demo/realtime-img2img).

`/api/ws/ID` is a WebSocket. The server says {"status": "connected" | "wait" | "send_frame" | "timeout" | "error"}, the
last two with a message and at its end. The client sends {"status": "next_frame"}, the stream's options as JSON, and a
picture's file as bytes. `/api/stream/ID` gives the pictures, as multipart JPEG. Every connection has a `Stream` of its
own, which takes frames while somebody reads its pictures; of frames that wait there is only the newest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from nativesd.errors import UsageError
from nativesd.reading import is_name, parse_json
from nativesd.server.apis.streams.session import PATIENCE, Given, Session
from nativesd.server.context import Context, context_of
from nativesd.server.jobs.desk import failure_of
from nativesd.server.settings import MEGABYTE
from nativesd.server.wire.answers import Refusal, answering, json_answer, plain

MOST_WORDS = MEGABYTE // 16
"""Bytes of the options."""
MOST_FRAME = 8 * MEGABYTE
"""Bytes of a frame's file."""
MOST_READERS = 4
"""Of one stream's pictures."""
BOUNDARY = "frame"


def routes() -> list[BaseRoute]:
    """The API's addresses."""
    return [
        WebSocketRoute("/api/ws/{id}", socket),
        Route("/api/stream/{id}", pictures),
        Route("/api/settings", get_settings),
        Route("/api/queue", get_queue),
    ]


def sessions_of(connection: HTTPConnection) -> dict[str, Session]:
    """The streams of a server by the names that their clients chose."""
    state = connection.app.state
    if not hasattr(state, "sessions"):
        state.sessions = {}
    sessions: dict[str, Session] = state.sessions
    return sessions


def _entered(name: str, connection: WebSocket) -> Session:
    """A place for a stream, on the device that has the fewest. Raises UsageError where there is none."""
    context, sessions = context_of(connection), sessions_of(connection)
    if not is_name(name):
        raise UsageError("a stream's id must be a plain name, such as a UUID")
    if name in sessions:
        raise UsageError(f"there is a stream {name[:100]!r} already")
    if len(sessions) >= context.settings.limits.streams:
        raise UsageError(f"{len(sessions)} streams are open, and no more may be: try again later")
    if context.desk.closing:
        raise UsageError("the server is shutting down")
    taken = [session.shelf for session in sessions.values()]
    session = sessions[name] = Session(context, min(context.desk.shelves, key=taken.count))
    return session


async def socket(connection: WebSocket) -> None:
    """A client's connection: its stream lasts as long."""
    await connection.accept()
    name = connection.path_params["id"]
    try:
        session = _entered(name, connection)
    except UsageError as error:
        await _end(connection, "error", str(error))
        return
    tasks: list[asyncio.Task[None]] = []
    try:
        await connection.send_json({"status": "connected", "message": "Connected"})
        await connection.send_json({"status": "send_frame"})
        tasks = [asyncio.create_task(work(connection, session)) for work in (_work, _hear)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for each in tasks:
            if each.done():
                each.result()
    except TimeoutError:
        await _end(connection, "timeout", f"there was no frame, or nobody who read the pictures, for {PATIENCE:.0f} s")
    except WebSocketDisconnect:
        pass
    except Exception as error:
        await _end(connection, "error", failure_of(error, "a stream").message)
    finally:
        await session.leave()
        if tasks:
            tasks[1].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # the work ends behind the frame that it has
        await run_in_threadpool(session.close)
        del sessions_of(connection)[name]


async def _end(connection: WebSocket, status: str, message: str) -> None:
    """Say why, and close."""
    try:
        await connection.send_json({"status": status, "message": message})
        await connection.close(1000 if status == "timeout" else 1008)
    except (WebSocketDisconnect, RuntimeError):  # it went meanwhile
        pass


async def _hear(connection: WebSocket, session: Session) -> None:
    """Take frames until the client goes. Raises WebSocketDisconnect then, and NativesdError for what is none."""
    while True:
        said = parse_json(await _text(connection), "a message")
        if said.get("status") != "next_frame":
            raise UsageError('a frame begins with {"status": "next_frame"}, its options and its picture come after')
        options = parse_json(await _text(connection), "the options")
        message = await _message(connection)
        data = message.get("bytes")
        if data is None:
            raise UsageError("after its options, a frame's picture must come as bytes")
        if len(data) > MOST_FRAME:
            raise UsageError(f"a frame may have {MOST_FRAME} bytes, not {len(data)}")
        if data:
            await session.put(Given(options, data))
        else:  # as a page says it whose camera is not ready
            await connection.send_json({"status": "send_frame"})


async def _text(connection: WebSocket) -> bytes:
    text = (await _message(connection)).get("text")
    if text is None:
        raise UsageError("a frame's picture must come after its options as JSON")
    if len(text) > MOST_WORDS:
        raise UsageError(f"a message may have {MOST_WORDS} characters, not {len(text)}")
    return bytes(text.encode("utf-8", "replace"))


async def _message(connection: WebSocket) -> Mapping[str, Any]:
    message = await connection.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    return message


async def _work(connection: WebSocket, session: Session) -> None:
    """Make pictures until the client goes. Raises TimeoutError, and what `Session.make` raises."""
    while (given := await session.take()) is not None:
        if busy := session.context.desk.busy(session.shelf):  # the frame is old when the job is done
            await connection.send_json({"status": "wait"})
        else:
            await connection.send_json({"status": "send_frame"})
        picture = await run_in_threadpool(session.make, given)
        if picture is not None:
            await session.show(picture)
        if busy and not session.gone.is_set():
            await connection.send_json({"status": "send_frame"})


@answering(plain)
async def pictures(request: Request) -> Response:
    """A stream's pictures, one after the other in one answer (multipart/x-mixed-replace)."""
    session = sessions_of(request).get(request.path_params["id"])
    if session is None:
        raise Refusal(404, "there is no stream of this id: connect to /api/ws/ID first", code="not_found")
    if session.readers >= MOST_READERS:
        raise Refusal(503, f"{MOST_READERS} read this stream, and no more may", code="too_many_readers")
    media = f"multipart/x-mixed-replace; boundary={BOUNDARY}"
    return StreamingResponse(_parts(session), media_type=media, headers={"Cache-Control": "no-store"})


async def _parts(session: Session) -> AsyncIterator[bytes]:
    """Pictures as parts. A boundary follows at once: browsers show a part when they see its end."""
    boundary = f"--{BOUNDARY}\r\n".encode()
    yield boundary
    async with aclosing(session.read()) as read:
        async for picture in read:
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n".encode()
            yield head + picture + b"\r\n" + boundary


@answering(plain)
async def get_queue(request: Request) -> Response:
    """How many streams are open."""
    return json_answer({"queue_size": len(sessions_of(request))})


@answering(plain)
async def get_settings(request: Request) -> Response:
    """What a client may ask for: a JSON schema of the options, as the demo's page reads it."""
    context = context_of(request)
    return json_answer(
        {
            "info": {"properties": {"title": {"default": "nativesd"}, "input_mode": {"default": "image"}}},
            "input_params": {"title": "InputParams", "type": "object", "properties": _fields(context)},
            "max_queue_size": context.settings.limits.streams,
            "page_content": "",
        }
    )


def _fields(context: Context) -> dict[str, Any]:
    """The options that the demo's page shows, and the size that it cuts frames to."""
    loaded = context.desk.shelves[0].loaded
    sides = {} if loaded is None else dict.fromkeys(("width", "height"), loaded.config.size)
    texts = {"prompt": "textarea", "negative_prompt": "textarea"}
    return {
        **{
            name: {"id": name, "title": name.replace("_", " ").capitalize(), "type": "string", "field": field,
                   "default": ""}
            for name, field in texts.items()
        },
        **{
            name: {"id": name, "title": name.capitalize(), "type": "integer", "default": side, "hide": True,
                   "disabled": True}
            for name, side in sides.items()
        },
    }  # fmt: skip
