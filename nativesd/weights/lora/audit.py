"""What a LoRA touches and which base it fits, from its header: the report that the audit shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from nativesd.config import Config
from nativesd.weights.audit import Expected
from nativesd.weights.formats.header import TensorInfo
from nativesd.weights.identity.describe import FAMILIES
from nativesd.weights.identity.evidence import Evidence
from nativesd.weights.identity.metadata import stated_family
from nativesd.weights.lora.bases import Fit, fits
from nativesd.weights.lora.file import group
from nativesd.weights.lora.place import Change, Place, context, is_alpha
from nativesd.weights.maps.keymap import KeyMap
from nativesd.weights.maps.lora_names import PARTS
from nativesd.weights.report import ComponentReport, Mapped, Unexpected


def report_lora(
    report: ComponentReport,
    tensors: Mapping[str, TensorInfo],
    tables: Mapping[str, KeyMap],
    expected: Expected,
    read: Callable[[str], float] | None = None,
    known: dict[Config, Place] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ComponentReport:
    """The report of a LoRA, whose keys are `tensors`, with the parameters that they change in the base that it fits.

    Keys without a place there are unexpected. `read` gives the value of a key that is one number, where the file is at
    hand; `known` is that of `fits`; of several bases that it fits, the one counts that its `metadata` names.
    """
    groups, nameless = group(tensors, tables)
    found = fits(groups, tensors, tables, expected, known)
    if not found:
        width = context(groups, tensors)
        reason = f"no published base has a context {width} wide"
        found = [Fit("", {}, (), {key: reason for group in groups for key in group.keys.values()})]
    family, field = stated_family(metadata or {})
    named = [fit for fit in found if len(found) > 1 and fit.label == FAMILIES.get(family)]
    found = named or found
    best, families = found[0], list(dict.fromkeys(fit.label.partition(" ")[0] for fit in found))
    alphas = {change.keys["alpha"] for change in best.changes if "alpha" in change.keys}
    values = {} if read is None else {key: read(key) for key in sorted(alphas)}
    strange = {key: f"the alpha {value:g} is none" for key, value in values.items() if not is_alpha(value)}
    unplaced = {**nameless, **best.unplaced, **strange}
    places: dict[str, list[tuple[str, Change]]] = {}
    for change in best.changes:
        for part, key in change.keys.items():
            places.setdefault(key, []).append((part, change))
    names = {key: next(t.name for t in tables.values() if t.lora and t.lora.part(key)) for key in places}
    return replace(
        report,
        family=" or ".join(families) if best.changes else "",
        expected=len(tensors),
        mapped=tuple(
            Mapped(
                " + ".join(f"{change.component} {change.target.parameter}" for _, change in entries),
                (key,), entries[0][1].target.shape, PARTS[entries[0][0]], names[key], 0,
            )
            for key, entries in places.items()
            if key not in strange
        ),
        unexpected=tuple(
            Unexpected(key, tensors[key].shape, tensors[key].dtype, reason) for key, reason in unplaced.items()
        ),
        evidence=(_base(found, len(groups), unplaced, field if named else ""), *_evidence(best.changes, values)),
    )  # fmt: skip


def _base(found: Sequence[Fit], count: int, unplaced: Mapping[str, str], field: str) -> Evidence:
    """Which base the LoRA fits, and why."""
    labels = ", ".join(fit.label for fit in found if fit.changes) or "none that is known"
    if not found[0].changes:
        return Evidence("base", labels, f"none has a place for any of the {len(unplaced)} keys")
    if unplaced:
        return Evidence("base", labels, f"{len(unplaced)} keys find no place in it", determined=False)
    if field:
        return Evidence("base", labels, f"the {count} modules are all in it, and the metadata's {field} names it")
    where = "it" if len(found) == 1 else "each of them, and nothing tells which was meant"
    return Evidence("base", labels, f"the {count} modules are all in {where}")


def _evidence(changes: Sequence[Change], values: Mapping[str, float]) -> list[Evidence]:
    """What kinds of changes there are, in which components, of which ranks, and how they are scaled.

    values  of the alphas, where they were read
    """
    if not changes:
        return []
    ranks = [change.rank for change in changes if change.rank is not None]
    alphas = [change.keys["alpha"] for change in changes if "alpha" in change.keys]
    out = [
        Evidence("changes", _counted(change.kind for change in changes), "the parts that the keys name"),
        Evidence("components", _counted(change.component for change in changes), "the modules that the keys name"),
    ]
    if ranks:
        out.append(Evidence("rank", _counted(ranks), "the matrices' inner size"))
    if alphas and values:
        out.append(Evidence("alpha", _counted(f"{values[key]:g}" for key in alphas), "scale = alpha / rank"))
    elif alphas:
        out.append(Evidence("alpha", f"in {len(alphas)} changes", "scale = alpha / rank; its value is not in a header"))
    if len(ranks) > len(alphas):
        out.append(
            Evidence(
                "no alpha", f"in {len(ranks) - len(alphas)} changes", "the scale is 1, or what peft's settings say"
            )
        )
    return out


def _counted(values: Iterable[object]) -> str:
    """Each value with how often it occurs, the commonest first."""
    return ", ".join(f"{value} x{count}" for value, count in Counter(values).most_common())
