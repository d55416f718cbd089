"""The same picture, with a LoRA and control, by PyTorch, ONNX Runtime, OpenVINO and, where a GPU is, TensorRT.

    python tools/demo_control_engine.py out.png [--model MODEL --control CONTROLNET --lora FILE[:SCALE]]
        [--image PICTURE] [--engines DIR]

The embedded model, its ControlNet and a LoRA drawn at random by default. Prints a table of times per step, differences
from PyTorch's picture, which are below the pictures too, and how often PyTorch ran something instead; exits with 1
where a picture is another one or PyTorch ran anything.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file

import nativesd
from nativesd.checkpoints.export import export_tensorrt
from nativesd.export.library import BackendName
from nativesd.export.tensorrt.product import backend_for, device_target
from nativesd.pipeline.asked.readers import lora_use
from nativesd.pipeline.pipeline import Pipeline
from nativesd.shipped import TINY

SUBJECT = "a strawberry on a blue background"  # its edges steer
PROMPT = "a strawberry on a yellow background"
TILE, LINE, GAP = 256, 18, 8
LARGEST = 1  # of 255, in float32
MEAN = 4.0  # of 255, where float16 rounds at other places: single pixels may differ, pictures do not


@dataclass(frozen=True)
class Made:
    """A backend's picture, and how long one step took."""

    name: str
    image: Image.Image
    seconds: float
    half: bool
    fallbacks: int = 0
    """How often PyTorch ran something instead"""

    def differences(self, reference: Made) -> tuple[int, float]:
        """The largest and the mean difference of any channel of any pixel, of 255."""
        pixels = np.asarray(self.image, np.int16) - np.asarray(reference.image, np.int16)
        return int(np.abs(pixels).max()), float(np.abs(pixels).mean())

    def same(self, reference: Made) -> bool:
        """Whether it is the reference's picture, up to rounding, with nothing run by PyTorch instead."""
        largest, mean = self.differences(reference)
        return self.fallbacks == 0 and (mean <= MEAN if self.half else largest <= LARGEST)

    def columns(self, reference: Made) -> list[str]:
        """For the table."""
        speed = f"{self.seconds * 1000:.1f} ms/step"
        largest, mean = self.differences(reference)
        against = f"off by {largest}, mean {mean:.2f}" if self is not reference else "reference"
        return [self.name, speed, f"{reference.seconds / self.seconds:.2f} x", against, f"{self.fallbacks} fallbacks"]


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def backends(device: torch.device) -> list[BackendName]:
    """Those that run here."""
    if device.type == "cpu":
        return [name for name, package in (("onnx", "onnxruntime"), ("openvino", "openvino")) if has(package)]  # type: ignore[misc]
    out: list[BackendName] = [backend_for(device_target(device))]
    if has("onnxruntime"):
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            out.insert(0, "onnx")
    return out


def random_lora(path: Path) -> Path:
    """A LoRA of the attentions in the embedded model's UNet and of its text encoder, at random, so that it shows."""
    generator, tensors = torch.Generator().manual_seed(7), {}
    for component, ends in (("unet", ("to_q.weight", "to_k.weight", "to_v.weight")), ("text_encoder", ("fc1.weight",))):
        [file] = (TINY / component).glob("*.safetensors")
        with safe_open(file, "pt") as published:
            for key in published.keys():  # noqa: SIM118 (it is no dictionary)
                if not key.endswith(ends):
                    continue
                out, width = published.get_slice(key).get_shape()
                name = f"{component}.{key.removesuffix('.weight')}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(4, width, generator=generator) * width**-0.5
                tensors[f"{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.1
    save_file(tensors, path)
    return path


def make(name: str, pipe: Pipeline, control: nativesd.Control, options: argparse.Namespace) -> Made:
    """A picture, after one of two steps has loaded what is loaded late."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(options.prompt, steps=2, seed=options.seed, control=[control])
        times = [time.monotonic()]
        image = pipe(
            options.prompt, steps=options.steps, seed=options.seed, control=[control],
            on_step=lambda _: times.append(time.monotonic()),
        ).images[0]  # fmt: skip
    fallbacks = sum("PyTorch runs it" in str(warning.message) for warning in caught)
    # the text encoders' time is before the first step, and the VAE's behind the last
    return Made(name, image, median(b - a for a, b in pairwise(times[1:])), pipe.dtype != torch.float32, fallbacks)


def sheet(hint: Image.Image, made: list[Made], reference: Made) -> Image.Image:
    """The hint and the pictures in a row, each above what is said of it."""
    font = ImageFont.load_default(LINE - 5)
    out = Image.new("RGB", ((1 + len(made)) * (TILE + GAP) - GAP, TILE + 5 * LINE), "white")
    tiles = [(hint, ["the hint"]), *((each.image, each.columns(reference)) for each in made)]
    for i, (picture, lines) in enumerate(tiles):
        scale = TILE / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        x = i * (TILE + GAP)
        out.paste(picture.convert("RGB").resize(size, Image.Resampling.NEAREST), (x, 0))
        ImageDraw.Draw(out).text((x + 4, TILE + 4), "\n".join(lines), "black", font, spacing=4)
    return out


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="One controlled picture by every backend that runs here.")
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--control", default="tiny", help="a ControlNet that takes canny edges")
    parser.add_argument("--lora", help="FILE or FILE:SCALE [default with the embedded model: one drawn at random]")
    parser.add_argument("--image", type=Path, help="whose edges steer [default: one that the model makes]")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--engines", type=Path, help="folder of graphs and engines [default: a temporary one]")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps must be at least 3: times are those between steps")

    with TemporaryDirectory() as temporary:
        loras: list[Any] = [lora_use(options.lora)] if options.lora else []
        if not loras and options.model == "tiny":
            loras = [random_lora(Path(temporary) / "random.safetensors")]
        torch_pipe = nativesd.load(options.model, loras=loras)
        device = torch_pipe.device
        picture = options.image or torch_pipe(SUBJECT, seed=1, loras=[]).images[0]
        control = nativesd.Control(options.control, nativesd.canny(picture))
        name = f"torch, {device.type}, {str(torch_pipe.dtype).removeprefix('torch.')}"
        reference = make(name, torch_pipe, control, options)
        made = [reference]
        without = torch_pipe(options.prompt, steps=options.steps, seed=options.seed, control=[control], loras=[])
        engines = options.engines or Path(temporary) / "engines"
        for backend in backends(device):
            if backend in ("tensorrt", "tensorrt-rtx"):
                export_tensorrt(
                    options.model, engines, backend=backend, control=[options.control], loras=loras,
                    dtype=torch_pipe.dtype,
                )  # type: ignore[arg-type]  # fmt: skip
            fast = nativesd.load(options.model, loras=loras, backend=backend, engines=engines)
            made.append(make(backend, fast, control, options))
            fast.close()
    sheet(control.image, made, reference).save(options.out)  # type: ignore[arg-type]
    print("| backend | time | speed | largest and mean difference, of 255 | run by PyTorch instead |")
    print("|---|---|---|---|---|")
    for each in made:
        print(f"| {' | '.join(each.columns(reference))} |")
    if loras:
        print(
            "PyTorch's without the LoRA: off by {}, mean {:.2f}".format(
                *Made("", without.images[0], 1.0, False).differences(reference)
            )
        )
    others = [each.name for each in made if not each.same(reference)]
    if others:
        print(f"{', '.join(others)}: another picture than PyTorch's")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
