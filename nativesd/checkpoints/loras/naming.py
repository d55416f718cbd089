"""The tensors of a LoRA under the names of a layout, with the scale said as its readers look for it.

kohya      lora_unet_, lora_te_ (of SDXL lora_te1_ and lora_te2_) and the module's name with underscores: of SDXL's UNet
           that of the single file, else that of diffusers' folders; `.alpha` beside the matrices
diffusers  the component, the module's name in diffusers' folders, and `.lora.down.weight`, `.lora.up.weight`, of text
           encoders `.lora_linear_layer.` instead of `.lora.`
peft       the same with `.lora_A.weight` and `.lora_B.weight`, as diffusers writes now

The last two have no alphas among their tensors: they are in peft's settings (`writing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nativesd.config import Config, TextEncoderConfig, UNetConfig
from nativesd.errors import UsageError, WeightsError
from nativesd.models.build import expected
from nativesd.weights.files.locate import locate_model
from nativesd.weights.files.source import open_source
from nativesd.weights.files.tensors import read_tensor
from nativesd.weights.identity.describe import unet_family
from nativesd.weights.identity.metadata import stated_family
from nativesd.weights.lora.bases import fits
from nativesd.weights.lora.file import LoraFile
from nativesd.weights.lora.parts import DORA, dora_axis
from nativesd.weights.lora.place import Change, Place, context, place
from nativesd.weights.lora.resolve import reasons
from nativesd.weights.maps.keymap import KeyMap
from nativesd.weights.maps.rules import Shape
from nativesd.weights.model import identify_known

LAYOUTS = ("kohya", "diffusers", "peft")
ENDINGS: Mapping[str, Mapping[str, str]] = {
    "kohya": {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"},
    "diffusers": {"down": ".lora.down.weight", "up": ".lora.up.weight"},
    "peft": {"down": ".lora_A.weight", "up": ".lora_B.weight"},
}
"""layout -> part -> what its key ends with; of kohya's other parts with their own names."""
MAGNITUDE = ".lora_magnitude_vector"
"""What the key of a DoRA magnitude ends with in diffusers' and peft's files."""


@dataclass
class Piece:
    """What a LoRA does to one parameter: the tensors by the parts they play, and the alpha; None: the scale is 1."""

    component: str
    parameter: str
    parts: dict[str, Tensor]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Of a product of two matrices."""
        return self.parts["down"].shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def is_plain(self) -> bool:
        """Whether it is a product of two matrices and nothing else."""
        return self.parts.keys() == {"down", "up"}


@dataclass(frozen=True)
class Base:
    """The model that LoRAs are for, by which their modules have names."""

    places: Mapping[str, Place]

    @property
    def family(self) -> str:
        """sd1, sd2, sdxl or refiner; "" where there is no UNet."""
        unet = self.places["unet"].config if "unet" in self.places else None
        return unet_family(unet)[0] if isinstance(unet, UNetConfig) else ""

    @property
    def is_xl(self) -> bool:
        """Whether its modules have the names of SDXL in kohya's layout; the UNet says it where there is one."""
        return self.family in ("sdxl", "refiner") or "text_encoder_2" in self.places

    @cached_property
    def _names(self) -> dict[tuple[str, str], dict[str, str]]:
        return {}

    def module(self, component: str, parameter: str, layout: str) -> str:
        """The name of the module that a parameter is of, with dots. Raises UsageError for one without."""
        ldm = layout == "kohya" and component == "unet" and self.is_xl
        known = self._names.setdefault((component, "ldm" if ldm else "diffusers"), {})
        if not known:
            known.update(_module_names(self.places[component], ldm=ldm))
        if parameter not in known:
            raise UsageError(f"the {component}'s {parameter} has no name in LoRAs of the layout {layout}")
        return known[parameter]

    def prefix(self, component: str, layout: str) -> str:
        """What the keys of a component begin with."""
        if layout != "kohya":
            return f"{component}."
        number = "" if not self.is_xl else "2" if component == "text_encoder_2" else "1"
        return "lora_unet_" if component == "unet" else f"lora_te{number}_"


