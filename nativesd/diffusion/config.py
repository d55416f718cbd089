"""What is known of a loaded model beside its tensors, and what follows from it where a call does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nativesd.config import Prediction, TextEncoderConfig, TinyVAEConfig, UNetConfig, VAEConfig
from nativesd.sampling.published import SchedulerConfig

# input channels: latents; those of an inpainting UNet (latents, mask, known latents); of instruct-pix2pix (two latents)
PLAIN, INPAINTING, EDITING = 4, 9, 8


@dataclass(frozen=True)
class PipelineConfig:
    """Everything about a loaded model that is not a tensor."""

    name: str
    family: str
    """sd1, sd2, sdxl or refiner"""
    unet: UNetConfig
    vae: VAEConfig | TinyVAEConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    scheduler: SchedulerConfig
    prediction: Prediction
    size: int
    """Default side of a picture, in pixels."""
    zero_empty_negative: bool
    """SDXL's force_zeros_for_empty_prompt: without a negative prompt its embeddings are zeros."""
    guidance_scale: float | None = None
    """The model's own default; None: the family's."""
    steps: int | None = None
    """The same for the steps."""
    inferred: Mapping[str, str] = field(default_factory=dict)
    """What was chosen at load without being told, and from what."""
    words: frozenset[str] | None = None
    """All that the embedded model knows; None: of a model that was taught language."""
    file: Path | None = None
    """The single file that all of it is in; None: it is of several"""

    @property
    def smallest(self) -> int:
        """Pixels of the shortest side at which the UNet's deepest feature map is a cell wide."""
        return self.vae.factor << len(self.unet.levels) - 1

    @property
    def few_steps(self) -> bool:
        """A distilled model: LCM's or TCD's sampler, or trailing spacing on an Euler scheduler (turbo, Lightning)."""
        name = self.scheduler.class_name
        return name in ("LCMScheduler", "TCDScheduler") or (
            self.scheduler.spacing == "trailing" and not self.scheduler.zero_snr and name.startswith("Euler")
        )

    @property
    def default_guidance(self) -> float:
        """Guidance where none is asked for: few-step models none, LCM (told its scale) 8.5, SDXL 5, else 7.5."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        if self.unet.guidance is not None:
            return 8.5
        return 1.0 if self.few_steps else 5.0 if self.unet.added is not None else 7.5

    @property
    def default_steps(self) -> int:
        """Steps where none are asked for."""
        return self.steps or (4 if self.few_steps else 20)
