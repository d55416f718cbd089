"""A1111's API by the client that people use, webuiapi, and by what other clients send."""

from __future__ import annotations

import base64
import json
import threading
from typing import Any

import numpy as np
import pytest
import webuiapi
from PIL import Image, ImageOps

import nativesd
from nativesd.pictures.infotext import parse_infotext
from nativesd.server.apis.sd.generation import _hires
from nativesd.server.wire.answers import field_of
from server.fixtures import PROMPT, SLOW, Running, encoded, pixels, serving, until

HERE: dict[str, Any] = {"prompt": PROMPT, "seed": 7, "steps": 3, "width": 64, "height": 64, "cfg_scale": 4}
OURS: dict[str, Any] = {"seed": 7, "steps": 3, "guidance_scale": 4, "sampler": "Euler a"}


@pytest.fixture(scope="module")
def api(server: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(port=server.port)


def same(found: Image.Image, wanted: nativesd.Result, index: int = 0) -> None:
    np.testing.assert_array_equal(pixels(found), pixels(wanted.images[index]))


def test_txt2img_is_the_librarys_picture(api: webuiapi.WebUIApi, pipe: nativesd.Pipeline) -> None:
    made = api.txt2img(**HERE, negative_prompt="green", batch_size=2, n_iter=2)
    wanted = pipe(PROMPT, **OURS, negative_prompt="green", num_images=4)
    assert len(made.images) == 4
    for index, image in enumerate(made.images):
        same(image, wanted, index)
    info = made.info
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert (info["seed"], info["width"], info["height"], info["sampler_name"]) == (7, 64, 64, "Euler a")
    assert info["notes"] == []
    assert [parse_infotext(text).fields["Seed"] for text in info["infotexts"]] == ["7", "8", "9", "10"]
    assert made.images[0].info["parameters"] == info["infotexts"][0]
    assert made.parameters["steps"] == 3


def test_defaults_are_the_models_own(server: Running, pipe: nativesd.Pipeline) -> None:
    made = server.post("/sdapi/v1/txt2img", {"prompt": PROMPT, "seed": 3, "steps": 2}).json()
    np.testing.assert_array_equal(pixels(made["images"][0]), pixels(pipe(PROMPT, seed=3, steps=2).images[0]))
    assert isinstance(made["info"], str)
    assert json.loads(made["info"])["cfg_scale"] == 3


@pytest.mark.parametrize(
    ("scheduler", "schedule"), [("automatic", "karras"), ("Karras", "karras"), ("SGM Uniform", "sgm uniform")]
)
def test_schedules_as_a1111_means_them(
    api: webuiapi.WebUIApi, pipe: nativesd.Pipeline, scheduler: str, schedule: str
) -> None:
    made = api.txt2img(**HERE, sampler_name="DPM++ 2M", scheduler=scheduler)
    same(made.image, pipe(PROMPT, **{**OURS, "sampler": "DPM++ 2M"}, schedule=schedule))


def test_hires_and_settings(api: webuiapi.WebUIApi, pipe: nativesd.Pipeline) -> None:
    prompt = "a (strawberry:1.3) on a yellow background"
    made = api.txt2img(
        **{**HERE, "prompt": prompt}, enable_hr=True, hr_scale=1.5, hr_upscaler="Lanczos", denoising_strength=0.6,
        hr_second_pass_steps=2,
        override_settings={"CLIP_stop_at_last_layers": 2, "randn_source": "NV", "emphasis": "No norm"},
    )  # fmt: skip
    hires = nativesd.Hires(1.5, 0.6, 2, "lanczos")
    same(made.image, pipe(prompt, **OURS, hires=hires, clip_skip=2, noise="cuda", emphasis="no norm"))
    assert made.image.size == (96, 96)
    comfy = api.txt2img(**HERE, batch_size=2, override_settings={"randn_source": "ComfyUI"})
    wanted = pipe(PROMPT, **OURS, noise="comfyui", num_images=2)
    for number, found in enumerate(comfy.images):
        same(found, wanted, number)
    assert "RNG: ComfyUI" in comfy.info["infotexts"][0]


@pytest.mark.parametrize(
    ("first", "second", "schedule"),
    [
        ({"sampler_name": "DPM++ 2M", "scheduler": "Exponential"}, {"hr_sampler_name": "Euler"}, "exponential"),
        ({"sampler_name": "DPM++ 2M Karras"}, {"hr_sampler_name": "Euler", "hr_scheduler": "Use same scheduler"}, None),
        ({"sampler_name": "DPM++ 2M"}, {"hr_sampler_name": "Euler", "hr_scheduler": "Use same scheduler"}, "normal"),
        ({"sampler_name": "Euler"}, {"hr_sampler_name": "DPM++ 2M"}, "karras"),
        ({"sampler_name": "Euler", "scheduler": "Karras"}, {"hr_scheduler": "Automatic"}, "normal"),
        ({"sampler_name": "Euler"}, {"hr_sampler_name": "DPM++ 2M Karras", "hr_scheduler": "Automatic"}, None),
        ({"sampler_name": "Euler", "scheduler": "Karras"}, {}, None),
    ],
)
def test_the_schedule_of_a_second_pass(first: dict[str, Any], second: dict[str, Any], schedule: str | None) -> None:
    """As modules/processing.py and modules/sd_samplers_kdiffusion.py of A1111 choose it; None: the library does."""
    assert _hires({**first, **second}, "latent").schedule == schedule


def test_variations(api: webuiapi.WebUIApi, pipe: nativesd.Pipeline) -> None:
    made = api.txt2img(**HERE, subseed=20, subseed_strength=0.3, seed_resize_from_w=48, seed_resize_from_h=48, n_iter=2,
                       override_settings={"eta_noise_seed_delta": 31337})  # fmt: skip
    for index, image in enumerate(made.images):
        same(image, pipe(PROMPT, **OURS, variation=nativesd.Variation(20 + index, 0.3, (48, 48), 31337)))
    assert (made.info["all_seeds"], made.info["all_subseeds"], made.info["subseed_strength"]) == ([7, 7], [20, 21], 0.3)
    assert made.info["notes"] == []


def test_img2img(api: webuiapi.WebUIApi, pipe: nativesd.Pipeline, picture: Image.Image) -> None:
    made = api.img2img(images=[picture.resize((80, 64))], **HERE, denoising_strength=0.5, resize_mode=1)
    wanted = pipe(PROMPT, **OURS, image=picture.resize((80, 64)), width=64, height=64, resize="crop", strength=0.5,
                  steps_as="a1111")  # fmt: skip
    same(made.image, wanted)
    assert made.json["parameters"]["init_images"] is None


@pytest.mark.parametrize(("number", "fill"), [(0, "fill"), (1, "original"), (2, "noise"), (3, "nothing")])
def test_inpainting(
    api: webuiapi.WebUIApi, pipe: nativesd.Pipeline, picture: Image.Image, mask: Image.Image, number: int, fill: Any
) -> None:
    large, large_mask = picture.resize((160, 128)), mask.resize((160, 128))
    made = api.img2img(
        images=[large], mask_image=ImageOps.invert(large_mask), inpainting_mask_invert=1, inpainting_fill=number,
        inpaint_full_res_padding=8, **HERE,
    )  # fmt: skip
    wanted = pipe(
        PROMPT, **OURS, image=large, mask=large_mask, mask_fill=fill, only_masked=8, width=64, height=64,
        strength=0.75, steps_as="a1111",
    )  # fmt: skip
    same(made.image, wanted)
    assert made.image.size == (160, 128)
    if number == 1:
        unit = webuiapi.ControlNetUnit(image=large, module="none", model="tiny")
        steered = api.img2img(images=[large], mask_image=large_mask, inpainting_fill=1, inpaint_full_res_padding=8,
                              controlnet_units=[unit], **HERE)  # fmt: skip
        same(steered.image, pipe(
            PROMPT, **OURS, image=large, mask=large_mask, only_masked=8, width=64, height=64, strength=0.75,
            steps_as="a1111", control=nativesd.Control("tiny", large),
        ))  # fmt: skip
    whole = api.img2img(images=[large], mask_image=large_mask, inpaint_full_res=False, inpainting_fill=1, **HERE)
    assert whole.image.size == (64, 64)


def test_controlnet(api: webuiapi.WebUIApi, pipe: nativesd.Pipeline, picture: Image.Image) -> None:
    assert api.controlnet_model_list() == ["tiny"]
    assert api.controlnet_module_list() == ["none", "canny"]
    assert api.controlnet_version() >= 2
    edges = nativesd.canny(picture, 50, 120)
    detected = api.controlnet_detect([picture], module="canny", threshold_a=50, threshold_b=120).image
    np.testing.assert_array_equal(pixels(detected), pixels(edges))
    unit = webuiapi.ControlNetUnit(
        image=picture, module="canny", model="tiny", weight=0.8, guidance_end=0.7, threshold_a=50, threshold_b=120,
        control_mode=2,
    )  # fmt: skip
    made = api.txt2img(**HERE, controlnet_units=[unit])
    control = nativesd.Control("tiny", edges, scale=0.8, end=0.7)
    same(made.image, pipe(PROMPT, **OURS, control=control, guess_mode=True))
    same(api.txt2img(**HERE).image, pipe(PROMPT, **OURS))  # webuiapi would repeat the unit, were it not told of it


def test_what_of_a_unit_is_not_heeded_is_named(server: Running, picture: Image.Image) -> None:
    unit = {"model": "tiny", "image": encoded(picture), "module": "canny", "pixel_perfect": True, "processor_res": 768,
            "hr_option": "Low res only", "mask": encoded(picture)}  # fmt: skip
    made = server.post("/sdapi/v1/txt2img", {**HERE, "alwayson_scripts": {"controlnet": {"args": [unit]}}}).json()
    notes = " ".join(json.loads(made["info"])["notes"])
    for name in ("pixel_perfect", "processor_res", "hr_option", "mask"):
        assert f".{name} " in notes
    usual = {**unit, "pixel_perfect": False, "processor_res": 512, "hr_option": "Both", "mask": None}
    made = server.post("/sdapi/v1/txt2img", {**HERE, "alwayson_scripts": {"controlnet": {"args": [usual]}}}).json()
    assert json.loads(made["info"])["notes"] == []


def test_a_sentence_that_is_about_no_field() -> None:
    assert field_of("nothing is left of the mask at 8 pixels per latent cell") is None
    assert field_of("there is no such thing") is None
    assert field_of("mask is no picture") == "mask"


def test_loras_in_prompts(api: webuiapi.WebUIApi, pipe: nativesd.Pipeline, lora_dir: Any) -> None:
    assert [each["name"] for each in api.get_loras()] == ["style"]
    made = api.txt2img(**{**HERE, "prompt": f"{PROMPT} <lora:style:0.8>"})
    same(made.image, pipe(PROMPT, **OURS, loras=(lora_dir / "style.safetensors", 0.8)))


def test_noise_on_the_way_and_tiling(api: webuiapi.WebUIApi, pipe: nativesd.Pipeline) -> None:
    noisy = {**HERE, "sampler_name": "Euler", "tiling": True, "s_churn": 2.0, "s_noise": 1.01}
    sampling = nativesd.Sampling(churn=2.0, noise=1.01)
    same(api.txt2img(**noisy).image, pipe(PROMPT, **{**OURS, "sampler": "Euler"}, tiling="xy", sampling=sampling))


def test_what_is_not_heeded_is_named(server: Running) -> None:
    odd = {"s_min_uncond": 1.0, "styles": ["x"], "refiner_checkpoint": "None",
           "override_settings": {"sd_vae": "other"}, "s_churn": 0.0, "subseed_new": 1}  # fmt: skip
    made = server.post("/sdapi/v1/txt2img", {**HERE, **odd}).json()
    notes = json.loads(made["info"])["notes"]
    for name in ("s_min_uncond", "styles", "override_settings.sd_vae", "subseed_new"):
        assert f"{name} is not used" in notes
    assert len(notes) == 4


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("txt2img", {"sampler_name": "none such"}, 404, "Sampler not found"),
        ("txt2img", {"steps": "many"}, 422, "steps"),
        ("txt2img", {"steps": 1000}, 422, "steps"),
        ("txt2img", {"batch_size": 100}, 422, "batch_size"),
        ("txt2img", {"width": -1}, 422, "width"),
        ("txt2img", {"cfg_scale": "NaN"}, 422, "cfg_scale"),
        ("txt2img", {"script_name": "xyz"}, 422, "xyz"),
        ("txt2img", {"alwayson_scripts": {"roop": {"args": [1]}}}, 422, "roop"),
        ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [True]}}}, 422, "ADetailer"),
        ("txt2img", {"alwayson_scripts": {"soft inpainting": {"args": ["yes"]}}}, 422, "enabled"),
        ("txt2img", {"alwayson_scripts": {"soft inpainting": {"args": [{"Bias": 1}]}}}, 422, "Bias"),
        ("txt2img", {"alwayson_scripts": {"soft inpainting": {"args": [True] * 8}}}, 422, "at most 7"),
        ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"model": "tiny"}]}}}, 422, "image"),
        ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"model": "x", "image": "aa"}]}}}, 422, "image"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "/etc/passwd"}}, 422, "model"),
        ("txt2img", {"override_settings": {"randn_source": "TPU"}}, 422, "CPU, GPU, NV or ComfyUI"),
        ("txt2img", {"override_settings": {"randn_source": 5}}, 422, "randn_source"),
        ("options", {"randn_source": "TPU"}, 422, "CPU, GPU, NV or ComfyUI"),
        ("options", {"randn_source": ["NV"]}, 422, "randn_source"),
        ("txt2img", {"prompt": "a <lora:none:1>"}, 422, "none"),
        ("txt2img", {"refiner_checkpoint": "x"}, 422, "model"),
        ("img2img", {}, 404, "Init image"),
        ("img2img", {"init_images": ["https://example.org/x.png"]}, 422, "init_images"),
        ("img2img", {"init_images": ["file:///etc/passwd"]}, 422, "init_images"),
        ("png-info", {"image": "/etc/passwd"}, 422, "image"),
        ("png-info", {}, 422, "image"),
        ("extra-single-image", {"image": "AAAA"}, 422, "image"),
        ("options", {"sd_model_checkpoint": "other"}, 422, "other"),
        ("options", {"CLIP_stop_at_last_layers": 99}, 422, "CLIP_stop"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be(server: Running, path: str, body: dict[str, Any], status: int, says: str) -> None:
    answer = server.post(f"/sdapi/v1/{path}", body)
    assert answer.status_code == status, answer.text
    assert says in json.dumps(answer.json()["detail"])


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ({"args": [True]}, {}),
        ({"args": [True, 2, 0.25, None, 0.5]},
         {"mask_blend_power": 2, "mask_blend_scale": 0.25, "composite_mask_influence": 0.5}),
        ({"args": [{"Soft inpainting": True, "Schedule bias": 2, "Difference contrast": 3}]},
         {"mask_blend_power": 2, "composite_difference_contrast": 3}),
        ({"args": {"Soft inpainting mask influence": 1, "mask_blend_scale": 4}},
         {"composite_mask_influence": 1, "mask_blend_scale": 4}),
        ({"args": [False, 2]}, None),
        ({"args": [{"Soft inpainting": False, "Schedule bias": 2}]}, None),
    ],
)  # fmt: skip
def test_soft_inpainting(
    api: webuiapi.WebUIApi, pipe: nativesd.Pipeline, picture: Image.Image, mask: Image.Image, script: Any, settings: Any
) -> None:
    made = api.img2img(
        images=[picture], mask_image=mask, inpaint_full_res=False, inpainting_fill=1, mask_blur=8,
        alwayson_scripts={"Soft Inpainting": script}, **HERE,
    )  # fmt: skip
    soft = None if settings is None else nativesd.SoftInpaint(**settings)
    wanted = pipe(PROMPT, **OURS, image=picture, mask=mask, mask_blur=8, strength=0.75, steps_as="a1111",
                  width=64, height=64, soft_inpaint=soft)  # fmt: skip
    same(made.image, wanted)
    assert ("Soft inpainting enabled: True" in made.info["infotexts"][0]) == (soft is not None)


