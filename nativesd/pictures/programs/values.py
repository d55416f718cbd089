"""What values of A1111's fields mean: from a field's name, for a message, and its text. Each raises UsageError."""

from __future__ import annotations

import re

from nativesd.errors import UsageError
from nativesd.pictures.infotext import EMPHASIS, MASKED_CONTENT, schedule_named


def size(name: str, value: str) -> tuple[int, int]:
    """Width and height of "512x768"."""
    match = re.fullmatch(r"([0-9]{1,9}) ?x ?([0-9]{1,9})", value)
    if match is None:
        raise UsageError(f"{name}: {value!r} is not a size such as 512x768")
    return int(match[1]), int(match[2])


def noise(name: str, value: str) -> str:
    """Whose noise: "cpu", "cuda" or "comfyui"."""
    source = {"cpu": "cpu", "nv": "cuda", "gpu": "cuda", "cuda": "cuda", "comfyui": "comfyui"}.get(value.lower())
    if source is None:
        raise UsageError(f"{name}: {value!r} is not a source of noise: CPU, GPU, NV or ComfyUI")
    return source


def masked_content(name: str, value: str) -> str:
    """What is under the mask at first."""
    fill = {shown: fill for fill, shown in MASKED_CONTENT.items()}.get(value.lower())
    if fill is None:
        raise UsageError(f"{name}: {value!r} is not one of {', '.join(MASKED_CONTENT.values())}")
    return fill


def emphasis(name: str, value: str) -> str:
    """How prompts weigh their words."""
    if value.lower() not in EMPHASIS:
        raise UsageError(f"{name}: {value!r} is not one of {', '.join(EMPHASIS.values())}")
    return value.lower()


def as_it_is(name: str, value: str) -> str:
    """A text."""
    return value


def schedule_type(name: str, value: str) -> str:
    """A schedule by the name that is shown."""
    return schedule_named(value)


def truth(name: str, value: str) -> bool:
    """True or False."""
    if value not in ("True", "False"):
        raise UsageError(f"{name}: {value!r} is neither True nor False")
    return value == "True"
