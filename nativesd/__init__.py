"""A native PyTorch Stable Diffusion stack. Imports are lazy: torch is loaded when the first function is used.

import nativesd
nativesd.generate("a strawberry on a yellow background").save("strawberry.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nativesd.errors import NativesdError
from nativesd.version import __version__

if TYPE_CHECKING:
    from nativesd.auditing import audit as audit
    from nativesd.auditing import diff as diff
    from nativesd.control import Control as Control
    from nativesd.converting import convert as convert
    from nativesd.exporting import export_onnx as export_onnx
    from nativesd.exporting import export_tensorrt as export_tensorrt
    from nativesd.loading import load as load
    from nativesd.loading import load_control as load_control
    from nativesd.pipeline import Hires as Hires
    from nativesd.pipeline import Pipeline as Pipeline
    from nativesd.pipeline import options_from as options_from
    from nativesd.preprocess import canny as canny
    from nativesd.result import Result as Result

_LAZY = {
    "audit": "nativesd.auditing", "diff": "nativesd.auditing", "convert": "nativesd.converting",
    "export_onnx": "nativesd.exporting", "export_tensorrt": "nativesd.exporting",
    "load": "nativesd.loading", "load_control": "nativesd.loading", "canny": "nativesd.preprocess",
    "Control": "nativesd.control", "Hires": "nativesd.pipeline", "Pipeline": "nativesd.pipeline",
    "options_from": "nativesd.pipeline", "Result": "nativesd.result",
}  # fmt: skip
__all__ = [
    "Control",
    "Hires",
    "NativesdError",
    "Pipeline",
    "Result",
    "__version__",
    "audit",
    "canny",
    "convert",
    "diff",
    "export_onnx",
    "export_tensorrt",
    "generate",
    "load",
    "load_control",
    "options_from",
]

LOAD_OPTIONS = (
    "device",
    "dtype",
    "prediction",
    "unet",
    "vae",
    "text_encoders",
    "preview",
    "offload",
    "maps",
    "backend",
    "engines",
    "fast",
    "compile",
    "fp8",
)


def generate(prompt: str | Sequence[str], model: str = "tiny", **options: Any) -> Result:
    """Load `model` and make pictures of `prompt`: the options of `load` and of `Pipeline.__call__`, by name."""
    from nativesd.loading import load

    loading = {name: options.pop(name) for name in LOAD_OPTIONS if name in options}
    return load(model, **loading)(prompt, **options)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nativesd' has no attribute {name!r}")
