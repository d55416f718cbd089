"""A small model that enlarges pictures, for tests, and spandrel, which runs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor


@contextmanager
def spandrel_alone() -> Iterator[None]:
    """spandrel imports torchvision for two architectures that are not looked at here; it is large, and not needed."""
    with pytest.MonkeyPatch.context() as patch:
        if "spandrel" not in sys.modules:
            functional = ModuleType("torchvision.transforms.functional")
            for name in ("InterpolationMode", "rotate", "normalize"):
                setattr(functional, name, None)
            for name in ("torchvision", "torchvision.transforms"):
                patch.setitem(sys.modules, name, ModuleType(name))
            patch.setitem(sys.modules, functional.__name__, functional)
        pytest.importorskip("spandrel")
        yield


def esrgan() -> dict[str, Tensor]:
    """A small RRDBNet that doubles, in the names of ESRGAN's files."""
    rrdb = importlib.import_module("spandrel.architectures.ESRGAN.__arch.RRDB")
    torch.manual_seed(0)
    network = rrdb.RRDBNet(in_nc=3, out_nc=3, num_filters=4, num_blocks=1, scale=2)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
