"""Modules as functions of named tensors: the form in which they are exported, run and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nativesd.errors import UsageError
from nativesd.export.slots import (
    CHUNK,
    IDENTITY,
    IMAGE_EMBEDS,
    IMAGE_STATES,
    IP_BIAS,
    IP_KEYS,
    IP_MASK,
    IP_VALUES,
    Component,
    Request,
    Schema,
    controlnet_schema,
    image_encoder_schema,
    ip_adapter_schema,
    text_encoder_schema,
    unet_schema,
    vae_schema,
)
from nativesd.models.clip import TextEncoder
from nativesd.models.clip_vision import VisionEncoder
from nativesd.models.controlnet import ControlNet, ControlNetUnion
from nativesd.models.ip_adapter import IPAdapter
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.unet import ImageContext, UNet
from nativesd.models.vae import VAE

FILE = "model.onnx"
OPSETS: Mapping[Component, int] = {
    "unet": 23, "controlnet": 23, "text_encoder": 23, "vae_decoder": 21, "vae_encoder": 21, "image_encoder": 21,
    "ip_adapter": 21,
}  # fmt: skip
"""From 23 on attention is one node, which TensorRT-RTX builds for the heads of UNets and not for the VAE's 512
channels, nor for all heads of image encoders (ViT-H's are 80 wide); from 21 on a group norm is one node."""
DTYPES = {"float32": torch.float32, "int64": torch.int64}


class Graph(nn.Module):
    """A component as a function of the tensors that its schema names, in order."""

    def __init__(self, module: nn.Module, schema: Schema) -> None:
        super().__init__()
        self.module = module
        self.schema = schema
        self._run = _RUN[schema.component]

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return next(self.module.parameters()).device

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Tensors of `schema.inputs` to those of `schema.outputs`."""
        named = {slot.name: tensor for slot, tensor in zip(self.schema.inputs, inputs, strict=True)}
        return tuple(self._run(self.module, named))

    def inputs(self, request: Request, generator: torch.Generator | None = None) -> list[Tensor]:
        """Random inputs of the size that a request asks for, in ranges that such inputs have; residuals among them."""
        out = []
        for slot in self.schema.inputs:
            shape = slot.shape(request)
            if slot.kind == "int64":  # tokens; the last is the end of text, which has the highest id
                vocabulary = cast("TextEncoder", self.module).config.vocabulary
                ids = torch.randint(0, vocabulary - 2, shape, generator=generator)
                ids[:, -1] = vocabulary - 1
                out.append(ids)
                continue
            tensor = torch.randn(shape, generator=generator)
            if slot.name == "timestep":
                tensor = torch.linspace(999.0, 1.0, shape[0])
            elif slot.name == "time_ids":
                tensor = (tensor.abs() * 512).round()
            elif slot.is_control:
                tensor *= 0.1
            elif slot.name.startswith(IP_MASK.format("")):
                tensor = tensor.sigmoid()
            out.append(tensor.to(DTYPES.get(slot.kind, self.dtype)))
        return out


def graph_of(module: nn.Module, component: Component, *, control: bool = True, images: bool = True) -> Graph:
    """A component of a loaded module. Raises UsageError where there is no such graph."""
    match module:
        case UNet():
            return Graph(module, unet_schema(module.config, control=control, images=images))
        case ControlNet():
            return Graph(module, controlnet_schema(module.control_config))
        case ControlNetUnion():
            return Graph(module, controlnet_schema(module.control_config))  # which says why not
        case TextEncoder():
            return Graph(module, text_encoder_schema(module.config))
        case VisionEncoder():
            return Graph(module, image_encoder_schema(module.config))
        case IPAdapter():
            return Graph(module, ip_adapter_schema(module.config))
        case VAE() | TinyVAE() if component in ("vae_decoder", "vae_encoder"):
            return Graph(module, vae_schema(module.config, component))
    raise UsageError(f"a {type(module).__name__} has no exported form")


def vae_parts(vae: VAE | TinyVAE) -> list[Component]:
    """The graphs of a VAE: of both its halves, or of the one that there is."""
    parts: dict[Component, str] = {"vae_encoder": "encoder", "vae_decoder": "decoder"}
    return [part for part, half in parts.items() if vae.config.half in (None, half)]


def typical(schema: Schema) -> Request:
    """A request to trace with: no side or batch is 1, which would be taken for a constant, nor equal to another."""
    return Request(2, 72, 56, 2 * CHUNK if schema.component != "text_encoder" else CHUNK, 3, 20)


def _unet(module: nn.Module, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
    residuals = [tensor for name, tensor in given.items() if name.startswith("input_control_")]
    return (
        module(
            given["sample"], given["timestep"], given["encoder_hidden_states"], pooled=given.get("text_embeds"),
            time_ids=given.get("time_ids"), guidance=given.get("timestep_cond"), residuals=residuals or None,
            images=_images(given),
        ),
    )  # fmt: skip


def _images(given: Mapping[str, Tensor]) -> ImageContext | None:
    """The image prompts among a UNet's inputs, where it has any."""
    if IP_BIAS not in given:
        return None

    def numbered(name: str) -> dict[int, Tensor]:
        begins = name.format("")
        return {int(key.removeprefix(begins)): tensor for key, tensor in given.items() if key.startswith(begins)}

    return ImageContext(numbered(IP_KEYS), numbered(IP_VALUES), given[IP_BIAS], numbered(IP_MASK))


def image_inputs(images: ImageContext, like: Tensor, schema: Schema) -> dict[str, Tensor]:
    """What image prompts are for a graph, for latents like (B, C, h, w): everything that it has an input for."""
    keys = next(iter(images.keys.values()))
    given = {IP_KEYS.format(width): tensor for width, tensor in images.keys.items()}
    given |= {IP_VALUES.format(width): tensor for width, tensor in images.values.items()}
    given[IP_BIAS] = keys.new_zeros(keys.shape[1:4]) if images.bias is None else images.bias
    request = Request(like.shape[0], like.shape[2], like.shape[3], groups=keys.shape[2])
    for slot in schema.images:
        if slot.name.startswith(IP_MASK.format("")):
            shape, level = slot.shape(request), int(slot.name.removeprefix(IP_MASK.format("")))
            given[slot.name] = keys.new_ones(shape) if images.masks is None else images.masks[level].expand(shape)
    return given


def _controlnet(module: nn.Module, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
    residuals: list[Tensor] = module(
        given["sample"], given["timestep"], given["encoder_hidden_states"], given["controlnet_cond"],
        pooled=given.get("text_embeds"), time_ids=given.get("time_ids"),
    )  # fmt: skip
    return residuals


def _vae_decoder(module: nn.Module, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return (cast("VAE | TinyVAE", module).decode(given["latent_sample"]),)


def _vae_encoder(module: nn.Module, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
    encoded = cast("VAE | TinyVAE", module).encode(given["sample"])
    return (encoded if isinstance(encoded, Tensor) else torch.cat(encoded, dim=1),)


def _text_encoder(module: nn.Module, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
    encoder, tokens = cast("TextEncoder", module), given["input_ids"]
    states = encoder.states(tokens)
    return torch.stack([encoder.context(state) for state in states]), encoder.pooled(tokens, states[-1])


def _image_encoder(module: nn.Module, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
    embedding, hidden = cast("VisionEncoder", module)(given["pixel_values"])
    return (hidden,) if embedding is None else (embedding, hidden)


def _ip_adapter(module: nn.Module, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
    adapter = cast("IPAdapter", module)
    tokens = adapter.tokens(given.get(IMAGE_EMBEDS, given.get(IMAGE_STATES)), given.get(IDENTITY))
    made, widths = adapter.keys_values(tokens), adapter.config.widths
    return [
        torch.stack([made[number][part] for number, each in enumerate(widths) if each == width])[:, :, None]
        for part in (0, 1)
        for width in sorted({*widths})
    ]  # (L, B, S, C) -> (L, B, 1, S, C)


_RUN: dict[Component, Callable[[nn.Module, Mapping[str, Tensor]], Sequence[Tensor]]] = {
    "unet": _unet, "controlnet": _controlnet, "vae_decoder": _vae_decoder, "vae_encoder": _vae_encoder,
    "text_encoder": _text_encoder, "image_encoder": _image_encoder, "ip_adapter": _ip_adapter,
}  # fmt: skip
