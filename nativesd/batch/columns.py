"""From a row to jobs: the columns that are a call's options, read and checked, and those that pass through.

The names are those of the call (`pipeline.arguments`), which also checks their values.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from nativesd.batch.files import Row, plain
from nativesd.batch.jobs import HASH_DIGITS, Job, digest, read_id, seed_of
from nativesd.diffusion.control import Control
from nativesd.diffusion.images.prompts import ImagePrompt
from nativesd.diffusion.prompting import SDXL
from nativesd.diffusion.regions import Region
from nativesd.diffusion.tiles import Tiles
from nativesd.errors import SourceError, UsageError, quote
from nativesd.pictures.images import read_image
from nativesd.pictures.soft import SoftInpaint
from nativesd.pipeline.asked.arguments import CallOptions, Checked, LoadOptions, check, readers_of
from nativesd.pipeline.asked.elsewhere import ELSEWHERE
from nativesd.pipeline.asked.hires import Hires
from nativesd.pipeline.asked.inputs import require_together
from nativesd.pipeline.asked.readers import Reader, flag, is_list, lora_use, shown, text, to_real, to_whole, whole
from nativesd.pipeline.asked.records import MOST_PICTURES, read_seed, record_of
from nativesd.reading import parse_json
from nativesd.sampling.options import Sampling
from nativesd.sampling.variation import SEEDS, Variation

OWN = ("id", "model", "prompt", "seed", "num_images")
PICTURES = ("image", "mask")
NO_COLUMNS = ("latents", "on_step", "refiner", "lora_dirs")
"""Options of a call that no cell can hold, or that are of a whole run."""
READERS: Mapping[str, Reader] = {n: r for n, r in readers_of(Checked).items() if n not in NO_COLUMNS}
DECLARED = (*OWN, *READERS)
HERE = Path()
RESULTS = ("file", "sha256", "bytes", "seconds", "error", "parameters", "finished")
"""What results have beside a job's own columns, and so no column may be called."""
LOADING = ("dtype", "prediction", "unet", "vae", "text_encoders", "maps", "fp8", "quantize")
"""Options of `nativesd.load` on which pictures depend; where and by what they are computed is no part of them."""
LIKE = 0.75
"""How alike a name is to a column's that is meant: "setps", "promt", but neither "task" nor "image_id"."""
MODELS = ("sd_model", "sd_model_name", "sd_model_checkpoint", "checkpoint", "ckpt", "ckpt_name")
"""What other programs call the column `model`."""
TRUTHS = {"true": True, "1": True, "false": False, "0": False}
JSON = ("{", "[")
LISTS = ("outpaint", "guidance", "savings")
"""Options that may be lists and are no records."""


def _bare(name: str) -> str:
    """A name without what programs write differently: "CFG scale", cfg-scale and cfgScale are cfg_scale."""
    return re.sub(r"[\W_]+", "", name.lower())


BARE = {_bare(name): name for name in DECLARED}
WHOLE_RUN = {_bare(name) for name in (*LoadOptions.__annotations__, *NO_COLUMNS)} - BARE.keys()
FOREIGN = {_bare(name): ours for name, ours in (*ELSEWHERE.items(), *((each, "model") for each in MODELS))}
"""By the bare names."""


