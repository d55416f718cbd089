"""ComfyUI's API by its documented exchange over websocket-client, and by comfy-api-simplified."""

from __future__ import annotations

import copy
import json
import struct
import uuid
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import websocket
from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper
from PIL import Image

import nativesd
from nativesd.pictures.images import read_image
from server.fixtures import PROMPT, Running, file_of, pixels, until


def link(node: int, slot: int = 0) -> list[Any]:
    return [str(node), slot]


def node(kind: str, title: str = "", **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}


def workflow(**sampling: Any) -> dict[str, Any]:
    """The seven classes of ComfyUI's example."""
    options = {"seed": 7, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        "3": node("KSampler", model=link(4), positive=link(6), negative=link(7), latent_image=link(5),
                  **{**options, **sampling}),
        "4": node("CheckpointLoaderSimple", ckpt_name="tiny"),
        "5": node("EmptyLatentImage", width=48, height=80, batch_size=1),
        "6": node("CLIPTextEncode", "Positive", text=PROMPT, clip=link(4, 1)),
        "7": node("CLIPTextEncode", "Negative", text="green", clip=link(4, 1)),
        "8": node("VAEDecode", samples=link(3), vae=link(4, 2)),
        "9": node("SaveImage", "Save", images=link(8), filename_prefix="test"),
    }  # fmt: skip


OURS: dict[str, Any] = {"seed": 7, "steps": 3, "guidance_scale": 4, "sampler": "euler", "schedule": "normal",
                        "negative_prompt": "green"}  # fmt: skip


def made(server: Running, graph: dict[str, Any]) -> list[bytes]:
    """What a graph's outputs are."""
    answer = server.post("/prompt", {"prompt": graph})
    assert answer.status_code == 200, answer.text
    name = answer.json()["prompt_id"]
    told = until(lambda: server.get(f"/history/{name}").json().get(name))
    assert told["status"]["status_str"] == "success", told
    images = [image for output in told["outputs"].values() for image in output["images"]]
    return [server.get("/view", params=image).content for image in images]


def same(found: bytes, wanted: nativesd.Result, index: int = 0) -> None:
    np.testing.assert_array_equal(pixels(found), pixels(wanted.images[index]))


def test_the_documented_exchange(server: Running, pipe: nativesd.Pipeline) -> None:
    client = uuid.uuid4().hex
    socket = websocket.WebSocket()
    socket.connect(f"ws://127.0.0.1:{server.port}/ws?clientId={client}", timeout=30)
    first = json.loads(socket.recv())
    assert first["type"] == "status"
    assert first["data"]["sid"] == client
    answer = server.post("/prompt", {"prompt": workflow(steps=8), "client_id": client}).json()
    kinds, previews = [], []
    while True:
        message = socket.recv()
        if isinstance(message, bytes):
            previews.append(message)
            continue
        told = json.loads(message)
        kinds.append(told["type"])
        if told["type"] == "progress":
            assert told["data"]["max"] == 8
        if told["type"] == "executing" and told["data"]["node"] is None:
            assert told["data"]["prompt_id"] == answer["prompt_id"]
            break
    socket.close()
    assert {"status", "execution_start", "executing", "progress", "executed", "execution_success"} <= set(kinds)
    assert struct.unpack(">II", previews[0][:8]) == (1, 1)
    assert Image.open(BytesIO(previews[0][8:])).format == "JPEG"
    history = server.get(f"/history/{answer['prompt_id']}").json()[answer["prompt_id"]]
    (image,) = history["outputs"]["9"]["images"]
    assert image == {"filename": "test_00001_.png", "subfolder": "", "type": "output"}
    found = server.get("/view", params=image)
    assert found.headers["Content-Type"] == "image/png"
    same(found.content, pipe(PROMPT, **{**OURS, "steps": 8}, width=48, height=80))


def test_the_picture_repeats_itself(server: Running, tmp_path: Path) -> None:
    (found,) = made(server, workflow())
    (tmp_path / "made.png").write_bytes(found)
    options, _ = nativesd.options_from(tmp_path / "made.png")
    assert (options["prompt"], options["seed"], options["sampler"]) == (PROMPT, 7, "Euler")
    with Image.open(tmp_path / "made.png") as image:
        assert json.loads(image.info["prompt"])["3"]["inputs"]["seed"] == 7


