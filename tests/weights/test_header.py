"""Safetensors headers: what is valid reads as the library reads it, and every fault is refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clock import seconds_of
from nativesd.errors import SourceError, WeightsError
from nativesd.shipped import TINY
from nativesd.weights.files.folder import shards
from nativesd.weights.formats.header import (
    BITS,
    HEAD,
    MAX_HEADER,
    Header,
    header_length,
    merge_headers,
    parse_header,
    read_header,
    read_index,
)

GOOD = '"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]}'


def pack(header: str | bytes, data: int = 0) -> bytes:
    """A file with this header, and `data` bytes of zeros."""
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def entry(dtype: Any = "F16", shape: Any = (2, 3), offsets: Any = (0, 12), **extra: Any) -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}})


def read_bytes(content: bytes, name: str = "x.safetensors") -> Header:
    """What `read_header` does, without a file."""
    length = header_length(content[:HEAD], len(content), name)
    return parse_header(content[8 : 8 + length], len(content), name)


def test_a_saved_file_reads_as_it_was_saved(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.zeros(4, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 5),
        "größe \U0001f33b": torch.zeros(7, dtype=torch.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": 'a "quoted"\n\\ line'})
    header = read_header(path)
    assert {name: info.shape for name, info in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {name: info.dtype for name, info in header.tensors.items()} == {
        "weight": "BF16", "scalar": "F32", "empty": "F32", "größe \U0001f33b": "F8_E4M3",
    }  # fmt: skip
    assert header.tensors["scalar"].elements == 1
    assert header.tensors["empty"].nbytes == 0
    assert header.metadata == {"format": "pt", "note": 'a "quoted"\n\\ line'}
    info = header.tensors["scalar"]
    begin = header.data_start + info.start
    assert np.frombuffer(path.read_bytes()[begin : begin + info.nbytes], np.float32) == 1.5
    assert header.file_size == path.stat().st_size


def test_the_embedded_model_reads() -> None:
    for path in TINY.rglob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            expected = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert {key: info.shape for key, info in read_header(path).tensors.items()} == expected


@pytest.mark.parametrize(("dtype", "bits"), BITS.items())
def test_every_dtype_is_as_long_as_the_library_says(dtype: str, bits: int) -> None:
    content = pack(entry(dtype, [8], [0, bits]), bits)
    assert read_bytes(content).tensors["a"].nbytes == bits
    assert safetensors.deserialize(content)[0][1]["dtype"] == dtype


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        "{ \t\r\n}",
        '{"__metadata__":{}}',
        "{" + GOOD + "}   ",
        '{ "a" : { "shape" : [ 2 , 3 ] , "data_offsets" : [ 0 , 12 ] , "dtype" : "F16" } , "__metadata__":{"k" :""} }',
        entry("U8", [], [0, 1]),
        entry("F64", [0, 7], [0, 0]),
        entry("F4", [2], [0, 1]),
        entry("U8", [1] * 64, [0, 1]),
        '{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"\\u0061\\ud83c\\udf3b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    ],
)
def test_unusual_but_valid(header: str) -> None:
    for size in (0, 1, 12):
        try:
            expected = safetensors.deserialize(pack(header, size))
        except safetensors.SafetensorError:
            continue
        found = read_bytes(pack(header, size)).tensors
        assert {key: info.shape for key, info in found.items()} == {key: tuple(t["shape"]) for key, t in expected}
        return
    pytest.fail("the library refuses it at every size")


# what is in the file, and words of the message
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty: the download or copy was interrupted"),
    "seven bytes": (b"abcdefg", "has 7 bytes, fewer than the 8"),
    "zeros": (bytes(5000), "begins with zeros"),
    "no header": (bytes(8) + b"abcdef", "has a header of no bytes"),
    "header over the limit": ((MAX_HEADER + 1).to_bytes(8, "little") + b"{" * 99, "over the format's limit of 10"),
    "length of all ones": (b"\xff" * 99, "18446744073709551615 bytes"),
    "header beyond the file": ((999).to_bytes(8, "little") + b'{"a":', "its header should end at byte 1007"),
    "cut in the data": (pack("{" + GOOD + "}", 11), "is cut short: its tensors take 12 bytes, 11 are there"),
    "bytes behind": (pack("{" + GOOD + "}", 13), "has 1 bytes after its last tensor"),
    "no tensors but data": (pack("{}", 5), "has 5 bytes after its last tensor"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6938\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html><title>Sign in</title></html>" * 9, "a web page"),
    "error answer": (b'{"error":"Invalid username or password."}', "plain JSON"),
    "zip": (b"PK\x03\x04" + b"\0\0\x08\x08archive/data.pkl" * 20, "a zip archive as torch.save writes it"),
    "pickle": (pickle.dumps({"state_dict": [1.0] * 100}, protocol=2), "a pickle as torch.save writes it"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\x23\x01\0\0\0\0\0\0" * 9, "a GGUF file"),
    "not json": (pack('{"a"'), "not JSON at byte 9"),
    "words": (pack("hello, world"), "does not begin with '{'"),
    "list": (pack("[1, 2]"), "does not begin with '{'"),
    "spaces first": (pack(" {" + GOOD + "}", 12), "does not begin with '{'"),
    "byte order mark": (pack("\ufeff{" + GOOD + "}", 12), "does not begin with '{'"),
    "utf-16": (pack(("{" + GOOD + "}").encode("utf-16-le"), 12), "not JSON at byte 9"),
    "trailing comma": (pack("{" + GOOD + ",}", 12), "not JSON"),
    "no comma": (pack("{" + GOOD + GOOD + "}", 12), "that the format does not have"),
    "unclosed": (pack("{" + GOOD, 12), "the format does not have"),
    "two objects": (pack("{" + GOOD + "}{}", 12), "goes on after its closing '}'"),
    "null behind": (pack("{" + GOOD + "}\0", 12), "goes on after its closing '}'"),
    "deep": (pack('{"a":' * 100_000 + "}" * 100_000), "'a' with text that is not JSON, or is nested or too long"),
    "deep list": (pack('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested or too long"),
    "somewhat deep": (pack('{"a":' + "[" * 500 + "]" * 500 + "}"), "not an object"),
    "deep shape": (pack(entry(shape="@").replace('"@"', "[" * 500 + "]" * 500)), "not a list of integers"),
    "deep metadata": (pack('{"__metadata__":' + '{"a":' * 100_000), "__metadata__ that is not an object of strings"),
    "invalid utf-8 name": (pack(b'{"\xff":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1), "not valid UTF-8"),
    "invalid utf-8 metadata": (pack(b'{"__metadata__":{"a":"\xc3"}}'), "not valid UTF-8"),
    "invalid utf-8 dtype": (pack(b'{"a":{"dtype":"\xff","shape":[],"data_offsets":[0,1]}}', 1), "not JSON"),
    "half a surrogate pair": (pack('{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1), "not valid UTF-8"),
    "encoded surrogate": (pack('{"\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1), "not valid UTF-8"),
    "bad escape": (pack('{"\\x":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1), "not valid UTF-8 or JSON"),
    "line end in a name": (pack('{"a\nb":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1), "not JSON"),
    "nan": (pack(entry(shape=[float("nan")])), "the shape [nan], not a list of integers"),
    "infinity": (pack(entry(offsets=[0, float("inf")])), "the data_offsets [0, inf], not a list of integers"),
    "nan for an entry": (pack('{"a":NaN}'), "by nan, not an object"),
    "metadata number": (pack('{"__metadata__":{"step":1}}'), "not an object of strings"),
    "metadata object": (pack('{"__metadata__":{"a":{}}}'), "not an object of strings"),
    "metadata list": (pack('{"__metadata__":["a"]}'), "not an object of strings"),
    "metadata null": (pack('{"__metadata__":null}'), "not an object of strings"),
    "metadata as a tensor": (pack('{"__metadata__":' + GOOD[4:] + "}", 12), "__metadata__ that is not strings alone"),
    "metadata twice": (pack('{"__metadata__":{},"__metadata__":{}}'), "has __metadata__ twice"),
    "metadata key twice": (pack('{"__metadata__":{"k":"1","\\u006b":"2"}}'), "has 'k' twice in its __metadata__"),
    "name twice": (pack("{" + GOOD + "," + GOOD.replace("[0,12]", "[12,24]") + "}", 24), "names the tensor 'a' twice"),
    "name twice, same range": (pack("{" + GOOD + "," + GOOD + "}", 12), "names the tensor 'a' twice"),
    "name twice, escaped": (pack("{" + GOOD + "," + GOOD.replace("a", "\\u0061", 1) + "}", 12), "the tensor 'a' twice"),
    "field twice": (pack('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1), "with 2 dtype"),
    "field twice, one missing": (pack('{"a":{"dtype":"U8","dtype":"U8","data_offsets":[0,1]}}', 1), "with 2 dtype"),
    "no dtype": (pack('{"a":{"shape":[1],"data_offsets":[0,1]}}', 1), "with no dtype"),
    "no shape": (pack('{"a":{"dtype":"U8","data_offsets":[0,1]}}', 1), "with no shape"),
    "no offsets": (pack('{"a":{"dtype":"U8","shape":[1]}}', 1), "with no data_offsets"),
    "no fields": (pack('{"a":{}}'), "with no dtype"),
    "a field more": (pack(entry(strides=[3, 1]), 12), "a field that the format does not have, 'strides'"),
    "entry a list": (pack('{"a":[1]}'), "by [1], not an object"),
    "entry a string": (pack('{"a":"F16"}'), "by 'F16', not an object"),
    "entry null": (pack('{"a":null}'), "by None, not an object"),
    "dtype a number": (pack(entry(dtype=16), 12), "the dtype 16, not a string"),
    "dtype a list": (pack(entry(dtype=[16]), 12), "the dtype [16], not a string"),
    "dtype unknown": (pack(entry(dtype="F128"), 12), "the dtype 'F128', which the format does not have"),
    "dtype of torch": (pack(entry(dtype="torch.float16"), 12), "in a way of writing"),
    "dtype empty": (pack(entry(dtype=""), 12), "the dtype '', which"),
    "dtype escaped": (pack(entry(dtype="F16").replace("F16", "\\u004616"), 12), "in a way of writing"),
    "shape a number": (pack(entry(shape=6), 12), "the shape 6, not a list of integers"),
    "shape a string": (pack(entry(shape="6"), 12), "the shape '6', not a list of integers"),
    "shape of booleans": (pack(entry(shape=[True, 6]), 12), "the shape [True, 6], not a list of integers"),
    "shape of floats": (pack(entry(shape=[2.0, 3]), 12), "the shape [2.0, 3], not a list of integers"),
    "shape of lists": (pack(entry(shape=[[2], 3]), 12), "not a list of integers"),
    "shape of null": (pack(entry(shape=[None]), 12), "not a list of integers"),
    "shape negative": (pack(entry(shape=[-2, -3]), 12), "the shape [-2, -3], not all from 0"),
    "shape minus zero": (pack(entry("U8", shape=["@"]).replace('"@"', "-0"), 12), "in a way of writing"),
    "shape huge": (pack(entry(shape=[2**63]), 12), "which no memory holds"),
    "shape of 25 digits": (pack(entry(shape=[10**25]), 12), "not all from 0 to 2^63 - 1"),
    "shape of 3,000 digits": (pack(entry(shape=[10**3000]), 12), "not all from 0 to 2^63 - 1"),
    "shape of 100,000 digits": (pack(entry(shape=["@"]).replace('"@"', "9" * 100_000), 12), "too long"),
    "product over 2^63": (pack(entry(shape=[2**32, 2**31]), 12), "which no memory holds"),
    "product over 2^64 that wraps to 6": (pack(entry("U8", [2**63, 2, 6], [0, 6]), 6), "which no memory holds"),
    "product over 2^63, with a zero": (pack(entry(shape=[2**40, 2**40, 0], offsets=[0, 0])), "which no memory holds"),
    "65 dimensions": (pack(entry("U8", [1] * 65, [0, 1]), 1), "with 65 dimensions"),
    "offsets a number": (pack(entry(offsets=0), 12), "the data_offsets 0, not a list of integers"),
    "offsets empty": (pack(entry(offsets=[]), 12), "with 0 data_offsets, not 2"),
    "offsets one": (pack(entry(offsets=[12]), 12), "with 1 data_offsets, not 2"),
    "offsets three": (pack(entry(offsets=[0, 12, 24]), 12), "with 3 data_offsets, not 2"),
    "offsets negative": (pack(entry(offsets=[-12, 0]), 12), "the data_offsets [-12, 0], not all from 0"),
    "offsets of booleans": (pack(entry(offsets=[False, 12]), 12), "not a list of integers"),
    "offsets reversed": (pack(entry(offsets=[12, 0]), 12), "data_offsets in reverse, 12 to 0"),
    "offsets over 2^63": (pack(entry(offsets=[2**64, 2**64 + 12]), 12), "not all from 0 to 2^63 - 1"),
    "offsets too near": (pack(entry(offsets=[0, 10]), 10), "10 bytes, but F16 (2, 3) takes 12 bytes"),
    "offsets too far": (pack(entry(offsets=[0, 14]), 14), "14 bytes, but F16 (2, 3) takes 12 bytes"),
    "half a byte": (pack(entry("F4", [3], [0, 2]), 2), "2 bytes, but F4 (3,) takes 12 bits, no whole bytes"),
    "overlap": (
        pack("{" + GOOD + ',"b":{"dtype":"U8","shape":[4],"data_offsets":[10,14]}}', 14),
        "gives bytes 10 to 12 to two tensors, 'a' and 'b'",
    ),
    "same range": (pack("{" + GOOD + "," + GOOD.replace("a", "b", 1) + "}", 12), "to two tensors, 'a' and 'b'"),
    "hole": (
        pack("{" + GOOD + ',"b":{"dtype":"U8","shape":[4],"data_offsets":[14,18]}}', 18),
        "gives bytes 12 to 14 to no tensor, before 'b'",
    ),
    "hole at the beginning": (pack(entry(offsets=[4, 16]), 16), "gives bytes 0 to 4 to no tensor"),
    "empty tensor apart": (
        pack("{" + GOOD + ',"b":{"dtype":"U8","shape":[0],"data_offsets":[99,99]}}', 12),
        "gives bytes 12 to 99 to no tensor",
    ),
    "a name of many lines": (
        pack(json.dumps({"x\n\x1b[31m" * 999: {"dtype": "F", "shape": [], "data_offsets": [0, 1]}}), 1),
        r"'x\n\x1b[31mx",
    ),
}  # fmt: skip


def check_message(message: str, path: Path) -> None:
    """One sentence on one line, of bearable length, which names the file and goes on after a colon with what to do."""
    assert message.startswith(f"{path} ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500
    assert ": " in message


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    content, words = FAULTS[fault]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read_header(path)
    assert words in str(caught.value)
    check_message(str(caught.value), path)


def test_a_torch_checkpoint_elsewhere_is_told_to_be_downloaded(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for new in (True, False):
        torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(SourceError, match="from a local file only: download it"):
            read_header(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_nothing(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_folder, "is a folder"),
        (make_pipe, "is a device or pipe"),
        (make_dangling_link, "is a link to nothing"),
        (make_nothing, "is missing"),
    ],
)
def test_what_is_no_file_is_refused(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(SourceError, match=words) as caught:
        read_header(path)
    check_message(str(caught.value), path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud8ff"])
def test_names_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_header(tmp_path / name)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a patch, since the tests may run as root, whom no file's mode keeps out."""

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "x.safetensors"
    path.write_bytes(pack("{}"))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match="cannot be read: Permission denied"):
        read_header(path)


