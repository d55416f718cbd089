"""Linear layers and convolutions that keep their weights in 8 bits: half the memory of half precision, on any device.

A weight is rounded to steps of its own for every output channel, 127 of them to the largest. Here it is made a number
again whenever it is used; where a CPU multiplies 8 bits faster, `fast_int8` has the same layers by such products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nativesd.errors import WeightsError
from nativesd.models.layers import GEGLU, Attention, ResnetBlock, Upsample

STEPS = 127
FEWEST = 1 << 14
"""Numbers of a weight below which it stays as it is: nothing is saved, and those that see the latents are so small."""
ENDS = ("conv_in", "conv_out")
"""The layers that see the latents themselves, which stay."""


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (O, ...) in 8 bits, each output channel in steps of its own, and the steps (O,) in float32.

    The largest magnitude of a channel is 127 steps; a half is rounded to the even number.
    """
    rows = weight.flatten(1).float()
    steps = (rows.abs().amax(dim=1) / STEPS).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / steps[:, None]).round_().to(torch.int8).reshape(weight.shape), steps


class Int8(nn.Module):
    """A layer whose `weight` is in 8 bits, with the steps of its output channels in `steps`."""

    weight: Tensor
    steps: Tensor

    def store(self, weight: Tensor) -> None:
        """Round a weight (O, ...) of any floating-point dtype, and keep it where the layer is, if it is anywhere."""
        with torch.inference_mode(mode=False), torch.no_grad():  # of what is made in it, nothing is written to later
            rounded, steps = to_int8(weight.detach())
            own = self.weight
            device = weight.device if own.is_meta else own.device
            self.weight = nn.Parameter(rounded.to(device), requires_grad=False)
            self.steps = steps.to(device)

    def numbers(self) -> Tensor:
        """The weight (O, ...) that is computed with, in float32."""
        return self.weight * self.steps.reshape(-1, *[1] * (self.weight.ndim - 1))


class Int8Linear(Int8, nn.Linear):
    """A linear layer in 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(input, self.numbers().to(input.dtype), self.bias)


class Int8Conv2d(Int8, nn.Conv2d):
    """A convolution in 8 bits."""

    after_silu = False
    """Whether its input is a SiLU's, which is nowhere below -0.28"""

    def forward(self, input: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        out: Tensor = self._conv_forward(input, self.numbers().to(input.dtype), self.bias)
        return out


class Int8Upsample(Upsample, Int8Conv2d):
    """An upsampling convolution in 8 bits."""


class Int8Attention(Attention):
    """An attention whose projections are in 8 bits."""


class Int8GEGLU(GEGLU):
    """A GEGLU whose projections are in 8 bits."""


LAYERS: dict[type[nn.Module], type[Int8]] = {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d, Upsample: Int8Upsample}
AROUND: dict[type[nn.Module], type[nn.Module]] = {Attention: Int8Attention, GEGLU: Int8GEGLU}


def use_int8(module: nn.Module) -> None:
    """Change the linear layers and convolutions within a UNet or ControlNet, in place, filled already or not.

    Small ones stay as they are, and so do those that see the latents. From then on `load_state_dict` takes those layers
    as they are stored alone, and raises WeightsError for other weights before anything is changed.
    """
    for parent in list(module.modules()):
        for name, part in parent.named_children():
            if type(part) in LAYERS and name not in ENDS and part.get_parameter("weight").numel() >= FEWEST:
                _change(part)
                if isinstance(parent, ResnetBlock) and isinstance(part, Int8Conv2d):
                    part.after_silu = name in ("conv1", "conv2")
        if type(parent) in AROUND and all(isinstance(part, Int8) for part in parent.children()):
            parent.__class__ = AROUND[type(parent)]
    for part in module.modules():
        part.register_load_state_dict_pre_hook(_require_stored)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _require_stored(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Raise WeightsError where a state dict's weights of layers in 8 bits are not in 8 bits with their steps."""
    for name, part in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(part, Int8):
            weight, steps = (f"{name}.{end}".removeprefix(".") for end in ("weight", "steps"))
            there = {key for key in (weight, steps) if key in state}
            if there and (len(there) < 2 or state[weight].dtype != torch.int8):
                raise WeightsError(
                    f"{weight} is kept in 8 bits with its steps ({steps}), and the state dict has it otherwise: "
                    "nothing is loaded; load the model without quantize, or a state dict of one in 8 bits"
                )


def _change(part: nn.Module) -> None:
    weight = part.get_parameter("weight")
    part.__class__ = LAYERS[type(part)]
    assert isinstance(part, Int8)
    part.register_buffer("steps", torch.empty(len(weight), device="meta"))
    part.weight = nn.Parameter(torch.empty_like(weight, dtype=torch.int8, device="meta"), requires_grad=False)
    if not weight.is_meta:
        part.store(weight)


def is_int8(module: nn.Module) -> bool:
    """Whether `use_int8` has changed it."""
    return any(isinstance(part, Int8) for part in module.modules())
