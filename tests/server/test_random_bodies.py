"""Random bodies at every address that reads one: each is answered, and never by a fault of the program.

A good request has some of its values replaced, at any depth, or its bytes spoiled; in the suite a few at every address,
`NATIVESD_RANDOM_BODIES=1000 python -m pytest tests/server/test_random_bodies.py` tries that many.
"""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any
from urllib.parse import quote

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from attacks.values import VALUES, deeply_changed, spoiled
from nativesd.server.settings import Limits
from server.fixtures import BASE, PROMPT, Adapters, Running, encoded, file_of, serving, until
from server.test_comfy import link, node, workflow


def encoded_with_text(text: str) -> str:
    """A picture in base64 that carries A1111's parameters."""
    info, data = PngInfo(), BytesIO()
    info.add_text("parameters", text)
    SMALL.save(data, format="PNG", pnginfo=info)
    return base64.b64encode(data.getvalue()).decode()


pytestmark = pytest.mark.filterwarnings("default::nativesd.NativesdWarning")  # as outside of tests: it is no error
BODIES = int(os.environ.get("NATIVESD_RANDOM_BODIES", "12"))
SMALL = Image.new("RGB", (48, 40), (200, 90, 20))
PICTURE = encoded(SMALL)
MASK = encoded(Image.new("L", (48, 40), 255))
ODD = [Image.new(mode, (9, 5)) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
PICTURES = [PICTURE, *map(encoded, ODD), encoded(Image.new("CMYK", (9, 5)), "JPEG"), encoded(Image.new("L", (1, 1))),
            encoded(Image.new("RGB", (600, 2)), "GIF"), PICTURE[:-60], f"data:image/png;base64,{PICTURE}"]  # fmt: skip
WRITTEN = encoded_with_text("a cat\nNegative prompt: green\nSteps: 2, Sampler: Euler a, Seed: 7, Size: 48x40")
WRONG = (
    *VALUES, *PICTURES, WRITTEN, "tiny", "style", "Euler a", "DPM++ 2M", "Karras", "automatic", "canny",
    "<lora:style:1>", "(" * 50, "a AND b", "7", "NaN", "64x64", "jpeg", "url", "file:///etc/passwd", "http://127.0.0.1/x",
    2**63, 2**64, 1e-308, 64, 63, 200, ["a", "b"], {"args": []}, {"args": [{"model": "tiny"}]},
)  # fmt: skip
HERE = {"prompt": PROMPT, "negative_prompt": "green", "seed": 3, "steps": 1, "width": 48, "height": 48}
PLACED = {"sampler": "euler a", "schedule": "karras", "guidance_scale": 4, "model": "tiny"}
UNIT = {"model": "tiny", "image": PICTURE, "module": "canny", "weight": 0.8, "guidance_start": 0.1, "guidance_end": 0.9,
        "control_mode": 0, "resize_mode": 1, "pixel_perfect": True, "threshold_a": 100, "threshold_b": 200,
        "enabled": True}  # fmt: skip
SHOWN = {"module": "ip-adapter-auto", "model": BASE, "image": [{"image": PICTURE}], "weight": 0.8, "hr_option": "Both",
         "guidance_start": 0.1, "effective_region_mask": MASK, "advanced_weighting": None}  # fmt: skip
A1111 = {**HERE, "cfg_scale": 4.0, "sampler_name": "Euler a", "scheduler": "Karras", "n_iter": 1, "batch_size": 1,
         "subseed": 4, "subseed_strength": 0.2, "seed_resize_from_w": 0, "seed_resize_from_h": 0, "eta": 0.5,
         "denoising_strength": 0.6, "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_model_checkpoint": "tiny",
         "randn_source": "CPU", "eta_noise_seed_delta": 0}, "alwayson_scripts": {"controlnet": {"args": [UNIT, SHOWN]}},
         "force_task_id": "", "styles": [], "send_images": True, "script_name": "", "script_args": [],
         "refiner_checkpoint": "", "refiner_switch_at": 0.8}  # fmt: skip
