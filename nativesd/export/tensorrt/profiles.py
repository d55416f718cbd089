"""Optimization profiles: the requests that an engine serves, by name, checked, and matched to a request."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nativesd.errors import UsageError
from nativesd.export.slots import CHUNK, Component, Request, Schema, Slot

CHUNKS = 3  # of a prompt, that ready profiles allow
BEST_IMAGES, MOST_IMAGES = (1, 16), (4, 1028)
"""Groups of image prompts, and tokens of each: one adapter with 16, and four with four pictures of 257."""


@dataclass(frozen=True)
class Profile:
    """The requests that an engine serves: from `min` to `max`, fastest at `opt`."""

    name: str
    min: Request
    opt: Request
    max: Request

    def shapes(self, slot: Slot) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The smallest, best and largest shape of a slot."""
        return slot.shape(self.min), slot.shape(self.opt), slot.shape(self.max)


def ready_profile(
    name: str, component: Component, *, native: int, factor: int = 8, image_prompts: bool = True
) -> Profile:
    """A profile by a name that says everything: SIZE[-bIMAGES][-sSLOTS][-cCHUNKS], such as "512", "768x512-b2".

    SIZE     pixels: one size ("1024" is square, "768x512" width and height), any sides in a range ("512to1024"), or
             "dynamic", which is half to one and a half times the native size
    IMAGES   how many pictures at once, 1 by default; UNets and ControlNets take as many rows, or twice as many for
             guidance
    SLOTS    of a stream instead of pictures: a UNet and ControlNets take from as many rows to twice as many, for every
             way of guidance, and are fastest at as many; the VAE takes one picture
    CHUNKS   of a prompt, 3 by default
    native   the side in pixels that the model was trained on, for which ranges are fastest
    factor   pixels per latent cell along one side
    image_prompts  whether a UNet's graph has inputs for them: from none to `MOST_IMAGES`

    Raises UsageError for a name that says nothing, and sizes that have no whole number of cells.
    """
    found = re.fullmatch(r"(?:dynamic|(N)(?:(x|to)(N))?)(?:-b(N)|-s(N))?(?:-c(N))?".replace("N", "[0-9]{1,9}"), name)
    if found is None:
        raise UsageError(
            f"{name!r} is not a profile: such as 512, 768x512, 512to1024 or dynamic, then -b2 for 2 pictures or -s2 "
            "for a stream of 2 slots, and -c4 for 4 chunks of a prompt"
        )
    first, kind, second, images, slots, chunks = found.groups()
    least, most = (int(first or native // 2),) * 2, (int(second or first or native * 3 // 2),) * 2
    best = (min(max(native, least[0]), most[0]),) * 2
    if kind == "x":
        least = best = most = (int(first), int(second))
    if least[0] > most[0]:
        raise UsageError(f"profile {name}: there is no side from {least[0]} to {most[0]} pixels")
    for pixels in (*least, *best, *most):
        if pixels < factor or pixels % factor:
            raise UsageError(f"profile {name}: sides are multiples of {factor} pixels, and {pixels} is not")
    count, longest = int(images or slots or 1), int(chunks or CHUNKS)
    if count < 1 or longest < 1:
        raise UsageError(f"profile {name}: at least one picture and one chunk")
    rows = {"unet": 2, "controlnet": 2, "text_encoder": 2 * longest}.get(component, 1)
    tokens = CHUNK if component == "text_encoder" else longest * CHUNK

    none = (1, 1)
    shown = component == "ip_adapter" or (component == "unet" and image_prompts)
    best_images, most_images = (BEST_IMAGES, MOST_IMAGES) if shown else (none, none)

    def request(batch: int, sides: tuple[int, int], length: int, images: tuple[int, int] = none) -> Request:
        out = Request(batch, sides[1] // factor, sides[0] // factor, length, *images)
        out.require_possible(f"profile {name}")
        return out

    if slots is not None:
        streamed = component in ("unet", "controlnet")
        fewest = count if streamed else 1
        most_rows = rows * count if streamed else rows
        return Profile(
            name,
            request(fewest, least, CHUNK),
            request(fewest, best, CHUNK, best_images),
            request(most_rows, most, tokens, most_images),
        )
    return Profile(
        name,
        request(1, least, CHUNK),
        request(min(2, rows * count), best, CHUNK, best_images),
        request(rows * count, most, tokens, most_images),
    )


def check_profiles(schema: Schema, profiles: Sequence[Profile]) -> None:
    """Raises UsageError where there is none, two have one name, or one is not min <= opt <= max throughout."""
    names = [profile.name for profile in profiles]
    if not names or len({*names}) < len(names):
        raise UsageError(f"an engine needs profiles with names of their own, not {', '.join(names) or 'none'}")
    for profile in profiles:
        for slot in schema.inputs:
            for least, best, most in zip(*profile.shapes(slot), strict=True):
                if not 0 < least <= best <= most:
                    raise UsageError(
                        f"profile {profile.name}: {slot.name} would be from {least} to {most} and best at {best}, "
                        "which is not in order"
                    )


def within(schema: Schema, request: Request, profile: Profile) -> bool:
    """Whether a profile takes a request."""
    return all(
        least <= size <= most
        for slot in schema.inputs
        for size, least, most in zip(
            slot.shape(request), slot.shape(profile.min), slot.shape(profile.max), strict=True
        )
    )  # fmt: skip


def distance(schema: Schema, request: Request, profile: Profile) -> float:
    """How far a request is from what a profile is fastest at: the sum over the axes of the logarithms' differences."""
    return sum(
        abs(math.log(size / best))
        for slot in schema.inputs
        for size, best in zip(slot.shape(request), slot.shape(profile.opt), strict=True)
    )
