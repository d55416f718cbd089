"""Sources of Gaussian noise, one stream per picture, so that a batch is its pictures made alone.

All noise is drawn on the CPU in float32, and so is the same on every device.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from nativesd.errors import UsageError, install_line

NoiseKind = Literal["cpu", "cuda", "comfyui"]
"""Whose `torch.randn` the noise is: the CPU's; that of an NVIDIA card, imitated on the CPU; or both, as ComfyUI on such
a card takes them, for a whole batch of one seed."""


class NoiseSource(Protocol):
    """A stream of noise for each picture of a batch."""

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise of each picture, of `shape` each: (B, *shape), float32 on the CPU."""

    def first(self, shape: Sequence[int]) -> Tensor:
        """The noise that pictures begin from, of the same form."""


def noise_source(kind: NoiseKind, seeds: Sequence[int]) -> NoiseSource:
    """Streams of `kind` that begin at `seeds`, one for each picture; ComfyUI's pictures of one seed are a batch."""
    kinds: dict[NoiseKind, type[CpuNoise | CudaNoise | ComfyNoise]]
    kinds = {"cpu": CpuNoise, "cuda": CudaNoise, "comfyui": ComfyNoise}
    return kinds[kind](seeds)


def move_noise(noise: Tensor, device: torch.device) -> Tensor:
    """Noise onto a device: CUDA fetches it from pinned memory by itself, and nobody waits."""
    if device.type == "cuda":
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


class CpuNoise:
    """`torch.randn` on the CPU with a generator for each seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise of each picture: (B, *shape), float32."""
        return torch.stack([torch.randn(*shape, generator=g, dtype=torch.float32) for g in self._generators])

    first = draw


class CudaNoise:
    """What `torch.randn` gives on an NVIDIA card for a generator freshly seeded with each seed.

    The numbers are those that A1111 documents for its "NV" source (modules/rng_philox.py). They are computed in double
    precision; A1111 and the card round earlier, and differ by about 1e-6.

    This holds for shapes of which the card computes every element in a thread of its own: up to its multiprocessors
    times the threads resident on each (2048, or 1536 on consumer cards since 2020), such as 125952 on an RTX 3090; a
    1024x1024 picture has 4 * 128 * 128 = 65536. Beyond, a card's threads compute up to four elements each, from all
    four words of a Philox call (`distribution_elementwise_grid_stride_kernel` in torch's
    aten/src/ATen/native/cuda/DistributionTemplates.h), which is not imitated.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)
        self._draws = 0

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise of each picture: (B, *shape), float32."""
        noise = torch.stack([philox_normal(seed, self._draws, math.prod(shape)) for seed in self._seeds])
        self._draws += 1  # a card's offset grows by 4 numbers with each call, which is 1 Philox block
        return noise.view(-1, *shape)

    first = draw


class ComfyNoise:
    """ComfyUI's on an NVIDIA card: the noise that a batch begins from by the CPU, that of its steps by the card.

    Pictures of the same seed are a batch, in their order, and a batch is drawn at once from a generator with its seed
    (Comfy-Org/ComfyUI comfy/sample.py, `prepare_noise`; comfy/k_diffusion/sampling.py, `default_noise_sampler`).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)
        self._draws = 0

    def first(self, shape: Sequence[int]) -> Tensor:
        """The noise that pictures begin from: (B, *shape), float32."""
        return in_batches(self._seeds, lambda seed, count: CpuNoise([seed]).draw((count, *shape))[0])

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise of each picture: (B, *shape), float32."""
        numbers, block = math.prod(shape), self._draws
        self._draws += 1
        return in_batches(
            self._seeds, lambda seed, count: philox_normal(seed, block, count * numbers).view(count, *shape)
        )


def in_batches(keys: Sequence[int], drawn: Callable[[int, int], Tensor]) -> Tensor:
    """Of each picture its own, (B, ...), of what is `drawn` for a key and so many pictures: those that have the key."""
    batches = {key: iter(drawn(key, count)) for key, count in Counter(keys).items()}
    return torch.stack([next(batches[key]) for key in keys])


def philox_normal(seed: int, block: int, count: int) -> Tensor:
    """`count` normal numbers, (count,) float32: number i is of Philox's counter (block, 0, i, 0) and the key `seed`.

    That is cuRAND's layout: the low half of the counter is the offset, the high half the subsequence, which is the
    thread (`curand_init` in curand_kernel.h). Seeds are of 64 bits.
    """
    thread = torch.arange(count, dtype=torch.int64)
    zero = torch.zeros_like(thread)
    first, second, _, _ = philox_4x32((zero + (block & _LOW), zero + (block >> 32), thread, zero), seed)
    return box_muller(first, second)


