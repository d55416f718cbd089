"""A job: one picture that is asked for, its name, its seed, and what tells whether it was painted so already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from nativesd.errors import UsageError, quote
from nativesd.reading import is_name
from nativesd.text.tags import take_tags

ID_BYTES = 200
"""Of an id, which is a file's name: file systems hold 255 with its suffix."""
HASH_DIGITS = 20
"""Of an id that is made of a row: of 10^9 rows two are alike by chance once in a million times (80 bits)."""
ALONE = ("variation",)
"""Options with which the pictures of one call depend on each other: their rows share no batch."""


@dataclass(frozen=True)
class Job:
    """One picture that is asked for.

    options   of the call beside prompt and seed, as JSON has them
    loading   what says which model it is beside its name, as JSON has it: part of what makes a picture the same
    extra     the columns that pass through to the results
    line      of the jobs file
    pictures  options that are pictures and no files, of which `options` has the hashes
    """

    id: str
    seed: int
    model: str
    prompt: str
    options: Mapping[str, Any]
    loading: Mapping[str, Any]
    extra: Mapping[str, Any]
    line: int
    pictures: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def parameters(self) -> str:
        """A hash of all that the picture depends on, as far as the jobs file and the command say it."""
        return digest([self.model, self.loading, self.prompt, self.seed, self.options])[:16]

    @cached_property
    def shape(self) -> str:
        """A hash that jobs have in common where one call can paint them together."""
        options = {name: value for name, value in self.options.items() if name != "negative_prompt"}
        tags = [] if options.get("literal") else [list(tag.__dict__.values()) for tag in take_tags(self.prompt)[1]]
        depends = any(name in options for name in ALONE) or options.get("noise") == "comfyui"
        alone = self.id if depends else None
        return digest([self.model, self.loading, options, tags, alone])[:16]

    def file(self, suffix: str) -> str:
        """Where its picture goes in the folder of results."""
        return f"{hashed(self.id)[:1].hex()}/{self.id}.{suffix}"

    def shard(self, shards: int) -> int:
        """Which of so many shards paints it, from 0."""
        return int.from_bytes(hashed(self.id)[8:16]) % shards

    def to_json(self) -> str:
        """All of it but pictures that are no files."""
        return canonical({name: value for name, value in asdict(self).items() if name != "pictures"})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


def read_id(value: Any) -> str:
    """An id, which names a file: a text, or a whole number. Raises UsageError."""
    if isinstance(value, float) and value.is_integer():  # as pandas has whole numbers beside empty cells
        value = int(value)
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(name, str) or not is_name(name) or name.startswith(".") or len(name.encode()) > ID_BYTES:
        raise UsageError(
            f"id must be a whole number, or a text that can be a file's name, of at most {ID_BYTES} bytes, without a "
            f"dot before it and without / \\ :, not {quote(value)}"
        )
    return name


def seed_of(name: str) -> int:
    """The seed of a job that states none, from its id: below 2^32, as A1111's."""
    return int.from_bytes(hashed(name)[1:5])


def hashed(name: str) -> bytes:
    """The hash of an id."""
    return hashlib.sha256(name.encode()).digest()


def digest(value: Any) -> str:
    """The hash of a value as JSON has it."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    """A value as JSON, the same for the same value. Raises UsageError for what JSON cannot hold."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:  # UnicodeEncodeError, of half a surrogate pair, is the second
        raise UsageError(f"it holds what JSON cannot: {str(error).partition(': ')[0]}") from None
    return text
