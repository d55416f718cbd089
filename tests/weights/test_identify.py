"""What a file is taken for: copies beside the model, the right activation, and towers that only look like another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nativesd
from nativesd.checkpoints.convert import convert
from nativesd.config import (
    CLIP_L,
    CLIP_VISION_L,
    OPENCLIP_H,
    PLAYGROUND_VAE,
    SDXL_BIGG,
    SDXL_CLIP_L,
    TextEncoderConfig,
)
from nativesd.weights.identity.identify import Identity, identify
from nativesd.weights.identity.stated import FewSteps, few_steps
from nativesd.weights.maps.keymap import load_tables
from nativesd.weights.maps.rules import Shape
from oracles import published_manifests

MANIFESTS = published_manifests()
SD15 = MANIFESTS["sd15.checkpoint.ldm"].shapes
SDXL = MANIFESTS["sdxl-base.checkpoint.sgm"].shapes


def identity_of(shapes: Mapping[str, Shape]) -> Identity:
    return identify(shapes, load_tables())


def moved(shapes: Mapping[str, Shape], old: str, new: str) -> dict[str, Shape]:
    """The part under a prefix, under another."""
    return {new + key.removeprefix(old): shape for key, shape in shapes.items() if key.startswith(old)}


COPIES = {
    "textual inversion's embedder": (SD15, "cond_stage_model.", "embedding_manager.embedder.", "text_encoder"),
    "a UNet of another tool": (SD15, "model.diffusion_model.", "kept.before.", "unet"),
    "SDXL's encoder under ldm's name": (
        SDXL, "conditioner.embedders.0.transformer.", "cond_stage_model.transformer.", "text_encoder",
    ),
    "SD1.x's encoder under sgm's name": (
        SD15, "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoder",
    ),
    "an autoencoder without a prefix": (SD15, "first_stage_model.", "", "vae"),
    "SDXL's second encoder": (SDXL, "conditioner.embedders.1.model.", "backup.clip_g.", "text_encoder_2"),
}  # fmt: skip


@pytest.mark.parametrize("case", COPIES)
@pytest.mark.parametrize("first", [False, True])
def test_a_copy_is_named_and_not_used(case: str, first: bool) -> None:
    shapes, old, new, name = COPIES[case]
    copy = moved(shapes, old, new)
    found = identity_of(copy | dict(shapes) if first else dict(shapes) | copy)
    own = identity_of(shapes)
    assert [(c.name, c.found.prefix, c.config, c.layout) for c in found.components] == [
        (c.name, c.found.prefix, c.config, c.layout) for c in own.components
    ]
    reasons = {found.ignored[key] for key in copy if "sition_ids" not in key and "logit_scale" not in key}
    assert len(reasons) == 1
    assert f"a copy of the {name}" in reasons.pop()
    assert not found.unrecognised


def test_a_component_that_is_nowhere_else_counts_under_any_prefix() -> None:
    shapes = {key: shape for key, shape in SD15.items() if not key.startswith("cond_stage_model.")}
    found = identity_of(shapes | moved(SD15, "cond_stage_model.", "embedding_manager.embedder."))
    encoder = next(c for c in found.components if c.name == "text_encoder")
    assert (encoder.found.foreign_prefix, encoder.config) == (True, CLIP_L)


def test_a_file_with_copies_loads_as_without(tmp_path: Path) -> None:
    convert("tiny", tmp_path / "plain.safetensors", layout="ldm")
    tensors = load_file(tmp_path / "plain.safetensors")
    copies = {
        new + key.removeprefix(old): torch.full_like(tensor, 7)
        for old, new in (("cond_stage_model.", "embedding_manager.embedder."), ("first_stage_model.", "kept."))
        for key, tensor in tensors.items()
        if key.startswith(old)
    }
    save_file(tensors | copies, tmp_path / "copies.safetensors")
    with pytest.warns(UserWarning, match="no published form"):
        one, other = (nativesd.load(tmp_path / f"{name}.safetensors", fast=False) for name in ("plain", "copies"))
    for a, b in ((one.vae, other.vae), (one.text_encoders[0], other.text_encoders[0])):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_openai_names_mean_openais_activation() -> None:
    """The same ViT-L has transformers' names, or OpenAI's own, which OpenCLIP took over."""
    expected: dict[str, TextEncoderConfig] = {
        "openclip-vit-l-14.text.openclip": CLIP_L,
        "openclip-vit-h-14.text.openclip": OPENCLIP_H,
        "openclip-vit-bigg-14.text.openclip": SDXL_BIGG,
    }
    for stem, config in expected.items():
        [component] = identity_of(MANIFESTS[stem].shapes).components
        assert component.config == config
    swapped = {key: shape for key, shape in SDXL.items() if not key.startswith("conditioner.embedders.0.")}
    swapped |= moved(MANIFESTS["openclip-vit-l-14.text.openclip"].shapes, "", "conditioner.embedders.0.model.")
    found = {c.name: c.config for c in identity_of(swapped).components}
    assert (found["text_encoder"], found["text_encoder_2"]) == (SDXL_CLIP_L, SDXL_BIGG)


def vision_tower(layers: int, width: int) -> dict[str, Shape]:
    """transformers' CLIPVisionModel."""
    out: dict[str, Shape] = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, width),
        "visual_projection.weight": (768, width),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        out |= {f"vision_model.{norm}.weight": (width,), f"vision_model.{norm}.bias": (width,)}
    for i in range(layers):
        layer = f"vision_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= {f"{layer}.self_attn.{name}.weight": (width, width), f"{layer}.self_attn.{name}.bias": (width,)}
        out |= {f"{layer}.mlp.fc1.weight": (4 * width, width), f"{layer}.mlp.fc1.bias": (4 * width,)}
        out |= {f"{layer}.mlp.fc2.weight": (width, 4 * width), f"{layer}.mlp.fc2.bias": (width,)}
        for norm in ("layer_norm1", "layer_norm2"):
            out |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
    return out


