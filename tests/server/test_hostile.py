"""Hostile requests, one by one: each is refused with a sentence, opens nothing, paints nothing; the next one works."""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from server.fixtures import PROMPT, Running, file_of, serving, until
from server.test_comfy import link, node, workflow

TEXT, IMAGE = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
PICTURE = base64.b64encode(file_of(Image.new("RGB", (64, 64)))).decode()
PART = b'--x\r\nContent-Disposition: form-data; name="a%d"\r\n\r\nb\r\n'
Ask = Callable[[Running], requests.Response]


def posts(path: str, **body: Any) -> Ask:
    return lambda server: server.post(path, body)


def raw(path: str, body: bytes, kind: str = "application/json") -> Ask:
    return lambda server: requests.post(server.url + path, data=body, headers={"Content-Type": kind}, timeout=60)


def gets(path: str) -> Ask:
    return lambda server: server.get(path)


def edits(image: bytes, **fields: Any) -> Ask:
    return lambda server: requests.post(
        f"{server.url}/v1/images/edits", files={"image": ("x.png", image)}, data={"prompt": PROMPT, **fields},
        timeout=60,
    )  # fmt: skip


def image_to_image(given: str, **more: Any) -> Ask:
    return posts(IMAGE, prompt=PROMPT, steps=1, init_images=[given], **more)


