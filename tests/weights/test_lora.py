"""LoRAs: every naming of one and the same finds the same weights, merges to what the formulas, diffusers and peft say,
and comes out again to the bit."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nativesd
from checkpoints.test_convert import single
from nativesd.checkpoints.loras.merge import merge_checkpoint
from nativesd.config import SDXL_UNET
from nativesd.errors import SourceError, UsageError, WeightsError
from nativesd.models.build import build, expected
from nativesd.weights.checkpoint import fill, unmap
from nativesd.weights.files.locate import Located
from nativesd.weights.formats.header import read_header
from nativesd.weights.lora.bases import bases
from nativesd.weights.lora.file import read_lora
from nativesd.weights.lora.merge import Host, Merged, host, merge_into, set_loras
from nativesd.weights.lora.place import Place
from nativesd.weights.lora.resolve import Use, resolve
from nativesd.weights.maps.keymap import KeyMap, load_table, load_tables
from nativesd.weights.maps.templates import TableError
from nativesd.weights.model import choose, identify
from oracles import difference, published_manifests, sparse
from pipeline.test_pipeline import save_model

pytestmark = pytest.mark.filterwarnings("ignore:.* of no published form")

TOLERANCE = 1e-6  # of a weight's largest value
MANIFESTS = {stem: m for stem, m in published_manifests().items() if m.component == "lora"}
FORMS = ("sd15", "sd21-base", "sdxl")
Tensors = dict[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]
"""Module, as component.name in the published folders -> down and up, with a scale of 1."""


# --- models


@dataclass
class Model:
    """A small model: its folder, diffusers' pipeline of it in float32, our modules of its UNet and text encoders."""

    form: str
    folder: Path
    theirs: diffusers.DiffusionPipeline
    ours: Merged

    def reference(self) -> Tensors:
        """diffusers' weights by component.name."""
        return published({name: getattr(self.theirs, name).state_dict() for name in self.ours.hosts})

    def found(self) -> Tensors:
        """Ours under the same names."""
        return published({name: as_published(name, module.module) for name, module in self.ours.hosts.items()})


def published(states: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    """component.name -> a copy of the tensor; transformers 5 has no text_model. before CLIPTextModel's names."""
    return {
        f"{component}.{name.removeprefix('text_model.')}": tensor.detach().clone()
        for component, state in states.items()
        for name, tensor in state.items()
        if not name.endswith("position_ids")
    }


def as_published(component: str, module: nn.Module) -> Tensors:
    table = load_table("unet.diffusers" if component == "unet" else "text_encoder.transformers")
    return unmap(module.state_dict(), table.bind(prefix=table.prefixes[0]))


def hosts(source: Path, dtype: torch.dtype = torch.float32) -> dict[str, Host]:
    """Our modules of a model's UNet and text encoders, filled."""
    out = {}
    for name, (member, component) in choose(identify(Located(source), load_tables())).parts.items():
        if name != "vae":
            assert component.config is not None
            module = build(component.config)
            fill(module, member, component, device=torch.device("cpu"), dtype=dtype)
            out[name] = host(module, member, component)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {}
    for form in FORMS:
        out[form] = tmp_path_factory.mktemp("models") / form
        save_model(form, out[form])
    return out


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Model:
    return load_model(request.param, folders)


def load_model(form: str, folders: dict[str, Path]) -> Model:
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders[form])
    return Model(form, folders[form], theirs, Merged(hosts(folders[form])))


# --- one LoRA in every naming: the names are made of diffusers' modules and of ldm's rules, not of our tables


def modules(model: Model, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> dict[str, nn.Module]:
    """component.name -> the module, of the UNet's and the text encoders' layers."""
    return {
        f"{component}.{name.removeprefix('text_model.')}": module
        for component in model.ours.hosts
        for name, module in getattr(model.theirs, component).named_modules()
        if isinstance(module, kinds) and (component == "unet" or "encoder.layers" in name)
    }


def attention(model: Model) -> list[str]:
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    return [name for name in modules(model) if name.endswith(ends)]


def factors(model: Model, names: list[str], seed: int = 0, ranks: tuple[int, ...] = (2, 3, 4)) -> Factors:
    """Random matrices for some modules, of the ranks in turn."""
    generator = torch.Generator().manual_seed(seed)
    found = modules(model, (nn.Linear, nn.Conv2d))
    out = {}
    for index, name in enumerate(names):
        weight = found[name].weight
        rank, inner = ranks[index % len(ranks)], weight[0].numel()
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * inner**-0.5
        out[name] = down, torch.randn(weight.shape[0], rank, generator=generator) * 0.5
    return out


LEAVES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def ldm_name(name: str, up_attention: list[bool]) -> str:
    """What ldm and sgm call a UNet's module, for two layers per level: blocks are counted through all levels."""
    if name in OUTER:
        return OUTER[name]
    side, *path = name.split(".")
    if side == "mid_block":
        kind, j, *leaf = path
        block = f"middle_block.{2 * int(j) if kind == 'resnets' else 1}"
    else:
        i, kind, j, *leaf = path[0], *path[1:]
        if kind == "downsamplers":
            return f"input_blocks.{3 * (int(i) + 1)}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{3 * int(i) + 2}.{1 + up_attention[int(i)]}.conv"
        number = 1 + 3 * int(i) + int(j) if side == "down_blocks" else 3 * int(i) + int(j)
        block = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
    return ".".join([block, LEAVES.get(leaf[0], leaf[0]) if kind == "resnets" else leaf[0], *leaf[1:]])


def kohya(model: Model, name: str, *, ldm: bool) -> str:
    """kohya's name of a module."""
    component, _, path = name.partition(".")
    if component == "unet":
        up = [hasattr(block, "attentions") for block in model.theirs.unet.up_blocks]
        return "lora_unet_" + (ldm_name(path, up) if ldm else path).replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if model.form == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
    return f"{prefix[component]}text_model_{path.replace('.', '_')}"


def in_kohya(model: Model, lora: Factors, *, ldm: bool = False, turned: bool = False) -> Tensors:
    """With an alpha of half the rank; `turned`: matrices of 1x1 convolutions as of linear layers, and the other way."""
    out: Tensors = {}
    for name, (down, up) in lora.items():
        key = kohya(model, name, ldm=ldm)
        if turned and name.startswith("unet."):
            down = down[:, :, 0, 0] if down.shape[2:] == (1, 1) else down[:, :, None, None] if down.ndim == 2 else down
        up = up[:, :, None, None] if down.ndim == 4 else up
        out |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * 2}
        out[f"{key}.alpha"] = torch.tensor(down.shape[0] / 2)
    return out


def dotted(name: str) -> str:
    component, _, path = name.partition(".")
    return name if component == "unet" else f"{component}.text_model.{path}"


def in_comfyui(lora: Factors) -> Tensors:
    out: Tensors = {}
    clips = {"text_encoder": "text_encoders.clip_l.transformer", "text_encoder_2": "text_encoders.clip_g.transformer"}
    for name, (down, up) in lora.items():
        component, _, path = dotted(name).partition(".")
        key = f"{clips.get(component, 'diffusion_model')}.{path}"
        out |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    return out


