"""Fuzz the readers of headers: whatever bytes they are given, they give a header or raise SourceError.

    python tools/fuzz_header.py [--kind safetensors|pickle|zip|gguf] [--minutes N] [--seed N]

Guided by coverage, with atheris (`pip install atheris`), from valid files on; half of the mutations are libFuzzer's,
half know the format. What is fuzzed of a pickle is the pickle itself, read in a whole archive and in the older form
without one; of a zip file the archive. safetensors and pickles are read twice: safetensors as a file and as one whose
header's length is mended; what is accepted there has to read the same with the safetensors library. Tensors that are
accepted have to lie in the file. Ends with the input, and a code other than 0, at the first other exception,
difference, processor second spent on one input (of 64 KB at most), growth by 200 MB, or, with pickles, at anything
that is imported. Prints how many inputs were tried.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import atheris
import safetensors

with atheris.instrument_imports(include=["nativesd.weights.files", "pickletools", "zipfile"]):
    from nativesd.errors import SourceError
    from nativesd.weights.formats.archive import read_archive, read_pickles
    from nativesd.weights.formats.gguf import read_gguf
    from nativesd.weights.formats.header import BITS, HEAD, Header, header_length, parse_header

LONGEST = 65536
"""Bytes of an input."""
SECONDS = 1.0
MEMORY = 200_000
"""Kilobytes."""

Entry = tuple[str, str, list[int]]


def pack(raw: bytes, data: int) -> bytes:
    """A file with this header and so many zeros."""
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def valid(chance: random.Random) -> bytes:
    """A valid file of up to five tensors."""
    entries: list[Entry] = [
        (f"k{i}.é\n", chance.choice(list(BITS)), [*chance.choices(range(1, 5), k=chance.randrange(4)), 8])
        for i in range(chance.randrange(6))
    ]
    ends = list(accumulate((size(entry) for entry in entries), initial=0))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if chance.random() < 0.5 else {}
    for (name, dtype, shape), start, end in zip(entries, ends, ends[1:], strict=False):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    separators = (",", ":") if chance.random() < 0.5 else (" , ", " : ")
    raw = json.dumps(header, separators=separators, ensure_ascii=chance.random() < 0.5).encode()
    return pack(raw + b" " * chance.randrange(9), ends[-1])


def size(entry: Entry) -> int:
    """The bytes of a tensor."""
    bits = BITS[entry[1]]
    for count in entry[2]:
        bits *= count
    return bits // 8


TOKENS = [
    *(f'"{dtype}"'.encode() for dtype in BITS),
    *(b'"dtype":', b'"shape":', b'"data_offsets":', b'"__metadata__":{', b'"a":"b",', b"[0,0]", b"true", b"null"),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\u0061",
        b"\\ud800",
        b"\xff",
        b"\xed\xa0\x80",
        b"\x00" * 8,
        b" " * 100,
    ),
    *(b"NaN", b"Infinity", b"-0", b"1e3", b"1.0", b"9223372036854775807", b"9223372036854775808", b"9" * 5000),
    *(b"[" * 2000, b'{"a":' * 2000, b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'),
    *(b"PK\x03\x04", b"GGUF", b"\x80\x02", b"<html", b"version https://git-lfs"),
]


STORAGE = b"(X\x07\0\0\0storageq\x01ctorch\nFloatStorage\nq\x02X\x01\0\0\x00%cq\x03X\x03\0\0\0cpuq\x04K\x08tq\x05Q"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89Ntq\x06R"
PIECES = [
    *(b"(", b")", b"]", b"}", b"a", b"e", b"s", b"u", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x81", b"o", b"Q"),
    *(b"q\x00", b"h\x00", b"h\x05", b"2", b"0", b"1", b".", b"N", b"\x88", b"\x94", b"\x93", b"\x92", b"\x8f", b"\x90"),
    *(b"cos\nsystem\n", b"(icollections\nOrderedDict\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n"),
    *(b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"c__torch__\nNet\n)\x81"),
    *(b"X\x01\0\0\0a", b"X\x0a\0\0\0state_dict", b"\x8c\x01b", b"U\x01c", b"K\x00", b"K\xff", b"J\xff\xff\xff\xff"),
    *(b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8b\x04\0\0\0\xff\xff\xff\x7f", b"I1\n", b"L9999999999L\n"),
    *(b"X\xff\xff\xff\x7f", b"G\x7f\xf0\0\0\0\0\0\0", b"p5\n", b"g5\n", b"r\xff\0\0\0", b"j\xff\0\0\0", STORAGE % 48),
    *(TENSOR % 48, TENSOR % 49, b"](" + b"h\x06" * 50 + b"e", b"(" * 300, b"]" * 300 + b"a" * 299, b"}" * 500),
]


def valid_pickle(chance: random.Random) -> bytes:
    """A pickle of up to three entries, which torch.save or torch.jit.save could have written."""
    entries = b"".join(
        b"X\x01\0\0\0"
        + name
        + chance.choice([TENSOR % 48, TENSOR % 49, b"](" + TENSOR % 48 + b"K\x01e", b"K\x05", b"N"])
        for name in (b"a", b"b", b"c")[: chance.randrange(1, 4)]
    )
    whole = b"}(" + entries + b"u"
    form = chance.choice([whole, b"}X\x0a\0\0\0state_dict" + whole + b"s", b"c__torch__\nNet\n)\x81" + whole + b"b"])
    return b"\x80\x02" + form + b"."


def archive(content: bytes) -> bytes:
    """An archive of a pickle and the storages that it may speak of."""
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in {
            "data.pkl": content,
            "byteorder": b"little",
            "data/0": bytes(32),
            "data/1": bytes(32),
        }.items():
            file.writestr(zipfile.ZipInfo(f"x/{name}"), data)
    return stream.getvalue()


def older(content: bytes) -> bytes:
    """The same as pickles one after another."""
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    numbers = (8).to_bytes(8, "little") + bytes(32)
    return head + content + pickle.dumps(["0", "1"], 2) + numbers * 2


def valid_gguf(chance: random.Random) -> bytes:
    """A GGUF file of up to three tensors."""

    def text(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    keys = [text(b"general.name") + b"\x08\0\0\0" + text(b"x"), text(b"n") + b"\x04\0\0\0\x05\0\0\0"]
    keys += [text(b"l") + b"\x09\0\0\0\x05\0\0\0" + (2).to_bytes(8, "little") + bytes(8)]
    keys, entries, at = keys[: chance.randrange(4)], [], 0
    for name in (b"a", b"b.c", b"d")[: chance.randrange(1, 4)]:
        kind, block, width = chance.choice([(0, 1, 4), (1, 1, 2), (8, 32, 34), (12, 256, 144), (14, 256, 210)])
        rows = chance.randrange(1, 3)
        sizes = b"".join(size.to_bytes(8, "little") for size in (block, rows))
        entries.append(text(name) + b"\x02\0\0\0" + sizes + kind.to_bytes(4, "little") + at.to_bytes(8, "little"))
        at += -(-rows * width // 32) * 32
    counts = len(entries).to_bytes(8, "little") + len(keys).to_bytes(8, "little")
    head = b"GGUF" + chance.choice([2, 3]).to_bytes(4, "little") + counts + b"".join(keys + entries)
    return head + bytes(-len(head) % 32 + at)


NUMBERS = [b"\xff" * 8, b"\0" * 8, b"\x01" + b"\0" * 7, b"\xff" * 7 + b"\x7f", b"\xff\xff\0\0", b"GGUF", b"PK\x01\x02"]
NUMBERS += [b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"x/data/0", b"x/data.pkl", b"\x01\0\x10\0"]


def mutate(content: bytes, chance: random.Random, tokens: list[bytes]) -> bytes:
    """A few pieces of `content` cut out, doubled, moved or overwritten."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([0, 1, 1, 2, 5, 20, 60]))
        piece = chance.choice([b"", bytes([chance.randrange(256)]), chance.choice(tokens), bytes(data[at:end]) * 2])
        if chance.random() < 0.2:
            at = end = chance.randrange(len(data) + 1)
        data[at:end] = piece
    return bytes(data[:LONGEST])