def big_header(count: int) -> tuple[bytes, int]:
    """A header as long as that of an SDXL checkpoint in one file, and the file's size."""
    names = [f"model.diffusion_model.input_blocks.{i}.1.transformer_blocks.0.attn1.to_q.weight" for i in range(count)]
    data = {
        name: {"dtype": "F16", "shape": [1280, 1280], "data_offsets": [i * 3276800, (i + 1) * 3276800]}
        for i, name in enumerate(names)
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}} | data, separators=(",", ":")).encode()
    return raw, 8 + len(raw) + count * 3276800


def test_a_header_of_sdxl_reads_in_milliseconds() -> None:
    raw, size = big_header(2515)
    assert len(parse_header(raw, size, "x").tensors) == 2515
    # 13 ms on one core of the machine this was written on
    assert seconds_of(lambda: parse_header(raw, size, "x"), 0.1, tries=5) < 0.1


@pytest.mark.parametrize(
    "begin",
    ['{"a":', '{"__metadata__":{"a":"b",', '{"a":[', '{"a":{"dtype":"U8","shape":[0,', "{ ", '{"a":{"b":0,', '{"\\"'],
)
def test_what_is_refused_costs_no_memory(begin: str) -> None:
    raw = (begin * (4_000_000 // len(begin))).encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def refuse() -> None:
        with pytest.raises(SourceError):
            parse_header(raw, 8 + len(raw), "x")

    assert seconds_of(refuse, 5) < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
ARRAYS = st.tuples(
    st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.uint16, np.int64, np.bool_, np.complex64]),
    st.lists(st.integers(0, 4), max_size=4),
)
FILES = st.dictionaries(NAMES, ARRAYS, max_size=6)
METADATA = st.none() | st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"])), st.text(max_size=9), max_size=3
)


