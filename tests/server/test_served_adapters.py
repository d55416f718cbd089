"""IP-Adapters over HTTP, by names of the server: A1111's units, ComfyUI's nodes, jobs and streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import requests
import webuiapi
from PIL import Image

import nativesd
from nativesd import ImagePrompt
from nativesd.errors import UsageError
from nativesd.server.apis.comfy.adapters import ADVANCED, channel, image_prompt, preset_name, square
from nativesd.server.apis.sd.controlnet import _layers
from server.fixtures import BASE, PLUS, PROMPT, Adapters, Running, encoded, file_of, pixels, serving
from server.test_comfy import OURS, link, made, node, same, workflow
from server.test_served_stream import OPTIONS, Pictures, connected, frames, jpeg_pixels


@pytest.fixture(scope="module")
def server(adapters: Adapters) -> Iterator[Running]:
    with serving(control_dirs=(adapters.models,), image_encoder_dirs=(adapters.encoders,)) as running:
        yield running


HERE: dict[str, Any] = {"prompt": PROMPT, "seed": 7, "steps": 2, "width": 64, "height": 64, "cfg_scale": 4}
MINE: dict[str, Any] = {"seed": 7, "steps": 2, "guidance_scale": 4}


def text2img(server: Running, *units: dict[str, Any]) -> requests.Response:
    return server.post("/sdapi/v1/txt2img", {**HERE, "alwayson_scripts": {"controlnet": {"args": list(units)}}})


def test_units_of_a1111(
    server: Running, adapters: Adapters, pipe: nativesd.Pipeline, picture: Image.Image, mask: Image.Image
) -> None:
    """As webuiapi sends one, and two at once by hand: beside a ControlNet, with a region, and weights by layer."""
    api = webuiapi.WebUIApi(port=server.port)
    assert api.controlnet_model_list() == ["tiny", PLUS, BASE]
    assert "ip-adapter_clip_sd15" in api.controlnet_module_list()
    kinds = server.get("/controlnet/control_types").json()["control_types"]
    assert (kinds["IP-Adapter"]["default_model"], kinds["Canny"]["model_list"]) == (PLUS, ["None", "tiny"])
    assert kinds["All"] == {
        "module_list": api.controlnet_module_list(), "model_list": ["None", "tiny", PLUS, BASE],
        "default_option": "none", "default_model": "None",
    }  # fmt: skip
    unit = webuiapi.ControlNetUnit(image=picture, module="ip-adapter_clip_sd15", model=f"{BASE} [6a3f6166]", weight=0.7,
                                   guidance_end=0.6)  # fmt: skip
    found = api.txt2img(**HERE, controlnet_units=[unit])
    prompt = ImagePrompt(adapters.adapter(BASE), picture, 0.7, end=0.6)
    usual = {**MINE, "sampler": "Euler a"}  # which webuiapi says
    wanted = pipe(PROMPT, **usual, image_prompts=prompt, image_encoder=adapters.encoder)
    np.testing.assert_array_equal(pixels(found.image), pixels(wanted.images[0]))
    assert (pixels(found.image) != pixels(pipe(PROMPT, **usual).images[0])).any()

    edges = nativesd.canny(picture)
    units = [
        {"module": "ip-adapter-auto", "model": PLUS, "image": {"image": encoded(picture)}, "hr_option": "Both",
         "effective_region_mask": encoded(mask), "weight": 0.5, "resize_mode": 2, "control_mode": 1},
        {"module": "none", "model": "tiny", "image": encoded(edges)},
    ]  # fmt: skip
    answer = text2img(server, *units).json()
    assert json.loads(answer["info"])["notes"] == []
    wanted = pipe(
        PROMPT, **MINE, image_prompts=ImagePrompt(adapters.adapter(PLUS), picture, 0.5, mask=mask),
        image_encoder=adapters.encoder, control=nativesd.Control("tiny", edges),
    )  # fmt: skip
    np.testing.assert_array_equal(pixels(answer["images"][0]), pixels(wanted.images[0]))


def test_weights_by_layer_come_in_another_order() -> None:
    """args.py: of SD1.x 6 before, 9 behind, then the middle, which is the seventh on the data's way."""
    given = [number / 10 for number in range(16)]
    assert [*_layers("x", given).values()] == [*given[:6], 1.5, *given[6:15]]
    assert [*_layers("x", given[:11]).values()] == [*given[:4], 1.0, *given[4:10]]
    with pytest.raises(UsageError, match=r"16 numbers for SD1\.x, 11 for SDXL, not 2"):
        _layers("x", [1, 2])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"module": "ip-adapter_face_id"}, "module ip-adapter_face_id asks a face recogniser"),
        ({"module": "none"}, "is an IP-Adapter, whose module is ip-adapter-auto, not 'none'"),
        ({"module": "depth"}, "must be one of none, canny, ip-adapter-auto, not 'depth'"),
        ({"model": "tiny"}, "there is no IP-Adapter 'tiny'"),
        ({"model": "../../x"}, "there is no IP-Adapter"),
        ({"image": None}, "image must be a picture in base64"),
        ({"image": "/etc/passwd"}, "is not base64"),
        ({"ipadapter_input": "gASV"}, "is a pickle, which is not opened"),
        ({"advanced_weighting": [1.0] * 3}, "must be 16 numbers"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, "must be before guidance_end"),
        ({"weight": 3}, "weight"),
    ],
)
def test_units_that_cannot_be(server: Running, picture: Image.Image, fields: dict[str, Any], says: str) -> None:
    unit = {"module": "ip-adapter-auto", "model": BASE, "image": encoded(picture)}
    answer = text2img(server, {**unit, **fields})
    assert answer.status_code == 422, answer.text
    assert says in answer.json()["detail"][0]["msg"]