def test_comfy_api_simplified(server: Running, pipe: nativesd.Pipeline, picture: Image.Image, tmp_path: Path) -> None:
    api = ComfyApiWrapper(server.url)
    file = tmp_path / "begin.png"
    picture.save(file)
    uploaded = api.upload_image(file)
    graph = workflow(denoise=0.6)
    graph["10"] = node("LoadImage", "Load", image=f"{uploaded['subfolder']}/{uploaded['name']}")
    graph["5"] = node("VAEEncode", pixels=link(10), vae=link(4, 2))
    wrapped = ComfyWorkflowWrapper(graph)
    wrapped.set_node_param("Positive", "text", "a fox on a green background")
    found = api.queue_and_wait_images(wrapped, "Save")
    (data,) = found.values()
    wanted = pipe("a fox on a green background", **OURS, image=picture, strength=0.6, steps_as="all", noise="comfyui")
    same(data, wanted)
    assert {"KSampler", "LatentUpscale"} <= api.get_object_info().keys()
    assert api.get_system_stats()["devices"][0]["name"] == "cpu"
    assert api.get_embeddings() == []
    assert api.get_queue() == {"queue_running": [], "queue_pending": []}
    api.interrupt()


def test_loras_controls_and_a_second_pass(
    server: Running, pipe: nativesd.Pipeline, picture: Image.Image, lora_dir: Path
) -> None:
    answer = requests.post(
        f"{server.url}/api/upload/image", files={"image": ("edges.png", file_of(nativesd.canny(picture)))}, timeout=60
    )
    graph = workflow()
    graph["20"] = node("LoraLoader", model=link(4), clip=link(4, 1), lora_name="style.safetensors", strength_model=0.8,
                       strength_clip=0.5)  # fmt: skip
    graph["21"] = node("ControlNetLoader", control_net_name="tiny")
    graph["22"] = node("LoadImage", image=answer.json()["name"])
    graph["23"] = node("ControlNetApplyAdvanced", positive=link(6), negative=link(7), control_net=link(21),
                       image=link(22), strength=0.9, start_percent=0.0, end_percent=0.8)  # fmt: skip
    for text in ("6", "7"):
        graph[text]["inputs"]["clip"] = link(20, 1)
    graph["3"]["inputs"] |= {"model": link(20), "positive": link(23), "negative": link(23, 1)}
    (found,) = made(server, graph)
    control = nativesd.Control("tiny", nativesd.canny(picture), 0.9, 0.0, 0.8)
    loras = (lora_dir / "style.safetensors", 0.8, 0.5)
    same(found, pipe(PROMPT, **OURS, width=48, height=80, control=control, loras=loras))

    graph = workflow()
    graph["30"] = node(
        "LatentUpscale", samples=link(3), upscale_method="bilinear", width=72, height=120, crop="disabled"
    )
    graph["31"] = copy.deepcopy(graph["3"])
    graph["31"]["inputs"] |= {"latent_image": link(30), "denoise": 0.5}
    graph["8"]["inputs"]["samples"] = link(31)
    (found,) = made(server, graph)
    hires = nativesd.Hires(1.5, 0.5, upscaler="latent")
    same(found, pipe(PROMPT, **OURS, width=48, height=80, hires=hires))


def test_prompts_weigh_as_in_comfyui(server: Running, pipe: nativesd.Pipeline) -> None:
    prompt = "a (strawberry:1.4) on [a] yellow background"
    graph = workflow()
    graph["6"]["inputs"]["text"] = prompt
    (found,) = made(server, graph)
    same(found, pipe(prompt, **OURS, width=48, height=80, emphasis="comfyui"))


