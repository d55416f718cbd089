"""Fuzz the safetensors header reader: whatever bytes it is given, it gives a header or raises SourceError.

    python tools/fuzz_header.py [--minutes N] [--seed N]

Guided by coverage, with atheris (`pip install atheris`), from valid files on; half of the mutations are libFuzzer's,
half know the format. Every input is read twice, as a file and as one whose header's length is mended; what is accepted
has to read the same with the safetensors library. Ends with the input, and a code other than 0, at the first other
exception, difference, processor second spent on one input (of 64 KB at most), or growth by 200 MB. Prints how many
inputs were tried.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import atheris
import safetensors

with atheris.instrument_imports(include=["nativesd.weights.files.header"]):
    from nativesd.errors import SourceError
    from nativesd.weights.files.header import BITS, HEAD, header_length, parse_header

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


def mutate(content: bytes, chance: random.Random) -> bytes:
    """A few pieces of `content` cut out, doubled, moved or overwritten."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([0, 1, 1, 2, 5, 20, 60]))
        piece = chance.choice([b"", bytes([chance.randrange(256)]), chance.choice(TOKENS), bytes(data[at:end]) * 2])
        if chance.random() < 0.2:
            at = end = chance.randrange(len(data) + 1)
        data[at:end] = piece
    return bytes(data[:LONGEST])


def mend(content: bytes) -> bytes:
    """The file whose header's length is right again if its data was left alone: what was the data stays the data."""
    length = content.rfind(b"}") - 7
    return max(0, length).to_bytes(8, "little") + content[8:]


def check(content: bytes) -> bool:
    """Read one input; whether it is valid. Raises AssertionError, or what the reader should not."""
    started, header, message = time.process_time(), None, ""
    try:
        length = header_length(content[:HEAD], len(content), "x")
        header = parse_header(content[8 : 8 + length], len(content), "x")
    except SourceError as error:
        message = str(error)
    assert time.process_time() - started < SECONDS, "too slow"
    if header is None:
        assert message.isprintable(), "the message is not one printable line"
        assert len(message) < 600, "the message is too long"
        return False
    theirs = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    found = {name: (info.dtype, info.shape, info.nbytes) for name, info in header.tensors.items()}
    expected = {name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in theirs.items()}
    assert found == expected, "the library reads something else"
    return True


def main() -> None:
    """Parse the arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_header_"))
    chance = random.Random(arguments.seed)
    for i in range(200):
        content = valid(chance)
        assert check(content), content
        (folder / str(i)).write_bytes(content)
    tried = accepted = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    deadline = time.monotonic() + 60 * arguments.minutes

    def one(content: bytes) -> None:
        nonlocal tried, accepted
        for data in (content, mend(content)):
            tried += 1
            try:
                accepted += check(data)
            except BaseException:
                print(f"failed on {data!r}", flush=True)
                raise
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < MEMORY, "memory grows"
        if time.monotonic() > deadline:
            print(f"{tried} inputs tried, {accepted} of them valid; memory grew by {grown // 1000} MB", flush=True)
            shutil.rmtree(folder)
            os._exit(0)  # libFuzzer knows no other way to end well

    def mutator(content: bytes, longest: int, seed: int) -> bytes:
        own = random.Random(seed)
        return mutate(content, own)[:longest] if own.random() < 0.5 else atheris.Mutate(content, longest)

    options = [f"-max_len={LONGEST}", f"-seed={arguments.seed}", f"-artifact_prefix={folder}/", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(folder)], one, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