def graph(**nodes: Any) -> Ask:
    return posts("/prompt", prompt={**workflow(steps=1), **nodes})


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few kB: whoever decodes it takes gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (60_000).to_bytes(4, "big")
    header = size + size + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    """A small PNG whose compressed text has 200 MB."""
    text, data = PngInfo(), BytesIO()
    text.add_text("parameters", "a" * 200_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(data, "PNG", pnginfo=text)
    return data.getvalue()


HOSTILE: dict[str, Ask] = {
    # paths
    "a path for a picture": image_to_image("/etc/passwd"),
    "a path beside the server": image_to_image("../../etc/passwd"),
    "a path for a mask": image_to_image(PICTURE, mask="/etc/passwd"),
    "a path for a model": posts(TEXT, prompt=PROMPT, override_settings={"sd_model_checkpoint": "/etc/passwd"}),
    "a path up for a model": posts(TEXT, prompt=PROMPT, override_settings={"sd_model_checkpoint": "../../x"}),
    "a hub's model": posts(TEXT, prompt=PROMPT, override_settings={"sd_model_checkpoint": "evil/model"}),
    "a path for a refiner": posts(TEXT, prompt=PROMPT, refiner_checkpoint="/etc/passwd"),
    "a path for a LoRA": posts(TEXT, prompt=f"{PROMPT} <lora:../../etc/passwd:1>"),
    "a path for a LoRA of a job": posts("/jobs", prompt=PROMPT, loras=["/etc/passwd"]),
    "a path for a picture of a job": posts("/jobs", prompt=PROMPT, image="/etc/passwd"),
    "folders for a job's LoRAs": posts("/jobs", prompt=PROMPT, lora_dirs=["/etc"]),
    "a path for an upscaler": posts(TEXT, prompt=PROMPT, enable_hr=True, hr_upscaler="/etc/passwd"),
    "a path for a ControlNet": posts(
        TEXT, prompt=PROMPT,
        alwayson_scripts={"controlnet": {"args": [{"model": "../../x", "image": PICTURE}]}},
    ),
    "a path for an IP-Adapter": posts("/jobs", prompt=PROMPT, image_prompts=[{"adapter": "/x", "picture": PICTURE}]),
    "a hub's IP-Adapter": posts("/jobs", prompt=PROMPT, image_prompts=[{"adapter": "a/b/c.bin", "picture": PICTURE}]),
    "a path for an image encoder": posts("/jobs", prompt=PROMPT, image_encoder="/etc/passwd"),
    "a path for an IP-Adapter's unit": posts(
        TEXT, prompt=PROMPT,
        alwayson_scripts={"controlnet": {"args": [{"module": "ip-adapter-auto", "model": "../x", "image": PICTURE}]}},
    ),
    "a path for the audit": gets("/audit?file=/etc/passwd"),
    "a path up for the audit": gets("/audit?file=../../etc/passwd"),
    "a path for a view": gets("/view?filename=../../../etc/passwd"),
    "a path in a view's folder": gets("/view?filename=passwd&subfolder=/etc&type=input"),
    "a path in the address": gets("/%2e%2e/%2e%2e/etc/passwd"),
    "a path for ComfyUI's picture": graph(**{"11": node("LoadImage", image="../../etc/passwd"),
                                             "12": node("SaveImage", images=link(11), filename_prefix="x")}),
    "a path for ComfyUI's model": graph(**{"4": node("CheckpointLoaderSimple", ckpt_name="/etc/passwd")}),
    "another folder of ComfyUI's": lambda server: requests.post(
        f"{server.url}/upload/image", files={"image": ("x.png", base64.b64decode(PICTURE))},
        data={"subfolder": "../../tmp"}, timeout=60,
    ),
    # addresses
    "an address for a picture": image_to_image("http://127.0.0.1:1/x.png"),
    "a file's address": image_to_image("file:///etc/passwd"),
    "an address for a mask": image_to_image(PICTURE, mask="http://169.254.169.254/latest/meta-data"),
    "an address for a job": posts("/jobs", prompt=PROMPT, image="https://example.org/x.png"),
    "an address for a view": gets("/view?filename=http://example.org/x.png"),
    # bombs
    "a bomb of pixels": image_to_image(base64.b64encode(bomb()).decode()),
    "a bomb for an edit": edits(bomb()),
    "a bomb for its parameters": posts("/sdapi/v1/png-info", image=base64.b64encode(bomb()).decode()),
    "a text that grows": posts("/sdapi/v1/png-info", image=base64.b64encode(text_bomb()).decode()),
    "a drawing with scripts": image_to_image(base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg"/>').decode()),
    "deep JSON": raw(TEXT, b'{"prompt": ' + b"[" * 100_000),
    "a body twice as long as it says": raw(TEXT, b"{}" + b"x" * 100),
    "two of a name": raw(TEXT, b'{"prompt": "a", "prompt": "b"}'),
    "not UTF-8": raw(TEXT, b'{"prompt": "\xff"}'),
    "ten thousand parts": raw(
        "/v1/images/edits",
        b"".join(PART % i for i in range(10_000)) + b"--x--",
        "multipart/form-data; boundary=x",
    ),
    "ten thousand nodes": posts("/prompt", prompt={str(i): node("LoadImage", image="x") for i in range(10_000)}),
    "a graph that bites its tail": graph(**{"5": node("VAEEncode", pixels=link(8), vae=link(4, 2))}),
    # numbers
    "NaN": raw(TEXT, b'{"prompt": "a", "cfg_scale": NaN}'),
    "infinity": raw(TEXT, b'{"prompt": "a", "cfg_scale": 1e999}'),
    "a number of 5,000 digits": raw(TEXT, b'{"prompt": "a", "steps": ' + b"9" * 5000 + b"}"),
    "too many steps": posts(TEXT, prompt=PROMPT, steps=10**18),
    "too many pixels": posts(TEXT, prompt=PROMPT, width=10**9, height=10**9),
    "fewer than no pixels": posts(TEXT, prompt=PROMPT, width=-64),
    "too many pictures": posts(TEXT, prompt=PROMPT, batch_size=10**6, n_iter=10**6),
    "too large a second pass": posts(TEXT, prompt=PROMPT, enable_hr=True, hr_scale=10**6),
    "too long a prompt": posts(TEXT, prompt="(" * 1_000_000),
    "a size of another world": posts("/v1/images/generations", prompt=PROMPT, size="999999999x999999999"),
    "too many of OpenAI's": posts("/v1/images/generations", prompt=PROMPT, n=10**9),
    # scripts and names
    "a script": posts(TEXT, prompt=PROMPT, script_name="custom code", script_args=["import os"]),
    "a script that is always on": posts(TEXT, prompt=PROMPT, alwayson_scripts={"evil": {"args": [1]}}),
    "a name that begins a line": posts(TEXT, prompt=PROMPT, force_task_id="a\n2026-01-01 job forged done"),
    "a node that runs code": graph(**{"11": node("ExecutePython", code="import os")}),
    # who asks
    "a page of somebody else's": lambda server: server.post(
        TEXT, {"prompt": PROMPT}, headers={"Origin": "https://evil.example"}
    ),
    "a name that was bound to this machine": lambda server: server.post(
        TEXT, {"prompt": PROMPT}, headers={"Host": "evil.example"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_requests_are_refused(server: Running, what: str, caplog: pytest.LogCaptureFixture) -> None:
    desk = server.context.desk
    until(lambda: not desk.waiting and not desk.running)  # what other tests left
    painted = desk.counts["done"]
    with caplog.at_level(logging.INFO):
        answer = HOSTILE[what](server)
    assert 400 <= answer.status_code < 500, answer.text[:500]
    assert "root:" not in answer.text
    assert len(answer.content) < 5000
    assert desk.counts["done"] == painted
    assert all(record.getMessage().isprintable() for record in caplog.records if record.name.startswith("nativesd"))
    assert server.get("/health").json()["waiting"] == 0


def test_without_a_key_nothing_is_answered() -> None:
    with serving(api_key="a-secret") as guarded:
        for path in (TEXT, "/jobs", "/prompt", "/v1/images/generations", "/view", "/audit", "/metrics"):
            for answer in (guarded.get(path), guarded.post(path, {"prompt": PROMPT})):
                assert answer.status_code == 401
                assert PROMPT not in answer.text


def test_the_next_one_works(server: Running) -> None:
    made = server.post(TEXT, {"prompt": PROMPT, "steps": 1, "seed": 1})
    assert made.status_code == 200
    assert json.loads(made.json()["info"])["seed"] == 1
    assert not Path("x.png").exists()
