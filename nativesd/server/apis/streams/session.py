"""A connection's stream: its newest frame, the turn on the device, and its newest picture."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from nativesd.errors import UsageError
from nativesd.pipeline.asked.readers import shown
from nativesd.server.apis.own import jpeg, named_control, named_image_prompts, named_lora
from nativesd.server.context import Context
from nativesd.server.jobs.shelf import Shelf
from nativesd.server.wire.bodies import Intake
from nativesd.server.wire.fields import listed
from nativesd.streaming.stream import Stream

PATIENCE = 60.0
"""Seconds in which there must be a frame, and somebody who reads the pictures."""
QUALITY = 90
"""Of the JPEG files."""
OPENING = ("model", "loras", "control")
"""Options that are names of the server, beside those of `Pipeline.stream`."""


@dataclass(frozen=True)
class Given:
    """A frame that came: the stream's options, and the picture's file."""

    options: Mapping[str, Any]
    data: bytes


class Session:
    """A connection's stream, its newest frame and its newest picture. Used on the event loop but for `make`."""

    def __init__(self, context: Context, shelf: Shelf) -> None:
        self.context = context
        self.shelf = shelf
        self.gone = threading.Event()
        self.readers = 0
        self.picture: bytes | None = None
        self._slot: Given | None = None
        self._number = 0
        self._changed = asyncio.Condition()
        self._stream: Stream | None = None
        self._asked: Mapping[str, Any] = {}

    async def put(self, given: Given) -> None:
        """Keep a frame until it is taken, or until the next one comes."""
        async with self._changed:
            self._slot = given
            self._changed.notify_all()

    async def take(self) -> Given | None:
        """The newest frame, when there is one and somebody reads; None at the end. Raises TimeoutError."""
        async with self._changed:
            ready = self._changed.wait_for(lambda: self.gone.is_set() or (self._slot is not None and self.readers > 0))
            await asyncio.wait_for(ready, PATIENCE)
            given, self._slot = self._slot, None
            return None if self.gone.is_set() else given

    async def show(self, picture: bytes) -> None:
        """Give a picture to those who read."""
        async with self._changed:
            self.picture, self._number = picture, self._number + 1
            self._changed.notify_all()

    async def read(self) -> AsyncGenerator[bytes]:
        """The pictures from now on; a slow reader gets the newest ones."""
        seen = self._number
        try:
            async with self._changed:
                self.readers += 1
                self._changed.notify_all()
            while await self._after(seen):
                seen, picture = self._number, self.picture
                assert picture is not None
                yield picture
        finally:
            self.readers -= 1

    async def _after(self, number: int) -> bool:
        """Wait for a later picture; False at the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.gone.is_set() or self._number > number)
        return not self.gone.is_set()

    async def leave(self) -> None:
        """The connection is over: whoever waits goes on."""
        self.gone.set()
        self.shelf.line.look()
        async with self._changed:
            self._changed.notify_all()

    def make(self, given: Given) -> bytes | None:
        """A frame's turn: the picture that is done then, as a file; None where there is none yet.

        Raises NativesdError for what is no picture, or cannot be asked for, and what the networks raise.
        """
        limits = self.context.settings.limits
        frame = Intake(replace(limits, pixels=min(limits.pixels, limits.side**2))).decoded("the frame", given.data)
        with self.shelf.line.turn(lambda: not self.gone.is_set()) as mine:
            if not mine:
                return None
            made = self._following(given.options)(frame.convert("RGB"))
        if made is None:
            return None
        assert isinstance(made.image, Image.Image)
        return jpeg(made.image, QUALITY)

    def _following(self, options: Mapping[str, Any]) -> Stream:
        """The stream, which makes what is asked for now."""
        if self._stream is None:
            self._stream = self._opened(options)
        elif self.shelf.loaded is not self._stream.pipeline:
            raise UsageError("a job has loaded another model, which ends this stream: connect again")
        elif changes := {name: value for name, value in options.items() if value != self._asked.get(name)}:
            for name in OPENING:
                if name in changes:
                    raise UsageError(f"{name} is what a stream begins with, and cannot change: connect again")
            self._stream.update(**_bounded(changes, self.context))
        self._asked = {**self._asked, **options}
        return self._stream

    def _opened(self, options: Mapping[str, Any]) -> Stream:
        asked = _bounded(options, self.context)
        model, loras, control = (asked.pop(name, None) for name in OPENING)
        catalogue = self.context.catalogue
        if model is not None and not isinstance(model, str):
            raise UsageError(f"model must be a name, not {shown(model)}")
        if loras is not None:
            asked["loras"] = [named_lora(each, self.context) for each in listed("loras", loras)]
        elif catalogue.models[catalogue.model(model)] == "tiny":
            asked["loras"] = ["tiny-lcm"]  # as `nativesd.stream` has it
        if control is not None:
            intake = self.context.intake()
            asked["control"] = [named_control(each, self.context, intake) for each in listed("control", control)]
        return self.shelf.pipeline(model).stream(**asked)

    def close(self) -> None:
        """End the stream; after its last frame."""
        if self._stream is not None:
            self._stream.close()


def _bounded(options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Options within the server's bounds. Raises UsageError for others, and for what is no client's business."""
    limits = context.settings.limits
    if "output" in options:
        raise UsageError("output cannot be asked for here")
    for name in ("width", "height"):
        if isinstance(side := options.get(name), int | float) and side > limits.side:
            raise UsageError(f"{name} must be at most {limits.side} pixels on this server, not {shown(side)}")
    for name in ("prompts", "seeds", "loras", "control", "image_prompts"):
        if isinstance(several := options.get(name), list) and len(several) > limits.batch:
            raise UsageError(f"{name} must be at most {limits.batch} on this server, not {len(several)}")
    return {**options, **named_image_prompts(options, context, context.intake())}
