"""Files of tensors, safetensors and GGUF, written with two tensors in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import torch
from torch import Tensor

from nativesd.errors import WeightsError
from nativesd.weights.entries import Entry, Flow, cast_finite, is_finite, to_quantise
from nativesd.weights.files.tensors import NAMES
from nativesd.weights.formats.blocks import INSTEAD, dequantise, quantise
from nativesd.weights.formats.gguf import ALIGNMENT, BLOCKS, MAX_NAME, gguf_bytes, gguf_header
from nativesd.weights.formats.header import header_bytes
from nativesd.weights.maps.rules import Shape

POURING = 2  # threads: one reads or writes while another computes; more of them wait for the disk


def write(path: Path, tensors: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """A safetensors file, two tensors in memory at a time, in the order of the safetensors library: larger elements
    first, then by name."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    placed: dict[str, tuple[str, Shape, int, int]] = {}
    at = 0
    for name, entry in ordered:
        size = entry.dtype.itemsize * torch.Size(entry.shape).numel()
        placed[name] = (NAMES[entry.dtype], entry.shape, at, at + size)
        at += size
    raw = header_bytes(placed, metadata)
    first = 8 + len(raw)
    whole = {name: entry for name, entry in ordered if entry.flow is None}
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, data in zip(whole, _made(whole.values()), strict=True):
            file.seek(first + placed[name][2])
            file.write(data)
    _pour_all(path, [(first + placed[name][2], entry.flow) for name, entry in ordered if entry.flow is not None])


def _made(entries: Iterable[Entry]) -> Iterator[memoryview]:
    """The tensors' bytes, a tensor at a time; each is made while what is before it is written."""
    with ThreadPoolExecutor(1) as beside:
        before: Future[Tensor] | None = None
        for entry in entries:
            following = beside.submit(entry.make)
            if before is not None:
                yield _bytes_of(before.result())
            before = following
        if before is not None:
            yield _bytes_of(before.result())


def _bytes_of(tensor: Tensor) -> memoryview:
    out: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return out


def _pour_all(path: Path, flows: Sequence[tuple[int, Flow]]) -> None:
    """Tensors into a file that is there, each from its first byte on, several at a time, a piece of each in memory."""
    threads, begun = torch.get_num_threads(), Barrier(min(POURING, len(flows)) + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread: those that torch would start for a piece wait for one another
        with suppress(BrokenBarrierError):
            begun.wait()  # the pool begins a thread only while none is idle, so none does anything before all are there

    with ThreadPoolExecutor(POURING, initializer=begin) as pool:
        try:
            poured = [pool.submit(_pour, path, first, flow) for first, flow in flows]
            begun.wait()
            torch.set_num_threads(threads)  # of threads that begin from now on, as before
            for done in poured:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            begun.abort()
            raise


def _pour(path: Path, first: int, flow: Flow) -> None:
    with path.open("r+b") as file:
        file.seek(first)
        for piece in flow():
            file.write(_bytes_of(piece))


PLAIN_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""The dtypes that are written into GGUF files as they are; others become float32."""
HALF = torch.finfo(torch.float16).max
ROWS = 1 << 17  # numbers that are quantised at once: their copies stay in the processor's caches


def write_gguf(path: Path, tensors: Mapping[str, Entry], metadata: Mapping[str, str], kind: str | None) -> None:
    """A GGUF file as stable-diffusion.cpp writes them, two tensors in memory at a time.

    kind  one of `blocks.WRITERS`, for matrices whose rows are whole blocks, or by `blocks.INSTEAD`. Other tensors of
          more than one dimension are float16 then; vectors stay as they are, as all do for None

    Raises WeightsError for numbers that are not finite, or more than their dtype can hold.
    """
    placed, at = list[tuple[str, str, Entry, int]](), 0
    for name, entry in tensors.items():
        own = _kind(entry, kind)
        placed.append((name, own, entry, at))
        at += -(-gguf_bytes(own, entry.shape) // ALIGNMENT) * ALIGNMENT
    texts = {key: value for key, value in metadata.items() if len(value) <= MAX_NAME}
    head = gguf_header(texts, [(name, own, entry.shape, start) for name, own, entry, start in placed])
    made = (
        Entry(torch.uint8, (gguf_bytes(own, entry.shape),), partial(_in_kind, entry, own, name))
        for name, own, entry, _ in placed
    )
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for data in _made(made):
            file.write(data)
            file.write(bytes(-len(data) % ALIGNMENT))


def _kind(entry: Entry, kind: str | None) -> str:
    """The dtype that a tensor gets in a GGUF file."""
    if kind is None or len(entry.shape) < 2:
        return PLAIN_KINDS.get(entry.dtype, "F32")
    fitting = (each for each in (kind, INSTEAD.get(kind, kind)) if entry.shape[1] % BLOCKS[each][0] == 0)
    return next(fitting, "F16") if len(entry.shape) == 2 else "F16"


def _in_kind(entry: Entry, kind: str, key: str) -> Tensor:
    """A tensor's bytes (n,) uint8 in a dtype of GGUF's. Raises WeightsError for numbers that it cannot hold."""
    if kind in BLOCKS:
        tensor = to_quantise(entry, key)
        out = [quantise(piece.float(), kind) for piece in torch.split(tensor.flatten(), ROWS)]
        largest = float(tensor.abs().amax()) if tensor.numel() else 0.0
        if largest > HALF and not all(is_finite(dequantise(raw, kind)) for raw in out):  # its scales are float16
            raise WeightsError(
                f"{key} has numbers up to {largest:.3g}, which {kind} cannot hold: nothing is written; choose another "
                "dtype"
            )
        return torch.cat(out)
    dtype = next(dtype for dtype, name in PLAIN_KINDS.items() if name == kind)
    return cast_finite(entry.make(), dtype, key).contiguous().flatten().view(torch.uint8)
