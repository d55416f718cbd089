"""The configurations of what stands beside a model: ControlNets, adapters, image encoders, TAESD; with the evidence."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from nativesd.config import (
    SD15_ADAPTER,
    SD15_LIGHT_ADAPTER,
    SDXL_ADAPTER,
    TAESD,
    UNETS,
    ControlNetConfig,
    IPAdapterConfig,
    IPAdapterKind,
    T2IAdapterConfig,
    TinyVAEConfig,
    UnionConfig,
    VisionEncoderConfig,
)
from nativesd.weights.identity.describe import unet_config
from nativesd.weights.identity.evidence import Evidence, Parameters, count, most, present, shapes_of


def controlnet_config(parameters: Parameters, pooled: int = 1280) -> tuple[ControlNetConfig, list[Evidence]]:
    """A ControlNet's configuration: the encoder's, and whether it tells several kinds of hint apart."""
    unet, evidence = unet_config(parameters, pooled)
    union = None
    if any(name.startswith(("task_embedding.", "transformer.", "kinds_embedding.")) for name in parameters):
        kinds = most((s[0] for s in shapes_of(parameters, r"task_embedding\.weight", 2) if s[0] in UNION_KINDS), 6)
        union = UnionConfig(kinds=kinds, layers=count(n for (n,) in present(parameters, r"transformer\.(\d+)\.", 8)))
        evidence.append(Evidence("union", f"{kinds} kinds of hint", "shape of task_embedding"))
    if not any("attn2" in name for name in parameters):
        context = 2048 if unet.added is not None else 1024 if unet.linear_projection else 768
        unet = replace(unet, context=context)
        why = "no cross-attention in the file; the family's"
        evidence = [e for e in evidence if e.what != "context"]
        evidence.append(Evidence("context", str(context), why, determined=False))
    return ControlNetConfig(unet, hint_widths=_hint_widths(parameters), union=union), evidence


def _hint_widths(parameters: Parameters) -> tuple[int, ...]:
    """Widths of a hint's encoder: the published ones, unless more of the file's layers have others."""
    published, found = ControlNetConfig.hint_widths, []
    names = ["hint.conv_in.weight", *(f"hint.blocks.{i}.weight" for i in range(1, 16, 2))]  # every second one strides
    for name in names:
        found += [shape[0] for shape in shapes_of(parameters, re.escape(name), 4)]
    same = sum(a == b for a, b in zip(found, published, strict=False))
    return published if same * 2 >= len(found) and len(found) <= len(published) else tuple(found)


UNION_KINDS = (6, 8)  # ControlNetUnion as first published, and promax


def tiny_vae_config(parameters: Parameters) -> tuple[TinyVAEConfig, list[Evidence]]:
    """TAESD's configuration: which halves are there, and the latents' channels (4, or 16 for later families)."""
    halves = {name.partition(".")[0] for name in parameters}
    half: Literal["encoder", "decoder"] | None = None
    if halves == {"encoder"}:
        half = "encoder"
    elif halves == {"decoder"}:
        half = "decoder"
    channels = [s[1] for s in shapes_of(parameters, r"decoder\.layers\.0\.weight", 4)]
    channels += [s[0] for s in shapes_of(parameters, r"encoder\.layers\.14\.weight", 4)]
    latent = most((n for n in channels if n in (4, 16)), 4)
    config = replace(TAESD, half=half, latent_channels=latent)
    return config, [Evidence("halves", half or "encoder and decoder", "which names there are")]


def t2i_adapter_config(parameters: Parameters) -> tuple[T2IAdapterConfig, list[Evidence]]:
    """A T2I-Adapter's configuration. Where it halves the picture, no name tells: as published for its input's width."""
    stages = count(i for (i,) in present(parameters, r"stages\.(\d+)\.", 4))
    light = any(re.match(r"stages\.\d+\.conv_out\.", name) for name in parameters)
    inputs = shapes_of(parameters, r"stages\.0\.conv_in\.weight" if light else r"conv_in\.weight", 4)
    wide = any({16 * 16, 3 * 16 * 16} & set(shape) or shape[1] > 2 * 3 * 8 * 8 for shape in inputs)
    base = SD15_LIGHT_ADAPTER if light else SDXL_ADAPTER if wide else SD15_ADAPTER
    channels = 1 if any(shape[1] == base.unshuffle**2 for shape in inputs) else 3
    layers = most(Counter(i for i, _ in present(parameters, r"stages\.(\d+)\.resnets\.(\d+)\.", 3)).values(), 2)
    config = replace(base, stages=base.stages[:stages] or base.stages, layers=layers, image_channels=channels)
    kind = "light" if light else "full"
    return config, [
        Evidence("form", f"{kind}, {stages} stages of {layers} blocks", "numbers of the blocks"),
        Evidence("downsampling", "SDXL's" if wide else "SD1.x's", "input channels of the first convolution"),
    ]


VISION_ENCODERS = {1024: "CLIP ViT-L/14", 1280: "OpenCLIP ViT-H/14", 1664: "OpenCLIP ViT-bigG/14"}
"""The published image encoders of adapters by their width."""
PROJECTIONS = {1024: 768, 1280: 1024, 1664: 1280}
"""Width of their pictures' embeddings."""


