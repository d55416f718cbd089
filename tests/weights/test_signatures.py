"""What is recognised and not supported: one sentence each, and nothing that is supported is taken for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nativesd
from conftest import Run
from nativesd.errors import WeightsError
from nativesd.shipped import TABLES
from nativesd.weights.identity.identify import identify
from nativesd.weights.identity.signatures import load_signatures, recognise
from nativesd.weights.lora.file import read_lora
from nativesd.weights.maps.keymap import SIGNATURES, load_tables
from nativesd.weights.maps.rules import Shape
from nativesd.weights.maps.templates import TableError
from nativesd.weights.names import grouped
from oracles import published_manifests

MANIFESTS = published_manifests()
KINDS: dict[str, Mapping[str, Shape]] = {
    "Flux": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072), "img_in.weight": (3072, 64)},
    "Flux LoRA": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)},
    "Chroma": {"distilled_guidance_layer.in_proj.weight": (5, 5), "double_blocks.0.img_attn.qkv.weight": (9, 9)},
    "SD3": {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
        "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
    },
    "SD3 LoRA": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 1536)},
    "Stable Cascade": {"clip_txt_pooled_mapper.weight": (8192, 1280), "down_blocks.0.0.channelwise.0.weight": (9, 9)},
    "AnimateDiff": {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)},
    "diffusion transformer": {"adaln_single.linear.weight": (6912, 1152)},
    "ControlNet LLLite": {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.down.0.weight": (64, 640)},
    "control-LoRA": {"lora_controlnet": (1,), "input_hint_block.0.weight": (16, 3, 3, 3)},
    "ControlNet-XS": {"down_blocks.0.base_to_ctrl.0.weight": (32, 32, 1, 1)},
    "GLIGEN": {"down_blocks.0.attentions.0.transformer_blocks.0.fuser.alpha_attn": (), "position_net.x": (3,)},
    "unCLIP": {**MANIFESTS["sd21.checkpoint.ldm"].shapes, "noise_augmentor.data_mean": (1, 768)}
    | {"model.diffusion_model.label_emb.0.0.weight": (1280, 1536)},
    "InstantID": {
        "image_proj.latents": (1, 16, 1280), "image_proj.proj_in.weight": (1280, 512),
        "ip_adapter.1.to_k_ip.weight": (640, 2048),
    },
    "PhotoMaker": {"id_encoder.vision_model.x": (3,), "lora_weights.unet.down_blocks.0.x.lora_A.weight": (4, 4)},
    "hypernetwork": {"768.0.linear.0.weight": (1536, 768), "768.1.linear.0.weight": (1536, 768)},
    "list of tensors": {"0": (768, 4), "1": (4, 768), "2": (768, 4), "3": (4, 768)},
    "numbered LoRA": {"unet:0:up": (320, 1), "unet:0:down": (1, 320), "<s1>": (768,)},
    "ComfyUI's quantised layers": {"model.diffusion_model.x.weight_scale": (8,), "a.comfy_quant": (30,)},
    "bitsandbytes 4 bits": {"a.weight": (9, 1), "a.weight.quant_state.bitsandbytes__nf4": (80,)},
    "ESRGAN": {"model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3), "model.0.weight": (64, 3, 3, 3)},
    "SwinIR": {"layers.0.residual_group.blocks.0.attn.qkv.weight": (540, 180)},
    "compact upscaler": {"body.0.weight": (64, 3, 3, 3), "body.1.weight": (64,), "body.2.weight": (64, 64, 3, 3)},
    "autoencoder of 16 channels": {
        **MANIFESTS["sd.vae.ldm"].shapes, "decoder.conv_in.weight": (512, 16, 3, 3),
        "encoder.conv_out.weight": (32, 512, 3, 3),
    },
    "TAESD3 or TAEF1": {**MANIFESTS["taesd_decoder.original"].shapes, "1.weight": (64, 16, 3, 3)},
    "asymmetric autoencoder": {"decoder.condition_encoder.layers.0.weight": (3,), "encoder.conv_in.weight": (3,)},
    "T5": {"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096), "shared.weight": (32128, 4096)},
    "SigLIP": {"vision_model.head.probe": (1, 1, 1152), "vision_model.encoder.layers.0.mlp.fc1.bias": (4304,)},
    "safety checker": {"concept_embeds": (17, 768), "vision_model.vision_model.embeddings.class_embedding": (9,)},
    "language model": {"model.layers.0.self_attn.q_proj.weight": (4096, 4096)},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_supported_is_named(kind: str) -> None:
    found = identify(KINDS[kind], load_tables())
    assert found.unsupported is not None
    assert (found.unsupported.name, found.components, found.label()) == (kind, [], "")
    assert set(found.unrecognised) == set(KINDS[kind])


@pytest.mark.parametrize("halved", ["sd.vae.ldm", "taesd_encoder.original", "taesd.diffusers"])
def test_sixteen_channels_in_every_half(halved: str) -> None:
    """A decoder or an encoder alone shows its latents' channels at one end."""
    sixteen = {
        "sd.vae.ldm": ("encoder.conv_out.weight", (32, 512, 3, 3)),
        "taesd_encoder.original": ("14.weight", (16, 64, 3, 3)),
        "taesd.diffusers": ("decoder.layers.0.weight", (64, 16, 3, 3)),
    }
    name, shape = sixteen[halved]
    found = recognise({**MANIFESTS[halved].shapes, name: shape})
    assert found is not None
    assert "16 latent channels" in found.says


