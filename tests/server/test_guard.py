"""The door: keys, Host, Origin, bodies, and what `nativesd serve` refuses to begin with."""

from __future__ import annotations

import base64
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from conftest import Run
from nativesd.errors import NativesdError, UsageError
from nativesd.server.serve import bind
from nativesd.server.settings import Limits, Settings
from server.fixtures import PROMPT, SLOW, Running, serving, until

KEY = "a-secret-key"
HERE = {"prompt": PROMPT, "steps": 2}


def basic(text: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with serving(
        api_key=KEY, users={"anna": "päss"}, origins=("https://example.org",), limits=Limits(body=100_000)
    ) as running:
        yield running


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {KEY}"},
        basic(f"whoever:{KEY}"),
        basic("anna:päss"),
    ],
)
def test_a_key_opens(guarded: Running, headers: dict[str, str]) -> None:
    assert guarded.get("/catalogue", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": KEY},
        {"Authorization": "Basic ***"},
        {"Authorization": "Basic /w=="},
        basic("anna:pass"),
        basic("anna"),
        basic("nobody:päss"),
    ],
)
def test_nothing_else_does(guarded: Running, headers: dict[str, str]) -> None:
    for path in ("/catalogue", "/jobs", "/metrics", "/nothing"):
        answer = guarded.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic")
    assert guarded.post("/jobs", HERE, headers=headers).status_code == 401
    assert guarded.get("/health", headers=headers).status_code == 200


def test_an_empty_authorization_is_none_where_no_key_is_set(server: Running) -> None:
    assert server.get("/catalogue", headers={"Authorization": ""}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "", "a@127.0.0.1", "[::2]"]
)
def test_a_name_that_is_not_this_machines_is_refused(server: Running, host: str) -> None:
    assert server.get("/catalogue", headers={"Host": host}).status_code == 403
    assert server.post("/jobs", HERE, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:7860", "127.0.0.1", "[::1]:7860", "LOCALHOST"])
def test_the_names_of_this_machine(server: Running, host: str) -> None:
    assert server.get("/catalogue", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"])
def test_pages_of_others_change_nothing(server: Running, origin: str) -> None:
    for method in ("post", "delete", "put"):
        answer = requests.request(method, server.url + "/jobs", json=HERE, headers={"Origin": origin}, timeout=60)
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert requests.options(server.url + "/jobs", headers={"Origin": origin}, timeout=60).status_code == 403


def test_the_own_page_may_and_an_allowed_one(server: Running, guarded: Running) -> None:
    assert server.post("/jobs", HERE, headers={"Origin": server.url}).status_code == 202
    headers = {"Origin": "https://example.org", "Authorization": f"Bearer {KEY}"}
    answer = guarded.post("/jobs", HERE, headers=headers)
    assert answer.status_code == 202
    assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    asked = requests.options(guarded.url + "/jobs", headers={"Origin": "https://example.org"}, timeout=60)
    assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (204, "https://example.org")


def test_a_body_is_bounded_whatever_it_says(guarded: Running) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    assert guarded.post("/jobs", {"prompt": "a" * 100_000}, headers=headers).status_code == 413
    pieces = (b" " * 10_000 for _ in range(11))
    assert requests.post(guarded.url + "/jobs", data=pieces, headers=headers, timeout=60).status_code == 413


@pytest.mark.parametrize("path", ["/jobs", "/sdapi/v1/txt2img", "/v1/images/generations", "/prompt"])
@pytest.mark.parametrize(
    "body", [{"prompt": "a \ud800"}, {"prompt": PROMPT, "x": {"\udfff": 1}}, {"\ud83d": [1], "prompt": PROMPT}]
)
def test_half_of_a_character_is_refused(server: Running, path: str, body: dict[str, object]) -> None:
    answer = server.post(path, body)
    assert answer.status_code in (400, 422)
    assert "half of a character" in answer.text or "surrogates not allowed" in answer.text


def test_characters_in_two_halves_are_whole(server: Running) -> None:
    assert server.post("/jobs", {**HERE, "prompt": "a \U0001f353"}).status_code == 202


@pytest.mark.parametrize("length", ["-1", "9" * 30, "x"])
def test_a_length_that_is_none(server: Running, length: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
        assert connection.recv(100).split()[1] in (b"400", b"413")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"host": "0.0.0.0"}, "--api-key"),
        ({"host": "192.168.0.1"}, "everybody"),
        ({"api_key": "short"}, "8"),
        ({"origins": ("*",)}, "origin"),
        ({"apis": ("sd", "soap")}, "soap"),
        ({"queue": 0}, "queue"),
        ({"lora_dirs": (Path("/no such folder"),)}, "no folder"),
        ({"models": {}}, "no model"),
    ],
)
def test_settings_that_are_not_safe(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Settings(**options)  # type: ignore[arg-type]
    assert Settings(host="0.0.0.0", api_key=KEY).guarded


def test_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(NativesdError, match="--port"):
        bind(Settings(port=taken.getsockname()[1]))


def test_the_command_line_refuses_in_one_sentence(run: Run) -> None:
    for arguments, says in (
        (["--host", "0.0.0.0"], "--api-key"),
        (["--api-auth", "anna"], "USER:PASS"),
        (["--api-auth", "anna:a,bob:b,anna:c"], "two passwords for anna"),
        (["tiny", "tiny"], "two models"),
        (["--model-dir", "none"], "no folder"),
        (["./missing.safetensors"], "missing.safetensors"),
    ):
        done = run("serve", "--port", "0", *arguments)
        assert done.returncode in (2, 3, 4)
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_sigterm_under_load_leaves_nobody_without_an_answer() -> None:
    command = [sys.executable, "-m", "nativesd", "serve", "--port", "0", "--queue", "8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            answers, log = _ended_under_load(process)
        finally:
            process.kill()
    assert process.returncode == 0
    assert sorted(answers) == [200, 503, 503, 503]  # what ran is answered with the picture so far
    assert "Traceback" not in log


def _ended_under_load(process: subprocess.Popen[str]) -> tuple[list[int], str]:
    """The answers of four clients of a server that is told to end, and what it logged."""
    assert process.stderr is not None
    url = next(line for line in process.stderr if "listening" in line).split()[-1]
    answers: list[int] = []

    def ask() -> None:
        body = {**SLOW, "steps": 60, "width": 192, "height": 192}
        answers.append(requests.post(f"{url}/sdapi/v1/txt2img", json=body, timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: requests.get(f"{url}/health", timeout=60).json()["waiting"] == 3)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    process.wait(60)
    return answers, process.stderr.read()
