"""The audit: what every tensor of a checkpoint becomes and why it does not load, by the tables that the loader uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from nativesd.config import Config
from nativesd.weights.formats.header import TensorInfo
from nativesd.weights.identity.evidence import Evidence
from nativesd.weights.identity.identify import Component, Identity
from nativesd.weights.identity.words import TABLE, find_words
from nativesd.weights.maps.keymap import BoundMap
from nativesd.weights.maps.plan import make_plan, unfit
from nativesd.weights.maps.rules import Shape, Source
from nativesd.weights.names import nearest
from nativesd.weights.report import (
    ComponentReport,
    Duplicate,
    Ignored,
    Mapped,
    Missing,
    Unexpected,
    WrongShape,
)

Expected = Callable[[Config], Mapping[str, Shape]]
"""The parameters of the module that a configuration describes, with their shapes."""


def report_components(
    identity: Identity, tensors: Mapping[str, TensorInfo], expected: Expected
) -> list[ComponentReport]:
    """Compare every component of a checkpoint with its module, and account for every other key."""
    reports = [_report(component, tensors, expected) for component in identity.components]
    unknown = identity.unrecognised
    if identity.unsupported is not None:
        what = identity.unsupported
        reports.append(_beside(what.name, _sums(unknown, tensors), (), (), what.says))
        unknown = []
    if identity.ignored or unknown:
        unexpected = tuple(
            Unexpected(key, tensors[key].shape, tensors[key].dtype, "no component of any known layout has this name")
            for key in unknown
        )
        name = "beside the components" if reports else "unrecognised"
        ignored = tuple(Ignored(key, reason) for key, reason in identity.ignored.items())
        keys = [key for key in (*identity.ignored, *unknown) if key in tensors]  # a pickle's leavings are no tensors
        reports.append(_beside(name, _sums(keys, tensors), ignored, unexpected))
    if not tensors:
        reports.append(_beside("nothing", _sums((), tensors), (), (), "a file without a tensor"))
    return reports


def _beside(
    name: str,
    sums: dict[str, Any],
    ignored: tuple[Ignored, ...],
    unexpected: tuple[Unexpected, ...],
    unsupported: str = "",
) -> ComponentReport:
    """A report of keys that are no component."""
    return ComponentReport(
        name, "", "", "", **sums, expected=0, mapped=(), ignored=ignored, missing=(), unexpected=unexpected,
        wrong_shape=(), duplicate=(), unsupported=unsupported,
    )  # fmt: skip


def _sums(keys: Iterable[str], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The totals over some keys."""
    infos = [tensors[key] for key in keys]
    return {
        "tensors": len(infos),
        "parameters": sum(info.elements for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(Counter(info.dtype for info in infos).most_common()),
    }


def _report(component: Component, tensors: Mapping[str, TensorInfo], expected: Expected) -> ComponentReport:
    found, table = component.found, component.table
    sums = _sums(found.keys, tensors)
    head = (component.name, component.family, component.layout, found.prefix)
    if component.config is None:
        return _named(component, tensors, ComponentReport(
            *head, **sums, expected=0, mapped=(), ignored=(), missing=(), unexpected=(), wrong_shape=(), duplicate=(),
            evidence=component.evidence, unused=table.keymap.unused,
        ))  # fmt: skip
    return compare(
        table, {key: tensors[key] for key in found.keys}, expected(component.config), head, component.evidence
    )


def _named(component: Component, tensors: Mapping[str, TensorInfo], report: ComponentReport) -> ComponentReport:
    """The report of what has names and no module: what each key is, and of a textual inversion what cannot be read."""
    found, table = component.found, component.table
    words = None
    if component.name == TABLE:
        own = {key: tensors[key] for key in found.keys}
        shapes, dtypes = ({key: getattr(info, part) for key, info in own.items()} for part in ("shape", "dtype"))
        words = find_words(shapes, table.keymap, dtypes)
    faults = {key: reason for key in found.keys if (reason := _no_weight(tensors[key])) is not None}
    faults |= {} if words is None else words.faults
    mapped = tuple(
        Mapped(meaning, (key,), tensors[key].shape, "name", table.keymap.name, 0)
        for key in found.keys
        if key not in faults and (meaning := table.describe(key)) is not None
    )
    ignored = {key: reason for key in found.keys if (reason := table.reason_to_ignore(key)) is not None}
    return replace(
        report,
        expected=len(mapped) + len(faults),
        mapped=mapped,
        ignored=tuple(Ignored(key, reason) for key, reason in ignored.items()),
        unexpected=tuple(
            Unexpected(key, tensors[key].shape, tensors[key].dtype, reason) for key, reason in faults.items()
        ),
    )


def _no_weight(info: TensorInfo) -> str | None:
    """Why a tensor is no weight, whatever its name; None where nothing says so."""
    return unfit(info.dtype) or (None if info.elements else "it has no numbers")


def compare(
    table: BoundMap,
    tensors: Mapping[str, TensorInfo],
    parameters: Mapping[str, Shape],
    head: tuple[str, str, str, str],
    evidence: tuple[Evidence, ...] = (),
) -> ComponentReport:
    """Account for every tensor and every parameter of one component; `head` is its name, family, layout and prefix."""
    shapes, dtypes = ({key: getattr(info, part) for key, info in tensors.items()} for part in ("shape", "dtype"))
    plan = make_plan(table, shapes, parameters, dtypes)
    near = nearest({key for keys in plan.missing.values() for key in keys}, plan.unexpected, table.words)
    back = {key: (name, hint) for name, (key, hint) in near.items()}
    missing: dict[tuple[str, ...], Missing] = {}
    for name, keys in plan.missing.items():
        found, hint = next((near[key] for key in keys if key in near), ("", ""))
        known = missing.get(keys) if keys else None
        joined = f"{known.parameter} + {name}" if known else name
        missing[keys or (name,)] = Missing(joined, parameters[name], keys, found, hint)
    wrong: dict[tuple[str, ...], WrongShape] = {}
    for name, source in plan.wrong_shape.items():
        joined = f"{wrong[source.keys].parameter} + {name}" if source.keys in wrong else name
        shape, wanted = tensors[source.keys[0]].shape, source.published_shape(parameters[name])
        wrong[source.keys] = WrongShape(joined, source.keys, shape, wanted, source.rule.table, source.rule.number)
    return ComponentReport(
        *head,
        **_sums(tensors, tensors),
        expected=len(parameters),
        mapped=tuple(_mapped(name, source, parameters[name], tensors) for name, source in plan.sources.items()),
        ignored=tuple(Ignored(key, reason) for key, reason in plan.ignored.items()),
        missing=tuple(missing.values()),
        unexpected=tuple(
            Unexpected(
                key,
                tensors[key].shape,
                tensors[key].dtype,
                f"would be {', '.join(names)}, which this model lacks" if names else "no rule names it",
                *back.get(key, ("", "")),
            )
            for key, names in plan.unexpected.items()
        )
        + tuple(
            Unexpected(key, tensors[key].shape, tensors[key].dtype, unfit(tensors[key].dtype) or "")
            for key in plan.quantised
        ),
        wrong_shape=tuple(wrong.values()),
        duplicate=tuple(Duplicate(name, keys) for name, keys in plan.duplicate.items()),
        evidence=evidence,
    )


def _mapped(name: str, source: Source, shape: Shape, tensors: Mapping[str, TensorInfo]) -> Mapped:
    """With the scales of what is in scaled float8 among its keys."""
    operation = source.rule.op
    scales = tuple(tensors[key].scale for key in source.keys if tensors[key].scale)
    part = f" {source.part + 1} of {source.parts}" if operation == "split" else ""
    more = ", scaled" if scales else ""
    return Mapped(name, source.keys + scales, shape, operation + part + more, source.rule.table, source.rule.number)