def save(arrays: dict[str, tuple[Any, list[int]]], metadata: dict[str, str] | None = None) -> bytes:
    """A file. Metadata {} is left out: with no tensors beside it, safetensors 0.8 writes what it cannot read."""
    tensors = {name: np.zeros(shape, dtype) for name, (dtype, shape) in arrays.items()}
    return safetensors.numpy.save(tensors, metadata or None)


@settings(deadline=None, max_examples=150)
@given(FILES, METADATA)
def test_whatever_the_library_writes_reads_the_same(
    arrays: dict[str, tuple[Any, list[int]]], metadata: dict[str, str] | None
) -> None:
    content = save(arrays, metadata)
    header = read_bytes(content)
    assert header.metadata == (metadata or {})
    check_against_the_library(content, header)


def check_against_the_library(content: bytes, header: Header) -> None:
    """Every tensor is there, of the same dtype, shape and bytes."""
    theirs = dict(safetensors.deserialize(content))
    assert theirs.keys() == header.tensors.keys()
    for name, info in header.tensors.items():
        assert (info.dtype, info.shape) == (theirs[name]["dtype"], tuple(theirs[name]["shape"]))
        assert content[header.data_start + info.start :][: info.nbytes] == bytes(theirs[name]["data"])


PIECES = st.binary(max_size=3) | st.sampled_from(
    [b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"1e3", b"true", b"null", b"NaN", b'"a":', b" ", b"\\",
     b"\xff", b'"dtype"', b'"F16"', b'"shape"', b'"data_offsets"', b'"__metadata__":{}', b"9223372036854775808"]
)  # fmt: skip
EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 6), PIECES), min_size=1, max_size=3)