def test_soft_inpainting_without_a_mask_is_named(server: Running) -> None:
    body = {**HERE, "alwayson_scripts": {"soft inpainting": {"args": [True]}}}
    notes = json.loads(server.post("/sdapi/v1/txt2img", body).json()["info"])["notes"]
    assert "alwayson_scripts.soft inpainting (it is for a mask)" in " ".join(notes)


def test_switched_off_scripts_are_accepted(api: webuiapi.WebUIApi) -> None:
    scripts = {"ADetailer": {"args": [False]}, "animatediff": {"args": [False]}, "ControlNet": {"args": []}}
    assert api.txt2img(**HERE, alwayson_scripts=scripts).image


def test_the_lists(api: webuiapi.WebUIApi, server: Running) -> None:
    assert "Euler a" in api.util_get_sampler_names()
    assert "karras" in api.util_get_scheduler_names()
    assert api.util_get_model_names() == ["tiny"]
    assert api.util_get_current_model() == "tiny"
    assert {"None", "Lanczos"} <= {each["name"] for each in api.get_upscalers()}
    assert api.get_embeddings()["loaded"] == {}
    assert api.get_hypernetworks() == []
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_scripts()["txt2img"] == ["controlnet", "controlnet m2m"]
    assert api.get_scripts()["img2img"] == ["controlnet", "soft inpainting", "controlnet m2m"]
    for name in ("cmd-flags", "sd-vae", "script-info", "latent-upscale-modes", "server-info", "face-restorers"):
        assert server.get(f"/sdapi/v1/{name}").status_code == 200
    for name in ("checkpoints", "loras", "vae", "embeddings"):
        assert server.post(f"/sdapi/v1/refresh-{name}").json() == {}


