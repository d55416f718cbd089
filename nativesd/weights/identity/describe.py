"""The exact configuration of a component, read off its parameters' names and shapes, with the evidence.

Every conclusion that one tensor could spoil is a majority's, so that a missing, additional or mis-shaped tensor is a
finding of the audit and not another architecture. What names and shapes cannot say is said to be undetermined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from nativesd.config import (
    PLAYGROUND_VAE,
    SD15_UNET,
    SD_VAE,
    SDXL_VAE,
    UNETS,
    Depth,
    Level,
    TextEncoderConfig,
    TextTime,
    UNetConfig,
    VAEConfig,
)
from nativesd.weights.identity.evidence import Evidence, Parameters, count, most, present, shapes_of

FAMILIES = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL", "refiner": "SDXL refiner"}
"""The families by the names that code and `--as` use, and as people write them."""

INPUTS = {4: "", 5: "depth", 7: "upscaler", 8: "InstructPix2Pix", 9: "inpainting"}
"""A UNet's input channels (latents and what stands beside them) and the name of the variant. One tensor shows them, so
other numbers are taken for a fault of that tensor; so are 5 and 7 outside SD2.x."""

GUIDANCE = 256  # width of the guidance embedding in every LCM
VOCABULARY = 49408
LENGTHS = (77, 248)  # CLIP, and LongCLIP


def unet_config(parameters: Parameters, pooled: int = 1280) -> tuple[UNetConfig, list[Evidence]]:
    """A UNet's configuration, or that of a ControlNet's encoder (levels without an up path).

    `pooled` is the width of the pooled text embedding, where the UNet is conditioned on one. The head count is the
    family's: 8 where the projections are convolutions (SD1.x), else width / 64 (SD2.x, SDXL). SDXL's added conditioning
    has six ids, the refiner's five, each 256 wide.
    """
    down, up = _stages(parameters, r"down\.(\d+)"), _stages(parameters, r"up\.(\d+)")
    down = down or [level.down for level in SD15_UNET.levels]  # too little is there to tell
    widths = [_width(parameters, f"down.{i}") for i in range(len(down))]
    projections = [
        len(s) for name, s in parameters.items() if re.search(r"attentions\.\d+\.proj_(in|out)\.weight", name)
    ]
    linear = most(projections, 2) == 2
    context = most((shape[1] for shape in shapes_of(parameters, r".*attn2\.to_[kv]\.weight", 2)), 2048)
    known = [channels for channels in INPUTS if channels not in (5, 7) or context == 1024]
    inputs = most((s[1] for s in shapes_of(parameters, r"conv_in\.weight", 4) if s[1] in known), 4)
    conditioned = any(name.startswith("add_embedding.") for name in parameters)
    ids = 5 if context == pooled else 6  # the refiner has one text encoder, SDXL a second beside it
    added = TextTime(pooled, ids) if conditioned else None
    guidance = GUIDANCE if "time_embedding.cond_proj.weight" in parameters else None
    config = UNetConfig(
        levels=tuple(
            Level(
                width,
                down=down[i],
                up=up[len(down) - 1 - i] if i >= len(down) - len(up) else (),
                heads=_heads(width, linear=linear),
            )
            for i, width in enumerate(widths)
        ),
        mid=next(iter(_stages(parameters, "mid()")), ()),
        context=context,
        in_channels=inputs,
        linear_projection=linear,
        added=added,
        guidance=guidance,
        groups=_groups(widths),
    )
    depths = " / ".join(",".join("-" if d is None else str(d) for d in level.down) for level in config.levels)
    rule = "width / 64, as in SD2.x and SDXL" if linear else "8, as in SD1.x"
    evidence = [
        Evidence(
            "levels", f"{len(widths)}, {'/'.join(map(str, widths))} wide", "output channels of the residual blocks"
        ),
        Evidence("transformer depths", depths, "numbers of the transformer blocks, going down"),
        Evidence("context", str(context), "input width of the cross-attentions' key and value projections"),
        Evidence("input channels", str(inputs), "shape of conv_in"),
        Evidence("projections", "linear" if linear else "1x1 convolutions", "rank of proj_in and proj_out"),
        Evidence("heads", "/".join(str(level.heads) for level in config.levels), rule, determined=False),
    ]
    if added is not None:
        why = "add_embedding is there; the refiner's context is as wide as the pooled embedding, SDXL's wider"
        evidence.append(Evidence("added conditioning", f"pooled {added.pooled} + {added.ids} ids", why))
    if guidance:
        evidence.append(Evidence("guidance embedding", str(guidance), "time_embedding.cond_proj is there (LCM)"))
    return config, evidence


def _heads(width: int, *, linear: bool) -> int:
    """The family's head count for a width: 8 or width / 64, or the next lower number that divides it."""
    rule = max(width // 64, 1) if linear else 8
    return next(heads for heads in range(rule, 0, -1) if width % heads == 0)


def _stages(parameters: Parameters, path: str) -> list[tuple[Depth, ...]]:
    """The depths of every stage that the pattern `path` numbers (one stage where it has an empty group).

    A depth is the number of transformer blocks behind a residual block; None: no attention, 0: its shell alone.
    """
    resnets = present(parameters, rf"{path}\.resnets\.(\d+)\.", 5)
    shells = present(parameters, rf"{path}\.attentions\.(\d+)\.(?:norm|proj_in|proj_out)\.", 3)
    blocks = present(parameters, rf"{path}\.attentions\.(\d+)\.blocks\.(\d+)\.", 10)

    def depth(i: int, j: int) -> Depth:
        return count(n for *place, n in blocks if place == [i, j]) if (i, j) in shells else None

    return [
        tuple(depth(i, j) for j in range(count(j for stage, j in resnets if stage == i)))
        for i in range(count(i for i, _ in resnets))
    ]


def _width(parameters: Parameters, stage: str) -> int:
    """The width of a stage: what most tensors of its residual blocks put out."""
    compiled = re.compile(rf"{re.escape(stage)}\.resnets\.\d+\.(conv1|conv2|norm2|time_emb_proj)\.(weight|bias)")
    return most((shape[0] for name, shape in parameters.items() if shape and compiled.fullmatch(name)), 32)


def _groups(widths: Iterable[int]) -> int:
    """GroupNorm's groups: 32 in every published model, fewer where a width is no multiple of that."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if all(width % groups == 0 for width in widths))


def unet_family(config: UNetConfig) -> tuple[str, str]:
    """The family ("" for none) and the variant ("" for the family's base model) of a UNet's configuration."""
    if config.added is not None:
        family = "refiner" if config.added.ids == 5 else "sdxl"
    else:
        family = {768: "sd1", 1024: "sd2"}.get(config.context, "sd2" if config.linear_projection else "sd1")
    variants = [INPUTS.get(config.in_channels, ""), "LCM" if config.guidance else ""]
    form = [(level.width, level.down, level.up) for level in config.levels], config.mid
    known = {
        name: preset
        for name, preset in UNETS.items()
        if ([(level.width, level.down, level.up) for level in preset.levels], preset.mid) == form
    }
    if not known:
        variants.append(OWN_FORM)
    elif "sd15" not in known and "sdxl" not in known and "refiner" not in known:
        variants.append(DISTILLED[next(iter(known))])
    return family, ", ".join(variant for variant in variants if variant)


OWN_FORM = "of its own form"
"""The variant of a UNet that is no published one."""

DISTILLED = {
    "bk-sdm-base": "BK-SDM base", "bk-sdm-tiny": "BK-SDM tiny", "bk-sdm-v2-base": "BK-SDM base",
    "bk-sdm-v2-tiny": "BK-SDM tiny", "ssd-1b": "SSD-1B", "vega": "Vega",
}  # fmt: skip


def vae_config(parameters: Parameters, family: str, *, playground: bool = False) -> tuple[VAEConfig, list[Evidence]]:
    """An autoencoder's configuration; its scaling factor is the family's, or Playground 2.5's."""
    blocks = present(parameters, r"encoder\.down\.(\d+)\.resnets\.(\d+)\.", 4)
    mirrored = not blocks
    half: Literal["encoder", "decoder"] | None = None
    if mirrored:  # a file with the decoder alone
        half = "decoder"
        blocks = present(parameters, r"decoder\.up\.(\d+)\.resnets\.(\d+)\.", 4)
    elif not present(parameters, r"decoder\.(?:up\.(\d+)|mid)\.resnets\.(\d+)\.", 4):
        half = "encoder"
    if not blocks:  # neither: too little is there to tell
        half = None
    levels = count(i for i, _ in blocks)
    widths = [_width(parameters, f"{'decoder.up' if mirrored else 'encoder.down'}.{i}") for i in range(levels)]
    layers = most((count(j for i, j in blocks if i == level) for level in range(levels)), 2) - mirrored
    base = PLAYGROUND_VAE if playground else SDXL_VAE if family in ("sdxl", "refiner") else SD_VAE
    config = replace(
        base,
        widths=tuple(widths[::-1] if mirrored else widths) or base.widths,
        layers=layers,
        latent_channels=most(
            [
                *(n for shape in shapes_of(parameters, r"post_quant_conv\.weight", 4) for n in shape[:2]),
                *(shape[0] for shape in shapes_of(parameters, r"post_quant_conv\.bias", 1)),
                *(shape[1] for shape in shapes_of(parameters, r"decoder\.conv_in\.weight", 4)),
                *(shape[0] // 2 for shape in shapes_of(parameters, r"(quant_conv|encoder\.conv_out)\.bias", 1)),
            ],
            4,
        ),
        groups=_groups(widths or base.widths),
        half=half,
    )
    why = f"{FAMILIES[family]}'s, as the UNet or the metadata says" if family else "SD1.x's and SD2.x's"
    if playground:
        why = "as published for Playground 2.5, with its latents' mean and deviation: edm_mean is there"
    return config, [
        Evidence("levels", f"{levels}, {'/'.join(map(str, config.widths))} wide", "output channels of residual blocks"),
        Evidence("latent channels", str(config.latent_channels), "shape of the decoder's conv_in"),
        Evidence("scaling factor", str(config.scaling), why, bool(family), "" if family else "0.13025 for an SDXL VAE"),
        *([Evidence("half", f"the {half} alone", "which names there are")] if half is not None else ()),
    ]


TEXT_ENCODERS = {768: "CLIP ViT-L", 1024: "OpenCLIP ViT-H", 1280: "OpenCLIP ViT-bigG"}
"""The published text encoders by their width."""


def text_config(parameters: Parameters, family: str, *, fused: bool) -> tuple[TextEncoderConfig, list[Evidence]]:
    """A text encoder's configuration. What the UNet gets of it is the family's rule; `fused`: OpenCLIP's layout.

    SDXL and the refiner take the penultimate layer without the final norm, SD2.x the penultimate with it, SD1.x the
    last with it. SD2.x's penultimate layer is the last of 23: its 24th is left out, where the file has one. The
    activation is the width's: ViT-L is OpenAI's, with quick_gelu in either layout, ViT-H and bigG are OpenCLIP's.
    """
    width = most((shape[0] for shape in shapes_of(parameters, r"layers\.\d+\.norm[12]\.\w+", 1)), 768)
    layers = count(n for (n,) in present(parameters, r"layers\.(\d+)\.", 8))
    sdxl = family in ("sdxl", "refiner")
    openclip = width in (1024, 1280) or (fused and width != 768)  # OpenAI's own ViT-L has the fused names too
    projected = "text_projection.weight" in parameters and openclip and (sdxl or width == 1280)
    left_out = openclip and not projected and layers == 24
    config = TextEncoderConfig(
        width=width,
        layers=layers - left_out,
        heads=max(width // 64, 1),
        mlp=most((shape[0] for shape in shapes_of(parameters, r"layers\.\d+\.mlp\.fc1\.weight", 2)), 4 * width),
        activation="gelu" if openclip else "quick_gelu",
        projection=width if projected else None,
        hidden=-2 if sdxl or projected else -1,
        hidden_norm=not (sdxl or projected),
        vocabulary=VOCABULARY,
        length=most((s[0] for s in shapes_of(parameters, r"position_embedding\.weight", 2) if s[0] in LENGTHS), 77),
    )
    which = f"{'penultimate' if config.hidden == -2 or left_out else 'last'}, " + (
        "with the final norm" if config.hidden_norm else "without the final norm"
    )
    evidence = [
        Evidence("layers", f"{config.layers}, {width} wide", "numbers and norms of the layers"),
        Evidence("activation", config.activation, "OpenCLIP's" if openclip else "CLIP ViT-L's", determined=False),
        Evidence("heads", str(config.heads), "width / 64, as in every CLIP text encoder", determined=False),
        Evidence("hidden state", which, FAMILIES.get(family, "as published for this width"), determined=bool(family)),
    ]
    return config, evidence
