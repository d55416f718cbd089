"""What inputs for image prompts cost in a step of SD1.5's UNet: idle, and filled, against none; in turns.

    python tools/bench_image_prompts.py [--cells 32] [--rows 2] [--turns 3] [--onnx] [--tiny]

Random weights, float32, one thread; the least of the turns of each case. Prints seconds and what they are of the first.
With --tiny the UNet has the embedded model's form, whose short steps want more turns.
With --onnx ONNX Runtime runs two exported graphs, one with these inputs: of SD1.5's, minutes and 12 GB of disk.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from nativesd.config import SD15_UNET, UNetConfig
from nativesd.export.graphs import FILE, graph_of, image_inputs
from nativesd.export.onnx import export_onnx
from nativesd.export.sessions import OnnxRunner
from nativesd.loading.load import load
from nativesd.models.build import build
from nativesd.models.unet import ImageContext, UNet
from nativesd.tuning.tune import tune

Step = Callable[[], object]


def filled(config: UNetConfig, rows: int, groups: int, tokens: int, value: float = 1.0) -> ImageContext:
    """Image prompts of so many tokens; with a value of 0 they are idle."""
    counts: dict[int, int] = {}
    for place in config.cross_attentions:
        counts[place.width] = counts.get(place.width, 0) + 1
    keys = {width: torch.randn(count, rows, groups, tokens, width) * value for width, count in counts.items()}
    return ImageContext(keys, dict(keys))


def table(cases: dict[str, Step], turns: int) -> None:
    """Run every case in every turn, and print the least seconds of each."""
    least = dict.fromkeys(cases, float("inf"))
    for turn in range(turns + 1):  # the first one packs and allocates
        for name, step in cases.items():
            began = time.process_time()
            step()
            if turn:
                least[name] = min(least[name], time.process_time() - began)
    first = next(iter(least.values()))
    for name, seconds in least.items():
        print(f"| {name} | {seconds:.3f} s | {seconds / first:.3f} |", flush=True)


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = load("tiny", device="cpu").config.unet if options.tiny else SD15_UNET
    unet = build(config).to_empty(device="cpu").eval().requires_grad_(False)
    assert isinstance(unet, UNet)
    for parameter in unet.parameters():
        parameter.normal_(0, 0.02)
    rows, cells = options.rows, options.cells
    latents, context = torch.randn(rows, 4, cells, cells), torch.randn(rows, 77, config.context)
    shown = {
        "idle": filled(config, rows, 1, 1, 0.0), "4 tokens": filled(config, rows, 1, 4),
        "16 tokens": filled(config, rows, 1, 16), "257 tokens": filled(config, rows, 1, 257),
        "two of 16": filled(config, rows, 2, 16),
    }  # fmt: skip
    if options.onnx:
        plain, slots = graph_of(unet, "unet", images=False), graph_of(unet, "unet")
        given = {"sample": latents, "timestep": torch.full((rows,), 500.0), "encoder_hidden_states": context}
        with TemporaryDirectory() as folder:
            runners = []
            for number, graph in enumerate((plain, slots)):
                path = Path(folder) / str(number) / FILE
                path.parent.mkdir()
                export_onnx(graph, path)
                runners.append(OnnxRunner(path, graph.schema, torch.float32, torch.device("cpu")))

            def by(runner: OnnxRunner, more: dict[str, Tensor]) -> Step:
                return lambda: runner.run(given | more)

            cases = {"a graph without": by(runners[0], {}), "idle": by(runners[1], {})}
            cases |= {
                name: by(runners[1], image_inputs(images, latents, slots.schema))
                for name, images in shown.items()
                if name != "idle"
            }
            table(cases, options.turns)
        return
    tune(unet)

    def torch_step(images: ImageContext | None) -> Step:
        return lambda: unet(latents, 500.0, context, images=images)

    table({"without": torch_step(None)} | {name: torch_step(images) for name, images in shown.items()}, options.turns)


if __name__ == "__main__":
    main()
