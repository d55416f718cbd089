"""Steering a UNet by pictures: ControlNets, whose residuals are summed outside the UNet, and T2I-Adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from nativesd.config import UNetConfig
from nativesd.diffusion.conditioning import Conditioning
from nativesd.diffusion.turns import Turns
from nativesd.errors import UsageError
from nativesd.models.controlnet import ControlNet, ControlNetUnion
from nativesd.models.t2i_adapter import T2IAdapter
from nativesd.pictures.images import ImageSource, fit, open_image, read_image, to_tensor
from nativesd.pictures.preprocess import preprocess
from nativesd.sampling.steps import Steps

# xinsir6/ControlNetPlus README: the kinds of hint by number
UNION_KINDS = {"openpose": 0, "depth": 1, "scribble": 2, "hed": 2, "canny": 3, "lineart": 3, "mlsd": 3, "normal": 4,
               "segment": 5, "tile": 6, "inpaint": 7}  # fmt: skip


@dataclass(frozen=True, repr=False)
class ControlModel:
    """A loaded ControlNet or T2I-Adapter, and the name it is spoken of by."""

    name: str
    module: ControlNet | ControlNetUnion | T2IAdapter
    turns: Turns = field(default_factory=Turns, compare=False)
    """Of the calls that use it."""

    def __repr__(self) -> str:
        return f"<{type(self.module).__name__} {self.name}>"


@dataclass(frozen=True)
class Control:
    """One steering picture.

    model       a loaded `ControlModel`, or what `load_control` takes: "tiny", a folder, a file, a hub id
    image       the hint: edges, depth, a pose, ...; None, in a stream: every frame itself, and with "inpaint" the
                call's picture; in a call, a list has one for each prompt. With only_masked it is of the whole
                picture, and is cut as that is; where a picture is cropped, filled up or outpainted, so is a hint of its
                shape, unless it has the result's size
    scale       factor on everything that the model adds
    start, end  from which and up to which part of the steps it acts
    preprocess  what makes the hint of `image`: "canny", "inpaint" (of a picture with holes), or a processor of
                controlnet_aux; None: it is one already
    kind        for a ControlNetUnion: what the hint is, by name ("depth") or number
    """

    model: ControlModel | str | Path
    image: ImageSource | list[ImageSource] | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: str | None = None
    kind: str | int | None = None


@dataclass(frozen=True)
class Hint:
    """A control made ready for one size: `pixels` (1, channels, H, W) in [0, 1]."""

    model: ControlModel
    pixels: Tensor
    scale: float
    start: float
    end: float
    kind: int | None


def make_hint(control: Control, unet: UNetConfig, size: tuple[int, int], factor: int) -> Hint:
    """The control for pictures of a size, width and height in pixels, of which a latent cell has `factor` a side.

    Raises UsageError for a model of another family, and for what cannot be.
    """
    kind = check_control(control, unet, size, factor)
    model = control.model
    assert isinstance(model, ControlModel)
    assert control.image is not None  # the call has been checked
    assert not isinstance(control.image, list)  # and there is one prompt
    picture = open_image(control.image) if control.preprocess == "inpaint" else read_image(control.image)
    pixels = hint_pixels(control, picture, size)[:, : hint_channels(model.module)]
    return Hint(model, pixels, control.scale, control.start, control.end, kind)


def check_control(control: Control, unet: UNetConfig, size: tuple[int, int], factor: int) -> int | None:
    """The number of a union's kind of hint. Raises UsageError where a control does not fit a model, or a size."""
    model = control.model
    assert isinstance(model, ControlModel)  # the pipeline has loaded it
    name, module = model.name, model.module
    width, height = size
    if isinstance(module, T2IAdapter):
        cell = module.config.unshuffle
        if width % cell or height % cell:
            raise UsageError(f"{name} takes pictures whose sides are multiples of {cell}, not {width}x{height}")
    else:
        cell = 2 ** (len(module.control_config.hint_widths) - 1)
        check_controlnet(name, module, unet)
        if cell != factor:
            raise UsageError(f"{name} has {cell} pixels to a latent cell, and the model's VAE {factor}")
    kind = UNION_KINDS.get(control.kind) if isinstance(control.kind, str) else control.kind
    if isinstance(module, ControlNetUnion) and (kind is None or not 0 <= kind < module.union.kinds):
        known = ", ".join(word for word, number in UNION_KINDS.items() if number < module.union.kinds)
        raise UsageError(f"{name} tells kinds of hint apart: pass kind= ({known}), not {control.kind!r}")
    return kind


