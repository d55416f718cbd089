"""Checkpoints: what is in them, and changing their layout."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.text import Text

from nativesd.cli.common import SOURCE_HELP, Row, by_reason, count, main, print_lines, say_left_out, size_text, some
from nativesd.errors import UsageError

if TYPE_CHECKING:
    from nativesd.weights.diff import DiffReport
    from nativesd.weights.report import AuditReport, ComponentReport

SHOWN = 5  # findings of a kind that are listed one by one, unless all are asked for


@main.command(
    help=f"Explain every tensor of SOURCE: {SOURCE_HELP}. Of several files, of patterns, of a folder of loose files: "
    f"a line each. Exit code 1 means findings."
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--keys", is_flag=True, help="List the whole mapping.")
@click.option("--trace", metavar="NAME", help="Show how a key or parameter is mapped, or all that NAME is a part of.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with --keys all of it: see docs/models-and-files.md.")
@click.option("--as", "believed", metavar="FAMILY/LAYOUT", help="Compare with what you take it for: such as SDXL/sgm.")
@click.option("--diff", "other", metavar="OTHER", help="Compare two checkpoints, whatever their layouts.")
@click.option("--values", is_flag=True, help="With --diff: compare the tensors too.")
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--missing", is_flag=True, help="Say what a model lacks for a picture.")
@click.option("--all", "everything", is_flag=True, help=f"List every finding, not the first {SHOWN} of a kind.")
def audit(
    sources: Sequence[str],
    keys: bool,
    trace: str | None,
    as_json: bool,
    believed: str | None,
    other: str | None,
    values: bool,
    maps: Path | None,
    revision: str | None,
    missing: bool,
    everything: bool,
) -> None:
    """See the command's help."""
    if _are_many(sources):
        if other is not None or trace is not None or keys or believed is not None:
            raise click.UsageError("--diff, --trace, --keys and --as are of one source: name one")
        _survey(sources, maps, as_json=as_json, missing=missing)
    from nativesd.checkpoints import audit as auditing

    [source] = sources
    if other is not None:
        difference = auditing.diff(source, other, values=values, maps=maps)
        if as_json:
            click.echo(difference.to_json())
        else:
            print_lines(_diff_lines(difference, len(difference.differences) if everything else SHOWN))
        sys.exit(0 if difference.ok else 1)
    if values:
        raise click.UsageError("--values compares two checkpoints: name the other one with --diff")
    report = auditing.audit(source, maps=maps, believed=believed, revision=revision)
    if trace is not None:
        lines = report.trace(trace)
        if not lines:
            raise UsageError(f"{source} has no key, and its model no parameter, with {trace} in its name")
        print_lines(Text(line) for line in lines)
    elif as_json:
        click.echo(report.to_json(mapped=keys))
    else:
        print_lines(_audit_lines(report, keys=keys, shown=sys.maxsize if everything else SHOWN))
        if missing and (lacks := report.lacks):
            print_lines([_lacking(lacks)])
    sys.exit(0 if report.ok else 1)


@main.command(
    help=f"Write SOURCE ({SOURCE_HELP}) to DEST in another layout: a model as a folder, or for ldm as a .safetensors "
    "or .gguf file; a LoRA as a .safetensors file, in kohya's, diffusers' or peft's names, or as a folder of peft's."
)
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--layout", required=True, type=click.Choice(["diffusers", "ldm", "kohya", "peft"]), help="The layout of DEST."
)
@click.option(
    "--dtype",
    type=click.Choice(["f16", "bf16", "f32", "fp8", "q8_0", "q6_k", "q5_k", "q5_0", "q5_1", "q4_k", "q4_0", "q4_1"]),
    help="fp8 (scaled, as in ComfyUI) is of .safetensors files, those after it of .gguf files. "
    "[default: as stored, but float32 for what is quantised in SOURCE]",
)
@click.option("--unet", help="The UNet of DEST, instead of SOURCE's.")
@click.option("--vae", help="The VAE of DEST, instead of SOURCE's.")
@click.option("--text-encoder", "text_encoders", multiple=True, help="A text encoder of DEST, instead of SOURCE's.")
@click.option("--prune", multiple=True, type=click.Choice(["ema", "text", "vae", "duplicates"]), help="Leave this out.")
@click.option(
    "--keep",
    multiple=True,
    type=click.Choice(["unet", "vae", "text", "ema"]),
    help="Keep this alone; with ema the UNet is the training's average.",
)
@click.option("--fold-alpha", is_flag=True, help="Of a LoRA: multiply its scale into the matrices.")
@click.option("--base", help="Of a LoRA: the model that it is for. [default: the published one that it fits]")
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override.")
def convert(source: str, dest: Path, layout: str, **given: Any) -> None:
    """See the command's help."""
    from nativesd.checkpoints.convert import convert as run_convert

    done = run_convert(source, dest, layout=layout, **given)
    say_left_out(done.ignored)
    click.echo(done.path)


