"""A model's components as ONNX files or TensorRT engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from nativesd.checkpoints.manifest import write_manifest
from nativesd.destination import fresh
from nativesd.diffusion.control import check_controlnet
from nativesd.diffusion.images.prompts import ImageAdapter, ImagePrompt, check_encoder, check_family
from nativesd.errors import UsageError
from nativesd.export.graphs import FILE, vae_parts
from nativesd.export.kept.store import Store
from nativesd.export.library import Part, default_store, numbered, write_onnx
from nativesd.export.slots import CHUNK, Convention, Request
from nativesd.export.tensorrt.build import Progress
from nativesd.export.tensorrt.engines import Wish, build
from nativesd.export.tensorrt.product import Backend, device_target, parse_target
from nativesd.export.tensorrt.profiles import ready_profile
from nativesd.loading.load import load
from nativesd.models.clip_vision import VisionEncoder
from nativesd.models.controlnet import ControlNet, ControlNetUnion
from nativesd.pictures.clip import MEAN, STD
from nativesd.pipeline.asked.arguments import Lora
from nativesd.pipeline.asked.readers import real
from nativesd.pipeline.asked.records import read_loras
from nativesd.pipeline.pipeline import Pipeline
from nativesd.tuning.memory import memory_explained

OnPart = Callable[[str, int, int], None]
LEAST_FACTOR = 4
"""Pixels along a side of a latent's cell, of the VAEs that there are: what is wrong for it is so for every model."""
EXPORTED = ("text_encoder", "unet", "controlnet", "vae_encoder", "vae_decoder", "image_encoder", "ip_adapter")


@dataclass(frozen=True)
class Exported:
    """One component's file or engine, and what its manifest says: seconds, opset, error against PyTorch, profiles.

    target  of an engine: the cards that it is for, such as "sm86" or "sm89+sm120"
    state   "built", "there" (it was already) or "skipped" (those cards cannot have it, for `reason`; there is no path)
    """

    name: str
    path: Path | None
    details: dict[str, Any]
    target: str = ""
    state: Literal["built", "there", "skipped"] = "built"
    reason: str = ""


@dataclass(frozen=True)
class Static:
    """One size in pixels, rows (pictures, twice with guidance) and chunks of a prompt, instead of any.

    groups        image prompts that act at once, each by itself, where the UNet has inputs for them
    image_tokens  of each: base adapters have 4 a picture, plus 16, full-face 257; `ip_bias` leaves out what is too many
    """

    width: int
    height: int
    batch: int = 2
    chunks: int = 1
    groups: int = 1
    image_tokens: int = 16

    def request(self, factor: int) -> Request:
        """In cells and tokens. Raises UsageError for what cannot be, and sides that are no multiples of `factor`."""
        size = f"static {self.width}x{self.height}"
        if self.width % factor or self.height % factor:
            raise UsageError(f"{size}: sides must be multiples of {factor}, in pixels")
        request = Request(
            self.batch, self.height // factor, self.width // factor, self.chunks * CHUNK, self.groups, self.image_tokens
        )
        request.require_possible(size)
        return request


