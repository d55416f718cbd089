"""LoRAs that a prompt names: A1111's `<lora:name:scale>`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nativesd.errors import UsageError

TAG = re.compile(r" ?(?<!\\)<(?:lora|lyco):([^:<>]+)((?::[^:<>]*)*)>", re.IGNORECASE)


@dataclass(frozen=True)
class Tag:
    """A LoRA by its file's name without the suffix, and the scales of its parts."""

    name: str
    unet: float = 1.0
    text: float = 1.0


def take_tags(prompt: str) -> tuple[str, tuple[Tag, ...]]:
    """The prompt without its tags, and these.

    `<lora:name>`, `<lora:name:scale>`, `<lora:name:text:unet>`, or by name, `<lora:name:te=0.5:unet=0.8>`: the scale of
    the text encoders comes first, and is the UNet's too where that is not given (A1111's
    extensions-builtin/Lora/extra_networks_lora.py). Raises UsageError for a scale that is no number, what else such a
    tag may have, and two tags that give one LoRA other scales.
    """
    tags = tuple(_read(match) for match in TAG.finditer(prompt))
    first: dict[str, Tag] = {}
    for tag in tags:
        same = first.setdefault(tag.name.lower(), tag)
        if (same.unet, same.text) != (tag.unet, tag.text):
            raise UsageError(f"the prompt names the LoRA {tag.name} twice, with other scales: keep one of them")
    return (TAG.sub("", prompt).strip() if tags else prompt), tags


def _read(match: re.Match[str]) -> Tag:
    where, name = match[0].strip(), match[1].strip()
    positional, named = [], dict[str, float]()
    for value in match[2].split(":")[1:]:
        key, equals, number = value.rpartition("=")
        if equals:
            if (key := key.strip().lower()) in named:
                raise UsageError(f"{where} in the prompt has {key}= twice: keep one of them")
            named[key] = _scale(number, where)
        else:
            positional.append(_scale(number, where))
    if len(positional) > 2 or named.keys() - {"te", "unet"}:
        raise UsageError(f"{where} in the prompt: only the scales of the text encoders and of the UNet are supported")
    text = named.get("te", positional[0] if positional else 1.0)
    return Tag(name, named.get("unet", positional[1] if len(positional) > 1 else text), text)


def _scale(number: str, where: str) -> float:
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise UsageError(f"{where} in the prompt: {number!r} is not a scale")
    return scale
