"""A device's line: jobs and the frames of streams use it one after the other, in the order in which they came."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition


class Line:
    """A lock that goes to who has waited longest, so that nobody who comes again at once keeps the others away.

    A job takes it for all of its work, a stream for one frame: a job waits for a frame of each stream at most, and a
    frame for one job and for the other streams' frames.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._waiting: deque[object] = deque()
        """The first one has it."""

    @contextmanager
    def turn(self, wanted: Callable[[], bool] = lambda: True) -> Iterator[bool]:
        """Wait for the turn; gives whether it came, before it was wanted no more (say so with `look`)."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting[0] is ticket or not wanted())
            yield wanted()
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def look(self) -> None:
        """Have those who wait look whether they still want to."""
        with self._changed:
            self._changed.notify_all()