@pytest.mark.parametrize("stem", MANIFESTS)
def test_what_is_supported_is_not_named(stem: str) -> None:
    assert recognise(MANIFESTS[stem].shapes) is None


def test_one_sentence_for_a_file_in_audit_and_load(run: Run, tmp_path: Path) -> None:
    tensors = {f"double_blocks.{i}.img_attn.qkv.weight": torch.zeros(3, 3) for i in range(349)}
    save_file(tensors, tmp_path / "flux.safetensors")
    done = run("audit", str(tmp_path / "flux.safetensors"))
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 3
    assert "this is a Flux transformer" in " ".join(done.stdout.split())
    data = json.loads(nativesd.audit(tmp_path / "flux.safetensors").to_json())
    assert (data["ok"], data["components"][0]["tensors"]) == (False, 349)
    assert data["components"][0]["unsupported"].startswith("a Flux transformer")
    with pytest.raises(WeightsError, match=r"flux\.safetensors is a Flux transformer"):
        nativesd.load(tmp_path / "flux.safetensors")
    save_file({"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match="is a LoRA of Flux"):
        read_lora(tmp_path / "lora.safetensors")


def test_a_strange_lora_has_no_base(run: Run, tmp_path: Path) -> None:
    parts = {"lora_down.weight": (4, 64), "lora_up.weight": (64, 4), "alpha": ()}
    save_file(
        {f"lora_unet_odd_{i}.{part}": torch.zeros(shape) for i in range(19) for part, shape in parts.items()},
        tmp_path / "odd.safetensors",
    )
    lines = run("audit", str(tmp_path / "odd.safetensors")).stdout.splitlines()
    assert lines[0] == "lora (kohya): 0 of 57 mapped"
    assert len(lines) < 8
    assert any("lora_unet_odd_* (57)" in line for line in lines)


def test_alphas_alone_are_no_lora_and_a_doubled_name_is_no_ia3() -> None:
    tables = load_tables()
    assert not identify({f"layer{i}.alpha": () for i in range(9)}, tables).components
    name = "lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q_lora_down.weight"
    assert all("IA3" not in (table.bind().describe(name) or "") for table in tables.values() if table.lora)
    ia3 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.weight"
    assert any("IA3" in (table.bind().describe(ia3) or "") for table in tables.values() if table.lora)


def test_lists_of_names_are_short() -> None:
    names = [f"blocks.{i}.attn.to_q.weight" for i in range(40)] + [f"out.{i}.bias" for i in range(3)]
    assert grouped(names) == ["blocks.* (40)", "out.* (3)"]
    assert grouped([f"{i}x.y" for i in range(9)]) == ["0x.y", "1x.y", "2x.y", "3x.y", "5 others"]
    assert grouped(["one", "two"]) == ["one", "two"]


def test_a_faulty_table_is_named(tmp_path: Path) -> None:
    assert all(signature.says[-1] != "." for signature in load_signatures())
    assert (TABLES / SIGNATURES).is_file()
    for text in ("[[signature]]\nname = 'x'", "[[signature]]\nname='x'\nsays='y'\nall=['a']\nodd=1", "[["):
        path = tmp_path / f"{len(text)}.toml"
        path.write_text(text)
        with pytest.raises(TableError):
            load_signatures(path)
