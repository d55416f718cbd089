"""What the smoke test checks: components, the calls that are made of them, and weights that are drawn for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nativesd.config import Config, ControlNetConfig, TextEncoderConfig, UNetConfig, VAEConfig
from nativesd.machine.needs import Family
from nativesd.models.vae import VAE

Size = Literal["small", "published"]


@dataclass(frozen=True)
class Case:
    """A call of a component: its name, and the call with inputs cast and moved. It gives tensors."""

    name: str
    inputs: Mapping[str, Any]
    call: Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Subject:
    """A component to check: its name, the families that have it, and the (batch, height, width) of the latents."""

    name: str
    families: tuple[str, ...]
    config: Config
    sizes: tuple[tuple[int, int, int], ...]


def subjects(families: Mapping[str, Family], size: Size) -> list[Subject]:
    """The components of the families; what several have in common comes once."""
    wanted: dict[tuple[str, Config, tuple[tuple[int, int, int], ...]], list[str]] = {}
    for name, family in families.items():
        cells = family.side // family.vae.factor
        sizes = ((2, 32, 32), (1, 33, 27)) if size == "small" else ((2, cells, cells),)
        one = tuple((1, height, width) for _, height, width in sizes)
        wanted.setdefault(("VAE", family.vae, one), []).append(name)
        for encoder in family.text_encoders:
            wanted.setdefault(("text encoder", encoder, ()), []).append(name)
        wanted.setdefault(("UNet", family.unet, sizes), []).append(name)
        wanted.setdefault(("ControlNet", family.controlnet, sizes), []).append(name)
    return [Subject(label, tuple(names), config, sizes) for (label, config, sizes), names in wanted.items()]


def cases(config: Config, sizes: Sequence[tuple[int, int, int]]) -> Iterator[Case]:
    """The calls of a component for latents of `sizes`, each (batch, height, width)."""
    generator = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, generator=generator)
    match config:
        case TextEncoderConfig():
            yield Case(f"2x{config.length} tokens", {"tokens": _tokens(config, generator)}, _call)
        case VAEConfig():
            for batch, height, width in sizes:
                pixels = (batch, config.image_channels, config.factor * height, config.factor * width)
                shape = f"{pixels[3]}x{pixels[2]} px"
                yield Case(f"encode {shape}", {"images": normal(pixels).clamp(-1, 1)}, _encode)
                latents = normal((batch, config.latent_channels, height, width))
                yield Case(f"decode {shape}", {"latents": latents}, _decode)
        case UNetConfig():
            for batch, height, width in sizes:
                inputs = _unet_inputs(config, batch, height, width, generator)
                residuals = [normal(shape) for shape in config.residual_shapes(batch, height, width)]
                yield Case(f"{batch}x{height}x{width} cells", inputs, _call)
                yield Case(f"{batch}x{height}x{width} cells, residuals", {**inputs, "residuals": residuals}, _call)
        case ControlNetConfig():
            factor = 1 << (len(config.hint_widths) - 1)
            for batch, height, width in sizes:
                inputs = _unet_inputs(config.unet, batch, height, width, generator)
                hint = torch.rand((batch, config.hint_channels, factor * height, factor * width), generator=generator)
                yield Case(f"{batch}x{height}x{width} cells", {**inputs, "hint": hint}, _call)


def _unet_inputs(config: UNetConfig, batch: int, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
    """Normal latents, context and pooled embedding; a timestep per picture, and the ids of a square picture."""
    inputs: dict[str, Any] = {
        "latents": torch.randn((batch, config.in_channels, height, width), generator=generator),
        "timestep": torch.linspace(999, 261, batch),
        "context": torch.randn((batch, 77, config.context), generator=generator),
    }
    if config.added is not None:
        inputs["pooled"] = torch.randn((batch, config.added.pooled), generator=generator)
        inputs["time_ids"] = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024][: config.added.ids]).expand(batch, -1)
    return inputs


FLOAT32_INPUTS = ("timestep", "time_ids")  # as the pipeline passes them, whatever the dtype


def _tokens(config: TextEncoderConfig, generator: torch.Generator) -> Tensor:
    """Ids (2, length) of a short and a long prompt, padded with the end-of-text token."""
    tokens = torch.full((2, config.length), config.vocabulary - 1)
    for row, length in zip(tokens, (7, config.length - 17), strict=True):
        row[:length] = torch.randint(config.vocabulary - 2, (length,), generator=generator)
    return tokens


def _call(module: nn.Module, **inputs: Any) -> Sequence[Tensor]:
    out: Tensor | Sequence[Tensor] = module(**inputs)
    return [out] if isinstance(out, Tensor) else out


def _encode(module: VAE, images: Tensor) -> Sequence[Tensor]:
    return module.encode(images)


def _decode(module: VAE, latents: Tensor) -> Sequence[Tensor]:
    return [module.decode(latents)]


# Of the weights in blocks around which their input passes, times 1 / sqrt(fan-in). With 1 deep transformers double what
# TF32 rounds off (SDXL at a fifth of its width: 2.3e-3 against 1e-3). The VAE's rounding grows with less than 1.
RESIDUAL_GAIN = 0.7


def draw(module: nn.Module, seed: int, gain: float) -> None:
    """Move a module from meta to the CPU and draw every parameter, at scales that keep activations of order one.

    Weights have a standard deviation of gain / sqrt(fan-in). No parameter has a telling value: norms are not the
    identity, and no convolution is zero.
    """
    module.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                match part:
                    case nn.GroupNorm() | nn.LayerNorm():
                        parameter.normal_(1.0 if name == "weight" else 0.0, 0.2, generator=generator)
                    case nn.Embedding():
                        parameter.normal_(generator=generator)
                    case _:
                        fan_in = parameter[0].numel()
                        parameter.normal_(0.0, 0.1 if name == "bias" else gain * fan_in**-0.5, generator=generator)