_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four 32-bit words of each of n blocks: (n,) int64 each, from 0 to 2^32 - 1."""


def philox_4x32(counter: Words, key: int) -> Words:
    """Philox-4x32-10, the counter-based generator of Salmon et al. 2011 (section 3.3; Random123's philox.h)."""
    a, b, c, d = counter
    low_key, high_key = key & _LOW, key >> 32
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(a, _MULTIPLIERS[0])
        high_c, low_c = _multiply(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ low_key, low_c, high_a ^ d ^ high_key, low_a
        low_key, high_key = (low_key + _KEY_STEPS[0]) & _LOW, (high_key + _KEY_STEPS[1]) & _LOW
    return a, b, c, d


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of 32-bit numbers, by halves, as int64 does not hold it."""
    by_low, by_high = words * (factor & 0xFFFF), words * (factor >> 16)  # below 2^48
    middle = by_high + (by_low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (by_low & 0xFFFF)


def box_muller(radius: Tensor, angle: Tensor) -> Tensor:
    """Normal numbers (n,) float32 of 32-bit words (n,), two for each: the sine half of Box and Muller 1958.

    Words are scaled as in cuRAND's `_curand_box_muller` (curand_normal.h): w * 2^-32 + 2^-33, so that none is zero.
    """
    u, v = (words.double() * 2.0**-32 + 2.0**-33 for words in (radius, angle))
    return (torch.sqrt(-2.0 * torch.log(u)) * torch.sin(2.0 * math.pi * v)).float()


class BrownianNoise:
    """Noise between two sigmas out of one Brownian path per picture, so that steps of any size see the same path.

    Called with (sigma, sigma_next) it answers noise (B, ...) of unit variance, float32 on the device of `x`. The
    numbers are those of k-diffusion's `BrownianTreeNoiseSampler` on the CPU with a list of seeds; with kind "cuda",
    A1111's on a card, where the tree's `randn` is the card's (modules/sd_samplers_common.py,
    `replace_torchsde_browinan`); with "comfyui" the CPU's, with one path for all pictures of a seed. `x` (B, ...) gives
    shape and device; the path spans sigma_min to sigma_max, and torchsde warns of sigmas outside.

    Raises UsageError where torchsde, an optional dependency, is missing.
    """

    def __init__(
        self, x: Tensor, sigma_min: float, sigma_max: float, seeds: Sequence[int], kind: NoiseKind = "cpu"
    ) -> None:
        try:
            torchsde: Any = importlib.import_module("torchsde")
        except ImportError:
            raise UsageError(f"this sampler's noise needs torchsde: {install_line('samplers')}") from None
        self._device = x.device
        self._kind = kind
        self._ascending = sigma_min < sigma_max
        low, high = sorted((_single(sigma_min), _single(sigma_max)))
        self._paths: Sequence[int] = seeds if kind == "comfyui" else range(len(seeds))
        entropy = dict(zip(self._paths, seeds, strict=True))
        with _normals_of(kind):
            self._trees = {
                path: torchsde.BrownianTree(low, torch.zeros(count, *x.shape[1:]), high, entropy=entropy[path])
                for path, count in Counter(self._paths).items()
            }

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """The path's increment from `sigma` to `sigma_next` over its standard deviation: (B, ...) float32."""
        low, high = sorted((_single(sigma), _single(sigma_next)))
        ends = [round(float(end), _TREE_DIGITS) for end in (low, high)]  # else it warns that the last is beyond its own
        with _normals_of(self._kind):
            increment = in_batches(self._paths, lambda path, _: self._trees[path](*ends))
        if (sigma < sigma_next) != self._ascending:
            increment = -increment
        return move_noise(increment / (high - low).sqrt(), self._device)


def _single(sigma: float) -> Tensor:
    """k-diffusion's sigmas are single precision, and the tree is cut at exactly those."""
    return torch.tensor(sigma, dtype=torch.float32)


_TREE_DIGITS = 6
"""Decimals to which torchsde rounds the places where it cuts its tree, which is of tolerance 1e-6."""
_torchsde_lock = threading.Lock()


@contextmanager
def _normals_of(kind: NoiseKind) -> Iterator[None]:
    """torchsde draws normals of `kind` meanwhile. It has no option for it, so its function is replaced, as A1111 does.

    Locked for all kinds: no other thread may draw from the replaced function.
    """
    interval: Any = importlib.import_module("torchsde._brownian.brownian_interval")
    with _torchsde_lock:
        original = interval._randn
        if kind == "cuda":
            interval._randn = _philox_randn
        try:
            yield
        finally:
            interval._randn = original


def _philox_randn(size: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """torchsde's `_randn`: the first numbers of a generator seeded with `seed`."""
    return CudaNoise([int(seed)]).draw(size)[0].to(device, dtype)
