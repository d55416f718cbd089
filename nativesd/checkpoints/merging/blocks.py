"""How much of which block: alphas by SuperMerger's and A1111's numbers, and by our own paths with wildcards.

A UNet's blocks are those of ldm's layout: IN00 to IN11, M00 and OUT00 to OUT11 of SD1.x and SD2.x, IN00 to IN08, M00
and OUT00 to OUT08 of SDXL. What is in none of them is BASE: the text encoders, the VAE, and the embeddings of the time
and of SDXL's sizes. The last layers belong to the last OUT (hako-mikan/sd-webui-supermerger,
scripts/mergers/mergers.py, `blockfromkey`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from nativesd.config import UNetConfig
from nativesd.errors import UsageError, quote
from nativesd.weights.maps.keymap import load_table

Given = str | Sequence[float] | Mapping[str, float]
"""As a caller says it: numbers, or names with a number each; a text is one of both with commas."""
ALIASES = {"MID": "M00", "MID00": "M00", "M": "M00"}
FULL = ["BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))]
"""The 26 numbers that users of SD1.x write; of a model with fewer blocks those are taken that it has."""


def parse_blocks(given: Given) -> tuple[float, ...] | dict[str, float]:
    """What a caller says: the numbers, or names with theirs. Raises UsageError."""
    if isinstance(given, str):
        words = [word.strip() for word in given.replace("\n", ",").split(",") if word.strip()]
        if not any("=" in word for word in words):
            return tuple(_number(word, word) for word in words)
        named: Iterable[tuple[str, object]] = [
            (name.strip(), value.strip()) for name, _, value in (word.partition("=") for word in words)
        ]
    elif isinstance(given, Mapping):
        named = given.items()
    else:
        return tuple(_number(value, value) for value in given)
    return {str(name): _number(value, f"{name}={value}") for name, value in named}


def _number(value: object, said: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # what is no number is refused below
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"blocks must be numbers, or names with numbers such as IN00=0.3, not {quote(str(said))}")
    return number


def alphas(
    blocks: tuple[float, ...] | Mapping[str, float],
    alpha: float,
    unet: UNetConfig | None,
    parameters: Mapping[str, Iterable[str]],
    merged: Collection[str],
) -> dict[tuple[str, str], float]:
    """The alpha of every parameter, by component and name.

    blocks      numbers for all blocks with BASE first, or without it, which is `alpha` then; or names with numbers: a
                block, a range of them (IN00-IN05), or a path of ours (unet.down.0, text_encoder*), the last that fits
    parameters  component -> its parameters
    merged      the components that are merged: a name must mean something in them

    Raises UsageError for another count, and for a name that nothing has.
    """
    own = {} if unet is None else blocks_of(unet, parameters.get("unet", ()))
    names = sorted(set(own.values()) | {"BASE"}, key=FULL.index)
    by_name = isinstance(blocks, Mapping)
    if not isinstance(blocks, Mapping):
        blocks = _counted(blocks, names)
    every = [(component, name) for component, part in parameters.items() for name in part]
    out = dict.fromkeys(every, alpha)
    for name, number in blocks.items():
        wanted = _named(name, names)
        if wanted:
            found = [each for each in every if _block(own, each) in wanted]
        else:
            found = [each for each in every if _fits(".".join(each), name)]
        if not found:
            raise UsageError(
                f"blocks: {quote(name)} is neither a block of this model ({', '.join(names)}) nor the path of a "
                "parameter, such as unet.down.0.*"
            )
        if by_name and not any(component in merged for component, _ in found):
            raise UsageError(f"blocks: {quote(name)} is in none of what is merged: {', '.join(merged) or 'nothing'}")
        out |= dict.fromkeys(found, number)
    return out


def blocks_of(config: UNetConfig, parameters: Iterable[str]) -> dict[str, str]:
    """The block that every parameter of a UNet is in; {} where its blocks have no numbers."""
    try:
        table = load_table("unet.ldm").bind(config.dims, "")
    except ValueError:
        return {}
    found = {name: _place(source.keys[0]) for name in parameters if (source := table.source(name)) is not None}
    last = max((block for block in found.values() if block.startswith("OUT")), default="BASE")
    return {name: block or last for name, block in found.items()}


def _place(key: str) -> str:
    """The block of a key of ldm's layout; "" is the last one."""
    if match := re.match(r"(input|output)_blocks\.(\d+)\.", key):
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}"
    return "M00" if key.startswith("middle_block.") else "" if key.startswith("out.") else "BASE"


def _block(own: Mapping[str, str], parameter: tuple[str, str]) -> str:
    component, name = parameter
    return own.get(name, "BASE") if component == "unet" else "BASE"


def _counted(numbers: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Numbers by their blocks. Raises UsageError where they are too many or too few."""
    for known in (list(names), FULL):
        if set(names) <= set(known) and len(known) - len(numbers) in (0, 1):
            given = dict(zip(known[len(known) - len(numbers) :], numbers, strict=True))
            return {name: number for name, number in given.items() if name in names}
    raise UsageError(
        f"blocks must be {len(names)} numbers ({', '.join(names)}), or one less without BASE, not {len(numbers)}"
    )


def _named(name: str, names: Sequence[str]) -> Sequence[str]:
    """The blocks that a name means: one, or those from one to another; () where it means none."""
    first, _, last = name.upper().partition("-")
    first, last = ALIASES.get(first, first), ALIASES.get(last, last)
    if first not in names or (last and last not in names):
        return ()
    return names[names.index(first) : names.index(last or first) + 1]


def _fits(path: str, pattern: str) -> bool:
    """Whether a path is what a pattern says, or in what it says."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")
