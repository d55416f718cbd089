"""`nativesd serve`: its options, and from them to a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from nativesd.cli.common import main, say
from nativesd.cli.help import section
from nativesd.errors import UsageError, install_line

FOLDER = click.Path(path_type=Path)


@main.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@section(
    "The address",
    click.option("--host", default="127.0.0.1", show_default=True, help="Beyond this machine only with a key."),
    click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 is a free one."),
    click.option("--api", "apis", help="Of sd (A1111's), openai, comfy, stream [default: all]."),
)
@section(
    "Who may use it",
    click.option("--api-key", envvar="NATIVESD_API_KEY", help="What clients have to say [env: NATIVESD_API_KEY]."),
    click.option("--api-auth", envvar="NATIVESD_API_AUTH", metavar="USER:PASS[,...]", help="The same, by names."),
    click.option("--allow-origin", "origins", multiple=True, help="Web pages that may use it; repeatable."),
)
@section(
    "What there is",
    click.option("--model-dir", "model_dirs", type=FOLDER, multiple=True, help="Folder of models; repeatable."),
    click.option("--lora-dir", "lora_dirs", type=FOLDER, multiple=True, help="Folder of LoRAs; repeatable."),
    click.option("--control-dir", "control_dirs", type=FOLDER, multiple=True, help="Folder of ControlNets."),
    click.option(
        "--image-adapter-dir", "image_adapter_dirs", type=FOLDER, multiple=True, help="Folder of IP-Adapters."
    ),
    click.option("--image-encoder-dir", "image_encoder_dirs", type=FOLDER, multiple=True, help="Of CLIP's."),
    click.option("--embedding-dir", "embedding_dirs", type=FOLDER, multiple=True, help="Folder of embeddings."),
    click.option("--upscaler-dir", "upscaler_dirs", type=FOLDER, multiple=True, help="Of ESRGAN and its kin."),
)
@section(
    "Bounds",
    click.option("--queue", type=click.IntRange(1, 10_000), default=32, show_default=True, help="Jobs that may wait."),
    click.option(
        "--max-side", "side", type=click.IntRange(64, 16_384), default=2048, show_default=True, help="Pixels."
    ),
    click.option(
        "--max-batch", "batch", type=click.IntRange(1, 1000), default=16, show_default=True, help="Pictures a job."
    ),
    click.option(
        "--max-steps", "steps", type=click.IntRange(1, 999), default=150, show_default=True, help="Of a picture."
    ),
    click.option(
        "--max-streams", "streams", type=click.IntRange(1, 100), default=4, show_default=True, help="At once."
    ),
    click.option(
        "--max-body", "body", type=click.IntRange(1, 4096), default=64, show_default=True, help="MB of a request."
    ),
)
@section(
    "This machine",
    click.option("--device", "devices", multiple=True, help="cpu, cuda, cuda:1, ...; repeatable: a worker each."),
    click.option("--dtype", help="float16, bfloat16 or float32 [default: float16 on CUDA, else float32]."),
    click.option("--offload", is_flag=True, default=None, help="Keep what is not in use in main memory."),
    click.option("--quantize", type=click.Choice(["int8"]), help="Keep the UNet's weights in 8 bits: half the memory."),
    click.option("--preview", help="A TAESD (taesd, or a file or folder) for the previews."),
)
@click.option("--log-prompts", is_flag=True, help="Write prompts into the log.")
def serve(
    models: Sequence[str],
    apis: str | None,
    api_auth: str | None,
    side: int,
    batch: int,
    steps: int,
    streams: int,
    body: int,
    devices: Sequence[str],
    dtype: str | None,
    offload: bool | None,
    quantize: str | None,
    preview: str | None,
    **given: Any,
) -> None:
    """Serve pictures over HTTP, to A1111's, OpenAI's and ComfyUI's clients and to a page, until it is told to end."""
    try:
        from nativesd.server.serve import serve as run
    except ModuleNotFoundError as error:
        raise UsageError(f"serve needs {error.name}: {install_line('server')}") from None
    from nativesd.server.settings import APIS, MEGABYTE, Limits, Settings

    loading = {"dtype": dtype, "offload": offload, "quantize": quantize, "preview": preview}
    settings = Settings(
        models=_named(models or (() if given["model_dirs"] else ("tiny",))),
        loading={name: value for name, value in loading.items() if value is not None},
        devices=tuple(devices) or (None,),
        apis=APIS if apis is None else tuple(filter(None, map(str.strip, apis.split(",")))),
        users=_users(api_auth),
        limits=Limits(side=side, batch=batch, steps=steps, streams=streams, body=body * MEGABYTE),
        **given,
    )
    import logging

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("nativesd").setLevel(logging.INFO)
    run(settings, ready=lambda address: say(f"listening on {address}"))


def _named(models: Sequence[str]) -> dict[str, str]:
    """Sources by the names that clients say."""
    named: dict[str, str] = {}
    for source in models:
        name = Path(source).stem if Path(source).is_file() else Path(source).name
        if name in named:
            raise click.UsageError(f"two models are called {name}: {named[name]} and {source}")
        named[name] = source
    return named


def _users(text: str | None) -> dict[str, str]:
    """Names and passwords, as A1111's --api-auth has them."""
    users: dict[str, str] = {}
    for pair in filter(None, (text or "").split(",")):
        name, colon, password = pair.strip().partition(":")
        if not name or not colon or not password:
            raise click.UsageError("--api-auth must be USER:PASS, or several with commas between them")
        if name in users:
            raise click.UsageError(f"--api-auth has two passwords for {name}: keep one of them")
        users[name] = password
    return users
