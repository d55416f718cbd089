"""A1111's fields: which are heeded, which say nothing at these values, and which cannot matter here.

The names and defaults are those of A1111's modules/processing.py (StableDiffusionProcessing and those after it) and
modules/api/models.py. A field at its default is accepted whatever it is; one that asks for something that is not done
is named in the answer's `info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nativesd.pipeline.asked.readers import Reader, flag, real, whole
from nativesd.server.wire.fields import listed, mapping, words

SEED = whole(-1, (1 << 64) - 1)


def anything(_name: str, value: Any) -> Any:
    """What is read later."""
    return value


BOTH: Mapping[str, Reader] = {
    "prompt": words, "negative_prompt": words, "seed": SEED, "batch_size": whole(1), "n_iter": whole(1),
    "steps": whole(1), "cfg_scale": real(0), "width": whole(1), "height": whole(1), "sampler_name": words,
    "sampler_index": words, "scheduler": words, "eta": real(0, 1), "denoising_strength": real(0, 1),
    "override_settings": mapping, "alwayson_scripts": mapping, "script_name": words, "force_task_id": words,
    "send_images": flag, "refiner_checkpoint": words, "refiner_switch_at": real(0, 1), "styles": listed,
    "s_churn": real(0, 1000), "s_tmin": real(0, 1e6), "s_tmax": real(0, 1e6), "s_noise": real(0, 10), "tiling": flag,
    "subseed": SEED, "subseed_strength": real(0, 1), "seed_resize_from_w": whole(-1), "seed_resize_from_h": whole(-1),
}  # fmt: skip
TXT2IMG: Mapping[str, Reader] = {
    **BOTH, "enable_hr": flag, "hr_scale": real(0, 16, above=True), "hr_upscaler": words,
    "hr_second_pass_steps": whole(0), "hr_resize_x": whole(0), "hr_resize_y": whole(0), "hr_sampler_name": words,
    "hr_scheduler": words, "hr_prompt": words, "hr_negative_prompt": words,
}  # fmt: skip
IMG2IMG: Mapping[str, Reader] = {
    **BOTH, "init_images": listed, "mask": words, "mask_blur": whole(0, 256), "inpainting_fill": whole(0, 3),
    "inpaint_full_res": flag, "inpaint_full_res_padding": whole(0, 4096), "inpainting_mask_invert": flag,
    "resize_mode": whole(0, 3), "image_cfg_scale": real(0), "include_init_images": flag,
}  # fmt: skip
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "restore_faces": (False,),
    "s_min_uncond": (0,), "comments": ({},), "disable_extra_networks": (False,), "firstpass_image": ("",),
    "firstphase_width": (0,), "firstphase_height": (0,), "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_additional_modules": ([], ["Use same choices"]), "mask_blur_x": (4,), "mask_blur_y": (4,),
    "mask_round": (True,), "latent_mask": ("",), "initial_noise_multiplier": (1,), "infotext": ("",),
    "save_images": (False,), "script_args": ([],), "is_api": (True, False, ()), "scale_by": (1,),
}  # fmt: skip
"""Fields that are not heeded, at values that ask for nothing."""
NOTHING = frozenset({"do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards"})
"""Fields that cannot matter: this server saves nothing."""


def read_fields(body: Mapping[str, Any], heeded: Mapping[str, Reader]) -> tuple[dict[str, Any], list[str]]:
    """What is asked for, by A1111's names, and what of it is not heeded. Raises UsageError that names the field."""
    asked: dict[str, Any] = {}
    unheeded: list[str] = []
    for name, value in body.items():
        if value is None:
            continue
        if name in heeded:
            asked[name] = heeded[name](name, value)
        elif name not in NOTHING and value not in NEUTRAL.get(name, ("", False, [], {})):
            unheeded.append(name)
    return asked, unheeded
