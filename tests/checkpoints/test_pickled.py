"""Everything that takes safetensors files takes torch's own: the same weights, reports and files come of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

import nativesd
from nativesd.checkpoints.convert import convert
from nativesd.checkpoints.loras.merge import merge_checkpoint
from nativesd.errors import SourceError
from nativesd.loading.control import load_control
from nativesd.shipped import TINY
from nativesd.text.embedding import read_embeddings
from nativesd.weights.lora.file import read_lora
from nativesd.weights.lora.resolve import Use

FILES = Path(__file__).parents[1] / "weights" / "files"
Save = Callable[[Mapping[str, Tensor], Path], None]


def owned(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, each with memory of its own: torch.save refuses empty ones that share their place."""
    return {key: tensor.clone() for key, tensor in load_file(path).items()}


def lightning(tensors: Mapping[str, Tensor], path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": dict(tensors), "optimizer_states": [{"state": torch.ones(9)}]}, path)


def legacy(tensors: Mapping[str, Tensor], path: Path) -> None:
    torch.save(dict(tensors), path, _use_new_zipfile_serialization=False)


def strided(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As a model in channels_last, on its side, saves itself."""
    kept = {
        key: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t.T.contiguous().T if t.ndim == 2 else t
        for key, t in tensors.items()
    }
    torch.save(kept, path)


SAVES: dict[str, Save] = {"lightning": lightning, "legacy": legacy, "strided": strided}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as one file."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    convert("tiny", path, layout="ldm")
    return path


def states(pipe: nativesd.Pipeline) -> dict[str, Tensor]:
    modules = {"unet": pipe.unet, "vae": pipe.vae} | {f"text{i}": e for i, e in enumerate(pipe.text_encoders)}
    return {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        t.dtype == second[key].dtype and torch.equal(t, second[key]) for key, t in first.items()
    )


@pytest.mark.filterwarnings("ignore:.*of no published form")
@pytest.mark.parametrize("kind", SAVES)
def test_a_checkpoint(kind: str, single: Path, tmp_path: Path) -> None:
    tensors = owned(single)
    SAVES[kind](tensors, tmp_path / "model.ckpt")
    for dtype in ("float16", "float32"):
        loaded, wanted = (
            nativesd.load(path, device="cpu", dtype=dtype, fast=False) for path in (tmp_path / "model.ckpt", single)
        )
        assert same(states(loaded), states(wanted))
    convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors", layout="ldm")
    assert same(load_file(tmp_path / "model.safetensors"), tensors)
    difference = nativesd.diff(tmp_path / "model.ckpt", single, values=True)
    assert difference.ok
    report, expected = nativesd.audit(tmp_path / "model.ckpt"), nativesd.audit(single)
    assert report.ok
    assert [c.mapped for c in report.components if c.mapped] == [c.mapped for c in expected.components if c.mapped]
    if kind == "lightning":
        ignored = {i.key: i.reason for c in report.components for i in c.ignored}
        assert "optimizer" in ignored["optimizer_states"]


def pickled(folder: Path, out: Path, *, shards: bool = False) -> None:
    """The model folder with .bin files under their published names."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("controlnet"))
    for file in out.glob("*/*.safetensors"):
        stem = "pytorch_model" if file.stem == "model" else file.stem
        tensors = load_file(file)
        file.unlink()
        if not shards:
            torch.save(tensors, file.with_name(f"{stem}.bin"))
            continue
        half, index = len(tensors) // 2, {}
        for number, part in enumerate((list(tensors)[:half], list(tensors)[half:])):
            shard = f"{stem}-0000{number + 1}-of-00002.bin"
            torch.save({key: tensors[key] for key in part}, file.with_name(shard))
            index |= dict.fromkeys(part, shard)
        file.with_name(f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder(shards: bool, tmp_path: Path) -> None:
    pickled(TINY, tmp_path / "model", shards=shards)
    wanted = nativesd.load(TINY, device="cpu", fast=False)
    assert same(states(nativesd.load(tmp_path / "model", device="cpu", fast=False)), states(wanted))
    assert nativesd.audit(tmp_path / "model").ok
    assert nativesd.audit(tmp_path / "model" / "unet").ok


def test_a_lora_and_its_merge(single: Path, tmp_path: Path) -> None:
    weights = load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors")
    key = next(key for key in weights if key.endswith("attn1.to_q.weight"))
    rows, columns = weights[key].shape
    chance, name = torch.Generator().manual_seed(0), f"unet.{key.removesuffix('.weight')}"
    lora = {
        f"{name}.lora_A.weight": torch.randn(2, columns, generator=chance),
        f"{name}.lora_B.weight": torch.randn(rows, 2, generator=chance),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    torch.save(lora, tmp_path / "lora.bin")
    pickled(TINY, tmp_path / "model", shards=True)
    torch.save({"state_dict": owned(single), "epoch": 1, "callbacks": {}}, tmp_path / "model.ckpt")
    merged = {}
    for source, kind in ((single, "safetensors"), (tmp_path / "model.ckpt", "bin")):
        out = tmp_path / f"{kind}.safetensors"
        done = merge_checkpoint(source, [Use(read_lora(tmp_path / f"lora.{kind}"))], out)
        assert done.changed == 1
        merged[kind] = load_file(out)
    assert same(merged["safetensors"], merged["bin"])
    assert "callbacks" in done.ignored
    merge_checkpoint(tmp_path / "model", [Use(read_lora(tmp_path / "lora.bin"))], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.bin*"))
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors.index.json").is_file()
    merge_checkpoint(TINY, [Use(read_lora(tmp_path / "lora.safetensors"))], tmp_path / "plain")
    again, wanted = (nativesd.load(tmp_path / name, device="cpu", fast=False) for name in ("out", "plain"))
    assert same(states(again), states(wanted))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth"])
def test_a_folder_of_one_file(suffix: str, tmp_path: Path) -> None:
    shutil.copy(TINY / "unet" / "config.json", tmp_path)
    torch.save(load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors"), tmp_path / f"unet{suffix}")
    report = nativesd.audit(tmp_path)
    assert (report.components[0].name, report.ok) == ("unet", True)


MEMORY = """
import sys, torch
from pathlib import Path
from nativesd.models.build import build
from nativesd.weights.checkpoint import fill
from nativesd.weights.files.source import open_source
from nativesd.weights.identity.identify import identify_all
from nativesd.weights.maps.keymap import load_tables
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) * 1024
[(member, identity)] = identify_all(open_source(sys.argv[1]), load_tables())
[component] = identity.components
unet = build(component.config)
before = anonymous()
fill(unet, member, component, device=torch.device("cpu"), dtype=torch.float16)
print((anonymous() - before) / sum(p.nbytes for p in unet.parameters()))
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["zip", "torchscript"])
def test_weights_are_mapped(kind: str, tmp_path: Path) -> None:
    """As those of safetensors: nearly no memory is taken beside the file's pages."""
    tensors = load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors")
    shutil.copy(TINY / "unet" / "config.json", tmp_path)
    if kind == "zip":
        torch.save(tensors, tmp_path / "unet.pt")
    else:
        torch.jit.script(tree(tensors)).save(tmp_path / "unet.pt")  # type: ignore[no-untyped-call]
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert ratio < 0.15


def tree(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module whose state dict they are."""
    root = nn.Module()
    for key, tensor in tensors.items():
        *path, name = key.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, nn.Parameter(tensor))
    return root


def test_a_controlnet(tmp_path: Path) -> None:
    [file] = (TINY / "controlnet").glob("*.safetensors")
    shutil.copy(TINY / "controlnet" / "config.json", tmp_path)
    torch.save(load_file(file), tmp_path / "diffusion_pytorch_model.bin")
    found, wanted = load_control(tmp_path, device="cpu"), load_control(device="cpu")
    assert same(found.module.state_dict(), wanted.module.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_torchscript_of_a_text_encoder(tmp_path: Path) -> None:
    """As owners of TorchScript pipelines have them: its class is transformers'."""
    module = CLIPTextModel.from_pretrained(TINY / "text_encoder", torch_dtype=torch.float32).eval()
    traced = torch.jit.trace(module, torch.zeros(1, 77, dtype=torch.int64), strict=False)  # type: ignore[no-untyped-call]
    traced.save(tmp_path / "text_encoder.pt")
    report = nativesd.audit(tmp_path / "text_encoder.pt")
    assert report.ok
    assert report.components[0].name == "text_encoder"
    pipe = nativesd.load(device="cpu", text_encoders=[tmp_path / "text_encoder.pt"], fast=False)
    assert same(
        pipe.text_encoders[0].state_dict(), nativesd.load(device="cpu", fast=False).text_encoders[0].state_dict()
    )


def test_published_textual_inversions() -> None:
    for file, name, count in (("a1111.pt", "a1111", 8), ("learned_embeds.bin", "<birb-style>", 1)):
        [word] = read_embeddings(FILES / file)
        data = torch.load(FILES / file, map_location="cpu", weights_only=True)
        [vectors] = data.get("string_to_param", data).values()
        assert (word.name, word.count) == (name, count)
        assert torch.equal(word.vectors[0], vectors.detach().reshape(count, 768))
    report = nativesd.audit(FILES / "a1111.pt")
    assert report.components[0].name == "textual_inversion"
    assert report.ok
    with pytest.raises(SourceError, match="not a safetensors file"):
        read_embeddings(Path(__file__))