def in_diffusers(lora: Factors) -> Tensors:
    out: Tensors = {}
    for name, (down, up) in lora.items():
        infix = "lora" if name.startswith("unet.") else "lora_linear_layer"
        up = up[:, :, None, None] if down.ndim == 4 else up
        out |= {f"{dotted(name)}.{infix}.down.weight": down, f"{dotted(name)}.{infix}.up.weight": up}
    return out


def in_peft(lora: Factors, adapter: str = "") -> Tensors:
    out: Tensors = {}
    for name, (down, up) in lora.items():
        up = up[:, :, None, None] if down.ndim == 4 else up
        out |= {f"{dotted(name)}.lora_A{adapter}.weight": down, f"{dotted(name)}.lora_B{adapter}.weight": up}
    return out


def in_peft_parts(tensors: Tensors) -> Tensors:
    names = {"lora_down": "lora_A", "lora_up": "lora_B"}
    return {re.sub("lora_down|lora_up", lambda match: names[match[0]], key): t for key, t in tensors.items()}


def in_omi(model: Model | None, lora: Factors) -> Tensors:
    """OneTrainer's keys: the component, a module in the single file's names (or in diffusers'), kohya's parts."""
    clips = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    out: Tensors = {}
    for name, (down, up) in lora.items():
        component, _, path = dotted(name).partition(".")
        if component == "unet" and model is not None:
            path = ldm_name(path, [hasattr(block, "attentions") for block in model.theirs.unet.up_blocks])
        key = f"{clips.get(component, component)}.{path}"
        out |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        out[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    return out


def wrapped(tensors: Tensors) -> Tensors:
    """Saved from a PeftModel that was not unwrapped."""
    return {key.replace(".", ".base_model.model.", 1): tensor for key, tensor in tensors.items()}


def without_component(tensors: Tensors, prefix: str = "") -> Tensors:
    return {prefix + key.partition(".")[2]: tensor for key, tensor in tensors.items()}


def in_processors(lora: Factors, *, prefix: str) -> Tensors:
    out: Tensors = {}
    for name, (down, up) in lora.items():
        component, _, path = dotted(name).removesuffix(".0").partition(".")
        parent, _, leaf = path.rpartition(".")
        if component == "unet":
            key = f"{prefix}{parent}.processor.{leaf}_lora"
        else:
            key = f"{component}.{parent}.to_{leaf.removesuffix('_proj')}_lora"
        out |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return out


NAMINGS: dict[str, Callable[[Model, Factors], Tensors]] = {
    "kohya": lambda model, lora: in_kohya(model, lora),
    "kohya, ldm names": lambda model, lora: in_kohya(model, lora, ldm=True),
    "kohya, matrices of the other form": lambda model, lora: in_kohya(model, lora, turned=True),
    "comfyui": lambda _, lora: in_comfyui(lora),
    "comfyui, peft's parts": lambda _, lora: in_peft_parts(in_comfyui(lora)),
    "omi": lambda model, lora: in_omi(model, lora),
    "omi, diffusers names": lambda _, lora: in_omi(None, lora),
    "diffusers in base_model": lambda _, lora: wrapped(in_diffusers(lora)),
    "base_model before": lambda _, lora: {f"base_model.model.{key}": t for key, t in in_peft(lora).items()},
    "base_model behind": lambda _, lora: wrapped(in_peft(lora, ".default")),
    "diffusers": lambda _, lora: in_diffusers(lora),
    "peft": lambda _, lora: in_peft(lora),
    "peft with the adapter's name": lambda _, lora: in_peft(lora, ".style_1"),
}
UNET_NAMINGS: dict[str, Callable[[Factors], Tensors]] = {
    "peft with base_model": lambda lora: without_component(in_peft(lora), "base_model.model."),
    "peft without component": lambda lora: without_component(in_peft(lora)),
    "processors": lambda lora: in_processors(lora, prefix=""),
    "processors with unet": lambda lora: in_processors(lora, prefix="unet."),
}


def write(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata)
    return path


def formula(weights: Tensors, lora: Factors, unet: float = 1.0, text: float = 1.0) -> Tensors:
    """W + strength * up @ down, computed in float64."""
    out = dict(weights)
    for name, (down, up) in lora.items():
        product = torch.einsum("or,ri->oi", up.double(), down.double().flatten(1))
        weight = out[f"{name}.weight"]
        strength = unet if name.startswith("unet.") else text
        out[f"{name}.weight"] = (weight.double() + strength * product.reshape(weight.shape)).float()
    return out


def same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert difference(found[name], tensor) <= TOLERANCE or torch.equal(found[name], tensor), name


def test_every_naming_of_a_lora_gives_the_same_weights(model: Model, tmp_path: Path) -> None:
    base, lora = model.reference(), factors(model, attention(model))
    assert {name.partition(".")[0] for name in lora} == model.ours.hosts.keys()
    files = {name: make(model, lora) for name, make in NAMINGS.items()}
    files["processors of all"] = in_processors(lora, prefix="unet.")
    wanted = formula(base, lora)
    assert not torch.equal(wanted["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"],
                           base["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"])  # fmt: skip
    for index, (naming, tensors) in enumerate(files.items()):
        use = Use(read_lora(write(tensors, tmp_path / f"{index}.safetensors")))
        [resolution] = set_loras(model.ours, [use])
        assert len(resolution.changes) == len(lora), naming
        same(model.found(), wanted)
    unet = {name: pair for name, pair in lora.items() if name.startswith("unet.")}
    for index, make in enumerate(UNET_NAMINGS.values()):
        set_loras(model.ours, [Use(read_lora(write(make(unet), tmp_path / f"unet-{index}.safetensors")))])
        same(model.found(), formula(base, unet))


def test_every_module_of_a_model(model: Model, tmp_path: Path) -> None:
    """Linear layers and convolutions alike: projections, feed-forwards, residual blocks, embeddings, down and up."""
    lora = factors(model, list(modules(model, (nn.Linear, nn.Conv2d))))
    assert sum(down.shape[2:] == (3, 3) for down, _ in lora.values()) > 10
    wanted = formula(model.reference(), lora)
    for index, tensors in enumerate(
        [
            in_kohya(model, lora),
            in_kohya(model, lora, ldm=True),
            in_kohya(model, lora, turned=True),
            in_diffusers(lora),
            in_peft(lora),
        ]
    ):
        set_loras(model.ours, [Use(read_lora(write(tensors, tmp_path / f"{index}.safetensors")))])
        same(model.found(), wanted)


@pytest.mark.parametrize("naming", ["kohya", "kohya, ldm names", "diffusers", "peft", "processors"])
def test_diffusers_agrees(model: Model, naming: str, tmp_path: Path) -> None:
    """In the namings that it reads. kohya's it reads right only with one alpha for all (0.42, `get_peft_kwargs`)."""
    if naming == "kohya, ldm names" and model.form != "sdxl":
        pytest.skip("diffusers knows these names in SDXL alone")
    ranks = (4,) if naming.startswith("kohya") else (2, 3, 4)
    lora = factors(model, attention(model), seed=3, ranks=ranks)
    if naming == "processors":
        lora = {name: pair for name, pair in lora.items() if name.startswith("unet.")}
        tensors = in_processors(lora, prefix="unet.")
    else:
        tensors = NAMINGS[naming](model, lora)
    path = write(tensors, tmp_path / "lora.safetensors")
    set_loras(model.ours, [Use(read_lora(path), 0.5, 0.5)])
    model.theirs.load_lora_weights(path)
    model.theirs.fuse_lora(lora_scale=0.5)
    model.theirs.unload_lora_weights()
    same(model.found(), model.reference())


# --- the other kinds of changes, by peft and by their formulas


PEFT: dict[str, tuple[type[peft.PeftConfig], dict[str, Any], str]] = {
    "LoRA": (peft.LoraConfig, {"lora_alpha": 6, "r": 4}, "lora_B.weight"),
    "rank-stabilised": (peft.LoraConfig, {"lora_alpha": 6, "r": 4, "use_rslora": True}, "lora_B.weight"),
    "patterns": (
        peft.LoraConfig,
        {"lora_alpha": 6, "r": 4, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 5, "attn2.to_k": 7}},
        "lora_B.weight",
    ),
    "DoRA": (peft.LoraConfig, {"lora_alpha": 6, "r": 4, "use_dora": True}, "lora_magnitude_vector"),
    "LoHa": (peft.LoHaConfig, {"alpha": 6, "r": 4}, "hada_w2_b"),
    "LoHa with cores": (peft.LoHaConfig, {"alpha": 6, "r": 4, "use_effective_conv2d": True}, "hada_t1"),
    "LoKr": (peft.LoKrConfig, {"alpha": 6, "r": 3}, "lokr_w2_a"),
    "LoKr of products": (peft.LoKrConfig, {"alpha": 6, "r": 2, "decompose_both": True}, "lokr_w1_b"),
    "LoKr with cores": (peft.LoKrConfig, {"alpha": 6, "r": 2, "use_effective_conv2d": True}, "lokr_t2"),
    "LoKr of whole factors": (peft.LoKrConfig, {"alpha": 6, "r": 64}, "lokr_w2"),
}  # fmt: skip
SOME = [
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "mid_block.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv",
]  # fmt: skip
MID = "mid_block.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize("kind", PEFT)
def test_peft_agrees(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Its own files with its settings beside them, of every kind that it merges, for linear layers and convolutions."""
    cls, options, part = PEFT[kind]
    model = load_model("sd15", folders)
    torch.manual_seed(0)
    random = {"init_lora_weights" if cls is peft.LoraConfig else "init_weights": False}
    wrapped = peft.get_peft_model(model.theirs.unet, cls(**options, **random, target_modules=SOME))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    wrapped.save_pretrained(tmp_path)
    wanted = {key: tensor.clone() for key, tensor in wrapped.merge_and_unload().state_dict().items()}
    before = as_published("unet", model.ours.hosts["unet"].module)
    before = {key: tensor.clone() for key, tensor in before.items()}
    [resolution] = set_loras(model.ours, [Use(read_lora(tmp_path / "adapter_model.safetensors"))])
    assert len(resolution.changes) == len(SOME)
    assert any(key.endswith(f".{part}") for key in load_file(tmp_path / "adapter_model.safetensors"))
    found = as_published("unet", model.ours.hosts["unet"].module)
    assert {key for key in found if not torch.equal(found[key], before[key])} == {f"{key}.weight" for key in SOME}
    for key, tensor in wanted.items():
        assert difference(found[key], tensor) <= TOLERANCE or torch.equal(found[key], tensor), key


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def lokr(w1: Tensor, w2: Tensor) -> Tensor:
    """w1 (A, C), w2 (B, D, ...) -> (A B, C D, ...)."""
    product = torch.einsum("ac,bd...->abcd...", w1, w2)
    return product.flatten(0, 1).flatten(1, 2)


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    """DoRA, with the norm over the axes that the magnitude does not run along."""
    total = weight + change
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    return weight + strength * (magnitude * total / total.square().sum(axes, keepdim=True).sqrt() - weight)


QUERY, CONV, NORM = f"{MID}.attn1.to_q", "mid_block.resnets.0.conv1", f"{MID}.norm1"
SQUARE, WIDE = (64, 64), (64, 64, 3, 3)
A, B = random(64, 3, seed=1), random(3, 64, seed=2)
KERNEL, CORE = random(3, 64, 3, 3, seed=3), random(3, 3, 3, 3, seed=4)
SCALE = 5 / 3  # alpha 5, rank 3
UP_DOWN = {"lora_up.weight": A, "lora_down.weight": B, "alpha": torch.tensor(5.0)}
HADA = {
    "hada_w1_a": A, "hada_w1_b": B, "hada_w2_a": random(64, 3, seed=5), "hada_w2_b": random(3, 64, seed=6),
    "alpha": torch.tensor(5.0),
}  # fmt: skip
W1, W2 = random(4, 8, seed=7), random(16, 8, seed=8)
Expected = Callable[[Tensor, float], Tensor]
"""The weight that a weight becomes at some strength."""
KOHYA: dict[str, tuple[str, Tensors, Expected]] = {
    "alpha": (QUERY, UP_DOWN, lambda w, s: w + s * SCALE * (A @ B)),
    "no alpha": (QUERY, {"lora_up.weight": A, "lora_down.weight": B}, lambda w, s: w + s * (A @ B)),
    "LoCon": (
        CONV, {"lora_up.weight": A[..., None, None], "lora_down.weight": KERNEL, "alpha": torch.tensor(5.0)},
        lambda w, s: w + s * SCALE * torch.einsum("or,riyx->oiyx", A, KERNEL),
    ),
    "LoCon with a core": (
        CONV,
        {"lora_up.weight": A[..., None, None], "lora_down.weight": B[..., None, None], "lora_mid.weight": CORE,
         "alpha": torch.tensor(5.0)},
        lambda w, s: w + s * SCALE * torch.einsum("om,mnyx,ni->oiyx", A, CORE, B),
    ),
    "DoRA along outputs": (
        QUERY, UP_DOWN | {"dora_scale": A.abs()[:, :1]},
        lambda w, s: decomposed(w, SCALE * (A @ B), A.abs()[:, :1], s),
    ),
    "DoRA along inputs": (
        QUERY, UP_DOWN | {"dora_scale": B.abs()[:1]}, lambda w, s: decomposed(w, SCALE * (A @ B), B.abs()[:1], s),
    ),
    "DoRA of a convolution": (
        CONV,
        {"lora_up.weight": A[..., None, None], "lora_down.weight": KERNEL, "dora_scale": B.abs()[:1, :, None, None]},
        lambda w, s: decomposed(
            w, torch.einsum("or,riyx->oiyx", A, KERNEL), B.abs()[:1, :, None, None], s
        ),
    ),
    "LoHa": (
        QUERY, HADA, lambda w, s: w + s * SCALE * (A @ B) * (HADA["hada_w2_a"] @ HADA["hada_w2_b"]),
    ),
    "LoHa with cores": (
        CONV, HADA | {"hada_w1_a": A.T, "hada_w2_a": HADA["hada_w2_a"].T, "hada_t1": CORE, "hada_t2": CORE.flip(0)},
        lambda w, s: w + s * SCALE * torch.einsum("mnyx,mo,ni->oiyx", CORE, A.T, B) * torch.einsum(
            "mnyx,mo,ni->oiyx", CORE.flip(0), HADA["hada_w2_a"].T, HADA["hada_w2_b"]
        ),
    ),
    "LoKr": (
        QUERY, {"lokr_w1": W1, "lokr_w2": W2, "alpha": torch.tensor(5.0)}, lambda w, s: w + s * lokr(W1, W2),
    ),
    "LoKr of a product": (
        QUERY, {"lokr_w1": W1, "lokr_w2_a": A[:16], "lokr_w2_b": B[:, :8], "alpha": torch.tensor(5.0)},
        lambda w, s: w + s * SCALE * lokr(W1, A[:16] @ B[:, :8]),
    ),
    "LoKr of two products": (
        QUERY,
        {"lokr_w1_a": A[:4], "lokr_w1_b": B[:, :8], "lokr_w2_a": A[:16], "lokr_w2_b": B[:, 8:16],
         "alpha": torch.tensor(5.0)},
        lambda w, s: w + s * SCALE * lokr(A[:4] @ B[:, :8], A[:16] @ B[:, 8:16]),
    ),
    "LoKr of a convolution": (
        CONV, {"lokr_w1": W1, "lokr_w2": random(16, 8, 3, 3, seed=9)},
        lambda w, s: w + s * lokr(W1, random(16, 8, 3, 3, seed=9)),
    ),
    "LoKr of a convolution as a matrix": (
        CONV, {"lokr_w1": W1, "lokr_w2_a": A[:16], "lokr_w2_b": random(3, 72, seed=9)},
        lambda w, s: w + s * lokr(W1, (A[:16] @ random(3, 72, seed=9)).reshape(16, 8, 3, 3)),
    ),
    "LoKr with a core": (
        CONV, {"lokr_w1": W1, "lokr_w2_a": A.T[:, :16], "lokr_w2_b": B[:, :8], "lokr_t2": CORE,
               "alpha": torch.tensor(5.0)},
        lambda w, s: w + s * SCALE * lokr(W1, torch.einsum("mnyx,mo,ni->oiyx", CORE, A.T[:, :16], B[:, :8])),
    ),
    "DoRA on LoKr": (
        QUERY, {"lokr_w1": W1, "lokr_w2": W2, "dora_scale": A.abs()[:, :1]},
        lambda w, s: decomposed(w, lokr(W1, W2), A.abs()[:, :1], s),
    ),
    "difference": (CONV, {"diff": random(*WIDE, seed=9)}, lambda w, s: w + s * random(*WIDE, seed=9)),
    "difference of a norm": (NORM, {"w_norm": B[0]}, lambda w, s: w + s * B[0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KOHYA)
def test_formulas(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Under kohya's names, at two strengths, in half precision on disk and not."""
    name, parts, wanted = KOHYA[kind]
    module, state = hosts(folders["sd15"]), Merged({})
    state.hosts = module
    base = as_published("unet", module["unet"].module)[f"{name}.weight"].clone()
    for dtype in (torch.float32, torch.float16):
        key = "lora_unet_" + name.replace(".", "_")
        tensors = {f"{key}.{part}": tensor.to(dtype) for part, tensor in parts.items()}
        use = Use(read_lora(write(tensors, tmp_path / f"{dtype}.safetensors")), 0.75)
        set_loras(state, [use])
        found = as_published("unet", module["unet"].module)[f"{name}.weight"]
        assert difference(found, wanted(base, 0.75)) <= (TOLERANCE if dtype == torch.float32 else 1e-2)
        assert difference(found, base) > 1e-2


def test_biases_change_with_their_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    state = Merged(hosts(folders["sd15"]))
    before = {name: t.clone() for name, t in as_published("unet", state.hosts["unet"].module).items()}
    tensors = {
        f"lora_unet_{CONV.replace('.', '_')}.lora_up.weight": A[..., None, None],
        "diffusion_model.middle_block.1.norm.b_norm": B[2],
        f"lora_unet_{CONV.replace('.', '_')}.lora_down.weight": KERNEL, "diffusion_model.out.0.diff_b": B[0, :32],
        f"lora_unet_{CONV.replace('.', '_')}.diff_b": B[1],
    }  # fmt: skip
    set_loras(state, [Use(read_lora(write(tensors, tmp_path / "lora.safetensors")), 2.0)])
    found = as_published("unet", state.hosts["unet"].module)
    wanted = {
        f"{CONV}.bias": B[1], "conv_norm_out.bias": B[0, :32], "mid_block.attentions.0.norm.bias": B[2],
        f"{CONV}.weight": torch.einsum("or,riyx->oiyx", A, KERNEL),
    }  # fmt: skip
    for name, tensor in found.items():
        assert torch.allclose(tensor, before[name] + 2 * wanted[name] if name in wanted else before[name], atol=1e-6)


# --- into the model and out of it


@pytest.fixture(scope="module")
def loras(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two LoRAs of every form, on the attentions, and a DoRA of one module of SD1.5."""
    base, out = tmp_path_factory.mktemp("loras"), {}
    for form in FORMS:
        model = load_model(form, folders)
        out[form] = [
            write(in_kohya(model, factors(model, attention(model)[seed:], seed)), base / f"{form}-{seed}.safetensors")
            for seed in (1, 2)
        ]
    key = "lora_unet_" + QUERY.replace(".", "_")
    dora = {f"{key}.{part}": tensor for part, tensor in KOHYA["DoRA along outputs"][1].items()}
    out["sd15"].append(write(dora, base / "dora.safetensors"))
    return out


def bits(state: Merged) -> Tensors:
    return {
        f"{name}.{key}": tensor.clone()
        for name, h in state.hosts.items()
        for key, tensor in h.module.state_dict().items()
    }


def equal(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def digest(path: Path) -> list[str]:
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def lora_of_file(path: Path, out: Path, seed: int) -> Path:
    """A LoRA on the attentions of a single file's UNet and CLIP, named after its own keys, with one alpha for all."""
    generator = torch.Generator().manual_seed(seed)
    clip = {
        "cond_stage_model.transformer.": "lora_te_", "conditioner.embedders.0.transformer.": "lora_te1_",
        "model.diffusion_model.": "lora_unet_",
    }  # fmt: skip
    tensors = {}
    for key, info in read_header(path).tensors.items():
        if re.search(r"(attn[12]?\..*|proj_in|proj_out)\.weight$", key):
            for prefix, ours in clip.items():
                if key.startswith(prefix):
                    name = ours + key.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
                    for half, shape in (("up", (info.shape[0], 4)), ("down", (4, info.shape[1]))):
                        tensors[f"{name}.lora_{half}.weight"] = torch.randn(shape, generator=generator) * 0.2
    return write(tensors, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["sd15", "sdxl", "sd1 file", "sd2 file", "sdxl file"])
def test_out_again_to_the_bit(
    folders: dict[str, Path], loras: dict[str, list[Path]], form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Whatever list there was before; the files, which the weights are mapped from, stay as they are."""
    if form in folders:
        path, (one, two) = folders[form], loras[form][:2]
    else:
        path = single(form.removesuffix(" file"), tmp_path / "model.safetensors")
        one, two = (lora_of_file(path, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    state, files = Merged(hosts(path, dtype)), digest(path)
    before, parameters = bits(state), [p for h in state.hosts.values() for p in h.module.parameters()]
    first, second = read_lora(one), read_lora(two)
    set_loras(state, [Use(first)])
    alone = bits(state)
    assert all(not torch.equal(alone[f"unet.{name}"], before[f"unet.{name}"]) for name in state.touched["unet"])
    assert len(state.touched["unet"]) > 20
    set_loras(state, [Use(second, 0.5), Use(first, 1.0, 0.25)])
    assert not equal(bits(state), alone)
    set_loras(state, [Use(first)])
    assert equal(bits(state), alone)
    set_loras(state, [])
    assert equal(bits(state), before)
    assert not any(state.touched.values())
    after = [p for h in state.hosts.values() for p in h.module.parameters()]
    assert all(p is q for p, q in zip(parameters, after, strict=True))
    assert digest(path) == files


def test_strengths_of_the_unet_and_the_text_encoders(model: Model, loras: dict[str, list[Path]]) -> None:
    base, lora = model.reference(), factors(model, attention(model)[1:], seed=1)
    use = read_lora(loras[model.form][0])
    for unet, text in ((0.5, 2.0), (0.0, 1.0), (1.0, 0.0), (-1.0, 0.0)):
        set_loras(model.ours, [Use(use, unet, text)])
        same(model.found(), formula(base, lora, unet, text))
        if not unet:
            assert not model.ours.touched["unet"]


def test_the_order_does_not_matter(folders: dict[str, Path], loras: dict[str, list[Path]]) -> None:
    """With DoRA among them: every change is that of the model's own weights, and they are rounded once."""
    state = Merged(hosts(folders["sd15"], torch.float16))
    base = bits(state)
    uses = [Use(read_lora(path), 0.5 + index) for index, path in enumerate(loras["sd15"])]
    set_loras(state, uses)
    found = bits(state)
    set_loras(state, uses[::-1])
    assert equal(bits(state), found)
    exact, single = {}, {}
    for use in uses:
        set_loras(state, [use])
        single[use.lora.path] = bits(state)
    for name, tensor in found.items():
        changes = sum(one[name].double() - base[name].double() for one in single.values())
        exact[name] = (base[name].double() + changes).half()
        assert torch.allclose(tensor.float(), exact[name].float(), atol=5e-3)


def test_a_failure_leaves_no_half_of_a_lora(
    folders: dict[str, Path], loras: dict[str, list[Path]], tmp_path: Path
) -> None:
    state = Merged(hosts(folders["sd15"]))
    before = bits(state)
    tensors = load_file(loras["sd15"][0])
    last = [key for key in tensors if key.endswith("lora_up.weight")][-1]
    tensors[last][0, 0] = torch.nan
    broken = write(tensors, tmp_path / "nan.safetensors")
    set_loras(state, [Use(read_lora(loras["sd15"][1]))])
    with pytest.raises(WeightsError, match="not finite"):
        set_loras(state, [Use(read_lora(loras["sd15"][0])), Use(read_lora(broken))])
    assert equal(bits(state), before)
    assert state.uses == ()


def test_the_models_file_must_still_be_there(tmp_path: Path) -> None:
    path = single("sd1", tmp_path / "model.safetensors")
    state = Merged(hosts(path))
    set_loras(state, [Use(read_lora(lora_of_file(path, tmp_path / "lora.safetensors", 1)))])
    path.write_bytes(path.read_bytes())
    with pytest.raises(SourceError, match="load the model again"):
        set_loras(state, [])
    assert state.touched["unet"]


# --- what does not fit


def test_a_lora_of_another_family_is_refused(folders: dict[str, Path], loras: dict[str, list[Path]]) -> None:
    state = Merged(hosts(folders["sdxl"]))
    before = bits(state)
    for partial in (True, False):
        with pytest.raises(WeightsError, match=r"fits another model \(context 32\), but .* SDXL \(context 80\)"):
            set_loras(state, [Use(read_lora(loras["sd15"][0]))], partial=partial)
    assert equal(bits(state), before)


FAMILIES = {"sd15": ("sd15", "SD1.x"), "lcm": ("sd15", "SD1.x"), "sdxl": ("sdxl", "SDXL")}


def preset(stem: str) -> tuple[str, dict[str, Place]]:
    """The base that a manifest's LoRA was made for."""
    label = next(label for form, (_, label) in FAMILIES.items() if form in stem)
    return label, places(label)


def places(label: str) -> dict[str, Place]:
    return {name: Place(config, expected(config), load_tables()) for name, config in bases()[label].items()}


@pytest.mark.parametrize("stem", MANIFESTS)
def test_every_published_lora_finds_every_target(stem: str, tmp_path: Path) -> None:
    """And the audit says so, with the ranks and the base that it fits."""
    manifest, (label, base) = MANIFESTS[stem], preset(stem)
    path = sparse(manifest, tmp_path / "lora.safetensors")
    resolution = resolve(read_lora(path), base)
    assert not resolution.unplaced
    changed = [(change.component, change.target.parameter) for change in resolution.changes]
    assert len(changed) == len(set(changed)) == sum("down.weight" in k or "lora_A" in k for k in manifest.shapes)
    assert {key for change in resolution.changes for key in change.keys.values()} == manifest.shapes.keys()
    report = nativesd.audit(path)
    [component] = report.components
    said = {evidence.what: evidence.value for evidence in component.evidence}
    assert report.ok
    assert (component.name, component.family, said["base"]) == ("lora", label, label)
    assert {key for m in component.mapped for key in m.keys} == manifest.shapes.keys()
    assert said["rank"].startswith(f"{manifest.config.get('r') or manifest.config['lora_dim']} x")
    assert ("alpha" in said) == any(key.endswith(".alpha") for key in manifest.shapes)


@pytest.mark.parametrize(
    ("stem", "model", "message"),
    [
        ("lora-sdxl.kohya", "SD1.x", r"fits SDXL \(context 2048\), but the model is SD1.x \(context 768\)"),
        ("lora-sd15.kohya", "SDXL", r"fits SD1.x \(context 768\), but the model is SDXL \(context 2048\)"),
        ("lora-sd15-attn.peft", "SD2.x", r"fits SD1.x \(context 768\), but the model is SD2.x \(context 1024\)"),
        ("lora-sdxl-attn.diffusers", "SDXL refiner", r"context 2048\), but the model is SDXL refiner \(context 1280\)"),
        (
            "lora-sdxl-attn.diffusers",
            "SDXL SSD-1B",
            r"fits SDXL, but the model is SDXL SSD-1B: there 576 of its 1120 keys found no place; partial=True applies",
        ),
    ],
)
def test_a_published_lora_on_another_base(stem: str, model: str, message: str, tmp_path: Path) -> None:
    path = sparse(MANIFESTS[stem], tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=message):
        resolve(read_lora(path), places(model))


@pytest.mark.parametrize("label", bases())
def test_no_two_modules_have_one_name(label: str) -> None:
    """In all layouts together, and with underscores for dots: `Place.modules` raises where they have."""
    for part in places(label).values():
        assert len(part.modules) > 2 * len({name.rpartition(".")[0] for name in part.shapes}) - 10


GOOD = {f"lora_unet_{QUERY.replace('.', '_')}.{part}": tensor for part, tensor in UP_DOWN.items()}
QUERY_KEY = "lora_unet_" + QUERY.replace(".", "_")
OTHER = "lora_unet_" + f"{MID}.attn1.to_k".replace(".", "_")
STRANGE: dict[str, tuple[Tensors, str]] = {
    "a name of no naming": ({"some.weight": A}, "no naming of LoRA files has such a key"),
    "a module that is not there": (
        {"lora_unet_nowhere.lora_up.weight": A, "lora_unet_nowhere.lora_down.weight": B},
        "the unet has no module of this name",
    ),
    "a component that is not there": (
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.diff_b": B[0]}, "the model has no text_encoder_2",
    ),
    "no up": ({f"{OTHER}.lora_down.weight": B}, "its up matrix is missing"),
    "no factor": ({f"{OTHER}.lokr_w1": W1}, "its LoKr, second factor, left is missing"),
    "only an alpha": ({f"{OTHER}.alpha": torch.tensor(1.0)}, "nothing is to be scaled"),
    "another rank": (
        {f"{OTHER}.lora_up.weight": A[:, :2], f"{OTHER}.lora_down.weight": B},
        "its up matrix has 2 columns, its down matrix 3 rows",
    ),
    "another size": (
        {f"{OTHER}.lora_up.weight": A, f"{OTHER}.lora_down.weight": B[:, :32]},
        r"its parts make a matrix 64 x 32, the module's weight is \[64, 64\]",
    ),
    "another size of a difference": ({f"{OTHER}.diff": B}, r"it is \[3, 64\], the module's tensor is \[64, 64\]"),
    "a vector": (
        {f"{OTHER}.lora_up.weight": A[:, 0], f"{OTHER}.lora_down.weight": B}, r"its up matrix is \[64\], no matrix",
    ),
    "another core": (
        {f"{OTHER}.lora_up.weight": A, f"{OTHER}.lora_down.weight": B, f"{OTHER}.lora_mid.weight": KERNEL},
        r"its core of the kernel is \[3, 64, 3, 3\], for matrices of 3 and 3",
    ),
    "two kinds": (
        {f"{OTHER}.lora_up.weight": A, f"{OTHER}.lora_down.weight": B, f"{OTHER}.diff": random(64, 64, seed=1)},
        "it has parts of LoRA and of full difference",
    ),
    "a factor twice": (
        {f"{OTHER}.lokr_w1": W1, f"{OTHER}.lokr_w1_a": A, f"{OTHER}.lokr_w2": W2},
        "it has lokr_w1 whole and as a product",
    ),
    "several alphas": (
        {f"{OTHER}.lora_up.weight": A, f"{OTHER}.lora_down.weight": B, f"{OTHER}.alpha": B[0]},
        "its alpha is not one number",
    ),
    "alpha of a difference": (
        {f"{OTHER}.diff": random(64, 64, seed=1), f"{OTHER}.alpha": torch.tensor(1.0)},
        "a full difference has no alpha",
    ),
    "another magnitude": (
        {f"{OTHER}.lora_up.weight": A, f"{OTHER}.lora_down.weight": B, f"{OTHER}.dora_scale": torch.ones(7, 1)},
        r"its DoRA magnitude is \[7, 1\], the module's weight \[64, 64\]",
    ),
    "a bias that is not there": ({f"{OTHER}.diff_b": B[0]}, "the module has no bias"),
    "two names of one module": (
        {"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.diff": random(64, 64, seed=1)},
        rf"{QUERY_KEY}.* already changes unet mid.attentions.0.blocks.0.attn1.to_q.weight",
    ),
    "halves of two adapters": (
        {f"unet.{MID}.attn1.to_k.lora_A.one.weight": B, f"unet.{MID}.attn1.to_k.lora_B.two.weight": A},
        "its (up|down) matrix is missing",
    ),
    "two adapters": (
        {f"unet.{QUERY}.lora_{half}.{name}.weight": tensor for half, tensor in (("A", B), ("B", A))
         for name in ("one", "two")},
        "already changes unet mid.attentions.0.blocks.0.attn1.to_q.weight",
    ),
    "OFT": ({f"{OTHER}.oft_blocks": random(4, 8, 8, seed=1)}, "OFT turns the weight"),
    "GLoRA": ({f"{OTHER}.a1.weight": A}, "GLoRA multiplies the weight"),
    "IA3": ({f"{OTHER}.on_input": torch.tensor(True)}, "IA3 scales the weight"),
    "a trained scale": ({f"{OTHER}.scalar": torch.tensor(2.0)}, "a trained scale of early LyCORIS files"),
    "a bias of peft": ({f"unet.{MID}.attn1.to_k.lora_B.bias": B[0]}, r"a bias of the up matrix \(peft's lora_bias\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE)
def test_what_finds_no_place_is_named_with_the_reason(folders: dict[str, Path], case: str, tmp_path: Path) -> None:
    """And refused, or with partial=True left out while the rest is merged."""
    tensors, reason = STRANGE[case]
    lora = read_lora(write(GOOD | tensors, tmp_path / "lora.safetensors"))
    state = Merged(hosts(folders["sd15"]))
    before = bits(state)
    with pytest.raises(WeightsError, match=rf"\n  [\w.*, ]+: .*{reason}"):
        set_loras(state, [Use(lora)])
    assert equal(bits(state), before)
    [resolution] = set_loras(state, [Use(lora)], partial=True)
    assert resolution.unplaced.keys() <= tensors.keys() | GOOD.keys()
    assert all(re.search(reason, why) for why in resolution.unplaced.values())
    assert [change.target.parameter for change in resolution.changes] == ["mid.attentions.0.blocks.0.attn1.to_q.weight"]
    with pytest.raises(WeightsError, match="found no place"):
        set_loras(state, [Use(lora)])


def test_what_is_no_lora_at_all(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is a model, not a LoRA"):
        read_lora(folders["sd15"])
    with pytest.raises(WeightsError, match=r"is no LoRA: it has no key named like a LoRA's, but 'a'"):
        read_lora(write({"a": A}, tmp_path / "a.safetensors"))
    with pytest.raises(SourceError, match=r"missing|does not exist"):
        read_lora(tmp_path / "none.safetensors")
    lora = read_lora(write({k: v for k, v in GOOD.items() if "up" not in k}, tmp_path / "b.safetensors"))
    for partial in (True, False):
        with pytest.raises(WeightsError, match="2 of its 2 keys found no place"):
            resolve(lora, {"unet": hosts(folders["sd15"])["unet"].place}, partial=partial)
    with pytest.raises(UsageError, match="finite"):
        Use(lora, float("nan"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "not a JSON object"),
        ('{"unet.r": 4}', "no lora_alpha, r and alpha_pattern"),
        ('{"unet.r": 0, "unet.lora_alpha": 4}', "has the rank r = 0, which must be a whole number from 1 on"),
        ('{"r": 2.5, "lora_alpha": 4}', "has the rank r = 2.5, which must be a whole number from 1 on"),
        ('{"unet.peft_type": "IA3"}', "has the peft_type 'IA3', of which nothing is read here: LORA, LOHA, LOKR are"),
        ('{"peft_type": ["LORA"], "r": 4, "lora_alpha": 4}', "has the peft_type .*, of which nothing is read here"),
        ('{"r": 4, "lora_alpha": 4, "alpha_pattern": {"a": "b"}}', "no lora_alpha, r and alpha_pattern"),
        ('{"r": 4, "lora_alpha": 4, "alpha_pattern": {"(a+)+": 2}}', "no module's name"),
    ],
)
def test_settings_that_cannot_be(settings: str, message: str, tmp_path: Path) -> None:
    path = write(GOOD, tmp_path / "lora.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(WeightsError, match=message):
        read_lora(path)


def test_the_rank_that_peft_takes_where_none_is_given(tmp_path: Path) -> None:
    path = write(GOOD, tmp_path / "lora.safetensors", {"lora_adapter_metadata": '{"lora_alpha": 4}'})
    stated = read_lora(path).groups[0].stated
    assert stated is not None
    assert stated.rank == peft.LoraConfig().r == 8
    assert stated.scale("to_q", None) == 0.5


def test_settings_in_the_metadata(model: Model, tmp_path: Path) -> None:
    """As diffusers writes them: for every component by itself. It scales as we do."""
    lora = factors(model, attention(model), seed=5, ranks=(4,))
    data = {"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True, "unet.alpha_pattern": {"to_k": 6}}
    data |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 2, "text_encoder_2.r": 4, "text_encoder_2.lora_alpha": 12}
    path = write(in_peft(lora), tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(data)})
    set_loras(model.ours, [Use(read_lora(path))])
    scales = {"text_encoder": 0.5, "text_encoder_2": 3.0}
    scaled = {}
    for name, (down, up) in lora.items():
        component = name.partition(".")[0]
        scaled[name] = down, up * scales.get(component, 3.0 if name.endswith("to_k") else 4.0)
    same(model.found(), formula(published({
        name: as_published(name, h.module) for name, h in hosts(model.folder).items()
    }), scaled))  # fmt: skip


def test_peft_without_component_in_a_text_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    """Both of SDXL's have the names; the shapes say which is meant."""
    model = load_model("sdxl", folders)
    base = model.reference()
    for component in ("text_encoder", "text_encoder_2"):
        lora = factors(model, [n for n in attention(model) if n.startswith(f"{component}.")])
        tensors = without_component(in_peft(lora), "base_model.model.")
        set_loras(model.ours, [Use(read_lora(write(tensors, tmp_path / f"{component}.safetensors")))])
        same(model.found(), formula(base, lora))


def test_openclips_own_names(tmp_path: Path) -> None:
    """Its in_proj is query, key and value in one: the change is cut like the matrix."""
    path = single("sdxl", tmp_path / "model.safetensors")
    state = Merged(hosts(path))
    encoder = state.hosts["text_encoder_2"].module
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    up, down = random(384, 3, seed=1), random(3, 128, seed=2)
    key = "lora_te2_transformer_resblocks_1_attn_in_proj"
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.diff_b": up[:, 0]}
    [resolution] = set_loras(state, [Use(read_lora(write(tensors, tmp_path / "lora.safetensors")))])
    assert len(resolution.changes) == 6
    parts = [f"layers.1.attn.{part}" for part in "qkv"]
    for index, part in enumerate(parts):
        rows = slice(index * 128, (index + 1) * 128)
        assert torch.allclose(
            encoder.get_parameter(f"{part}.weight"), before[f"{part}.weight"] + up[rows] @ down, atol=1e-6
        )
        assert torch.allclose(encoder.get_parameter(f"{part}.bias"), before[f"{part}.bias"] + up[rows, 0], atol=1e-6)
    tensors[f"{key}.dora_scale"] = torch.ones(384, 1)
    with pytest.raises(WeightsError, match="DoRA of a matrix that is several in one here"):
        set_loras(state, [Use(read_lora(write(tensors, tmp_path / "dora.safetensors")))])


# --- tables


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('prefix = { "a." = "unet" }', "needs prefix, and suffix or parts"),
        ('prefix = { "a." = "unet" }\nparts = ["alpha", "beta"]', "unknown part beta"),
        ('prefix = { "a." = "unet" }\nparts = ["alpha"]\nfoo = 1', "unknown field foo"),
        ('prefix = { "a." = "unet" }\nparts = ["alpha"]\nrefused = { "(" = "x" }', "is not a regular expression"),
    ],
)
def test_faulty_tables(section: str, message: str) -> None:
    with pytest.raises(TableError, match=rf"my.toml.*: .*{message}"):
        KeyMap.parse(f'[map]\ncomponent = "lora"\nlayout = "my"\n[lora]\n{section}', "my.toml")


def test_a_naming_of_ones_own(folders: dict[str, Path], tmp_path: Path) -> None:
    """A table in a folder of one's own is enough for a new naming."""
    (tmp_path / "lora.my.toml").write_text(
        '[map]\ncomponent = "lora"\nlayout = "my"\n[lora]\nprefix = { "MY." = "unet" }\n'
        'suffix = { ".u" = "up", ".d" = "down" }'
    )
    path = write({f"MY.{QUERY}.u": A, f"MY.{QUERY}.d": B}, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match="is no LoRA"):
        read_lora(path)
    lora = read_lora(path, load_tables(tmp_path))
    resolution = resolve(lora, {name: h.place for name, h in hosts(folders["sd15"]).items()})
    assert [change.target.parameter for change in resolution.changes] == ["mid.attentions.0.blocks.0.attn1.to_q.weight"]


# --- the audit


def test_audit_of_what_does_not_fit(tmp_path: Path) -> None:
    sd15 = {key: torch.zeros(shape) for key, shape in MANIFESTS["lora-sd15-attn.peft"].shapes.items()}
    lost, *_ = [key for key in sd15 if key.endswith("lora_B.weight")]
    del sd15[lost]
    path = write(
        sd15 | {"unet.mid_block.nothing.lora_A.weight": A, f"unet.{QUERY}.oft_R": B}, tmp_path / "a.safetensors"
    )
    report = nativesd.audit(path)
    assert not report.ok
    reasons = {u.key: u.reason for c in report.components for u in c.unexpected}
    assert reasons.keys() == {
        lost.replace("lora_B", "lora_A"), "unet.mid_block.nothing.lora_A.weight", f"unet.{QUERY}.oft_R",
    }  # fmt: skip
    assert reasons[lost.replace("lora_B", "lora_A")] == "its up matrix is missing"
    assert report.components[0].family == "SD1.x"


def test_audit_of_one_that_fits_several_bases(tmp_path: Path) -> None:
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{key}.lora_up.weight": torch.zeros(320, 4), f"{key}.lora_down.weight": torch.zeros(4, 320),
               f"{key}.alpha": torch.tensor(2.5), f"{key}.dora_scale": torch.zeros(320, 1)}  # fmt: skip
    report = nativesd.audit(write(tensors, tmp_path / "a.safetensors"))
    [component] = report.components
    said = {evidence.what: evidence.value for evidence in component.evidence}
    assert report.ok
    assert component.family == "SD1.x or SD2.x"
    assert said["base"].startswith("SD1.x, SD2.x, SD1.x BK-SDM base")
    assert (said["changes"], said["rank"], said["alpha"]) == ("DoRA on LoRA x1", "4 x1", "2.5 x1")


def test_audit_of_one_for_no_base_that_is_known(loras: dict[str, list[Path]], tmp_path: Path) -> None:
    [component] = nativesd.audit(loras["sdxl"][0]).components
    assert not component.ok
    assert {u.reason for u in component.unexpected} == {"no published base has a context 80 wide"}
    flux = {"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.zeros(64, 4),
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(4, 64)}  # fmt: skip
    [component] = nativesd.audit(write(flux, tmp_path / "flux.safetensors")).components
    assert (component.name, component.ok, component.mapped) == ("Flux LoRA", False, ())
    assert component.unsupported == "a LoRA of Flux, a transformer that is not a Stable Diffusion model"


# --- merged into files


def test_a_merged_checkpoint_is_what_the_merged_model_is(tmp_path: Path) -> None:
    """A single file stays one, with its names, dtypes and everything else in it."""
    for family in ("sd1", "sd2", "sdxl"):
        path = single(family, tmp_path / f"{family}.safetensors")
        lora = lora_of_file(path, tmp_path / "lora.safetensors", 1)
        uses = [Use(read_lora(lora), 0.5, 1.5), Use(read_lora(lora), 0.25, 0.0)]
        state = Merged(hosts(path, torch.float16))
        set_loras(state, uses)
        out = tmp_path / f"{family}-merged.safetensors"
        done = merge_checkpoint(path, uses, out)
        assert equal(bits(Merged(hosts(out, torch.float16))), bits(state))
        first, second = load_file(path), load_file(out)
        changed = {key for key in second if not torch.equal(first[key], second[key])}
        assert (len(second), len(changed)) == (done.tensors, done.changed)
        assert first.keys() - second.keys() == done.ignored.keys() == {"model_ema.decay"}
        assert all(tensor.dtype == first[key].dtype for key, tensor in second.items())
        assert all("attn" in key or "proj" in key for key in changed)
        metadata = read_header(out).metadata
        assert metadata["note"] == "kept"
        assert json.loads(metadata["merged_loras"])["lora.safetensors"] == {"unet": 0.25, "text_encoder": 0.0}


def test_a_merged_folder(folders: dict[str, Path], loras: dict[str, list[Path]], tmp_path: Path) -> None:
    """Every other file goes with it; other variants of the weights do not, as they are without the LoRA."""
    folder = tmp_path / "model"
    shutil.copytree(folders["sdxl"], folder)
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet" / "old.bin")
    state, uses = Merged(hosts(folder)), [Use(read_lora(path)) for path in loras["sdxl"]]
    set_loras(state, uses)
    done = merge_checkpoint(folder, uses, tmp_path / "merged")
    assert equal(bits(Merged(hosts(tmp_path / "merged"))), bits(state))
    assert done.changed == sum(map(len, state.touched.values()))
    before, after = ({str(f.relative_to(base)) for f in base.rglob("*") if f.is_file()} for base in (folder, done.path))
    assert before - after == {"unet/old.bin"}
    assert not after - before
    theirs = diffusers.DiffusionPipeline.from_pretrained(done.path)
    assert torch.equal(
        theirs.vae.decoder.conv_in.weight,
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")["decoder.conv_in.weight"],
    )


def test_merging_into_files_that_cannot_be(
    folders: dict[str, Path], loras: dict[str, list[Path]], tmp_path: Path
) -> None:
    uses = [Use(read_lora(loras["sd15"][0]))]
    for dest, given, message in (
        ("out.safetensors", uses, "is a folder"), ("out", [], "no LoRA to merge"), (".", uses, "exists"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            merge_checkpoint(folders["sd15"], given, tmp_path / dest)
    with pytest.raises(WeightsError, match="but the model is SDXL"):
        merge_checkpoint(folders["sdxl"], uses, tmp_path / "out")
    with pytest.raises(UsageError, match="neither a UNet nor a text encoder"):
        merge_checkpoint(folders["sd15"] / "vae", uses, tmp_path / "out")
    broken = {
        key: torch.full_like(t, torch.inf) if "up" in key else t for key, t in load_file(loras["sd15"][0]).items()
    }
    with pytest.raises(WeightsError, match="not finite"):
        merge_checkpoint(folders["sd15"], [Use(read_lora(write(broken, tmp_path / "b.safetensors")))], tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.safetensors"]


# --- cost


MERGE = """
import sys, time, nativesd
from nativesd.weights.lora.file import read_lora
from nativesd.weights.lora.resolve import Use
from nativesd.weights.lora.merge import set_loras
def peak():
    return next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if line.startswith('VmHWM'))
pipe = nativesd.load(sys.argv[1], device='cpu', dtype='float16')
weights = sum(p.nbytes for module in (pipe.unet, pipe.vae, *pipe.text_encoders) for p in module.parameters())
use = Use(read_lora(sys.argv[2]), 0.8)
if sys.argv[3] == 'memory':
    for p in pipe.unet.parameters():
        p.data = p.data.clone()
before = peak()
start = time.perf_counter()
set_loras(pipe.lora_state, [use])
print(time.perf_counter() - start, (peak() - before) / weights, len(pipe.lora_state.touched['unet']))
"""


@pytest.mark.full
@pytest.mark.parametrize("weights", ["memory", "file"])
def test_cost_of_a_rank_64_lora_for_sdxl(weights: str, tmp_path: Path) -> None:
    """All projections of the UNet's transformers, merged into fp16 weights: 10 s, and 1.2 times the model's memory.

    Weights that are mapped from the file have to be read from it first, into memory of their own.
    """
    model = sparse(published_manifests()["sdxl-base.checkpoint.sgm"], tmp_path / "sdxl.safetensors")
    table = load_table("unet.diffusers").bind({})
    tensors: Tensors = {}
    for name, shape in expected(SDXL_UNET).items():
        if re.search(r"\.blocks\.\d+\..*weight$", name) and len(shape) == 2:
            source = table.source(name)
            assert source is not None
            module = source.keys[0].removesuffix(".weight")
            tensors[f"unet.{module}.lora_A.weight"] = torch.randn(64, shape[1], dtype=torch.float16)
            tensors[f"unet.{module}.lora_B.weight"] = torch.randn(shape[0], 64, dtype=torch.float16)
    lora = tmp_path / "lora.safetensors"
    save_file(tensors, lora)
    command = [sys.executable, "-c", MERGE, str(model), str(lora), weights]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    seconds, added, touched = float(done[0]), float(done[1]), int(done[2])
    print(f"\n{touched} weights in {weights} merged in {seconds:.1f} s, {added:.2f} of the model's memory added")
    assert touched == len(tensors) // 2
    assert seconds <= 10
    assert added <= 1.2


@pytest.mark.parametrize("alpha", [1e38, 3e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_weight_that_would_be_infinite_is_named(alpha: float, dtype: torch.dtype) -> None:
    """An alpha that float32 holds and the product does not, or float32 does and half does not."""
    weight = torch.zeros(4, 4, dtype=dtype)
    up, down = torch.full((4, 1), 1e4), torch.full((1, 4), 1e4)
    target = SimpleNamespace(parameter="to_k.weight", source=SimpleNamespace(rule=SimpleNamespace(op="copy")))
    change = SimpleNamespace(target=target, keys={"up": "a.up", "down": "a.down"}, scale=lambda _: alpha)
    changes: Any = [(change, 1.0, {"a.up": up, "a.down": down}.__getitem__)]
    if alpha < 1e10 and dtype == torch.float32:
        merge_into(weight, weight, changes)
        return
    with pytest.raises(WeightsError, match=r"to_k\.weight would not be finite"):
        merge_into(weight, weight, changes)