def test_the_image_tower_is_no_text_encoder() -> None:
    text = MANIFESTS["sd15.text_encoder.transformers"].shapes
    whole = {**text, **vision_tower(24, 1024), "text_projection.weight": (768, 768), "logit_scale": ()}
    found = {component.name: component for component in identity_of(whole).components}
    assert {name: component.config for name, component in found.items()} == {
        "text_encoder": CLIP_L, "image_encoder": CLIP_VISION_L,
    }  # fmt: skip
    assert {key for component in found.values() for key in component.found.keys} == set(whole)
    [alone] = identity_of(vision_tower(24, 1024)).components
    assert (alone.name, alone.config) == ("image_encoder", CLIP_VISION_L)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("HyperRealism", None), ("hyper_realism_v2", None), ("realCMix_v3", None), ("turbine", None), ("sd15", None),
        ("sd_xl_turbo_1.0_fp16", ("turbo", 4)), ("dreamshaperXL_v21TurboDPMSDE", ("turbo", 4)),
        ("sdxl_lightning_8step", ("lightning", 8)), ("realvisxlV50_v50LightningBakedvae", ("lightning", 4)),
        ("Hyper-SDXL-1step", ("hyper", 1)), ("HyperSD15", ("hyper", 8)), ("hyper_model_12steps", ("hyper", 12)),
        ("LCM_Dreamshaper_v7", ("lcm", 4)), ("dreamshaper-lcm", ("lcm", 4)), ("8stepsToHeaven", None),
    ],
)  # fmt: skip
def test_few_steps_by_whole_words(stem: str, expected: tuple[str, int] | None) -> None:
    found = few_steps(stem)
    assert (None if found is None else (found.word, found.steps)) == expected


def test_few_steps_by_the_metadatas_title() -> None:
    found = few_steps("model", {"modelspec.title": "Some XL Lightning, 8-step"})
    assert found is not None
    assert (found.word, found.steps, found.why) == ("lightning", 8, "the file's title says lightning")
    assert few_steps("model", {"modelspec.title": "HyperRealism XL"}) is None
    assert few_steps("sdxl_lightning_1step_x0") == FewSteps("lightning", 1, "the file's name says lightning", True)


def test_markers_and_metadata_say_what_is_predicted() -> None:
    sd21 = MANIFESTS["sd21.checkpoint.ldm"].shapes
    for keys, metadata, expected, determined in (
        (SDXL | {"v_pred": (0,)}, {}, "v", True),
        (SDXL | {"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}, {}, "v", True),
        (SDXL | {"edm_mean": (4,), "edm_std": (4,)}, {"modelspec.predict_key": "v"}, "epsilon", True),
        (sd21, {"modelspec.predict_key": "epsilon"}, "epsilon", True),
        (SDXL, {"modelspec.prediction_type": "v"}, "v", True),
        (SD15, {"ss_v_parameterization": "True"}, "v", True),
        (sd21, {"modelspec.predict_key": "nonsense"}, "v", False),
        (SDXL, {}, "epsilon", False),
    ):
        found = identify(keys, load_tables(), metadata=metadata)
        guess = next(e for e in found.components[0].evidence if e.what == "prediction")
        assert (found.prediction, guess.determined) == (expected, determined)
    vae = next(c for c in identity_of(SDXL | {"edm_mean": (4,), "edm_std": (4,)}).components if c.name == "vae")
    assert vae.config == PLAYGROUND_VAE
