"""The audit of a source, and the comparison of two."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

from nativesd.checkpoints.reports import family_of, reports_of
from nativesd.errors import SourceError
from nativesd.models.build import expected
from nativesd.shipped import NAMED
from nativesd.weights.diff import DiffReport, Parameter, compare_parameters, parameters, unmapped
from nativesd.weights.files.locate import is_missing_file
from nativesd.weights.files.source import Member, open_source
from nativesd.weights.files.tensors import read_tensor
from nativesd.weights.identity.believed import parse_believed
from nativesd.weights.identity.identify import identify_all
from nativesd.weights.maps.keymap import load_tables
from nativesd.weights.report import AuditReport


def audit(
    source: str | Path, *, maps: str | Path | None = None, believed: str | None = None, revision: str | None = None
) -> AuditReport:
    """What is in a source and what every tensor of it becomes, from headers alone: no tensor is read, but for a
    LoRA's alphas, each one number.

    source    "tiny", a local file or model folder, a hub id, org/name/file.safetensors on the hub, or its URL
    maps      a folder of weight maps (*.toml) that add to the shipped ones or replace those of the same name
    believed  "family/layout" that the source is compared with, whatever it looks like: such as "SDXL/sgm", by the
              names that audits print
    revision  branch, tag or commit on the hub

    Raises SourceError for what cannot be read, NetworkError for the hub, UsageError for an argument that cannot be,
    TableError for a faulty table.
    """
    tables = load_tables(None if maps is None else Path(maps))
    identities = identify_all(
        find(source, revision=revision), tables, believed=None if believed is None else parse_believed(believed)
    )
    reports = [
        report
        for member, identity in identities
        for report in reports_of(
            member, identity, tables, expected, read=partial(_number, member) if member.files else None
        )
    ]
    return AuditReport(str(source), family_of(identities, reports), tuple(reports))


def _number(member: Member, key: str) -> float:
    return float(read_tensor(member, key))


def diff(source: str | Path, other: str | Path, *, values: bool = False, maps: str | Path | None = None) -> DiffReport:
    """What two checkpoints differ in, parameter by parameter, whatever their layouts.

    values  compare the tensors too: max|difference|, one parameter in memory at a time; local sources only

    Raises what `audit` raises.
    """
    tables = load_tables(None if maps is None else Path(maps))
    sides: list[tuple[dict[str, Parameter], dict[str, str]]] = []
    for side in (source, other):
        entries, unused = dict[str, Parameter](), dict[str, str]()
        for member, identity in identify_all(find(side), tables):
            for component in identity.components:
                for name, entry in parameters(member, component).items():
                    entries[f"{component.name}.{name}"] = entry
            unknown, beside = unmapped(member, identity)
            entries |= unknown
            unused |= beside
        sides.append((entries, unused))
    (first, one), (second, two) = sides
    return compare_parameters(str(source), str(other), first, second, values=values, unused=(one, two))


def find(source: str | Path, *, revision: str | None = None) -> list[Member]:
    """The checkpoints of a local or remote source, their headers read. Raises SourceError, NetworkError."""
    path = NAMED.get(str(source), Path(source))
    if os.path.exists(path):
        return open_source(path)
    if isinstance(source, Path) or not REMOTE.fullmatch(source) or is_missing_file(source):
        raise SourceError(f"{source} does not exist; a source is a file, a folder, a URL, or a hub id such as org/name")
    from nativesd.weights.files.remote import open_remote  # the hub's client is not needed for local files

    return open_remote(source, revision=revision)


REMOTE = re.compile(r"https?://.+|[A-Za-z0-9][\w.-]*/[\w.-]+(/.+\.(safetensors|ckpt|pt|pth|bin|gguf))?")
"""A URL, a hub id, or a file in a hub repository."""
