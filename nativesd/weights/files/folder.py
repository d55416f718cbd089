"""Models in the published folder layout: model_index.json, and a folder with config and weights for every component."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from nativesd.errors import SourceError, quote
from nativesd.reading import list_folder
from nativesd.weights.formats.container import SUFFIXES, read_file
from nativesd.weights.formats.header import merge_headers, read_index

INDEX = "model_index.json"
"""What a folder has that is a whole model."""
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
PICKLED = {"model": "pytorch_model"}
"""What `.bin` files are called, where not as `.safetensors` files."""


VARIANTS = ("", "fp32", "fp16", "bf16", "ema", "non_ema")
"""What stands between a name and its suffix, the plain file first: by this order one is chosen."""
HALF = ("fp16", "", "bf16", "fp32", "ema", "non_ema")
"""The order for half precision."""
SHARD = r"-\d+-of-\d+"


def choose(names: Iterable[str], stem: str, *, half: bool) -> str | None:
    """Which of a folder's files holds the weights called `stem`, or the index of their shards; None where none does.

    safetensors files go before pickles, then the variant decides: by VARIANTS or HALF; one of another name is taken
    where it is the only one. Raises SourceError where several of other names leave the choice open.
    """
    names = sorted(names)
    for called, suffix in ((stem, ".safetensors"), (PICKLED.get(stem, stem), ".bin")):
        own, end = re.escape(called), re.escape(suffix)
        name = re.compile(rf"{own}(?:\.(\w+))?{end}|{own}{end}\.index(?:\.(\w+))?\.json|{own}\.(\w+){end}\.index\.json")
        found: dict[str, str] = {}
        for file in names:
            if match := name.fullmatch(file):
                found.setdefault(next(filter(None, match.groups()), ""), file)
        if known := [found[variant] for variant in (HALF if half else VARIANTS) if variant in found]:
            return known[0]
        if len(found) > 1:
            raise SourceError(
                f"there are several variants of {stem}: {', '.join(found.values())}; keep one of them, or name its file"
            )
        if found:
            return next(iter(found.values()))
    return None


def stem_of(name: str) -> str | None:
    """What a file of weights, or an index of shards, is called without variant and suffix; None for other files.

    Pickles have the names that safetensors files have.
    """
    match = _WEIGHTS.fullmatch(name)
    if match is None or re.search(SHARD + "$", match[1]):
        return None
    names = {pickled: own for own, pickled in PICKLED.items()}
    return names.get(match[1], match[1]) if match[2] == "bin" else match[1]


_WEIGHTS = re.compile(
    r"(.+?)(?:\.(?:fp32|fp16|bf16|ema|non_ema))?\.(safetensors|bin|ckpt|pt|pth|gguf)(\.index(\.\w+)?\.json)?"
)


def component_file(names: Iterable[str], where: str, *, half: bool) -> str:
    """The file of weights of a folder that is one component, or the index of their shards: of its variants one is
    chosen. `where` is what messages call the folder. Raises SourceError where none or several are there.
    """
    names = sorted(names)
    stems = dict.fromkeys(filter(None, map(stem_of, names)))
    if not stems:
        raise SourceError(f"{where} has neither {INDEX} nor weights ({', '.join(SUFFIXES)})")
    usual = [stem for stem in (*STEMS.values(), "model") if stem in stems]
    for stem in usual[:1] or stems if usual or len(stems) == 1 else ():
        if (chosen := choose(names, stem, half=half)) is not None:
            return chosen
    for suffix in SUFFIXES:  # safetensors files before pickles
        files = [name for name in names if name.endswith(suffix)]
        if len(files) == 1:
            return files[0]
        if files:
            raise SourceError(f"{where} holds {len(files)} checkpoints: name one of {', '.join(files)}")
    raise SourceError(f"{where} has an index of shards, but not of one that is known: name it")


def folder_of(path: Path) -> Path:
    """A model's folder, where its model_index.json is named; any other path as it is."""
    return path.parent if path.name == INDEX and os.path.isfile(path) else path


def weight_file(names: Collection[str], component: str, *, half: bool) -> str | None:
    """Which of a model's files (`names`, relative to its folder) holds a component's weights, or the index of their
    shards; None where none does. Raises SourceError."""
    inside = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
    chosen = choose(inside, STEMS.get(component, "model"), half=half)
    return None if chosen is None else f"{component}/{chosen}"


def local_weights(path: Path, component: str, *, half: bool) -> list[Path]:
    """The weights' files of one component of a model folder, shards resolved. Raises SourceError."""
    folder = path / component
    names = [file.name for file in list_folder(folder)] if folder.is_dir() else []
    chosen = choose(names, STEMS.get(component, "model"), half=half)
    if chosen is None:
        stem = STEMS.get(component, "model")
        raise SourceError(f"{folder} holds no weights (expected {stem}.safetensors or {PICKLED.get(stem, stem)}.bin)")
    return located(folder / chosen)


def located(file: Path) -> list[Path]:
    """A file of weights, or the shards that it is the index of. Raises SourceError."""
    return shards(file) if file.suffix == ".json" else [file]


def shards(index: Path) -> list[Path]:
    """The files that an index of shards names, which must lie beside it and hold what it says. Raises SourceError."""
    weight_map = read_index(index)
    files = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    for name, path in files.items():
        if not path.is_file():
            raise SourceError(f"{index} names the shard {name}, which is missing: download it too, into {index.parent}")
    tensors = merge_headers({path: read_file(path) for path in files.values()})
    for key, name in weight_map.items():
        if key not in tensors or tensors[key][0] != files[name]:
            raise SourceError(f"{index} places {quote(key)} in {name}, which lacks it: download index and shards anew")
    return list(files.values())
