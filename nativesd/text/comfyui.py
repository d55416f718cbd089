"""ComfyUI's prompts: its brackets, and how it divides a prompt into chunks.

`(word)` weighs 1.1 times as much as what is around it, and `(word:1.2)` weighs 1.2, whatever is around it. Brackets
behind a backslash are text, and so is everything else that has a meaning in A1111. Source: Comfy-Org/ComfyUI
comfy/sd1_clip.py, `token_weights` and `SDTokenizer.tokenize_with_weights`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from nativesd.errors import UsageError

T = TypeVar("T")
BRACKETED = 1.1
DEEPEST = 100
"""Brackets inside each other: more would take long, and weigh more than 1.1^100."""
WORD = 8
"""Tokens of one weight from which they may be divided between two chunks."""
HIDDEN = {"\\)": "\0\1", "\\(": "\0\2"}
BRACKET = re.compile(r"[()]")


def weighted_texts(prompt: str) -> list[tuple[str, float]]:
    """The texts of a prompt with their weights, in their order. Raises UsageError where brackets are too deep."""
    for written, stand_in in HIDDEN.items():
        prompt = prompt.replace(written, stand_in)
    return list(_weighted(prompt, 1.0, 0))


def _weighted(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    if depth > DEEPEST:
        raise UsageError(f"the prompt has more than {DEEPEST} brackets inside each other")
    for item in _items(text):
        if len(item) >= 2 and item[0] == "(" and item[-1] == ")":
            yield from _weighted(*_bracket(item[1:-1], weight), depth + 1)
        else:
            for written, stand_in in HIDDEN.items():
                item = item.replace(stand_in, written[1])
            yield item, weight


def _bracket(inner: str, around: float) -> tuple[str, float]:
    """What a bracket holds, and its weight: the number behind its last colon, or by what is around it."""
    text, colon, number = inner.rpartition(":")
    if colon and text:
        try:
            weight = float(number)
        except ValueError:
            return inner, around * BRACKETED
        if not math.isfinite(weight):
            raise UsageError(f"the prompt has the weight {number!r}, which is no number to multiply by")
        return text, weight
    return inner, around * BRACKETED


def _items(text: str) -> list[str]:
    """A text divided into its outermost brackets and what is between; a bracket that closes none hides the next."""
    items, start, level = [], 0, 0
    for match in BRACKET.finditer(text):
        if match[0] == "(":
            if level == 0:
                items.append(text[start : match.start()])
                start = match.start()
            level += 1
        else:
            level -= 1
            if level == 0:
                items.append(text[start : match.end()])
                start = match.end()
    return [item for item in [*items, text[start:]] if item]


def fill_chunks(groups: Iterable[Sequence[T]], size: int) -> list[list[T]]:
    """Groups of tokens, each of one weight, in chunks of at most `size`; a group of fewer than eight stays together."""
    chunks: list[list[T]] = [[]]
    for group in groups:
        left = list(group)
        while len(chunks[-1]) + len(left) > size:
            cut = size - len(chunks[-1]) if len(group) >= WORD else 0
            chunks[-1] += left[:cut]
            left = left[cut:]
            chunks.append([])
        chunks[-1] += left
    return chunks
