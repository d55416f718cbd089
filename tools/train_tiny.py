"""Trains the embedded model from nothing: the VAE, then the text encoder and the UNet together, then a ControlNet.

    python tools/train_tiny.py --work DIR [--out nativesd/tiny]

One fixed seed.

Stages leave a checkpoint in DIR every few minutes and go on from it, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny_scenes as scenes
from nativesd.config import ControlNetConfig, Level, TextEncoderConfig, UNetConfig, VAEConfig
from nativesd.models.clip import TextEncoder
from nativesd.models.controlnet import ControlNet
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.pictures.preprocess import canny
from nativesd.sampling.published import SchedulerConfig
from nativesd.sampling.schedule import alphas_cumprod
from nativesd.text.tokenizer import ClipTokenizer
from nativesd.weights.checkpoint import unmap
from nativesd.weights.maps.keymap import load_table
from nativesd.weights.maps.published import controlnet_json, model_index, scheduler_json, text_json, unet_json, vae_json

SIZE = 64
SEED = 20261121
VAE_CONFIG = VAEConfig(widths=(32, 64, 96), layers=1, groups=8)
TEXT_CONFIG = TextEncoderConfig(width=80, layers=2, heads=5, mlp=320, activation="gelu")
UNET_CONFIG = UNetConfig(
    levels=(Level(64, (None,), (None, None), 2), Level(144, (1,), (1, 1), 4), Level(224, (1,), (1, 1), 7)),
    mid=(1, None), context=80, linear_projection=True, groups=16,
)  # fmt: skip
# no transformers going down: 9.5 MB in float16, a third of the UNet's size
CONTROL_CONFIG = ControlNetConfig(
    unet=replace(UNET_CONFIG, levels=tuple(replace(level, down=(None,), up=()) for level in UNET_CONFIG.levels)),
    hint_widths=(16, 32, 64),
)
CONTROL_PICTURES = 12_000
LARGE_SHARE = 0.6  # of the training pictures


def autocast(device: str) -> torch.autocast:
    """bfloat16 arithmetic over float32 weights."""
    return torch.autocast(device, dtype=torch.bfloat16)


def cosine(step: int, total: int, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then a half cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total))


def rate(step: int, total: int, warmup: int = 100, first: int = 5000, decay: float = 0.3) -> float:
    """Learning rate of the diffusion: 1.5e-3 for the `first` steps, then 4e-4; linear warm-up, and linear to zero over
    the last `decay` of the steps."""
    return (1.5e-3 if step < first else 4e-4) * min(1.0, (step + 1) / warmup, (total - step) / (decay * total))


def save_grid(images: Tensor, path: Path, columns: int = 16) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as one picture, rows of `columns`."""
    array = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(array[i : i + columns]), axis=1) for i in range(0, len(array), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


class Checkpoint:
    """Weights, optimiser and step of one stage in one file, written to a temporary name and renamed."""

    def __init__(self, path: Path, **parts: nn.Module | torch.optim.Optimizer) -> None:
        self.path, self.parts = path, parts

    def load(self) -> int:
        """Restore everything; the step to go on with (0 where there is no file)."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write everything."""
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"step": step}
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)


def random_pictures(rng: np.random.Generator, batch: int, art: dict[int, np.ndarray]) -> Tensor:
    """Subjects of any prepared size, anywhere, on the palette's or any colour: (B, 3, SIZE, SIZE) in [-1, 1]."""
    palette = list(scenes.BACKGROUNDS.values())
    pictures = []
    for _ in range(batch):
        side = list(art)[rng.integers(len(art))]
        plain = palette[rng.integers(len(palette))] if rng.random() < 0.7 else tuple(rng.integers(0, 256, 3))
        x, y = rng.integers(0, SIZE - side + 1, 2)
        pictures.append(scenes.compose(art[side][rng.integers(len(art[side]))], plain, SIZE, x, y))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1


