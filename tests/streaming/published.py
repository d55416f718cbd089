"""The published stream as an oracle: `streamdiffusion` on a CPU, with what it asks of CUDA stubbed.

Install it with `pip install --no-deps streamdiffusion==0.1.1`: what it requires would replace diffusers and torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


class _Event:
    """A moment that nobody measures."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def published_module(name: str = "pipeline") -> Any:
    """A module of the package; skips the test where it is not installed."""
    if importlib.util.find_spec("streamdiffusion") is None:
        pytest.skip("streamdiffusion is not installed: pip install --no-deps streamdiffusion==0.1.1")
    return importlib.import_module(f"streamdiffusion.{name}")


@contextmanager
def as_here(generator: torch.Generator) -> Iterator[None]:
    """Meanwhile it runs on a CPU, takes the mean of what the VAE encodes, and its noise is its generator's."""
    module = published_module()
    retrieve, randn = module.retrieve_latents, torch.randn

    def mean(encoded: Any, _: torch.Generator) -> Tensor:
        out: Tensor = retrieve(encoded, sample_mode="argmax")
        return out

    def drawn(*shape: Any, **options: Any) -> Tensor:
        return randn(*shape, **{"generator": generator, **options})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(module, "retrieve_latents", mean)
        patch.setattr(torch, "randn", drawn)
        yield


class Published:
    """The published stream over a diffusers pipeline."""

    def __init__(self, pipe: Any, indices: list[int], mode: str, prompt: str, **options: Any) -> None:
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.renoise = options.pop("renoise", True)
        self.stream = published_module().StreamDiffusion(
            pipe, indices, torch_dtype=torch.float32, width=side, height=side, cfg_type=mode,
            do_add_noise=self.renoise,
        )  # fmt: skip
        self.generator = torch.Generator()
        with as_here(self.generator):
            self.stream.prepare(prompt, generator=self.generator, **options)

    def __call__(self, frame: Any = None) -> Tensor:
        """The picture (3, H, W) in [0, 1], unclamped before; what comes out while the slots fill means nothing."""
        with as_here(self.generator), torch.no_grad():
            if len(self.stream.t_list) == 1 and self.stream.cfg_type == "self":
                self.stream.stock_noise = self.stream.init_noise  # the published residual leaks from frame to frame
            out: Tensor = self.stream(frame)
            return (out[0] / 2 + 0.5).clamp(0, 1)

    def turbo(self) -> Tensor:
        """A picture of SD-Turbo from noise."""
        with as_here(self.generator), torch.no_grad():
            out: Tensor = self.stream.txt2img_sd_turbo()
            return (out[0] / 2 + 0.5).clamp(0, 1)
