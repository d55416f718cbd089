"""Float8 weights with a scale beside them, as ComfyUI keeps them: which tensors of a file belong together.

A weight is X.weight times X.scale_weight, a float32 number, or one for every row. The older form marks a file, or a
part of it, by a tensor `scaled_fp8`, whose dtype is that of the weights, and which has two numbers where products are
to be in full precision; X.scale_input is for products in float8. The newer one calls the scales X.weight_scale and
X.input_scale, and says in X.comfy_quant what it is (github.com/comfyanonymous/ComfyUI, comfy/utils.py,
`convert_old_quants`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nativesd.errors import SourceError
from nativesd.reading import parse_json
from nativesd.weights.formats.header import TensorInfo

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALED = tuple(f"{dtype} scaled" for dtype in FLOAT8)
"""What the dtype of a weight is called here that is to be multiplied with its scale."""
FORMATS = dict(zip(FLOAT8, ("float8_e4m3fn", "float8_e5m2"), strict=True))
"""What comfy_quant calls them (ComfyUI, comfy/quant_ops.py, QUANT_ALGOS)."""
AGAIN = "get the file again, or take its float16 version"
NO_SCALE, TWO_SCALES, BAD_SCALE = "without scale", "with two scales", "with a faulty scale"
OTHER_FORMAT, NOT_SCALED = "of another format", "with a scale"
FAULTS = {
    NO_SCALE: f"in float8 without a scale that fits it, which this file has for such weights: {AGAIN}",
    TWO_SCALES: f"in float8 with two scales, scale_weight and weight_scale: {AGAIN}",
    BAD_SCALE: f"in float8 with a scale that is not finite, below 0, or 0 of other numbers than 0: {AGAIN}",
    OTHER_FORMAT: f"in float8, though its comfy_quant says another format: {AGAIN}",
    NOT_SCALED: f"no float8, though it has a scale for such beside it: {AGAIN}",
}
"""What stands behind the dtype of a weight that cannot be read as its scales are, and why."""
MARK, WEIGHT, SCALE = "scaled_fp8", ".weight", ".scale_weight"
SCALES = (SCALE, ".weight_scale")
STATED = ".comfy_quant"
BESIDE = {
    ".scale_input": "the scale of a layer's inputs, for products in float8",
    ".input_scale": "the scale of a layer's inputs, for products in float8",
    STATED: "says that a layer is in scaled float8, as its dtype and its scale do",
}


@dataclass
class Folded:
    """The tensors of a checkpoint without what belongs to others, which is in `scales` (by its name) or left out."""

    tensors: dict[str, TensorInfo]
    scales: dict[str, TensorInfo] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def fold(tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes] | None = None) -> Folded:
    """Put the scales to their weights. A weight whose scale is not as it should be gets one of `FAULTS` to its dtype;
    what does not belong to a float8 weight stays as it is.

    read  gives a tensor's bytes, by which values are looked at too
    """
    out = Folded(dict(tensors))
    weights = {key: info for key, info in tensors.items() if info.dtype in FLOAT8 and key.endswith(WEIGHT)}
    marked = [key.removesuffix(MARK) for key in tensors if key == MARK or key.endswith(f".{MARK}")]
    alone: list[str] = []
    for key, info in weights.items():
        layer = key.removesuffix(WEIGHT)
        there = [layer + end for end in SCALES if layer + end in tensors]
        fitting = [scale for scale in there if _fits(tensors[scale], info)]
        if not fitting:
            alone.append(key)
            continue
        fault = TWO_SCALES if len(there) > 1 else "" if read is None else _fault(tensors, layer, fitting[0], read)
        dtype = f"{info.dtype} {fault}" if fault else SCALED[FLOAT8.index(info.dtype)]
        out.tensors[key] = replace(info, dtype=dtype, scale="" if fault else fitting[0])
        out.scales[fitting[0]] = out.tensors.pop(fitting[0])
        for scale in there:
            if out.tensors.pop(scale, None) is not None:
                out.left_out[scale] = "another scale of a weight that has one"
        _leave_out(out, layer)
    having = {scale.partition(".")[0] for scale in out.scales}
    for key in alone:
        layer, info = key.removesuffix(WEIGHT), weights[key]
        if any(tensors[layer + end].dtype not in NUMBERS for end in SCALES if layer + end in tensors):
            continue  # of blocks, which a signature knows
        stated = any(layer + end in tensors for end in BESIDE)
        newer = out.tensors.pop(layer + SCALES[1], None) is not None
        if newer:
            out.left_out[layer + SCALES[1]] = "a scale that does not fit its weight"
        matrix = len(info.shape) == 2 and (any(map(key.startswith, marked)) or key.partition(".")[0] in having)
        if stated or newer or matrix:
            out.tensors[key] = replace(info, dtype=f"{info.dtype} {NO_SCALE}")
            _leave_out(out, layer)
    for key in [key for key in out.tensors if key.endswith(SCALES[1])]:
        weight = key.removesuffix(SCALES[1]) + WEIGHT
        own = tensors.get(weight)
        if own is not None and own.dtype in PLAIN:
            out.tensors[weight] = replace(own, dtype=f"{own.dtype} {NOT_SCALED}")
            out.left_out[key] = "a scale of a weight that is no float8"
            del out.tensors[key]
            _leave_out(out, key.removesuffix(SCALES[1]))
    for prefix in marked:
        if any(key.startswith(prefix) for key in weights):
            del out.tensors[prefix + MARK]
            out.left_out[prefix + MARK] = "the mark of scaled float8: weights in it have their scales beside them"
    return out


NUMBERS = {"F32": "f", "F16": "e", "BF16": ""}
"""The dtypes that scales have, as `struct` calls them."""
PLAIN = (*NUMBERS, "F64")
ZEROS = b"\x00\x80"
"""The bytes that are 0 and -0 in float8, of either kind."""
MAX_ZEROS = 1 << 28
"""Bytes of a weight that are looked through for other numbers than 0; the largest matrix of SDXL has 2^24."""
MAX_STATED = 1000
"""Bytes of a comfy_quant; ComfyUI's have less than 100."""


