"""The same run on a Ray cluster: Ray's workers paint, and the process that began it writes down what they did.

Only this file knows of Ray, and imports it when a run begins.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from nativesd.batch.jobs import Job
from nativesd.batch.plan import Plan
from nativesd.batch.results import save
from nativesd.batch.run import Run, Tally, nothing
from nativesd.batch.studio import Setting, Studio
from nativesd.destination import scratch
from nativesd.errors import NativesdError, UsageError, install_line

BLOCK = 1024
"""Rows of a file that a reader of Ray's takes, at most."""
SHARES = 4
"""Files for each worker, at least: the last ones to be taken even out what workers need."""


class Worker:
    """What Ray calls with batches of jobs: it paints them, saves the pictures, and answers the lines of the results."""

    def __init__(self, setting: Setting, out: str, home: str) -> None:
        with suppress(OSError):  # models and LoRAs are named from where the run was begun, where this node has that
            os.chdir(home)
        self._studio = Studio(setting)
        self._out = Path(out)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Of a batch with the column `body`, jobs as JSON, to one with `answer`, as JSON too.

        An answer has a job's `row` and `line`, or, where no row is to blame, what `ended` the run and the exit code.
        """
        alike: dict[str, list[Job]] = {}
        for body in batch["body"]:
            job = Job.from_json(str(body))
            alike.setdefault(job.shape, []).append(job)
        answers: list[dict[str, Any]] = []
        suffix = self._studio.setting.suffix
        try:
            for jobs in alike.values():
                for outcomes in self._studio.paint(jobs):
                    for outcome in outcomes:
                        save(self._out, outcome, suffix)
                        answers.append({"row": outcome.job.line, "line": outcome.line(suffix)})
        except NativesdError as error:
            answers.append({"ended": str(error), "code": error.exit_code})
        return {"answer": [json.dumps(answer) for answer in answers]}


def run_on_ray(
    run: Run,
    address: str | None,
    workers: int | None = None,
    ending: Event | None = None,
    told: Callable[[Tally], object] = nothing,
    looked: Callable[[int], object] = nothing,
) -> Tally:
    """`Run.__call__`, painted by a Ray cluster, which must see the same folders under the same names.

    address  of the cluster, as `ray.init` takes it; None: the one that RAY_ADDRESS names, else a new one here
    workers  how many models paint at a time; default: one on each GPU, or one on every CPU but one

    Raises UsageError where Ray is not installed, or has less to give than is asked for.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise UsageError(f"--ray needs {error.name}: {install_line('ray')}") from None
    ending, tally = ending or Event(), Tally()
    out = run.out.resolve()
    setting = replace(run.setting, folder=run.setting.folder.resolve())
    with run.opened(tally, ending, looked) as results:
        if run.plan.left and not ending.is_set():
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError) as error:
                raise UsageError(f"Ray's cluster cannot be reached: {str(error).partition(chr(10))[0]}") from error
            try:
                resources = _resources(ray.cluster_resources(), workers)
                with scratch(out / "ray") as folder:
                    _write_jobs(run.plan, folder, run.size, resources["workers"])
                    for rows in _painted(ray, folder, run.size, resources, (setting, str(out), os.getcwd())):
                        results.add(row["line"] for row in rows)
                        for row in rows:
                            tally.add(row["line"]["id"], row["row"], row["line"]["error"])
                        told(tally)
                        if tally.failed and run.on_error == "stop":
                            ending.set()
                        if ending.is_set():
                            break
            finally:
                ray.shutdown()
    tally.left = run.plan.left - tally.painted - tally.failed
    return tally


def _resources(cluster: Mapping[str, float], workers: int | None) -> dict[str, Any]:
    """What a worker is given. Ray reads the jobs by tasks of its own, which need a CPU that no worker holds."""
    cpus, gpus = cluster.get("CPU", 0), int(cluster.get("GPU", 0))
    if cpus < 1:
        raise UsageError("Ray's cluster has no CPU to give")
    count = workers or gpus or max(int(cpus) - 1, 1)
    if gpus and count > gpus:
        raise UsageError(f"{count} workers need a GPU each, and Ray's cluster has {gpus}")
    share = min(1.0, (cpus - 1) / count) if cpus > 1 else 0.5 / count
    return {"workers": count, "num_cpus": math.floor(share * 100) / 100, **({"num_gpus": 1} if gpus else {})}


def _write_jobs(plan: Plan, folder: Path, size: int, workers: int) -> None:
    """The jobs that are left as files that Ray reads, each whole batches of them."""
    import pyarrow as arrow
    from pyarrow import parquet

    block = min(BLOCK, max(math.ceil(plan.left / (SHARES * workers)), 1))
    block = math.ceil(block / size) * size
    jobs = plan.jobs()
    for number in range(math.ceil(plan.left / block)):
        part = list(islice(jobs, block))
        table = arrow.table({"body": [job.to_json() for job in part]})
        parquet.write_table(table, folder / f"{number:08}.parquet")


def _painted(
    ray: Any, folder: Path, size: int, resources: Mapping[str, Any], arguments: tuple[Any, ...]
) -> Iterator[list[dict[str, Any]]]:
    """What the workers answer, as it comes. Raises NativesdError where one ended it."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet(str(folder), override_num_blocks=sum(1 for _ in folder.iterdir()))
    given = dict(resources)
    pool = ray.data.ActorPoolStrategy(size=given.pop("workers"))
    done = rows.map_batches(Worker, fn_constructor_args=arguments, batch_size=size, compute=pool, **given)
    try:
        for batch in done.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            answers = [json.loads(str(answer)) for answer in batch["answer"]]
            yield [answer for answer in answers if "line" in answer]
            for answer in answers:
                if "ended" in answer:
                    failure = NativesdError(answer["ended"])
                    failure.exit_code = answer["code"]
                    raise failure
    except ray.exceptions.RayError as error:
        first = str(error).strip().partition("\n")[0]
        raise NativesdError(f"Ray ended the run: {first or type(error).__name__}") from error
