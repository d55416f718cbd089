"""Models of continuous sigmas (CosXL, Playground 2.5): schedules, preconditioning and steps as diffusers has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor

from nativesd.config import PLAYGROUND_VAE, SD_VAE, Prediction
from nativesd.diffusion.denoiser import to_clean
from nativesd.errors import SourceError, UsageError
from nativesd.latents.autoencoder import decode, encode
from nativesd.models.vae import VAE
from nativesd.sampling.calls import Call
from nativesd.sampling.names import find_sampler
from nativesd.sampling.published import SchedulerConfig
from nativesd.sampling.schedule import make_schedule
from nativesd.weights.files.configs import vae_config
from nativesd.weights.maps.published import vae_json
from oracles import difference, draw

COSXL = {
    "_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0,
    "sigma_schedule": "exponential", "prediction_type": "v_prediction", "num_train_timesteps": 1000, "rho": 7.0,
}  # fmt: skip
PLAYGROUND = {
    "_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
    "rho": 7.0, "prediction_type": "epsilon", "algorithm_type": "dpmsolver++", "solver_order": 2,
    "solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False, "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
}  # fmt: skip


def test_cosxl_is_told_a_quarter_of_the_logarithm() -> None:
    config = SchedulerConfig.from_published(COSXL)
    plan = make_schedule(config, find_sampler(config.class_name).sampler.rule, 6)
    expected = [1.197, 0.647, 0.097, -0.453, -1.004, -1.554]
    assert plan.timesteps.tolist() == pytest.approx(expected, abs=5e-4)
    published = EDMEulerScheduler.from_config(COSXL)
    published.set_timesteps(6)
    torch.testing.assert_close(plan.timesteps.float(), published.timesteps, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(plan.sigmas.float(), published.sigmas, atol=1e-6, rtol=1e-5)
    assert plan.start == pytest.approx(float(published.init_noise_sigma), rel=1e-6)
    assert plan.timestep(1.0) == 0.0


def model(x: Tensor, time: float) -> Tensor:
    """Some function of the UNet's inputs."""
    return (1.3 * x + 0.4 * time).sin()


@pytest.mark.parametrize("data", [COSXL, PLAYGROUND, {**PLAYGROUND, "sigma_schedule": "exponential"}])
@pytest.mark.parametrize("steps", [6, 20])
def test_a_whole_picture_is_diffusers(data: dict[str, Any], steps: int) -> None:
    config = SchedulerConfig.from_published(data)
    edm = config.edm
    assert edm is not None
    kinds = {"EDMEulerScheduler": EDMEulerScheduler, "EDMDPMSolverMultistepScheduler": EDMDPMSolverMultistepScheduler}
    published = kinds[data["_class_name"]].from_config(data)
    published.set_timesteps(steps)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = noise * published.init_noise_sigma
    for timestep in published.timesteps:
        x = published.step(model(published.scale_model_input(x, timestep), timestep), timestep, x).prev_sample
    sampler = find_sampler(config.class_name).sampler
    plan = make_schedule(config, sampler.rule, steps)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        scaled = x / (sigma**2 + edm.data**2) ** 0.5
        return to_clean(model(scaled, plan.timestep(sigma)), x, sigma, config.prediction, edm)

    found = sampler.run(denoise, noise * plan.start, Call(plan, lambda *_: noise, config))
    assert difference(found, x) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_what_an_output_means(prediction: Prediction) -> None:
    data = {**PLAYGROUND, "prediction_type": {"v": "v_prediction"}.get(prediction, prediction)}
    published, edm = EDMDPMSolverMultistepScheduler.from_config(data), SchedulerConfig.from_published(data).edm
    x, output = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    for sigma in (80.0, 1.0, 0.01):
        expected = published.precondition_outputs(x, output, torch.tensor(sigma, dtype=torch.float64))
        torch.testing.assert_close(to_clean(output, x, sigma, prediction, edm), expected)


def test_schedules_by_name() -> None:
    config = SchedulerConfig.from_published(PLAYGROUND)
    rule = find_sampler("Euler").sampler.rule
    for kind in ("karras", "exponential", "normal", "sgm uniform", "simple", "trailing"):
        plan = make_schedule(config, rule, 8, kind)  # type: ignore[arg-type]
        assert float(plan.sigmas[0]) == pytest.approx(80)
        assert bool((plan.sigmas.diff() < 0).all())
    with pytest.raises(UsageError, match="continuous sigmas"):
        make_schedule(config, find_sampler("LCM").sampler.rule, 4)
    with pytest.raises(SourceError, match="sigma_schedule"):
        SchedulerConfig.from_published({**COSXL, "sigma_schedule": "odd"})
    with pytest.raises(SourceError, match="no sigmas from"):
        SchedulerConfig.from_published({**COSXL, "sigma_max": 0.001})


def test_playgrounds_latents_are_moved_and_stretched() -> None:
    """As StableDiffusionXLPipeline decodes where the VAE's config has latents_mean and latents_std."""
    assert vae_config(vae_json(PLAYGROUND_VAE, 1024), "config.json") == PLAYGROUND_VAE
    small = {"widths": (32, 32), "layers": 1}

    plain, moved = (VAE(replace(config, **small)) for config in (SD_VAE, PLAYGROUND_VAE))
    draw(plain, 0)
    moved.load_state_dict(plain.state_dict())
    latents = torch.randn(1, 4, 4, 4)
    mean, std = (torch.tensor(values).reshape(1, 4, 1, 1) for values in (PLAYGROUND_VAE.mean, PLAYGROUND_VAE.std))
    expected = decode(plain, latents * std / 0.5 + mean, scaling=1)
    torch.testing.assert_close(decode(moved, latents, scaling=0.5), expected)
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    found, deviation = encode(moved, pixels, scaling=0.5)
    plain_mean, plain_deviation = encode(plain, pixels, scaling=1)
    torch.testing.assert_close(found, (plain_mean - mean) * 0.5 / std)
    torch.testing.assert_close(deviation, plain_deviation * 0.5 / std)
