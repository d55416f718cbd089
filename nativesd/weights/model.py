"""What is known of a model before a tensor is read: which component comes from where, by whose word."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nativesd.config import Config, Prediction, TextEncoderConfig, TinyVAEConfig, UNetConfig, VAEConfig
from nativesd.errors import NativesdWarning, SourceError, WeightsError
from nativesd.reading import read_json
from nativesd.weights.files.configs import sample_size
from nativesd.weights.files.locate import TAESD, Located, locate_taesd, other_half
from nativesd.weights.files.source import Member, join, open_source
from nativesd.weights.files.tensors import read_tensor
from nativesd.weights.identity.describe import OWN_FORM, unet_family
from nativesd.weights.identity.identify import Component, Identity, identify_all
from nativesd.weights.identity.stated import EDM_LATENTS, EDM_V, prediction
from nativesd.weights.maps.keymap import KeyMap
from nativesd.weights.maps.published import edm_json, picture_size, scheduler_json
from nativesd.weights.names import grouped

Part = tuple[Member, Component]
"""A component, and the checkpoint that it is in."""

ENCODERS = {"sdxl": ["text_encoder", "text_encoder_2"], "refiner": ["text_encoder_2"]}
"""The text encoders of the families that do not have just one."""

KINDS = {"unet": ("unet",), "vae": ("vae", "tiny_vae"), "text_encoders": ("text_encoder", "text_encoder_2")}
"""option of `load` -> the components that it may bring; what else its source holds stays where it is."""


@dataclass(frozen=True)
class Identified:
    """What the located sources hold: the model's own components, and by option those that replace them."""

    located: Located
    family: str
    own: tuple[Part, ...]
    replacing: Mapping[str, tuple[Part, ...]]
    preview: Part | None


@dataclass(frozen=True)
class Model:
    """A complete model: for every component, where it is and what it is, and what is said of the whole."""

    path: Path
    family: str
    parts: Mapping[str, Part]
    scheduler: Mapping[str, Any]
    prediction_known: bool
    """Whether the source says what the UNet predicts; two forms of SD2.x have the same tensors."""
    size: int
    """Side, in latent cells, of the pictures the UNet was trained on."""
    zero_empty_negative: bool
    preview: Part | None = field(default=None)

    @classmethod
    def of(cls, path: Path, name: str, member: Member, component: Component) -> Model:
        """A component that stands alone."""
        config = component.config
        family = unet_family(config)[0] if isinstance(config, UNetConfig) else ""
        size = picture_size(family, "epsilon", config) if isinstance(config, UNetConfig) else 64
        return cls(path, family, {name: (member, component)}, {}, False, size, zero_empty_negative=False)

    @property
    def text_encoders(self) -> list[str]:
        """Their names, in the UNet's order."""
        return sorted(name for name in self.parts if name.startswith("text_encoder"))

    def picture_side(self, predicted: Prediction) -> int:
        """Side, in latent cells, of the pictures that the UNet was trained on, given what it predicts."""
        config = self.parts["unet"][1].config
        if self.prediction_known or not isinstance(config, UNetConfig):
            return self.size
        return picture_size(self.family, predicted, config)


def identify_known(
    path: Path, members: Sequence[Member], tables: Mapping[str, KeyMap], *, family: str = ""
) -> list[tuple[Member, Identity]]:
    """`identify_all`, for sources of which no tensor may be left over. Raises WeightsError, naming those that are."""
    identities = identify_all(members, tables, family=family)
    for _, identity in identities:
        if identity.unsupported is not None:
            raise WeightsError(f"{path} is {identity.unsupported.says}")
    if unknown := [key for _, identity in identities for key in identity.unrecognised]:
        raise WeightsError(
            f"{path} holds {len(unknown)} tensors that no component of any known layout has:\n  "
            + "\n  ".join(f"unexpected {line}" for line in grouped(unknown))
        )
    return identities


