"""What a folder of exported graphs says of itself, so that another runtime can make pictures with it alone.

manifest.json beside the graphs, `scheduler/scheduler_config.json` and the tokenizers as they are published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nativesd.config import TinyVAEConfig, VAEConfig
from nativesd.diffusion.config import EDITING, INPAINTING, PipelineConfig
from nativesd.export.kept.entries import MANIFEST, files_in
from nativesd.export.library import numbered
from nativesd.pipeline.pipeline import Pipeline
from nativesd.sampling.published import EDM_CLASSES, PREDICTIONS, SchedulerConfig
from nativesd.sampling.schedule import trained_sigmas
from nativesd.text.tokenizer import ClipTokenizer
from nativesd.version import __version__

SCHEMA = 1
"""Version of manifest.json's schema; it counts up when a name changes its meaning or goes away."""
CHANNELS = {
    INPAINTING: ["latents"] * 4 + ["mask"] + ["latents of the picture without the masked part"] * 4,
    EDITING: ["latents"] * 4 + ["latents of the picture, not scaled"] * 4,
}
"""What a UNet's input channels are, where they are more than the latents."""
TIME_IDS = ["height", "width", "crop top", "crop left"]  # then what the last ones are, by how many there are
LAST_IDS = {5: ["aesthetic score"], 6: ["target height", "target width"]}
AXES = {
    "batch": "rows: pictures, twice as many for guidance in one call",
    "tokens": "of the prompt: 77 for every chunk",
    "groups": "image prompts, each attended to by itself; 1 where there are none",
    "image_tokens": "of the longest image prompt; 1 where there are none. Of an ip_adapter: states of its picture",
    "h": "the picture's height in latent cells: its pixels divided by vae.factor",
    "w": "the picture's width in latent cells",
}

OF_IMAGES = ("groups", "image_tokens")
"""The axes that only inputs of image prompts have."""


def write_manifest(folder: Path, pipeline: Pipeline, components: Mapping[str, Mapping[str, Any]]) -> None:
    """Write manifest.json, the tokenizers of the exported text encoders and the scheduler's config into `folder`.

    components  name -> what is to be said of each graph in the folder; its file is name/model.onnx
    """
    config = pipeline.config
    names = [numbered("text_encoder", i) for i in range(1, 1 + len(config.text_encoders))]
    for name, tokenizer in zip(names, pipeline.tokenizers, strict=True):
        tokenizer.save(folder / _tokenizer(name))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    published = scheduler_json(config.scheduler)
    scheduler.write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")
    files = files_in(folder)
    manifest = {
        "schema": SCHEMA,
        "nativesd": __version__,
        "model": {
            "name": config.name, "family": config.family, "size": config.size, "steps": config.default_steps,
            "guidance_scale": config.default_guidance, "inferred": dict(config.inferred),
        },
        "loras": [
            {"name": use.lora.path.stem, "unet": use.unet, "text_encoder": use.text_encoder}
            for use in ([] if pipeline.lora_state is None else pipeline.lora_state.uses)
        ],
        "prediction": config.prediction,
        "scheduler": {
            "file": scheduler.relative_to(folder).as_posix(), "class": config.scheduler.class_name,
            "sigmas": trained_sigmas(config.scheduler).tolist(),
        },
        "conditioning": _conditioning(config, names, pipeline.tokenizers),
        "vae": {
            "scaling_factor": config.vae.scaling, "factor": config.vae.factor,
            "latent_channels": config.vae.latent_channels, **_moved(config.vae),
        },
        "axes": {axis: words for axis, words in AXES.items() if axis not in OF_IMAGES or axis in _axes(components)},
        "components": components,
        "files": {name: {"bytes": file.size, "sha256": file.sha256} for name, file in files.items()},
    }  # fmt: skip
    (folder / MANIFEST).write_text(_on_one_line(json.dumps(manifest, indent=2)) + "\n", encoding="utf-8")


def _axes(components: Mapping[str, Mapping[str, Any]]) -> set[Any]:
    """The axes of all inputs."""
    return {axis for each in components.values() for slot in each["inputs"] for axis in slot["shape"]}


