"""How LoRA files name their tensors: a component's prefix, a module's name in some layout, and a part's suffix.

The section [lora] of a table says it:

    prefix   what a key begins with -> the component it is of, or several where it does not say which
    suffix   what a key ends with -> the part that the tensor plays; {adapter} stands for one name
    parts    parts whose suffix is "." and their own name
    ending   what the module's name ends with -> what it is called in its layout; only such modules are meant
    refused  pattern of whole keys -> why what they hold cannot be merged

Which modules there are is not said here: their names are those of the layouts' own tables, with dots or underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nativesd.errors import quote
from nativesd.weights.maps.templates import LONGEST, expression

PARTS = {
    "down": "down matrix", "mid": "core of the kernel", "up": "up matrix", "alpha": "alpha, scale = alpha / rank",
    "dora_scale": "DoRA magnitude", "magnitude": "DoRA magnitude per output",
    "diff": "full difference", "diff_b": "full difference of the bias",
    "w_norm": "difference of a norm's weight", "b_norm": "difference of a norm's bias",
    "hada_w1_a": "LoHa, first product, left", "hada_w1_b": "LoHa, first product, right",
    "hada_w2_a": "LoHa, second product, left", "hada_w2_b": "LoHa, second product, right",
    "hada_t1": "LoHa, first core", "hada_t2": "LoHa, second core",
    "lokr_w1": "LoKr, first factor", "lokr_w1_a": "LoKr, first factor, left", "lokr_w1_b": "LoKr, first factor, right",
    "lokr_w2": "LoKr, second factor", "lokr_w2_a": "LoKr, second factor, left",
    "lokr_w2_b": "LoKr, second factor, right", "lokr_t2": "LoKr, second core",
}  # fmt: skip
"""What a tensor can be of the change that a LoRA makes to a module, and what that is."""


@dataclass(frozen=True)
class Part:
    """One tensor of a LoRA: the part that it plays in the change of a module of one of the components.

    `adapter` is that name, where the suffix has one.
    """

    components: tuple[str, ...]
    module: str
    part: str
    prefix: str
    adapter: str


@dataclass(frozen=True)
class LoraNames:
    """The section [lora] of a table."""

    prefixes: tuple[tuple[str, tuple[str, ...]], ...]
    """The longest first."""
    suffix: re.Pattern[str]
    """A group for every one of `suffixes`, in their order."""
    suffixes: tuple[tuple[str, str], ...]
    """Each with the part that it means."""
    endings: Mapping[str, str]
    refused: Mapping[re.Pattern[str], str]

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> LoraNames:
        """The section from its fields. Raises ValueError."""
        suffixes = {f".{part}": part for part in data["parts"]} | data["suffix"]
        if not (data["prefix"] and suffixes):
            raise ValueError("[lora] needs prefix, and suffix or parts")
        if unknown := set(suffixes.values()) - set(PARTS):
            raise ValueError(f"[lora] has an unknown part {', '.join(sorted(unknown)[:5])}")
        if wrong := [suffix for suffix in suffixes if suffix.count("{adapter}") > 1]:
            raise ValueError(f"[lora] has the suffix {quote(wrong[0])} with more than one {{adapter}}")
        if wrong := [prefix for prefix, components in data["prefix"].items() if not components]:
            raise ValueError(f"[lora] has the prefix {quote(wrong[0])} of no component")
        return cls(
            tuple(sorted(data["prefix"].items(), key=lambda item: -len(item[0]))),
            re.compile("|".join(f"({_expression(suffix)}\\Z)" for suffix in suffixes)),
            tuple(suffixes.items()),
            data["ending"],
            {expression(pattern): reason for pattern, reason in data["refused"].items()},
        )

    def part(self, key: str) -> Part | None:
        """What a key names, or None where it is not named so."""
        prefix, components = next(((p, c) for p, c in self.prefixes if key.startswith(p)), ("", ()))
        match = self.suffix.search(key) if components else None
        if match is None or match.lastindex is None:
            return None
        module = key[len(prefix) : match.start()]
        if self.endings:
            ending = next((ending for ending in self.endings if module.endswith(ending)), None)
            if ending is None:
                return None
            module = module.removesuffix(ending) + self.endings[ending]
        suffix, part = self.suffixes[match.lastindex - 1]
        before, _, after = suffix.partition("{adapter}")
        adapter = match[0].removeprefix(before).removesuffix(after)
        return Part(components, module, part, prefix, adapter) if module else None

    def refusal(self, key: str) -> str | None:
        """Why what a key holds cannot be merged, or None where nothing says so."""
        if len(key) > LONGEST or self.part(key) is not None:
            return None
        return next((reason for pattern, reason in self.refused.items() if pattern.fullmatch(key)), None)

    def describe(self, key: str) -> str | None:
        """What a key is, in words; None where it is not named so."""
        part = self.part(key)
        return self.refusal(key) if part is None else f"{part.components[0]} {part.module}: {PARTS[part.part]}"


def _expression(suffix: str) -> str:
    return r"[^.]+".join(map(re.escape, suffix.split("{adapter}")))
