"""From a UNet to the function that samplers call: guidance, prediction, and what is known of the picture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nativesd.config import Prediction
from nativesd.diffusion.conditioning import Conditioning, Group, groups, join
from nativesd.diffusion.guiding.combine import At, Combiner, Guidance
from nativesd.diffusion.prompting import Sides
from nativesd.diffusion.savings import DeepCache
from nativesd.errors import NativesdWarning
from nativesd.models.edits import Edits
from nativesd.models.reuse import Reuse
from nativesd.models.unet import ImageContext, UNet
from nativesd.pictures.soft import SoftMask
from nativesd.sampling.methods.onestep import Denoiser
from nativesd.sampling.published import EDM
from nativesd.sampling.steps import Steps


class Shows(Protocol):
    """What the UNet is shown beside the text: image prompts (`nativesd.diffusion.images.keys.ImagePrompting`)."""

    def at(self, sigma: float, group: Group) -> ImageContext | None:
        """For the rows of a group, what the UNet takes as `images`."""


class Steers(Protocol):
    """What adds to the UNet's features: ControlNets and adapters (`nativesd.diffusion.control.Steering`)."""

    @property
    def mixes(self) -> bool:
        """Whether a picture's rows see each other, and so have to stay together."""

    def residuals(self, latents: Tensor, time: float, sigma: float, side: Conditioning) -> list[Tensor] | None:
        """For noisy latents of unit variance (B, C, h, w), what the UNet takes as `residuals`."""

    @property
    def broken(self) -> Mapping[str, Tensor]:
        """What adds them, by name -> whether it has made numbers that are not finite of such that are."""

    def adapter(self, sigma: float, copies: int) -> list[Tensor]:
        """What the UNet takes as `adapter`, `copies` rows of each."""


class Guided:
    """What samplers call: noisy latents (B, C, h, w) and sigma to the predicted clean latents, float32.

    `sides` gives the conditionings that `guidance` and `combiners` combine, each for all B pictures. `edits` are those
    of every call of the UNet, `shown` image prompts, `cache` what it keeps. `edm` is the scheduler's.
    `asked` is shared by denoisers of the same sides, of which all have steering or none has.
    """

    def __init__(
        self,
        unet: UNet,
        sides: Sides,
        guidance: Guidance,
        timestep: Callable[[float], float],
        prediction: Prediction,
        dtype: torch.dtype,
        steering: Steers | None = None,
        edm: EDM | None = None,
        *,
        combiners: Sequence[Combiner] = (),
        edits: Edits = (),
        shown: Shows | None = None,
        cache: DeepCache | None = None,
        asked: dict[int, Asked] | None = None,
    ) -> None:
        self._unet, self._sides, self._guidance, self._timestep = unet, sides, guidance, timestep
        self._prediction, self._dtype, self._steering, self._edm = prediction, dtype, steering, edm
        self._combiners, self._edits, self._shown = combiners, edits, shown
        self._spread = 1.0 if edm is None else edm.data  # of clean latents
        self._sequential = guidance.sequential
        self._prepared = {} if asked is None else asked
        self._cache, self._reuse = cache, dict[int, Reuse]()
        self._made: dict[int, int] = {}  # by group: the call that left what is kept of it
        self._asked: list[float] = []  # the noise levels so far, but for those asked for again at once
        self._last: tuple[At, Sequence[Conditioning], Sequence[Tensor]] | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The clean latents, guided."""
        scaled, time = x / math.hypot(self._spread, sigma), self._timestep(sigma)
        now = self._sides(sigma)
        if id(now) not in self._prepared:
            self._prepared[id(now)] = Asked(now, self._steering)
        told = self._prepared[id(now)]
        if self._asked[-1:] != [sigma]:
            self._asked.append(sigma)
        outputs: Sequence[Tensor] = ()
        if not self._sequential:
            try:
                outputs = self._answers(told.together, scaled, time, sigma)
            except torch.cuda.OutOfMemoryError:
                if len(told.together) == len(now):
                    raise
                warnings.warn(
                    "not enough memory for prompt and negative prompt at once: one by one now",
                    NativesdWarning,
                    stacklevel=2,
                )
                self._sequential = True
        if self._sequential:
            outputs = self._answers(told.each, scaled, time, sigma)
        at = At(x, sigma, *clean_shares(sigma, self._prediction, self._edm))
        self._last = at, now, outputs
        return at.clean(self._guidance.combine(outputs, now, at, self._combiners))

    def unguided(self) -> Tensor:
        """The clean latents that the last call's negative prompt alone means."""
        assert self._last is not None
        at, sides, outputs = self._last
        return at.clean(
            next((o for side, o in zip(sides, outputs, strict=True) if side.role == "negative"), outputs[0])
        )

    def broken(self) -> list[str]:
        """The ControlNets that have made numbers which are not finite of such that are."""
        return [] if self._steering is None else [name for name, flag in self._steering.broken.items() if flag]

    def _answers(self, batches: Sequence[_Batch], scaled: Tensor, time: float, sigma: float) -> list[Tensor]:
        """The UNet's output for every side, in their order."""
        out: dict[int, Tensor] = {}
        for batch in batches:
            rows = scaled if batch.shared else torch.cat([scaled] * len(batch.numbers))
            answers = self._grouped(batch.groups, rows, time, sigma).chunk(len(batch.numbers))
            out |= zip(batch.numbers, answers, strict=True)
        return [out[number] for number in range(len(out))]

    def _grouped(self, parts: Sequence[Group], scaled: Tensor, time: float, sigma: float) -> Tensor:
        if len(parts) == 1:
            return self._answer(parts[0], scaled, time, sigma)
        out = torch.empty_like(scaled, dtype=torch.float32)
        for part in parts:
            out[part.rows] = self._answer(part, scaled[part.rows], time, sigma)
        return out

    def _answer(self, group: Group, scaled: Tensor, time: float, sigma: float) -> Tensor:
        side, steering = group.side, self._steering
        inputs = scaled if side.channels is None else torch.cat([scaled, side.channels], dim=1)
        output: Tensor = self._unet(
            inputs.to(self._dtype), time, group.context,
            pooled=side.pooled, time_ids=side.time_ids, guidance=side.guidance,
            residuals=None if steering is None else steering.residuals(scaled.to(self._dtype), time, sigma, side),
            adapter=() if steering is None else steering.adapter(sigma, len(scaled)),
            edits=(*side.edits, *self._edits), images=None if self._shown is None else self._shown.at(sigma, group),
            reuse=self._kept(group),
        )  # fmt: skip
        return output.float()

    def _kept(self, group: Group) -> Reuse | None:
        """What of the deep levels is left for later calls, or taken from an earlier one."""
        if self._cache is None:
            return None
        kept = self._reuse.setdefault(id(group), Reuse(self._cache.level))
        call = len(self._asked)
        age = call - self._made.get(id(group), -self._cache.every)  # groups take turns where prompts or sides change
        kept.fresh = age == 0 or age >= self._cache.every
        if kept.fresh:
            self._made[id(group)] = call
        return kept


