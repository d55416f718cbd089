"""The samplers and schedules: a row for each, with what is known of it. A new one is a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from nativesd.sampling.calls import Call
from nativesd.sampling.methods import distilled, multistep, onestep, own, plusplus, sde, unipc
from nativesd.sampling.methods.onestep import Denoiser, Unguided
from nativesd.sampling.published import Kind
from nativesd.sampling.schedule import SamplerRule, timestep_of

Of = Literal["clean", "noise"]
TCD_ETA = 0.3  # TCDScheduler's default of gamma, the share of every step that is noise


Run = Callable[[Denoiser, Tensor, Call], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A sampler under the name that A1111 shows (else its paper's), and the other names that it is known by."""

    name: str
    run: Run
    rule: SamplerRule
    source: str
    order: int
    """of convergence, of the deterministic part"""
    published: str | None = None
    """diffusers' class, and in brackets its algorithm_type and order where these are not the class's own"""
    aliases: tuple[str, ...] = ()
    noisy: bool = False
    """Draws noise at every step: ancestral, or on the reverse SDE."""
    brownian: bool = False
    """The noise is that of one Brownian path, so more steps refine the same picture."""
    evaluations: int = 1
    """of the model per step"""
    few_steps: bool = False
    """Made for distilled models, with their own steps and without guidance."""
    drops: bool = False
    """A1111 leaves the last sigma but one out (`discard_next_to_last_sigma` of modules/sd_samplers_kdiffusion.py)."""
    churns: bool = False
    """Takes churn."""
    plus_plus: bool = False
    """CFG++: it needs what the model answers without guidance."""
    shared_steps: bool = False
    """Chooses its steps by all pictures of a batch."""


_DDIM = SamplerRule("leading", whole_steps=True, last="alpha", unit_variance=True)
_DDPM = SamplerRule("leading", whole_steps=True, unit_variance=True)
_EULER = SamplerRule("linspace")
_DPM_2 = SamplerRule("linspace", whole_karras=True)
_DPM = SamplerRule(
    "linspace", whole_steps=True, whole_karras=True, extra_step=True, unit_variance=True, full_range=True
)
_DEIS = replace(_DPM, last="trained")
_LCM = SamplerRule("skipping", unit_variance=True)
_TCD = SamplerRule("skipping", unit_variance=True, last="trained")


