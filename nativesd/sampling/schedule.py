"""Noise schedules: the timesteps and sigmas that each sampler visits.

Everything is in the variance-exploding form of Karras et al. 2022: x = latents + sigma * noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nativesd.errors import UsageError, install_line
from nativesd.sampling.options import PLAIN, Sampling
from nativesd.sampling.published import EDM, Kind, SchedulerConfig, Spacing

LARGEST_SIGMA_ALPHA = 2**-24  # in place of zero terminal SNR's alpha of 0 (EulerDiscreteScheduler of diffusers)


def alphas_cumprod(config: SchedulerConfig) -> Tensor:
    """The trained schedule's cumulative alphas, (train_steps,) float64.

    "scaled_linear" is linear in the square root of beta (`make_beta_schedule` "linear" of CompVis/latent-diffusion).
    """
    start, end, steps = config.beta_start, config.beta_end, config.train_steps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float64)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)
    if config.zero_snr:
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas[-1] = LARGEST_SIGMA_ALPHA
    return alphas


def trained_sigmas(config: SchedulerConfig) -> Tensor:
    """sqrt((1 - alpha) / alpha) of every trained timestep, ascending, (train_steps,) float64."""
    if config.edm is not None:  # none are trained: as many between the ends, even in their logarithm
        return exponential_sigmas(config.train_steps, config.edm.smallest, config.edm.largest).flip(0)
    alphas = alphas_cumprod(config)
    return ((1 - alphas) / alphas).sqrt()


@dataclass(frozen=True)
class SamplerRule:
    """How the published class of a sampler lays out its steps; the classes differ in every one of these."""

    spacing: Spacing
    """where the config does not say"""
    whole_steps: bool = False
    """linspace's timesteps are rounded to trained ones; those of exponential and beta sigmas cut"""
    whole_karras: bool = False
    """the timesteps of Karras sigmas are rounded"""
    extra_step: bool = False
    """linspace and leading divide the range by one step more (DPMSolverMultistepScheduler)"""
    last: Literal["sigma", "alpha", "trained"] = "sigma"
    """what decides if the last sigma is zero or the smallest trained: final_sigmas_type, set_alpha_to_one, nothing"""
    unit_variance: bool = False
    """the start is sqrt(1 + sigma^2) * noise for every spacing; else sigma * noise unless leading"""
    full_range: bool = False
    """Karras, exponential and beta sigmas span the trained range, not the spaced one"""


@dataclass(frozen=True)
class Schedule:
    """One picture's steps: `timesteps` (n,) and `sigmas` (n + 1,), descending float64.

    x starts at `start` * noise, and the latents are x / `end`, as x has that variance where the last sigma is not zero.
    """

    timesteps: Tensor
    sigmas: Tensor
    start: float
    end: float
    trained: Tensor
    """`trained_sigmas`"""
    edm: bool = False
    """Whether a timestep is 0.25 log sigma (Karras et al. 2022, table 1, c_noise)"""

    def timestep(self, sigma: float) -> float:
        """The timestep of a sigma: the scheduled one, or between steps by interpolation of the trained log-sigmas."""
        if self.edm:
            return 0.25 * math.log(sigma)
        index = (self.sigmas[:-1] == sigma).nonzero()
        if len(index):
            return float(self.timesteps[index[0, 0]])
        return float(timestep_of(torch.tensor([sigma], dtype=torch.float64), self.trained)[0])

    def part(self, first: int, last: int | None = None) -> Schedule:
        """Steps `first` up to and without `last`; x starts wherever the step before it left it."""
        end = len(self.timesteps) if last is None else last
        return replace(self, timesteps=self.timesteps[first:end], sigmas=self.sigmas[first : end + 1])

    def without_penultimate(self) -> Schedule:
        """Without the last sigma but one: a step less (`discard_next_to_last_sigma` of A1111's samplers)."""
        return replace(self, timesteps=self.timesteps[:-1], sigmas=torch.cat([self.sigmas[:-2], self.sigmas[-1:]]))


def timestep_of(sigmas: Tensor, trained: Tensor) -> Tensor:
    """Fractional timesteps of `sigmas`, linear in log sigma (k-diffusion `DiscreteSchedule.sigma_to_t`)."""
    logs, log_sigmas = sigmas.log(), trained.log()
    high = torch.searchsorted(log_sigmas, logs).clamp(1, len(log_sigmas) - 1)
    low = high - 1
    weight = ((logs - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])).clamp(0, 1)
    return low + weight


def _at(timesteps: Tensor, values: Tensor) -> Tensor:
    """`values` of fractional timesteps, linearly."""
    low = timesteps.floor().long()
    high = (low + 1).clamp(max=len(values) - 1)
    return values[low] + (timesteps - low) * (values[high] - values[low])