class _Batch:
    """Sides of the same edits, which are asked in one call of the UNet, and their `numbers` among all."""

    def __init__(self, numbers: Sequence[int], sides: Sequence[Conditioning], steering: Steers | None) -> None:
        self.numbers = numbers
        self.groups = groups(join(sides), one=steering is not None and steering.mixes)
        whole = self.groups[0].side
        # the UNet's answers begin to differ where the text comes in
        self.shared = (
            len(self.groups) == 1
            and steering is None
            and whole.channels is whole.pooled is whole.guidance is None
            and not whole.edits
        )


class Asked:
    """Sides ready to be asked together, as far as their edits are the same, or each alone."""

    def __init__(self, sides: Sequence[Conditioning], steering: Steers | None) -> None:
        self.sides = sides  # kept, so that its id stays its own
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, side in enumerate(sides):
            alike.setdefault(tuple(map(id, side.edits)), []).append(number)
        self.together = [_Batch(numbers, [sides[i] for i in numbers], steering) for numbers in alike.values()]
        self.each = [_Batch([number], [side], steering) for number, side in enumerate(sides)]


def to_clean(output: Tensor, x: Tensor, sigma: float, prediction: Prediction, edm: EDM | None = None) -> Tensor:
    """The clean latents that a UNet's output means at x = clean + sigma * noise."""
    return At(x, sigma, *clean_shares(sigma, prediction, edm)).clean(output)


def clean_shares(sigma: float, prediction: Prediction, edm: EDM | None = None) -> tuple[float, float]:
    """How much of x = clean + sigma * noise, and of a UNet's output, is in the clean latents that the output means.

    Source: Karras et al. 2022, table 1. EDM's "epsilon" is no noise but the table's last column: what is left to add to
    the share of x.
    """
    if edm is not None and prediction != "sample":
        rest = sigma * edm.data / math.hypot(sigma, edm.data)
        return edm.data**2 / (sigma**2 + edm.data**2), rest if prediction == "epsilon" else -rest
    match prediction:
        case "epsilon":
            return 1.0, -sigma
        case "v":
            return 1 / (1 + sigma**2), -sigma / math.hypot(1, sigma)
        case "sample":
            return 0.0, 1.0


def guidance_embedding(guidance_scale: float, width: int) -> Tensor:
    """LCM's embedding (1, width) of the guidance scale, sines first (Luo et al. 2023, `w_embedding`)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = (guidance_scale - 1) * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos()])[None]


def keep_known(denoise: Denoiser, known: Tensor, noise: Tensor, mask: Tensor) -> Denoiser:
    """A denoiser that paints where `mask` (B or 1, 1, h, w) is 1 and keeps `known` (B, C, h, w) where it is 0.

    The model sees the known part as its clean latents with the picture's own noise at every sigma (Lugmayr et al.
    2022, equation 8, without resampling), and its answer there is replaced by them.
    """

    def inpaint(x: Tensor, sigma: float) -> Tensor:
        x = torch.lerp(known + sigma * noise, x, mask)
        return torch.lerp(known, denoise(x, sigma), mask)

    return inpaint


def keep_softly(denoise: Denoiser, soft: SoftMask) -> Denoiser:
    """A denoiser whose answers are mixed with the picture that a soft mask has begun with, the more the noisier."""
    return lambda x, sigma: soft.blended(denoise(x, sigma), sigma)


def watch(denoise: Denoiser, steps: Steps, report: Callable[[int, float, Tensor, Tensor], None]) -> Denoiser:
    """A denoiser that reports (index, sigma, x, denoised) when a sampler first comes to a step, or is beyond it.

    A sampler with steps of its own may leave some out.
    """
    reported = -1

    def watched(x: Tensor, sigma: float) -> Tensor:
        nonlocal reported
        denoised = denoise(x, sigma)
        index = steps.at(sigma)
        if index > reported:
            reported = index
            report(index, sigma, x, denoised)
        return denoised

    return watched
