"""A1111's and Forge's fields of guidance, as the text that the option `guidance` takes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from nativesd.errors import UsageError
from nativesd.pictures.programs.recipe import real

_EARLY = "skip early cfg"
_EXTENSION = {
    "dynamic thresholding enabled": "enabled", "mimic scale": "mimic_scale",
    "threshold percentile": "threshold_percentile",
}  # fmt: skip
"""Fields of the extension sd-dynamic-thresholding, and Forge's names for them, where a percentile is a share."""
_FORGE: dict[str, tuple[str, dict[str, str]]] = {
    "pag": ("pag", {"scale": "scale", "start": "start", "end": "end"}),
    "freeu": ("freeu", {"b1": "b1", "b2": "b2", "s1": "s1", "s2": "s2"}),
    "dynthres": ("threshold", {"mimic_scale": "mimic", "threshold_percentile": "percentile", "interpolate_phi": "phi"}),
}
"""Forge's fields by what stands before "_", with the record that they are, and its fields by the rest of the name."""
_USUAL = {
    "attenuation": ("0",), "start": ("0",), "end": ("1",), "mimic_mode": ("constant",), "cfg_mode": ("constant",),
    "separate_feature_channels": ("enable", "true"), "scaling_startpoint": ("mean",), "variability_measure": ("ad",),
}  # fmt: skip
"""Values of Forge's other fields that change nothing."""
_UNUSED = ("mimic_scale_min", "cfg_scale_min", "sched_val")  # with constant modes


def about_guidance(key: str) -> bool:
    """Whether a field, in lower case, is read here."""
    prefix, _, rest = key.partition("_")
    return key == _EARLY or key in _EXTENSION or bool(rest and prefix in _FORGE)


def guidance_of(fields: Mapping[str, str], steps: int) -> tuple[str, list[str]]:
    """The records' text (empty: none), and the fields of them that have no equal; names are in lower case."""
    texts, unread = [], []
    early = 0.0
    with suppress(UsageError):
        early = real(_EARLY, fields.get(_EARLY, "0"))
    if early:  # there, steps up to this share of all have none
        texts.append(f"interval:start={(int(early * steps) + 1) / steps!r}")
    for prefix, (record, names) in _FORGE.items():
        said = {key.removeprefix(f"{prefix}_"): value for key, value in fields.items() if key.startswith(f"{prefix}_")}
        if prefix == "dynthres":
            said |= _of_extension(fields)
        if said.pop("enabled", "").lower() != "true":
            continue
        texts.append(f"{record}:" + ",".join(f"{field}={said[name]}" for name, field in names.items() if name in said))
        for key, value in said.items():
            usual = value.lower().removesuffix(".0") in _USUAL.get(key, ())
            if key not in names and not usual and key not in _UNUSED:
                unread.append(f"{prefix}_{key}")
    return " ".join(texts), unread


def _of_extension(fields: Mapping[str, str]) -> dict[str, str]:
    said = {_EXTENSION[key]: value for key, value in fields.items() if key in _EXTENSION}
    with suppress(UsageError):
        if "threshold_percentile" in said:
            said["threshold_percentile"] = f"{real('', said['threshold_percentile']) / 100:g}"
    return said
