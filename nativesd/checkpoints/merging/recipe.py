"""What makes a merged checkpoint, as one record: checked, read from TOML, and kept in what was made by it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nativesd.checkpoints.layouts import DTYPES, LAYOUTS
from nativesd.checkpoints.merging.blocks import parse_blocks
from nativesd.checkpoints.merging.methods import METHODS, How, Method
from nativesd.errors import SourceError, UsageError, quote
from nativesd.reading import parse_json, read_bounded
from nativesd.schema import REQUIRED, Field, either, many, mapping, number, one_of, read_fields, text, whole
from nativesd.weights.files.hashes import hash_file
from nativesd.weights.formats.container import read_file
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
        if self.alpha is not None and not abs(self.alpha) <= LARGEST:  # NaN, too
            raise UsageError(f"alpha must be a number from {-LARGEST:g} to {LARGEST:g}, not {self.alpha}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"density must be a number above 0 and at most 1, not {self.density}")
        if self.weights is not None:
            self._check_weights(self.weights)
        if self.blocks is not None and method.alpha is None:
            raise UsageError(f"{self.method} has no alpha, so no blocks have their own")
        for value in self.blocks.values() if isinstance(self.blocks, Mapping) else self.blocks or ():
            if not abs(value) <= LARGEST:
                raise UsageError(f"blocks must be numbers from {-LARGEST:g} to {LARGEST:g}, not {value}")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed must be between 0 and 2^63 - 1, not {self.seed}")
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
        if not all(abs(weight) <= LARGEST for weight in weights):
            raise UsageError(f"weights must be numbers from {-LARGEST:g} to {LARGEST:g}, not {weights}")
        if not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise UsageError(f"weights must add up to 1, not {sum(weights):g}: the result would be no model")

    def metadata(self) -> dict[str, str]:
        """What is said of it in the checkpoint, as A1111 and ModelSpec name it; of paths nothing but the last name."""
        usual = asdict(Recipe(()))
        said = {
            name: value
            for name, value in asdict(self.published()).items()
            if name in ("sources", "method") or value != usual[name]
        }
        names = [Path(source).stem for source in self.sources]
        models = {sha: {"name": name} for name, sha in self.hashes.items()}
        return {
            KEY: json.dumps({"type": "nativesd", **said}, ensure_ascii=False),
            "sd_merge_models": json.dumps(models, ensure_ascii=False),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.merged_from": ", ".join(names),
        }

    def published(self) -> Recipe:
        """The same with names instead of paths."""
        return replace(
            self,
            sources=tuple(map(shown, self.sources)),
            unet=None if self.unet is None else shown(self.unet),
            vae=None if self.vae is None else shown(self.vae),
            text_encoders=tuple(map(shown, self.text_encoders)),
        )


def shown(source: str) -> str:
    """How a recipe names a source: a local one by its last name, others as they are."""
    return Path(os.path.abspath(source)).name if Path(source).exists() else source


_WORDS = many(text(), MOST, 0)
_NUMBERS = many(number(-LARGEST, LARGEST), MOST)
SCHEMA = (
    Field("type", one_of("nativesd"), "nativesd"),
    Field("sources", many(text(), MOST, 1), REQUIRED),
    Field("method", one_of(*METHODS), "weighted-sum"),
    Field("alpha", number(-LARGEST, LARGEST)),
    Field("weights", _NUMBERS),
    Field("density", number(0, 1)),
    Field("seed", whole(0, (1 << 63) - 1), 0),
    Field("blocks", either(_NUMBERS, mapping(number(-LARGEST, LARGEST), 1000), text(2000))),
    Field("only", _WORDS, ()),
    Field("unet", text()),
    Field("vae", text()),
    Field("text_encoders", _WORDS, ()),
    Field("layout", one_of(*LAYOUTS)),
    Field("dtype", one_of(*DTYPES)),
    Field("hashes", mapping(text(64), 1000), {}),
)
"""The fields of a recipe's file."""


def read_recipe(path: Path) -> Recipe:
    """A recipe: a TOML file, or a checkpoint that was made by one. What it names is looked for beside it first.

    Raises SourceError for what cannot be read, UsageError for what cannot be.
    """
    data = _from_toml(path) if path.suffix.lower() == ".toml" else _from_checkpoint(path)
    if unknown := set(data) - {each.name for each in SCHEMA}:
        raise UsageError(f"{path}: unknown field {quote(sorted(unknown)[0])}")
    read = read_fields(data, SCHEMA, str(path), UsageError)
    blocks = read["blocks"]
    recipe = Recipe(**{each.name: read[each.name] for each in fields(Recipe)})
    if isinstance(blocks, str):
        recipe = replace(recipe, blocks=parse_blocks(blocks))

    def found(name: str) -> str:
        beside = path.parent / name
        return str(beside) if beside.exists() else name

    return replace(
        recipe,
        sources=tuple(map(found, recipe.sources)),
        unet=None if recipe.unet is None else found(recipe.unet),
        vae=None if recipe.vae is None else found(recipe.vae),
        text_encoders=tuple(map(found, recipe.text_encoders)),
    )


def _from_toml(path: Path) -> dict[str, Any]:
    try:
        raw = read_bounded(path, MAX_RECIPE, "recipe").decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not text in UTF-8: {error}") from error
    return parse_toml(raw, str(path))


def _from_checkpoint(path: Path) -> dict[str, Any]:
    """Raises SourceError where a checkpoint says nothing of how it was merged."""
    metadata = read_file(path).metadata
    if KEY not in metadata:
        raise SourceError(f"{path} does not say that nativesd merged it: name a recipe's .toml file")
    return parse_json(metadata[KEY].encode(), f"{path}, {KEY}")


def source_hashes(source: str, place: Path, files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of a source's files of weights, by the names that a recipe has for them."""
    name = shown(source)
    return {
        name if file == place else f"{name}/{file.relative_to(place).as_posix()}": hash_file(file).sha256
        for file in files
    }
