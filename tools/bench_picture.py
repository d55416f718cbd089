"""Whole pictures by nativesd and by diffusers' pipeline on the same random weights of SD2.1, in turns, in one process.

    python tools/bench_picture.py [--size N] [--steps N] [--dtype bfloat16] [--rounds N] [--device cpu] [--openvino]

Prints the medians, their ratio, and the most memory above the loaded models. One picture of each comes before and does
not count. --openvino adds nativesd with backend="openvino", whose graphs (3 GB) go to a temporary folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import diffusers
import torch
import transformers

import nativesd
from nativesd.config import TEXT_ENCODERS, UNETS, VAES
from nativesd.machine.bench import draw
from nativesd.machine.timing import peak_memory
from nativesd.text.tokenizer import DEFAULT

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles import published_text_encoder, published_unet, published_vae

PROMPT, NEGATIVE = "a red fox in the snow, golden hour", "blurry"


def published_pipeline(dtype: torch.dtype, device: torch.device) -> diffusers.StableDiffusionPipeline:
    """diffusers' SD2.1 base with random weights."""
    parts = {
        "unet": published_unet(UNETS["sd21"]),
        "vae": published_vae(VAES["sd"]),
        "text_encoder": published_text_encoder(TEXT_ENCODERS["openclip-h"]),
    }
    for part in parts.values():
        draw(part.to(dtype).eval(), device)
    for positions in parts["text_encoder"].buffers():
        positions.copy_(torch.arange(positions.shape[-1]))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        **parts, scheduler=scheduler, tokenizer=transformers.CLIPTokenizer.from_pretrained(DEFAULT, pad_token="!"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--openvino", action="store_true")
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    common = {"width": options.size, "height": options.size, "guidance_scale": 7.5, "negative_prompt": NEGATIVE}
    with TemporaryDirectory() as folder:
        theirs = published_pipeline(dtype, device)
        theirs.save_pretrained(folder)
        ours = nativesd.load(folder, device=device, dtype=dtype)
        ways: dict[str, Callable[[int], object]] = {
            "diffusers": lambda steps: theirs(PROMPT, num_inference_steps=steps, **common).images,
            "nativesd": lambda steps: ours(PROMPT, steps=steps, sampler="DDIM", **common).images,
        }
        if options.openvino:
            fast = ours.accelerate("openvino", engines=Path(folder) / "engines")
            ways["nativesd, openvino"] = lambda steps: fast(PROMPT, steps=steps, sampler="DDIM", **common).images
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        peaks = {}
        for name, way in ways.items():
            way(2)
            with peak_memory(device) as peak:
                way(2)
            peaks[name] = peak()
        for _ in range(options.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way(options.steps)
                seconds[name].append(time.perf_counter() - start)
    print(f"SD2.1, {options.size}x{options.size}, {options.steps} steps, {options.dtype}, {device}")
    print("| | seconds | times diffusers | peak above the models |\n|---|---|---|---|")
    for name, times in seconds.items():
        peak_text = "" if (most := peaks[name]) is None else f"{most / 1e9:.2f} GB"
        print(f"| {name} | {median(times):.1f} | {median(times) / median(seconds['diffusers']):.2f} | {peak_text} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
