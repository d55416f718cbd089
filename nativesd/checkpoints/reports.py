"""The reports of one checkpoint: its components, a LoRA with its base, and what the file says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from nativesd.config import Config
from nativesd.weights.audit import Expected, report_components
from nativesd.weights.files.source import Member
from nativesd.weights.identity.identify import Identity
from nativesd.weights.identity.metadata import metadata_evidence
from nativesd.weights.lora.audit import report_lora
from nativesd.weights.lora.place import Place
from nativesd.weights.maps.keymap import KeyMap
from nativesd.weights.report import ComponentReport


def reports_of(
    member: Member,
    identity: Identity,
    tables: Mapping[str, KeyMap],
    expected: Expected,
    *,
    read: Callable[[str], float] | None = None,
    known: dict[Config, Place] | None = None,
) -> list[ComponentReport]:
    """Everything about a checkpoint; `read` and `known` are those of `report_lora`."""
    reports = report_components(identity, member.tensors, expected)
    lora = [key for component in identity.components if component.name == "lora" for key in component.found.keys]
    own = {key: member.tensors[key] for key in lora}
    reports = [
        report_lora(report, own, tables, expected, read, known, member.metadata) if report.name == "lora" else report
        for report in reports
    ]
    if reports and (said := metadata_evidence(member.metadata)):
        reports[0] = replace(reports[0], evidence=(*reports[0].evidence, *said))
    return reports


def family_of(identities: Iterable[tuple[Member, Identity]], reports: Iterable[ComponentReport]) -> str:
    """The family of a whole source: its UNet's, or that of its first component that has one."""
    labels = [label for _, identity in identities if (label := identity.label())]
    return next(iter(labels), "") or next((report.family for report in reports if report.family), "")