def test_sizes_layers_and_a_lora_of_the_unet(server: Running, pipe: nativesd.Pipeline, lora_dir: Path) -> None:
    graph = workflow()
    graph["20"] = node("LoraLoaderModelOnly", model=link(4), lora_name="style.safetensors", strength_model=0.8)
    graph["21"] = node("CLIPSetLastLayer", clip=link(4, 1), stop_at_clip_layer=-2)
    graph["3"]["inputs"]["model"] = link(20)
    for text in ("6", "7"):
        graph[text]["inputs"]["clip"] = link(21)
    (found,) = made(server, graph)
    wanted = pipe(PROMPT, **OURS, width=48, height=80, loras=(lora_dir / "style.safetensors", 0.8, 0.0), clip_skip=2)
    same(found, wanted)

    plain = pipe(PROMPT, **OURS, width=48, height=80).images[0]
    for method, filter_ in (("lanczos", Image.Resampling.LANCZOS), ("nearest-exact", Image.Resampling.NEAREST)):
        graph = workflow()
        graph["30"] = node("ImageScale", image=link(8), upscale_method=method, width=96, height=0, crop="disabled")
        graph["31"] = node("ImageScaleBy", image=link(30), upscale_method=method, scale_by=0.5)
        graph["9"]["inputs"]["images"] = link(30)
        graph["10"] = node("PreviewImage", images=link(31))
        by_size = {pixels(each).shape: pixels(each) for each in made(server, graph)}
        np.testing.assert_array_equal(by_size[160, 96, 3], np.asarray(plain.resize((96, 160), filter_)))
        assert (80, 48, 3) in by_size

    graph = workflow()
    graph["30"] = node("LatentUpscaleBy", samples=link(3), upscale_method="bilinear", scale_by=1.5)
    graph["31"] = copy.deepcopy(graph["3"])
    graph["31"]["inputs"] |= {"latent_image": link(30), "denoise": 0.5}
    graph["8"]["inputs"]["samples"] = link(31)
    (found,) = made(server, graph)
    same(found, pipe(PROMPT, **OURS, width=48, height=80, hires=nativesd.Hires(1.5, 0.5, upscaler="latent")))


@pytest.mark.parametrize("way", ["mask", "hole", "model"])
def test_inpainting(server: Running, pipe: nativesd.Pipeline, picture: Image.Image, way: str) -> None:
    masked = picture.convert("RGBA")
    masked.putalpha(Image.new("L", picture.size, 255))
    masked.paste((0, 0, 0, 0), (16, 16, 48, 48))
    mask = Image.new("L", picture.size)
    mask.paste(255, (16, 16, 48, 48))
    answer = requests.post(f"{server.url}/upload/image", files={"image": ("holed.png", file_of(masked))}, timeout=60)
    graph = workflow(denoise=0.8)
    graph["10"] = node("LoadImage", image=answer.json()["name"])
    image = {"pixels": link(10), "vae": link(4, 2)}
    wanted: dict[str, Any] = {"image": read_image(masked), "mask": mask}
    match way:
        case "mask":
            graph["20"] = node("VAEEncode", **image)
            graph["5"] = node("SetLatentNoiseMask", samples=link(20), mask=link(10, 1))
        case "hole":
            graph["5"] = node("VAEEncodeForInpaint", **image, mask=link(10, 1), grow_mask_by=7)
            mask.paste(255, (13, 13, 51, 51))
            wanted["image"].paste((128, 128, 128), (16, 16, 48, 48))
        case "model":
            graph["5"] = node("InpaintModelConditioning", positive=link(6), negative=link(7), **image, mask=link(10, 1),
                              noise_mask=True)  # fmt: skip
            graph["3"]["inputs"] |= {"positive": link(5, 0), "negative": link(5, 1), "latent_image": link(5, 2)}
    (found,) = made(server, graph)
    same(found, pipe(PROMPT, **OURS, **wanted, strength=0.8, steps_as="all", noise="comfyui"))


def failed(server: Running, graph: dict[str, Any]) -> str:
    """What is said of a graph that fails while it runs."""
    answer = server.post("/prompt", {"prompt": graph})
    assert answer.status_code == 200, answer.text
    told = until(lambda: server.get(f"/history/{answer.json()['prompt_id']}").json().get(answer.json()["prompt_id"]))
    assert told["status"]["status_str"] == "error", told
    return str(told["status"]["messages"])


