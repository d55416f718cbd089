"""Image prompts to the keys and values that a UNet adds to its attentions, made once for a pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nativesd.config import UNetConfig
from nativesd.diffusion.conditioning import Group
from nativesd.diffusion.control import acts
from nativesd.diffusion.images.prompts import Prepared
from nativesd.models.unet import ImageContext
from nativesd.pictures.masks import mask_to_tensor
from nativesd.sampling.steps import Steps

FILLING = -1e4
"""A logit so low that its exponential is 0 beside any other's, and that half precision holds."""


class ImageKeyring:
    """The keys and values of a pass's image prompts, for latents of `cells`, height and width."""

    def __init__(
        self,
        prompts: Sequence[Prepared],
        unet: UNetConfig,
        cells: tuple[int, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.prompts = prompts
        self._unet = unet
        self._device, self._dtype = device, dtype
        self._layers = [
            [prompt.adapter.module.keys_values(tokens) for tokens in prompt.groups] for prompt in prompts
        ]  # prompt, group, attention: keys and values (2, S, C)
        self._masks = [[_at_levels(mask, unet, cells) for mask in prompt.masks] for prompt in prompts]

    def context(self, prompt: Tensor, factors: Sequence[Sequence[float]]) -> ImageContext | None:
        """What B rows of the UNet are shown; None: nothing.

        prompt   (B,) 1 for rows of the prompt, 0 for those of the negative prompt
        factors  of every image prompt, one for all rows or one for each
        """
        active = [number for number, each in enumerate(factors) if any(each)]
        if not active:
            return None
        groups = [(number, group) for number in active for group in range(len(self._layers[number]))]
        lengths = [self._layers[number][group][0][0].shape[1] for number, group in groups]
        rows = (1 - prompt).long().to(self._device)  # 0: the prompt's tokens, 1: those of the negative prompt
        scaled = torch.tensor([factors[number] for number, _ in groups], device=self._device, dtype=self._dtype)
        factor = scaled.T[None, :, :, None, None]  # (G, B or 1) -> (1, B or 1, G, 1, 1)
        keys, values = dict[int, Tensor](), dict[int, Tensor]()
        places = self._unet.cross_attentions
        for width in sorted({place.width for place in places}):
            own = [number for number, place in enumerate(places) if place.width == width]
            keys[width] = self._stacked(groups, own, 0, max(lengths), rows)
            values[width] = self._stacked(groups, own, 1, max(lengths), rows) * factor
        return ImageContext(keys, values, self._bias(lengths, len(rows)), self._masks_of(groups))

    def _bias(self, lengths: Sequence[int], rows: int) -> Tensor | None:
        """For B rows (B, G, S): what groups are filled up with, where they differ in length, is not attended to."""
        if len(set(lengths)) == 1:
            return None
        bias = torch.zeros(len(lengths), max(lengths), device=self._device, dtype=self._dtype)
        for number, length in enumerate(lengths):
            bias[number, length:] = FILLING
        return bias.expand(rows, -1, -1).contiguous()

    def _stacked(
        self, groups: Sequence[tuple[int, int]], attentions: Sequence[int], part: int, longest: int, rows: Tensor
    ) -> Tensor:
        """Keys or values of attentions of one width: (L, B, G, S, C)."""
        every = []
        for attention in attentions:
            each = [self._layers[number][group][attention][part] for number, group in groups]
            if part:
                scales = [self.prompts[number].scales[attention] for number, _ in groups]
                each = [tensor * scale for tensor, scale in zip(each, scales, strict=True)]
            filled = [F.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in each]  # (2, S, C)
            every.append(torch.stack(filled, 1))  # (2, G, S, C)
        stacked = torch.stack(every).to(self._device, self._dtype)
        return stacked[:, rows]  # (L, 2, G, S, C) -> (L, B, G, S, C)

    def _masks_of(self, groups: Sequence[tuple[int, int]]) -> dict[int, Tensor] | None:
        """The masks of all groups, by level (1, G, h, w); None where none has one."""
        own = [self._masks[number] for number, _ in groups]
        found = [masks[group if len(masks) > 1 else 0] for masks, (_, group) in zip(own, groups, strict=True)]
        shown = next((each for each in found if each is not None), None)
        if shown is None:
            return None
        every = [{level: torch.ones_like(shown[level]) for level in shown} if each is None else each for each in found]
        return {
            level: torch.stack([each[level] for each in every])[None].to(self._device, self._dtype) for level in shown
        }


def _at_levels(mask: Image.Image | None, unet: UNetConfig, cells: tuple[int, int]) -> dict[int, Tensor] | None:
    """A mask (h, w) at every level that has attention: taken from its pixels (bicubic), as diffusers does."""
    if mask is None:
        return None
    pixels = mask_to_tensor(mask)
    out = {}
    height, width = cells
    for level in range(len(unet.levels)):
        if level in unet.attended_levels:
            out[level] = F.interpolate(pixels, (height, width), mode="bicubic")[0, 0]
        height, width = -(-height // 2), -(-width // 2)
    return out


class ImagePrompting:
    """The image prompts of one pass."""

    def __init__(self, keyring: ImageKeyring, steps: Steps) -> None:
        self._keyring = keyring
        self._steps = steps
        self._made: dict[tuple[tuple[bool, ...], Group], ImageContext | None] = {}

    def at(self, sigma: float, group: Group) -> ImageContext | None:
        """What the UNet is shown for the rows of a group, at a sigma; kept for as long as nothing changes."""
        step = self._steps.at(sigma)
        active = tuple(acts(prompt, step, len(self._steps)) for prompt in self._keyring.prompts)
        key = (active, group)
        if key not in self._made:
            self._made[key] = self._keyring.context(group.side.prompt, [[float(each)] for each in active])
        return self._made[key]
