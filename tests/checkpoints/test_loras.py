"""LoRAs under other names, extracted, resized and joined: to the bit, by formulas, and as diffusers reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import single
from torch import Tensor, nn

import nativesd
from conftest import Run
from nativesd.checkpoints.loras.change import convert_lora, join_loras, resize_lora
from nativesd.checkpoints.loras.extract import extract_lora
from nativesd.checkpoints.loras.merge import merge_checkpoint
from nativesd.checkpoints.loras.naming import Base
from nativesd.checkpoints.loras.ranks import Rule, clamp, shrink, split
from nativesd.config import SDXL_UNET
from nativesd.errors import NativesdWarning, UsageError, WeightsError
from nativesd.models.build import expected
from nativesd.weights.files.hashes import hash_file
from nativesd.weights.formats.header import read_header
from nativesd.weights.lora.file import read_lora
from nativesd.weights.lora.merge import set_loras
from nativesd.weights.lora.place import Place
from nativesd.weights.lora.resolve import Use
from nativesd.weights.maps.keymap import load_tables
from oracles import difference, published_manifests, sparse
from pipeline.test_pipeline import save_model
from weights import test_lora as loras

pytestmark = pytest.mark.filterwarnings("ignore:.* of no published form", "ignore:.* will not say ")
FORMS = ("sd15", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {}
    for form in FORMS:
        out[form] = tmp_path_factory.mktemp("models") / form
        save_model(form, out[form])
    return out


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> loras.Model:
    return loras.load_model(request.param, folders)


def every_kind(model: loras.Model) -> list[str]:
    """Attentions of all components, and a convolution with and without a kernel."""
    unet = [name for name in loras.modules(model, (nn.Conv2d,)) if "resnets.0.conv" in name]
    return [*loras.attention(model), *unet[:3]]


def with_loras(model: loras.Model, *uses: tuple[Path, float]) -> loras.Tensors:
    set_loras(model.ours, [Use(read_lora(path), strength, strength) for path, strength in uses])
    return model.found()


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]) for key in wanted
    )


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_is_bit_exact(
    layout: str, dtype: torch.dtype, model: loras.Model, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Alphas that differ from layer to layer stay; diffusers reads what is written, and merges the same."""
    lora = loras.factors(model, every_kind(model))
    tensors = {key: t.to(dtype) for key, t in loras.in_kohya(model, lora, ldm=model.form == "sdxl").items()}
    path = loras.write(tensors, tmp_path / "kohya.safetensors", {"ss_output_name": "kept"})
    done = nativesd.convert(path, tmp_path / "other.safetensors", layout=layout, base=model.folder)
    assert done.tensors == 2 * len(lora)
    other, back = tmp_path / "other.safetensors", tmp_path / "back.safetensors"
    assert not any("alpha" in key for key in load_file(other))
    nativesd.convert(other, back, layout="kohya", base=model.folder)
    assert equal(load_file(back), load_file(path))
    assert read_header(back).metadata["ss_output_name"] == "kept"
    wanted = with_loras(model, (path, 0.5))
    loras.same(with_loras(model, (other, 0.5)), wanted)
    if dtype == torch.float32 and layout == "peft":
        theirs = loras.load_model(model.form, folders)
        theirs.theirs.load_lora_weights(other)
        theirs.theirs.fuse_lora(lora_scale=0.5)
        theirs.theirs.unload_lora_weights()
        loras.same(theirs.reference(), wanted)


def test_alpha_folded_in(model: loras.Model, tmp_path: Path) -> None:
    lora = loras.factors(model, every_kind(model))
    path = loras.write(loras.in_kohya(model, lora), tmp_path / "kohya.safetensors")
    wanted = with_loras(model, (path, 1.0))
    for layout in ("kohya", "diffusers", "peft"):
        out = tmp_path / f"in-{layout}.safetensors"
        convert_lora(path, out, layout=layout, fold_alpha=True, base=model.folder)
        assert not any("alpha" in key for key in load_file(out))
        assert "lora_adapter_metadata" not in read_header(out).metadata
        loras.same(with_loras(model, (out, 1.0)), wanted)


