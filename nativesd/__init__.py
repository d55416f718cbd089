"""A native PyTorch Stable Diffusion stack. Imports are lazy: torch is loaded when the first function is used.

import nativesd
nativesd.generate("a strawberry on a yellow background").save("strawberry.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nativesd.errors import Interrupted, NativesdError, NativesdWarning
from nativesd.version import __version__

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Unpack

    from nativesd.checkpoints.audit import audit as audit
    from nativesd.checkpoints.audit import diff as diff
    from nativesd.checkpoints.convert import convert as convert
    from nativesd.checkpoints.export import export_onnx as export_onnx
    from nativesd.checkpoints.export import export_tensorrt as export_tensorrt
    from nativesd.checkpoints.loras.change import join_loras as join_loras
    from nativesd.checkpoints.loras.change import resize_lora as resize_lora
    from nativesd.checkpoints.loras.extract import extract_lora as extract_lora
    from nativesd.checkpoints.merging.merge import merge as merge
    from nativesd.diffusion.control import Control as Control
    from nativesd.diffusion.guiding.guiders import APG as APG
    from nativesd.diffusion.guiding.guiders import PAG as PAG
    from nativesd.diffusion.guiding.guiders import SEG as SEG
    from nativesd.diffusion.guiding.guiders import SLG as SLG
    from nativesd.diffusion.guiding.guiders import TCFG as TCFG
    from nativesd.diffusion.guiding.guiders import DynamicThreshold as DynamicThreshold
    from nativesd.diffusion.guiding.guiders import FreeU as FreeU
    from nativesd.diffusion.guiding.guiders import Interval as Interval
    from nativesd.diffusion.images.prompts import ImageEmbeddings as ImageEmbeddings
    from nativesd.diffusion.images.prompts import ImagePrompt as ImagePrompt
    from nativesd.diffusion.prompting import SDXL as SDXL
    from nativesd.diffusion.regions import Region as Region
    from nativesd.diffusion.savings import DeepCache as DeepCache
    from nativesd.diffusion.savings import HyperTile as HyperTile
    from nativesd.diffusion.savings import TokenMerging as TokenMerging
    from nativesd.diffusion.tiles import Tiles as Tiles
    from nativesd.latents.preview import Step as Step
    from nativesd.loading.control import load_control as load_control
    from nativesd.loading.image_prompts import load_image_adapter as load_image_adapter
    from nativesd.loading.image_prompts import load_image_encoder as load_image_encoder
    from nativesd.loading.load import load as load
    from nativesd.pictures.preprocess import canny as canny
    from nativesd.pictures.result import Result as Result
    from nativesd.pictures.soft import SoftInpaint as SoftInpaint
    from nativesd.pipeline.asked.arguments import GenerateOptions, Prompt
    from nativesd.pipeline.asked.hires import Hires as Hires
    from nativesd.pipeline.asked.repeat import options_from as options_from
    from nativesd.pipeline.pipeline import Pipeline as Pipeline
    from nativesd.pipeline.upscaling import load_upscaler as load_upscaler
    from nativesd.sampling.options import Sampling as Sampling
    from nativesd.sampling.variation import Variation as Variation
    from nativesd.streaming.frames import Frame as Frame
    from nativesd.streaming.options import OpenOptions
    from nativesd.streaming.similar import Similar as Similar
    from nativesd.streaming.stream import Stream as Stream
    from nativesd.weights.files.hashes import hash_file as hash_file

_HOMES = {
    "checkpoints.audit": ("audit", "diff"),
    "checkpoints.convert": ("convert",),
    "checkpoints.export": ("export_onnx", "export_tensorrt"),
    "checkpoints.loras.change": ("join_loras", "resize_lora"),
    "checkpoints.loras.extract": ("extract_lora",),
    "checkpoints.merging.merge": ("merge",),
    "pictures.preprocess": ("canny",),
    "pictures.result": ("Result",),
    "pictures.soft": ("SoftInpaint",),
    "diffusion.control": ("Control",),
    "diffusion.guiding.guiders": ("APG", "PAG", "SEG", "SLG", "TCFG", "DynamicThreshold", "FreeU", "Interval"),
    "diffusion.images.prompts": ("ImageEmbeddings", "ImagePrompt"),
    "loading.control": ("load_control",),
    "loading.image_prompts": ("load_image_adapter", "load_image_encoder"),
    "loading.load": ("load",),
    "pipeline.asked.hires": ("Hires",),
    "latents.preview": ("Step",),
    "diffusion.prompting": ("SDXL",),
    "diffusion.regions": ("Region",),
    "diffusion.savings": ("DeepCache", "HyperTile", "TokenMerging"),
    "diffusion.tiles": ("Tiles",),
    "pipeline.pipeline": ("Pipeline",),
    "pipeline.asked.repeat": ("options_from",),
    "pipeline.upscaling": ("load_upscaler",),
    "sampling.options": ("Sampling",),
    "sampling.variation": ("Variation",),
    "streaming.similar": ("Similar",),
    "streaming.frames": ("Frame",),
    "streaming.stream": ("Stream",),
    "weights.files.hashes": ("hash_file",),
}
_LAZY = {name: f"nativesd.{module}" for module, names in _HOMES.items() for name in names}
__all__ = [
    "APG",
    "PAG",
    "SDXL",
    "SEG",
    "SLG",
    "TCFG",
    "Control",
    "DeepCache",
    "DynamicThreshold",
    "Frame",
    "FreeU",
    "Hires",
    "HyperTile",
    "ImageEmbeddings",
    "ImagePrompt",
    "Interrupted",
    "Interval",
    "NativesdError",
    "NativesdWarning",
    "Pipeline",
    "Region",
    "Result",
    "Sampling",
    "Similar",
    "SoftInpaint",
    "Step",
    "Stream",
    "Tiles",
    "TokenMerging",
    "Variation",
    "__version__",
    "audit",
    "canny",
    "convert",
    "diff",
    "export_onnx",
    "export_tensorrt",
    "extract_lora",
    "generate",
    "hash_file",
    "join_loras",
    "load",
    "load_control",
    "load_image_adapter",
    "load_image_encoder",
    "load_upscaler",
    "merge",
    "options_from",
    "resize_lora",
    "stream",
]


def generate(prompt: Prompt, model: str | Path = "tiny", **options: Unpack[GenerateOptions]) -> Result:
    """Load `model` and make pictures of `prompt`: the options of `load` and of `Pipeline.__call__`, by name.

    Those of the call are checked before anything is loaded. Raises what the two raise.
    """
    from nativesd.loading.load import load
    from nativesd.pipeline.asked.arguments import check, split

    loading, asked = split(options)
    check(prompt, asked)
    return load(model, **loading)(prompt, **asked)


def stream(prompt: str | None = None, model: str | Path = "tiny", **options: Unpack[OpenOptions]) -> Stream:
    """Load `model` and open a stream over it: the options of `load` and of `Pipeline.stream`, by name.

    The embedded model comes with its LCM-LoRA where no LoRAs are named. Those of the stream are checked before anything
    is loaded. Raises what the two raise.
    """
    from nativesd.loading.load import load
    from nativesd.pipeline.asked.arguments import split
    from nativesd.streaming.options import check_stream

    loading, asked = split(options)
    check_stream({"prompt": prompt, **asked})
    if model == "tiny" and loading.get("loras") is None:
        loading["loras"] = ["tiny-lcm"]
    return load(model, **loading).stream(prompt, **asked)


def __getattr__(name: str) -> Any:
    if name == "batch":  # the room of `nativesd.batch.Painter`
        return import_module("nativesd.batch")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nativesd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
