"""The addresses of ComfyUI's API, with and without `/api` before them: its queue, history, files and lists."""

from __future__ import annotations

import sys
from typing import Any

import torch
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from nativesd.errors import UsageError
from nativesd.reading import is_name
from nativesd.server.apis.comfy.checking import GraphError, check_graph
from nativesd.server.apis.comfy.files import KINDS
from nativesd.server.apis.comfy.nodes import NODES, choices, object_info
from nativesd.server.apis.comfy.running import Prompt
from nativesd.server.apis.comfy.socket import Studio, socket, studio_of
from nativesd.server.apis.state import resident_bytes
from nativesd.server.context import context_of
from nativesd.server.jobs.job import Job
from nativesd.server.wire.answers import Refusal, answering, json_answer
from nativesd.server.wire.bodies import read_object
from nativesd.version import __version__

FOLDERS = {
    "checkpoints": "models", "loras": "loras", "controlnet": "controls", "ipadapter": "image_adapters",
    "clip_vision": "image_encoders",
}  # fmt: skip


def routes() -> list[BaseRoute]:
    """The API's addresses."""
    bare: list[tuple[str, Any, str]] = [
        ("/prompt", post_prompt, "POST"), ("/prompt", get_prompt, "GET"), ("/queue", get_queue, "GET"),
        ("/queue", post_queue, "POST"), ("/interrupt", interrupt, "POST"), ("/history", get_history, "GET"),
        ("/history", post_history, "POST"), ("/history/{id}", get_history, "GET"), ("/view", view, "GET"),
        ("/upload/image", upload, "POST"), ("/object_info", get_object_info, "GET"),
        ("/object_info/{name}", get_object_info, "GET"), ("/system_stats", system_stats, "GET"),
        ("/embeddings", embeddings, "GET"), ("/models", model_folders, "GET"), ("/models/{folder}", models, "GET"),
        ("/extensions", nothing, "GET"), ("/features", features, "GET"),
    ]  # fmt: skip
    return [
        *(Route(before + path, handler, methods=[method]) for before in ("", "/api") for path, handler, method in bare),
        *(WebSocketRoute(before + "/ws", socket) for before in ("", "/api")),
    ]


def style(refusal: Refusal) -> Response:
    """An error as ComfyUI says it; what cannot be is 400."""
    error = {"type": refusal.code or "error", "message": refusal.message, "details": refusal.field or "",
             "extra_info": {}}  # fmt: skip
    status = 400 if refusal.status == 422 else refusal.status
    return json_answer({"error": error, "node_errors": {}}, status, refusal.headers)


@answering(style)
async def post_prompt(request: Request) -> Response:
    """Have a graph run."""
    context, studio = context_of(request), studio_of(request)
    body = await read_object(request)
    lists = choices(context.catalogue, studio.files.names("input"))
    try:
        checked = await run_in_threadpool(check_graph, body.get("prompt"), lists, context.settings.limits)
    except GraphError as error:
        return json_answer(error.answer, 400)
    client = said if isinstance(said := body.get("client_id"), str) else ""
    extra = given if isinstance(given := body.get("extra_data"), dict) else {}
    name = body.get("prompt_id")
    if name is not None and (not isinstance(name, str) or not is_name(name)):
        raise UsageError("prompt_id must be a name")
    prompt = Prompt(
        number=studio.next_number(),
        checked=checked,
        client=client,
        extra=extra,
        files=studio.files,
        previews=studio.wants_previews(client, extra),
    )
    job = Job("comfy", prompt, name=name)
    studio.submit(job, prompt)
    return json_answer({"prompt_id": job.id, "number": prompt.number, "node_errors": {}})


@answering(style)
async def get_prompt(request: Request) -> Response:
    """How many prompts wait and run."""
    return json_answer({"exec_info": {"queue_remaining": studio_of(request).remaining()}})


def _row(studio: Studio, job: Job) -> list[Any]:
    prompt = studio.prompts[job.id]
    return [prompt.number, job.id, prompt.checked.graph.nodes, dict(prompt.extra), prompt.checked.outputs]


@answering(style)
async def get_queue(request: Request) -> Response:
    """What runs and waits."""
    studio, desk = studio_of(request), context_of(request).desk
    rows = {
        name: [_row(studio, job) for job in jobs if job.id in studio.prompts]
        for name, jobs in (("queue_running", desk.running), ("queue_pending", desk.waiting))
    }
    return json_answer(rows)


@answering(style)
async def post_queue(request: Request) -> Response:
    """Take prompts out that wait: those named in `delete`, or with `clear` all of this API's."""
    body, studio, desk = await read_object(request), studio_of(request), context_of(request).desk
    for job in desk.waiting:
        if job.id in studio.prompts and (body.get("clear") is True or job.id in _names(body)):
            desk.cancel(job)
    return Response()


def _names(body: dict[str, Any]) -> list[Any]:
    names = body.get("delete", [])
    if not isinstance(names, list):
        raise UsageError("delete must be a list of prompt ids")
    return names


@answering(style)
async def interrupt(request: Request) -> Response:
    """End the named prompt after its step, or without a name the one of this API that runs; no other is touched."""
    body, desk = await read_object(request, empty=True), context_of(request).desk
    name = body.get("prompt_id")
    for job in (*desk.running, *(desk.waiting if name else ())):
        if job.kind == "comfy" and name in (None, job.id):
            desk.cancel(job)
            break
    return Response()


