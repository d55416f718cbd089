"""Float8 weights with a scale beside them, as ComfyUI keeps them: which tensors of a file belong together.

A weight is X.weight times X.scale_weight, a float32 number, or one for every row. The older form marks a file, or a
part of it, by a tensor `scaled_fp8`, whose dtype is that of the weights, and which has two numbers where products are
to be in full precision; X.scale_input is for products in float8. The newer one calls the scales X.weight_scale and
X.input_scale, and says in X.comfy_quant what it is (github.com/comfyanonymous/ComfyUI, comfy/utils.py,
`convert_old_quants`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nativesd.weights.formats.header import TensorInfo

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALED = tuple(f"{dtype} scaled" for dtype in FLOAT8)
"""What the dtype of a weight is called here that is to be multiplied with its scale."""
UNSCALED = tuple(f"{dtype} without scale" for dtype in FLOAT8)
"""And of one whose scale is not there, though the file's mark says that it should be."""
MARK, WEIGHT, SCALE = "scaled_fp8", ".weight", ".scale_weight"
SCALES = (SCALE, ".weight_scale")
BESIDE = {
    ".scale_input": "the scale of a layer's inputs, for products in float8",
    ".input_scale": "the scale of a layer's inputs, for products in float8",
    ".comfy_quant": "says that a layer is in scaled float8, as its dtype and its scale do",
}


@dataclass
class Folded:
    """The tensors of a checkpoint without what belongs to others, which is in `scales` (by its name) or left out."""

    tensors: dict[str, TensorInfo]
    scales: dict[str, TensorInfo] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def fold(tensors: Mapping[str, TensorInfo]) -> Folded:
    """Put the scales to their weights. What does not belong to a float8 weight stays as it is."""
    out = Folded(dict(tensors))
    weights = {key: info for key, info in tensors.items() if info.dtype in FLOAT8 and key.endswith(WEIGHT)}
    marked = [key.removesuffix(MARK) for key in tensors if key == MARK or key.endswith(f".{MARK}")]
    for key, info in weights.items():
        layer = key.removesuffix(WEIGHT)
        scale = next((layer + end for end in SCALES if _fits(tensors.get(layer + end), info)), None)
        if scale is not None:
            out.tensors[key] = replace(info, dtype=SCALED[FLOAT8.index(info.dtype)], scale=scale)
            out.scales[scale] = out.tensors.pop(scale)
            for end, reason in BESIDE.items():
                if out.tensors.pop(layer + end, None) is not None:
                    out.left_out[layer + end] = reason
        elif len(info.shape) == 2 and any(map(key.startswith, marked)):
            out.tensors[key] = replace(info, dtype=UNSCALED[FLOAT8.index(info.dtype)])
    for prefix in marked:
        if any(key.startswith(prefix) for key in weights):
            del out.tensors[prefix + MARK]
            out.left_out[prefix + MARK] = "the mark of scaled float8: weights in it have their scales beside them"
    return out


def _fits(scale: TensorInfo | None, weight: TensorInfo) -> bool:
    """Whether a tensor is one number, or one for every row of a weight."""
    if scale is None or scale.dtype not in ("F32", "F16", "BF16"):
        return False
    rows = weight.shape[:1]
    return scale.elements == 1 or (scale.shape[:1] == rows and scale.elements == rows[0])
