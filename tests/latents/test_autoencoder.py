"""Decoding and encoding in strips, one by one and in half precision against the plain run; memory; previews."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import nativesd
import tiny_scenes as scenes
from nativesd.config import SD_VAE, SDXL_VAE, TAESD, TinyVAEConfig, VAEConfig
from nativesd.errors import NativesdError, UsageError
from nativesd.latents.autoencoder import decode, decode_bytes, encode, tile_size
from nativesd.latents.preview import LatentPreview
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.vae import VAE

FORMS = [
    VAEConfig(widths=(16, 16, 16, 32), layers=1, groups=8),
    VAEConfig(widths=(16, 32, 64, 64), layers=2, groups=16),
    VAEConfig(widths=(8, 16, 16), layers=2, groups=4),
    VAEConfig(widths=(8, 8), layers=1, groups=8),
    VAEConfig(widths=(8,), layers=1, groups=8),
]


@pytest.fixture(scope="module")
def vae() -> VAE:
    """The embedded model's, which is trained."""
    found = nativesd.load(device="cpu").vae
    assert isinstance(found, VAE)
    return found


def mosaic(columns: int, rows: int, side: int = 64) -> Tensor:
    """Scenes of the embedded model side by side, (1, 3, rows * side, columns * side) in [-1, 1]."""
    large, small = (scenes.artworks(round(share * side)) for share in (scenes.LARGE, scenes.SMALL))
    chosen = scenes.scenes()[:: len(scenes.scenes()) // (columns * rows)]
    pictures = [scenes.render(scene, side, large, small) for scene in chosen[: columns * rows]]
    lines = [np.concatenate(pictures[i * columns : (i + 1) * columns], axis=1) for i in range(rows)]
    return torch.from_numpy(np.concatenate(lines)).permute(2, 0, 1)[None] * 2 - 1


def rows_seen(module: nn.Module) -> list[int]:
    """A list that will hold the height of every input of `module`."""
    heights: list[int] = []
    module.register_forward_pre_hook(lambda _, args: heights.append(args[0].shape[2]))
    return heights


@pytest.mark.parametrize(("columns", "rows", "tile"), [(4, 4, 64), (4, 4, 16), (1, 4, 100), (5, 1, 64)])
def test_strips_of_a_trained_vae_are_the_whole_picture(vae: VAE, columns: int, rows: int, tile: int) -> None:
    """Tiles of their own are off by 1 to 9 of 255 in the mean here; strips by rounding."""
    picture = mosaic(columns, rows)
    mean, std = encode(vae, picture, scaling=1.0)
    whole = decode(vae, mean, scaling=1.0)
    strips = decode(vae, mean, scaling=1.0, tile=tile)
    assert whole.shape == strips.shape == picture.shape
    assert (whole - (picture + 1) / 2).abs().mean() < 0.05, "the picture comes back"
    assert (strips - whole).abs().max() < 1e-5
    strips_mean, strips_std = encode(vae, picture, scaling=1.0, tile=tile)
    assert (strips_mean - mean).abs().max() < 1e-5 * mean.abs().max()
    assert (strips_std - std).abs().max() < 1e-5


@pytest.mark.parametrize("config", FORMS)
@pytest.mark.parametrize("cells", [1, 30, 80])
def test_strips_of_every_form(config: VAEConfig, cells: int) -> None:
    """Odd heights, batches, strips of two rows and of many, one to four levels."""
    torch.manual_seed(0)
    model, tile = VAE(config).eval(), round(cells**0.5 * config.factor)
    latents = torch.randn(2, 4, 21, 13)
    images = torch.rand(2, 3, 21 * config.factor, 13 * config.factor) * 2 - 1
    assert (decode(model, latents, scaling=0.5, tile=tile) - decode(model, latents, scaling=0.5)).abs().max() < 3e-5
    for strips, whole in zip(
        encode(model, images, scaling=0.5, tile=tile), encode(model, images, scaling=0.5), strict=True
    ):
        assert (strips - whole).abs().max() < 3e-5


def test_full_size_maps_are_never_whole() -> None:
    model = VAE(FORMS[1]).eval()
    latents = torch.randn(1, 4, 32, 32)
    for stage in (model.decoder.up[3], model.encoder.down[0]):
        heights = rows_seen(stage.resnets[1].conv2)
        decode(model, latents, scaling=1.0, tile=64)
        encode(model, torch.rand(1, 3, 256, 256), scaling=1.0, tile=64)
        # 16 strips of 16 rows, and two rows of either neighbour
        assert len(heights) == 16
        assert max(heights) == 20


def measured(config: VAEConfig | TinyVAEConfig, run: str, **environment: str) -> tuple[float, float, int]:
    """Seconds that `run` takes in a process of its own, bytes it adds at its peak, and the process's peak."""
    code = f"""
import time, torch
from nativesd.latents.autoencoder import decode, encode
from nativesd.config import TinyVAEConfig, VAEConfig
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.vae import VAE
def status(name):
    return [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name)][0]
torch.manual_seed(0)
config = {config!r}
vae = (VAE if isinstance(config, VAEConfig) else TinyVAE)(config).eval()
decode(vae, torch.randn(1, 4, 8, 8), scaling=1)  # what the first run alone needs
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before, start = status("VmRSS"), time.perf_counter()
{run}
print(time.perf_counter() - start, status("VmHWM") - before, status("VmHWM"))
"""
    variables = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
    seconds, added, peak = done.stdout.split()
    return float(seconds), int(added), int(peak)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_memory_of_strips() -> None:
    """About one feature map of full size, where a plain decode has four of twice the width.

    Strips as small as these would come from glibc's heap, which keeps a part of what is freed, another in every run.
    """
    config = VAEConfig(widths=(32, 64, 64, 64), layers=1, groups=8)
    run = "decode(vae, torch.randn(1, 4, 64, 64), scaling=1, tile={})"
    plain, strips = (
        measured(config, run.format(tile), MALLOC_MMAP_THRESHOLD_=str(256 << 10))[1] for tile in (None, 64)
    )
    estimate = decode_bytes(config, 512, 512, torch.float32)
    print(
        f"\n512x512, widths {config.widths}: plain {plain >> 20} MB, estimated {estimate >> 20}, strips {strips >> 20}"
    )
    assert strips <= 0.3 * plain


@linux
@pytest.mark.full
@pytest.mark.parametrize(
    ("config", "height", "width", "dtype", "batch"),
    [
        (SD_VAE, 512, 512, torch.float32, 1),
        (SD_VAE, 768, 512, torch.bfloat16, 1),
        (SD_VAE, 512, 512, torch.float32, 2),
        (SD_VAE, 1024, 1024, torch.float32, 1),
        (TAESD, 1024, 1024, torch.float32, 1),
        (TAESD, 2048, 2048, torch.float32, 1),
    ],
)
def test_estimate_of_a_plain_decode(
    config: VAEConfig | TinyVAEConfig, height: int, width: int, dtype: torch.dtype, batch: int
) -> None:
    latents = f"torch.randn({batch}, 4, {height // 8}, {width // 8})"
    seconds, added, _ = measured(config, f"decode(vae.to({dtype}), {latents}, scaling=1)")
    estimate = decode_bytes(config, height, width, dtype, batch)
    print(
        f"\n{batch} of {width}x{height}, {dtype}: {added / 1e9:.2f} GB, {estimate / 1e9:.2f} expected, {seconds:.0f} s"
    )
    assert 0.75 * estimate <= added <= 1.25 * estimate


@linux
@pytest.mark.full
@pytest.mark.parametrize(("run", "limit"), [
    ("decode(vae, torch.randn(1, 4, 256, 256), scaling=0.18215, tile=tile_size('auto', 2048, 2048))", 4e9),
    ("encode(vae, torch.rand(1, 3, 2048, 2048) * 2 - 1, scaling=0.18215, tile=tile_size('auto', 2048, 2048))", 5e9),
])  # fmt: skip
def test_2048_pixels_in_strips(run: str, limit: float) -> None:
    """The published VAE in float32, all of the process counted."""
    seconds, added, peak = measured(SD_VAE, f"from nativesd.latents.autoencoder import tile_size\n{run}")
    print(
        f"\n{run.split('(')[0]} of 2048x2048: peak {peak / 1e9:.2f} GB, {added / 1e9:.2f} of it added, {seconds:.0f} s"
    )
    assert peak <= limit


@pytest.mark.parametrize("tile", [None, 64])
def test_half_precision_is_close(vae: VAE, tile: int | None) -> None:
    latents = encode(vae, mosaic(3, 3), scaling=1.0)[0]
    half = VAE(vae.config).eval()
    half.load_state_dict(vae.state_dict())
    half.to(torch.bfloat16)
    expected = decode(vae, latents, scaling=1.0)
    found = decode(half, latents, scaling=1.0, tile=tile)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.01


def test_slicing_takes_one_picture_at_a_time(vae: VAE) -> None:
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = mosaic(3, 1).chunk(3, dim=3)
    whole = decode(vae, latents, scaling=0.3), *encode(vae, torch.cat(images), scaling=0.3)
    batches: list[int] = []
    hooks = [
        half.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
        for half in (vae.decoder, vae.encoder)
    ]
    sliced = decode(vae, latents, scaling=0.3, slicing=True), *encode(vae, torch.cat(images), scaling=0.3, slicing=True)
    for hook in hooks:
        hook.remove()
    assert batches == [1] * 6
    for a, b in zip(whole, sliced, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("tile", [None, 32])
@pytest.mark.parametrize(("half", "run"), [("decoder", decode), ("encoder", encode)])
def test_overflow_in_half_precision(half: str, run: Callable[..., Any], tile: int | None) -> None:
    """Features beyond 65504: said to be so, and from then on the result is that of float32."""
    torch.manual_seed(0)
    model = VAE(FORMS[2]).eval()
    conv = getattr(model, half).conv_in
    with torch.no_grad():
        conv.weight *= 3e4
        conv.bias.fill_(6e4)
    model.half()
    inputs = torch.randn(1, conv.in_channels, 48, 40)
    expected = run(deepcopy(model).float(), inputs, scaling=1.0, tile=tile)
    with pytest.warns(UserWarning, match="the VAE overflowed in half precision: it runs in float32 from now on"):
        found = run(model, inputs, scaling=1.0, tile=tile)
    assert conv.weight.dtype == torch.float32
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, inputs, scaling=1.0, tile=tile)


@pytest.mark.parametrize("tile", [None, 32])
def test_broken_weights_are_said_to_be(tile: int | None) -> None:
    model = VAE(FORMS[2]).eval()
    with torch.no_grad():
        model.post_quant_conv.weight.fill_(torch.nan)
        model.quant_conv.weight.fill_(torch.nan)
    with pytest.raises(NativesdError, match=r"^abc: the picture is not finite \(NaN\)"):
        decode(model, torch.randn(1, 4, 12, 10), scaling=1.0, tile=tile, name="abc")
    with pytest.raises(NativesdError, match=r"^abc: the encoded picture is not finite"):
        encode(model, torch.rand(1, 3, 48, 40), scaling=1.0, tile=tile, name="abc")


@pytest.mark.parametrize(
    "config", [TAESD, TinyVAEConfig(width=8, encoder=(2, 1, 1), decoder=(1, 2, 1)), TinyVAEConfig(width=8)]
)
def test_strips_of_taesd(config: TinyVAEConfig) -> None:
    """Strips reach as far as the convolutions do: no further would be needed, less would show."""
    torch.manual_seed(0)
    model, factor = TinyVAE(config).eval(), config.factor
    for weight in model.parameters():
        nn.init.uniform_(weight, 0, 0.02)  # nothing is lost in a ReLU, so that everything in reach counts
    latents, images = torch.rand(2, 4, 90, 3), torch.rand(2, 3, 90 * factor, 3 * factor) * 2 - 1
    assert (decode(model, latents, scaling=1, tile=8) - decode(model, latents, scaling=1)).abs().max() < 1e-5
    mean, std = encode(model, images, scaling=1)
    strips, _ = encode(model, images, scaling=1, tile=8)
    assert mean.shape == latents.shape
    assert (strips - mean).abs().max() < 1e-5 * mean.abs().max()
    assert (std == 0).all()


def test_scaling_is_undone(vae: VAE) -> None:
    mean, std = encode(vae, mosaic(2, 1), scaling=1.0)
    scaled, scaled_std = encode(vae, mosaic(2, 1), scaling=0.25)
    assert (scaled == mean * 0.25).all()
    assert (scaled_std == std * 0.25).all()
    assert (decode(vae, scaled, scaling=0.25) == decode(vae, mean, scaling=1.0)).all()
    assert 0 < float(std.min()) < float(std.max()) < 1


def test_tile_sizes() -> None:
    assert tile_size(None, 4096, 4096) is None
    assert tile_size(320, 64, 64) == 320
    assert tile_size("auto", 1536, 1536) is None
    assert tile_size("auto", 1537, 64) is not None
    assert tile_size("auto", 512, 512, needed=100, free=200) is None
    assert tile_size("auto", 512, 512, needed=300, free=200) is not None
    for wrong in (0, -8, True, "512", 1.5):
        with pytest.raises(UsageError, match="tile must be a positive number of pixels"):
            tile_size(wrong, 512, 512)  # type: ignore[arg-type]


def test_estimate_grows_with_what_it_counts() -> None:
    one = decode_bytes(SD_VAE, 1024, 1024, torch.float16)
    assert one == 4 * 256 * 1024 * 1024 * 2
    assert decode_bytes(SD_VAE, 1024, 1024, torch.float32, 3) == 6 * one
    assert decode_bytes(SD_VAE, 2048, 512, torch.float16) == one
    assert decode_bytes(TAESD, 1024, 1024, torch.float16) < one


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])


