"""A hub that lies: a local server with the answers of the Hugging Face hub, one of which is spoiled."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants

from nativesd.weights.files import asking
from nativesd.weights.files.hub import fetch, fetch_file
from nativesd.weights.files.remote import open_remote

COMMIT = "c0ffee" * 6 + "c0de"
MODEL = {
    "model_index.json": json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}).encode(),
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
}
"""A repository's files; not a whole model."""

API: dict[str, bytes] = {
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "nothing": b"",
    "a page": b"<!DOCTYPE html><title>Sign in</title>",
    "cut short": b'{"siblings": [{"rfilename": "model_in',
    "not UTF-8": b'{"siblings": [{"rfilename": "\xff"}]}',
    "UTF-16": '{"siblings": []}'.encode("utf-16"),
    "deep": b'{"siblings": ' + b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "twice": b'{"siblings": [], "siblings": []}',
    "NaN": b'{"siblings": [], "a": NaN}',
    "no siblings": b'{"sha": 1}',
    "siblings null": b'{"siblings": null}',
    "siblings a text": b'{"siblings": "model_index.json"}',
    "siblings of numbers": b'{"siblings": [1, 2]}',
    "siblings without names": b'{"siblings": [{}]}',
    "siblings with lists for names": b'{"siblings": [{"rfilename": ["x"]}]}',
    "siblings by the hundred thousand": b'{"siblings": ['
    + b'{"rfilename": "a/b"},' * 150_000
    + b'{"rfilename": "a"}]}',
    "names outside": b'{"siblings": [{"rfilename": "../../x"}, {"rfilename": "/etc/passwd"}, {"rfilename": ""}]}',
    "configs without end": json.dumps(
        {"siblings": [{"rfilename": "model_index.json"}] + [{"rfilename": f"tokenizer/{i}"} for i in range(5000)]}
    ).encode(),
    "a number of a million digits": b'{"siblings": ' + b"9" * 1_000_000 + b"}",
}
"""What the API may answer instead of a list of files."""

