"""What savings gain, and what they cost of the picture, with the embedded model: times in turns, on one thread.

    python tools/bench_savings.py          # a few seconds for each row

The time is a step's processor time at a size where attention counts; the error is that of the latents of a picture
after all steps, relative to the plain ones'.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import nativesd

SIZE, STEPS, TURNS = 384, 2, 3
KINDS = ["", "tome:0.3", "tome:0.5", "hypertile:128", "hypertile:64"]


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
            begun = time.thread_time()
            latents[kind] = pipe(
                "a fox", savings=kind or None, on_step=lambda _, m=moments: m.append(time.thread_time()), **options
            ).latents
            taken = min(b - a for a, b in zip([begun, *moments], moments, strict=False))
            least[kind] = min(taken, least.get(kind, taken))
    for kind in KINDS:
        plain = latents[""]
        error = float((latents[kind] - plain).abs().max() / plain.abs().max())
        mean = float((latents[kind] - plain).abs().mean() / plain.abs().mean())
        print(f"{kind or 'plain':14} {least[kind]:6.3f} s a step, {least[kind] / least['']:5.2f} of plain, "
              f"error {error:.3f} at most, {mean:.3f} on average")  # fmt: skip


if __name__ == "__main__":
    main()
