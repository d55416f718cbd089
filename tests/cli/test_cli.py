"""The command line, as a user runs it: pictures, paths, exit codes, one sentence for every mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from sd_parsers import ParserManager

import nativesd
from conftest import Done, Run
from nativesd.diffusion.control import Control
from nativesd.pictures.embedded import read_texts
from nativesd.pictures.infotext import parse_infotext
from nativesd.shipped import TINY


def test_generate_writes_a_picture_that_parsers_read(run: Run, tmp_path: Path) -> None:
    done = run(
        "generate", "a hot dog on a blue background", "--seed", "3", "--steps", "4", "--sampler", "dpm++ 2m karras",
        "--negative-prompt", "fog", "--guidance-scale", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "nativesd-3.png\n"
    picture = tmp_path / "nativesd-3.png"
    assert Image.open(picture).size == (64, 64)
    text = Image.open(picture).text["parameters"]  # type: ignore[attr-defined]
    assert text.splitlines()[:2] == ["a hot dog on a blue background", "Negative prompt: fog"]
    parsed = ParserManager().parse(picture)
    assert parsed is not None
    assert [prompt.value for prompt in parsed.prompts] == ["a hot dog on a blue background"]
    assert [prompt.value for prompt in parsed.negative_prompts] == ["fog"]
    (sampler,) = parsed.samplers
    assert sampler.name == "DPM++ 2M"
    assert sampler.parameters["seed"] == "3"
    assert sampler.parameters["steps"] == "4"


def test_several_pictures(run: Run, tmp_path: Path) -> None:
    done = run("generate", "a fox", "--steps", "1", "--num-images", "2", "-o", str(tmp_path / "fox.png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "fox-0.png"), str(tmp_path / "fox-1.png")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fox-0.png", "fox-1.png"]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "no-such-model"], 3, "no-such-model does not exist"),
        (["--model", "/no/such/folder"], 3, "does not exist"),
        (["--sampler", "Euler b"], 2, "no sampler 'Euler b'"),
        (["--sampler", "DDIM karras", "--schedule", "automatic"], 2, "contradict"),
        (["--schedule", "spiral"], 2, "no schedule 'spiral'"),
        (["--size", "65x64"], 2, "multiples of 4"),
        (["--size", "big"], 2, "not a size"),
        (["--steps", "0"], 2, "steps must be between 1 and 999"),
        (["--num-images", "0"], 2, "--num-images must be between 1 and 1000"),
        (["--seed", "-2"], 2, "seeds must be between"),
        (["--guidance-scale", "nan"], 2, "between 0 and 1000"),
        (["--device", "toaster"], 2, "device 'toaster' cannot be used"),
        (["--dtype", "int4"], 2, "dtype must be"),
        (["--prediction", "w"], 2, "prediction must be one of epsilon, v, sample"),
        (["-o", "picture.xyz", "--steps", "1"], 2, "not a picture format"),
        (["-o", "/no/such/folder/a.png", "--steps", "1"], 3, "cannot be written"),
        (["--unknown-option"], 2, "No such option"),
    ],
)
def test_mistakes(run: Run, arguments: list[str], code: int, words: str) -> None:
    check_mistake(run("generate", "a fox", *arguments), code, words)


def check_mistake(done: Done, code: int, words: str) -> None:
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model_index.json", None, "neither model_index.json nor weights"),
        ("unet/config.json", None, "config.json is missing"),
        ("unet/config.json", b"{", "cannot be read as JSON"),
        ("unet/config.json", b"[1]", "not a JSON object"),
        ("unet/config.json", b"{}", "lacks the field 'block_out_channels'"),
        ("vae/diffusion_pytorch_model.safetensors", None, "holds no weights"),
        ("vae/diffusion_pytorch_model.safetensors", b"<html>", "is a web page"),
        ("tokenizer/merges.txt", b"#version\nx", "tokenizer"),
    ],
)
def test_broken_folders(run: Run, broken: Path, name: str, content: bytes | None, words: str) -> None:
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_bytes(content)
    check_mistake(run("generate", "a fox", "--model", str(broken), "--steps", "1"), 3, words)


def test_weights_that_do_not_fit_are_named(run: Run, broken: Path) -> None:
    config = broken / "unet" / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps(data | {"block_out_channels": [*data["block_out_channels"][:-1], 448]}))
    done = run("generate", "a fox", "--model", str(broken))
    check_mistake(done, 3, "of a wrong shape: up_blocks.0.*")


def test_help_is_fast_and_does_not_import_torch(run: Run) -> None:
    code = "import sys, nativesd, nativesd.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "generate" in run("--help").stdout


def pixels(path: Path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


@pytest.mark.parametrize("options", [
    ("--sampler", "Euler a", "--schedule", "karras", "--guidance-scale", "3.3"),
    ("--sampler", "DPM++ 2M SDE", "--schedule", "exponential", "--noise", "cuda", "--negative-prompt", "(fog:1.2), a"),
    ("--sampler", "DDIM", "--eta", "0.4", "--guidance-rescale", "0.7", "--literal"),
    ("--sampler", "LCM", "--clip-skip", "2", "--size", "48x80"),
    ("--hires", "1.5", "--hires-steps", "3", "--hires-strength", "0.55", "--hires-upscaler", "lanczos"),
])  # fmt: skip
def test_a_picture_is_repeated_from_its_parameters(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    """The pixels are the same, and another tool reads the same parameters."""
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    done = run("generate", "a (red:1.1) fox, on grass", "--steps", "4", "--seed", "7", "-o", str(first), *options)
    assert done.returncode == 0, done.stderr
    done = run("generate", "--from", str(first), "-o", str(second))
    assert done.returncode == 0, done.stderr
    assert pixels(first) == pixels(second)
    parsed = [ParserManager().parse(path) for path in (first, second)]
    assert parsed[0] is not None
    assert parsed[1] is not None
    assert parsed[0].samplers == parsed[1].samplers
    other = tmp_path / "other.png"
    assert run("generate", "--from", str(first), "--seed", "8", "-o", str(other)).returncode == 0
    assert pixels(first) != pixels(other)


@pytest.mark.parametrize(("made", "changed", "expected"), [
    (("--hires", "1.5", "--hires-upscaler", "lanczos"), ("--hires-strength", "0.3"),
     {"Hires upscale": "1.5", "Hires upscaler": "Lanczos", "Denoising strength": "0.3"}),
    (("--hires", "1.5", "--hires-strength", "0.6"), ("--hires", "1.25"),
     {"Hires upscale": "1.25", "Denoising strength": "0.6"}),
    (("--schedule", "karras", "--sigma-max", "12"), ("--churn", "3"), {"Schedule max sigma": "12", "Sigma churn": "3"}),
    (("--variation-strength", "0.3", "--variation-seed", "9"), ("--variation-strength", "0.1"),
     {"Variation seed": "9", "Variation seed strength": "0.1"}),
    (("--variation-strength", "0.3", "--variation-seed", "9"), ("--variation-seed", "12"),
     {"Variation seed": "12", "Variation seed strength": "0.3"}),
    (("--tiles", "64", "--size", "96x96"), ("--tiles", "72"), {"Tiles": "72 overlap 32"}),
])  # fmt: skip
def test_an_option_changes_its_own_part_of_what_is_repeated(
    run: Run, tmp_path: Path, made: tuple[str, ...], changed: tuple[str, ...], expected: dict[str, str]
) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    done = run("generate", "a fox", "--steps", "2", "--seed", "7", "--sampler", "Euler", "-o", str(first), *made)
    assert done.returncode == 0, done.stderr
    done = run("generate", "--from", str(first), "-o", str(second), *changed)
    assert done.returncode == 0, done.stderr
    was, now = (parse_infotext(read_texts(path).parameters).fields for path in (first, second))
    assert now == was | expected


def test_repeating_from_other_formats(run: Run, tmp_path: Path) -> None:
    for suffix in (".jpg", ".webp"):
        first, again = tmp_path / f"first{suffix}", tmp_path / "again.png"
        assert run("generate", "a fox", "--steps", "2", "--seed", "7", "-o", str(first)).returncode == 0
        assert run("generate", "--from", str(first), "-o", str(again)).returncode == 0
        whole = tmp_path / "whole.png"
        assert run("generate", "a fox", "--steps", "2", "--seed", "7", "-o", str(whole)).returncode == 0
        assert pixels(again) == pixels(whole)


def test_what_cannot_be_repeated_is_said(run: Run, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.png"
    chunk = PngInfo()
    chunk.add_text("parameters", "a fox\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64, NGMS: 2.5")
    Image.new("RGB", (8, 8)).save(foreign, pnginfo=chunk)
    done = run("generate", "--from", str(foreign), "-o", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stderr
    assert "not repeated: NGMS" in done.stderr
    assert "RNG: NV" in Image.open(tmp_path / "out.png").text["parameters"]  # type: ignore[attr-defined]
    chunk = PngInfo()
    chunk.add_text("parameters", "a fox\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64, Model: dream")
    Image.new("RGB", (8, 8)).save(foreign, pnginfo=chunk)
    done = run("generate", "--from", str(foreign))
    assert done.returncode == 2
    assert "was made with the model dream: pass it with --model" in done.stderr
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    assert run("generate", "--from", str(plain)).returncode == 3
    assert run("generate").returncode == 2


def test_images_previews_and_reasons(run: Run, tmp_path: Path) -> None:
    first = tmp_path / "first.png"
    assert run("generate", "a fox", "--steps", "4", "--seed", "7", "-o", str(first)).returncode == 0
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    preview = tmp_path / "preview.png"
    done = run(
        "generate", "a cactus", "--image", str(first), "--mask", "mask.png", "--steps", "4", "--seed", "1", "-v",
        "--preview", str(preview), "-o", "second.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "guidance_scale: 3, " in done.stderr
    assert "sampler: DDIM, for the model's DDIMScheduler" in done.stderr
    assert Image.open(preview).size == (64, 64)
    done = run("generate", "a fox", "--image", str(first), "--size", "32x64", "--steps", "4", "-o", "third.png")
    assert "64x64 resized to 32x64" in done.stderr
    assert run("generate", "a fox", "--hires-steps", "3").returncode == 2
    assert run("generate", "a fox", "--image", str(first), "--outpaint", "1,2").returncode == 2


def test_samplers_are_listed(run: Run) -> None:
    done = run("samplers")
    assert done.returncode == 0
    for word in ("DPM++ 2M SDE", "UniPCMultistepScheduler", "Brownian", "align your steps", "arXiv 2206.00364"):
        assert word in done.stdout


def test_tokens_are_shown(run: Run) -> None:
    done = run("tokens", "a (red:1.5) fox BREAK grass")
    assert done.returncode == 0
    assert "chunk 1 of 2: 3 of 75 tokens" in done.stdout
    assert "736  red  x 1.5" in done.stdout
    assert run("tokens", "a [b:c:0.5]").returncode == 2


def test_controls_are_matched_by_their_order(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "hint.png")
    seen: list[list[Control]] = []
    original = nativesd.Pipeline.__call__

    def call(self: nativesd.Pipeline, prompt: str, **options: Any) -> nativesd.Result:
        seen.append(options.pop("control", []))
        return original(self, prompt, **options)

    monkeypatch.setattr(nativesd.Pipeline, "__call__", call)
    done = run(
        "generate", "a fox", "--steps", "1", "--control", "one", "hint.png", "--control", "two", "hint.png",
        "--control-scale", "0.5", "--control-scale", "0.7", "--control-end", "0.6", "--control-preprocess", "none",
        "--control-preprocess", "canny", "--control-kind", "depth",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert seen == [[
        Control("one", "hint.png", 0.5, end=0.6, kind="depth"), Control("two", "hint.png", 0.7, preprocess="canny"),
    ]]  # fmt: skip
    done = run("generate", "a fox", "--control", "one", "hint.png", "--control-scale", "1", "--control-scale", "2")
    assert done.returncode == 2
    assert "2 --control-scale for 1 --control" in done.stderr
    monkeypatch.setattr(nativesd.Pipeline, "__call__", original)
    done = run("generate", "a fox", "--control", "nothing.safetensors", "hint.png")
    assert done.returncode == 3
    assert "nothing.safetensors does not exist" in done.stderr


def test_loras_are_used_and_merged(run: Run, tmp_path: Path) -> None:
    """Merged for one call, or into a folder that then makes the same picture; a foreign one is refused."""
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v"
    generator = torch.Generator().manual_seed(0)
    down, up = (4 * torch.randn(*shape, generator=generator) for shape in ((4, 144), (144, 4)))
    save_file({f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}, tmp_path / "style.safetensors")
    common = ("generate", "a fox", "--steps", "2", "--seed", "7", "-o")
    assert run(*common, "plain.png").returncode == 0
    done = run(*common, "style.png", "--lora", "style.safetensors:0.5")
    assert done.returncode == 0, done.stderr
    text = Image.open(tmp_path / "style.png").text["parameters"]  # type: ignore[attr-defined]
    assert 'LoRAs: "<lora:style:0.5>"' in text
    done = run("lora", "merge", str(TINY), "style.safetensors:0.5", "merged")
    assert done.returncode == 0, done.stderr
    assert "1 of " in done.stderr
    assert run(*common, "merged.png", "--model", "merged", "--guidance-scale", "3").returncode == 0
    plain, style, merged = (
        np.asarray(Image.open(tmp_path / f"{name}.png"), float) for name in ("plain", "style", "merged")
    )
    assert np.abs(style - plain).mean() > 1
    assert np.abs(style - merged).mean() < 0.1, "the merged weights are rounded to float16"
    foreign = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file({f"{foreign}.lora_down.weight": torch.ones(4, 2048), f"{foreign}.lora_up.weight": torch.ones(640, 4)},
              tmp_path / "foreign.safetensors")  # fmt: skip
    done = run(*common, "foreign.png", "--lora", "foreign.safetensors")
    assert done.returncode == 3
    assert not (tmp_path / "foreign.png").exists()


def test_what_is_passed_again_is_not_asked_for(run: Run, tmp_path: Path) -> None:
    edges, first = tmp_path / "edges.png", tmp_path / "first.png"
    Image.new("RGB", (64, 64)).save(edges)
    control = ("--control", "tiny", str(edges), "--control-scale", "0.5")
    done = run("generate", "a fox", "--steps", "1", "--seed", "3", *control, "-o", str(first))
    assert done.returncode == 0, done.stderr
    for passed in ((), control):
        done = run("generate", "--from", str(first), *passed, "-o", str(tmp_path / "again.png"))
        assert done.returncode == 0, done.stderr
        assert ("pass it again: --control tiny" in done.stderr) is (not passed)
