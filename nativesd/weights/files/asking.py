"""Requests to servers that may be slow, broken or hostile: every answer is bounded and checked, and waiting ends.

The requests are those of the Hugging Face hub's client, so its environment variables and a program's own settings for
it count. Hooks in that client watch what is asked for within `within`, and nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants, errors, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import _http

from nativesd.errors import NativesdError, NetworkError, SourceError, UsageError, quote
from nativesd.reading import MAX_JSON, is_name

T = TypeVar("T")

PATIENCE = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else 5.0
"""Seconds for which a server may keep us waiting, over all requests of one call."""
SLOWEST = 20_000
"""Bytes that buy a second more."""
MOST = 4.0
"""Times PATIENCE that can be saved up so."""
TRIES = 3
"""Of one call: how often a server may be in trouble, or not answer, before its client stops trying."""
OFFICIAL = ("huggingface.co", "hf.co")
"""The hosts whose files may come by xet."""
# the client's transport error, of whichever HTTP library it stands on
TRANSPORT_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
_HTTP: Any = import_module(TRANSPORT_ERROR.__module__.partition(".")[0])


class MissingError(NetworkError):
    """The server has no such file."""


def within(name: str, call: Callable[[], T], limit: int | None = None) -> T:
    """What `call` gives, whose requests are watched, and whose downloads have at most `limit` bytes.

    Messages name `name`. The call runs on a thread: the name of a host is looked up without a timeout, and headers may
    come a byte at a time. Within another call of `within`, patience is that one's.

    Raises NetworkError, SourceError where the cache cannot be used, and what `call` raises of ours.
    """
    if (outer := _watching.get()) is not None:
        return outer.during(name, call, limit)
    _install()
    outcome: Future[T] = Future()
    watch = _Watch()

    def work() -> None:
        _watching.set(watch)
        try:
            outcome.set_result(watch.during(name, call, limit))
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=work, daemon=True).start()
    while True:
        try:
            return outcome.result(timeout=max(0.02, min(watch.left, 1.0)))
        except TimeoutError:
            if outcome.done():  # the call's own
                raise
            if watch.left <= 0:
                close_session()  # or the thread would wait on, with the file's lock
            watch.check()


def refusal(status: int, headers: Mapping[str, str], name: str) -> NetworkError:
    """What a server's refusal to hand out `name` means; the hub says more in X-Error-Code."""
    kind = NetworkError
    match status, headers.get("X-Error-Code"):
        case _, "GatedRepo":
            reason = "is gated: accept its terms on the hub and set HF_TOKEN"
        case _, "RepoNotFound":
            reason = "is not on the hub, or is private: check the repository's name, or set HF_TOKEN"
        case _, "RevisionNotFound":
            reason = "is not on the hub in this revision: check the branch, tag or commit"
        case _, "EntryNotFound":
            reason, kind = "is not on the hub: its repository has no such file", MissingError
        case 401, _:
            reason = "asks for a sign-in (401): set HF_TOKEN to a valid token, or check the name"
        case 403, _:
            reason = "is refused (403): the token, if any, gives no access to it"
        case 404 | 410, _:
            reason, kind = f"is not there ({status}): check the name", MissingError
        case 429, _:
            wait = re.fullmatch("[0-9]{1,5}", headers.get("Retry-After", ""))
            reason = f"is refused for now (429): try again in {wait[0] if wait else 'some'} seconds"
        case _ if status >= 500:
            reason = f"cannot be had, as the server is in trouble ({status}): try again later"
        case _:
            reason = f"cannot be had, as the server answered {status}: check the address"
    return kind(f"{name} {reason}")


