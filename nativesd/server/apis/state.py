"""How the server is: `/health`, and `/metrics` in Prometheus' text form."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

import torch
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from nativesd.server.apis.streams.routes import sessions_of
from nativesd.server.context import Context, context_of
from nativesd.server.wire.answers import json_answer
from nativesd.version import __version__


def routes() -> list[Route]:
    """The addresses."""
    return [Route("/health", health), Route("/metrics", metrics)]


async def health(request: Request) -> Response:
    """Whether it takes jobs: 200, and 503 while it shuts down."""
    context = context_of(request)
    desk = context.desk
    return json_answer(
        {
            "status": "closing" if desk.closing else "ok",
            "version": __version__,
            "model": context.catalogue.current,
            "waiting": len(desk.waiting),
            "running": len(desk.running),
        },
        503 if desk.closing else 200,
    )


async def metrics(request: Request) -> Response:
    """Jobs, the queue, streams, seconds and memory (https://prometheus.io/docs/instrumenting/exposition_formats)."""
    return PlainTextResponse(
        "".join(_lines(context_of(request), len(sessions_of(request)))), media_type="text/plain; version=0.0.4"
    )


def _lines(context: Context, streams: int) -> list[str]:
    desk = context.desk
    lines = [
        _metric("nativesd_jobs_total", "counter", "Jobs by how they ended; refused: the queue was full.",
                {f'{{status="{status}"}}': number for status, number in desk.counts.items()}),
        _metric("nativesd_jobs_waiting", "gauge", "Jobs in the queue.", {"": len(desk.waiting)}),
        _metric("nativesd_jobs_running", "gauge", "Jobs that a worker has.", {"": len(desk.running)}),
        _metric("nativesd_job_seconds_total", "counter", "Seconds that jobs ran.", {"": round(desk.seconds, 6)}),
        _metric("nativesd_streams_open", "gauge", "Streams that clients are connected to.", {"": streams}),
        _metric("nativesd_uptime_seconds", "gauge", "Seconds since the start.",
                {"": round(time.time() - context.started, 3)}),
    ]  # fmt: skip
    if (resident := resident_bytes()) is not None:
        lines.append(_metric("process_resident_memory_bytes", "gauge", "Main memory in use.", {"": resident}))
    if torch.cuda.is_available():
        used = {f'{{device="{i}"}}': torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count())}
        lines.append(_metric("nativesd_cuda_memory_bytes", "gauge", "Memory of GPUs that tensors take.", used))
    return lines


def _metric(name: str, kind: str, words: str, values: Mapping[str, float]) -> str:
    rows = "".join(f"{name}{labels} {value}\n" for labels, value in values.items())
    return f"# HELP {name} {words}\n# TYPE {name} {kind}\n{rows}"


def resident_bytes() -> int | None:
    """What of main memory this process holds (proc(5): /proc/self/statm, in pages); None where that is not told."""
    if sys.platform != "linux":
        return None
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
