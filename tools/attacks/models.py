"""Kinds A and K: the JSON of model folders, headers of weights, and what audits say of them."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import nativesd
from attacks.values import NAMES, VALUES, changed, deeply_changed, put
from nativesd.errors import NativesdError
from nativesd.models.build import expected
from nativesd.reading import read_json
from nativesd.sampling.published import FIELDS, SchedulerConfig
from nativesd.sampling.schedule import trained_sigmas
from nativesd.shipped import TINY
from nativesd.text.tokenizer import ClipTokenizer, pad_id
from nativesd.weights.files import configs
from nativesd.weights.files.source import components
from nativesd.weights.formats.header import read_index

CONFIGS = {"unet": configs.UNET, "vae": configs.VAE, "text_encoder": configs.TEXT, "controlnet": configs.CONTROLNET}


@cache
def published(name: str) -> dict[str, Any]:
    """A JSON file of the embedded model."""
    return read_json(TINY / name)


def config(rng: random.Random, folder: Path) -> None:
    """config.json of a component, and the network that it describes."""
    name = rng.choice(list(CONFIGS))
    good = published(f"{name}/config.json")
    path = folder / name / "config.json"
    put(rng, path, json.dumps(changed(rng, good, [*good, *(field.name for field in CONFIGS[name])])).encode())
    if (found := configs.component_config(path)) is not None:
        expected(found)


def scheduler(rng: random.Random, folder: Path) -> None:
    """scheduler_config.json, and its sigmas."""
    good = published("scheduler/scheduler_config.json")
    data = changed(rng, good, [*good, *(field.name for field in FIELDS)])
    trained_sigmas(SchedulerConfig.from_published(data))


def listing(rng: random.Random, folder: Path) -> None:
    """model_index.json, or an index of shards."""
    keys = {rng.choice(NAMES): rng.choice((["diffusers", "UNet"], *VALUES)) for _ in range(3)}
    if rng.random() < 0.5:
        put(rng, folder / "model_index.json", json.dumps(keys).encode())
        components(folder)
    else:
        put(rng, folder / "x.safetensors.index.json", json.dumps({"weight_map": keys}).encode())
        read_index(folder / "x.safetensors.index.json")


def tokenizer(rng: random.Random, folder: Path) -> None:
    """vocab.json, merges.txt and the maps beside them, most of them as they should be."""
    wrong = rng.choice(("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"))
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        if name != wrong:
            (folder / name).symlink_to(TINY / "tokenizer" / name)
    if wrong == "merges.txt":
        lines = [f"{rng.choice('abcd')} {rng.choice('abcd')}" for _ in range(9)] + [rng.choice(NAMES)]
        raw = "\n".join(["#version: 0.2", *lines]).encode(errors="surrogatepass")
    elif wrong == "vocab.json":
        names = ("a", "b</w>", *NAMES)
        raw = json.dumps({rng.choice(names): rng.choice((5, 2**32 - 1, *VALUES)) for _ in "123"}).encode()
    else:
        raw = json.dumps(deeply_changed(rng, published(f"tokenizer/{wrong}"))).encode()
    put(rng, folder / wrong, raw)
    if wrong in ("vocab.json", "merges.txt"):
        ClipTokenizer(folder, pad=0).encode(["a cat"])
    else:
        pad_id(folder, 0)


@cache
def _header(component: str) -> dict[str, Any]:
    raw = (TINY / component / "diffusion_pytorch_model.safetensors").read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1, "I32": 4, "I64": 8, "BOOL": 1, "U8": 1, "F8_E4M3": 1}
INTEGERS = ("I8", "I32", "I64", "BOOL", "U8")


def header(rng: random.Random, folder: Path) -> None:
    """Names, shapes and dtypes of a real file changed: never a traceback, and never clean where it is not."""
    tensors = {key: (each["dtype"], list(each["shape"])) for key, each in _header("vae").items() if key[0] != "_"}
    must_show = False
    for key in rng.sample(list(tensors), rng.randint(1, 3)):
        dtype, shape = tensors.get(key, ("F16", [1]))
        match rng.randrange(7):
            case 0:
                tensors.pop(key, None)
                must_show = True
            case 1:
                tensors[f"{key}{rng.choice(('x', '.y', chr(0), ' '))}"] = dtype, shape
                must_show = True
            case 2:
                tensors[key] = rng.choice(INTEGERS), shape
                must_show = True
            case 3:
                tensors[key] = dtype, [*shape, rng.choice((0, 2, 3))]
                must_show = True
            case 4:
                tensors[key] = rng.choice(("F32", "BF16", "F8_E4M3")), shape
            case 5:
                tensors[key] = dtype, [rng.choice((0, 5, 2**40)) for _ in shape]
                must_show = True
            case _:
                tensors[rng.choice([name for name in NAMES if "\ud800" not in name])] = dtype, shape
                must_show = True
    out: dict[str, Any] = {}
    at = 0
    for key, (dtype, shape) in tensors.items():
        size = SIZES[dtype]
        for side in shape:
            size *= side
        out[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(out).encode()
    path = folder / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        try:
            file.truncate(min(8 + len(raw) + at, 1 << 40))
        except OSError as error:
            raise NativesdError("this file system has no files of that size") from error
    if nativesd.audit(path).ok and must_show:
        raise AssertionError("a file with a wrong tensor audits clean")
