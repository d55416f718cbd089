"""What there is, as A1111 lists it: models, samplers, LoRAs and all that its clients ask for at their start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nativesd.pictures.infotext import shown_schedule
from nativesd.pipeline.asked.hires import LATENT, PIXELS
from nativesd.sampling.table import SAMPLERS, SCHEDULES
from nativesd.server.apis.sd.style import answered
from nativesd.server.apis.state import resident_bytes
from nativesd.server.context import Context, context_of
from nativesd.server.wire.answers import answering, json_answer
from nativesd.version import __version__
from nativesd.weights.files.hashes import known_hashes

SCRIPTS = {False: ["controlnet"], True: ["controlnet", "soft inpainting"]}
"""By whether they are for pictures that begin from pictures."""
BESIDE = "controlnet m2m"
"""The extension's other script, by which webuiapi knows that it is there; else its next request repeats units."""


def routes() -> list[Route]:
    """The API's addresses."""
    lists: dict[str, Callable[[Context], Any]] = {
        "cmd-flags": lambda context: {"api": True, "lora_dir": [str(d) for d in context.settings.lora_dirs]},
        "samplers": lambda _: _samplers(),
        "schedulers": lambda _: _schedulers(),
        "upscalers": lambda context: [
            _upscaler(name) for name in (*map(str.title, PIXELS), *context.catalogue.upscalers)
        ],
        "latent-upscale-modes": lambda _: [{"name": name.capitalize()} for name in LATENT],
        "sd-models": _models,
        "sd-vae": lambda _: [],
        "sd-modules": lambda _: [],
        "hypernetworks": lambda _: [],
        "face-restorers": lambda _: [],
        "realesrgan-models": lambda _: [],
        "prompt-styles": lambda _: [],
        "loras": lambda context: [_lora(name, file) for name, file in context.catalogue.loras.items()],
        "embeddings": _embeddings,
        "memory": lambda _: _memory(),
        "scripts": lambda _: {"txt2img": [*SCRIPTS[False], BESIDE], "img2img": [*SCRIPTS[True], BESIDE]},
        "script-info": lambda _: [
            {"name": name, "is_alwayson": True, "is_img2img": is_img2img, "args": []}
            for is_img2img in (False, True)
            for name in SCRIPTS[is_img2img]
        ],
        "extensions": lambda _: [],
        "server-info": _server,
    }
    refreshes = ("checkpoints", "vae", "loras", "embeddings")
    return [
        *(Route(f"/sdapi/v1/{name}", _listing(made)) for name, made in lists.items()),
        *(Route(f"/sdapi/v1/refresh-{name}", refresh, methods=["POST"]) for name in refreshes),
        Route("/config", _listing(_server)),
    ]


def _listing(made: Callable[[Context], Any]) -> Callable[[Request], Any]:
    @answering(answered)
    async def answer(request: Request) -> Response:
        return json_answer(await run_in_threadpool(made, context_of(request)))

    return answer


@answering(answered)
async def refresh(request: Request) -> Response:
    """Look into the folders again."""
    await run_in_threadpool(context_of(request).catalogue.refresh)
    return json_answer({})


def _samplers() -> list[dict[str, Any]]:
    return [{"name": sampler.name, "aliases": list(sampler.aliases), "options": {}} for sampler in SAMPLERS]


def _schedulers() -> list[dict[str, Any]]:
    return [
        {
            "name": schedule.name.replace(" ", "_"), "label": shown_schedule(schedule.name),
            "aliases": list(schedule.aliases), "default_rho": 7.0 if schedule.name == "karras" else -1,
            "need_inner_model": False,
        }
        for schedule in SCHEDULES
    ]  # fmt: skip


def _upscaler(name: str) -> dict[str, Any]:
    return {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}


def _models(context: Context) -> list[dict[str, Any]]:
    files = {name: context.catalogue.file(name) for name in context.catalogue.models}
    known = {name: known_hashes(file) for name, file in files.items()}
    return [
        {"title": name, "model_name": name, "hash": hashes and hashes.auto_v2, "sha256": hashes and hashes.sha256,
         "filename": str(files[name]), "config": None}
        for name, hashes in known.items()
    ]  # fmt: skip


def _lora(name: str, file: str) -> dict[str, Any]:
    return {"name": name, "alias": name, "path": file, "metadata": {}}


def _embeddings(context: Context) -> dict[str, Any]:
    refused = {name for shelf in context.desk.shelves for name in shelf.refused}
    rows = {
        name: {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": None, "vectors": None}
        for name in context.catalogue.embeddings
    }
    return {
        "loaded": {name: row for name, row in rows.items() if name not in refused},
        "skipped": {name: row for name, row in rows.items() if name in refused},
    }


def _memory() -> dict[str, Any]:
    total = _of_system(("SC_PHYS_PAGES", "SC_PAGE_SIZE"))
    free = _of_system(("SC_AVPHYS_PAGES", "SC_PAGE_SIZE"))
    ram = {"free": free, "used": resident_bytes(), "total": total}
    if not torch.cuda.is_available():
        return {"ram": ram, "cuda": {"error": "unavailable"}}
    left, whole = torch.cuda.mem_get_info()
    return {
        "ram": ram,
        "cuda": {"system": {"free": left, "used": whole - left, "total": whole},
                 "allocated": {"current": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}},
    }  # fmt: skip


def _of_system(names: Iterable[str]) -> int | None:
    """A product of what sysconf(3) tells; None where it does not."""
    product = 1
    for name in names:
        if name not in getattr(os, "sysconf_names", {}):
            return None
        product *= os.sysconf(name)
    return product


def _server(context: Context) -> dict[str, Any]:
    return {
        "version": __version__,
        "app": "nativesd",
        "model": context.catalogue.current,
        "devices": [str(shelf.loaded.device) for shelf in context.desk.shelves if shelf.loaded is not None],
    }
