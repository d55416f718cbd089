"""The .yaml beside a single file, as A1111 and Stability publish it: what it says that no tensor says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nativesd.config import Prediction
from nativesd.errors import SourceError
from nativesd.reading import read_bounded

LIMIT = 1 << 20
"""Bytes; published ones have 2 to 5 thousand."""
PREDICTIONS: Mapping[str, Prediction] = {"v": "v", "eps": "epsilon"}
"""`parameterization` of ldm's LatentDiffusion (Stability-AI/stablediffusion, ldm/models/diffusion/ddpm.py)."""
SCALINGS: Mapping[str, Prediction] = {"VScaling": "v", "EpsScaling": "epsilon"}
"""The last part of `scaling_config.target` in sgm's configurations (Stability-AI/generative-models,
sgm/modules/diffusionmodules/denoiser_scaling.py)."""


@dataclass(frozen=True)
class Beside:
    """What a .yaml says of a model; None where it says nothing of it.

    `heads`: of every level; `head_width`: or what one is wide; the others are the UNet's of the same name in config.
    """

    name: str
    prediction: Prediction | None = None
    model_channels: int | None = None
    in_channels: int | None = None
    context: int | None = None
    heads: int | None = None
    head_width: int | None = None


def read_beside(path: Path) -> Beside | None:
    """The .yaml beside a single file; None where there is none, or it is none of a model. Raises SourceError."""
    found = next((each for suffix in (".yaml", ".yml") if (each := path.with_suffix(suffix)).is_file()), None)
    if found is None or found == path:
        return None
    try:
        data = yaml.safe_load(read_bounded(found, LIMIT, "YAML file"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise SourceError(f"{found}, beside the model, is no YAML ({problem}): mend it, or move it away") from error
    params = _inside(data, "model", "params")
    unet = _inside(params, "unet_config", "params") or _inside(params, "network_config", "params")
    if not unet:
        return None
    scaling = str(_inside(params, "denoiser_config", "params", "scaling_config").get("target", "")).rpartition(".")[2]
    head_width = _number(unet, "num_head_channels")
    return Beside(
        name=found.name,
        prediction=PREDICTIONS.get(str(params.get("parameterization")), SCALINGS.get(scaling)),
        model_channels=_number(unet, "model_channels"),
        in_channels=_number(unet, "in_channels"),
        context=_number(unet, "context_dim"),
        heads=_number(unet, "num_heads") if head_width is None else None,
        head_width=head_width,
    )


def _inside(data: Any, *names: str) -> dict[Any, Any]:
    """The mapping at the end of a way through mappings; {} where it ends before."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _number(data: Mapping[Any, Any], name: str) -> int | None:
    """A positive number of a mapping; ldm writes -1 for one that is not set."""
    value = data.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
