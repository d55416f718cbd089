"""How a prompt is read, and how it weighs its words."""

from __future__ import annotations

from typing import Literal

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
