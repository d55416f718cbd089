"""What a call has come to before anything of it is painted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nativesd.pipeline.asked.arguments import Checked
from nativesd.pipeline.asked.chosen import Chosen
from nativesd.pipeline.asked.inputs import Inputs
from nativesd.pipeline.asked.placed import Placed
from nativesd.pipeline.asked.tagged import LoraUse


@dataclass(frozen=True)
class Plan:
    """What a call asks for with its files read, and so what can be said of it before anything is painted."""

    asked: Checked
    chosen: Chosen
    inputs: Inputs
    given: Placed
    prompts: Sequence[str]
    loras: Sequence[LoraUse]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the pictures that the first pass makes."""
        return self.inputs.width, self.inputs.height