@pytest.mark.parametrize(
    ("source", "layout", "wanted"),
    [
        ("lora-sd15-attn-te.peft", "diffusers", "lora-sd15-attn-te.diffusers"),
        ("lora-sd15-attn-te.diffusers", "peft", "lora-sd15-attn-te.peft"),
        ("lora-sdxl-attn-te.diffusers", "peft", "lora-sdxl-attn-te.peft"),
        ("lora-sdxl.kohya-diffusersnames", "kohya", "lora-sdxl.kohya"),
        ("lora-sd15-attn.diffusers-attnprocs", "diffusers", "lora-sd15-attn.diffusers"),
    ],
)
def test_names_are_those_of_published_files(source: str, layout: str, wanted: str, tmp_path: Path) -> None:
    """The published base that it fits gives the names."""
    manifests = published_manifests()
    path = sparse(manifests[source], tmp_path / "source.safetensors")
    nativesd.convert(path, tmp_path / "out.safetensors", layout=layout)
    assert read_header(tmp_path / "out.safetensors").tensors.keys() == manifests[wanted].shapes.keys()


def test_the_hashes_are_those_of_a1111(model: loras.Model, tmp_path: Path) -> None:
    path = loras.write(loras.in_kohya(model, loras.factors(model, every_kind(model))), tmp_path / "a.safetensors")
    convert_lora(path, tmp_path / "b.safetensors", layout="kohya", base=model.folder)
    metadata, found = read_header(tmp_path / "b.safetensors").metadata, hash_file(tmp_path / "b.safetensors")
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == (found.tensors, found.legacy)
    assert (metadata["ss_network_dim"], metadata["ss_network_module"]) == ("Dynamic", "networks.lora")
    assert metadata["ss_base_model_version"] == {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}[model.form]


# --- extraction


def merged_into(model: loras.Model, lora: Path, out: Path) -> Path:
    merge_checkpoint(model.folder, [Use(read_lora(lora))], out)
    return out


def test_a_lora_is_extracted_again(model: loras.Model, tmp_path: Path) -> None:
    """base + LoRA - base is up x down again, in another layout too; what no LoRA can have is named."""
    lora = loras.factors(model, every_kind(model), ranks=(3,))
    path = loras.write(loras.in_kohya(model, lora), tmp_path / "lora.safetensors")
    tuned = merged_into(model, path, tmp_path / "tuned")
    if model.form == "sd15":
        nativesd.convert(tuned, tmp_path / "tuned.safetensors", layout="ldm")
        tuned = file = tmp_path / "tuned.safetensors"
        key = "model.diffusion_model.out.2.bias"
    else:  # a single file cannot say the form of this small one
        file, key = tuned / "unet" / "diffusion_pytorch_model.safetensors", "conv_out.bias"
    state = load_file(file)
    state[key] += 0.25
    save_file(state, file)
    out = tmp_path / "out.safetensors"
    done = extract_lora(tuned, model.folder, out, rank=3, dtype="f32")
    assert (done.layers, done.ranks) == (len(lora), (3, 3))
    assert done.error < 1e-4
    assert done.left_out == {"unet.conv_out.bias": pytest.approx(0.25)}
    assert {key.split(".")[0] for key in load_file(out)} == {
        loras.kohya(model, name, ldm=model.form == "sdxl") for name in lora
    }
    wanted, found = with_loras(model, (path, 1.0)), with_loras(model, (out, 1.0))
    for name in wanted:
        assert difference(found[name], wanted[name]) <= 1e-5 or torch.equal(found[name], wanted[name])
    metadata = read_header(out).metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "3.0")


def test_what_is_extracted(model: loras.Model, tmp_path: Path) -> None:
    lora = loras.factors(model, every_kind(model), ranks=(3,))
    path = loras.write(loras.in_kohya(model, lora), tmp_path / "lora.safetensors")
    tuned = merged_into(model, path, tmp_path / "tuned")
    done = extract_lora(tuned, model.folder, tmp_path / "a.safetensors", energy=0.5, conv_rank=0, text_encoders=False)
    assert done.ranks[1] <= 3
    assert {name for name in done.left_out if "resnets" in name} == set(done.left_out)
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "a.safetensors"))
    with pytest.raises(WeightsError, match="does not differ from"):
        extract_lora(model.folder, model.folder, tmp_path / "b.safetensors", rank=3)
    assert not (tmp_path / "b.safetensors").exists()


