"""From what a stream is asked for to what every frame reads: made when it is opened, and by every update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nativesd.diffusion.config import PLAIN, PipelineConfig
from nativesd.diffusion.control import acts
from nativesd.diffusion.images.keys import ImageKeyring
from nativesd.diffusion.images.prompts import ImageEncoder, ImagePrompt
from nativesd.errors import UsageError
from nativesd.export.slots import Request
from nativesd.models.unet import ImageContext
from nativesd.pipeline.asked.tagged import LoraUse, tagged_prompts
from nativesd.pipeline.pipeline import Pipeline
from nativesd.streaming.batch import Plan, extra_rows, make_plan
from nativesd.streaming.ladder import Ladder
from nativesd.streaming.options import Asked, Seeds
from nativesd.streaming.rows import require_rows
from nativesd.streaming.told import Told, tell


class Noises:
    """The noise of a seed, or of several that are blended: drawn on the CPU, float32, the same on every device.

    A sum of independent noises by weights is brought back to unit variance by the root of the weights' squares.
    """

    def __init__(self, seeds: Seeds) -> None:
        self.seeds = seeds
        self._generators = [torch.Generator().manual_seed(seed) for seed, _ in seeds]

    def again(self, shape: Sequence[int]) -> Noises:
        """The same from the beginning, behind the first noise, of a shape."""
        out = Noises(self.seeds)
        out.draw(shape)
        return out

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise."""
        weights = [weight for _, weight in self.seeds]
        parts = [
            torch.randn(*shape, generator=generator) * weight
            for generator, weight in zip(self._generators, weights, strict=True)
        ]
        return torch.stack(parts).sum(0) / math.hypot(*weights)


@dataclass(frozen=True)
class Setup:
    """All that a frame reads and that does not change with the frames."""

    asked: Asked
    ladder: Ladder
    loras: Sequence[LoraUse]
    noises: Noises
    """Of frames that are made from noise."""
    told: Told
    told_of: tuple[object, ...]
    """What `told` depends on."""
    plan: Plan
    keyring: ImageKeyring | None
    """The image prompts, made ready."""
    keyring_of: tuple[object, ...]
    """What `keyring` depends on, by identity."""
    images: ImageContext | None
    """What image prompts show to every row of the UNet."""


def require_streamable(pipeline: Pipeline) -> None:
    """Raises UsageError for a model that a stream cannot be made of."""
    config = pipeline.config
    if config.family == "refiner":
        raise UsageError(f"{config.name} is a refiner, which ends what another model began, and cannot stream")
    if config.scheduler.edm is not None:
        raise UsageError(f"{config.name} has continuous sigmas (EDM), and a stream goes by trained timesteps")
    if config.unet.in_channels != PLAIN:
        raise UsageError(
            f"{config.name} takes {config.unet.in_channels} input channels (inpainting or edits), and a stream has "
            "latents alone"
        )
    if pipeline.offload:
        raise UsageError("offload moves the model for every frame: load it without offload=True to stream")


def stream_size(config: PipelineConfig, asked: Asked) -> tuple[int, int]:
    """Width and height in pixels. Raises UsageError for a size that the model does not make."""
    factor = config.vae.factor
    for name, side in (("width", asked.width), ("height", asked.height)):
        if side is not None and (side % factor or side < config.smallest):
            raise UsageError(
                f"{name} must be a multiple of {factor} pixels, and at least {config.smallest}, for {config.name}, not "
                f"{side}"
            )
    return asked.width or config.size, asked.height or config.size


def make_setup(pipeline: Pipeline, asked: Asked, size: tuple[int, int], before: Setup | None = None) -> Setup:
    """The setup of what is asked for; what did not change is taken from the one before.

    Its LoRAs are in the weights afterwards. Raises UsageError for what cannot be.
    """
    config = pipeline.config
    ladder = asked.ladder(config.scheduler)
    if asked.control_scales is not None and len(asked.control_scales) != len(asked.control):
        raise UsageError(
            f"control_scales must be one number for each control, of which there are {len(asked.control)}, not "
            f"{len(asked.control_scales)}"
        )
    own_loras = pipeline.own_loras if asked.loras is None else asked.loras
    texts, loras = tagged_prompts([text for text, _ in asked.prompts], own_loras, ())
    image_prompts = pipeline.adapted(asked.image_prompts)
    loras = [*loras, *pipeline.identity_loras(image_prompts)]
    pipeline.merge(loras, partial=pipeline.own_partial)

    is_told = config.unet.guidance is not None  # LCM's UNets are told the scale, and guide themselves
    residual = "none" if is_told else asked.residual
    extra = extra_rows(residual, len(ladder), guided=asked.guidance_scale > 1)
    weights = [weight for _, weight in asked.prompts]
    told_of = (
        tuple(texts), tuple(weights), asked.negative_prompt if extra else "", asked.blend, ladder.timesteps, extra,
        asked.guidance_scale if is_told else None, tuple(loras),
    )  # fmt: skip
    if before is not None and before.told_of == told_of:
        told = before.told
    else:
        told = tell(
            pipeline, tuple(zip(texts, weights, strict=True)), asked.negative_prompt, ladder, size,
            extra=extra, guidance_scale=asked.guidance_scale, blend=asked.blend,
        )  # fmt: skip
    if before is not None and before.asked.seeds == asked.seeds and len(before.ladder) == len(ladder):
        noises, noise = before.noises, before.plan.noise
    else:
        noises = Noises(asked.seeds)
        factor = config.vae.factor
        noise = noises.draw((len(ladder), config.vae.latent_channels, size[1] // factor, size[0] // factor))
    plan = make_plan(
        ladder, noise, config.prediction, guidance_scale=asked.guidance_scale, residual=residual, delta=asked.delta,
        renoise=asked.renoise, device=pipeline.device,
    )  # fmt: skip
    keyring_of = (asked.image_prompts, asked.image_encoder)
    if before is not None and all(one is other for one, other in zip(before.keyring_of, keyring_of, strict=True)):
        keyring, told_before = before.keyring, before.told
    else:
        keyring, told_before = _keyring(pipeline, image_prompts, asked.image_encoder, noise), None
    images = before.images if before is not None and told is told_before else _images(keyring, told, len(ladder))
    groups = (1, 1) if images is None else tuple(next(iter(images.keys.values())).shape[2:4])
    request = Request(plan.rows, noise.shape[2], noise.shape[3], told.context.states.shape[1], *groups)
    require_rows(pipeline, asked.control, plan.slots, request, size, images=images is not None)
    return Setup(asked, ladder, loras, noises, told, told_of, plan, keyring, keyring_of, images)


def _keyring(
    pipeline: Pipeline,
    prompts: Sequence[ImagePrompt],
    image_encoder: ImageEncoder | str | Path | None,
    noise: Tensor,
) -> ImageKeyring | None:
    """The image prompts, made ready for latents of the noise's size."""
    if not prompts:
        return None
    return ImageKeyring(
        pipeline.prepared(prompts, image_encoder), pipeline.config.unet, (noise.shape[2], noise.shape[3]),
        device=pipeline.device, dtype=pipeline.dtype,
    )  # fmt: skip


def _images(keyring: ImageKeyring | None, told: Told, slots: int) -> ImageContext | None:
    """What every row of the UNet is shown of image prompts, which act in the slots whose step is between their ends."""
    if keyring is None:
        return None
    rows = len(told.prompt)
    factors = [[float(acts(each, row % slots, slots)) for row in range(rows)] for each in keyring.prompts]
    return keyring.context(told.prompt.flatten(), factors)
