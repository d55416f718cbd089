"""The noise levels of a stream, one for every slot, and the shares that its equations take from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nativesd.errors import UsageError
from nativesd.sampling.published import SchedulerConfig
from nativesd.sampling.schedule import alphas_cumprod, skipping_timesteps

MOST_SLOTS = 8


@dataclass(frozen=True)
class Ladder:
    """n noise levels, falling: slot 0, of the newest frame, has the first.

    A latent of slot k is signal[k] * clean + noise[k] * e with e of unit variance. skip and out are those of a
    consistency model's boundary condition (Luo et al. 2023, arXiv 2310.04378, section 4.1): an answer is out[k] * clean
    + skip[k] * latent. All are (n,) float64.
    """

    timesteps: tuple[int, ...]
    signal: Tensor
    noise: Tensor
    skip: Tensor
    out: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sigmas(self) -> list[float]:
        """Noise over signal of every slot."""
        return (self.noise / self.signal).tolist()


def make_ladder(config: SchedulerConfig, timesteps: Sequence[int]) -> Ladder:
    """The levels of `timesteps` in the noise that a model was trained with.

    Raises UsageError where these are not 1 to 8 trained timesteps, falling.
    """
    if not 1 <= len(timesteps) <= MOST_SLOTS:
        raise UsageError(f"a stream has 1 to {MOST_SLOTS} timesteps, one for each of its slots, not {len(timesteps)}")
    for each in timesteps:
        if not 0 <= each < config.train_steps:
            raise UsageError(f"timesteps must be between 0 and {config.train_steps - 1}, not {each}")
    for before, after in pairwise(timesteps):
        if after >= before:
            raise UsageError(f"timesteps must fall from slot to slot, and {after} follows {before}")
    cumulative = alphas_cumprod(config)[torch.tensor(timesteps)]
    scaled = torch.tensor(timesteps, dtype=torch.float64) * config.timestep_scaling
    variance = 0.5**2  # of the data: sigma_data of diffusers' LCMScheduler
    return Ladder(
        tuple(timesteps),
        signal=cumulative.sqrt(),
        noise=(1 - cumulative).sqrt(),
        skip=variance / (scaled**2 + variance),
        out=scaled / (scaled**2 + variance).sqrt(),
    )


def timesteps_of_indices(config: SchedulerConfig, indices: Sequence[int], steps: int | None = None) -> list[int]:
    """The timesteps that StreamDiffusion's `t_index_list` means, of a schedule of `steps` (its num_inference_steps).

    Raises UsageError where they are not indices into it that rise.
    """
    own = skipping_timesteps(config, config.original_steps if steps is None else steps).long().tolist()
    for each in indices:
        if not 0 <= each < len(own):
            raise UsageError(f"t_index_list must have numbers between 0 and {len(own) - 1}, not {each}")
    for before, after in pairwise(indices):
        if after <= before:
            raise UsageError(f"t_index_list must rise, as the noise falls, and {after} follows {before}")
    return [own[each] for each in indices]


def timesteps_of_strength(config: SchedulerConfig, steps: int, strength: float) -> list[int]:
    """The timesteps at which `steps` begin that give up `strength` of a picture, as LCM's image-to-image has them."""
    return [int(each) for each in skipping_timesteps(config, steps, strength)]