def _moved(vae: VAEConfig | TinyVAEConfig) -> dict[str, Any]:
    """By what latents are moved and stretched beside the scaling factor, where they are."""
    if not isinstance(vae, VAEConfig) or vae.mean is None or vae.std is None:
        return {}
    return {"latents_mean": vae.mean, "latents_std": vae.std}


def _conditioning(config: PipelineConfig, names: Sequence[str], tokenizers: Sequence[ClipTokenizer]) -> dict[str, Any]:
    """How prompts become the UNet's inputs."""
    out: dict[str, Any] = {
        "encoder_hidden_states": [
            {
                "component": name, "output": "hidden_states", "layer": encoder.hidden,
                "tokenizer": _tokenizer(name), "length": encoder.length, "begin": tokenizer.begin,
                "end": tokenizer.end, "pad": tokenizer.pad,
            }
            for name, encoder, tokenizer in zip(names, config.text_encoders, tokenizers, strict=True)
        ],
        "zeros_for_empty_negative": config.zero_empty_negative,
    }  # fmt: skip
    if config.unet.added is not None:
        out["text_embeds"] = {"component": names[-1], "output": "pooled"}
        out["time_ids"] = TIME_IDS + LAST_IDS[config.unet.added.ids]
    if config.unet.in_channels in CHANNELS:
        out["sample"] = CHANNELS[config.unet.in_channels]
    return out


def _tokenizer(encoder: str) -> str:
    """The folder of a text encoder's tokenizer, as it is published."""
    return encoder.replace("text_encoder", "tokenizer")


def scheduler_json(config: SchedulerConfig) -> dict[str, Any]:
    """What `SchedulerConfig.from_published` reads as `config`; fields that have their usual values are left out."""
    name, _, form = config.class_name.rstrip("]").partition("[")
    algorithm = next((word for word in form.split(", ") if not word.startswith("order ")), "")
    prediction = {ours: published for published, ours in PREDICTIONS.items()}
    data: dict[str, Any] = {
        "_class_name": name,
        "num_train_timesteps": config.train_steps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": prediction[config.prediction],
        "steps_offset": config.steps_offset,
        "set_alpha_to_one": config.set_alpha_to_one,
        "skip_prk_steps": True,
        "clip_sample": False,
    }
    usual = SchedulerConfig()
    unusual = {
        "trained_betas": (None if config.trained_betas is None else list(config.trained_betas), None),
        "timestep_spacing": (config.spacing, usual.spacing),
        "final_sigmas_type": ("zero" if config.final_sigma_zero else "sigma_min", "zero"),
        "rescale_betas_zero_snr": (config.zero_snr, usual.zero_snr),
        "solver_order": (config.order, usual.order),
        "solver_type": (config.solver, usual.solver),
        "lower_order_final": (config.lower_order_final, None if name.startswith("DPMSolver") else True),
        "euler_at_final": (config.euler_at_final, usual.euler_at_final),
        "original_inference_steps": (config.original_steps, usual.original_steps),
        "timestep_scaling": (config.timestep_scaling, usual.timestep_scaling),
        "algorithm_type": (algorithm, ""),
        "use_lu_lambdas" if config.kind == "lu" else f"use_{config.kind}_sigmas": (config.kind != "automatic", False),
    }
    data |= {key: value for key, (value, default) in unusual.items() if value != default}
    if (edm := config.edm) is not None:
        data["_class_name"] = next(published for published, ours in EDM_CLASSES.items() if ours == name)
        data |= {
            "sigma_min": edm.smallest, "sigma_max": edm.largest, "sigma_data": edm.data, "sigma_schedule": edm.kind,
            "rho": edm.rho,
        }  # fmt: skip
    return data


def _on_one_line(text: str) -> str:
    """Indented JSON with each list of numbers or words on one line."""
    lines = re.compile(r"\[\n *([^\[\]{}]*?)\n *\]")
    return lines.sub(lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", text)