def test_what_of_a_unit_is_not_heeded_is_named(server: Running, picture: Image.Image) -> None:
    several = [{"image": encoded(picture), "mask": encoded(picture)}] * 2
    unit = {"module": "ip-adapter-auto", "model": BASE, "image": several, "mask": encoded(picture), "hr_option": "Low"}
    notes = " ".join(json.loads(text2img(server, unit).json()["info"])["notes"])
    for words in ("2 pictures together, not their mean", ".mask ", "hr_option (taken: Both)"):
        assert words in notes


def test_jobs_and_the_catalogue(
    server: Running, adapters: Adapters, pipe: nativesd.Pipeline, picture: Image.Image
) -> None:
    told = server.get("/catalogue").json()
    assert (told["image_adapters"], told["image_encoders"], told["controls"]) == (
        [PLUS, BASE], ["clip", "other"], ["tiny"]
    )  # fmt: skip
    said = {"adapter": BASE, "picture": [encoded(picture)] * 2, "scale": 0.8, "layers": {"0": 1, "2": 0.5}}
    body = {"prompt": PROMPT, **MINE, "image_prompts": [said], "image_encoder": "clip"}
    job = server.finished(server.post("/jobs", body).json()["poll_url"])
    prompt = ImagePrompt(adapters.adapter(BASE), [picture, picture], 0.8, layers={0: 1.0, 2: 0.5})
    wanted = pipe(PROMPT, **MINE, image_prompts=prompt, image_encoder=adapters.encoder)
    np.testing.assert_array_equal(pixels(server.get(job["pictures"][0]["url"]).content), pixels(wanted.images[0]))
    job = server.finished(server.post("/jobs", {**body, "image_encoder": "other"}).json()["poll_url"])
    assert "takes an embedding 40 wide" in job["error"]["message"]
    assert "gives an embedding 56 wide" in job["error"]["message"]
    for change, words in (
        ({"image_encoder": "/etc"}, "there is no image encoder"),
        ({"image_prompts": [{"adapter": str(adapters.adapter(BASE)), "picture": encoded(picture)}]}, "no IP-Adapter"),
        ({"image_prompts": [{"adapter": "org/name/x.bin", "picture": encoded(picture)}]}, "no IP-Adapter"),
        ({"image_prompts": [{"adapter": BASE, "picture": "told.safetensors"}]}, "is not base64"),
        ({"image_prompts": [{"adapter": BASE, "picture": encoded(picture), "mask": "m.png"}]}, "is not base64"),
        ({"image_prompts": {"adapter": BASE}}, "image_prompts must be a list"),
        ({"image_prompts": [{"adapter": BASE, "strength": 1}]}, "has no field 'strength'"),
        ({"image_prompts": [{"adapter": BASE, "picture": encoded(picture), "scale": "x"}]}, "scale of image_prompts"),
        ({"image_prompts": [{"adapter": BASE}]}, f"image_prompts: {BASE} is prompted by a picture"),
    ):  # fmt: skip
        answer = server.post("/jobs", body | change)
        assert answer.status_code == 422, answer.text
        assert words in answer.text


