"""The page in a real browser, where there is a chromium; and what it asks the server."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

import nativesd
from nativesd.pictures.embedded import texts_of
from server.fixtures import BASE, PROMPT, SLOW, Adapters, Running, encoded, pixels, serving, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DROP = """
async ([selector, address]) => {
  const blob = await (await fetch(address)).blob();
  const transfer = new DataTransfer();
  transfer.items.add(new File([blob], "picture.png", { type: "image/png" }));
  document.querySelector(selector).dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
}
"""  # noqa: E501


def test_the_page_runs_only_what_stands_in_it(server: Running) -> None:
    answer = server.get("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    policy = answer.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert len(re.findall("'sha256-", policy)) == 2
    assert not re.search(r"(src|href)=.(https?:)?//", answer.text), "it works offline"


def test_recipes(server: Running, pipe: nativesd.Pipeline, tmp_path: Path) -> None:
    pipe(PROMPT, seed=3, steps=2, hires=nativesd.Hires(1.5)).save(tmp_path / "made.png")
    body = {"image": encoded(Image.open(tmp_path / "made.png"))}
    assert server.post("/recipe", body).status_code == 422  # encoded anew, it says nothing any more
    body = {"image": base64.b64encode((tmp_path / "made.png").read_bytes()).decode()}
    told = server.post("/recipe", body).json()
    assert told["unheeded"] == []
    assert (told["options"]["prompt"], told["options"]["seed"]) == (PROMPT, 3)
    assert told["options"]["hires"]["scale"] == 1.5


def test_audits_are_of_models_by_name(server: Running) -> None:
    assert server.get("/audit?model=tiny").json()["ok"]
    for query in ("", "?model=", "?model=/etc/passwd", "?model=../tiny", "?model=someone/else"):
        assert server.get(f"/audit{query}").status_code == 422


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@contextmanager
def opened(browser: Any, server: Running) -> Iterator[Any]:
    """A server's page, which makes no fault."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
    page.goto(server.url)
    until(lambda: page.evaluate("document.querySelectorAll('#sampler option').length > 5"))
    yield page
    context.close()
    assert faults == []


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    with opened(browser, server) as page:
        yield page


def open_streams(server: Running) -> int:
    found = re.search(r"^nativesd_streams_open (\d+)$", server.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def paint(page: Any, **fields: Any) -> None:
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#go")


def done(page: Any) -> bytes:
    """The file of the picture that was painted last, when it is."""
    until(lambda: page.evaluate("/^(Done|Ended early)/.test(document.querySelector('#status').textContent)"))
    address = page.get_attribute("#gallery li:first-child a", "href")
    return requests.get(page.url.rstrip("/") + address, timeout=60).content


def test_it_paints_the_librarys_picture(page: Any, pipe: nativesd.Pipeline) -> None:
    page.select_option("#sampler", "DPM++ 2M")
    page.select_option("#schedule", "karras")
    paint(page, prompt=PROMPT, negative="green", steps=3, seed=7, width=48, height=80, guidance=4)
    wanted = pipe(PROMPT, negative_prompt="green", steps=3, seed=7, width=48, height=80, guidance_scale=4,
                  sampler="DPM++ 2M", schedule="karras")  # fmt: skip
    np.testing.assert_array_equal(pixels(done(page)), pixels(wanted.images[0]))


def test_errors_are_sentences(page: Any) -> None:
    paint(page, steps=0)
    page.wait_for_selector("#status.bad")
    assert "steps must be" in page.inner_text("#status")


def test_previews_and_cancelling_by_the_keyboard(page: Any) -> None:
    paint(page, steps=SLOW["steps"], width=128, height=128)
    until(lambda: page.evaluate("document.querySelector('#preview').src.startsWith('data:image/jpeg')"))
    assert 0 < page.evaluate("document.querySelector('#progress').value") < 1
    page.keyboard.press("Escape")
    assert Image.open(BytesIO(done(page))).size == (128, 128)
    assert page.inner_text("#status").startswith("Ended early. · interrupted after step")
    assert page.is_disabled("#cancel")


def test_a_dropped_picture_is_used_again(page: Any, pipe: nativesd.Pipeline) -> None:
    paint(page, prompt="a fox on a green background", steps=3, seed=11, guidance=5)
    first = done(page)
    address = page.get_attribute("#gallery li:first-child a", "href")
    page.reload()
    until(lambda: page.evaluate("document.querySelectorAll('#sampler option').length > 5"))
    page.evaluate(DROP, ["body", address])
    until(lambda: page.evaluate("document.querySelector('#seed').value === '11'"))
    assert page.input_value("#prompt") == "a fox on a green background"
    paint(page)
    np.testing.assert_array_equal(pixels(done(page)), pixels(first))


def test_a_mask_is_painted(page: Any, server: Running, picture: Image.Image, tmp_path: Path) -> None:
    file = tmp_path / "begin.png"
    picture.save(file)
    page.click("#begin-part summary")
    page.set_input_files("#begin-file", file)
    page.wait_for_selector("#mask")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.5, steps=4)
    page.mouse.up()
    paint(page, prompt=PROMPT, steps=3, seed=2)
    changed = (pixels(done(page)).astype(int) != pixels(picture)).any(axis=2)
    assert changed[28:36, 22:42].mean() > 0.5
    assert not changed[:8].any()
    assert not changed[-8:].any()
    page.check("#soft")
    paint(page, prompt=PROMPT, steps=3, seed=2)
    assert "Soft inpainting enabled: True" in texts_of(Image.open(BytesIO(done(page))), "the picture").parameters


