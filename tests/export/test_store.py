"""The engine store: names, atomic builds, locks, and every reason why an entry does not serve."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from nativesd.destination import LEFTOVER
from nativesd.errors import SourceError, UsageError
from nativesd.export import kept
from nativesd.export.kept import entries
from nativesd.export.kept.entries import MANIFEST, Entry, Key, read_entry, verify, why_not
from nativesd.export.kept.store import Building, Store

KEY = Key(
    "text_encoder", "sdxl", "0123456789ab", "tensorrt-rtx", "1.7.1.116", "sm86+sm120", "fp16", ("512", "768x512-b2"),
    "c0ffee00", True, "0.1.0", "opset23",
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "engines")


def write(folder: Path) -> None:
    (folder / "model.engine").write_bytes(b"engine")


def build(store: Store, key: Key = KEY, *, writing: Callable[[Path], None] = write, again: bool = False) -> Entry:
    with store.building(key, again=again) as building:
        writing(building.folder)
        building.details["seconds"] = 1.5
    entry = store.find(key)
    assert entry is not None
    return entry


def write_another(folder: Path) -> None:
    (folder / "model.engine").write_bytes(b"another")


def left(store: Store) -> list[str]:
    """What is in the store's folder, where there is one."""
    return sorted(path.name for path in store.root.iterdir()) if store.root.exists() else []


def test_an_entry_is_read_back_as_it_was_written(store: Store) -> None:
    entry = build(store)
    assert (entry.key, entry.details, entry.problem, entry.size) == (KEY, {"seconds": 1.5}, None, 6)
    assert entry.path.name == (
        "text_encoder__sdxl__0123456789ab__tensorrt-rtx__1.7.1.116__sm86+sm120__fp16__512+768x512-b2__c0ffee00__control"
        "__0.1.0__opset23"
    )
    assert verify(entry) is None
    assert store.entries() == [entry]
    assert left(store) == [entry.path.name]


def test_several_files_in_folders_are_one_entry(store: Store) -> None:
    with store.building(replace(KEY, backend="onnx")) as building:
        (building.folder / "parts").mkdir()
        for name in ("model.onnx", "parts/weights.data"):
            (building.folder / name).write_bytes(name.encode())
    [entry] = store.entries()
    assert sorted(entry.files) == ["model.onnx", "parts/weights.data"]
    assert verify(entry) is None


@pytest.mark.parametrize("part", ["a__b", "a/b", "", "über", "_a"])
def test_names_cannot_be_ambiguous(part: str) -> None:
    with pytest.raises(UsageError, match="cannot be the family"):
        _ = replace(KEY, family=part).name


def test_a_name_that_no_file_system_takes_is_refused() -> None:
    with pytest.raises(UsageError, match="build fewer profiles"):
        _ = replace(KEY, profiles=tuple(map(str, range(1000, 1100)))).name


