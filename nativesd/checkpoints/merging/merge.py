"""Checkpoints merged into one, in any layouts: parameter by parameter through the maps, with constant memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nativesd.checkpoints.layouts import DTYPES, SINGLE, check_target, write_model
from nativesd.checkpoints.merging.blocks import Given, alphas
from nativesd.checkpoints.merging.methods import How, Method, combine
from nativesd.checkpoints.merging.recipe import Recipe, read_recipe, recipe_of, source_hashes
from nativesd.checkpoints.sources import open_model, open_side, require_alike
from nativesd.config import UNetConfig
from nativesd.destination import fresh
from nativesd.errors import SourceError, UsageError, WeightsError
from nativesd.models.build import expected
from nativesd.weights.entries import Entry, each, is_finite, stored_parameters
from nativesd.weights.files.locate import locate_part
from nativesd.weights.maps.keymap import KeyMap, load_tables


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote: how many tensors, what became of what only some of the models have, and what was left out of
    the first one, with the reasons."""

    path: Path
    tensors: int
    choices: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)


def merge(
    sources: Sequence[str | Path] | None,
    dest: str | Path,
    *,
    method: str = "weighted-sum",
    alpha: float | None = None,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
    blocks: Given | None = None,
    only: Sequence[str] = (),
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoders: Sequence[str | Path] = (),
    layout: str | None = None,
    dtype: str | None = None,
    recipe: str | Path | None = None,
    maps: str | Path | None = None,
) -> Merged:
    """Write the merge of several models, or of one component of each, computed in float32, one parameter in memory.

    sources  files, model folders or hub ids, each in a layout of its own: A, B, C ... of the method's formula
    dest     the .safetensors or .gguf file ("ldm") or the folder ("diffusers") to write; it must not exist
    method   one of `methods.METHODS`, which say their formulas
    alpha    how much of the others; [the method's own]
    weights  with "sum": one for each model, adding up to 1 [all the same]
    density  with "ties", "dare" and "magnitude": the part of the differences that is kept, above 0 and at most 1
    seed     with "dare": what the part that is dropped is drawn by
    blocks   alphas of blocks: 26 numbers for SD1.x and SD2.x, 20 for SDXL, BASE first; or names with numbers, such as
             "IN00-IN03=0.2, M00=1", {"unet.down.0.*": 0.2, "text_encoder": 0}; the last that fits counts
    only     the components to merge ("unet", "text_encoder", "text_encoder_2", "vae"); the others are the first model's
    unet, vae, text_encoders  components of the result, instead of merged ones
    layout   "ldm" or "diffusers" [by dest]
    dtype    "f16", "bf16" or "f32" [as the first model has it]
    recipe   a .toml file with all of this, or a checkpoint that `merge` wrote: made again, and nothing else is said

    Of an inpainting or editing model, which must be the first, the channels are merged that the others have; the rest
    stays. The result says in its metadata how it was made. Raises UsageError, SourceError, WeightsError, NetworkError.
    """
    if recipe is not None:
        if sources:
            raise UsageError("a recipe names its models: pass no others beside recipe=")
        asked = read_recipe(Path(recipe))
    else:
        asked = recipe_of(
            sources if sources is not None else (), method=method, alpha=alpha, weights=weights, density=density,
            seed=seed, blocks=blocks, only=only, unet=unet, vae=vae, text_encoders=text_encoders, layout=layout,
            dtype=dtype,
        )  # fmt: skip
    path = Path(dest)
    asked = replace(asked, layout=asked.layout or ("ldm" if path.suffix in SINGLE else "diffusers"))
    assert asked.layout is not None  # said above
    check_target(path, asked.layout, asked.dtype)
    tables = load_tables(None if maps is None else Path(maps))
    with fresh(path) as temporary:
        return _merge(asked, temporary, path, tables)


def _merge(recipe: Recipe, out: Path, dest: Path, tables: Mapping[str, KeyMap]) -> Merged:
    first, *others = recipe.sources
    hashes: dict[str, str] = {}
    sides = [open_side(source, tables) for source in others]
    model, ignored, given = open_model(
        first, tables, unet=recipe.unet, vae=recipe.vae, text_encoders=recipe.text_encoders,
        others=[part for side in sides for part in side.parts.values()],
    )  # fmt: skip
    own = open_side(first, tables)
    names = recipe.names()
    for side in (own, *sides):
        hashes |= source_hashes(names[side.name], side.place, side.files)
    used = {file for name in given for file in model.parts[name][0].data_starts}
    for source in recipe.elsewhere:
        place = locate_part(source)
        files = [file for file in used if file == place or file.is_relative_to(place)]
        hashes |= source_hashes(names[source], place, sorted(files))
    _check_hashes(recipe, hashes)
    choices: dict[str, str] = {}
    for name in model.parts.keys() - given - own.parts.keys() - {"tiny_vae"}:
        giver = next((side.name for side in sides if name in side.parts), None)
        if giver is not None:
            choices[name] = f"{first} has none: that of {giver} is taken"
    for side in reversed(sides):  # where the first model is one component alone
        for name in side.parts.keys() - model.parts.keys():
            choices[name] = f"{first} has none: that of {side.name} is left out"
    require_alike(own, sides)
    plain_names = {
        name: list(expected(component.config)) for name, (_, component) in model.parts.items() if component.config
    }
    config = model.parts["unet"][1].config if "unet" in model.parts else None
    how = recipe.settings()
    if lacking := [name for name in recipe.only if name not in model.parts]:
        raise UsageError(f"only: {first} has no {lacking[0]}, but {', '.join(model.parts)}")
    asked_for = [name for name in model.parts if name not in given and (not recipe.only or name in recipe.only)]
    unet_config = config if isinstance(config, UNetConfig) else None
    amounts = alphas(recipe.blocks or {}, how.alpha, unet_config, plain_names, asked_for)
    named: dict[str, dict[str, Entry]] = {}
    for name, (member, component) in model.parts.items():
        assert component.config is not None  # a model's components have modules
        entries, left_out = stored_parameters(member, component, expected(component.config))
        ignored = {**ignored, **left_out}
        lacking = [side.name for side in sides if name not in side.parts]
        if name in given or name in choices or (recipe.only and name not in recipe.only):
            named[name] = entries
        elif lacking:
            choices[name] = f"{lacking[0]} has none: that of {first} is kept"
            named[name] = entries
        else:
            models = [side.parameters(name) for side in sides]
            wanted = None if recipe.dtype is None else DTYPES[recipe.dtype]
            part = _Part(name, recipe.how, how, amounts, wanted, (first, *(side.name for side in sides)))
            named[name] = part.merged(entries, models, choices)
    if not any(name in side.parts for side in sides for name in named):
        raise UsageError(f"{first} and {others[0]} have no component in common, so there is nothing to merge")
    earlier = [member.metadata for side in (*sides, own) for member, _ in side.parts.values()]
    said = replace(recipe, hashes=hashes).metadata(earlier)
    assert recipe.layout is not None  # `merge` says it
    marked, count = write_model(model, named, out, dest, layout=recipe.layout, dtype=recipe.dtype, metadata=said)
    return Merged(dest, count, choices, {key: reason for key, reason in ignored.items() if key not in marked})


