"""A LoRA in a model: what it changes there, or in one sentence why it does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nativesd.config import UNetConfig
from nativesd.errors import UsageError, WeightsError
from nativesd.weights.identity.describe import FAMILIES, unet_family
from nativesd.weights.identity.identify import CONTEXTS
from nativesd.weights.lora.bases import fits
from nativesd.weights.lora.file import LoraFile
from nativesd.weights.lora.place import Change, Place, context, place
from nativesd.weights.maps.parameters import known_parameters
from nativesd.weights.names import grouped


@dataclass(frozen=True)
class Resolution:
    """What a LoRA changes in a model, and the keys that found no place in it, with the reasons."""

    changes: tuple[Change, ...]
    unplaced: Mapping[str, str]


def resolve(lora: LoraFile, places: Mapping[str, Place], *, partial: bool = False) -> Resolution:
    """Find the parameters that a LoRA changes in the components `places`.

    Raises WeightsError for a LoRA of another family, one of which nothing fits, and, if not `partial`, one of which
    anything does not fit, naming such keys with the reason.
    """
    tensors, unet = lora.member.tensors, places.get("unet")
    width = context(lora.groups, tensors)
    model = unet.config if unet is not None and isinstance(unet.config, UNetConfig) else None
    if width is not None and model is not None and width != model.context:
        theirs, ours = CONTEXTS.get(width, "another model"), FAMILIES[unet_family(model)[0]]
        raise WeightsError(
            f"{lora.path} fits {theirs} (context {width}), but the model is {ours} (context {model.context})"
        )
    changes, unplaced = place(lora.groups, tensors, places)
    unplaced = {**lora.unplaced, **unplaced}
    if unplaced and not (partial and changes):
        meant = _meant(lora, places, model) if model is not None and not lora.unplaced else ""
        verdict = f"{meant}: there" if meant else "does not fit the model:"
        rest = "; partial=True applies the others" if changes else ""
        raise WeightsError(
            f"{lora.path} {verdict} {len(unplaced)} of its {len(tensors)} keys found no place{rest}:\n  "
            + "\n  ".join(reasons(unplaced))
        )
    return Resolution(tuple(changes), unplaced)


def _meant(lora: LoraFile, places: Mapping[str, Place], model: UNetConfig) -> str:
    """Which base a LoRA fits as a whole, where that is not the model's, as the beginning of a sentence; else ""."""
    tables = next(iter(places.values())).tables
    fitting = fits(lora.groups, lora.member.tensors, tables, lambda config: known_parameters(config) or {})
    labels = [fit.label for fit in fitting if not fit.unplaced and fit.changes]
    family, variant = unet_family(model)
    own = f"{FAMILIES[family]} {variant}".strip()
    return "" if not labels or own in labels else f"fits {labels[0]}, but the model is {own}"


def reasons(unplaced: Mapping[str, str], limit: int = 5) -> list[str]:
    """Keys with the reasons why they have no place: each where there are few of a reason, else what they begin with."""
    groups: dict[str, list[str]] = {}
    for key, reason in unplaced.items():
        groups.setdefault(reason, []).append(key)
    return [f"{', '.join(grouped(keys, limit))}: {reason}" for reason, keys in groups.items()]


@dataclass(frozen=True)
class Use:
    """A LoRA with the strength it is applied with, to the UNet and to the text encoders; 0 is not at all."""

    lora: LoraFile
    unet: float = 1.0
    text_encoder: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.unet) and math.isfinite(self.text_encoder)):
            raise UsageError(f"the strength of {self.lora.path} must be a finite number")

    def strength(self, component: str) -> float:
        """That of one component."""
        return self.unet if component == "unet" else self.text_encoder
