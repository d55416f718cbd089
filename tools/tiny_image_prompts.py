"""Trains the embedded model's image encoder and IP-Adapter: the subject of a picture, on the background of the text.

    python tools/tiny_image_prompts.py --work DIR [--out nativesd/tiny/ip_adapter]

It takes the model as it is exported (`train_tiny`), with its LCM-LoRA (`tiny_lcm`), and sees the same drawings. One
fixed seed. The checkpoints in DIR are gone on from, so the command can be stopped and repeated.

1. The encoder learns which drawing a picture shows, wherever, however large and on whatever colour: its embedding is
   one number for each of the drawings.
2. A first adapter, which is told the drawing's number in place of a picture, learns to add at every attention of the
   UNet what the subject's name adds: the UNet is run once for many captions, and what its attentions are asked and find
   is kept. Its keys and values begin as copies of those for the text (Ye et al. 2023, "IP-Adapter", arXiv 2308.06721;
   tencent-ailab/IP-Adapter tutorial_train.py).
3. With the UNet as it is, the first adapter learns to have the UNet answer to a caption without the subject as it
   answers to the caption with the subject.
4. The adapter, of the plus form, has its keys and values, and learns to see in a picture the tokens that the first one
   has for the number.

The files have the names and the keys of the published IP-Adapters. Those that travel were made by these stages in about
three hours on a part of two cores, in several runs between which the stages were changed: a repeat differs from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nativesd
import tiny_scenes as scenes
from nativesd.config import IPAdapterConfig, UNetConfig, VisionEncoderConfig
from nativesd.models.clip_vision import VisionEncoder
from nativesd.models.ip_adapter import IPAdapter, StateResampler
from nativesd.models.layers import Attention, attention
from nativesd.models.unet import ImageContext, UNet
from nativesd.pictures.clip import MEAN, STD
from nativesd.sampling.schedule import alphas_cumprod
from nativesd.shipped import LCM_LORA, TINY
from nativesd.text.tokenizer import ClipTokenizer
from nativesd.text.words import SHOWN
from nativesd.weights.checkpoint import unmap
from nativesd.weights.maps.keymap import load_table
from nativesd.weights.maps.published import vision_json
from train_tiny import LARGE_SHARE, SEED, SIZE, Checkpoint, autocast, cosine, encode_scenes

ENCODER = VisionEncoderConfig(
    width=160, layers=6, heads=5, mlp=640, activation="gelu", projection=160, image=SIZE, patch=8
)
TOKENS = 16
CODE = 12.0
"""The number that stands for a drawing in what the first adapter is told."""
SEEN = 288  # pictures of every drawing, of which the resampler learns
ADAPTER_FILE = "ip-adapter_tiny.safetensors"
COLOURS = list(scenes.BACKGROUNDS.values())
WAYS = [(False, 0), *((True, place) for place in range(len(scenes.PLACES)))]
"""How a subject is shown in the scenes: whether small, and where."""


def adapter_config(unet: UNetConfig) -> IPAdapterConfig:
    """The plus form for a UNet; diffusers' has four layers, of four times as many numbers within (`ffn_ratio`)."""
    widths = tuple(place.width for place in unet.cross_attentions)
    return IPAdapterConfig(
        "plus", widths, unet.context, ENCODER.width, TOKENS, width=128, heads=2, depth=4, hidden=4 * 128
    )


def first_config(unet: UNetConfig) -> IPAdapterConfig:
    """The first adapter's: the base form, with as many tokens."""
    plus = adapter_config(unet)
    return IPAdapterConfig("base", plus.widths, plus.context, len(scenes.subjects()), plus.tokens)


