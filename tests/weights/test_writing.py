"""Several threads write one file, each its own tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nativesd.errors import WeightsError
from nativesd.weights import writing
from nativesd.weights.entries import Entry
from nativesd.weights.writing import write


class Hesitant(ThreadPoolExecutor):
    """Has done a small piece of work before it is given the next."""

    def submit(self, *asked: Any, **more: Any) -> Future[Any]:
        given = super().submit(*asked, **more)
        time.sleep(0.05)
        return given


def ended(path: Path, tensors: dict[str, Entry]) -> list[BaseException | None]:
    """How writing ends, in a thread of its own: a list of nothing where it does not."""
    out: list[BaseException | None] = []

    def run() -> None:
        try:
            write(path, tensors, {})
            out.append(None)
        except BaseException as error:
            out.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    return out


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def numbers(count: int) -> Iterator[Tensor]:
    yield from torch.split(torch.arange(count, dtype=torch.float32), 4)


def flowing(sizes: Sequence[int]) -> dict[str, Entry]:
    return {f"{number}": Entry.of(torch.float32, (size,), partial(numbers, size)) for number, size in enumerate(sizes)}


THREADS = 3


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [[], [3], [0, 0], [9, 0], [1, 9, 0, 5]])
def test_few_and_small_tensors_are_written(sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ThreadPoolExecutor", Hesitant)
    whole = {"whole": Entry(torch.float32, (2,), partial(torch.ones, 2))}
    assert ended(tmp_path / "a.safetensors", whole | flowing(sizes)) == [None]
    found = load_file(tmp_path / "a.safetensors")
    assert found.pop("whole").tolist() == [1, 1]
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        f"{number}": list(range(size)) for number, size in enumerate(sizes)
    }
    assert threads_of_a_new_thread() == THREADS


def test_what_one_of_them_raises_ends_all(tmp_path: Path) -> None:
    def broken() -> Iterator[Tensor]:
        yield torch.zeros(4)
        raise WeightsError("broken")

    entries = flowing([8, 8, 8, 8]) | {"1": Entry.of(torch.float32, (8,), broken)}
    [error] = ended(tmp_path / "a.safetensors", entries)
    assert isinstance(error, WeightsError)
    assert threads_of_a_new_thread() == THREADS


def test_a_thread_that_cannot_begin_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(ThreadPoolExecutor):
        def submit(self, *asked: Any, **more: Any) -> Future[Any]:
            if self._threads:
                raise RuntimeError("can't start new thread")
            return super().submit(*asked, **more)

    monkeypatch.setattr(writing, "ThreadPoolExecutor", Full)
    [error] = ended(tmp_path / "a.safetensors", flowing([8, 8]))
    assert isinstance(error, RuntimeError)
