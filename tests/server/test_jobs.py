"""The server's own jobs: made, followed, cancelled, bounded; and how the server says how it is."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

import nativesd
from server.fixtures import PROMPT, SLOW, Running, encoded, pixels, serving, until


def job(server: Running, **body: Any) -> dict[str, Any]:
    answer = server.post("/jobs", {"prompt": PROMPT, "steps": 3, "seed": 7, **body})
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == answer.json()["poll_url"]
    return server.finished(answer.json()["poll_url"])


def made(server: Running, **body: Any) -> list[Any]:
    told = job(server, **body)
    assert told["status"] == "done", told
    return [pixels(server.get(each["url"]).content) for each in told["pictures"]]


def test_the_picture_is_the_librarys(server: Running, pipe: nativesd.Pipeline) -> None:
    options: dict[str, Any] = {"sampler": "DPM++ 2M", "schedule": "karras", "guidance_scale": 4, "num_images": 2}
    found = made(server, width=48, height=80, **options)
    wanted = pipe(PROMPT, steps=3, seed=7, width=48, height=80, **options)
    assert len(found) == 2
    for index, each in enumerate(found):
        np.testing.assert_array_equal(each, pixels(wanted.images[index]))


def test_the_file_repeats_itself(server: Running, tmp_path: Path) -> None:
    told = job(server, sampler="Euler a")
    file = tmp_path / "picture.png"
    file.write_bytes(server.get(told["pictures"][0]["url"]).content)
    options, unheeded = nativesd.options_from(file)
    assert (options["prompt"], options["seed"], options["steps"], unheeded) == (PROMPT, 7, 3, [])


def test_pictures_masks_controls_and_loras(
    server: Running, pipe: nativesd.Pipeline, picture: Image.Image, mask: Image.Image, lora_dir: Path
) -> None:
    plain = {"image": encoded(picture), "mask": encoded(mask), "only_masked": 4, "strength": 0.7}
    (found,) = made(server, **plain)
    wanted = pipe(PROMPT, steps=3, seed=7, image=picture, mask=mask, only_masked=4, strength=0.7)
    np.testing.assert_array_equal(found, pixels(wanted.images[0]))

    unit = {"model": "tiny", "image": f"data:image/png;base64,{encoded(picture)}", "preprocess": "canny"}
    (found,) = made(server, control=[unit], loras=[["style", 0.5]], hires={"scale": 1.5, "steps": 2})
    wanted = pipe(
        PROMPT, steps=3, seed=7, control=nativesd.Control("tiny", picture, preprocess="canny"),
        loras=(lora_dir / "style.safetensors", 0.5), hires=nativesd.Hires(1.5, steps=2),
    )  # fmt: skip
    np.testing.assert_array_equal(found, pixels(wanted.images[0]))
    (tagged,) = made(server, prompt=f"{PROMPT} <lora:style:0.5>")
    (untouched,) = made(server)
    assert (tagged != untouched).any()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 151}, "steps"),
        ({"width": 4096}, "width"),
        ({"hires": {"scale": 16}, "width": 256}, "width"),
        ({"num_images": 17}, "num_images"),
        ({"seed": -5}, "seed"),
        ({"sampler": "no such"}, "sampler"),
        ({"cfg_scale": 7}, "cfg_scale"),
        ({"on_step": 1}, "on_step"),
        ({"prompt": 5}, "prompt"),
        ({"image": "https://example.org/a.png"}, "image"),
        ({"image": "/etc/passwd"}, "image"),
        ({"image": base64.b64encode(b"no picture").decode()}, "image"),
        ({"mask": ""}, "mask"),
        ({"loras": ["../style"]}, None),
        ({"loras": [["style", 1, 2, 3]]}, "loras"),
        ({"control": [{"model": "/etc/passwd", "image": ""}]}, None),
        ({"control": [{"model": "tiny"}]}, "control"),
        ({"model": "someone/else"}, "model"),
        ({"model": "../../etc/passwd"}, "model"),
        ({"hires": {"size": 2}}, "hires"),
        ({"variation": 3}, "variation"),
        ({"variation": {"strength": 2}}, "variation"),
    ],
)
def test_what_cannot_be_is_422_and_named(server: Running, body: dict[str, Any], field: str | None) -> None:
    answer = server.post("/jobs", {"prompt": PROMPT, **body})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["param"] == field, error
    assert error["message"]
    assert "Traceback" not in answer.text


def test_bodies_that_are_no_json(server: Running) -> None:
    for raw in (
        b"",
        b"{",
        b"[]",
        b'{"steps": NaN}',
        b'{"a": 1, "a": 2}',
        b'{"a": ' + b"[" * 5000,
        b"\xff",
        b'"\\ud800"',
    ):
        assert requests.post(server.url + "/jobs", data=raw, timeout=60).status_code == 422


def test_a_bomb_is_refused_before_it_is_decoded(server: Running) -> None:
    data = BytesIO()
    Image.new("1", (20_000, 20_000)).save(data, format="PNG")
    assert len(data.getvalue()) < 100_000
    answer = server.post("/jobs", {"prompt": "", "image": base64.b64encode(data.getvalue()).decode()})
    assert answer.status_code == 422
    assert "pixels" in answer.json()["error"]["message"]


def test_unknown_jobs_and_pictures_are_404(server: Running) -> None:
    told = job(server)
    for path in ("/jobs/none", "/jobs/none/events", f"{told['poll_url']}/pictures/1", "/nothing"):
        assert server.get(path).status_code == 404


def test_events_tell_steps_previews_and_the_end(server: Running) -> None:
    blocker = server.post("/jobs", {**SLOW, "steps": 30}).json()
    told = server.post("/jobs", {"prompt": PROMPT, "steps": 5, "seed": 1}).json()
    assert told["status"] == "waiting"
    kinds, last = [], {}
    with server.get(told["events_url"], stream=True) as answer:
        requests.delete(server.url + blocker["poll_url"], timeout=60)
        for line in answer.iter_lines(decode_unicode=True):
            name, _, value = line.partition(": ")
            if name == "event":
                kinds.append(value)
            elif name == "data":
                last[kinds[-1]] = json.loads(value)
    assert kinds[:2] == ["job", "started"]
    assert kinds[-1] == "ended"
    assert {"step", "preview"} <= set(kinds)
    assert last["step"]["step"] == last["step"]["steps"] == 5
    assert Image.open(BytesIO(base64.b64decode(last["preview"]["picture"]))).format == "JPEG"
    assert last["ended"]["pictures"][0]["url"]


def test_a_running_job_ends_after_its_step_with_the_picture_so_far(server: Running) -> None:
    first, second = server.post("/jobs", SLOW).json(), server.post("/jobs", {"prompt": PROMPT, "steps": 2}).json()
    until(lambda: server.get(first["poll_url"]).json()["step"] >= 2)
    assert server.get(second["poll_url"]).json()["position"] == 0
    assert requests.delete(server.url + first["poll_url"], timeout=60).status_code == 202
    ended = server.finished(first["poll_url"])
    assert (ended["status"], ended["interrupted"]) == ("done", True)
    assert len(ended["pictures"]) == 1
    assert "interrupted after step" in ended["notes"][0]
    assert server.finished(second["poll_url"])["status"] == "done"
    assert requests.delete(server.url + first["poll_url"], timeout=60).status_code == 409


def test_a_waiting_job_is_cancelled_at_once(server: Running) -> None:
    first, second = server.post("/jobs", SLOW).json(), server.post("/jobs", SLOW).json()
    answer = requests.delete(server.url + second["poll_url"], timeout=60)
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    requests.delete(server.url + first["poll_url"], timeout=60)
    server.finished(first["poll_url"])


def test_a_failed_job_is_an_answer_and_the_next_one_works(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = server.context.desk.shelves[0].loaded
    assert pipeline is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline.vae), "decode", lambda self, latents: latents[:, :3] * float("nan"))
        failed = job(server)
    assert failed["status"] == "failed"
    assert "finite" in failed["error"]["message"]
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline), "run", lambda *_: 1 // 0)
        failed = job(server)
    assert failed["error"]["message"] == "a fault of nativesd: ZeroDivisionError"
    assert job(server)["status"] == "done"


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    with serving(queue=2) as server:
        jobs = [server.post("/jobs", SLOW).json()]
        until(lambda: server.get(jobs[0]["poll_url"]).json()["status"] == "running")
        jobs += [server.post("/jobs", SLOW).json() for _ in range(2)]
        full = server.post("/jobs", SLOW)
        assert full.status_code == 503
        assert int(full.headers["Retry-After"]) >= 1
        assert "nativesd_jobs_waiting 2" in server.get("/metrics").text
        assert 'nativesd_jobs_total{status="refused"} 1' in server.get("/metrics").text
        for each in reversed(jobs):
            requests.delete(server.url + each["poll_url"], timeout=60)


def test_health_metrics_and_the_catalogue(server: Running) -> None:
    health = server.get("/health").json()
    assert (health["status"], health["model"]) == ("ok", "tiny")
    lines = server.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["process_resident_memory_bytes"]) > 1e7
    assert {'nativesd_jobs_total{status="done"}', "nativesd_job_seconds_total"} <= values.keys()
    catalogue = server.get("/catalogue").json()
    assert catalogue["loras"] == ["style"]
    assert catalogue["controls"] == ["tiny"]
    assert "Euler a" in catalogue["samplers"]


def test_prompts_are_logged_only_where_that_is_asked_for(
    server: Running, caplog: pytest.LogCaptureFixture, lora_dir: Path
) -> None:
    secret = {"prompt": "a secret <lora:hidden:1>", "steps": 2}
    with caplog.at_level("INFO", "nativesd.server"):
        server.finished(server.post("/jobs", secret).json()["poll_url"])
        assert "failed in" in caplog.text
        assert "secret" not in caplog.text
        assert "hidden" not in caplog.text
        with serving(log_prompts=True) as other:
            other.finished(other.post("/jobs", secret).json()["poll_url"])
        assert "secret" in caplog.text
