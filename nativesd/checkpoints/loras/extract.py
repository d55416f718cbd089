"""What a tuned model differs in from its base, as a LoRA: the singular value decomposition of every layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from nativesd.checkpoints.layouts import DTYPES
from nativesd.checkpoints.loras.change import Written, check_lora, is_folder, summary
from nativesd.checkpoints.loras.naming import Base, Piece, name_pieces
from nativesd.checkpoints.loras.ranks import Rule, clamp, split
from nativesd.checkpoints.loras.writing import network_metadata, write_lora
from nativesd.checkpoints.sources import Side, open_side, require_alike
from nativesd.config import TextEncoderConfig, UNetConfig
from nativesd.destination import fresh
from nativesd.errors import UsageError, WeightsError
from nativesd.models.build import expected
from nativesd.pipeline.asked.readers import real, whole
from nativesd.weights.entries import cast_finite
from nativesd.weights.lora.place import Place
from nativesd.weights.maps.keymap import load_tables

LAYERS = re.compile(
    r"(down|mid|up)\b.*(attentions|resnets|downsample|upsample).*\.weight|layers\.\d+\.(attn|mlp)\..*\.weight"
)
"""The parameters that kohya's trainers change: a UNet's attention and residual blocks and what is between its levels, a
text encoder's layers (sd-scripts, networks/lora.py, UNET_TARGET_REPLACE_MODULE and the two beside it)."""


@dataclass(frozen=True)
class Extracted(Written):
    """A LoRA that was extracted. `left_out`: the parameters that differ and are not in it, with the largest difference
    of each: inf where the shapes differ, or only one of the models has it."""

    left_out: Mapping[str, float] = field(default_factory=dict)


def extract_lora(
    tuned: str | Path,
    base: str | Path,
    dest: str | Path,
    *,
    rank: int | None = None,
    ratio: float | None = None,
    cumulative: float | None = None,
    frobenius: float | None = None,
    energy: float | None = None,
    conv_rank: int | None = None,
    text_encoders: bool = True,
    clamp_quantile: float | None = None,
    layout: str = "kohya",
    dtype: str = "f16",
    on_progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Write the difference of a tuned model from its base as a LoRA, layer by layer, whatever their layouts.

    rank, ...       how large every layer's matrices are, by a `ranks.Rule`
    conv_rank       the same of convolutions with a kernel (LoCon), at most; 0 leaves them out [as of the others]
    text_encoders   whether their layers are extracted too
    clamp_quantile  keep both matrices within this quantile of their numbers, as kohya's script does with 0.99 [not]
    dtype           "f16", "bf16" or "f32"
    on_progress     called with how many parameters are done, and how many there are

    Layers that do not differ are not in it. What differs and has no place in a LoRA is in `left_out`: norms, biases,
    embeddings, the first and the last convolution, and what has another shape. Raises UsageError, SourceError,
    WeightsError.
    """
    rule = Rule.of(rank=rank, ratio=ratio, cumulative=cumulative, frobenius=frobenius, energy=energy)
    conv_rank = None if conv_rank is None else whole(0)("conv_rank", conv_rank)
    clamp_quantile = None if clamp_quantile is None else real(0, 1, above=True)("clamp_quantile", clamp_quantile)
    check_lora(dest, layout, dtype)
    tables = load_tables()
    left_out: dict[str, float] = {}
    errors, pieces = [0.0], list[Piece]()
    with fresh(dest) as temporary, torch.no_grad():
        one, other = open_side(tuned, tables), open_side(base, tables)
        require_alike(one, [other])
        places = {
            name: Place(component.config, expected(component.config), tables)
            for name, (_, component) in other.parts.items()
            if isinstance(component.config, UNetConfig | TextEncoderConfig) and name in one.parts
        }
        if not places:
            raise UsageError(f"{tuned} and {base} have neither a UNet nor a text encoder in common")
        known = Base(places)
        wanted = [name for name in places if text_encoders or name == "unet"]
        for component in wanted:
            unlike = _unlike(one, other, component)
            left_out |= dict.fromkeys((f"{component}.{name}" for name in unlike), math.inf)
        for component, name, difference in _differences(one, other, wanted, on_progress):
            kernel = difference.ndim == 4 and difference.shape[2:] != (1, 1)
            if difference.ndim < 2 or not LAYERS.fullmatch(name) or (kernel and conv_rank == 0):
                left_out[f"{component}.{name}"] = float(torch.linalg.vector_norm(difference, math.inf))
                continue
            own = replace(rule, rank=conv_rank) if kernel and conv_rank else rule
            up, down, error = split(difference.flatten(1), own)
            errors.append(error)
            if clamp_quantile is not None:
                up, down = clamp(up, down, clamp_quantile)
            ending = (1, 1) if difference.ndim == 4 else ()
            parts = {"up": up.reshape(*up.shape, *ending), "down": down.reshape(len(down), *difference.shape[1:])}
            cast = {part: cast_finite(t, DTYPES[dtype], f"{component}.{name}'s {part}") for part, t in parts.items()}
            pieces.append(Piece(component, name, cast, float(len(down))))
        if not pieces:
            raise WeightsError(f"{tuned} does not differ from {base} in any layer that a LoRA changes")
        named = name_pieces(pieces, known, layout)
        said = {"format": "pt", **network_metadata(pieces, known.family)}
        said["ss_training_comment"] = f"extracted from {Path(tuned).stem} and {Path(base).stem} by {rule.says()}"
        write_lora(temporary, named, said, folder=is_folder(dest))
    done = summary(dest, named, pieces)
    return Extracted(done.path, done.tensors, done.layers, done.ranks, max(errors), left_out)


def _unlike(tuned: Side, base: Side, component: str) -> list[str]:
    """The parameters that cannot be compared: their shapes differ, or only one of the models has them."""
    one, other = (side.parameters(component) for side in (tuned, base))
    shapes, others = ({name: entry.shape for name, entry in each.items()} for each in (one, other))
    return sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))


def _differences(
    tuned: Side, base: Side, components: list[str], on_progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, str, Tensor]]:
    """What differs, parameter by parameter, in float32. Raises WeightsError where it is not finite."""
    sides = {component: (tuned.parameters(component), base.parameters(component)) for component in components}
    pairs = [
        (component, name, one[name], other[name])
        for component, (one, other) in sides.items()
        for name in sorted(one.keys() & other.keys())
        if one[name].shape == other[name].shape  # `_unlike` has the others
    ]
    for number, (component, name, one, other) in enumerate(pairs):
        if on_progress is not None:
            on_progress(number, len(pairs))
        difference = one.make().float().sub_(other.make())
        low, high = difference.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise WeightsError(f"{component}.{name} of {tuned.name} or {base.name} is not finite")
        if low < 0 or high > 0:
            yield component, name, difference
