"""Compare our modules with diffusers and transformers at the published sizes: float32, CPU, every parameter random.

    python tools/parity.py [--only NAME]

Prints a markdown table and exits with 1 where max|difference| / max|reference| exceeds 1e-5. Needs up to 20 GB of
memory for the SDXL and refiner UNets: the two implementations share their tensors, and one family is held at a time.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nativesd.config import (
    CONTROLNETS,
    TEXT_ENCODERS,
    UNETS,
    VAES,
    ControlNetConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from nativesd.models.controlnet import ControlNet

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles import (
    TOLERANCE,
    difference,
    lend,
    published_controlnet,
    random_residuals,
    run_controlnet,
    run_published_controlnet,
    run_published_decode,
    run_published_encode,
    run_published_text_encoder,
    run_published_unet,
    run_unet,
    text_pair,
    unet_inputs,
    unet_pair,
    vae_pair,
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
    **{f"unet {name}": partial(check_unet, config) for name, config in UNETS.items()},
    **{
        f"controlnet {name}": partial(check_controlnet, config)
        for name, config in CONTROLNETS.items()
        if config.union is None
    },
}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Numerical parity with diffusers and transformers at published sizes.")
    parser.add_argument("--only", metavar="NAME", choices=CHECKS, help=f"one of: {', '.join(CHECKS)}")
    only = parser.parse_args().only
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
