"""Pickles and TorchScript: bit for bit what torch reads, and nothing of theirs is executed."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clock import seconds_of
from nativesd.errors import SourceError
from nativesd.weights.files.source import Member, open_source
from nativesd.weights.files.tensors import map_file, map_tensor, read_tensor
from nativesd.weights.formats import pickles
from nativesd.weights.formats.container import read_file

FILES = Path(__file__).parent / "files"


def opened(path: Path) -> Member:
    [member] = open_source(path)
    return member


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal to the bit, NaN too."""
    alike = found.dtype == expected.dtype and found.shape == expected.shape
    return alike and torch.equal(bits(found), bits(expected))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def check(path: Path, expected: Mapping[str, Tensor]) -> Member:
    """All tensors of a file, as torch reads them, however they are read here."""
    member = opened(path)
    assert member.tensors.keys() == expected.keys()
    storage = map_file(path)
    for key, tensor in expected.items():
        assert same(read_tensor(member, key), tensor), key
        mapped = map_tensor(storage, member, key, tensor.dtype)
        if tensor.is_contiguous() and not member.data_starts[path] + member.tensors[key].start % tensor.itemsize:
            assert mapped is not None, key
        assert mapped is None or same(mapped, tensor), key
    return member


def several() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=chance)
    tensors = {
        "plain": base, "tied": base, "view": base[2:4], "transposed": base.T, "column": base[:, 3], "step": base[::2],
        "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "expanded": torch.ones(1).expand(5),
        "nan": torch.tensor([torch.nan, torch.inf, -0.0]), "channels last": torch.randn(2, 3, 4, 5).to(
            memory_format=torch.channels_last), "half": base.half(), "bf16": base.bfloat16(), "double": base.double(),
        "float8": base.to(torch.float8_e4m3fn), "float8 5": base.to(torch.float8_e5m2), "bool": base > 0,
        "parameter": nn.Parameter(base.clone()),
    }  # fmt: skip
    tensors |= {str(kind): torch.arange(5).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.int8)}
    tensors["uint8"] = torch.arange(5, dtype=torch.uint8)
    attributed = torch.ones(2)
    attributed.note = "an attribute"  # type: ignore[attr-defined]
    return tensors | {"attributed": attributed}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_kind_of_tensor_as_torch_reads_it(legacy: bool, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    # torch's older way of writing knows no float8
    tensors = {key: tensor for key, tensor in several().items() if not legacy or "float8" not in key}
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    check(path, torch.load(path, weights_only=protocol == 2))


def test_names_are_the_way_to_a_tensor(tmp_path: Path) -> None:
    one = torch.ones(1)
    data = {"a": {"b": [one, (one * 2, {"c": one * 3})], 7: one * 4}, "d.e": one * 5, "none": None, "list": []}
    torch.save(data, tmp_path / "x.pt")
    names = {"a.b.0": 1, "a.b.1.0": 2, "a.b.1.1.c": 3, "a.7": 4, "d.e": 5}
    check(tmp_path / "x.pt", {name: one * value for name, value in names.items()})
    torch.save([one, one * 2], tmp_path / "list.pt")
    check(tmp_path / "list.pt", {"0": one, "1": one * 2})


class Callback:
    """Stands for what training tools leave in their checkpoints."""

    def __init__(self) -> None:
        self.best = torch.ones(3)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "params"])
