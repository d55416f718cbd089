"""Noise schedules: the published scheduler configs, and the timesteps and sigmas that each sampler visits.

Everything is in the variance-exploding form of Karras et al. 2022: x = latents + sigma * noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from nativesd.config import Prediction
from nativesd.errors import SourceError, UsageError

Spacing = Literal["leading", "trailing", "linspace"]
PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


@dataclass(frozen=True)
class SchedulerConfig:
    """What a published scheduler_config.json says of the noise. The defaults are Stable Diffusion's own values.

    `set_alpha_to_one` false means that DDIM and PNDM end at the smallest trained sigma, not at zero.
    """

    class_name: str = "DDIMScheduler"
    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction: Prediction = "epsilon"
    spacing: Spacing | None = None
    """None: absent from the file, so each sampler's own default holds."""
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    final_sigma_zero: bool = True
    karras: bool = False

    @classmethod
    def from_published(cls, data: Mapping[str, Any]) -> SchedulerConfig:
        """Read scheduler_config.json; absent fields take the published classes' defaults. Raises SourceError."""
        for name, allowed in _ONLY.items():
            if data.get(name, allowed[0]) not in allowed:
                raise SourceError(f"scheduler_config.json: {name} = {data[name]!r} is not supported")
        prediction = data.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise SourceError(
                f"scheduler_config.json: prediction_type = {prediction!r} is not one of {', '.join(PREDICTIONS)}"
            )
        spacing = data.get("timestep_spacing")
        if spacing not in (None, "leading", "trailing", "linspace"):
            raise SourceError(
                f"scheduler_config.json: timestep_spacing = {spacing!r} is not leading, trailing or linspace"
            )
        return cls(
            class_name=data.get("_class_name", "DDIMScheduler"),
            train_steps=data.get("num_train_timesteps", 1000),
            beta_start=data.get("beta_start", 0.0001),
            beta_end=data.get("beta_end", 0.02),
            beta_schedule=data.get("beta_schedule", "linear"),
            prediction=PREDICTIONS[prediction],
            spacing=cast("Spacing | None", spacing),
            steps_offset=data.get("steps_offset", 0),
            set_alpha_to_one=data.get("set_alpha_to_one", False),
            final_sigma_zero=data.get("final_sigmas_type", "zero") == "zero",
            karras=bool(data.get("use_karras_sigmas", False)),
        )


_ONLY: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear"),
    "trained_betas": (None,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "rescale_betas_zero_snr": (False, None),
    "thresholding": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "solver_order": (2,),
}
"""Fields that would change the picture in a way this version does not know, with the values it does."""


def alphas_cumprod(config: SchedulerConfig) -> Tensor:
    """The trained schedule's cumulative alphas, (train_steps,) float64.

    "scaled_linear" is linear in the square root of beta (`make_beta_schedule` "linear" of CompVis/latent-diffusion).
    """
    start, end, steps = config.beta_start, config.beta_end, config.train_steps
    if config.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def trained_sigmas(config: SchedulerConfig) -> Tensor:
    """sqrt((1 - alpha) / alpha) of every trained timestep, ascending, (train_steps,) float64."""
    alphas = alphas_cumprod(config)
    return ((1 - alphas) / alphas).sqrt()


@dataclass(frozen=True)
class SamplerRule:
    """How the published class of a sampler lays out its steps; the classes differ in every one of these."""

    spacing: Spacing
    """where the config does not say"""
    whole_steps: bool
    """timesteps are rounded to trained ones, those of Karras sigmas too"""
    extra_step: bool
    """linspace and leading divide the range by one step more (DPMSolverMultistepScheduler)"""
    ends_at_trained: bool
    """the last sigma is the smallest trained one unless set_alpha_to_one, instead of zero"""
    unit_variance: bool
    """the start is sqrt(1 + sigma^2) * noise for every spacing; else sigma * noise unless leading"""
    karras_full_range: bool
    """Karras sigmas span the trained range, not the spaced one"""


