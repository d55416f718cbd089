"""What a converted model says of its sampling: marker tensors, metadata, and what its new layout cannot say."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from nativesd.config import SD_VAE, SDXL_VAE, Config, TextEncoderConfig, UNetConfig, VAEConfig
from nativesd.sampling.published import SchedulerConfig
from nativesd.sampling.schedule import trained_sigmas
from nativesd.weights.entries import Entry
from nativesd.weights.files.source import Member
from nativesd.weights.identity.describe import unet_config
from nativesd.weights.identity.identify import Component
from nativesd.weights.identity.stated import EDM_LATENTS, EDM_V, few_steps, prediction
from nativesd.weights.maps.published import edm_json, scheduler_json
from nativesd.weights.model import Model

ARCHITECTURES = {
    "sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base",
    "refiner": "stable-diffusion-xl-v1-refiner",
}  # fmt: skip
"""family -> modelspec.architecture (github.com/Stability-AI/ModelSpec)"""


def markers(model: Model) -> dict[str, Entry]:
    """The tensors by which a single file says how the model is sampled, as loaders of other programs read them too."""
    scheduler = SchedulerConfig.from_published(model.scheduler)
    values: dict[str, list[float] | float] = {}
    vae = _vae(model)
    if scheduler.edm is not None and scheduler.prediction == "v":
        values |= {EDM_V[0]: scheduler.edm.largest, EDM_V[1]: scheduler.edm.smallest}
    elif scheduler.edm is not None and isinstance(vae, VAEConfig) and vae.mean is not None and vae.std is not None:
        values |= {EDM_LATENTS[0]: list(vae.mean), EDM_LATENTS[1]: list(vae.std)}
    elif scheduler.edm is None:
        if scheduler.prediction == "v" and model.prediction_known:
            values["v_pred"] = []
        if scheduler.zero_snr:
            values["ztsnr"] = []
        if _turbo(model, scheduler):
            values["denoiser.sigmas"] = [float(sigma) for sigma in trained_sigmas(scheduler)]
    return {name: _entry(value) for name, value in values.items()}


def _vae(model: Model) -> Config | None:
    """The VAE's configuration, where the model still has one."""
    return model.parts["vae"][1].config if "vae" in model.parts else None


def _turbo(model: Model, scheduler: SchedulerConfig) -> bool:
    """Whether it is sampled as SD-Turbo, whose single file has the sigmas of sgm."""
    return (
        model.family == "sd2" and scheduler.class_name.startswith("EulerAncestral") and scheduler.spacing == "trailing"
    )


def _entry(value: list[float] | float) -> Entry:
    tensor = torch.tensor(value, dtype=torch.float32)
    return Entry(torch.float32, tuple(tensor.shape), lambda: tensor)


def spec(model: Model) -> dict[str, str]:
    """The metadata of a single file that says what it is."""
    if not model.prediction_known:
        return {}
    predicted = SchedulerConfig.from_published(model.scheduler).prediction
    architecture = ARCHITECTURES.get(model.family, "")
    if architecture.endswith("-768-v") and predicted != "v":
        architecture = "stable-diffusion-v2-512"
    said = {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture}
    return {**{key: value for key, value in said.items() if value}, "modelspec.predict_key": predicted}


def not_said(model: Model, layout: str, name: str) -> list[str]:
    """What loading the converted model will not know any more, a phrase each; `name` is the new file's stem."""
    member, unet = model.parts["unet"]
    own = few_steps(model.path.stem, member.metadata) if model.path.is_file() else None
    out = []
    if layout == "diffusers" or not model.path.is_dir():
        if not model.prediction_known and model.scheduler["prediction_type"] != "epsilon":
            out.append(
                f"what the UNet predicts, which the source does not say either: "
                f"{model.scheduler['prediction_type']} is the family's usual"
            )
        if own is not None and (layout == "diffusers" or few_steps(name, member.metadata) != own):
            out.append(f"that it is a model of {own.steps} steps ({own.why}): ask for its steps and sampler by name")
        return out + (_heads_not_said(member, unet) if layout == "ldm" else [])
    source = SchedulerConfig.from_published(model.scheduler)
    keys = markers(model)
    kind, _ = prediction(keys, model.family, "", spec(model))
    said = scheduler_json(model.family, kind, turbo="denoiser.sigmas" in keys, zero_snr="ztsnr" in keys)
    if source.edm is not None:
        said = edm_json(kind, source.edm.smallest, source.edm.largest)
    loaded = SchedulerConfig.from_published(said)
    if model.family in ("sd1", "sd2"):
        source = replace(source, steps_offset=1)
    out += [
        f"the scheduler's {field.name} = {getattr(source, field.name)!r}"
        for field in fields(SchedulerConfig)
        if getattr(source, field.name) != getattr(loaded, field.name)
    ]
    out += _heads_not_said(member, unet)
    vae = _vae(model)
    usual = SDXL_VAE if model.family in ("sdxl", "refiner") else SD_VAE
    if isinstance(vae, VAEConfig) and EDM_LATENTS[0] not in keys and (vae.scaling, vae.mean) != (usual.scaling, None):
        out.append(f"the VAE's scaling factor {vae.scaling}: {usual.scaling} is the family's")
    if model.zero_empty_negative != (model.family == "sdxl"):
        out.append(f"force_zeros_for_empty_prompt = {model.zero_empty_negative}")
    for encoder in model.text_encoders:
        text = model.parts[encoder][1].config
        if isinstance(text, TextEncoderConfig) and text.activation == "gelu_tanh":
            out.append(f"the {encoder}'s activation gelu_tanh")
    return out


def _heads_not_said(member: Member, unet: Component) -> list[str]:
    """The UNet's heads, where a file that cannot say them would be read with others: those of a folder's config, or of
    the .yaml beside a file."""
    config = unet.config
    if not isinstance(config, UNetConfig):
        return []
    by_rule, _ = unet_config(
        unet.found.parameters(member.shapes), config.added.pooled if config.added is not None else 1280
    )
    heads = [[level.heads for level in each.levels] for each in (config, by_rule)]
    if heads[0] == heads[1]:
        return []
    return [f"the UNet's heads {heads[0]}: by the family's rule they would be {heads[1]}"]
