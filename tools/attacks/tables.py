"""Kind B: weight maps of strangers, changed at any place, and used on names as the detection uses them."""

from __future__ import annotations

import random
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from attacks.values import VALUES, deeply_changed, put
from nativesd.shipped import TABLES
from nativesd.weights.identity.detect import detect
from nativesd.weights.maps.keymap import SIGNATURES, load_tables

EXPRESSIONS = (
    "1000000000", str(10**30), "levels", "9999*9999", "i", "i/0", "i//0", "1-2", "(" * 90 + "1" + ")" * 90,
    "1+" * 3000 + "1", "i**i", "x[i]", "levels[0]", "__import__('os')", "\0", "", "-1",
)  # fmt: skip
TEMPLATES = (
    "a.{i}", "{", "}", "{}", "{{n}}", "{n}.{n}", "{a}{b}{c}{d}", "{i+1}", "../../x", "a" * 3000, ".", "..", "{p}{p}",
    "{" + "(" * 5000 + "1" + ")" * 5000 + "}", "{9999999*9999999}", "{n:>999999999}", "{n.__class__}",
)  # fmt: skip
PATTERNS = (
    "(a+)+$", "(a|a)*b", "(.*)*x", "a?" * 40, ".*.*.*.*x", r"(a)\1", "(?=a)", "(", "[", "a{999999999999}",
    "(?P<n>.*)\\.x", ".*", "(" * 300, "\\", "(?i)a", "(a|b|c)" * 30, "[^.]+",
)  # fmt: skip
WRONG = (*VALUES, *EXPRESSIONS, *TEMPLATES, *PATTERNS)
NAMES = (
    "a" * 250,
    "a" * 50_000,
    "1.1.1.1",
    "weight",
    "a.1.weight",
    "down_blocks.0.resnets.0.norm1.weight",
    "x",
    ".",
    "",
)


@cache
def _shipped() -> list[dict[str, Any]]:
    paths = sorted(path for path in TABLES.glob("*.toml") if path.name != SIGNATURES)
    return [tomllib.loads(path.read_text()) for path in paths]


def toml(value: Any) -> str:
    """A value as TOML; what TOML cannot say becomes a text."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case dict():
            return "{" + ", ".join(f"{toml(str(key))} = {toml(each)}" for key, each in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
    return '"' + "".join(map(_character, str(value))) + '"'


def _character(character: str) -> str:
    code = ord(character)
    if 32 <= code < 127 and character not in '"\\':
        return character
    return f"\\U{0xFFFD if 0xD800 <= code < 0xE000 else code:08x}"


def table(rng: random.Random, folder: Path) -> None:
    """A shipped table with one to four values changed."""
    data = rng.choice(_shipped())
    for _ in range(rng.randint(1, 4)):
        data = deeply_changed(rng, data, WRONG)
    if not isinstance(data, dict):
        data = {"map": data}
    raw = "\n".join(f"{toml(str(name))} = {toml(value)}" for name, value in data.items())
    put(rng, folder / "mine.toml", raw.encode(), spoil=0.1)
    tables = load_tables(folder)
    mine = tables["mine"]
    names = [*NAMES, *(prefix + name for prefix in mine.prefixes for name in mine.detect)]
    bound = mine.bind(mine.probe(names, mine.prefixes[0]))
    for name in names:
        bound.parameters(name)
        bound.reason_to_ignore(name)
        bound.describe(name)
    if rng.random() < 0.1:
        detect(names, {"mine": mine})
