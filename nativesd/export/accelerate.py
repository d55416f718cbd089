"""Modules whose work an exported graph does, and PyTorch where the graph does not fit what is asked.

An accelerated module is the plain one, with the same parameters under the same names, and another `forward`: what
takes a UNet takes an `AcceleratedUNet`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from nativesd.errors import NativesdWarning, UsageError
from nativesd.export.graphs import image_inputs
from nativesd.export.runner import Runner
from nativesd.export.slots import Request
from nativesd.models.clip import TextEncoder, TextOutput
from nativesd.models.controlnet import ControlNet
from nativesd.models.edits import Edits
from nativesd.models.layers import CachedContext, Context, repeat_to
from nativesd.models.reuse import Reuse
from nativesd.models.tiling import goes_around
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.unet import CachedTime, ImageContext, Time, UNet
from nativesd.models.vae import VAE

Stale = Callable[[], str | None]
"""Why the weights are no longer those of the graph; None where they are."""
Renew = Callable[[], Runner | None]
"""A runner of the weights as they are now; None where there is none."""
Module = TypeVar("Module", bound=nn.Module)


class Delegate:
    """A runner with what decides whether it may answer, and the fallback's warnings, one of each kind.

    dtype  of the graph's weights
    renew  asked for another runner where the weights have changed
    """

    def __init__(
        self, name: str, runner: Runner, stale: Stale, *, dtype: torch.dtype | None = None, renew: Renew | None = None
    ) -> None:
        self.name = name
        self.runner = runner
        self.stale = stale
        self.dtype = dtype
        self.renew = renew
        self.fallbacks: set[str] = set()

    def refusal(self, request: Request) -> str | None:
        """Why the graph cannot answer a request with the weights as they are now; None where it can."""
        return self._outdated() or self.runner.refusal(request)

    def _outdated(self) -> str | None:
        """Why the graph is not of the weights as they are now, after another was asked for; None where it is."""
        reason = self.stale()
        runner = None if reason is None or self.renew is None else self.renew()
        if runner is None:
            return reason
        self.runner.close()
        self.runner = runner
        return None

    def run(self, given: Mapping[str, Tensor | None], *, unfit: str | None = None) -> dict[str, Tensor] | None:
        """The graph's answer for what is given, or None, after a warning that says why, where PyTorch has to answer.

        unfit  what of the call the graph has no input for
        """
        reason = unfit or self._outdated()
        schema = self.runner.schema
        kinds = {slot.name: slot.kind for slot in schema.inputs}
        tensors = {
            name: tensor.to(self.dtype) if self.dtype is not None and kinds.get(name) == "weights" else tensor
            for name, tensor in given.items()
            if tensor is not None
        }
        if reason is None:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            reason = self.runner.refusal(schema.given(tensors.keys()).request(shapes))
        if reason is None:
            return self.runner.run(tensors)
        if reason not in self.fallbacks:
            self.fallbacks.add(reason)
            warnings.warn(f"{self.name}: {reason}: PyTorch runs it instead", NativesdWarning, stacklevel=4)
        return None


def fetch(module: nn.Module, device: torch.device) -> None:
    """Have a module's weights where PyTorch is to compute with them: while graphs did, they may have stayed away."""
    if next(module.parameters()).device != device:
        module.to(device)


class AcceleratedUNet(UNet):
    """A UNet that an exported graph runs."""

    delegate: Delegate

    def forward(
        self,
        latents: Tensor,
        timestep: Time,
        context: Context,
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        residuals: Sequence[Tensor] | None = None,
        adapter: Sequence[Tensor] = (),
        edits: Edits = (),
        images: ImageContext | None = None,
        reuse: Reuse | None = None,
    ) -> Tensor:
        """As `UNet.forward`."""
        slots = self.delegate.runner.schema.control
        unfit = "exported UNets have no inputs for a T2I-Adapter's features" if adapter else None
        if edits or reuse is not None:
            unfit = "exported UNets compute as they were trained to, and this call asks for another way"
        if images is not None and not self.delegate.runner.schema.images:
            unfit = "this graph was exported without slots for image prompts"
        if residuals is not None and not slots:
            unfit = "this graph was exported without control slots"
        states = _states(context)
        rows = repeat_to(latents, states.shape[0])
        given = {
            "sample": rows, "timestep": _rows(timestep, rows), "encoder_hidden_states": states,
            "text_embeds": pooled, "time_ids": time_ids, "timestep_cond": guidance,
        }  # fmt: skip
        if residuals is not None and unfit is None:
            given |= {slot.name: residual for slot, residual in zip(slots, residuals, strict=True)}
        if images is not None and unfit is None:
            given |= image_inputs(images, rows, self.delegate.runner.schema)
        answer = self.delegate.run(given, unfit=unfit)
        if answer is not None:
            return answer["out_sample"].to(latents)
        fetch(self, latents.device)
        return super().forward(
            latents, timestep, context, pooled=pooled, time_ids=time_ids, guidance=guidance, residuals=residuals,
            adapter=adapter, edits=edits, images=images, reuse=reuse,
        )  # fmt: skip


