"""The parts of a change that a LoRA makes: which there must be, and what they multiply to, by their shapes.

The product is a matrix of the module's outputs and its inputs times the kernel's places:

    LoRA   up @ down; with a core M (LoCon): sum over m, n of up[o, m] M[m, n, y, x] down[n, i]
    LoHa   (w1_a @ w1_b) * (w2_a @ w2_b); with cores T: sum over m, n of a[m, o] T[m, n, y, x] b[n, i] in either product
    LoKr   the Kronecker product of w1 and w2, either whole or as a product, w2 with or without a core

times alpha / rank (KohakuBlueleaf/LyCORIS, lycoris/functional and lycoris/modules; kohya-ss/sd-scripts,
networks/lora.py; peft's tuners). Without alpha the scale is 1, and it is 1 where LoKr has both factors whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nativesd.weights.maps.lora_names import PARTS
from nativesd.weights.maps.rules import Shape

BIAS = {"diff_b": "full difference", "b_norm": "norm difference"}
KINDS = {
    "down": "LoRA", "up": "LoRA", "mid": "LoRA", "diff": "full difference", "w_norm": "norm difference",
    **{part: "LoHa" for part in PARTS if part.startswith("hada_")},
    **{part: "LoKr" for part in PARTS if part.startswith("lokr_")},
}  # fmt: skip
DORA = ("dora_scale", "magnitude")


def product(parts: Mapping[str, Shape]) -> tuple[str, int, int, int | None]:
    """The kind of a change, and the rows, columns and rank of what its parts multiply to.

    Raises ValueError where a part is missing, too many, or does not fit the others.
    """
    kinds = {KINDS[part] for part in parts if part in KINDS}
    if len(kinds) != 1:
        raise ValueError(f"it has parts of {' and of '.join(sorted(kinds))}" if kinds else "nothing is to be scaled")
    [kind] = kinds
    dora = [part for part in DORA if part in parts]
    if len(dora) > 1:
        raise ValueError("it has two DoRA magnitudes")
    if parts.get("alpha", ()) != ():
        raise ValueError(f"its alpha is not one number but {list(parts['alpha'])}")
    if empty := next((part for part, shape in parts.items() if 0 in shape), None):
        raise ValueError(f"its {PARTS[empty]} is {list(parts[empty])}, without a number in it")
    if kind.endswith("difference"):
        if set(parts) & {"alpha", *DORA}:
            raise ValueError(f"a {kind} has no {PARTS[next(iter(set(parts) & {'alpha', *DORA}))]}")
        [shape] = parts.values()
        return kind, shape[0] if shape else 1, math.prod(shape[1:]), None
    if kind == "LoRA":
        return kind, *_product(parts, "up", "down", "mid")
    if kind == "LoHa":
        first = _product(parts, "hada_w1_a", "hada_w1_b", "hada_t1", turned=True)
        second = _product(parts, "hada_w2_a", "hada_w2_b", "hada_t2", turned=True)
        if first[:2] != second[:2]:
            raise ValueError("its two products have different shapes")
        return kind, *first
    small, large = _factor(parts, "lokr_w1", ""), _factor(parts, "lokr_w2", "lokr_t2")
    return kind, small[0] * large[0], small[1] * large[1], small[2] if large[2] is None else large[2]


def _factor(parts: Mapping[str, Shape], name: str, core: str) -> tuple[int, int, int | None]:
    """Rows, columns and rank of one factor of LoKr, whole or a product. Raises ValueError."""
    if name not in parts:
        return _product(parts, f"{name}_a", f"{name}_b", core, turned=True)
    if f"{name}_a" in parts or f"{name}_b" in parts:
        raise ValueError(f"it has {name} whole and as a product")
    return *_flat(parts, name), None


def _product(
    parts: Mapping[str, Shape], left: str, right: str, core: str, *, turned: bool = False
) -> tuple[int, int, int]:
    """Rows, columns and rank of a product; `turned`: with a core, the left matrix is transposed. Raises ValueError."""
    (rows, inner), (rank, columns) = _flat(parts, left), _flat(parts, right)
    if len(parts[left]) != len(parts[right]):
        raise ValueError(f"its {PARTS[left]} is {list(parts[left])}, its {PARTS[right]} {list(parts[right])}")
    if core not in parts:
        if inner != rank:
            raise ValueError(f"its {PARTS[left]} has {inner} columns, its {PARTS[right]} {rank} rows")
        return rows, columns, rank
    if turned:
        rows, inner = inner, rows
    shape = parts[core]
    if shape[:2] != (inner, rank):
        raise ValueError(f"its {PARTS[core]} is {list(shape)}, for matrices of {inner} and {rank}")
    return rows, columns * math.prod(shape[2:]), rank


def _flat(parts: Mapping[str, Shape], part: str) -> tuple[int, int]:
    """The shape of a part as a matrix: of a linear layer, or a convolution. Raises ValueError where it is neither."""
    if part not in parts:
        raise ValueError(f"its {PARTS[part]} is missing")
    shape = parts[part]
    if len(shape) not in (2, 4):
        raise ValueError(f"its {PARTS[part]} is {list(shape)}, no matrix")
    return shape[0], math.prod(shape[1:])


def dora_axis(part: str, shape: Shape, weight: Shape) -> int:
    """The axis of the weight that a DoRA magnitude runs along: 0 its outputs, 1 its inputs. Raises ValueError.

    peft's magnitudes are of the outputs. LyCORIS's have the weight's number of dimensions, all but the axis 1 long; its
    older versions, and kohya's, ran along the inputs (LyCORIS, `wd_on_out`).
    """
    count = math.prod(shape)
    if count == weight[0] and (part == "magnitude" or shape[0] == count):
        return 0
    if part == "dora_scale" and len(shape) > 1 and count == shape[1] == weight[1]:
        return 1
    raise ValueError(f"its DoRA magnitude is {list(shape)}, the module's weight {list(weight)}")
