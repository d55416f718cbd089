"""A job's turn: calls of a pipeline that are counted, shown while they run, and ended when somebody asks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from nativesd.errors import Interrupted
from nativesd.pictures.result import Result
from nativesd.server.jobs.job import Job, Made

if TYPE_CHECKING:
    from nativesd.latents.preview import Step
    from nativesd.pipeline.pipeline import Pipeline
    from nativesd.server.jobs.shelf import Shelf

PNG_LEVEL = 4
"""zlib's: against its default of 6 about half the time, and 2 % more bytes for a photo of 1024x1024."""


log = logging.getLogger("nativesd.server")


class Ended(Exception):  # noqa: N818  # nothing went wrong
    """The job was ended before there was anything of it."""


class Turn:
    """What the work of a job is given: the models of one worker, and the job itself."""

    def __init__(self, job: Job, shelf: Shelf) -> None:
        self.job = job
        self.shelf = shelf
        self._pipeline: Pipeline | None = None

    def plan(self, calls: int) -> None:
        """How many calls there will be; progress counts them."""
        self.job.part, self.job.parts = 0, calls

    def load(self, model: str | None) -> Pipeline:
        """The pipeline of a model's name; None: the server's. Raises UsageError for a name that is not known."""
        self.require_wanted()
        pipeline = self.shelf.pipeline(model)
        self.require_wanted()
        return pipeline

    def require_wanted(self) -> None:
        """Raise Ended where the job is to end."""
        if self.job.ending.is_set():
            raise Ended

    def make(self, pipeline: Pipeline, prompt: str, **options: Any) -> Result:
        """A call. Where it is ended before it is whole, the result is what there was then.

        Raises what the call raises, and Ended where the job ended before its first step.
        """
        self.require_wanted()
        self._pipeline = pipeline
        if self.shelf.log_prompts:
            log.info("job %s: %s", self.job.id, prompt)
        self.job.step, self.job.steps = 0, 0
        try:
            result = pipeline(prompt, on_step=self._on_step, **options)
        except Interrupted as ended:
            self.job.interrupted = True
            result = ended.result()
        finally:
            self.job.skipping.clear()
        self.job.part += 1
        self.job.step = 0
        return result

    def keep(self, result: Result) -> list[Made]:
        """A result's pictures as files, which are the job's from now on."""
        made = made_of(result)
        self.job.pictures += made
        self.job.notes += [note for note in result.parameters.get("notes", ()) if note not in self.job.notes]
        return made

    def _on_step(self, step: Step) -> None:
        job = self.job
        job.step, job.steps = step.index + 1, step.total
        job.tell("step", step=job.step, steps=job.steps, progress=job.progress)
        last = step.index + 1 == step.total
        if not last and (job.watched or job.glanced.is_set()):
            job.glanced.clear()
            job.preview = step.preview()
            job.tell("preview", picture=job.preview, step=job.step, steps=job.steps)
        if job.ending.is_set() or job.skipping.is_set():
            assert self._pipeline is not None
            self._pipeline.interrupt()


def made_of(result: Result) -> list[Made]:
    """A result's pictures as PNG files that carry their parameters."""
    return [_png(result, index) for index in range(len(result.images))]


def _png(result: Result, index: int) -> Made:
    image = result.images[index]
    data = result.encoded(index, compress_level=PNG_LEVEL)
    return Made(data, result.infotext(index), result.seeds[index], image.width, image.height)
