"""Textual inversion (Gal et al. 2022): learnt token embeddings that a prompt invokes by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from nativesd.config import SDXL_BIGG, SDXL_CLIP_L
from nativesd.errors import SourceError, UsageError
from nativesd.weights.files.source import Member, open_source
from nativesd.weights.files.tensors import read_tensor
from nativesd.weights.identity.words import TABLE, Word, find_words
from nativesd.weights.maps.keymap import load_table


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learnt word. `vectors`: for each encoder it was trained with, in the UNet's order, (n, width) float32."""

    name: str
    vectors: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """How many token positions the word takes."""
        return len(self.vectors[0])

    @property
    def widths(self) -> list[int]:
        """The vectors' lengths, for each encoder."""
        return [vectors.shape[1] for vectors in self.vectors]

    def fit(self, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """The vectors (n, width) for text encoders of these widths.

        The refiner has SDXL's second encoder alone, so it takes the second half of SDXL's embeddings. Raises UsageError
        where a width differs.
        """
        own = self.widths
        if len(own) < len(widths) and set(own) <= set(widths):
            raise UsageError(
                f"the embedding {self.name!r} has vectors for one of the model's text encoders ({_sum(own)} wide, of "
                f"{_sum(widths)}): give it together with the file for the other one"
            )
        if own[-len(widths) :] != list(widths):
            raise UsageError(
                f"the embedding {self.name!r} is {_sum(own)} wide, but the model's text encoding {_sum(widths)}: "
                f"it was trained for another family of models"
            )
        return self.vectors[-len(widths) :]


def read_embeddings(source: str | Path | Sequence[str | Path], name: str | None = None) -> tuple[Embedding, ...]:
    """The learnt words of a file, or of two, which are SDXL's: one for each text encoder. A LoRA's file may bring some.

    Of two files whose names say that they belong together (`PAIRS`), either stands for both.

    A word's name is what the file says (diffusers' `<cat>`, `string_to_param` of A1111's .pt files with a name), else
    the file's stem; `name` overrides it, where there is one word. What a file may hold is in `weights.identity.words`.
    Raises SourceError for a file that is not that, UsageError for a name that cannot be.
    """
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]
    if name is not None and not name.strip():
        raise UsageError(f"the embedding {_listed(paths)} needs a name to be invoked by")
    files = [_read(path) for path in paths]
    if len(files) == 1 and (pair := _pair(paths[0], files[0])) is not None:
        paths, files = pair
    words = _joined(paths, files) if len(files) > 1 else files[0]
    if name is None:
        return words
    if len(words) > 1:
        called = ", ".join(word.name for word in words)
        raise UsageError(f"{_listed(paths)} holds {len(words)} words, which have names of their own: {called}")
    return (replace(words[0], name=name.strip()),)


PAIRS = ((r"(.+)[-_. ]clip[-_]?l", r"(.+)[-_. ]clip[-_]?g"), (r"(.+)", r"(.+)_2"))
"""The stems of SDXL's two files, for the first and the second text encoder; what they have in common is the word. The
last are those of diffusers' textual_inversion_sdxl.py."""
HALVES = ([SDXL_CLIP_L.width], [SDXL_BIGG.width])


def _pair(path: Path, words: tuple[Embedding, ...]) -> tuple[list[Path], list[tuple[Embedding, ...]]] | None:
    """A half of SDXL's embedding with the other half beside it, where one is there."""
    own = next((i for i, width in enumerate(HALVES) if all(word.widths == width for word in words)), None)
    if own is None:
        return None
    for names in PAIRS:
        match = re.fullmatch(names[own], path.stem, re.IGNORECASE)
        for beside in sorted(path.parent.glob(f"*{path.suffix}")) if match is not None else []:
            other = re.fullmatch(names[1 - own], beside.stem, re.IGNORECASE)
            if match is None or other is None or other[1] != match[1] or beside == path:
                continue
            try:
                partner = _read(beside)
            except SourceError:  # what it is called by is no fault of this one
                continue
            if all(word.widths == HALVES[1 - own] for word in partner):
                found = [path, beside], [_called(match[1], path, words), _called(match[1], beside, partner)]
                return found if own == 0 else (found[0][::-1], found[1][::-1])
    return None