def _are_many(sources: Sequence[str]) -> bool:
    """Whether a line each is wanted: several sources, a pattern, or a folder of loose files."""
    if len(sources) > 1:
        return True
    path = Path(sources[0])
    if not os.path.isdir(path):
        return not os.path.exists(path) and any(mark in sources[0] for mark in "*?[") and "://" not in sources[0]
    from nativesd.checkpoints.survey import expand

    found = expand([path])
    return found != [path] and len(found) > 1 and not list(path.glob("*.safetensors.index*.json"))


def _survey(sources: Sequence[str], maps: Path | None, *, as_json: bool, missing: bool) -> NoReturn:
    """Print a line for every source and a summary, or JSON lines; leave with 1 where one is not ok."""
    from nativesd.checkpoints.survey import survey

    inside = Path(sources[0]) if len(sources) == 1 and os.path.isdir(sources[0]) else None
    lines = []
    for line in survey(sources, maps=maps):
        lines.append(line)
        if as_json:
            click.echo(line.to_json())
            continue
        what = ", ".join(filter(None, (line.kind, line.family, line.layout, line.dtype)))
        if line.error:
            state, style, what = line.error.removeprefix(f"{line.source} "), "red", ""
        elif not line.ok:
            state, style = line.why or "has findings", "red"
        else:
            state, style = line.why or "ok", ""
        name = line.source if inside is None else str(Path(line.source).relative_to(inside))
        words = f" [{', '.join(line.words)}]" if line.words else ""
        size = f" {size_text(line.bytes)}" if line.bytes else ""
        print_lines([Text.assemble((name, "bold"), f": {what}{size}{words}: " if what else ": ", (state, style))])
        if missing and line.lacks:
            print_lines([_lacking(line.lacks)])
    if not as_json:
        good = sum(line.ok for line in lines)
        kinds = by_reason((line.source, line.kind or "unreadable") for line in lines)
        counts = ", ".join(f"{kind} {len(each)}" for kind, each in sorted(kinds.items()))
        total = size_text(sum(line.bytes for line in lines))
        print_lines([Text(f"{len(lines)} files, {good} ok, {total}: {counts}")])
    sys.exit(0 if all(line.ok for line in lines) else 1)


def _lacking(lacks: Sequence[str]) -> Text:
    """What a model lacks for a picture, with the options that bring it."""
    return Text("  " + ", ".join(f"no {name.rstrip('s')}: --{name.replace('_', '-').rstrip('s')}" for name in lacks))


