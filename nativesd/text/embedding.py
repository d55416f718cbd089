"""Textual inversion (Gal et al. 2022): learnt token embeddings that a prompt invokes by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nativesd.errors import SourceError, UsageError
from nativesd.weights.files.source import open_source
from nativesd.weights.files.tensors import read_tensor

SDXL_KEYS = ["clip_l", "clip_g"]  # in the order of SDXL's encoders: CLIP ViT-L, OpenCLIP ViT-bigG


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learnt word. `vectors`: for each encoder it was trained with, in the UNet's order, (n, width) float32."""

    name: str
    vectors: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """How many token positions the word takes."""
        return len(self.vectors[0])

    def fit(self, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """The vectors (n, width) for text encoders of these widths.

        The refiner has SDXL's second encoder alone, so it takes the second half of SDXL's embeddings. Raises UsageError
        where a width differs.
        """
        own = [vectors.shape[1] for vectors in self.vectors]
        if own[-len(widths) :] != list(widths):
            raise UsageError(
                f"the embedding {self.name!r} is {_sum(own)} wide, but the model's text encoding {_sum(widths)}: "
                f"it was trained for another family of models"
            )
        return self.vectors[-len(widths) :]


def read_embedding(path: str | Path, name: str | None = None) -> Embedding:
    """Read an embedding from a file; `name` is the word that invokes it, by default the file's stem.

    One tensor (n, width) or (width,) under any key (A1111's `emb_params`, and `string_to_param` in its .pt files;
    diffusers writes the token's own name, also in `learned_embeds.bin`), or
    SDXL's `clip_l` and `clip_g`. Raises SourceError for a file that is not that, UsageError for an empty name.
    """
    path = Path(path)
    name = path.stem if name is None else name.strip()
    if not name:
        raise UsageError(f"the embedding {path} needs a name to be invoked by")
    if not path.is_file():
        raise SourceError(f"{path} does not exist; an embedding is a file (.safetensors, .pt, .bin)")
    [member] = open_source(path)
    keys = sorted(member.tensors)
    if len(keys) != 1 and keys != sorted(SDXL_KEYS):
        found = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        raise SourceError(
            f"{path} is no textual inversion: it should hold one tensor, or clip_l and clip_g, but holds "
            f"{found or 'none'}"
        )
    ordered = keys if len(keys) == 1 else SDXL_KEYS
    vectors = tuple(_rows(read_tensor(member, key), f"{key} of {path}") for key in ordered)
    if len({len(rows) for rows in vectors}) > 1:
        raise SourceError(f"{path} holds different numbers of vectors: {_sum([len(rows) for rows in vectors])}")
    return Embedding(name, vectors)


def _rows(tensor: Tensor, where: str) -> Tensor:
    """(width,) or (n, width) -> (n, width) float32."""
    if tensor.ndim not in (1, 2) or tensor.numel() == 0 or not tensor.is_floating_point():
        raise SourceError(
            f"{where} should hold rows of floats (n, width), not {str(tensor.dtype)[6:]} {tuple(tensor.shape)}"
        )
    rows = tensor.float().reshape(-1, tensor.shape[-1])
    if not rows.isfinite().all():
        raise SourceError(f"{where} holds numbers that are not finite (NaN): the file is broken")
    return rows


def _sum(numbers: Sequence[int]) -> str:
    return " + ".join(map(str, numbers))
