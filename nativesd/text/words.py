"""The words that the embedded model was taught, and those of a prompt that it was not."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cache

from nativesd.shipped import TINY
from nativesd.text.editing import all_texts
from nativesd.text.prompt import parse_prompt
from nativesd.text.syntax import ONE_TEXT, Syntax
from nativesd.text.tags import take_tags

FILE = TINY / "words.txt"
SHOWN = "picture"
"""The word that stands for the subject in a prompt beside a picture of it, in the embedded adapter's training."""


@cache
def taught_words() -> frozenset[str]:
    """Every word of the captions that the embedded model was trained on."""
    return frozenset(FILE.read_text(encoding="utf-8").split())


def unknown_words(
    prompts: Sequence[str], known: Collection[str], *, syntax: Syntax = "original", beside_pictures: bool = False
) -> list[str]:
    """The words of prompts that are not among `known`, each once, in their order; a plural or a weight is none.

    Beside pictures as prompts `SHOWN` is known, too.
    """
    known = {*known, SHOWN} if beside_pictures else known
    bare = prompts if syntax == "literal" else [take_tags(prompt)[0] for prompt in prompts]
    single = bare if syntax in ONE_TEXT else [text for prompt in bare for text in all_texts(prompt)]
    texts = [piece.text for prompt in single for part in parse_prompt(prompt, syntax=syntax) for piece in part]
    words = dict.fromkeys(word.lower() for text in texts for word in re.findall(r"[^\W\d_]+", text))
    return [word for word in words if word not in known and word.removesuffix("s") not in known]