def identify(located: Located, tables: Mapping[str, KeyMap], *, half: bool = False) -> Identified:
    """What every located source holds, by names, shapes and configs alone; the UNet's family decides about the rest.

    `half` prefers fp16 variants. Raises SourceError for what cannot be read, or holds nothing that its option is for.
    """
    family = ""

    def parts(path: Path) -> tuple[Part, ...]:
        nonlocal family
        identities = _joined(path, identify_known(path, open_source(path, half=half), tables, family=family), tables)
        family = family or next((identity.family for _, identity in identities if identity.family), "")
        return tuple(
            (member, component)
            for member, identity in identities
            for component in identity.components
            if component.config is not None
        )

    def replacement(option: str, path: Path) -> tuple[Part, ...]:
        found = parts(path)
        if chosen := tuple(part for part in found if part[1].name in KINDS[option]):
            return chosen
        kinds = ", ".join(component.name for _, component in found) or "nothing known"
        raise SourceError(f"{path} has no {KINDS[option][0]}, so {option}= cannot take one from it (found: {kinds})")

    replacing: dict[str, tuple[Part, ...]] = {}
    if located.unet is not None:  # first: its family is the model's
        replacing["unet"] = replacement("unet", located.unet)
    own = parts(located.path)
    if located.vae is not None:
        replacing["vae"] = replacement("vae", _autoencoder(located.vae, family))
    replacing["text_encoders"] = tuple(
        part for path in located.text_encoders for part in replacement("text_encoders", path)
    )
    preview = None
    if located.preview is not None:
        previews = [
            part for part in parts(_autoencoder(located.preview, family)) if isinstance(part[1].config, TinyVAEConfig)
        ]
        if not previews:
            raise SourceError(f"{located.preview} is not a TAESD, so it makes no previews")
        preview = previews[0]
    return Identified(located, family, own, replacing, preview)


def _joined(
    path: Path, identities: list[tuple[Member, Identity]], tables: Mapping[str, KeyMap]
) -> list[tuple[Member, Identity]]:
    """An autoencoder's half with the other one, where that is in the file beside it. Raises what reading it raises."""
    beside = other_half(path) if path.is_file() else None
    if beside is None or len(identities) != 1 or len(identities[0][1].components) != 1:
        return identities
    [(member, identity)] = identities
    [component] = identity.components
    config = component.config
    if not isinstance(config, VAEConfig | TinyVAEConfig) or config.half is None:
        return identities
    halves = {config.half: member, "decoder" if config.half == "encoder" else "encoder": open_source(beside)[0]}
    original = component.layout == "original"  # whose names do not say which half they are of
    if not original and set(member.tensors) & {
        key for one in halves.values() if one is not member for key in one.tensors
    }:
        return identities
    whole = join([(f"taesd_{half}." if original else "", one) for half, one in halves.items()])
    return identify_known(path, [whole], tables, family=identity.family)


