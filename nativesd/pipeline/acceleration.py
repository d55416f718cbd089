"""A loaded model whose components run as exported graphs, where there are such and where they fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from nativesd.errors import NativesdWarning, UsageError
from nativesd.export import library
from nativesd.export.accelerate import Delegate, accelerate_module
from nativesd.export.capture import CapturedRunner, CudaQueue
from nativesd.export.engines import engine_runner
from nativesd.export.library import BACKENDS, BackendName, Part, default_store
from nativesd.export.runner import Runner
from nativesd.export.slots import Component
from nativesd.export.store import Store
from nativesd.export.tensorrt.engine import Arena
from nativesd.models.controlnet import ControlNet
from nativesd.models.vae import VAE
from nativesd.pipeline.control import ControlModel
from nativesd.pipeline.diffusion import Diffusion
from nativesd.tuning.fp8 import is_fp8

ACCELERATED = ("text_encoder", "unet", "controlnet", "vae")
STEP = ("unet", "controlnet")  # what runs once a step: CUDA graphs gain nothing on the rest, and hold on to its memory
Model = TypeVar("Model", bound=Diffusion)
Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Acceleration:
    """The graphs of one model: where they are kept, and what runs them."""

    backend: BackendName
    store: Store
    device: torch.device
    family: str
    runners: list[Runner] = field(default_factory=list)

    @cached_property
    def queue(self) -> CudaQueue:
        """Where TensorRT's engines and CUDA graphs run."""
        return CudaQueue(self.device)

    @cached_property
    def arena(self) -> Arena:
        """The engines' memory."""
        return Arena(self.queue)

    def runner(self, part: Part) -> Runner:
        """What runs a part. Raises NativesdError where there is nothing that can."""
        if self.backend == "onnx":
            runner = library.onnx_runner(part, self.store, self.device)
        elif self.backend == "openvino":
            runner = library.openvino_runner(part, self.store)
        elif self.backend == "cudagraphs":
            runner = CapturedRunner(part.graph(), self.queue)
        else:
            runner = engine_runner(part, self.store, self.device, self.arena, self.backend)
        self.runners.append(runner)
        return runner

    def module(
        self, name: str, module: Module, components: Sequence[Component], stale: Callable[[], str | None]
    ) -> Module:
        """A module with its components' graphs. Engines that are not there are warned of; graphs are made."""
        delegates: dict[str, Delegate] = {}
        dtype = next(module.parameters()).dtype

        def changed() -> str | None:
            found = next(module.parameters()).dtype
            return stale() if found == dtype else f"its weights are {found} now, and the graph's are {dtype}"

        for component in components:
            label = name if component == name or len(components) == 1 else component
            try:
                runner = self.runner(Part(label, component, module, self.family))
            except UsageError as error:
                if not self.backend.startswith("tensorrt"):
                    raise
                warnings.warn(
                    f"{error}: PyTorch runs it; `nativesd export tensorrt` builds one", NativesdWarning, stacklevel=4
                )
                continue
            delegates[component] = Delegate(label, runner, changed)
        return accelerate_module(module, delegates) if delegates else module

    def close(self) -> int:
        """Free what the runners hold; returns how many bytes that was, as far as it is known."""
        freed = sum(runner.close() for runner in self.runners)
        self.runners.clear()
        return freed


def accelerate(
    model: Model, backend: BackendName, *, engines: str | Path | None = None, components: Sequence[str] | None = None
) -> Model:
    """`model` with the components named run by `backend`; the given one stays as it is and shares the weights.

    Without names, all that the backend is of use to. Raises UsageError for a backend or component that there is not,
    and what its graphs' making raises.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if components is None:
        components = STEP if backend == "cudagraphs" else ACCELERATED
    if unknown := set(components) - set(ACCELERATED):
        raise UsageError(f"there is no component {', '.join(sorted(unknown))}: there are {', '.join(ACCELERATED)}")
    if model.offload:
        raise UsageError("offload moves modules between devices, which graphs cannot follow: load without offload=True")
    if backend not in ("onnx", "openvino") and model.device.type != "cuda":
        what = "CUDA graphs" if backend == "cudagraphs" else "TensorRT engines"
        raise UsageError(f"{what} run on a GPU, and the model is on {model.device}: load it with device='cuda'")
    if backend == "openvino" and model.device.type != "cpu":
        raise UsageError(
            f"OpenVINO runs on the CPU here, and the model is on {model.device}: load it with device='cpu'"
        )
    if backend != "cudagraphs" and is_fp8(model.unet):
        raise UsageError(f"a UNet in float8 has no form for {backend}: load the model without fp8=True")
    graphs = Acceleration(
        backend, Store(default_store() if engines is None else engines), model.device, model.config.family
    )
    merged = model.lora_state
    uses = () if merged is None else merged.uses

    def other_loras() -> str | None:
        same = merged is None or merged.uses == uses or backend == "cudagraphs"  # which has the model's own weights
        return None if same else "other LoRAs are in the weights now than when its graph was made"

    encoders, unet, vae, load = model.text_encoders, model.unet, model.vae, model.load_control
    if "text_encoder" in components:
        encoders = tuple(
            graphs.module(library.numbered("text_encoder", i), encoder, ["text_encoder"], other_loras)
            for i, encoder in enumerate(encoders, 1)
        )
    if "unet" in components:
        unet = graphs.module("unet", unet, ["unet"], other_loras)
    if "vae" in components and isinstance(vae, VAE):
        vae = graphs.module("vae", vae, ["vae_encoder", "vae_decoder"], lambda: None)
    if "controlnet" in components and load is not None:
        load = partial(_load_control, load, graphs)
    return replace(
        model, unet=unet, vae=vae, text_encoders=encoders, load_control=load, acceleration=graphs, _controls={}
    )


def _load_control(load: Callable[[str | Path], ControlModel], graphs: Acceleration, source: str | Path) -> ControlModel:
    control = load(source)
    if not isinstance(control.module, ControlNet):
        return control
    return replace(control, module=graphs.module("controlnet", control.module, ["controlnet"], lambda: None))
