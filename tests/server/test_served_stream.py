"""The stream: the webcam demo's protocol by a WebSocket client, and the pictures as multipart JPEG."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import requests
import websocket
from PIL import Image, ImageDraw

import nativesd
from attacks.values import deeply_changed, spoiled
from nativesd.server.apis.own import jpeg
from nativesd.server.apis.streams import routes, session
from nativesd.server.jobs.line import Line
from nativesd.server.settings import Limits
from server.fixtures import PROMPT, SLOW, Running, encoded, file_of, pixels, serving, until
from server.test_random_bodies import WRONG

OPTIONS = {"prompt": PROMPT, "steps": 2, "strength": 0.3}


class Client:
    """What the demo's page does."""

    def __init__(self, server: Running, name: str | None = None, **options: Any) -> None:
        self.server, self.name = server, name or str(uuid.uuid4())
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{server.port}/api/ws/{self.name}", timeout=60,
                                                  **options)  # fmt: skip

    def heard(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.socket.recv())
        return told

    def send(self, options: object, data: bytes | None) -> None:
        self.socket.send(json.dumps({"status": "next_frame"}))
        self.socket.send(json.dumps(options))
        if data is not None:
            self.socket.send_binary(data)

    def until_asked(self) -> None:
        while (told := self.heard())["status"] != "send_frame":
            assert told["status"] == "wait", told

    def ended(self) -> str:
        """The message of the error that it is told; the connection is closed behind it."""
        while (told := self.heard())["status"] != "error":
            assert told["status"] in ("connected", "send_frame", "wait")
        assert self.socket.recv() == ""
        message: str = told["message"]
        return message


@contextmanager
def connected(server: Running, **options: Any) -> Iterator[Client]:
    client = Client(server, **options)
    try:
        assert client.heard() == {"status": "connected", "message": "Connected"}
        assert client.heard() == {"status": "send_frame"}
        yield client
    finally:
        client.socket.close()
        until(lambda: server.get(f"/api/stream/{client.name}", stream=True).status_code == 404)


def frames(count: int) -> list[bytes]:
    """A red disc that moves over yellow, as JPEG files."""
    out = []
    for number in range(count):
        image = Image.new("RGB", (64, 64), "gold")
        ImageDraw.Draw(image).ellipse((4 + 8 * number, 18, 32 + 8 * number, 46), fill="crimson")
        out.append(file_of(image, "JPEG"))
    return out


class Pictures:
    """What a stream's address gives, part by part."""

    def __init__(self, client: Client) -> None:
        self.answer = client.server.get(f"/api/stream/{client.name}", stream=True)
        assert self.answer.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
        self._line = iter(self.answer.raw.readline, b"")

    def next(self) -> bytes:
        assert next(self._line) == b"--frame\r\n"
        assert next(self._line) == b"Content-Type: image/jpeg\r\n"
        length = int(next(self._line).decode().removeprefix("Content-Length: "))
        assert next(self._line) == b"\r\n"
        data: bytes = self.answer.raw.read(length)
        assert next(self._line) == b"\r\n"
        return data

    def rest(self) -> bytes:
        """What comes until its end."""
        found: bytes = self.answer.raw.read()
        return found


def jpeg_pixels(frame: Any) -> Any:
    """The library's picture as the server sends it."""
    return pixels(jpeg(frame.image, session.QUALITY))


def test_pictures_are_the_librarys_and_options_change_on_the_way(server: Running, pipe: nativesd.Pipeline) -> None:
    files = frames(5)
    stream = pipe.stream(loras=["tiny-lcm"], **OPTIONS)
    with connected(server) as client:
        assert server.get("/metrics").ok
        shown = Pictures(client)
        for number, file in enumerate(files):
            options = {**OPTIONS, "prompt": "a fox on a green background"} if number == 3 else OPTIONS
            stream.update(prompt=options["prompt"])
            wanted = stream(Image.open(BytesIO(file)))
            client.send(options, file)
            if wanted is not None:  # it is None for the first of two slots
                np.testing.assert_array_equal(pixels(shown.next()), jpeg_pixels(wanted))
            client.until_asked()
        client.socket.close()
        assert shown.rest() == b"--frame\r\n"


def test_frames_steer_themselves(server: Running, pipe: nativesd.Pipeline) -> None:
    """By their own edges, and by a picture that stays; scales change on the way."""
    files = frames(4)
    edges = Image.open(BytesIO(files[0]))
    still = nativesd.canny(edges)
    controls = [nativesd.Control("tiny", preprocess="canny", end=0.9), nativesd.Control("tiny", still, scale=0.5)]
    stream = pipe.stream(loras=["tiny-lcm"], control=controls, **OPTIONS)
    said = [
        {"model": "tiny", "preprocess": "canny", "end": 0.9}, {"model": "tiny", "image": encoded(still), "scale": 0.5},
    ]  # fmt: skip
    with connected(server) as client:
        shown = Pictures(client)
        for number, file in enumerate(files):
            options: dict[str, Any] = {**OPTIONS, "control": said}
            if number >= 2:
                options["control_scales"] = [0.3, 0]
                stream.update(control_scales=[0.3, 0])
            wanted = stream(Image.open(BytesIO(file)))
            client.send(options, file)
            if wanted is not None:
                np.testing.assert_array_equal(pixels(shown.next()), jpeg_pixels(wanted))
            client.until_asked()