def choose(identified: Identified) -> Model:
    """The components of one complete model. Raises SourceError where one is missing, or does not go with another."""
    path = identified.located.path
    parts: dict[str, Part] = {}
    for part in (*(part for found in identified.replacing.values() for part in found), *identified.own):
        name = "vae" if part[1].name == "tiny_vae" else part[1].name
        parts.setdefault(name, part)
    if "unet" not in parts:
        kinds = ", ".join(component.name for _, component in identified.own)
        raise SourceError(f"{path} has no UNet that is recognised (found: {kinds or 'nothing known'}): see its audit")
    unet_member, unet = parts["unet"]
    config = unet.config
    assert isinstance(config, UNetConfig)
    family, variant = unet_family(config)
    wanted = ["vae", *ENCODERS.get(family, ["text_encoder"])]
    if lacking := [name for name in wanted if name not in parts]:
        raise SourceError(
            f"{path} has no {' and no '.join(lacking)}: pass "
            + " and ".join("vae=" if name == "vae" else "text_encoders=" for name in lacking)
        )
    parts = {name: parts[name] for name in ("unet", *wanted)}
    context = sum(c.width for _, component in parts.values() if isinstance(c := component.config, TextEncoderConfig))
    if context != config.context:
        names = " + ".join(wanted[1:])
        raise SourceError(f"{path}: the UNet takes a context {config.context} wide, but {names} gives {context}")
    parts["vae"] = _with_latents(parts["vae"], unet_member)
    vae = parts["vae"][1].config
    moved = EDM_LATENTS[0] in unet_member.tensors or (isinstance(vae, VAEConfig) and vae.mean is not None)
    _check_latents(path, config, vae, moved=moved)
    if (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json")
        size = sample_size(path / "unet" / "config.json")
        return Model(
            path=path,
            family=family,
            parts=parts,
            scheduler=read_json(path / "scheduler" / "scheduler_config.json"),
            prediction_known=True,
            size=size if isinstance(size, int) else 128 if config.added is not None else 64,
            zero_empty_negative=bool(index.get("force_zeros_for_empty_prompt", family == "sdxl")),
            preview=identified.preview,
        )
    keys = unet_member.tensors
    said = {entry.what: entry for entry in unet.evidence}
    evidence = said.get("prediction") or prediction(keys, family, variant, unet_member.metadata)[1]
    kind: Prediction = "v" if evidence.value == "v" else "epsilon"
    if "beside" in said:
        warnings.warn(f"{path}: {said['beside'].value}: {said['beside'].why}", NativesdWarning, stacklevel=3)
    if OWN_FORM in variant and not ("heads" in said and said["heads"].determined):
        warnings.warn(
            f"{path} is a UNet of no published form: its head counts are taken by the family's rule, as no header says "
            f"them; load its folder, with config.json, or put its .yaml beside it, where the pictures are wrong",
            NativesdWarning,
            stacklevel=3,
        )
    turbo = "denoiser.sigmas" in keys and family == "sd2"  # Stability's sgm export of SD-Turbo
    scheduler = scheduler_json(family, kind, turbo=turbo, zero_snr="ztsnr" in keys)
    if set(keys) & {*EDM_V, *EDM_LATENTS}:
        scheduler = edm_json(kind, *_sigmas(unet_member, kind))
    return Model(
        path=path,
        family=family,
        parts=parts,
        scheduler=scheduler,
        prediction_known=evidence.determined or turbo,
        size=picture_size(family, kind, config),
        zero_empty_negative=family == "sdxl",
        preview=identified.preview,
    )


def _sigmas(member: Member, predicted: Prediction) -> tuple[float, float]:
    """The least and the largest sigma of a model of continuous ones: what its two tensors say, or as published.

    Raises SourceError for no such numbers.
    """
    known = [0.002, 120.0 if predicted == "v" else 80.0]
    for i, key in enumerate(EDM_V[::-1]):
        if key in member.tensors:
            if member.tensors[key].elements != 1:
                raise SourceError(f"{key} is not one number but {list(member.tensors[key].shape)}")
            known[i] = float(f"{float(read_tensor(member, key)):.7g}")  # the number that was meant, not float32's
    return known[0], known[1]


def _with_latents(part: Part, member: Member) -> Part:
    """Playground 2.5's VAE with the mean and deviation of its latents that stand in the file itself.

    Raises SourceError for such as cannot be.
    """
    config = part[1].config
    if not isinstance(config, VAEConfig) or config.mean is None or part[0] is not member:
        return part
    values = []
    for key in EDM_LATENTS:
        if key not in member.tensors:
            return part
        numbers = read_tensor(member, key).double().flatten().tolist()
        if len(numbers) != config.latent_channels or not all(map(math.isfinite, numbers)):
            shape = list(member.tensors[key].shape)
            raise SourceError(
                f"{key} is {shape}, not one number for each of the {config.latent_channels} latent channels"
            )
        values.append(tuple(float(f"{number:.7g}") for number in numbers))
    return part[0], replace(part[1], config=replace(config, mean=values[0], std=values[1]))


def _check_latents(path: Path, unet: UNetConfig, vae: Config | None, *, moved: bool) -> None:
    """Raises SourceError where a VAE's latents are not those of the UNet, or it has no decoder."""
    assert isinstance(vae, VAEConfig | TinyVAEConfig)
    if vae.half == "encoder":
        raise SourceError(f"{path}: its VAE is an encoder alone, and every picture needs the decoder: pass vae=")
    if vae.latent_channels != unet.out_channels:
        raise SourceError(
            f"{path}: the UNet's latents have {unet.out_channels} channels, the VAE's {vae.latent_channels}: it is of "
            f"another family of models"
        )
    if moved and isinstance(vae, TinyVAEConfig):
        raise SourceError(f"{path}: Playground 2.5's latents are not those that TAESD was trained on: use its own VAE")


def _autoencoder(named: Path | str, family: str) -> Path:
    return locate_taesd(family) if named == TAESD else Path(named)