class AcceleratedControlNet(ControlNet):
    """A ControlNet that an exported graph runs; the scale is applied outside."""

    delegate: Delegate

    def forward(
        self,
        latents: Tensor,
        timestep: Time,
        context: Context,
        hint: Tensor,
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> list[Tensor]:
        """As `ControlNet.forward`."""
        given = {
            "sample": latents, "timestep": _rows(timestep, latents), "encoder_hidden_states": _states(context),
            "controlnet_cond": hint, "text_embeds": pooled, "time_ids": time_ids,
        }  # fmt: skip
        answer = self.delegate.run(given, unfit=_unfit(self))
        if answer is not None:
            return [answer[slot.name].to(latents) * scale for slot in self.delegate.runner.schema.outputs]
        fetch(self, latents.device)
        return super().forward(latents, timestep, context, hint, pooled=pooled, time_ids=time_ids, scale=scale)


class AcceleratedTextEncoder(TextEncoder):
    """A text encoder that an exported graph runs."""

    delegate: Delegate

    def forward(self, tokens: Tensor, *, embedded: Tensor | None = None, hidden: int | None = None) -> TextOutput:
        """As `TextEncoder.forward`."""
        unfit = "exported text encoders take tokens, and a textual inversion is none" if embedded is not None else None
        answer = self.delegate.run({"input_ids": tokens}, unfit=unfit)
        if answer is None:
            fetch(self, tokens.device)
            return super().forward(tokens, embedded=embedded, hidden=hidden)
        dtype = self.position_embedding.weight.dtype
        layer = self.config.hidden if hidden is None else hidden
        states, pooled = answer["hidden_states"][layer], answer["pooled"]
        return TextOutput(states.to(tokens.device, dtype), pooled.to(tokens.device, dtype))


class AcceleratedVAE(VAE):
    """A VAE whose whole pictures exported graphs encode and decode; strips of large ones are PyTorch's."""

    encoding: Delegate | None
    decoding: Delegate | None

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `VAE.encode`."""
        answer = None if self.encoding is None else self.encoding.run({"sample": images}, unfit=_unfit(self))
        if answer is None:
            return super().encode(images)
        mean, logvar = answer["latent_parameters"].to(images).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor) -> Tensor:
        """As `VAE.decode`."""
        answer = None if self.decoding is None else self.decoding.run({"latent_sample": latents}, unfit=_unfit(self))
        return super().decode(latents) if answer is None else answer["sample"].to(latents)


class AcceleratedTinyVAE(TinyVAE):
    """A TAESD whose whole pictures exported graphs encode and decode."""

    encoding: Delegate | None
    decoding: Delegate | None

    def encode(self, images: Tensor) -> Tensor:
        """As `TinyVAE.encode`."""
        answer = None if self.encoding is None else self.encoding.run({"sample": images}, unfit=_unfit(self))
        return super().encode(images) if answer is None else answer["latent_sample"].to(images)

    def decode(self, latents: Tensor) -> Tensor:
        """As `TinyVAE.decode`."""
        answer = None if self.decoding is None else self.decoding.run({"latent_sample": latents}, unfit=_unfit(self))
        return super().decode(latents) if answer is None else answer["sample"].to(latents)


def accelerate_module(module: Module, delegates: Mapping[str, Delegate]) -> Module:
    """A module with its graphs' runners, by component; it shares the parameters of the given one.

    Raises UsageError for a module that has no exported form.
    """
    parts: dict[str, object] = {}
    kind: type[nn.Module]
    match module:
        case UNet():
            kind, parts["delegate"] = AcceleratedUNet, delegates["unet"]
        case ControlNet():
            kind, parts["delegate"] = AcceleratedControlNet, delegates["controlnet"]
        case TextEncoder():
            kind, parts["delegate"] = AcceleratedTextEncoder, delegates["text_encoder"]
        case VAE() | TinyVAE():
            kind = AcceleratedVAE if isinstance(module, VAE) else AcceleratedTinyVAE
            parts["encoding"], parts["decoding"] = delegates.get("vae_encoder"), delegates.get("vae_decoder")
        case _:
            raise UsageError(f"a {type(module).__name__} has no exported form")
    out = kind.__new__(kind)
    out.__dict__.update(module.__dict__, **parts)
    return cast("Module", out)


def _unfit(module: nn.Module) -> str | None:
    """Why a graph cannot answer for a module as it is now; None where it can."""
    return "exported graphs do not go around, and tiling asks for it" if goes_around(module) else None


def _states(context: Context) -> Tensor:
    return context.states if isinstance(context, CachedContext) else context


def _rows(timestep: Time, latents: Tensor) -> Tensor:
    if isinstance(timestep, CachedTime):
        timestep = timestep.values
    if isinstance(timestep, Tensor):
        return timestep.to(latents.device, torch.float32).expand(len(latents))
    return torch.full((len(latents),), timestep, dtype=torch.float32, device=latents.device)
