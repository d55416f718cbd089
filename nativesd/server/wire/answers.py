"""Answers: what is refused, in one sentence and with a status, in the form of the API that was asked."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nativesd.errors import NativesdError
from nativesd.server.jobs.desk import Closing, QueueFull
from nativesd.server.jobs.job import Job

log = logging.getLogger("nativesd.server")


class Refusal(Exception):  # noqa: N818  # the client's mistake, or nobody's
    """A request that gets no picture. `field` names what of it is meant, `headers` go with the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code
        self.headers = dict(headers or {})


Handler = Callable[[Request], Awaitable[Response]]
Style = Callable[[Refusal], Response]
"""How an API says a refusal."""
_FIELD = re.compile(
    r"(?!there |nothing )([a-z]\w*)(?=(?:\[\d+\])?(?:\.\w+)*(?: and \w+)? (?:must|is|are|cannot|makes|has|takes)\b|:)"
)
_OPTION = re.compile(r"there is no (?:(?:option|field) '(\w+)'|(sampler|schedule|model) )")


def refusal_of(error: NativesdError) -> Refusal:
    """What an error of the library says to a client: 422, and the field that its sentence begins with."""
    if isinstance(error, QueueFull):
        return Refusal(503, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, Closing):
        return Refusal(503, str(error), code="shutting_down", headers={"Retry-After": "10"})
    message = str(error)
    return Refusal(422, message, field=field_of(message), code=type(error).__name__)


def field_of(message: str) -> str | None:
    """The field that a sentence of the library is about."""
    match = _OPTION.match(message) or _FIELD.match(message)
    name = None if match is None else next(filter(None, match.groups()))
    return {"seeds": "seed"}.get(name or "", name)


def require_done(job: Job) -> None:
    """Raise Refusal for a job that came to nothing."""
    if job.failure is not None:
        if job.failure.ours:
            raise Refusal(500, job.failure.message, code=job.failure.kind)
        raise Refusal(422, job.failure.message, field=field_of(job.failure.message), code=job.failure.kind)
    if job.status == "cancelled":
        raise Refusal(410, "the job was cancelled before there was a picture", code="cancelled")


def answering(style: Style) -> Callable[[Handler], Handler]:
    """Have a handler's refusals, and the library's errors, answered in an API's form."""

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except Refusal as refusal:
                return style(refusal)
            except NativesdError as error:
                return style(refusal_of(error))

        return answer

    return decorate


def plain(refusal: Refusal) -> Response:
    """The form of our own API, which is OpenAI's too: {"error": {message, type, param, code}}."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    return json_answer(
        {"error": {"message": refusal.message, "type": kind, "param": refusal.field, "code": refusal.code}},
        refusal.status,
        refusal.headers,
    )


def json_answer(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """JSON."""
    return JSONResponse(data, status, dict(headers or {}))