@answering(style)
async def get_history(request: Request) -> Response:
    """What became of the prompts that ended not long ago."""
    studio, desk = studio_of(request), context_of(request).desk
    name = request.path_params.get("id")
    most = request.query_params.get("max_items", "")
    jobs = [job for job in desk.ended if job.id in studio.prompts and name in (None, job.id)]
    if most.isdecimal():
        jobs = jobs[-min(int(most[:9]), len(jobs)) :] if int(most[:9]) else []
    return json_answer({job.id: _told(studio, job) for job in jobs})


def _told(studio: Studio, job: Job) -> dict[str, Any]:
    good = job.status == "done" and not job.interrupted
    messages: list[Any] = [["execution_start", {"prompt_id": job.id}]]
    messages.append(["execution_success" if good else studio.how_it_ended(job)[0], studio.how_it_ended(job)[1]])
    return {
        "prompt": _row(studio, job),
        "outputs": studio.prompts[job.id].outputs,
        "status": {"status_str": "success" if good else "error", "completed": good, "messages": messages},
        "meta": {},
    }


@answering(style)
async def post_history(request: Request) -> Response:
    """Forget prompts that ended."""
    body, studio, desk = await read_object(request), studio_of(request), context_of(request).desk
    for job in desk.ended:
        if job.id in studio.prompts and (body.get("clear") is True or job.id in _names(body)):
            desk.forget(job)
            studio.prompts.pop(job.id, None)
    return Response()


@answering(style)
async def view(request: Request) -> Response:
    """A picture that was made or uploaded."""
    asked = request.query_params
    kind, name = asked.get("type", "output"), asked.get("filename", "")
    folder = asked.get("subfolder", "")
    data = studio_of(request).files.get(kind, f"{folder}/{name}" if folder else name)
    if data is None:
        raise Refusal(404, f"there is no picture {name[:100]!r}; they are kept for an hour", code="not_found")
    return Response(data, media_type=_media_type(data), headers={"Content-Disposition": 'inline; filename="picture"'})


def _media_type(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "image/png"
    return "image/jpeg" if data.startswith(b"\xff\xd8") else "image/webp" if data[8:12] == b"WEBP" else "image/gif"


@answering(style)
async def upload(request: Request) -> Response:
    """Take a picture for LoadImage. It is decoded once, so that what is kept is a picture."""
    context, studio = context_of(request), studio_of(request)
    async with request.form(max_files=2, max_fields=20) as form:
        file, folder = form.get("image"), str(form.get("subfolder", ""))
        kind, over = str(form.get("type", "input")), str(form.get("overwrite", "")).lower() in ("true", "1")
        if not isinstance(file, UploadFile):
            raise UsageError("image must be a file")
        name, data = file.filename or "picture.png", await file.read()
    if kind not in KINDS or not is_name(name) or (folder and not all(map(is_name, folder.split("/")))):
        raise UsageError(f"image must have a plain name, not {f'{folder}/{name}'[:100]!r}")
    await run_in_threadpool(context.intake().decoded, "image", data)
    whole = f"{folder}/{name}" if folder else name
    stem, dot, suffix = name.rpartition(".")
    number = 0
    while not over and (kept := studio.files.get(kind, whole)) is not None and kept != data:
        number += 1
        name = f"{stem or suffix} ({number}){dot if stem else ''}{suffix if stem else ''}"
        whole = f"{folder}/{name}" if folder else name
    studio.files.put(kind, whole, data)
    return json_answer({"name": name, "subfolder": folder, "type": kind})


@answering(style)
async def get_object_info(request: Request) -> Response:
    """The nodes."""
    context, name = context_of(request), request.path_params.get("name")
    lists = choices(context.catalogue, studio_of(request).files.names("input"))
    names = list(NODES) if name is None else [name] if name in NODES else []
    return json_answer(object_info(names, lists, context.settings.limits))


@answering(style)
async def system_stats(request: Request) -> Response:
    """What it runs on."""
    shelves = context_of(request).desk.shelves
    devices = [
        {"name": str(shelf.loaded.device), "type": shelf.loaded.device.type, "index": shelf.loaded.device.index or 0,
         "vram_total": 0, "vram_free": 0, "torch_vram_total": 0, "torch_vram_free": 0}
        for shelf in shelves if shelf.loaded is not None
    ]  # fmt: skip
    system = {
        "os": sys.platform, "comfyui_version": f"nativesd {__version__}", "python_version": sys.version,
        "pytorch_version": torch.__version__, "embedded_python": False, "argv": [], "ram_total": 0, "ram_free": 0,
        "ram_used": resident_bytes(),
    }  # fmt: skip
    return json_answer({"system": system, "devices": devices})


@answering(style)
async def embeddings(request: Request) -> Response:
    """The names of learnt words."""
    return json_answer(list(context_of(request).catalogue.embeddings))


@answering(style)
async def model_folders(_request: Request) -> Response:
    """The kinds of models that there are lists of."""
    return json_answer(list(FOLDERS))


@answering(style)
async def models(request: Request) -> Response:
    """The names of a kind."""
    folder = request.path_params["folder"]
    if folder not in FOLDERS:
        raise Refusal(404, f"there is no list {folder[:100]!r}: there is {', '.join(FOLDERS)}", code="not_found")
    return json_answer(choices(context_of(request).catalogue, ())[FOLDERS[folder]])


@answering(style)
async def nothing(_request: Request) -> Response:
    """An empty list."""
    return json_answer([])


@answering(style)
async def features(request: Request) -> Response:
    """What a client may count on."""
    return json_answer(
        {"supports_preview_metadata": False, "max_upload_size": context_of(request).settings.limits.body}
    )