def test_preview_by_the_vae_itself(vae: VAE) -> None:
    """The embedded model's latents are decoded; large ones in small."""
    scaling = vae.config.scaling
    for columns, rows in ((1, 1), (6, 6)):
        picture = mosaic(columns, rows)
        preview = LatentPreview(vae, scaling).preview(encode(vae, picture, scaling=scaling)[0])
        assert decode_bytes(vae.config, preview.height, preview.width, torch.float32) <= 32 << 20
        pixels = (picture[0].permute(1, 2, 0).numpy() + 1) * 127.5
        small = Image.fromarray(pixels.astype(np.uint8)).resize(preview.size)
        assert correlation(np.asarray(preview), np.asarray(small)) > 0.9


def test_previews_of_a_batch_are_side_by_side(vae: VAE) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    preview = LatentPreview(vae, vae.config.scaling).preview(latents)
    assert preview.size == (64, 32)
    second = LatentPreview(vae, vae.config.scaling).preview(latents[1:])
    assert np.abs(np.asarray(preview, int)[:, 32:] - np.asarray(second, int)).max() <= 1


def test_preview_by_taesd(vae: VAE) -> None:
    torch.manual_seed(0)
    tiny = TinyVAE(TinyVAEConfig(half="decoder")).eval()
    latents = torch.randn(1, 4, 8, 8)
    expected = decode(tiny, latents, scaling=1)[0].permute(1, 2, 0).numpy() * 255
    for previews in (LatentPreview(vae, SD_VAE.scaling, tiny), LatentPreview(tiny, 1.0)):
        assert np.abs(np.asarray(previews.preview(latents)) - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("config", "channel", "rgb"),
    [(SD_VAE, 0, (172, 157, 169)), (SD_VAE, 3, (100, 94, 36)), (SDXL_VAE, 1, (109, 125, 141))],
)
def test_preview_by_published_factors(config: VAEConfig, channel: int, rgb: tuple[int, int, int]) -> None:
    """One latent channel at 1, the others at 0: the picture is (factors + bias) / 2 + 0.5."""
    latents = torch.zeros(1, 4, 3, 5)
    latents[:, channel] = 1
    with torch.device("meta"):
        unused = VAE(config)
    preview = LatentPreview(unused, config.scaling).preview(latents)
    assert preview.size == (5, 3)
    assert preview.getpixel((2, 1)) == rgb
