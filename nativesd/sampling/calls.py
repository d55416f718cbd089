"""What a sampler is called with beside the denoiser and x."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nativesd.sampling.methods.onestep import Noise, Unguided
from nativesd.sampling.options import PLAIN, Sampling
from nativesd.sampling.published import SchedulerConfig
from nativesd.sampling.schedule import Schedule
from nativesd.sampling.steps import Steps


@dataclass(frozen=True)
class Call:
    """What a sampler may ask for beyond the denoiser and x."""

    schedule: Schedule
    source: Noise
    config: SchedulerConfig
    eta: float | None = None
    unguided: Unguided | None = None
    """Needed by the samplers of `plus_plus`"""
    options: Sampling = PLAIN

    @property
    def sigmas(self) -> list[float]:
        """The schedule's, as numbers."""
        numbers: list[float] = self.schedule.sigmas.tolist()
        return numbers

    @property
    def noise(self) -> Noise:
        """The noise that samplers add."""
        factor, source = self.options.noise, self.source
        return source if factor == 1 else lambda sigma, sigma_next: source(sigma, sigma_next) * factor

    def churn(self, x: Tensor, sigma: float) -> tuple[Tensor, float]:
        """What `options` ask for before a step, of which k-diffusion draws the noise at every sigma."""
        if not self.options.churn:
            return x, sigma
        risen, drawn = self.risen(sigma), self.noise(sigma, sigma)
        return (x, sigma) if risen == sigma else (x + drawn * math.sqrt(risen**2 - sigma**2), risen)

    def risen(self, sigma: float) -> float:
        """The sigma that a step begins at, after its churn."""
        options = self.options
        if not options.churn or not options.churn_min <= sigma <= options.churn_max:
            return sigma
        return sigma * (1 + min(options.churn / len(self.schedule.timesteps), math.sqrt(2) - 1))

    def steps(self, plan: Schedule) -> Steps:
        """The steps of a plan, by the sigmas at which the sampler begins them here."""
        sigmas = plan.sigmas[:-1].tolist()
        return Steps(sigmas, [self.risen(sigma) for sigma in sigmas])

    @property
    def full_noise(self) -> float:
        """eta as asked for, else 1: as much noise as the diffusion has."""
        return 1.0 if self.eta is None else self.eta
