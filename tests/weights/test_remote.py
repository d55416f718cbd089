"""Headers over HTTP: how many requests and bytes, where the token goes, and every way in which a server can fail."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from nativesd.errors import NativesdError, NetworkError, SourceError, UsageError
from nativesd.weights.files import asking
from nativesd.weights.files.hub import list_files
from nativesd.weights.files.remote import FIRST, fetch_header, fetch_url_header

FILE = "unet/diffusion_pytorch_model.safetensors"


def make_file(tensors: int, *, note: str = "") -> tuple[bytes, int]:
    """The header of a file of `tensors` tensors, with its length before it, and how long the file would be."""
    size = 2_000_000
    data = {
        f"model.diffusion_model.input_blocks.{i}.1.transformer_blocks.0.attn1.to_q.weight": {
            "dtype": "F16", "shape": [1000, 1000], "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(tensors)
    }  # fmt: skip
    raw = json.dumps({"__metadata__": {"note": note}} | data).encode()
    return len(raw).to_bytes(8, "little") + raw, 8 + len(raw) + tensors * size


SMALL = make_file(3)
SDXL = make_file(2515)
HUGE = make_file(2515, note="x" * FIRST)


@dataclass
class Server:
    """A server's files and manners, and what was asked of it. The data of a file is made up as it is sent."""

    head: bytes = SMALL[0]
    size: int = SMALL[1]
    manner: str = ""
    redirect: str = ""
    address: str = ""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """The handler that behaves so."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                with suppress(ConnectionError):
                    server.answer(self, len(server.requests))

            def log_message(self, format: str, *args: object) -> None:
                """Silence."""

        return Handler

    def answer(self, to: BaseHTTPRequestHandler, number: int) -> None:
        """Answer one request, the `number`th."""
        etag = '"two"' if self.manner == "new etag" and number > 1 else '"one"'
        size = self.size + 8 if self.manner == "new size" and number > 1 else self.size
        headers = {"ETag": etag, "Content-Type": "application/octet-stream"}
        if self.redirect:
            return self.reply(to, 302, {"Location": self.redirect + to.path, "Content-Length": "0"})
        if self.manner.isdecimal():
            body = b'{"error":"no"}'
            more = {"X-Error-Code": to.path.split("/")[1]} if to.path.startswith("/X-") else {}
            return self.reply(to, int(self.manner), {"Content-Length": str(len(body)), "Retry-After": "7"} | more, body)
        if self.manner in ("GatedRepo", "RepoNotFound", "RevisionNotFound", "EntryNotFound"):
            status = 403 if self.manner == "GatedRepo" else 404
            return self.reply(to, status, {"Content-Length": "0", "X-Error-Code": self.manner})
        if self.manner == "silence" or (self.manner == "silence later" and number > 1):
            time.sleep(3)
            return None
        if self.manner == "drip":
            to.send_response(200)
            for i in range(100):
                to.send_header(f"X-{i}", "x")
                to.flush_headers()
                time.sleep(0.1)
            return None
        if self.manner == "endless redirects":
            return self.reply(to, 302, {"Location": to.path, "Content-Length": "0"})
        if self.manner == "bad redirect":
            return self.reply(to, 302, {"Location": "http://[", "Content-Length": "0"})
        if self.manner == "redirect to a file":
            return self.reply(to, 302, {"Location": "file:///etc/passwd", "Content-Length": "0"})
        if self.manner == "garbage":
            to.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            to.close_connection = True
            return None
        if size == 0:
            return self.reply(to, 416, {"Content-Range": "bytes */0", "Content-Length": "0"})
        if self.manner == "packed":
            headers["Content-Encoding"] = "gzip"
        if self.manner == "no length":
            to.close_connection = True
            return self.reply(to, 200, headers | {"Connection": "close"}, self.head)
        match = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", to.headers["Range"])
        assert match is not None
        start, stop = int(match[1]), min(int(match[2]) + 1, size)
        if self.manner in ("ignores ranges", "ignores ranges, short"):
            length = size if self.manner == "ignores ranges" else size + 99
            return self.reply(to, 200, headers | {"Content-Length": str(length)}, self.head, size)
        if self.manner == "another range":
            start += 1
        total = "*" if self.manner == "unknown total" else str(size)
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{total}", "Content-Length": str(stop - start)}
        body = self.head[start:stop]
        if self.manner == "breaks off":
            to.close_connection = True
            return self.reply(to, 206, headers, body[:100])
        if self.manner == "sends less":
            headers |= {"Content-Range": f"bytes {start}-{start + 99}/{size}", "Content-Length": "100"}
            return self.reply(to, 206, headers, body[:100])
        return self.reply(to, 206, headers, body, stop - start)

    def reply(
        self, to: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b"", length: int = 0
    ) -> None:
        """Send an answer whose body is filled up with zeros to `length`."""
        to.send_response(status)
        for name, value in headers.items():
            to.send_header(name, value)
        to.end_headers()
        to.wfile.write(body)
        self.sent += len(body)
        rest = length - len(body)
        while rest > 0:
            to.wfile.write(bytes(min(rest, 65536)))
            self.sent += min(rest, 65536)
            rest -= 65536


class Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Silence for clients that hang up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def serve(server: Server) -> Iterator[Server]:
    listener = Listener(("127.0.0.1", 0), server.handler())
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.address = f"http://127.0.0.1:{listener.server_address[1]}"
    yield server
    listener.shutdown()
    listener.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A hub that everything is asked of, with an empty cache and a token."""
    for server in serve(Server()):
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        close_session()


