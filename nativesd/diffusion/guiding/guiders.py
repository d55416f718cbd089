"""Guidance beside the prompt's: each a record that does one thing, and any of them together.

A `Perturbed` asks for one side more; a `Combined` changes how the sides become one; `Interval` leaves sides out for a
part of the steps; `FreeU` changes the UNet's way up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from nativesd.config import UNetConfig
from nativesd.diffusion.conditioning import Conditioning
from nativesd.diffusion.guiding.combine import Combiner
from nativesd.diffusion.guiding.combiners import Damping, Limiting, Projecting
from nativesd.diffusion.guiding.edits import FLAT, Alone, Blurred, Scaled, Skipped
from nativesd.diffusion.prompting import Sides
from nativesd.errors import UsageError
from nativesd.models.edits import Edit, Place
from nativesd.sampling.steps import Steps


@dataclass(frozen=True)
class Guider:
    """What all of these records have: they act from `start` up to `end`, shares of the steps, 0 to 1.

    A step counts where it begins: the first of 20 at 0, the second at 0.05.
    """

    name: ClassVar[str]

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, of which the first is 0."""
        start, end = getattr(self, "start", 0.0), getattr(self, "end", 1.0)
        return bool(start - 1e-9 <= step / steps < end - 1e-9)

    def edit(self, config: UNetConfig) -> Edit | None:
        """What it changes in every call of the UNet."""
        return None


@dataclass(frozen=True)
class Perturbed(Guider, ABC):
    """Guidance away from what the UNet would paint if some of its transformers were worse at it.

    What is added is scale * (the answer for the prompt - the worse answer), so it works without a negative prompt too.
    `layers` names the worse ones by part, level (0 is the one of the most cells) and layer: "mid", "down.1", "up.2.0".
    """

    scale: float = 3.0
    layers: tuple[str, ...] = ("mid",)
    start: float = 0.0
    end: float = 1.0

    @abstractmethod
    def perturbation(self) -> Edit:
        """What makes the UNet worse."""


@dataclass(frozen=True)
class PAG(Perturbed):
    """Perturbed-attention guidance: there, every cell attends to itself alone.

    Source: Ahn et al. 2024, arXiv 2403.17377, equation 14.
    """

    name: ClassVar[str] = "pag"

    def perturbation(self) -> Edit:
        """Self-attention whose weights are the identity."""
        return Alone(frozenset(self.layers))


@dataclass(frozen=True)
class SEG(Perturbed):
    """Smoothed energy guidance: there, the self-attention's queries are blurred by a Gaussian of `blur` cells.

    From 9999 on, the default, all queries are their mean. Source: Hong 2024, arXiv 2408.00760, algorithm 1.
    """

    name: ClassVar[str] = "seg"
    blur: float = FLAT

    def perturbation(self) -> Edit:
        """Self-attention of blurred queries."""
        return Blurred(frozenset(self.layers), self.blur)


@dataclass(frozen=True)
class SLG(Perturbed):
    """Skip-layer guidance: there, the transformer blocks are passed by.

    Source: Stability-AI/sd3.5, `SkipLayerCFGDenoiser`, and its defaults.
    """

    name: ClassVar[str] = "slg"
    scale: float = 2.5
    start: float = 0.01
    end: float = 0.2

    def perturbation(self) -> Edit:
        """No blocks."""
        return Skipped(frozenset(self.layers))


@dataclass(frozen=True)
class Combined(Guider, ABC):
    """Another way in which the answers for the prompt and the negative prompt become one."""

    @abstractmethod
    def begin(self) -> Combiner:
        """It, at the beginning of a pass."""


@dataclass(frozen=True)
class APG(Combined):
    """Adaptive projected guidance: less of what only saturates, so that high guidance scales do not burn.

    eta        how much is kept of guidance's part along the prompt's clean picture
    threshold  the largest norm of what guidance adds; 0: any
    momentum   of what guidance adds from step to step; below 0 it turns away from what it added before

    Source: Sadat et al. 2024, arXiv 2410.02416, algorithm 1, and table 6 for SDXL.
    """

    name: ClassVar[str] = "apg"
    eta: float = 0.0
    threshold: float = 15.0
    momentum: float = -0.5

    def begin(self) -> Combiner:
        """With no momentum yet."""
        return Projecting(self.eta, self.threshold, self.momentum)


@dataclass(frozen=True)
class TCFG(Combined):
    """Tangential damping: of the answer without the prompt only that part counts which both answers share.

    Source: Kwon et al. 2025, arXiv 2503.18137, algorithm 1.
    """

    name: ClassVar[str] = "tcfg"

    def begin(self) -> Combiner:
        """It has nothing to remember."""
        return Damping()