def test_what_fails_leaves_nothing(store: Store) -> None:
    def interrupt(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(store, writing=interrupt)
    assert left(store) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(store: Store) -> None:
    def fill(folder: Path) -> None:
        (folder / "model.engine").symlink_to("/dev/full")
        (folder / "model.engine").write_bytes(b"x" * 100_000)

    with pytest.raises(SourceError, match="cannot be written: No space left on device"):
        build(store, writing=fill)
    assert left(store) == []


def test_an_entry_is_not_built_again_unasked(store: Store) -> None:
    build(store)
    with pytest.raises(UsageError, match="is there already"):
        build(store)
    assert verify(build(store, writing=write_another, again=True)) is None
    assert (store.path(KEY) / "model.engine").read_bytes() == b"another"
    assert left(store) == [KEY.name]


def test_the_old_entry_stays_where_the_new_one_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = build(store)
    rename, moved = Path.rename, list[Path]()

    def full(path: Path, target: Path) -> Path:
        moved.append(path)
        if len(moved) == 2:  # the first makes room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(SourceError, match="No space left"):
        build(store, writing=write_another, again=True)
    assert verify(entry) is None
    assert left(store) == [KEY.name]


def hold(root: Path, ready: multiprocessing.synchronize.Event) -> None:
    with Store(root).building(KEY) as building:
        (building.folder / "model.engine").write_bytes(b"half")
        ready.set()
        time.sleep(60)


def test_two_processes_cannot_build_the_same_and_a_killed_one_leaves_no_lock(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(store.root, ready))
    process.start()
    try:
        assert ready.wait(30)
        with pytest.raises(UsageError, match="another process is writing"):
            build(store)
        build(store, replace(KEY, family="sd15"))  # others can be built meanwhile
        assert store.prune() == []  # and what is being built is not removed
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.join()
    [pruned] = store.prune(dry_run=True)
    assert (LEFTOVER.fullmatch(pruned.path.name) is not None, pruned.size) == (True, 4)
    assert verify(build(store)) is None
    assert store.prune() == []


def spoil_size(path: Path) -> None:
    os.truncate(path / "model.engine", 3)


def spoil_bytes(path: Path) -> None:
    (path / "model.engine").write_bytes(b"eNgine")


def spoil_file(path: Path) -> None:
    (path / "model.engine").unlink()


def spoil_manifest(path: Path) -> None:
    os.truncate(path / MANIFEST, 40)


def spoil_schema(path: Path) -> None:
    data = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(data | {"schema": 99}))


def spoil_key(path: Path) -> None:
    data = json.loads((path / MANIFEST).read_text())
    del data["key"]["slots"]
    (path / MANIFEST).write_text(json.dumps(data))


def spoil_depth(path: Path) -> None:
    (path / MANIFEST).write_text('{"schema": ' + "[" * 100_000)


def spoil_kind(path: Path) -> None:
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)


def spoil_paths(path: Path) -> None:
    data = json.loads((path / MANIFEST).read_text())
    data["files"]["../../x"] = {"bytes": 0, "sha256": "0"}
    (path / MANIFEST).write_text(json.dumps(data))


def spoil_profiles(path: Path) -> None:
    data = json.loads((path / MANIFEST).read_text())
    data["key"]["profiles"] = [["x"]]
    (path / MANIFEST).write_text(json.dumps(data))


def spoil_name(path: Path) -> None:
    data = json.loads((path / MANIFEST).read_text())
    data["key"]["device"] = "sm90"
    (path / MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_size, "has 3 bytes and was written with 6"), (spoil_bytes, "sha256 differs"),
        (spoil_file, "cannot be read: No such file"), (spoil_manifest, "cannot be read"),
        (spoil_schema, "schema 99, and this version reads 2"), (spoil_key, "see slots"),
        (spoil_name, "its name is not what its manifest says"), (spoil_depth, "nested deeper"),
        (spoil_kind, "a device or pipe"), (spoil_paths, "files = "), (spoil_profiles, "a profile that is no text"),
    ],
)  # fmt: skip
def test_damage_is_found_and_pruned(store: Store, spoil: Callable[[Path], None], reason: str) -> None:
    spoil(build(store).path)
    [entry] = store.entries()
    found = verify(entry)
    assert found is not None
    assert reason in found
    assert [each.path for each in store.prune()] == ([] if spoil is spoil_bytes else [entry.path])


def test_a_folder_that_is_somebody_elses_is_named_and_not_pruned(store: Store) -> None:
    build(store)
    (store.root / "photos").mkdir()
    assert "no manifest.json" in str(verify(read_entry(store.root / "photos")))
    assert [entry.path.name for entry in store.entries() if entry.problem] == ["photos"]
    assert store.prune(lambda entry: "unwanted") != []
    assert left(store) == ["photos"]