@pytest.fixture
def uploaded(server: Running, picture: Image.Image, mask: Image.Image) -> dict[str, str]:
    names = {}
    for name, image in (("seen", picture), ("region", mask)):
        sent = {"image": (f"{name}.png", file_of(image))}
        names[name] = requests.post(f"{server.url}/api/upload/image", files=sent, timeout=60).json()["name"]
    return names


def test_nodes_of_comfyui(
    server: Running, adapters: Adapters, pipe: nativesd.Pipeline, picture: Image.Image, mask: Image.Image,
    uploaded: dict[str, str],
) -> None:  # fmt: skip
    graph = workflow(steps=2)
    graph |= {
        "20": node("LoadImage", image=uploaded["seen"]),
        "21": node("LoadImageMask", image=uploaded["region"], channel="red"),
        "22": node("IPAdapterUnifiedLoader", model=link(4), preset="STANDARD (medium strength)"),
        "23": node("IPAdapterAdvanced", model=link(22), ipadapter=link(22, 1), image=link(20), weight=0.7,
                   weight_type="weak input", combine_embeds="average", start_at=0.0, end_at=0.8,
                   embeds_scaling="V only", attn_mask=link(21)),
        "24": node("IPAdapterModelLoader", ipadapter_file=f"{PLUS}.safetensors"),
        "25": node("PrepImageForClipVision", image=link(20), interpolation="LANCZOS", crop_position="top",
                   sharpening=0.0),
        "26": node("IPAdapter", model=link(23), ipadapter=link(24), image=link(25), weight=0.4, start_at=0.0,
                   end_at=1.0, weight_type="prompt is more important"),
    }  # fmt: skip
    graph["3"]["inputs"]["model"] = link(26)
    (found,) = made(server, graph)
    first = ImagePrompt(adapters.adapter(BASE), picture, 0.7, end=0.8, mask=mask, weight_type="weak input")
    cut = square(picture, "top", "LANCZOS")
    assert cut.size == (224, 224)
    second = ImagePrompt(adapters.adapter(PLUS), cut, 0.4, weight_type="ease out")
    options = {**OURS, "steps": 2, "width": 48, "height": 80}
    same(found, pipe(PROMPT, **options, image_prompts=[first, second], image_encoder=adapters.encoder))

    graph["27"] = node("CLIPVisionLoader", clip_name="clip")
    graph["3"]["inputs"]["model"] = link(23)
    graph["23"]["inputs"] |= {"clip_vision": link(27)}
    (found,) = made(server, graph)
    same(found, pipe(PROMPT, **options, image_prompts=first, image_encoder=adapters.encoder))
    assert server.get("/models/ipadapter").json() == [PLUS, BASE]
    assert server.get("/models/clip_vision").json() == ["clip", "other"]


def test_nodes_that_cannot_be(server: Running, uploaded: dict[str, str]) -> None:
    graph = workflow(steps=1)
    graph["20"] = node("LoadImage", image=uploaded["seen"])
    graph["24"] = node("IPAdapterModelLoader", ipadapter_file=BASE)
    inputs = {"model": link(4), "ipadapter": link(24), "image": link(20), "weight": 1.0, "weight_type": "linear",
              "combine_embeds": "concat", "start_at": 0.0, "end_at": 1.0, "embeds_scaling": "V only"}  # fmt: skip
    graph["3"]["inputs"]["model"] = link(23)
    for change, words in (
        ({"embeds_scaling": "K+V"}, "not in ['V only']"),
        ({"weight_type": "style transfer precise"}, "not in ['linear'"),
        ({"image_negative": link(20)}, "image_negative is not heeded here"),
        ({"ipadapter": link(4)}, "received_type(MODEL) mismatch input_type(IPADAPTER)"),
        ({"weight": 6}, "bigger than max of 5"),
    ):  # fmt: skip
        answer = server.post("/prompt", {"prompt": {**graph, "23": node("IPAdapterAdvanced", **(inputs | change))}})
        assert answer.status_code == 400, answer.text
        assert words in answer.text
    for kind in ("IPAdapterFaceID", "IPAdapterUnifiedLoaderFaceID"):
        answer = server.post("/prompt", {"prompt": {**graph, "23": node(kind)}})
        assert f"Node {kind} is not here" in answer.text


