"""What a call may ask of sampling beside a sampler and a schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Karras et al. 2022's noise on the way, and the ends of a schedule.

    churn                 noise that Euler, Heun, Heun++ 2 and DPM2 add before their steps, over all of them (S_churn)
    churn_min, churn_max  at sigmas from the one to the other (S_tmin, S_tmax)
    noise                 factor on all noise that samplers add (S_noise)
    sigma_min, sigma_max  ends of the schedules that have a formula: Karras, exponential, polyexponential, beta, KL
                          optimal. Default: those that the model was trained with
    rho                   how much Karras's and polyexponential sigmas crowd together at the small end. Default 7 and 1
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    noise: float = 1.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None

    def chosen(self) -> dict[str, Any]:
        """What is not at its default."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def ends(self, smallest: float, largest: float) -> tuple[float, float]:
        """The smallest and the largest sigma, where these are the model's."""
        return self.sigma_min or smallest, self.sigma_max or largest


PLAIN = Sampling()
"""Nothing is asked."""
