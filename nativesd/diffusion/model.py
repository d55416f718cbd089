"""One pass of the diffusion: what every call does with the modules, whatever it starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nativesd.config import UNetConfig
from nativesd.diffusion.conditioning import Role
from nativesd.diffusion.config import EDITING, INPAINTING
from nativesd.diffusion.control import Control, ControlModel, make_hint, steer
from nativesd.diffusion.denoiser import Asked, Guided, guidance_embedding, keep_known, keep_softly, watch
from nativesd.diffusion.guiding.combine import Guidance
from nativesd.diffusion.guiding.guiders import Guider, combiners_of, guided_sides
from nativesd.diffusion.images.keys import ImageKeyring, ImagePrompting
from nativesd.diffusion.images.prompts import Prepared
from nativesd.diffusion.loaded import Loaded, going_around
from nativesd.diffusion.prompting import SDXL, Frame, Sides, negative_side, over_steps, prompt_sides, with_channels
from nativesd.diffusion.regions import Region, with_regions
from nativesd.diffusion.savings import DeepCache, Saving
from nativesd.diffusion.start import Start
from nativesd.diffusion.tiles import Tiled, Tiles
from nativesd.latents.preview import Step
from nativesd.models.edits import Edit
from nativesd.models.tiling import Circular, Tiling
from nativesd.models.tiny_vae import TinyVAE
from nativesd.pictures.masks import mask_to_tensor
from nativesd.sampling.calls import Call
from nativesd.sampling.methods.onestep import Denoiser, Noise
from nativesd.sampling.names import Choice
from nativesd.sampling.noise import BrownianNoise, NoiseKind, NoiseSource, move_noise
from nativesd.sampling.options import Sampling
from nativesd.sampling.published import Kind
from nativesd.sampling.schedule import Schedule
from nativesd.sampling.steps import Steps
from nativesd.sampling.variation import Variation, varied_noise
from nativesd.text.encode import require_finite
from nativesd.text.syntax import Syntax


@dataclass(frozen=True)
class Job:
    """What a call asks of every pass: base, refiner and hires."""

    prompts: Sequence[str]
    negatives: Sequence[str]
    """One for all prompts, or one for each."""
    syntax: Syntax
    clip_skip: int | None
    seeds: Sequence[int]
    sdxl: SDXL
    noise: NoiseKind
    variation: Variation | None
    variation_seeds: Sequence[int]
    guidance: Guidance
    choice: Choice
    kind: Kind
    eta: float | None
    sampling: Sampling
    control: Sequence[Control]
    guess: bool
    refiner: Diffusion | None
    refiner_at: float
    on_step: Callable[[Step], object] | None
    image_prompts: Sequence[Prepared] = ()
    guiders: Sequence[Guider] = ()
    regions: Sequence[Region] = ()
    tiling: Tiling | None = None
    tiles: Tiles | None = None
    savings: Sequence[Saving] = ()
    steps_before: int | None = None
    """Steps of the first pass, in the second one."""

    def edits(self, unet: UNetConfig) -> list[Edit]:
        """What every call of a UNet does otherwise than it was trained to."""
        edits = [edit for guider in self.guiders if (edit := guider.edit(unet)) is not None]
        edits += [edit for saving in self.savings if (edit := saving.edit(unet)) is not None]
        return edits if self.tiling is None else [*edits, Circular()]


class Diffusion(Loaded):
    """A loaded model, and its passes. See `Loaded` for what it consists of."""

    def run(self, job: Job, steps: int, size: tuple[int, int], start: Start | None = None) -> Tensor:
        """Clean latents (B, C, h, w) of one size, width and height in pixels, from noise or from `start`.

        Noise is drawn as diffusers' pipelines draw it: for the encoded picture, the start, the masked picture, steps.
        """
        config, factor = self.config, self.config.vae.factor
        job = self._within_memory(job, size)
        total, first = (steps, 0) if start is None else start.steps(steps, editing=config.unet.in_channels == EDITING)
        plan = job.choice.schedule(
            config.scheduler, total, job.kind, job.sampling, sdxl=config.unet.added is not None
        ).part(first)
        source = varied_noise(job.noise, job.seeds, job.variation_seeds, job.variation, factor)
        shape = (config.vae.latent_channels, size[1] // factor, size[0] // factor)
        if start is None:
            noise = source.first(shape).to(self.device)
            return self._sample(job, plan, noise * plan.start, source, size, steps)
        if config.unet.in_channels == EDITING:
            edited, _ = self.encode_tensor(start.pixels(), tiling=job.tiling)
            edited = edited / config.vae.scaling  # not scaled, as it was trained
            noise = source.first(shape).to(self.device)
            return self._sample(job, plan, noise * plan.start, source, size, steps, channels=edited)

        inpainting = config.unet.in_channels == INPAINTING
        known, channels = None, None
        if not start.all_noise or not inpainting or start.soft is not None:
            known = start.latents if start.latents is not None else self._draw(start.pixels(), source, job)
        noise = source.first(shape).to(self.device)
        cells = start.cells(factor)
        mask = None if cells is None else cells.to(self.device)
        if mask is not None and start.mask is not None:
            visible = start.pixels() * (mask_to_tensor(start.mask) < 0.5).to(self.device)
            hidden = self._draw(visible, source, job)  # diffusers draws for it even where no UNet looks at it
            if inpainting:
                channels = torch.cat([mask.round().expand(len(hidden), -1, -1, -1), hidden], dim=1)
        if known is not None and mask is not None and start.fill in ("noise", "nothing"):
            known = torch.lerp(known, noise if start.fill == "noise" else torch.zeros_like(noise), mask)
        if known is None or (mask is not None and start.all_noise):
            x = noise * plan.start
        else:
            x = known + noise * float(plan.sigmas[0])
        if known is None or mask is None or (inpainting and start.soft is None):
            return self._sample(job, plan, x, source, size, steps, channels=channels)
        if start.soft is not None:
            start.soft.begin(known, mask)
            softly = partial(keep_softly, soft=start.soft)
            return self._sample(job, plan, x, source, size, steps, channels=channels, keep=softly)
        firmly = partial(keep_known, known=known, noise=noise, mask=mask)
        return torch.lerp(known, self._sample(job, plan, x, source, size, steps, keep=firmly), mask)

    def _draw(self, pixels: Tensor, source: NoiseSource, job: Job) -> Tensor:
        """Latents (B, C, h, w) of a picture (1, 3, H, W), drawn for every seed; other programs spend no noise on it."""
        mean, std = self.encode_tensor(pixels, tiling=job.tiling)
        if job.noise != "cpu" or isinstance(self.vae, TinyVAE):
            return mean.expand(len(job.seeds), -1, -1, -1)
        return mean + std * source.draw(mean.shape[1:]).to(self.device)

    def _sample(
        self,
        job: Job,
        plan: Schedule,
        x: Tensor,
        source: NoiseSource,
        size: tuple[int, int],
        steps: int,
        *,
        channels: Tensor | None = None,
        keep: Callable[[Denoiser], Denoiser] | None = None,
    ) -> Tensor:
        """From x at the first sigma to clean latents (B, C, h, w); the refiner takes over where there is one.

        steps     what was asked for, by which prompts change
        channels  further inputs of the UNet; keep  what keeps of a picture what its mask leaves
        """
        total = len(plan.timesteps)
        noise: Noise = lambda sigma, sigma_next: move_noise(source.draw(x.shape[1:]), self.device)  # noqa: E731
        if job.choice.brownian:
            above_zero = plan.sigmas[plan.sigmas > 0]
            noise = BrownianNoise(x, float(above_zero[-1]), float(plan.sigmas[0]), job.seeds, job.noise)
        parts: list[tuple[Diffusion, int, int]] = [(self, 0, total)]
        if job.refiner is not None:
            trained = self.config.scheduler.train_steps
            handover = int((plan.timesteps >= round(trained - job.refiner_at * trained)).sum())
            parts = [(self, 0, handover), (job.refiner, handover, total)]
        for model, begin, end in parts:
            if begin == end:
                continue
            part = plan.part(begin, end)
            settings, eta = job.choice.settings(model.config.scheduler), job.choice.eta(job.eta)
            call = Call(part, noise, settings, eta, options=job.sampling)
            guided, networks = model._guided(
                job, part, call.steps(plan), x, size, steps, channels, steered=model is self
            )
            call = replace(call, unguided=guided.unguided)
            denoise = guided if keep is None else keep(guided)
            denoise = watch(denoise, call.steps(part), partial(self._report, job, begin, total))
            modules = [model.unet, *(network.module for network in networks)]
            with model._visiting(*modules), going_around(modules, job.tiling):
                x = job.choice.sampler.run(denoise, x, call)
            broken = guided.broken()
            require_finite(x, f"ControlNet {broken[0]}" if broken else f"UNet of {model.config.name}", model.dtype)
        return x / plan.end

    def _guided(
        self,
        job: Job,
        part: Schedule,
        moments: Steps,
        x: Tensor,
        size: tuple[int, int],
        steps: int,
        channels: Tensor | None,
        *,
        steered: bool,
    ) -> tuple[Tiled, list[ControlModel]]:
        """What samplers call for a `part` of a plan, over the windows of x, and the ControlNets that it asks.

        moments  the plan's steps; steps  as in `_sample`
        """
        factor = self.config.vae.factor
        hints = [make_hint(each, self.config.unet, size, factor) for each in job.control] if steered else []
        tiles = Tiles(max(size)) if job.tiles is None else job.tiles
        parts = []
        networks: dict[int, ControlModel] = {}
        windows = tiles.windows(x.shape[2], x.shape[3], factor)
        cells = windows[0].bottom - windows[0].top, windows[0].right - windows[0].left  # which all of them have
        # what all windows are told is made once, and its keys and values are kept once
        told = self._sides(job, (cells[1] * factor, cells[0] * factor), channels is not None, steps, moments)
        sides, asked = guided_sides(told, job.guiders, moments), dict[int, Asked]()
        shown = None
        if steered and job.image_prompts:
            keyring = ImageKeyring(job.image_prompts, self.config.unet, cells, device=self.device, dtype=self.dtype)
            shown = ImagePrompting(keyring, moments)
        for window in windows:
            steering = None
            if hints:
                seen = [replace(hint, pixels=window.of(hint.pixels, factor)) for hint in hints]
                steering = steer(
                    seen, self.config.unet, moments, batch=len(x), cells=cells, device=self.device, guess=job.guess
                )
                networks |= {id(hint.model.module): hint.model for hint in steering.networks}
            guided = Guided(
                self.unet,
                sides if channels is None else with_channels(sides, window.of(channels)),
                job.guidance,
                part.timestep,
                self.config.prediction,
                self.dtype,
                steering,
                self.config.scheduler.edm,
                combiners=combiners_of(job.guiders),
                edits=job.edits(self.config.unet),
                shown=shown,
                asked=asked if channels is None else None,
                cache=next((saving for saving in job.savings if isinstance(saving, DeepCache)), None),
            )
            parts.append((window, guided))
        return Tiled(parts), list(networks.values())

    def _report(self, job: Job, begin: int, total: int, index: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        if job.on_step is not None:
            job.on_step(Step(begin + index, total, sigma, x, denoised, partial(self.preview, denoised)))

    def _sides(self, job: Job, size: tuple[int, int], channels: bool, steps: int, moments: Steps) -> Sides:
        """The conditionings that guidance combines, over the steps of a pass, of which `steps` were asked for.

        `channels` says that further channels come to them.
        """
        unet, pictures = self.config.unet, len(job.seeds)
        of_pass = (pictures, steps, job.steps_before)
        texts = prompt_sides(job.prompts, *of_pass, syntax=job.syntax, second=job.sdxl.prompt_2)
        if unet.guidance is None and (job.guidance.guides or len(texts) > 1):
            editing = unet.in_channels == EDITING and channels and job.guidance.image_scale != 1
            roles: list[Role] = ["picture", "nothing"] if editing else ["negative"]
            second = job.sdxl.negative_prompt_2
            texts = [
                *(negative_side(job.negatives, *of_pass, role, syntax=job.syntax, second=second) for role in roles),
                *texts,
            ]

        frame = Frame(
            pictures=pictures,
            size=size,
            ids=None if unet.added is None else unet.added.ids,
            guidance=None if unet.guidance is None else guidance_embedding(job.guidance.scale, unet.guidance),
            device=self.device,
            zero_empty=self.config.zero_empty_negative,
            sdxl=job.sdxl,
        )
        encode = partial(self.encode_each, syntax=job.syntax, clip_skip=job.clip_skip)
        sides = over_steps(texts, encode, frame, moments)
        if not job.regions:
            return sides
        parts = [prompt_sides([each.prompt], *of_pass, syntax=job.syntax)[0] for each in job.regions]
        return with_regions(sides, over_steps(parts, encode, frame, moments), job.regions)

    def _within_memory(self, job: Job, size: tuple[int, int]) -> Job:
        """The job, with guidance one by one where the memory asks for it."""
        sides = 2 if job.guidance.guides and self.config.unet.guidance is None else 1
        seen = size if job.tiles is None else (min(size[0], job.tiles.size), min(size[1], job.tiles.size))
        if self.fits(len(job.seeds) * sides, seen):
            return job
        return replace(job, guidance=replace(job.guidance, sequential=True))
