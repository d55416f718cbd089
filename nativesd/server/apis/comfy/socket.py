"""ComfyUI's WebSocket: what each client is told while its prompts run.

Messages are those of ComfyUI's server.py and execution.py. A prompt's go to the client that it names, or to all where
it names none. Pictures of its steps go to a client that was connected when the prompt came, or where `extra_data` asks
for a `preview_method`: clients that connect later (comfy-api-simplified) take every binary message for a result.
"""

from __future__ import annotations

import asyncio
import struct
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketDisconnect

from nativesd.server.apis.comfy.files import Files
from nativesd.server.apis.comfy.running import Prompt
from nativesd.server.apis.own import jpeg
from nativesd.server.context import Context
from nativesd.server.jobs.job import Event, Job
from nativesd.server.wire.waiting import Mailbox

PREVIEW, JPEG = 1, 1
"""BinaryEventTypes.PREVIEW_IMAGE of ComfyUI's protocol.py, and its number of the format."""


class Studio:
    """The prompts and clients of this API."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.files = Files(context.settings.limits, context.settings.lora_dirs)
        self.prompts: dict[str, Prompt] = {}
        """By the ids of their jobs, as long as these are remembered."""
        self._boxes: dict[str, Mailbox] = {}
        self._number = 0

    def next_number(self) -> int:
        """A prompt's, counted from 0."""
        self._number += 1
        return self._number - 1

    def submit(self, job: Job, prompt: Prompt) -> None:
        """Have a prompt wait. Raises what `Desk.submit` raises."""
        self.prompts = {name: each for name, each in self.prompts.items() if self.context.desk.find(name) is not None}
        leave = job.listen(self._hear, previews=prompt.previews)
        self.prompts[job.id] = prompt
        try:
            self.context.desk.submit(job)
        except Exception:
            leave()
            self.prompts.pop(job.id, None)
            raise
        self._post(Event(job, "queued"), "")

    def remaining(self) -> int:
        """How many prompts wait and run."""
        desk = self.context.desk
        return sum(job.kind == "comfy" and not job.over for job in (*desk.running, *desk.waiting))

    def wants_previews(self, client: str, extra: Mapping[str, Any]) -> bool:
        """Whether the steps of a prompt are to be shown to its client."""
        method = extra.get("preview_method")
        return method != "none" and (method is not None or client in self._boxes)

    def enter(self, client: str) -> tuple[Mailbox, Callable[[], None]]:
        """A client's mailbox, and what closes it."""
        box = self._boxes[client] = Mailbox()

        def leave() -> None:
            if self._boxes.get(client) is box:
                del self._boxes[client]

        return box, leave

    def _hear(self, event: Event) -> None:
        prompt = self.prompts.get(event.job.id)
        self._post(event, prompt.client if prompt is not None else "")
        if event.kind == "ended" and prompt is not None and prompt.client:
            for client, box in tuple(self._boxes.items()):
                if client != prompt.client:
                    box.post(Event(event.job, "queued"))

    def _post(self, event: Event, client: str) -> None:
        for each, box in tuple(self._boxes.items()):
            if client in ("", each):
                box.post(event)

    def status(self) -> dict[str, Any]:
        """How many prompts wait and run, as a message."""
        return {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": self.remaining()}}}}

    def how_it_ended(self, job: Job) -> tuple[str, dict[str, Any]]:
        """The message of an ended prompt."""
        prompt = self.prompts[job.id]
        node = prompt.node or ""
        about = {"prompt_id": job.id, "timestamp": int(1000 * (job.ended or time.time()))}
        of_node = {"node_id": node, "node_type": prompt.checked.graph.kind(node), "executed": []}
        if job.failure is not None:
            return "execution_error", {
                **about, **of_node, "exception_message": job.failure.message, "exception_type": job.failure.kind,
                "traceback": [], "current_inputs": {}, "current_outputs": [],
            }  # fmt: skip
        if job.interrupted or job.status == "cancelled":
            return "execution_interrupted", {**about, **of_node}
        return "execution_success", about

    def messages(self, event: Event) -> list[dict[str, Any]]:
        """What a client is told of an event."""
        job, prompt = event.job, self.prompts.get(event.job.id)
        about = {"prompt_id": job.id}
        if prompt is None or event.kind == "queued":
            return [self.status()]
        match event.kind:
            case "started":
                return [
                    {"type": "execution_start", "data": {**about, "timestamp": int(1000 * time.time())}},
                    {"type": "execution_cached", "data": {**about, "nodes": []}},
                ]
            case "node":
                node = event.data["node"]
                return [{"type": "executing", "data": {**about, "node": node, "display_node": node}}]
            case "step":
                value = {"value": event.data["step"], "max": event.data["steps"], "node": prompt.node}
                return [{"type": "progress", "data": {**about, **value}}]
            case "output":
                node = event.data["node"]
                told = {**about, "node": node, "display_node": node, "output": event.data["output"]}
                return [{"type": "executed", "data": told}]
            case "ended":
                kind, data = self.how_it_ended(job)
                return [
                    {"type": kind, "data": data},
                    {"type": "executing", "data": {**about, "node": None, "display_node": None}},
                    self.status(),
                ]
        return []


def studio_of(connection: HTTPConnection) -> Studio:
    """The one of a server, which is there from the first request on."""
    state = connection.app.state
    if not hasattr(state, "studio"):
        state.studio = Studio(state.context)
    studio: Studio = state.studio
    return studio


async def socket(connection: WebSocket) -> None:
    """A client's connection: its messages until it goes."""
    studio = studio_of(connection)
    client = connection.query_params.get("clientId", "")[:200] or uuid.uuid4().hex
    await connection.accept()
    box, leave = studio.enter(client)
    hearing = asyncio.ensure_future(_until_gone(connection))
    try:
        first = studio.status()
        first["data"]["sid"] = client
        await connection.send_json(first)
        while not hearing.done():
            taking = asyncio.ensure_future(box.take())
            await asyncio.wait({taking, hearing}, return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                taking.cancel()
                break
            event = taking.result()
            if event.kind == "preview":
                data = await run_in_threadpool(jpeg, event.data["picture"])
                await connection.send_bytes(struct.pack(">II", PREVIEW, JPEG) + data)
            for message in studio.messages(event):
                await connection.send_json(message)
    except (WebSocketDisconnect, RuntimeError):  # it went while it was told something
        pass
    finally:
        hearing.cancel()
        leave()


async def _until_gone(connection: WebSocket) -> None:
    while (await connection.receive())["type"] != "websocket.disconnect":
        pass
