"""What is read out of a program's text, and how its values are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nativesd.errors import UsageError


@dataclass
class Recipe:
    """How a picture was made: `options` of a call under our names (and "model", a name), as far as they are said.

    `unheeded` names what would change the picture and has no option, each with what is taken instead.
    """

    program: str
    prompt: str = ""
    negative_prompt: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    unheeded: list[str] = field(default_factory=list)

    def take(self, data: Mapping[str, Any], options: Mapping[str, str], *, harmless: Sequence[str] = ()) -> None:
        """Take those of `data` that `options` has a name for; name the others that say something."""
        for name, value in data.items():
            if name in options and value not in (None, ""):
                self.options[options[name]] = value
            elif name not in harmless and name not in options and value not in (None, "", False, 0, [], {}, "None"):
                self.unheeded.append(name)

    def need_picture(self, strength: object, steps_as: str) -> None:
        """The picture was made from a picture, of which `strength` was given up."""
        self.options |= {"strength": real("strength", strength), "steps_as": steps_as}


def integer(name: str, value: object) -> int:
    """A whole number, "2.0" included. Raises UsageError that names the field."""
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,20}(\.0*)?\s*", str(value)):
        raise UsageError(f"{name}: {value!r} is not a whole number")
    return int(str(value).partition(".")[0])


def real(name: str, value: object) -> float:
    """A finite number. Raises UsageError that names the field."""
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name}: {value!r} is not a number")
    return number


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is; None: it is none."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def objects(value: object) -> list[dict[str, Any]]:
    """The objects in a list; empty where it is none."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def lora_tag(name: object, unet: object = 1.0, text: object | None = None) -> str:
    """A LoRA as A1111 writes it in a prompt: the text encoders' scale, and the UNet's where it differs."""
    stem = re.sub(r"\.(safetensors|pt|ckpt|bin)$", "", re.split(r"[\\/]", str(name))[-1])
    scales = [f"{real('LoRA', each):g}" for each in ([unet] if text in (None, unet) else [text, unet])]
    return f"<lora:{stem}:{':'.join(scales)}>"
