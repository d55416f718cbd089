"""Every published layout: recognised, mapped to the last tensor, and in agreement with diffusers' own conversion."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nativesd.checkpoints.layouts import target
from nativesd.config import (
    CLIP_L,
    CLIP_VISION_H,
    CLIP_VISION_L,
    CONTROLNETS,
    IP_ADAPTERS,
    OPENCLIP_H,
    REFINER_UNET,
    SD15_UNET,
    SD21_UNET,
    SD_VAE,
    SDXL_BIGG,
    SDXL_CLIP_L,
    SDXL_UNET,
    SDXL_VAE,
    SSD_1B_UNET,
    T2I_ADAPTERS,
    TAESD,
    UNETS,
    VISION_ENCODERS,
    Config,
)
from nativesd.errors import NativesdError
from nativesd.models.build import expected
from nativesd.shipped import TABLES
from nativesd.weights.audit import report_components
from nativesd.weights.checkpoint import apply
from nativesd.weights.formats.header import TensorInfo
from nativesd.weights.identity.believed import parse_believed
from nativesd.weights.identity.identify import Identity, identify
from nativesd.weights.maps.keymap import BoundMap, load_table, load_tables
from nativesd.weights.maps.rules import Shape
from nativesd.weights.names import nearest
from nativesd.weights.report import AuditReport
from oracles import Manifest, published_manifests, unet_kwargs

MANIFESTS = published_manifests()
WEIGHTS = [stem for stem, manifest in MANIFESTS.items() if manifest.component != "lora"]
CHECKPOINTS = [stem for stem, manifest in MANIFESTS.items() if manifest.component == "checkpoint"]
ADAPTERS = [stem for stem, manifest in MANIFESTS.items() if manifest.component in ("lora", "ip_adapter")]


def run(shapes: Mapping[str, Shape], **options: Any) -> tuple[Identity, AuditReport]:
    """The identity and the audit of a header."""
    identity = identify(shapes, load_tables(), **options)
    tensors = {key: TensorInfo("F32", shape, 0, 0) for key, shape in shapes.items()}
    return identity, AuditReport("test", identity.label(), tuple(report_components(identity, tensors, expected)))


@pytest.mark.parametrize("stem", MANIFESTS)
def test_every_tensor_of_every_manifest_is_accounted_for(stem: str) -> None:
    manifest = MANIFESTS[stem]
    identity, report = run(manifest.shapes)
    assert report.ok
    assert not identity.unrecognised
    said = [key for c in report.components for m in c.mapped for key in m.keys]
    said += [i.key for c in report.components for i in c.ignored]
    assert set(said) == set(manifest.shapes)
    assert all(len(c.mapped) == c.expected for c in report.components)
    assert all(i.reason for c in report.components for i in c.ignored)
    assert report.components[0].expected > 0


EXPECTED: dict[str, dict[str, Config]] = {
    "sd15.checkpoint.ldm": {"unet": SD15_UNET, "text_encoder": CLIP_L, "vae": SD_VAE},
    "sd15.checkpoint.ldm-full-ema": {"unet": SD15_UNET, "text_encoder": CLIP_L, "vae": SD_VAE},
    "sd15-inpainting.checkpoint.ldm": {"unet": replace(SD15_UNET, in_channels=9)},
    "sd21.checkpoint.ldm": {"unet": SD21_UNET, "text_encoder": OPENCLIP_H, "vae": SD_VAE},
    "sd2-inpainting.checkpoint.ldm": {"unet": replace(SD21_UNET, in_channels=9)},
    "sd-turbo.checkpoint.sgm": {"unet": SD21_UNET, "text_encoder": OPENCLIP_H, "vae": SD_VAE},
    "sdxl-base.checkpoint.sgm": {
        "unet": SDXL_UNET, "text_encoder": SDXL_CLIP_L, "text_encoder_2": SDXL_BIGG, "vae": SDXL_VAE,
    },
    "ssd-1b.checkpoint.sgm": {"unet": SSD_1B_UNET, "text_encoder_2": SDXL_BIGG, "vae": SDXL_VAE},
    "lcm-dreamshaper-v7.unet.diffusers": {"unet": replace(SD15_UNET, guidance=256)},
    "bk-sdm-base.unet.diffusers": {"unet": UNETS["bk-sdm-base"]},
    "bk-sdm-v2-tiny.unet.diffusers": {"unet": UNETS["bk-sdm-v2-tiny"]},
    "sdxl-refiner.unet.diffusers": {"unet": REFINER_UNET},
    "controlnet-sd15.checkpoint.controlnet-ldm-full": {"controlnet": CONTROLNETS["sd15"], "unet": SD15_UNET},
    "controlnet-sd15.controlnet-ldm": {"controlnet": CONTROLNETS["sd15"]},
    "controlnet-sd15.diffusers": {"controlnet": CONTROLNETS["sd15"]},
    "controlnet-sdxl.diffusers": {"controlnet": CONTROLNETS["sdxl"]},
    "controlnet-sdxl-small.diffusers": {"controlnet": CONTROLNETS["sdxl-small"]},
    "controlnet-union-sdxl.diffusers": {"controlnet": CONTROLNETS["sdxl-union"]},
    "openclip-vit-h-14.full.openclip": {"text_encoder": OPENCLIP_H, "image_encoder": CLIP_VISION_H},
    "openclip-vit-h-14.image.transformers": {"image_encoder": CLIP_VISION_H},
    "clip-vit-l-14.full.transformers": {"text_encoder": CLIP_L, "image_encoder": CLIP_VISION_L},
    "ip-adapter-sd15.ip-adapter": {"ip_adapter": IP_ADAPTERS["sd15"]},
    "ip-adapter-plus-sd15.ip-adapter": {"ip_adapter": IP_ADAPTERS["sd15-plus"]},
    "ip-adapter-plus-face-sd15.ip-adapter": {"ip_adapter": IP_ADAPTERS["sd15-plus"]},
    "ip-adapter-sdxl.ip-adapter": {"ip_adapter": IP_ADAPTERS["sdxl"]},
    "ip-adapter-sdxl-vit-h.ip-adapter": {"ip_adapter": IP_ADAPTERS["sdxl-vit-h"]},
    "ip-adapter-plus-sdxl-vit-h.ip-adapter": {"ip_adapter": IP_ADAPTERS["sdxl-plus-vit-h"]},
    "openclip-vit-bigg-14.text.openclip": {"text_encoder_2": SDXL_BIGG},
    "sdxl-refiner.text_encoder_2.transformers": {"text_encoder_2": SDXL_BIGG},
    "taesd.diffusers": {"tiny_vae": TAESD},
    "taesd_decoder.original": {"tiny_vae": replace(TAESD, half="decoder")},
    "taesd_encoder.original": {"tiny_vae": replace(TAESD, half="encoder")},
    "t2i-adapter-sd15-in3.original": {"t2i_adapter": T2I_ADAPTERS["sd15"]},
    "t2i-adapter-sd15-light.diffusers": {"t2i_adapter": T2I_ADAPTERS["sd15-light"]},
    "t2i-adapter-sdxl.diffusers": {"t2i_adapter": T2I_ADAPTERS["sdxl"]},
}  # fmt: skip


@pytest.mark.parametrize("stem", EXPECTED)
def test_configurations_are_read_off_the_header(stem: str) -> None:
    identity, _ = run(MANIFESTS[stem].shapes)
    found = {component.name: component.config for component in identity.components}
    assert found | EXPECTED[stem] == found


def as_published(config: Config, table: str, prefix: str) -> dict[str, Shape]:
    """The header of a file with a configuration's parameters, as a table writes them."""
    bound = load_table(table).bind(prefix=prefix)
    out = {}
    for name, shape in expected(config).items():
        source = bound.source(name)
        assert source is not None
        out[source.keys[0]] = source.published_shape(shape)
    return out


