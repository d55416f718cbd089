"""Every sampler and schedule against diffusers' schedulers and k-diffusion's functions, and by its order."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.mochi import pipeline_mochi
from torch import Tensor

import kdiffusion
from nativesd.diffusion.denoiser import to_clean
from nativesd.errors import SourceError, UsageError
from nativesd.sampling.calls import Call
from nativesd.sampling.methods import multistep, onestep, own, plusplus, sde, unipc
from nativesd.sampling.names import find_sampler, find_schedule
from nativesd.sampling.options import Sampling
from nativesd.sampling.published import Kind, SchedulerConfig
from nativesd.sampling.schedule import karras_sigmas, make_schedule, timestep_of, trained_sigmas
from nativesd.sampling.table import SAMPLERS, SCHEDULES

STEPS = 20
TOLERANCE = 1e-4  # of the largest value
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SHAPE = (2, 4, 6, 5)

# A model in closed form: the score of a mixture of two Gaussians per latent value.
MEANS, WIDTHS, WEIGHTS = (-1.1, 0.7), (0.35, 0.5), (0.4, 0.6)


def denoised(x: Tensor, sigma: float) -> Tensor:
    """The expectation of the clean value, given x = clean + sigma * noise, of the mixture above."""
    logs, means = [], []
    for mean, width, weight in zip(MEANS, WIDTHS, WEIGHTS, strict=True):
        variance = width**2 + sigma**2
        logs.append(math.log(weight / math.sqrt(variance)) - (x - mean) ** 2 / (2 * variance))
        means.append(mean + width**2 / variance * (x - mean))
    return (torch.stack(logs).softmax(0) * torch.stack(means)).sum(0)


def counted() -> tuple[Callable[[Tensor, float], Tensor], list[float]]:
    """The mixture as a denoiser, and the sigmas that it is asked about."""
    asked: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return denoised(x, sigma)

    return denoise, asked


def model(prediction: str, trained: Tensor) -> Callable[[Tensor, float], Tensor]:
    """A UNet: inputs of unit variance and a timestep, maybe fractional, to its prediction."""
    logs = trained.log()

    def answer(scaled: Tensor, timestep: float) -> Tensor:
        low = min(int(timestep), len(trained) - 2)
        sigma = float(torch.exp(logs[low] + (timestep - low) * (logs[low + 1] - logs[low])))
        x = scaled.double() * math.hypot(1, sigma)
        clean = denoised(x, sigma)
        out = {
            "epsilon": (x - clean) / sigma,
            "v_prediction": (x / (1 + sigma**2) - clean) * (math.hypot(1, sigma) / sigma),
            "sample": clean,
        }[prediction]
        return out.float()

    return answer


def draws(seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator)


def theirs(scheduler: Any, steps: int, *, eta: float | None = None) -> Tensor:
    """What diffusers' pipelines do with a scheduler."""
    answer = model(
        scheduler.config.prediction_type, trained_sigmas(SchedulerConfig.from_published(config_of(scheduler)))
    )
    scheduler.set_timesteps(steps)
    x = draws(1)() * scheduler.init_noise_sigma
    options: dict[str, Any] = {}
    accepted = inspect.signature(scheduler.step).parameters
    if "generator" in accepted:
        options["generator"] = torch.Generator().manual_seed(2)
    if "eta" in accepted and eta is not None:
        options["eta"] = eta
    for timestep in scheduler.timesteps:
        output = answer(scheduler.scale_model_input(x, timestep), float(timestep))
        x = scheduler.step(output, timestep, x, **options).prev_sample
    return x


def config_of(scheduler: Any) -> dict[str, Any]:
    """As in scheduler_config.json."""
    data = {**scheduler.config, "_class_name": type(scheduler).__name__}
    data.pop("_use_default_values", None)
    return data


def ours(name: str, data: dict[str, Any], steps: int, *, eta: float | None = None) -> Tensor:
    """What the pipeline does with a sampler, on the latents as it leaves them."""
    config = SchedulerConfig.from_published(data)
    choice = find_sampler(config.class_name)
    assert choice.sampler.name == name
    plan = choice.schedule(config, steps, choice.kind or config.kind)
    answer = model({"v": "v_prediction"}.get(config.prediction, config.prediction), plan.trained)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return to_clean(answer(x / math.hypot(1, sigma), plan.timestep(sigma)), x, sigma, config.prediction)

    draw = draws(2)
    call = Call(plan, lambda sigma, sigma_next: draw(), choice.settings(config), eta)
    return choice.sampler.run(denoise, draws(1)() * plan.start, call) / plan.end


def difference(found: Tensor, expected: Tensor) -> float:
    assert expected.isfinite().all()
    assert expected.std() > 0.1, "a flat picture would prove nothing"
    return float((found - expected).abs().max() / expected.abs().max())