@memory_explained()
def export_onnx(
    source: str | Path,
    dest: str | Path,
    *,
    components: Sequence[str] = EXPORTED,
    control: Sequence[str | Path] = (),
    loras: Sequence[Lora] = (),
    dtype: str | torch.dtype = "float32",
    slots: bool = True,
    image_prompts: bool | None = None,
    image_encoder: str | Path | None = None,
    image_adapters: Sequence[str | Path] = (),
    static: Static | None = None,
    opset: int | None = None,
    names: Convention = "nativesd",
    check: bool = True,
    tolerance: float | None = None,
    maps: str | Path | None = None,
    on_part: OnPart | None = None,
) -> list[Exported]:
    """Write a model's components as ONNX: DEST/unet/model.onnx with its weights beside it, and so on.

    DEST/manifest.json says what another runtime needs to know, and the tokenizers and the scheduler's config are there.

    source      what `load` takes
    dest        a folder that does not exist yet
    components  of text_encoder, unet, controlnet, vae_encoder, vae_decoder, image_encoder, ip_adapter; the last three
                of these are those of `control`, `image_encoder` and `image_adapters`
    loras       merged into the weights before, as `Pipeline.__call__` takes them
    slots       whether the UNet has inputs for control residuals; zeros in them cost next to nothing
    image_prompts  whether the UNet has inputs for image prompts, of any IP-Adapter; zeros in them cost next to nothing.
                Default: it has, but for the names of comfyui and streamdiffusion, which have none
    image_encoder  a CLIP image encoder to export too
    image_adapters  IP-Adapters whose projections, keys and values are exported too; FaceID's LoRAs are merged before
    static      one size and batch; else batch, sides and chunks of the prompt are dynamic
    opset       default: 23 (attention is one node), for the VAE, image encoder and adapters 21 (a group norm is one)
    names       of the UNet's inputs and outputs: nativesd's, or those that comfyui or streamdiffusion bind
    check       run every file by ONNX Runtime against PyTorch
    tolerance   max|difference| / max|float32's| that it may show; default: 1e-5 in float32, 5e-3 in float16, 4e-2 in
                bfloat16, or twice what PyTorch itself is off in that dtype
    on_part     called before every component's turn with its name, its number from 1 on, and how many there are

    DEST appears when all is written and, where it is checked, computes what PyTorch does: NativesdError otherwise.
    Raises UsageError for what cannot be exported, and what `load` raises.
    """
    if static is not None:
        static.request(LEAST_FACTOR)
        if image_adapters and "ip_adapter" in components:
            raise UsageError("an IP-Adapter's own graph has no static size: export image_adapters without static")
    if image_prompts is None:
        image_prompts = names == "nativesd" or bool(image_adapters)
    if tolerance is not None:
        tolerance = real(0)("tolerance", tolerance)
    done: list[Exported] = []
    said: dict[str, dict[str, Any]] = {}
    with fresh(dest) as folder:
        pipeline = _load(source, dtype, maps)
        adapters = _merge(pipeline, loras, image_adapters)
        request = None if static is None else static.request(pipeline.config.vae.factor)
        parts = _parts(pipeline, components, control, image_prompts, image_encoder, adapters)
        for part in _turns(parts, on_part):
            file = folder / part.name / FILE
            file.parent.mkdir(parents=True)
            details = write_onnx(
                part.graph(control=slots), file, static=_asked(part, request), opset=opset,
                names=names if part.component == "unet" else "nativesd", check=check, tolerance=tolerance,
                metadata={"family": part.family, "source": part.source},
            )  # fmt: skip
            done.append(Exported(part.name, Path(dest) / part.name / FILE, details))
            said[part.name] = {
                "file": f"{part.name}/{FILE}", "component": part.component, "family": part.family,
                "weights": part.weights, **details, **_told(part),
            }  # fmt: skip
        write_manifest(folder, pipeline, said)
    return done


@memory_explained()
def export_tensorrt(
    source: str | Path,
    engines: str | Path | None = None,
    *,
    backend: Backend | None = None,
    targets: Sequence[str] = (),
    profiles: Sequence[str] = ("dynamic",),
    components: Sequence[str] = EXPORTED,
    control: Sequence[str | Path] = (),
    loras: Sequence[Lora] = (),
    dtype: str | torch.dtype = "float16",
    slots: bool = True,
    image_prompts: bool = True,
    image_encoder: str | Path | None = None,
    image_adapters: Sequence[str | Path] = (),
    weight_streaming: bool = False,
    check: bool = True,
    tolerance: float | None = None,
    again: bool = False,
    maps: str | Path | None = None,
    on_part: OnPart | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Exported]:
    """Build TensorRT engines of a model's components into a folder of engines, by way of checked ONNX graphs.

    engines   default: nativesd/engines in the user's cache
    backend   tensorrt-rtx or tensorrt; default: by the GPU that it is for
    targets   compute capabilities, such as "sm120", "SM_120" or "12.0", also several in one with commas; TensorRT-RTX
              builds for GPUs that are elsewhere, without any here. Each gets an engine of its own, and "sm86+sm89" one
              for both. Default: the GPU's own
    profiles  SIZE[-bIMAGES][-sSLOTS][-cCHUNKS] with a SIZE such as 512, 768x512, 512to1024 or dynamic: `ready_profile`
    check     run the graphs against PyTorch, and the engines whose GPU is here; `tolerance` as in `export_onnx`, on
              the GPU by default 1e-4 in float32 (the VAE, in TF32: 3e-3), 1e-2 in float16, 4e-2 in bfloat16
    again     build in place of engines that are there; without, they are left, so that what was interrupted goes on
    on_progress  called from the builder's threads

    The other options are those of `export_onnx`. What a card cannot have is skipped, and said to be. Raises UsageError
    for what cannot be built, SourceError for files that cannot be written, and what `load` raises.
    """
    if not targets:
        if not torch.cuda.is_available():
            raise UsageError("there is no GPU here to build for: say for which, such as sm120 (--for sm120)")
        targets = (device_target(torch.device("cuda")),)
    groups = [
        sorted({parse_target(each) for each in group.split("+")}, key=lambda target: int(target[2:]))
        for target in targets
        for group in target.split(",")
    ]
    for name in profiles:
        ready_profile(name, "unet", native=512, factor=LEAST_FACTOR)
    if tolerance is not None:
        tolerance = real(0)("tolerance", tolerance)
    pipeline = _load(source, dtype, maps)
    parts = _parts(pipeline, components, control, image_prompts, image_encoder, _merge(pipeline, loras, image_adapters))
    config, store = pipeline.config, Store(default_store() if engines is None else engines)
    wish = Wish(groups, backend, slots, weight_streaming, check, tolerance, again, on_progress)
    done = []
    for part in _turns(parts, on_part):
        ready = [
            ready_profile(name, part.component, native=config.size, factor=config.vae.factor, image_prompts=part.images)
            for name in profiles
        ]
        for made in build(part, store, ready, wish):
            path, details = (None, {}) if made.entry is None else (made.entry.path, dict(made.entry.details))
            done.append(Exported(part.name, path, details, made.target, made.state, made.reason))
    return done