def changed(source: Path, out: Path, more: dict[str, Tensor]) -> Path:
    """A single file of which every parameter is changed, norms and biases too, and some are others."""
    state = load_file(source)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        key: (t.float() + 0.02 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.ndim else t
        for key, t in state.items()
    }
    save_file(tensors | more, out)
    return out


def test_a_whole_fine_tune_is_extracted(run: Run, tmp_path: Path) -> None:
    """Every parameter differs: matrices are extracted, vectors listed; so is what has another shape."""
    base = single("sd1", tmp_path / "base.safetensors", seed=1)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide = torch.cat([load_file(base)[key], torch.randn(32, 5, 3, 3).half()], 1)
    tuned = changed(base, tmp_path / "tuned.safetensors", {key: wide})
    done = extract_lora(tuned, base, tmp_path / "out.safetensors", rank=2)
    assert done.layers > 20
    assert done.left_out["unet.conv_in.weight"] == math.inf
    assert 0 < done.left_out["text_encoder.layers.0.norm1.weight"] < 1
    assert any(name.endswith("norm1.weight") and name.startswith("unet.") for name in done.left_out)
    said = run("lora", "extract", str(tuned), str(base), "b.safetensors", "--rank", "1").stderr
    assert "left out unet.conv_in.weight: of another shape, or only in one of the models" in said


# --- ranks


def tail(values: Tensor, rank: int) -> Tensor:
    return values[rank:].norm() / values.norm()


def test_the_error_is_the_tail_of_the_singular_values() -> None:
    matrix = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 5, 39):
        up, down, error = split(matrix, Rule(rank))
        assert torch.allclose(up.norm(dim=0), values[:rank], rtol=1e-4)
        assert torch.isclose(torch.tensor(error), tail(values, rank), rtol=1e-3)
        assert torch.allclose(torch.linalg.matrix_norm(matrix - up @ down), values[rank:].norm(), rtol=1e-3)
    left, right = torch.randn(300, 8), torch.randn(8, 200)
    up, down, error = shrink(left, right, Rule(5))
    wanted = torch.linalg.svdvals(left @ right)
    assert torch.isclose(torch.tensor(error), tail(wanted, 5), rtol=1e-3)
    assert torch.allclose(torch.linalg.matrix_norm(left @ right - up @ down), wanted[5:8].norm(), rtol=1e-3)


@pytest.mark.parametrize("shape", [(320, 320), (1280, 320), (320, 2880)])
@pytest.mark.parametrize(("noise", "more"), [(1.0, 5e-3), (0.01, 1e-5), (0.0, 1e-5)])
def test_the_largest_singular_values_alone_are_those_of_all(shape: tuple[int, int], noise: float, more: float) -> None:
    """What is lost is the tail of the spectrum: of a matrix whose values fall, and nearly so of mere noise."""
    generator = torch.Generator().manual_seed(1)
    left, right, rest = (torch.randn(each, generator=generator) for each in ((shape[0], 64), (64, shape[1]), shape))
    matrix = (1 - noise) * (left * torch.logspace(0, -2, 64)) @ right + noise * rest
    values = torch.linalg.svdvals(matrix.double())
    state = torch.get_rng_state()
    up, down, error = split(matrix, Rule(32))
    assert torch.equal(torch.get_rng_state(), state)
    wanted = float(tail(values, 32))
    assert wanted * (1 - 1e-4) <= error <= wanted * (1 + more)
    assert float(torch.linalg.matrix_norm(matrix.double() - up.double() @ down.double()) / values.norm()) <= (
        wanted * (1 + more) + 1e-7
    )
    again = split(matrix, Rule(32))
    assert torch.equal(up, again[0])
    assert torch.equal(down, again[1])


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        # singular values 8, 4, 2, 1, 1: sums 8/16, 12/16, 14/16, ...; squares 64, 80, 84, 85, 86 of 86
        ({"rank": 2}, 2), ({"ratio": 2.5}, 2), ({"ratio": 2}, 1), ({"ratio": 100}, 5), ({"ratio": 100, "rank": 3}, 3),
        ({"cumulative": 0.5}, 1), ({"cumulative": 0.6}, 2), ({"cumulative": 0.9}, 4), ({"cumulative": 1.0}, 5),
        ({"energy": 0.7}, 1), ({"energy": 0.95}, 3), ({"frobenius": 0.95}, 2), ({"frobenius": 0.97}, 3),
    ],
)  # fmt: skip
def test_rules_are_kohyas(rule: dict[str, Any], count: int) -> None:
    """networks/resize_lora.py: an index by searchsorted, and one more; values above the largest by the ratio."""
    assert Rule(**rule).count(torch.tensor([8.0, 4, 2, 1, 1])) == count


