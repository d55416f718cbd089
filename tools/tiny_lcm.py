"""Distils the embedded model to four steps without guidance: an LCM-LoRA of its UNet.

    python tools/tiny_lcm.py --work DIR [--out nativesd/tiny/lcm_lora/tiny-lcm.safetensors]

It takes the model as it is exported (`train_tiny`) and sees the same scenes. The checkpoint in DIR is gone on from, so
the command can be stopped and repeated.

Luo et al. 2023, "LCM-LoRA", arXiv 2311.05556: with the LoRA the UNet answers at any time as it answers, a step of the
guided teacher further, itself. The file has the name and the keys of the published LCM-LoRAs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import nativesd
import tiny_scenes as scenes
from nativesd.models.unet import UNet
from nativesd.sampling.schedule import alphas_cumprod
from nativesd.shipped import LCM_LORA
from nativesd.text.tokenizer import ClipTokenizer
from nativesd.weights.maps.keymap import load_table
from train_tiny import LARGE_SHARE, SEED, Checkpoint, autocast, cosine, encode_scenes

RANK, CONV_RANK = 32, 8
GUIDANCE = 3.0  # of the teacher
GRID = 20  # times are 19, 39, ..., 999, as LCM's sampler takes them
STRIDE = 100  # of the teacher's step


class Lowered(nn.Module):
    """A linear layer or a 3x3 convolution, which stays as it is, and a low-rank change beside it."""

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base, self.active = base, True
        if isinstance(base, nn.Conv2d):
            self.down: nn.Linear | nn.Conv2d = nn.Conv2d(base.in_channels, CONV_RANK, 3, padding=1, bias=False)
            self.up: nn.Linear | nn.Conv2d = nn.Conv2d(CONV_RANK, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, RANK, bias=False)
            self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of `x`, and the change where it is active."""
        out: Tensor = self.base(x)
        return out + self.up(self.down(x)) if self.active else out


class Lora:
    """The changes that are put into a UNet: in every linear layer of its transformers, every residual convolution."""

    def __init__(self, unet: UNet) -> None:
        unet.requires_grad_(False)
        self.layers: dict[str, Lowered] = {}
        for name, module in list(unet.named_modules()):
            linear = isinstance(module, nn.Linear) and ".attentions." in name
            if linear or (isinstance(module, nn.Conv2d) and name.endswith((".conv1", ".conv2"))):
                parent, _, own = name.rpartition(".")
                self.layers[name] = Lowered(module)
                setattr(unet.get_submodule(parent), own, self.layers[name])
        self.changes = nn.ModuleList(nn.ModuleList([layer.down, layer.up]) for layer in self.layers.values())

    def switch(self, active: bool) -> None:
        """Make the UNet the student (active) or the teacher."""
        for layer in self.layers.values():
            layer.active = active

    def save(self, path: Path) -> None:
        """Write it in float16, under the names of the published LCM-LoRAs."""
        table = load_table("unet.diffusers").bind()
        tensors = {}
        for name, layer in self.layers.items():
            source = table.source(f"{name}.weight")
            assert source is not None  # the table has every parameter of the UNet
            stem = "lora_unet_" + source.keys[0].removesuffix(".weight").replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = layer.down.weight.detach().half().contiguous()
            tensors[f"{stem}.lora_up.weight"] = layer.up.weight.detach().half().contiguous()
            tensors[f"{stem}.alpha"] = torch.tensor(float(len(layer.down.weight))).half()  # the rank: a scale of 1
        path.parent.mkdir(parents=True, exist_ok=True)
        note = {"format": "pt", "title": "LCM-LoRA of nativesd's embedded model: sampler LCM, 4 steps, guidance 1"}
        save_file(tensors, path, metadata=note)


def consistency(
    unet: UNet,
    lora: Lora,
    clean: Tensor,
    context: Tensor,
    empty: Tensor,
    alphas: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one batch: `clean` latents (B, C, h, w), their captions' context (B, T, w), and that of no words."""
    count = len(clean)
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    times = ((1000 // GRID * uniform**0.6).long() + 1) * GRID - 1  # more at high noise
    earlier = (times - STRIDE).clamp(min=0)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    times, earlier = times.to(clean.device), earlier.to(clean.device)
    alpha, nearer = (alphas[t][:, None, None, None] for t in (times, earlier))
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def answer(x: Tensor, t: Tensor, alpha: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a velocity means."""
        with autocast(x.device.type):
            velocity = unet(x.contiguous(memory_format=torch.channels_last), t, words).float()
        return alpha.sqrt() * x - (1 - alpha).sqrt() * velocity, alpha.sqrt() * velocity + (1 - alpha).sqrt() * x

    with torch.no_grad():
        lora.switch(False)
        told, plain = answer(noisy, times, alpha, context), answer(noisy, times, alpha, empty.expand_as(context))
        begin, left = (p + GUIDANCE * (t - p) for t, p in zip(told, plain, strict=True))
        lora.switch(True)
        further, _ = answer(nearer.sqrt() * begin + (1 - nearer).sqrt() * left, earlier, nearer, context)
        wanted = torch.where(earlier[:, None, None, None] < GRID, begin, further)  # the boundary: almost clean
    made, _ = answer(noisy, times, alpha, context)
    return F.huber_loss(made, wanted, delta=0.1)


def train(work: Path, device: str, steps: int, batch: int) -> Lora:
    """Distil the exported model on the scenes and captions of its training."""
    torch.manual_seed(SEED)
    pipe = nativesd.load(device=device, dtype="float32", fast=False)
    every = scenes.scenes()
    with autocast(device):
        latents = encode_scenes(pipe.vae, every, device)[0].float()  # type: ignore[arg-type]
    tokens = torch.tensor(ClipTokenizer(pad=0).encode([*map(scenes.caption, every), ""]), device=device)
    unet, encoder = pipe.unet, pipe.text_encoders[0]
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    lora = Lora(unet)
    lora.changes.to(device)
    optimizer = torch.optim.AdamW(lora.changes.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = Checkpoint(work / "lcm.pt", lora=lora.changes, optimizer=optimizer)
    start = checkpoint.load()
    weights = torch.tensor([(1 - LARGE_SHARE) / len(scenes.PLACES) if s.small else LARGE_SHARE for s in every])
    alphas = alphas_cumprod(pipe.config.scheduler).float().to(device)
    clock, running = time.perf_counter(), 0.0
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = 3e-4 * cosine(step, steps, warmup=20)
        generator = torch.Generator().manual_seed(SEED + step)
        pick = torch.multinomial(weights, batch, replacement=True, generator=generator).to(device)
        with torch.no_grad():
            context = encoder(torch.cat([tokens[pick], tokens[-1:]])).hidden
        loss = consistency(unet, lora, latents[pick], context[:-1], context[-1:], alphas, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(lora.changes.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == start else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0 or step == steps - 1:
            print(f"lcm {step} loss {running:.5f} {time.perf_counter() - clock:.0f}s", flush=True)
        if step % 40 == 39 or step == steps - 1:
            checkpoint.save(step + 1)
    return lora


def main() -> None:
    """Train what is not trained yet, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--out", type=Path, default=LCM_LORA, help="file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train(args.work, args.device, args.steps, args.batch).save(args.out)


if __name__ == "__main__":
    main()