def _check_hashes(recipe: Recipe, found: Mapping[str, str]) -> None:
    """Raises SourceError where a file is not the one that a recipe was made with."""
    for name, sha in recipe.hashes.items():
        if name not in found:
            raise SourceError(f"the models have no file {name}, which the recipe was made with")
        if found[name] != sha:
            raise SourceError(
                f"{name} is not the file that the recipe was made with: its SHA-256 begins with {found[name][:10]}, "
                f"that of the recipe's with {sha[:10]}"
            )


@dataclass(frozen=True)
class _Part:
    """One component as it is merged."""

    name: str
    method: Method
    how: How
    amounts: Mapping[tuple[str, str], float]
    dtype: torch.dtype | None
    sources: tuple[str, ...]

    def merged(
        self, own: Mapping[str, Entry], models: Sequence[Mapping[str, Entry]], choices: dict[str, str]
    ) -> dict[str, Entry]:
        """The component's parameters; what only some of the models have goes into `choices`."""
        out = {}
        for name, entry in own.items():
            path = f"{self.name}.{name}"
            alpha = self.amounts[self.name, name]
            others = [model[name] for model in models if name in model]
            if len(others) < len(models):
                lacking = next(s for s, model in zip(self.sources[1:], models, strict=True) if name not in model)
                choices[path] = f"{lacking} has none: that of {self.sources[0]} is kept"
                out[name] = entry
            elif alpha == 0 and self.method.begins_with_a:
                out[name] = each(entry.dtype, entry.shape, [entry], partial(self._copied, path, self.sources[0]))
            elif alpha == 1 and self.method.ends_in_b and others[0].shape == entry.shape:
                out[name] = each(entry.dtype, entry.shape, others, partial(self._copied, path, self.sources[1]))
            else:
                kind = entry.dtype if self.dtype is None else self.dtype
                how, entries = replace(self.how, alpha=alpha, name=path), [entry, *others]
                if self.method.by_element and all(other.shape == entry.shape for other in others):
                    out[name] = each(kind, entry.shape, entries, partial(self._combined, how, kind))
                else:
                    out[name] = Entry(kind, entry.shape, partial(self._whole, how, kind, entries))
        for source, model in zip(self.sources[1:], models, strict=True):
            for name in model.keys() - own.keys():
                choices[f"{self.name}.{name}"] = f"{self.sources[0]} has none: that of {source} is left out"
        return out

    @staticmethod
    def _copied(name: str, source: str, tensors: Sequence[Tensor]) -> Tensor:
        """One parameter, or a piece of it, as it is. Raises WeightsError where it is not finite."""
        [tensor] = tensors
        if not is_finite(tensor):
            raise WeightsError(f"{name} of {source} holds values that are not finite: nothing is written")
        return tensor

    def _combined(self, how: How, dtype: torch.dtype, models: Sequence[Tensor]) -> Tensor:
        """One merged parameter, or a piece of it. Raises WeightsError where it is not finite."""
        out = combine(self.method, models, how, dtype)
        if not is_finite(out):
            for source, model in zip(self.sources, models, strict=True):
                self._copied(how.name, source, [model])
            raise WeightsError(
                f"{how.name} would not be finite in {str(dtype)[6:]}: an alpha or a weight is too large, or choose "
                "another dtype"
            )
        return out

    def _whole(self, how: How, dtype: torch.dtype, entries: Sequence[Entry]) -> Tensor:
        """One merged parameter; of the first model's channels those stay that others lack."""
        models = [entry.make() for entry in entries]
        first = models[0]
        if all(model.shape == first.shape for model in models):
            return self._combined(how, dtype, models)
        channels = min(model.shape[1] for model in models)
        out = self._combined(how, dtype, [model[:, :channels] for model in models])
        return torch.cat([out, first[:, channels:].to(dtype)], 1)
