"""What makes a merged checkpoint, as one record: checked, read from TOML, and kept in what was made by it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nativesd.checkpoints.layouts import DTYPES, LAYOUTS
from nativesd.checkpoints.merging.blocks import parse_blocks
from nativesd.checkpoints.merging.methods import METHODS, How, Method
from nativesd.errors import SourceError, UsageError, quote, said_in
from nativesd.pipeline.asked.readers import Reader, is_list, is_path, real, whole
from nativesd.pipeline.asked.readers import shown as shown_value
from nativesd.pipeline.asked.readers import text as a_text
from nativesd.reading import parse_json, read_bounded
from nativesd.schema import REQUIRED, Field, either, many, mapping, number, one_of, read_fields, text
from nativesd.schema import whole as whole_number
from nativesd.weights.files.hashes import hash_file
from nativesd.weights.formats.container import SUFFIXES, read_file
from nativesd.weights.maps.grammar import parse_toml

KEY = "sd_merge_recipe"
"""Where A1111 and SuperMerger keep a recipe in a checkpoint's metadata, as JSON with a `type`."""
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
MOST = 100
"""Models in one merge."""
LARGEST = 1000.0
"""Alphas and weights, either way."""
MAX_RECIPE = 200_000
"""Bytes."""


@dataclass(frozen=True)
class Recipe:
    """What makes a merged checkpoint. None: the method's own."""

    sources: tuple[str, ...]
    method: str = "weighted-sum"
    alpha: float | None = None
    weights: tuple[float, ...] | None = None
    density: float | None = None
    seed: int = 0
    blocks: tuple[float, ...] | Mapping[str, float] | None = None
    only: tuple[str, ...] = ()
    unet: str | None = None
    vae: str | None = None
    text_encoders: tuple[str, ...] = ()
    layout: str | None = None
    dtype: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    """A source's name, for one in a folder with the file's path -> its SHA-256"""

    @property
    def how(self) -> Method:
        """Its method."""
        return METHODS[self.method]

    def settings(self) -> How:
        """What the method is told, with its own values where nothing is said."""
        count = len(self.sources)
        return How(
            alpha=(self.how.alpha or 0.0) if self.alpha is None else self.alpha,
            weights=self.weights or (1 / count,) * count,
            density=(self.how.density or 1.0) if self.density is None else self.density,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raises UsageError for what cannot be."""
        if self.method not in METHODS:
            raise UsageError(f"method must be one of {', '.join(METHODS)}, not {quote(self.method)}")
        method, count = self.how, len(self.sources)
        if not method.least <= count <= (method.most or MOST):
            most = f"at most {method.most or MOST}" if count > method.least else f"{method.least}"
            raise UsageError(f"{self.method} ({method.formula}) takes {most} models, not {count}")
        for name, value in (("alpha", self.alpha), ("density", self.density)):
            if value is not None and getattr(method, name) is None:
                raise UsageError(f"{self.method} has no {name}")
        if self.weights is not None:
            self._check_weights(self.weights)
        if self.blocks is not None and method.alpha is None:
            raise UsageError(f"{self.method} has no alpha, so no blocks have their own")
        if unknown := set(self.only) - set(PARTS):
            raise UsageError(f"only must be of {', '.join(PARTS)}, not {quote(sorted(unknown)[0])}")
        for name, word, known in (("layout", self.layout, LAYOUTS), ("dtype", self.dtype, tuple(DTYPES))):
            if word is not None and word not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, not {quote(word)}")

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if self.method != "sum":
            raise UsageError(f"{self.method} has no weights")
        if len(weights) != len(self.sources):
            raise UsageError(f"weights must be {len(self.sources)} numbers, one for each model, not {len(weights)}")
        if not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise UsageError(f"weights must add up to 1, not {sum(weights):g}: the result would be no model")

    def metadata(self, earlier: Iterable[Mapping[str, str]] = ()) -> dict[str, str]:
        """What is said of it in the checkpoint, as A1111 and ModelSpec name it, with what the sources' own metadata,
        `earlier`, says of what they were merged of; of paths as little as tells them apart."""
        usual = asdict(Recipe(()))
        said = {
            name: value
            for name, value in asdict(self.published()).items()
            if name in ("sources", "method") or value != usual[name]
        }
        names = [_without_suffix(self.names()[source]) for source in self.sources]
        models: dict[str, Any] = {}
        for each in earlier:
            models |= _merge_models(each.get("sd_merge_models", ""))
        models |= {sha: {"name": name} for name, sha in self.hashes.items()}
        return {
            KEY: json.dumps({"type": "nativesd", **said}, ensure_ascii=False),
            "sd_merge_models": json.dumps(models, ensure_ascii=False),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.merged_from": ", ".join(names),
        }

    def published(self) -> Recipe:
        """The same with names instead of paths."""
        return self.renamed(self.names().__getitem__)

    def renamed(self, name: Callable[[str], str]) -> Recipe:
        """The same with other names for the sources and the components from elsewhere."""
        return replace(
            self,
            sources=tuple(map(name, self.sources)),
            unet=None if self.unet is None else name(self.unet),
            vae=None if self.vae is None else name(self.vae),
            text_encoders=tuple(map(name, self.text_encoders)),
        )

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The sources of components that are not merged."""
        return tuple(filter(None, (self.unet, self.vae, *self.text_encoders)))

    def names(self) -> dict[str, str]:
        """How a recipe names everything that it is made of: what is local by its last name, and by the names of as many
        folders as tell it from the others; the rest as it is."""
        every = dict.fromkeys((*self.sources, *self.elsewhere))
        local = {each: Path(os.path.abspath(each)).parts[1:] for each in every if os.path.exists(each)}
        depth = dict.fromkeys(local, 1)
        while True:
            names = {each: "/".join(local[each][-depth[each] :]) if each in local else each for each in every}
            places: dict[str, set[str]] = {}
            for each, name in names.items():
                places.setdefault(name, set()).add("/".join(local.get(each, (each,))))
            alike = [each for each in local if len(places[names[each]]) > 1 and depth[each] < len(local[each])]
            if not alike:
                return names
            depth |= {each: depth[each] + 1 for each in alike}


def _merge_models(said: str) -> dict[str, Any]:
    """What a checkpoint says that it was merged of: its models by their SHA-256; {} where that is not to be read."""
    try:
        return parse_json(said.encode(), "sd_merge_models") if said else {}
    except SourceError:
        return {}


def _without_suffix(name: str) -> str:
    return str(Path(name).with_suffix("")) if name.endswith(SUFFIXES) else name


def recipe_of(sources: Any, **given: Any) -> Recipe:
    """A recipe of what a caller passes, or a file says, every value read and in its range. Raises UsageError.

    sources  the models; by name the other fields of a `Recipe`, None where nothing is said
    """
    if not is_list(sources) or not all(map(is_path, sources)):
        raise UsageError(f"sources must be several files, folders or hub ids, not {shown_value(sources)}")
    read = {name: READERS[name](name, value) for name, value in given.items() if value is not None}
    recipe = Recipe(tuple(map(str, sources)), **read)
    recipe.check()
    return recipe


def _several(reader: Reader) -> Reader:
    """Any number of values, as a tuple."""

    def read(name: str, value: Any) -> tuple[Any, ...]:
        if not is_list(value):
            raise UsageError(f"{name} must be a list, not {shown_value(value)}")
        return tuple(reader(name, each) for each in value)

    return read


def _source(name: str, value: Any) -> str:
    if not is_path(value):
        raise UsageError(f"{name} must be a file, a folder or a hub id, not {shown_value(value)}")
    return str(value)


def _blocks(name: str, value: Any) -> tuple[float, ...] | dict[str, float]:
    if not (isinstance(value, str | Mapping) or is_list(value)):
        raise UsageError(f"{name} must be numbers, or names with numbers, not {shown_value(value)}")
    blocks = parse_blocks(value)
    for amount in blocks.values() if isinstance(blocks, Mapping) else blocks:
        _AMOUNT(name, amount)
    return blocks


_AMOUNT = real(-LARGEST, LARGEST)
READERS: Mapping[str, Reader] = {
    "method": a_text, "alpha": _AMOUNT, "weights": _several(_AMOUNT), "density": real(0, 1, above=True),
    "seed": whole(0, (1 << 63) - 1), "blocks": _blocks, "only": _several(a_text), "unet": _source, "vae": _source,
    "text_encoders": _several(_source), "layout": a_text, "dtype": a_text, "hashes": lambda _, value: dict(value),
}  # fmt: skip
"""How every argument is read."""

_PATHS = many(text(4096), MOST, 0)
_NUMBERS = many(number(-LARGEST, LARGEST), MOST)
SCHEMA = (
    Field("type", one_of("nativesd"), "nativesd"),
    Field("sources", many(text(4096), MOST, 1), REQUIRED),
    Field("method", one_of(*METHODS)),
    Field("alpha", number(-LARGEST, LARGEST)),
    Field("weights", _NUMBERS),
    Field("density", number(0, 1)),
    Field("seed", whole_number(0, (1 << 63) - 1)),
    Field("blocks", either(_NUMBERS, mapping(number(-LARGEST, LARGEST), 1000), text(2000))),
    Field("only", many(one_of(*PARTS), len(PARTS), 0)),
    Field("unet", text(4096)),
    Field("vae", text(4096)),
    Field("text_encoders", _PATHS),
    Field("layout", one_of(*LAYOUTS)),
    Field("dtype", one_of(*DTYPES)),
    Field("hashes", mapping(text(64), 1000, text(4096))),
)
"""The fields of a recipe's file."""


def read_recipe(path: Path) -> Recipe:
    """A recipe: a TOML file, or a checkpoint that was made by one. What it names is looked for beside it first.

    Raises SourceError for what cannot be read, UsageError for what cannot be.
    """
    with said_in(str(path)):
        data = _from_toml(path) if path.suffix.lower() == ".toml" else _from_checkpoint(path)
        if unknown := set(data) - {each.name for each in SCHEMA}:
            raise UsageError(f"unknown field {quote(sorted(unknown)[0])}")
        read = read_fields(data, SCHEMA, str(path), UsageError)
        recipe = recipe_of(**{each.name: read[each.name] for each in fields(Recipe)})

    def found(name: str) -> str:
        beside = path.parent / name
        return str(beside) if os.path.exists(beside) else name

    return recipe.renamed(found)


def _from_toml(path: Path) -> dict[str, Any]:
    try:
        raw = read_bounded(path, MAX_RECIPE, "recipe").decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not text in UTF-8: {error}") from error
    return parse_toml(raw, str(path))


def _from_checkpoint(path: Path) -> dict[str, Any]:
    """Raises SourceError where a checkpoint says nothing of how it was merged."""
    files = sorted(path.rglob("*.safetensors")) if os.path.isdir(path) else [path]
    metadata = next((said for file in files if KEY in (said := read_file(file).metadata)), {})
    if KEY not in metadata:
        raise SourceError(f"{path} does not say that nativesd merged it: name a recipe's .toml file")
    return parse_json(metadata[KEY].encode(), f"{path}, {KEY}")


def source_hashes(name: str, place: Path, files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of the files of weights in a source's place, by the names that a recipe has for them."""
    return {
        name if file == place else f"{name}/{inside(file, place)}": hash_file(file).sha256 for file in files
    }  # fmt: skip


def inside(file: Path, place: Path) -> str:
    """A file's path in a folder; of one beside it the name."""
    return file.relative_to(place).as_posix() if file.is_relative_to(place) else file.name
