"""Merged checkpoints: methods by their formulas and as sd-mecha has them, in mixed layouts, by blocks and recipes."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import measure_peak, single
from torch import Tensor

import nativesd
from conftest import Run
from nativesd.checkpoints.merging import methods
from nativesd.checkpoints.merging.blocks import blocks_of, parse_blocks
from nativesd.checkpoints.merging.methods import METHODS, How, combine
from nativesd.cli import workshop
from nativesd.config import SD15_UNET, SDXL_UNET
from nativesd.errors import NativesdError, SourceError, UsageError, WeightsError
from nativesd.models.build import expected
from nativesd.weights import entries
from nativesd.weights.formats.header import read_header
from oracles import published_manifests, sparse

pytestmark = pytest.mark.filterwarnings("ignore:.* of no published form", "ignore:.* will not say ")
SEEDS = {"a": 1, "b": 2, "c": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small models of SD1.x in one layout each, and the second in two."""
    base = tmp_path_factory.mktemp("models")
    for name, seed in SEEDS.items():
        single("sd1", base / f"{name}.safetensors", seed=seed)
    nativesd.convert(base / "b.safetensors", base / "b", layout="diffusers")
    torch.save({"state_dict": load_file(base / "c.safetensors")}, base / "c.ckpt")
    return base


def tensors_of(path: Path) -> dict[str, Tensor]:
    """A single file's, without what a merge leaves out."""
    return {key: t for key, t in load_file(path).items() if key not in ("betas", "model_ema.decay")}


def merged(folder: Path, out: Path, *names: str, **options: Any) -> dict[str, Tensor]:
    nativesd.merge([folder / name for name in names], out, **options)
    return tensors_of(out)


FORMULAS: dict[str, tuple[tuple[str, ...], dict[str, Any], Callable[..., Tensor]]] = {
    "weighted-sum": (("a", "b"), {"alpha": 0.3}, lambda a, b: 0.7 * a + 0.3 * b),
    "add-difference": (("a", "b", "c"), {"alpha": 0.8}, lambda a, b, c: a + 0.8 * (b - c)),
    "sum": (("a", "b", "c"), {"weights": [0.5, 0.2, 0.3]}, lambda a, b, c: 0.5 * a + 0.2 * b + 0.3 * c),
    "train-difference": (
        ("a", "b", "c"),
        {},
        lambda a, b, c: a + 1.8 * (b - c) * ((b - a).abs() / ((b - a).abs() + (b - c).abs())).nan_to_num(0),
    ),
}
LAYOUTS = {"a": "a.safetensors", "b": "b", "c": "c.ckpt"}


