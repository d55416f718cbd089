"""Memory: how much is free, and what is said where there is too little."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nativesd.config import UNetConfig
from nativesd.errors import NoMemoryError

CPU_WORDS = ("can't allocate memory", "not enough memory")  # of c10's allocator of main memory, in a RuntimeError


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, where that can be known; what torch holds there for the next tensors is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _held(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _held(device: torch.device) -> int:
    """What torch's allocator has of a GPU and does not use."""
    if torch.cuda.get_allocator_backend() != "native":  # cudaMallocAsync has no snapshots
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["active_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == index and tuple(segment["segment_pool_id"]) == (0, 0)  # the others are of graphs
    )


def unet_bytes(config: UNetConfig, batch: int, height: int, width: int, dtype: torch.dtype) -> int:
    """About what a step needs beside the weights, for latents of `height` x `width`: the skips and the feature maps.

    Of these there are, at the peak, 29 to 33 of the first level's size in float32 and 13 to 14 in half precision (SD1.5
    and SD2.1, batches of 2 and 4, 64x64 and 96x96 cells; on a CPU); SDXL's first level has no attention, so fewer.
    """
    shapes = config.residual_shapes(batch, height, width)
    maps = 32 if dtype == torch.float32 else 14
    return dtype.itemsize * (sum(math.prod(shape) for shape in shapes) + maps * math.prod(shapes[0]))


@contextmanager
def memory_explained() -> Iterator[None]:
    """Raises NoMemoryError, which says what would help, where the block (or a function so decorated) runs out of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0].split(". GPU ")[0].rstrip(".")
        raise NoMemoryError(
            f"the GPU's memory does not do ({reason}): make smaller pictures or fewer at a time, load with "
            "offload=True (--offload) or dtype='float16' (--dtype float16), or end what else uses the card"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in CPU_WORDS):
            raise
        raise NoMemoryError(
            "main memory does not do: make smaller pictures or fewer at a time, load with dtype='bfloat16' "
            "(--dtype bfloat16), or end what else uses it"
        ) from error
