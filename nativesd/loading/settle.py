"""What is decided once the modules are there: the scheduler, and everything that a pipeline knows beside tensors."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from nativesd.config import Prediction
from nativesd.diffusion.config import PipelineConfig
from nativesd.errors import NativesdWarning
from nativesd.loading.modules import Modules
from nativesd.models.unet import UNet
from nativesd.sampling.published import SchedulerConfig
from nativesd.shipped import TINY
from nativesd.text.words import taught_words
from nativesd.weights.files.locate import Located
from nativesd.weights.identity.stated import few_steps
from nativesd.weights.model import Model

LAST_TIMESTEP = 999.0
TINY_GUIDANCE = 3.0  # at 7.5 the embedded model's colours are over-saturated: backgrounds are right in 93 %, not 100 %

DISTILLED = {
    "turbo": "EulerAncestralDiscreteScheduler", "lightning": "EulerDiscreteScheduler",
    "hyper": "EulerDiscreteScheduler", "lcm": "LCMScheduler",
}  # fmt: skip
"""The samplers of distilled models, by the word that names them"""


def settle_scheduler(
    model: Model, unet: UNet, prediction: Prediction | None, name: str | None
) -> tuple[SchedulerConfig, int | None, dict[str, str]]:
    """The scheduler of a model, its own number of steps, and what was inferred, each with the reason.

    `name` is that of the file with the UNet, or None where a published folder states its scheduler.
    """
    inferred: dict[str, str] = {}
    scheduler = SchedulerConfig.from_published(model.scheduler)
    if model.family in ("sd1", "sd2") and scheduler.steps_offset != 1:
        # as diffusers' StableDiffusionPipeline: the published models were all sampled from timestep 1 on
        inferred["steps_offset"] = f"1, as all Stable Diffusion models, not {scheduler.steps_offset}"
        scheduler = replace(scheduler, steps_offset=1)
    if prediction is not None:
        scheduler = replace(scheduler, prediction=prediction)
    elif not model.prediction_known and scheduler.prediction == "v":
        found, share = probe_prediction(unet)
        scheduler = replace(scheduler, prediction=found)
        inferred["prediction"] = f"{found}, as the UNet answers pure noise with {share:.0%} of that noise"
    elif not model.prediction_known:
        inferred["prediction"] = f"{scheduler.prediction}, as nothing in the file says otherwise"
    if scheduler.zero_snr and scheduler.prediction == "epsilon":
        inferred["zero_snr"] = "the first step's noise hides the picture, and epsilon says nothing of it there"
        warnings.warn(
            "scheduler_config.json asks for zero terminal SNR of a model that predicts epsilon: at the first step that "
            "says nothing of the picture. Such models predict v: pass prediction= if the file says it wrong",
            NativesdWarning,
            stacklevel=2,
        )
    steps = None
    distilled = None if name is None or scheduler.edm is not None else few_steps(name, model.parts["unet"][0].metadata)
    if distilled is not None:
        steps, sampler = distilled.steps, DISTILLED[distilled.word]
        scheduler = replace(scheduler, class_name=sampler, spacing="trailing", set_alpha_to_one=True)
        inferred["scheduler"] = f"{sampler} with trailing steps, as {distilled.why}"
        inferred["steps"] = f"{steps}, as {distilled.why}"
        if distilled.sample and prediction is None:
            scheduler = replace(scheduler, prediction="sample")
            inferred["prediction"] = "sample, as the file's name says x0"
        warnings.warn(
            f"{name} is taken for a model of few steps, as {distilled.why}: {steps} steps without guidance, unless the "
            f"call says otherwise",
            NativesdWarning,
            stacklevel=4,
        )
    return scheduler, steps, inferred


@torch.inference_mode()
def probe_prediction(unet: UNet) -> tuple[Prediction, float]:
    """What a UNet predicts, epsilon or v, by its answer to noise at the last timestep; and the noise's share in it.

    There the noise is nearly all there is: to predict it is to repeat the input, while the velocity is the clean
    latents, negative, and only 7 % of the noise (alpha is 0.0047).
    """
    config, weight = unet.config, unet.conv_in.weight
    noise = torch.randn(1, config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0)).to(weight)
    context = torch.zeros(1, 77, config.context).to(weight)
    answer = unet(noise, LAST_TIMESTEP, context).float()
    share = float((answer * noise[:, : config.out_channels]).mean() / noise[:, : config.out_channels].square().mean())
    return ("epsilon" if share > 0.5 else "v"), share


def settle(
    model: Model, modules: Modules, located: Located, name: str, prediction: Prediction | None
) -> PipelineConfig:
    """Everything about a loaded model that is not a tensor; `name` is what the caller called it.

    `prediction` is what the caller says that the UNet predicts, over what the source says.
    """
    file = located.unet_file
    scheduler, steps, inferred = settle_scheduler(model, modules.unet, prediction, None if file is None else file.stem)
    return PipelineConfig(
        name=name,
        file=located.path if located.path.is_file() and located.unet is None else None,
        family=model.family,
        unet=modules.unet.config,
        vae=modules.vae.config,
        text_encoders=tuple(encoder.config for encoder in modules.text_encoders),
        scheduler=scheduler,
        prediction=scheduler.prediction,
        size=model.picture_side(scheduler.prediction) * modules.vae.config.factor,
        zero_empty_negative=model.zero_empty_negative,
        guidance_scale=TINY_GUIDANCE if model.path == TINY else None,
        words=taught_words() if model.path == TINY else None,
        steps=steps,
        inferred=inferred,
    )
