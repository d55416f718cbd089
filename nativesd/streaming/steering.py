"""Control inside the stream: every slot keeps the hints of its own frame, and is steered as far as its step says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from nativesd.diffusion.control import (
    Control,
    ControlModel,
    acts,
    adapter_features,
    check_control,
    hint_channels,
)
from nativesd.diffusion.model import Diffusion
from nativesd.models.controlnet import ControlNet, ControlNetUnion
from nativesd.models.t2i_adapter import T2IAdapter
from nativesd.streaming.told import Told

HintOf = Callable[[int], Tensor]
"""A control's hint for the newest frame, by its number: pixels (1, 3, H, W) in [0, 1]."""


class Ring:
    """One tensor (1, ...) of each slot's frame."""

    def __init__(self, newest: Tensor, slots: int) -> None:
        self.slots = slots
        self._rows = newest.expand(2 * slots, *newest.shape[1:]).clone()

    def push(self, newest: Tensor, extra: int) -> None:
        """Move every slot on by one, put the newest frame's into the first, and repeat the first `extra` behind all."""
        for slot in range(self.slots - 1, 0, -1):
            self._rows[slot].copy_(self._rows[slot - 1])
        self._rows[:1].copy_(newest)
        self._rows[self.slots : self.slots + extra].copy_(self._rows[:extra])

    def rows(self, extra: int) -> Tensor:
        """Of every slot, and again of the first `extra`: (slots + extra, ...)."""
        return self._rows[: self.slots + extra]


class SlotControl:
    """One control: its rings, which the first frame's hint makes, and how much of it every row takes."""

    def __init__(self, model: Diffusion, control: Control, size: tuple[int, int], slots: int) -> None:
        assert isinstance(control.model, ControlModel)  # the stream has loaded it
        config, factor = model.config, model.config.vae.factor
        self.control, self.model = control, control.model
        self.kind = check_control(control, config.unet, size, factor)
        self._slots = slots
        self._features_of = partial(adapter_features, self.model, config.unet, size[1] // factor, size[0] // factor)
        self._rings: list[Ring] = []
        self._newest: tuple[Tensor, list[Tensor]] | None = None

    @property
    def adapts(self) -> bool:
        """Whether it is a T2I-Adapter."""
        return isinstance(self.model.module, T2IAdapter)

    def adjust(self, extra: int, scale: float, model: Diffusion) -> None:
        """How many rows the negative prompt has, and the scale of the slots whose step is between start and end."""
        self.extra = extra
        self.factors = [scale * acts(self.control, slot, self._slots) for slot in range(self._slots)]
        self.active = any(self.factors)
        rows = [*self.factors, *self.factors[:extra]]
        scales = torch.tensor(rows, dtype=model.dtype, device=model.device)
        self.scales = scales.reshape(-1, 1, 1, 1)  # (rows,) -> (rows, 1, 1, 1)

    def push(self, pixels: Tensor) -> None:
        """Take the newest frame's hint in; the same tensor as before means the same."""
        if self._newest is None or self._newest[0] is not pixels:
            weight = next(self.model.module.parameters())
            hint = pixels[:, : hint_channels(self.model.module)].to(weight.device, weight.dtype)
            self._newest = pixels, self._features_of(hint) if self.adapts else [hint]
        newest = self._newest[1]
        self._rings = self._rings or [Ring(each, self._slots) for each in newest]
        for ring, each in zip(self._rings, newest, strict=True):
            ring.push(each, self.extra)

    def shift(self) -> None:
        """Move on without a new frame."""
        for ring in self._rings:
            ring.push(ring.rows(0)[:1], self.extra)

    def hints(self) -> list[Tensor]:
        """What every row of the UNet is steered by: a ControlNet's pixels, or an adapter's features, level by level."""
        return [ring.rows(self.extra) for ring in self._rings]


class Steering:
    """All controls of a stream."""

    def __init__(self, model: Diffusion, controls: Sequence[Control], size: tuple[int, int], slots: int) -> None:
        self.controls = [SlotControl(model, control, size, slots) for control in controls]
        self._model, self._slots = model, slots
        self._parts: tuple[Told, list[tuple[list[int], Told]]] | None = None

    def adjust(self, extra: int, scales: Sequence[float] | None) -> None:
        """How many rows the negative prompt has, and every control's scale; None: as the control says."""
        for number, control in enumerate(self.controls):
            control.adjust(extra, control.control.scale if scales is None else scales[number], self._model)

    def push(self, hint_of: HintOf | None) -> None:
        """Move on by a frame; None: without a new one."""
        for number, control in enumerate(self.controls):
            if hint_of is None:
                control.shift()
            else:
                control.push(hint_of(number))

    def residuals(self, latents: Tensor, told: Told) -> list[Tensor] | None:
        """The sum of the ControlNets' residuals for latents (rows, C, h, w), as the UNet takes them; None: none."""
        total: list[Tensor] | None = None
        acting = [control for control in self.controls if control.active and not control.adapts]
        for _, group in groupby(acting, key=lambda control: id(control.model.module)):
            for residuals in self._run(list(group), latents, told):
                total = residuals if total is None else [a + b for a, b in zip(total, residuals, strict=True)]
        return total

    def adapter(self) -> list[Tensor]:
        """The sum of the T2I-Adapters' features, a row of each for every row of the UNet."""
        acting = [
            [features * control.scales for features in control.hints()]
            for control in self.controls
            if control.active and control.adapts
        ]
        return [torch.stack(parts).sum(0) for parts in zip(*acting, strict=True)]

    def _run(self, controls: list[SlotControl], latents: Tensor, told: Told) -> Iterator[list[Tensor]]:
        """Residuals of controls that share a model: a union fuses them, a plain ControlNet runs for each."""
        module = controls[0].model.module
        if isinstance(module, ControlNetUnion):
            yield self._union(module, controls, latents, told)
        elif isinstance(module, ControlNet):
            for control in controls:
                scale = control.scales * told.prompt if module.control_config.pooled else control.scales
                yield module(
                    latents, told.time, told.context, control.hints()[0],
                    pooled=told.pooled, time_ids=told.time_ids, scale=scale,
                )  # fmt: skip

    def _union(self, module: ControlNetUnion, controls: list[SlotControl], latents: Tensor, told: Told) -> list[Tensor]:
        """A union attends across its batch, which so has to be one frame's rows."""
        out: list[Tensor] | None = None
        for rows, part in self._by_slot(told):
            acting = [(control, control.factors[rows[0]]) for control in controls if control.factors[rows[0]]]
            if not acting:
                continue
            answers: list[Tensor] = module(
                latents[rows], part.time, part.context,
                [control.hints()[0][rows] for control, _ in acting], [control.kind or 0 for control, _ in acting],
                pooled=part.pooled, time_ids=part.time_ids, scale=[scale for _, scale in acting],
            )  # fmt: skip
            if out is None:
                out = [answer.new_zeros(len(latents), *answer.shape[1:]) for answer in answers]
            for whole, answer in zip(out, answers, strict=True):
                whole[rows] = answer
        assert out is not None  # some control acts in some slot
        return out

    def _by_slot(self, told: Told) -> list[tuple[list[int], Told]]:
        """Every slot's rows, and what they are told; made once for what is told."""
        if self._parts is None or self._parts[0] is not told:
            extra = len(told.prompt) - self._slots
            rows = [[slot, self._slots + slot] if slot < extra else [slot] for slot in range(self._slots)]
            self._parts = told, [(each, told.part(each)) for each in rows]
        return self._parts[1]