CHANGED = {
    "component": ("unet", "its component is text_encoder, not unet"),
    "family": ("sd15", "its family is sdxl, not sd15"),
    "weights": ("ffffffffffff", "it was made of the weights 0123456789ab, not ffffffffffff"),
    "backend": ("tensorrt", "it is for tensorrt-rtx, not tensorrt"),
    "version": ("1.8.0", "it was built by version 1.7.1.116, not 1.8.0"),
    "device": ("sm89", "it was built for sm86+sm120, not sm89"),
    "precision": ("bf16", "its precision is fp16, not bf16"),
    "profiles": (("1024",), "it has no profile 1024, only 512, 768x512-b2"),
    "slots": ("00000000", "the digest of its inputs and outputs is c0ffee00, not 00000000"),
    "control": (False, "it has control slots"),
    "nativesd": ("0.2.0", "it was made by nativesd 0.1.0, not 0.2.0"),
    "opset": ("opset22", "its graph has opset23, not opset22"),
}


@pytest.mark.parametrize("name", [each.name for each in fields(Key)])
def test_every_part_of_the_key_is_compared(store: Store, name: str) -> None:
    value, reason = CHANGED[name]
    assert why_not(build(store), replace(KEY, **{name: value})) == reason


def test_an_engine_of_another_system_does_not_serve_and_a_graph_does(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(store)
    build(store, replace(KEY, backend="onnx"))
    for module in (entries, kept.store):
        monkeypatch.setattr(module, "this_platform", lambda: "windows-amd64")
    reasons = {entry.key.backend: why_not(entry, entry.key) for entry in store.entries() if entry.key}
    assert reasons["onnx"] is None
    assert "and this is windows-amd64" in str(reasons["tensorrt-rtx"])


def test_match_finds_what_serves_and_says_why_the_others_do_not(store: Store) -> None:
    wanted = replace(KEY, device="sm120", profiles=("512",))
    assert store.match(wanted) == (None, [])
    build(store, replace(KEY, version="1.6.0"))
    build(store, replace(KEY, component="unet"))  # not of the component: not worth a reason
    entry, reasons = store.match(wanted)
    assert entry is None
    assert [reason.partition(": ")[2] for reason in reasons] == ["it was built by version 1.6.0, not 1.7.1.116"]
    build(store)
    entry, reasons = store.match(wanted)
    assert entry is not None
    assert entry.key == KEY
    assert len(reasons) == 1


def wait_and_obtain(root: Path, ready: Any, out: Any) -> None:
    """In another process: ask for the entry that is being made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ready.set()
        entry, made = Store(root).obtain(KEY, lambda building: write_another(building.folder))
    out.put(((entry.path / "model.engine").read_bytes(), made, [str(warning.message) for warning in caught]))


def test_what_another_process_is_making_is_waited_for(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    ready, out = context.Event(), context.Queue()
    with store.building(KEY) as building:
        other = context.Process(target=wait_and_obtain, args=(store.root, ready, out))
        other.start()
        ready.wait(30)
        time.sleep(0.3)  # until it has met the lock
        write(building.folder)
    data, made, said = out.get(timeout=30)
    other.join(30)
    assert (data, made) == (b"engine", False)
    assert len(said) == 1
    assert said[0].endswith(f"{KEY.name}: waiting for it")


def test_what_is_there_is_not_made_again_unless_it_is_damaged_or_asked_for(store: Store) -> None:
    made = []

    def make(building: Building) -> None:
        made.append(1)
        write(building.folder)

    assert [store.obtain(KEY, make)[1] for _ in range(2)] == [True, False]
    (store.path(KEY) / "model.engine").write_bytes(b"engin")
    entry, new = store.obtain(KEY, make)
    assert (new, verify(entry)) == (True, None)
    assert store.obtain(KEY, make, again=True)[1]
    assert len(made) == 3


def test_entries_of_the_earlier_schema_are_pruned(store: Store) -> None:
    entry = build(store)
    earlier = store.root / entry.path.name.removesuffix("__0.1.0__opset23")
    entry.path.rename(earlier)
    (earlier / MANIFEST).write_text(json.dumps({"schema": 1}))
    [found] = store.entries()
    assert found.problem == "its manifest has schema 1, and this version reads 2"
    assert [gone.path for gone in store.prune()] == [earlier]