def _audit_lines(report: AuditReport, *, keys: bool, shown: int) -> Iterator[Text | Row]:
    """The report for people: per component a headline, its sums, the evidence, what is ignored, the findings."""
    for component in report.components:
        what = ", ".join(filter(None, (component.family, component.layout)))
        counts = f"{len(component.mapped)} of {component.expected} mapped" if component.expected else ""
        yield Text.assemble(
            (component.name, "bold"), f" ({what})" if what else "", f": {counts}" if counts else "",
            style="" if component.ok else "red",
        )  # fmt: skip
        dtypes = ", ".join(f"{name} x{count}" for name, count in component.dtypes.items())
        yield Row(
            "tensors",
            f"{component.tensors}, {count(component.parameters)} parameters, {dtypes}, {size_text(component.bytes)}",
        )
        if component.unused:
            yield Row("not used", component.unused, "yellow")
        for entry in component.evidence:
            override = f"; to choose otherwise: {entry.override}" if entry.override else ""
            if entry.determined:
                yield Row(entry.what, f"{entry.value} ({entry.why})")
            else:
                yield Row(entry.what, f"{entry.value} by default, not determined ({entry.why}{override})", "yellow")
        for reason, names in by_reason((i.key, i.reason) for i in component.ignored).items():
            yield Row("ignored", f"{some(names)}: {reason}")
        if keys:
            for m in component.mapped:
                yield Row("mapped", f"{' + '.join(m.keys)} -> {m.parameter} {m.shape} [{m.operation}]")
        yield from _finding_lines(component, shown)


def _finding_lines(component: ComponentReport, shown: int) -> Iterator[Text | Row]:
    """Findings one by one, or of a kind with more than `shown` their number and what their names begin with."""
    if component.unsupported:
        yield Row("not supported", f"this is {component.unsupported}", "red")
    paired = {m.found for m in component.missing if m.found}
    unexpected = [u for u in component.unexpected if u.key not in paired]
    if len(component.missing) > shown:
        names = [name for m in component.missing for name in m.expected or (m.parameter,)]
        yield from _many("missing", names, f"{len(component.missing)} parameters, expected as")
    else:
        for m in component.missing:
            yield Row("missing", f"{m.parameter} {m.shape}", "red")
            yield Row("", f"expected as {' + '.join(m.expected) or 'nothing any rule names'}")
            if m.found:
                yield Row("", f"found {m.found}: {m.hint}")
    for reason, names in by_reason((u.key, u.reason) for u in unexpected).items():
        if len(names) > shown:
            yield from _many("unexpected", names, f"{len(names)} tensors: {reason}")
        else:
            for u in unexpected:
                if u.reason == reason:
                    yield Row("unexpected", f"{u.key} {u.shape} {u.dtype}: {u.reason}", "red")
    if len(component.wrong_shape) > shown:
        names = [key for w in component.wrong_shape for key in w.keys]
        yield from _many("wrong shape", names, f"{len(component.wrong_shape)} tensors")
    else:
        for w in component.wrong_shape:
            yield Row("wrong shape", f"{' + '.join(w.keys)} {w.shape}, for {w.parameter}", "red")
            yield Row("", f"expected {w.expected} ({w.table} rule {w.rule})")
    if len(component.duplicate) > shown:
        names = [key for d in component.duplicate for key in d.keys]
        yield from _many("duplicate", names, f"{len(component.duplicate)} parameters claimed twice")
    else:
        for d in component.duplicate:
            yield Row("duplicate", f"{d.parameter}: claimed by {', '.join(d.keys)}", "red")


def _many(label: str, names: Sequence[str], what: str) -> Iterator[Text | Row]:
    from nativesd.weights.names import grouped

    yield Row(label, f"{what} (--all lists them)", "red")
    for line in grouped(names):
        yield Row("", line)


def _diff_lines(report: DiffReport, shown: int) -> Iterator[Text | Row]:
    if report.values:
        yield Text(f"{report.same} parameters are the same in {report.first} and {report.second}")
    else:
        yield Text(
            f"{report.same} parameters have the same shapes and dtypes in {report.first} and {report.second}; "
            f"their values were not compared (--values compares them)"
        )
    for kind in ("only in first", "only in second"):
        for reason, keys in by_reason(
            (d.parameter, d.second if kind == "only in first" else d.first) for d in report.unused if d.kind == kind
        ).items():
            yield Row(f"{kind}, unused", f"{some(keys)}: {reason}")
    for d in report.differences[:shown]:
        maximum = "" if d.maximum is None else f", max |difference| {d.maximum:g}"
        sides = " | ".join(side for side in (d.first, d.second) if side)
        yield Row(d.kind, f"{d.parameter}: {sides}{maximum}", "red")
    if len(report.differences) > shown:
        yield Row("", f"and {len(report.differences) - shown} more (--all lists them)")
