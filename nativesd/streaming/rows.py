"""Whether graphs and engines have the rows that a stream needs: said before the first frame, never found out by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nativesd.diffusion.control import Control, ControlModel
from nativesd.errors import UsageError
from nativesd.export.accelerate import (
    AcceleratedControlNet,
    AcceleratedTinyVAE,
    AcceleratedUNet,
    AcceleratedVAE,
    Delegate,
)
from nativesd.export.slots import Request
from nativesd.models.t2i_adapter import T2IAdapter
from nativesd.pipeline.acceleration import Acceleration
from nativesd.pipeline.pipeline import Pipeline

Need = tuple[str, str, Delegate | None, Request]
"""What is needed, the component to export, what runs it (None: no engine was found), and what will be asked of it."""


def require_rows(
    pipeline: Pipeline,
    controls: Sequence[Control],
    slots: int,
    request: Request,
    size: tuple[int, int],
    *,
    images: bool = False,
) -> None:
    """Raises UsageError where a backend cannot serve `request` in every frame, with the command that mends it."""
    graphs = pipeline.acceleration
    if not isinstance(graphs, Acceleration) or graphs.backend == "cudagraphs":
        return
    for control in controls:
        assert isinstance(control.model, ControlModel)  # the stream has loaded it
        if isinstance(control.model.module, T2IAdapter):
            raise UsageError(
                f"{control.model.name} is a T2I-Adapter, for whose features exported UNets have no inputs: stream "
                "without backend="
            )
    if images and isinstance(pipeline.unet, AcceleratedUNet) and not pipeline.unet.delegate.runner.schema.images:
        raise UsageError(
            "the UNet was exported without inputs for image prompts: leave image_prompts=False out of accelerate(), or "
            "--no-image-prompts out of the export, or stream without backend="
        )
    engines = graphs.backend.startswith("tensorrt")
    for what, component, delegate, asked in _needs(pipeline, controls, request):
        reason = "there is no engine of it" if delegate is None else delegate.refusal(asked)
        if reason is None or (delegate is None and not engines):  # a component that was not asked to be accelerated
            continue
        mend = "load the model with these LoRAs (loras=), so that they are in its graphs"
        if engines:
            width, height = size
            mend = (
                f"nativesd export tensorrt {graphs.source} --component {component} --profile {width}x{height} "
                f"--stream {slots}"
            )
        raise UsageError(f"the stream asks {what} for {asked}: {reason}; {mend}")


def _needs(pipeline: Pipeline, controls: Sequence[Control], request: Request) -> Iterator[Need]:
    unet, vae = pipeline.unet, pipeline.vae
    yield "the UNet", "unet", unet.delegate if isinstance(unet, AcceleratedUNet) else None, request
    one = Request(1, request.height, request.width)
    made = vae if isinstance(vae, AcceleratedVAE | AcceleratedTinyVAE) else None
    yield "the VAE's encoder", "vae_encoder", None if made is None else made.encoding, one
    yield "the VAE's decoder", "vae_decoder", None if made is None else made.decoding, one
    for control in controls:
        assert isinstance(control.model, ControlModel)
        module = control.model.module
        if isinstance(module, AcceleratedControlNet):  # others were loaded elsewhere, or have no graph: PyTorch's
            yield control.model.name, "controlnet", module.delegate, request