def test_what_is_lost_or_too_large_is_refused(server: Running) -> None:
    narrow = file_of(Image.new("RGB", (1, 512)))
    answer = requests.post(f"{server.url}/upload/image", files={"image": ("narrow.png", narrow)}, timeout=60)
    graph = workflow()
    graph["10"] = node("LoadImage", image=answer.json()["name"])
    for method in ("lanczos", "bilinear"):
        graph["30"] = node("ImageScale", image=link(10), upscale_method=method, width=2048, height=0, crop="disabled")
        graph["9"]["inputs"]["images"] = link(30)
        assert "at most 8192 pixels a side on this server, not 2048x1048576" in failed(server, graph)
    graph["30"] = node("ImageScale", image=link(10), upscale_method="bilinear", width=64, height=1, crop="center")
    assert [pixels(each).shape for each in made(server, graph)] == [(1, 64, 3)]

    graph = workflow(denoise=0.5)
    graph["10"] = node("LoadImage", image=answer.json()["name"])
    graph["20"] = node("VAEEncode", pixels=link(8), vae=link(4, 2))
    graph["21"] = node("SetLatentNoiseMask", samples=link(20), mask=link(10, 1))
    graph["30"] = node("LatentUpscaleBy", samples=link(21), upscale_method="bilinear", scale_by=1.5)
    graph["31"] = copy.deepcopy(graph["3"])
    graph["31"]["inputs"]["latent_image"] = link(30)
    graph["32"] = node("VAEDecode", samples=link(31), vae=link(4, 2))
    graph["9"]["inputs"]["images"] = link(32)
    assert "latent_image must be of VAEEncode where it has a mask" in failed(server, graph)

    graph = workflow()
    graph["20"] = node("CLIPSetLastLayer", clip=link(4, 1), stop_at_clip_layer=-2)
    graph["7"]["inputs"]["clip"] = link(20)
    assert "positive and negative must come of one CLIP here" in failed(server, graph)


def test_a_later_start_and_a_batch(server: Running, pipe: nativesd.Pipeline) -> None:
    graph = workflow()
    inputs = graph["3"]["inputs"]
    del inputs["denoise"]
    seed = inputs.pop("seed")
    graph["3"] |= {"class_type": "KSamplerAdvanced"}
    inputs |= {"noise_seed": seed, "add_noise": "enable", "start_at_step": 0, "end_at_step": 10000,
               "return_with_leftover_noise": "disable"}  # fmt: skip
    graph["5"]["inputs"]["batch_size"] = 2
    found = made(server, graph)
    wanted = pipe(PROMPT, **OURS, width=48, height=80, num_images=2, noise="comfyui")
    for index, each in enumerate(found):
        same(each, wanted, index)


@pytest.mark.parametrize(
    ("change", "number", "kind"),
    [
        ({"3": node("Nonsense")}, "3", "missing_node_type"),
        ({"10": {"inputs": {}}}, "10", "missing_node_type"),
        ({"10": None}, "10", "missing_node_type"),
        ({"5": node("EmptyLatentImage", width=48, height=80)}, "5", "required_input_missing"),
        ({"5": node("EmptyLatentImage", width=1 << 20, height=80, batch_size=1)}, "5", "value_bigger_than_max"),
        ({"5": node("EmptyLatentImage", width=-1, height=80, batch_size=1)}, "5", "value_smaller_than_min"),
        ({"5": node("EmptyLatentImage", width="x", height=80, batch_size=1)}, "5", "invalid_input_type"),
        ({"5": node("EmptyLatentImage", width=1e308, height=80, batch_size=1)}, "5", "value_bigger_than_max"),
        ({"4": node("CheckpointLoaderSimple", ckpt_name="/etc/passwd")}, "4", "value_not_in_list"),
        ({"4": node("CheckpointLoaderSimple", ckpt_name="../tiny")}, "4", "value_not_in_list"),
        ({"8": node("VAEDecode", samples=link(99), vae=link(4, 2))}, "8", "bad_linked_input"),
        ({"8": node("VAEDecode", samples=link(3, 7), vae=link(4, 2))}, "8", "bad_linked_input"),
        ({"8": node("VAEDecode", samples=["3", {}], vae=link(4, 2))}, "8", "bad_linked_input"),
        ({"8": node("VAEDecode", samples=link(6), vae=link(4, 2))}, "8", "return_type_mismatch"),
        ({"8": node("VAEDecode", samples=3, vae=link(4, 2))}, "8", "bad_linked_input"),
        ({"5": node("LatentUpscale", samples=link(3), upscale_method="area", width=64, height=64, crop="disabled")},
         "5", "dependency_cycle"),
        ({"10": node("LoadImage", image="../../etc/passwd")}, "10", "value_not_in_list"),
    ],
)  # fmt: skip
def test_graphs_that_cannot_be(server: Running, change: dict[str, Any], number: str, kind: str) -> None:
    answer = server.post("/prompt", {"prompt": {**workflow(), **change}})
    assert answer.status_code == 400
    errors = answer.json()["node_errors"]
    found = errors.get(number) or next(iter(errors.values()))
    assert found["errors"][0]["type"] == kind, errors