def _turns(parts: Sequence[Part], on_part: OnPart | None) -> Iterator[Part]:
    for number, part in enumerate(parts, 1):
        if on_part is not None:
            on_part(part.name, number, len(parts))
        yield part


def _asked(part: Part, request: Request | None) -> Request | None:
    """The one request of a part: image prompts are asked of the UNet alone."""
    return request if request is None or part.component == "unet" else replace(request, groups=1, image_tokens=1)


def _load(source: str | Path, dtype: str | torch.dtype, maps: str | Path | None) -> Pipeline:
    return load(source, device="cpu", dtype=dtype, maps=maps)


def _merge(pipeline: Pipeline, loras: Sequence[Lora], image_adapters: Sequence[str | Path]) -> list[ImageAdapter]:
    """Load the image adapters, and merge the LoRAs, with those that are in FaceID's. Raises UsageError for an adapter
    of another family."""
    prompts = pipeline.adapted([ImagePrompt(adapter) for adapter in image_adapters])
    adapters = [cast("ImageAdapter", prompt.adapter) for prompt in prompts]
    for adapter in adapters:
        check_family(adapter, pipeline.config.unet)
    with pipeline.turns.call():
        pipeline.merge([*read_loras("loras", loras), *pipeline.identity_loras(prompts)], partial=False)
    return adapters


def _told(part: Part) -> dict[str, Any]:
    """What a manifest says of an image encoder's input."""
    if not isinstance(part.module, VisionEncoder):
        return {}
    pixels = {"resample": "bicubic, the shorter side to the input's", "crop": "center", "mean": MEAN, "std": STD}
    return {"pixel_values": pixels}


def _parts(
    pipeline: Pipeline,
    components: Sequence[str],
    control: Sequence[str | Path],
    image_prompts: bool = True,
    image_encoder: str | Path | None = None,
    adapters: Sequence[ImageAdapter] = (),
) -> list[Part]:
    """The components that are asked for. Raises UsageError for one that there is not."""
    if unknown := set(components) - set(EXPORTED):
        raise UsageError(f"there is no component {', '.join(sorted(unknown))}: there are {', '.join(EXPORTED)}")
    family, source, merged = pipeline.config.family, pipeline.config.name, pipeline.lora_state
    out = []
    if "text_encoder" in components:
        out += [
            Part(numbered("text_encoder", i), "text_encoder", encoder, family, source, merged)
            for i, encoder in enumerate(pipeline.text_encoders, 1)
        ]
    if "unet" in components:
        out.append(Part("unet", "unet", pipeline.unet, family, source, merged, image_prompts))
    if "controlnet" in components and pipeline.load_control is not None:
        for i, each in enumerate(control, 1):
            model = pipeline.load_control(each)
            if not isinstance(model.module, ControlNet | ControlNetUnion):
                raise UsageError(f"{each} is a T2I-Adapter, which has no exported form")
            check_controlnet(model.name, model.module, pipeline.config.unet)
            out.append(Part(numbered("controlnet", i), "controlnet", model.module, family, model.name))
    out += [
        Part(component, component, pipeline.vae, family, source)
        for component in vae_parts(pipeline.vae)
        if component in components
    ]
    if image_encoder is not None and "image_encoder" in components and pipeline.load_image_encoder is not None:
        encoder = pipeline.load_image_encoder(image_encoder)
        for adapter in adapters:
            check_encoder(adapter, encoder)
        out.append(Part("image_encoder", "image_encoder", encoder.module, family, encoder.name))
    if "ip_adapter" in components:
        out += [
            Part(numbered("ip_adapter", i), "ip_adapter", adapter.module, family, adapter.name)
            for i, adapter in enumerate(adapters, 1)
        ]
    if not out:
        raise UsageError(
            "there is nothing to export: name a component, ControlNets with control (--control), an image encoder with "
            "image_encoder (--image-encoder), and IP-Adapters with image_adapters (--image-adapter)"
        )
    return out