def test_presets_stand_for_published_names() -> None:
    names = ["ip-adapter_sd15", "ip-adapter-plus_sd15", "ip_adapter_plus_sdxl_vit_h", "ip-adapter_sd15_vit-G"]
    assert preset_name("PLUS (high strength)", names, sdxl=False) == "ip-adapter-plus_sd15"
    assert preset_name("PLUS (high strength)", names, sdxl=True) == "ip_adapter_plus_sdxl_vit_h"
    assert preset_name("VIT-G (medium strength)", names, sdxl=False) == "ip-adapter_sd15_vit-G"
    with pytest.raises(UsageError, match="stands for ip-adapter_sdxl_vit-h, which is not here: there is ip-adapter_"):
        preset_name("STANDARD (medium strength)", names, sdxl=True)
    with pytest.raises(UsageError, match="has no adapter for SDXL"):
        preset_name("FULL FACE - SD1.5 only (portraits stronger)", names, sdxl=True)
    with pytest.raises(UsageError, match="weight must be 1 with the weight type 'style and composition'"):
        image_prompt("x", [Image.new("RGB", (8, 8))], 0.5, 0, 1, ADVANCED["style and composition"], None)
    with pytest.raises(UsageError, match="start_at must be at most end_at"):
        image_prompt("x", [Image.new("RGB", (8, 8))], 1, 0.5, 0, ADVANCED["linear"], None)


def test_squares_and_channels() -> None:
    wide = Image.new("RGB", (20, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    assert square(wide, "left", "NEAREST").getpixel((223, 100)) == (255, 0, 0)
    assert square(wide, "right", "NEAREST").getpixel((0, 100)) == (0, 0, 255)
    padded = square(wide, "pad", "NEAREST")
    assert [padded.getpixel((10, y)) for y in (0, 112, 223)] == [(0, 0, 0), (255, 0, 0), (0, 0, 0)]
    assert channel(wide, "blue").getpixel((15, 5)) == 255
    assert channel(wide, "alpha").getextrema() == (0, 0)
    hole = Image.new("RGBA", (2, 1), (9, 9, 9, 255))
    hole.putpixel((0, 0), (9, 9, 9, 0))
    assert [channel(hole, "alpha").getpixel((x, 0)) for x in (0, 1)] == [255, 0]


def test_a_stream_is_shown_pictures(
    server: Running, adapters: Adapters, pipe: nativesd.Pipeline, picture: Image.Image
) -> None:
    """From its first frame on, and another scale on the way."""
    said = {"adapter": BASE, "picture": encoded(picture), "scale": 0.9}
    ours = [ImagePrompt(adapters.adapter(BASE), picture, scale) for scale in (0.9, 0.2)]
    stream = pipe.stream(loras=["tiny-lcm"], image_prompts=ours[0], image_encoder=adapters.encoder, **OPTIONS)
    with connected(server) as client:
        shown = Pictures(client)
        for number, file in enumerate(frames(4)):
            if number == 2:
                stream.update(image_prompts=ours[1])
            wanted = stream(Image.open(BytesIO(file)))
            client.send({**OPTIONS, "image_prompts": [{**said, "scale": 0.2 if number >= 2 else 0.9}]}, file)
            if wanted is not None:
                np.testing.assert_array_equal(pixels(shown.next()), jpeg_pixels(wanted))
            client.until_asked()
    with connected(server) as client:
        reader = Pictures(client)  # without one no frame is taken
        client.send({**OPTIONS, "image_prompts": [said], "image_encoder": "/etc"}, frames(1)[0])
        assert "there is no image encoder" in client.ended()
        reader.answer.close()