class _Watch:
    """What the requests of one call have cost so far."""

    def __init__(self) -> None:
        self.name, self.what = "", "an answer"
        self._limit: int | None = None
        self._left, self._since, self._waiting = PATIENCE, monotonic(), False
        self._unanswered = self._troubled = 0
        self._trouble: NetworkError | None = None
        self._size: int | None = None

    def during(self, name: str, call: Callable[[], T], limit: int | None) -> T:
        """What a call gives, or its fault in a sentence."""
        before = self.name, self._limit, self._size
        self.name, self._limit, self._size = name, limit, None
        try:
            return call()
        except NativesdError:
            raise
        except Exception as error:
            raise _explained(error, self) from error
        finally:
            self.name, self._limit, self._size = before

    @property
    def left(self) -> float:
        """Seconds of patience."""
        return self._left - (monotonic() - self._since if self._waiting else 0)

    def check(self) -> None:
        """Raises NetworkError where the server was too slow."""
        if self.left <= 0:
            raise self._trouble or self.too_slow()

    def too_slow(self) -> NetworkError:
        """What is said where patience ends, here or in the client's own timeouts, whichever is first."""
        return NetworkError(
            f"{self.name} cannot be reached (the server took over {PATIENCE:g} s for {self.what}, or sent under"
            f" {SLOWEST // 1000} kB a second): try again later, or wait longer with HF_HUB_ETAG_TIMEOUT=60"
        )

    def asked(self, request: Any) -> None:
        """A request goes out: its timeouts are ours, and its answer is to come as it is."""
        self._left, self._since, self._waiting = self.left, monotonic(), True
        self.what = _what(str(request.url))
        self.check()
        self._unanswered += 1
        if self._unanswered > TRIES:
            raise NetworkError(f"{self.name} cannot be reached (no answer in {TRIES} tries): check the connection")
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), self.left)
        request.headers["Accept-Encoding"] = "identity"

    def answered(self, response: Any) -> None:
        """An answer begins: what the client takes for names in its cache has to be names."""
        self._unanswered = 0
        status, headers, method = response.status_code, response.headers, response.request.method
        if status >= 400 and status != 416:
            error = refusal(status, headers, self.name)
            if status < 500:
                raise error
            self.failed(error)
            return
        if response.request.url.host not in OFFICIAL:  # what xet's own client does cannot be watched
            headers.pop(constants.HUGGINGFACE_HEADER_X_XET_HASH, None)
        commit = headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
        if commit is not None and not re.fullmatch("[0-9a-f]{40}", commit):
            raise self._nonsense(f"names {quote(commit)} as the commit")
        if method == "HEAD":
            self._size = self._stated(headers)
        limit = self._size if self._size is not None or "Content-Length" in headers else MAX_JSON
        response.stream = _Bounded(response.stream, self, limit if method == "GET" else None)

    def received(self, count: int) -> None:
        """Bytes of a body are there."""
        self._left = min(self._left + count / SLOWEST, MOST * PATIENCE + monotonic() - self._since)
        self.check()

    def failed(self, error: NetworkError) -> None:
        """An answer is none, or broke off: the client asks again, but not for ever."""
        self._trouble = error
        self._troubled += 1
        if self._troubled == TRIES:
            raise error

    def pause(self) -> None:
        """An answer is there, whole or as much as is wanted."""
        self._left, self._waiting = self.left, False

    def _stated(self, headers: Mapping[str, str]) -> int | None:
        """The size of a file that is to be downloaded, after a look at its version."""
        tag = headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) or headers.get("ETag")
        if tag is not None and not (is_name(plain := tag.lstrip("W/").strip('"')) and len(plain) <= 200):
            raise self._nonsense(f"names {quote(tag)} as the version")
        stated = headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_SIZE) or headers.get("Content-Length")
        if stated is None or not re.fullmatch("[0-9]{1,18}", stated):
            return self._limit
        if self._limit is not None and int(stated) > self._limit:
            raise NetworkError(
                f"{self.name} cannot be had: it has {stated} bytes, more than the {self._limit} that it may have"
            )
        free = _free(Path(constants.HF_HUB_CACHE))
        if free is not None and int(stated) > free:
            raise NetworkError(
                f"{self.name} cannot be had: {self.what} has {int(stated) / 1e9:.1f} GB, and the hub's cache,"
                f" {constants.HF_HUB_CACHE}, has room for {free / 1e9:.1f} GB"
            )
        return int(stated)

    def _nonsense(self, what: str) -> NetworkError:
        return NetworkError(f"{self.name} cannot be had: the server {what} of {self.what}; check HF_ENDPOINT")


