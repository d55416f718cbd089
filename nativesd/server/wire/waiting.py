"""Between workers and the event loop: answers that wait for a job, and events that are sent as they come."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from nativesd.server.jobs.desk import Desk
from nativesd.server.jobs.job import Event, Job
from nativesd.server.wire.answers import Refusal

LATEST = ("step", "preview")
"""Events of which a slow reader gets the last one only."""
KEEP_ALIVE = 15.0
"""Seconds without an event after which a comment is sent, so that proxies keep the connection."""


class Mailbox:
    """Events that other threads post, for one reader on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._filled = asyncio.Event()

    def post(self, event: Event) -> None:
        """From any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        if event.kind in LATEST:
            same = (each for each in self._events if (each.job, each.kind) == (event.job, event.kind))
            if (old := next(same, None)) is not None:
                self._events.remove(old)
        self._events.append(event)
        self._filled.set()

    async def take(self) -> Event:
        """The next event."""
        while not self._events:
            self._filled.clear()
            await self._filled.wait()
        return self._events.popleft()


async def wait_for(request: Request, desk: Desk, job: Job) -> Job:
    """Have a job wait and run, until it is over. A client that goes away ends it. Raises what `submit` raises."""
    mailbox = Mailbox()
    leave = job.listen(lambda event: mailbox.post(event) if event.kind == "ended" else None)
    desk.submit(job)
    over, gone = asyncio.ensure_future(mailbox.take()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({over, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leave()
        over.cancel()
        gone.cancel()
        if not job.over:
            desk.cancel(job)
    if not job.over:
        raise Refusal(499, "the client closed its connection", code="closed")
    if job.status == "cancelled" and desk.closing:
        raise Refusal(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})
    return job


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events_of(job: Job, *, previews: bool) -> AsyncIterator[Event | None]:
    """A job's events from now to its end; None where there was none for a while."""
    mailbox = Mailbox()
    leave = job.listen(mailbox.post, previews=previews)
    try:
        if job.over:
            yield Event(job, "ended")
            return
        while True:
            try:
                event = await asyncio.wait_for(mailbox.take(), KEEP_ALIVE)
            except TimeoutError:
                yield None
                continue
            yield event
            if event.kind == "ended":
                return
    finally:
        leave()


def server_sent(events: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def sent(kind: str | None, data: Any) -> str:
    """One server-sent event."""
    head = "" if kind is None else f"event: {kind}\n"
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n"
