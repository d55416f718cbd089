"""The desk: jobs wait in one bounded queue, and every device's worker takes the next one."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence

from nativesd.errors import Interrupted, NativesdError, NoMemoryError, UsageError, quote
from nativesd.server.jobs.job import Failure, Job, Status
from nativesd.server.jobs.shelf import Shelf
from nativesd.server.jobs.turn import Ended, Turn

KEPT = 1000
"""Ended jobs that are remembered, without the pictures of those whose clients waited."""
KEPT_SECONDS = 3600.0
KEPT_BYTES = 256 << 20
"""Of their pictures; the oldest go first."""
MOST_NAME = 200
"""Characters of a job's id, where its client gives it."""
USUAL_SECONDS = 5.0
"""A job's, before there was one."""
log = logging.getLogger("nativesd.server")


class QueueFull(NativesdError):  # noqa: N818  # nothing is wrong with it
    """No more jobs may wait. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Closing(NativesdError):  # noqa: N818
    """The server shuts down."""


class Desk:
    """One worker for every shelf, and at most `limit` jobs that wait."""

    def __init__(self, shelves: Sequence[Shelf], limit: int) -> None:
        self.shelves = shelves
        self.limit = limit
        self.closing = False
        self.counts = {"done": 0, "failed": 0, "cancelled": 0, "refused": 0}
        self.seconds = 0.0
        """That jobs ran, altogether."""
        self._seconds_each = USUAL_SECONDS
        self._waiting: deque[Job] = deque()
        self._running: dict[Shelf, Job] = {}
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._changed = threading.Condition()
        self._workers = [
            threading.Thread(target=self._serve, args=(shelf,), name=f"nativesd-worker-{number}", daemon=True)
            for number, shelf in enumerate(shelves)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, job: Job) -> Job:
        """Have a job wait. Raises QueueFull, Closing, and UsageError for a name that is none, or that another has."""
        if not (job.id.isprintable() and len(job.id) <= MOST_NAME):
            raise UsageError(f"a job's id must be printable, of at most {MOST_NAME} characters, not {quote(job.id)}")
        with self._changed:
            if self.closing:
                raise Closing("the server is shutting down")
            if self.find(job.id) is not None:
                raise UsageError(f"there is a job {job.id} already")
            if len(self._waiting) >= self.limit:
                self.counts["refused"] += 1
                seconds = max(int(self._seconds_each * len(self._waiting) / len(self.shelves)), 1)
                raise QueueFull(f"{len(self._waiting)} jobs are waiting, and no more may: try again later", seconds)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def find(self, name: str) -> Job | None:
        """A job by its id: waiting, running, or ended not long ago."""
        with self._changed:
            for job in (*self._waiting, *self._running.values()):
                if job.id == name:
                    return job
            return self._ended.get(name)

    @property
    def waiting(self) -> list[Job]:
        """The jobs that wait, the next one first."""
        with self._changed:
            return list(self._waiting)

    @property
    def running(self) -> list[Job]:
        """The jobs that run, the one that began first first."""
        with self._changed:
            return sorted(self._running.values(), key=lambda job: job.started or 0)

    @property
    def ended(self) -> list[Job]:
        """The jobs that ended, the last one last."""
        with self._changed:
            return list(self._ended.values())

    def busy(self, shelf: Shelf) -> bool:
        """Whether a job has a shelf, or is the next one that gets it."""
        with self._changed:
            return shelf in self._running

    def position(self, job: Job) -> int | None:
        """How many jobs are before a waiting one; None: it does not wait."""
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else None

    def cancel(self, job: Job) -> bool:
        """End a job: at once where it waits, after its step where it runs. Returns whether it was not over yet."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.end("cancelled")
                self._remember(job)
                return True
            if job.over:
                return False
            job.ending.set()
            return True

    def forget(self, job: Job) -> None:
        """Do not remember an ended job any more."""
        with self._changed:
            self._ended.pop(job.id, None)

    def close(self, grace: float) -> None:
        """End: waiting jobs are cancelled, running ones get `grace` seconds, and then end after their step."""
        with self._changed:
            self.closing = True
            self._changed.notify_all()
        for job in self.waiting:
            self.cancel(job)
        until = time.monotonic() + grace
        while self.running and time.monotonic() < until:
            time.sleep(0.02)
        for job in self.running:
            job.ending.set()
        for worker in self._workers:
            worker.join(max(until - time.monotonic(), 0) + 30)

    def _serve(self, shelf: Shelf) -> None:
        """A worker: the next job, until the desk closes."""
        while True:
            with self._changed:
                while not self._waiting and not self.closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._running[shelf] = job
            with shelf.line.turn():
                self._run(job, shelf)
            del job  # an idle worker holds nothing

    def _run(self, job: Job, shelf: Shelf) -> None:
        begun = time.perf_counter()
        failure: Failure | None = None
        job.begin()
        try:
            job.value = job.work(Turn(job, shelf))
        except (Ended, Interrupted):
            job.interrupted = True
        except Exception as error:
            failure = failure_of(error, f"job {job.id}")
        seconds = time.perf_counter() - begun
        cancelled = job.interrupted and not job.pictures
        status: Status = "failed" if failure else "cancelled" if cancelled else "done"
        with self._changed:
            del self._running[shelf]
            self.seconds += seconds
            self._seconds_each += 0.2 * (seconds - self._seconds_each)
            job.end(status, failure)
            self._remember(job)
        why = "" if failure is None else f": {failure.message if shelf.log_prompts else failure.kind}"
        log.info("job %s (%s) %s in %.2f s%s", job.id, job.kind, status, seconds, why)

    def _remember(self, job: Job) -> None:
        self.counts[job.status] += 1
        if job.private:
            return
        self._ended[job.id] = job
        oldest = time.time() - KEPT_SECONDS
        held = sum(_bytes(each) for each in self._ended.values())
        while len(self._ended) > 1:
            first = next(iter(self._ended.values()))
            if len(self._ended) <= KEPT and held <= KEPT_BYTES and (first.ended or oldest) >= oldest:
                return
            held -= _bytes(first)
            del self._ended[first.id]


def failure_of(error: Exception, what: str) -> Failure:
    """What went wrong, for the client; a fault of the program is logged, as one of `what`."""
    if isinstance(error, NativesdError):
        return Failure(str(error), type(error).__name__)
    if isinstance(error, MemoryError):
        return Failure("this takes more memory than there is: ask for smaller pictures", NoMemoryError.__name__)
    log.error("%s failed, which is a fault of nativesd", what, exc_info=error)
    return Failure(f"a fault of nativesd: {type(error).__name__}", "InternalError", ours=True)


def _bytes(job: Job) -> int:
    return sum(len(picture.data) for picture in job.pictures)