@pytest.mark.parametrize("name", IP_ADAPTERS)
def test_ip_adapters_of_every_published_kind(name: str) -> None:
    """There are manifests of six; the others' headers are made by the map. Faults in them are found, too."""
    config = IP_ADAPTERS[name]
    shapes = as_published(config, "ip_adapter", "")
    identity, report = run(shapes)
    [component] = identity.components
    assert (component.name, component.config, report.ok) == ("ip_adapter", config, True)
    assert component.family == ("SDXL" if "sdxl" in name else "SD1.x")
    rng = random.Random(name)
    for gone in rng.sample(sorted(shapes), 5):
        _, report = run({key: shape for key, shape in shapes.items() if key != gone} | {f"{gone}.extra": (3,)})
        [found] = report.components
        assert [m.expected for m in found.missing] == [(gone,)]
        assert [u.key for u in found.unexpected] == [f"{gone}.extra"]
        assert not found.wrong_shape


@pytest.mark.parametrize("name", VISION_ENCODERS)
@pytest.mark.parametrize(
    ("table", "prefix"),
    [
        ("image_encoder.transformers", "vision_model."), ("image_encoder.transformers", ""),
        ("image_encoder.openclip", "visual."),
    ],
)  # fmt: skip
def test_image_encoders_of_either_layout(name: str, table: str, prefix: str) -> None:
    identity, report = run(as_published(VISION_ENCODERS[name], table, prefix))
    [component] = identity.components
    assert (component.config, component.layout, report.ok) == (VISION_ENCODERS[name], table.partition(".")[2], True)