@dataclass(frozen=True)
class Schedule:
    """One picture's steps: `timesteps` (n,) and `sigmas` (n + 1,), descending float64; x starts at `start` * noise."""

    timesteps: Tensor
    sigmas: Tensor
    start: float
    log_sigmas: Tensor

    def timestep(self, sigma: float) -> float:
        """The timestep of a sigma: the scheduled one, or between steps by interpolation of the trained log-sigmas."""
        index = (self.sigmas[:-1] == sigma).nonzero()
        if len(index):
            return float(self.timesteps[index[0, 0]])
        return float(_timestep_of(torch.tensor([sigma], dtype=torch.float64), self.log_sigmas)[0])


def _timestep_of(sigmas: Tensor, log_sigmas: Tensor) -> Tensor:
    """Fractional timesteps of `sigmas`, linear in log sigma (k-diffusion `DiscreteSchedule.sigma_to_t`)."""
    logs = sigmas.log()
    high = torch.searchsorted(log_sigmas, logs).clamp(1, len(log_sigmas) - 1)
    low = high - 1
    weight = ((logs - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])).clamp(0, 1)
    return low + weight


def karras_sigmas(steps: int, smallest: float, largest: float, rho: float = 7.0) -> Tensor:
    """`steps` sigmas from `largest` to `smallest` (Karras et al. 2022, equation 5), float64."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    sigmas: Tensor = (high + ramp * (low - high)) ** rho
    return sigmas


def spaced_timesteps(config: SchedulerConfig, rule: SamplerRule, steps: int) -> Tensor:
    """Descending timesteps, (steps,) float64, in one of the spacings of Lin et al. 2023, table 2."""
    total = config.train_steps
    spacing = config.spacing or rule.spacing
    parts = steps + 1 if rule.extra_step else steps
    match spacing:
        case "leading":
            ascending = torch.arange(parts, dtype=torch.float64) * (total // parts) + config.steps_offset
        case "linspace":
            ascending = torch.linspace(0, total - 1, parts, dtype=torch.float64)
            if rule.whole_steps:
                ascending = ascending.round()
        case "trailing":
            return torch.arange(total, 0, -total / steps, dtype=torch.float64)[:steps].round() - 1
    return ascending.flip(0)[:steps].clamp(max=total - 1)


def make_schedule(config: SchedulerConfig, rule: SamplerRule, steps: int, *, karras: bool) -> Schedule:
    """The schedule of `steps` steps. Raises UsageError for a number of steps the trained range does not have."""
    if not 1 <= steps < config.train_steps:
        raise UsageError(f"steps must be between 1 and {config.train_steps - 1}, not {steps}")
    trained = trained_sigmas(config)
    log_sigmas = trained.log()
    timesteps = spaced_timesteps(config, rule, steps)
    low = timesteps.floor().long()
    high = (low + 1).clamp(max=len(trained) - 1)
    sigmas = trained[low] + (timesteps - low) * (trained[high] - trained[low])
    if karras:
        ends = (trained[0], trained[-1]) if rule.karras_full_range else (sigmas[-1], sigmas[0])
        sigmas = karras_sigmas(steps, float(ends[0]), float(ends[1]))
        timesteps = _timestep_of(sigmas, log_sigmas)
        if rule.whole_steps:
            timesteps = timesteps.round()
    if rule.ends_at_trained:
        last = 0.0 if config.set_alpha_to_one else float(trained[0])
    else:
        last = 0.0 if config.final_sigma_zero else float(trained[0])
    first = float(sigmas[0])
    leading = (config.spacing or rule.spacing) == "leading"
    start = (1 + first**2) ** 0.5 if rule.unit_variance or leading else first
    return Schedule(timesteps, torch.cat([sigmas, sigmas.new_tensor([last])]), start, log_sigmas)
