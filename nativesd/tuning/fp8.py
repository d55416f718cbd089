"""Linear layers in float8: half the memory of half precision, and products by the GPU's fastest tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nativesd.models.layers import TransformerBlock

KIND = torch.float8_e4m3fn
LARGEST = torch.finfo(KIND).max  # 448


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K) in float8_e4m3fn, each scaled to fill its range, and the scales (M, 1) float32 that undo it."""
    scales = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scales).to(KIND).contiguous(), scales


class Fp8Linear(nn.Module):
    """A linear layer of which weights and inputs are rounded to float8, row by row, and the sums are float32.

    Rows are scaled by themselves, so that a picture does not depend on what else is in its batch.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scales = to_fp8(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)  # (O, I)
        self.register_buffer("scales", scales)  # (O, 1)
        self.scales: Tensor
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), for I and O that are multiples of 16."""
        rows, scales = to_fp8(x.flatten(0, -2))
        # where rows have scales, CUDA's products are in bfloat16 only
        out: Tensor = torch._scaled_mm(
            rows, self.weight.T, scale_a=scales, scale_b=self.scales.T, out_dtype=torch.bfloat16
        )  # fmt: skip
        out = out.reshape(*x.shape[:-1], -1).to(x.dtype)  # (M, O) -> (..., O)
        return out if self.bias is None else out + self.bias


def use_fp8(module: nn.Module) -> None:
    """Change the linear layers of all transformer blocks within a module, in place. Nothing else is that large.

    Where a side is no multiple of 16, which no published model has, a layer stays as it is.
    """
    for block in module.modules():
        if isinstance(block, TransformerBlock):
            for part in list(block.modules()):
                for name, child in part.named_children():
                    if type(child) is nn.Linear and not (child.in_features % 16 or child.out_features % 16):
                        setattr(part, name, Fp8Linear(child))


def why_not_fp8(device: torch.device) -> str | None:
    """Why a device does not multiply in float8, as GPUs before Ada (8.9) and torch on Windows do not; None: it does."""
    try:
        values, scales = to_fp8(torch.ones(16, 16, device=device))
        torch._scaled_mm(values, values.T, scale_a=scales, scale_b=scales.T, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return None


def is_fp8(module: nn.Module) -> bool:
    """Whether `use_fp8` has changed it."""
    return any(isinstance(part, Fp8Linear) for part in module.modules())