def test_options_as_a_whole(api: webuiapi.WebUIApi) -> None:
    options = api.get_options()
    assert api.set_options(options) == {}
    api.set_options({"CLIP_stop_at_last_layers": 2})
    assert api.get_options()["CLIP_stop_at_last_layers"] == 2
    api.set_options({"CLIP_stop_at_last_layers": 1})
    api.util_set_model("tiny")


def test_png_info_and_extras(api: webuiapi.WebUIApi) -> None:
    made = api.txt2img(**HERE)
    info = api.png_info(made.image)
    assert info.info == made.info["infotexts"][0]
    assert info.parameters["Seed"] == "7"
    assert info.parameters["Prompt"] == PROMPT
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""
    assert api.extra_single_image(made.image, upscaler_1="Lanczos", upscaling_resize=1.5).image.size == (96, 96)
    cropped = api.extra_single_image(made.image, resize_mode=1, upscaling_resize_w=100, upscaling_resize_h=50)
    assert cropped.image.size == (100, 50)
    assert len(api.extra_batch_images([made.image, made.image]).images) == 2


class Asking(threading.Thread):
    """A client that waits for its picture."""

    def __init__(self, server: Running, **body: Any) -> None:
        super().__init__()
        self.server, self.body = server, body
        self.start()

    def run(self) -> None:
        self.answer = self.server.post("/sdapi/v1/txt2img", self.body)

    def done(self) -> dict[str, Any]:
        self.join(60)
        assert self.answer.status_code == 200, self.answer.text
        found: dict[str, Any] = self.answer.json()
        return found


