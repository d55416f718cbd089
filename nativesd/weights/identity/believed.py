"""What the user takes a checkpoint for, whatever it looks like: `audit --as SDXL/sgm`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nativesd.config import UNETS, UNetConfig
from nativesd.errors import UsageError
from nativesd.weights.identity.describe import FAMILIES, GUIDANCE, INPUTS, OWN_FORM, unet_family
from nativesd.weights.identity.detect import Detection, Found
from nativesd.weights.maps.keymap import KeyMap
from nativesd.weights.maps.rules import Shape

USUAL = {"sd1": "sd15", "sd2": "sd21"}
"""The families' names in code, where their own model has another."""


@dataclass(frozen=True)
class Believed:
    """A UNet's configuration, which the family comes with, and a layout."""

    unet: UNetConfig
    layout: str


def parse_believed(text: str) -> Believed:
    """FAMILY/LAYOUT, by the names that the audit prints ("SDXL refiner/sgm") or the presets' ("sd15/ldm").

    Raises UsageError.
    """
    family, slash, layout = text.rpartition("/")
    if not slash:
        raise UsageError(f"{text!r} is not FAMILY/LAYOUT, such as SDXL/sgm")
    name = family.strip().casefold()
    unet = UNETS.get(USUAL.get(name, name)) or _labelled().get(name)
    if unet is None and name.endswith(OWN_FORM):
        raise UsageError(f"{family!r} is no published form, so there is nothing to compare with")
    if unet is None:
        known = dict.fromkeys([*(label for label in FAMILIES.values()), *UNETS])
        raise UsageError(f"{family!r} is not a family: it is one of {', '.join(known)}")
    return Believed(unet, layout.strip().casefold())


def _labelled() -> dict[str, UNetConfig]:
    """Every published form of a UNet by what the audit calls it."""
    out: dict[str, UNetConfig] = {}
    for preset in UNETS.values():
        for channels in INPUTS:
            for guidance in (None, GUIDANCE):
                unet = replace(preset, in_channels=channels, guidance=guidance)
                family, variant = unet_family(unet)
                out.setdefault(f"{FAMILIES[family]} {variant}".strip().casefold(), unet)
    return out


def as_believed(
    detection: Detection, shapes: Mapping[str, Shape], tables: Mapping[str, KeyMap], believed: Believed
) -> Detection:
    """The components read through the tables of the layout that the user names. Raises UsageError."""
    layout = "ldm" if believed.layout == "sgm" else believed.layout
    chosen = {table.component: table for table in tables.values() if table.layout == layout and table.rules}
    if not chosen:
        layouts = sorted({table.layout for table in tables.values() if table.rules} | {"sgm"})
        raise UsageError(f"{believed.layout!r} is not a layout of models: it is one of {', '.join(layouts)}")
    dims = believed.unet.dims
    if not detection.found:
        table = chosen.get("unet") or next(iter(chosen.values()))
        prefix = table.prefixes[0]
        return Detection([Found(table.bind(dims, prefix), prefix, detection.unrecognised)], detection.ignored)
    out = replace(detection, found=[])
    for found in detection.found:
        table = chosen.get(found.component, found.table.keymap)
        prefix = found.prefix if found.prefix in table.prefixes else table.prefixes[0]
        own = dims if table.component == "unet" else table.probe(found.keys, found.prefix)
        out.found.append(Found(table.bind(own, prefix), prefix, found.keys))
    return out
