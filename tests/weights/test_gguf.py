"""GGUF: every dtype to the bit as the `gguf` package reads it, and headers that lie are refused."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from test_convert import single
from torch import Tensor

import nativesd
from nativesd.checkpoints.convert import convert
from nativesd.checkpoints.layouts import QUANTISED
from nativesd.errors import SourceError, UsageError, WeightsError
from nativesd.weights.entries import Entry
from nativesd.weights.files.source import open_source
from nativesd.weights.files.tensors import read_tensor
from nativesd.weights.formats.blocks import INSTEAD, WRITERS, dequantise, quantise
from nativesd.weights.formats.gguf import BLOCKS, FILE_TYPES, TYPES, read_gguf
from nativesd.weights.writing import write_gguf

Array = NDArray[np.generic]


def write(path: Path, tensors: Mapping[str, tuple[Array, Kind]], shapes: Mapping[str, list[int]] | None = None) -> Path:
    """A file of tensors that are given as their bytes are to be."""
    writer = gguf.GGUFWriter(path, "sd")
    writer.add_string("general.name", "a model")
    writer.add_uint32("general.file_type", 7)
    writer.add_array("some.texts", ["a", "b"])
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: str, rows: int, columns: int) -> Array:
    """Any bytes are a block; scales that are not finite are none that a program writes."""
    numbers, width = BLOCKS[kind]
    chance = np.random.default_rng(0)
    raw = chance.integers(0, 256, (rows * columns // numbers, width), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for at in halves:
        raw[:, at : at + 2] = chance.normal(0, 0.1, len(raw)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_quantised_dtype_to_the_bit(kind: str, tmp_path: Path) -> None:
    raw = random_blocks(kind, 24, 512)
    write(tmp_path / "x.gguf", {"w": (raw, Kind[kind])})
    [member] = open_source(tmp_path / "x.gguf")
    assert (member.tensors["w"].dtype, member.tensors["w"].shape) == (kind, (24, 512))
    found = read_tensor(member, "w")
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(raw, Kind[kind])))


def test_plain_dtypes_and_shapes(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {
        "f32": torch.randn(3, 5, generator=chance), "f16": torch.randn(4, 3, 2, 2, generator=chance).half(),
        "f64": torch.randn(2, generator=chance).double(), "i64": torch.arange(3), "i32": torch.arange(5).int(),
        "i8": torch.arange(3).to(torch.int8),
    }  # fmt: skip
    entries: dict[str, tuple[Array, Kind]] = {key: (t.numpy(), Kind[key.upper()]) for key, t in tensors.items()}
    half = torch.randn(2, 6, generator=chance).bfloat16()
    entries["bf16"] = half.view(torch.uint8).numpy(), Kind.BF16
    entries["flat"] = tensors["f32"].reshape(15).numpy(), Kind.F32
    write(tmp_path / "x.gguf", entries, {"flat": [5, 3, 1, 1]})
    [member] = open_source(tmp_path / "x.gguf")
    for key, tensor in (tensors | {"bf16": half, "flat": tensors["f32"].reshape(5, 3, 1, 1)}).items():
        found = read_tensor(member, key)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert member.metadata["general.name"] == "a model"


def test_the_types_are_those_of_the_format() -> None:
    assert {number: kind.name for kind in Kind if (number := int(kind)) in TYPES} == TYPES
    assert {kind: gguf.GGML_QUANT_SIZES[Kind[kind]] for kind in BLOCKS} == BLOCKS
    names = {kind: f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}" for kind in FILE_TYPES}
    names |= {kind: f"MOSTLY_{kind}_S" for kind in ("Q4_K", "Q5_K")}
    assert {kind: int(gguf.LlamaFileType[name]) for kind, name in names.items()} == FILE_TYPES


@pytest.mark.filterwarnings("ignore:.*of no published form")
def test_a_model_in_ldms_names(tmp_path: Path) -> None:
    """As sd.cpp writes it: matrices whose rows are whole blocks in Q8_0, the rest as it is."""
    convert("tiny", tmp_path / "tiny.safetensors", layout="ldm")
    entries: dict[str, tuple[Array, Kind]] = {}
    wanted: dict[str, Tensor] = {}
    for key, tensor in load_file(tmp_path / "tiny.safetensors").items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            raw = gguf.quantize(tensor.float().numpy(), Kind.Q8_0)
            entries[key] = raw, Kind.Q8_0
            wanted[key] = torch.from_numpy(gguf.dequantize(raw, Kind.Q8_0))
        else:
            entries[key] = tensor.float().numpy(), Kind.F32
            wanted[key] = tensor.float()
    write(tmp_path / "tiny.gguf", entries)
    report = nativesd.audit(tmp_path / "tiny.gguf")
    assert report.ok
    assert {"Q8_0", "F32"} <= {dtype for component in report.components for dtype in component.dtypes}
    convert(tmp_path / "tiny.gguf", tmp_path / "again.safetensors", layout="ldm")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in wanted.items())
    for dtype in ("float32", "float16"):
        pipe, plain = (
            nativesd.load(tmp_path / name, device="cpu", dtype=dtype, fast=False)
            for name in ("tiny.gguf", "again.safetensors")
        )
        ours, theirs = pipe.unet.state_dict(), plain.unet.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def packed(
    tensors: bytes = b"", *, version: int = 3, counts: tuple[int, int] = (1, 0), keys: bytes = b"", data: int = 128
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + keys + tensors
    return head + bytes(-len(head) % 32 + data)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def entry(name: bytes = b"w", sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


FAULTS = {
    "version 1": (packed(entry(), version=1), "of version 1"),
    "big-endian": (packed(entry(), version=3 << 24), "big-endian"),
    "counts": (packed(entry(), counts=(2**63, 0)), "over the 65536"),
    "keys that are not there": (packed(entry(), counts=(1, 60000)), "."),
    "a long name": (packed(struct.pack("<Q", 2**62)), "of 4611686018427387904 bytes"),
    "a long text": (packed(counts=(0, 1), keys=text(b"a") + struct.pack("<IQ", 8, 2**40)), "over the 8000000"),
    "no text": (packed(entry(b"\xff")), "not UTF-8"),
    "a long array": (packed(counts=(0, 1), keys=text(b"a") + struct.pack("<IIQ", 9, 0, 2**62)), "an array of"),
    "an array of arrays": (
        packed(counts=(0, 1), keys=text(b"a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IIQ", 9, 9, 1)),
        "the type 9",
    ),
    "a type": (packed(counts=(0, 1), keys=text(b"a") + struct.pack("<I", 99)), "the type 99"),
    "a key twice": (packed(entry(), counts=(1, 2), keys=(text(b"a") + struct.pack("<IB", 0, 1)) * 2), "'a' twice"),
    "a tensor twice": (packed(entry() * 2, counts=(2, 0)), "a tensor twice"),
    "dimensions": (packed(entry(sizes=(1,) * 5)), "5 dimensions"),
    "sizes": (packed(entry(sizes=(2**40, 2**40))), "which no F32 has"),
    "rows that are no blocks": (packed(entry(sizes=(33, 32), kind=8)), "which no Q8_0 has"),
    "a dtype": (packed(entry(kind=10)), "Q2_K, which is not read here"),
    "an unknown dtype": (packed(entry(kind=999)), "999, which is not read here"),
    "two at one place": (packed(entry() + entry(b"v"), counts=(2, 0)), "over another tensor"),
    "a place between": (packed(entry(offset=8)), "between two places"),
    "cut short": (packed(entry(), data=100), "is cut short"),
    "cut in the header": (packed(entry())[:30], "is cut short in its header"),
    "an alignment": (
        packed(entry(), counts=(1, 1), keys=text(b"general.alignment") + struct.pack("<II", 4, 7)), "the alignment 7"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_headers_that_lie(fault: str, tmp_path: Path) -> None:
    content, words = FAULTS[fault]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(SourceError, match=words) as caught:
        open_source(tmp_path / "x.gguf")
    assert str(caught.value).isprintable()


EDITS = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(EDITS)
def test_no_damage_raises_anything_else(edits: list[tuple[int, int, bytes]]) -> None:

    data = bytearray(
        packed(entry() + entry(b"v", (256, 2), 12, 128), counts=(2, 1), keys=text(b"a") + b"\0" * 5, data=500)
    )
    for at, length, piece in edits:
        data[at : at + length] = piece
    try:
        header = read_gguf(BytesIO(data), len(data), "x")
    except SourceError:
        return
    assert all(header.data_start + info.end <= len(data) for info in header.tensors.values())


# --- written


@pytest.mark.parametrize("kind", sorted(WRITERS.keys() - INSTEAD))
def test_what_is_quantised_is_ggmls_to_the_bit(kind: str) -> None:
    chance = torch.Generator().manual_seed(0)
    numbers = torch.randn(64, 512, generator=chance) * torch.logspace(-6, 3, 64)[:, None]
    numbers[3], numbers[4, :32], numbers[5, 7] = 0, 1.5, -1e4
    numbers[6] = torch.arange(512.0) / 127  # halves between two integers
    wanted = gguf.quantize(numbers.numpy(), Kind[kind])
    assert torch.equal(quantise(numbers, kind).reshape(64, -1), torch.from_numpy(wanted))


@pytest.mark.parametrize("kind", INSTEAD)
def test_k_types_are_as_near_as_ggmls(kind: str) -> None:
    """`ggml_k.npz`: blocks of ten distributions, and what `quantize_row_*_K_ref` of libggml 0.13.1 makes of them.

    Where two scales are as good, and with numbers all near 1, whose sums cancel, another is chosen.
    """
    kept = np.load(Path(__file__).with_name("ggml_k.npz"))
    numbers, theirs = torch.from_numpy(kept["numbers"]).float(), torch.from_numpy(kept[kind])
    ours = quantise(numbers, kind).reshape(len(numbers), -1)
    assert ours.shape == theirs.shape
    assert (ours == theirs).all(1).float().mean() >= 0.5
    errors = [(dequantise(raw.flatten(), kind).reshape(numbers.shape) - numbers).abs() for raw in (ours, theirs)]
    for mine, reference in ((e.amax(1) for e in errors), (e.square().mean(1).sqrt() for e in errors)):
        assert (mine <= 1.25 * reference).all()
        assert mine.mean() <= 1.01 * reference.mean()
    assert errors[0][1].max() == 0  # of zeros


MOST = {"Q8_0": (0.0054, 0.004), "Q6_K": (0.0178, 0.015), "Q5_K": (0.0362, 0.035), "Q5_1": (0.038, 0.026),
        "Q5_0": (0.043, 0.036), "Q4_K": (0.0718, 0.052), "Q4_1": (0.0786, 0.055), "Q4_0": (0.0858, 0.076)}  # fmt: skip
"""The error in the Frobenius norm, and the largest, as a part of the largest number; of normal numbers."""


@pytest.mark.parametrize("kind", WRITERS)
def test_errors_of_every_type(kind: str) -> None:
    numbers = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.05
    raw = quantise(numbers, kind)
    error = dequantise(raw, kind).reshape(numbers.shape) - numbers
    norm, largest = MOST[kind]
    assert 0.95 * norm < error.norm() / numbers.norm() < norm
    assert error.abs().max() / numbers.abs().max() < largest
    theirs = gguf.dequantize(raw.reshape(64, -1).numpy(), Kind[kind])
    assert torch.equal(dequantise(raw, kind).reshape(numbers.shape), torch.from_numpy(theirs))


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """As llama.cpp: another type for rows that are whole blocks of 32 alone, float16 for what has none."""
    rows = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    tensors = {
        "k": rows,
        "smaller": rows[:, :320],
        "none": rows[:, :48],
        "vector": rows[0],
        "conv": rows[:, :256, None, None],
    }
    entries = {name: Entry(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}  # type: ignore[misc]
    for kind, instead in INSTEAD.items():
        write_gguf(tmp_path / kind, entries, {}, kind)
        found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / kind).tensors}
        assert found == {"k": kind, "smaller": instead, "none": "F16", "vector": "F32", "conv": "F16"}


BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
NOT_FINITE = r"^x.weight has numbers that are not finite \(NaN or infinite\), of which nothing can be quantised"


@pytest.mark.parametrize("kind", WRITERS)
def test_numbers_that_no_block_can_hold(kind: str, tmp_path: Path) -> None:
    for bad in (math.nan, math.inf, -math.inf, 1e9):
        numbers = torch.ones(2, 256)
        numbers[1, 3] = bad
        words = f"^x.weight has numbers up to 1e\\+09, which {kind} cannot hold" if bad == 1e9 else NOT_FINITE
        with pytest.raises(WeightsError, match=words):
            write_gguf(tmp_path / "x", {"x.weight": Entry(torch.float32, (2, 256), numbers.clone)}, {}, kind)


@pytest.mark.filterwarnings("ignore:.* of no published form", "ignore:.* will not say ")
@pytest.mark.parametrize("dtype", ["q6_k", "q8_0", "fp8"])
def test_a_model_with_a_weight_that_is_not_finite(dtype: str, tmp_path: Path) -> None:
    source, key = single("sd1", tmp_path / "model.safetensors"), f"{BLOCK}.ff.net.2.weight"
    tensors = load_file(source)
    tensors[key][0, 0] = math.nan
    save_file(tensors, source)
    out = tmp_path / ("out.safetensors" if dtype == "fp8" else "out.gguf")
    with pytest.raises(WeightsError, match=f"^{key} has numbers that are not finite"):
        convert(source, out, layout="ldm", dtype=dtype)
    assert [file.name for file in tmp_path.iterdir()] == [source.name]


@pytest.mark.filterwarnings("ignore:.* of no published form", "ignore:.* will not say ")
@pytest.mark.parametrize("dtype", [None, "f16", "bf16", "f32", *QUANTISED])
def test_a_model_as_gguf(dtype: str | None, tmp_path: Path) -> None:
    """What is written has the names of the single file; the package and our reader find the same numbers in it."""
    source, out = single("sd1", tmp_path / "model.safetensors"), tmp_path / "model.gguf"
    done = convert(source, out, layout="ldm", dtype=dtype)
    own = {key: t for key, t in load_file(source).items() if key not in done.ignored}
    reader = gguf.GGUFReader(out)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == own.keys()
    [member] = open_source(out)
    kinds = set()
    for key, tensor in own.items():
        each = found[key]
        kinds.add(each.tensor_type.name)
        read = read_tensor(member, key)
        assert read.shape == tensor.shape
        if each.tensor_type.name == "BF16":
            assert torch.equal(read, tensor.bfloat16())
            continue
        theirs = torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy()).reshape(tensor.shape)
        assert torch.equal(read.float(), theirs.float())
        if each.tensor_type.name not in BLOCKS:
            assert torch.equal(read.float(), tensor.float())
        else:
            # half a step, and the rounding of the scale to float16
            step = {"Q8_0": 1 / 254, "Q6_K": 1 / 32, "Q5_0": 1 / 16, "Q5_1": 1 / 31, "Q5_K": 1 / 16, "Q4_0": 1 / 8,
                    "Q4_1": 1 / 15, "Q4_K": 1 / 8}  # fmt: skip
            most = (step[each.tensor_type.name] + 2**-11) * tensor.float().abs().max()
            assert (theirs - tensor.float()).abs().max() <= most
    wanted = {"f32": {"F32"}, "bf16": {"BF16"}}.get(dtype or "", {"F16"})
    kind = QUANTISED.get(dtype or "", "")
    assert wanted < kinds <= wanted | {kind, INSTEAD.get(kind, kind)} if kind else kinds == wanted
    assert reader.fields["general.architecture"].contents() == "sd"
    assert reader.fields["note"].contents() == "kept"
    assert nativesd.audit(out).ok


@pytest.mark.filterwarnings("ignore:.* of no published form")
def test_a_quantised_model_makes_almost_the_same_picture(tmp_path: Path) -> None:
    options = {"steps": 4, "seed": 1, "width": 96, "height": 96}
    convert("tiny", tmp_path / "tiny.safetensors", layout="ldm")
    wanted = nativesd.load(tmp_path / "tiny.safetensors", device="cpu")("a strawberry", **options).latents
    errors = []
    for dtype in ("q8_0", "q4_k", "q4_0"):
        convert("tiny", tmp_path / f"{dtype}.gguf", layout="ldm", dtype=dtype)
        pipe = nativesd.load(tmp_path / f"{dtype}.gguf", device="cpu")
        errors.append(float((pipe("a strawberry", **options).latents - wanted).norm() / wanted.norm()))
    assert errors[0] < 0.05
    assert errors == sorted(errors)


def test_dtypes_and_files_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"q8_0 is a dtype of \.gguf files: .*out.safetensors is none"):
        convert("tiny", tmp_path / "out.safetensors", layout="ldm", dtype="q8_0")
    with pytest.raises(UsageError, match="diffusers is a folder"):
        convert("tiny", tmp_path / "out.gguf", layout="diffusers")
    with pytest.raises(UsageError, match=r"dtype must be one of f16, .*, not 'q3_k'"):
        convert("tiny", tmp_path / "out.gguf", layout="ldm", dtype="q3_k")
