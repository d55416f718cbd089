"""How far a call is: a bar on a terminal, plain lines where there is none, and at the end one line that stays."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from tqdm import tqdm

from nativesd.cli.common import say, size_text
from nativesd.latents.preview import Step

EVERY = 5.0  # seconds between plain lines


class Steps:
    """The steps of a call, as they come."""

    def __init__(self) -> None:
        self.taken = 0
        self._said = perf_counter()
        self._bar = tqdm(file=sys.stderr, unit="step", leave=False, disable=None)

    def __call__(self, step: Step) -> None:
        """Show that one was taken."""
        self.taken += 1
        if step.index == 0:  # of the first pass, or of a second
            self._bar.reset(step.total)
        self._bar.update()
        if self._bar.disable and perf_counter() - self._said >= EVERY:
            say(f"step {step.index + 1} of {step.total}")
            self._said = perf_counter()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


class _Lines(logging.Handler):
    """What the library logs, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def listening() -> Iterator[None]:
    """Meanwhile what the library logs about its work is said."""
    log, handler = logging.getLogger("nativesd"), _Lines()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def progress(device: torch.device) -> Iterator[Steps]:
    """The steps of a call while it runs; after it, what it took."""
    start, steps = perf_counter(), Steps()
    try:
        yield steps
    finally:
        steps.close()
    peak = peak_bytes(device)
    memory = "" if peak is None else f", peak memory {size_text(peak)}"
    say(f"{steps.taken} {'step' if steps.taken == 1 else 'steps'} in {perf_counter() - start:.1f} s{memory}")


def peak_bytes(device: torch.device) -> int | None:
    """The most that was in use so far: of a GPU by torch, else of main memory by this process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # getrusage(2): bytes there, kB on Linux
