"""Sources and destinations that cannot be, through the commands: one sentence, exit 2 or 3, and nothing is changed."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import Run
from nativesd.shipped import TINY

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
WRITERS = {
    "convert": ("convert", "tiny", "DEST.safetensors", "--layout", "ldm"),
    "convert to a folder": ("convert", "tiny", "DEST", "--layout", "diffusers"),
    "merge": ("lora", "merge", "tiny", "lora.safetensors", "DEST"),
    "merge models": ("merge", "tiny", "tiny", "DEST"),
    "resize": ("lora", "resize", "lora.safetensors", "DEST.safetensors", "--rank", "1", "--base", "tiny"),
    "join": ("lora", "join", "lora.safetensors", "lora.safetensors:2", "DEST.safetensors", "--base", "tiny"),
    "adapters": ("convert", "lora.safetensors", "DEST", "--layout", "peft", "--base", "tiny"),
    "export": ("export", "onnx", "tiny", "DEST", "--component", "text_encoder", "--no-check"),
    "generate": ("generate", "a red house", "--steps", "1", "--seed", "1", "-o", "DEST.png"),
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder with a LoRA for the embedded model."""
    save_file(
        {f"{MODULE}.lora_up.weight": torch.ones(224, 2), f"{MODULE}.lora_down.weight": torch.ones(2, 224)},
        tmp_path / "lora.safetensors",
    )
    return tmp_path


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else f"{path.stat().st_size}"
        for path in folder.rglob("*")
    }


def under_a_file(here: Path) -> str:
    (here / "file").touch()
    return "file/x"


def of_300_characters(here: Path) -> str:
    return "x" * 300


def under_a_loop(here: Path) -> str:
    (here / "loop").symlink_to("loop")
    return "loop/x"


def in_a_folder_that_nothing_is_made_in(here: Path) -> str:
    return "/proc/x"