def hint_pixels(control: Control, picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """What a control makes of a picture, at a size: (1, 3, H, W) in [0, 1]. Raises what `preprocess` does.

    "inpaint" has -1 in all channels where a picture has holes, as its ControlNets were trained (lllyasviel,
    control_v11p_sd15_inpaint; diffusers' documentation, `make_inpaint_condition`).
    """
    if control.preprocess == "inpaint":
        holed = picture.convert("RGBA")
        alpha = fit(holed.getchannel("A"), *size).image
        holes = to_tensor([alpha])[:, :1] < 0  # (1, 1, H, W)
        return (to_tensor([fit(holed.convert("RGB"), *size).image]) / 2 + 0.5).masked_fill(holes, -1.0)
    if control.preprocess is not None:
        picture = preprocess(picture, control.preprocess)
    return to_tensor([fit(picture, *size).image]) / 2 + 0.5


def hint_channels(module: ControlNet | ControlNetUnion | T2IAdapter) -> int:
    """How many of a hint's channels a model takes."""
    return module.config.image_channels if isinstance(module, T2IAdapter) else module.control_config.hint_channels


def check_controlnet(name: str, module: ControlNet | ControlNetUnion, unet: UNetConfig) -> None:
    """Raises UsageError for a ControlNet of another family."""
    found, wanted = module.residual_shapes(1, 64, 64), unet.residual_shapes(1, 64, 64)
    if found != wanted:
        differs = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), (found, wanted))
        raise UsageError(
            f"{name} is a ControlNet of another family: it gives {len(found)} residuals and the UNet takes "
            f"{len(wanted)}; at 64x64 cells the first to differ is {differs[0]}, where the UNet takes {differs[1]}"
        )
    if module.config.context != unet.context or module.config.added != unet.added:
        raise UsageError(
            f"{name} is a ControlNet of another family: it takes a context {module.config.context} wide, and the "
            f"model's is {unet.context}"
        )


def adapter_features(model: ControlModel, unet: UNetConfig, height: int, width: int, pixels: Tensor) -> list[Tensor]:
    """What a T2I-Adapter makes of a hint (1, C, H, W), for latents of `height` x `width`.

    Raises UsageError if they do not fit.
    """
    features: list[Tensor] = model.module(pixels)
    found, places = [tuple(feature.shape) for feature in features], unet.adapter_shapes(1, height, width)
    if len(found) < len(unet.levels) or found != places[: len(found)]:
        raise UsageError(
            f"{model.name} is a T2I-Adapter of another family: it gives features {found}, and the UNet takes {places}"
        )
    return features


class Acts(Protocol):
    """What acts in a part of the steps."""

    @property
    def start(self) -> float:
        """From which part of them on."""

    @property
    def end(self) -> float:
        """Up to which part."""


def acts(hint: Acts, step: int, steps: int) -> bool:
    """Whether a hint acts in a step, of which the first is 0: it lies between start and end as a whole."""
    return step / steps >= hint.start and (step + 1) / steps <= hint.end


def steer(
    hints: Sequence[Hint],
    unet: UNetConfig,
    steps: Steps,
    *,
    batch: int,
    cells: tuple[int, int],
    device: torch.device,
    guess: bool,
) -> Steering:
    """The hints made ready for a pass on `batch` latents of `cells`, height and width."""
    adapters = [hint for hint in hints if isinstance(hint.model.module, T2IAdapter)]

    def moved(hint: Hint) -> Tensor:
        return hint.pixels.to(device, next(hint.model.module.parameters()).dtype)

    features = [(hint, adapter_features(hint.model, unet, *cells, moved(hint))) for hint in adapters]
    networks = [replace(hint, pixels=moved(hint)) for hint in hints if hint not in adapters]
    return Steering(networks, steps, batch, guess, features)