def _ddim(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    if call.eta:
        return onestep.sample_euler_ancestral(denoise, x, call.sigmas, call.noise, call.eta)
    return onestep.sample_euler(denoise, x, call.sigmas)


def _ends_low(call: Call) -> bool:
    """`lower_order_final` of diffusers' multistep schedulers, which is for less than 15 steps."""
    return call.config.lower_order_final and len(call.sigmas) <= 15


def _dpmpp_2m(denoise: Denoiser, x: Tensor, call: Call, *, solver: str | None = None, sde: bool = False) -> Tensor:
    lower = call.config.euler_at_final or _ends_low(call)
    return multistep.sample_dpmpp_2m(
        denoise, x, call.sigmas, solver=solver or _solver(call),
        noise=call.noise if sde else None, eta=call.full_noise, final_order=1 if lower else 2,
    )  # fmt: skip


def _dpm(denoise: Denoiser, x: Tensor, call: Call, *, order: int | None = None, of: Of = "clean") -> Tensor:
    orders = multistep.final_orders(
        len(call.sigmas) - 1,
        order or call.config.order,
        low_end=_ends_low(call),
        euler_end=call.config.euler_at_final or call.sigmas[-1] == 0,
    )
    return multistep.sample_dpm_multistep(denoise, x, call.sigmas, orders, solver=_solver(call), of=of)


def _dpm_single(denoise: Denoiser, x: Tensor, call: Call, *, of: Of = "clean") -> Tensor:
    order, steps = call.config.order, len(call.sigmas) - 1
    low = call.config.lower_order_final or steps % order > 0 or call.sigmas[-1] == 0
    return multistep.sample_dpm_singlestep(denoise, x, call.sigmas, order, solver=_solver(call), of=of, low_end=low)


def _deis(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    orders = multistep.final_orders(
        len(call.sigmas) - 1, call.config.order, low_end=_ends_low(call), euler_end=call.sigmas[-1] == 0
    )
    return multistep.sample_deis(denoise, x, call.sigmas, orders)


def _solver(call: Call) -> str:
    return "heun" if call.config.solver == "heun" else "midpoint"


def _unipc(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    solver = "bh1" if call.config.solver == "bh1" else "bh2"
    return unipc.sample_unipc(denoise, x, call.sigmas, order=call.config.order, solver=solver)


def _lcm(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    # sigma_data of the boundary condition is 0.5 (Luo et al. 2023, appendix)
    times = call.schedule.timesteps * call.config.timestep_scaling
    skips: list[float] = (0.25 / (times**2 + 0.25)).tolist()
    return distilled.sample_lcm(denoise, x, call.sigmas, call.noise, skips)


def _tcd(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    trained = call.schedule.trained
    eta = TCD_ETA if call.eta is None else call.eta
    following = timestep_of(call.schedule.sigmas[1:].clamp(min=float(trained[0])), trained)
    between: list[float] = trained[((1 - eta) * following.round()).floor().long()].tolist()
    return distilled.sample_tcd(denoise, x, call.sigmas, call.noise, between)


def _span(call: Call) -> tuple[float, float]:
    """The largest sigma, and the smallest above zero."""
    above = [sigma for sigma in call.sigmas if sigma > 0]
    return above[0], above[-1]


def _dpm_fast(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    steps = len(call.schedule.timesteps)
    return own.sample_dpm_fast(denoise, x, *_span(call), steps, call.noise, call.full_noise)


def _dpm_adaptive(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    return own.sample_dpm_adaptive(denoise, x, *_span(call), call.noise, call.full_noise)


def _sa_solver(denoise: Denoiser, x: Tensor, call: Call) -> Tensor:
    # SASolverScheduler's default of tau: noise in the middle of the timesteps only
    taus = [call.full_noise if 200 <= time <= 800 else 0.0 for time in call.schedule.timesteps.tolist()]
    return sde.sample_sa_solver(denoise, x, call.sigmas, call.noise, taus, low_end=call.config.lower_order_final)


def _plain(call: Call) -> Unguided:
    assert call.unguided is not None
    return call.unguided


def _euler_plusplus(denoise: Denoiser, x: Tensor, call: Call, *, noisy: bool = False) -> Tensor:
    noise = call.noise if noisy or call.eta else None
    return plusplus.sample_euler_plusplus(denoise, x, call.sigmas, _plain(call), noise, call.full_noise)


_KARRAS22 = "Karras et al. 2022, arXiv 2206.00364"
_DPMPP = "Lu et al. 2022, arXiv 2211.01095"
_DPM_SOLVER = "Lu et al. 2022, arXiv 2206.00927"
_DEIS_PAPER = "Zhang and Chen 2023, arXiv 2204.13902"
_RES = "Zhang et al. 2023, arXiv 2308.02157"
_CROWSON = "k-diffusion sampling.py"
_PLUS_PLUS = "Chung et al. 2024, arXiv 2406.08070"

SAMPLERS = (
    Sampler("DDIM", _ddim, _DDIM, "Song et al. 2020, arXiv 2010.02502", 1, "DDIMScheduler"),
    Sampler(
        "DDPM", lambda d, x, c: onestep.sample_euler_ancestral(d, x, c.sigmas, c.noise, c.full_noise), _DDPM,
        "Ho et al. 2020, arXiv 2006.11239", 1, "DDPMScheduler", noisy=True,
    ),
    Sampler(
        "PLMS", lambda d, x, c: multistep.sample_plms(d, x, c.sigmas, c.config.prediction), _DDIM,
        "Liu et al. 2022, arXiv 2202.09778", 4, "PNDMScheduler", ("PNDM",),
    ),
    Sampler(
        "Euler", lambda d, x, c: onestep.sample_euler(d, x, c.sigmas, c.churn), _EULER, _KARRAS22, 1,
        "EulerDiscreteScheduler", churns=True,
    ),
    Sampler(
        "Euler a", lambda d, x, c: onestep.sample_euler_ancestral(d, x, c.sigmas, c.noise, c.full_noise), _EULER,
        _CROWSON, 1, "EulerAncestralDiscreteScheduler", ("Euler ancestral",), noisy=True,
    ),
    Sampler(
        "Heun", lambda d, x, c: onestep.sample_heun(d, x, c.sigmas, c.churn), _EULER, _KARRAS22, 2,
        "HeunDiscreteScheduler", evaluations=2, churns=True,
    ),
    Sampler(
        "Heun++ 2", lambda d, x, c: onestep.sample_heun_plusplus(d, x, c.sigmas, c.churn), _EULER,
        "Carzit/sd-webui-samplers-scheduler", 1, None, ("heunpp2",), evaluations=3, churns=True,
    ),
    Sampler(
        "LMS", lambda d, x, c: multistep.sample_lms(d, x, c.sigmas), _EULER, _CROWSON, 4, "LMSDiscreteScheduler",
    ),
    Sampler(
        "DPM2", lambda d, x, c: onestep.sample_dpm_2(d, x, c.sigmas, churn=c.churn), _DPM_2, _KARRAS22, 2,
        "KDPM2DiscreteScheduler", ("dpm_2",), evaluations=2, drops=True, churns=True,
    ),
    Sampler(
        "DPM2 a", lambda d, x, c: onestep.sample_dpm_2(d, x, c.sigmas, c.noise, c.full_noise), _EULER, _CROWSON, 2,
        "KDPM2AncestralDiscreteScheduler", ("DPM2 ancestral", "dpm_2_ancestral", "dpm_2 a"), noisy=True, evaluations=2,
        drops=True,
    ),
    Sampler(
        "DPM++ 2S a", lambda d, x, c: onestep.sample_dpmpp_2s_ancestral(d, x, c.sigmas, c.noise, c.full_noise),
        _EULER, _DPMPP, 2, None, ("dpmpp_2s_ancestral", "dpmpp 2s a"), noisy=True, evaluations=2,
    ),
    Sampler(
        "DPM++ SDE", lambda d, x, c: onestep.sample_dpmpp_sde(d, x, c.sigmas, c.noise, c.full_noise), _EULER, _DPMPP,
        2, "DPMSolverSDEScheduler", ("dpmpp_sde",), noisy=True, brownian=True, evaluations=2,
    ),
    Sampler("DPM++ 2M", _dpmpp_2m, _DPM, _DPMPP, 2, "DPMSolverMultistepScheduler", ("dpmpp_2m",)),
    Sampler("DPM++ 3M", partial(_dpm, order=3), _DPM, _DPMPP, 2, "DPMSolverMultistepScheduler[order 3]"),
    Sampler("DPM++ 1M", partial(_dpm, order=1), _DPM, _DPMPP, 1, "DPMSolverMultistepScheduler[order 1]"),
    Sampler("DPM-Solver", partial(_dpm, of="noise"), _DPM, _DPM_SOLVER, 2, "DPMSolverMultistepScheduler[dpmsolver]"),
    Sampler("DPM++ 2S", _dpm_single, _DPM, _DPMPP, 2, "DPMSolverSinglestepScheduler", ("DPM++ 2S singlestep",)),
    Sampler(
        "DPM-Solver 2S", partial(_dpm_single, of="noise"), _DPM, _DPM_SOLVER, 2,
        "DPMSolverSinglestepScheduler[dpmsolver]",
    ),
    Sampler(
        "DPM++ 2M SDE", partial(_dpmpp_2m, sde=True), _DPM, _DPMPP, 2,
        "DPMSolverMultistepScheduler[sde-dpmsolver++]", ("dpmpp_2m_sde",), noisy=True, brownian=True,
    ),
    Sampler(
        "DPM++ 2M SDE Heun", partial(_dpmpp_2m, solver="heun", sde=True), _DPM, _DPMPP, 2, None,
        ("dpmpp_2m_sde_heun",), noisy=True, brownian=True,
    ),
    Sampler(
        "DPM++ 3M SDE", lambda d, x, c: multistep.sample_dpmpp_3m_sde(d, x, c.sigmas, c.noise, c.full_noise), _DPM,
        _CROWSON, 2, None, ("dpmpp_3m_sde",), noisy=True, brownian=True, drops=True,
    ),
    Sampler(
        "DPM fast", _dpm_fast, _EULER, _DPM_SOLVER, 3, None, ("dpm_fast",), noisy=True,
    ),
    Sampler(
        "DPM adaptive", _dpm_adaptive, _EULER, _DPM_SOLVER, 3, None, ("dpm_adaptive",), noisy=True, evaluations=3,
        shared_steps=True,
    ),
    Sampler(
        "Restart", lambda d, x, c: own.sample_restart(d, x, c.sigmas, c.noise), _EULER,
        "Xu et al. 2023, arXiv 2306.14878", 2, noisy=True, evaluations=2,
    ),
    Sampler(
        "iPNDM", lambda d, x, c: multistep.sample_ipndm(d, x, c.sigmas), _EULER, _DEIS_PAPER, 4,
    ),
    Sampler("RES multistep", lambda d, x, c: multistep.sample_res(d, x, c.sigmas), _EULER, _RES, 2),
    Sampler(
        "RES multistep a", lambda d, x, c: multistep.sample_res(d, x, c.sigmas, c.noise, c.full_noise), _EULER, _RES, 2,
        None, ("res_multistep_ancestral",), noisy=True,
    ),
    Sampler(
        "ER-SDE", lambda d, x, c: sde.sample_er_sde(d, x, c.sigmas, c.noise), _EULER,
        "Cui et al. 2023, arXiv 2309.06169", 3, noisy=True,
    ),
    Sampler(
        "SA-Solver", _sa_solver, _DEIS, "Xue et al. 2023, arXiv 2309.05019", 2, "SASolverScheduler", noisy=True,
    ),
    Sampler("DEIS", _deis, _DEIS, _DEIS_PAPER, 2, "DEISMultistepScheduler"),
    Sampler(
        "UniPC", _unipc, _DPM, "Zhao et al. 2023, arXiv 2302.04867", 3, "UniPCMultistepScheduler",
        ("uni_pc", "uni_pc_bh2"),
    ),
    Sampler("DDIM CFG++", _euler_plusplus, _DDIM, _PLUS_PLUS, 1, plus_plus=True),
    Sampler("Euler CFG++", _euler_plusplus, _EULER, _PLUS_PLUS, 1, plus_plus=True),
    Sampler(
        "Euler a CFG++", partial(_euler_plusplus, noisy=True), _EULER, _PLUS_PLUS, 1, None, ("euler_ancestral_cfg_pp",),
        noisy=True, plus_plus=True,
    ),
    Sampler(
        "DPM++ 2M CFG++", lambda d, x, c: plusplus.sample_dpmpp_2m_plusplus(d, x, c.sigmas, _plain(c)), _DPM,
        _PLUS_PLUS, 2, plus_plus=True,
    ),
    Sampler(
        "LCM", _lcm, _LCM, "Luo et al. 2023, arXiv 2310.04378", 1, "LCMScheduler", noisy=True, few_steps=True,
    ),
    Sampler(
        "TCD", _tcd, _TCD, "Zheng et al. 2024, arXiv 2402.19159", 1, "TCDScheduler", noisy=True, few_steps=True,
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
    ScheduleName("lu", ("lu lambdas",), "Lu et al. 2022, arXiv 2206.00927: even in log sigma, at whole timesteps"),
    ScheduleName("polyexponential", (), "k-diffusion sampling.py get_sigmas_polyexponential, rho 1"),
    ScheduleName("kl optimal", (), "Sabour et al. 2024, arXiv 2404.14507, theorem 3.1"),
    ScheduleName("linear quadratic", (), "genmoai/models: linear, then a parabola"),
    ScheduleName("ddim uniform", ("ddim",), "ComfyUI comfy/samplers.py ddim_scheduler"),
)
assert tuple(schedule.name for schedule in SCHEDULES) == get_args(Kind)
