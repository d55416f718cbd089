"""A model that enlarges what it has made, and paints it again."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from nativesd.diffusion.model import Job
from nativesd.diffusion.start import Start
from nativesd.pictures import images
from nativesd.pipeline.adapted import Adapted
from nativesd.pipeline.asked.chosen import choose_sampler
from nativesd.pipeline.asked.hires import LATENT, Hires, enlarge_latents, enlarge_picture
from nativesd.pipeline.upscaling import is_upscaler_file, load_upscaler
from nativesd.text.tags import take_tags


class Twice(Adapted):
    """A loaded model and its second pass. See `Diffusion` for what it consists of."""

    def _with_upscaler(self, hires: Hires) -> Hires:
        """The same with its upscaler's file loaded. Raises what `load_upscaler` does."""
        upscaler = hires.upscaler
        if isinstance(upscaler, str) and is_upscaler_file(upscaler):
            return replace(hires, upscaler=load_upscaler(upscaler, device=self.device))
        return hires

    def _enlarge(self, job: Job, steps: int, latents: Tensor, hires: Hires) -> Tensor:
        """The second pass, of `_second`'s job and `_with_upscaler`'s record: latents of the larger size."""
        factor = self.config.vae.factor
        size = hires.enlarged(latents.shape[3] * factor, latents.shape[2] * factor, factor)
        upscaler = hires.upscaler
        if isinstance(upscaler, str) and upscaler in LATENT:
            larger = enlarge_latents(latents, size, factor, upscaler)
        else:
            pictures = [
                enlarge_picture(each, size, factor, upscaler) for each in self.decode(latents, tiling=job.tiling)
            ]
            larger = self.encode_tensor(images.to_tensor(pictures), tiling=job.tiling)[0]
        start = Start(hires.strength, latents=size.cut(larger), steps_as="all")
        return self.run(replace(job, steps_before=steps), hires.steps or steps, size.size(factor), start)

    def _second(self, job: Job, hires: Hires) -> Job:
        """What the second pass is asked for: as the first, but for what `hires` says."""
        if hires.sampler is not None or hires.schedule is not None:
            choice, kind = choose_sampler(self.config, hires.sampler or job.choice.sampler.name, hires.schedule)
            if hires.sampler is None:
                choice = job.choice  # as it was named
            elif hires.schedule is None and choice.kind is None:
                kind = job.kind
            scale = choice.scale(job.guidance.scale / job.choice.scale(1.0))
            guidance = replace(job.guidance, scale=scale, always=choice.sampler.plus_plus)
            job = replace(job, choice=choice, kind=kind, guidance=guidance)
        if hires.guidance_scale is not None:
            scale = job.choice.scale(hires.guidance_scale)
            job = replace(job, guidance=replace(job.guidance, scale=scale))
        prompts = (
            job.prompts
            if hires.prompt is None
            else [hires.prompt if job.syntax == "literal" else take_tags(hires.prompt)[0]]
        )
        negatives = job.negatives if hires.negative_prompt is None else [hires.negative_prompt]
        return replace(job, prompts=prompts, negatives=negatives)
