"""One pass of the diffusion: what every call does with the modules, whatever it starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from nativesd.diffusion import autoencoder
from nativesd.diffusion.conditioning import Role
from nativesd.diffusion.config import EDITING, INPAINTING, PipelineConfig
from nativesd.diffusion.control import Control, ControlModel, make_hint, steer
from nativesd.diffusion.denoiser import guidance_embedding, keep_known, make_denoiser, watch
from nativesd.diffusion.guidance import Guidance
from nativesd.diffusion.preview import LatentPreview, Step
from nativesd.diffusion.prompting import SDXL, Frame, Sides, negative_side, over_steps, prompt_sides
from nativesd.diffusion.start import Start
from nativesd.diffusion.turns import Turns
from nativesd.errors import NoMemoryError
from nativesd.models.clip import TextEncoder
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.pictures.images import to_pictures
from nativesd.pictures.masks import mask_to_latents, mask_to_tensor
from nativesd.sampling.names import Choice
from nativesd.sampling.noise import BrownianNoise, NoiseKind, NoiseSource, move_noise
from nativesd.sampling.published import Kind
from nativesd.sampling.samplers import Noise
from nativesd.sampling.schedule import Schedule
from nativesd.sampling.table import Call
from nativesd.sampling.variation import Variation, varied_noise
from nativesd.text.embedding import Embedding
from nativesd.text.encode import Text, encode_each, encode_prompts, require_finite
from nativesd.text.tokenizer import ClipTokenizer
from nativesd.tuning.memory import free_bytes, memory_explained, unet_bytes
from nativesd.weights.lora.file import LoraFile
from nativesd.weights.lora.merge import Merged


@dataclass(frozen=True)
class Job:
    """What a call asks of every pass: base, refiner and hires."""

    prompts: Sequence[str]
    negatives: Sequence[str]
    """One for all prompts, or one for each."""
    literal: bool
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
    control: Sequence[Control]
    guess: bool
    refiner: Diffusion | None
    refiner_at: float
    on_step: Callable[[Step], object] | None
    steps_before: int | None = None
    """Steps of the first pass, in the second one."""


class Closes(Protocol):
    """What holds memory that can be given back."""

    def close(self) -> int:
        """Free it; returns how many bytes that was, as far as it is known."""


PIXEL = 40
"""Bytes of memory for a decoded picture's pixel: three float32 numbers, and copies on their way to bytes."""


