"""How long imports and loading take: the seconds and the peak memory of fresh processes, in turns.

    python tools/bench_load.py [--family NAME] [--rounds N] [--folder FOLDER]

Writes a UNet of a published size with random fp16 weights (SDXL: 5.1 GB) in diffusers' layout, and loads it as bf16
by nativesd, by diffusers, and by the least there is to do: every tensor read once and cast once. The file is in the
system's cache. Peaks are the process's, beyond what its imports take.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from nativesd.config import UNETS
from nativesd.machine.bench import draw

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles import published_unet

START = """
import sys, time
def status(name):
    return next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if line.startswith(name + ':'))
"""
FINISH = """
seconds, peak = time.perf_counter() - start, status('VmHWM') - before
print(seconds, peak / sum(tensor.nbytes for tensor in tensors))
"""
LOADS = {
    "read and cast": """
import torch
from safetensors import safe_open
before, start = status('VmRSS'), time.perf_counter()
with safe_open(sys.argv[1] + '/diffusion_pytorch_model.safetensors', 'pt') as file:
    tensors = [file.get_tensor(key).to(torch.bfloat16) for key in file.keys()]
""",
    "nativesd": """
from pathlib import Path
import torch
from nativesd.models.build import build
from nativesd.weights.checkpoint import fill
from nativesd.weights.identity.identify import identify_all
from nativesd.weights.maps.keymap import load_tables
from nativesd.weights.files.source import open_source
before, start = status('VmRSS'), time.perf_counter()
members = open_source(Path(sys.argv[1]) / 'diffusion_pytorch_model.safetensors')
[(member, identity)] = identify_all(members, load_tables())
[component] = identity.components
module = build(component.config)
fill(module, member, component, device=torch.device('cpu'), dtype=torch.bfloat16)
tensors = list(module.parameters())
""",
    "diffusers": """
import torch
from diffusers import UNet2DConditionModel
before, start = status('VmRSS'), time.perf_counter()
tensors = list(UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).parameters())
""",
}
IMPORTS = {
    name: f"start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    for name, code in {
        "import torch": "import torch",
        "import torch, nativesd": "import torch, nativesd",
        "from nativesd import Pipeline": "from nativesd.pipeline.pipeline import Pipeline",
        "from diffusers import StableDiffusionPipeline": "from diffusers import StableDiffusionPipeline",
    }.items()
}


def in_turns(scripts: dict[str, str], rounds: int, *arguments: str) -> dict[str, list[list[float]]]:
    """What each script printed, after a first round that does not count."""
    out: dict[str, list[list[float]]] = {name: [] for name in scripts}
    for number in range(rounds + 1):
        for name, code in scripts.items():
            command = [sys.executable, "-c", START + code, *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            if number:
                out[name].append([float(word) for word in done.stdout.split()[-2:]])
    return out


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=UNETS, default="sdxl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the UNet is written [default: a temporary one]")
    options = parser.parse_args()
    print("| | seconds | times the first |\n|---|---|---|")
    imports = {name: median(row[0] for row in rows) for name, rows in in_turns(IMPORTS, 2 * options.rounds).items()}
    for name, seconds in imports.items():
        print(f"| {name} | {seconds:.2f} | {seconds / imports['import torch']:.2f} |", flush=True)
    with TemporaryDirectory(dir=options.folder) as folder:
        with torch.device("meta"):
            reference = published_unet(UNETS[options.family]).half()
        draw(reference, torch.device("cpu"))
        reference.save_pretrained(folder, max_shard_size="100GB")
        del reference
        loads = in_turns({name: code + FINISH for name, code in LOADS.items()}, options.rounds, folder)
    print(f"\n| {options.family} UNet, fp16 to bf16 | seconds | times the first | peak / result |\n|---|---|---|---|")
    first = median(row[0] for row in loads["read and cast"])
    for name, rows in loads.items():
        seconds, peak = (median(row[i] for row in rows) for i in (0, 1))
        print(f"| {name} | {seconds:.2f} | {seconds / first:.2f} | {peak:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