def _module_names(place: Place, *, ldm: bool) -> dict[str, str]:
    """parameter -> its module's name in a layout."""
    config = place.config
    if isinstance(config, TextEncoderConfig):
        table = place.tables["text_encoder.transformers"].bind(prefix="text_model.")
    elif ldm:
        assert isinstance(config, UNetConfig)  # the only other one that LoRAs change
        table = place.tables["unet.ldm"].bind(config.dims, "")
    else:
        table = place.tables["unet.diffusers"].bind(prefix="")
    sources = {name: table.source(name) for name in place.shapes}
    return {
        name: source.keys[0].rpartition(".")[0]
        for name, source in sources.items()
        if source is not None and len(source.keys) == 1 and source.rule.op in ("copy", "conv1x1")
    }


def base_of(model: str | Path, tables: Mapping[str, KeyMap]) -> Base:
    """The base that a model is. Raises UsageError where nothing of it takes a LoRA, and what reading it raises."""
    place_of = locate_model(model)
    configs: dict[str, Config] = {
        component.name: component.config
        for _, identity in identify_known(place_of, open_source(place_of), tables)
        for component in identity.components
        if isinstance(component.config, UNetConfig | TextEncoderConfig)
    }
    if not configs:
        raise UsageError(f"{model} has neither a UNet nor a text encoder, so no LoRA is for it")
    return Base({name: Place(config, expected(config), tables) for name, config in configs.items()})


def published_base(lora: LoraFile, tables: Mapping[str, KeyMap]) -> Base:
    """The published base that a LoRA fits as a whole. Raises WeightsError where there is none."""
    kept: dict[Config, Place] = {}
    best = fits(lora.groups, lora.member.tensors, tables, expected, kept)
    whole = [Base(fit.places) for fit in best if not fit.unplaced and not lora.unplaced]
    if not whole:
        label = f"; of {best[0].label} there is no place for" if best else ":"
        width = context(lora.groups, lora.member.tensors)
        why = reasons({**lora.unplaced, **best[0].unplaced}) if best else [f"none has a context {width} wide"]
        raise WeightsError(
            f"{lora.path} fits no published base as a whole: name the model that it is for with base={label}\n  "
            + "\n  ".join(why)
        )
    if len({base.is_xl for base in whole}) == 1:
        return whole[0]
    xl = _says_xl(lora)
    if xl is None:
        raise WeightsError(
            f"{lora.path} fits {' and '.join(fit.label for fit in best)}, whose modules have other names in LoRAs: "
            "name the model that it is for with base="
        )
    return next(base for base in whole if base.is_xl == xl)


def _says_xl(lora: LoraFile) -> bool | None:
    """Whether a LoRA that fits SDXL and another base is for SDXL, by its metadata or kohya's names; None: neither."""
    family, _ = stated_family(lora.member.metadata)
    if family:
        return family in ("sdxl", "refiner")
    keys = lora.member.tensors
    if any(key.startswith(XL_NAMES) for key in keys):
        return True
    return False if any(key.startswith("lora_te_") for key in keys) else None


XL_NAMES = (
    "lora_te1_", "lora_te2_", "lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_",
)  # fmt: skip
"""What only the keys of SDXL's LoRAs begin with, as kohya's trainers write them."""


def read_pieces(lora: LoraFile, base: Base) -> list[Piece]:
    """What a LoRA does, parameter by parameter, in memory. Raises WeightsError where something finds no place."""
    changes, unplaced = place(lora.groups, lora.member.tensors, base.places)
    if unplaced := {**lora.unplaced, **unplaced}:
        raise WeightsError(f"{lora.path} does not fit the base:\n  " + "\n  ".join(reasons(unplaced)))
    return [_piece(lora, change) for change in changes]


