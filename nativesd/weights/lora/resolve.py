"""A LoRA in a model: what it changes there, or in one sentence why it does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nativesd.config import UNetConfig
from nativesd.errors import UsageError, WeightsError
from nativesd.weights.lora.file import LoraFile
from nativesd.weights.lora.place import Change, Place, context, place
from nativesd.weights.maps.describe import FAMILIES, unet_family
from nativesd.weights.maps.identify import CONTEXTS


@dataclass(frozen=True)
class Resolution:
    """What a LoRA changes in a model, and the keys that found no place in it, with the reasons."""

    changes: tuple[Change, ...]
    unplaced: Mapping[str, str]


def resolve(lora: LoraFile, places: Mapping[str, Place], *, strict: bool = True) -> Resolution:
    """Find the parameters that a LoRA changes in the components `places`.

    Raises WeightsError for a LoRA of another family, one of which nothing fits, and with `strict` one of which anything
    does not fit, naming every such key with the reason.
    """
    shapes, unet = lora.member.shapes, places.get("unet")
    width = context(lora.groups, shapes)
    if width is not None and unet is not None and isinstance(unet.config, UNetConfig) and width != unet.config.context:
        theirs, ours = CONTEXTS.get(width, "another model"), FAMILIES[unet_family(unet.config)[0]]
        raise WeightsError(
            f"{lora.path} fits {theirs} (context {width}), but the model is {ours} (context {unet.config.context})"
        )
    changes, unplaced = place(lora.groups, shapes, places)
    unplaced = {**lora.unplaced, **unplaced}
    if unplaced and (strict or not changes):
        raise WeightsError(
            f"{lora.path} does not fit the model: {len(unplaced)} of its {len(shapes)} keys found no place:\n  "
            + "\n  ".join(f"{key}: {reason}" for key, reason in unplaced.items())
        )
    return Resolution(tuple(changes), unplaced)


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
