"""From a source to an IP-Adapter or a CLIP image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from posixpath import dirname, join, normpath

import torch
from torch import nn

from nativesd.config import Config, IPAdapterConfig, VisionEncoderConfig
from nativesd.diffusion.images.prompts import ImageAdapter, ImageEncoder
from nativesd.errors import NativesdError, NetworkError, SourceError
from nativesd.loading.placement import find_placement
from nativesd.models.build import build
from nativesd.models.clip_vision import VisionEncoder
from nativesd.models.ip_adapter import IPAdapter
from nativesd.reading import MAX_JSON
from nativesd.shipped import IMAGE_ENCODER, IP_ADAPTER
from nativesd.tuning.memory import memory_explained
from nativesd.weights.checkpoint import fill
from nativesd.weights.files.configs import component_config
from nativesd.weights.files.locate import locate_part, locate_weights
from nativesd.weights.files.source import Member, open_source
from nativesd.weights.identity.identify import Component, identify_all
from nativesd.weights.maps.keymap import load_tables

ENCODERS = ("image_encoder", "../models/image_encoder", "../sdxl_models/image_encoder")
"""Where image encoders lie in h94/IP-Adapter on the hub, as seen from its adapters."""


@memory_explained()
def load_image_adapter(
    source: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    maps: str | Path | None = None,
    shortcut: bool | None = None,
) -> ImageAdapter:
    """Load an IP-Adapter: "tiny" (for the embedded model), a file, or a folder with one; or on the hub, as
    "h94/IP-Adapter/models/ip-adapter_sd15.bin".

    shortcut  whether a FaceID plus adapter is of the second version, which its tensors do not say. Default: whether its
              file's name has "v2"

    The other options are those of `load`. Raises SourceError for what cannot be read or is none, NetworkError for the
    hub.
    """
    placement = find_placement(device, dtype)
    path, on_hub = (IP_ADAPTER, None) if source == "tiny" else locate_weights(source)
    found = _component(path, IPAdapterConfig, maps)
    if found is None:
        raise SourceError(f"{source} is no IP-Adapter: see its audit")
    member, component = found
    config = component.config
    assert isinstance(config, IPAdapterConfig)
    second = "v2" in path.stem.lower() if shortcut is None else shortcut
    module = build(replace(config, shortcut=second and config.kind == "faceid-plus"))
    assert isinstance(module, IPAdapter)
    fill(module, member, component, device=placement.home, dtype=placement.dtype)
    module.loras = nn.ModuleList()  # they are merged into the UNet, from the file
    return ImageAdapter("tiny" if source == "tiny" else path.stem, module.eval(), path, member, on_hub)


@memory_explained()
def load_image_encoder(
    source: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    maps: str | Path | None = None,
) -> ImageEncoder:
    """Load a CLIP image encoder for IP-Adapters: "tiny" (that of the embedded one), a file, a folder, or on the hub, as
    "h94/IP-Adapter/models/image_encoder"; of a whole CLIP its image tower.

    The options are those of `load`. Raises SourceError for what cannot be read or has none.
    """
    placement = find_placement(device, dtype)
    path = IMAGE_ENCODER if source == "tiny" else locate_part(source, stem="model")
    found = _component(path, VisionEncoderConfig, maps)
    if found is None:
        raise SourceError(f"{source} has no CLIP image encoder: see its audit")
    member, component = found
    assert component.config is not None
    module = build(component.config)
    assert isinstance(module, VisionEncoder)
    fill(module, member, component, device=placement.home, dtype=placement.dtype)
    return ImageEncoder(path.name if path.is_dir() else path.stem, module.eval())


def find_image_encoder(adapter: ImageAdapter, others: Sequence[str | Path] = ()) -> Path | None:
    """The image encoder in one of the places where an adapter is published with one, or else of `others`, which gives
    what it takes.

    Of an adapter on the hub, its repository is looked into. Raises NetworkError where none is known for the hub's sake.
    """
    if adapter.on_hub is not None:
        return _fetched_encoder(adapter, adapter.on_hub)
    beside = adapter.path if adapter.path.is_dir() else adapter.path.parent
    for place in (*(beside / place for place in ENCODERS), *map(Path, others)):
        if not place.exists():
            continue
        try:
            found = _component(place, VisionEncoderConfig, None)
        except NativesdError:  # the one that is named with image_encoder= is to say what is wrong with it
            continue
        if found is not None and _serves(found[1].config, adapter):
            return place
    return None


def _fetched_encoder(adapter: ImageAdapter, on_hub: str) -> Path | None:
    """The same in the repository of an adapter: its config says whether it serves before its weights are fetched."""
    # the hub's client is not needed for local files
    from nativesd.weights.files.asking import MissingError
    from nativesd.weights.files.hub import fetch_component, fetch_file, inside_of

    repo_id, inside = inside_of(on_hub)
    failure: NetworkError | None = None
    for place in ENCODERS:
        folder = normpath(join(dirname(inside), place))
        if folder.startswith(".."):
            continue
        try:
            config = component_config(fetch_file(repo_id, f"{folder}/config.json", limit=MAX_JSON))
        except MissingError:
            continue
        except NetworkError as error:  # another place may be in the cache
            failure = failure or error
            continue
        if _serves(config, adapter):
            return fetch_component(f"{repo_id}/{folder}", "model")
    if failure is not None:
        raise failure
    return None


def _serves(encoder: Config | None, adapter: ImageAdapter) -> bool:
    """Whether an image encoder gives what an adapter takes."""
    config = adapter.module.config
    if not isinstance(encoder, VisionEncoderConfig):
        return False
    return config.image == (encoder.projection if config.kind == "base" else encoder.width)


def _component(path: Path, kind: type, maps: str | Path | None) -> tuple[Member, Component] | None:
    """The component of a source whose configuration is of a kind."""
    for member, identity in identify_all(open_source(path), load_tables(None if maps is None else Path(maps))):
        for component in identity.components:
            if isinstance(component.config, kind):
                return member, component
    return None