def _leave_out(out: Folded, layer: str) -> None:
    """Leave out what says of a layer that it is in scaled float8."""
    for end, reason in BESIDE.items():
        if out.tensors.pop(layer + end, None) is not None:
            out.left_out[layer + end] = reason


def _fault(tensors: Mapping[str, TensorInfo], layer: str, scale: str, read: Callable[[str], bytes]) -> str:
    """The fault of a layer by the values of its scale and of what says its format; "" where there is none."""
    if (stated := tensors.get(layer + STATED)) is not None:
        known = stated.nbytes <= MAX_STATED and _format(read(layer + STATED))
        if known != FORMATS[tensors[layer + WEIGHT].dtype]:
            return OTHER_FORMAT
    raw, kind = read(scale), NUMBERS[tensors[scale].dtype]
    if not kind:  # bfloat16 is the upper half of float32
        raw, kind = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2)), "f"
    numbers = struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw)
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        return BAD_SCALE
    zeros = [row for row, number in enumerate(numbers) if number == 0]
    return BAD_SCALE if zeros and not _zero(read, layer, tensors[layer + WEIGHT], len(numbers), zeros) else ""


def _zero(read: Callable[[str], bytes], layer: str, weight: TensorInfo, scales: int, rows: Sequence[int]) -> bool:
    """Whether a weight has nothing but zeros where its scale is 0, as quantisers write it of a layer of zeros.

    scales  how many the weight has: of all of it, or of every row
    """
    if weight.nbytes > MAX_ZEROS:
        return False
    raw, size = read(layer + WEIGHT), weight.nbytes // scales
    return not any(raw[row * size : (row + 1) * size].strip(ZEROS) for row in rows)


def _format(raw: bytes) -> object:
    """What the JSON of a comfy_quant says; None where it says none."""
    try:
        return parse_json(raw, STATED).get("format")
    except SourceError:
        return None


def _fits(scale: TensorInfo, weight: TensorInfo) -> bool:
    """Whether a tensor is one number, or one for every row of a weight."""
    if scale.dtype not in NUMBERS:
        return False
    rows = weight.shape[:1]
    return scale.elements == 1 or (scale.shape[:1] == rows and scale.elements == rows[0])