@dataclass(frozen=True)
class DynamicThreshold(Combined):
    """Dynamic thresholding: a high guidance scale with the contrast of a lower one, `mimic`, channel by channel.

    percentile  of the values, up to which they are brought into the lower one's range; those above are cut
    phi         how much of it is mixed in, 0 to 1

    Source: mcmonkeyprojects/sd-dynamic-thresholding, dynthres_core.py, with its defaults (MEAN, AD, separate channels),
    after Saharia et al. 2022, arXiv 2205.11487, section 2.3.
    """

    name: ClassVar[str] = "threshold"
    mimic: float = 7.0
    percentile: float = 1.0
    phi: float = 1.0

    def begin(self) -> Combiner:
        """It has nothing to remember."""
        return Limiting(self.mimic, self.percentile, self.phi)


@dataclass(frozen=True)
class Interval(Guider):
    """Guidance only from `start` up to `end`; in the other steps the prompt alone is asked, in half the time.

    Source: Kynkäänniemi et al. 2024, arXiv 2404.07724.
    """

    name: ClassVar[str] = "interval"
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class FreeU(Guider):
    """On the way up, more of the UNet's own features (b1 at the deepest level, b2 at the next) and less of the skips'
    low frequencies (s1, s2).

    Source: Si et al. 2023, arXiv 2309.11497, with its values for SD 1.4; at which levels as diffusers' `enable_freeu`.
    """

    name: ClassVar[str] = "freeu"
    b1: float = 1.3
    b2: float = 1.4
    s1: float = 0.9
    s2: float = 0.2

    def edit(self, config: UNetConfig) -> Edit:
        """The way up, otherwise."""
        deepest = len(config.levels) - 1
        return Scaled({deepest: (self.b1, self.s1), deepest - 1: (self.b2, self.s2)})


GUIDERS: dict[str, type[Guider]] = {
    kind.name: kind for kind in (PAG, SEG, SLG, TCFG, APG, DynamicThreshold, Interval, FreeU)
}


def combiners_of(guiders: Sequence[Guider]) -> list[Combiner]:
    """The combiners of a pass, in the order in which they work: APG projects what TCFG has left."""
    combined = [guider for guider in guiders if isinstance(guider, Combined)]
    return [guider.begin() for guider in sorted(combined, key=lambda guider: list(GUIDERS).index(guider.name))]


def check_guiders(guiders: Sequence[Guider], config: UNetConfig, model: str) -> None:
    """Raises UsageError where layers are named in which the model has no transformer."""
    places = [Place("mid", len(config.levels) - 1, j) for j, depth in enumerate(config.mid) if depth]
    for i, level in enumerate(config.levels):
        places += [Place("down", i, j) for j, depth in enumerate(level.down) if depth]
        places += [Place("up", i, j) for j, depth in enumerate(level.up) if depth]
    known = list(dict.fromkeys(name for place in places for name in place.names))
    for guider in guiders:
        if isinstance(guider, Perturbed):
            for layer in guider.layers:
                if layer not in known:
                    raise UsageError(f"{guider.name}: {model} has no transformer at {layer}: it has {', '.join(known)}")


def guided_sides(sides: Sides, guiders: Sequence[Guider], steps: Steps) -> Sides:
    """What is asked for at every sigma, with the sides more that guiders ask for, and without those left out."""
    changing = [guider for guider in guiders if isinstance(guider, Perturbed | Interval)]
    if not changing:
        return sides
    edits = {guider: guider.perturbation() for guider in changing if isinstance(guider, Perturbed)}
    made: dict[tuple[int, tuple[Guider, ...]], tuple[Sequence[Conditioning], Sequence[Conditioning]]] = {}

    def at(sigma: float) -> Sequence[Conditioning]:
        now, step = sides(sigma), steps.at(sigma)
        acting = tuple(guider for guider in changing if guider.acts(step, len(steps)))
        key = (id(now), acting)
        if key not in made:
            out = list(now)
            prompts = [side for side in out if side.role == "prompt"]
            idle = any(isinstance(guider, Interval) and guider not in acting for guider in changing)
            if idle:  # several prompts are combined by the negative one
                out = prompts if len(prompts) == 1 else [replace(side, idle=True) for side in out]
                prompts = [side for side in out if side.role == "prompt"]
            for guider in acting:
                if isinstance(guider, Perturbed):
                    share = torch.full_like(prompts[0].prompt, guider.scale)
                    out.append(
                        replace(prompts[0], role="perturbed", share=share, edits=(*prompts[0].edits, edits[guider]))
                    )
            made[key] = now, out  # `now` is kept, so that its id stays its own
        return made[key][1]

    return at
