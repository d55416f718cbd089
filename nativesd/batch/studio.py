"""Jobs to pictures: the model of each loaded once, batches halved that do not fit, and a row that fails by itself."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nativesd.batch.columns import options_of
from nativesd.batch.jobs import Job
from nativesd.batch.results import FORMATS, Outcome, pixel_hash
from nativesd.errors import NativesdError, NoMemoryError
from nativesd.loading.load import load

if TYPE_CHECKING:
    from nativesd.pictures.result import Result
    from nativesd.pipeline.pipeline import Pipeline

PNG_LEVEL = 4
"""zlib's: against Pillow's default of 6 about half the time, and 2 % more bytes for a photo of 1024x1024."""
FAULTS = 5
"""Rows one after the other, each painted alone, whose errors are none of ours: then one that asks for nothing is tried,
and where that fails too it is the machine, and not the rows."""
log = logging.getLogger("nativesd.batch")


class BrokenError(NativesdError):
    """What no row is to blame for: nothing more can be painted here."""


@dataclass(frozen=True)
class Setting:
    """What all jobs of a run have in common.

    model    whose failure to load ends all; that of another one, which a row names, is that row's error
    loading  options of `nativesd.load`
    always   options of every call: `lora_dirs`
    refiner  a model for the last steps of all pictures
    suffix   of the pictures' files
    folder   where the paths of pictures to begin from begin
    """

    model: str = "tiny"
    loading: Mapping[str, Any] = field(default_factory=dict)
    embeddings: Sequence[Any] = ()
    always: Mapping[str, Any] = field(default_factory=dict)
    refiner: str | None = None
    suffix: str = "png"
    folder: Path = Path()


class Studio:
    """A model at a time, and the pictures that it makes. Close it, or use it as a context."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._pipeline: Pipeline | None = None
        self._more: dict[str, Any] = {}
        self._name: str | None = None
        self._refused: dict[str, str] = {}
        """Models that could not be loaded, and why."""
        self._most: dict[str, int] = {}
        """Of a shape: how many fit."""
        self._faults = 0
        self._writers = ThreadPoolExecutor(min(os.cpu_count() or 1, 8), "nativesd-writer")

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model."""
        self._writers.shutdown()
        self._let_go()

    def paint(self, jobs: Sequence[Job]) -> Iterator[Sequence[Outcome]]:
        """The outcomes of jobs of one shape, call by call: of all at once where they fit, else of halves.

        What fails is the outcome of the row that fails. Raises BrokenError where it is not the rows', and what
        `nativesd.load` raises of the run's own model.
        """
        most = self._most.get(jobs[0].shape, len(jobs))
        for begin in range(0, len(jobs), most):
            yield from self._paint(jobs[begin : begin + most])

    def _paint(self, jobs: Sequence[Job]) -> Iterator[Sequence[Outcome]]:
        begun = time.perf_counter()
        reason = ""
        try:
            outcomes = self._outcomes(jobs, self._call(jobs), begun)
        except BrokenError:
            raise
        except NativesdError as error:
            reason = str(error)
            if isinstance(error, NoMemoryError) and len(jobs) > 1:
                self._most[jobs[0].shape] = (len(jobs) + 1) // 2
                log.info("a batch of %d does not fit into the memory, and is halved", len(jobs))
        if not reason:
            yield outcomes
            return
        _free()  # here, where the error is gone, and with it the tensors of its frames
        if len(jobs) == 1:
            yield [Outcome(jobs[0], time.perf_counter() - begun, error=reason)]
            return
        middle = (len(jobs) + 1) // 2
        yield from self._paint(jobs[:middle])
        yield from self._paint(jobs[middle:])

    def _call(self, jobs: Sequence[Job]) -> Result:
        """One call of the model. Raises NativesdError."""
        first = jobs[0]
        pipeline = self._load(first.model)
        options = {
            **options_of(first.options, first.pictures, self.setting.folder),
            **self.setting.always,
            **self._more,
        }
        options["seed"] = [job.seed for job in jobs]
        if any("negative_prompt" in job.options for job in jobs):
            options["negative_prompt"] = [job.options.get("negative_prompt", "") for job in jobs]
        try:
            result = pipeline([job.prompt for job in jobs], **options)
        except NativesdError:
            raise
        except Exception as error:
            log.error("a call failed, which is a fault of nativesd or of this machine", exc_info=error)
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self._faults += len(jobs) == 1  # a batch says nothing of how many of its rows are bad
            if self._faults >= FAULTS:
                self._require_whole(pipeline, said)
            raise NativesdError(f"a fault of nativesd or of this machine: {said}") from error
        self._faults = 0
        return result

    def _require_whole(self, pipeline: Pipeline, said: str) -> None:
        """Paint the least there is. Raises BrokenError where even that fails, and begins to count faults again."""
        self._faults = 0
        try:
            pipeline([""], seed=[0], steps=1, **self.setting.always, **self._more)
        except Exception as error:
            raise BrokenError(
                f"{FAULTS} calls failed one after the other, the last by {said}, and then one without a prompt: it is "
                "this machine or a fault of nativesd, and not the rows; run nativesd doctor, and then the same command "
                "again"
            ) from error

    def _outcomes(self, jobs: Sequence[Job], result: Result, begun: float) -> list[Outcome]:
        """The pictures as files, encoded side by side."""
        kind = FORMATS[self.setting.suffix]
        options = {"compress_level": PNG_LEVEL} if kind == "PNG" else {}
        files = list(self._writers.map(partial(_encoded, result, kind, options), range(len(jobs))))
        seconds = (time.perf_counter() - begun) / len(jobs)
        return [
            Outcome(job, seconds, data, image.width, image.height, sha256)
            for job, image, (data, sha256) in zip(jobs, result.images, files, strict=True)
        ]

    def _load(self, name: str) -> Pipeline:
        """The pipeline of a model; the one before is let go."""
        if name == self._name and self._pipeline is not None:
            return self._pipeline
        if name in self._refused:
            raise NativesdError(self._refused[name])
        self._let_go()
        setting = self.setting
        try:
            pipeline = load(name, **setting.loading)
            for embedding in setting.embeddings:
                pipeline.load_embedding(embedding)
            if setting.refiner is not None and not self._more:
                own = {**setting.loading, "unet": None, "vae": None, "loras": None}
                self._more = {"refiner": load(setting.refiner, **own)}
        except NativesdError as error:
            if name == setting.model:
                failure = BrokenError(str(error))
                failure.exit_code = error.exit_code
                raise failure from error
            self._refused[name] = f"the model {name} cannot be loaded: {error}"
            raise NativesdError(self._refused[name]) from error
        self._pipeline, self._name = pipeline, name
        return pipeline

    def _let_go(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = self._name = None
            _free()


def _free() -> None:
    """Give back what torch keeps of a GPU's memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _encoded(result: Result, kind: str, options: Mapping[str, Any], index: int) -> tuple[bytes, str]:
    return result.encoded(index, kind, **options), pixel_hash(result.images[index])
