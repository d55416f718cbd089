"""The usual work of a job: one call of a model after the other, in the library's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from nativesd.errors import UsageError
from nativesd.pipeline.asked.arguments import Checked, check
from nativesd.pipeline.asked.inputs import require_together
from nativesd.pipeline.upscaling import UpscaleModel
from nativesd.server.jobs.job import Made
from nativesd.server.jobs.turn import Turn
from nativesd.server.settings import Limits

UNKNOWN_SIZE = 1024
"""The side of a model's pictures, before it is loaded: SDXL's."""


@dataclass(frozen=True)
class Call:
    """A call: its prompt, and the options of `Pipeline.__call__`."""

    prompt: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """What came of a call: its pictures, and `Result.parameters`."""

    made: Sequence[Made]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Order:
    """The calls of a job on one model. The value of the job are their parts, those that were ended included.

    refiner  the name of a model for the last steps
    """

    model: str | None
    calls: Sequence[Call]
    refiner: str | None = None

    def __call__(self, turn: Turn) -> list[Part]:
        """The job's work."""
        turn.plan(len(self.calls))
        pipeline = turn.load(self.model)
        more = {} if self.refiner is None else {"refiner": turn.shelf.refiner(self.refiner)}
        parts: list[Part] = []
        for call in self.calls:
            if turn.job.ending.is_set() and parts:
                break
            result = turn.make(pipeline, call.prompt, **{**call.options, **more})
            parts.append(Part(turn.keep(result), result.parameters))
        return parts


def require_bounded(order: Order, limits: Limits, size: int | None, names: Mapping[str, str] | None = None) -> None:
    """Check an order before it waits. Raises UsageError for what cannot be, or is more than the server's bounds.

    size   the side of the model's pictures, where it is loaded
    names  what the API calls the options "width", "height", "steps" and "num_images"
    """
    says = {name: name for name in ("width", "height", "steps", "num_images")} | dict(names or {})
    pictures = 0
    for call in order.calls:
        try:
            asked = check(call.prompt, dict(call.options))  # type: ignore[arg-type]  # its errors say what is no option
            require_together(asked)
        except UsageError as error:
            name, _, rest = str(error).partition(" ")
            raise UsageError(f"{says.get(name, name)} {rest}") from None
        pictures += len(asked.seeds)
        steps = max(asked.steps or 0, asked.hires.steps or 0 if asked.hires else 0)
        if steps > limits.steps:
            raise UsageError(f"{says['steps']} must be at most {limits.steps} on this server, not {steps}")
        for name, side in zip(("width", "height"), _sides(asked, size or UNKNOWN_SIZE), strict=True):
            if side > limits.side:
                raise UsageError(f"{says[name]} must be at most {limits.side} pixels on this server, not {side}")
    if pictures > limits.batch:
        raise UsageError(f"{says['num_images']} must be at most {limits.batch} on this server, not {pictures}")


def require_enlarging(model: UpscaleModel, picture: Image.Image, limits: Limits) -> None:
    """Raise UsageError for a picture that a model would make larger than this server makes any."""
    most = 4 * limits.side
    if max(picture.size) * model.scale > most:
        raise UsageError(f"image must have at most {most // model.scale} pixels a side for {model.name} on this server")


def _sides(asked: Checked, default: int) -> tuple[int, int]:
    """The most that a call's sides reach."""
    width, height = asked.width or default, asked.height or default
    if isinstance(asked.image, Image.Image):
        width, height = asked.width or asked.image.width, asked.height or asked.image.height
    if asked.outpaint is not None:
        left, top, right, bottom = asked.outpaint
        width, height = width + left + right, height + top + bottom
    if asked.hires is not None:
        larger = asked.hires.enlarged(width, height, 1)
        width, height = max(width, larger.width), max(height, larger.height)
    return width, height
