"""A1111's script "soft inpainting", among those that are always on: from its arguments to our option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nativesd.errors import UsageError
from nativesd.pictures.infotext import SOFT_INPAINT, SOFT_INPAINT_FIELDS
from nativesd.pictures.soft import SoftInpaint
from nativesd.pipeline.asked.readers import flag
from nativesd.pipeline.asked.worded import read_soft_inpaint

SOFT = "soft inpainting"
ENABLED = "enabled"
NAMES: Mapping[str, str] = {
    **{name.name: name.name for name in fields(SoftInpaint)},
    **{shown.lower(): field for field, shown in SOFT_INPAINT_FIELDS.items()},
    **{shown.lower().removeprefix(f"{SOFT} "): field for field, shown in SOFT_INPAINT_FIELDS.items()},
    **dict.fromkeys((SOFT, SOFT_INPAINT.lower(), ENABLED), ENABLED),
}
"""What clients call an argument, in lower case: as the script's sliders, its fields in a text, or its variables."""
ORDER = (ENABLED, *(field.name for field in fields(SoftInpaint)))
"""Of the arguments, where they have no names."""


def read_soft(arguments: list[Any], *, masked: bool, unheeded: list[str]) -> dict[str, Any]:
    """The option `soft_inpaint` of the script's arguments: a list of values, or of one object.

    Without a mask they are not heeded, as in A1111. Raises UsageError that names the argument.
    """
    where = f"alwayson_scripts.{SOFT}.args"
    if len(arguments) == 1 and isinstance(arguments[0], dict):
        given: dict[str, Any] = {ENABLED: True}  # an object switches it on, unless it says otherwise
        for name, value in arguments[0].items():
            if name.lower() not in NAMES:
                raise UsageError(f"{where} has no {name!r}: it has Soft inpainting, {', '.join(SOFT_INPAINT_FIELDS)}")
            given[NAMES[name.lower()]] = value
    elif len(arguments) > len(ORDER):
        raise UsageError(f"{where} must be at most {len(ORDER)} values, not {len(arguments)}")
    else:
        given = dict(zip(ORDER, arguments, strict=False))
    enabled = given.pop(ENABLED, None)
    if enabled is None or not flag(f"{where}: enabled", enabled):
        return {}
    if not masked:
        unheeded.append(f"alwayson_scripts.{SOFT} (it is for a mask)")
        return {}
    settings = SoftInpaint(**{name: value for name, value in given.items() if value is not None})
    return {"soft_inpaint": read_soft_inpaint(where, settings)}