@pytest.mark.parametrize("method", FORMULAS)
def test_a_method_in_mixed_layouts_is_its_formula(method: str, folder: Path, tmp_path: Path) -> None:
    """A single file, a folder of diffusers' and a pickle give, to the bit, what three single files give."""
    names, options, formula = FORMULAS[method]
    given = {"method": method, "dtype": "f32", **options}
    mixed = merged(folder, tmp_path / "mixed.safetensors", *(LAYOUTS[name] for name in names), **given)
    alike = merged(folder, tmp_path / "alike.safetensors", *(f"{name}.safetensors" for name in names), **given)
    own = [tensors_of(folder / f"{name}.safetensors") for name in names]
    assert mixed.keys() == alike.keys() == own[0].keys()
    for key, tensor in mixed.items():
        assert torch.equal(tensor, alike[key])
        wanted = formula(*(each[key].double() for each in own))
        assert tensor.double().sub(wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("name", METHODS)
def test_alpha_0_and_1_are_copies(name: str, folder: Path, tmp_path: Path) -> None:
    method = METHODS[name]
    if method.alpha is None:
        return
    sources = [LAYOUTS[each] for each in "abc"[: method.least]]
    first = merged(folder, tmp_path / "0.safetensors", *sources, method=name, alpha=0)
    a, b = (tensors_of(folder / f"{each}.safetensors") for each in "ab")
    assert all(tensor.dtype == torch.float16 and torch.equal(tensor, a[key]) for key, tensor in first.items())
    if method.ends_in_b:
        last = merged(folder, tmp_path / "1.safetensors", *sources, method=name, alpha=1)
        assert all(torch.equal(tensor, b[key]) for key, tensor in last.items())


@pytest.mark.parametrize("method", ["weighted-sum", "train-difference"])
def test_piece_by_piece_is_the_whole(
    method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is used again holds nothing of the piece before it, and pieces of all models meet."""
    names = [LAYOUTS[name] for name in FORMULAS[method][0]]
    whole = merged(folder, tmp_path / "whole.safetensors", *names, method=method)
    monkeypatch.setattr(entries, "PIECE", 1024)
    pieces = merged(folder, tmp_path / "pieces.safetensors", *names, method=method)
    assert max(tensor.numel() for tensor in whole.values()) > 10 * 1024
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(pieces[key], whole[key]) for key in whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [7, 64, 1000])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, count: int) -> None:
    """And rounded once, though torch's lerp takes it as it is."""
    a, b = (each.to(dtype) for each in drawn(2, count))
    for alpha in (0.3, 0.5, 0.9, 1.7):
        found = combine(METHODS["weighted-sum"], [a, b], How(alpha=alpha), dtype)
        exact = torch.lerp(a.double(), b.double(), alpha)
        step = exact.abs().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= 0.501 * step).all()


@cache
def mecha(name: str) -> ModuleType:
    """sd-mecha's methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of a package it would be faster with
        pytest.importorskip("sd_mecha", reason="sd-mecha is not installed")
        from importlib import import_module

        return import_module(f"sd_mecha.extensions.builtin.merge_methods.{name}")


def drawn(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def theirs(name: str, models: list[Tensor], how: How) -> Tensor:
    """The same by sd-mecha, of the methods that it has."""
    linear, alpha = mecha("linear"), torch.tensor(how.alpha)
    a, *rest = models
    if name == "weighted-sum":
        return linear.weighted_sum.__wrapped__({"k": a}, {"k": rest[0]}, alpha, key="k")
    if name == "add-difference":
        return linear.add_difference.__wrapped__({"k": a}, {"k": rest[0] - rest[1]}, alpha, key="k")
    if name == "slerp":
        return linear.slerp.__wrapped__(a, rest[0], alpha)
    if name == "train-difference":
        return a + linear.train_difference_mask.__wrapped__(a, *rest, alpha) * (rest[0] - rest[1])
    summed = mecha("ties").ties_sum.__wrapped__(*(each - a for each in rest), k=how.density, vote_sgn=True)
    return a + alpha * summed


SHAPES: list[tuple[int, ...]] = [(), (7,), (40, 30), (9, 4, 3, 3), (700, 500)]
ORACLES = [
    (name, shape)
    for name in ("weighted-sum", "add-difference", "slerp", "train-difference", "ties")
    for shape in SHAPES
    if shape or name != "slerp"  # of which one number has no arc
]


@pytest.mark.parametrize(("name", "shape"), ORACLES)
def test_a_method_is_that_of_sd_mecha(name: str, shape: tuple[int, ...]) -> None:
    models = drawn(3 if METHODS[name].most != 2 else 2, *shape)
    for alpha in (0.25, 0.5, 1.0):
        how = How(alpha=alpha, density=0.3)
        found, wanted = combine(METHODS[name], models, how, torch.float32), theirs(name, models, how)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_slerp_of_what_has_no_arc_is_a_line() -> None:
    a, zero = torch.ones(5), torch.zeros(5)
    for b in (a * 3, -a, zero):
        assert torch.allclose(methods._slerp([a, b], How(alpha=0.25)), torch.lerp(a, b, 0.25), atol=1e-6)


def test_dare_keeps_the_expected_difference() -> None:
    base, b, c = drawn(3, 400, 300)
    how = How(alpha=0.5, density=0.25, seed=7, name="unet.x")
    out = methods._dare([base, b, c], how)
    assert torch.equal(out, methods._dare([base, b, c], how))
    for other in (How(0.5, (), 0.25, 8, "unet.x"), How(0.5, (), 0.25, 7, "unet.y")):
        assert not torch.equal(out, methods._dare([base, b, c], other))
    alone = (methods._dare([base, b], how) - base) / (b - base)
    kept = alone != 0
    assert abs(kept.float().mean() - 0.25) < 0.01
    assert torch.allclose(alone[kept], torch.tensor(0.5 / 0.25), rtol=1e-3)
    everything = methods._dare([base, b, c], How(alpha=1.0, density=1.0))
    assert torch.allclose(everything, (b + c) / 2, atol=1e-6)


def test_magnitude_keeps_the_largest() -> None:
    a, b, c = drawn(3, 10, 10)
    found = methods._magnitude([a, b, c], How(alpha=1.0, density=0.2)) - a
    least = (b - c).abs().flatten().sort().values[79]
    assert torch.allclose(found, (b - c) * ((b - c).abs() >= least), atol=1e-6)
    assert torch.equal(methods._magnitude([a, b], How(alpha=1.0)), a + (b - a))


@pytest.mark.parametrize("angle", [5e-4, 2e-3, 0.1, 1.0, 3.0])
def test_slerp_of_a_large_matrix_is_its_formula(angle: float) -> None:
    """In float64; a sum in float32 over so many numbers is off in the fourth digit, and the angle with it."""
    a, p = drawn(2, 1280 * 1280)
    p = p - (p @ a) / (a @ a) * a
    p *= a.norm() / p.norm()
    b = (1.5 * (a.double() * math.cos(angle) + p.double() * math.sin(angle))).float()
    x, y = a.double() / a.double().norm(), b.double() / b.double().norm()
    between = torch.arccos((x @ y).clamp(-1, 1))
    arc = (x * torch.sin(0.7 * between) + y * torch.sin(0.3 * between)) / torch.sin(between)
    wanted = arc * torch.lerp(a.double().norm(), b.double().norm(), 0.3)
    found = methods._slerp([a, b], How(alpha=0.3))
    assert (found - wanted).norm() / wanted.norm() < 1e-6


# --- blocks


def test_blocks_are_ldms() -> None:
    sd, xl = (blocks_of(config, expected(config)) for config in (SD15_UNET, SDXL_UNET))
    assert set(sd.values()) == {"BASE", "M00", *(f"{side}{i:02}" for side in ("IN", "OUT") for i in range(12))}
    assert set(xl.values()) == {"BASE", "M00", *(f"{side}{i:02}" for side in ("IN", "OUT") for i in range(9))}
    assert (sd["conv_in.weight"], sd["mid.attentions.0.norm.weight"], sd["conv_out.bias"]) == ("IN00", "M00", "OUT11")
    assert (sd["time_embedding.linear_1.weight"], xl["conv_out.bias"]) == ("BASE", "OUT08")


def test_blocks_by_numbers_names_and_paths(folder: Path, tmp_path: Path) -> None:
    """Each block's own number, and the last that fits of those that several fit."""
    a, b = (tensors_of(folder / f"{name}.safetensors") for name in "ab")
    numbers = [i / 20 for i in range(20)]
    by_number = merged(folder, tmp_path / "n.safetensors", "a.safetensors", "b", blocks=numbers, dtype="f32")
    prefix = "model.diffusion_model."
    places = {
        "time_embed.0.weight": 0, "input_blocks.0.0.weight": 1, "input_blocks.4.0.in_layers.2.weight": 5,
        "middle_block.0.in_layers.2.weight": 10, "output_blocks.0.0.in_layers.2.weight": 11, "out.2.weight": 19,
    }  # fmt: skip
    keys = {prefix + name: place for name, place in places.items()} | {"first_stage_model.encoder.conv_in.weight": 0}
    for key, place in keys.items():
        assert torch.allclose(by_number[key], torch.lerp(a[key].float(), b[key].float(), numbers[place]), atol=1e-6)
    text = "in01-in04=0, OUT00=0, mid=1, unet.conv_out=1, vae.*=0, text_encoder=0.25"
    by_name = merged(folder, tmp_path / "p.safetensors", "a.safetensors", "b", alpha=0.5, blocks=text)
    for key, source in (
        ("input_blocks.4.0.in_layers.2.weight", a),
        ("middle_block.0.in_layers.2.weight", b),
        ("out.2.weight", b),
        ("output_blocks.0.0.in_layers.2.weight", a),
    ):
        assert torch.equal(by_name[prefix + key], source[prefix + key])
    key = "first_stage_model.encoder.conv_in.weight"
    assert torch.equal(by_name[key], a[key])
    key = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    assert torch.equal(by_name[key], torch.lerp(a[key].float(), b[key].float(), 0.25).half())


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([0.5] * 24, "blocks must be 20 numbers .*, not 24"),
        ("IN09=1", "'IN09' is neither a block of this model"),
        ("unet.down.9=1", "neither a block of this model .* nor the path"),
        ("IN00=much", "blocks must be numbers, or names with numbers such as IN00=0.3, not 'IN00=much'"),
        ([float("nan")] * 26, "blocks must be numbers"),
        ({"IN00": 1e9}, "blocks must be between -1000 and 1000"),
    ],
)
def test_blocks_that_cannot_be(blocks: Any, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        merged(folder, tmp_path / "out.safetensors", "a.safetensors", "b", blocks=blocks)
    assert list(tmp_path.iterdir()) == []


def test_numbers_without_base_and_for_larger_models() -> None:
    from nativesd.checkpoints.merging.blocks import FULL, _counted

    names = [name for name in FULL if name[-2:] not in ("09", "10", "11")]
    numbers = [float(i) for i in range(26)]
    assert _counted(numbers, names) == {name: float(FULL.index(name)) for name in names}
    assert _counted(numbers[:19], names) == dict(zip(names[1:], numbers, strict=False))
    assert parse_blocks("0, 0.5,\n1") == (0, 0.5, 1)


# --- parts, families, what only one side has


def test_only_some_components(folder: Path, tmp_path: Path) -> None:
    a = tensors_of(folder / "a.safetensors")
    out = merged(folder, tmp_path / "out.safetensors", "a.safetensors", "b", only=["text_encoder"])
    changed = {key.partition(".")[0] for key, tensor in out.items() if not torch.equal(tensor, a[key])}
    assert changed == {"cond_stage_model"}


def test_components_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    """A VAE that is baked in is not merged; a component that only one model has is taken or kept, and said."""
    c = tensors_of(folder / "c.safetensors")
    out = merged(folder, tmp_path / "out.safetensors", "a.safetensors", "b", vae=folder / "c.safetensors")
    for key, tensor in out.items():
        assert torch.equal(tensor, c[key]) == key.startswith("first_stage_model.")
    bare = single("sd1", tmp_path / "bare.safetensors", without="vae", seed=1)
    done = nativesd.merge([bare, folder / "b"], tmp_path / "taken.safetensors")
    assert done.choices == {"vae": f"{bare} has none: that of {folder / 'b'} is taken"}
    done = nativesd.merge([folder / "b", bare], tmp_path / "kept.safetensors")
    assert done.choices == {"vae": f"{bare} has none: that of {folder / 'b'} is kept"}
    b = tensors_of(folder / "b.safetensors")
    for name in ("taken", "kept"):
        found = tensors_of(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(t, b[key]) for key, t in found.items() if key.startswith("first_stage_model."))


def test_a_component_alone(folder: Path, tmp_path: Path) -> None:
    out = merged(folder, tmp_path / "unet.safetensors", "b/unet", "c.ckpt", alpha=1)
    c = tensors_of(folder / "c.safetensors")
    assert out.keys() == {key for key in c if key.startswith("model.diffusion_model.")}
    assert all(torch.equal(tensor, c[key]) for key, tensor in out.items())


def test_what_a_component_alone_lacks_is_listed(folder: Path, tmp_path: Path) -> None:
    done = nativesd.merge([folder / "b" / "unet", folder / "c.ckpt"], tmp_path / "unet.safetensors")
    left = f"{folder / 'b' / 'unet'} has none: that of {folder / 'c.ckpt'} is left out"
    assert done.choices == {"vae": left, "text_encoder": left}


def test_channels_of_two_meanings_are_refused(folder: Path, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    for count in (8, 9):
        state = load_file(folder / "a.safetensors")
        state[key] = torch.randn(32, count, 3, 3).half()
        save_file(state, tmp_path / f"{count}.safetensors")
    with pytest.raises(UsageError, match=r"9.safetensors is an inpainting model and .*8.safetensors an editing model"):
        nativesd.merge([tmp_path / "9.safetensors", tmp_path / "8.safetensors"], tmp_path / "out.safetensors")


@pytest.mark.parametrize("channels", [8, 9])
def test_an_inpainting_model_by_a1111s_rule(channels: int, folder: Path, tmp_path: Path) -> None:
    """The channels of the latents are merged, the others are the first model's."""
    key = "model.diffusion_model.input_blocks.0.0.weight"
    state = load_file(folder / "a.safetensors")
    state[key] = torch.randn(32, channels, 3, 3).half()
    save_file(state, tmp_path / "inpaint.safetensors")
    sources = [tmp_path / "inpaint.safetensors", folder / "b", folder / "c.ckpt"]
    nativesd.merge(sources, tmp_path / "out.safetensors", method="add-difference")
    files = (tmp_path / "out.safetensors", folder / "b.safetensors", folder / "c.safetensors")
    found, b, c = (load_file(file)[key].float() for file in files)
    assert torch.equal(found[:, :4], (state[key][:, :4].float() + (b - c)).half().float())
    assert torch.equal(found[:, 4:], state[key][:, 4:].float())
    with pytest.raises(UsageError, match=r"inpaint.safetensors is an? (inpainting|editing) model .*first"):
        nativesd.merge([folder / "b", tmp_path / "inpaint.safetensors"], tmp_path / "other.safetensors")


def test_families_are_compared_first(folder: Path, tmp_path: Path) -> None:
    other = single("sd2", tmp_path / "other.safetensors", seed=1)
    with pytest.raises(WeightsError, match=r"SD1.x.*SD2.x.*: only models of one family and form can be merged"):
        nativesd.merge([folder / "b", other], tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match="no component in common"):
        nativesd.merge([folder / "b" / "unet", folder / "b" / "vae"], tmp_path / "out")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("family", ["sd2", "sdxl", "refiner"])
def test_every_family(family: str, tmp_path: Path) -> None:
    a, b = (single(family, tmp_path / f"{i}.safetensors", seed=i) for i in (1, 2))
    nativesd.convert(b, tmp_path / "b", layout="diffusers")
    nativesd.merge([a, tmp_path / "b"], tmp_path / "out", alpha=0.25, dtype="f32")
    nativesd.convert(tmp_path / "out", tmp_path / "back.safetensors", layout="ldm")
    one, two, found = (tensors_of(path) for path in (a, b, tmp_path / "back.safetensors"))
    assert all(torch.equal(found[key], torch.lerp(one[key].float(), two[key].float(), 0.25)) for key in one)


# --- recipes


def test_a_recipe_says_all_and_repeats_it(folder: Path, tmp_path: Path, run: Run) -> None:
    for name in ("a.safetensors", "b"):
        os.symlink(folder / name, tmp_path / name)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'method = "dare"\nsources = ["a.safetensors", "b"]\nseed = 5\ndensity = 0.5\n'
        '[blocks]\n"IN00-IN03" = 0.5\n"vae.*" = 0\n'
    )
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    done = run("merge", "--recipe", "recipe.toml", out.name)
    assert (done.returncode, done.stdout) == (0, f"{out.name}\n"), done.stderr
    nativesd.merge(None, again, recipe=out)
    assert again.read_bytes() == out.read_bytes()
    metadata = read_header(out).metadata
    said = json.loads(metadata["sd_merge_recipe"])
    assert said["hashes"]["a.safetensors"] == nativesd.hash_file(folder / "a.safetensors").sha256
    assert "b/unet/diffusion_pytorch_model.safetensors" in said["hashes"]
    assert str(folder) not in metadata["sd_merge_recipe"]
    assert (said["type"], said["seed"], said["blocks"]) == ("nativesd", 5, {"IN00-IN03": 0.5, "vae.*": 0.0})
    assert (metadata["modelspec.merged_from"], metadata["note"]) == ("a, b", "kept")
    (tmp_path / "a.safetensors").unlink()
    os.symlink(folder / "c.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(SourceError, match=r"a.safetensors is not the file that the recipe was made with"):
        nativesd.merge(None, tmp_path / "other.safetensors", recipe=out)
    assert run("merge", "--recipe", "recipe.toml", "--alpha", "0", "x.safetensors").returncode == 2


def test_a_merge_has_an_identity_of_its_own(folder: Path, tmp_path: Path) -> None:
    """What its first model says of itself alone is not said of it; what that was merged of is."""
    one = {"modelspec.title": "A", "modelspec.author": "me", "modelspec.hash_sha256": "0x1", "ss_output_name": "a"}
    save_file(load_file(folder / "a.safetensors"), tmp_path / "a.safetensors", {**one, "note": "kept"})
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    nativesd.merge([tmp_path / "a.safetensors", folder / "b.safetensors"], first)
    nativesd.merge([first, folder / "c.safetensors"], second)
    metadata = read_header(second).metadata
    assert not one.keys() & metadata.keys()
    assert metadata["note"] == "kept"
    names = {each["name"] for each in json.loads(metadata["sd_merge_models"]).values()}
    assert names == {"a.safetensors", "b.safetensors", "c.safetensors", "first.safetensors"}
    nativesd.convert(tmp_path / "a.safetensors", tmp_path / "converted.safetensors", layout="ldm")
    assert one.keys() - read_header(tmp_path / "converted.safetensors").metadata.keys() == {"modelspec.hash_sha256"}


def test_sources_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """And the files of components from elsewhere are checked as well."""
    for place, name in (("x", "a"), ("y", "b"), ("z", "c")):
        (tmp_path / place).mkdir()
        os.symlink(folder / f"{name}.safetensors", tmp_path / place / "model.safetensors")
    x, y, z = (tmp_path / place / "model.safetensors" for place in "xyz")
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    nativesd.merge([x, y], out, alpha=0.3, vae=z)
    nativesd.merge(None, again, recipe=out)
    assert again.read_bytes() == out.read_bytes()
    metadata = read_header(out).metadata
    said = json.loads(metadata["sd_merge_recipe"])
    assert said["sources"] == ["x/model.safetensors", "y/model.safetensors"]
    assert said["hashes"].keys() == {f"{place}/model.safetensors" for place in "xyz"}
    assert metadata["modelspec.merged_from"] == "x/model, y/model"
    for place in (x, z):
        own = os.readlink(place)
        place.unlink()
        os.symlink(folder / "b.safetensors", place)
        with pytest.raises(SourceError, match=rf"{place.parent.name}/model.safetensors is not the file that the"):
            nativesd.merge(None, tmp_path / "other.safetensors", recipe=out)
        place.unlink()
        os.symlink(own, place)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources = 5", "sources = 5 must be a list"),
        ('sources = ["a", "b"]\nmethod = "magic"', "method = 'magic' must be 'weighted-sum' or"),
        ('sources = ["a", "b"]\nalpah = 1', "unknown field 'alpah'"),
        ('sources = ["a", "b"]\nalpha = nan', "alpha = nan must be a number"),
        ("sources = [", "is not TOML"),
        ('sources = ["a", "b"]\nmethod = "sum"\nweights = [1.0]', "weights must be 2 numbers"),
        ('method = "sum"', "lacks the field 'sources'"),
    ],
)
def test_a_recipe_that_cannot_be(text: str, message: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "r.toml").write_text(text)
    told = run("merge", "--recipe", "r.toml", "out.safetensors").stderr
    assert re.match(f"nativesd: r.toml.* {message}", told), told
    with pytest.raises(NativesdError, match=message):
        nativesd.merge(None, tmp_path / "out.safetensors", recipe=tmp_path / "r.toml")


