"""Compare our modules with diffusers and transformers at the published sizes: float32, CPU, every parameter random.

    python tools/parity.py [--only NAME]
    python tools/parity.py --onnx [float32|float16] [--only NAME] [--no-run]

Prints a markdown table and exits with 1 where max|difference| / max|reference| exceeds 1e-5. Needs up to 20 GB of
memory for the SDXL and refiner UNets: the two implementations share their tensors, and one family is held at a time.

With --onnx: every component is exported to a temporary folder, UNets with all control slots, and ONNX Runtime compared
with PyTorch, in a process of its own. The table has the largest error (`nativesd.export.check`, whose tolerances decide
about the exit code), and the export's seconds and the process's peak memory until then. The run needs as much again as
the export, and more in float16; --no-run leaves it out.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from nativesd.config import (
    CONTROLNETS,
    TEXT_ENCODERS,
    UNETS,
    VAES,
    VISION_ENCODERS,
    Config,
    ControlNetConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    VisionEncoderConfig,
)
from nativesd.export.check import SIZES, TOLERANCES, compare
from nativesd.export.graphs import FILE, graph_of
from nativesd.export.onnx import export_onnx
from nativesd.export.sessions import OnnxRunner
from nativesd.export.slots import Component, Request
from nativesd.models.build import build
from nativesd.models.controlnet import ControlNet

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles import (
    TOLERANCE,
    difference,
    draw,
    lend,
    published_controlnet,
    random_residuals,
    run_controlnet,
    run_published_controlnet,
    run_published_decode,
    run_published_encode,
    run_published_image_encoder,
    run_published_text_encoder,
    run_published_unet,
    run_unet,
    text_pair,
    unet_inputs,
    unet_pair,
    vae_pair,
    vision_pair,
    worst,
)

Row = tuple[str, str, float]
"""case, tensors (ours filled / published), difference"""


def tensors(ours: nn.Module, reference: nn.Module) -> str:
    """How many tensors the weight map filled in our module, of how many published ones."""
    return f"{len(ours.state_dict())} / {len(reference.state_dict())}"


def normal(*shape: int) -> Tensor:
    """Standard normal values, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def check_vae(config: VAEConfig) -> Iterator[Row]:
    """Encode to mean and log-variance, and decode."""
    ours, reference = vae_pair(config)
    count = tensors(ours, reference)
    for height, width in ((256, 256), (264, 200)):
        images = normal(1, config.image_channels, height, width).clamp(-1, 1)
        for part, found, expected in zip(
            ("mean", "log-variance"), ours.encode(images), run_published_encode(reference, images), strict=True
        ):
            yield f"encode {height}x{width} px, {part}", count, difference(found, expected)
        latents = normal(1, config.latent_channels, height // config.factor, width // config.factor)
        error = difference(ours.decode(latents), run_published_decode(reference, latents))
        yield f"decode to {height}x{width} px", count, error


def check_text_encoder(config: TextEncoderConfig) -> Iterator[Row]:
    """Two prompts of different length, padded with the end-of-text token."""
    ours, reference = text_pair(config)
    tokens = torch.full((2, config.length), config.vocabulary - 1)
    for row, length in zip(tokens, (7, 60), strict=True):
        row[:length] = torch.randint(config.vocabulary - 2, (length,), generator=torch.Generator().manual_seed(length))
    found, expected = ours(tokens), run_published_text_encoder(reference, config, tokens)
    layer = {-1: "last layer", -2: "penultimate layer"}[config.hidden]
    norm = "normed" if config.hidden_norm else "raw"
    yield f"hidden ({layer}, {norm})", tensors(ours, reference), difference(found.hidden, expected.hidden)
    pooled = "pooled" if config.projection is None else "pooled, projected"
    yield pooled, tensors(ours, reference), difference(found.pooled, expected.pooled)


def check_image_encoder(config: VisionEncoderConfig) -> Iterator[Row]:
    """The embedding, and the last states but one, of two pictures."""
    ours, reference = vision_pair(config)
    pixels = normal(2, config.image_channels, config.image, config.image)
    found, (embedding, states) = ours(pixels), run_published_image_encoder(reference, pixels)
    yield "embedding", tensors(ours, reference), difference(found.embedding, embedding)
    yield "states", tensors(ours, reference), difference(found.hidden, states)


def check_unet(config: UNetConfig) -> Iterator[Row]:
    """With and without control residuals, at an even and an odd size."""
    ours, reference = unet_pair(config)
    for batch, height, width, timestep in ((2, 32, 32, torch.tensor([999.0, 261.0])), (1, 33, 27, 500.5)):
        inputs = unet_inputs(config, batch, height, width, timestep=timestep)
        for label, residuals in (("", None), (", control residuals", random_residuals(config, inputs))):
            error = difference(run_unet(ours, inputs, residuals), run_published_unet(reference, inputs, residuals))
            yield f"{batch}x{config.in_channels}x{height}x{width}{label}", tensors(ours, reference), error


def check_controlnet(config: ControlNetConfig) -> Iterator[Row]:
    """All residuals, at an even and an odd size."""
    with torch.device("meta"):
        ours = ControlNet(config)
    reference = published_controlnet(config)
    lend(ours, reference, "controlnet.diffusers")
    for batch, height, width in ((2, 32, 32), (1, 33, 27)):
        inputs = unet_inputs(config.unet, batch, height, width, timestep=500.5)
        hint = normal(batch, config.hint_channels, 8 * height, 8 * width).sigmoid()
        error = worst(run_controlnet(ours, inputs, hint), run_published_controlnet(reference, inputs, hint))
        yield f"residuals, {batch}x4x{height}x{width}", tensors(ours, reference), error


CHECKS: dict[str, Callable[[], Iterator[Row]]] = {
    **{f"vae {name}": partial(check_vae, config) for name, config in VAES.items()},
    **{f"text encoder {name}": partial(check_text_encoder, config) for name, config in TEXT_ENCODERS.items()},
    **{f"image encoder {name}": partial(check_image_encoder, config) for name, config in VISION_ENCODERS.items()},
    **{f"unet {name}": partial(check_unet, config) for name, config in UNETS.items()},
    **{
        f"controlnet {name}": partial(check_controlnet, config)
        for name, config in CONTROLNETS.items()
        if config.union is None
    },
}


EXPORTS: dict[str, tuple[Component, Config]] = {
    **{f"vae_decoder {name}": ("vae_decoder", config) for name, config in VAES.items() if name == "sd"},
    **{f"vae_encoder {name}": ("vae_encoder", config) for name, config in VAES.items() if name == "sd"},
    **{f"text encoder {name}": ("text_encoder", config) for name, config in TEXT_ENCODERS.items()},
    **{f"unet {name}": ("unet", config) for name, config in UNETS.items()},
    **{f"controlnet {name}": ("controlnet", config) for name, config in CONTROLNETS.items() if config.union is None},
}
"""SDXL's VAE has the form of SD's."""


def peak_memory() -> int:
    """The most bytes that this process has held in memory (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def check_export(name: str, dtype: torch.dtype, *, run: bool) -> bool:
    """Export a component, compare it and print its row; whether it is within the tolerance."""
    component, config = EXPORTS[name]
    with torch.device("meta"):
        module = build(config).to(dtype)
    draw(module, 0)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    graph = graph_of(module, component)
    with TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        start, cpu = time.monotonic(), time.process_time()
        export_onnx(graph, file)
        seconds = f"{time.monotonic() - start:.0f} s ({time.process_time() - cpu:.0f} s of CPU)"
        peak = peak_memory()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        error = None
        if run:
            runner = OnnxRunner(file, graph.schema, dtype, torch.device("cpu"))
            requests = SIZES if dtype == torch.float16 else [*SIZES, Request(1, 64, 64)]  # which is slow on a CPU
            error = max(each.error for each in compare(graph, runner, requests))
    columns = [
        name, str(dtype).removeprefix("torch."), f"{weights / 1e9:.2f} GB", seconds,
        f"{peak / 1e9:.2f} GB, {peak / weights:.2f} x", f"{(peak - weights) / 1e9:.2f} GB", f"{size / 1e9:.2f} GB",
        "not run" if error is None else f"{error:.1e}",
    ]  # fmt: skip
    print(f"| {' | '.join(columns)} |", flush=True)
    return error is None or error <= TOLERANCES[dtype]


def main_onnx(dtype: str, only: str | None, *, run: bool) -> int:
    """All exports, each by a process of its own, or the one here."""
    if only is not None:
        return 0 if check_export(only, getattr(torch, dtype), run=run) else 1
    print("| component | dtype | weights | export | peak memory | beyond the weights | files | error |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    command = [sys.executable, __file__, "--onnx", dtype, *([] if run else ["--no-run"])]
    codes = [subprocess.run([*command, "--only", name], check=False).returncode for name in EXPORTS]
    return 1 if any(codes) else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Numerical parity with diffusers and transformers at published sizes.")
    parser.add_argument("--only", metavar="NAME", choices={**CHECKS, **EXPORTS}, help="one component")
    parser.add_argument("--onnx", nargs="?", const="float32", choices=["float32", "float16"], help="exported graphs")
    parser.add_argument("--no-run", action="store_true", help="with --onnx: export only")
    options = parser.parse_args()
    only = options.only
    names = CHECKS if options.onnx is None else EXPORTS
    if only is not None and only not in names:
        parser.error(f"--only is one of: {', '.join(names)}")
    if options.onnx is not None:
        return main_onnx(options.onnx, only, run=not options.no_run)
    largest = 0.0
    print("| component | case | tensors (ours filled / published) | max\\|diff\\| / max\\|ref\\| |")
    print("|---|---|---|---|", flush=True)
    for name, check in CHECKS.items():
        if only in (None, name):
            with torch.inference_mode():
                for case, count, error in check():
                    print(f"| {name} | {case} | {count} | {error:.1e} |", flush=True)
                    largest = max(largest, error)
            gc.collect()
    return 1 if largest > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())
