"""Records as a call takes them that can be texts, too: such as "pag:3", "tome", "mask_blend_scale=1"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from nativesd.diffusion.guiding.guiders import GUIDERS, Guider
from nativesd.diffusion.savings import SAVINGS, Saving
from nativesd.errors import UsageError
from nativesd.pictures.soft import SoftInpaint
from nativesd.pipeline.asked.readers import Reader, is_list, real, shown, whole

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", Guider, Saving)
DEFAULT = "default"
"""The text of a `SoftInpaint` as it comes."""
_SHARE = real(0, 1)
_RANGES: dict[str, Reader] = {
    "start": _SHARE, "end": _SHARE, "percentile": _SHARE, "phi": _SHARE, "scale": real(-100, 100),
    "blur": real(0, above=True), "eta": real(-10, 10), "threshold": real(0, 1e6), "momentum": real(-1, 1),
    "mimic": real(0, 1000), "ratio": real(0, 0.75), "size": whole(8), "depth": whole(0, 10),
    "every": whole(1, 999), "level": whole(0, 10),
    **dict.fromkeys(("mask_blend_power", "mask_blend_scale"), real(0, 8)), "inpaint_detail_preservation": real(1, 32),
    "composite_mask_influence": _SHARE,
    **dict.fromkeys(("composite_difference_threshold", "composite_difference_contrast"), real(0, 8)),
    **dict.fromkeys(("b1", "b2", "s1", "s2"), real(0, 10)),
}  # fmt: skip


def read_guidance(name: str, value: Any) -> tuple[Guider, ...]:
    """One record or several, or their texts; "pag:3" is a text of one, and blanks stand between several."""
    return tuple(_one(name, each, GUIDERS, ": a number is guidance_scale") for each in _several(value))


def read_savings(name: str, value: Any) -> tuple[Saving, ...]:
    """The same of savings, such as "tome:0.5", of which there may be one."""
    read = tuple(_one(name, each, SAVINGS, "") for each in _several(value))
    if len(read) > 1:
        raise UsageError(f"{name}: they are not made to go together: pass one")
    return read


def read_soft_inpaint(name: str, value: Any) -> SoftInpaint | None:
    """A `SoftInpaint`; True and "default" are one as it comes, "mask_blend_scale=1,..." one of that; False is none."""
    if value is False:
        return None
    if value is True:
        value = SoftInpaint()
    elif isinstance(value, str):
        value = SoftInpaint(**_settings(name, "it", "" if value == DEFAULT else value, SoftInpaint))
    if not isinstance(value, SoftInpaint):
        raise UsageError(f"{name} must be a SoftInpaint, or True, not {shown(value)}")
    return SoftInpaint(**{f.name: _value(f"{name}.{f.name}", f.name, getattr(value, f.name)) for f in fields(value)})


def _several(value: Any) -> list[Any]:
    return value.split() if isinstance(value, str) else list(value) if is_list(value) else [value]


def _one(name: str, value: Any, known: Mapping[str, type[Record]], hint: str) -> Record:
    if isinstance(value, str):
        value = _parse(name, value, known)
    if type(value) not in known.values():
        kinds = ", ".join(kind.__name__ for kind in known.values())
        raise UsageError(f"{name} must be of {kinds}, or a text of it, not {shown(value)}{hint}")
    kind = type(value)
    given = {field.name: getattr(value, field.name) for field in fields(value)}
    read: Record = kind(
        **{field: _value(f"{name}: {kind.name}'s {field}", field, each) for field, each in given.items()}
    )
    if getattr(read, "start", 0.0) > getattr(read, "end", 1.0):
        raise UsageError(f"{name}: {kind.name} acts from start up to end, and {given['start']} is after {given['end']}")
    return read


def _value(name: str, field: str, value: Any) -> Any:
    if field != "layers":
        return _RANGES[field](name, value)
    layers = tuple([value] if isinstance(value, str) else value if is_list(value) else ())
    if not layers or not all(isinstance(layer, str) for layer in layers):
        raise UsageError(f"{name} must be names of layers, such as mid, not {shown(value)}")
    return layers


def _parse(name: str, text: str, kinds: Mapping[str, type[Record]]) -> Record:
    """NAME, NAME:VALUE, NAME:FIELD=VALUE,... where VALUE alone is the record's first number."""
    word, _, rest = text.partition(":")
    kind = kinds.get(word.strip().lower())
    if kind is None:
        raise UsageError(f"{name}: there is no {shown(word)}: there are {', '.join(kinds)}")
    return kind(**_settings(name, word, rest, kind))


def _settings(name: str, word: str, text: str, kind: type[DataclassInstance]) -> dict[str, Any]:
    """Fields of a record, of a text that was said of a `word`: FIELD=VALUE,... or, first, the VALUE of the first."""
    known = [field.name for field in fields(kind)]
    values: dict[str, Any] = {}
    for number, part in enumerate(filter(None, text.split(","))):
        field, equals, value = part.partition("=")
        if not equals and number == 0 and known:
            field, value = known[0], part
        if field not in known:
            raise UsageError(f"{name}: {word} has no {shown(field)}: it has {', '.join(known) or 'nothing to say'}")
        if field in values:
            raise UsageError(f"{name}: {word} has {field} twice: keep one of them")
        values[field] = value.split("+") if field == "layers" else value
    return values


def record_text(record: Guider | Saving) -> str:
    """A record as the text that is read here, without what is at its default."""
    said = []
    for field in fields(record):
        value = getattr(record, field.name)
        if value != _default(field):
            said.append(f"{field.name}={'+'.join(value) if field.name == 'layers' else repr(value)}")
    return record.name + (":" + ",".join(said) if said else "")


def _default(field: Field[Any]) -> Any:
    return None if field.default is MISSING else field.default