@pytest.mark.parametrize(
    "graph", [None, {}, [], "x", {"4": node("CheckpointLoaderSimple", ckpt_name="tiny")}, {"1": {}}]
)
def test_no_graph_at_all(server: Running, graph: Any) -> None:
    answer = server.post("/prompt", {"prompt": graph})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_an_error_while_it_runs_is_told(server: Running) -> None:
    graph = workflow()
    graph["8"]["inputs"]["samples"] = link(5)
    name = server.post("/prompt", {"prompt": graph}).json()["prompt_id"]
    told = until(lambda: server.get(f"/history/{name}").json().get(name))
    (kind, data) = told["status"]["messages"][-1]
    assert (kind, data["node_id"], data["exception_type"]) == ("execution_error", "8", "UsageError")
    assert "empty latent" in data["exception_message"]


def test_interrupt_hits_the_prompt_that_is_named(server: Running) -> None:
    graph = workflow(steps=150)
    graph["5"]["inputs"] |= {"width": 128, "height": 128}
    first, second, third = (server.post("/prompt", {"prompt": each}).json()["prompt_id"]
                            for each in (graph, workflow(), graph))  # fmt: skip
    until(lambda: server.get("/queue").json()["queue_running"])
    assert [row[1] for row in server.get("/queue").json()["queue_pending"]] == [second, third]
    assert server.get("/prompt").json()["exec_info"]["queue_remaining"] == 3
    server.post("/interrupt", {"prompt_id": second})
    server.post("/queue", {"delete": [third]})
    assert [row[1] for row in server.get("/queue").json()["queue_running"]] == [first]
    server.post("/api/interrupt")
    told = until(lambda: server.get(f"/history/{first}").json().get(first))
    assert told["status"]["messages"][-1][0] == "execution_interrupted"
    assert not told["status"]["completed"]
    for name in (second, third):
        assert server.get(f"/history/{name}").json()[name]["outputs"] == {}
    server.post("/history", {"delete": [first]})
    assert server.get(f"/history/{first}").json() == {}


def test_uploads_are_pictures_with_plain_names(server: Running, picture: Image.Image) -> None:
    url = f"{server.url}/upload/image"
    for name, data in (("a.png", b"no picture"), ("../a.png", file_of(picture)), ("a\x00.png", file_of(picture))):
        assert requests.post(url, files={"image": (name, data)}, timeout=60).status_code == 400
    answer = requests.post(url, files={"image": ("a.png", file_of(picture))}, data={"subfolder": "../x"}, timeout=60)
    assert answer.status_code == 400
    first = requests.post(url, files={"image": ("b.png", file_of(picture))}, timeout=60).json()
    other = requests.post(url, files={"image": ("b.png", file_of(picture.rotate(90)))}, timeout=60).json()
    assert (first["name"], other["name"]) == ("b.png", "b (1).png")
    assert server.get("/view?filename=b.png&type=input").content == file_of(picture)
    for path in ("/view?filename=../../etc/passwd", "/view?filename=/etc/passwd&type=input", "/view"):
        assert server.get(path).status_code == 404


def test_other_pages_get_no_socket(server: Running) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException):
        websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws", origin="https://evil.example", timeout=10)
    websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws", origin=server.url, timeout=10).close()


def test_the_lists(server: Running) -> None:
    info = server.get("/object_info/CheckpointLoaderSimple").json()["CheckpointLoaderSimple"]
    assert info["input"]["required"]["ckpt_name"] == [["tiny"], {}]
    assert server.get("/object_info/Nonsense").json() == {}
    assert server.get("/models/loras").json() == ["style"]
    for path in ("/models", "/extensions", "/features", "/api/system_stats", "/embeddings"):
        assert server.get(path).status_code == 200


@pytest.mark.parametrize("odd", [["x"], {"x": 1}, 7, None])
def test_a_client_and_extra_data_that_are_none(server: Running, odd: object) -> None:
    answer = server.post("/prompt", {"prompt": workflow(steps=1), "client_id": odd, "extra_data": odd})
    assert answer.status_code == 200, answer.text