def mend(content: bytes) -> bytes:
    """The file whose header's length is right again if its data was left alone: what was the data stays the data."""
    length = content.rfind(b"}") - 7
    return max(0, length).to_bytes(8, "little") + content[8:]


def check_safetensors(content: bytes) -> bool:
    """Read one input; whether it is valid. Raises AssertionError, or what the reader should not."""

    def read() -> Header:
        length = header_length(content[:HEAD], len(content), "x")
        return parse_header(content[8 : 8 + length], len(content), "x")

    header = tried(read)
    if header is None:
        return False
    theirs = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    found = {name: (info.dtype, info.shape, info.nbytes) for name, info in header.tensors.items()}
    expected = {name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in theirs.items()}
    assert found == expected, "the library reads something else"
    return True


def checker(reader: Callable[[BytesIO, int, str], Header]) -> Callable[[bytes], bool]:
    """A check as `check_safetensors` for the readers of other files."""

    def check(content: bytes) -> bool:
        modules = set(sys.modules)
        header = tried(lambda: reader(BytesIO(content), len(content), "x"))
        new = {name for name in set(sys.modules) - modules if not name.startswith("encodings.")}
        assert not new, f"{new} was imported"
        if header is None:
            return False
        for info in header.tensors.values():
            assert 0 <= header.data_start + info.start <= header.data_start + info.end <= len(content), (
                "out of the file"
            )
        return True

    return check