CASES: dict[str, list[dict[str, Any]]] = {
    "DDIM": [{}, {"set_alpha_to_one": True}, {"timestep_spacing": "trailing"},
             {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}],
    "DDPM": [{}, {"timestep_spacing": "trailing"}],
    "PLMS": [{}, {"timestep_spacing": "trailing"}],
    "Euler": [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True},
              {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}, {"final_sigmas_type": "sigma_min"},
              {"timestep_spacing": "leading", "use_karras_sigmas": True},
              {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}],
    "Euler a": [{}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}],
    "Heun": [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}],
    "LMS": [{}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}],
    "DPM2": [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "leading"}],
    "DPM2 a": [{}],  # Karras: k-diffusion's, below, does not round timesteps
    "DPM++ 2M": [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True},
                 {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}, {"solver_type": "heun"},
                 {"use_lu_lambdas": True},
                 {"final_sigmas_type": "sigma_min"}, {"euler_at_final": True, "final_sigmas_type": "sigma_min"}],
    "DPM++ 3M": [{}, {"use_karras_sigmas": True}, {"euler_at_final": True}, {"final_sigmas_type": "sigma_min"}],
    "DPM++ 1M": [{}],
    "DPM-Solver": [{"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min", "solver_order": 3},
                   {"final_sigmas_type": "sigma_min", "solver_type": "heun"}],
    "DPM++ 2S": [{}, {"solver_order": 3}, {"solver_order": 1}, {"solver_order": 3, "solver_type": "heun"},
                 {"use_karras_sigmas": True, "solver_type": "heun"},
                 {"final_sigmas_type": "sigma_min", "lower_order_final": False}],
    "DPM-Solver 2S": [{"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min", "solver_order": 3}],
    "DEIS": [{}, {"solver_order": 3}, {"solver_order": 1}, {"use_karras_sigmas": True}],
    "DPM++ 2M SDE": [{}, {"use_karras_sigmas": True}, {"solver_type": "heun"}],
    "UniPC": [{}, {"use_karras_sigmas": True}, {"solver_order": 3},
              {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},  # NaN there where the last sigma is zero
              {"timestep_spacing": "trailing"}],
    "SA-Solver": [{}, {"use_karras_sigmas": True}, {"lower_order_final": False}],
    "LCM": [{}, {"original_inference_steps": 100}],
    "TCD": [{}],
}  # fmt: skip
NO_DIFFUSERS = {"DPM++ 2S a", "DPM++ SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "DPM fast", "DPM adaptive"}
"""DPM++ SDE has a class there, but its noise begins at another sigma: k-diffusion is its oracle."""


def form(brackets: str) -> dict[str, Any]:
    """The options that a published name has in brackets."""
    if brackets.startswith("order"):
        return {"solver_order": int(brackets.split()[1])}
    final = {"final_sigmas_type": "sigma_min"} if brackets == "dpmsolver" else {}  # the class refuses zero there
    return {"algorithm_type": brackets, **final} if brackets else {}


def published(name: str, options: dict[str, Any]) -> Any:
    cls, _, algorithm = (find_sampler(name).sampler.published or "").rstrip("]").partition("[")
    fixed: dict[str, Any] = {"skip_prk_steps": True} if name == "PLMS" else form(algorithm)
    if name in ("DDIM", "DDPM", "LCM", "TCD"):
        fixed["clip_sample"] = False
    offset = {} if cls == "DPMSolverSinglestepScheduler" else {"steps_offset": 1}
    return getattr(diffusers, cls)(**{**BETAS, **offset, **fixed, **options})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "options"), [(name, options) for name in CASES for options in CASES[name]], ids=str)
def test_against_diffusers(name: str, options: dict[str, Any], prediction: str) -> None:
    scheduler = published(name, {"prediction_type": prediction, **options})
    short = {"LCM": 4, "TCD": 4, "DPM++ 3M": 9, "DEIS": 9, "DPM++ 2S": 8, "DPM-Solver": 9}
    for steps in (STEPS, short.get(name, STEPS)):
        expected = theirs(scheduler, steps)
        found = ours(name, config_of(scheduler), steps)
        worst = difference(found, expected)
        print(f"\n{name} {options} {prediction} {steps} steps: {worst:.1e}")
        assert worst <= TOLERANCE


@pytest.mark.parametrize(("name", "eta"), [("DDIM", 0.5), ("DDIM", 1.0), ("TCD", 0.0), ("TCD", 0.8)])
def test_eta(name: str, eta: float) -> None:
    scheduler = published(name, {})
    assert difference(ours(name, config_of(scheduler), STEPS, eta=eta), theirs(scheduler, STEPS, eta=eta)) <= TOLERANCE


K_DIFFUSION = {
    "Euler": "sample_euler", "Euler a": "sample_euler_ancestral", "Heun": "sample_heun", "LMS": "sample_lms",
    "DPM2": "sample_dpm_2", "DPM2 a": "sample_dpm_2_ancestral", "DPM++ 2S a": "sample_dpmpp_2s_ancestral",
    "DPM++ SDE": "sample_dpmpp_sde", "DPM++ 2M": "sample_dpmpp_2m", "DPM++ 2M SDE": "sample_dpmpp_2m_sde",
    "DPM++ 2M SDE Heun": "sample_dpmpp_2m_sde", "DPM++ 3M SDE": "sample_dpmpp_3m_sde",
    "DPM fast": "sample_dpm_fast", "DPM adaptive": "sample_dpm_adaptive",
}  # fmt: skip


