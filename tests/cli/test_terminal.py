"""What a file holds does not steer the terminal, nor begin a line of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import nativesd
from nativesd.cli import main
from nativesd.errors import NativesdError, printable

EVIL = "x\x1b]0;mine\x07\x1b[2J\r\u202e\x9b1m\nnativesd: all is well"


def test_what_is_printable() -> None:
    assert printable("a cat, Ключ, 猫.weight") == "a cat, Ключ, 猫.weight"
    assert printable("\x1b[31m\n\u202e\ud800\\") == "\\x1b[31m\\n\\u202e\\ud800\\"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with odd names, and odd texts in its metadata."""
    path = tmp_path_factory.mktemp("evil") / "evil.safetensors"
    keys = [f"lora_unet_{EVIL}.lora_{half}.weight" for half in ("up", "down")]
    metadata = {"modelspec.title": EVIL, "ss_output_name": EVIL, "modelspec.license": EVIL}
    save_file({key: torch.ones(1, 1) for key in (*keys, EVIL)}, path, metadata)
    save_file({key: torch.ones(1, 2) for key in keys}, path.with_name("other.safetensors"))
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["audit", "FILE"], ["audit", "--all", "FILE"], ["audit", "--keys", "FILE"], ["audit", "--trace", "x", "FILE"],
        ["audit", "FILE", "FILE"], ["audit", "--diff", "FILE", "OTHER"], ["audit", "--json", "FILE"],
        ["generate", "x", "--lora", "FILE"], ["generate", "x", "--model", "FILE"], ["generate", "x", "--vae", "FILE"],
        ["generate", "x", "--embedding", "FILE"], ["generate", "x", "--control", "FILE", "PICTURE"],
        ["lora", "merge", "tiny", "FILE", "DEST"], ["lora", "merge", "tiny", "FILE", "DEST", "--lora-partial"],
        ["convert", "FILE", "DEST", "--layout", "diffusers"],
    ],
)  # fmt: skip
def test_names_do_not_steer_the_terminal(arguments: list[str], evil: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    nativesd.generate("a fox", steps=1).images[0].save(picture)
    given = {
        "FILE": str(evil),
        "OTHER": str(evil.with_name("other.safetensors")),
        "PICTURE": str(picture),
        "DEST": str(tmp_path / "dest"),
    }
    done = CliRunner().invoke(main, [given.get(word, word) for word in arguments], catch_exceptions=True)
    assert done.exit_code
    if isinstance(done.exception, NativesdError):  # `run` says these by way of `say`
        assert printable(str(done.exception).replace("\n", " "))
    else:
        assert isinstance(done.exception, SystemExit)
    assert not [line for line in done.output.split("\n") if not line.isprintable()]
    assert not [line for line in done.output.split("\n") if line.startswith("nativesd: all is well")]