@settings(deadline=None, max_examples=500)
@given(FILES, EDITS, st.booleans())
def test_a_mutated_file_is_consistent_or_refused(
    arrays: dict[str, tuple[Any, list[int]]], edits: list[tuple[int, int, bytes]], mend: bool
) -> None:
    """Edits put a piece in the place of some bytes; `mend` gives the header its new length again."""
    content = save(arrays)
    length = int.from_bytes(content[:8], "little")
    edited = content[8:] if mend else content
    for place, removed, piece in edits:
        place %= len(edited) + 1
        edited = edited[:place] + piece + edited[place + removed :]
    if mend:
        edited = max(0, length + len(edited) - len(content) + 8).to_bytes(8, "little") + edited
    try:
        header = read_bytes(edited)
    except SourceError as error:
        message = str(error)
    else:
        check_against_the_library(edited, header)
        message = ""
    assert message == "" or message.isprintable()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(content: bytes, framed: bool) -> None:
    data = pack(content) if framed else content
    with suppress(SourceError):
        check_against_the_library(data, read_bytes(data))


def save_shards(folder: Path, weight_map: object) -> Path:
    """Two shards with the tensors a, b and c, and an index that says where they are."""
    save_file({"a": torch.zeros(1), "b": torch.zeros(2)}, folder / "1.safetensors")
    save_file({"c": torch.zeros(3)}, folder / "2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


RIGHT = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}