OWN_STEPS = ("DPM fast", "DPM adaptive")


@pytest.mark.parametrize("kind", ["karras", "exponential", "normal"])
@pytest.mark.parametrize("name", [name for name in K_DIFFUSION if name not in OWN_STEPS])
def test_against_k_diffusion(name: str, kind: str) -> None:
    """The same sigmas, the same noise for the same step, in float32."""
    oracle = kdiffusion.kdiffusion_sampling()
    sampler = find_sampler(name).sampler
    plan = make_schedule(SchedulerConfig(), sampler.rule, STEPS, find_schedule(kind))
    if kind != "normal":
        smallest, largest = float(plan.trained[0]), float(plan.trained[-1])
        sigmas = getattr(oracle, f"get_sigmas_{kind}")(STEPS, smallest, largest)
        assert (sigmas - plan.sigmas).abs().max() <= 1e-5
    call = Call(plan, lambda sigma, sigma_next: noise_of(sigma, sigma_next), SchedulerConfig())
    start = draws(1)() * plan.start
    options: dict[str, Any] = {"disable": True}
    function = getattr(oracle, K_DIFFUSION[name])
    if "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = lambda sigma, sigma_next: noise_of(float(sigma), float(sigma_next))
    if name.endswith("Heun") and name != "Heun":
        options["solver_type"] = "heun"

    def answer(x: Tensor, sigma: Tensor) -> Tensor:
        return denoised(x, float(sigma[0]))

    expected = function(answer, start, plan.sigmas.float(), **options)
    worst = difference(sampler.run(lambda x, sigma: denoised(x, sigma), start, call), expected)
    print(f"\n{name} {kind} k-diffusion: {worst:.1e}")
    assert worst <= TOLERANCE


def noise_of(sigma: float, sigma_next: float) -> Tensor:
    """Noise that depends on the step alone, as both sides may draw in another order."""
    seed = round(1000 * sigma) * 100_003 + round(1000 * sigma_next)
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [4, 6, 8, 21])
def test_dpm_fast_is_k_diffusions(steps: int, eta: float) -> None:
    oracle, start = kdiffusion.kdiffusion_sampling(), draws(1)() * 9.0
    options: dict[str, Any] = {"disable": True, "eta": eta,
                               "noise_sampler": lambda a, b: noise_of(float(a), float(b))}  # fmt: skip
    expected = oracle.sample_dpm_fast(lambda x, sigma: denoised(x, float(sigma[0])), start, 0.03, 9.0, steps, **options)
    denoise, asked = counted()
    found = own.sample_dpm_fast(denoise, start, 9.0, 0.03, steps, noise_of, eta)
    assert len(asked) == steps
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_adaptive_is_k_diffusions(eta: float) -> None:
    """The steps' lengths depend on rounding, so the noise is the same wherever it is drawn."""
    oracle, start, noise = kdiffusion.kdiffusion_sampling(), draws(1)() * 9.0, draws(2)()
    options: dict[str, Any] = {"disable": True, "eta": eta, "noise_sampler": lambda a, b: noise, "return_info": True}
    expected, info = oracle.sample_dpm_adaptive(
        lambda x, sigma: denoised(x, float(sigma[0])), start, 0.03, 9.0, **options
    )
    denoise, asked = counted()
    found = own.sample_dpm_adaptive(denoise, start, 9.0, 0.03, lambda a, b: noise, eta)
    assert len(asked) == info["nfe"]
    assert difference(found, expected) <= TOLERANCE
    broken = own.sample_dpm_adaptive(lambda x, sigma: x * math.nan, start, 9.0, 0.03)
    assert broken.isnan().all()


CHURN = Sampling(churn=6.0, churn_min=0.3, churn_max=8.0, noise=1.01)


@pytest.mark.parametrize("name", ["Euler", "Heun", "DPM2"])
def test_churn_is_k_diffusions(name: str) -> None:
    oracle = kdiffusion.kdiffusion_sampling()
    plan = make_schedule(SchedulerConfig(), find_sampler(name).sampler.rule, STEPS, "karras")
    start, draw = draws(1)() * plan.start, draws(2)
    call = Call(plan, lambda sigma, sigma_next: draw(), SchedulerConfig(), options=CHURN)
    found = find_sampler(name).sampler.run(denoised, start, call)
    torch.manual_seed(2)
    expected = getattr(oracle, K_DIFFUSION[name])(
        lambda x, sigma: denoised(x, float(sigma[0])), start, plan.sigmas.float(), disable=True,
        s_churn=6.0, s_tmin=0.3, s_tmax=8.0, s_noise=1.01,
    )  # fmt: skip
    assert difference(found, expected) <= TOLERANCE
    calm = find_sampler(name).sampler.run(denoised, start, Call(plan, noise_of, SchedulerConfig()))
    assert difference(found, calm) > 0.01


