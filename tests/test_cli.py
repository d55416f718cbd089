"""The command line, as a user runs it: pictures, paths, exit codes, one sentence for every mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from sd_parsers import ParserManager

from nativesd import cli
from nativesd.loading import TINY


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The console script in this process, in an empty folder: code, stdout, stderr."""

    def invoke(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["nativesd", *arguments])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back what the script replaces
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            cli.run()
        captured = capsys.readouterr()
        return Done(int(end.value.code or 0), captured.out, captured.err)

    return invoke


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
        (["--num-images", "0"], 2, "num_images must be at least 1"),
        (["--seed", "-1"], 2, "seeds must be between"),
        (["--guidance-scale", "nan"], 2, "finite"),
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
        ("model_index.json", None, "neither model_index.json nor safetensors weights"),
        ("unet/config.json", None, "config.json is missing"),
        ("unet/config.json", b"{", "cannot be read as JSON"),
        ("unet/config.json", b"[1]", "not a JSON object"),
        ("unet/config.json", b"{}", "lacks the field 'block_out_channels'"),
        ("vae/diffusion_pytorch_model.safetensors", None, "holds no safetensors weights"),
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
    config.write_text(json.dumps(data | {"block_out_channels": [*data["block_out_channels"][:-1], 192]}))
    done = run("generate", "a fox", "--model", str(broken))
    check_mistake(done, 3, "wrong shape mid.resnets.0.conv1.weight: the model takes [192, 192, 3, 3]")


def test_help_is_fast_and_does_not_import_torch(run: Run) -> None:
    code = "import sys, nativesd, nativesd.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "generate" in run("--help").stdout
