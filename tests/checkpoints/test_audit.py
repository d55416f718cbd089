"""The audit as a user runs it: what is printed, the JSON, tracing, comparing, and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.text import Text
from safetensors.torch import load_file, save_file

import nativesd
from conftest import Run
from nativesd.checkpoints.convert import convert
from nativesd.cli.common import Row, print_lines
from nativesd.errors import SourceError, UsageError, WeightsError
from nativesd.shipped import TINY
from nativesd.weights.maps.templates import TableError
from oracles import published_manifests, sparse

MANIFESTS = published_manifests()
KEY = "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL file as published, its tensors holes."""
    return sparse(MANIFESTS["sdxl-base.checkpoint.sgm"], tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a misspelt name, a mis-shaped tensor and one too many."""
    manifest = MANIFESTS["sdxl-base.checkpoint.sgm"]
    manifest.shapes[KEY.replace("weight", "wieght")] = manifest.shapes.pop(KEY)
    manifest.shapes["first_stage_model.quant_conv.bias"] = (9,)
    manifest.shapes["model.diffusion_model.surprise"] = (2, 3)
    return sparse(manifest, tmp_path_factory.mktemp("broken") / "broken.safetensors")


def test_a_clean_file(run: Run, sdxl: Path) -> None:
    done = run("audit", str(sdxl))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heads = [line for line in lines if line and not line.startswith(" ")]
    assert heads == [
        "unet (SDXL, sgm): 1680 of 1680 mapped",
        "text_encoder (SDXL, transformers): 196 of 196 mapped",
        "text_encoder_2 (SDXL, openclip): 517 of 517 mapped",
        "vae (SDXL, sgm): 248 of 248 mapped",
    ]
    assert "1680, 2.57 B parameters, F16 x1680, 5.13 GB" in done.stdout
    assert any(line.split()[:2] == ["heads", "5/10/20"] and "not determined" in line for line in lines)
    assert any(line.split()[:2] == ["prediction", "epsilon"] and "--prediction" in line for line in lines)
    assert "\x1b" not in done.stdout


def test_findings(run: Run, broken: Path) -> None:
    done = run("audit", str(broken))
    assert done.returncode == 1
    assert "unet (SDXL, sgm): 1679 of 1680 mapped" in done.stdout
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    start = rows.index("missing down.1.attentions.0.blocks.1.attn2.to_k.weight (640, 2048)")
    assert rows[start + 1] == f"expected as {KEY}"
    assert rows[start + 2] == f"found {KEY.replace('weight', 'wieght')}: a misspelling?"
    assert "unexpected model.diffusion_model.surprise (2, 3) F16: no rule names it" in rows
    assert "wrong shape first_stage_model.quant_conv.bias (9,), for quant_conv.bias" in rows
    assert sum("unexpected" in row for row in rows) == 1  # the misspelt one is told with the missing one


def test_json(run: Run, broken: Path) -> None:
    done = run("audit", str(broken), "--json")
    assert done.returncode == 1
    data = json.loads(done.stdout)
    assert (data["schema"], data["ok"], data["family"], data["source"]) == (2, False, "SDXL", str(broken))
    unet = data["components"][0]
    assert {"name", "family", "layout", "tensors", "parameters", "found", "ignored", "missing", "unexpected"} <= set(
        unet
    )
    assert {"wrong_shape", "duplicate", "ok", "dtypes", "bytes", "evidence"} <= set(unet)
    assert unet["missing"][0]["expected"] == [KEY]
    assert "mapped" not in unet
    assert unet["found"] == 1679
    assert data == json.loads(nativesd.audit(broken).to_json())
    whole = json.loads(run("audit", str(broken), "--json", "--keys").stdout)
    assert len(whole["components"][0]["mapped"]) == 1679
    assert whole == json.loads(nativesd.audit(broken).to_json(mapped=True))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (KEY, f"{KEY} -> unet.ldm.toml rule 5 -> copy -> unet down.1.attentions.0.blocks.1.attn2.to_k.weight"),
        ("down.1.attentions.0.blocks.1.attn2.to_k.weight", f"{KEY} -> unet.ldm.toml rule 5 -> copy"),
        ("conditioner.embedders.1.model.text_projection", "-> transpose -> text_encoder_2 text_projection.weight"),
        ("conditioner.embedders.1.model.logit_scale", "-> ignored: the temperature"),
        ("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias", "split 2 of 3"),
    ],
)
def test_trace(run: Run, sdxl: Path, name: str, words: str) -> None:
    done = run("audit", str(sdxl), "--trace", name)
    assert done.returncode == 0
    assert words in done.stdout


def test_trace_of_a_fault_and_of_nothing(run: Run, broken: Path) -> None:
    assert "missing down.1.attentions.0" in run("audit", str(broken), "--trace", KEY).stdout
    done = run("audit", str(broken), "--trace", "no.such.name")
    assert done.returncode == 2
    assert "no.such.name" in done.stderr


def test_trace_of_a_part_of_a_name(run: Run, sdxl: Path) -> None:
    """All that it is a part of, where no name is just so."""
    lines = run("audit", str(sdxl), "--trace", "attn2.to_k.weight").stdout.splitlines()
    assert len(lines) == 70  # SDXL's transformer blocks
    assert all("attn2.to_k.weight" in line for line in lines)
    assert len(run("audit", str(sdxl), "--trace", KEY).stdout.splitlines()) == 1


@pytest.mark.parametrize("stem", [stem for stem, m in MANIFESTS.items() if m.component in ("unet", "checkpoint")])
def test_every_name_that_an_audit_prints_can_be_believed(stem: str, tmp_path: Path) -> None:
    path = sparse(MANIFESTS[stem], tmp_path / "x.safetensors")
    report = nativesd.audit(path)
    for component in report.components:
        if component.name == "unet":
            again = nativesd.audit(path, believed=f"{component.family}/{component.layout}")
            assert next(c for c in again.components if c.name == "unet").ok == component.ok


def test_the_metadata_is_shown_and_counts(run: Run, tmp_path: Path) -> None:
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{key}.lora_up.weight": torch.zeros(320, 4), f"{key}.lora_down.weight": torch.zeros(4, 320)}
    said = {
        "modelspec.title": "Ink\x1b[31m\nstyle", "modelspec.license": "MIT", "ss_sd_model_name": "v1-5.safetensors",
        "modelspec.trigger_phrase": "inkstyle, by hand", "ss_base_model_version": "sd_v2", "ss_v_parameterization": "x",
        "modelspec.prediction_type": "v",
    }  # fmt: skip
    path = tmp_path / "ink.safetensors"
    save_file(tensors, path, said)
    rows = [" ".join(row.split()) for row in run("audit", str(path)).stdout.splitlines()]
    for row in (
        "title Ink [31m style (the metadata's modelspec.title)", "licence MIT (the metadata's modelspec.license)",
        "base by its author v1-5.safetensors (the metadata's ss_sd_model_name)",
        "trigger words inkstyle, by hand (the metadata's modelspec.trigger_phrase)",
        "prediction by its author v (the metadata's modelspec.prediction_type)",
        "base SD2.x (the 1 modules are all in it, and the metadata's ss_base_model_version names it)",
    ):  # fmt: skip
        assert row in rows
    assert nativesd.audit(path).family == "SD2.x"
    vae = {key: torch.zeros(shape) for key, shape in MANIFESTS["sd.vae.ldm"].shapes.items()}
    for architecture, scaling in (("stable-diffusion-xl-v1-base/vae", "0.13025"), ("", "0.18215")):
        save_file(vae, path, {"modelspec.architecture": architecture})
        [component] = nativesd.audit(path).components
        entry = next(e for e in component.evidence if e.what == "scaling factor")
        assert (entry.value, entry.determined) == (scaling, bool(architecture))


def test_a_headline_keeps_its_indent_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    print_lines([Text("loras/" + "long-" * 12 + "name.safetensors: lora, SD1.x, kohya, F16 144 MB: ok"), Row("a", "b")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("    ")
    assert all(len(line) <= 80 for line in lines)


def test_what_a_single_file_lacks(run: Run, tmp_path: Path) -> None:
    path = sparse(MANIFESTS["sdxl-base.unet.diffusers"], tmp_path / "unet.safetensors")
    done = run("audit", str(path), "--missing")
    assert done.stdout.splitlines()[-1] == "  no vae: --vae, no text_encoder: --text-encoder"


def test_keys(run: Run, sdxl: Path) -> None:
    done = run("audit", str(sdxl), "--keys")
    assert sum(line.split()[0] == "mapped" for line in done.stdout.splitlines()) == 1680 + 196 + 517 + 248


def test_believed(run: Run, sdxl: Path) -> None:
    assert run("audit", str(sdxl), "--as", "sdxl/sgm").returncode == 0
    done = run("audit", str(sdxl), "--as", "sd15/ldm")
    assert done.returncode == 1
    assert "--all lists them" in done.stdout
    for same in ("SDXL/sgm", "sdxl/ldm"):
        assert run("audit", str(sdxl), "--as", same).returncode == 0
    for wrong in ("sdxl", "nothing/ldm", "sdxl/nothing", "SDXL of its own form/sgm"):
        assert run("audit", str(sdxl), "--as", wrong).returncode == 2


def test_diff(run: Run, tmp_path: Path) -> None:
    same = run("audit", "tiny", "--diff", str(TINY), "--values")
    assert (same.returncode, same.stdout.split()[0]) == (0, "518")
    tensors = load_file(TINY / "vae" / "diffusion_pytorch_model.safetensors")
    tensors["quant_conv.bias"][0] += 256  # where float16 counts by quarters
    tensors["post_quant_conv.bias"] = tensors["post_quant_conv.bias"].float()
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, tmp_path / "vae.safetensors")
    done = run("audit", str(TINY / "vae"), "--diff", str(tmp_path / "vae.safetensors"), "--values", "--json")
    assert done.returncode == 1
    found = {entry["parameter"]: (entry["kind"], entry["maximum"]) for entry in json.loads(done.stdout)["differences"]}
    assert found == {
        "vae.quant_conv.bias": ("values", pytest.approx(256, abs=0.25)),
        "vae.post_quant_conv.bias": ("dtype", None),
        "vae.encoder.conv_in.bias": ("only in first", None),
    }
    assert run("audit", "tiny", "--values").returncode == 2


def test_diff_says_what_it_compared_and_leaves_no_key_out(run: Run, tmp_path: Path) -> None:
    tensors = load_file(TINY / "vae" / "diffusion_pytorch_model.safetensors")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    done = run("audit", str(tmp_path / "a.safetensors"), "--diff", str(tmp_path / "b.safetensors"))
    assert done.returncode == 0
    assert "have the same shapes and dtypes" in done.stdout
    assert "values were not compared (--values" in done.stdout
    save_file(other | {"surprise": torch.zeros(2), "model_ema.decay": torch.zeros(())}, tmp_path / "b.safetensors")
    done = run("audit", str(tmp_path / "a.safetensors"), "--diff", str(tmp_path / "b.safetensors"))
    assert done.returncode == 1
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "only in second surprise: surprise" in rows
    assert any(row.startswith("only in second, unused model_ema.decay: training average") for row in rows)
    data = json.loads(nativesd.diff(tmp_path / "b.safetensors", tmp_path / "a.safetensors").to_json())
    assert [(d["parameter"], d["kind"]) for d in data["differences"]] == [("surprise", "only in first")]
    assert data["values"] is False


def test_bare_integers_are_no_weights(run: Run, tmp_path: Path) -> None:
    tensors = load_file(TINY / "vae" / "diffusion_pytorch_model.safetensors")
    key = "encoder.conv_in.weight"
    save_file(tensors | {key: tensors[key].to(torch.int8)}, tmp_path / "vae.safetensors")
    done = run("audit", str(tmp_path / "vae.safetensors"))
    assert done.returncode == 1
    assert f"{key} {tuple(tensors[key].shape)} I8: a quantised weight" in " ".join(done.stdout.split())
    with pytest.raises(WeightsError, match="a quantised weight, whose scale is not known"):
        nativesd.load("tiny", vae=tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match="does not load as it is"):
        convert(tmp_path / "vae.safetensors", tmp_path / "out.safetensors", layout="ldm")


def test_own_tables(sdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="holds no tables"):
        nativesd.audit(sdxl, maps=tmp_path)
    (tmp_path / "mine.toml").write_text(
        '[map]\ncomponent = "vae"\nlayout = "mine"\nprefix = "my."\ndetect = ["quant_conv.weight"]\n\n'
        '[[rule]]\ntheirs = "quant_conv.{p}"\nours = "quant_conv.{p}"\n'
    )
    save_file({"my.quant_conv.weight": torch.zeros(8, 8, 1, 1)}, tmp_path / "my.safetensors")
    [component] = nativesd.audit(tmp_path / "my.safetensors", maps=tmp_path).components
    assert (component.layout, len(component.mapped)) == ("mine", 1)
    (tmp_path / "mine.toml").write_text("[map]")
    with pytest.raises(TableError, match="lacks the field 'component'"):
        nativesd.audit(sdxl, maps=tmp_path)


def test_what_cannot_be_audited(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "empty").mkdir()
    for source, code, words in (
        ("nothing.safetensors", 3, "does not exist"),
        ("model.ckpt", 3, "no readable zip archive"),
        ("empty", 3, "neither model_index.json nor weights"),
    ):
        done = run("audit", str(tmp_path / source))
        assert (done.returncode, done.stdout) == (code, "")
        assert words in done.stderr
    with pytest.raises(SourceError):
        nativesd.audit(tmp_path / "nothing")
    (tmp_path / "a" / "b").mkdir(parents=True)
    for missing in ("folder/x.safetensors", "a/b/x.safetensors", "a/x.ckpt", "a/model_index.json"):
        for call in (run("audit", missing), run("generate", "a fox", "--model", missing)):
            assert call.returncode == 3  # not 4: nothing is asked of the hub
            assert f"{missing} does not exist" in call.stderr
    with pytest.raises(UsageError):
        nativesd.audit("tiny", believed="sdxl")


def test_a_folder_of_one_component_and_of_shards(tmp_path: Path) -> None:
    tensors = load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors")
    half = len(tensors) // 2
    names = list(tensors)
    index = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for source in (tmp_path, path):
        [component] = nativesd.audit(source).components
        assert (component.name, component.tensors) == ("unet", len(tensors))


def test_convert(run: Run, tmp_path: Path) -> None:
    done = run("convert", "tiny", "tiny.safetensors", "--layout", "ldm")
    assert (done.returncode, done.stdout) == (0, "tiny.safetensors\n")
    assert nativesd.diff("tiny", tmp_path / "tiny.safetensors").ok
    assert run("convert", "tiny", "tiny.safetensors", "--layout", "ldm").returncode == 2
    assert run("convert", "tiny", "x", "--layout", "sgm").returncode == 2
