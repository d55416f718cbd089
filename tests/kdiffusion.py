"""k-diffusion's samplers, loaded without its package, whose requirements are large (torchvision, wandb, CUDA).

Install the oracle with `pip install --no-deps k-diffusion` and its sampling module's own needs with
`pip install --no-deps torchdiffeq` and `pip install torchsde`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor


def _append_dims(x: Tensor, dimensions: int) -> Tensor:
    """`k_diffusion.utils.append_dims`, the only one of its utilities that the samplers call."""
    return x.reshape(*x.shape, *[1] * (dimensions - x.ndim))


def kdiffusion_sampling() -> Any:
    """The module `k_diffusion.sampling`; skips the test where it or what it imports is not installed."""
    for name in ("k_diffusion", "torchdiffeq", "torchsde", "scipy"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    return _load()


@cache
def _load() -> ModuleType:
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    package, utils = ModuleType("k_diffusion"), ModuleType("k_diffusion.utils")
    package.__path__ = []
    vars(utils)["append_dims"] = _append_dims
    vars(package)["utils"] = utils
    path = Path(folder) / "sampling.py"
    found = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    stubs = {"k_diffusion": package, "k_diffusion.utils": utils}
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        found.loader.exec_module(module)
    finally:  # nobody else may find the stubs
        for name, original in before.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original
    return module