def test_training_tools_checkpoints_are_unwrapped(wrapper: str, tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    data = {
        "epoch": 3, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "loss": 0.25, "nothing": None,
        wrapper: module.state_dict(), "optimizer_states": [optimizer.state_dict()], "callbacks": {Callback: Callback()},
        "hyper_parameters": argparse.Namespace(rate=1e-5), "lr_schedulers": [], "ema": {"weight": torch.zeros(1)},
    }  # fmt: skip
    torch.save(data, tmp_path / "model.ckpt")
    member = check(tmp_path / "model.ckpt", module.state_dict())
    assert member.metadata == {
        "epoch": "3", "global_step": "470000", "pytorch-lightning_version": "1.4.2", "loss": "0.25"
    }  # fmt: skip
    assert "optimizer" in member.left_out["optimizer_states"]
    assert wrapper in member.left_out["ema"]
    assert {"callbacks", "hyper_parameters", "lr_schedulers"} <= member.left_out.keys()
    assert f"{__name__}.Callback" in member.left_out  # a class that no known tool has


def test_what_is_no_plain_tensor_is_named(tmp_path: Path) -> None:
    import numpy as np

    data = {"weight": torch.ones(2), "sparse": torch.eye(2).to_sparse(), "array": np.ones(3), "number": np.float64(1)}
    torch.save(data, tmp_path / "x.pt")
    member = check(tmp_path / "x.pt", {"weight": torch.ones(2)})
    assert "_rebuild_sparse_tensor" in member.left_out["sparse"]
    assert "_reconstruct" in member.left_out["array"]
    assert "number" in member.left_out


class Net(nn.Module):
    """A module with a submodule under two names, a buffer, and a strided parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.inner = nn.Sequential(self.shared, nn.Conv2d(2, 2, 1))
        self.register_buffer("steps", torch.arange(3))
        self.strided = nn.Parameter(torch.randn(3, 4).T[:3])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](self.shared(x)) @ self.strided + self.steps  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("half", [False, True])
def test_torchscript_gives_the_state_dict_of_the_module(half: bool, tmp_path: Path) -> None:
    traced = torch.jit.trace(Net().eval(), torch.ones(2, 3))  # type: ignore[no-untyped-call]
    if half:
        traced.bfloat16()
    traced.save(tmp_path / "net.pt")
    check(tmp_path / "net.pt", torch.jit.load(tmp_path / "net.pt").state_dict())  # type: ignore[no-untyped-call]
    torch.jit.freeze(traced).save(tmp_path / "frozen.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(SourceError, match=r"frozen TorchScript .*: export it unfrozen"):
        opened(tmp_path / "frozen.pt")


def test_a_module_saved_whole(tmp_path: Path) -> None:
    module = Net()
    torch.save(module, tmp_path / "whole.pt")
    check(tmp_path / "whole.pt", module.state_dict())


@pytest.mark.parametrize("name", ["a1111.pt", "learned_embeds.bin"])
def test_published_embeddings(name: str) -> None:
    data = torch.load(FILES / name, map_location="cpu", weights_only=True)
    expected = {f"string_to_param.{key}": t for key, t in data.get("string_to_param", {}).items()} or data
    member = check(FILES / name, expected)
    if "name" in data:
        assert member.metadata == {"name": data["name"], "step": str(data["step"])}


def test_python_2_wrote_ordered_dictionaries_as_pairs(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    raw = member_of(tmp_path / "x.pt", "x/data.pkl")
    tensor = raw[raw.index(b"ctorch._utils") : raw.rindex(b"s.")]
    rewrite(tmp_path / "x.pt", b"\x80\x02ccollections\nOrderedDict\n]](U\x01w" + tensor + b"ea\x85R.")
    check(tmp_path / "x.pt", {"w": torch.ones(2)})


# ---------------------------------------------------------------------------------------------------------- attackers


def member_of(path: Path, entry: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(entry)


def zipped(raw: bytes, *, data: bytes = bytes(4), compress: bool = False, **more: bytes) -> bytes:
    """An archive as torch.save writes it, of one storage."""
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in {"data.pkl": raw, "byteorder": b"little", "data/0": data, **more}.items():
            archive.writestr(f"x/{name}", content)
    return stream.getvalue()


def rewrite(path: Path, raw: bytes) -> None:
    """Give an archive another pickle."""
    with zipfile.ZipFile(path) as archive:
        rest = {name: archive.read(name) for name in archive.namelist() if not name.endswith("data.pkl")}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", raw)
        for name, content in rest.items():
            archive.writestr("x/" + name.partition("/")[2], content)


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x01\x85K\x01\x85\x89NtR"


def tensor(sizes: bytes, strides: bytes, offset: bytes = b"K\x00") -> bytes:
    """A pickle of one tensor in a storage of one number."""
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + sizes + strides + b"\x89NtR."


def nested(levels: int, leaf: bytes) -> bytes:
    """Lists of the same list ten times, so many levels deep."""
    levels_ = (b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(levels))
    return b"\x80\x02" + leaf + b"q\x00" + b"".join(levels_) + b"."


def many(before: bytes = b"") -> bytes:
    """A dictionary that has one tensor under many names."""
    names = b"".join(b"X\x06\0\0\0%06dh\x00" % i for i in range(340_000))
    return b"\x80\x02" + TENSOR + b"q\x000" + before + b"}(" + names + b"u"


def legacy(*parts: bytes) -> bytes:
    return b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})) + b"".join(parts)


HUGE = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"  # 2^63 - 1
ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a list bomb": (lambda: zipped(nested(21, b"]")), "holds no tensors"),
    "a list bomb with a tensor": (lambda: zipped(nested(21, TENSOR)), "made to fill memory"),
    "a zip bomb": (lambda: zipped(bytes(300_000_000), compress=True), "packed entries"),
    "a pickle of 300 MB": (lambda: zipped(bytes(300_000_000)), "300000000 bytes in x/data.pkl"),
    "depth": (lambda: zipped(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."), "over 100 deep"),
    "marks": (lambda: zipped(b"\x80\x02" + b"(" * 900_000), "over 1000 marks"),
    "opcodes": (lambda: zipped(b"\x80\x02" + b"}" * 3_000_000 + b"."), "over 700000 opcodes"),
    "memo and dictionaries": (lambda: zipped(b"\x80\x04" + b"}\x94" * 340_000 + b"."), "no tensors"),
    "entries of a dictionary": (lambda: zipped(many() + b"."), "340000 entries"),
    "entries of an inner dictionary": (lambda: zipped(many(b"}K\x01") + b"s."), "made to fill memory"),
    "names to call": (
        lambda: zipped(b"\x80\x02" + b"".join(b"ca\nb%d\n)R0" % i for i in range(170_000)) + b"N."), "holds no tensors"
    ),
    "a memo's number": (lambda: zipped(b"\x80\x02Np%d\n." % 2**61), "memorises under the number"),
    "equal hashes": (
        lambda: zipped(b"\x80\x02}(" + b"".join(b"L%dL\nN" % (k * (2**61 - 1)) for k in range(100_000)) + b"u."),
        "holds no tensors",
    ),
    "a text of 8 MB": (
        lambda: zipped(b"\x80\x02X" + struct.pack("<I", 7_900_000) + "🌵".encode() + b"a" * 7_899_996 + b"."),
        "no tensors",
    ),
    "a text that is not there": (lambda: zipped(b"\x80\x02X\xff\xff\xff\x7fa."), "cut short, or no pickle"),
    "entries": (
        lambda: zipped(b"\x80\x02N.", **{f"data/{i:0100}": b"" for i in range(30_000)}), "directory of over"
    ),
    "huge sizes": (lambda: zipped(tensor(HUGE * 2 + b"\x86", b"K\x00K\x00\x86")), "more than there are in the file"),
    "huge strides": (lambda: zipped(tensor(b"K\x02\x85", HUGE + b"\x85")), "outside its storage"),
    "a huge offset": (lambda: zipped(tensor(b"K\x01\x85", b"K\x01\x85", HUGE)), "outside its storage"),
    "an expanded number": (
        lambda: zipped(tensor(b"J\xff\xff\xff\x7f\x85", b"K\x00\x85")), "more than there are in the file"
    ),
    "beyond the storage": (lambda: zipped(tensor(b"K\x02\x85", b"K\x01\x85")), "outside its storage of 4 bytes"),
    "a negative size": (lambda: zipped(tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85")), "the number -1"),
    "a size that is text": (lambda: zipped(tensor(b"X\x01\0\0\0a\x85", b"K\x01\x85")), "the number 'a'"),
    "strides that are too few": (lambda: zipped(tensor(b"K\x01\x85", b")")), "different lengths"),
    "a storage that is shorter": (
        lambda: zipped(tensor(b"K\x01\x85", b"K\x01\x85"), data=b""), "has 0 bytes, not 4"
    ),
    "a storage that is not there": (
        lambda: zipped(tensor(b"K\x01\x85", b"K\x01\x85").replace(b"X\x01\0\0\x000", b"X\x05\0\0\x00../a/")),
        "which is missing",
    ),
    "big-endian numbers": (
        lambda: zipped(tensor(b"K\x01\x85", b"K\x01\x85"), byteorder=b"big"), "big-endian machine"
    ),
    "an opcode of the registry": (lambda: zipped(b"\x80\x02\x82\x01."), "opcode EXT1"),
    "a stack that is empty": (lambda: zipped(b"\x80\x02R."), "more from its stack"),
    "an item of a tuple": (lambda: zipped(b"\x80\x02)K\x01a."), "no list"),
    "a reference to anything": (lambda: zipped(b"\x80\x02K\x01Q."), "names no storage"),
    "names twice": (
        lambda: zipped(b"\x80\x02}(X\x03\0\0\0a.b" + TENSOR + b"X\x01\0\0\0a}X\x01\0\0\0b" + TENSOR + b"su."),
        "names 'a.b' twice",
    ),
    "no pickle": (lambda: zipped(b"\xffhello"), "cut short, or no pickle"),
    "no end": (lambda: zipped(b"\x80\x02"), "cut short, or no pickle"),
    "half of a surrogate pair": (lambda: zipped(b"\x80\x02}X\x03\0\0\0\xed\xa0\x80" + TENSOR + b"s."), "no tensors"),
    "legacy: nothing more": (lambda: legacy(), "cut short, or no pickle"),
    "legacy: opcodes": (lambda: legacy(b"\x80\x04" + b"]" * 3_000_000), "over 700000 opcodes"),
    "legacy: no storages": (lambda: legacy(tensor(b"K\x01\x85", b"K\x01\x85"), b"\x80\x02]."), "lacks the storage"),
    "legacy: cut short": (
        lambda: legacy(tensor(b"K\x01\x85", b"K\x01\x85"), pickle.dumps(["0"]), bytes([1, *bytes(7)])), "cut short"
    ),
    "legacy: another length": (
        lambda: legacy(tensor(b"K\x01\x85", b"K\x01\x85"), pickle.dumps(["0"]), bytes([9, *bytes(11)])), "has 9 numbers"
    ),
    "legacy: unknown storages": (
        lambda: legacy(tensor(b"K\x01\x85", b"K\x01\x85"), pickle.dumps(["1"])), "lists the storage '1'"
    ),
    "another pickle": (lambda: pickle.dumps({"a": [1.0] * 100}, 2), "none that torch.save wrote"),
    "a tar file": (lambda: b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + bytes(1000), "PyTorch 0.1"),
    "an archive of something else": (
        lambda: zipped(b"\x80\x02N.").replace(b"data.pkl", b"data.txt"), "none that torch.save wrote"
    ),
}  # fmt: skip

LIMITS = """
import resource, sys, time
from pathlib import Path
from nativesd.errors import SourceError
from nativesd.weights.formats.container import read_file
for name in sys.argv[1:]:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read_file(Path(name))
        message = "was read"
    except SourceError as error:
        message = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{time.process_time() - started:.2f} {grown // 1000} {message}")
"""


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_by_name(attack: str, tmp_path: Path) -> None:
    """In one printable sentence, under 1 s and 100 MB."""
    make, words = ATTACKS[attack]
    (tmp_path / "x.ckpt").write_bytes(make())
    # by way of a small process: a child's first memory is its parent's
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LIMITS!r}, *sys.argv[1:]], check=True)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.ckpt")], capture_output=True, text=True, check=True
    )
    seconds, megabytes, message = done.stdout.strip().split(" ", 2)
    assert words in message
    assert message.startswith(str(tmp_path / "x.ckpt"))
    assert message.isprintable()
    assert float(seconds) < 1
    assert int(megabytes) < 100


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_runs_a_command_runs_nothing(legacy: bool, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    data = OrderedDict(weight=torch.ones(2), attack=Attack(f"touch {proof}"))
    torch.save(data, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
    before = set(sys.modules)
    member = check(tmp_path / "x.ckpt", {"weight": torch.ones(2)})
    assert set(sys.modules) == before
    assert not proof.exists()
    assert {"attack", "posix.system"} <= member.left_out.keys()
    torch.load(tmp_path / "x.ckpt", weights_only=False)  # it would have
    assert proof.exists()


@pytest.mark.parametrize(
    "call",
    [
        b"cos\nsystem\n(X\x04\0\0\0exit\x85R", b"cbuiltins\neval\nX\x04\0\0\0exit\x85R",
        b"(X\x04\0\0\0exitios\nsystem\n", b"(cos\nsystem\nX\x04\0\0\0exito", b"cos\nsystem\nX\x04\0\0\0exit\x85\x81",
        b"X\x02\0\0\0osX\x06\0\0\0system\x93X\x04\0\0\0exit\x85R", b"cos\nsystem\nX\x04\0\0\0exit\x85}\x92",
    ],
)  # fmt: skip
def test_every_way_to_call_is_inert(call: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", pytest.fail)
    monkeypatch.setattr("builtins.eval", pytest.fail)
    (tmp_path / "x.pt").write_bytes(zipped(b"\x80\x02}(X\x01\0\0\0a" + call.replace(b"\n(X", b"\nX") + b"0"
                                           b"X\x01\0\0\0b" + TENSOR + b"u."))  # fmt: skip
    with pytest.raises(SourceError):  # an odd number of items
        opened(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(
        zipped(b"\x80\x02}(X\x01\0\0\0a" + call.replace(b"\n(X", b"\nX") + b"X\x01\0\0\0b" + TENSOR + b"u.")
    )
    member = opened(tmp_path / "x.pt")
    assert list(member.tensors) == ["b"]
    assert {"os.system", "builtins.eval"} & member.left_out.keys()


def archive_faults() -> dict[str, tuple[bytes, str]]:
    good = zipped(tensor(b"K\x01\x85", b"K\x01\x85"))
    pickle_at = good.index(b"PK\x01\x02")  # the first entry of the directory
    twice = good.replace(b"x/byteorder", b"x/data/0\0\0\0")
    return {
        "a name twice": (twice, "two entries of the same name"),
        "a name outside": (good.replace(b"x/byteorder", b"../yteorder"), "an entry called"),
        "an absolute name": (good.replace(b"x/byteorder", b"/xbyteorder"), "an entry called"),
        "another name inside": (good.replace(b"x/data.pkl", b"x/dataXpkl", 1), "disagree"),
        "another size inside": (good[:18] + b"\x01" + good[19:], "disagree"),
        "a checksum": (good.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v1"), "checksum"),
        "encrypted": (good[:6] + b"\x01" + good[7:], "disagree"),
        "an offset": (good[: pickle_at + 42] + b"\x07" + good[pickle_at + 43 :], "disagree"),
        "cut short": (good[:-30], "zip archive"),
        "a hole": (good[:60] + good[90:], "zip archive"),
    }


@pytest.mark.parametrize("fault", archive_faults())
def test_archives_that_contradict_themselves(fault: str, tmp_path: Path) -> None:
    content, words = archive_faults()[fault]
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(SourceError, match=words):
        opened(tmp_path / "x.pt")


def test_storages_may_not_overlap(tmp_path: Path) -> None:
    two = TENSOR.replace(b"X\x01\0\0\x000", b"X\x01\0\0\x001")
    raw = zipped(b"\x80\x02}(X\x01\0\0\0a" + TENSOR + b"X\x01\0\0\0b" + two + b"u.", **{"data/1": bytes(4)})
    (tmp_path / "x.pt").write_bytes(raw)
    assert list(opened(tmp_path / "x.pt").tensors) == ["a", "b"]
    place = raw.index(b"x/data/0") - 30
    directory = raw.rindex(b"x/data/1") - 46
    moved = raw[: directory + 42] + place.to_bytes(4, "little") + raw[directory + 46 :]
    (tmp_path / "x.pt").write_bytes(moved)
    with pytest.raises(SourceError, match=r"disagree|two storages"):
        opened(tmp_path / "x.pt")


def test_entries_of_more_than_4_gb_say_so_elsewhere(tmp_path: Path) -> None:
    """As small ones can, too: the size stands in an extra field."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in {"data.pkl": tensor(b"K\x01\x85", b"K\x01\x85"), "data/0": struct.pack("<f", 2)}.items():
            with archive.open(zipfile.ZipInfo(f"x/{name}"), "w", force_zip64=True) as entry:
                entry.write(content)
    check(tmp_path / "x.pt", {"": torch.full((1,), 2.0)})


def test_checksums_may_be_left_out(tmp_path: Path) -> None:
    known = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(known)
    check(tmp_path / "x.pt", {"a": torch.ones(3)})


def test_as_many_entries_as_sdxl_open_in_half_a_second(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.output_blocks.{i}.1.transformer_blocks.0.w": torch.ones(1) for i in range(1680)}
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
    assert seconds_of(lambda: read_file(tmp_path / "x.ckpt"), 0.5) < 0.5
    assert len(read_file(tmp_path / "x.ckpt").tensors) == 1680


SAMPLES = [zipped(b"\x80\x02}(X\x01\0\0\0a" + TENSOR + b"X\x01\0\0\0b]K\x01au."), zipped(nested(3, TENSOR))]
EDITS = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 4), st.binary(max_size=3)), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SAMPLES), EDITS)
def test_no_damage_raises_anything_else(sample: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    data = bytearray(sample)
    for at, length, piece in edits:
        data[at : at + length] = piece
    path = Path(tempfile.gettempdir()) / f"damaged.{os.getpid()}.pt"
    path.write_bytes(data)
    try:
        header = read_file(path)
    except SourceError:
        return
    finally:
        path.unlink()
    for info in header.tensors.values():
        assert header.data_start + info.end <= header.file_size


def test_the_walk_knows_the_opcodes_that_torch_writes() -> None:
    """And none that a registry, a buffer out of band, or a name given by text stands behind."""
    assert {"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}.isdisjoint(pickles.STEPS)
