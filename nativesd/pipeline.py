"""From a prompt to pictures: encode, denoise, decode."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from nativesd.config import Prediction, TextEncoderConfig, UNetConfig, VAEConfig
from nativesd.errors import NativesdError, UsageError
from nativesd.models.clip import TextEncoder
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.result import Result
from nativesd.sampling.samplers import Sampler, find_sampler
from nativesd.sampling.schedule import Schedule, SchedulerConfig, make_schedule
from nativesd.text.tokenizer import ClipTokenizer

# sgm inference/api.py (SamplingParams): the refiner's aesthetic scores for the prompt and the negative prompt
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


@dataclass(frozen=True)
class PipelineConfig:
    """Everything about a loaded model that is not a tensor."""

    name: str
    family: str
    """sd1, sd2, sdxl or refiner"""
    unet: UNetConfig
    vae: VAEConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    scheduler: SchedulerConfig
    prediction: Prediction
    size: int
    """Default side of a picture, in pixels."""
    zero_empty_negative: bool
    """SDXL's force_zeros_for_empty_prompt: without a negative prompt its embeddings are zeros."""
    guidance_scale: float | None = None
    """The model's own default; None: the family's."""

    @property
    def few_steps(self) -> bool:
        """A distilled model (turbo): published with trailing spacing on an Euler scheduler; guidance is off."""
        return self.scheduler.spacing == "trailing" and self.scheduler.class_name.startswith("Euler")

    @property
    def default_guidance(self) -> float:
        """Classifier-free guidance where none is asked for: few-step models none, SDXL 5, others 7.5."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        return 1.0 if self.few_steps else 5.0 if self.unet.added is not None else 7.5


@dataclass(frozen=True)
class Step:
    """What `on_step` receives, once for every step, after the model has answered.

    `latents` (B, C, h, w) are the sampler's, noise included, at `sigma`; `denoised` the clean latents it predicts.
    """

    index: int
    total: int
    sigma: float
    latents: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told: context (B, T, C), and SDXL's pooled embedding (B, P) and time ids (B, n)."""

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __add__(self, other: Conditioning) -> Conditioning:
        """Both, one after the other along the batch."""

        def join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        context = torch.cat([self.context, other.context])
        return Conditioning(context, join(self.pooled, other.pooled), join(self.time_ids, other.time_ids))