@pytest.mark.parametrize("name", ["Euler a", "DPM2 a", "DPM++ 2S a", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 3M SDE"])
def test_the_noise_s_factor_is_k_diffusions(name: str) -> None:
    oracle = kdiffusion.kdiffusion_sampling()
    plan = make_schedule(SchedulerConfig(), find_sampler(name).sampler.rule, STEPS, "karras")
    start = draws(1)() * plan.start
    call = Call(plan, noise_of, SchedulerConfig(), options=Sampling(noise=1.05))
    expected = getattr(oracle, K_DIFFUSION[name])(
        lambda x, sigma: denoised(x, float(sigma[0])), start, plan.sigmas.float(), disable=True, s_noise=1.05,
        noise_sampler=lambda sigma, sigma_next: noise_of(float(sigma), float(sigma_next)),
    )  # fmt: skip
    assert difference(find_sampler(name).sampler.run(denoised, start, call), expected) <= TOLERANCE


def test_ipndm_is_diffusers() -> None:
    """Its class has a noise schedule of its own: the test gives it ours, and velocities."""
    plan = make_schedule(SchedulerConfig(), find_sampler("iPNDM").sampler.rule, 12, "karras")
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(12)
    scheduler.alphas = (1 / (1 + plan.sigmas**2)).sqrt()
    scheduler.betas = plan.sigmas * scheduler.alphas
    start = draws(1)().double() * float(plan.sigmas[0])
    x = start * scheduler.alphas[0]
    for timestep, sigma, alpha in zip(scheduler.timesteps, plan.sigmas.tolist(), scheduler.alphas, strict=False):
        clean = denoised(x / alpha, sigma)
        velocity = (x / alpha / (1 + sigma**2) - clean) * (math.hypot(1, sigma) / sigma)
        x = scheduler.step(velocity, timestep, x).prev_sample
    call = Call(plan, noise_of, SchedulerConfig())
    assert difference(find_sampler("iPNDM").sampler.run(denoised, start, call), x) <= TOLERANCE


def test_heun_plusplus_as_stated() -> None:
    """The last step is Euler's, the one before weighs two slopes, all others three, by their sigmas over the first."""
    sigmas = [9.0, 4.0, 2.0, 0.7, 0.0]
    start = torch.linspace(-4, 4, 33, dtype=torch.float64)

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - denoised(x, sigma)) / sigma

    x = start
    for i in range(2):
        a, b, c = sigmas[i : i + 3]
        first = slope(x, a)
        second = slope(x + first * (b - a), b)
        third = slope(x + first * (b - a) + second * (c - b), c)
        x = x + (b - a) * ((1 - (b + c) / 27) * first + b / 27 * second + c / 27 * third)
    first = slope(x, 2.0)
    second = slope(x + first * (0.7 - 2.0), 0.7)
    x = x + (0.7 - 2.0) * ((1 - 0.7 / 18) * first + 0.7 / 18 * second)
    x = x + slope(x, 0.7) * -0.7
    assert difference(onestep.sample_heun_plusplus(denoised, start, sigmas), x) < 1e-9


def test_res_multistep_without_noise_is_the_exponential_integrator() -> None:
    """In the ODE's form it is DPM-Solver++ 2M with the solver "heun", which diffusers is the oracle of."""
    plan = make_schedule(SchedulerConfig(), find_sampler("RES multistep").sampler.rule, STEPS, "karras")
    start = draws(1)() * plan.start
    expected = multistep.sample_dpmpp_2m(denoised, start, plan.sigmas.tolist(), solver="heun")
    assert difference(multistep.sample_res(denoised, start, plan.sigmas.tolist()), expected) < 1e-5


def test_restart_goes_back_up() -> None:
    start = draws(1)() * 14.6
    for steps in (19, 20, 36):
        plan = make_schedule(SchedulerConfig(), find_sampler("Restart").sampler.rule, steps, "karras")
        denoise, asked = counted()
        found = own.sample_restart(denoise, start, plan.sigmas.tolist(), noise_of)
        rises = [(a, b) for a, b in pairwise(asked) if b > a]
        assert len(rises) == {19: 0, 20: 1, 36: 2}[steps]
        assert all(abs(a - 0.1) < 0.1 and abs(b - 2) < 0.8 for a, b in rises)
        assert len(asked) == 2 * steps - 1  # Heun's, of which the last is Euler's
        if steps < 20:
            assert torch.equal(found, onestep.sample_heun(denoised, start, plan.sigmas.tolist()))


KEEPS: dict[str, Callable[[onestep.Denoiser, Tensor, list[float], onestep.Noise], Tensor]] = {
    "ER-SDE": sde.sample_er_sde,
    "SA-Solver": lambda d, x, s, n: sde.sample_sa_solver(d, x, s, n, [1.0] * (len(s) - 1)),
    "RES multistep a": multistep.sample_res,
    "Restart": own.sample_restart,
    "DPM fast": lambda d, x, s, n: own.sample_dpm_fast(d, x, s[0], s[-2], 120, n),
    "DPM adaptive": lambda d, x, s, n: own.sample_dpm_adaptive(d, x, s[0], s[-2], n),
}


@pytest.mark.parametrize("name", KEEPS)
def test_the_noise_keeps_the_distribution(name: str) -> None:
    """From the noise of a Gaussian, whose denoiser is known, samples of this Gaussian come out."""
    generator = torch.Generator().manual_seed(4)
    mean, width, count = 0.6, 0.4, 20_000

    def clean(x: Tensor, sigma: float) -> Tensor:
        return mean + width**2 / (width**2 + sigma**2) * (x - mean)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    sigmas = [*karras_sigmas(120, 0.02, 20.0).tolist(), 0.0]
    start = mean + noise(0, 0) * math.hypot(width, 20.0)
    found = KEEPS[name](clean, start, sigmas, noise)
    assert abs(float(found.mean()) - mean) < 0.015
    assert abs(float(found.std()) / width - 1) < 0.03


STATED = {"Heun++ 2", "iPNDM", "RES multistep", "RES multistep a", "ER-SDE", "Restart", "DDIM CFG++", "Euler CFG++",
          "Euler a CFG++", "DPM++ 2M CFG++"}  # fmt: skip
"""Not in k-diffusion, and not in diffusers in a form like the others: tests above, below, and by their order."""


def test_every_sampler_has_an_oracle() -> None:
    assert {sampler.name for sampler in SAMPLERS} == set(CASES) | set(K_DIFFUSION) | STATED
    assert {sampler.name for sampler in SAMPLERS} - set(CASES) - STATED == NO_DIFFUSERS


class Pulled:
    """The mixture as what a model answers without guidance, and with it what lies `share` of the way to `elsewhere`."""

    def __init__(self, share: float, elsewhere: float = 0.9) -> None:
        self.share, self.elsewhere, self.last = share, elsewhere, torch.zeros(())

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.last = denoised(x, sigma)
        return self.last + self.share * (self.elsewhere - self.last)

    def unguided(self) -> Tensor:
        return self.last


def test_cfg_plus_plus_is_guidance_that_grows() -> None:
    """The paper's equation 14: a step of CFG++ is one of CFG with the scale share / (1 - sigma_next / sigma)."""
    sigmas = [9.0, 4.0, 2.0, 1.0, 0.4, 0.1]
    start = torch.linspace(-20, 20, 33, dtype=torch.float64)
    model = Pulled(0.3)
    found = plusplus.sample_euler_plusplus(model, start, sigmas, model.unguided)
    expected = start
    for sigma, sigma_next in pairwise(sigmas):
        guided = Pulled(0.3 / (1 - sigma_next / sigma))(expected, sigma)
        expected = onestep.toward(expected, guided, sigma, sigma_next)
    assert difference(found, expected) < 1e-9


def test_ancestral_cfg_plus_plus() -> None:
    """Without guidance it is Euler a; with it, the next state has the guided latents and the unguided noise."""
    start, sigmas = draws(1)() * 9.0, [9.0, 4.0, 1.0, 0.0]
    model = Pulled(0.0)
    found = plusplus.sample_euler_plusplus(model, start, sigmas, model.unguided, noise_of)
    assert difference(found, onestep.sample_euler_ancestral(denoised, start, sigmas, noise_of)) < 1e-5
    model = Pulled(0.3)
    found = plusplus.sample_euler_plusplus(model, start, sigmas[:2], model.unguided, noise_of)
    down, up = onestep.ancestral(9.0, 4.0, 1.0)
    noise = (start - denoised(start, 9.0)) / 9.0
    assert difference(found, model(start, 9.0) + noise * down + noise_of(9.0, 4.0) * up) < 1e-5


def test_cfg_plus_plus_2m() -> None:
    """Without guidance it is DPM++ 2M; with it, as ComfyUI states it in log sigma."""
    start, sigmas = draws(1)() * 9.0, [9.0, 5.0, 2.0, 1.0, 0.3, 0.0]
    model = Pulled(0.0)
    found = plusplus.sample_dpmpp_2m_plusplus(model, start, sigmas, model.unguided)
    assert difference(found, multistep.sample_dpmpp_2m(denoised, start, sigmas)) < 1e-5
    model, expected, older = Pulled(0.3), start, None
    found = plusplus.sample_dpmpp_2m_plusplus(model, start, sigmas, model.unguided)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        guided = model(expected, sigma)
        h = -math.log(sigma_next / sigma) if sigma_next else math.inf
        mixed = -math.exp(-h) * model.last
        if older is not None and sigma_next:
            last = math.log(sigmas[i - 1] / sigma)
            mixed = mixed - math.expm1(-h) * h / (2 * last) * (guided - older)
        expected, older = guided + mixed + math.exp(-h) * expected, model.last
    assert difference(found, expected) < 1e-5


def test_whose_scale_a_name_means() -> None:
    """A1111's 7.5 is the paper's 0.6; ComfyUI's names take the paper's. A picture's parameters keep the difference."""
    for name, scale in (("Euler CFG++", 0.6), ("euler_cfg_pp", 7.5), ("DDIM CFG++", 0.6), ("Euler", 7.5)):
        assert find_sampler(name).scale(7.5) == pytest.approx(scale)
    for name in ("Euler CFG++", "euler_cfg_pp", "dpmpp_3m_sde", "DPM++ 3M SDE", "KDPM2DiscreteScheduler", "dpm_2",
                 "DPMSolverMultistepScheduler[sde-dpmsolver++]", "Euler a", "dpmpp_2m", "uni_pc"):  # fmt: skip
        choice = find_sampler(name)
        again = find_sampler(choice.shown)
        assert (again.sampler, again.drops_penultimate, again.brownian, again.scale(7.5)) == (
            choice.sampler, choice.drops_penultimate, choice.brownian, choice.scale(7.5)
        )  # fmt: skip
    assert find_sampler("dpmpp_2m").shown == "DPM++ 2M"


ORDERS = {
    "Euler": 1, "DDIM": 1, "Heun": 2, "DPM2": 2, "DPM++ 2M": 2, "DPM++ 3M": 2, "UniPC": 3, "LMS": 4, "DEIS": 3,
    "Heun++ 2": 1, "RES multistep": 2, "SA-Solver": 2, "ER-SDE": 2, "Euler CFG++": 1, "DPM++ 2M CFG++": 2,
}  # fmt: skip
RUNS: dict[str, Callable[[onestep.Denoiser, Tensor, list[float]], Tensor]] = {
    "Heun++ 2": onestep.sample_heun_plusplus, "RES multistep": multistep.sample_res,
    "SA-Solver": lambda denoise, x, sigmas: sde.sample_sa_solver(
        denoise, x, sigmas, lambda a, b: torch.zeros_like(x), [0.0] * len(sigmas)
    ),
    "ER-SDE": lambda denoise, x, sigmas: sde.sample_er_sde(
        denoise, x, sigmas, lambda a, b: torch.zeros_like(x), scale=float, points=4000
    ),
    "Euler CFG++": lambda denoise, x, sigmas: plusplus.sample_euler_plusplus(
        model := Pulled(0.0), x, sigmas, model.unguided
    ),
    "DPM++ 2M CFG++": lambda denoise, x, sigmas: plusplus.sample_dpmpp_2m_plusplus(
        model := Pulled(0.0), x, sigmas, model.unguided
    ),
    "DEIS": lambda denoise, x, sigmas: multistep.sample_deis(
        denoise, x, sigmas, multistep.final_orders(len(sigmas) - 1, 3, low_end=False, euler_end=False)
    ),
    "Euler": onestep.sample_euler, "DDIM": onestep.sample_euler, "Heun": onestep.sample_heun,
    "DPM2": onestep.sample_dpm_2, "DPM++ 2M": multistep.sample_dpmpp_2m, "DPM++ 3M": multistep.sample_dpmpp_3m_sde,
    "UniPC": unipc.sample_unipc, "LMS": multistep.sample_lms,
}  # fmt: skip


def runge_kutta(x: Tensor, sigma: float, sigma_end: float, steps: int) -> Tensor:
    """The probability-flow ODE by the classical method of fourth order, in log sigma."""
    h = (math.log(sigma_end) - math.log(sigma)) / steps

    def slope(x: Tensor, log: float) -> Tensor:
        return x - denoised(x, math.exp(log))

    for i in range(steps):
        log = math.log(sigma) + i * h
        a = slope(x, log)
        b = slope(x + h / 2 * a, log + h / 2)
        c = slope(x + h / 2 * b, log + h / 2)
        d = slope(x + h * c, log + h)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


@pytest.mark.parametrize("name", RUNS)
def test_order_of_convergence(name: str) -> None:
    """The error falls with the published power of the step size, on the mixture's exact ODE in float64.

    Steps are even in log sigma, but small at both ends: a multistep method begins with steps of lower order, and UniPC
    ends with one, whose errors would hide its own.
    """
    start = torch.linspace(-4, 4, 33, dtype=torch.float64)

    def path(steps: int) -> Tensor:
        ramp = [1.4**k for k in range(-30, 0)]
        growth = ramp + [1.0] * steps + ramp[::-1]
        lengths = torch.tensor(growth, dtype=torch.float64).cumsum(0) / sum(growth)
        logs = math.log(3.0) + torch.cat([torch.zeros(1), lengths]) * (math.log(0.2) - math.log(3.0))
        return RUNS[name](denoised, start, logs.exp().tolist())

    exact = runge_kutta(start, 3.0, 0.2, 2000)
    errors = [float((path(steps) - exact).abs().max()) for steps in (160, 320)]
    order = math.log2(errors[0] / errors[1])
    print(f"\n{name}: order {order:.2f}")
    assert order > ORDERS[name] - 0.25, f"{name}: measured order {order:.2f}"


def test_ends_and_rho_are_k_diffusions() -> None:
    oracle, config = kdiffusion.kdiffusion_sampling(), SchedulerConfig()
    rule = find_sampler("Euler").sampler.rule
    asked = Sampling(sigma_min=0.1, sigma_max=10.0, rho=4.0)
    for kind, rho in (("karras", {"rho": 4.0}), ("polyexponential", {"rho": 4.0}), ("exponential", {})):
        expected = getattr(oracle, f"get_sigmas_{kind}")(STEPS, 0.1, 10.0, **rho)
        found = make_schedule(config, rule, STEPS, find_schedule(kind), asked).sigmas
        assert (found - expected).abs().max() < 1e-5
    trained = trained_sigmas(config)
    expected = oracle.get_sigmas_polyexponential(STEPS, float(trained[0]), float(trained[-1]))
    assert (make_schedule(config, rule, STEPS, "polyexponential").sigmas - expected).abs().max() < 1e-5
    with pytest.raises(UsageError, match=r"20 is not below 14\.6"):
        make_schedule(config, rule, STEPS, "karras", Sampling(sigma_min=20.0))


def test_the_schedules_as_published() -> None:
    """Ends, lengths and a few published numbers."""
    config, rule = SchedulerConfig(), find_sampler("Euler").sampler.rule
    trained = trained_sigmas(config)
    for schedule in SCHEDULES:
        for steps in (1, 4, 10, 23):
            plan = make_schedule(config, rule, steps, schedule.name)
            assert len(plan.timesteps) == len(plan.sigmas) - 1
            more = len(trained[1 :: 1000 // steps]) if schedule.name == "ddim uniform" else steps
            assert len(plan.timesteps) == more
            assert (plan.sigmas.diff() < 0).all()
            assert plan.sigmas[-1] == (trained[0] if schedule.name == "kl optimal" else 0)
            assert plan.timesteps.max() <= 999
            assert (timestep_of(plan.sigmas[:-1], trained) - plan.timesteps).abs().max() < 0.6
    near = make_schedule(config, rule, 4, "kl optimal").sigmas.atan()
    assert near.diff().tolist() == pytest.approx([float(near[-1] - near[0]) / 4] * 4)
    for steps in (1, 2, 7, 20):
        expected = pipeline_mochi.linear_quadratic_schedule(steps, 0.025) if steps > 1 else [1.0]
        fallen = make_schedule(config, rule, steps, "linear quadratic").sigmas[:-1] / trained[-1]
        assert fallen.tolist() == pytest.approx(list(map(float, expected)))
    assert make_schedule(config, rule, 20, "ddim uniform").sigmas[:-1].tolist() == trained[1::50].flip(0).tolist()
    simple = make_schedule(config, rule, 4, "simple")
    assert simple.timesteps.tolist() == pytest.approx([999, 749, 499, 249])
    sgm = make_schedule(config, rule, 3, "sgm uniform")
    assert sgm.timesteps.tolist() == pytest.approx([999, 666, 333])
    assert make_schedule(config, rule, 3, "normal").timesteps.tolist() == pytest.approx([999, 499.5, 0], abs=1e-9)
    aligned = make_schedule(config, rule, 10, "align your steps")
    assert aligned.sigmas.tolist() == pytest.approx(
        [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    )
    # diffusers' AysSchedules["StableDiffusionTimesteps"]
    assert aligned.timesteps.tolist() == pytest.approx([999, 850, 736, 645, 545, 455, 343, 233, 124, 24], abs=1)
    wide = make_schedule(config, rule, 10, "align your steps", sdxl=True)
    assert wide.timesteps.tolist() == pytest.approx([999, 845, 730, 587, 443, 310, 193, 116, 53, 13], abs=1)


def test_zero_terminal_snr() -> None:
    data = {**BETAS, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    config = SchedulerConfig.from_published(data)
    plan = make_schedule(config, find_sampler("Euler").sampler.rule, 10)
    assert plan.sigmas[0] == pytest.approx(4096, rel=1e-3)
    assert plan.timesteps[0] == 999
    assert trained_sigmas(config)[0] == pytest.approx(float(trained_sigmas(SchedulerConfig())[0]), rel=1e-6)


@pytest.mark.parametrize(
    ("typed", "name", "kind"),
    [
        ("DPM++ 2M Karras", "DPM++ 2M", "karras"), ("dpmpp_2m_karras", "DPM++ 2M", "karras"),
        ("euler_ancestral", "Euler a", None), ("Euler a", "Euler a", None), ("k_eulerr", None, None),
        ("k_euler", "Euler", None), ("k_euler_a", "Euler a", None), ("k_euler_ancestral", "Euler a", None),
        ("k_dpm_2_a", "DPM2 a", None), ("k_dpmpp_2m", "DPM++ 2M", None), ("sample_dpmpp_2m", "DPM++ 2M", None),
        ("dpmpp_2m_sde_gpu", "DPM++ 2M SDE", None), ("dpmpp_3m_sde_gpu", "DPM++ 3M SDE", None),
        ("dpmpp_2m_sde_heun_gpu", "DPM++ 2M SDE Heun", None), ("dpmpp_sde_gpu", "DPM++ SDE", None),
        ("DPM++ 2M SDE Exponential", "DPM++ 2M SDE", "exponential"), ("DPMSolverMultistepScheduler", "DPM++ 2M", None),
        ("dpmpp_3m_sde", "DPM++ 3M SDE", None), ("uni_pc", "UniPC", None), ("LMS Karras", "LMS", "karras"),
        ("lcm", "LCM", None), ("ddim", "DDIM", None), ("DPM2 a Karras", "DPM2 a", "karras"),
        ("dpm_2_ancestral", "DPM2 a", None), ("DPM++ SDE Karras", "DPM++ SDE", "karras"),
        ("Euler SGM Uniform", "Euler", "sgm uniform"),
    ],
)  # fmt: skip
def test_names(typed: str, name: str | None, kind: str | None) -> None:
    if name is None:
        with pytest.raises(UsageError, match="there is no sampler"):
            find_sampler(typed)
    else:
        choice = find_sampler(typed)
        assert (choice.sampler.name, choice.kind) == (name, kind)


@pytest.mark.parametrize(
    ("name", "kind", "ends"),
    [
        ("DPM2", "karras", [0.0744, 0.0473, 0]), ("DPM2 a", "karras", [0.0744, 0.0473, 0]),
        ("dpm_2", "karras", [0.0744, 0.0473, 0]), ("DPM++ 3M SDE", "karras", [0.0744, 0.0473, 0]),
        ("uni_pc_bh2", "karras", [0.0744, 0.0473, 0]), ("k_dpm_2_a", "karras", [0.0744, 0.0473, 0]),
        ("dpmpp_3m_sde", "karras", [0.0485, 0.0292, 0]), ("DPM++ 2M", "karras", [0.0485, 0.0292, 0]),
        ("KDPM2DiscreteScheduler", "karras", [0.0485, 0.0292, 0]), ("UniPC", "karras", [0.0485, 0.0292, 0]),
    ],
)  # fmt: skip
def test_the_last_sigma_but_one_is_left_out_as_the_program_of_the_name_does(
    name: str, kind: Kind, ends: list[float]
) -> None:
    """A1111's `cat(sigmas[:-2], sigmas[-1:])` of n + 1 steps, ComfyUI's the same for others."""
    plan = find_sampler(name).schedule(SchedulerConfig(), 20, kind)
    assert len(plan.timesteps) == len(plan.sigmas) - 1 == 20
    assert plan.sigmas[-3:].tolist() == pytest.approx(ends, abs=6e-5)


def test_options_of_a_solver_hold_for_the_one_that_they_are_of() -> None:
    third = SchedulerConfig.from_published({**BETAS, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 3})
    assert find_sampler(third.class_name).sampler.name == "DPM++ 3M"
    assert find_sampler(third.class_name).settings(third).order == 3
    assert find_sampler("DEIS").settings(third).order == find_sampler("UniPC").settings(third).order == 2


def test_names_that_contradict() -> None:
    assert find_sampler("DPM++ 2M", "ays").kind == "align your steps"
    with pytest.raises(UsageError, match="contradict"):
        find_sampler("DPM++ 2M Karras", "exponential")
    with pytest.raises(UsageError, match="there is no schedule"):
        find_sampler("DPM++ 2M", "cosine")


def test_scheduler_fields() -> None:
    """What is not understood is named; what would change the picture and is not supported stops."""
    with pytest.warns(UserWarning, match="not understood and not used: some_new_field"):
        SchedulerConfig.from_published({**BETAS, "some_new_field": 3})
    for field, value in (("prediction_type", "flow"), ("beta_schedule", "sigmoid"), ("use_flow_sigmas", True)):
        with pytest.raises(SourceError, match=field):
            SchedulerConfig.from_published({**BETAS, field: value})
    for field, value in (("timestep_spacing", "cosine"), ("thresholding", True), ("solver_order", 4),
                         ("interpolation_type", "log_linear"), ("solver_type", "euler")):  # fmt: skip
        assert SchedulerConfig.from_published({**BETAS, field: value}).unsupported == (f"{field} = {value!r}",)
    both = SchedulerConfig.from_published({"use_karras_sigmas": True, "use_beta_sigmas": True})
    assert both.unsupported == ("karras and beta sigmas at once",)
    betas = torch.linspace(0.001, 0.01, 10).tolist()
    assert len(trained_sigmas(SchedulerConfig.from_published({"trained_betas": betas}))) == 10


@pytest.mark.parametrize("name", [sampler.published for sampler in SAMPLERS if sampler.published])
def test_every_field_of_a_published_config_is_known(name: str, recwarn: pytest.WarningsRecorder) -> None:
    cls, _, algorithm = name.rstrip("]").partition("[")
    options = {"skip_prk_steps": True} if "PNDM" in name else form(algorithm)
    data = dict(getattr(diffusers, cls)(**options).config) | {"_class_name": cls}
    data.pop("_use_default_values", None)
    recwarn.clear()
    config = SchedulerConfig.from_published(data)
    assert not recwarn.list
    assert find_sampler(config.class_name).sampler.published == name
