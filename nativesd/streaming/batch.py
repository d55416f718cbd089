"""The stream batch: n frames at n noise levels go through the UNet in one call, and each moves on by one level.

The equations are those of Kodaira et al. 2023 (arXiv 2312.12491) as published in cumulo-autumn/StreamDiffusion
(src/streamdiffusion/pipeline.py), written for any prediction: what a UNet answers is turned into the clean latents that
it means, and guidance is done on these, which is the same as on noise. What a slot hands to the next is kept without
the noise of the next level, so that other levels or another seed hold for every frame from the next call on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nativesd.config import Prediction
from nativesd.diffusion.denoiser import clean_shares
from nativesd.streaming.ladder import Ladder

Residual = Literal["self", "initialize", "full", "none"]
"""Where the answer for the negative prompt comes from: a residual noise that is carried along, begun with the frame's
own noise ("self") or with one more row, of the newest frame ("initialize"); a row for each slot ("full"); nowhere."""

Ask = Callable[[Tensor], Tensor]
"""From latents (rows, C, h, w) of unit variance to the UNet's answers for them, float32."""


def extra_rows(residual: Residual, slots: int, *, guided: bool) -> int:
    """How many rows of the negative prompt the UNet is asked for beside the slots' own."""
    return {"self": 0, "initialize": 1, "full": slots, "none": 0}[residual] if guided else 0


@dataclass(frozen=True)
class Plan:
    """Everything that one call computes with, on the device; an update puts another in its place.

    `noise` (n, C, h, w) is each slot's own; all that ends in `share`, and the others, are (n, 1, 1, 1) float32.
    """

    slots: int
    extra: int
    guided: bool
    carries: bool
    """Whether a residual noise is carried along."""
    initialize: bool
    guidance_scale: float
    delta: float
    renoise: bool
    noise: Tensor
    added: Tensor
    """The noise of each level: level * noise."""
    signal: Tensor
    level: Tensor
    signal_to_level: Tensor
    clean_share: Tensor
    """Of a latent in the clean one that the answer means."""
    answer_share: Tensor
    skip: Tensor
    out: Tensor

    @property
    def rows(self) -> int:
        """Of the UNet."""
        return self.slots + self.extra


def make_plan(
    ladder: Ladder,
    noise: Tensor,
    prediction: Prediction,
    *,
    guidance_scale: float,
    residual: Residual,
    delta: float,
    renoise: bool,
    device: torch.device,
) -> Plan:
    """The plan for one ladder; guidance of 1 and below is none."""
    guided = guidance_scale > 1 and residual != "none"

    def column(values: Tensor) -> Tensor:
        return values.to(device, torch.float32).reshape(-1, 1, 1, 1)  # (n,) -> (n, 1, 1, 1)

    shares = torch.tensor([clean_shares(sigma, prediction) for sigma in ladder.sigmas], dtype=torch.float64)
    noise, level = noise.to(device, torch.float32), column(ladder.noise)
    return Plan(
        slots=len(ladder),
        extra=extra_rows(residual, len(ladder), guided=guided),
        guided=guided,
        carries=guided and residual != "full",
        initialize=guided and residual == "initialize",
        guidance_scale=guidance_scale,
        delta=delta,
        renoise=renoise,
        noise=noise,
        added=level * noise,
        signal=column(ladder.signal),
        level=level,
        signal_to_level=column(ladder.signal / ladder.noise),
        clean_share=column(shares[:, 0] / ladder.signal),  # of x = clean + sigma e, which is the latent over its signal
        answer_share=column(shares[:, 1]),
        skip=column(ladder.skip),
        out=column(ladder.out),
    )


class Batch:
    """What the slots hold between two calls, in memory that stays where it is."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.latents = plan.noise.new_zeros((plan.rows, *plan.noise.shape[1:]))
        self.clean, self.base, self.residual, self.drift = (torch.zeros_like(plan.noise) for _ in range(4))

    def follow(self, plan: Plan) -> Batch:
        """The batch for another plan: this one where its frames can go on, else one that has to be filled again."""
        if plan.slots != self.plan.slots:
            return Batch(plan)
        if plan.rows != self.plan.rows:
            self.latents = self.latents.new_zeros((plan.rows, *self.latents.shape[1:]))
        if not self.plan.carries:
            self.drift.zero_()  # nothing was carried so far: every slot begins with its own noise
        self.plan = plan
        return self

    def noised(self, clean: Tensor) -> Tensor:
        """Clean latents (1, C, h, w) at the level of the first slot."""
        plan = self.plan
        return torch.addcmul(plan.added[:1], clean, plan.signal[:1])

    def advance(self, newest: Tensor, ask: Ask) -> Tensor:
        """Put noisy latents (1, C, h, w) into the first slot and move all on; the clean latents (1, ...) of the last.

        The answer is in the batch's own memory, until the next call.
        """
        plan, n = self.plan, self.plan.slots
        x = self.latents[:n]
        x[:1].copy_(newest)
        torch.mul(self.clean[:-1], plan.signal[1:], out=x[1:])
        if plan.renoise:
            x[1:].add_(plan.added[1:])
        if plan.extra:
            self.latents[n:].copy_(x[: plan.extra])
        if plan.carries:  # R_k = e_k + signal_k * drift_(k - 1) / level_k
            self.residual.copy_(plan.noise)
            self.residual[1:].addcmul_(self.drift[:-1], plan.signal_to_level[1:])
        answers = ask(self.latents)
        clean = torch.mul(x, plan.clean_share, out=self.clean).addcmul_(answers[:n], plan.answer_share)
        if plan.guided:
            torch.lerp(self._unconditional(x, answers), clean, plan.guidance_scale, out=clean)
        if plan.carries:  # drift = D(level R, eps); (level R - level eps) / signal = clean + (level R - x) / signal
            moved = torch.mul(self.residual, plan.level, out=self.residual)
            torch.sub(moved, x, out=self.drift).div_(plan.signal).add_(clean).mul_(plan.out)
            self.drift.addcmul_(moved, plan.skip)
        clean.mul_(plan.out).addcmul_(x, plan.skip)
        return clean[n - 1 :]

    def _unconditional(self, x: Tensor, answers: Tensor) -> Tensor:
        """The clean latents (n, ...) without the prompt: asked for, or what the carried noise says."""
        plan, n = self.plan, self.plan.slots
        if not plan.carries:
            return torch.mul(x, plan.clean_share, out=self.base).addcmul_(answers[n:], plan.answer_share)
        if plan.initialize:  # the noise in x that its answer means: (x - signal * clean) / level
            clean = torch.mul(x[:1], plan.clean_share[:1], out=self.base[:1]).addcmul_(
                answers[n:], plan.answer_share[:1]
            )
            torch.sub(x[:1], clean.mul_(plan.signal[:1]), out=self.residual[:1]).div_(plan.level[:1])
        torch.mul(self.residual, plan.level, out=self.base).mul_(-plan.delta)
        return self.base.add_(x).div_(plan.signal)