@pytest.fixture
def elsewhere() -> Iterator[Server]:
    """A second server, on another port and so of another origin."""
    yield from serve(Server())


def test_one_request_for_sdxl(hub: Server) -> None:
    hub.head, hub.size = SDXL
    header = fetch_header("someone/sdxl", FILE)
    assert len(header.tensors) == 2515
    assert header.file_size == SDXL[1] > 5e9
    ((path, asked),) = hub.requests
    assert path == f"/someone/sdxl/resolve/main/{FILE}"
    assert asked["range"] == f"bytes=0-{FIRST - 1}"
    assert asked["authorization"] == "Bearer hf_secret"
    assert hub.sent == FIRST


def test_two_requests_for_a_header_over_the_first(hub: Server) -> None:
    hub.head, hub.size = HUGE
    header = fetch_header("someone/huge", FILE, revision="refs/pr/1")
    assert header.metadata == {"note": "x" * FIRST}
    assert [asked["range"] for _, asked in hub.requests] == [
        f"bytes=0-{FIRST - 1}",
        f"bytes={FIRST}-{len(HUGE[0]) - 1}",
    ]
    assert hub.requests[0][0] == f"/someone/huge/resolve/refs%2Fpr%2F1/{FILE}"
    assert hub.sent == len(HUGE[0]) < 2_000_000


@pytest.mark.parametrize("content", [SMALL, SDXL, HUGE])
def test_a_server_that_ignores_ranges_is_cut_off(hub: Server, content: tuple[bytes, int]) -> None:
    """The system's buffers take some megabytes that are never read; of 7 GB, no more."""
    hub.head, hub.size = content
    hub.manner = "ignores ranges"
    assert fetch_header("someone/model", FILE).file_size == content[1]
    assert len(hub.requests) <= 2
    assert hub.sent < 2 * 16_000_000


def test_a_file_shorter_than_the_first_request(hub: Server) -> None:
    raw = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    hub.head = len(raw).to_bytes(8, "little") + raw + b"\0\0"
    hub.size = len(hub.head)
    assert fetch_header("someone/model", FILE).tensors["a"].shape == (2,)


@pytest.mark.parametrize("own_host", [True, False])
def test_a_redirect_keeps_the_range_and_not_the_token(hub: Server, elsewhere: Server, own_host: bool) -> None:
    elsewhere.head, elsewhere.size = HUGE
    if own_host:
        hub.head, hub.size = HUGE
    hub.redirect = elsewhere.address
    assert len(fetch_header("someone/model", FILE).tensors) == 2515
    assert len(hub.requests) == len(elsewhere.requests) == 2
    assert all("authorization" in asked for _, asked in hub.requests)
    assert not any("authorization" in asked or "cookie" in asked for _, asked in elsewhere.requests)
    assert all("range" in asked for _, asked in elsewhere.requests)