def test_a_layer_of_zeros_keeps_one() -> None:
    assert Rule(energy=0.9).count(torch.zeros(4)) == 1


def test_clamped_as_kohya_does() -> None:
    up, down = torch.randn(30, 4), torch.randn(4, 20)
    most = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.9)
    for found, wanted in zip(clamp(up, down, 0.9), (up, down), strict=True):
        assert torch.allclose(found, wanted.clamp(-most, most))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "say how large it may be"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"energy": 1.5}, "energy must be above 0 and at most 1, not 1.5"),
        ({"ratio": 0.5}, "ratio must be a finite number of at least 1, not 0.5"),
        ({"energy": float("nan")}, "energy must be above 0 and at most 1, not nan"),
        ({"energy": 0.5, "ratio": 2}, "energy and ratio are two rules"),
    ],
)
def test_rules_that_cannot_be(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rule.of(**rule)


def test_a_smaller_lora(model: loras.Model, tmp_path: Path) -> None:
    """Every layer is the best of its rank, times the same scale."""
    lora = loras.factors(model, every_kind(model), ranks=(6,))
    path = loras.write(loras.in_kohya(model, lora), tmp_path / "lora.safetensors", {"ss_training_comment": "mine"})
    out = tmp_path / "out.safetensors"
    done = resize_lora(path, out, rank=2, base=model.folder)
    assert done.ranks == (2, 2)
    tensors = load_file(out)
    for name, (down, up) in lora.items():
        key = loras.kohya(model, name, ldm=model.form == "sdxl")
        small = tensors[f"{key}.lora_up.weight"].flatten(1) @ tensors[f"{key}.lora_down.weight"].flatten(1)
        whole = 2 * up @ down.flatten(1)
        lost = torch.linalg.svdvals(whole)[2:].norm()
        assert torch.allclose(torch.linalg.matrix_norm(whole - small), lost, rtol=1e-3)
        assert float(tensors[f"{key}.alpha"]) == 0.5 * 2  # the scale was a half, and is
    assert read_header(out).metadata["ss_training_comment"] == "resized from rank 6 by rank 2; mine"
    assert resize_lora(path, tmp_path / "all.safetensors", energy=1.0, base=model.folder).error < 1e-5


def test_joined_by_concatenation_and_by_decomposition(model: loras.Model, tmp_path: Path) -> None:
    """Side by side it is exact; decomposed to a rank that holds it, too."""
    names = every_kind(model)
    one = loras.write(loras.in_kohya(model, loras.factors(model, names, 1, ranks=(2,))), tmp_path / "one.safetensors")
    other = loras.write(loras.in_peft(loras.factors(model, names[::2], 2, ranks=(3,))), tmp_path / "other.safetensors")
    wanted = with_loras(model, (one, 0.75), (other, -0.5))
    done = join_loras([(one, 0.75), (other, -0.5)], tmp_path / "both.safetensors", base=model.folder)
    assert (done.layers, done.ranks) == (len(names), (2, 5))
    loras.same(with_loras(model, (tmp_path / "both.safetensors", 1.0)), wanted)
    done = join_loras([(one, 0.75), (other, -0.5)], tmp_path / "svd.safetensors", rank=5, base=model.folder)
    assert done.error < 1e-5
    found = with_loras(model, (tmp_path / "svd.safetensors", 1.0))
    for name in wanted:
        assert difference(found[name], wanted[name]) <= 1e-5 or torch.equal(found[name], wanted[name])
    assert join_loras([(one, 1), (other, 1)], tmp_path / "small.safetensors", rank=1, base=model.folder).error > 0.1


# --- what files have beside, and which base they mean


def pair(name: str, out: int, into: int, fill: float = 1.0) -> dict[str, Tensor]:
    """A LoRA of one module, in kohya's names."""
    tensors = {"lora_down.weight": torch.full((4, into), fill), "lora_up.weight": torch.ones(out, 4)}
    return {f"{name}.{part}": tensor for part, tensor in (tensors | {"alpha": torch.tensor(4.0)}).items()}


TE1 = pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768)
NEUTRAL = {
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(4, 768),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": torch.ones(3072, 4),
}


