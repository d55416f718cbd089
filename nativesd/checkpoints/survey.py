"""Many files at once, a line each: what they are, for whom, and whether they are whole. Nothing here needs torch."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nativesd.checkpoints.reports import family_of, reports_of
from nativesd.config import Config
from nativesd.errors import NativesdError, SourceError, WeightsError
from nativesd.reading import list_folder
from nativesd.shipped import NAMED
from nativesd.weights.files.source import open_source
from nativesd.weights.identity.identify import identify_all
from nativesd.weights.identity.metadata import stated_text, trigger_words
from nativesd.weights.identity.words import TABLE
from nativesd.weights.lora.place import Place
from nativesd.weights.maps.keymap import KeyMap, load_tables
from nativesd.weights.maps.parameters import known_parameters
from nativesd.weights.maps.rules import Shape
from nativesd.weights.report import ComponentReport, as_json, lacking

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
SCHEMA = 1
"""Version of `Line.to_json`'s schema."""


@dataclass(frozen=True)
class Line:
    """What one source is. `ok` is false for what has findings, is not supported, or cannot be read (`error`)."""

    source: str
    kind: str = ""
    family: str = ""
    layout: str = ""
    dtype: str = ""
    bytes: int = 0
    words: tuple[str, ...] = ()
    """A LoRA's trigger words, by its metadata; the words that an embedding's file names"""
    title: str = ""
    base: str = ""
    """The model that it was made from, or is for, by its metadata"""
    licence: str = ""
    prediction: str = ""
    """What a UNet predicts, or an adapter's metadata says of it"""
    lacks: tuple[str, ...] = ()
    """What a model lacks for a picture, as the options of `load` that bring it"""
    ok: bool = False
    why: str = ""
    error: str = ""

    def to_json(self) -> str:
        """One line of JSON; of a source that cannot be read, its name and the error."""
        said = {"source": self.source, "ok": False, "error": self.error} if self.error else asdict(self)
        return as_json({"schema": SCHEMA, **said}, indent=None)


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """The sources that paths mean: files, model folders, patterns with *, and every file in folders of loose files.

    Sorted, each once. Raises SourceError for one that is nothing.
    """
    out: dict[Path, None] = {}
    for path in paths:
        named = NAMED.get(str(path), Path(path))
        found = (
            [named] if os.path.exists(named) else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        )
        if not found:
            raise SourceError(f"{path} does not exist, and no file has a name like it")
        for each in found:
            out |= dict.fromkeys(_loose(each) if each.is_dir() else [each])
    return sorted(out)


def _loose(folder: Path) -> Iterator[Path]:
    """What a folder holds: itself where it is a model, or one component with its config, else its files."""
    if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
        yield folder
        return
    try:
        entries = list_folder(folder)
    except SourceError:  # which is a line's text
        yield folder
        return
    for entry in entries:
        if entry.name.startswith("."):  # such as ._model.safetensors, which a Mac leaves beside a file
            continue
        if entry.is_dir():
            yield from _loose(entry)
        elif entry.suffix.lower() in SUFFIXES:  # a link to nothing, too: that is a line
            yield entry


def survey(paths: Iterable[str | Path], *, maps: str | Path | None = None) -> Iterator[Line]:
    """A line for every source that `paths` mean (`expand`), as each is read, sorted by name.

    Headers alone are read. A source that cannot be read is a line with its error. Raises SourceError for a path that is
    nothing, TableError for a faulty table.
    """
    tables = load_tables(None if maps is None else Path(maps))
    places: dict[Config, Place] = {}
    for path in expand(paths):
        try:
            yield _line(path, tables, places)
        except NativesdError as error:
            yield Line(str(path), error=str(error))


class _UnknownFormError(WeightsError):
    """A configuration that is not published, whose parameters only its module says."""


def _expected(config: Config) -> Mapping[str, Shape]:
    known = known_parameters(config)
    if known is None:
        raise _UnknownFormError("of its own form: audit it alone to compare it with its module")
    return known


def _line(path: Path, tables: Mapping[str, KeyMap], places: dict[Config, Place]) -> Line:
    found = identify_all(open_source(path), tables)
    reports: list[ComponentReport] = []
    note = ""
    for member, identity in found:
        try:
            reports += reports_of(member, identity, tables, _expected, known=places)
        except _UnknownFormError as unknown:
            note = str(unknown)
    names = [c.name for _, identity in found for c in identity.components]
    unsupported = next((i.unsupported for _, i in found if i.unsupported is not None), None)
    family = family_of(found, reports)
    metadata = {key: value for member, _ in found for key, value in member.metadata.items()}
    infos = [info for member, _ in found for info in member.tensors.values()]
    layouts = dict.fromkeys(c.layout for _, identity in found for c in identity.components)
    problems = [problem for report in reports for problem in report.short_problems(1)]
    said = [unsupported.says if unsupported else "", *problems[:1], note, *(report.unused for report in reports)]
    return Line(
        source=str(path),
        kind=unsupported.name if unsupported else _kind(names),
        family=family,
        layout="+".join(filter(None, layouts)),
        dtype="/".join(name for name, _ in Counter(info.dtype for info in infos).most_common(2)),
        bytes=sum(info.nbytes for info in infos),
        words=_words(reports) or trigger_words(metadata)[0],
        title=stated_text(metadata, "title")[0],
        base=stated_text(metadata, "base by its author")[0],
        licence=stated_text(metadata, "licence")[0],
        prediction=next((e.value for r in reports for e in r.evidence if e.what.startswith("prediction")), ""),
        lacks=lacking(names, family),
        ok=bool(names) and all(report.ok for report in reports),
        why=next(filter(None, said), ""),
    )


def _kind(names: Sequence[str]) -> str:
    """One word for what the components are together."""
    if "unet" in names and len(set(names)) > 1:
        return "model"
    return "+".join(dict.fromkeys(names)) or "unknown"


def _words(reports: Sequence[ComponentReport]) -> tuple[str, ...]:
    """The learnt words of textual inversions."""
    named = [e.value for r in reports if r.name == TABLE for e in r.evidence if e.what == "word"]
    return tuple(named) if named != ["the file's name"] else ()