def test_progress_with_previews_and_interrupt(api: webuiapi.WebUIApi, server: Running) -> None:
    asking = Asking(server, **SLOW, force_task_id="task-1")
    until(lambda: api.get_progress()["state"]["sampling_step"] > 1)
    told = until(lambda: told if (told := api.get_progress())["current_image"] else None)
    assert 0 < told["progress"] < 1
    assert told["eta_relative"] > 0
    assert (told["state"]["sampling_steps"], told["state"]["job"], told["state"]["job_count"]) == (150, "task-1", 1)
    assert pixels(told["current_image"]).any()
    named = server.get("/sdapi/v1/progress?force_task_id=task-1&skip_current_image=true").json()
    assert named["progress"] > 0
    assert named["current_image"] is None
    assert server.post("/internal/progress", {"id_task": "task-1"}).json()["active"]
    assert server.post("/sdapi/v1/interrupt?force_task_id=another").json() == {}
    assert api.get_progress()["state"]["interrupted"] is False
    assert api.interrupt() == {}
    made = asking.done()
    assert len(made["images"]) == 1
    assert "interrupted after step" in json.loads(made["info"])["notes"][0]
    assert api.get_progress()["progress"] == 0


def test_skip_ends_one_picture_and_interrupt_touches_no_other(api: webuiapi.WebUIApi, server: Running) -> None:
    asking = Asking(server, **{**SLOW, "steps": 60}, n_iter=2, force_task_id="first")
    other = Asking(server, **HERE, force_task_id="second")
    until(lambda: server.get("/sdapi/v1/progress?force_task_id=first").json()["state"]["sampling_step"] > 1)
    api.skip()
    until(lambda: api.get_progress()["state"]["job_no"] == 1)
    server.post("/sdapi/v1/interrupt", {"id_task": "first"})
    assert len(asking.done()["images"]) == 2
    assert json.loads(other.done()["info"])["notes"] == []