def test_bundled_words_stay(tmp_path: Path) -> None:
    word = {"bundle_emb.word.string_to_param.*": torch.ones(2, 768)}
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(TE1 | word, path)
    out = tmp_path / "out"
    convert_lora(path, out / "c.safetensors", layout="kohya")
    resize_lora(path, out / "r.safetensors", rank=1)
    join_loras([(path, 1), (path, 1)], out / "j.safetensors")
    for name in "crj":
        assert word.keys() < load_file(out / f"{name}.safetensors").keys()
    with pytest.warns(NativesdWarning, match=r"learnt words in .*bundle_emb.word.* are left out, as peft"):
        convert_lora(path, out / "p.safetensors", layout="peft")
    save_file(TE1 | {key: t + 1 for key, t in word.items()}, other)
    with pytest.raises(WeightsError, match="has another bundle_emb"):
        join_loras([(path, 1), (other, 1)], out / "k.safetensors")


@pytest.mark.parametrize(
    ("tensors", "metadata", "number"),
    [
        (TE1, {}, "1"),
        (NEUTRAL, {"ss_base_model_version": "sdxl_base_v0-9"}, "1"),
        (NEUTRAL, {"ss_base_model_version": "sd_v1"}, ""),
        (pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 3072, 768), {}, ""),
    ],
)
def test_an_ambiguous_lora_keeps_its_base(
    tensors: dict[str, Tensor], metadata: dict[str, str], number: str, tmp_path: Path
) -> None:
    path = loras.write(tensors, tmp_path / "a.safetensors", metadata)
    resize_lora(path, tmp_path / "b.safetensors", rank=2)
    assert all(key.startswith(f"lora_te{number}_") for key in load_file(tmp_path / "b.safetensors"))
    said = read_header(tmp_path / "b.safetensors").metadata["ss_base_model_version"]
    assert said == (metadata.get("ss_base_model_version") or ("sdxl_base_v1-0" if number else "sd_v1"))


def test_a_lora_that_says_no_base_is_asked_for_one(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    path = loras.write(NEUTRAL, tmp_path / "neutral.safetensors", {})
    with pytest.raises(WeightsError, match=r"fits SD1.x and SDXL.*name the model that it is for with base="):
        resize_lora(path, out, rank=2)
    strange = pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 512)
    path = loras.write(strange, tmp_path / "strange.safetensors", {})
    with pytest.raises(WeightsError, match=r"name the model that it is for with base=:\n  none has a context 512 wide"):
        resize_lora(path, out, rank=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_in_loras(value: float, tmp_path: Path) -> None:
    path = loras.write(pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768, value), tmp_path / "a.st", {})
    out = tmp_path / "out.safetensors"
    with pytest.raises(WeightsError, match=r"fc1.lora_down.weight holds values that are not finite"):
        resize_lora(path, out, rank=2)
    with pytest.raises(WeightsError, match=r"fc1.lora_down.weight holds values that are not finite"):
        join_loras([(path, 1)], out)
    assert not out.exists()


