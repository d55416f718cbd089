"""OpenAI's images API by its own client."""

from __future__ import annotations

import json
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from PIL import Image, ImageOps

import nativesd
from server.fixtures import PROMPT, Running, file_of, pixels, serving

EXTRA: dict[str, Any] = {"seed": 7, "steps": 3}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def holes(mask: Image.Image) -> bytes:
    """A mask as OpenAI has it: transparent where it is to be painted."""
    return file_of(Image.merge("RGBA", (mask, mask, mask, ImageOps.invert(mask))))


def test_generations_are_the_librarys_pictures(client: openai.OpenAI, pipe: nativesd.Pipeline) -> None:
    made = client.images.generate(
        prompt=PROMPT, model="tiny", n=2, size="48x80", response_format="b64_json",  # type: ignore[call-overload]
        extra_body={**EXTRA, "guidance_scale": 4, "negative_prompt": "green"},
    )  # fmt: skip
    wanted = pipe(PROMPT, **EXTRA, guidance_scale=4, negative_prompt="green", width=48, height=80, num_images=2)
    assert len(made.data) == 2
    for index, each in enumerate(made.data):
        assert each.url is None
        np.testing.assert_array_equal(pixels(each.b64_json), pixels(wanted.images[index]))


@pytest.mark.parametrize(("form", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_addresses_are_served_in_the_format(client: openai.OpenAI, form: Any, kind: str, tmp_path: Path) -> None:
    made = client.images.generate(
        prompt=PROMPT, size="auto", response_format="url", output_format=form, output_compression=90, extra_body=EXTRA
    )
    assert made.data is not None
    assert made.data[0].b64_json is None
    answer = requests.get(str(made.data[0].url), timeout=60)
    assert answer.headers["Content-Type"] == f"image/{form}"
    assert Image.open(BytesIO(answer.content)).format == kind
    file = tmp_path / f"made.{form}"
    file.write_bytes(answer.content)
    assert nativesd.options_from(file)[0]["seed"] == 7


def test_edits(client: openai.OpenAI, pipe: nativesd.Pipeline, picture: Image.Image, mask: Image.Image) -> None:
    wanted = pipe(PROMPT, **EXTRA, image=picture, mask=mask)
    made = client.images.edit(
        prompt=PROMPT, image=("a.png", file_of(picture)), mask=("m.png", holes(mask)), extra_body=EXTRA
    )
    assert made.data is not None
    np.testing.assert_array_equal(pixels(str(made.data[0].b64_json)), pixels(wanted.images[0]))

    made = client.images.edit(
        prompt=PROMPT,
        image=[("a.png", file_of(picture)), ("b.png", file_of(mask))],
        extra_body={**EXTRA, "strength": 0.9},
    )
    assert made.data is not None
    wanted = pipe(PROMPT, **EXTRA, image=picture, strength=0.9)
    np.testing.assert_array_equal(pixels(str(made.data[0].b64_json)), pixels(wanted.images[0]))


def test_streams_send_partial_pictures(client: openai.OpenAI, pipe: nativesd.Pipeline) -> None:
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7, "steps": 12})
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    assert pixels(events[0].b64_json).any()
    np.testing.assert_array_equal(pixels(events[-1].b64_json), pixels(pipe(PROMPT, seed=7, steps=12).images[0]))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "nativesd"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"model": "gpt-image-1"}, openai.NotFoundError, "model"),
        ({"size": "512"}, openai.BadRequestError, "size"),
        ({"size": "99999x64"}, openai.BadRequestError, "size"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"n": 99}, openai.BadRequestError, "n"),
        ({"output_format": "exe"}, openai.BadRequestError, "output_format"),
        ({"extra_body": {"steps": 0}}, openai.BadRequestError, "steps"),
        ({"extra_body": {"seed": "x"}}, openai.BadRequestError, "seed"),
    ],
)
def test_what_cannot_be(client: openai.OpenAI, options: dict[str, Any], error: Any, param: str) -> None:
    with pytest.raises(error) as raised:
        client.images.generate(prompt=PROMPT, **options)
    assert raised.value.param == param
    assert raised.value.body["message"]


def test_edits_that_cannot_be(server: Running) -> None:
    url = f"{server.url}/v1/images/edits"
    for files, data in (
        ({}, {"prompt": "x"}),
        ({"image": ("a.png", b"none")}, {"prompt": "x"}),
        ({"mask": ("a.png", b"none")}, {"prompt": "x", "image": "https://example.org/a.png"}),
    ):
        answer = requests.post(url, files=files or {"x": ("x", b"")}, data=data, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "image"
    assert requests.post(url, json={"prompt": "x"}, timeout=60).status_code == 400
    assert requests.post(
        url, data=b"--x\r\nbroken", headers={"Content-Type": "multipart/form-data; boundary=x"}, timeout=60
    ).status_code == 400  # fmt: skip


def test_a_wrong_key_is_said_as_openai_says_it() -> None:
    with serving(api_key="a-secret-key") as server:
        url = f"{server.url}/v1"
        assert openai.OpenAI(base_url=url, api_key="a-secret-key").models.list().data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="another", max_retries=0).models.list()


NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "unused" });
const made = await client.images.generate(
  { prompt: process.argv[3], n: 1, response_format: "b64_json", seed: 7, steps: 3 });
console.log(JSON.stringify(made.data.map((each) => each.b64_json)));
"""


def test_the_client_for_node(server: Running, pipe: nativesd.Pipeline, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no node here")
    root = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=False).stdout.strip()
    if not (Path(root) / "openai").is_dir():
        pytest.skip("node has no package openai: npm install -g openai")
    (tmp_path / "node_modules").symlink_to(root)
    (tmp_path / "client.mjs").write_text(NODE)
    done = subprocess.run(
        ["node", "client.mjs", f"{server.url}/v1", PROMPT], cwd=tmp_path, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    np.testing.assert_array_equal(pixels(json.loads(done.stdout)[0]), pixels(pipe(PROMPT, **EXTRA).images[0]))