@dataclass(frozen=True)
class Columns:
    """How the rows of a jobs file become jobs.

    model     of the rows that name none
    loading   options of `nativesd.load` on which pictures depend, as JSON has them
    defaults  options of a call for rows that do not state them, as JSON has them
    kept      columns that pass through although they look like an option
    reserved  what no column may be called
    """

    model: str = "tiny"
    loading: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    kept: Sequence[str] = ()
    reserved: Sequence[str] = RESULTS
    _fine: set[str] = field(default_factory=set, compare=False, repr=False)
    """Names that have been looked at."""

    def __post_init__(self) -> None:
        for name in self.kept:
            if name in DECLARED:
                raise UsageError(
                    f"{quote(name)} cannot be kept as it is: it is an option here; rename the column to pass it through"
                )
        check("", options_of({name: _read(name, value) for name, value in self.defaults.items()}, {}))

    def jobs(self, row: Row) -> list[Job]:
        """The jobs of a row: one, or `num_images` with ids and seeds that count up. Raises UsageError."""
        for name in row.cells.keys() - self._fine:
            self.require_meant(name)
        if "prompt" not in row.cells:
            raise UsageError(f"there is no column 'prompt': there is {', '.join(map(quote, row.cells)) or 'none'}")
        cells = {name: cell if row.texts else plain(cell) for name, cell in row.cells.items()}
        given = {name: cell for name, cell in cells.items() if cell is not None and not (row.texts and cell == "")}
        declared = {name: cell for name, cell in given.items() if name in DECLARED and name not in self.kept}
        extra = {name: cell for name, cell in given.items() if name not in declared}
        pictures = {
            name: _picture(name, declared[name]) for name in PICTURES if not isinstance(declared.get(name), str | None)
        }
        declared |= {name: _as_data(image) for name, image in pictures.items()}
        values = {name: _cell(name, cell) if row.texts else cell for name, cell in declared.items()}
        return self._made(values, extra, row.line, pictures)

    def _made(
        self, values: Mapping[str, Any], extra: Mapping[str, Any], line: int, pictures: Mapping[str, Any]
    ) -> list[Job]:
        stated = {name: value for name, value in values.items() if name not in OWN}
        options = {name: _read(name, value) for name, value in stated.items()}
        prompt = _words("prompt", values.get("prompt", ""))
        model = text("model", values.get("model", self.model))
        count = whole(1, MOST_PICTURES)("num_images", values.get("num_images", 1))
        seed = to_whole("seed", values.get("seed", -1))
        content = {
            **{name: value for name, value in extra.items() if isinstance(value, str | int | float)},
            **options,
            **{"prompt": prompt, "model": values.get("model"), "seed": seed, "num_images": count},
        }
        name = read_id(values["id"]) if "id" in values else digest(content)[:HASH_DIGITS]
        first = seed_of(name) if seed == -1 else read_seed(seed)
        if first + count > SEEDS:
            raise UsageError(f"seeds must be between 0 and 2^64 - 1, not {first + count - 1}")
        options = {**{name: _read(name, value) for name, value in self.defaults.items()}, **options}
        require_together(check(prompt, {**options_of(options, pictures), "seed": first}))
        return [
            Job(
                id=name if count == 1 else read_id(f"{name}-{i}"),
                seed=first + i,
                model=model,
                prompt=prompt,
                options=options,
                loading=self.loading,
                extra=extra,
                line=line,
                pictures=pictures,
            )
            for i in range(count)
        ]

    def require_meant(self, name: str) -> None:
        """Raise UsageError for a column that seems to be meant for another one, or that results have already."""
        if name in self.reserved:
            raise UsageError(f"the column {quote(name)} is what the results call something of their own: rename it")
        if name not in self.kept and name not in DECLARED:
            keep = f"or keep it as it is (--keep {name}, or a Painter's keep)"
            written, bare = re.sub(r"[\s-]+", "_", name.strip().lower()), _bare(name)
            if bare in WHOLE_RUN:
                raise UsageError(f"{quote(name)} is of a whole run, not of a row: take the column out, {keep}")
            if bare in FOREIGN:
                raise UsageError(f"there is no column {quote(name)}: here it is {FOREIGN[bare]}; rename it, {keep}")
            near = [
                each
                for each in DECLARED
                if each[0] == written[:1] and len(each) > 3 and abs(len(each) - len(written)) <= 1 + (len(each) > 6)
            ]
            if bare in BARE or (close := get_close_matches(written, near, 1, LIKE)):
                meant = BARE[bare] if bare in BARE else close[0]
                raise UsageError(f"there is no column {quote(name)}: did you mean {meant}? Rename it, {keep}")
        self._fine.add(name)