def test_shards_are_found_and_merged(tmp_path: Path) -> None:
    files = shards(save_shards(tmp_path, RIGHT))
    assert files == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    merged = merge_headers({path: read_header(path) for path in files})
    assert {key: (path.name, info.shape) for key, (path, info) in merged.items()} == {
        "a": ("1.safetensors", (1,)), "b": ("1.safetensors", (2,)), "c": ("2.safetensors", (3,)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (RIGHT | {"d": "3.safetensors"}, "3.safetensors, which is missing"),
        (RIGHT | {"d": "2.safetensors"}, "places 'd' in 2.safetensors, which lacks it"),
        (RIGHT | {"a": "2.safetensors"}, "places 'a' in 2.safetensors, which lacks it"),
        *(
            (RIGHT | {"a": name}, "outside its folder")
            for name in ("../1.safetensors", "/etc/passwd", "sub/1.safetensors", "..\\1.safetensors", "C:1.safetensors",
                         "C:\\1.safetensors", "..", ".", "", "1.safetensors\0", "\ud800", "x" * 300, "\x1b[31m")
        ),
        (RIGHT | {"a": 1}, "places 'a' in 1, not a file's name"),
        (RIGHT | {"a": None}, "places 'a' in None, not a file's name"),
        (RIGHT | {"a": ["1.safetensors"]}, "not a file's name"),
        ({}, "names no shards"),
        (None, "names no shards"),
        (["1.safetensors"], "names no shards"),
        ("1.safetensors", "names no shards"),
    ],
)  # fmt: skip
def test_a_faulty_index_is_refused(weight_map: object, words: str, tmp_path: Path) -> None:
    index = save_shards(tmp_path, weight_map)
    with pytest.raises(SourceError, match=words) as caught:
        shards(index)
    check_message(str(caught.value), index)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ("{}", "names no shards"),
        ('{"weight_map":' * 100_000, "cannot be read as JSON"),
        ('{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}', "it names 'a' twice"),
        ('{"weight_map":{"a":"1.safetensors"},"weight_map":{}}', "it names 'weight_map' twice"),
        ("\xff", "cannot be read as JSON"),
        (" " * 32_000_001, "more than the 32000000"),
    ],
)
def test_an_index_that_is_none_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.index.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SourceError, match=words) as caught:
        read_index(path)
    check_message(str(caught.value), path)
    for other in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(SourceError):
            read_index(other)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = save_shards(tmp_path, RIGHT)
    save_file({"a": torch.zeros(1), "c": torch.zeros(3)}, tmp_path / "2.safetensors")
    with pytest.raises(WeightsError, match=r"'a' is in two files, .*1\.safetensors and .*2\.safetensors"):
        shards(index)
