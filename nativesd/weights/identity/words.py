"""Textual inversions: which learnt words a file has, by its names and shapes. The audit and the loader both ask here.

The table (weightmaps/textual_inversion.toml) says what rows are called: the group `word` of a pattern is the word's
name, `encoder` the text encoder that they are for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nativesd.weights.identity.describe import TEXT_ENCODERS
from nativesd.weights.identity.evidence import Evidence
from nativesd.weights.maps.keymap import KeyMap
from nativesd.weights.maps.plan import INTEGERS
from nativesd.weights.maps.rules import Shape
from nativesd.weights.maps.templates import LONGEST

TABLE = "textual_inversion"
BUNDLED = "bundle_emb."
"""What the names of textual inversions begin with that come in a LoRA's file (A1111's, OneTrainer's)."""
ENCODERS = {"l": 0, "h": 0, "0": 0, "g": 1, "1": 1}
"""What the table's group `encoder` finds -> the place of the text encoder in the UNet's order."""
MOST = 246
"""Rows that a nameless tensor may have: those that fit in a prompt's chunk for the longest text encoder (LongCLIP)."""
FAMILIES = {(768,): "SD1.x", (1024,): "SD2.x", (768, 1280): "SDXL", (1280,): "SDXL, its second text encoder"}


@dataclass(frozen=True)
class Word:
    """A learnt word. `name` is "" where the file does not say it; `keys` are its rows for each text encoder that it was
    trained with, in the UNet's order."""

    name: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """What a file of textual inversions holds: words, keys that nothing needs, and those that cannot be, with why."""

    words: tuple[Word, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)


def find_words(shapes: Mapping[str, Shape], table: KeyMap, dtypes: Mapping[str, str] | None = None) -> Words | None:
    """The words of a file, or of a LoRA's file that brings some; None where it is no file of textual inversions.

    That is one with names that the table knows, with one tensor (width,) or (n, width) of any name, or with several
    as wide as a text encoder, whose names are the words. `dtypes` by the format's names: integers are no rows.
    """
    bundled = [key for key in shapes if key.startswith(BUNDLED)]
    ignored: dict[str, str] = {}
    rows: dict[str, dict[int, str]] = {}
    faults: dict[str, str] = {}
    others: list[str] = []
    for key in bundled or shapes:
        if (reason := table.reason_to_ignore(key)) is not None:
            ignored[key] = reason
        elif (match := _match(table, key)) is not None:
            said = match.groupdict()
            word, place = (said.get("word") or "*"), ENCODERS.get(said.get("encoder") or "0", 0)
            word = "" if word == "*" else word  # A1111's own placeholder
            first = rows.setdefault(word, {}).setdefault(place, key)
            if first != key:
                faults[key] = f"{first} is the same word for the same text encoder"
        else:
            others.append(key)
    if rows:
        faults |= dict.fromkeys(others, "no name that rows of a learnt word have")
        words = [Word(word, tuple(keys[place] for place in sorted(keys))) for word, keys in rows.items()]
    elif (nameless := _nameless(others, shapes)) is not None:
        words = nameless
    else:
        return None
    for word in words:
        faults |= _faults(word, shapes, dtypes or {})
    return Words(tuple(words), ignored, faults)


def _match(table: KeyMap, key: str) -> re.Match[str] | None:
    if len(key) > LONGEST:
        return None
    return next((match for pattern in table.names if (match := re.fullmatch(pattern, key))), None)


def _nameless(keys: Sequence[str], shapes: Mapping[str, Shape]) -> list[Word] | None:
    """The words of tensors whose names say nothing; None where their shapes are not those of learnt words."""
    own = [shapes[key] for key in keys]
    if not own or not all(len(shape) in (1, 2) and shape[0] > 0 and shape[-1] > 0 for shape in own):
        return None
    if any(len(shape) == 2 and shape[0] > MOST for shape in own):
        return None
    if len(keys) == 1:
        return [Word("", (keys[0],))]
    widths = {shape[-1] for shape in own}
    if len(widths) > 1 or not widths & set(TEXT_ENCODERS) or any(key.endswith(("weight", "bias")) for key in keys):
        return None
    return [Word(key, (key,)) for key in keys]


def _faults(word: Word, shapes: Mapping[str, Shape], dtypes: Mapping[str, str]) -> dict[str, str]:
    """The keys of a word that cannot be its rows, with the reasons."""
    out = {
        key: f"rows of floats (n, width) are needed, not {dtypes.get(key, '')} {list(shapes[key])}".replace("  ", " ")
        for key in word.keys
        if len(shapes[key]) not in (1, 2) or 0 in shapes[key] or dtypes.get(key) in INTEGERS
    }
    counts = {key: count_rows(shapes[key]) for key in word.keys}
    if not out and len(set(counts.values())) > 1:
        out[word.keys[-1]] = f"different numbers of vectors: {' + '.join(map(str, counts.values()))}"
    return out


def count_rows(shape: Shape) -> int:
    """How many vectors a tensor (width,) or (n, width) has."""
    return shape[0] if len(shape) == 2 else 1


def describe_words(words: Iterable[Word], shapes: Mapping[str, Shape]) -> tuple[str, list[Evidence]]:
    """The family that the words are for ("" for none that is published), and what they are, by their widths."""
    words = [word for word in words if all(shapes[key] for key in word.keys)]
    widths = list(dict.fromkeys(tuple(shapes[key][-1] for key in word.keys) for word in words))
    counts = dict.fromkeys(str(count_rows(shapes[word.keys[0]])) for word in words)
    family = FAMILIES.get(widths[0], "") if len(widths) == 1 else ""
    why = "the rows' length" if family else "the rows' length, which no published family has"
    return family, [
        Evidence("word", ", ".join(word.name or "the file's name" for word in words), "what a prompt calls it by"),
        Evidence("width", " or ".join(" + ".join(map(str, each)) for each in widths), why),
        Evidence("vectors", ", ".join(counts), "how many token positions the word takes"),
    ]