RANDOM = int(os.environ.get("NATIVESD_RANDOM_BODIES", "12"))
GOOD: dict[str, Any] = {
    **OPTIONS, "negative_prompt": "green", "guidance_scale": 1.5, "residual": "self", "delta": 0.9, "seed": 3,
    "width": 64, "height": 64, "skip_similar": None, "control": [{"model": "tiny", "preprocess": "canny"}],
    "loras": [["tiny-lcm", 1.0]], "prompts": None, "model": "tiny", "renoise": True,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_random_messages_are_answered(server: Running, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Each by a picture or a sentence, and none by a fault of the program."""
    rng, file = random.Random(seed), frames(1)[0]
    with caplog.at_level(logging.ERROR):
        for _ in range(-(-RANDOM // 4)):
            client = Client(server)
            assert client.heard()["status"] == "connected"
            reader = Pictures(client)
            try:
                for _ in range(3):
                    options = deeply_changed(rng, GOOD, WRONG)
                    words = json.dumps(options)
                    if rng.random() < 0.2:
                        words = spoiled(rng, words.encode()).decode(errors="replace")
                    client.socket.send(json.dumps({"status": "next_frame"}))
                    client.socket.send(words.encode(), websocket.ABNF.OPCODE_BINARY if rng.random() < 0.1 else 1)
                    client.socket.send_binary(spoiled(rng, file) if rng.random() < 0.3 else file)
                    while (told := client.heard())["status"] not in ("send_frame", "error"):
                        pass
                    if told["status"] == "error":
                        assert 0 < len(told["message"]) < 2000
                        assert "fault" not in told["message"]
                        break
            except (websocket.WebSocketException, ConnectionError):
                pass  # it was told, and its connection closed, while it sent
            finally:
                client.socket.close()
                reader.answer.close()
    assert [record for record in caplog.records if not record.name.startswith("websocket")] == []
    assert server.get("/health").ok


def test_of_frames_that_wait_there_is_the_newest(server: Running, pipe: nativesd.Pipeline) -> None:
    files = frames(4)
    one = {**OPTIONS, "steps": 1}
    with connected(server) as client:
        for file in files:  # nobody reads yet, so that none is taken
            client.send(one, file)
        client.send(one, b"")
        assert client.heard() == {"status": "send_frame"}  # all that came before it are heard
        got = Pictures(client).next()
    wanted = pipe.stream(loras=["tiny-lcm"], **one)(Image.open(BytesIO(files[-1])))
    np.testing.assert_array_equal(pixels(got), jpeg_pixels(wanted))


def test_streams_and_jobs_take_turns(server: Running) -> None:
    file = frames(1)[0]
    with connected(server) as client:
        shown = Pictures(client)
        client.send({**OPTIONS, "steps": 1}, file)
        shown.next()
        client.until_asked()
        job = server.post("/jobs", SLOW).json()
        until(lambda: server.get("/jobs/" + job["id"]).json()["status"] == "running")
        client.send({**OPTIONS, "steps": 1}, file)
        assert client.heard() == {"status": "wait"}
        short = server.post("/jobs", {"prompt": PROMPT, "steps": 1}).json()
        requests.delete(f"{server.url}/jobs/{job['id']}", timeout=60)
        client.until_asked()
        shown.next()
        assert server.finished("/jobs/" + job["id"])["status"] in ("done", "cancelled")
        assert server.finished("/jobs/" + short["id"])["status"] == "done"
        client.send({**OPTIONS, "steps": 1}, file)
        shown.next()


def test_a_client_that_goes_while_it_waits_for_a_job_frees_its_place(server: Running) -> None:
    job = server.post("/jobs", SLOW).json()
    with connected(server) as client:
        shown = Pictures(client)
        until(lambda: server.get("/jobs/" + job["id"]).json()["status"] == "running")
        client.send(OPTIONS, frames(1)[0])
        assert client.heard() == {"status": "wait"}
        client.socket.close()
        until(lambda: server.get("/api/stream/" + client.name).status_code == 404, 5)
        assert server.get("/jobs/" + job["id"]).json()["status"] == "running"
        assert shown.rest() == b"--frame\r\n"
    requests.delete(f"{server.url}/jobs/{job['id']}", timeout=60)
    server.finished("/jobs/" + job["id"])


def test_a_job_with_another_model_ends_it() -> None:
    file = frames(1)[0]
    with serving(models={"one": "tiny", "two": "tiny"}) as server, connected(server) as client:
        shown = Pictures(client)
        client.send({**OPTIONS, "steps": 1}, file)
        shown.next()
        client.until_asked()
        job = server.post("/jobs", {"prompt": PROMPT, "steps": 1, "model": "two"}).json()
        assert server.finished("/jobs/" + job["id"])["status"] == "done"
        client.send({**OPTIONS, "steps": 1}, file)
        assert client.ended().startswith("a job has loaded another model")
        with connected(server) as again:
            shown = Pictures(again)
            again.send({**OPTIONS, "steps": 1, "model": "one"}, file)
            shown.next()
            again.until_asked()
            again.send({**OPTIONS, "steps": 1, "model": "two"}, file)
            assert again.ended().startswith("model is what a stream begins with")


BOMB = file_of(Image.new("1", (5000, 5000)))


@pytest.mark.parametrize(
    ("options", "data", "says"),
    [
        (OPTIONS, b"no picture", "the frame is not a picture"),
        (OPTIONS, BOMB, "the frame has 5000x5000 pixels"),
        (OPTIONS, b"x" * (routes.MOST_FRAME + 1), "a frame may have"),
        (OPTIONS, None, "picture must come as bytes"),
        ([], b"", "not a JSON object"),
        ({"prompt": "x" * routes.MOST_WORDS}, b"", "a message may have"),
        ({"prompt": 3}, frames(1)[0], "must be a text"),
        ({"strngth": 0.5}, frames(1)[0], "did you mean strength"),
        ({"width": 4096}, frames(1)[0], "width must be at most 2048"),
        ({"width": 65}, frames(1)[0], "width"),
        ({"steps": 1000}, frames(1)[0], "steps"),
        ({"prompts": [["a", 1]] * 17}, frames(1)[0], "prompts must be at most 16"),
        ({"model": "/etc/passwd"}, frames(1)[0], "there is no model"),
        ({"loras": ["/etc/passwd"]}, frames(1)[0], "there is no LoRA"),
        ({"control": ["tiny"]}, frames(1)[0], "control must"),
        ({"control": "tiny"}, frames(1)[0], "control must be a list"),
        ({"control": [{"model": "../x"}]}, frames(1)[0], "there is no ControlNet"),
        ({"control": [{"model": "tiny", "preprocess": "os.system"}]}, frames(1)[0], "control must be preprocessed"),
        ({"control": [{"model": "tiny", "image": "/etc/passwd"}]}, frames(1)[0], "control"),
        ({"control": [{"model": "tiny"}] * 17}, frames(1)[0], "control must be at most 16"),
    ],
)
def test_what_cannot_be_is_an_error_and_the_end(
    server: Running, options: object, data: bytes | None, says: str
) -> None:
    with connected(server) as client:
        shown = Pictures(client)
        client.send(options, data)
        if data is None:
            client.socket.send("{}")
        assert says in client.ended()
        assert shown.rest() == b"--frame\r\n"


def test_streams_are_bounded(pipe: nativesd.Pipeline) -> None:
    with serving(limits=Limits(streams=1)) as server:
        with connected(server) as client:
            assert server.get("/api/settings").json()["max_queue_size"] == 1
            assert server.get("/api/settings").json()["input_params"]["properties"]["width"]["default"] == 64
            assert "there is a stream" in Client(server, client.name).ended()
            assert "1 streams are open" in Client(server).ended()
            readers = [server.get(f"/api/stream/{client.name}", stream=True) for _ in range(routes.MOST_READERS)]
            until(lambda: server.get(f"/api/stream/{client.name}", stream=True).status_code == 503)
            for reader in readers:
                reader.close()
        with connected(server):
            pass
        last = Client(server)
        assert last.heard()["status"] == "connected"
        shown = Pictures(last)
    assert shown.rest() == b"--frame\r\n"  # the server has ended, and the stream with it


def test_a_client_that_does_nothing_is_told_and_ended(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PATIENCE", 0.2)
    with connected(server) as client:
        assert client.heard()["status"] == "timeout"
        assert client.socket.recv() == ""


def test_pages_of_other_origins_may_not_stream(server: Running) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
        Client(server, origin="https://example.org")


def test_a_line_is_in_the_order_of_coming() -> None:
    line = Line()
    order: list[str] = []

    def come(name: str, wanted: bool = True) -> None:
        with line.turn(lambda: wanted) as mine:
            order.append(name if mine else f"not {name}")

    with line.turn():
        threads = []
        for number, name in enumerate("abc"):
            threads.append(threading.Thread(target=come, args=(name,)))
            threads[-1].start()
            until(lambda number=number: len(line._waiting) == number + 2)
        come("d", wanted=False)  # it does not wait
    for thread in threads:
        thread.join(10)
    assert order == ["not d", "a", "b", "c"]
