"""Models in the published folder layout: model_index.json, and a folder with config and weights for every component."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nativesd.errors import SourceError, quote
from nativesd.weights.formats.container import read_file
from nativesd.weights.formats.header import merge_headers, read_index

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
PICKLED = {"model": "pytorch_model"}
"""What `.bin` files are called, where not as `.safetensors` files."""


def weight_files(names: Collection[str], component: str, *, half: bool) -> list[str] | None:
    """Which of a model's files (`names`, relative to its folder) hold a component's weights; None where none do.

    An index stands for its shards and is the only entry then. Plain files are preferred, or, for `half` precision,
    the fp16 variant; the other is taken where there is only that. safetensors files go before pickles.
    """
    own = STEMS.get(component, "model")
    for stem, suffix in ((own, ".safetensors"), (PICKLED.get(own, own), ".bin")):
        plain = [f"{stem}{suffix}", f"{stem}{suffix}.index.json"]
        fp16 = [f"{stem}.fp16{suffix}", f"{stem}{suffix}.index.fp16.json", f"{stem}.fp16{suffix}.index.json"]
        for name in fp16 + plain if half else plain + fp16:
            if f"{component}/{name}" in names:
                return [f"{component}/{name}"]
    return None


def local_weights(path: Path, component: str, *, half: bool) -> list[Path]:
    """The weights' files of one component of a model folder, shards resolved. Raises SourceError."""
    folder = path / component
    names = {f"{component}/{file.name}" for file in folder.glob("*")} if folder.is_dir() else set()
    chosen = weight_files(names, component, half=half)
    if chosen is None:
        stem = STEMS.get(component, "model")
        raise SourceError(f"{folder} holds no weights (expected {stem}.safetensors or {PICKLED.get(stem, stem)}.bin)")
    first = path / chosen[0]
    return shards(first) if first.suffix == ".json" else [first]


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
