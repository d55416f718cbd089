"""What is to be painted, in which order: a whole jobs file, checked before the first picture, on disk, not in memory.

The rows are kept in a SQLite database without a name, which the system removes with the process, however that ends.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from nativesd.batch.columns import Columns
from nativesd.batch.files import at, read_rows
from nativesd.batch.jobs import Job, canonical
from nativesd.errors import NativesdError, SourceError, UsageError, quote, said_in

TABLES = """
CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID;
CREATE TABLE shapes (shape TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE jobs (id TEXT PRIMARY KEY, model INTEGER, shape TEXT, line INTEGER, body TEXT);
CREATE TABLE told (id TEXT PRIMARY KEY, finished TEXT, line TEXT);
CREATE TABLE skipped (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""


class Plan:
    """The jobs of one shard. Close it, or use it as a context."""

    def __init__(self) -> None:
        self.rows = 0
        """Jobs of all shards."""
        self.own = 0
        """Jobs of this one."""
        self._models: dict[str, int] = {}
        self._tables = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._tables.executescript(TABLES)

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.close()

    @classmethod
    def of(cls, path: Path, columns: Columns, shard: tuple[int, int] = (0, 1)) -> Plan:
        """A jobs file, all of it checked, with the jobs of shard `shard[0]` (from 0) of `shard[1]`.

        Raises SourceError, which says the line, for what cannot be, and for an id that two rows have.
        """
        plan = cls()
        try:
            plan._tables.execute("BEGIN")
            with said_in(str(path)):
                for row in read_rows(path):
                    try:
                        for job in columns.jobs(row):
                            plan._add(job, path, shard)
                    except UsageError as error:
                        raise SourceError(f"{at(path, row.line)}: {error}") from None
            plan._tables.execute("COMMIT")
        except BaseException:
            plan._tables.close()
            raise
        return plan

    def _add(self, job: Job, path: Path, shard: tuple[int, int]) -> None:
        if job.pictures:
            raise UsageError(f"{next(iter(job.pictures))} must be a file's path in a jobs file")
        try:
            self._tables.execute("INSERT INTO ids VALUES (?, ?)", (job.id, job.line))
        except sqlite3.IntegrityError:
            ((first,),) = self._tables.execute("SELECT line FROM ids WHERE id = ?", (job.id,))
            raise SourceError(
                f"{at(path, first)} and {job.line} have the same id {quote(job.id)}: a row without an id has one by "
                "what it asks for, so give one of them another id, or another seed"
            ) from None
        try:
            body = job.to_json()
        except UsageError:
            raise UsageError(f"the column {quote(_unkept(job))} holds what JSON, and so the results, cannot") from None
        self.rows += 1
        if job.shard(shard[1]) != shard[0]:
            return
        self.own += 1
        self._tables.execute("INSERT OR IGNORE INTO shapes VALUES (?, ?)", (job.shape, job.line))
        model = self._models.setdefault(job.model, len(self._models))
        self._tables.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?)", (job.id, model, job.shape, job.line, body))

    @property
    def left(self) -> int:
        """How many of the own jobs are not skipped."""
        ((skipped,),) = self._tables.execute("SELECT count(*) FROM skipped")
        return self.own - int(skipped)

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take in what results tell of own jobs: of several lines for one id the one that was finished last."""
        known = "SELECT 1 FROM jobs WHERE id = ?"
        newest = (
            "INSERT INTO told VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE "
            "SET finished = excluded.finished, line = excluded.line WHERE excluded.finished >= finished"
        )
        self._tables.execute("BEGIN")
        for line in lines:
            if self._tables.execute(known, (line["id"],)).fetchone() is not None:
                self._tables.execute(newest, (line["id"], str(line.get("finished")), json.dumps(line)))
        self._tables.execute("COMMIT")

    def recalled(self) -> Iterator[tuple[Job, Mapping[str, Any]]]:
        """The own jobs that results tell of, with those lines."""
        found = self._tables.execute("SELECT jobs.body, told.line FROM told JOIN jobs USING (id) ORDER BY jobs.rowid")
        for body, line in found:
            yield Job.from_json(body), json.loads(line)

    def skip(self, ids: Iterable[str]) -> None:
        """Leave out jobs that are done."""
        self._tables.executemany("INSERT INTO skipped VALUES (?)", ((each,) for each in ids))

    def is_stale(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the results tells of an own job that is not skipped, or for which a newer line does."""
        query = (
            "SELECT skipped.id, told.line FROM jobs JOIN told USING (id) LEFT JOIN skipped USING (id) WHERE jobs.id = ?"
        )
        found = self._tables.execute(query, (line["id"],)).fetchone()
        return found is not None and (found[0] is None or found[1] != json.dumps(line))

    def jobs(self) -> Iterator[Job]:
        """The jobs that are not skipped: model after model, shape after shape, in the order of the file."""
        query = (
            "SELECT body FROM jobs JOIN shapes USING (shape) WHERE id NOT IN (SELECT id FROM skipped) "
            "ORDER BY model, number, shape, line, jobs.rowid"
        )
        for (body,) in self._tables.execute(query):
            yield Job.from_json(body)

    def batches(self, size: int) -> Iterator[list[Job]]:
        """The same, those of one shape together, `size` at a time."""
        for _, alike in groupby(self.jobs(), key=lambda job: job.shape):
            batch: list[Job] = []
            for job in alike:
                batch.append(job)
                if len(batch) == size:
                    yield batch
                    batch = []
            if batch:
                yield batch


def _unkept(job: Job) -> str:
    """The column that JSON cannot hold."""
    for name, value in {**job.extra, "prompt": job.prompt, **job.options}.items():
        try:
            canonical(value)
        except NativesdError:
            return name
    return "id"
