"""What a server is told at its start."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nativesd.errors import UsageError

APIS = ("sd", "openai", "comfy", "stream")
"""A1111's, OpenAI's, ComfyUI's, and the stream; the jobs and the page are always there."""
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of what a client may ask for."""

    body: int = 64 * MEGABYTE
    """Bytes of a request."""
    side: int = 2048
    """Pixels of a picture's side, also after a second pass."""
    batch: int = 16
    """Pictures of one request."""
    steps: int = 150
    streams: int = 4
    """Open at once."""
    pixels: int = 50_000_000
    """Of a picture that comes in, looked at before it is decoded."""


@dataclass(frozen=True)
class Settings:
    """What a server is told at its start. Raises UsageError for what cannot be, or is not safe.

    models       names to sources (what `nativesd.load` takes); the first is loaded at the start
    loading      further options of `nativesd.load`
    devices      one worker each; None: the one that `load` chooses
    api_key      what clients say as "Authorization: Bearer", or as the password of any user
    users        names and passwords of clients that say "Authorization: Basic"
    origins      other origins whose pages may use the server
    queue        jobs that may wait
    """

    models: Mapping[str, str] = field(default_factory=lambda: {"tiny": "tiny"})
    loading: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str | None, ...] = (None,)
    host: str = "127.0.0.1"
    port: int = 7860
    apis: tuple[str, ...] = APIS
    api_key: str | None = None
    users: Mapping[str, str] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    model_dirs: tuple[Path, ...] = ()
    lora_dirs: tuple[Path, ...] = ()
    control_dirs: tuple[Path, ...] = ()
    image_adapter_dirs: tuple[Path, ...] = ()
    image_encoder_dirs: tuple[Path, ...] = ()
    embedding_dirs: tuple[Path, ...] = ()
    upscaler_dirs: tuple[Path, ...] = ()
    queue: int = 32
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.models and not self.model_dirs:
            raise UsageError("there is no model: name one, or a folder with --model-dir")
        for folder in (
            *self.model_dirs, *self.lora_dirs, *self.control_dirs, *self.image_adapter_dirs, *self.image_encoder_dirs,
            *self.embedding_dirs, *self.upscaler_dirs,
        ):  # fmt: skip
            if not folder.is_dir():
                raise UsageError(f"{folder} is no folder")
        if unknown := [api for api in self.apis if api not in APIS]:
            raise UsageError(f"there is no API {unknown[0]!r}: choose of {', '.join(APIS)}")
        if self.queue < 1:
            raise UsageError(f"queue must be at least 1, not {self.queue}")
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii()):
            raise UsageError("the API key must have 8 ASCII characters or more")
        for origin in self.origins:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or origin == "*":
                raise UsageError(f"an origin is such as https://example.org, not {origin!r}")
        if not self.loopback and not self.guarded:
            raise UsageError(
                f"on {self.host} everybody in the network could use this server: pass --api-key or --api-auth, or "
                "listen on 127.0.0.1"
            )

    @property
    def guarded(self) -> bool:
        """Whether clients have to say who they are."""
        return self.api_key is not None or bool(self.users)

    @property
    def loopback(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine itself."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")