def test_the_unet_alone_says_that_it_is_sdxls(tmp_path: Path) -> None:
    """kohya's names of SDXL come of the UNet's family, not of the text encoders beside it."""
    place = Place(SDXL_UNET, expected(SDXL_UNET), load_tables())
    base = Base({"unet": place})
    assert base.module("unet", "conv_in.weight", "kohya") == "input_blocks.0.0"


# --- what cannot be


def test_what_cannot_be_written(model: loras.Model, tmp_path: Path) -> None:
    key = loras.kohya(model, loras.attention(model)[0], ldm=False)
    width = loras.modules(model)[loras.attention(model)[0]].weight.shape[0]
    parts = {"hada_w1_a": (width, 2), "hada_w1_b": (2, width), "hada_w2_a": (width, 2), "hada_w2_b": (2, width)}
    loha = loras.write({f"{key}.{name}": torch.ones(shape) for name, shape in parts.items()}, tmp_path / "loha.st")
    out = tmp_path / "out.safetensors"
    for layout in ("diffusers", "peft"):
        with pytest.raises(UsageError, match=f"the layout {layout} has no name for .*hada_w1_a: kohya's has"):
            convert_lora(loha, out, layout=layout, base=model.folder)
    with pytest.raises(WeightsError, match="only LoRAs are joined"):
        join_loras([(loha, 1)], out, base=model.folder)
    with pytest.raises(WeightsError, match="fits no published base as a whole: name the model that it is for"):
        convert_lora(loha, out, layout="kohya")
    with pytest.raises(UsageError, match="the strength of a LoRA must be between -1000 and 1000, not nan"):
        join_loras([(loha, float("nan"))], out, base=model.folder)
    with pytest.raises(UsageError, match=r"a LoRA is a \.safetensors file: .*out is not"):
        convert_lora(loha, tmp_path / "out", layout="kohya")
    with pytest.raises(UsageError, match=r"a LoRA is a \.safetensors file, or of the layout peft a folder"):
        convert_lora(loha, tmp_path / "out.bin", layout="peft")
    lora = loras.write(
        pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768), tmp_path / "loha.safetensors", {}
    )
    with pytest.raises(UsageError, match=r"a LoRA is a \.safetensors file"):
        nativesd.convert(lora, tmp_path / "out", layout="diffusers")
    lora.unlink()
    with pytest.raises(UsageError, match="vae is for models: kohya is a layout of LoRAs here"):
        nativesd.convert(loha, out, layout="kohya", vae="taesd")
    with pytest.raises(UsageError, match="fold_alpha is for LoRAs"):
        nativesd.convert(model.folder, out, layout="ldm", fold_alpha=True)
    assert [path.name for path in tmp_path.iterdir()] == ["loha.st"]


def test_the_commands(model: loras.Model, run: Run, tmp_path: Path) -> None:
    if model.form != "sd15":
        return
    lora = loras.factors(model, loras.attention(model), ranks=(3,))
    path = loras.write(loras.in_kohya(model, lora), tmp_path / "lora.safetensors")
    tuned, base = str(merged_into(model, path, tmp_path / "tuned")), ("--base", str(model.folder))
    done = run("lora", "extract", tuned, str(model.folder), "a.safetensors", "--rank", "2", "--dtype", "f32")
    assert (done.returncode, done.stdout) == (0, "a.safetensors\n"), done.stderr
    assert f"{len(lora)} layers of rank 2" in done.stderr
    assert run("lora", "resize", "a.safetensors", "b.safetensors", "--rank", "1", *base).returncode == 0
    assert run("lora", "join", "a.safetensors:0.5", "b.safetensors", "c.safetensors", *base).returncode == 0
    assert run("convert", "c.safetensors", "d.safetensors", "--layout", "peft", *base).returncode == 0
    settings = json.loads(read_header(tmp_path / "d.safetensors").metadata["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (3, 3.0)
    done = run("lora", "resize", "a.safetensors", "e.safetensors", *base)
    assert (done.returncode, done.stderr) == (
        2, "nativesd: say how large it may be: --rank, --ratio, --cumulative, --frobenius or --energy\n",
    )  # fmt: skip
