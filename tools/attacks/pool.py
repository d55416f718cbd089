"""Processes that try inputs, live as long as they behave, and are watched for time and memory."""

from __future__ import annotations

import multiprocessing
import random
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MEMORY = 1.0
"""GB that an input may take beside what the process has."""
BUSY = 3
"""Times the seconds of the processor that an input may take by the clock: the machine may have other work."""
GRACE = 5.0
"""Seconds after which a process that does not answer is killed."""


@dataclass(frozen=True)
class Outcome:
    """What became of an input: "ok", "refused", or what promise it broke; in seconds of the processor, and GB."""

    what: str
    seconds: float
    memory: float


@dataclass
class Row:
    """The outcomes of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    memory: float = 0.0
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, seed: int, outcome: Outcome) -> None:
        """Count one."""
        failed = outcome.what not in ("ok", "refused")
        self.counts["failed" if failed else outcome.what] += 1
        self.slowest, self.memory = max(self.slowest, outcome.seconds), max(self.memory, outcome.memory)
        if failed:
            self.failures.append((seed, outcome.what))


class _TooLong(BaseException):
    """An input took longer than is promised."""


def attempt(name: str, seed: int) -> Outcome:
    """Try one input in this process."""
    from attacks.kinds import EVERY
    from nativesd.errors import NativesdError

    kind = EVERY[name]

    def stop(*_: object) -> None:
        raise _TooLong

    before = _peak(reset=True)
    start = time.process_time()
    for timer, number, most in (
        (signal.ITIMER_PROF, signal.SIGPROF, kind.seconds), (signal.ITIMER_REAL, signal.SIGALRM, BUSY * kind.seconds),
    ):  # fmt: skip
        signal.signal(number, stop)
        signal.setitimer(timer, most)
    try:
        with tempfile.TemporaryDirectory(prefix="attack-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.attack(random.Random(f"{name} {seed}"), Path(folder))
        what = "ok"
    except NativesdError as error:
        what = "refused" if 0 < len(str(error)) < 2000 else f"a message of {len(str(error))} characters"
    except _TooLong as error:
        frames = [each for each in traceback.extract_tb(error.__traceback__) if "nativesd/" in each.filename]
        where = f" in {frames[-1].name}, {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        what = f"over {kind.seconds:g} s{where}"
    except Exception as error:
        what = repr(error)[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    memory = _peak() - before
    if memory > MEMORY:
        what = f"over {MEMORY:g} GB" + ("" if what in ("ok", "refused") else f", and {what}")
    return Outcome(what, time.process_time() - start, memory)


def _peak(*, reset: bool = False) -> float:
    """GB that this process had at most, since the last reset; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1e6 if found else 0.0


def _serve(asked: Connection) -> None:
    """A process's work: inputs come as (kind, seed), outcomes go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked.send(None)
    while True:
        try:
            asked.send(attempt(*asked.recv()))
        except EOFError:
            return


class _Worker:
    """A process, and the input that it has."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()
        self.input: tuple[str, int] | None = None
        self.since = 0.0

    def ask(self, name: str, seed: int) -> None:
        """Try an input."""
        self.input, self.since = (name, seed), time.monotonic()
        self.pipe.send(self.input)

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def attack(
    kinds: Sequence[str], *, seed: int, count: int | None, seconds: float | None, workers: int
) -> Iterator[tuple[str, int, Outcome]]:
    """Inputs of the kinds in turn, by their shares, until there were `count` or it took so many seconds.

    Yields the kind, the seed and the outcome of each.
    """
    from attacks.kinds import EVERY

    turn = [name for name in kinds for _ in range(EVERY[name].share)]
    random.Random(seed).shuffle(turn)
    end = None if seconds is None else time.monotonic() + seconds
    given = 0
    team = [_Worker() for _ in range(workers)]
    try:
        while True:
            over = (count is not None and given >= count) or (end is not None and time.monotonic() > end)
            for worker in team:
                if worker.input is None and not over:
                    worker.ask(turn[given % len(turn)], seed + given)
                    given += 1
                    over = count is not None and given >= count
            busy: dict[Any, int] = {worker.pipe: i for i, worker in enumerate(team) if worker.input is not None}
            if not busy:
                return
            for pipe in wait(list(busy), timeout=0.5):
                worker = team[busy.pop(pipe)]
                name, number = worker.input or ("", 0)
                try:
                    yield name, number, worker.pipe.recv()
                    worker.input = None
                except (EOFError, ConnectionError):
                    team[team.index(worker)] = _Worker()
                    yield name, number, Outcome("the process died", time.monotonic() - worker.since, 0.0)
            for at in busy.values():
                worker = team[at]
                name, number = worker.input or ("", 0)
                taken = time.monotonic() - worker.since
                if taken > BUSY * EVERY[name].seconds + GRACE:
                    worker.end()
                    team[at] = _Worker()
                    yield name, number, Outcome(f"over {EVERY[name].seconds:g} s, and could not be stopped", taken, 0.0)
    finally:
        for worker in team:
            worker.end()
