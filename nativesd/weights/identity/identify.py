"""What a checkpoint is: its components, each with its table, its exact configuration, its family, and the evidence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from nativesd.config import (
    CLIP_L,
    OPENCLIP_H,
    SD_VAE,
    SDXL_BIGG,
    SDXL_CLIP_L,
    SDXL_VAE,
    Config,
    ControlNetConfig,
    Prediction,
    T2IAdapterConfig,
    TextEncoderConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    VisionEncoderConfig,
)
from nativesd.weights.files.beside import Beside
from nativesd.weights.files.source import UNUSED, Member
from nativesd.weights.identity.adapters import (
    VISION_ENCODERS,
    controlnet_config,
    ip_adapter_config,
    t2i_adapter_config,
    tiny_vae_config,
    vision_config,
)
from nativesd.weights.identity.believed import Believed, as_believed
from nativesd.weights.identity.describe import (
    FAMILIES,
    TEXT_ENCODERS,
    text_config,
    unet_config,
    unet_family,
    vae_config,
)
from nativesd.weights.identity.detect import Detection, Found, detect
from nativesd.weights.identity.evidence import Evidence
from nativesd.weights.identity.metadata import stated_family
from nativesd.weights.identity.signatures import Signature, recognise
from nativesd.weights.identity.stated import EDM_LATENTS, prediction, with_beside
from nativesd.weights.identity.words import TABLE, describe_words, find_words
from nativesd.weights.maps.keymap import BoundMap, KeyMap
from nativesd.weights.maps.rules import Shape

STATED = Evidence("configuration", "config.json", "stated beside the weights")


@dataclass(frozen=True)
class Component:
    """One component of a checkpoint. `config` is None where the layout is recognised and there is no module for it."""

    name: str
    family: str
    layout: str
    found: Found
    config: Config | None
    evidence: tuple[Evidence, ...] = ()

    @property
    def table(self) -> BoundMap:
        """The table that says what the names should be: under a foreign prefix, the one with the first known prefix."""
        table = self.found.table
        return table.keymap.bind(table.dims, table.keymap.prefixes[0]) if self.found.foreign_prefix else table


@dataclass
class Identity:
    """A checkpoint's components and what is said of it as a whole. `family` is "" where nothing says it."""

    components: list[Component] = field(default_factory=list)
    family: str = ""
    variant: str = ""
    prediction: Prediction = "epsilon"
    ignored: dict[str, str] = field(default_factory=dict)
    unrecognised: list[str] = field(default_factory=list)
    unsupported: Signature | None = None
    """What the unrecognised keys are, where that is known: nothing that is supported."""

    def label(self) -> str:
        """The family and variant as people write them."""
        name = FAMILIES.get(self.family, "")
        return f"{name} {self.variant}" if name and self.variant else name


def identify(
    shapes: Mapping[str, Shape],
    tables: Mapping[str, KeyMap],
    *,
    config: Config | None = None,
    name: str | None = None,
    family: str = "",
    believed: Believed | None = None,
    metadata: Mapping[str, str] | None = None,
    beside: Beside | None = None,
) -> Identity:
    """Identify a checkpoint from its names and shapes.

    config    what a config.json beside it says, instead of what the shapes say
    name      the component's name, where a folder gives it
    family    known from elsewhere (the UNet of the same folder)
    believed  what the user takes it for, and it is compared with, whatever it is
    metadata  what the file says of itself
    beside    what the .yaml beside it says

    Raises UsageError for a layout that does not exist, TableError for a faulty table.
    """
    if believed is None and (signature := recognise(shapes)) is not None:
        return Identity(family=family, unrecognised=list(shapes), unsupported=signature)
    detection = detect(shapes, tables)
    if believed is not None:
        detection = as_believed(detection, shapes, tables, believed)
    elif (words := _nameless_words(detection, shapes, tables)) is not None:
        detection = Detection([words], detection.ignored)
    identity = Identity(family=family, ignored=detection.ignored, unrecognised=detection.unrecognised)
    if not family and not any(found.component == "unet" for found in detection.found):
        identity.family, _ = stated_family(metadata or {})
    order = {id(found): i for i, found in enumerate(detection.found)}
    unets = [found for found in detection.found if found.component == "unet"]
    unet = None
    if unets:
        own = min(unets, key=lambda found: _place(found, sgm=False))
        unet = _unet(own, shapes, identity, config, believed, detection, metadata, beside)
    sgm = identity.family in ("sdxl", "refiner") or (
        _any(shapes, "conditioner.") and not _any(shapes, "cond_stage_model.")
    )
    for found in sorted(detection.found, key=lambda found: _place(found, sgm=sgm)):
        if unet is not None and found.component == "unet":
            component = replace(unet, found=found)
        else:
            component = _component(found, shapes, identity, config, believed)
        component = replace(component, layout=found.table.keymap.layout, name=name or component.name)
        if (first := next((c for c in identity.components if _same(c, component)), None)) is None:
            identity.components.append(component)
        else:
            where = f"under {found.prefix}" if found.prefix else "without a prefix"
            reason = f"a copy of the {component.name} {where}; that under {first.found.prefix or 'no prefix'} is used"
            identity.ignored |= dict.fromkeys(found.keys, reason)
    identity.components = [
        replace(component, layout="sgm") if sgm and component.layout == "ldm" else component
        for component in sorted(identity.components, key=lambda c: (c.name != "unet", order[id(c.found)]))
    ]
    return identity


