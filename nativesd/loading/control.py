"""From a source to a ControlNet or a T2I-Adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from nativesd.config import ControlNetConfig, T2IAdapterConfig
from nativesd.diffusion.control import ControlModel
from nativesd.errors import SourceError, UsageError
from nativesd.loading.placement import find_placement
from nativesd.models.build import build
from nativesd.models.controlnet import ControlNet, ControlNetUnion
from nativesd.models.t2i_adapter import T2IAdapter
from nativesd.models.unet import UNet
from nativesd.shipped import TINY
from nativesd.tuning.fp8 import is_fp8
from nativesd.tuning.int8 import Int8, use_int8
from nativesd.tuning.memory import memory_explained
from nativesd.tuning.tune import tune
from nativesd.weights.checkpoint import fill
from nativesd.weights.files.locate import locate_part
from nativesd.weights.files.source import open_source
from nativesd.weights.identity.identify import identify_all
from nativesd.weights.maps.keymap import load_tables


@memory_explained()
def load_control(
    source: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    maps: str | Path | None = None,
    unet: UNet | None = None,
    fast: bool = True,
    quantize: Literal["int8"] | None = None,
) -> ControlModel:
    """Load a ControlNet (plain or union) or a T2I-Adapter: "tiny" (edges, for the embedded model), a folder, a file, or
    a hub id.

    A single file does not say that it is a "shuffle" ControlNet, which is pooled: its name must. The options are those
    of `load`. `unet` is the model's, to which a ControlNet that was saved as a difference is added. Raises SourceError
    for what cannot be read or is neither.
    """
    placement = find_placement(device, dtype, quantize=quantize)
    path = TINY / "controlnet" if source == "tiny" else locate_part(source)
    for member, identity in identify_all(open_source(path), load_tables(None if maps is None else Path(maps))):
        for component in identity.components:
            config = component.config
            if isinstance(config, ControlNetConfig | T2IAdapterConfig):
                if isinstance(config, ControlNetConfig) and path.is_file() and "shuffle" in path.stem.lower():
                    config = replace(config, pooled=True)  # as in A1111
                module = build(config)
                assert isinstance(module, ControlNet | ControlNetUnion | T2IAdapter)
                difference = "difference" in member.tensors
                if placement.int8 and not difference:
                    use_int8(module)
                fill(module, member, component, device=placement.home, dtype=placement.dtype)
                if difference:
                    _add(module, unet, path)
                    if placement.int8:
                        use_int8(module)
                if fast:
                    tune(module)
                return ControlModel(str(source) if source == "tiny" else path.stem, module.eval())
    raise SourceError(f"{source} is neither a ControlNet nor a T2I-Adapter: see its audit")


@torch.no_grad()
def _add(module: torch.nn.Module, unet: UNet | None, path: Path) -> None:
    """Add the UNet's encoder to a ControlNet that holds what it differs by."""
    if unet is None:
        raise SourceError(f"{path} holds the difference from a model's UNet: use it with one, or pass unet=")
    if is_fp8(unet):
        raise UsageError(f"{path} holds the difference from a UNet, and the model's is in float8: load it without fp8")
    shared = unet.state_dict()
    shared |= {f"{name}.weight": part.numbers() for name, part in unet.named_modules() if isinstance(part, Int8)}
    for name, parameter in module.named_parameters():
        if name in shared:
            if shared[name].shape != parameter.shape:
                raise SourceError(
                    f"{path} holds the difference from another family's UNet: {name} is {tuple(parameter.shape)}, and "
                    f"the model's {tuple(shared[name].shape)}"
                )
            parameter.add_(shared[name].to(parameter))
