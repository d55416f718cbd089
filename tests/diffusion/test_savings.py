"""Token merging against tomesd, HyperTile against attention tile by tile, and that neither is on by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nativesd
from nativesd import DeepCache, HyperTile, TokenMerging
from nativesd.config import Level, UNetConfig
from nativesd.diffusion.savings import merging, tiles
from nativesd.errors import UsageError
from nativesd.models.build import build
from nativesd.models.edits import Place
from nativesd.models.reuse import Reuse
from nativesd.models.unet import UNet
from nativesd.pictures.infotext import Infotext
from nativesd.pictures.programs.a1111 import generation_options
from oracles import draw

CONFIG = UNetConfig(
    levels=(Level(32, (1, 1), (1, 1, 1), 2), Level(64, (1, 1), (1, 1, 1), 4)), mid=(1, None), context=48
)


@pytest.fixture(scope="module")
def unet() -> UNet:
    network = build(CONFIG)
    assert isinstance(network, UNet)
    draw(network, 0)
    return network


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 16, 24, generator=generator), torch.randn(2, 77, 48, generator=generator)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("size", [(8, 8), (16, 10), (7, 9)])
def test_merging_is_tomesds(size: tuple[int, int], ratio: float) -> None:
    oracle = pytest.importorskip("tomesd.merge")
    height, width = size
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(2, height * width, 12, generator=generator) for _ in range(2))
    merge, unmerge = merging(x, size, ratio)
    theirs, back = oracle.bipartite_soft_matching_random2d(
        x, width, height, 2, 2, int(height * width * ratio), no_rand=True
    )
    assert merge(y).shape == theirs(y).shape
    assert torch.allclose(unmerge(merge(y)), back(theirs(y)), atol=1e-6)
    fewer = merge(y)
    assert torch.allclose(fewer.sort(1).values, theirs(y).sort(1).values, atol=1e-6)


def test_nothing_merged_is_the_plain_answer(unet: UNet) -> None:
    latents, context = inputs()
    with torch.inference_mode():
        plain = unet(latents, 500, context)
        assert torch.equal(unet(latents, 500, context, edits=(TokenMerging(0.0).edit(CONFIG),)), plain)
        assert torch.equal(unet(latents, 500, context, edits=(HyperTile(192).edit(CONFIG),)), plain)
        merged = unet(latents, 500, context, edits=(TokenMerging(0.5).edit(CONFIG),))
        split = unet(latents, 500, context, edits=(HyperTile(64).edit(CONFIG),))
    for changed in (merged, split):
        assert 1e-3 < float((changed - plain).abs().max() / plain.abs().max()) < 1


def test_tiles_attend_to_themselves() -> None:
    """Every tile as a feature map of its own."""
    x = torch.randn(2, 16 * 24, 8, generator=torch.Generator().manual_seed(3))
    seen: list[tuple[int, ...]] = []

    def attend(tokens: Tensor) -> Tensor:
        seen.append(tuple(tokens.shape))
        return tokens - tokens.mean(1, keepdim=True)

    place = Place("down", 0, size=(16, 24))
    found = HyperTile(64).edit(CONFIG).self_attention(place, None, x, attend)  # type: ignore[arg-type]
    assert seen == [(2 * 6, 64, 8)]
    maps, expected = x.view(2, 16, 24, 8), torch.empty(2, 16, 24, 8)
    for top in (0, 8):
        for left in (0, 8, 16):
            part = maps[:, top : top + 8, left : left + 8]
            expected[:, top : top + 8, left : left + 8] = part - part.mean((1, 2), keepdim=True)
    assert torch.allclose(found, expected.flatten(1, 2), atol=1e-6)
    deep = Place("down", 1, size=(16, 24))
    assert HyperTile(64).edit(CONFIG).self_attention(deep, None, x, lambda y: y) is x  # type: ignore[arg-type]
    assert [tiles(length, 8) for length in (7, 8, 16, 17, 24, 36)] == [1, 1, 2, 1, 3, 4]


def test_savings_in_a_call(tmp_path: Any) -> None:
    pipe = nativesd.load(device="cpu")
    options: dict[str, Any] = {"steps": 2, "seed": 3, "width": 128, "height": 128}
    plain = pipe("a fox", **options)
    saved = pipe("a fox", savings="tome:0.5", **options)
    assert not torch.equal(saved.latents, plain.latents)
    assert "Token merging ratio: 0.5" in saved.infotext()
    split = pipe("a fox", savings=HyperTile(64, depth=1), **options)
    assert not torch.equal(split.latents, plain.latents)
    with pytest.raises(UsageError, match="pass one"):
        pipe("a fox", savings=[TokenMerging(0.3), HyperTile(64)], **options)
    for result in (saved, split):
        again, unheeded = nativesd.options_from(result.save(tmp_path / "saved.png")[0])
        assert not [each for each in unheeded if "model" not in each]
        assert torch.equal(pipe("a fox", savings=again["savings"], **options).latents, result.latents)
    theirs, _ = generation_options(Infotext("", "", {"Steps": "20", "Token merging ratio": "0.4", "Model": "m"}))
    assert theirs["savings"] == "tome:0.4"
    with pytest.raises(UsageError, match="between 0 and"):
        pipe("a fox", savings="tome:0.9", **options)


def test_kept_features_are_those_of_the_call(unet: UNet) -> None:
    """What a call leaves makes the same call again, without its deep levels; a call of another time takes them over."""
    latents, context = inputs()
    counted: list[int] = []
    hook = unet.mid.resnets[0].register_forward_hook(lambda *_: counted.append(1))
    residuals = [torch.full(shape, 0.1) for shape in unet.residual_shapes(2, 16, 24)]
    try:
        with torch.inference_mode():
            for level in (0, 1):
                kept = Reuse(level)
                plain = unet(latents, 500, context, residuals=residuals)
                assert torch.equal(unet(latents, 500, context, residuals=residuals, reuse=kept), plain)
                counted.clear()
                kept.fresh = False
                assert torch.equal(unet(latents, 500, context, residuals=residuals, reuse=kept), plain)
                assert not counted, "the middle was computed"
                other = unet(latents, 400, context, reuse=kept)
                assert not torch.equal(other, unet(latents, 400, context))
    finally:
        hook.remove()


def test_every_second_step_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = nativesd.load(device="cpu")
    options: dict[str, Any] = {"steps": 6, "seed": 3, "sampler": "Euler", "width": 96}
    plain = pipe("a fox", **options).latents
    assert torch.equal(pipe("a fox", savings="deepcache:1", **options).latents, plain)
    fresh: list[bool] = []
    forward = pipe.unet.forward

    def record(*given: Any, **told: Any) -> Tensor:
        fresh.append(not told["reuse"].ready)
        return forward(*given, **told)

    monkeypatch.setattr(pipe.unet, "forward", record)
    kept = pipe("a fox", savings=DeepCache(2), **options).latents
    assert fresh == [True, False] * 3
    assert 0 < float((kept - plain).abs().max() / plain.abs().max()) < 0.5
    fresh.clear()
    pipe("a fox", savings="deepcache:3", guidance="pag:1", **options)
    assert fresh == [True, True, False, False, False, False] * 2
    with pytest.raises(UsageError, match="has levels 0 to"):
        pipe("a fox", savings=DeepCache(2, 7), **options)


@pytest.mark.parametrize(
    "options",
    [{"prompt": "a [strawberry|lemon] on a plate"}, {"prompt": "a fox", "guidance": "interval:start=0.2,end=0.5"}],
    ids=["prompts take turns", "sides take turns"],
)
def test_features_are_never_old(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken was left by the call before the one that takes it, whatever was asked for in between."""
    pipe = nativesd.load(device="cpu")
    made: dict[int, float] = {}
    levels: list[float] = []
    ages: list[int] = []
    forward = pipe.unet.forward

    def record(latents: Tensor, time: float, context: Any, **told: Any) -> Tensor:
        kept = told["reuse"]
        if time not in levels:
            levels.append(time)
        if kept.ready:
            ages.append(len(levels) - 1 - levels.index(made[id(kept)]))
        else:
            made[id(kept)] = time
        return forward(latents, time, context, **told)

    monkeypatch.setattr(pipe.unet, "forward", record)
    pipe(**options, steps=10, sampler="Euler", seed=3, width=96, guidance_scale=4.0, savings="deepcache:3")
    assert ages
    assert max(ages) <= 2
