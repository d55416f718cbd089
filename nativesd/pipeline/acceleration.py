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

from nativesd.diffusion.control import ControlModel
from nativesd.diffusion.model import Diffusion
from nativesd.errors import NativesdWarning, UsageError
from nativesd.export import library
from nativesd.export.accelerate import Delegate, accelerate_module
from nativesd.export.capture import CapturedRunner, CudaQueue
from nativesd.export.graphs import vae_parts
from nativesd.export.kept.store import Store
from nativesd.export.library import BACKENDS, BackendName, Part, default_store
from nativesd.export.runner import Runner
from nativesd.export.slots import Component
from nativesd.export.tensorrt.engine import Arena
from nativesd.export.tensorrt.engines import engine_runner
from nativesd.models.controlnet import ControlNet
from nativesd.tuning.fp8 import is_fp8
from nativesd.tuning.int8 import is_int8
from nativesd.weights.lora.file import LoraFile
from nativesd.weights.lora.merge import Merged, writes

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
    source: str = ""
    merged: Merged | None = None
    """The LoRAs that are in the model's weights."""
    refit: bool = False
    """Find or make other graphs where other LoRAs are in the weights"""
    weight_budget: int | None = None
    """Bytes of an engine's weights that stay on the GPU, for those that stream them"""
    image_prompts: bool = True
    """Whether the UNet's graph has inputs for image prompts"""
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
            runner = engine_runner(
                part, self.store, self.device, self.arena, self.backend, weight_budget=self.weight_budget
            )
        self.runners.append(runner)
        return runner

    def module(self, name: str, module: Module, components: Sequence[Component], *, away: bool = False) -> Module:
        """A module with its components' graphs. Engines that are not there are warned of; graphs are made.

        away  with engines for all components, the weights go to main memory until PyTorch has to run it
        """
        delegates: dict[str, Delegate] = {}
        dtype = next(module.parameters()).dtype
        weights = Weights(module, self.merged, own=self.backend == "cudagraphs")
        for component in components:
            label = name if component == name or len(components) == 1 else component
            part = Part(label, component, module, self.family, self.source, self.merged, self.image_prompts)
            try:
                runner = self.runner(part)
            except UsageError as error:
                if not self.backend.startswith("tensorrt"):
                    raise
                warnings.warn(
                    f"{error}: PyTorch runs it; `nativesd export tensorrt` builds one", NativesdWarning, stacklevel=4
                )
                continue
            renew = partial(self._renew, part, weights) if self.refit else None
            delegates[component] = Delegate(label, runner, weights.stale, dtype=dtype, renew=renew)
        if away and len(delegates) == len(components):
            module.to("cpu")
        return accelerate_module(module, delegates) if delegates else module

    def _renew(self, part: Part, weights: Weights) -> Runner | None:
        """A runner of a part with the LoRAs that are in it now, found or made; None where there is none.

        Weights that were written to otherwise get none.
        """
        if not weights.worth_asking():
            return None
        try:
            runner = self.runner(replace(part))  # anew, as it keeps what its weights are called
        except UsageError as error:
            if not self.backend.startswith("tensorrt"):
                raise
            warnings.warn(f"{error}: `nativesd export tensorrt --lora` builds one", stacklevel=5)
            weights.refuse()
            return None
        weights.accept()
        return runner

    def close(self) -> int:
        """Free what the runners hold; returns how many bytes that was, as far as it is known."""
        freed = sum(runner.close() for runner in self.runners)
        self.runners.clear()
        return freed


class Weights:
    """A module's weights as they were when its graphs were made, and whether they still are.

    own  whatever is in them may run: a graph with no copies of its own
    """

    def __init__(self, module: nn.Module, merged: Merged | None, *, own: bool = False) -> None:
        self._module = module
        self._merged = merged
        self._own = own
        self._dtype = next(module.parameters()).dtype
        self._component = None if merged is None else merged.component(module)
        self._loras = self._merged_in()
        self._refused: tuple[tuple[LoraFile, float], ...] | None = None
        self._writes = dict(writes(module))

    def stale(self) -> str | None:
        """Why the graphs are no longer those of the weights; None where they are."""
        found = next(self._module.parameters()).dtype
        if found != self._dtype:
            return f"its weights are {found} now, and the graph's are {self._dtype}"
        if self._own:
            return None
        if self._merged_in() != self._loras:
            return "other LoRAs are in the weights now than when its graph was made"
        return self._written()

    def worth_asking(self) -> bool:
        """Whether there may be graphs of the LoRAs that are in the weights now: nothing else was written."""
        same = next(self._module.parameters()).dtype == self._dtype
        return same and self._merged_in() != self._refused and self._written() is None

    def refuse(self) -> None:
        """There are none."""
        self._refused = self._merged_in()

    def accept(self) -> None:
        """There are, and they run now."""
        self._loras = self._merged_in()

    def _merged_in(self) -> tuple[tuple[LoraFile, float], ...]:
        return () if self._merged is None else self._merged.merged_into(self._component)

    def _written(self) -> str | None:
        """What was written that was no merging of LoRAs."""
        merging = {} if self._merged is None else self._merged.writes.get(self._component or "", {})
        for name, count in writes(self._module):
            if count not in (self._writes.get(name, count), merging.get(name)):
                return f"its weights were written to ({name}) after its graph was made: accelerate it again"
        return None


def accelerate(
    model: Model,
    backend: BackendName,
    *,
    engines: str | Path | None = None,
    components: Sequence[str] | None = None,
    refit: bool = False,
    weight_budget: int | None = None,
    image_prompts: bool = True,
    away: bool = False,
) -> Model:
    """`model` with the components named run by `backend`; the given one stays as it is and shares the weights.

    Without names, all that the backend is of use to. The options are those of `Pipeline.accelerate`; with `away` the
    weights of what engines run go to main memory, those of the given model too. Raises UsageError for a backend or
    component that there is not, and what its graphs' making raises.
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
    if backend != "cudagraphs" and is_int8(model.unet):
        raise UsageError(f"a UNet in 8 bits has no form for {backend}: load the model without quantize='int8'")
    if weight_budget is not None and not backend.startswith("tensorrt"):
        raise UsageError(f"weight_budget is for TensorRT engines, and the backend is {backend}: leave it out")
    graphs = Acceleration(
        backend, Store(default_store() if engines is None else engines), model.device, model.config.family,
        model.config.name, model.lora_state, refit, weight_budget, image_prompts,
    )  # fmt: skip
    away = away and backend.startswith("tensorrt")
    encoders, unet, vae, load = model.text_encoders, model.unet, model.vae, model.load_control
    if "text_encoder" in components:
        encoders = tuple(
            graphs.module(library.numbered("text_encoder", i), encoder, ["text_encoder"], away=away)
            for i, encoder in enumerate(encoders, 1)
        )
    if "unet" in components:
        unet = graphs.module("unet", unet, ["unet"], away=away)
    if "vae" in components:
        vae = graphs.module("vae", vae, vae_parts(vae))
    if "controlnet" in components and load is not None:
        load = partial(_load_control, load, graphs)
    return replace(
        model, unet=unet, vae=vae, text_encoders=encoders, load_control=load, acceleration=graphs, _controls={}
    )


def _load_control(load: Callable[[str | Path], ControlModel], graphs: Acceleration, source: str | Path) -> ControlModel:
    control = load(source)
    if not isinstance(control.module, ControlNet):
        return control
    return replace(control, module=graphs.module("controlnet", control.module, ["controlnet"]))