PLACES: list[Callable[[Path], str]] = [
    under_a_file, of_300_characters, under_a_loop, in_a_folder_that_nothing_is_made_in,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", WRITERS)
def test_destinations_that_cannot_be(command: str, place: Callable[[Path], str], here: Path, run: Run) -> None:
    dest = place(here)
    before = tree(here)
    done = run(*(part.replace("DEST", dest) for part in WRITERS[command]))
    assert done.returncode == 3, done.stderr
    assert dest[:5] in done.stderr
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") <= 2
    assert tree(here) == before


@pytest.mark.parametrize("command", [name for name in WRITERS if name != "generate"])
@pytest.mark.parametrize("target", ["nowhere", "DEST", "lora.safetensors"])
def test_a_link_is_no_free_name(command: str, target: str, here: Path, run: Run) -> None:
    """To nothing, to itself, to a file: it stays, and what it leads to."""
    name = "DEST.safetensors" if "DEST.safetensors" in WRITERS[command] else "DEST"
    (here / name).symlink_to(target if target != "DEST" else name)
    before = tree(here)
    done = run(*WRITERS[command])
    assert (done.returncode, "exists" in done.stderr) == (2, True), done.stderr
    assert tree(here) == before


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("command", WRITERS)
def test_a_system_that_refuses(command: str, error: int, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the file that is written, as disks that are full or read-only do."""
    plain = os.open

    def refuse(path: str, flags: int, *args: int, **options: int) -> int:
        if ".nativesd-" in os.fspath(path) and flags & os.O_CREAT and not str(path).endswith(".lock"):
            raise OSError(error, os.strerror(error), path)
        return plain(path, flags, *args, **options)

    def refuse_open(file: object, mode: str = "r", *args: object, **options: object) -> object:
        if ".nativesd-" in str(file) and set(mode) & set("wx"):
            raise OSError(error, os.strerror(error), str(file))
        return real_open(file, mode, *args, **options)  # type: ignore[call-overload]

    import builtins

    real_open = io.open
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(builtins, "open", refuse_open)
    monkeypatch.setattr(io, "open", refuse_open)
    before = tree(here)
    done = run(*WRITERS[command])
    monkeypatch.undo()
    assert done.returncode == 3, done.stderr
    assert f"cannot be written: {os.strerror(error)}" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(here) == before


@pytest.mark.parametrize(
    "command",
    [
        "audit NAME", "audit NAME NAME", "hash NAME", "convert NAME out --layout diffusers", "merge NAME NAME out",
        "merge --recipe NAME out", "lora merge NAME NAME out", "lora merge tiny NAME out",
        "lora resize NAME out.safetensors --rank 1", "generate x --model NAME", "generate x --vae NAME",
        "convert tiny out --layout diffusers --vae NAME",
    ],
)  # fmt: skip
def test_a_source_of_300_characters(command: str, here: Path, run: Run) -> None:
    """No name that a file can have: one sentence, as of any other that is not there."""
    done = run(*command.replace("NAME", "x" * 300).split())
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("nativesd: xxx")
    assert ("does not exist" in done.stderr) or ("cannot be read: File name too long" in done.stderr)
    assert done.stderr.count("\n") == 1
    assert set(tree(here)) == {"lora.safetensors"}


def copied(here: Path) -> Path:
    shutil.copytree(TINY, here / "model")
    return here / "model"


def linked_secret(model: Path) -> None:
    (model.parent / "secret").write_text("{}")
    (model / "tokenizer" / "vocab.json").unlink()
    (model / "tokenizer" / "vocab.json").symlink_to(model.parent / "secret")


def loop(model: Path) -> None:
    (model / "tokenizer" / "merges.txt").unlink()
    (model / "tokenizer" / "merges.txt").symlink_to("merges.txt")


def fifo(model: Path) -> None:
    (model / "tokenizer" / "vocab.json").unlink()
    os.mkfifo(model / "tokenizer" / "vocab.json")


def fifo_config(model: Path) -> None:
    (model / "unet" / "config.json").unlink()
    os.mkfifo(model / "unet" / "config.json")


def fifo_weights(model: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    os.mkfifo(model / "unet" / "diffusion_pytorch_model.safetensors")


def folder_for_a_file(model: Path) -> None:
    (model / "scheduler" / "scheduler_config.json").unlink()
    (model / "scheduler" / "scheduler_config.json").mkdir()


SOURCES: list[Callable[[Path], None]] = [linked_secret, loop, fifo, fifo_config, fifo_weights, folder_for_a_file]


@pytest.mark.parametrize("change", SOURCES)
@pytest.mark.parametrize("command", ["convert to a folder", "merge", "generate", "audit"])
def test_sources_with_what_is_no_file(command: str, change: Callable[[Path], None], here: Path, run: Run) -> None:
    change(copied(here))
    before = tree(here)
    arguments = WRITERS.get(command, ("audit", "tiny"))
    if command == "generate":
        arguments = (*arguments, "--model", "tiny")
    done = run(*(str(here / "model") if part == "tiny" else part for part in arguments))
    assert done.returncode in (0, 3), done.stderr
    assert done.returncode == 3 or command in ("audit", "generate")  # which need not look at that file
    for name in ("DEST", "DEST.png"):
        assert done.returncode == 0 or not (here / name).exists()
    assert done.returncode == 0 or tree(here) == before
    assert "secret" not in {path.read_text() for path in (here / "DEST").rglob("vocab.json")}


def refusing(call: Callable[..., Any], barred: Path) -> Callable[..., Any]:
    """A system call that another user's file or folder is not opened by."""

    def refuse(path: Any = ".", *rest: Any, **options: Any) -> Any:
        if not isinstance(path, int) and Path(os.fsdecode(path)) == barred:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return call(path, *rest, **options)

    return refuse


@pytest.mark.parametrize(
    "name",
    ["", "unet", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "model_index.json", "vae",
     "text_encoder/model.safetensors", "tokenizer/vocab.json", "scheduler/scheduler_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["convert to a folder", "merge", "generate", "audit"])
def test_sources_that_may_not_be_read(
    command: str, name: str, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of another user; by the calls, as root may read all."""
    barred = copied(here) / name
    for module, call in ((os, "open"), (os, "listdir"), (os, "scandir"), (io, "open")):
        monkeypatch.setattr(module, call, refusing(getattr(module, call), barred))
    arguments = ("audit", "tiny") if command == "audit" else WRITERS[command]
    if command == "generate":
        arguments = (*arguments, "--model", "tiny")
    done = run(*(str(here / "model") if part == "tiny" else part for part in arguments))
    # an audit is of weights, and the library that pictures' tokenizer is read by has calls of its own
    needs = command in ("convert to a folder", "merge") or not name.startswith(("tokenizer", "scheduler"))
    if needs and name:
        assert done.returncode == 3, done.stderr
        assert f"{barred} cannot be read: Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or not [here / each for each in ("DEST", "DEST.png") if (here / each).exists()]


@pytest.mark.parametrize("command", ["convert to a folder", "merge"])
@pytest.mark.parametrize("dest", ["model", "model/.", "link"])
def test_the_source_is_no_destination(command: str, dest: str, here: Path, run: Run) -> None:
    model = copied(here)
    (here / "link").symlink_to("model")
    before = tree(here)
    done = run(*({"tiny": str(model), "DEST": dest}.get(part, part) for part in WRITERS[command]))
    assert (done.returncode, "exists" in done.stderr) == (2, True), done.stderr
    assert tree(here) == before


@pytest.mark.parametrize("command", ["convert to a folder", "merge"])
def test_a_destination_in_the_source(command: str, here: Path, run: Run) -> None:
    """It is written, and does not become a part of itself."""
    model = copied(here)
    before = tree(model)
    done = run(*({"tiny": str(model), "DEST": "model/new"}.get(part, part) for part in WRITERS[command]))
    assert done.returncode == 0, done.stderr
    assert {name: size for name, size in tree(model).items() if not name.startswith("new")} == before
    assert not (model / "new" / "new").exists()
