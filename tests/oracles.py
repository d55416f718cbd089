"""The published implementations as oracles: the same random weights in theirs and in ours, the same inputs to both.

A pair is built from one of our config records. The published module (diffusers, transformers) gets every parameter
drawn at random, and our module gets the very same tensors through the weight map: nothing is copied, so a pair needs
the memory of one model.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from nativesd.config import (
    ControlNetConfig,
    IPAdapterConfig,
    IPAdapterKind,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    VisionEncoderConfig,
)
from nativesd.models.clip import TextEncoder, TextOutput
from nativesd.models.clip_vision import VisionEncoder
from nativesd.models.controlnet import ControlNet
from nativesd.models.ip_adapter import IPAdapter
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.weights.checkpoint import unmap
from nativesd.weights.maps.keymap import BoundMap, load_table
from nativesd.weights.maps.plan import make_plan
from nativesd.weights.maps.published import controlnet_json, text_json, unet_json, vae_json, vision_json

TOLERANCE = 1e-5
"""The largest `difference` that counts as the same result in float32."""

PublishedTextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection


@dataclass(frozen=True)
class Manifest:
    """The header of a published file, and the config.json beside it."""

    config: dict[str, Any]
    component: str
    layout: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def table(self) -> str:
        """The stem of the weight map that reads it."""
        return f"{self.component.removesuffix('_2')}.{self.layout}"


def published_manifests() -> dict[str, Manifest]:
    """The headers of published files of every kind, by name."""
    data = json.loads(gzip.decompress((Path(__file__).parent / "manifests" / "published.json.gz").read_bytes()))
    return {
        stem: Manifest(
            manifest["config"],
            manifest["component"],
            manifest["layout"],
            {name: tuple(shape) for name, (_, shape) in manifest["tensors"].items()},
        )
        for stem, manifest in data.items()
    }


def difference(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected|; infinite where that has no meaning.

    That is where shapes differ, a value is not finite, or nothing but zeros is expected.
    """
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return math.inf
    scale = expected.detach().abs().max().item()
    return (found - expected).detach().abs().max().item() / scale if scale > 0 else math.inf


def unet_kwargs(config: UNetConfig) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel. Raises UsageError where it cannot express the config."""
    return arguments(unet_json(config, 64))


def vae_kwargs(config: VAEConfig) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL."""
    return arguments(vae_json(config, 512))


def text_kwargs(config: TextEncoderConfig) -> dict[str, Any]:
    """Arguments of transformers' CLIPTextConfig. The published eos_token_id of 2 makes it pool at the argmax."""
    return arguments(text_json(config))


