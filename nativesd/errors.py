"""The errors a caller can expect. Each message is one sentence: what was wrong, where, and what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class NativesdWarning(UserWarning):
    """The category of every warning of nativesd's, so that a program can filter them."""


class NativesdError(Exception):
    """Base of every error that nativesd raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 3
    of_file = False
    """Whether it is of what a file says, and so in the file's names: see `said_in`."""


class Interrupted(NativesdError):  # noqa: N818  # it is no mistake
    """A call was ended by `Pipeline.interrupt`. `latents`, a tensor (B, C, h, w), are the clean ones of its last step.

    `Pipeline.decode` makes pictures of them, and `result()` a whole `Result`.
    """

    exit_code = 130

    def __init__(self, message: str, latents: Any) -> None:
        super().__init__(message)
        self.latents = latents
        self.finish: Callable[[], Any] | None = None

    def result(self) -> Any:
        """What the call would have returned, made of these latents; a note of it says where it ended."""
        if self.finish is None:
            raise UsageError("this call had no result yet")
        return self.finish()


def install_line(extra: str) -> str:
    """The command that installs what an extra brings: from the checkout, as no package index has nativesd yet."""
    return f'pip install ".[{extra}]"'


class UsageError(NativesdError, ValueError):
    """An option or argument that cannot be: an unknown sampler, a size the model cannot make."""

    exit_code = 2


class SourceError(NativesdError):
    """A file or folder that is missing, unreadable, or not what it has to be."""


class WeightsError(SourceError):
    """Tensors that do not fit the model: missing, left over, of another shape, or claimed twice."""


class NetworkError(NativesdError):
    """The hub could not be reached, or does not have what was asked for."""

    exit_code = 4


@contextmanager
def said_in(where: str) -> Iterator[None]:
    """What is raised meanwhile is of what the file `where` says: its message begins with that, and is in its names."""
    try:
        yield
    except NativesdError as error:
        message = str(error)
        error.args = (message if message.startswith(where) else f"{where}: {message}", *error.args[1:])
        error.of_file = True
        raise


def printable(text: str) -> str:
    """A line with its escape for every character that is not printable.

    A tensor's or a file's name may hold what steers a terminal, or a line break that begins a line of its own.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quote(value: object) -> str:
    """A value for a message: one line, printable, and no longer than 100 characters."""
    if not isinstance(value, str):
        return reprlib.repr(value)
    text = f"'{value}'" if value.isprintable() else ascii(value)
    return text if len(text) <= 100 else f"{text[:96]}...'"


class NoMemoryError(NativesdError):
    """More memory would be needed than there is, on the GPU or beside it."""