def vision_config(parameters: Parameters) -> tuple[VisionEncoderConfig, list[Evidence]]:
    """A CLIP image encoder's configuration. Heads and activation are those published for the width: 16 heads, and
    quick_gelu in OpenAI's own (ViT-L), the exact gelu in OpenCLIP's. Of other widths: heads of 64, and quick_gelu."""
    width = most((shape[0] for shape in shapes_of(parameters, r"layers\.\d+\.norm[12]\.\w+", 1)), 1280)
    patch = most((shape[2] for shape in shapes_of(parameters, r"patch_embedding\.weight", 4)), 14)
    cells = most((shape[0] - 1 for shape in shapes_of(parameters, r"position_embedding\.weight", 2)), 256)
    projection = most(
        (shape[0] for shape in shapes_of(parameters, r"projection\.weight", 2)), PROJECTIONS.get(width, 0)
    )
    config = VisionEncoderConfig(
        width=width,
        layers=count(n for (n,) in present(parameters, r"layers\.(\d+)\.", 8)),
        heads=16 if width in VISION_ENCODERS else max(width // 64, 1),
        mlp=most((shape[0] for shape in shapes_of(parameters, r"layers\.\d+\.mlp\.fc1\.weight", 2)), 4 * width),
        activation="gelu" if width in (1280, 1664) else "quick_gelu",
        projection=projection or None,
        image=math.isqrt(cells) * patch,
        patch=patch,
    )
    made_by = "OpenCLIP's" if config.activation == "gelu" else "OpenAI's"
    gives = f"states {width} wide" + (f", an embedding {projection} wide" if projection else ", and no embedding")
    return config, [
        Evidence("layers", f"{config.layers}, {width} wide", "numbers and norms of the layers"),
        Evidence("pictures", f"{config.image} pixels, patches of {patch}", "shapes of the embeddings"),
        Evidence("activation", config.activation, f"{made_by}, by the width", determined=False),
        Evidence("heads", str(config.heads), "as published for the width", determined=False),
        Evidence("gives", gives, "widths of the layers and of the projection"),
        Evidence("loaded by", "image_encoder=FILE (--image-encoder FILE)", "it encodes the pictures of image_prompts="),
    ]


IP_KINDS: dict[IPAdapterKind, str] = {
    "base": "a linear layer and a norm", "plus": "a resampler", "full": "an MLP of every state",
    "faceid": "an MLP of a face's identity", "faceid-plus": "a resampler that begins with a face's identity",
}  # fmt: skip
EMBEDDINGS = {768: "CLIP ViT-L/14", 1024: "OpenCLIP ViT-H/14", 1280: "OpenCLIP ViT-bigG/14"}
"""The published image encoders by the width of their embeddings."""


def ip_adapter_config(parameters: Parameters) -> tuple[IPAdapterConfig, list[Evidence]]:
    """An IP-Adapter's configuration: its kind by the projection's names, all else by their shapes.

    That the second version of FaceID plus adds its identity's tokens once more, no name tells.
    """
    context = most((shape[1] for shape in shapes_of(parameters, r"to_[kv]\.\d+\.weight", 2)), 768)
    kind = _ip_kind(parameters)
    prefix = r"projection\.resampler" if kind == "faceid-plus" else "projection"
    resampler = kind in ("plus", "faceid-plus")

    def sizes(pattern: str, axis: int, rank: int = 2) -> list[int]:
        return [shape[axis] for shape in shapes_of(parameters, pattern, rank)]

    width = most(sizes(prefix + r"\.layers\.\d+\.norm\w*\.(weight|bias)", 0, 1), context) if resampler else 0
    mlp = most([
        *sizes(r"projection\.fc1\.weight", 0), *sizes(r"projection\.fc2\.weight", 1),
        *sizes(r"projection\.fc1\.bias", 0, 1),
    ], 1024)  # fmt: skip
    widths = _attention_widths(parameters, context)
    known = any(widths == tuple(place.width for place in unet.cross_attentions) for unet in UNETS.values())
    image: int | None = None
    if kind == "base":
        said = sizes(r"projection\.linear\.weight", 1)
        image = _published(parameters, "projection.linear.weight", EMBEDDINGS, 1024) if known else most(said, 1024)
    elif kind == "full":
        image = most([*sizes(r"projection\.fc1\.weight", 1), mlp], 1280)
    elif resampler:
        said = sizes(prefix + r"\.proj_in\.weight", 1)
        name = prefix.replace("\\", "") + ".proj_in.weight"
        image = _published(parameters, name, VISION_ENCODERS, 1280) if known else most(said, 1280)
    tokens = {"plus": 16, "full": 257}.get(kind, 4)
    if kind == "base":
        both = [*sizes(r"projection\.linear\.weight", 0), *sizes(r"projection\.linear\.bias", 0, 1)]
        tokens = most((size // context for size in both if size and size % context == 0), tokens)
    elif kind == "plus":
        tokens = most(sizes(r"projection\.latents", 1, 3), tokens)
    elif kind != "full":
        both = [*sizes(r"projection\.fc2\.weight", 0), *sizes(r"projection\.fc2\.bias", 0, 1)]
        each = width or context
        tokens = most((size // each for size in both if size and size % each == 0), tokens)
    identity = most(sizes(r"projection\.fc1\.weight", 1), 512) if kind.startswith("faceid") else 512
    ranks = sizes(r"loras\.\d+\.\w+_down\.weight", 0)
    config = IPAdapterConfig(
        kind=kind,
        widths=widths,
        context=context,
        image=image,
        tokens=tokens,
        mlp=mlp if kind in ("full", "faceid", "faceid-plus") else 0,
        width=width,
        heads=max(most(sizes(prefix + r"\.layers\.\d+\.to_[qkv]\.weight", 0), width) // 64, 1) if resampler else 0,
        depth=count(n for (n,) in present(parameters, prefix + r"\.layers\.(\d+)\.", 5)) if resampler else 0,
        hidden=most(sizes(prefix + r"\.layers\.\d+\.fc1\.weight", 0), 4 * width) if resampler else 0,
        identity=identity,
        lora=most(ranks, 128) if len(ranks) > 4 else None,
    )
    takes = []
    if kind.startswith("faceid"):
        takes.append(f"a face's identity, {identity} numbers of a face recogniser")
    if kind == "base":
        takes.append(f"a picture's embedding, {image} wide ({EMBEDDINGS.get(image or 0, 'of a CLIP')})")
    elif image is not None:
        takes.append(f"a picture's states, {image} wide ({VISION_ENCODERS.get(image, 'of a CLIP')})")
    lora = [Evidence("LoRA", f"rank {config.lora}, merged into the UNet", "its names")] if config.lora else []
    return config, [
        Evidence("kind", f"{kind}: {IP_KINDS[kind]}, {tokens} tokens", "names and shapes of the projection"),
        Evidence("takes", " and ".join(takes), "shapes of the projection"),
        Evidence("attentions", f"{len(config.widths)}, context {context}", "numbers and shapes of to_k_ip and to_v_ip"),
        *lora,
        Evidence("loaded by", "image_prompts=[ImagePrompt(FILE, PICTURE)] (--image-prompt)", "it is an IP-Adapter"),
    ]


def _published(parameters: Parameters, name: str, known: Iterable[int], default: int) -> int:
    """The width that an encoder gives, which one tensor says: of one that is damaged, the published one it is near."""
    shape, widths = parameters.get(name, ()), set(known)
    near = [meant for last in shape[1:2] for meant in (last, last - 1, last + 1, last // 2)]
    return next((size for size in (*near, *shape) if size in widths), default)


def _ip_kind(parameters: Parameters) -> IPAdapterKind:
    """What most names of the projection are of."""
    names = {
        "base": ("projection.linear.",), "plus": ("projection.layers.", "projection.proj_", "projection.latents"),
        "full": ("projection.state_norm.",), "faceid-plus": ("projection.resampler.",),
    }  # fmt: skip
    votes = {kind: sum(name.startswith(begins) for name in parameters) for kind, begins in names.items()}
    kinds: tuple[IPAdapterKind, ...] = ("faceid-plus", "plus", "full", "base")
    best = max(kinds, key=lambda kind: votes[kind])
    return best if votes[best] else "faceid"


def _attention_widths(parameters: Parameters, context: int) -> tuple[int, ...]:
    """The widths of the cross-attentions: a published UNet's, if most of what is there agrees, else what is there."""
    pattern = re.compile(r"to_[kv]\.(\d+)\.weight")
    found: dict[int, list[int]] = {}
    for name, shape in parameters.items():
        if (match := pattern.fullmatch(name)) and len(shape) == 2:
            found.setdefault(int(match[1]), []).append(shape[0])
    own = {number: most(sizes, 0) for number, sizes in found.items()}
    for unet in UNETS.values():
        widths = tuple(place.width for place in unet.cross_attentions)
        agree = sum(own.get(number) == width for number, width in enumerate(widths))
        if unet.context == context and 2 * agree > max(len(widths), len(own)) and abs(len(own) - len(widths)) < 4:
            return widths
    return tuple(own[number] for number in range(count(own)))