def said(loading: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Of the options of `nativesd.load`, and what is loaded `more`, what says which model it is, as JSON has it."""
    found = {name: loading[name] for name in LOADING if name in loading} | more
    found = {name: value for name, value in found.items() if value not in (None, (), [])}
    return {name: list(map(str, each)) if is_list(each) else str(each) for name, each in found.items()}


def options_of(options: Mapping[str, Any], pictures: Mapping[str, Any], folder: Path = HERE) -> CallOptions:
    """A job's options as a call takes them. Raises UsageError for a record that cannot be.

    folder  where the paths of pictures begin
    """
    made = {name: BUILT[name](name, value) if name in BUILT else value for name, value in options.items()}
    for name in PICTURES:
        if name in made:
            made[name] = _placed(made[name], folder)
    for name, fields in PLACED.items():
        made |= {name: [_all_placed(each, fields, folder) for each in made[name]]} if name in made else {}
    return cast("CallOptions", {**made, **pictures})


def _all_placed(record: Any, fields: Sequence[str], folder: Path) -> Any:
    return replace(record, **{field: _placed(getattr(record, field), folder) for field in fields})


def _placed(value: Any, folder: Path) -> Any:
    """A picture's path, or several, from where paths begin."""
    if isinstance(value, list):
        return [_placed(each, folder) for each in value]
    return folder / value if isinstance(value, str) else value


def _read(name: str, value: Any) -> Any:
    """An option's value: read where it is a number, a word or a flag, and else as JSON has it."""
    if name == "negative_prompt":
        return _words(name, value)
    if name in PLACED:
        return value if isinstance(value, list) else [value]
    if name in NUMBERED and not isinstance(value, Mapping):
        return to_real(name, value)
    if name in BUILT or name in PICTURES:
        return value
    read = READERS[name](name, value)
    return read if isinstance(read, str | int | float) else value


def _cell(name: str, cell: str) -> Any:
    """The value of a cell that is a text, as JSON has it."""
    if name in ("prompt", "negative_prompt", "id", "model"):
        return cell
    if name in (*BUILT, *LISTS) and cell.lstrip().startswith(JSON):
        try:
            return parse_json(f'{{"cell": {cell}}}'.encode(), name)["cell"]
        except SourceError as error:
            raise UsageError(str(error)) from None
    if name == "loras":
        use = lora_use(cell)
        return cell if use[0] == cell else [list(use)]
    if name == "outpaint":
        return [to_whole(name, side) for side in cell.split(",")]
    if READERS.get(name) is flag:
        if cell.strip().lower() not in TRUTHS:
            raise UsageError(f"{name} must be true or false, not {shown(cell)}")
        return TRUTHS[cell.strip().lower()]
    return cell


def _words(name: str, value: Any) -> str:
    """A text, of any length."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a text, not {shown(value)}")
    return value


def _picture(name: str, value: Any) -> Image.Image:
    """A picture that is no file's path: PIL's, an array, or the bytes of a file, as tables hold them."""
    if isinstance(value, Mapping):  # a column of pictures as the hub's data sets have it
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, Image.Image | np.ndarray | torch.Tensor | str | bytes):
        raise UsageError(f"{name} must be a picture or its file, not {shown(value)}")
    try:
        return read_image(value)
    except SourceError as error:
        raise UsageError(f"{name}: {error}") from None


def _as_data(image: Image.Image) -> dict[str, str]:
    """What stands for such a picture among a job's options."""
    return {"sha256": hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()}


def _loras(name: str, value: Any) -> list[Any]:
    """A file, or a list of files, [file, scale], [file, scale of the UNet's part, scale of the text encoders']."""
    return [tuple(each) if isinstance(each, list) else each for each in (value if isinstance(value, list) else [value])]


def _one(kind: type[Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: record_of(kind, name, value)


def _one_or_number(kind: type[Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: record_of(kind, name, value) if isinstance(value, Mapping) else value


def _several(kind: type[Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: [record_of(kind, name, each) for each in value]


def _controls(name: str, value: Any) -> list[Control]:
    """Controls, each with one picture: rows that are alike are painted together, and a row is one prompt."""
    controls = [record_of(Control, name, each) for each in value]
    for control in controls:
        if isinstance(control.image, list):
            raise UsageError(f"the picture of a {name} must be one in a row, not a list of {len(control.image)}")
    return controls


NUMBERED: Mapping[str, type[Any]] = {"hires": Hires, "tiles": Tiles}
"""Records, or a number that stands for one."""
BUILT: Mapping[str, Callable[[str, Any], Any]] = {
    "loras": _loras,
    **{name: _one_or_number(kind) for name, kind in NUMBERED.items()},
    "sdxl": _one(SDXL),
    "variation": _one(Variation),
    "sampling": _one(Sampling),
    "soft_inpaint": _one_or_number(SoftInpaint),
    "control": _controls,
    "regions": _several(Region),
    "image_prompts": _several(ImagePrompt),
}
"""What makes of JSON what a call takes."""
PLACED = {"control": ("image",), "regions": ("mask",), "image_prompts": ("picture", "mask")}
"""Of lists of records: the fields that are pictures, and so may be paths."""
