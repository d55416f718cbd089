"""Kinds F and G: destinations that cannot be, hostile folders to copy from, and caches that others left."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

from attacks.values import NAMES, deeply_changed, odd_file, put
from nativesd import convert
from nativesd.destination import fresh
from nativesd.export.kept.entries import MANIFEST, Key, verify
from nativesd.export.kept.store import Store
from nativesd.shipped import TINY
from nativesd.tuning import tune


def place(rng: random.Random, folder: Path) -> None:
    """Writing where it cannot be, and what must stay."""
    (folder / "mine").write_bytes(b"mine")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    (folder / ".x.partial").write_bytes(b"mine")
    name = rng.choice(("x", "mine", "mine/x", "loop", "loop/x", "gone", "a/b/c", *NAMES)).removeprefix("/etc")
    try:
        with fresh(f"{folder}/{name}", replace=rng.random() < 0.3 and name != "mine") as temporary:
            if rng.random() < 0.3:
                raise OSError(28, "No space left on device")
            temporary.write_bytes(b"new")
    finally:
        _unchanged(folder / "mine", folder / ".x.partial")
        if left := [path.name for path in folder.iterdir() if ".nativesd-" in path.name]:
            raise AssertionError(f"left behind: {left}")


def folder_of_a_model(rng: random.Random, folder: Path) -> None:
    """A model folder with something odd in it, converted: nothing from outside it is in what comes out."""
    secret = folder / "secret"
    secret.write_bytes(b"secret")
    source = folder / "source"
    shutil.copytree(_model(), source, copy_function=os.link)
    victim = rng.choice([path for path in source.rglob("*") if path.is_file()])
    kind = rng.random()
    if kind < 0.7:
        victim.unlink()
    if kind < 0.4:
        odd_file(rng, victim)
    elif kind < 0.7:
        victim.symlink_to(secret)
    (source / "tokenizer" / rng.choice(("more.txt", "vocab.txt"))).symlink_to(secret)
    try:
        convert(source, folder / "out", layout="diffusers")
    finally:
        out = [path for path in (folder / "out").rglob("*") if path.is_file()]
        if any(path.read_bytes() == b"secret" for path in out if path.stat().st_size < 100):
            raise AssertionError("a file from outside the model folder was copied")


@cache
def _model() -> Path:
    """The embedded model as a folder of ordinary files, which can be linked to."""
    made = tempfile.TemporaryDirectory(prefix="attack-model-")
    _kept.append(made)
    for path in TINY.rglob("*"):
        if path.is_file() and path.parent.name in ("vae", "scheduler", "tokenizer", "tiny", "unet", "text_encoder"):
            to = Path(made.name) / path.relative_to(TINY)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
    return Path(made.name)


_kept: list[object] = []


@cache
def _key() -> Key:
    return Key(
        component="unet", family="SD1.5", weights="0" * 8, backend="onnx", version="1", device="any", precision="f32",
        profiles=("a",), slots="0", control=False, nativesd="0", opset="opset23",
    )  # fmt: skip


def caches(rng: random.Random, folder: Path) -> None:
    """The manifest of an engine, or the tuning cache, spoiled: listed with a reason, or made anew."""
    if rng.random() < 0.3:
        os.environ["XDG_CACHE_HOME"] = str(folder)
        put(rng, folder / "nativesd" / "tuning.json", b'{"x, torch y": {"linear": true}}', spoil=0.7, odd=0.2)
        tune._read(folder / "nativesd" / "tuning.json")
        return
    store = Store(folder / "engines")
    with store.building(_key()) as building:
        (building.folder / "model.onnx").write_bytes(b"x")
    (folder / "mine").write_bytes(b"mine")
    path = store.root / _key().name / MANIFEST
    data = json.loads(path.read_text())
    path.unlink()
    changed = deeply_changed(rng, data) if rng.random() < 0.8 else data | {"files": {"../../mine": {"bytes": 4}}}
    put(rng, path, json.dumps(changed).encode(), odd=0.1)
    for entry in store.entries():
        verify(entry)
    store.prune(dry_run=rng.random() < 0.5)
    _unchanged(folder / "mine")


def _unchanged(*paths: Path) -> None:
    if any(path.read_bytes() != b"mine" for path in paths):
        raise AssertionError("somebody else's file was changed")
