"""Many files at once: a line each, sorted, as text and JSON lines, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import Run
from nativesd.checkpoints.survey import expand, survey
from nativesd.errors import SourceError
from nativesd.models.build import expected
from nativesd.shipped import TINY
from nativesd.weights.identity.identify import identify
from nativesd.weights.maps.keymap import load_tables
from nativesd.weights.maps.parameters import known_parameters, published
from oracles import published_manifests, sparse

MANIFESTS = published_manifests()
FILES = {
    "a_model": "sd15.checkpoint.ldm", "b_unet": "sd15.unet.diffusers", "c_lora": "lora-sd15.kohya",
    "d_vae": "sd.vae.ldm", "e_control": "controlnet-sd15.controlnet-ldm",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loose")
    for name, stem in FILES.items():
        sparse(MANIFESTS[stem], out / f"{name}.safetensors")
    (out / "f_broken.safetensors").write_bytes(b"nothing")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, out / "g_flux.safetensors")
    (out / "notes.txt").write_text("no model")
    return out


def test_the_kept_parameters_are_the_modules() -> None:
    """tools/parameters.py writes them; here they are compared with what it would write."""
    for config in published().values():
        assert known_parameters(config) == expected(config)


def test_lines(run: Run, folder: Path) -> None:
    done = run("audit", str(folder), "--missing")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines()[:-1] if line[0] != " "]
    assert [Path(line.split(": ")[0]).stem for line in lines] == [*FILES, "f_broken", "g_flux"]
    assert "model, SD1.x, transformers+ldm" in lines[0] or "model, SD1.x" in lines[0]
    assert "unet, SD1.x, diffusers, F16 1.72 GB: ok" in lines[1]
    assert "lora, SD1.x, kohya" in lines[2]
    assert "a Flux transformer" in lines[6]
    assert "  no vae: --vae, no text_encoder: --text-encoder" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1].startswith("7 files, 5 ok, ")


def test_json_lines(run: Run, folder: Path) -> None:
    done = run("audit", str(folder / "*.safetensors"), str(folder / "a_model.safetensors"), "--json")
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    assert [entry["ok"] for entry in entries] == [True] * 5 + [False] * 2
    assert set(entries[5]) == {"schema", "source", "ok", "error"}
    assert entries[1]["lacks"] == ["vae", "text_encoders"]
    assert entries[6]["kind"] == "Flux"


def test_metadata_is_shown(tmp_path: Path) -> None:
    tags = {"10_cat": {"a cat": 20, "whiskers": 5}, "5_dog": {"dog": 9, "a cat": 1}}
    said = {"ss_tag_frequency": json.dumps(tags), "modelspec.title": "Cats", "modelspec.license": "MIT"}
    save_file({"emb_params": torch.zeros(2, 768)}, tmp_path / "cat.safetensors", said)
    [line] = survey([tmp_path / "cat.safetensors"])
    assert (line.words, line.title, line.licence) == (("a cat", "dog", "whiskers"), "Cats", "MIT")
    assert (line.kind, line.family, line.ok) == ("textual_inversion", "SD1.x", True)
    save_file({"emb_params": torch.zeros(2, 768)}, tmp_path / "odd.safetensors", {"ss_tag_frequency": "[1]"})
    assert next(iter(survey([tmp_path / "odd.safetensors"]))).words == ()


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        ({"<cat>": (768,)}, "SD1.x"), ({"anything": (4, 1024)}, "SD2.x"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "SDXL"),
        ({"text_encoders_0": (768,), "text_encoders_1": (1280,)}, "SDXL"),
        ({"clip_l": (1, 768), "clip_g": (1, 1280), "clip_l_out": (1, 768), "t5xxl": (1, 4096)}, "SDXL"),
    ],
)  # fmt: skip
def test_embeddings_are_recognised(shapes: dict[str, tuple[int, ...]], family: str) -> None:
    [component] = identify(shapes, load_tables()).components
    assert (component.name, component.family) == ("textual_inversion", family)


def test_what_paths_mean(folder: Path) -> None:
    assert expand([TINY]) == [TINY]
    assert len(expand([folder, folder / "a_*.safetensors"])) == 7
    with pytest.raises(SourceError, match="does not exist"):
        expand([folder / "none*.safetensors"])


def test_a_link_to_nothing_is_a_line_and_a_hidden_file_none(tmp_path: Path) -> None:
    (tmp_path / "._model.safetensors").write_bytes(b"what a Mac leaves beside a file")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    [line] = survey([tmp_path])
    assert "gone.safetensors is missing: it is a link to nothing" in line.error


def test_it_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from nativesd import cli; sys.argv = ['nativesd', 'audit', *sys.argv[1:]]\n"
        "try: cli.run()\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