def tried(read: Callable[[], Header]) -> Header | None:
    """The header, or None where it is refused as it should be. Raises AssertionError."""
    started, header, message = time.process_time(), None, ""
    try:
        header = read()
    except SourceError as error:
        message = str(error)
    assert time.process_time() - started < SECONDS, "too slow"
    if header is None:
        assert message.isprintable(), f"the message is not one printable line: {message!a}"
        assert len(message) < 900, "the message is too long"
    return header


@dataclass(frozen=True)
class Kind:
    """What is fuzzed: valid inputs, what mutations insert, and the files made of an input, with their checks."""

    valid: Callable[[random.Random], bytes]
    tokens: list[bytes]
    files: list[tuple[Callable[[bytes], bytes], Callable[[bytes], bool]]]


def same(content: bytes) -> bytes:
    """The input is the file."""
    return content


KINDS = {
    "safetensors": Kind(valid, TOKENS, [(same, check_safetensors), (mend, check_safetensors)]),
    "pickle": Kind(valid_pickle, PIECES, [(archive, checker(read_archive)), (older, checker(read_pickles))]),
    "zip": Kind(lambda chance: archive(valid_pickle(chance)), NUMBERS, [(same, checker(read_archive))]),
    "gguf": Kind(valid_gguf, NUMBERS, [(same, checker(read_gguf))]),
}


def main() -> None:
    """Parse the arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="safetensors")
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_header_"))
    chance, kind = random.Random(arguments.seed), KINDS[arguments.kind]
    for i in range(200):
        content = kind.valid(chance)
        assert kind.files[0][1](kind.files[0][0](content)) or arguments.kind in ("pickle", "zip"), content
        (folder / str(i)).write_bytes(content)
    count = accepted = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    deadline = time.monotonic() + 60 * arguments.minutes

    def one(content: bytes) -> None:
        nonlocal count, accepted
        for make, check in kind.files:
            data = make(content)
            count += 1
            try:
                accepted += check(data)
            except BaseException:
                print(f"failed on {data!r}", flush=True)
                raise
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < MEMORY, "memory grows"
        if time.monotonic() > deadline:
            print(f"{count} inputs tried, {accepted} of them valid; memory grew by {grown // 1000} MB", flush=True)
            shutil.rmtree(folder)
            os._exit(0)  # libFuzzer knows no other way to end well

    def mutator(content: bytes, longest: int, seed: int) -> bytes:
        own = random.Random(seed)
        return mutate(content, own, kind.tokens)[:longest] if own.random() < 0.5 else atheris.Mutate(content, longest)

    options = [f"-max_len={LONGEST}", f"-seed={arguments.seed}", f"-artifact_prefix={folder}/", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(folder)], one, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
