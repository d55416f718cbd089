"""The samplers and schedules by the names that people type: A1111's, ComfyUI's and the published classes'."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from nativesd.errors import UsageError
from nativesd.sampling import samplers as s
from nativesd.sampling.samplers import Denoiser, Noise
from nativesd.sampling.schedule import Kind, SamplerRule, Schedule, SchedulerConfig, timestep_of

TCD_ETA = 0.3  # TCDScheduler's default of gamma, the share of every step that is noise


@dataclass(frozen=True)
class Call:
    """What a sampler may ask for beyond the denoiser and x."""

    schedule: Schedule
    noise: Noise
    config: SchedulerConfig
    eta: float | None = None

    @property
    def sigmas(self) -> list[float]:
        """The schedule's, as numbers."""
        numbers: list[float] = self.schedule.sigmas.tolist()
        return numbers

    @property
    def full_noise(self) -> float:
        """eta as asked for, else 1: as much noise as the diffusion has."""
        return 1.0 if self.eta is None else self.eta


Run = Callable[[Denoiser, Tensor, Call], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A sampler under the name that A1111 shows (else its paper's), and the other names that it is known by."""

    name: str
    run: Run
    rule: SamplerRule
    published: str | None
    """diffusers' class, and in brackets its algorithm_type where it is not the class's own"""
    aliases: tuple[str, ...]
    order: int
    """of convergence, of the deterministic part"""
    noisy: bool
    """Draws noise at every step: ancestral, or on the reverse SDE."""
    source: str
    brownian: bool = False
    """The noise is that of one Brownian path, so more steps refine the same picture."""
    evaluations: int = 1
    """of the model per step"""
    few_steps: bool = False
    """Made for distilled models, with their own steps and without guidance."""


_DDIM = SamplerRule("leading", whole_steps=True, last="alpha", unit_variance=True)
_DDPM = SamplerRule("leading", whole_steps=True, unit_variance=True)
_EULER = SamplerRule("linspace")
_DPM_2 = SamplerRule("linspace", whole_karras=True)
_DPM = SamplerRule(
    "linspace", whole_steps=True, whole_karras=True, extra_step=True, unit_variance=True, full_range=True
)
_LCM = SamplerRule("skipping", unit_variance=True)
_TCD = SamplerRule("skipping", unit_variance=True, last="trained")


def _ddim(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    if call.eta:
        return s.sample_euler_ancestral(denoise, x, call.sigmas, call.noise, call.eta)
    return s.sample_euler(denoise, x, call.sigmas)


def _dpmpp_2m(denoise: Denoiser, x: Tensor, call: Call, *, solver: str | None = None, sde: bool = False) -> Tensor:
    config, sigmas = call.config, call.sigmas
    lower = config.euler_at_final or (config.lower_order_final and len(sigmas) <= 15)
    return s.sample_dpmpp_2m(
        denoise, x, sigmas, solver=solver or ("heun" if config.solver == "heun" else "midpoint"),
        noise=call.noise if sde else None, eta=call.full_noise, final_order=1 if lower else 2,
    )  # fmt: skip


def _unipc(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    solver = "bh1" if call.config.solver == "bh1" else "bh2"
    return s.sample_unipc(denoise, x, call.sigmas, order=call.config.order, solver=solver)


def _lcm(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    # sigma_data of the boundary condition is 0.5 (Luo et al. 2023, appendix)
    times = call.schedule.timesteps * call.config.timestep_scaling
    skips: list[float] = (0.25 / (times**2 + 0.25)).tolist()
    return s.sample_lcm(denoise, x, call.sigmas, call.noise, skips)


def _tcd(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    trained = call.schedule.trained
    eta = TCD_ETA if call.eta is None else call.eta
    following = timestep_of(call.schedule.sigmas[1:].clamp(min=float(trained[0])), trained)
    between: list[float] = trained[((1 - eta) * following.round()).floor().long()].tolist()
    return s.sample_tcd(denoise, x, call.sigmas, call.noise, between)


_KARRAS22 = "Karras et al. 2022, arXiv 2206.00364"
_DPMPP = "Lu et al. 2022, arXiv 2211.01095"
_CROWSON = "k-diffusion sampling.py"

SAMPLERS = (
    Sampler(
        "DDIM", _ddim, _DDIM, "DDIMScheduler", (), 1, False, "Song et al. 2020, arXiv 2010.02502",
    ),
    Sampler(
        "DDPM", lambda d, x, c: s.sample_euler_ancestral(d, x, c.sigmas, c.noise, c.full_noise), _DDPM,
        "DDPMScheduler", (), 1, True, "Ho et al. 2020, arXiv 2006.11239",
    ),
    Sampler(
        "PLMS", lambda d, x, c: s.sample_plms(d, x, c.sigmas, c.config.prediction), _DDIM, "PNDMScheduler",
        ("PNDM",), 4, False, "Liu et al. 2022, arXiv 2202.09778",
    ),
    Sampler(
        "Euler", lambda d, x, c: s.sample_euler(d, x, c.sigmas), _EULER, "EulerDiscreteScheduler", (), 1, False,
        _KARRAS22,
    ),
    Sampler(
        "Euler a", lambda d, x, c: s.sample_euler_ancestral(d, x, c.sigmas, c.noise, c.full_noise), _EULER,
        "EulerAncestralDiscreteScheduler", ("Euler ancestral",), 1, True, _CROWSON,
    ),
    Sampler(
        "Heun", lambda d, x, c: s.sample_heun(d, x, c.sigmas), _EULER, "HeunDiscreteScheduler", (), 2, False,
        _KARRAS22, evaluations=2,
    ),
    Sampler(
        "LMS", lambda d, x, c: s.sample_lms(d, x, c.sigmas), _EULER, "LMSDiscreteScheduler", (), 4, False, _CROWSON,
    ),
    Sampler(
        "DPM2", lambda d, x, c: s.sample_dpm_2(d, x, c.sigmas), _DPM_2, "KDPM2DiscreteScheduler", ("dpm_2",), 2,
        False, _KARRAS22, evaluations=2,
    ),
    Sampler(
        "DPM2 a", lambda d, x, c: s.sample_dpm_2(d, x, c.sigmas, c.noise, c.full_noise), _EULER,
        "KDPM2AncestralDiscreteScheduler", ("DPM2 ancestral", "dpm_2_ancestral", "dpm_2 a"), 2, True, _CROWSON,
        evaluations=2,
    ),
    Sampler(
        "DPM++ 2S a", lambda d, x, c: s.sample_dpmpp_2s_ancestral(d, x, c.sigmas, c.noise, c.full_noise), _EULER, None,
        ("dpmpp_2s_ancestral", "dpmpp 2s a"), 2, True, _DPMPP, evaluations=2,
    ),
    Sampler(
        "DPM++ SDE", lambda d, x, c: s.sample_dpmpp_sde(d, x, c.sigmas, c.noise, c.full_noise), _EULER,
        "DPMSolverSDEScheduler", ("dpmpp_sde",), 2, True, _DPMPP, brownian=True, evaluations=2,
    ),
    Sampler(
        "DPM++ 2M", _dpmpp_2m, _DPM, "DPMSolverMultistepScheduler", ("dpmpp_2m",), 2, False, _DPMPP,
    ),
    Sampler(
        "DPM++ 2M SDE", lambda d, x, c: _dpmpp_2m(d, x, c, sde=True), _DPM,
        "DPMSolverMultistepScheduler[sde-dpmsolver++]", ("dpmpp_2m_sde",), 2, True, _DPMPP, brownian=True,
    ),
    Sampler(
        "DPM++ 2M SDE Heun", lambda d, x, c: _dpmpp_2m(d, x, c, solver="heun", sde=True), _DPM, None,
        ("dpmpp_2m_sde_heun",), 2, True, _DPMPP, brownian=True,
    ),
    Sampler(
        "DPM++ 3M SDE", lambda d, x, c: s.sample_dpmpp_3m_sde(d, x, c.sigmas, c.noise, c.full_noise), _DPM, None,
        ("dpmpp_3m_sde",), 2, True, _CROWSON, brownian=True,
    ),
    Sampler(
        "UniPC", _unipc, _DPM, "UniPCMultistepScheduler", ("uni_pc", "uni_pc_bh2"), 3, False,
        "Zhao et al. 2023, arXiv 2302.04867",
    ),
    Sampler(
        "LCM", _lcm, _LCM, "LCMScheduler", (), 1, True, "Luo et al. 2023, arXiv 2310.04378", few_steps=True,
    ),
    Sampler(
        "TCD", _tcd, _TCD, "TCDScheduler", (), 1, True, "Zheng et al. 2024, arXiv 2402.19159", few_steps=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class ScheduleName:
    """A schedule, the other names that it is known by, and where it comes from."""

    name: Kind
    aliases: tuple[str, ...]
    source: str


SCHEDULES = (
    ScheduleName("automatic", ("default", "model"), "the model's scheduler_config.json, and its sampler's class"),
    ScheduleName("normal", ("uniform", "discrete"), "k-diffusion external.py get_sigmas: even timesteps to the first"),
    ScheduleName("karras", (), _KARRAS22 + ", equation 5, rho 7"),
    ScheduleName("exponential", (), "k-diffusion sampling.py get_sigmas_exponential"),
    ScheduleName("sgm uniform", (), "Stability-AI/generative-models: even timesteps, stopping before the first"),
    ScheduleName("simple", (), "ComfyUI comfy/samplers.py simple_scheduler"),
    ScheduleName("beta", (), "Lee et al. 2024, arXiv 2407.12173; alpha = beta = 0.6"),
    ScheduleName("align your steps", ("ays",), "Sabour et al. 2024, arXiv 2404.14507"),
    ScheduleName("trailing", (), "Lin et al. 2023, arXiv 2305.08891, table 2"),
    ScheduleName("leading", (), "Lin et al. 2023, arXiv 2305.08891, table 2"),
    ScheduleName("linspace", (), "Lin et al. 2023, arXiv 2305.08891, table 2"),
)
assert tuple(schedule.name for schedule in SCHEDULES) == get_args(Kind)


@dataclass(frozen=True)
class Choice:
    """A sampler as somebody named it. `kind` is None where the name says nothing of the schedule."""

    sampler: Sampler
    kind: Kind | None
    by_class: bool
    """Named by its published class, whose noise is never Brownian but for DPMSolverSDEScheduler's."""

    @property
    def brownian(self) -> bool:
        """Whether the noise is that of one Brownian path."""
        return self.sampler.brownian and (not self.by_class or self.sampler.published == "DPMSolverSDEScheduler")


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower()).replace("++", "pp")


def _names(sampler: Sampler) -> tuple[str, ...]:
    return (sampler.name, *filter(None, [sampler.published]), *sampler.aliases)


_SAMPLERS = {_key(name): sampler for sampler in SAMPLERS for name in _names(sampler)}
_SCHEDULES = {_key(name): schedule.name for schedule in SCHEDULES for name in (schedule.name, *schedule.aliases)}


def find_sampler(name: str, schedule: str | None = None) -> Choice:
    """The sampler of a name, in any case, and its schedule: fused ("DPM++ 2M Karras") or split. Raises UsageError."""
    key, kind = _key(name), None if schedule is None else find_schedule(schedule)
    if key not in _SAMPLERS:
        for suffix, fused in _SCHEDULES.items():
            if key.endswith(suffix) and key.removesuffix(suffix) in _SAMPLERS:
                if kind not in (None, fused):
                    raise UsageError(f"sampler {name!r} and schedule {schedule!r} contradict each other")
                key, kind = key.removesuffix(suffix), fused
                break
        else:
            raise UsageError(f"there is no sampler {name!r}: choose one of {', '.join(each.name for each in SAMPLERS)}")
    sampler = _SAMPLERS[key]
    return Choice(sampler, kind, by_class=sampler.published is not None and key == _key(sampler.published))


def find_schedule(name: str) -> Kind:
    """The schedule of a name, in any case. Raises UsageError."""
    if _key(name) not in _SCHEDULES:
        raise UsageError(f"there is no schedule {name!r}: choose one of {', '.join(each.name for each in SCHEDULES)}")
    return _SCHEDULES[_key(name)]