class _Bounded(_HTTP.SyncByteStream):  # type: ignore[misc]  # which of two libraries it is, is known at run time
    """A body that ends where it has more bytes than the limit, or comes too slowly."""

    def __init__(self, stream: Any, watch: _Watch, limit: int | None) -> None:
        self._stream, self._watch, self._limit = stream, watch, limit

    def __iter__(self) -> Iterator[bytes]:
        total, chunks = 0, iter(self._stream)
        while True:
            try:
                chunk = next(chunks, None)
            except TRANSPORT_ERROR as error:
                self._watch.failed(_unreached(error, self._watch))
                raise
            if chunk is None:
                return
            total += len(chunk)
            self._watch.received(len(chunk))
            if self._limit is not None and total > self._limit:
                raise NetworkError(
                    f"{self._watch.name} cannot be had: the server sends more than {self._limit} bytes as"
                    f" {self._watch.what}; check HF_ENDPOINT"
                )
            yield chunk

    def close(self) -> None:
        """Let the connection go."""
        self._watch.pause()
        self._stream.close()


_watching: ContextVar[_Watch | None] = ContextVar("watching", default=None)


def _install() -> None:
    """Have the clients that the hub's library makes from now on, by whatever settings, tell the watch."""
    make = _http._GLOBAL_CLIENT_FACTORY  # there is no public name for it
    if getattr(make, "is_watched", False):
        return

    def factory() -> Any:
        client = make()
        hooks = client.event_hooks
        client.event_hooks = {"request": [*hooks["request"], _asked], "response": [*hooks["response"], _answered]}
        return client

    factory.is_watched = True  # type: ignore[attr-defined]
    set_client_factory(factory)


def _asked(request: Any) -> None:
    if (watch := _watching.get()) is not None:
        watch.asked(request)


def _answered(response: Any) -> None:
    if (watch := _watching.get()) is not None:
        watch.answered(response)


def _what(url: str) -> str:
    """What a request is for, in words."""
    path = urlsplit(url).path
    if "/api/" in path:
        return "the list of files"
    return quote(unquote(path.rpartition("/resolve/")[2].partition("/")[2] or path.rpartition("/")[2]) or "/")


def _free(folder: Path) -> int | None:
    """Bytes that a disk has free, on which a folder is or would be."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def _explained(error: Exception, watch: _Watch) -> NativesdError:
    """What the hub's client raised, in a sentence."""
    name = watch.name
    match error:
        case OfflineModeIsEnabled():
            return NetworkError(f"{name} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it")
        case LocalEntryNotFoundError():
            cause = error.__cause__
            return _explained(cause, watch) if isinstance(cause, Exception) else _unreached(error, watch)
        case HfHubHTTPError():
            return refusal(error.response.status_code, error.response.headers, name)
        case HFValidationError():
            return UsageError(f"{name} names nothing on the hub: a repository is owner/name")
        case UnicodeError():
            return NetworkError(f"{name} cannot be asked for: HF_TOKEN, or the token that is signed in, is no token")
        case OSError(filename=str(path)):
            return SourceError(f"the hub's cache cannot be used: {path}: {error.strerror}; check HF_HOME and the disk")
        case _ if isinstance(error, OSError | TRANSPORT_ERROR):
            return _unreached(error, watch)
    return NetworkError(f"{name} cannot be had: the server's answer is not the hub's ({error}); check HF_ENDPOINT")


def _unreached(error: Exception, watch: _Watch) -> NetworkError:
    reason = str(error) or type(error).__name__
    if "timed out" in reason:
        return watch.too_slow()
    return NetworkError(f"{watch.name} cannot be reached ({reason}): check the connection, or try again later")