GRAPH = {
    **workflow(steps=1),
    "10": node("LoadImage", image="x.png"),
    "11": node("VAEEncode", pixels=link(10), vae=link(4, 2)),
    "12": node("LoraLoader", model=link(4), clip=link(4, 1), lora_name="style", strength_model=0.8, strength_clip=1.0),
    "13": node("ControlNetLoader", control_net_name="tiny"),
    "14": node("ControlNetApplyAdvanced", positive=link(6), negative=link(7), control_net=link(13), image=link(10),
               strength=0.9, start_percent=0.0, end_percent=1.0),
    "15": node("LatentUpscale", samples=link(11), upscale_method="bilinear", width=64, height=64, crop="disabled"),
    "30": node("IPAdapterModelLoader", ipadapter_file=BASE),
    "31": node("CLIPVisionLoader", clip_name="clip"),
    "32": node("PrepImageForClipVision", image=link(10), interpolation="LANCZOS", crop_position="pad", sharpening=0.0),
    "33": node("LoadImageMask", image="x.png", channel="red"),
    "34": node("IPAdapterAdvanced", model=link(12), ipadapter=link(30), image=link(32), clip_vision=link(31),
               attn_mask=link(33), weight=0.8, weight_type="weak input", combine_embeds="concat", start_at=0.0,
               end_at=0.9, embeds_scaling="V only"),
    "16": node("KSamplerAdvanced", model=link(34), positive=link(14), negative=link(14, 1), latent_image=link(15),
               add_noise="enable", noise_seed=1, steps=2, cfg=4.0, sampler_name="euler", scheduler="normal",
               start_at_step=1, end_at_step=10000, return_with_leftover_noise="disable"),
    "17": node("VAEDecode", samples=link(16), vae=link(4, 2)),
    "18": node("PreviewImage", images=link(17)),
}  # fmt: skip
JSON: Mapping[str, dict[str, Any]] = {
    "/jobs": {**HERE, **PLACED, "num_images": 1, "loras": [["style", 0.5, 0.4], "style"],
              "variation": {"seed": 5, "strength": 0.2, "ensd": 0}, "clip_skip": 2, "eta": 0.5,
              "hires": {"scale": 1.5, "strength": 0.6, "steps": 1, "upscaler": "latent"},
              "control": [{"model": "tiny", "image": PICTURE, "scale": 0.8, "preprocess": "canny"}],
              "image_prompts": [{"adapter": BASE, "picture": PICTURE, "scale": 0.8, "layers": {"0": 1.0}, "mask": MASK,
                                 "weight_type": "ease in", "crop": "top", "identity": None}],
              "image_encoder": "clip"},
    "/jobs (a picture)": {**HERE, "steps": 2, "image": PICTURE, "mask": MASK, "strength": 0.6, "mask_blur": 2,
                          "mask_fill": "noise", "only_masked": 8, "resize": "crop"},
    "/recipe": {"image": WRITTEN},
    "/sdapi/v1/txt2img": {**A1111, "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "hr_prompt": "",
                          "hr_second_pass_steps": 1, "hr_sampler_name": "Euler", "hr_scheduler": "Automatic",
                          "hr_resize_x": 0, "hr_resize_y": 0, "hr_negative_prompt": ""},
    "/sdapi/v1/img2img": {**A1111, "init_images": [PICTURE], "mask": MASK, "mask_blur": 2, "inpainting_fill": 1,
                          "inpaint_full_res": True, "inpaint_full_res_padding": 8, "inpainting_mask_invert": 0,
                          "resize_mode": 1, "include_init_images": True, "image_cfg_scale": 1.5},
    "/sdapi/v1/extra-single-image": {"image": PICTURE, "upscaler_1": "Lanczos", "upscaling_resize": 1.5,
                                     "resize_mode": 0, "upscaling_resize_w": 64, "upscaling_resize_h": 50,
                                     "upscaling_crop": True, "gfpgan_visibility": 0},
    "/sdapi/v1/extra-batch-images": {"imageList": [{"data": PICTURE, "name": "a.png"}], "upscaler_1": "None",
                                     "upscaling_resize": 1, "resize_mode": 0},
    "/sdapi/v1/png-info": {"image": WRITTEN},
    "/sdapi/v1/options": {"CLIP_stop_at_last_layers": 1, "sd_model_checkpoint": "tiny", "randn_source": "CPU",
                          "eta_noise_seed_delta": 0},
    "/sdapi/v1/interrupt": {"force_task_id": "x"},
    "/sdapi/v1/skip": {"id_task": "x"},
    "/internal/progress": {"id_task": "x", "live_preview": True, "id_live_preview": -1},
    "/controlnet/detect": {"controlnet_module": "canny", "controlnet_input_images": [PICTURE],
                           "controlnet_threshold_a": 100, "controlnet_threshold_b": 200,
                           "controlnet_processor_res": 64},
    "/v1/images/generations": {"prompt": PROMPT, "n": 1, "size": "48x48", "response_format": "b64_json", "seed": 3,
                               "steps": 1, "output_format": "png", "output_compression": 90, "stream": False,
                               "partial_images": 1, "quality": "auto", "user": "anna", "negative_prompt": "green",
                               "guidance_scale": 4, "sampler": "euler", "schedule": "karras", "clip_skip": 2,
                               "model": "tiny"},
    "/prompt": {"prompt": GRAPH, "client_id": "x", "extra_data": {"preview_method": "auto", "extra_pnginfo": {}},
                "prompt_id": None},
    "/queue": {"clear": False, "delete": ["x"]},
    "/history": {"clear": False, "delete": ["x"]},
    "/interrupt": {"prompt_id": "x"},
}  # fmt: skip
FORMS: Mapping[str, dict[str, Any]] = {
    "/v1/images/edits": {"prompt": PROMPT, "n": "1", "size": "48x48", "seed": "3", "steps": "1", "strength": "0.6",
                         "mask_blur": "2", "mask_fill": "noise", "only_masked": "8", "output_format": "webp",
                         "output_compression": "90", "stream": "false", "guidance_scale": "4", "model": "tiny"},
    "/upload/image": {"subfolder": "a", "type": "input", "overwrite": "true"},
}  # fmt: skip
QUERIES: Mapping[str, dict[str, Any]] = {
    "/sdapi/v1/progress": {"skip_current_image": "false", "force_task_id": "x"},
    "/view": {"filename": "x.png", "type": "input", "subfolder": "a"},
    "/history": {"max_items": "3"},
    "/audit": {"model": "tiny"},
}
TEXTS = tuple(each for each in WRONG if isinstance(each, str) and each.isprintable())
"""What a client can say in a header or an address; a lone surrogate it cannot."""
FEW = settings(
    max_examples=BODIES, deadline=None, derandomize=BODIES < 100, suppress_health_check=list(HealthCheck), database=None
)
RANDOMS = st.randoms(use_true_random=True)
"""Draws from a seed that hypothesis chooses."""


