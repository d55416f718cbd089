"""Sources as people name them, opened to be converted or merged: a whole model, or one component."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from nativesd.config import IPAdapterConfig, TextEncoderConfig, UNetConfig, VAEConfig
from nativesd.errors import NativesdWarning, UsageError, WeightsError
from nativesd.models.build import expected
from nativesd.weights.entries import Entry, stored_parameters
from nativesd.weights.files.locate import locate, locate_model
from nativesd.weights.files.source import open_source
from nativesd.weights.identity.describe import unet_family
from nativesd.weights.identity.identify import Component
from nativesd.weights.maps.keymap import KeyMap
from nativesd.weights.maps.parameters import plain
from nativesd.weights.model import Model, Part, choose, identify, identify_known


class Opened(NamedTuple):
    """A source's model, the keys that are no part of it with the reasons, and the components that stand in for its own
    or that it lacks."""

    model: Model
    ignored: Mapping[str, str]
    given: frozenset[str]


def open_model(
    source: str | Path,
    tables: Mapping[str, KeyMap],
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoders: Sequence[str | Path] = (),
    half: bool = False,
    others: Sequence[Part] = (),
) -> Opened:
    """A model, whole, or a component that stands alone.

    unet, vae, text_encoders  sources of components that stand in for its own, as `load` takes them
    others                    components of which those are taken that a model of several lacks

    Raises UsageError for what has no other layout, and what `locate`, `identify` and `choose` raise.
    """
    located = locate(source, unet=unet, vae=vae, text_encoders=text_encoders, half=half)
    identities = identify_known(located.path, open_source(located.path, half=half), tables)
    parts = {c.name: (member, c) for member, identity in identities for c in identity.components}
    for name, (_, component) in parts.items():
        if component.config is None or isinstance(component.config, IPAdapterConfig):
            raise UsageError(
                f"{source} is a {name.replace('_', ' ')} ({component.layout}), which has no other layout here"
            )
    ignored = {key: reason for _, identity in identities for key, reason in identity.ignored.items()}
    found = identify(located, tables, half=half)
    if towers := [part for part in found.own if part[1].name == "image_encoder" and len(found.own) > 1]:
        keys = (key for _, component in towers for key in component.found.keys)
        ignored |= dict.fromkeys(keys, "a whole CLIP's image tower: no text encoder")
        found = replace(found, own=tuple(part for part in found.own if part not in towers))
    if len(found.own) == 1 and not any(found.replacing.values()):
        [(member, component)] = found.own  # the halves of an autoencoder are joined
        return Opened(Model.of(located.path, component.name, member, component), ignored, frozenset())
    given = {"vae" if c.name == "tiny_vae" else c.name for each in found.replacing.values() for _, c in each}
    lacking = [part for part in others if part[1].name not in parts and part[1].name not in given]
    model = choose(replace(found, own=(*found.own, *lacking)))
    return Opened(model, ignored, frozenset(given & set(model.parts)))


@dataclass(frozen=True)
class Side:
    """A model whose components are compared with another's, or merged with them: those that have modules."""

    name: str
    place: Path
    files: tuple[Path, ...]
    """Of weights"""
    parts: Mapping[str, Part]

    def parameters(self, name: str) -> Mapping[str, Entry]:
        """Those of a component, under our names. Raises WeightsError where it is not whole."""
        member, component = self.parts[name]
        assert component.config is not None  # there are no others
        return stored_parameters(member, component, expected(component.config))[0]


def open_side(source: str | Path, tables: Mapping[str, KeyMap]) -> Side:
    """A model's components, complete or not. Raises what `locate_model` and `identify_known` raise."""
    place = locate_model(source)
    identities = identify_known(place, open_source(place), tables)
    parts = {c.name: (member, c) for member, identity in identities for c in identity.components if c.config}
    files = tuple(file for member, _ in identities for file in member.data_starts)
    return Side(str(source), place, files, parts)


LATENTS = 4
"""Input channels of a UNet that takes nothing but latents."""
CHANNELS = {8: "an editing model (InstructPix2Pix)", 9: "an inpainting model"}
"""Input channels that a UNet may have beside the latents' four, which A1111 merges into as well."""


def require_alike(first: Side, sides: Sequence[Side]) -> None:
    """Raises WeightsError where models are of different families or forms; warns where they predict other things."""
    for side in sides:
        for name in first.parts.keys() & side.parts.keys():
            one, other = first.parts[name][1], side.parts[name][1]
            if _form(one) != _form(other):
                kinds = [each.family or each.layout for each in (one, other)]
                what = f"{first.name} has the {name} of {kinds[0]}, {side.name} that of {kinds[1]}"
                if kinds[0] == kinds[1]:
                    what = f"the {name} of {side.name} has another form than that of {first.name}"
                raise WeightsError(f"{what}: only models of one family and form can be merged")
            if isinstance(one.config, UNetConfig) and isinstance(other.config, UNetConfig):
                _compare_unets((first.name, one), (side.name, other))


def _compare_unets(first: tuple[str, Component], other: tuple[str, Component]) -> None:
    channels = []
    for _, component in (first, other):
        assert isinstance(component.config, UNetConfig)
        channels.append(component.config.in_channels)
    if channels[0] < channels[1]:
        what = CHANNELS.get(channels[1], f"a model of {channels[1]} input channels")
        raise UsageError(f"{other[0]} is {what} and {first[0]} is not: name {other[0]} first")
    if channels[0] != channels[1] and channels[1] != LATENTS:
        kinds = [CHANNELS.get(count, f"a model of {count} input channels") for count in channels]
        raise UsageError(
            f"{first[0]} is {kinds[0]} and {other[0]} {kinds[1]}: their channels mean other things, "
            "so they cannot be merged"
        )
    said = [
        next((e.value for e in component.evidence if e.what == "prediction" and e.determined), "")
        for _, component in (first, other)
    ]
    if all(said) and said[0] != said[1]:
        warnings.warn(
            f"{first[0]} predicts {said[0]} and {other[0]} {said[1]}: what is merged of both predicts neither, unless "
            "it is a difference",
            NativesdWarning,
            stacklevel=6,
        )


def _form(component: Component) -> object:
    """What two components must have in common to be merged."""
    match component.config:
        case UNetConfig() as unet:
            return unet_family(unet)[0], plain(replace(unet, in_channels=4, guidance=None))
        case VAEConfig() as vae:
            return plain(replace(vae, half=None))
        case TextEncoderConfig() as text:
            return plain(replace(text, projection=None, layers=0)), text.layers
        case other:
            return None if other is None else plain(other)