def train_vae(work: Path, device: str, steps: int, batch: int, lr: float) -> VAE:
    """Reconstruction (absolute, and of the picture's gradients) with a slight pull of the latents to N(0, 1).

    Quarter-size crops first, whole pictures for the last sixth: on a CPU that is four times the steps in a given time.
    """
    torch.manual_seed(SEED)
    vae = VAE(VAE_CONFIG)
    with torch.no_grad():  # a posterior of std 1 would drown the latents while they are still small
        vae.quant_conv.bias[VAE_CONFIG.latent_channels :] = -4.0
    vae.to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = Checkpoint(work / "vae.pt", vae=vae, optimizer=optimizer)
    start = checkpoint.load()
    large, small = round(scenes.LARGE * SIZE), round(scenes.SMALL * SIZE)
    art = {side: scenes.artworks(side) for side in (large, small, (large + small) // 2)}
    clock = time.perf_counter()
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = lr * cosine(step, steps)
        rng = np.random.default_rng([SEED, step])
        images = random_pictures(rng, batch, art).to(device)
        if step < steps * 5 // 6:
            i, j = rng.integers(0, SIZE // 2 + 1, 2)
            images = images[:, :, i : i + SIZE // 2, j : j + SIZE // 2]
        torch.manual_seed(SEED + step)
        with autocast(device):
            mean, logvar = vae.encode(images)
            latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            output = vae.decode(latents)
        output, mean, logvar = output.float(), mean.float(), logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        edges = sum(F.l1_loss(output.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
        loss = F.l1_loss(output, images) + 0.5 * edges + 3e-5 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            error = (output.detach() - images).abs().mean() * 127.5
            seconds = time.perf_counter() - clock
            print(
                f"vae {step} loss {loss.item():.4f} error {error:.2f}/255 kl {kl.item():.2f} {seconds:.0f}s", flush=True
            )
        if step % 250 == 249 or step == steps - 1:
            checkpoint.save(step + 1)
            save_grid(torch.cat([images[:16], output.detach()[:16]]), work / "vae.png")
    return vae.eval()


@torch.no_grad()
def encode_scenes(vae: VAE, every: list[scenes.Scene], device: str) -> tuple[Tensor, float]:
    """Latents of all training pictures, scaled to unit variance, and that scale."""
    large, small = (scenes.artworks(round(side * SIZE)) for side in (scenes.LARGE, scenes.SMALL))
    means = []
    for start in range(0, len(every), 64):
        pictures = np.stack([scenes.render(scene, SIZE, large, small) for scene in every[start : start + 64]])
        mean, _ = vae.encode((torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1).to(device))
        means.append(mean)
    latents = torch.cat(means)
    scaling = 1 / float(latents.std())
    return latents * scaling, scaling


def train_diffusion(work: Path, device: str, vae: VAE, steps: int, batch: int) -> float:
    """Text encoder and UNet together, v-prediction; returns the latents' scaling.

    A tenth of the captions is empty, a tenth has no colour. What is exported is the moving average of the weights.
    """
    torch.manual_seed(SEED)
    every = scenes.scenes()
    latents, scaling = encode_scenes(vae, every, device)
    tokenizer = ClipTokenizer(pad=0)
    captions = [[scenes.caption(scene, background=flag) for scene in every] for flag in (True, False)] + [[""]]
    with_colour, without, empty = (torch.tensor(tokenizer.encode(rows), device=device) for rows in captions)
    model = nn.ModuleDict({"text_encoder": TextEncoder(TEXT_CONFIG), "unet": UNet(UNET_CONFIG)})
    embedding = model["text_encoder"].token_embedding.weight
    with torch.no_grad():  # words that no caption has stay zero: they say nothing rather than noise
        used = torch.cat([with_colour.flatten(), without.flatten(), empty.flatten()]).unique().cpu()
        embedding.zero_()
        embedding[used] = 0.3 * torch.randn(len(used), TEXT_CONFIG.width)
        model["text_encoder"].position_embedding.weight.normal_(std=0.1)
    model.to(device, memory_format=torch.channels_last)  # a tenth faster on a CPU
    ema = nn.ModuleDict({"text_encoder": TextEncoder(TEXT_CONFIG), "unet": UNet(UNET_CONFIG)}).to(device)
    ema.load_state_dict(model.state_dict())
    ema.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = Checkpoint(work / "diffusion.pt", model=model, ema=ema, optimizer=optimizer)
    start = checkpoint.load()
    small = torch.tensor([scene.small for scene in every])
    weights = torch.where(small, (1 - LARGE_SHARE) / small.sum(), LARGE_SHARE / (~small).sum())
    alphas = alphas_cumprod(SchedulerConfig()).float().to(device)
    clock, running = time.perf_counter(), 0.0
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        generator = torch.Generator().manual_seed(SEED + step)
        pick = torch.multinomial(weights, batch, replacement=True, generator=generator)
        kind = torch.rand(batch, generator=generator)[:, None].to(device)
        # stratified, so that every batch covers the range; more at high noise, where the subject is decided
        uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        times = (1000 * uniform**0.75).long().clamp(max=999).to(device)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator).to(device)
        pick = pick.to(device)
        tokens = torch.where(kind < 0.1, empty, torch.where(kind < 0.2, without[pick], with_colour[pick]))
        alpha = alphas[times][:, None, None, None]
        clean = latents[pick]
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with autocast(device):
            context = model["text_encoder"](tokens).hidden
            output = model["unet"](noisy, times, context)
        loss = F.mse_loss(output.float(), velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9995, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"diffusion {step} loss {running:.4f} {time.perf_counter() - clock:.0f}s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            checkpoint.save(step + 1)
    return scaling


def control_pictures(vae: VAE, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, 4, h, w), edges (N, 1, SIZE, SIZE) uint8, and (N, 2) which subject on which background.

    Subjects of any size from half to whole, anywhere, half of them mirrored: only the edges say where they are.
    """
    rng = np.random.default_rng(SEED)
    art = {side: scenes.artworks(side) for side in range(SIZE // 2, SIZE, 4)}
    colours = list(scenes.BACKGROUNDS.values())
    latents, edges, drawn = [], [], []
    while len(drawn) < CONTROL_PICTURES:
        pictures = []
        while len(pictures) < 100:
            subject, background = int(rng.integers(len(scenes.subjects()))), int(rng.integers(len(colours)))
            side = list(art)[rng.integers(len(art))]
            x, y = rng.integers(0, SIZE - side + 1, 2)
            drawing = art[side][subject]
            if scenes.held_out(subject, background):
                continue
            if rng.random() < 0.5:
                drawing = drawing[:, ::-1]
            picture = scenes.compose(drawing, colours[background], SIZE, x, y)
            pictures.append(picture)
            drawn.append((subject, background))
            hint = canny(Image.fromarray((picture * 255).round().astype(np.uint8)))
            edges.append(torch.from_numpy(np.asarray(hint)[None, :, :, 0].copy()))
        device = vae.quant_conv.weight.device
        batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(device)  # (B, H, W, 3) -> (B, 3, H, W)
        with torch.no_grad():
            latents.append(vae.encode(batch * 2 - 1)[0] * scaling)
    return torch.cat(latents), torch.stack(edges), torch.tensor(drawn)


def train_control(work: Path, device: str, vae: VAE, scaling: float, steps: int, batch: int) -> None:
    """A ControlNet of Canny edges for the finished model, begun as a copy of the UNet's encoder.

    A third of the captions is empty, and a third names another subject on the right background: the outline has to
    come from the edges, whatever the words say.
    """
    torch.manual_seed(SEED)
    latents, edges, drawn = control_pictures(vae, scaling)
    latents, edges = latents.to(device), edges.to(device)
    parts = nn.ModuleDict({"text_encoder": TextEncoder(TEXT_CONFIG), "unet": UNet(UNET_CONFIG)})
    Checkpoint(work / "diffusion.pt", ema=parts).load()
    parts.requires_grad_(False).to(device, memory_format=torch.channels_last)
    colours = range(len(scenes.BACKGROUNDS))
    captions = [scenes.caption(scenes.Scene(s, b)) for s in range(len(scenes.subjects())) for b in colours]
    tokens = torch.tensor(ClipTokenizer(pad=0).encode([*captions, ""]), device=device)
    with torch.no_grad():
        contexts = parts["text_encoder"](tokens).hidden
    control = ControlNet(CONTROL_CONFIG)
    with torch.no_grad():
        shared, own = parts["unet"].state_dict(), control.state_dict()
        for name in shared.keys() & own.keys():
            own[name].copy_(shared[name])
        for conv in (*control.control_down, control.control_mid, control.hint.conv_out):
            conv.weight.zero_()
            conv.bias.zero_()
    control.to(device, memory_format=torch.channels_last)
    ema = ControlNet(CONTROL_CONFIG).to(device).requires_grad_(False)
    ema.load_state_dict(control.state_dict())
    optimizer = torch.optim.AdamW(control.parameters(), lr=4e-4, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = Checkpoint(work / "control.pt", control=control, ema=ema, optimizer=optimizer)
    start = checkpoint.load()
    alphas = alphas_cumprod(SchedulerConfig()).float().to(device)
    clock, running = time.perf_counter(), 0.0
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = 4e-4 * min(1.0, (step + 1) / 100, (steps - step) / (0.3 * steps))
        generator = torch.Generator().manual_seed(SEED + step)
        pick = torch.randint(len(latents), (batch,), generator=generator)
        kind = torch.rand(batch, generator=generator)
        other = torch.randint(len(scenes.subjects()), (batch,), generator=generator)
        subject, background = drawn[pick].unbind(1)
        named = torch.where(kind < 1 / 3, other, subject) * len(colours) + background
        context = contexts[torch.where(kind > 2 / 3, len(captions), named).to(device)]
        uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        times = (1000 * uniform**0.75).long().clamp(max=999).to(device)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator).to(device)
        pick = pick.to(device)
        alpha = alphas[times][:, None, None, None]
        clean, hint = latents[pick], (edges[pick].float() / 255).expand(-1, 3, -1, -1)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with autocast(device):
            residuals = control(noisy, times, context, hint)
            output = parts["unet"](noisy, times, context, residuals=residuals)
        loss = F.mse_loss(output.float(), velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(control.parameters()), 1 - decay)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"control {step} loss {running:.4f} {time.perf_counter() - clock:.0f}s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            checkpoint.save(step + 1)


def export(work: Path, out: Path, scaling: float) -> None:
    """The trained parts in the published folder layout, float16, as diffusers and nativesd open it."""
    vae, ema = VAE(VAE_CONFIG), nn.ModuleDict({"text_encoder": TextEncoder(TEXT_CONFIG), "unet": UNet(UNET_CONFIG)})
    Checkpoint(work / "vae.pt", vae=vae).load()
    Checkpoint(work / "diffusion.pt", ema=ema).load()
    control = ControlNet(CONTROL_CONFIG)
    Checkpoint(work / "control.pt", ema=control).load()
    weights = {
        "vae/diffusion_pytorch_model.safetensors": (vae, "vae.diffusers"),
        "unet/diffusion_pytorch_model.safetensors": (ema["unet"], "unet.diffusers"),
        "text_encoder/model.safetensors": (ema["text_encoder"], "text_encoder.transformers"),
        "controlnet/diffusion_pytorch_model.safetensors": (control, "controlnet.diffusers"),
    }
    for name, (module, table) in weights.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        published = unmap(module.state_dict(), load_table(table).bind())
        half = {key: tensor.half().contiguous() for key, tensor in published.items()}
        save_file(half, out / name, metadata={"format": "pt"})
    for name, data in published_configs(scaling).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(data, indent=2) + "\n")


def published_configs(scaling: float) -> dict[str, dict[str, Any]]:
    """model_index.json and every component's config, in the words of diffusers and transformers."""
    vae, scheduler = replace(VAE_CONFIG, scaling=scaling), scheduler_json("sd2", "v")
    return {
        "model_index.json": model_index("sd2", {"text_encoder": TEXT_CONFIG}, scheduler["_class_name"]),
        "scheduler/scheduler_config.json": scheduler,
        "unet/config.json": unet_json(UNET_CONFIG, SIZE // vae.factor),
        "vae/config.json": vae_json(vae, SIZE),
        "text_encoder/config.json": text_json(TEXT_CONFIG),
        "controlnet/config.json": controlnet_json(CONTROL_CONFIG),
    }


def main() -> None:
    """Train what is not trained yet, and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and progress pictures")
    parser.add_argument("--out", type=Path, default=Path("nativesd/tiny"), help="model folder to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vae-steps", type=int, default=4200)
    parser.add_argument("--steps", type=int, default=11000)
    parser.add_argument("--control-steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--export-only", action="store_true", help="write the latest checkpoints without training on")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.export_only:
        vae = train_vae(args.work, args.device, steps=args.vae_steps, batch=16, lr=1.5e-3)
        scaling = train_diffusion(args.work, args.device, vae, steps=args.steps, batch=args.batch)
        (args.work / "scaling.json").write_text(json.dumps(scaling))
        train_control(args.work, args.device, vae, scaling, steps=args.control_steps, batch=args.batch)
    export(args.work, args.out, json.loads((args.work / "scaling.json").read_text()))


if __name__ == "__main__":
    main()
