"""Names of tensors for people: many as a few lines, and the one that was probably meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from itertools import islice

DEEPEST = 7
"""Pieces of a name by which it is put with others; a stranger's may have hundreds."""


def grouped(keys: Iterable[str], limit: int = 5) -> list[str]:
    """Names as few lines: each where there are few, else by what they begin with, as "prefix* (number)"."""
    keys = list(keys)
    if len(keys) <= limit:
        return keys
    pieces = {key: [match[0] for match in islice(_PIECE.finditer(key), DEEPEST)] for key in keys}
    for depth in range(1, DEEPEST + 1):
        finer: dict[str, list[str]] = {}
        for key in keys:
            finer.setdefault("".join(pieces[key][:depth]), []).append(key)
        if depth > 1 and len(finer) > limit:
            break
        groups = finer
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    lines = [f"{start}* ({len(members)})" if len(members) > 1 else members[0] for start, members in ordered]
    if len(lines) > limit:
        rest = sum(len(members) for _, members in ordered[limit - 1 :])
        lines = [*lines[: limit - 1], f"{rest} others"]
    return lines


_PIECE = re.compile(r"[^._:/]*[._:/]?|.+")
"""A part of a name, with what ends it."""


def nearest(
    expected: Iterable[str], unexpected: Iterable[str], words: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """expected name -> (the unexpected one that is probably meant, in which way); each is used once.

    A name with something before it is told from a misspelt one; misspellings are looked for among names that have most
    of their parts in common. A number, or one of the layout's own `words`, is no misspelling of another: `to_v` is not
    meant where `proj_out` is missing.
    """
    out: dict[str, tuple[str, str]] = {}
    left = dict.fromkeys(unexpected)
    by_tail: dict[str, list[str]] = {}
    for key in left:
        by_tail.setdefault(_tail(key), []).append(key)
    for name in expected:
        for key in by_tail.get(_tail(name), ()):
            if key in left and (key.endswith("." + name) or name.endswith("." + key)):
                extra = key.removesuffix(name) or name.removesuffix(key)
                out[name] = key, f"{'an additional' if len(key) > len(name) else 'without the'} prefix {extra}"
                del left[key]
                break
    parts = {key: _parts(key) for key in left}
    for name in sorted(set(expected) - set(out)):
        own = _parts(name)
        similar = [key for key in left if len(parts[key] ^ own) <= 2 and not _other(parts[key] - own, words)]
        for key in get_close_matches(name, similar, n=1, cutoff=0.8):
            out[name] = key, "a misspelling?"
            del left[key]
    return out


def _other(parts: Iterable[tuple[int, str]], words: Collection[str]) -> bool:
    """Whether what a name differs by says something else, and is not misspelt."""
    return any(word in words or word.isdecimal() for _, word in parts)


def _tail(name: str) -> str:
    return name.rpartition(".")[2] if name.count(".") < 1 else ".".join(name.rsplit(".", 2)[-2:])


def _parts(name: str) -> frozenset[tuple[int, str]]:
    return frozenset(enumerate(name.split(".")))