def test_a_merged_folder_repeats_itself(folder: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b"):
        os.symlink(folder / name, tmp_path / name)
    nativesd.merge([tmp_path / "a.safetensors", tmp_path / "b"], tmp_path / "out", alpha=0.3)
    nativesd.merge(None, tmp_path / "again", recipe=tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert (tmp_path / "again" / file.relative_to(tmp_path / "out")).read_bytes() == file.read_bytes()


def test_a_checkpoint_without_recipe(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not say that nativesd merged it"):
        nativesd.merge(None, tmp_path / "out.safetensors", recipe=folder / "a.safetensors")


# --- what cannot be


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (2, {"alpha": float("nan")}, "alpha must be between -1000 and 1000, not nan"),
        (2, {"method": "magic"}, "method must be one of weighted-sum"),
        (2, {"method": "add-difference"}, r"add-difference .* takes 3 models, not 2"),
        (1, {}, "weighted-sum .* takes 2 models, not 1"),
        (3, {}, "weighted-sum .* takes at most 2 models, not 3"),
        (2, {"method": "sum", "weights": [0.5, 0.6]}, "weights must add up to 1, not 1.1"),
        (2, {"method": "sum", "weights": [1.0]}, "weights must be 2 numbers"),
        (2, {"method": "sum", "alpha": 1}, "sum has no alpha"),
        (2, {"method": "sum", "blocks": "IN00=1"}, "sum has no alpha, so no blocks"),
        (2, {"weights": [0.5, 0.5]}, "weighted-sum has no weights"),
        (2, {"density": 0.5}, "weighted-sum has no density"),
        (2, {"method": "ties", "density": 0}, "density must be above 0 and at most 1, not 0"),
        (2, {"only": ["lora"]}, "only must be of unet"),
        (2, {"layout": "diffusers"}, "diffusers is a folder"),
        (2, {"dtype": "f64"}, "dtype must be one of"),
        (2, {"seed": -1}, "seed must be between 0 and"),
        (2, {"seed": 0.5}, "seed must be a whole number, not 0.5"),
        (2, {"alpha": "much"}, "alpha must be a number, not 'much'"),
        (2, {"method": "sum", "weights": 0.5}, "weights must be a list, not 0.5"),
        (2, {"blocks": 5}, "blocks must be numbers, or names with numbers, not 5"),
        (2, {"only": "unet"}, "only must be a list, not 'unet'"),
        (2, {"only": ["text_encoder_2"]}, "only: .* has no text_encoder_2, but "),
        (2, {"only": ["unet"], "blocks": "text_encoder=1"}, "'text_encoder' is in none of what is merged: unet"),
        (2, {"vae": 5}, "vae must be a file, a folder or a hub id, not 5"),
    ],
)
def test_options_that_cannot_be(
    count: int, options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        nativesd.merge([folder / "b"] * count, tmp_path / "out.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_model_is_merged_into_one(folder: Path, tmp_path: Path) -> None:
    """What its file says of itself is said anew."""
    nativesd.convert(folder / "a.safetensors", tmp_path / "a.gguf", layout="ldm", dtype="q8_0")
    mixed = merged(folder, tmp_path / "plain.safetensors", tmp_path / "a.gguf", "b", dtype="f32")
    assert not any(key.startswith("general.") for key in read_header(tmp_path / "plain.safetensors").metadata)
    done = nativesd.merge([tmp_path / "a.gguf", folder / "b"], tmp_path / "out.gguf", dtype="f32")
    assert nativesd.diff(done.path, tmp_path / "plain.safetensors", values=True).ok
    assert len(mixed) == done.tensors
    nativesd.convert(done.path, tmp_path / "half.gguf", layout="ldm", dtype="f16")
    assert nativesd.audit(tmp_path / "half.gguf").ok


def test_a_pickle_is_not_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a \.safetensors or \.gguf file, or a folder: .*out\.ckpt is neither"):
        nativesd.merge([folder / "b"] * 2, tmp_path / "out.ckpt")


def test_sources_are_several(tmp_path: Path) -> None:
    for sources in ("tiny", [1, 2], None):
        with pytest.raises(UsageError, match=r"sources must be several|takes 2 models, not 0"):
            nativesd.merge(sources, tmp_path / "out.safetensors")  # type: ignore[arg-type]  # as people may


def test_numbers_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "a.safetensors")
    state["model.diffusion_model.out.2.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(WeightsError, match=r"conv_out.weight of .*nan.safetensors holds values that are not finite"):
        nativesd.merge([folder / "b", tmp_path / "nan.safetensors"], out)
    for sources, alpha in (
        ([tmp_path / "nan.safetensors", folder / "b"], 0),
        ([folder / "b", tmp_path / "nan.safetensors"], 1),
    ):
        with pytest.raises(
            WeightsError, match=r"conv_out.weight of .*nan.safetensors holds values that are not finite"
        ):
            nativesd.merge(sources, out, alpha=alpha)
    state["model.diffusion_model.out.2.weight"][0, 0, 0, 0] = 6e4
    save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(WeightsError, match=r"conv_out.weight would not be finite in float16"):
        nativesd.merge([folder / "b", tmp_path / "large.safetensors"], out, alpha=1.5)
    assert not out.exists()


def test_the_command(folder: Path, run: Run, tmp_path: Path) -> None:
    assert tuple(workshop.METHODS) == tuple(METHODS)
    a, b = str(folder / "a.safetensors"), str(folder / "b")
    done = run("merge", a, b, "out", "--alpha", "0.3", "--only", "unet")
    assert (done.returncode, done.stdout) == (0, "out\n"), done.stderr
    assert nativesd.audit(tmp_path / "out").ok
    for arguments in (("--alpha", "nan"), ("--method", "add-difference"), ("--weights", "a,b", "--method", "sum")):
        done = run("merge", a, b, "other.safetensors", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.full
def test_cost_of_two_full_size_sdxls(tmp_path: Path) -> None:
    """In under 1 GB, and within 1.5 of the time of reading both and writing one; their hashes are known."""
    a, b = (sparse(published_manifests()["sdxl-base.checkpoint.sgm"], tmp_path / f"{x}.safetensors") for x in "ab")
    for path in (a, b):
        nativesd.hash_file(path)
    copy = (
        "import sys, time; start = time.perf_counter(); *sources, dest = sys.argv[1:]; out = open(dest, 'wb')\n"
        "for i, source in enumerate(sources):\n"
        "    with open(source, 'rb', buffering=0) as file:\n"
        "        while piece := file.read(1 << 24):\n"
        "            i or out.write(piece)\n"
        "out.close(); print(time.perf_counter() - start)"
    )
    merge = (
        "import sys, time, nativesd, nativesd.checkpoints.merging.merge; start = time.perf_counter()\n"
        "nativesd.merge(sys.argv[1:3], sys.argv[3], alpha=0.3); print(time.perf_counter() - start, *PEAK)"
    )
    ratios, peak = [], 0
    for number in range(3):
        [plain] = measure_peak(copy, a, b, tmp_path / "copy")
        (tmp_path / "copy").unlink()
        seconds, peak = measure_peak(merge, a, b, tmp_path / f"{number}.safetensors")
        (tmp_path / f"{number}.safetensors").unlink()
        ratios.append(float(seconds) / float(plain))
        print(f"\nmerge of two SDXL: {float(seconds):.1f} s, reading both and writing one {float(plain):.1f} s", end="")
    print(f"; peak {int(peak) >> 10} MB")
    assert int(peak) < 1 << 20
    assert min(ratios) <= 1.5
