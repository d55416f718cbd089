"""The same clip through a stream by every backend that is here: frames per second, latency, and how far they differ.

    python tools/demo_stream.py [--frames 60] [--backend torch --backend onnx ...] [--sheet clip.jpg]
    python tools/demo_stream.py --model sd15 --vae taesd --backend torch --frames 5   # of published size

A red disc grows and moves over a yellow ground; the embedded model makes a strawberry of it. "own" is a frame's time
less that of its UNet and VAE, measured around each of their calls: the median, in milliseconds, and as a share. --sheet
writes frames and pictures side by side.
"""

from __future__ import annotations

import argparse
import math
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw

import nativesd
from nativesd.errors import NativesdError

PROMPT = "a strawberry on a yellow background"
SIDE, SHOWN = 64, 10


def drawing(number: int, frames: int) -> Image.Image:
    """A frame of the clip."""
    turn = 2 * math.pi * number / frames
    x, y, radius = 32 + 10 * math.cos(turn), 34 + 5 * math.sin(2 * turn), 15 + 5 * math.sin(turn)
    picture = Image.new("RGB", (4 * SIDE, 4 * SIDE), "#f5d142")
    draw = ImageDraw.Draw(picture)
    draw.ellipse([4 * (x - radius), 4 * (y - radius), 4 * (x + radius), 4 * (y + radius)], fill="#d4213d")
    draw.ellipse([4 * (x - 5), 4 * (y - radius - 4), 4 * (x + 5), 4 * (y - radius + 3)], fill="#3c8d3a")
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


class Timed:
    """The time that is spent inside of some methods."""

    def __init__(self) -> None:
        self.spent = 0.0

    def around(self, owner: Any, name: str) -> None:
        """Count the calls of a method of an object."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.spent += time.perf_counter() - start

        setattr(owner, name, timed)


def run(
    backend: str, frames: list[Image.Image], warm: int, loading: dict[str, Any], **options: Any
) -> tuple[list[Image.Image], list[str]]:
    """The pictures of a clip by a backend, and a row of the table; `warm` frames come before."""
    stream = nativesd.stream(
        PROMPT, device="cpu" if backend in ("torch", "onnx", "openvino") else None,
        backend=cast("Any", backend), **loading, **options,
    )  # fmt: skip
    timed = Timed()
    for owner, name in (
        (stream.pipeline.unet, "forward"),
        (stream.pipeline.vae, "encode"),
        (stream.pipeline.vae, "decode"),
    ):
        timed.around(owner, name)
    for frame in frames[:warm]:
        stream(frame)
    stream.reset()
    pictures, totals, own = [], [], []
    for frame in frames:
        before, start = timed.spent, time.perf_counter()
        made = stream(frame)
        total = time.perf_counter() - start
        if made is not None:
            pictures.append(cast("Image.Image", made.image))
            totals.append(total)
            own.append(total - (timed.spent - before))
    pictures += [cast("Image.Image", made.image) for made in stream.flush()]
    ordered = sorted(totals)
    numbers = [1 / median(totals), 1e3 * median(totals), 1e3 * ordered[int(0.95 * len(ordered))], 1e3 * median(own)]
    share = 100 * median(own) / median(totals)
    return pictures, [*(f"{each:.1f}" for each in numbers[:3]), f"{numbers[3]:.2f}", f"{share:.1f} %"]


def growth(frames: int) -> int:
    """Bytes that Python holds more after `frames` frames than after the first 50."""
    stream = nativesd.stream(PROMPT, "tiny", device="cpu", steps=1)
    given = [drawing(number, 60) for number in range(60)]
    tracemalloc.start()
    for number in range(50):
        stream(given[number % 60])
    before, _ = tracemalloc.get_traced_memory()
    for number in range(frames):
        stream(given[number % 60])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return after - before


def sheet(frames: list[Image.Image], pictures: list[Image.Image]) -> Image.Image:
    """Rows of frames, each with its pictures below."""
    rows = math.ceil(len(frames) / SHOWN)
    out = Image.new("RGB", (SHOWN * SIDE, rows * (2 * SIDE + 8)), "white")
    for number, (frame, picture) in enumerate(zip(frames, pictures, strict=True)):
        x, y = number % SHOWN * SIDE, number // SHOWN * (2 * SIDE + 8)
        out.paste(frame, (x, y))
        out.paste(picture, (x, y + SIDE))
    return out


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--strength", type=float, default=0.3)
    parser.add_argument("--backend", action="append", help="[default: torch, onnx, openvino, and on CUDA the others]")
    parser.add_argument("--model", default="tiny", help="the stream's pictures have its own size")
    parser.add_argument("--vae", help="such as taesd")
    parser.add_argument("--dtype", help="such as bfloat16")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--memory", type=int, metavar="FRAMES", help="measure how memory grows over so many frames")
    asked = parser.parse_args()
    if asked.memory:
        print(f"{growth(asked.memory) / 1024:.1f} KiB more after {asked.memory} frames")
        return
    frames = [drawing(number, asked.frames) for number in range(asked.frames)]
    others = ["cudagraphs", "tensorrt", "tensorrt-rtx"] if torch.cuda.is_available() else []
    first: list[Image.Image] | None = None
    print(f"{torch.get_num_threads()} threads, {asked.frames} frames, {asked.steps} steps")
    print("backend        fps    p50 ms   p95 ms   own ms      own   largest difference of 255")
    loading = {name: value for name in ("model", "vae", "dtype") if (value := getattr(asked, name)) is not None}
    warm = min(5, asked.frames // 2)
    for backend in asked.backend or ["torch", "onnx", "openvino", *others]:
        try:
            pictures, row = run(backend, frames, warm, loading, steps=asked.steps, strength=asked.strength)
        except NativesdError as error:
            print(f"{backend:<12} {error}")
            continue
        first = first or pictures
        far = max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(first, pictures, strict=True))
        print(f"{backend:<12}" + "".join(f"{text:>9}" for text in row) + f"{far:>9}")
    if asked.sheet is not None and first is not None:
        sheet(frames, first).save(asked.sheet, quality=90)


if __name__ == "__main__":
    main()