@dataclass(frozen=True)
class Steering:
    """The ControlNets and adapters of one pass, for `batch` pictures."""

    networks: Sequence[Hint]
    steps: Steps
    batch: int
    guess: bool
    """ControlNets act for the prompt only, and the deeper the stronger ("guess mode" of lllyasviel/ControlNet)."""
    features: Sequence[tuple[Hint, list[Tensor]]]
    """What the T2I-Adapters made of their hints."""
    broken: dict[str, Tensor] = field(default_factory=dict)
    """ControlNet -> whether it has made numbers that are not finite of such that are; not waited for"""

    @property
    def mixes(self) -> bool:
        """A union attends across its batch, which has to be one picture's rows."""
        return any(isinstance(hint.model.module, ControlNetUnion) for hint in self.networks)

    def active(self, hint: Hint, sigma: float) -> bool:
        """Whether a hint acts at a sigma."""
        return acts(hint, self.steps.at(sigma), len(self.steps))

    def residuals(self, latents: Tensor, time: float, sigma: float, side: Conditioning) -> list[Tensor] | None:
        """The sum of all ControlNets' residuals for latents (n * B, C, h, w), as the UNet takes them; None: none."""
        active = [hint for hint in self.networks if self.active(hint, sigma)]
        asked = side.prompt.to(latents)[:, None, None, None]  # (n * B,) -> (n * B, 1, 1, 1)
        total: list[Tensor] | None = None
        for _, group in groupby(active, key=lambda hint: id(hint.model.module)):
            hints = list(group)
            pooled = _is_pooled(hints[0])
            for residuals in _run(hints, latents, time, side, self.batch):
                self._watch(hints[0].model.name, latents, residuals)
                if pooled:
                    residuals = [residual * asked for residual in residuals]
                elif self.guess:
                    depths = torch.logspace(-1, 0, len(residuals)).tolist()  # as diffusers' ControlNetModel.forward
                    residuals = [residual * (asked * depth) for residual, depth in zip(residuals, depths, strict=True)]
                total = residuals if total is None else [a + b for a, b in zip(total, residuals, strict=True)]
        return total

    def _watch(self, name: str, latents: Tensor, residuals: Sequence[Tensor]) -> None:
        sums = torch.stack([residual.sum(dtype=torch.float32) for residual in residuals])
        wrong = latents.isfinite().all() & ~sums.isfinite().all()
        self.broken[name] = self.broken[name] | wrong if name in self.broken else wrong

    def adapter(self, sigma: float, copies: int) -> list[Tensor]:
        """The sum of all T2I-Adapters' features, `copies` rows of each."""
        active = [
            [feature * hint.scale for feature in features]
            for hint, features in self.features
            if self.active(hint, sigma)
        ]
        return [torch.stack(parts).sum(0).expand(copies, -1, -1, -1) for parts in zip(*active, strict=True)]


def _is_pooled(hint: Hint) -> bool:
    """Whether its ControlNet was trained without guidance, so that it acts for the prompt only ("shuffle")."""
    module = hint.model.module
    return not isinstance(module, T2IAdapter) and module.control_config.pooled


def _run(hints: list[Hint], latents: Tensor, time: float, side: Conditioning, batch: int) -> list[list[Tensor]]:
    """Residuals of hints that share a model: a union fuses them, a plain ControlNet runs for each."""
    module = hints[0].model.module
    if isinstance(module, ControlNetUnion):
        # it attends across its batch, so a batch must be one picture's rows: prompt and negative prompt
        parts = []
        for picture in range(batch):
            rows = slice(picture, None, batch)
            parts.append(
                module(
                    latents[rows], time, side.texts[rows],
                    [hint.pixels.expand(len(latents[rows]), -1, -1, -1) for hint in hints],
                    [hint.kind or 0 for hint in hints],
                    pooled=None if side.pooled is None else side.pooled[rows],
                    time_ids=None if side.time_ids is None else side.time_ids[rows],
                    scale=[hint.scale for hint in hints],
                )
            )  # fmt: skip
        # batch times (n, C, h, w) -> (n * batch, C, h, w)
        return [[torch.stack(residuals, dim=1).flatten(0, 1) for residuals in zip(*parts, strict=True)]]
    return [
        module(
            latents, time, side.texts, hint.pixels.expand(len(latents), -1, -1, -1), pooled=side.pooled,
            time_ids=side.time_ids, scale=hint.scale,
        )
        for hint in hints
    ]  # fmt: skip
