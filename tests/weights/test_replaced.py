"""Files that change between the look at their header and the reading of their tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nativesd
from nativesd.errors import SourceError
from nativesd.shipped import TINY
from nativesd.weights.files.source import open_source
from nativesd.weights.files.tensors import open_tensors, read_tensor


def replaced(path: Path) -> None:
    save_file({"a": torch.ones(8)}, path.with_name("new"))
    os.replace(path.with_name("new"), path)


def written_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(1, 1))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


@pytest.mark.parametrize("change", [replaced, written_over, cut_short])
def test_a_file_that_changed_is_not_read(change: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    [member] = open_source(path)
    assert read_tensor(member, "a").tolist() == [0] * 8
    with pytest.raises(SourceError, match=r"is not the file any more"), open_tensors(member, path):
        change(path)
    with pytest.raises(SourceError, match="is not the file any more"):
        read_tensor(member, "a")


def test_what_is_not_mapped_outlives_its_file(tmp_path: Path) -> None:
    for file in TINY.rglob("*.*"):
        (tmp_path / file.relative_to(TINY)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.relative_to(TINY)).write_bytes(file.read_bytes())
    pipeline = nativesd.load(tmp_path, device="cpu", dtype="float32", mapped=False)
    before = pipeline("a fox", seed=1, steps=1).latents
    for file in tmp_path.rglob("*.safetensors"):
        os.truncate(file, 100)
    assert torch.equal(pipeline("a fox", seed=1, steps=1).latents, before)
