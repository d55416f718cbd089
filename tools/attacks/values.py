"""What hostile inputs are made of: values of the wrong kind, spoiled JSON, pieces of texts, and files that are none.

Everything is drawn from a `random.Random`: one of a seed, or hypothesis's own (`st.randoms()`), which shrinks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 32, 10**9, 10**30, 1e308, -0.5, 0.5, True, False, None, "", "x" * 300, "DownBlock2D", "\ud800",
    "a\nb", "../x", "/etc/passwd", [], [[]], [1], [1] * 9, [None], [32, 64], ["x"], {}, {"a": 1}, [[[[1]]]],
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    *VALUES, -(10**30), 10**6, 10**22, 1e-308, float("nan"), float("inf"), float("-inf"), "7", "1e9", "NaN", "\u0663",
    2**63, 2**64, 1 + 2j, b"1", 64, 512, 513, 100_000,
)  # fmt: skip
"""What may stand where a number is wanted."""
TEXTS = (
    "(", ")", "[", "]", ":", "<", ">", "|", "\\", " ", "\t", "\n", "a", "1", ".", "1.1", ":1.2)", "BREAK", " AND ", ",",
    "\0", "\ud800", "\U0001f33b", "<lora:x:1>", "{", "}", "__x__", "embedding:x", "(a:", "e9", "Steps: 20, ",
    "Negative prompt: ", '"', "Size: 9x9, ", "Template: ", "[a:b:0.5]", "[a|b]", "\u202e", "=", "'",
)  # fmt: skip
NAMES = (
    "x", "unet", "..", ".", "a/b", "../x", "/etc/passwd", "x" * 300, "x" * 5000, "a\0b", "\ud800", "a\nb", "", "-", "~",
    "CON", "a:b", "\u202eb",
)  # fmt: skip


def changed(rng: random.Random, good: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A mapping with one to three fields replaced or left out."""
    data = dict(good)
    for name in rng.sample(list(names), min(rng.randint(1, 3), len(names))):
        if rng.random() < 0.15:
            data.pop(name, None)
        else:
            data[name] = rng.choice(VALUES)
    return data


def deeply_changed(rng: random.Random, data: Any, wrong: Sequence[Any] = VALUES) -> Any:
    """Nested data with one value, at any depth, replaced by one of `wrong`, left out, or put twice."""
    if isinstance(data, dict) and data and rng.random() < 0.9:
        name = rng.choice(list(data))
        if rng.random() < 0.1:
            return {key: value for key, value in data.items() if key != name}
        if rng.random() < 0.1:
            return {(str(rng.choice(wrong)) if key == name else key): value for key, value in data.items()}
        return data | {name: deeply_changed(rng, data[name], wrong)}
    if isinstance(data, list) and data and rng.random() < 0.9:
        at = rng.randrange(len(data))
        if rng.random() < 0.1:
            return data[:at] + data[at:] * rng.choice((2, 500))
        return [*data[:at], deeply_changed(rng, data[at], wrong), *data[at + 1 :]]
    return rng.choice(wrong)


def spoiled(rng: random.Random, raw: bytes) -> bytes:
    """Bytes of JSON, or of any file: some exchanged, cut, repeated or put in; or what is no such thing."""
    match rng.randrange(6):
        case 0:
            at = rng.randrange(len(raw) + 1)
            return raw[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 4))) + raw[at + 1 :]
        case 1:
            return raw[: rng.randrange(len(raw) + 1)]
        case 2:
            more = rng.choice((b'"a":1,"a":2,', b'"a":NaN,', b'"a":1e999,', b'"a":-Infinity,'))
            return raw.replace(b"{", b"{" + more, 1)
        case 3:
            depth = rng.choice((10, 100, 100_000))
            return b'{"a":' + b"[" * depth + b"]" * depth * rng.randrange(2) + b"}"
        case 4:
            start, stop = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
            return raw[:stop] + raw[start:stop] * rng.randint(1, 9) + raw[stop:]
        case _:
            return rng.choice((b"", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{" * 10_000))


def text(rng: random.Random) -> str:
    """A text of the pieces that prompts and parameters are written with, some by the thousand."""
    return "".join(rng.choice(TEXTS) * rng.choice((1, 1, 3, 50, 5000)) for _ in range(rng.randint(1, 12)))


def odd_file(rng: random.Random, path: Path) -> None:
    """Something at a path that is no file as it should be: a pipe, a device, a folder, a loop, 8 GB of nothing."""
    match rng.randrange(8):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to("/dev/zero")
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to(path.name)
        case 4:
            path.symlink_to("nowhere")
        case 5:
            with path.open("wb") as file:
                file.truncate(8 << 30)
        case 6:
            path.touch()
        case _:
            path.write_bytes(rng.randbytes(rng.randint(1, 5000)))


def put(rng: random.Random, path: Path, raw: bytes, *, spoil: float = 0.2, odd: float = 0.03) -> None:
    """Write a file, or in so many cases a spoiled one, or an odd one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = rng.random()
    if chance < odd:
        odd_file(rng, path)
    else:
        path.write_bytes(spoiled(rng, raw) if chance < odd + spoil else raw)