@pytest.fixture(scope="module")
def small(lora_dir: Any, adapters: Adapters) -> Iterator[Running]:
    """A server whose jobs are small whatever is asked for, with a picture uploaded."""
    limits = Limits(side=96, batch=2, steps=3, pixels=100_000, body=1 << 20)
    shown = {"image_adapter_dirs": (adapters.models,), "image_encoder_dirs": (adapters.encoders,)}
    with serving(lora_dirs=(lora_dir,), queue=8, limits=limits, **shown) as running:
        running.post("/upload/image", files={"image": ("x.png", file_of(SMALL))})
        yield running


def require_answered(small: Running, answer: requests.Response) -> None:
    """No fault of ours in an answer, nor in the jobs that it began."""
    desk = small.context.desk
    until(lambda: not desk.waiting and not desk.running)
    faults = [job.failure.message for job in desk.ended if job.failure is not None and job.failure.ours]
    for job in desk.ended:
        desk.forget(job)
    assert answer.status_code < 500, answer.text
    assert "a fault of nativesd" not in answer.text
    assert faults == []


@pytest.mark.parametrize("address", JSON)
@given(rng=RANDOMS)
@FEW
def test_json(small: Running, address: str, rng: random.Random) -> None:
    body: Any = JSON[address]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        body = deeply_changed(rng, body, WRONG)
    raw = json.dumps(body).encode()
    if rng.random() < 0.1:
        raw = spoiled(rng, raw)
    require_answered(small, small.post(address.split()[0], data=raw))


@pytest.mark.parametrize("address", FORMS)
@given(rng=RANDOMS)
@FEW
def test_forms(small: Running, address: str, rng: random.Random) -> None:
    fields = {
        name: rng.choice(TEXTS) if rng.random() < 0.15 else value
        for name, value in FORMS[address].items()
        if rng.random() < 0.9
    }
    files: list[tuple[str, tuple[str, bytes]]] = []
    for name in ("image", "image[]", "mask"):
        if rng.random() < (0.8 if name == "image" else 0.3):
            data = file_of(rng.choice([SMALL, *ODD]))
            files.append((name, (rng.choice(("x.png", *TEXTS)), spoiled(rng, data) if rng.random() < 0.2 else data)))
    form = requests.Request("POST", small.url + address, data=fields, files=files or None).prepare()
    raw = form.body.encode() if isinstance(form.body, str) else form.body or b""
    if rng.random() < 0.1:
        raw = spoiled(rng, raw)
    headers = {"Content-Type": form.headers.get("Content-Type", "multipart/form-data; boundary=x")}
    require_answered(small, small.post(address, data=raw, headers=headers))


@pytest.mark.parametrize("address", QUERIES)
@given(rng=RANDOMS)
@FEW
def test_queries(small: Running, address: str, rng: random.Random) -> None:
    said = {name: rng.choice(TEXTS) if rng.random() < 0.5 else value for name, value in QUERIES[address].items()}
    require_answered(small, small.get(address, params=said))


@pytest.mark.parametrize("address", ["/jobs/{}", "/jobs/{}/events", "/v1/models/{}", "/history/{}", "/object_info/{}"])
@given(rng=RANDOMS)
@FEW
def test_names(small: Running, address: str, rng: random.Random) -> None:
    name = quote(rng.choice(TEXTS), safe="")
    require_answered(small, small.get(address.format(name)))


@pytest.mark.parametrize("address", JSON)
def test_the_good_requests_are_good(small: Running, address: str) -> None:
    """Else all that is changed in them would be refused for one reason."""
    answer = small.post(address.split()[0], JSON[address])
    assert answer.status_code in (200, 202), answer.text
    desk = small.context.desk
    until(lambda: not desk.waiting and not desk.running)
    ended = desk.ended
    for job in ended:
        desk.forget(job)
    assert [job.failure.message for job in ended if job.failure is not None] == []