def _nameless_words(detection: Detection, shapes: Mapping[str, Shape], tables: Mapping[str, KeyMap]) -> Found | None:
    """Tensors whose names no table knows, where their shapes are those of learnt words."""
    if TABLE not in tables or detection.found or not detection.unrecognised:
        return None
    table, own = tables[TABLE], {key: shapes[key] for key in detection.unrecognised}
    found = find_words(own, table)
    if found is None:
        return None
    names = {
        f"(?P<word>{re.escape(word.name)})" if word.name else re.escape(word.keys[0]): "rows of the new token"
        for word in found.words
    }
    return Found(replace(table, names=names).bind(), "", list(own))


def _any(shapes: Mapping[str, Shape], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in shapes)


def _place(found: Found, *, sgm: bool) -> tuple[bool, bool, int]:
    """Which of several that are the same component is the file's own, the least: one under a prefix that tools know,
    under the family's own (sgm's `conditioner.` or ldm's `cond_stage_model.`), under the table's first."""
    prefixes = found.table.keymap.prefixes
    others = ("cond_stage_model.",) if sgm else ("conditioner.",)
    place = prefixes.index(found.prefix) if found.prefix in prefixes else len(prefixes)
    return found.foreign_prefix, found.prefix.startswith(others), place


def _same(one: Component, other: Component) -> bool:
    """Whether two components are one and its copy; the halves of an autoencoder are none of each other."""
    halves = [c.config.half for c in (one, other) if isinstance(c.config, TinyVAEConfig)]
    return one.name == other.name and len(set(halves)) < 2


def _unet(
    found: Found,
    shapes: Mapping[str, Shape],
    identity: Identity,
    config: Config | None,
    believed: Believed | None,
    detection: Detection,
    metadata: Mapping[str, str] | None,
    beside: Beside | None,
) -> Component:
    """The UNet, which decides the family."""
    unet = config if isinstance(config, UNetConfig) else None
    if unet is None and believed is not None:
        unet = believed.unet
    evidence = [STATED] if config is not None else []
    if unet is None:
        unet, evidence = unet_config(found.parameters(shapes), _pooled(detection, shapes))
        if beside is not None:
            unet, evidence, beside = with_beside(unet, evidence, beside)
    identity.family, identity.variant = unet_family(unet)
    identity.prediction, guess = prediction(shapes, identity.family, identity.variant, metadata, beside)
    if config is None:  # beside a config.json there is a scheduler_config.json, which says it
        evidence.append(guess)
    return Component("unet", identity.label(), "", found, unet, tuple(evidence))


def identify_all(
    members: Sequence[Member],
    tables: Mapping[str, KeyMap],
    *,
    family: str = "",
    believed: Believed | None = None,
) -> list[tuple[Member, Identity]]:
    """Identify every checkpoint of a source, those with a UNet first, since its family decides about the others.

    `family` and `believed` are those of `identify`. Raises what `identify` raises.
    """
    out: list[tuple[Member, Identity]] = []
    for member in sorted(members, key=lambda member: member.name != "unet"):
        if member.name in UNUSED:
            out.append((member, Identity(ignored=dict.fromkeys(member.tensors, UNUSED[member.name]))))
            continue
        identity = identify(
            member.shapes, tables, config=member.config, name=member.name or None, family=family, believed=believed,
            metadata=member.metadata, beside=member.beside,
        )  # fmt: skip
        identity.ignored |= member.left_out
        family = family or identity.family
        out.append((member, identity))
    return out


