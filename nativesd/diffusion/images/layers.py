"""How strongly an image prompt acts at each of a UNet's attentions: by a name, by places, and by a kind of weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, get_args

from nativesd.config import CrossAttention, UNetConfig
from nativesd.errors import UsageError

Place = tuple[str, int, int]
"""Of a transformer: part, stage of the part, and layer in it."""
WeightType = Literal[
    "linear", "ease in", "ease out", "ease in-out", "reverse in-out", "weak input", "weak middle", "weak output",
    "strong middle",
]  # fmt: skip
"""ComfyUI_IPAdapter_plus' weight types, which change the scale from transformer to transformer."""
Layers = str | Mapping[int, float] | Mapping[str, Any]
"""What an image prompt acts at: a name of `NAMED`; factors by the numbers of the transformers, in the order of the
data's way (ComfyUI's layer weights), also as a text such as "0=1 2=0.5"; or by places as diffusers has them, such as
{"down": {"block_2": [0, 1]}}."""

# cubiq/ComfyUI_IPAdapter_plus IPAdapterPlus.py, `ipadapter_execute`: the transformers of "style transfer" and
# "composition", by how many there are, which is 16 in SD1.x and SD2.x and 11 in SDXL (Wang et al. 2024, 2404.02733)
_STYLE = {16: dict.fromkeys((0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15), 1.0), 11: {6: 1.0}}
_LAYOUT = {16: {4: 0.25, 5: 1.0}, 11: {3: 1.0}}
NAMED = {
    "style": _STYLE, "layout": _LAYOUT,
    "style and layout": {count: _STYLE[count] | _LAYOUT[count] for count in _STYLE},
}  # fmt: skip
ALSO = {"style transfer": "style", "composition": "layout", "style and composition": "style and layout"}
"""ComfyUI's names for them."""
PUBLISHED: Mapping[str, tuple[WeightType, str | None]] = {
    **{name: (name, None) for name in get_args(WeightType)},
    **{name: ("linear", layers) for name, layers in ALSO.items()},
}
"""ComfyUI_IPAdapter_plus' weight types, as far as they are here: a weight type, and where the prompt acts."""


def layer_scales(unet: UNetConfig, layers: Layers | None, weight_type: WeightType = "linear") -> tuple[float, ...]:
    """A factor for every one of `UNetConfig.cross_attentions`. Raises UsageError for what this UNet has not."""
    if weight_type not in get_args(WeightType):
        raise UsageError(f"weight_type must be one of {', '.join(get_args(WeightType))}, not {weight_type!r}")
    order = {"down": 0, "mid": 1, "up": 2}
    every = [place for place, _ in groupby(unet.cross_attentions, key=_place)]
    places: list[Place] = sorted(every, key=lambda place: (order[place[0]], *place[1:]))  # as the data goes
    factors = dict.fromkeys(places, 1.0) if layers is None else _chosen(places, layers)
    for number, place in enumerate(places):
        factors[place] *= _weight(weight_type, number, len(places), place[0])
    return tuple(factors[_place(attention)] for attention in unet.cross_attentions)


def layers_text(unet: UNetConfig, layers: Layers | None) -> str | None:
    """The text that stands for `layers`: its name, or factors by number such as "0=1 2=0.5"; None where there are none.

    Raises UsageError for what this UNet has not.
    """
    if layers is None or (isinstance(layers, str) and "=" not in layers):
        return layers
    by_place = dict(zip(map(_place, unet.cross_attentions), layer_scales(unet, layers), strict=True))
    order = {"down": 0, "mid": 1, "up": 2}
    factors = [by_place[place] for place in sorted(by_place, key=lambda place: (order[place[0]], *place[1:]))]
    return " ".join(f"{number}={factor:g}" for number, factor in enumerate(factors) if factor) or "0=0"


def _place(attention: CrossAttention) -> Place:
    return attention.part, attention.stage, attention.layer