def karras_sigmas(steps: int, smallest: float, largest: float, rho: float = 7.0) -> Tensor:
    """`steps` sigmas from `largest` to `smallest` (Karras et al. 2022, equation 5), float64."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    sigmas: Tensor = (high + ramp * (low - high)) ** rho
    return sigmas


def exponential_sigmas(steps: int, smallest: float, largest: float) -> Tensor:
    """`steps` sigmas from `largest` to `smallest`, even in their logarithm (k-diffusion `get_sigmas_exponential`)."""
    ends = torch.tensor([largest, smallest], dtype=torch.float64).log()
    return torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64).exp()


def polyexponential_sigmas(steps: int, smallest: float, largest: float, rho: float = 1.0) -> Tensor:
    """Polynomial in log sigma, of degree `rho`, of which 1 is the exponential one (k-diffusion)."""
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    out: Tensor = (ramp * (math.log(largest) - math.log(smallest)) + math.log(smallest)).exp()
    return out


def kl_optimal_sigmas(steps: int, smallest: float, largest: float) -> Tensor:
    """`steps` + 1 sigmas, even in their arctangent (Sabour et al. 2024, arXiv 2404.14507, theorem 3.1): the last is the
    smallest, not zero, as A1111 has it."""
    ends = math.atan(largest), math.atan(smallest)
    return torch.linspace(*ends, steps + 1, dtype=torch.float64).tan()


def linear_quadratic_sigmas(steps: int, largest: float, threshold: float = 0.025) -> Tensor:
    """(steps + 1,): half of the steps fall linearly from `largest` by `threshold` of it, the others in a parabola to 0.

    Source: genmoai/models src/mochi_preview/infer.py (`linear_quadratic_schedule`), which ComfyUI follows.
    """
    linear = steps // 2
    if linear == 0:
        return torch.tensor([largest, 0.0], dtype=torch.float64)
    rest, number = steps - linear, torch.arange(steps + 1, dtype=torch.float64)
    bend = (linear - threshold * steps) / rest**2
    parabola = bend / linear * (number**2 + linear**2) + (threshold / linear - 2 * bend) * number
    fallen = torch.where(number < linear, number * threshold / linear, parabola)
    fallen[-1] = 1
    return (1 - fallen) * largest


def beta_sigmas(steps: int, smallest: float, largest: float, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """`steps` sigmas between the two, at quantiles of the Beta distribution (Lee et al. 2024, arXiv 2407.12173).

    In sigma, as A1111 and diffusers do it; ComfyUI takes the quantiles in timesteps. Raises UsageError without SciPy.
    """
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise UsageError(f"the beta schedule needs SciPy: {install_line('samplers')}") from error
    quantiles = torch.from_numpy(distribution.ppf(torch.linspace(1, 0, steps, dtype=torch.float64), alpha, beta))
    return smallest + quantiles * (largest - smallest)


# Align Your Steps (Sabour et al. 2024), the 10-step schedules of NVIDIA's quick-start guide
_ALIGNED = {
    False: (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),  # Stable Diffusion 1.5
    True: (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),  # SDXL
}


def aligned_sigmas(steps: int, *, sdxl: bool) -> Tensor:
    """Align Your Steps: `steps` sigmas, the published ten interpolated linearly in their logarithm."""
    table = torch.tensor(_ALIGNED[sdxl], dtype=torch.float64).log()
    positions = torch.linspace(0, len(table) - 1, steps + 1, dtype=torch.float64)
    return _at(positions, table).exp()[:steps]


def spaced_timesteps(config: SchedulerConfig, rule: SamplerRule, steps: int, spacing: Spacing) -> Tensor:
    """Descending timesteps, (steps,) float64. Raises UsageError for more steps than a distilled model has."""
    total = config.train_steps
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
        case "skipping":
            return skipping_timesteps(config, steps)
    return ascending.flip(0)[:steps].clamp(max=total - 1)


def skipping_timesteps(config: SchedulerConfig, steps: int, strength: float = 1.0) -> Tensor:
    """`steps` of the timesteps that LCM was distilled with, descending, (steps,) float64, from `strength` of all on.

    Source: diffusers' LCMScheduler.set_timesteps. Raises UsageError for more steps than there are.
    """
    own = torch.arange(int(config.original_steps * strength), 0, -1) * (config.train_steps // config.original_steps) - 1
    if steps > len(own):
        of = "this sampler" if strength == 1 else f"strength {strength:g} of it"
        raise UsageError(f"{of} has at most {len(own)} steps, not {steps}")
    picks = torch.linspace(0, len(own), steps + 1, dtype=torch.float64)[:-1].floor().long()
    return own[picks].double()


def make_schedule(
    config: SchedulerConfig,
    rule: SamplerRule,
    steps: int,
    kind: Kind = "automatic",
    options: Sampling = PLAIN,
    *,
    sdxl: bool = False,
) -> Schedule:
    """The schedule of `steps` steps. Raises UsageError for a number of steps the trained range does not have.

    `sdxl` chooses between the two tables of Align Your Steps. "ddim uniform" may have some steps more.
    """
    if not 1 <= steps < config.train_steps:
        raise UsageError(f"steps must be between 1 and {config.train_steps - 1}, not {steps}")
    if config.edm is not None:
        return _edm_schedule(config, config.edm, rule, steps, kind, options, sdxl=sdxl)
    trained = trained_sigmas(config)
    last_step = config.train_steps - 1
    spacing = config.spacing if config.spacing and rule.spacing != "skipping" else rule.spacing
    if kind in ("leading", "trailing", "linspace"):
        spacing = kind
    timesteps = spaced_timesteps(config, rule, steps, spacing)
    sigmas = _at(timesteps, trained)
    ends = (trained[0], trained[-1]) if rule.full_range or kind != config.kind else (sigmas[-1], sigmas[0])
    smallest, largest = _ends(options, float(ends[0]), float(ends[1]))
    match kind:
        case "karras" | "polyexponential" | "kl optimal" | "linear quadratic" | "beta" | "align your steps":
            sigmas = _by_formula(
                kind, steps, smallest, largest, options.rho or (7.0 if kind == "karras" else 1.0), sdxl
            )
        case "ddim uniform":  # ComfyUI comfy/samplers.py `ddim_scheduler`, and A1111's
            sigmas = trained[1 :: max(config.train_steps // steps, 1)].flip(0)
        case "exponential" | "lu":  # even in log sigma, where "lu" has whole timesteps (Lu et al. 2022)
            sigmas = exponential_sigmas(steps, smallest, largest)
        case "normal" | "sgm uniform":  # evenly spaced timesteps, down to the first one or stopping before it
            parts = steps if kind == "normal" else steps + 1
            even = torch.linspace(last_step, 0, parts, dtype=torch.float64)[:steps]
            sigmas = _at(even, trained.log()).exp()
        case "simple":  # ComfyUI comfy/samplers.py `simple_scheduler`
            picks = last_step - (torch.arange(steps, dtype=torch.float64) * config.train_steps / steps).long()
            sigmas = trained[picks]
    if kind not in ("automatic", "leading", "trailing", "linspace"):
        timesteps = timestep_of(sigmas, trained)
        if kind == "lu" or (kind == "karras" and rule.whole_karras):
            timesteps = timesteps.round()
        elif kind in ("exponential", "beta") and rule.whole_steps:
            timesteps = timesteps.floor()
    zero = {"sigma": config.final_sigma_zero, "alpha": config.set_alpha_to_one, "trained": False}[rule.last]
    own = kind in ("automatic", "leading", "trailing", "linspace", config.kind)
    last = float(trained[0]) if own and not zero else smallest if kind == "kl optimal" else 0.0
    first = float(sigmas[0])
    start = (1 + first**2) ** 0.5 if rule.unit_variance or (own and spacing == "leading") else first
    end = (1 + last**2) ** 0.5 if rule.unit_variance else 1.0
    return Schedule(timesteps, torch.cat([sigmas, sigmas.new_tensor([last])]), start, end, trained)


def _by_formula(kind: Kind, steps: int, smallest: float, largest: float, rho: float, sdxl: bool) -> Tensor:
    """The sigmas (steps,) of a schedule that needs no more than its ends, whatever the model was trained on."""
    match kind:
        case "karras":
            return karras_sigmas(steps, smallest, largest, rho)
        case "polyexponential":
            return polyexponential_sigmas(steps, smallest, largest, rho)
        case "kl optimal":
            return kl_optimal_sigmas(steps, smallest, largest)[:-1]
        case "linear quadratic":
            return linear_quadratic_sigmas(steps, largest)[:-1]
        case "beta":
            return beta_sigmas(steps, smallest, largest)
    return aligned_sigmas(steps, sdxl=sdxl)


def _ends(options: Sampling, smallest: float, largest: float) -> tuple[float, float]:
    """The ends of a schedule by formula. Raises UsageError where nothing is between them."""
    low, high = options.ends(smallest, largest)
    if low >= high and (low, high) != (smallest, largest):
        raise UsageError(f"sampling.sigma_min must be below sigma_max, and {low:g} is not below {high:g}")
    return low, high


def _edm_schedule(
    config: SchedulerConfig, edm: EDM, rule: SamplerRule, steps: int, kind: Kind, options: Sampling, *, sdxl: bool
) -> Schedule:
    """The schedule of a model of continuous sigmas. What is even in timesteps is even in log sigma.

    Raises UsageError for samplers that go by trained timesteps.
    """
    if rule.spacing == "skipping":
        raise UsageError("the model has continuous sigmas (EDM), and this sampler goes by trained timesteps")
    smallest, largest = _ends(options, edm.smallest, edm.largest)
    match edm.kind if kind == "automatic" else kind:
        case "karras" | "polyexponential" | "kl optimal" | "linear quadratic" | "beta" | "align your steps" as named:
            rho = options.rho or (edm.rho if named == "karras" else 1.0)
            sigmas = _by_formula(named, steps, smallest, largest, rho, sdxl)
        case "sgm uniform" | "trailing" | "simple":  # they stop before the smallest
            sigmas = exponential_sigmas(steps + 1, smallest, largest)[:steps]
        case _:
            sigmas = exponential_sigmas(steps, smallest, largest)
    last = 0.0 if config.final_sigma_zero and kind != "kl optimal" else smallest
    start = (1 + float(sigmas[0]) ** 2) ** 0.5
    ends = torch.cat([sigmas, sigmas.new_tensor([last])])
    return Schedule(0.25 * sigmas.log(), ends, start, 1.0, trained_sigmas(config), edm=True)
