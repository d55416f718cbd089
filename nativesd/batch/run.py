"""A run: what is there and agrees is skipped; all else is painted, saved and written down, until it is to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Literal

from nativesd.batch.jobs import Job
from nativesd.batch.plan import Plan
from nativesd.batch.results import Outcome, Results, look_at, read_results, save
from nativesd.batch.shards import Shard
from nativesd.batch.studio import Setting, Studio
from nativesd.destination import hold, leftovers, remove
from nativesd.errors import SourceError

OnError = Literal["skip", "stop"]
LOOKING = 8
"""Pictures that are looked at side by side."""
WINDOW = 512
"""Of them at a time."""


def nothing(_: object) -> None:
    """For who does not want to be told."""


@dataclass
class Tally:
    """What became of a run's rows."""

    skipped: int = 0
    """There before, and as asked for."""
    changed: int = 0
    """There before, with other parameters; they are painted anew."""
    damaged: int = 0
    """The same, as their files are missing or damaged."""
    painted: int = 0
    left: int = 0
    """Neither painted nor failed, as the run was ended."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why rows failed, and how many by each reason."""
    examples: dict[str, tuple[str, int]] = field(default_factory=dict)
    """The id and line of the first row of each reason."""

    @property
    def failed(self) -> int:
        """Rows that failed."""
        return self.reasons.total()

    def add(self, name: str, line: int, error: str | None) -> None:
        """Take in what came of a row."""
        if error is None:
            self.painted += 1
        else:
            self.reasons[error] += 1
            self.examples.setdefault(error, (name, line))


@dataclass(frozen=True)
class Run:
    """A shard of a jobs file, and the folder where its pictures go.

    size      rows that are painted together, at most
    on_error  whether a row that fails is skipped, or stops the run
    """

    plan: Plan
    out: Path
    setting: Setting = field(default_factory=Setting)
    shard: Shard = field(default_factory=Shard)
    size: int = 8
    on_error: OnError = "skip"

    @contextmanager
    def opened(self, tally: Tally, ending: Event, looked: Callable[[int], object] = nothing) -> Iterator[Results]:
        """The shard's results, which no other process writes meanwhile, with what is done skipped in the plan.

        ending  set from outside: no more pictures are looked at, and nothing is skipped or left out for it
        looked  called with the number of pictures that were looked at since it was called last
        """
        self.prepare()
        with hold(self.out / f"results.{self.shard.name}"):
            self._skip_done(tally, ending, looked)
            results = Results(self.out, self.shard)
            if not ending.is_set():  # else lines of pictures that nobody looked at would be taken for stale ones
                results.keep(lambda line: not self.plan.is_stale(line))
            try:
                yield results
            finally:
                results.close()

    def prepare(self) -> None:
        """The folder, without what killed processes left in it. Raises SourceError where it cannot be."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            folders = [self.out, *(path for path in self.out.iterdir() if len(path.name) == 2 and path.is_dir())]
        except OSError as error:
            raise SourceError(f"{self.out} cannot be a folder of results: {error.strerror or error}") from error
        for folder in folders:
            for path in leftovers(folder):
                remove(path)

    def __call__(
        self,
        ending: Event | None = None,
        told: Callable[[Tally], object] = nothing,
        looked: Callable[[int], object] = nothing,
    ) -> Tally:
        """Paint what is left.

        ending  set from outside: the run ends after the batch that it is at
        told    called after every call of the model

        Raises SourceError where results cannot be written, and what is no row's fault.
        """
        ending, tally = ending or Event(), Tally()
        with self.opened(tally, ending, looked) as results, Studio(self.setting) as studio:
            for batch in self.plan.batches(self.size):
                if ending.is_set():
                    break
                for outcomes in studio.paint(batch):
                    self.finish(outcomes, results, tally)
                    told(tally)
                    if tally.failed and self.on_error == "stop":
                        ending.set()
        tally.left = self.plan.left - tally.painted - tally.failed
        return tally

    def finish(self, outcomes: Sequence[Outcome], results: Results, tally: Tally) -> None:
        """Write pictures, and then the lines that say of them."""
        for outcome in outcomes:
            save(self.out, outcome, self.setting.suffix)
        results.add(outcome.line(self.setting.suffix) for outcome in outcomes)
        for outcome in outcomes:
            tally.add(outcome.job.id, outcome.job.line, outcome.error)

    def _skip_done(self, tally: Tally, ending: Event, looked: Callable[[int], object]) -> None:
        """Skip, of the jobs that results tell of, those whose pictures are there as they are asked for."""
        self.plan.recall(read_results(self.out))
        told = self._agreeing(tally)
        with ThreadPoolExecutor(LOOKING) as threads:
            while not ending.is_set() and (window := list(islice(told, WINDOW))):
                found = list(threads.map(lambda pair: look_at(self.out, pair[1]), window))
                same = [job.id for (job, _), each in zip(window, found, strict=True) if each == "as it was"]
                self.plan.skip(same)
                tally.skipped += len(same)
                tally.damaged += len(window) - len(same)
                looked(len(window))

    def _agreeing(self, tally: Tally) -> Iterator[tuple[Job, Mapping[str, Any]]]:
        """The jobs that results tell of as they are asked for, with their lines; errors are tried again."""
        for job, line in self.plan.recalled():
            if line.get("error") is not None:
                continue
            if line.get("parameters") == job.parameters and line.get("file") == job.file(self.setting.suffix):
                yield job, line
            else:
                tally.changed += 1