def arguments(data: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what says whose it is and what pictures it is for."""
    left_out = ("_class_name", "_diffusers_version", "architectures", "model_type", "sample_size")
    return {name: value for name, value in data.items() if name not in left_out}


def published_unet(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' UNet of our config, on meta."""
    with torch.device("meta"):
        return UNet2DConditionModel(**unet_kwargs(config))


def published_vae(config: VAEConfig) -> AutoencoderKL:
    """diffusers' autoencoder of our config, on meta."""
    with torch.device("meta"):
        return AutoencoderKL(**vae_kwargs(config))


def published_text_encoder(config: TextEncoderConfig) -> PublishedTextEncoder:
    """transformers' text encoder of our config, on meta."""
    module_type = CLIPTextModel if config.projection is None else CLIPTextModelWithProjection
    with torch.device("meta"):
        return module_type(CLIPTextConfig(**text_kwargs(config)))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """name -> shape of everything that a checkpoint of the module holds."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def draw(module: nn.Module, seed: int) -> None:
    """Move a module from meta to memory and draw every parameter, at scales that keep activations of order one.

    Nothing keeps a telling initial value: norms are not the identity, and no convolution is zero.
    """
    module.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                match part:
                    case nn.GroupNorm() | nn.LayerNorm():
                        parameter.normal_(1.0 if name == "weight" else 0.0, 0.2, generator=generator)
                    case nn.Embedding():
                        parameter.normal_(generator=generator)
                    case nn.Linear() | nn.Conv2d():
                        std = 0.1 if name == "bias" else parameter[0].numel() ** -0.5  # 1 / sqrt(fan-in)
                        parameter.normal_(0.0, std, generator=generator)
                    case _ if name in ("class_embedding", "latents"):
                        parameter.normal_(generator=generator)
                    case _:
                        raise TypeError(f"no rule for the parameters of {type(part).__name__}")
        for name, buffer in module.named_buffers():
            if not name.endswith("position_ids"):
                raise TypeError(f"no rule for the buffer {name}")
            buffer.copy_(torch.arange(buffer.shape[-1]))


def share(reference: nn.Module, ours: nn.Module, table: str) -> None:
    """Give the reference's tensors, themselves, to our module (on meta) through a weight map of the published folders.

    Raises AssertionError where the map and the two modules do not fit each other exactly.
    """
    tensors = reference.state_dict()
    plan = make_plan(load_table(table).bind(), shapes(reference), shapes(ours))
    faults = [plan.missing, plan.unexpected, plan.wrong_shape, plan.duplicate]
    assert not any(faults), faults
    assert not plan.ignored, plan.ignored
    assert {source.rule.op for source in plan.sources.values()} == {"copy"}
    ours.load_state_dict({name: tensors[source.keys[0]] for name, source in plan.sources.items()}, assign=True)
    ours.eval()


def unet_pair(config: UNetConfig, seed: int = 0) -> tuple[UNet, UNet2DConditionModel]:
    """Our UNet and diffusers' with the same random tensors."""
    reference = published_unet(config)
    with torch.device("meta"):
        ours = UNet(config)
    draw(reference, seed)
    share(reference, ours, "unet.diffusers")
    return ours, reference


def vae_pair(config: VAEConfig, seed: int = 0) -> tuple[VAE, AutoencoderKL]:
    """Our autoencoder and diffusers' with the same random tensors."""
    reference = published_vae(config)
    with torch.device("meta"):
        ours = VAE(config)
    draw(reference, seed)
    share(reference, ours, "vae.diffusers")
    return ours, reference


def text_pair(config: TextEncoderConfig, seed: int = 0) -> tuple[TextEncoder, PublishedTextEncoder]:
    """Our text encoder and transformers' with the same random tensors."""
    reference = published_text_encoder(config)
    with torch.device("meta"):
        ours = TextEncoder(config)
    draw(reference, seed)
    share(reference, ours, "text_encoder.transformers")
    return ours, reference


@dataclass(frozen=True)
class UNetInputs:
    """Everything a UNet of some config takes, apart from control residuals."""

    latents: Tensor
    timestep: Tensor | float
    context: Tensor
    pooled: Tensor | None
    time_ids: Tensor | None
    guidance: Tensor | None


def unet_inputs(
    config: UNetConfig,
    batch: int,
    height: int,
    width: int,
    *,
    timestep: Tensor | float,
    tokens: int = 77,
    seed: int = 1,
) -> UNetInputs:
    """Random inputs: normal latents, context, pooled and guidance embeddings; picture sizes up to 1024 as time ids."""
    generator = torch.Generator().manual_seed(seed)
    added = config.added
    return UNetInputs(
        latents=torch.randn(batch, config.in_channels, height, width, generator=generator),
        timestep=timestep,
        context=torch.randn(batch, tokens, config.context, generator=generator),
        pooled=None if added is None else torch.randn(batch, added.pooled, generator=generator),
        time_ids=None if added is None else torch.randint(1025, (batch, added.ids), generator=generator).float(),
        guidance=None if config.guidance is None else torch.randn(batch, config.guidance, generator=generator),
    )


def random_residuals(config: UNetConfig, inputs: UNetInputs, seed: int = 2) -> list[Tensor]:
    """Control residuals of order one, of the shapes that our config states."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = inputs.latents.shape
    return [torch.randn(shape, generator=generator) for shape in config.residual_shapes(batch, height, width)]


@torch.inference_mode()
def run_unet(ours: UNet, inputs: UNetInputs, residuals: Sequence[Tensor] | None = None) -> Tensor:
    """Our prediction."""
    out: Tensor = ours(
        inputs.latents,
        inputs.timestep,
        inputs.context,
        pooled=inputs.pooled,
        time_ids=inputs.time_ids,
        guidance=inputs.guidance,
        residuals=residuals,
    )
    return out


@torch.inference_mode()
def run_published_unet(
    reference: UNet2DConditionModel, inputs: UNetInputs, residuals: Sequence[Tensor] | None = None
) -> Tensor:
    """diffusers' prediction."""
    out: Tensor = reference(
        inputs.latents,
        inputs.timestep,
        inputs.context,
        timestep_cond=inputs.guidance,
        added_cond_kwargs={"text_embeds": inputs.pooled, "time_ids": inputs.time_ids},
        down_block_additional_residuals=None if residuals is None else tuple(residuals[:-1]),
        mid_block_additional_residual=None if residuals is None else residuals[-1],
    ).sample
    return out


@torch.inference_mode()
def run_published_encode(reference: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the latents from diffusers."""
    posterior = reference.encode(images).latent_dist
    return posterior.mean, posterior.logvar


@torch.inference_mode()
def run_published_decode(reference: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images from diffusers."""
    images: Tensor = reference.decode(latents).sample
    return images


@torch.inference_mode()
def run_published_text_encoder(
    reference: PublishedTextEncoder, config: TextEncoderConfig, tokens: Tensor
) -> TextOutput:
    """Context and pooled embedding from transformers, chosen as the published pipelines choose them."""
    out = reference(input_ids=tokens, output_hidden_states=True)
    hidden = out.hidden_states[config.hidden]  # [0] is the embeddings' output, [-1] the last layer's before the norm
    if config.hidden_norm:
        body = reference if config.projection is None else reference.text_model
        hidden = body.final_layer_norm(hidden)
    return TextOutput(hidden, out.pooler_output if config.projection is None else out.text_embeds)


def fits(table: BoundMap, theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]) -> None:
    """Raises AssertionError where a table does not map the names of `theirs` and `ours` onto each other, both ways."""
    plan = make_plan(table, theirs, ours)
    for problems in (plan.missing, plan.unexpected, plan.duplicate, plan.wrong_shape, plan.ignored):
        assert not problems
    assert plan.sources.keys() == ours.keys()
    assert {key for source in plan.sources.values() for key in source.keys} == theirs.keys()
    for name, source in plan.sources.items():
        written = table.source(name)
        assert written is not None
        assert len(written.keys) == 1
        prefix = source.keys[0].removesuffix(written.keys[0].removeprefix(table.keymap.prefixes[0]))
        assert prefix in table.keymap.prefixes


def lend(ours: nn.Module, reference: nn.Module, table: str) -> None:
    """Draw our module's tensors (it is on meta), and give them to diffusers' through a weight map, read backwards."""
    draw(ours, 0)
    bound = load_table(table).bind()
    fits(bound, shapes(reference), shapes(ours))
    tensors = ours.state_dict()
    theirs = {key: torch.cat([tensors[name] for name, _ in bound.parameters(key)]) for key in shapes(reference)}
    reference.load_state_dict(theirs, assign=True)
    reference.eval()


def published_controlnet(config: ControlNetConfig) -> ControlNetModel | ControlNetUnionModel:
    """diffusers' ControlNet of our config, on meta."""
    with torch.device("meta"):
        return (ControlNetModel if config.union is None else ControlNetUnionModel)(**arguments(controlnet_json(config)))


@torch.inference_mode()
def run_controlnet(ours: ControlNet, inputs: UNetInputs, hint: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Our residuals."""
    found: list[Tensor] = ours(
        inputs.latents,
        inputs.timestep,
        inputs.context,
        hint,
        pooled=inputs.pooled,
        time_ids=inputs.time_ids,
        scale=scale,
    )
    return found


@torch.inference_mode()
def run_published_controlnet(
    reference: ControlNetModel | ControlNetUnionModel, inputs: UNetInputs, hint: Any, scale: Any = 1.0, **more: Any
) -> list[Tensor]:
    """diffusers' residuals."""
    out = reference(
        inputs.latents,
        inputs.timestep,
        inputs.context,
        hint,
        conditioning_scale=scale,
        added_cond_kwargs={"text_embeds": inputs.pooled, "time_ids": inputs.time_ids},
        **more,
    )
    return [*out.down_block_res_samples, out.mid_block_res_sample]


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of two lists of residuals."""
    return max(difference(f, e) for f, e in zip(found, expected, strict=True))


def sparse(manifest: Manifest, path: Path) -> Path:
    """A safetensors file of a published file's size whose tensors are holes: all zeros, and no disk space."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in manifest.shapes.items():
        size = math.prod(shape) * 2
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    return path


def randomise(module: nn.Module, seed: int) -> None:
    """Zero convolutions too, so that they matter."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.05)


def save_union_and_adapter(unet: UNet2DConditionModel, root: Path) -> None:
    """A ControlNetUnion that fits an SDXL UNet, and a T2I-Adapter of two levels, in folders `union` and `adapter`."""
    shared = {name: unet.config[name] for name in (
        "block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups", "attention_head_dim",
        "cross_attention_dim", "use_linear_projection", "transformer_layers_per_block", "addition_embed_type",
        "addition_time_embed_dim", "projection_class_embeddings_input_dim",
    )}  # fmt: skip
    union = ControlNetUnionModel(
        **shared, conditioning_embedding_out_channels=(8, 8, 16, 16), num_control_type=6, num_trans_channel=32,
        num_trans_head=4, num_proj_channel=32,
    )  # fmt: skip
    randomise(union, 3)
    union.save_pretrained(root / "union")
    adapter = T2IAdapter(channels=[32, 64], num_res_blocks=2, downscale_factor=8, adapter_type="full_adapter")
    randomise(adapter, 4)
    adapter.save_pretrained(root / "adapter")


def published_image_encoder(config: VisionEncoderConfig) -> CLIPVisionModelWithProjection:
    """transformers' image encoder of our config, on meta."""
    with torch.device("meta"):
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**arguments(vision_json(config))))


