"""Thousands of pictures: a file of jobs on one machine or many, every row once, and what a cluster's workers call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nativesd.batch.painter import Painter as Painter

__all__ = ["Painter"]


def __getattr__(name: str) -> Any:
    if name == "Painter":  # when it is used: it imports torch
        from nativesd.batch.painter import Painter

        return Painter
    raise AttributeError(f"module 'nativesd.batch' has no attribute {name!r}")
