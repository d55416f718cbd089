"""Noise sources: against the published numbers of Philox and of A1111's CUDA imitation, and against k-diffusion."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import threading
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch

from kdiffusion import kdiffusion_sampling
from nativesd.errors import UsageError
from nativesd.sampling.noise import (
    BrownianNoise,
    CudaNoise,
    NoiseKind,
    box_muller,
    noise_source,
    philox_4x32,
)

KINDS: tuple[NoiseKind, ...] = ("cpu", "cuda")

# torch.randn(3, 4, device="cuda") after seed 0, as A1111's modules/rng_philox.py documents it
CUDA_SEED_0 = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


# Random123's tests/kat_vectors, "philox4x32 10": counter, key, result
@pytest.mark.parametrize(
    ("counter", "key", "result"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter: str, key: str, result: str) -> None:
    a, b, c, d = (torch.tensor([int(word, 16)]) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox_4x32((a, b, c, d), high << 32 | low)] == result.split()


def test_cuda_noise_is_the_documented_one() -> None:
    noise = noise_source("cuda", [0]).draw((3, 4))
    assert noise.dtype == torch.float32
    assert noise.shape == (1, 3, 4)
    torch.testing.assert_close(noise[0], torch.tensor(CUDA_SEED_0), rtol=0, atol=1e-8)


def test_box_muller_at_the_ends_of_the_words() -> None:
    """The smallest word gives the largest radius, sqrt(2 * 33 * ln 2), and no word gives infinity."""
    words = torch.tensor([0, 0xFFFFFFFF])
    quarter = torch.tensor([1 << 30, 1 << 30])  # the sine is 1
    largest, smallest = box_muller(words, quarter).tolist()
    assert largest == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-6)
    assert 0 < smallest < 2e-5


def test_each_draw_moves_the_offset_by_one_block() -> None:
    """torch advances a card's generator by 4 numbers with every call, whatever the size; Philox makes 4 at once."""
    source = noise_source("cuda", [7])
    for block, shape in enumerate([(5,), (2, 3), (5,)]):
        drawn = source.draw(shape)[0].flatten()
        for index, number in enumerate(drawn.tolist()):
            a, b, c, d = torch.tensor([[block], [0], [index], [0]])
            first, second, _, _ = philox_4x32((a, b, c, d), 7)
            assert number == box_muller(first, second).item()


def test_seeds_use_all_64_bits() -> None:
    low, high = noise_source("cuda", [5, 5 + (1 << 32)]).draw((8,))
    assert not torch.equal(low, high)
    assert noise_source("cuda", [(1 << 64) - 1]).draw((4,)).isfinite().all()
    assert noise_source("cpu", [(1 << 64) - 1]).draw((4,)).isfinite().all()


def test_cpu_noise_is_torchs() -> None:
    generator = torch.Generator().manual_seed(3)
    expected = [torch.randn((4, 6, 5), generator=generator) for _ in range(3)]
    source = noise_source("cpu", [3])
    for noise in expected:
        assert torch.equal(source.draw((4, 6, 5))[0], noise)


def test_comfyuis_batch_begins_from_the_cpu_and_goes_on_with_the_card() -> None:
    shape = (4, 8, 8)
    batch = noise_source("comfyui", [7, 7, 7])
    expected = torch.randn((3, *shape), generator=torch.Generator().manual_seed(7))
    assert torch.equal(batch.first(shape), expected)
    steps = [batch.draw(shape) for _ in range(2)]
    card = noise_source("cuda", [7])  # of a picture as large as the batch
    for drawn in steps:
        assert torch.equal(drawn.flatten(), card.draw((3 * 4, 8, 8)).flatten())
    fewer = noise_source("comfyui", [7, 9, 7])
    assert torch.equal(fewer.first(shape)[::2], expected[:2])
    assert torch.equal(fewer.draw(shape)[::2], steps[0][:2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_pictures_alone(kind: NoiseKind) -> None:
    seeds = [11, 12, 99]
    batch = noise_source(kind, seeds)
    alone = [noise_source(kind, [seed]) for seed in seeds]
    for shape in [(4, 8, 8), (4, 8, 8), (2, 3)]:
        noise = batch.draw(shape)
        assert noise.shape == (3, *shape)
        assert noise.device.type == "cpu"
        assert torch.equal(noise, torch.cat([source.draw(shape) for source in alone]))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_standard_normal(kind: NoiseKind) -> None:
    noise = noise_source(kind, [1]).draw((200_000,))[0].double()
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.var()) - 1) < 0.01
    assert abs(float((noise**4).mean()) - 3) < 0.1
    inside = float((noise.abs() < 1).double().mean())
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 0.005


# ---- Brownian

pytestmark = pytest.mark.filterwarnings("error:Should have t")  # torchsde's, of times outside its interval

SIGMAS = [14.614643, 9.7234, 5.1, 2.25, 0.8, 0.1, 0.029168]
SHAPE = (3, 4, 6, 5)
SEEDS = [5, 6, 1 << 40]


@pytest.fixture
def torchsde() -> Any:
    return pytest.importorskip("torchsde")