def test_vega() -> None:
    """There is no manifest of it; its names are those of diffusers' model of the published config."""
    with torch.device("meta"):
        published = UNet2DConditionModel(**unet_kwargs(UNETS["vega"]))
    identity, report = run({name: tuple(tensor.shape) for name, tensor in published.state_dict().items()})
    assert report.ok
    assert (identity.label(), identity.components[0].config) == ("SDXL Vega", UNETS["vega"])


@pytest.mark.parametrize(
    ("stem", "family", "configs"),
    [
        ("sd15.checkpoint.ldm", "sd1", {"unet": SD15_UNET, "vae": SD_VAE, "text_encoder": CLIP_L}),
        ("sd21.checkpoint.ldm", "sd2", {"unet": SD21_UNET, "vae": SD_VAE, "text_encoder": OPENCLIP_H}),
        (
            "sdxl-base.checkpoint.sgm", "sdxl",
            {"unet": SDXL_UNET, "vae": SDXL_VAE, "text_encoder": SDXL_CLIP_L, "text_encoder_2": SDXL_BIGG},
        ),
    ],
)  # fmt: skip
def test_single_files_are_written_with_the_published_names(
    stem: str, family: str, configs: Mapping[str, Config]
) -> None:
    """All of them, but for those that the audit ignores: what reads the published file reads the converted one."""
    written = {}
    for name, config in configs.items():
        table = target("ldm", family, name, config, alone=False)
        for parameter, shape in expected(config).items():
            source = table.source(parameter)
            assert source is not None
            written[source.keys[0]] = source.published_shape(shape)
    ignored = {i.key for c in run(MANIFESTS[stem].shapes)[1].components for i in c.ignored}
    assert written == {key: shape for key, shape in MANIFESTS[stem].shapes.items() if key not in ignored}


LABELS = {
    "sd15.checkpoint.ldm": "SD1.x", "sd15-inpainting.checkpoint.ldm": "SD1.x inpainting",
    "sd21.checkpoint.ldm": "SD2.x", "sdxl-base.checkpoint.sgm": "SDXL", "sdxl-refiner.unet.diffusers": "SDXL refiner",
    "ssd-1b.checkpoint.sgm": "SDXL SSD-1B", "bk-sdm-tiny.unet.diffusers": "SD1.x BK-SDM tiny",
    "lcm-dreamshaper-v7.unet.diffusers": "SD1.x LCM",
}  # fmt: skip