def _pooled(detection: Detection, shapes: Mapping[str, Shape]) -> int:
    """The width of the pooled text embedding: the projecting text encoder's in the same checkpoint, else bigG's."""
    for found in detection.found:
        if found.component == "text_encoder":
            parameters = found.parameters(shapes)
            if "text_projection.weight" in parameters:
                return text_config(parameters, "sdxl", fused=found.table.keymap.layout == "openclip")[0].width
    return 1280


def _component(
    found: Found,
    shapes: Mapping[str, Shape],
    identity: Identity,
    given: Config | None,
    believed: Believed | None,
) -> Component:
    """A component other than the UNet, in the light of the UNet's family."""
    parameters, family = found.parameters(shapes), identity.family
    label, kind, layout = FAMILIES.get(family, ""), found.component, found.table.keymap.layout
    config: Config | None = None
    evidence: list[Evidence] = []
    name = kind
    if kind == "vae":
        config, evidence = vae_config(parameters, family, playground=EDM_LATENTS[0] in shapes)
        if believed is not None:
            config = SDXL_VAE if family in ("sdxl", "refiner") else SD_VAE
        if isinstance(given, VAEConfig):
            config, evidence = given, [STATED]
        label = label or "SD1.x, SD2.x or SDXL"
    elif kind == "text_encoder":
        read, evidence = text_config(parameters, family, fused=layout == "openclip")
        if believed is not None:
            read = _text_preset(family, projected=read.projection is not None)
        if isinstance(given, TextEncoderConfig):
            read, evidence = given, [STATED]
        config = read
        name = "text_encoder_2" if read.projection is not None else "text_encoder"
        label = label or TEXT_ENCODERS.get(read.width, "CLIP")
    elif kind == "controlnet":
        config, evidence = controlnet_config(parameters)
        if isinstance(given, ControlNetConfig):
            config, evidence = given, [STATED]
        label = FAMILIES[unet_family(config.unet)[0]] + (" union" if config.union is not None else "")
    elif kind == "tiny_vae":
        config, evidence = tiny_vae_config(parameters)
        label = "TAESD"
    elif kind == "t2i_adapter":
        config, evidence = t2i_adapter_config(parameters)
        if isinstance(given, T2IAdapterConfig):
            config, evidence = given, [STATED]
        label = "SDXL" if config.unshuffle == 16 else "SD1.x"
    elif kind == "image_encoder":
        config, evidence = vision_config(parameters)
        if isinstance(given, VisionEncoderConfig):
            config, evidence = given, [STATED]
        label = VISION_ENCODERS.get(config.width, "CLIP")
    elif kind == "ip_adapter":
        config, evidence = ip_adapter_config(parameters)
        label = CONTEXTS.get(config.context, "")
    elif kind == "textual_inversion":
        words = find_words({key: shapes[key] for key in found.keys}, found.table.keymap)
        label, evidence = describe_words(words.words if words else (), shapes)
    elif found.table.keymap.is_named:
        label = adapter_family(shapes)
    return Component(name, label, "", found, config, tuple(evidence))


def _text_preset(family: str, *, projected: bool) -> TextEncoderConfig:
    """The text encoder that a family publishes."""
    if family in ("sdxl", "refiner"):
        return SDXL_BIGG if projected else SDXL_CLIP_L
    return OPENCLIP_H if family == "sd2" else CLIP_L


CONTEXTS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 1280: "SDXL refiner"}
"""The family by the width of its cross-attention's context."""


def adapter_family(shapes: Mapping[str, Shape]) -> str:
    """The family that a LoRA fits, by the input width of its cross-attention projections."""
    for key, shape in shapes.items():
        cross = "attn2" in key and any(part in key for part in ("to_k", "to_v"))
        down = key.endswith(("down.weight", "lora_A.weight", "lora_A.default.weight"))
        if cross and down and len(shape) >= 2 and shape[1] in CONTEXTS:
            return CONTEXTS[shape[1]]
    return ""
