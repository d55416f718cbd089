"""Hashes of files: by definition, as the programs that show them compute them, and from the cache."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

import nativesd
from conftest import Run
from nativesd.errors import SourceError
from nativesd.weights.files import hashes
from nativesd.weights.files.hashes import Hashes, hash_file, known_hashes

TENSORS = {"a.weight": torch.arange(400_000.0), "b": torch.ones(3, 5).half(), "c.alpha": torch.tensor(4.0)}
METADATA = {"ss_note": 'kept, "quoted" \u2603', "title": "left out" * 9}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(TENSORS, path, METADATA)
    return path


def test_by_definition(file: Path) -> None:
    """The two of kohya's are of the bytes that the safetensors library writes with the training's metadata alone."""
    raw, found = file.read_bytes(), nativesd.hash_file(file)
    trained = safetensors.torch.save(TENSORS, {"ss_note": METADATA["ss_note"]})
    behind = trained[8 + int.from_bytes(trained[:8], "little") :]
    assert found == Hashes(
        sha256=hashlib.sha256(raw).hexdigest(),
        short=hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8],
        crc32=f"{zlib.crc32(raw):08x}",
        tensors=hashlib.sha256(behind).hexdigest(),
        legacy=hashlib.sha256(trained[0x100000:0x110000]).hexdigest()[:8],
    )
    assert (found.auto_v2, found.auto_v3) == (found.sha256[:10], found.tensors[:12])


@pytest.mark.parametrize("raw", [b"", b"\x80\x02}", b"\x10\0\0\0\0\0\0\0{no header", os.urandom(3 << 20)])
def test_of_any_file(raw: bytes, tmp_path: Path) -> None:
    """What is no safetensors file, or a damaged one, has no hash of its tensors."""
    (tmp_path / "model.ckpt").write_bytes(raw)
    found = hash_file(tmp_path / "model.ckpt")
    assert (found.sha256, found.tensors, found.legacy) == (hashlib.sha256(raw).hexdigest(), "", "")
    assert found.short == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]


def test_old_hash_of_a_header_over_a_mebibyte_is_left_out(tmp_path: Path) -> None:
    """Its bytes would be the header's, whose order the library leaves open."""
    path = tmp_path / "long.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"ss_tag_frequency": "x" * 0x100000})
    assert (hash_file(path).legacy, len(hash_file(path).tensors)) == ("", 64)


@pytest.mark.parametrize("metadata", [None, {"title": "left out"}])
def test_old_hash_without_a_trainings_metadata(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    """kohya's code saves with {} then, which the library writes as metadata that says nothing."""
    path = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata)
    bare = safetensors.torch.save(TENSORS, {})
    assert hash_file(path).legacy == hashlib.sha256(bare[0x100000:0x110000]).hexdigest()[:8]


def test_kept_by_size_and_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_hashes(file) is None
    first = hash_file(file)
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "_hash", lambda *_: pytest.fail("read again"))
        assert hash_file(file) == first == known_hashes(file)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    os.utime(file, ns=(0, 5_000_000_000))
    assert known_hashes(file) is None
    assert hash_file(file) != first


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"x": 1}', None])
def test_a_damaged_cache_is_made_again(damage: bytes | None, file: Path) -> None:
    first = hash_file(file)
    kept = Path(os.environ["XDG_CACHE_HOME"]) / "nativesd" / "hashes.json"
    if damage is None:
        data = json.loads(kept.read_bytes())
        data[os.path.realpath(file)]["sha256"] = 5
        damage = json.dumps(data).encode()
    kept.write_bytes(damage)
    assert known_hashes(file) is None
    assert hash_file(file) == first == known_hashes(file)


def test_entries_of_files_that_are_gone_go(file: Path, tmp_path: Path) -> None:
    hash_file(file)
    file.unlink()
    (tmp_path / "other").write_bytes(b"x")
    hash_file(tmp_path / "other")
    assert list(hashes._kept()) == [os.path.realpath(tmp_path / "other")]


def test_the_command(file: Path, run: Run) -> None:
    found = hash_file(file)
    done = run("hash", str(file))
    assert f"AutoV3              {found.auto_v3}" in done.stdout
    assert f"{found.sha256[:10]} (A1111's model hash)" in done.stdout
    [line] = run("hash", str(file), "--json").stdout.splitlines()
    assert json.loads(line)["crc32"] == found.crc32
    lines = run("hash", "tiny", "--json").stdout.splitlines()
    assert {Path(json.loads(line)["file"]).parent.name for line in lines} == {"unet", "vae", "text_encoder"}
    done = run("hash", "nothing.safetensors")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    with pytest.raises(SourceError, match="is a folder"):
        hash_file(file.parent)


@pytest.mark.filterwarnings("ignore:.* of no published form")
def test_pictures_carry_the_model_hash_once_it_is_known(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    nativesd.convert("tiny", path, layout="ldm")
    pipe = nativesd.load(path, device="cpu")
    options = {"steps": 1, "seed": 1, "width": 32, "height": 32}
    assert "Model hash" not in pipe("a cat", **options).infotext()
    found = hash_file(path)
    assert f"Size: 32x32, Model hash: {found.auto_v2}, Model: model," in pipe("a cat", **options).infotext()
