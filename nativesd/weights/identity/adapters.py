"""The configurations of what stands beside a model: ControlNets, T2I-Adapters, TAESD; with the evidence."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Literal

from nativesd.config import (
    SD15_ADAPTER,
    SD15_LIGHT_ADAPTER,
    SDXL_ADAPTER,
    TAESD,
    ControlNetConfig,
    T2IAdapterConfig,
    TinyVAEConfig,
    UnionConfig,
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
