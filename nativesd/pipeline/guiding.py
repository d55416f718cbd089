"""Guidance records as a call takes them, and as texts such as "pag:3" or "freeu:b1=1.3,b2=1.4"."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from nativesd.diffusion.guiding.guiders import GUIDERS, Guider
from nativesd.errors import UsageError
from nativesd.pipeline.readers import Reader, is_list, real, shown

_SHARE = real(0, 1)
_RANGES: dict[str, Reader] = {
    "start": _SHARE, "end": _SHARE, "percentile": _SHARE, "phi": _SHARE, "scale": real(-100, 100),
    "blur": real(0, above=True), "eta": real(-10, 10), "threshold": real(0, 1e6), "momentum": real(-1, 1),
    "mimic": real(0, 1000), **dict.fromkeys(("b1", "b2", "s1", "s2"), real(0, 10)),
}  # fmt: skip


def read_guidance(name: str, value: Any) -> tuple[Guider, ...]:
    """One record or several, or their texts; "pag:3" is a text of one, and blanks stand between several."""
    given = value.split() if isinstance(value, str) else list(value) if is_list(value) else [value]
    return tuple(_one(name, each) for each in given)


def _one(name: str, value: Any) -> Guider:
    if isinstance(value, str):
        return _parse(name, value)
    if type(value) not in GUIDERS.values():
        kinds = ", ".join(kind.__name__ for kind in GUIDERS.values())
        raise UsageError(f"{name} must be of {kinds}, or a text of it, not {shown(value)}: a number is guidance_scale")
    kind = type(value)
    given = {field.name: getattr(value, field.name) for field in fields(value)}
    read: Guider = kind(
        **{field: _value(f"{name}: {kind.name}'s {field}", field, each) for field, each in given.items()}
    )
    return read


def _value(name: str, field: str, value: Any) -> Any:
    if field != "layers":
        return _RANGES[field](name, value)
    layers = tuple([value] if isinstance(value, str) else value)
    if not layers or not all(isinstance(layer, str) for layer in layers):
        raise UsageError(f"{name} must be names of layers, such as mid, not {shown(value)}")
    return layers


def _parse(name: str, text: str) -> Guider:
    """NAME, NAME:VALUE, NAME:FIELD=VALUE,... where VALUE alone is the record's first number."""
    word, _, rest = text.partition(":")
    kind = GUIDERS.get(word.strip().lower())
    if kind is None:
        raise UsageError(f"{name}: there is no {shown(word)}: there are {', '.join(GUIDERS)}")
    known = [field.name for field in fields(kind)]
    values: dict[str, Any] = {}
    for number, part in enumerate(filter(None, rest.split(","))):
        field, equals, value = part.partition("=")
        if not equals and number == 0 and known:
            field, value = known[0], part
        if field not in known:
            raise UsageError(f"{name}: {word} has no {shown(field)}: it has {', '.join(known) or 'nothing to say'}")
        values[field] = value.split("+") if field == "layers" else value
    return _one(name, kind(**values))


def guidance_text(guider: Guider) -> str:
    """A record as the text that `read_guidance` takes, without what is at its default."""
    said = []
    for field in fields(guider):
        value = getattr(guider, field.name)
        if value != _default(field):
            said.append(f"{field.name}={'+'.join(value) if field.name == 'layers' else repr(value)}")
    return guider.name + (":" + ",".join(said) if said else "")


def _default(field: Field[Any]) -> Any:
    return None if field.default is MISSING else field.default
