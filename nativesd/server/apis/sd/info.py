"""`info`: the JSON that A1111 sends beside pictures (Processed.js of modules/processing.py)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from nativesd.server.jobs.order import Part
from nativesd.version import __version__


def infotext_info(parts: Sequence[Part], fields: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """What was made, as A1111 says it; `notes`, which it has not, are what of the request was not heeded, and why."""
    made = [picture for part in parts for picture in part.made]
    parameters = parts[0].parameters
    prompt, negative = fields.get("prompt", ""), fields.get("negative_prompt", "")
    seeds = [picture.seed for picture in made]
    varied = [part.parameters.get("variation", {}) for part in parts]
    subseeds = [
        (said.get("seed") or 0) + i for said, part in zip(varied, parts, strict=True) for i in range(len(part.made))
    ]
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * len(made),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(made),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": subseeds[0],
        "all_subseeds": subseeds,
        "subseed_strength": varied[0].get("strength", 0),
        "width": parameters["width"],
        "height": parameters["height"],
        "sampler_name": parameters["sampler"],
        "cfg_scale": parameters["guidance_scale"],
        "steps": parameters["steps"],
        "batch_size": fields.get("batch_size", 1),
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": parameters["model"],
        "sd_model_hash": parameters.get("model_hash"),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": (varied[0].get("resize_from") or (-1, -1))[0],
        "seed_resize_from_h": (varied[0].get("resize_from") or (-1, -1))[1],
        "denoising_strength": fields.get("denoising_strength"),
        "extra_generation_params": {"Schedule type": parameters["schedule"]},
        "index_of_first_image": 0,
        "infotexts": [picture.infotext for picture in made],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": parameters.get("clip_skip", 1),
        "is_using_inpainting_conditioning": False,
        "version": f"nativesd {__version__}",
        "notes": [f"{note} is not used" if _is_name(note) else note for note in notes],
    }


def _is_name(note: str) -> bool:
    return note.replace(".", "_").isidentifier()
