"""A job: what it does, how far it is, and who listens."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

Status = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED: tuple[Status, ...] = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    kinds: "started", "step", "preview" (`data["picture"]`), "node" and "output" (of graphs), and at the end "ended".
    """

    job: Job
    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a job failed, in a sentence for the client. `ours`: by a fault of the program, not of what it was given."""

    message: str
    kind: str
    ours: bool = False


@dataclass(frozen=True)
class Made:
    """A picture as a file, and what it was made with."""

    data: bytes
    infotext: str
    seed: int
    width: int
    height: int
    type: str = "image/png"


Listener = Callable[[Event], None]
Work = Callable[[Any], Any]
"""What a worker runs: it is given a `Turn`."""


class Job:
    """Work that waits for its turn on a model. All of it may be used from any thread.

    kind     which API asked
    work     what a worker runs; what it returns is `value`
    private  the client waits for the answer itself: nothing is kept of it
    """

    def __init__(self, kind: str, work: Work, *, name: str | None = None, private: bool = False) -> None:
        self.id = name or secrets.token_hex(16)
        self.kind = kind
        self.work = work
        self.private = private
        self.status: Status = "waiting"
        self.created = time.time()
        self.started: float | None = None
        self.ended: float | None = None
        self.failure: Failure | None = None
        self.value: Any = None
        self.pictures: list[Made] = []
        self.notes: list[str] = []
        self.interrupted = False
        """Ended before it was whole; its pictures are those so far."""
        self.ending = threading.Event()
        """Set: the job is to end after the step it is in."""
        self.skipping = threading.Event()
        """Set: the picture that is being made is to end after its step."""
        self.step, self.steps = 0, 0
        self.part, self.parts = 0, 1
        self.preview: Image.Image | None = None
        self.watched = 0
        """How many listen for previews."""
        self.glanced = threading.Event()
        """Set: somebody asked for a preview once."""
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in ENDED

    @property
    def progress(self) -> float:
        """The share that is done, 0 to 1."""
        if self.over:
            return 1.0
        return min((self.part + (self.step / self.steps if self.steps else 0)) / max(self.parts, 1), 1.0)

    def listen(self, listener: Listener, *, previews: bool = False) -> Callable[[], None]:
        """Have a function called at every event, from whatever thread; returns what ends that."""
        with self._lock:
            self._listeners.append(listener)
            self.watched += previews

        def leave() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)
                    self.watched -= previews

        return leave

    def tell(self, kind: str, **data: Any) -> None:
        """Tell those who listen."""
        with self._lock:
            listeners = tuple(self._listeners)
        event = Event(self, kind, data)
        for listener in listeners:
            listener(event)

    def begin(self) -> None:
        """Its turn has come."""
        self.status, self.started = "running", time.time()
        self.tell("started")

    def end(self, status: Status, failure: Failure | None = None) -> None:
        """It is over; what it needed is let go."""
        self.failure, self.ended = failure, time.time()
        self.preview = None
        self.work = _nothing
        self.status = status
        self.tell("ended")


def _nothing(_turn: object) -> None:
    """The work of a job that is over."""
