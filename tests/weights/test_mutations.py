"""Headers of published files, changed in one place: what cannot be what it says it is never audits clean."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nativesd
from clock import seconds_of
from conftest import Run
from nativesd.checkpoints.survey import survey
from nativesd.errors import WeightsError
from nativesd.weights.formats.header import BITS

Header = dict[str, tuple[str, list[int]]]
"""key -> dtype and shape"""
ALL = json.loads(gzip.decompress((Path(__file__).parents[1] / "manifests" / "published.json.gz").read_bytes()))
LORAS = (
    "lora-sd15-conv.kohya", "lora-sdxl.kohya", "lora-sd15-attn-te.diffusers", "lora-sd15-attn.diffusers-attnprocs",
    "lora-sd15-attn-te.peft",
)  # fmt: skip
WITH_ALPHA = LORAS[:2]
MODELS = (
    "taesd.diffusers", "sd.vae.ldm", "sd15.text_encoder.transformers", "t2i-adapter-sd15-light.diffusers",
    "openclip-vit-h-14.image.transformers", "ip-adapter-sd15.ip-adapter", "ip-adapter-plus-sd15.ip-adapter",
)  # fmt: skip


def header(stem: str) -> Header:
    return {key: (dtype, list(shape)) for key, (dtype, shape) in ALL[stem]["tensors"].items()}


def write(tensors: Header, path: Path) -> Path:
    """A file with these tensors, all zeros, which take no room on the disk."""
    at, entries = 0, {}
    for key, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BITS[dtype] // 8
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    return path


def first(tensors: Header, end: str) -> str:
    """A key in the middle that ends so, of a matrix where there are any."""
    keys = [key for key in tensors if key.endswith(end)]
    keys = [key for key in keys if len(tensors[key][1]) > 1] or keys
    return keys[len(keys) // 2]


Change = Callable[[Header, str], None]


def of_dtype(dtype: str) -> Change:
    def change(tensors: Header, key: str) -> None:
        tensors[key] = dtype, tensors[key][1]

    return change


def all_of_dtype(tensors: Header, _: str) -> None:
    for key in tensors:
        tensors[key] = "I8", tensors[key][1]


def another_axis(tensors: Header, key: str) -> None:
    tensors[key] = tensors[key][0], [*tensors[key][1], 1]


def flat(tensors: Header, key: str) -> None:
    tensors[key] = tensors[key][0], [math.prod(tensors[key][1])]


def empty(tensors: Header, key: str) -> None:
    tensors[key] = tensors[key][0], [0, *tensors[key][1][1:]]


def away(tensors: Header, key: str) -> None:
    del tensors[key]


def renamed(tensors: Header, key: str) -> None:
    tensors[f"{key}_x"] = tensors.pop(key)


DTYPES: dict[str, Change] = {dtype: of_dtype(dtype) for dtype in ("I8", "I32", "BOOL", "U8", "F8_E8M0", "C64")}
SHAPES: dict[str, Change] = {"another axis": another_axis, "flat": flat, "empty": empty}
FACTORS = DTYPES | SHAPES | {"all I8": all_of_dtype, "away": away, "renamed": renamed}
ALPHAS: dict[str, Change] = {"away": away, "BOOL": of_dtype("BOOL"), "another axis": another_axis, "empty": empty}


def test_of_a_lora_every_change_is_a_finding(tmp_path: Path) -> None:
    """As a survey sees it, which knows a base's modules once for all files."""
    for stem in LORAS:
        end = {"kohya": "lora_up.weight", "peft": "lora_A.weight"}.get(stem.rpartition(".")[2], "down.weight")
        for name, change in FACTORS.items():
            tensors = header(stem)
            change(tensors, first(tensors, end))
            write(tensors, tmp_path / f"{stem} {name}.safetensors")
        write(header(stem), tmp_path / f"{stem} whole.safetensors")
    for stem in WITH_ALPHA:
        for name, change in ALPHAS.items():
            tensors = header(stem)
            change(tensors, first(tensors, ".alpha"))
            write(tensors, tmp_path / f"{stem} alpha {name}.safetensors")
    lines = list(survey([tmp_path]))
    assert len(lines) == len(LORAS) * (1 + len(FACTORS)) + len(WITH_ALPHA) * len(ALPHAS)
    assert [line.source for line in lines if line.ok] == [
        str(tmp_path / f"{stem} whole.safetensors") for stem in sorted(LORAS)
    ]
    assert {line.error for line in lines} == {""}
    assert all(line.why for line in lines if not line.ok)


@pytest.mark.parametrize("stem", MODELS)
def test_of_a_model(stem: str, tmp_path: Path) -> None:
    for name, change in FACTORS.items():
        tensors = header(stem)
        change(tensors, first(tensors, "weight"))
        write(tensors, tmp_path / f"{name}.safetensors")
    assert [line.source for line in survey([tmp_path]) if line.ok] == []
    assert nativesd.audit(write(header(stem), tmp_path / "whole.safetensors")).ok


