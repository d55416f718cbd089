"""Where a stream's frames come from and where its pictures go: folders of pictures, videos, and pipes."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from time import monotonic, sleep
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from nativesd.destination import fresh
from nativesd.errors import SourceError, UsageError, install_line
from nativesd.pictures.images import read_image
from nativesd.pictures.result import write_picture
from nativesd.reading import list_folder

FPS = 25.0
"""Frames per second of what says no rate of its own."""
PIPE = "-"


class Source:
    """Frames in their order, and how many come in a second."""

    def __init__(self, frames: Iterator[Image.Image], fps: float, *, live: bool = False) -> None:
        self.frames, self.fps, self.live = frames, fps, live
        """`live`: they come by themselves, as from a camera, and are not to be held back."""


@contextmanager
def open_source(source: str, fps: float | None = None) -> Iterator[Source]:
    """The frames of a folder of pictures, by their names' order; of a video; or of one that comes in on a pipe ("-").

    Raises SourceError for what cannot be read, UsageError where PyAV is missing.
    """
    path = Path(source)
    if source != PIPE and path.is_dir():
        known = Image.registered_extensions()
        files = sorted((file for file in list_folder(path) if file.suffix.lower() in known), key=_by_numbers)
        if not files:
            raise SourceError(f"{source} has no pictures in it")
        yield Source(map(read_image, files), fps or FPS)
        return
    if source != PIPE and not path.is_file():
        raise SourceError(f"{source} is no folder of pictures and no video: there is no such file")
    av = _av()
    try:
        container = av.open(sys.stdin.buffer if source == PIPE else str(path))
    except (OSError, ValueError) as error:
        raise SourceError(f"{_named(source)} is no video that can be read: {error}") from error
    with container:
        if not container.streams.video:
            raise SourceError(f"{_named(source)} has no video in it")
        rate = container.streams.video[0].average_rate
        yield Source(_decoded(container, av, source), fps or float(rate or FPS), live=source == PIPE)


def _decoded(container: Any, av: Any, source: str) -> Iterator[Image.Image]:
    try:
        for frame in container.decode(video=0):
            yield frame.to_image()
    except (av.error.FFmpegError, OSError) as error:
        raise SourceError(f"{_named(source)} cannot be read to its end: {error}") from error


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """frame-9 before frame-10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _named(source: str) -> str:
    return "what comes in on the pipe" if source == PIPE else source


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise UsageError(f"videos need PyAV: {install_line('stream')} (a folder of pictures does not)") from error


class Latest:
    """The newest of a source's frames, as they come in real time; those that nobody took in time are dropped.

    A thread reads ahead, and holds one frame.
    """

    def __init__(self, source: Source) -> None:
        self.dropped = 0
        self._source = source
        self._news = threading.Condition()
        self._frame: Image.Image | None = None
        self._ended = False
        self._error: BaseException | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        start, period = monotonic(), 1 / self._source.fps
        try:
            for number, frame in enumerate(self._source.frames):
                if not self._source.live:
                    sleep(max(start + number * period - monotonic(), 0))
                with self._news:
                    if self._ended:
                        return
                    self.dropped += self._frame is not None
                    self._frame = frame
                    self._news.notify()
        except Exception as error:
            self._error = error
        with self._news:
            self._ended = True
            self._news.notify()

    def __iter__(self) -> Iterator[Image.Image]:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._frame is not None or self._ended)
                frame, self._frame = self._frame, None
            if frame is None:
                if self._error is not None:
                    raise self._error
                return
            yield frame

    def close(self) -> None:
        """Have the thread end."""
        with self._news:
            self._ended = True


class Sink(Protocol):
    """Where pictures go, one after the other."""

    def write(self, picture: Image.Image) -> None:
        """Take the next one."""


class _Folder:
    """Pictures by their numbers, each of them whole, as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def write(self, picture: Image.Image) -> None:
        """See `Sink`."""
        write_picture(picture, self._folder / f"frame-{self._count:06d}.png")
        self._count += 1


class _Video:
    """A container with one video stream, which the first picture sizes."""

    def __init__(self, target: Path | BinaryIO, fps: float, kind: str | None, codec: str) -> None:
        self._container = _av().open(target if not isinstance(target, Path) else str(target), "w", format=kind)
        self._fps, self._codec = fps, codec
        self._stream: Any = None

    def write(self, picture: Image.Image) -> None:
        """See `Sink`."""
        if self._stream is None:
            self._stream = self._container.add_stream(self._codec, rate=Fraction(self._fps).limit_denominator(1001))
            self._stream.width, self._stream.height = picture.size
            self._stream.pix_fmt = "yuvj420p" if self._codec == "mjpeg" else "yuv420p"
        frame = _av().VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


KINDS = {
    ".mp4": ("mp4", "libx264"), ".mov": ("mov", "libx264"), ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx-vp9"), ".avi": ("avi", "mpeg4"),
}  # fmt: skip
"""Suffix of a video: its container and codec."""


def check_output(output: str) -> None:
    """Raises UsageError for an output that cannot be, before anything is loaded."""
    path = Path(output)
    if output == PIPE or path.suffix.lower() in KINDS:
        _av()
        if output != PIPE and path.exists():
            raise UsageError(f"{output} exists: remove it, or name another")
    elif path.suffix and not path.is_dir():
        raise UsageError(f"{output} is no video that can be written: {', '.join(KINDS)}, or a folder")
    elif path.exists() and not (path.is_dir() and not list_folder(path)):
        raise UsageError(f"{output} exists, and is no empty folder: remove it, or name another")


@contextmanager
def open_sink(output: str, fps: float) -> Iterator[Sink]:
    """Where pictures go: a folder, which is made; a video by its suffix, which is whole or not there; a pipe ("-").

    On a pipe it is Matroska with a JPEG for every picture, so that none waits for the next. Raises UsageError.
    """
    check_output(output)
    with ExitStack() as stack:
        if output != PIPE and Path(output).suffix.lower() not in KINDS:
            Path(output).mkdir(parents=True, exist_ok=True)
            yield _Folder(Path(output))
            return
        if output == PIPE:
            video = _Video(sys.stdout.buffer, fps, "matroska", "mjpeg")
        else:
            writing: AbstractContextManager[Path] = fresh(output)
            kind, codec = KINDS[Path(output).suffix.lower()]
            video = _Video(stack.enter_context(writing), fps, kind, codec)
        try:
            yield video
        except BaseException:
            with suppress(Exception):
                video.close()
            raise
        video.close()