def _called(name: str, path: Path, words: tuple[Embedding, ...]) -> tuple[Embedding, ...]:
    """Words that are called as their file by what its name has in common with the other half's."""
    return tuple(replace(word, name=name) if word.name == path.stem else word for word in words)


def _read(path: Path) -> tuple[Embedding, ...]:
    """The words of one file. Raises SourceError."""
    if not path.is_file():
        raise SourceError(f"{path} does not exist; an embedding is a file (.safetensors, .pt, .bin)")
    [member] = open_source(path)
    return words_of(member, path)


def words_of(member: Member, path: Path) -> tuple[Embedding, ...]:
    """The learnt words of a checkpoint that was opened from `path`. Raises SourceError where there are none."""
    dtypes = {key: info.dtype for key, info in member.tensors.items()}
    found = find_words(member.shapes, load_table(TABLE), dtypes)
    if found is None or not found.words:
        shown = [f"{key} {info.dtype} {list(info.shape)}" for key, info in list(member.tensors.items())[:4]]
        more = f" and {len(member.tensors) - 4} more" if len(member.tensors) > 4 else ""
        raise SourceError(
            f"{path} is no textual inversion: it should hold rows of learnt words (n, width), but holds "
            f"{', '.join(shown) or 'none'}{more}"
        )
    if found.faults:
        key, reason = next(iter(found.faults.items()))
        raise SourceError(f"{path} is no textual inversion that can be read: {key}: {reason}")
    return tuple(_embedding(word, member, path) for word in found.words)


def _embedding(word: Word, member: Member, path: Path) -> Embedding:
    vectors = tuple(_rows(read_tensor(member, key), f"{key} of {path}") for key in word.keys)
    return Embedding(word.name or path.stem, vectors)


def _joined(paths: Sequence[Path], files: Sequence[tuple[Embedding, ...]]) -> tuple[Embedding, ...]:
    """The words of two files, one for each of SDXL's text encoders, whose first is the narrower one.

    Words go together by their names; where each file has one, they are one, called as the first.
    """
    if len(files) != 2 or any(len(word.vectors) != 1 for file in files for word in file):
        raise UsageError(
            f"{_listed(paths)}: files that are given together are two halves of SDXL's embedding, one for each encoder"
        )
    first, second = sorted(files, key=lambda file: file[0].widths)
    names = {word.name: word for word in second}
    if len(first) == len(second) == 1:
        names = {first[0].name: second[0]}
    if {word.name for word in first} != set(names):
        raise UsageError(f"{_listed(paths)} do not have the same words, so they are not two halves of one embedding")
    out = tuple(Embedding(word.name, (*word.vectors, *names[word.name].vectors)) for word in first)
    for word in out:
        if len({len(rows) for rows in word.vectors}) > 1:
            counts = _sum([len(rows) for rows in word.vectors])
            raise SourceError(f"{_listed(paths)} hold different numbers of vectors of {word.name!r}: {counts}")
    return out


def _rows(tensor: Tensor, where: str) -> Tensor:
    """(width,) or (n, width) -> (n, width) float32. Raises SourceError for numbers that are not finite."""
    rows = tensor.float().reshape(-1, tensor.shape[-1])
    if not rows.isfinite().all():
        raise SourceError(f"{where} holds numbers that are not finite (NaN): the file is broken")
    return rows


def _listed(paths: Sequence[Path]) -> str:
    return " and ".join(map(str, paths))


def _sum(numbers: Sequence[int]) -> str:
    return " + ".join(map(str, numbers))
