"""How a prompt is read, and how it weighs its words."""

from __future__ import annotations

from typing import Literal

from nativesd.errors import UsageError, quote

Emphasis = Literal["original", "no norm", "ignore", "none", "comfyui"]
"""How a prompt weighs its words: A1111's setting of that name (modules/sd_emphasis.py), or as ComfyUI does it.

original  states times their weights, then scaled to the mean they had
no norm   states times their weights
ignore    weights are read and not applied
none      what would be weights is text
comfyui   ComfyUI's brackets; a state moves away from that of an empty prompt by its weight
"""
Syntax = Emphasis | Literal["literal"]
"""The same, or no syntax at all."""
ONE_TEXT: tuple[Syntax, ...] = ("comfyui", "literal")
"""Where a prompt is one text for all steps: neither AND nor prompt editing."""

LARGEST_WEIGHT = 1000
"""Of a text, all its brackets multiplied, and of a prompt that AND combines; people write 0 to 2."""


def require_weight(text: str, weight: float) -> float:
    """The weight that a prompt gives a text. Raises UsageError for one by which the model's numbers would overflow."""
    if not abs(weight) <= LARGEST_WEIGHT:  # NaN, too
        raise UsageError(
            f"{quote(text)} in the prompt gets the weight {weight:.4g}: weights must be between {-LARGEST_WEIGHT} and "
            f"{LARGEST_WEIGHT}, and people write 0 to 2"
        )
    return weight
