"""The door: who may ask, from where, and how much. Everything passes it before anything is read."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nativesd.server.settings import Settings, is_loopback
from nativesd.server.wire.answers import Refusal, plain

OPEN = ("/health",)
"""Paths that need no key."""
SAFE = ("GET", "HEAD", "OPTIONS")


class Guard:
    """ASGI middleware.

    Host     on loopback it must be a name of this machine, so that no page reaches it by a name of its own that leads
             here (DNS rebinding)
    Origin   of what changes anything, and of WebSockets: where a browser says one, it is the server's own or allowed
    key      "Authorization: Bearer KEY", or Basic with the key as the password, or with a user's name and password;
             compared in constant time
    body     at most so many bytes, whatever its header says
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self._allowed_hosts = {urlsplit(origin).hostname for origin in settings.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, or refuse."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin in self.settings.origins
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and origin is not None:
            await self._preflight(allowed, headers)(scope, receive, send)
            return
        refusal = self._refusal(scope, headers, allowed)
        if refusal is not None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.message})
            else:
                await plain(refusal)(scope, receive, self._marked(send, origin if allowed else None))
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        await self._bounded(scope, headers, receive, self._marked(send, origin if allowed else None))

    def _refusal(self, scope: Scope, headers: Headers, allowed: bool) -> Refusal | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.settings.loopback and not self._is_ours(host):
            return Refusal(403, f"the Host {host[:100]!r} is not this server: use its own address", code="host")
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE
        if changes and origin is not None and not allowed and urlsplit(origin).netloc != host:
            return Refusal(
                403, f"pages of {origin[:100]} may not use this server: allow it with --allow-origin", code="origin"
            )
        if scope["path"] not in OPEN and not self._may_enter(headers.get("authorization", "")):
            return Refusal(
                401,
                "this server needs a key: send it as Authorization: Bearer KEY, or as the password of any user",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="nativesd", charset="UTF-8"'},
            )
        return None

    def _is_ours(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname if "/" not in host and "@" not in host else None
        return name is not None and (is_loopback(name) or name in self._allowed_hosts)

    def _may_enter(self, authorization: str) -> bool:
        settings = self.settings
        if not settings.guarded:
            return True
        scheme, _, value = authorization.partition(" ")
        key = settings.api_key
        if scheme.lower() == "bearer":
            return key is not None and _same(value.strip(), key)
        if scheme.lower() != "basic":
            return False
        try:
            name, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return False
        by_key = key is not None and _same(password, key)
        by_name = [_same(name, user) & _same(password, secret) for user, secret in settings.users.items()]
        return by_key | any(by_name)

    def _preflight(self, allowed: bool, headers: Headers) -> Response:
        """The answer to a browser that asks whether a page may ask."""
        if not allowed:
            return Response(status_code=HTTPStatus.FORBIDDEN)
        return Response(
            status_code=HTTPStatus.NO_CONTENT,
            headers={
                **_cors(headers["origin"]),
                "Access-Control-Allow-Methods": "GET, POST, DELETE",
                "Access-Control-Allow-Headers": "Authorization, Content-Type",
                "Access-Control-Max-Age": "600",
            },
        )

    def _marked(self, send: Send, origin: str | None) -> Send:
        """Answers say that their type is no guess, and to an allowed origin that its pages may read them."""

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["X-Content-Type-Options"] = "nosniff"
                if origin is not None:
                    answer.update(_cors(origin))
            await send(message)

        return marked

    async def _bounded(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """Answer 413 for a body that is too large, and read no more of it."""
        most, got = self.settings.limits.body, 0
        refusal = Refusal(413, f"the body may have {most} bytes", code="too_large", headers={"Connection": "close"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            await plain(refusal)(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > most:
                raise refusal  # where the handler reads, which says it in its API's form
            return message

        await self.app(scope, counted, send)


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


def _cors(origin: str) -> Mapping[str, Any]:
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true", "Vary": "Origin"}
