"""Models that enlarge pictures, by name, in all APIs."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import nativesd
from server.fixtures import PROMPT, Running, encoded, pixels, serving
from server.test_comfy import link, made, node, workflow
from upscalers import esrgan, spandrel_alone

OURS = {"seed": 7, "steps": 2, "width": 48, "height": 48}
HERE = {"prompt": PROMPT, **OURS, "sampler_name": "Euler a", "scheduler": "normal", "cfg_scale": 4}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with spandrel_alone():
        path = tmp_path_factory.mktemp("upscalers") / "2x-Small.safetensors"
        save_file(esrgan(), path)
        yield path


@pytest.fixture(scope="module")
def upscaling(file: Path) -> Iterator[Running]:
    with serving(models={"tiny": "tiny"}, upscaler_dirs=(file.parent,)) as running:
        yield running


def opened(data: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(data)))


def test_hires_of_a1111(upscaling: Running, pipe: nativesd.Pipeline, file: Path) -> None:
    listed = upscaling.get("/sdapi/v1/upscalers").json()
    assert {"Lanczos", "2x-Small"} <= {each["name"] for each in listed}
    body = {**HERE, "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "2x-small", "denoising_strength": 0.5}
    answer = upscaling.post("/sdapi/v1/txt2img", body)
    assert answer.status_code == 200, answer.text
    hires = nativesd.Hires(1.5, 0.5, upscaler=str(file))
    wanted = pipe(PROMPT, **OURS, sampler="Euler a", schedule="normal", guidance_scale=4, hires=hires).images[0]  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.asarray(opened(answer.json()["images"][0])), np.asarray(wanted))
    assert "Hires upscaler: 2x-Small" in answer.json()["info"]
    answer = upscaling.post("/sdapi/v1/txt2img", {**body, "hr_upscaler": "2x-Smal"})
    assert answer.status_code == 422
    assert "there is no upscaler '2x-Smal': did you mean 2x-Small?" in answer.text


def test_extras_of_a1111(upscaling: Running, picture: Image.Image, file: Path) -> None:
    model = nativesd.load_upscaler(file, device="cpu")
    for scale, times in ((2, 1), (3, 2)):
        body = {"image": encoded(picture), "upscaler_1": "2x-Small", "upscaling_resize": scale}
        answer = upscaling.post("/sdapi/v1/extra-single-image", body)
        assert answer.status_code == 200, answer.text
        larger = picture.convert("RGB")
        for _ in range(times):
            larger = model(larger)
        wanted = larger.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(opened(answer.json()["image"])), np.asarray(wanted))
    body = {"imageList": [{"data": encoded(picture), "name": "a"}] * 2, "upscaler_1": "2x-Small"}
    assert len(upscaling.post("/sdapi/v1/extra-batch-images", body).json()["images"]) == 2
    body = {"image": encoded(Image.new("RGB", (5000, 10))), "upscaler_1": "2x-Small", "upscaling_resize": 1}
    answer = upscaling.post("/sdapi/v1/extra-single-image", body)
    assert answer.status_code == 422
    assert "image must have at most 4096 pixels a side for 2x-Small" in answer.text


def test_a_graph_with_a_model(upscaling: Running, pipe: nativesd.Pipeline, file: Path) -> None:
    graph = workflow()
    graph["20"] = node("UpscaleModelLoader", model_name="2x-Small.safetensors")
    graph["21"] = node("ImageUpscaleWithModel", upscale_model=link(20), image=link(8))
    graph["9"]["inputs"]["images"] = link(21)
    (found,) = made(upscaling, graph)
    plain = pipe(
        PROMPT, seed=7, steps=3, guidance_scale=4, sampler="euler", schedule="normal", negative_prompt="green",
        width=48, height=80,
    ).images[0]  # fmt: skip
    np.testing.assert_array_equal(pixels(found), np.asarray(nativesd.load_upscaler(file, device="cpu")(plain)))


def test_our_own_api(upscaling: Running, file: Path) -> None:
    body = {"prompt": PROMPT, **OURS, "hires": {"scale": 1.5, "upscaler": "2x-Small", "strength": 0.5}}
    answer = upscaling.post("/jobs", body)
    assert answer.status_code == 202, answer.text
    for path in (str(file), "../2x-Small", "/etc/passwd"):
        answer = upscaling.post("/jobs", {**body, "hires": {"upscaler": path}})
        assert answer.status_code in (400, 422), path
        assert "there is no upscaler" in answer.text
