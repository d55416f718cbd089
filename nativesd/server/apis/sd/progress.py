"""How far a job is, and its end: progress, interrupt, skip.

A1111 has one job and one progress for all. Here a client may name its job by the `force_task_id` that it sent; without
a name the job is the A1111 job that runs, and never one of another API.
"""

from __future__ import annotations

import time
from io import BytesIO
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nativesd.server.apis.sd.style import answered
from nativesd.server.context import context_of
from nativesd.server.jobs.job import Job
from nativesd.server.wire.answers import answering, json_answer
from nativesd.server.wire.bodies import data_of, read_object

NAMES = ("force_task_id", "id_task", "task_id")


def routes() -> list[Route]:
    """The API's addresses."""
    return [
        Route("/sdapi/v1/progress", progress),
        Route("/sdapi/v1/interrupt", interrupt, methods=["POST"]),
        Route("/sdapi/v1/skip", skip, methods=["POST"]),
        Route("/internal/progress", internal_progress, methods=["POST"]),
    ]


def _job(request: Request, body: dict[str, Any]) -> tuple[Job | None, bool]:
    """The job that is meant, and whether it was named."""
    desk = context_of(request).desk
    name = next((str(said[each]) for said in (request.query_params, body) for each in NAMES if said.get(each)), None)
    if name is not None:
        job = desk.find(name)
        return (job if job is not None and job.kind == "sd" else None), True
    return next((job for job in desk.running if job.kind == "sd"), None), False


@answering(answered)
async def progress(request: Request) -> Response:
    """As A1111's ProgressResponse; `current_image` is there from the second look on."""
    job, _ = _job(request, {})
    waiting = sum(each.kind == "sd" for each in context_of(request).desk.waiting)
    shows = request.query_params.get("skip_current_image", "false").lower() not in ("true", "1")
    if job is not None and shows:
        job.glanced.set()
    picture = job.preview if job is not None and shows else None
    data = None if picture is None else await run_in_threadpool(_encoded, picture, "PNG")
    runs = job is not None and job.status == "running"
    return json_answer(
        {
            "progress": job.progress if job is not None else 0.0,
            "eta_relative": _left(job),
            "state": {
                "skipped": job is not None and job.skipping.is_set(),
                "interrupted": job is not None and job.ending.is_set(),
                "stopping_generation": False,
                "job": job.id if job is not None else "",
                "job_count": (job.parts if job is not None and runs else 0) + waiting,
                "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.started if job else None)),
                "job_no": job.part if job is not None else 0,
                "sampling_step": job.step if job is not None else 0,
                "sampling_steps": job.steps if job is not None else 0,
            },
            "current_image": data,
            "textinfo": None,
        }
    )


def _left(job: Job | None) -> float:
    """Seconds that are left, guessed from those that went by."""
    if job is None or job.started is None or job.over or not job.progress:
        return 0.0
    return (time.time() - job.started) * (1 / job.progress - 1)


def _encoded(picture: Image.Image, kind: str) -> str:
    data = BytesIO()
    picture.save(data, format=kind)
    return data_of(data.getvalue())


@answering(answered)
async def internal_progress(request: Request) -> Response:
    """As the web UI itself asks (modules/progress.py)."""
    body = await read_object(request, empty=True)
    job, _ = _job(request, body)
    if job is not None and body.get("live_preview", True):
        job.glanced.set()
    picture = job.preview if job is not None else None
    return json_answer(
        {
            "active": job is not None and job.status == "running",
            "queued": job is not None and job.status == "waiting",
            "completed": job is None or job.over,
            "progress": None if job is None else job.progress,
            "eta": _left(job) or None,
            "live_preview": None
            if picture is None
            else f"data:image/jpeg;base64,{await run_in_threadpool(_encoded, picture, 'JPEG')}",
            "id_live_preview": 0 if job is None else job.step,
            "textinfo": None,
        }
    )


@answering(answered)
async def interrupt(request: Request) -> Response:
    """End the job after its step; its answer is the picture so far. A named job that waits ends at once."""
    job, named = _job(request, await read_object(request, empty=True))
    if job is not None and (named or job.status == "running"):
        context_of(request).desk.cancel(job)
    return json_answer({})


@answering(answered)
async def skip(request: Request) -> Response:
    """End the picture that is being made after its step, and go on with the next of the job."""
    job, _ = _job(request, await read_object(request, empty=True))
    if job is not None and job.status == "running":
        job.skipping.set()
    return json_answer({})
