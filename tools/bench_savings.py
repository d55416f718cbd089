"""What savings gain, and what they cost of the picture, with the embedded model: times in turns, on one thread.

    python tools/bench_savings.py          # about a minute

The time is the processor's for a whole picture, without its decoding; the error is that of the latents, relative to the
plain ones'.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import nativesd

SIZE, STEPS, TURNS = 256, 8, 2
KINDS = ["", "tome:0.3", "tome:0.5", "hypertile:128", "hypertile:64", "deepcache:2", "deepcache:3"]


def main() -> None:
    """Print a row for each."""
    torch.set_num_threads(1)
    pipe = nativesd.load(device="cpu")
    options: dict[str, Any] = {"steps": STEPS, "seed": 3, "width": SIZE, "height": SIZE, "sampler": "Euler"}
    least: dict[str, float] = {}
    latents: dict[str, torch.Tensor] = {}
    for _ in range(TURNS):
        for kind in KINDS:
            moments: list[float] = []
            latents[kind] = pipe(
                "a fox", savings=kind or None, on_step=lambda _, m=moments: m.append(time.thread_time()), **options
            ).latents
            taken = (moments[-1] - moments[0]) / (len(moments) - 1)
            least[kind] = min(taken, least.get(kind, taken))
    for kind in KINDS:
        plain = latents[""]
        error = float((latents[kind] - plain).abs().max() / plain.abs().max())
        mean = float((latents[kind] - plain).abs().mean() / plain.abs().mean())
        print(f"{kind or 'plain':14} {least[kind]:6.3f} s a step, {least[kind] / least['']:5.2f} of plain, "
              f"error {error:.3f} at most, {mean:.3f} on average")  # fmt: skip


if __name__ == "__main__":
    main()
