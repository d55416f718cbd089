"""LoRAs made of LoRAs: under other names, of smaller ranks, and several joined into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nativesd.checkpoints.layouts import DTYPES
from nativesd.checkpoints.loras.naming import (
    LAYOUTS,
    Base,
    Named,
    Piece,
    base_of,
    name_pieces,
    published_base,
    read_pieces,
)
from nativesd.checkpoints.loras.ranks import Rule, shrink
from nativesd.checkpoints.loras.writing import keep_words, network_metadata, write_lora
from nativesd.destination import fresh
from nativesd.errors import UsageError, WeightsError
from nativesd.pipeline.asked.readers import real
from nativesd.pipeline.asked.records import MOST_SCALE
from nativesd.weights.entries import cast_finite
from nativesd.weights.formats.container import SUFFIXES
from nativesd.weights.lora.file import LoraFile, read_lora
from nativesd.weights.maps.keymap import KeyMap, load_tables


@dataclass(frozen=True)
class Written:
    """A LoRA that was written: how many layers it changes, its smallest and largest rank, and the largest relative
    error of a layer, |wanted - written| / |wanted| in the Frobenius norm, before rounding."""

    path: Path
    tensors: int
    layers: int
    ranks: tuple[int, int]
    error: float = 0.0


def convert_lora(
    lora: str | Path, dest: str | Path, *, layout: str, fold_alpha: bool = False, base: str | Path | None = None
) -> Written:
    """Write a LoRA under the names of another layout; its tensors stay as they are, to the bit.

    dest        a .safetensors file; of the layout peft also a folder, of an adapter or of one for each component
    layout      "kohya", "diffusers" or "peft" (see `naming` and `writing`)
    fold_alpha  multiply the scale into the up matrices, for readers that look for no alpha
    base        the model that it is for, by which modules have names [the published base that it fits]

    Raises UsageError, SourceError, WeightsError.
    """
    check_lora(dest, layout, None)
    with fresh(dest) as temporary:
        [file], known = _open([lora], base)
        pieces = read_pieces(file, known)
        named = name_pieces(pieces, known, layout, fold=fold_alpha)
        keep_words(named, [file], layout)
        metadata = {"format": "pt", **file.member.metadata}
        if layout == "kohya":
            metadata = {**network_metadata(pieces, known.family), **metadata}
        write_lora(temporary, named, metadata, folder=is_folder(dest))
    return summary(dest, named, pieces)


def resize_lora(
    lora: str | Path,
    dest: str | Path,
    *,
    rank: int | None = None,
    ratio: float | None = None,
    cumulative: float | None = None,
    frobenius: float | None = None,
    energy: float | None = None,
    layout: str = "kohya",
    dtype: str | None = None,
    base: str | Path | None = None,
) -> Written:
    """Write a LoRA of smaller ranks: of every layer the largest singular values are kept, by a `ranks.Rule`.

    rank is the most, and alone the rank of all layers. Changes that are no product of two matrices stay as they are.
    Raises UsageError, SourceError, WeightsError.
    """
    rule = Rule.of(rank=rank, ratio=ratio, cumulative=cumulative, frobenius=frobenius, energy=energy)
    check_lora(dest, layout, dtype)
    with fresh(dest) as temporary, torch.no_grad():
        [file], known = _open([lora], base)
        pieces = read_pieces(file, known)
        resized, errors = [], [0.0]
        for piece in pieces:
            if not piece.is_plain:
                resized.append(piece)
                continue
            up, down = (_matrix(piece.parts[part]) for part in ("up", "down"))
            left, right, error = shrink(up, down, rule)
            errors.append(error)
            resized.append(_resized(piece, left, right, piece.scale * right.shape[0], DTYPES.get(dtype or "")))
        named = name_pieces(resized, known, layout)
        keep_words(named, [file], layout)
        old = network_metadata(pieces, known.family)["ss_network_dim"]
        said = {"format": "pt", **file.member.metadata, **network_metadata(resized, known.family)}
        if "ss_base_model_version" in file.member.metadata:
            said["ss_base_model_version"] = file.member.metadata["ss_base_model_version"]
        comment = f"resized from rank {old} by {rule.says()}"
        said["ss_training_comment"] = "; ".join(filter(None, (comment, said.get("ss_training_comment", ""))))
        write_lora(temporary, named, said, folder=is_folder(dest))
    return replace(summary(dest, named, resized), error=max(errors))


def join_loras(
    loras: Sequence[tuple[str | Path, float]],
    dest: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    layout: str = "kohya",
    dtype: str | None = None,
    base: str | Path | None = None,
) -> Written:
    """Write one LoRA that does what several do, each with its strength.

    Without a rule the matrices are put side by side, which is exact; the ranks add up. With `rank` or `energy` (see
    `ranks.Rule`) their sum is decomposed. Raises UsageError, SourceError, WeightsError: also for a change that is no
    product of two matrices.
    """
    if not loras:
        raise UsageError("there is no LoRA to join")
    loras = [(lora, real(-MOST_SCALE, MOST_SCALE)("the strength of a LoRA", strength)) for lora, strength in loras]
    rule = None if rank is None and energy is None else Rule.of(rank=rank, energy=energy)
    check_lora(dest, layout, dtype)
    with fresh(dest) as temporary, torch.no_grad():
        files, known = _open([lora for lora, _ in loras], base)
        layers: dict[tuple[str, str], list[tuple[Piece, float]]] = {}
        for file, (_, strength) in zip(files, loras, strict=True):
            for piece in read_pieces(file, known):
                if not piece.is_plain:
                    parts = ", ".join(piece.parts)
                    raise WeightsError(f"{file.path}: {piece.parameter} is changed by {parts}: only LoRAs are joined")
                layers.setdefault((piece.component, piece.parameter), []).append((piece, strength))
        joined, errors = [], [0.0]
        for each in layers.values():
            first = each[0][0]
            up = torch.cat([_matrix(piece.parts["up"]) * (piece.scale * weight) for piece, weight in each], 1)
            down = torch.cat([_matrix(piece.parts["down"]) for piece, _ in each])
            if rule is not None:
                up, down, error = shrink(up, down, rule)
                errors.append(error)
            joined.append(_resized(first, up, down, float(down.shape[0]), DTYPES.get(dtype or "")))
        named = name_pieces(joined, known, layout)
        keep_words(named, files, layout)
        names = ", ".join(f"{file.path.name}:{strength:g}" for file, (_, strength) in zip(files, loras, strict=True))
        said = {"format": "pt", **network_metadata(joined, known.family), "ss_training_comment": f"joined of {names}"}
        write_lora(temporary, named, said, folder=is_folder(dest))
    return replace(summary(dest, named, joined), error=max(errors))


def check_lora(dest: str | Path, layout: str, dtype: str | None) -> None:
    """Raises UsageError where no LoRA can be written so."""
    if layout not in LAYOUTS:
        raise UsageError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if is_folder(dest) and (layout != "peft" or Path(dest).suffix in SUFFIXES):
        more = ", or of the layout peft a folder" if layout == "peft" else ""
        raise UsageError(f"a LoRA is a .safetensors file{more}: {dest} is not")


def is_folder(dest: str | Path) -> bool:
    """Whether a LoRA is written as a folder, by its name."""
    return Path(dest).suffix != ".safetensors"


def _open(loras: Sequence[str | Path], base: str | Path | None) -> tuple[list[LoraFile], Base]:
    tables: Mapping[str, KeyMap] = load_tables()
    files = [read_lora(lora, tables) for lora in loras]
    return files, published_base(files[0], tables) if base is None else base_of(base, tables)


def _matrix(tensor: Tensor) -> Tensor:
    """(O, r, 1, 1) or (r, I, kernel) as a matrix in float32."""
    return tensor.flatten(1).float()


def _resized(piece: Piece, up: Tensor, down: Tensor, alpha: float, dtype: torch.dtype | None) -> Piece:
    """A piece with other matrices, in the shapes of a layer's: of a convolution with its kernel."""
    old = piece.parts
    shapes = {"up": (*up.shape, *old["up"].shape[2:]), "down": (len(down), *old["down"].shape[1:])}
    tensors = {"up": up, "down": down}
    parts = {
        part: cast_finite(tensors[part].reshape(shapes[part]), dtype or old[part].dtype, f"{piece.parameter}'s {part}")
        for part in ("up", "down")
    }
    return Piece(piece.component, piece.parameter, parts, alpha)


def summary(dest: str | Path, named: Named, pieces: Sequence[Piece]) -> Written:
    """What was written."""
    ranks = [piece.rank for piece in pieces if piece.is_plain] or [0]
    return Written(Path(dest), len(named.tensors), len(pieces), (min(ranks), max(ranks)))
