"""What a cluster's workers call: batches of columns in, the same with pictures out. It knows of no cluster."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nativesd.batch.columns import OWN, READERS, Columns, said
from nativesd.batch.files import Row
from nativesd.batch.jobs import Job, canonical
from nativesd.batch.results import Outcome
from nativesd.batch.studio import Setting, Studio
from nativesd.errors import NativesdError, UsageError
from nativesd.pipeline.asked.arguments import check, split
from nativesd.pipeline.asked.readers import shown

ADDED = ("id", "image", "seed", "width", "height", "error")
NUMBERS = {"seed": np.uint64, "width": np.int64, "height": np.int64}
"""Of those the numbers; seeds go up to 2^64 - 1."""
WORDED = {"guidance": '"pag:3"', "savings": '"deepcache"'}
"""Options that are no records in JSON, and a text of each."""


class Painter:
    """Paints batches of rows; the model is loaded at the first one. It can be pickled, and is sent without the model.

    model       what `nativesd.load` takes
    keep        columns that pass through although they look like an option
    refiner     an SDXL refiner for the last steps, as `nativesd.load` takes it
    embeddings  files of textual inversions
    options     those of `nativesd.load`, and those of a call for rows that do not state them

    The columns of a batch are the options of a call, `prompt` among them, and any others. Raises UsageError for options
    that cannot be.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        keep: Sequence[str] = (),
        refiner: str | None = None,
        embeddings: Sequence[str] = (),
        **options: Any,
    ) -> None:
        loading, asked = split(options)
        check("", asked)
        always = {"lora_dirs": asked.pop("lora_dirs")} if "lora_dirs" in asked else {}
        if own := loading.pop("loras", None):
            asked["loras"] = own
        defaults = {name: _told(value) for name, value in asked.items() if value is not None}
        for name, value in defaults.items():
            _require_default(name, value)
        self._columns = Columns(
            model=model,
            loading=said(loading, refiner=refiner, embeddings=embeddings),
            defaults=defaults,
            kept=tuple(keep),
            reserved=(),
        )
        self._setting = Setting(model, loading, embeddings, always, refiner)
        self._studio: Studio | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_studio": None}

    def __call__(self, batch: Any) -> Any:
        """A batch with a picture for every row: a mapping of columns (lists or arrays), or a data frame of pandas.

        Added are `image` (the bytes of a PNG with its parameters; instead of a picture to begin from), `seed`, `width`,
        `height`, `error` (a sentence where a row could not be painted, which then has no picture), and `id`. A batch is
        halved where it does not fit into the memory. Raises UsageError for a column that is misspelt or missing, and
        what `nativesd.load` raises.
        """
        names = [str(name) for name in batch]
        for name in names:
            self._columns.require_meant(name)
        if "prompt" not in names:
            raise UsageError(f"there is no column 'prompt': there is {', '.join(names) or 'none'}")
        rows = [dict(zip(names, cells, strict=True)) for cells in zip(*(batch[name] for name in names), strict=True)]
        done = self._painted(rows)
        made: dict[str, list[Any]] = {name: [each[name] for each in done] for name in ADDED}
        if hasattr(batch, "assign"):
            return batch.assign(**{name: _array(name, values) for name, values in made.items()})
        arrays = any(isinstance(batch[name], np.ndarray) for name in names)
        return {**batch, **{name: _array(name, values) if arrays else values for name, values in made.items()}}

    def frames(self, frames: Iterable[Any]) -> Iterator[Any]:
        """The same for one data frame after the other, as Spark's `mapInPandas` wants it."""
        return map(self, frames)

    def close(self) -> None:
        """Let go of the model; the next batch loads it again."""
        if self._studio is not None:
            self._studio.close()
            self._studio = None

    def _painted(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """For every row what is added to it."""
        if self._studio is None:
            self._studio = Studio(self._setting)
        done: list[dict[str, Any]] = [{}] * len(rows)
        alike: dict[str, list[Job]] = {}
        for number, cells in enumerate(rows):
            try:
                job, *others = self._columns.jobs(Row(number, cells))
                if others:
                    raise UsageError("num_images must be 1 in a batch, where a row is a picture")
                alike.setdefault(job.shape, []).append(job)
            except NativesdError as error:
                done[number] = _added(None, str(error))
        for jobs in alike.values():
            for outcomes in self._studio.paint(jobs):
                for outcome in outcomes:
                    done[outcome.job.line] = _added(outcome, outcome.error)
        return done


def _added(outcome: Outcome | None, error: str | None) -> dict[str, Any]:
    """What is added to a row; of one that failed, empty values of the same types, as tables want them."""
    return {
        "id": "" if outcome is None else outcome.job.id,
        "image": b"" if outcome is None else outcome.data,
        "seed": 0 if outcome is None else outcome.job.seed,
        "width": 0 if outcome is None else outcome.width,
        "height": 0 if outcome is None else outcome.height,
        "error": error or "",
    }


def _require_default(name: str, value: Any) -> None:
    """Raise UsageError for an option that is no default of rows."""
    if name in OWN:
        raise UsageError(f"{name} is a row's own: give the batch a column {name}")
    if name not in READERS:
        raise UsageError(f"{name} is of one call, and a Painter makes many: leave it out")
    if name in WORDED and any(isinstance(each, Mapping) for each in (value if isinstance(value, list) else [value])):
        raise UsageError(f"{name} must be texts here, as the command line takes them: {WORDED[name]}")
    try:
        canonical(value)
    except UsageError:
        raise UsageError(f"{name} must be a file's path or plain numbers and texts here, not {shown(value)}") from None


def _told(value: Any) -> Any:
    """An option as JSON has it: a record by the fields that were given, and a path as a text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {field.name: _told(each) for field, each in fields if each is not None and each is not field.default}
    return [_told(each) for each in value] if isinstance(value, list | tuple) else value


def _array(name: str, values: list[Any]) -> Any:
    """A column as numpy has it, of a type that does not depend on its values."""
    if name in NUMBERS:
        return np.array(values, NUMBERS[name])
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
