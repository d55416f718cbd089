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
from functools import cached_property
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


ADAPTER = "{adapter}"


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
    suffixes: Mapping[str, str]
    """Those without {adapter}, with the part that each means; the longest first."""
    adapted: Mapping[tuple[str, str], str]
    """Those with it, as what is before and after the adapter's name."""
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
        whole = {suffix: part for suffix, part in suffixes.items() if ADAPTER not in suffix}
        adapted = {tuple(suffix.split(ADAPTER)): part for suffix, part in suffixes.items() if ADAPTER in suffix}
        if wrong := [parts for parts in adapted if len(parts) > 2]:
            raise ValueError(f"[lora] has the suffix {quote(ADAPTER.join(wrong[0]))} with more than one {ADAPTER}")
        if wrong := [parts for parts in adapted if parts[0][-1:] != "." or parts[1][:1] not in ("", ".")]:
            raise ValueError(f"[lora] has the suffix {quote(ADAPTER.join(wrong[0]))}: dots must be around {ADAPTER}")
        if empty := [prefix for prefix, components in data["prefix"].items() if not components]:
            raise ValueError(f"[lora] has the prefix {quote(empty[0])} of no component")
        return cls(
            tuple(sorted(data["prefix"].items(), key=lambda item: -len(item[0]))),
            dict(sorted(whole.items(), key=lambda item: -len(item[0]))),
            {(before, after): part for (before, after), part in adapted.items()},
            data["ending"],
            {expression(pattern): reason for pattern, reason in data["refused"].items()},
        )

    def part(self, key: str) -> Part | None:
        """What a key names, or None where it is not named so."""
        suffix, part, adapter = self._suffix(key)
        if not suffix:
            return None
        found = self._beginning.match(key)
        if found is None:
            return None
        prefix = found[0]
        components = self._components[prefix]
        module = key[len(prefix) : -len(suffix)]
        if self.endings:
            ending = next((ending for ending in self.endings if module.endswith(ending)), None)
            if ending is None:
                return None
            module = module.removesuffix(ending) + self.endings[ending]
        return Part(components, module, part, prefix, adapter) if module else None

    def _suffix(self, key: str) -> tuple[str, str, str]:
        """The longest suffix that a key ends with, the part that it means, and the adapter's name; or "" for none."""
        if not key.endswith(self._ends):
            return "", "", ""
        best = meant = adapter = ""
        for length in self._lengths:
            if (part := self.suffixes.get(key[-length:])) is not None:
                best, meant = key[-length:], part
                break
        for (before, after), part in self.adapted.items():
            if before not in key:
                continue
            head = key.removesuffix(after) if key.endswith(after) else ""
            name = head.rpartition(".")[2]
            if name and head.endswith(before + name) and len(before + name + after) > len(best):
                best, meant, adapter = before + name + after, part, name
        return best, meant, adapter

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """What every key ends with that has a part."""
        return tuple(dict.fromkeys((*self.suffixes, *(after for _, after in self.adapted))))

    @cached_property
    def _beginning(self) -> re.Pattern[str]:
        """What a key begins with, the longest first."""
        return re.compile("|".join(re.escape(prefix) for prefix, _ in self.prefixes))

    @cached_property
    def _components(self) -> Mapping[str, tuple[str, ...]]:
        return dict(self.prefixes)

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        """Of the suffixes, the longest first: names from strangers are looked up, and not compared with every one."""
        return tuple(dict.fromkeys(map(len, self.suffixes)))

    def refusal(self, key: str) -> str | None:
        """Why what a key without a part holds cannot be merged, or None where nothing says so."""
        if len(key) > LONGEST:
            return None
        return next((reason for pattern, reason in self.refused.items() if pattern.fullmatch(key)), None)

    def describe(self, key: str) -> str | None:
        """What a key is, in words; None where it is not named so."""
        part = self.part(key)
        return self.refusal(key) if part is None else f"{part.components[0]} {part.module}: {PARTS[part.part]}"