def test_steering_and_loras(
    page: Any, pipe: nativesd.Pipeline, picture: Image.Image, lora_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "edges.png"
    picture.save(file)
    page.click("#control-part summary")
    page.set_input_files("#control-file", file)
    page.wait_for_selector("#control-image")
    page.fill("#prompt", PROMPT)
    page.click("#lora-part summary")
    page.click("#loras button")
    assert page.input_value("#prompt") == f"{PROMPT} <lora:style:1>"
    paint(page, steps=3, seed=7)
    wanted = pipe(PROMPT, steps=3, seed=7, control=nativesd.Control("tiny", picture, preprocess="canny"),
                  loras=lora_dir / "style.safetensors")  # fmt: skip
    np.testing.assert_array_equal(pixels(done(page)), pixels(wanted.images[0]))


def test_a_picture_is_a_prompt(
    browser: Any, pipe: nativesd.Pipeline, picture: Image.Image, adapters: Adapters, tmp_path: Path
) -> None:
    file = tmp_path / "shown.png"
    picture.save(file)
    folders = {"image_adapter_dirs": (adapters.models,), "image_encoder_dirs": (adapters.encoders,)}
    with serving(**folders) as server, opened(browser, server) as page:
        page.click("#shown-part summary")
        page.select_option("#shown", BASE)
        page.set_input_files("#shown-file", file)
        page.wait_for_selector("#shown-image")
        page.fill("#shown-scale", "0.8")
        paint(page, prompt=PROMPT, steps=2, seed=7)
        prompt = nativesd.ImagePrompt(adapters.adapter(BASE), picture, 0.8)
        wanted = pipe(PROMPT, steps=2, seed=7, image_prompts=prompt, image_encoder=adapters.encoder)
        np.testing.assert_array_equal(pixels(done(page)), pixels(wanted.images[0]))


def test_a_model_is_explained_by_the_keyboard(page: Any) -> None:
    page.focus("#tab-create")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#explain")
    page.focus("#audit-go")
    page.keyboard.press("Enter")
    page.wait_for_selector("#audit table")
    assert "326 of 326" in page.inner_text("#audit")
    assert "Every tensor is accounted for" in page.inner_text("#audit-status")


SHOWN = """
() => {
  const seen = document.createElement("canvas");
  seen.getContext("2d").drawImage(document.querySelector("#webcam-image"), 0, 0);
  return seen.toDataURL();
}
"""


def test_the_camera_streams(page: Any, server: Running) -> None:
    page.focus("#tab-explain")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#webcam")
    page.click("#webcam-go")
    until(lambda: page.evaluate("document.querySelector('#webcam-image').naturalWidth === 64"))
    assert open_streams(server) == 1
    assert page.inner_text("#webcam-status") == "Streaming."
    first = page.evaluate(SHOWN)
    until(lambda: page.evaluate(SHOWN) != first)  # as the camera's do
    page.click("#webcam-stop")
    assert page.inner_text("#webcam-status") == "Stopped."
    assert page.evaluate("document.querySelector('#webcam-video').srcObject") is None
    until(lambda: not open_streams(server))
    page.click("#webcam-go")  # and again
    until(lambda: page.evaluate("document.querySelector('#webcam-image').naturalWidth === 64"))
    page.click("#webcam-stop")
    until(lambda: not open_streams(server))


def test_without_the_stream_there_is_no_tab_for_it(browser: Any) -> None:
    with serving(apis=("sd",)) as server:
        page = browser.new_page()
        page.goto(server.url)
        until(lambda: page.evaluate("document.querySelectorAll('#sampler option').length > 5"))
        assert not page.is_visible("#tab-webcam")
        page.close()


@pytest.mark.parametrize("width", [400, 1000, 1600])
def test_nothing_is_wider_than_the_window_and_all_has_names(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    for part in ("#begin-part", "#control-part", "#lora-part"):
        page.click(f"{part} summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, select, textarea, button, canvas, img')]
           .filter((each) => !(each.labels?.length || each.ariaLabel || each.textContent.trim() || each.alt))
           .map((each) => each.outerHTML)"""
    )
    assert nameless == []


def test_pictures_are_kept_small_in_the_docs() -> None:
    folder = Path(__file__).parents[2] / "docs" / "pictures"
    shots = sorted(folder.glob("page-*.png"))
    assert [shot.stem for shot in shots] == ["page-1000", "page-1600", "page-400"]
    assert sum(shot.stat().st_size for shot in shots) < 600_000
