"""What is written is whole or absent, two writers never share a name, and what a killed one leaves is cleared."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nativesd.destination import copy_file, fresh, inside, leftovers, remove, scratch
from nativesd.errors import NativesdError, SourceError, UsageError

FORK = multiprocessing.get_context("fork")


def test_a_file_and_a_folder_appear_whole_and_leave_nothing_beside(tmp_path: Path) -> None:
    with fresh(tmp_path / "new" / "file") as temporary:
        temporary.write_bytes(b"whole")
        assert not (tmp_path / "new" / "file").exists()
    with fresh(tmp_path / "new" / "folder") as temporary:
        temporary.mkdir()
        (temporary / "part").write_bytes(b"part")
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == ["file", "folder", "part"]
    assert (tmp_path / "new" / "file").read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["new/deeper/x", "x"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_fails_leaves_nothing(tmp_path: Path, name: str, error: type[BaseException]) -> None:
    def fail() -> None:
        with fresh(tmp_path / name) as temporary:
            folder_there(temporary)
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def file_there(path: Path) -> None:
    path.write_bytes(b"mine")


def folder_there(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_bytes(b"mine")


def link_to_a_file(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(b"mine")
    path.symlink_to("elsewhere")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


THERE = [file_there, folder_there, link_to_a_file, link_to_nothing, link_to_itself]


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder: contents of files, targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("there", THERE)
def test_nothing_is_replaced_unasked(tmp_path: Path, there: Callable[[Path], None]) -> None:
    there(tmp_path / "x")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="exists"), fresh(tmp_path / "x"):
        raise AssertionError("it has begun")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("there", THERE)
def test_what_appears_meanwhile_stays(tmp_path: Path, kind: str, there: Callable[[Path], None]) -> None:
    before: dict[str, bytes | str] = {}

    def write() -> None:
        with fresh(tmp_path / "x") as temporary:
            there(tmp_path / "x")
            before.update((name, what) for name, what in tree(tmp_path).items() if ".nativesd-" not in name)
            temporary.mkdir() if kind == "folder" else temporary.touch()

    with pytest.raises(SourceError, match="cannot be written"):
        write()
    assert tree(tmp_path) == before


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    link_to_a_file(tmp_path / "x")
    with fresh(tmp_path / "x", replace=True) as temporary:
        temporary.write_bytes(b"new")
    assert tree(tmp_path) == {"elsewhere": b"mine", "x": b"new"}


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    folder_there(tmp_path / "x")
    with fresh(tmp_path / "x", replace=True) as temporary:
        folder_there(temporary)
        (temporary / "mine").write_bytes(b"new")
    assert tree(tmp_path) == {"x/mine": b"new"}


def test_names_that_others_gave_are_left_alone(tmp_path: Path) -> None:
    for name in (".x.partial", ".x.old", ".nativesd-mine.partial", ".nativesd-0123.partial", "x.lock", ".x.lock"):
        folder_there(tmp_path / name)
    (tmp_path / "victim").write_bytes(b"mine")
    before = tree(tmp_path)
    with fresh(tmp_path / "x") as temporary:
        temporary.write_bytes(b"new")
    assert tree(tmp_path) == {**before, "x": b"new"}


def test_a_planted_leftover_is_unlinked_and_not_followed(tmp_path: Path) -> None:
    folder_there(tmp_path / "victim")
    with fresh(tmp_path / "x") as temporary:
        name = temporary.name
        temporary.touch()
    remove(tmp_path / "x")
    (tmp_path / name).symlink_to("victim")
    with fresh(tmp_path / "x") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert tree(tmp_path) == {"victim/mine": b"mine", "x/new": b""}


@contextmanager
def writing(dest: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    """Another process that has begun to write `dest`."""
    ready = FORK.Event()

    def hold() -> None:
        with fresh(dest) as temporary:
            temporary.mkdir()
            (temporary / "half").write_bytes(b"half")
            ready.set()
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    try:
        assert ready.wait(30)
        yield process
    finally:
        process.kill()
        process.join()


def test_two_at_once_and_what_a_killed_one_leaves(tmp_path: Path) -> None:
    with writing(tmp_path / "x") as process:
        with pytest.raises(UsageError, match="another process is writing"), fresh(tmp_path / "x"):
            raise AssertionError("both have begun")
        with fresh(tmp_path / "y") as temporary:  # another name, meanwhile
            temporary.write_bytes(b"y")
        assert list(leftovers(tmp_path)) == []
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(list(leftovers(tmp_path))) == 1
    with fresh(tmp_path / "z") as temporary:  # the next writer, of whatever name, clears it
        temporary.write_bytes(b"z")
    assert tree(tmp_path) == {"y": b"y", "z": b"z"}
    with fresh(tmp_path / "x") as temporary:
        temporary.write_bytes(b"x")
    assert sorted(tree(tmp_path)) == ["x", "y", "z"]


def test_a_lock_alone_is_cleared_too(tmp_path: Path) -> None:
    lock = tmp_path / ".nativesd-0123456789abcdef.lock"
    lock.touch()  # of one that was killed before it wrote anything
    with fresh(tmp_path / "x") as temporary:
        temporary.write_bytes(b"x")
    assert tree(tmp_path) == {"x": b"x"}
    with writing(tmp_path / "y"):
        held = [name for name in os.listdir(tmp_path) if name.endswith(".lock")]
        with fresh(tmp_path / "z") as temporary:
            temporary.write_bytes(b"z")
        assert len(held) == 1
        assert held[0] in os.listdir(tmp_path)


def test_a_writer_that_is_waited_for(tmp_path: Path) -> None:
    with writing(tmp_path / "x") as process:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with fresh(tmp_path / "x", wait=30) as temporary:
            temporary.write_bytes(b"x")
    assert tree(tmp_path) == {"x": b"x"}


def once(dest: Path, content: bytes, go: multiprocessing.synchronize.Event) -> None:
    go.wait()
    try:
        with fresh(dest) as temporary:
            temporary.mkdir()
            for i in range(20):
                (temporary / str(i)).write_bytes(content)
    except NativesdError:
        os._exit(3)


def test_of_many_at_once_one_wins_whole(tmp_path: Path) -> None:
    for attempt in range(10):
        go, dest = FORK.Event(), tmp_path / str(attempt)
        processes = [FORK.Process(target=once, args=(dest, bytes([i]), go)) for i in range(4)]
        for process in processes:
            process.start()
        go.set()
        for process in processes:
            process.join()
        assert sorted(process.exitcode or 0 for process in processes) == [0, 3, 3, 3]
        assert len({path.read_bytes() for path in dest.iterdir()}) == 1
        assert len(list(dest.iterdir())) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(10)))


def under_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "x"


def too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


def under_a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop" / "x"


@pytest.mark.parametrize("place", [under_a_file, too_long, under_a_loop])
def test_places_that_cannot_be_written_are_said_before_anything_begins(
    tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    dest = place(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(SourceError, match=r"cannot be written: \w") as refused, fresh(dest):
        raise AssertionError("it has begun")
    assert str(dest) in str(refused.value)
    assert tree(tmp_path) == before


def test_the_longest_name_there_can_be(tmp_path: Path) -> None:
    with fresh(tmp_path / ("ü" * 127 + "x")) as temporary:
        temporary.touch()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "", ".."])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError), fresh(f"{tmp_path}/{name}"):
        raise AssertionError("it has begun")


def test_an_error_names_the_other_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"x cannot be written: No space left on device$"), fresh(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(SourceError, match=r"x cannot be written: .*source: No such file"), fresh(tmp_path / "x"):
        (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/x", "link/x", "link"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(SourceError):
        inside(tmp_path / "in", name)
    assert inside(tmp_path / "in", "unet/model.safetensors") == tmp_path / "in" / "unet" / "model.safetensors"


def test_regular_files_of_the_folder_are_copied(tmp_path: Path) -> None:
    model, secret = tmp_path / "model", tmp_path / "secret"
    model.mkdir()
    secret.write_bytes(b"secret")
    (model / "vocab.json").write_bytes(b"{}")
    (model / "same.json").symlink_to("vocab.json")
    (model / "link.json").symlink_to(secret)
    (model / "gone.json").symlink_to("nowhere")
    (model / "folder.json").mkdir()
    os.mkfifo(model / "pipe.json")
    assert copy_file(model, "vocab.json", tmp_path / "out")
    assert copy_file(model, "same.json", tmp_path / "out")
    assert not copy_file(model, "absent.json", tmp_path / "out")
    with (model / "merges.txt").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(SourceError, match="has 8589934592 bytes, more than the 32000000"):
        copy_file(model, "merges.txt", tmp_path / "out")
    for name in ("link.json", "gone.json", "folder.json", "pipe.json"):
        with pytest.raises(SourceError):
            copy_file(model, name, tmp_path / "out")
    assert tree(tmp_path / "out") == {"vocab.json": b"{}", "same.json": b"{}"}


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "hash").write_bytes(b"{}")
    (tmp_path / "models--a--b" / "secret").write_bytes(b"secret")
    snapshot.mkdir(parents=True)
    (snapshot / "vocab.json").symlink_to("../../blobs/hash")
    (snapshot / "merges.txt").symlink_to("../../secret")
    assert copy_file(snapshot, "vocab.json", tmp_path / "out")
    with pytest.raises(SourceError, match="leads out of"):
        copy_file(snapshot, "merges.txt", tmp_path / "out")


def test_scratch_folders_go_and_leftovers_are_cleared(tmp_path: Path) -> None:
    place = tmp_path / "new" / "graph-unet"
    with scratch(place) as folder:
        (folder / "model.onnx").write_bytes(b"graph")
        assert list(leftovers(place.parent)) == []  # in use
    assert list(place.parent.iterdir()) == []
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")  # as after a killed process
    with scratch(place) as again:
        assert list(again.iterdir()) == []
        assert not folder.exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError, match="file cannot be written: "), scratch(tmp_path / "file" / "graph"):
        pass