def _chosen(places: Sequence[Place], layers: Layers) -> dict[Place, float]:
    if isinstance(layers, str) and "=" in layers:
        return _numbered(places, [_pair(layers, part) for part in layers.split()])
    if isinstance(layers, str):
        table = NAMED.get(ALSO.get(layers, layers))
        if table is None:
            raise UsageError(f"layers must be {', '.join(NAMED)}, or factors by layer, not {layers!r}")
        if len(places) not in table:
            raise UsageError(
                f"layers={layers!r} is known for UNets of the form of SD1.x or SDXL, with 16 or 11 transformers, and "
                f"this one has {len(places)}: give factors by layer"
            )
        return _numbered(places, list(table[len(places)].items()))
    if not isinstance(layers, Mapping) or not layers:
        raise UsageError(
            f"layers must be {', '.join(NAMED)}, or factors by layer such as {{0: 1.0}}, not {layers!r}: what is not "
            "named has a factor of 0"
        )
    numbers = [(_number(key), factor) for key, factor in layers.items()]
    if all(isinstance(key, int) and not isinstance(key, bool) for key, _ in numbers):
        return _numbered(places, numbers)
    if unknown := [key for key in layers if key not in ("down", "mid", "up")]:
        raise UsageError(f"layers are named by numbers, or by down, mid and up, not by {unknown[0]!r}")
    return {place: _placed(places, place, layers.get(place[0], 0.0)) for place in places}  # type: ignore[call-overload]


def _pair(layers: str, part: str) -> tuple[int, float]:
    number, _, factor = part.partition("=")
    try:
        return int(number), float(factor)
    except ValueError:
        raise UsageError(f"layers must be factors by number such as 0=1 2=0.5, not {layers!r}") from None


def _number(key: Any) -> Any:
    """A number that is a text, as JSON's names are; any other key as it is."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 9 else key


def _numbered(places: Sequence[Place], pairs: Sequence[tuple[int, float]]) -> dict[Place, float]:
    factors: dict[int, float] = {}
    for number, factor in pairs:
        if number in factors:
            raise UsageError(f"layers has two factors for number {number}: keep one of them")
        factors[number] = factor
    if wrong := [number for number in factors if not 0 <= number < len(places)]:
        raise UsageError(f"layers has no number {wrong[0]} in this UNet: they are 0 to {len(places) - 1}")
    return {place: _factor(factors.get(number, 0.0)) for number, place in enumerate(places)}


def _placed(places: Sequence[Place], place: Place, value: Any) -> float:
    """The factor of one transformer, of what is said of its part of the UNet."""
    part, stage, layer = place
    beside = [each for each in places if each[:2] == (part, stage)]
    if isinstance(value, Mapping):
        known = {f"block_{each[1]}" for each in places if each[0] == part}
        if unknown := set(value) - known:
            raise UsageError(f"layers has {unknown.pop()!r} in {part!r}, and this UNet has {', '.join(sorted(known))}")
        value = value.get(f"block_{stage}", 0.0)
    if isinstance(value, list | tuple):
        if len(value) not in (1, len(beside)):
            raise UsageError(f"layers has {len(value)} factors for {len(beside)} transformers of {part}, block {stage}")
        value = value[0] if len(value) == 1 else value[[each[2] for each in beside].index(layer)]
    return _factor(value)


def _factor(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"a factor of layers must be a number, not {value!r}")
    return float(value)


def _weight(weight_type: WeightType, number: int, count: int, part: str) -> float:
    """The factor of the transformer of that number, of so many (CrossAttentionPatch.py of the source above)."""
    middle = count / 2
    match weight_type:
        case "ease in":
            return 0.05 + 0.95 * (1 - number / count)
        case "ease out":
            return 0.05 + 0.95 * number / count
        case "ease in-out":
            return 0.05 + 0.95 * (1 - abs(number - middle) / middle)
        case "reverse in-out":
            return 0.05 + 0.95 * abs(number - middle) / middle
        case "weak input":
            return 0.2 if part == "down" else 1.0
        case "weak middle":
            return 0.2 if part == "mid" else 1.0
        case "weak output":
            return 0.2 if part == "up" else 1.0
        case "strong middle":
            return 1.0 if part == "mid" else 0.2
        case "linear":
            return 1.0