def vision_pair(config: VisionEncoderConfig, seed: int = 0) -> tuple[VisionEncoder, CLIPVisionModelWithProjection]:
    """Our image encoder and transformers' with the same random tensors."""
    reference = published_image_encoder(config)
    with torch.device("meta"):
        ours = VisionEncoder(config)
    draw(reference, seed)
    share(reference, ours, "image_encoder.transformers")
    return ours, reference


@torch.inference_mode()
def run_published_image_encoder(reference: CLIPVisionModelWithProjection, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding and the last hidden states but one, from transformers."""
    out = reference(pixels, output_hidden_states=True)
    return out.image_embeds, out.hidden_states[-2]


def drawn_adapter(config: IPAdapterConfig, seed: int = 0) -> tuple[IPAdapter, dict[str, dict[str, Tensor]]]:
    """Our IP-Adapter with random tensors, and these as tencent-ailab's files have them: by their two halves."""
    with torch.device("meta"):
        ours = IPAdapter(config)
    draw(ours, seed)
    halves: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in unmap(ours.state_dict(), load_table("ip_adapter").bind()).items():
        half, _, name = key.partition(".")
        halves[half][name] = tensor.contiguous()
    return ours.requires_grad_(False), halves


def adapter_of(unet: UNetConfig, kind: IPAdapterKind, **fields: Any) -> IPAdapterConfig:
    """A small IP-Adapter of a kind for a UNet; its resampler's heads are 64 wide, as all are."""
    width, image = unet.context, 40
    resampler = {"width": width, "heads": 1, "depth": 4, "hidden": 4 * width}
    of_kind: dict[str, dict[str, Any]] = {
        "base": {"image": image, "tokens": 4}, "plus": {"image": image, "tokens": 5, **resampler},
        "full": {"image": image, "tokens": 257, "mlp": image}, "faceid": {"image": None, "tokens": 4, "mlp": 24},
        "faceid-plus": {"image": image, "tokens": 4, "mlp": 24, **resampler},
    }  # fmt: skip
    widths = tuple(place.width for place in unet.cross_attentions)
    return IPAdapterConfig(
        kind=kind, widths=widths, context=unet.context, **{"identity": 12, **of_kind[kind], **fields}
    )


def save_adapter(halves: dict[str, dict[str, Tensor]], path: Path) -> Path:
    """The file that such an adapter is published as."""
    save_file({f"{half}.{name}": t for half, tensors in halves.items() for name, t in tensors.items()}, path)
    return path


@contextmanager
def on_one_thread() -> Iterator[None]:
    """torch computes on one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
