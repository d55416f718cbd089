"""Headers of safetensors files on the Hugging Face hub, or at any URL, by HTTP range requests: never the tensors.

The hub's own client makes the requests, so HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and proxies count as with it;
it keeps the token from hosts that it is redirected to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache

from nativesd.config import Config
from nativesd.errors import NetworkError, SourceError, UsageError, quote
from nativesd.weights.files.asking import refusal, within
from nativesd.weights.files.configs import component_config
from nativesd.weights.files.folder import INDEX, component_file, weight_file
from nativesd.weights.files.hub import fetch_configs, headers_for, list_files
from nativesd.weights.files.source import UNUSED, Member, components, from_headers
from nativesd.weights.formats.header import HEAD, Header, header_length, parse_header, read_header, read_index

FIRST = 512 * 1024
"""Bytes of the first request, which are the only ones where the header is no longer (SDXL in one file: 0.4 MB)."""


def open_remote(source: str, *, revision: str | None = None) -> list[Member]:
    """The checkpoints of a hub repository, of one file in it (org/name/file.safetensors), or at a URL: headers alone.

    Raises SourceError and NetworkError.
    """
    if "://" in source:
        return [from_headers("", {Path(source): fetch_url_header(source)}, local=False)]
    return within(source, lambda: _open_repository(source, revision))


def _open_repository(source: str, revision: str | None) -> list[Member]:
    owner, name, *inside = source.split("/")
    repo_id = f"{owner}/{name}"

    def fetch(component: str, files: list[str], config: Config | None) -> Member:
        headers = {Path(file): fetch_header(repo_id, file, revision=revision) for file in files}
        return from_headers(component, headers, config, local=False)

    if inside:
        return [fetch("", ["/".join(inside)], None)]
    names = list_files(repo_id, revision=revision)
    folder = fetch_configs(repo_id, names, revision=revision)
    if folder is None or INDEX not in names:
        whole = component_file(
            [name for name in names if ".safetensors" in name and "/" not in name], repo_id, half=False
        )
        config = component_config(folder / "config.json") if folder is not None and "config.json" in names else None
        return [fetch("", _shards(folder, whole), config)]
    out = []
    for component in components(folder):
        chosen = weight_file(names, component, half=False)
        if chosen is None and component in UNUSED:
            continue
        if chosen is None:
            raise SourceError(f"{repo_id} has no weights in {component}/ that can be read")
        config = None if component in UNUSED else component_config(folder / component / "config.json")
        out.append(fetch(component, _shards(folder, chosen), config))
    return out


def _shards(folder: Path | None, file: str) -> list[str]:
    """A repository's file, or the shards of which it is the index, which lies in `folder`. Raises SourceError."""
    if not file.endswith(".json") or folder is None:
        return [file]
    inside = file.rpartition("/")[0]
    return [f"{inside}/{shard}" if inside else shard for shard in sorted(set(read_index(folder / file).values()))]


def fetch_header(repo_id: str, filename: str, *, revision: str | None = None) -> Header:
    """The header of a file on the hub, from the cache if it is there, else in one request, or two if it is over FIRST.

    Raises NetworkError, UsageError for names that cannot be, and SourceError as `read_header` does.
    """
    name = f"{repo_id}/{filename}" + (f" at revision {revision}" if revision else "")
    if not name.isprintable() or {"", ".", ".."} & set(filename.split("/")):
        raise UsageError(f"{name!a} names no file of a repository: give its path as the hub lists it")
    try:
        cached = try_to_load_from_cache(repo_id, filename, revision=revision)
        url = hf_hub_url(repo_id, filename, revision=revision)
    except ValueError as error:
        raise UsageError(f"{repo_id!r} is no repository on the hub: it has to be owner/name") from error
    except OSError as error:
        raise SourceError(f"the hub's cache cannot be read: {error}; check HF_HOME and the rights to it") from error
    if isinstance(cached, str):
        return read_header(Path(cached))
    _split(url)
    return within(name, lambda: _fetch(url, name, signed_in=True))


def fetch_url_header(url: str) -> Header:
    """The header of a safetensors file at an http(s) URL; HF_TOKEN goes to the hub alone. Raises as `fetch_header`."""
    parts = _split(url)
    hub = _split(constants.ENDPOINT)
    on_hub = (parts.scheme, parts.netloc) == (hub.scheme, hub.netloc)
    name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # no password, no signature
    return within(name, lambda: _fetch(url, name, signed_in=on_hub))


@dataclass(frozen=True)
class _Part:
    """Some bytes of a file, how long the whole is, and the tag of its version ("" where the server gives none)."""

    data: bytes
    total: int
    tag: str


def _fetch(url: str, name: str, *, signed_in: bool) -> Header:
    """The header of the file at `url`, which messages call `name`. Raises SourceError, NetworkError."""
    headers = headers_for(signed_in=signed_in)
    first = _read(url, name, headers, 0, FIRST)
    stop = 8 + header_length(first.data[:HEAD], first.total, name)
    raw = first.data[8:stop]
    if stop > FIRST:
        rest = _read(url, name, headers, FIRST, stop)
        if (rest.total, rest.tag) != (first.total, first.tag):
            raise NetworkError(f"{name} changed while its header was read: try again")
        raw += rest.data
    return parse_header(raw, first.total, name)


def _read(url: str, name: str, headers: Mapping[str, str], start: int, stop: int) -> _Part:
    """The bytes [start, stop) of a file, or to its end. A server that sends the whole file is cut off at `stop`."""
    asked = {**headers, "Range": f"bytes={start}-{stop - 1}"}
    data = bytearray()
    with get_session().stream("GET", url, headers=asked, follow_redirects=True) as response:
        status, answered = response.status_code, response.headers
        if status == 416 and answered.get("Content-Range") == "bytes */0":
            return _Part(b"", 0, "")
        if status not in (200, 206):
            raise refusal(status, answered, name)
        begin, total = _extent(status, answered)
        if begin not in (0, start) or total is None or answered.get("Content-Encoding", "identity") != "identity":
            raise NetworkError(f"{name} comes without its length, or packed: download it, and read it from there")
        stop = min(stop, total)
        for chunk in response.iter_raw():
            data += chunk
            if len(data) >= stop - begin:
                break
    if len(data) < stop - begin:
        raise NetworkError(f"{name} broke off after {len(data)} of {stop - begin} bytes: try again")
    return _Part(bytes(data[start - begin : stop - begin]), total, answered.get("ETag", ""))


def _extent(status: int, headers: Mapping[str, str]) -> tuple[int, int | None]:
    """At which byte an answer's body begins, and the length of the whole file, None where it is not said."""
    if status == 206:
        found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", headers.get("Content-Range", ""))
        return (int(found[1]), int(found[2])) if found else (0, None)
    length = headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None


def _split(url: str) -> SplitResult:
    """The parts of an http(s) URL. Raises UsageError."""
    try:
        parts = urlsplit(url)
        host = re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", parts.hostname or "")
        valid = host and parts.scheme in ("http", "https") and parts.port != 0 and re.fullmatch(r"[!-~]+", url)
    except ValueError:
        valid = None
    if not valid:
        raise UsageError(f"{quote(url)} is no http(s) address: write it as https://host/path/file.safetensors")
    return parts