@dataclass
class Pipeline:
    """A loaded model. The modules are bare: the VAE's scaling factor is applied here."""

    config: PipelineConfig
    unet: UNet
    vae: VAE
    text_encoders: tuple[TextEncoder, ...]
    tokenizers: tuple[ClipTokenizer, ...]
    device: torch.device
    dtype: torch.dtype
    _warned: set[str] = field(default_factory=set, repr=False)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        seed: int | None = None,
        num_images: int = 1,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Make pictures of `prompt`, or of each of several.

        width, height   pixels, multiples of the VAE's factor (8 as published); default: what the model was trained on
        steps           default 20 (few-step models: 4)
        guidance_scale  classifier-free guidance; 1 and below: off. Default 7.5, SDXL 5, few-step models off, "tiny" 3
        sampler         such as "Euler a", "DPM++ 2M Karras" or a published class's name; default: the model's own
        schedule        "karras" or "automatic" (the model's own)
        seed            of the first picture; picture i has seed + i. Default: a random one
        num_images      pictures of each prompt; all are made as one batch
        on_step         called with a `Step` at every step

        Raises UsageError for an option that cannot be.
        """
        config = self.config
        width, height = self._size(width), self._size(height)
        steps = (4 if config.few_steps else 20) if steps is None else steps
        if guidance_scale is None:
            guidance_scale = config.default_guidance
        if not math.isfinite(guidance_scale):
            raise UsageError(f"guidance_scale must be a finite number, not {guidance_scale}")
        if num_images < 1:
            raise UsageError(f"num_images must be at least 1, not {num_images}")
        if config.unet.in_channels != config.vae.latent_channels:
            raise UsageError(
                f"{config.name} takes {config.unet.in_channels} input channels (inpainting or an edited picture), "
                f"which a prompt alone does not give"
            )
        chosen, karras = self._sampler(sampler, schedule)
        plan = make_schedule(config.scheduler, chosen.rule, steps, karras=karras)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UsageError("there is no prompt: pass a text, or several")
        seed = secrets.randbits(32) if seed is None else seed
        seeds = [seed + i for i in range(num_images * len(prompts))]
        if not 0 <= seeds[0] <= seeds[-1] < 1 << 64:
            raise UsageError(f"seeds must be between 0 and 2^64 - 1, not {seed}")
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        conditioning, guided = self._conditioning(prompts, negative_prompt, guidance_scale, width, height, num_images)
        shape = (config.vae.latent_channels, height // config.vae.factor, width // config.vae.factor)

        def noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        denoise = self._denoiser(plan, conditioning, guidance_scale, guided, on_step)
        sigmas = plan.sigmas.tolist()
        latents = chosen.run(denoise, noise() * plan.start, sigmas, noise, config.prediction)
        latents = latents / math.hypot(1, sigmas[-1])  # a last sigma above zero leaves variance to take out
        return Result(
            images=self.decode(latents),
            seeds=seeds,
            latents=latents,
            parameters={
                "prompt": prompt if isinstance(prompt, str) else [p for p in prompts for _ in range(num_images)],
                "negative_prompt": negative_prompt,
                "steps": steps,
                "sampler": chosen.name,
                "schedule": "karras" if karras else "automatic",
                "guidance_scale": guidance_scale,
                "seed": seed,
                "width": width,
                "height": height,
                "model": config.name,
            },
        )

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context (B, T, C), both encoders' side by side, and the last encoder's pooled embedding (B, P)."""
        outputs = [
            encoder(torch.tensor(tokenizer.encode(prompts), device=self.device))
            for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True)
        ]
        return torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of scaled latents (B, C, h, w). Raises NativesdError where the VAE gives no finite picture."""
        images = self.decode_tensor(latents)
        array = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, 3, H, W) -> (B, H, W, 3)
        return [Image.fromarray(picture) for picture in array]

    @torch.inference_mode()
    def decode_tensor(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pixels (B, 3, H, W) in [0, 1], float32. Raises NativesdError."""
        latents = latents / self.config.vae.scaling
        images = self.vae.decode(latents.to(self.vae.quant_conv.weight.dtype)).float()
        if not images.isfinite().all() and self.vae.quant_conv.weight.dtype != torch.float32:
            warnings.warn("the VAE overflowed in half precision: it decodes in float32 from now on", stacklevel=2)
            self.vae.float()
            images = self.vae.decode(latents.float())
        if not images.isfinite().all():
            raise NativesdError(
                f"{self.config.name}: the picture is not finite (NaN), so the model's weights are broken"
            )
        return (images / 2 + 0.5).clamp(0, 1)

    def _size(self, pixels: int | None) -> int:
        factor = self.config.vae.factor
        if pixels is None:
            return self.config.size
        if pixels < factor or pixels % factor:
            raise UsageError(
                f"width and height must be positive multiples of {factor} pixels for this model, not {pixels}"
            )
        return pixels

    def _sampler(self, name: str | None, schedule: str | None) -> tuple[Sampler, bool]:
        """The sampler and whether its schedule is Karras': as asked for, else the model's own."""
        own = self.config.scheduler
        try:
            sampler, kind = find_sampler(name or own.class_name, schedule)
        except UsageError:
            if name is not None or schedule is not None:
                raise
            raise UsageError(
                f"{self.config.name} names the scheduler {own.class_name}, which is not supported: pass sampler="
            ) from None
        return sampler, own.karras if kind is None else kind == "karras"

    def _conditioning(
        self, prompts: Sequence[str], negative: str, guidance_scale: float, width: int, height: int, count: int
    ) -> tuple[Conditioning, bool]:
        """The prompts' conditioning, `count` rows each; the negative one's before it where guidance is on."""
        config = self.config
        guided = guidance_scale > 1 and config.unet.guidance is None
        context, pooled = self.encode_prompt([negative, *prompts] if guided else prompts)
        if guided and config.zero_empty_negative and negative == "":
            context[0], pooled[0] = 0, 0

        total = count * len(prompts)

        def rows(tensor: Tensor, negative: bool) -> Tensor:
            return (
                tensor[:1].expand(total, *tensor.shape[1:])
                if negative
                else tensor[-len(prompts) :].repeat_interleave(count, 0)
            )

        def side(score: float, *, negative: bool) -> Conditioning:
            if config.unet.added is None:
                return Conditioning(rows(context, negative))
            tail = [score] if config.unet.added.ids == 5 else [height, width]
            ids = torch.tensor([height, width, 0, 0, *tail], dtype=torch.float32, device=self.device)
            return Conditioning(rows(context, negative), rows(pooled, negative), ids.expand(total, -1))

        positive = side(AESTHETIC_SCORE, negative=False)
        return (side(NEGATIVE_AESTHETIC_SCORE, negative=True) + positive if guided else positive), guided

    def _denoiser(
        self,
        plan: Schedule,
        conditioning: Conditioning,
        guidance_scale: float,
        guided: bool,
        on_step: Callable[[Step], None] | None,
    ) -> Callable[[Tensor, float], Tensor]:
        """The function that samplers call: noisy latents and sigma to the predicted clean latents, both float32."""
        total = len(plan.sigmas) - 1
        steps_seen: set[int] = set()
        index_of = {sigma: i for i, sigma in reversed(list(enumerate(plan.sigmas[:-1].tolist())))}
        embedded_guidance = None
        if self.config.unet.guidance is not None:
            scale = guidance_embedding(guidance_scale, self.config.unet.guidance)
            embedded_guidance = scale.expand(len(conditioning.context), -1).to(self.device)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            scaled = x / math.hypot(1, sigma)
            inputs = torch.cat([scaled, scaled]) if guided else scaled
            output: Tensor = self.unet(
                inputs.to(self.dtype),
                plan.timestep(sigma),
                conditioning.context,
                pooled=conditioning.pooled,
                time_ids=conditioning.time_ids,
                guidance=embedded_guidance,
            ).float()
            if guided:
                negative, positive = output.chunk(2)
                output = negative + guidance_scale * (positive - negative)
            denoised = to_clean(output, x, sigma, self.config.prediction)
            index = index_of.get(sigma)
            if on_step is not None and index is not None and index not in steps_seen:
                steps_seen.add(index)
                on_step(Step(index, total, sigma, x, denoised))
            return denoised

        return denoise


def to_clean(output: Tensor, x: Tensor, sigma: float, prediction: Prediction) -> Tensor:
    """The clean latents that a UNet's output means at x = clean + sigma * noise (Karras et al. 2022, table 1)."""
    match prediction:
        case "epsilon":
            return x - sigma * output
        case "v":
            return x / (1 + sigma**2) - output * (sigma / math.hypot(1, sigma))
        case "sample":
            return output


def guidance_embedding(guidance_scale: float, width: int) -> Tensor:
    """LCM's embedding (1, width) of the guidance scale, sines first (Luo et al. 2023, `w_embedding`)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = (guidance_scale - 1) * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos()])[None]
