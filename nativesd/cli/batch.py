"""`nativesd batch`: a file of jobs, all of it checked, and then painted row by row, every one once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from nativesd.cli.common import MODEL_HELP, RUNNING, SAVING, Size, embedding_files, main, print_tables, say
from nativesd.cli.help import does_nothing, section
from nativesd.errors import UsageError
from nativesd.pipeline.asked.readers import lora_use

if TYPE_CHECKING:
    from nativesd.batch.plan import Plan
    from nativesd.batch.run import Tally

EVERY = 30.0
"""Seconds between lines where there is no terminal."""
REASONS = 20
"""Of failed rows, in the table."""


@main.command()
@click.argument("jobs", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@section(
    "The run",
    click.option(
        "--batch-size", "size", type=click.IntRange(1, 1000), default=8, show_default=True,
        help="Rows together, at most.",
    ),
    click.option("--shard", metavar="I/N|auto", help="Paint part I of N; auto: as torchrun or SLURM says."),
    click.option(
        "--on-error", type=click.Choice(["skip", "stop"]), default="skip", show_default=True,
        help="What a row that fails does to the run.",
    ),
    click.option(
        "--format", "suffix", type=click.Choice(["png", "jpg", "webp"]), default="png", show_default=True,
        help="Of the pictures.",
    ),
    click.option("--keep", "kept", multiple=True, metavar="COLUMN", help="Pass a column through; repeatable."),
    click.option("--check", is_flag=True, help="Check the file, and paint nothing."),
    click.option(
        "--ray", "address", is_flag=False, flag_value="", metavar="[ADDRESS]", help="Have a Ray cluster paint [here]."
    ),
    click.option("--workers", type=click.IntRange(1), help="Of Ray [default: one on each GPU, or CPU but one]."),
)  # fmt: skip
@section(
    "For rows that do not say it themselves",
    click.option("--model", default="tiny", show_default=True, help=f"{MODEL_HELP}."),
    click.option("--size", "pixels", type=Size(), help="Pixels, such as 512x768 [default: the model's]."),
    click.option("--steps", type=int, help="Sampling steps [default: 20; few-step models 4]."),
    click.option("--guidance-scale", "--cfg-scale", type=float, help="1 is off [default: the family's]."),
    click.option("--negative-prompt", help="What the pictures should not show."),
    click.option("--sampler", help="See nativesd samplers [default: the model's own]."),
    click.option("--schedule", help="The same [default: the model's own]."),
    click.option("--clip-skip", type=int, help="Layer of the text encoder from the end; 1 is the last."),
    click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE[:TEXT]]", help="LoRA to merge in; repeatable."),
)
@section(
    "The model",
    click.option("--lora-dir", "lora_dirs", type=click.Path(), multiple=True, help="Folder of LoRAs for prompts."),
    click.option(
        "--embedding", "embeddings", multiple=True, metavar="FILE[,FILE]", help="Textual inversion; repeatable."
    ),
    click.option("--refiner", help="SDXL refiner for the last steps: a folder, a file, or a hub id."),
    click.option("--unet", type=click.Path(), help="File or folder of a UNet to use instead of the model's."),
    click.option("--vae", type=click.Path(), help="File or folder of a VAE to use instead of the model's, or taesd."),
    click.option("--text-encoder", "text_encoders", type=click.Path(), multiple=True, help="The same; repeatable."),
    click.option("--prediction", help="epsilon, v or sample, where the model says it wrong or not at all."),
    click.option("--maps", type=click.Path(), help="Folder of weight maps to add or override."),
)
@section(
    "This machine",
    *RUNNING,
    *SAVING,
)
@click.pass_context
def batch(
    context: click.Context,
    /,
    jobs: Path,
    out: Path,
    size: int,
    shard: str | None,
    on_error: str,
    suffix: str,
    kept: Sequence[str],
    check: bool,
    address: str | None,
    workers: int | None,
    model: str,
    pixels: tuple[int, int] | None,
    refiner: str | None,
    embeddings: Sequence[str],
    lora_dirs: Sequence[str],
    **given: Any,
) -> int:
    """Paint every row of JOBS (.jsonl, .csv, .parquet, .txt) into the folder OUT, and skip those that are there.

    The columns are the options of a call by their names in Python; OUT/results.*.jsonl says of every row what came of
    it. Exit code 1: rows failed.
    """
    from nativesd.batch.cluster import run_on_ray
    from nativesd.batch.columns import Columns, said
    from nativesd.batch.plan import Plan
    from nativesd.batch.run import Run
    from nativesd.batch.shards import read_shard
    from nativesd.batch.studio import Setting
    from nativesd.cli.progress import listening
    from nativesd.pipeline.asked.arguments import split

    if address is not None and shard is not None:
        raise click.UsageError("--ray shares out the rows itself: leave --shard out")
    if address is None and workers is not None:
        raise does_nothing("--workers", "--ray")
    part = read_shard(shard)
    options = {name: value for name, value in given.items() if value not in (None, ())}
    if shard == "auto" and "device" not in options and (device := _own_device()) is not None:
        options["device"] = device
    if "loras" in options:
        options["loras"] = [list(lora_use(text)) for text in options["loras"]]
    if pixels is not None:
        options["width"], options["height"] = pixels
    loading, defaults = split({name: value for name, value in options.items() if name != "loras"})
    if "loras" in options:  # of rows, which may name others, and of the graphs of a backend
        defaults["loras"] = options["loras"]
        loading["loras"] = [lora_use(text) for text in given["loras"]]
    which = said(loading, refiner=refiner, embeddings=embeddings)
    columns = Columns(model, which, defaults, kept)
    setting = Setting(
        model, loading, [embedding_files(text) for text in embeddings],
        {"lora_dirs": list(lora_dirs)} if lora_dirs else {}, refiner, suffix, jobs.parent,
    )  # fmt: skip
    with Plan.of(jobs, columns, (part.index, part.count)) as plan:
        mine = "" if part.count == 1 else f", {plan.own} of them in shard {part.index + 1} of {part.count}"
        say(f"{jobs}: {_rows(plan.rows)}{mine}")
        if check:
            return 0
        run = Run(plan, out, setting, part, size, "stop" if on_error == "stop" else "skip")
        with _ending() as ending, listening():
            told = Told(plan)
            try:
                if address is None:
                    tally = run(ending, told, told.looked)
                else:
                    tally = run_on_ray(run, address or None, workers, ending, told, told.looked)
            finally:
                told.close()
    return _report(tally, told)


def _own_device() -> str | None:
    """The GPU of this one of several processes that torchrun started on a machine; None: the default."""
    import torch

    from nativesd.batch.shards import local_rank

    rank = local_rank()
    there = torch.cuda.device_count()
    if rank is None or there == 0:
        return None
    if rank < there:
        return f"cuda:{rank}"
    if there == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:  # each process was given its own
        return None
    raise UsageError(
        f"process {rank + 1} on this machine finds {there} GPUs: have torchrun start as many processes as there are "
        "GPUs, or name one for each with --device"
    )


@contextmanager
def _ending() -> Iterator[Event]:
    """Meanwhile SIGTERM and Ctrl-C let the batch be finished; the second one ends the process at once."""
    ending = Event()

    def end(number: int, _: object) -> None:
        say("the batch is finished, and then this ends; once more, and it ends at once")
        ending.set()
        for each, before in handlers.items():
            signal.signal(each, before)

    handlers = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ending
    finally:
        for each, before in handlers.items():
            signal.signal(each, before)


class Told:
    """How far a run is: a bar on a terminal, else a line now and then."""

    def __init__(self, plan: Plan) -> None:
        from tqdm import tqdm

        self._plan = plan
        self._said = perf_counter()
        self._begun: float | None = None
        self._all = plan.own
        self._bar = tqdm(file=sys.stderr, unit="row", leave=False, disable=None, total=plan.own)

    def looked(self, count: int) -> None:
        """Some pictures that are there already were looked at."""
        self._bar.update(count)
        if self._bar.disable and perf_counter() - self._said >= EVERY:
            self._said = perf_counter()
            say("pictures that are there already are looked at")

    def __call__(self, tally: Tally) -> None:
        """Some more were painted."""
        if self._begun is None:
            self._begun, self._first = perf_counter(), tally.painted + tally.failed
            self._all = self._plan.left
            self._bar.reset(self._all)
        done = tally.painted + tally.failed
        self._bar.update(done - self._bar.n)
        if self._bar.disable and perf_counter() - self._said >= EVERY:
            self._said = perf_counter()
            say(self._line(done, tally.failed))

    def _line(self, done: int, failed: int) -> str:
        assert self._begun is not None
        rate = (done - self._first) / max(perf_counter() - self._begun, 1e-9)
        left = _time((self._all - done) / rate) if rate else "not known yet"
        return f"{done} of {_rows(self._all)}, {failed} failed, {rate:.2f} pictures per second, time left: {left}"

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def _report(tally: Tally, told: Told) -> int:
    """What became of the rows, in lines and a table; returns the exit code."""
    from rich.table import Table

    again = ", ".join(
        f"{count} {why}"
        for count, why in ((tally.damaged, "as their files were damaged"), (tally.changed, "as other than asked for"))
        if count
    )
    again = f" (again: {again})" if again else ""
    say(f"{tally.painted} painted{again}, {tally.skipped} skipped, {tally.failed} failed")
    if tally.reasons:
        table = Table("rows", "the first", "line", "why", box=None, pad_edge=False)
        for reason, count in tally.reasons.most_common(REASONS):
            name, line = tally.examples[reason]
            table.add_row(str(count), name, str(line), reason)
        print_tables(table)
        if len(tally.reasons) > REASONS:
            click.echo(f"and {len(tally.reasons) - REASONS} more reasons, which the results have")
    if tally.left:
        say(f"{_rows(tally.left)} left: the same command goes on")
        return 1 if tally.failed else 130
    return 1 if tally.failed else 0


def _rows(count: int) -> str:
    return f"{count} {'row' if count == 1 else 'rows'}"


def _time(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
