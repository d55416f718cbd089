"""Kind C: LoRAs and embeddings whose parts do not fit each other."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import save_file

import nativesd
from nativesd.text.embedding import read_embeddings
from nativesd.weights.lora.file import read_lora

MODULES = (
    "lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1", "unet.mid_block.x", "x",
    "", "\u00fc" * 50, "lora_unet_" + "a_" * 200, "a." * 100,
)  # fmt: skip
PARTS = (
    "lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "dora_scale", "hada_w1_a", "hada_w1_b", "lokr_w1",
    "lokr_w2_a", "diff", "diff_b", "lora_A.weight", "lora_B.weight", "lora_A.x.weight", "w_norm",
)  # fmt: skip
DTYPES = (torch.float16, torch.float32, torch.bfloat16, torch.int8, torch.bool)
NUMBERS = (0.0, 1.0, 1e38, -1e30, float("nan"), float("inf"), 4.0)


def lora(rng: random.Random, folder: Path) -> None:
    """A file of a few parts, read as a LoRA, as an embedding, or audited."""
    tensors = {}
    for _ in range(rng.choice((1, 1, 2, 2000))):
        module = rng.choice(MODULES) + str(len(tensors) or "")
        for part in rng.sample(PARTS, rng.randint(1, 4)):
            shape = [rng.choice((0, 1, 2, 4, 16)) for _ in range(rng.randint(0, 4))]
            if part == "alpha" and rng.random() < 0.7:
                shape = []
            tensors[f"{module}.{part}"] = torch.full(shape, rng.choice(NUMBERS)).to(rng.choice(DTYPES))
    if rng.random() < 0.2:
        tensors = {rng.choice(("emb_params", "clip_l", "clip_g", "<x>", "a")): torch.zeros(shape) for _ in "12"}
    save_file(tensors, folder / "x.safetensors")
    match rng.randrange(3):
        case 0:
            read_lora(folder / "x.safetensors")
        case 1:
            read_embeddings(folder / "x.safetensors")
        case _:
            nativesd.audit(folder / "x.safetensors")


def pickled(rng: random.Random, folder: Path) -> None:
    """What torch.save wrote, spoiled: read as data, or refused."""
    from attacks.values import put

    path = folder / "good.pt"
    torch.save({"a.weight": torch.zeros(2, 3), "b": {"c": [1, 2.0, "x", None]}}, path)
    raw = path.read_bytes()
    path.unlink()
    put(rng, folder / rng.choice(("x.pt", "x.bin", "x.ckpt")), raw, spoil=0.9)
    [file] = folder.iterdir()
    nativesd.audit(file)