def test_brownian_noise_is_k_diffusions() -> None:
    sampling = kdiffusion_sampling()
    x = torch.zeros(SHAPE)
    theirs = sampling.BrownianTreeNoiseSampler(x, SIGMAS[-1], SIGMAS[0], seed=SEEDS)
    ours = BrownianNoise(x, SIGMAS[-1], SIGMAS[0], SEEDS)
    warnings.filterwarnings("ignore", "Should have t")  # k-diffusion does not round
    steps = list(pairwise(SIGMAS))
    between = [(9.7234, 7.0), (7.0, 5.1)]
    backwards = [(2.25, 5.1)]  # restarts go up
    for sigma, sigma_next in steps + between + backwards:
        noise = ours(sigma, sigma_next)
        assert noise.dtype == torch.float32
        assert torch.equal(noise, theirs(torch.tensor(sigma), torch.tensor(sigma_next)))


def test_brownian_ends_in_the_other_order_are_k_diffusions() -> None:
    sampling = kdiffusion_sampling()
    x = torch.zeros(SHAPE)
    theirs = sampling.BrownianTreeNoiseSampler(x, SIGMAS[0], SIGMAS[-1], seed=SEEDS)
    ours = BrownianNoise(x, SIGMAS[0], SIGMAS[-1], SEEDS)
    assert torch.equal(ours(5.1, 2.25), theirs(5.1, 2.25))


def test_a_brownian_batch_of_comfyui_is_k_diffusions_of_one_seed() -> None:
    sampling = kdiffusion_sampling()
    x = torch.zeros(3, 4, 8, 8)
    theirs = sampling.BrownianTreeNoiseSampler(x, SIGMAS[-1], SIGMAS[0], seed=5)
    ours = BrownianNoise(x, SIGMAS[-1], SIGMAS[0], [5, 5, 5], "comfyui")
    warnings.filterwarnings("ignore", "Should have t")  # k-diffusion does not round
    for sigma, sigma_next in pairwise(SIGMAS):
        assert torch.equal(ours(sigma, sigma_next), theirs(torch.tensor(sigma), torch.tensor(sigma_next)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_brownian_batch_is_its_pictures_alone(torchsde: Any, kind: NoiseKind) -> None:
    x = torch.zeros(SHAPE)
    batch = BrownianNoise(x, SIGMAS[-1], SIGMAS[0], SEEDS, kind)
    for i, seed in enumerate(SEEDS):
        alone = BrownianNoise(x[:1], SIGMAS[-1], SIGMAS[0], [seed], kind)
        assert torch.equal(batch(5.1, 2.25)[i], alone(5.1, 2.25)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_brownian_noise_has_unit_variance_and_adds_up(torchsde: Any, kind: NoiseKind) -> None:
    noise = BrownianNoise(torch.zeros(2, 4, 64, 64), SIGMAS[-1], SIGMAS[0], [1, 2], kind)
    for sigma, sigma_next in pairwise(SIGMAS):
        drawn = noise(sigma, sigma_next)
        assert abs(float(drawn.mean())) < 0.02
        assert abs(float(drawn.var()) - 1) < 0.03
    whole = noise(5.1, 0.8) * math.sqrt(5.1 - 0.8)
    parts = noise(5.1, 2.25) * math.sqrt(5.1 - 2.25) + noise(2.25, 0.8) * math.sqrt(2.25 - 0.8)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


def test_cuda_brownian_noise_draws_every_node_with_the_cards_numbers(
    torchsde: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As A1111 does it: torchsde's randn is the first draw of a card's generator."""

    def randn(size: Any, dtype: Any, device: Any, seed: Any) -> torch.Tensor:
        return CudaNoise([int(seed)]).draw(size)[0]

    x = torch.zeros(SHAPE)
    ours = BrownianNoise(x, SIGMAS[-1], SIGMAS[0], SEEDS, "cuda")(5.1, 2.25)
    assert not torch.equal(ours, BrownianNoise(x, SIGMAS[-1], SIGMAS[0], SEEDS)(5.1, 2.25))
    monkeypatch.setattr("torchsde._brownian.brownian_interval._randn", randn)
    theirs = kdiffusion_sampling().BrownianTreeNoiseSampler(x, SIGMAS[-1], SIGMAS[0], seed=SEEDS)
    assert torch.equal(ours, theirs(torch.tensor(5.1), torch.tensor(2.25)))


def test_torchsde_is_left_as_it_was(torchsde: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interval = importlib.import_module("torchsde._brownian.brownian_interval")
    original = interval._randn
    noise = BrownianNoise(torch.zeros(1, 4), 0.1, 10, [0], "cuda")
    noise(5, 4)
    assert interval._randn is original
    with pytest.raises(ValueError, match="non-negative"):
        BrownianNoise(torch.zeros(1, 4), 0.1, 10, [-1], "cuda")
    assert interval._randn is original


def test_both_kinds_at_once_do_not_mix(torchsde: Any) -> None:
    x = torch.zeros(1, 4, 8, 8)
    steps = [(10 - i / 4, 10 - (i + 1) / 4) for i in range(20)]
    alone = {kind: [BrownianNoise(x, 0.1, 10, [3], kind)(*step) for step in steps] for kind in KINDS}
    together: dict[str, list[torch.Tensor]] = {}

    def draw(kind: NoiseKind) -> None:
        noise = BrownianNoise(x, 0.1, 10, [3], kind)
        together[kind] = [noise(*step) for step in steps]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=draw, args=(kind,)) for kind in KINDS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for kind in KINDS:
        for ours, expected in zip(together[kind], alone[kind], strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_without_torchsde_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(UsageError, match=r'pip install "\.\[samplers\]"'):
        BrownianNoise(torch.zeros(1, 4), 0.1, 10, [0])


def test_torchsde_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, nativesd.sampling.noise; print('torchsde' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
