"""What a field of a request has to be: a text, an object or a list, as JSON has them."""

from __future__ import annotations

from typing import Any

from nativesd.errors import UsageError
from nativesd.pipeline.asked.readers import shown


def words(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a text, not {shown(value)}")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise UsageError(f"{name} must be an object, not {shown(value)}")
    return value


def listed(name: str, value: Any) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise UsageError(f"{name} must be a list, not {shown(value)}")
    return value
