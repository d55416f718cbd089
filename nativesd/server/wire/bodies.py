"""What comes in: JSON, and pictures in base64, each looked at before it is believed."""

from __future__ import annotations

import base64
import binascii
import json
import re
import warnings
from io import BytesIO
from typing import Any

from PIL import Image
from starlette.requests import Request

from nativesd.errors import SourceError, UsageError
from nativesd.reading import parse_json
from nativesd.server.settings import Limits
from nativesd.server.wire.answers import Refusal

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DATA_URI = re.compile(r"data:[\w./+-]*(?:;[\w=.-]+)*;base64,", re.IGNORECASE)


async def read_object(request: Request, *, empty: bool = False) -> dict[str, Any]:
    """The JSON object of a request's body. Raises Refusal; `empty`: a body may be missing."""
    raw = await request.body()
    if empty and not raw.strip():
        return {}
    try:
        body = parse_json(raw, "the body")
    except (SourceError, UnicodeEncodeError) as error:
        raise Refusal(422, str(error), code="json") from None
    if _SURROGATE.search(raw):
        _require_whole_characters(body)
    return body


def _require_whole_characters(body: dict[str, Any]) -> None:
    """Raise Refusal where a text has half of a surrogate pair, which JSON can say and no answer or file can hold."""
    for name, value in body.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            said = ascii(name)[1:-1][:100]
            message = f"{said} is not a text: it has half of a character, a surrogate without its other one"
            raise Refusal(422, message, field=said, code="json") from None


class Intake:
    """The pictures of one request, which together have at most `limits.pixels`. Errors name the field."""

    def __init__(self, limits: Limits) -> None:
        self._left = self._most = limits.pixels

    def picture(self, name: str, value: Any) -> Image.Image:
        """A picture in base64, bare or as a data URI. Raises UsageError."""
        return self.decoded(name, base64_bytes(name, value))

    def decoded(self, name: str, data: bytes) -> Image.Image:
        """A picture out of the bytes of a file. Raises UsageError."""
        try:
            with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
                image = Image.open(BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise UsageError(f"{name} has more than the {self._most} pixels that are read here") from None
        except Exception:  # what decoders raise for a damaged file is of many kinds
            raise UsageError(f"{name} is not a picture of a format that is read here: {', '.join(FORMATS)}") from None
        self._left -= image.width * image.height
        if self._left < 0:
            raise UsageError(
                f"{name} has {image.width}x{image.height} pixels: the pictures of a request may have "
                f"{self._most} altogether"
            )
        try:
            image.load()
        except Exception as error:
            raise UsageError(f"{name} is a damaged {image.format} file: {str(error)[:100]}") from None
        return image


def base64_bytes(name: str, value: Any) -> bytes:
    """The bytes of base64, bare or as a data URI. Raises UsageError; an address is not fetched, a path not opened."""
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name} must be a picture in base64, not {type(value).__name__}")
    if re.match(r"(https?|ftp|file)://", value, re.IGNORECASE):
        raise UsageError(f"{name} is an address, and this server fetches none: send the picture in base64")
    match = _DATA_URI.match(value)
    try:
        return base64.b64decode(re.sub(r"\s+", "", value[match.end() :] if match else value), validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{name} is not base64: send the picture's file in it, bare or as a data URI") from None


def data_of(made: bytes) -> str:
    """Bytes in base64."""
    return base64.b64encode(made).decode("ascii")
