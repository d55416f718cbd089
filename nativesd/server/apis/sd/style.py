"""How A1111's API says a refusal: {"detail": ...}, as FastAPI does, which its clients read."""

from __future__ import annotations

from starlette.responses import Response

from nativesd.server.wire.answers import Refusal, json_answer


def answered(refusal: Refusal) -> Response:
    """422 is a list of what is wrong with which field; all others are a sentence."""
    if refusal.status != 422:
        return json_answer({"detail": refusal.message}, refusal.status, refusal.headers)
    place = ["body", *([] if refusal.field is None else [refusal.field])]
    return json_answer({"detail": [{"loc": place, "msg": refusal.message, "type": "value_error"}]}, 422)