def test_of_an_embedding(tmp_path: Path) -> None:
    for name, (dtype, shape) in {"a": ("I8", [2, 768]), "b": ("BOOL", [768]), "c": ("F32", [0, 768])}.items():
        write({"emb_params": (dtype, shape)}, tmp_path / f"{name}.safetensors")
    assert [line.ok for line in survey([tmp_path])] == [False] * 3


def test_the_command_says_what_and_ends_with_1(run: Run, tmp_path: Path) -> None:
    tensors = header("lora-sd15-unetonly.kohya")
    key = first(tensors, "lora_up.weight")
    tensors[key] = "I8", tensors[key][1]
    write(tensors, tmp_path / "lora.safetensors")
    done = run("audit", "lora.safetensors")
    assert done.returncode == 1
    assert "its up matrix is I8: a quantised weight, whose scale is not known" in " ".join(done.stdout.split())
    write({}, tmp_path / "nothing.safetensors")
    done = run("audit", "nothing.safetensors")
    assert done.returncode == 1
    assert "this is a file without a tensor" in done.stdout
    assert not next(survey([tmp_path / "nothing.safetensors"])).ok


ONE = "lora_unet_mid_block_attentions_0_proj_in"


def one(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    whole = {"lora_up.weight": torch.ones(320, 4), "lora_down.weight": torch.ones(4, 320)}
    return {f"{ONE}.{part}": tensor for part, tensor in {**whole, **parts}.items()}


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 1e38, -70000.0])
def test_an_alpha_that_is_none_is_a_finding(alpha: float, run: Run, tmp_path: Path) -> None:
    tensors = one(alpha=torch.tensor(alpha))
    tensors = {key.replace("mid_block", "down_blocks_0"): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    done = run("audit", "lora.safetensors")
    assert done.returncode == 1
    assert f"the alpha {alpha:g} is none" in done.stdout
    save_file(
        {**tensors, next(key for key in tensors if "alpha" in key): torch.tensor(2.0)}, tmp_path / "good.safetensors"
    )
    assert run("audit", "good.safetensors").returncode == 0


def odd(stem: str, count: int, change: Callable[[int, str], str]) -> Header:
    """A published LoRA with odd names, repeated until there are so many keys."""
    tensors = list(header(stem).items())
    return {change(i, tensors[i % len(tensors)][0]): tensors[i % len(tensors)][1] for i in range(count)}


ODD: dict[str, Callable[[int, str], str]] = {
    "a prefix": lambda i, key: f"x{i}.{key}",
    "a suffix": lambda i, key: f"{key}.x{i}",
    "a number in the module": lambda i, key: key.replace("blocks", f"blocks_{i}", 1),
    "another adapter": lambda i, key: key.replace("lora_A.", f"lora_A.a{i}.").replace("lora_B.", f"lora_B.a{i}."),
    "misspelt": lambda i, key: key.replace("attn", f"atn{i}"),
    "long": lambda i, key: f"{key[:20]}{'.' * 200}{i}{key[20:]}",
    "dots": lambda i, key: "lora_unet_" + "." * 100 + f"{i}.lora_up.weight",
    "foreign prefixes": lambda i, key: f"x{i}.conv_in.weight",
    "large foreign prefixes": lambda i, key: (
        f"x{i // 25}.{'conv_in.weight' if i % 25 else 'encoder.conv_in.weight'}{i}"
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_many_odd_names_take_linear_time(name: str, tmp_path: Path) -> None:
    """Within the 5 s that are promised of any file; 10^5 names take three times as long."""
    stem = "lora-sd15-attn-te.peft" if name == "another adapter" else "lora-sdxl.kohya"
    path = write(odd(stem, 30_000, ODD[name]), tmp_path / "lora.safetensors")

    def refuse() -> None:
        assert not nativesd.audit(path).ok
        with pytest.raises(WeightsError) as refused:
            nativesd.load("tiny", device="cpu").set_loras([str(path)])
        assert len(str(refused.value)) < 30_000

    assert seconds_of(refuse, 5) < 5


def test_what_nothing_loads_is_said_to_be_unused(run: Run, tmp_path: Path) -> None:
    """By a table of one's own, which only names what is in a file."""
    words = "its tensors are explained, and nothing here loads a turntable"
    tables = tmp_path / "maps"
    tables.mkdir()
    (tables / "turntable.toml").write_text(
        f"[map]\ncomponent = 'turntable'\nlayout = 'own'\nunused = '{words}'\n[names]\n'plate' = 'what turns'\n"
    )
    path = write({"plate": ("F32", [3])}, tmp_path / "turntable.safetensors")
    assert f"not used            {words}" in run("audit", str(path), "--maps", str(tables)).stdout
    [line] = survey([path], maps=tables)
    assert (line.ok, line.why) == (True, words)