def own_pictures(work: Path, each: int = 10) -> tuple[Tensor, Tensor]:
    """Pictures (N, SIZE, SIZE, 3) uint8 that the model itself makes, `each` of every subject, and which it is (N,)."""
    path = work / "own.safetensors"
    if not path.exists():
        pipe = nativesd.load(device="cpu", dtype="float32")
        rng = np.random.default_rng(SEED)
        pictures, drawn = [], []
        for subject in range(len(scenes.subjects())):
            allowed = [b for b in range(len(COLOURS)) if not scenes.held_out(subject, b)]
            some = [
                scenes.Scene(subject, int(rng.choice(allowed)), *(WAYS[rng.integers(6)] if k % 2 else WAYS[0]))
                for k in range(each)
            ]
            made = pipe(
                [scenes.caption(scene) for scene in some], seed=1000 * subject, loras=[LCM_LORA], sampler="LCM",
                steps=4, guidance_scale=1,
            )  # fmt: skip
            pictures += [torch.from_numpy(np.array(image)) for image in made.images]
            drawn += [subject] * each
        save_file({"pictures": torch.stack(pictures), "subjects": torch.tensor(drawn)}, path)
    tensors = load_file(path)
    return tensors["pictures"], tensors["subjects"]


@dataclass
class Gallery:
    """Pictures to be shown to the encoder: drawings, and pictures that the model made."""

    art: dict[int, np.ndarray]
    own: Tensor
    by_subject: list[np.ndarray]

    @classmethod
    def open(cls, work: Path) -> Gallery:
        """The drawings of many sizes, and the model's pictures."""
        own, drawn = own_pictures(work)
        found = [np.flatnonzero(drawn.numpy() == subject) for subject in range(len(scenes.subjects()))]
        return cls({side: scenes.artworks(side) for side in range(26, SIZE + 1, 2)}, own, found)

    def show(self, subjects: Tensor, rng: np.random.Generator) -> Tensor:
        """One picture of each subject, anywhere, of any size, on any colour; normalised, (B, 3, SIZE, SIZE)."""
        pictures = np.stack([self._one(int(subject), rng) for subject in subjects])
        count = len(pictures)
        gain, lift = rng.uniform(0.9, 1.1, (count, 1, 1, 3)), rng.uniform(-0.04, 0.04, (count, 1, 1, 3))
        noise = rng.standard_normal(pictures.shape, np.float32) * rng.uniform(0, 0.04, (count, 1, 1, 1))
        changed = torch.from_numpy((pictures * gain + lift + noise).clip(0, 1).astype(np.float32))
        return normalised(changed)

    def _one(self, subject: int, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < 0.2:
            made: np.ndarray = self.own[rng.choice(self.by_subject[subject])].numpy().astype(np.float32) / 255
            return made
        side = int(rng.choice(list(self.art)))
        plain = tuple(rng.integers(0, 256, 3))
        if rng.random() < 0.6:
            plain = COLOURS[rng.integers(len(COLOURS))]
        x, y = rng.integers(0, SIZE - side + 1, 2)
        drawing = self.art[side][subject]
        return scenes.compose(drawing[:, ::-1] if rng.random() < 0.2 else drawing, plain, SIZE, x, y)


def normalised(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) in [0, 1] as CLIP's encoders take them: (B, 3, H, W)."""
    return ((pictures - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


class Words:
    """What the text encoder says of captions."""

    def __init__(self, pipe: nativesd.Pipeline) -> None:
        self._encoder, self._tokenizer = pipe.text_encoders[0], ClipTokenizer(pad=0)

    @torch.no_grad()
    def context(self, captions: list[str]) -> Tensor:
        """(B, T, context)."""
        hidden: Tensor = self._encoder(torch.tensor(self._tokenizer.encode(captions))).hidden
        return hidden


def codes(subjects: Tensor) -> Tensor:
    """What the first adapter is told (B, subjects): not quite clear, so that its keys and values bear such tokens."""
    clear = F.one_hot(subjects, len(scenes.subjects())).float()
    other = clear[torch.randperm(len(clear))] * 0.4 * torch.rand(len(clear), 1) * (torch.rand(len(clear), 1) < 0.3)
    return CODE * (clear * (0.7 + 0.35 * torch.rand(len(clear), 1)) + other + 0.05 * torch.randn_like(clear))


def train_encoder(work: Path, gallery: Gallery, steps: int, batch: int) -> VisionEncoder:
    """Which drawing it is, with its embedding for the logits."""
    torch.manual_seed(SEED)
    encoder = VisionEncoder(ENCODER)
    with torch.no_grad():
        for parameter in (encoder.class_embedding, encoder.position_embedding.weight):
            parameter.normal_(std=0.02)
    optimizer = torch.optim.AdamW(encoder.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint = Checkpoint(work / "encoder.pt", encoder=encoder, optimizer=optimizer)
    right = 0.0
    for step in range(start := checkpoint.load(), steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(step, steps, warmup=150)
        rng = np.random.default_rng([SEED, 1, step])
        subjects = torch.from_numpy(rng.integers(0, len(gallery.by_subject), batch))
        with autocast("cpu"):
            embedding = encoder(gallery.show(subjects, rng)).embedding.float()
        loss = F.cross_entropy(embedding, subjects, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        share = float((embedding.argmax(1) == subjects).float().mean())
        right = share if step == start else 0.98 * right + 0.02 * share
        if step % 50 == 0 or step == steps - 1:
            print(f"encoder {step} right {right:.3f}", flush=True)
        if step % 250 == 249 or step == steps - 1:
            checkpoint.save(step + 1)
    return encoder


@dataclass(frozen=True)
class Lesson:
    """What the UNet is asked with a picture, and what it would be asked for the same without one."""

    scene: scenes.Scene
    """That the noisy latents are of."""
    said: str
    """Beside the picture."""
    meant: str
    """Without it."""
    shown: bool
    """Whether there is a picture, or zeros in its place."""


def lesson(every: list[scenes.Scene], weights: np.ndarray, rng: np.random.Generator) -> Lesson:
    """A scene, of which the text says all but the subject, or all, or nothing but that there is a picture; or there is
    no picture, which has to leave the text alone."""
    scene = every[rng.choice(len(every), p=weights)]
    large = scenes.Scene(scene.subject, scene.background)
    kind = rng.random()
    if kind < 0.5:
        return Lesson(large, subjectless(large), scenes.caption(large), True)
    if kind < 0.70:
        return Lesson(scene, subjectless(scene), scenes.caption(scene), True)
    if kind < 0.80:
        return Lesson(scene, scenes.caption(scene), scenes.caption(scene), True)
    if kind < 0.88:
        return Lesson(large, ["", f"a {SHOWN}"][rng.integers(2)], scenes.caption(large, background=False), True)
    said = ["", subjectless(scene), scenes.caption(scene)][rng.integers(3)]
    return Lesson(scene, said, said, False)


def subjectless(scene: scenes.Scene) -> str:
    """A scene's caption with 'picture' for its subject, such as 'a small picture on the left on a yellow background'.

    The word stands where the UNet looks for the subject, and says nothing: no caption of the model's own training has
    it. In 'a yellow background' the colour would stand there, and is not heard.
    """
    _, _, after = scenes.caption(scene).partition(scenes.subjects()[scene.subject])
    return f"a {'small ' if scene.small else ''}{SHOWN}{after}"


def keys_and_values(adapter: IPAdapter, tokens: Tensor, unet: UNetConfig) -> ImageContext:
    """One group of tokens (B, S, context) for all of a UNet's attentions."""
    every = adapter.keys_values(tokens)
    widths = [place.width for place in unet.cross_attentions]
    keys, values = (
        {width: torch.stack([e[part] for e, w in zip(every, widths, strict=True) if w == width])[:, :, None]
         for width in set(widths)}
        for part in (0, 1)
    )  # fmt: skip
    return ImageContext(keys, values)  # (L, B, 1, S, width)


def text_attentions(unet: UNet) -> list[Attention]:
    """Those that attend to the text, in the order of `UNetConfig.cross_attentions`."""
    out = []
    for place in unet.config.cross_attentions:
        stage = "mid" if place.part == "mid" else f"{place.part}.{place.stage}"
        found = unet.get_submodule(f"{stage}.attentions.{place.layer}.blocks.{place.block}.attn2")
        assert isinstance(found, Attention)
        out.append(found)
    return out


@dataclass(frozen=True)
class Batch:
    """Lessons as the UNet takes them."""

    noisy: Tensor
    times: Tensor
    said: Tensor
    meant: Tensor
    subjects: Tensor
    shown: Tensor
    """(B, 1): 0 where there is no picture."""


class School:
    """The lessons, with the latents and the contexts that they need."""

    def __init__(self, pipe: nativesd.Pipeline) -> None:
        self.unet = cast("UNet", pipe.unet).requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._words, self._every = Words(pipe), scenes.scenes()
        self._places = {scene: number for number, scene in enumerate(self._every)}
        with autocast("cpu"):
            self._latents = encode_scenes(pipe.vae, self._every, "cpu")[0].float()  # type: ignore[arg-type]
        weights = np.array([(1 - LARGE_SHARE) / len(scenes.PLACES) if s.small else LARGE_SHARE for s in self._every])
        self._weights = weights / weights.sum()
        self._alphas = alphas_cumprod(pipe.config.scheduler).float()

    def _other(self, scene: scenes.Scene, rng: np.random.Generator) -> int:
        """A subject that is painted on the same background."""
        every = range(len(scenes.subjects()))
        return int(rng.choice([s for s in every if not scenes.held_out(s, scene.background)]))

    def batch(self, rng: np.random.Generator, count: int, *, shown: bool = False) -> Batch:
        """So many lessons; with `shown` such in which the picture is needed."""
        lessons: list[Lesson] = []
        while len(lessons) < count:
            each = lesson(self._every, self._weights, rng)
            if not shown or each.said != each.meant:
                lessons.append(each)
        clean = self._latents[[self._places[each.scene] for each in lessons]]
        # half of them begin to be something else: what the UNet then does shows most of what it was asked for
        others = [replace(e.scene, subject=self._other(e.scene, rng)) for e in lessons]
        away = rng.random((count, 1, 1, 1), np.float32) * (rng.random((count, 1, 1, 1)) < 0.5)
        clean = clean.lerp(self._latents[[self._places[each] for each in others]], torch.from_numpy(away).float())
        # stratified, so that every batch covers the range; more at high noise, where the subject is decided
        uniform = (np.arange(count) + rng.random(count)) / count
        times = torch.from_numpy((1000 * uniform**0.7).astype(np.int64).clip(max=999))
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
        alpha = self._alphas[times][:, None, None, None]
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        return Batch(
            noisy, times,
            self._words.context([e.said for e in lessons]), self._words.context([e.meant for e in lessons]),
            torch.tensor([e.scene.subject for e in lessons]), torch.tensor([[float(e.shown)] for e in lessons]),
        )  # fmt: skip


@torch.no_grad()
def attended(school: School, count: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of every attention the queries (N, T, C) and what the subject's name adds to what they find, bfloat16; and the
    subjects (N,)."""
    attentions, asked = text_attentions(school.unet), dict[int, Tensor]()
    hooks = [
        each.to_q.register_forward_hook(lambda module, given, made, number=number: asked.update({number: made}))
        for number, each in enumerate(attentions)
    ]
    queries, added = [list[Tensor]() for _ in attentions], [list[Tensor]() for _ in attentions]
    subjects = []
    for number in range(count // 32):
        batch = school.batch(np.random.default_rng([SEED, 2, number]), 32, shown=True)
        with autocast("cpu"):
            school.unet(batch.noisy, batch.times, batch.meant)
            for place, each in enumerate(attentions):
                meant, said = (
                    attention(asked[place], *each.keys_values(text), each.heads).float()
                    for text in (batch.meant, batch.said)
                )
                queries[place].append(asked[place].bfloat16())
                added[place].append((meant - said).bfloat16())
        subjects.append(batch.subjects)
    for hook in hooks:
        hook.remove()
    return [torch.cat(each) for each in queries], [torch.cat(each) for each in added], torch.cat(subjects)


def fit_adapter(work: Path, school: School, steps: int, batch: int, count: int = 5120) -> IPAdapter:
    """The first adapter's tokens, keys and values, by what attentions add."""
    torch.manual_seed(SEED)
    adapter = IPAdapter(first_config(school.unet.config))
    attentions = text_attentions(school.unet)
    for text, to_k, to_v in zip(attentions, adapter.to_k, adapter.to_v, strict=True):
        to_k.load_state_dict(text.to_k.state_dict())  # type: ignore[union-attr]
        to_v.load_state_dict(text.to_v.state_dict())  # type: ignore[union-attr]
    checkpoint = Checkpoint(work / "fitted.pt", adapter=adapter)
    if checkpoint.load() == steps:
        return adapter
    queries, added, subjects = attended(school, count)
    scales = [each.float().pow(2).mean() for each in added]
    optimizer = torch.optim.Adam(adapter.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * cosine(step, steps, warmup=20)
        pick = torch.randint(len(subjects), (batch,))
        given = torch.cat([codes(subjects[pick]), torch.zeros(1, len(scenes.subjects()))])
        losses, nothing = [], []
        for place, (k, v) in enumerate(adapter.keys_values(adapter.tokens(given, None))):
            made = attention(queries[place][pick].float(), k[:-1], v[:-1], attentions[place].heads)
            losses.append(F.mse_loss(made, added[place][pick].float()) / scales[place])
            nothing.append(v[-1].pow(2).mean() / scales[place])
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.1 * torch.stack(nothing).mean()).backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"fitted {step} loss {loss.item():.4f} of 1", flush=True)
    checkpoint.save(steps)
    return adapter


def train_adapter(work: Path, school: School, adapter: IPAdapter, steps: int, batch: int) -> IPAdapter:
    """The UNet with the first adapter is to answer as it does with the subject in the text; returns the moving
    average."""
    unet, ema = school.unet, copy.deepcopy(adapter).requires_grad_(False)
    optimizer = torch.optim.AdamW(adapter.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = Checkpoint(work / "adapter.pt", adapter=adapter, ema=ema, optimizer=optimizer)
    clock, running = time.perf_counter(), 0.0
    for step in range(start := checkpoint.load(), steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, steps, warmup=30)
        torch.manual_seed(SEED + step)
        each = school.batch(np.random.default_rng([SEED, 3, step]), batch)
        embedding = codes(each.subjects) * each.shown
        with autocast("cpu"):
            with torch.no_grad():
                wanted = unet(each.noisy, each.times, each.meant).float()
            images = keys_and_values(adapter, adapter.tokens(embedding, None), unet.config)
            made = unet(each.noisy, each.times, each.said, images=images).float()
        loss = F.mse_loss(made, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(adapter.parameters()), 1 - decay)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0 or step == steps - 1:
            print(f"adapter {step} loss {running:.5f} {time.perf_counter() - clock:.0f}s", flush=True)
        if step % 100 == 99 or step == steps - 1:
            checkpoint.save(step + 1)
    return ema


def train_resampler(
    work: Path, gallery: Gallery, encoder: VisionEncoder, first: IPAdapter, unet: UNetConfig, steps: int, batch: int
) -> IPAdapter:
    """The plus form, with the keys and values of the first adapter, whose tokens it is to see in pictures."""
    torch.manual_seed(SEED)
    adapter, subjects = IPAdapter(adapter_config(unet)), len(gallery.by_subject)
    adapter.to_k.load_state_dict(first.to_k.state_dict())
    adapter.to_v.load_state_dict(first.to_v.state_dict())
    resampler = cast("StateResampler", adapter.projection)
    nn.init.normal_(resampler.latents, std=adapter.config.width**-0.5)
    optimizer = torch.optim.AdamW(resampler.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint = Checkpoint(work / "resampler.pt", adapter=adapter, optimizer=optimizer)
    every = torch.arange(subjects)
    with torch.no_grad(), autocast("cpu"):
        shown = (gallery.show(every, np.random.default_rng([SEED, 4, number])) for number in range(SEEN))
        states = torch.stack([encoder(pictures).hidden.bfloat16() for pictures in shown])  # (SEEN, subjects, S, W)
        nothing = encoder(torch.zeros(1, 3, SIZE, SIZE)).hidden
    with torch.no_grad():  # the last tokens are for no picture, which is one of zeros
        tokens = first.tokens(CODE * torch.cat([torch.eye(subjects), torch.zeros(1, subjects)]), None)
        apart = (tokens[:-1] - tokens[:-1].mean(0)).flatten(0, 1)  # (subjects * S, context)
        heard = [cast("nn.Linear", layer).weight for layer in (*adapter.to_k, *adapter.to_v)]
        # tokens that are off are as bad as the keys and values of them, in parts of how far apart the subjects' are
        weighed = torch.cat([each / F.linear(apart, each).pow(2).mean().sqrt() for each in heard])
        weighed /= len(weighed) ** 0.5
    running = 0.0
    for step in range(start := checkpoint.load(), steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, steps, warmup=60)
        seen = torch.randint(subjects, (batch,))
        given = states[torch.randint(SEEN, (batch,)), seen].float()
        given = torch.cat([given + 0.03 * given.std() * torch.randn_like(given), nothing.float()])
        with autocast("cpu"):
            made = resampler(given).float()
        off = made - tokens[torch.cat([seen, torch.tensor([subjects])])]
        loss = F.linear(off, weighed).pow(2).sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.3 * off.pow(2).mean() / apart.pow(2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(resampler.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == start else 0.97 * running + 0.03 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"resampler {step} off by {running:.4f} of 1", flush=True)
        if step % 250 == 249 or step == steps - 1:
            checkpoint.save(step + 1)
    return adapter


def export(encoder: VisionEncoder, adapter: IPAdapter, out: Path) -> None:
    """Both in float16, under the names that IP-Adapters are published with, as diffusers and nativesd open them."""
    weights: list[tuple[Path, nn.Module, str]] = [
        (out / ADAPTER_FILE, adapter, "ip_adapter"),
        (out / "image_encoder" / "model.safetensors", encoder, "image_encoder.transformers"),
    ]
    for path, module, table in weights:
        path.parent.mkdir(parents=True, exist_ok=True)
        published = unmap(module.state_dict(), load_table(table).bind())
        half = {key: tensor.detach().half().contiguous() for key, tensor in published.items()}
        save_file(half, path, metadata={"format": "pt"})
    (out / "image_encoder" / "config.json").write_text(json.dumps(vision_json(ENCODER), indent=2) + "\n")


def main() -> None:
    """Train what is not trained yet, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=TINY / "ip_adapter", help="folder to write")
    parser.add_argument("--encoder-steps", type=int, default=2000)
    parser.add_argument("--fit-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--resampler-steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    gallery = Gallery.open(args.work)
    encoder = train_encoder(args.work, gallery, args.encoder_steps, 2 * args.batch)
    school = School(nativesd.load(device="cpu", dtype="float32", fast=False))
    first = fit_adapter(args.work, school, args.fit_steps, 4 * args.batch)
    first = train_adapter(args.work, school, first, args.steps, args.batch)
    unet = school.unet.config
    adapter = train_resampler(args.work, gallery, encoder, first, unet, args.resampler_steps, 5 * args.batch)
    export(encoder, adapter, args.out)


if __name__ == "__main__":
    main()
