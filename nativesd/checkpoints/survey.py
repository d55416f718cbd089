"""Many files at once, a line each: what they are, for whom, and whether they are whole. Nothing here needs torch."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nativesd.config import Config
from nativesd.errors import NativesdError, SourceError, WeightsError
from nativesd.shipped import NAMED
from nativesd.weights.audit import ComponentReport, report_components
from nativesd.weights.files.source import Member, open_source
from nativesd.weights.lora.audit import report_lora
from nativesd.weights.lora.place import Place
from nativesd.weights.maps.identify import Identity, identify_all
from nativesd.weights.maps.keymap import KeyMap, load_tables
from nativesd.weights.maps.parameters import known_parameters
from nativesd.weights.maps.rules import Shape

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
    """A LoRA's or an embedding's trigger words, by its metadata."""
    title: str = ""
    licence: str = ""
    lacks: tuple[str, ...] = ()
    """What a model lacks for a picture, as the options of `load` that bring it"""
    ok: bool = False
    why: str = ""
    error: str = ""

    def to_json(self) -> str:
        """One line of JSON; of a source that cannot be read, its name and the error."""
        if self.error:
            return json.dumps({"schema": SCHEMA, "source": self.source, "ok": False, "error": self.error})
        return json.dumps({"schema": SCHEMA, **asdict(self)}, ensure_ascii=False)


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """The sources that paths mean: files, model folders, patterns with *, and every file in folders of loose files.

    Sorted, each once. Raises SourceError for one that is nothing.
    """
    out: dict[Path, None] = {}
    for path in paths:
        named = NAMED.get(str(path), Path(path))
        found = [named] if named.exists() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
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
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _loose(entry)
        elif entry.is_file() and entry.suffix.lower() in SUFFIXES:
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
            own = report_components(identity, member.tensors, _expected)
            reports += [_of_lora(report, member, identity, tables, places) for report in own]
        except _UnknownFormError as unknown:
            note = str(unknown)
    names = [c.name for _, identity in found for c in identity.components]
    unsupported = next((i.unsupported for _, i in found if i.unsupported is not None), None)
    family = next((label for _, i in found if (label := i.label())), "") or next((r.family for r in reports), "")
    metadata = {key: value for member, _ in found for key, value in member.metadata.items()}
    infos = [info for member, _ in found for info in member.tensors.values()]
    layouts = dict.fromkeys(c.layout for _, identity in found for c in identity.components)
    problems = [problem for report in reports for problem in report.short_problems(1)]
    return Line(
        source=str(path),
        kind=unsupported.name if unsupported else _kind(names),
        family=family,
        layout="+".join(filter(None, layouts)),
        dtype="/".join(name for name, _ in Counter(info.dtype for info in infos).most_common(2)),
        bytes=sum(info.nbytes for info in infos),
        words=_words(metadata),
        title=metadata.get("modelspec.title", metadata.get("ss_output_name", "")),
        licence=metadata.get("modelspec.license", ""),
        lacks=_lacks(names, family),
        ok=bool(names) and all(report.ok for report in reports),
        why=(unsupported.says if unsupported else "") or (problems[0] if problems else note),
    )


def _of_lora(
    report: ComponentReport,
    member: Member,
    identity: Identity,
    tables: Mapping[str, KeyMap],
    places: dict[Config, Place],
) -> ComponentReport:
    """A LoRA's report with the base that it fits; any other as it is."""
    keys = [key for c in identity.components if c.name == report.name == "lora" for key in c.found.keys]
    if not keys:
        return report
    return report_lora(report, {key: member.tensors[key] for key in keys}, tables, _expected, None, places)


def _kind(names: Sequence[str]) -> str:
    """One word for what the components are together."""
    if "unet" in names and len(set(names)) > 1:
        return "model"
    return "+".join(dict.fromkeys(names)) or "unknown"


def _lacks(names: Sequence[str], family: str) -> tuple[str, ...]:
    """The options that bring what a UNet lacks for a picture."""
    if "unet" not in names:
        return ()
    encoders = 2 if family.startswith("SDXL") and "refiner" not in family else 1
    out = [] if {"vae", "tiny_vae"} & set(names) else ["vae"]
    return (*out, *(["text_encoders"] if sum(name.startswith("text_encoder") for name in names) < encoders else []))


def _words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Trigger words: what the file says they are, or the tags that its training pictures had most often."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return tuple(word.strip() for word in phrase.split(",") if word.strip())
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(number) for tag, number in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return ()
    return tuple(tag for tag, _ in counts.most_common(3))