@pytest.mark.parametrize("stem", LABELS)
def test_families(stem: str) -> None:
    identity, report = run(MANIFESTS[stem].shapes)
    assert identity.label() == report.family == report.components[0].family == LABELS[stem]


@pytest.mark.parametrize("stem", ADAPTERS)
def test_adapters_name_the_family_they_fit(stem: str) -> None:
    [component] = run(MANIFESTS[stem].shapes)[1].components
    if "unetonly" not in stem:
        assert component.family == ("SDXL" if "sdxl" in stem else "SD1.x")
    assert {key for mapped in component.mapped for key in mapped.keys} == set(MANIFESTS[stem].shapes)


@pytest.mark.parametrize(
    ("key", "component", "layout"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "lora", "kohya"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1", "lora", "kohya"),
        ("lora_unet_input_blocks_1_1_proj_in.diff_b", "lora", "kohya"),
        ("lora_unet_input_blocks_1_1_proj_in.dora_scale", "lora", "kohya"),
        ("lora_unet_input_blocks_1_1_proj_in.oft_diag", "lora", "kohya"),
        ("unet.mid_block.attentions.0.proj_in.lora_magnitude_vector", "lora", "peft"),
        ("mid_block.attentions.0.proj_in.lora_A.weight", "lora", "peft"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.default_0.weight", "lora", "peft"),
        ("emb_params", "textual_inversion", "embedding"),
        ("clip_g", "textual_inversion", "embedding"),
    ],
)
def test_more_names_of_adapters(key: str, component: str, layout: str) -> None:
    [found] = run({key: (4, 4)})[1].components
    assert (found.name, found.layout, len(found.mapped)) == (component, layout, 1)


@pytest.mark.parametrize(
    ("stem", "marker", "prediction", "determined"),
    [
        ("sd21.checkpoint.ldm", None, "v", False),
        ("sd21.checkpoint.ldm", "v_pred", "v", True),
        ("sdxl-base.checkpoint.sgm", None, "epsilon", False),
        ("sdxl-base.checkpoint.sgm", "v_pred", "v", True),
        ("sdxl-base.checkpoint.sgm", "edm_vpred.sigma_max", "v", True),
        ("sd-turbo.checkpoint.sgm", None, "epsilon", False),
        ("sd2-inpainting.checkpoint.ldm", None, "epsilon", False),
    ],
)
def test_what_a_unet_predicts(stem: str, marker: str | None, prediction: str, determined: bool) -> None:
    identity, report = run(MANIFESTS[stem].shapes | ({marker: (0,)} if marker else {}))
    assert identity.prediction == prediction
    [evidence] = [e for e in report.components[0].evidence if e.what == "prediction"]
    assert (evidence.value, evidence.determined) == (prediction, determined)
    assert determined or "prediction=" in evidence.override
    assert report.ok


# --- against diffusers' conversion


def small(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """A tensor of distinct values for every name: of the same rank, 2 long where the published one is longer than 1
    (6 where it is three matrices in one)."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.rand(
            [6 if i == 0 and "in_proj_" in key else min(n, 2) for i, n in enumerate(shape)], generator=generator
        )
        for key, shape in shapes.items()
    }


def parameters(table: BoundMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters that the tensors give."""
    return {name: apply([tensor], source) for key, tensor in tensors.items() for name, source in table.parameters(key)}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same tensors under the same names."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def singles() -> dict[str, tuple[Mapping[str, Shape], Manifest]]:
    """Single files, with the manifest of the same UNet in diffusers' layout. There is none of the refiner: its names
    are made by the map, and what diffusers makes of them is compared all the same."""
    refiner = load_table("unet.ldm").bind(REFINER_UNET.dims, "model.diffusion_model.")
    names = {}
    for name, shape in expected(REFINER_UNET).items():
        source = refiner.source(name)
        assert source is not None
        names[source.keys[0]] = shape
    pairs = {
        "sd15.checkpoint.ldm": "sd15", "sd15-inpainting.checkpoint.ldm": "sd15-inpainting",
        "sd21.checkpoint.ldm": "sd21", "sd-turbo.checkpoint.sgm": "sd21",
        "sdxl-base.checkpoint.sgm": "sdxl-base", "ssd-1b.checkpoint.sgm": "ssd-1b",
    }  # fmt: skip
    out = {single: (MANIFESTS[single].shapes, MANIFESTS[f"{unet}.unet.diffusers"]) for single, unet in pairs.items()}
    return out | {"refiner": (names, MANIFESTS["sdxl-refiner.unet.diffusers"])}


SINGLES = singles()


@pytest.mark.parametrize("stem", SINGLES)
def test_unets_equal_those_of_diffusers_conversion(stem: str) -> None:
    shapes, published = SINGLES[stem]
    tensors = small({key: shape for key, shape in shapes.items() if key.startswith("model.diffusion_model.")})
    [found] = [c.found for c in run(shapes)[0].components if c.name == "unet"]
    theirs = convert_ldm_unet_checkpoint(dict(tensors), {"layers_per_block": 2} | published.config)
    assert theirs.keys() == published.shapes.keys()
    assert same(parameters(found.table, tensors), parameters(load_table("unet.diffusers").bind(), theirs))


@pytest.mark.parametrize("stem", ["sd15.checkpoint.ldm", "sdxl-base.checkpoint.sgm", "sd.vae.ldm-ema-scalars"])
def test_autoencoders_equal_those_of_diffusers_conversion(stem: str) -> None:
    shapes = MANIFESTS[stem].shapes
    [found] = [c.found for c in run(shapes)[0].components if c.name == "vae"]
    tensors = small({key: shapes[key] for key in found.keys})
    theirs = convert_ldm_vae_checkpoint(dict(tensors), MANIFESTS["sd15.vae.diffusers"].config)
    assert same(parameters(found.table, tensors), parameters(load_table("vae.diffusers").bind(), theirs))


def clip(tensors: dict[str, Tensor], prefix: str, width: int) -> dict[str, Tensor]:
    return convert_ldm_clip_checkpoint(tensors)


def openclip(tensors: dict[str, Tensor], prefix: str, width: int) -> dict[str, Tensor]:
    return convert_open_clip_checkpoint(SimpleNamespace(config=SimpleNamespace(hidden_size=width)), tensors, prefix)


@pytest.mark.parametrize(
    ("stem", "name", "convert"),
    [
        ("sd15.checkpoint.ldm", "text_encoder", clip),
        ("sd21.checkpoint.ldm", "text_encoder", openclip),
        ("sd-turbo.checkpoint.sgm", "text_encoder", openclip),
        ("sdxl-base.checkpoint.sgm", "text_encoder", clip),
        ("sdxl-base.checkpoint.sgm", "text_encoder_2", openclip),
    ],
)
def test_text_encoders_equal_those_of_diffusers_conversion(
    stem: str, name: str, convert: Callable[[dict[str, Tensor], str, int], dict[str, Tensor]]
) -> None:
    shapes = MANIFESTS[stem].shapes
    [component] = [c for c in run(shapes)[0].components if c.name == name]
    assert component.config is not None
    names = expected(component.config).keys()
    tensors = small({key: shapes[key] for key in component.found.keys})
    theirs = parameters(
        load_table("text_encoder.transformers").bind(), convert(dict(tensors), component.found.prefix, 2)
    )
    ours = parameters(component.found.table, tensors)
    assert same({key: ours[key] for key in names}, {key: theirs[key] for key in names})


def test_distilled_files_have_their_projection_untransposed() -> None:
    [component] = [
        c for c in run(MANIFESTS["ssd-1b.checkpoint.sgm"].shapes)[0].components if c.name == "text_encoder_2"
    ]
    tensor = torch.rand(2, 2)
    [(name, source)] = component.found.table.parameters("conditioner.embedders.1.model.text_projection.weight")
    assert name == "text_projection.weight"
    assert torch.equal(apply([tensor], source), tensor)
    [(_, source)] = component.found.table.parameters("conditioner.embedders.1.model.text_projection")
    assert torch.equal(apply([tensor], source), tensor.T)


# --- faults


def mis_shaped(shape: Shape, rng: random.Random) -> Shape:
    """Another shape: one more, one fewer, twice, transposed, or of another rank."""
    axis = rng.randrange(len(shape))
    changed = {
        "more": (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]),
        "fewer": (*shape[:axis], shape[axis] - 1, *shape[axis + 1 :]),
        "twice": (*shape[:axis], shape[axis] * 2, *shape[axis + 1 :]),
        "transposed": shape[::-1],
        "rank": (*shape, 1),
    }[rng.choice(["more", "fewer", "twice", "transposed", "rank"])]
    return changed if changed != shape else (shape[0] + 1, *shape[1:])


@pytest.mark.parametrize("stem", WEIGHTS)
def test_planted_faults_are_named_and_no_others(stem: str) -> None:
    """One key missing, one mis-shaped, one extra: in every family and layout."""
    shapes = MANIFESTS[stem].shapes
    mapped = sorted({key for c in run(shapes)[1].components for m in c.mapped for key in m.keys})
    rng = random.Random(stem)
    for extra in ("{}.extra", "foo.bar"):
        gone, odd, like = rng.sample(mapped, 3)
        planted = {key: shape for key, shape in shapes.items() if key != gone}
        planted |= {odd: mis_shaped(shapes[odd], rng), extra.format(like): (3,)}
        _, report = run(planted)
        [missing] = [m for c in report.components for m in c.missing]
        [wrong] = [w for c in report.components for w in c.wrong_shape]
        [unexpected] = [u for c in report.components for u in c.unexpected]
        assert gone in missing.expected
        assert (wrong.keys, wrong.shape, wrong.expected) == ((odd,), planted[odd], shapes[odd])
        assert unexpected.key == extra.format(like)
        assert not any(c.duplicate for c in report.components)
        assert not report.ok


def test_a_misspelling_is_paired_with_what_is_missing() -> None:
    shapes = dict(MANIFESTS["sdxl-base.checkpoint.sgm"].shapes)
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight"
    odd = key.replace("weight", "wieght")
    shapes[odd] = shapes.pop(key)
    _, report = run(shapes)
    [missing] = report.components[0].missing
    assert missing.parameter == "down.1.attentions.0.blocks.1.attn2.to_k.weight"
    assert (missing.expected, missing.found, missing.hint) == ((key,), odd, "a misspelling?")
    assert report.components[0].unexpected[0].nearest == key


def test_a_foreign_prefix_is_said() -> None:
    shapes = {f"module.{key}": shape for key, shape in MANIFESTS["sd15.unet.diffusers"].shapes.items()}
    _, report = run(shapes)
    [component] = report.components
    assert (component.name, component.family, len(component.missing)) == ("unet", "SD1.x", 686)
    assert all(m.found == f"module.{m.expected[0]}" and "prefix module." in m.hint for m in component.missing)


def test_a_file_that_is_nothing_known() -> None:
    _, report = run({"transformer.h.0.attn.c_attn.weight": (768, 2304), "wte.weight": (50257, 768)})
    [component] = report.components
    assert component.name == "unrecognised"
    assert {u.key for u in component.unexpected} == {"transformer.h.0.attn.c_attn.weight", "wte.weight"}


def test_two_names_for_one_parameter_are_a_duplicate() -> None:
    shapes = MANIFESTS["sd15.vae.diffusers"].shapes
    [component] = run(shapes | {"decoder.mid_block.attentions.0.query.bias": (512,)})[1].components
    [duplicate] = component.duplicate
    assert duplicate.parameter == "decoder.mid.attention.to_q.bias"


def test_what_it_is_believed_to_be() -> None:
    shapes = MANIFESTS["sd15.checkpoint.ldm"].shapes
    assert run(shapes, believed=parse_believed("sd15/ldm"))[1].ok
    unet = run(shapes, believed=parse_believed("SD2.x/ldm"))[1].components[0]
    assert {w.keys[0].rpartition(".")[0].rpartition(".")[2] for w in unet.wrong_shape} == {
        "proj_in", "proj_out", "to_k", "to_v",
    }  # fmt: skip
    nothing = run({"wte.weight": (50257, 768)}, believed=parse_believed("sd15/ldm"))[1].components[0]
    assert (len(nothing.missing), [u.key for u in nothing.unexpected]) == (686, ["wte.weight"])
    diffusers = run(shapes, believed=parse_believed("SD1.x/diffusers"))[1].components[0]
    assert len(diffusers.missing) == len(diffusers.unexpected) == 686


SMALL = [stem for stem in WEIGHTS if len(MANIFESTS[stem].shapes) < 400]
SHAPES = st.lists(st.sampled_from([0, 1, 3, 4, 32, 320, 768, 2**31, 2**62]), max_size=5).map(tuple)
NUMBERS = st.sampled_from(["0", "1", "7", "00", "99999999", "9" * 30])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_nothing_but_an_error_of_ours_comes_of_nonsense(data: st.DataObject) -> None:
    """Names kept, dropped and renumbered, with shapes of any size."""
    shapes = MANIFESTS[data.draw(st.sampled_from(SMALL))].shapes
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    share = data.draw(st.sampled_from([0.02, 0.3, 1.0]))
    number, odd = data.draw(NUMBERS), data.draw(SHAPES)
    nonsense = {
        re.sub(r"[0-9]+", number, key, count=1) if rng.random() < 0.5 else key: odd if rng.random() < 0.5 else shape
        for key, shape in shapes.items()
        if rng.random() < share
    }
    try:
        _, report = run(nonsense)
    except NativesdError:
        return
    said = {key for c in report.components for m in (*c.mapped, *c.wrong_shape, *c.duplicate) for key in m.keys}
    said |= {entry.key for c in report.components for entry in (*c.ignored, *c.unexpected)}
    assert said == set(nonsense)


@pytest.mark.parametrize("stem", SMALL)
def test_tensors_without_numbers_tell_no_sizes(stem: str) -> None:
    shapes = MANIFESTS[stem].shapes
    for axis in range(2):
        empty = {key: tuple(0 if a == axis else n for a, n in enumerate(shape)) for key, shape in shapes.items()}
        assert not run(empty)[1].ok


def test_a_whole_unet_is_a_table_of_under_100_lines() -> None:
    for path in TABLES.glob("*.*.toml"):
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        assert len(lines) < 100, path.name


VAE_LDM, VAE_DIFFUSERS = MANIFESTS["sd.vae.ldm"].shapes, MANIFESTS["sd15.vae.diffusers"].shapes


def test_an_ldm_autoencoder_with_diffusers_attention() -> None:
    """Merging tools leave to_q and its kin in ldm files, and the weights of linear layers, under either name."""
    spellings = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    renamed = {
        re.sub(r"attn_1\.(\w+)\.", lambda m: f"attn_1.{spellings[m[1]]}.", key): shape for key, shape in VAE_LDM.items()
    }
    for names in (VAE_LDM, renamed):
        for flat in (False, True):
            shapes = {key: shape[:2] if flat and "attn_1" in key else shape for key, shape in names.items()}
            _, report = run(shapes)
            assert report.ok
            assert report.components[0].expected == len(report.components[0].mapped) == 248


def test_a_hint_names_no_other_part_of_the_layout() -> None:
    shapes = {key.replace("mid.attn_1.proj_out", "mid.attn_1.v2"): shape for key, shape in VAE_LDM.items()}
    _, report = run(shapes | {"decoder.mid.attn_1.norm1.weight": (512, 512, 1, 1)})
    hints = {m.found: m.hint for m in report.components[0].missing if m.found}
    assert "decoder.mid.attn_1.norm1.weight" not in hints
    assert nearest({"a.proj_out.weight"}, {"a.to_v.weight"}, {"to_v", "proj_out"}) == {}
    assert nearest({"a.long_name.weight"}, {"a.lon_name.weight"}, {"to_v"}) != {}
    assert nearest({"a.3.weight"}, {"a.4.weight"}) == {}


FORGE = {
    "text_encoder": ("sd15.text_encoder.transformers", "", "text_encoders.clip_l.transformer."),
    "unet": ("sd15.checkpoint.ldm", "model.diffusion_model.", "unet."),
    "vae": ("sd.vae.ldm", "", "vae."),
}


def test_forges_prefixes() -> None:
    shapes: dict[str, Shape] = {}
    for stem, old, new in FORGE.values():
        part = {key: shape for key, shape in MANIFESTS[stem].shapes.items() if key.startswith(old)}
        shapes |= {new + key.removeprefix(old): shape for key, shape in part.items()}
    identity, report = run(shapes)
    assert report.ok
    assert {c.name: c.config for c in identity.components} == {"unet": SD15_UNET, "text_encoder": CLIP_L, "vae": SD_VAE}
    bigg = MANIFESTS["sdxl.text_encoder_2.transformers"].shapes
    identity, report = run({f"text_encoders.clip_g.transformer.{key}": shape for key, shape in bigg.items()})
    assert report.ok
    assert [(c.name, c.config) for c in identity.components] == [("text_encoder_2", SDXL_BIGG)]


def test_diffusers_names() -> None:
    """What diffuseR's traced modules hold: an encoder under enc., under text_encoder., and a decoder under dec."""
    bigg = MANIFESTS["sdxl.text_encoder_2.transformers"].shapes
    for prefix in ("enc.", "text_encoder."):
        identity, report = run({prefix + key: shape for key, shape in bigg.items()})
        assert report.ok
        assert [c.config for c in identity.components] == [SDXL_BIGG]
    decoder = {
        "dec." + key.removeprefix("decoder."): shape
        for key, shape in VAE_DIFFUSERS.items()
        if key.startswith(("decoder.", "post_quant_conv."))
    }
    identity, report = run(decoder)
    assert report.ok
    assert [c.config for c in identity.components] == [replace(SD_VAE, half="decoder")]
    identity, report = run({key: shape for key, shape in decoder.items() if "quant" not in key})
    assert [m.parameter for m in report.components[0].missing] == ["post_quant_conv.weight", "post_quant_conv.bias"]


@pytest.mark.parametrize("names", [VAE_LDM, VAE_DIFFUSERS], ids=["ldm", "diffusers"])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_half_of_an_autoencoder(names: Mapping[str, Shape], half: str) -> None:
    own = ("decoder.", "post_quant_conv.") if half == "decoder" else ("encoder.", "quant_conv.")
    identity, report = run({key: shape for key, shape in names.items() if key.startswith(own)})
    assert report.ok
    assert [c.config for c in identity.components] == [replace(SD_VAE, half=half)]  # type: ignore[arg-type]


def test_both_halves_of_taesd_in_one_file() -> None:
    shapes = {
        f"taesd_{half}.{key}": shape
        for half in ("encoder", "decoder")
        for key, shape in MANIFESTS[f"taesd_{half}.original"].shapes.items()
    }
    identity, report = run(shapes)
    assert report.ok
    assert [c.config for c in identity.components] == [TAESD]