HEADERS: dict[str, dict[str, str]] = {
    "a version outside": {"ETag": '"../../x"'},
    "an absolute version": {"ETag": '"/tmp/x"'},
    "a weak version outside": {"ETag": 'W/"../../../x"'},
    "a linked version outside": {"X-Linked-Etag": '"../../x"'},
    "an empty version": {"ETag": '""'},
    "a version that is a folder": {"ETag": '".."'},
    "a version with a backslash": {"ETag": '"..\\..\\x"'},
    "a version of 5,000 characters": {"ETag": '"' + "x" * 5000 + '"'},
    "a commit outside": {"X-Repo-Commit": "../../../x"},
    "an absolute commit": {"X-Repo-Commit": "/tmp/x"},
    "an empty commit": {"X-Repo-Commit": ""},
    "a commit of capitals": {"X-Repo-Commit": "C" * 40},
    "a negative size": {"X-Linked-Size": "-1"},
    "a size beyond every disk": {"X-Linked-Size": "9" * 17},
    "a size of many digits": {"X-Linked-Size": "9" * 5000},
    "a size that is a word": {"X-Linked-Size": "large"},
    "another size": {"X-Linked-Size": "7"},
    "xet": {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": "http://127.0.0.1:9/x"},
    "10,000 links": {"Link": ", ".join(f'<http://127.0.0.1:9/{i}>; rel="next"' for i in range(1000))},
}
"""What the headers of a file may say."""

BODIES = (
    "endless", "endless chunks", "slow", "silent", "shorter", "longer", "packed", "a bomb", "garbage", "broken off",
    "slow headers", "many headers",
)  # fmt: skip
"""How an answer may come."""
STATUSES = (204, 301, 302, 304, 307, 400, 401, 403, 404, 408, 410, 416, 418, 429, 500, 502, 503, 504)
PLACES = ("api", "head", "get")


@dataclass
class Hub:
    """What is served, how `place` is spoiled, and what was asked: method, path and headers."""

    files: Mapping[str, bytes] = field(default_factory=lambda: dict(MODEL))
    place: str = ""
    fault: str | int = ""
    address: str = ""
    elsewhere: str = ""
    """What redirects lead to"""
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        self.asked.append((to.command, to.path, {name.lower(): value for name, value in to.headers.items()}))
        api = to.path.startswith("/api/")
        place = "api" if api else to.command.lower()
        if api:
            names = [{"rfilename": name} for name in self.files]
            self.reply(to, json.dumps({"sha": COMMIT, "siblings": names}).encode(), spoiled=place == self.place)
            return
        name = unquote(to.path.partition("/resolve/")[2].partition("/")[2])
        if name not in self.files:
            to.send_response(404)
            for key, value in {
                "X-Error-Code": "EntryNotFound",
                "Content-Length": "0",
                **self.said(place, name),
            }.items():
                to.send_header(key, value)
            to.end_headers()
            return
        self.reply(to, self.files[name], spoiled=place == self.place)

    def said(self, place: str, name: str) -> dict[str, str]:
        """The headers that a file has, spoiled where `place` is to be."""
        out = {"ETag": f'"{hashlib.sha1(name.encode()).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return out | (HEADERS.get(str(self.fault), {}) if place == self.place else {})

    def reply(self, to: BaseHTTPRequestHandler, body: bytes, *, spoiled: bool) -> None:
        """Send an answer, spoiled or not."""
        fault = self.fault if spoiled else ""
        headers = {"Content-Length": str(len(body))} | self.said(self.place if spoiled else "", to.path)
        status = 200
        if isinstance(fault, int):
            status, body = fault, b""
            headers |= {"Content-Length": "0", "Location": self.elsewhere + to.path, "Retry-After": "9" * 9}
        elif fault in API:
            body = API[str(fault)]
            headers["Content-Length"] = str(len(body))
        elif fault in BODIES:
            self.spoil(to, str(fault), body)
            return
        to.send_response(status)
        for name, value in headers.items():
            to.send_header(name, value)
        to.end_headers()
        if to.command != "HEAD":
            to.wfile.write(body)

    def spoil(self, to: BaseHTTPRequestHandler, how: str, body: bytes) -> None:
        """Send an answer as none should be."""
        to.close_connection = True
        end = time.monotonic() + 20
        if how == "silent":
            self.wait(to, end)
            return
        if how == "garbage":
            to.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n" * 10)
            return
        to.send_response(200)
        for name, value in self.said("", to.path).items():
            to.send_header(name, value)
        if how == "slow headers":
            while time.monotonic() < end:
                to.send_header("X-More", "x")
                to.flush_headers()
                time.sleep(0.05)
        if how == "many headers":
            for i in range(3000):
                to.send_header(f"X-{i}", "x" * 100)
        if how == "endless chunks":
            to.send_header("Transfer-Encoding", "chunked")
        elif how in ("packed", "a bomb"):
            body = zlib.compress(bytes(200_000_000)) if how == "a bomb" else zlib.compress(body)
            to.send_header("Content-Encoding", "deflate")
            to.send_header("Content-Length", str(len(body)))
        elif how != "endless":
            length = len(body) + {"shorter": -1, "longer": 9, "broken off": 9, "slow": 10**6}.get(how, 0)
            to.send_header("Content-Length", str(length))
        to.end_headers()
        if to.command == "HEAD":
            return
        block = b" " * 65536
        while how == "endless":
            to.wfile.write(block)
        while how == "endless chunks":
            to.wfile.write(b"10000\r\n" + block + b"\r\n")
        while how == "slow" and time.monotonic() < end:
            to.wfile.write(b" ")
            time.sleep(0.05)
        to.wfile.write(body[:-1] if how == "shorter" else body)

    def wait(self, to: BaseHTTPRequestHandler, end: float) -> None:
        """Say nothing until the client hangs up."""
        to.connection.settimeout(0.1)
        while time.monotonic() < end:
            with suppress(TimeoutError):
                if not to.connection.recv(1):
                    return


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Silence: clients hang up."""


def _handler(hub: Callable[[], Hub]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with suppress(OSError):
                hub().answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    return Handler


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The hub at an address of this machine, which `hub.address` and, unless it says otherwise, `elsewhere` are."""
    listener = _Listener(("127.0.0.1", 0), _handler(lambda: hub))
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    hub.address = f"http://127.0.0.1:{listener.server_address[1]}"
    hub.elsewhere = hub.elsewhere or hub.address
    try:
        yield hub
    finally:
        listener.shutdown()
        listener.server_close()


PATIENCE = 0.4
"""Seconds that are waited for the server here, so that many can be tried; users wait for 5."""


def hub(rng: random.Random, folder: Path) -> None:
    """A model fetched, a file of it, or its headers audited; nothing may be written outside of the cache."""
    place = rng.choice(PLACES)
    fault = rng.choice(list(API) if place == "api" else list(HEADERS)) if rng.random() < 0.6 else None
    if fault is None:
        fault = rng.choice((*BODIES, *STATUSES))
    served = _served()
    served.place, served.fault, served.files = place, fault, dict(MODEL)
    served.asked.clear()
    constants.HF_HUB_CACHE = str(folder / "home" / "hub")
    (folder / "x").write_bytes(b"mine")
    try:
        match rng.randrange(3):
            case 0:
                fetch("org/name", half=False)
            case 1:
                fetch_file("org/name", rng.choice(("model_index.json", "absent")))
            case _:
                open_remote("org/name")
    finally:
        if (folder / "x").read_bytes() != b"mine" or {path.name for path in folder.iterdir()} - {"home", "x"}:
            raise AssertionError("something was written outside of the cache")
        if (folder / "home").exists() and [path.name for path in (folder / "home").iterdir()] != ["hub"]:
            raise AssertionError("something was written beside the cache")


@cache
def _served() -> Hub:
    """A server that lives as long as the process."""
    made = serve(Hub())
    _kept.append(made)
    served = made.__enter__()
    constants.ENDPOINT = served.address
    constants.HUGGINGFACE_CO_URL_TEMPLATE = served.address + "/{repo_id}/resolve/{revision}/{filename}"
    asking.PATIENCE = PATIENCE
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    return served


_kept: list[object] = []