@dataclass(repr=False)
class Diffusion:
    """A loaded model. The modules are bare: the VAE's scaling factor is applied here.

    tile        side in pixels of the tiles in which the VAE works, None: none, "auto": where a picture is large
    slicing     the VAE takes a batch one picture at a time
    sequential  prompt and negative prompt go through the UNet one by one: less memory (on CUDA, a batch that does not
                fit switches to it by itself)
    offload     modules stay in main memory and visit the device while they are used
    previewer   a small autoencoder (TAESD) for the previews of `on_step`
    """

    config: PipelineConfig
    unet: UNet
    vae: VAE | TinyVAE
    text_encoders: tuple[TextEncoder, ...]
    tokenizers: tuple[ClipTokenizer, ...]
    device: torch.device
    dtype: torch.dtype
    embeddings: dict[str, Embedding] = field(default_factory=dict)
    tile: int | Literal["auto"] | None = "auto"
    slicing: bool = False
    sequential: bool = False
    offload: bool = False
    previewer: TinyVAE | None = None
    acceleration: Closes | None = None
    """The graphs that run in place of modules (`nativesd.pipeline.acceleration`)."""
    own_loras: Sequence[tuple[str, float, float]] = ()
    """Those of every call that names none: file, the UNet's scale, the text encoders'."""
    own_partial: bool = False
    """Whether LoRAs are applied of which a part does not fit."""
    lora_state: Merged | None = None
    """What LoRAs are merged into, and which are in it now."""
    load_control: Callable[[str | Path], ControlModel] | None = None
    """Loads the models of a `Control` that names one."""
    turns: Turns = field(default_factory=Turns)
    """Of the calls on these weights; pipelines that share the weights share them too."""
    _controls: dict[str, ControlModel] = field(default_factory=dict)
    _loras: dict[str, LoraFile] = field(default_factory=dict)
    _lora_words: dict[str, Embedding] = field(default_factory=dict)
    """Learnt words that came with the LoRAs which are merged now"""

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{type(self).__name__} {self.config.name} ({self.config.family}) on {self.device} in {dtype}>"

    @property
    def words(self) -> Mapping[str, Embedding]:
        """The learnt words that a prompt can say: those that were loaded, and those of the LoRAs that are merged."""
        own = {name.casefold() for name in self.embeddings}
        return {**{n: word for n, word in self._lora_words.items() if n.casefold() not in own}, **self.embeddings}

    @memory_explained()
    def encode_prompt(
        self, prompts: Sequence[str], *, literal: bool = False, clip_skip: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Context (B, T, C), both encoders' side by side, and the last encoder's pooled embedding (B, P)."""
        with self.turns.wait(), self._visiting(*self.text_encoders):
            return encode_prompts(
                prompts, self.text_encoders, self.tokenizers, literal=literal, clip_skip=clip_skip,
                embeddings=self.words, device=self.device,
            )  # fmt: skip

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of scaled latents (B, C, h, w). Raises NativesdError where the VAE gives no finite picture."""
        return to_pictures(self.decode_tensor(latents))

    @memory_explained()
    @torch.inference_mode()
    def decode_tensor(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pixels (B, 3, H, W) in [0, 1], float32. Raises NativesdError."""
        config = self.config.vae
        side = (latents.shape[2] * config.factor, latents.shape[3] * config.factor)
        with self.turns.wait(), self._visiting(self.vae):
            return autoencoder.decode(
                self.vae, latents, scaling=config.scaling, name=self.config.name, **self.room(side, len(latents))
            )

    @memory_explained()
    @torch.inference_mode()
    def encode_tensor(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] to mean and standard deviation of the scaled latents, float32."""
        options = self.room((pixels.shape[2], pixels.shape[3]), len(pixels))
        with self.turns.wait(), self._visiting(self.vae):
            return autoencoder.encode(
                self.vae, pixels.to(self.device), scaling=self.config.vae.scaling, name=self.config.name, **options
            )

    def run(self, job: Job, steps: int, size: tuple[int, int], start: Start | None = None) -> Tensor:
        """Clean latents (B, C, h, w) of one size, width and height in pixels, from noise or from `start`.

        Noise is drawn as diffusers' pipelines draw it: for the encoded picture, the start, the masked picture, steps.
        """
        config, factor = self.config, self.config.vae.factor
        job = self._within_memory(job, size)
        total, first = (steps, 0) if start is None else start.steps(steps, editing=config.unet.in_channels == EDITING)
        plan = job.choice.schedule(config.scheduler, total, job.kind, sdxl=config.unet.added is not None).part(first)
        source = varied_noise(job.noise, job.seeds, job.variation_seeds, job.variation, factor)
        shape = (config.vae.latent_channels, size[1] // factor, size[0] // factor)
        if start is None:
            noise = source.first(shape).to(self.device)
            return self._sample(job, plan, noise * plan.start, source, size, steps)
        if config.unet.in_channels == EDITING:
            edited = self.encode_tensor(start.pixels())[0] / config.vae.scaling  # not scaled, as it was trained
            noise = source.first(shape).to(self.device)
            return self._sample(job, plan, noise * plan.start, source, size, steps, channels=edited)

        inpainting = config.unet.in_channels == INPAINTING
        known, channels = None, None
        if not start.all_noise or not inpainting:
            known = start.latents if start.latents is not None else self._draw(start.pixels(), source, job)
        noise = source.first(shape).to(self.device)
        mask = None if start.mask is None else mask_to_latents(start.mask, factor).to(self.device)
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
        if known is None or mask is None or inpainting:
            return self._sample(job, plan, x, source, size, steps, channels=channels)
        latents = self._sample(job, plan, x, source, size, steps, keep=(known, noise, mask))
        return torch.lerp(known, latents, mask)

    def _draw(self, pixels: Tensor, source: NoiseSource, job: Job) -> Tensor:
        """Latents (B, C, h, w) of a picture (1, 3, H, W), drawn for every seed; A1111's noise is not spent on that."""
        mean, std = self.encode_tensor(pixels)
        if job.noise == "cuda" or isinstance(self.vae, TinyVAE):
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
        keep: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """From x at the first sigma to clean latents (B, C, h, w); the refiner takes over where there is one.

        steps     what was asked for, by which prompts change
        channels  further inputs of the UNet; keep  what `keep_known` takes beside the denoiser
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
            sides = model._sides(job, size, channels, steps, plan.sigmas[:-1].tolist())
            steering = None
            if job.control and model is self:
                hints = [make_hint(control, self.config.unet, size, self.config.vae.factor) for control in job.control]
                steering = steer(
                    hints, self.config.unet, plan.sigmas[:-1].tolist(), batch=len(x), cells=(x.shape[2], x.shape[3]),
                    device=self.device, guess=job.guess,
                )  # fmt: skip
            denoise = make_denoiser(
                model.unet,
                sides,
                job.guidance,
                part.timestep,
                model.config.prediction,
                model.dtype,
                steering,
                model.config.scheduler.edm,
            )
            if keep is not None:
                denoise = keep_known(denoise, *keep)
            denoise = watch(denoise, part.sigmas[:-1].tolist(), partial(self._report, job, begin, total))
            networks = [] if steering is None else [hint.model.module for hint in steering.networks]
            with model._visiting(model.unet, *networks):
                x = job.choice.sampler.run(
                    denoise, x, Call(part, noise, job.choice.settings(model.config.scheduler), job.eta)
                )
            broken = [] if steering is None else [name for name, flag in steering.broken.items() if flag]
            require_finite(x, f"ControlNet {broken[0]}" if broken else f"UNet of {model.config.name}", model.dtype)
        return x / plan.end

    def _report(self, job: Job, begin: int, total: int, index: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        if job.on_step is not None:
            job.on_step(Step(begin + index, total, sigma, x, denoised, partial(self.preview, denoised)))

    def _sides(
        self, job: Job, size: tuple[int, int], channels: Tensor | None, steps: int, sigmas: Sequence[float]
    ) -> Sides:
        """The conditionings that guidance combines, over a pass of `sigmas`, of which `steps` were asked for."""
        unet, pictures = self.config.unet, len(job.seeds)
        of_pass = (pictures, steps, job.steps_before)
        texts = prompt_sides(job.prompts, *of_pass, literal=job.literal, second=job.sdxl.prompt_2)
        if unet.guidance is None and (job.guidance.scale > 1 or len(texts) > 1):
            editing = unet.in_channels == EDITING and channels is not None and job.guidance.image_scale != 1
            roles: list[Role] = ["picture", "nothing"] if editing else ["negative"]
            second = job.sdxl.negative_prompt_2
            texts = [
                *(negative_side(job.negatives, *of_pass, role, literal=job.literal, second=second) for role in roles),
                *texts,
            ]

        frame = Frame(
            pictures=pictures,
            size=size,
            ids=None if unet.added is None else unet.added.ids,
            guidance=None if unet.guidance is None else guidance_embedding(job.guidance.scale, unet.guidance),
            channels=channels,
            device=self.device,
            zero_empty=self.config.zero_empty_negative,
            sdxl=job.sdxl,
        )
        encode = partial(self.encode_each, literal=job.literal, clip_skip=job.clip_skip)
        return over_steps(texts, encode, frame, sigmas)

    def encode_each(
        self, prompts: Sequence[Text], *, literal: bool = False, clip_skip: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Contexts (T_i, C), each of its own length, and the last encoder's pooled embedding (B, P)."""
        with self._visiting(*self.text_encoders):
            return encode_each(
                prompts, self.text_encoders, self.tokenizers, literal=literal, clip_skip=clip_skip,
                embeddings=self.words, device=self.device,
            )  # fmt: skip

    def preview(self, latents: Tensor) -> Image.Image:
        """A quick picture of clean latents (B, C, h, w), maybe smaller, a batch side by side."""
        with self.turns.wait(), self._visiting(self.vae):
            return LatentPreview(self.vae, self.config.vae.scaling, self.previewer).preview(latents)

    def room(self, side: tuple[int, int], batch: int) -> dict[str, Any]:
        """How the VAE is to work on `batch` pictures of a size, height and width, in the memory there is."""
        needed = autoencoder.decode_bytes(self.config.vae, *side, dtype=next(self.vae.parameters()).dtype, batch=1)
        free = free_bytes(self.device)
        tile = autoencoder.tile_size(self.tile, *side, needed=needed, free=free)
        return {"tile": tile, "slicing": self.slicing or (free is not None and needed * batch > free)}

    def require_room(self, pictures: int, size: tuple[int, int]) -> None:
        """Raise NoMemoryError where so many pictures of a size, width and height, cannot be made in the free memory."""
        free, factor, (width, height) = free_bytes(self.device), self.config.vae.factor, size
        step = unet_bytes(self.config.unet, pictures, height // factor, width // factor, self.dtype)
        needed = max(step, pictures * width * height * PIXEL)
        if free is not None and needed > free:
            raise NoMemoryError(
                f"{pictures} picture{'s' * (pictures > 1)} of {width}x{height} cannot fit: that takes about"
                f" {needed / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} GB are free; make fewer at a time, or"
                " smaller ones, or try it all the same with force=True (--force)"
            )

    def _within_memory(self, job: Job, size: tuple[int, int]) -> Job:
        """The job, with guidance one by one where the memory asks for it."""
        free, factor, config = free_bytes(self.device), self.config.vae.factor, self.config.unet
        sides = 2 if job.guidance.scale > 1 and config.guidance is None else 1
        needed = unet_bytes(config, len(job.seeds), size[1] // factor, size[0] // factor, self.dtype)
        if free is None or needed * sides <= free:
            return job
        return replace(job, guidance=replace(job.guidance, sequential=True))

    @contextmanager
    def _visiting(self, *modules: nn.Module) -> Iterator[None]:
        """With `offload`, the modules are on the device meanwhile, and in main memory before and after."""
        if not self.offload:
            yield
            return
        try:
            for module in modules:
                module.to(self.device)
            yield
        finally:
            for module in modules:
                module.to("cpu")