def test_interrupt_does_not_end_jobs_of_other_apis(server: Running) -> None:
    job = server.post("/jobs", {**SLOW, "steps": 20}).json()
    until(lambda: server.get(job["poll_url"]).json()["step"] > 0)
    server.post("/sdapi/v1/interrupt")
    assert server.finished(job["poll_url"])["interrupted"] is False


def test_basic_auth() -> None:
    with serving(users={"anna": "secret"}) as server:
        api = webuiapi.WebUIApi(port=server.port, username="anna", password="secret")
        assert api.util_get_model_names() == ["tiny"]
        with pytest.raises(RuntimeError, match="401"):
            webuiapi.WebUIApi(port=server.port).txt2img(**HERE)


def test_a_client_that_goes_away_ends_its_job(server: Running) -> None:
    from requests import ReadTimeout, post

    with pytest.raises(ReadTimeout):
        post(f"{server.url}/sdapi/v1/txt2img", json={**SLOW, "force_task_id": "gone"}, timeout=0.5)
    until(lambda: not server.context.desk.running, 5)


def test_pictures_as_data_uris_and_gradios_masks(server: Running, picture: Image.Image, mask: Image.Image) -> None:
    strokes = Image.merge("RGBA", (mask, mask, mask, mask))
    body = {**HERE, "init_images": [f"data:image/png;base64,{encoded(picture)}"], "inpaint_full_res": False}
    plain = server.post("/sdapi/v1/img2img", {**body, "mask": encoded(mask)}).json()
    drawn = server.post("/sdapi/v1/img2img", {**body, "mask": base64.b64encode(
        base64.b64decode(encoded(strokes))).decode()}).json()  # fmt: skip
    assert plain["images"] == drawn["images"]


@pytest.mark.parametrize("side", [100_000, 10**30])
def test_hints_are_not_made_larger_than_pictures_may_be(server: Running, picture: Image.Image, side: int) -> None:
    unit = {"model": "tiny", "image": encoded(picture), "module": "canny", "resize_mode": 1}
    body = {"prompt": PROMPT, "width": side, "height": side, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    answer = server.post("/sdapi/v1/txt2img", body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "width"]