def cache(folder: Path, content: bytes, name: str = FILE) -> Path:
    """Put a file into a hub cache as its client does."""
    repository = folder / "models--someone--model"
    path = repository / "snapshots" / ("c" * 40) / name
    path.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    path.write_bytes(content)
    return path


def test_a_cached_file_needs_no_request(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache(tmp_path / "hub", b"\x02\0\0\0\0\0\0\0{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_header("someone/model", FILE).file_size == 10
    path.write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    with pytest.raises(SourceError, match=re.escape(str(path))):
        fetch_header("someone/model", FILE)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE forbids"):
        fetch_header("someone/model", FILE, revision="other")
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE forbids"):
        list_files("someone/model")
    assert hub.requests == []


FAULTS = {
    "GatedRepo": "is gated: accept its terms on the hub and set HF_TOKEN",
    "RepoNotFound": "is not on the hub, or is private",
    "RevisionNotFound": "is not on the hub in this revision",
    "EntryNotFound": "its repository has no such file",
    "401": "asks for a sign-in (401): set HF_TOKEN",
    "403": "is refused (403)",
    "404": "is not there (404): check the name",
    "410": "is not there (410)",
    "418": "the server answered 418",
    "429": "is refused for now (429): try again in 7 seconds",
    "500": "the server is in trouble (500): try again later",
    "503": "the server is in trouble (503)",
    "304": "the server answered 304",
    "silence": "the server took over 1 s",
    "drip": "the server took over 1 s",
    "endless redirects": "redirects",
    "bad redirect": "cannot be reached",
    "redirect to a file": "cannot be reached",
    "garbage": "cannot be reached",
    "breaks off": "cannot be reached",
    "sends less": "broke off after 100 of",
    "another range": "comes without its length, or packed",
    "unknown total": "comes without its length, or packed",
    "no length": "comes without its length, or packed",
    "packed": "comes without its length, or packed",
    "new etag": "changed while its header was read: try again",
    "new size": "changed while its header was read: try again",
    "silence later": "the server took over 1 s",
}


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "PATIENCE", 1.0)


@pytest.mark.parametrize("manner", FAULTS)
def test_every_fault_is_told(hub: Server, manner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if manner in ("silence", "silence later", "drip"):
        be_impatient(monkeypatch)
    hub.manner = manner
    hub.head, hub.size = HUGE
    started = time.monotonic()
    with pytest.raises(NetworkError) as caught:
        fetch_header("someone/model", FILE)
    message = str(caught.value)
    assert message.startswith(f"someone/model/{FILE} ")
    assert FAULTS[manner] in message
    assert ": " in message
    assert message.isprintable()
    assert "hf_secret" not in message
    assert time.monotonic() - started < 8


def test_a_slow_body_ends(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never silent for long, yet never done."""
    be_impatient(monkeypatch)

    def drip(to: BaseHTTPRequestHandler, number: int) -> None:
        hub.reply(to, 206, {"Content-Range": "bytes 0-524287/9999999", "Content-Length": "524288"})
        for _ in range(50):
            to.wfile.write(b"x")
            time.sleep(0.1)

    monkeypatch.setattr(hub, "answer", drip)
    with pytest.raises(NetworkError, match=r"took over 1 s for .*/diffusion_pytorch_model.safetensors.*under 20 kB"):
        fetch_header("someone/model", FILE)


def test_bad_content_is_a_source_error(hub: Server) -> None:
    for content, words in (
        (b"", "is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        (b"\x02\0\0\0\0\0\0\0[]", "does not begin with"),
        (b"\xff" * 99, "over the format's limit"),
        (b"\x02\x09\0\0\0\0\0\0{}", "cut short"),
    ):
        hub.head, hub.size = content, len(content)
        with pytest.raises(SourceError, match=words) as caught:
            fetch_header("someone/model", FILE)
        assert str(caught.value).startswith(f"someone/model/{FILE} is" if words != "does not begin with" else "someone")


def test_a_refused_connection(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(NetworkError, match=r"cannot be reached \(.*refused.*\): check the connection"):
        fetch_url_header(f"{address}/x.safetensors")
    with pytest.raises(NetworkError, match="cannot be reached"):
        fetch_url_header("http://does-not-exist.invalid/x.safetensors")


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "a b", "../x", "a\nb", "/", "-", "x" * 200])
def test_names_that_cannot_be(hub: Server, repo_id: str) -> None:
    with pytest.raises(UsageError):
        fetch_header(repo_id, FILE)
    with pytest.raises(UsageError):
        list_files(repo_id)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "/etc/passwd", "a//b", "../../../x.safetensors", "a\0b", "a\x1bb", "\ud800"])
def test_file_names_that_cannot_be(hub: Server, name: str) -> None:
    with pytest.raises(UsageError):
        fetch_header("someone/model", name)
    assert hub.requests == []


def test_a_token_that_is_none(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_☃")
    for call in (lambda: fetch_header("someone/model", FILE), lambda: list_files("someone/model")):
        with pytest.raises(NetworkError, match="is no token"):
            call()


def test_a_url(hub: Server, elsewhere: Server) -> None:
    assert len(fetch_url_header(f"{elsewhere.address}/a/x.safetensors?signature=1").tensors) == 3
    ((path, asked),) = elsewhere.requests
    assert path == "/a/x.safetensors?signature=1"
    assert "authorization" not in asked
    assert len(fetch_url_header(f"{hub.address}/someone/model/resolve/main/{FILE}").tensors) == 3
    assert hub.requests[0][1]["authorization"] == "Bearer hf_secret"


def test_a_url_keeps_its_secrets(elsewhere: Server) -> None:
    elsewhere.manner = "403"
    url = elsewhere.address.replace("//", "//user:password@") + "/x.safetensors?signature=1#part"
    with pytest.raises(NetworkError) as caught:
        fetch_url_header(url)
    assert str(caught.value).startswith(f"{elsewhere.address}/x.safetensors is refused (403)")


@pytest.mark.parametrize(
    "url",
    ["", "x.safetensors", "ftp://host/x", "file:///etc/passwd", "http://", "http://[", "http://a:99999999/x",
     "http://a b/x", "http://a:0/x", "http://\u2603/x", "http://a/\0", "http://a/\n", "http:///x", "https:x"],
)  # fmt: skip
def test_urls_that_cannot_be(url: str) -> None:
    with pytest.raises(UsageError, match=r"is no http\(s\) address"):
        fetch_url_header(url)


@pytest.mark.parametrize(
    "url", ["http://xn--/x", f"http://{'a' * 70}.invalid/x", "http://[::1]:1/x", "http://1.2.3.4.5/x"]
)
def test_strange_hosts_are_not_reached(url: str) -> None:
    with pytest.raises(NativesdError):
        fetch_url_header(url)


class Listing(BaseHTTPRequestHandler):
    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def listing(hub: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Listing]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield Listing
    server.shutdown()
    server.server_close()


def test_files_are_listed(listing: type[Listing]) -> None:
    listing.body = json.dumps({"id": "a/b", "siblings": [{"rfilename": "b"}, {"rfilename": "a/c"}]}).encode()
    assert list_files("a/b") == ["a/c", "b"]
    for body in (b"", b"[]", b"3", b"<html>", b'{"id": "a/b", "siblings": [1]}', b'{"siblings": [{}]}'):
        listing.body = body
        with pytest.raises(NetworkError, match="gave no list of a/b's files"):
            list_files("a/b")


PROCESS = """
import sys
from nativesd.weights.files.remote import fetch_header
from nativesd.errors import NativesdError
try:
    print(len(fetch_header("someone/model", "x.safetensors").tensors))
except NativesdError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_the_environment_counts(elsewhere: Server, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE, which the client reads when it is imported."""

    def run(**environment: str) -> tuple[int, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        base = {"HF_ENDPOINT": elsewhere.address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_mine"}
        done = subprocess.run(
            [sys.executable, "-c", PROCESS], env=inherited | base | environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    assert run() == (0, "3\n")
    assert elsewhere.requests[0][1]["authorization"] == "Bearer hf_mine"
    code, message = run(HF_HUB_OFFLINE="1")
    assert code == 4
    assert "HF_HUB_OFFLINE forbids" in message
    assert len(elsewhere.requests) == 1
    cache(tmp_path / "hub", b"\x02\0\0\0\0\0\0\0{}", "x.safetensors")
    assert run(HF_HUB_OFFLINE="1") == (0, "0\n")
    assert len(elsewhere.requests) == 1