def _piece(lora: LoraFile, change: Change) -> Piece:
    if change.target.source.rule.op not in ("copy", "conv1x1"):
        key = next(iter(change.keys.values()))
        raise WeightsError(f"{lora.path}: {key} is of a matrix that is several in one, which has no name elsewhere")
    parts = {part: read_tensor(lora.member, key) for part, key in change.keys.items()}
    for part, tensor in parts.items():
        if part != "alpha" and not tensor.float().isfinite().all():
            raise WeightsError(f"{lora.path}: {change.keys[part]} holds values that are not finite: get the file again")
    alpha = parts.pop("alpha", None)
    if alpha is not None:
        number: float | None = float(alpha)
        change.scale(number)  # refuses what no alpha can be
    else:
        number = None if change.stated is None else change.stated * (change.rank or 1)
    return Piece(change.component, change.target.parameter, parts, number)


@dataclass
class Named:
    """The tensors of a LoRA in a layout, and what peft's settings say of every module (of kohya's nothing)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, dict[str, Setting]] = field(default_factory=dict)
    """component -> module -> its setting"""


class Setting(NamedTuple):
    """What peft's settings say of one module."""

    rank: int
    alpha: float | None
    """None: nothing says one, so the scale is 1"""
    dora: bool


def name_pieces(pieces: Iterable[Piece], base: Base, layout: str, *, fold: bool = False) -> Named:
    """Pieces under a layout's names.

    fold  multiply the scale into the up matrices, so that nothing says an alpha

    Raises UsageError for what the layout has no name for.
    """
    out = Named()
    for piece in pieces:
        module = base.module(piece.component, piece.parameter, layout)
        parts, alpha = dict(piece.parts), piece.alpha
        if fold and alpha is not None and piece.parts.keys() >= {"down", "up"}:
            parts["up"] = (parts["up"].float() * piece.scale).to(parts["up"].dtype)
            alpha = None
        stem = base.prefix(piece.component, layout) + (module.replace(".", "_") if layout == "kohya" else module)
        dora = next((part for part in DORA if part in parts), None)
        if dora is not None:
            weight = base.places[piece.component].shapes[piece.parameter]
            magnitude = _magnitude(dora, parts.pop(dora), weight, parts, layout, module)
            out.tensors[stem + (".dora_scale" if layout == "kohya" else MAGNITUDE)] = magnitude
        for part, tensor in parts.items():
            ending = ENDINGS[layout].get(part, f".{part}" if layout == "kohya" else "")
            if layout == "diffusers" and piece.component != "unet":
                ending = ending.replace(".lora.", ".lora_linear_layer.")
            if not ending:
                raise UsageError(f"the layout {layout} has no name for {module}'s {part}: kohya's has")
            out.tensors[stem + ending] = tensor
        if layout != "kohya":
            out.settings.setdefault(piece.component, {})[module] = Setting(piece.rank, alpha, dora is not None)
        elif alpha is not None:
            out.tensors[f"{stem}.alpha"] = _as_tensor(alpha, next(iter(parts.values())).dtype)
    return out


def _magnitude(
    part: str, tensor: Tensor, weight: Shape, others: Mapping[str, Tensor], layout: str, module: str
) -> Tensor:
    """A DoRA magnitude as the layout's readers expect it: (O, 1) of a matrix, and (O, 1, 1, 1) of a convolution, with
    kohya's names (LyCORIS); with peft's (O,) and (1, O, 1, 1). Raises UsageError for one along the inputs, which peft
    has not."""
    if (part == "dora_scale") == (layout == "kohya"):
        return tensor
    if dora_axis(part, tuple(tensor.shape), weight) != 0:
        raise UsageError(f"the layout {layout} has no DoRA magnitude along the inputs, as {module}'s is: kohya's has")
    is_conv = others["up"].ndim == 4
    if layout == "kohya":
        return tensor.reshape((-1, 1, 1, 1) if is_conv else (-1, 1))
    return tensor.reshape((1, -1, 1, 1) if is_conv else (-1,))


def _as_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """An alpha in the dtype of its matrices, where it can be said so."""
    out = torch.tensor(alpha, dtype=dtype)
    return out if float(out) == alpha else torch.tensor(alpha, dtype=torch.float32)
