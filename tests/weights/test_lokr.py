"""A LoKr that people trained, merged into SD1.5: every module has its place, and becomes what the formula says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_lora import ldm_name, places

import nativesd
from nativesd.checkpoints.loras.merge import merge_checkpoint
from nativesd.errors import WeightsError
from nativesd.weights.lora.file import read_lora
from nativesd.weights.lora.resolve import Use, resolve
from oracles import published_manifests, sparse

FILE = Path(__file__).parent / "files" / "smart_falcon_4_lokr.safetensors"
MANIFESTS = published_manifests()
STRENGTH = 0.75


def test_every_module_has_its_place() -> None:
    resolution = resolve(read_lora(FILE), places("SD1.x"))
    assert not resolution.unplaced
    changed = {(change.component, change.target.parameter) for change in resolution.changes}
    assert len(changed) == len(resolution.changes) == 350
    assert {change.kind for change in resolution.changes} == {"LoKr"}
    report = nativesd.audit(FILE)
    said = {entry.what: entry.value for entry in report.components[0].evidence}
    assert report.ok
    assert (said["base"], said["changes"], said["rank"], said["alpha"]) == ("SD1.x", "LoKr x350", "4 x350", "4 x350")
    assert said["comment"].startswith("trigger word is smart falcon")


def test_the_numbered_lora_is_named_with_the_reason(tmp_path: Path) -> None:
    """cloneofsimo's first tool: the order of layers in a version of a library, which the file does not name."""
    shapes = {"<s1>": (768,)} | {f"unet:{i}:{part}": (320, 1) for i in range(144) for part in ("up", "down")}
    manifest = MANIFESTS["lora-sd15-attn.peft"]
    manifest.shapes.clear()
    manifest.shapes.update(shapes)
    path = sparse(manifest, tmp_path / "numbered.safetensors")
    with pytest.raises(WeightsError, match="counts the model's layers instead of naming them, so that which is which"):
        read_lora(path)
    [component] = nativesd.audit(path).components
    assert "cloneofsimo's first tool" in component.unsupported


def in_diffusers() -> dict[str, tuple[str, str]]:
    """kohya's name of every module of SD1.5 -> the component, and what the folder calls it."""
    out = {}
    for component, prefix, stem in (("unet", "lora_unet_", "sd15.unet.diffusers"),
                                    ("text_encoder", "lora_te_", "sd15.text_encoder.transformers")):  # fmt: skip
        for key in MANIFESTS[stem].shapes:
            if key.endswith(".weight"):
                out[prefix + key.removesuffix(".weight").replace(".", "_")] = component, key.removesuffix(".weight")
    return out


def in_ldm(component: str, name: str) -> str:
    if component == "text_encoder":
        return f"cond_stage_model.transformer.{name}.weight"
    return f"model.diffusion_model.{ldm_name(name, [False, True, True, True])}.weight"


def deltas() -> Iterator[tuple[str, torch.Tensor]]:
    """Every module by kohya's name, and what is added to its weight as a matrix (LyCORIS, functional/lokr.py)."""
    tensors = {key: tensor.double() for key, tensor in load_file(FILE).items()}
    for module in sorted({key.partition(".")[0] for key in tensors}):
        first, second = (
            tensors[f"{module}.lokr_{w}_a"] @ tensors[f"{module}.lokr_{w}_b"].flatten(1) for w in ("w1", "w2")
        )
        rank = tensors[f"{module}.lokr_w2_b"].shape[0]
        yield module, torch.kron(first, second) * (float(tensors[f"{module}.alpha"]) / rank)


@pytest.mark.full
def test_merged_into_a_published_sd15(tmp_path: Path) -> None:
    """All 350 modules, in a single file and in a folder."""
    single = sparse(MANIFESTS["sd15.checkpoint.ldm-fp16-pruned"], tmp_path / "sd15.safetensors")
    with safe_open(single, "pt") as file:
        start = single.stat().st_size - sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    data = np.memmap(single, np.float16, "r+", offset=start)
    block = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float16)
    for at in range(0, len(data), len(block)):
        data[at : at + len(block)] = block[: len(data) - at]
    data.flush()
    nativesd.convert(single, tmp_path / "folder", layout="diffusers")
    uses = [Use(read_lora(FILE), STRENGTH, STRENGTH)]
    for source, out in ((single, tmp_path / "out.safetensors"), (tmp_path / "folder", tmp_path / "out")):
        assert merge_checkpoint(source, uses, out).changed == 350
    names, checked = in_diffusers(), 0
    folder = {"unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "text_encoder/model.safetensors"}
    with safe_open(single, "pt") as before, safe_open(tmp_path / "out.safetensors", "pt") as after:
        parts = {name: safe_open(tmp_path / "out" / path, "pt") for name, path in folder.items()}
        written = {name: set(part.keys()) for name, part in parts.items()}
        for module, delta in deltas():
            component, name = names[module]
            weight = before.get_tensor(in_ldm(component, name))
            expected = (weight.double() + STRENGTH * delta.reshape(weight.shape)).half()
            merged = after.get_tensor(in_ldm(component, name))
            torch.testing.assert_close(merged, expected, rtol=2**-10, atol=2**-24)
            assert torch.equal(merged, weight) == (not delta.any())  # three modules were left untrained
            key = f"{name.removeprefix('text_model.')}.weight"
            key = key if key in written[component] else f"text_model.{key}"  # as transformers 5 has it, or 4
            assert torch.equal(parts[component].get_tensor(key).reshape(merged.shape), merged)
            checked += 1
    assert checked == 350
