"""The command line: the only file that knows about terminals.

Exit codes: 0 fine, 1 findings, 2 usage, 3 unreadable or unfit input, 4 network.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from nativesd.errors import NativesdError, UsageError
from nativesd.version import __version__

if TYPE_CHECKING:
    from nativesd.control import Control
    from nativesd.weights.audit import AuditReport, ComponentReport
    from nativesd.weights.diff import DiffReport

SHOWN = 20  # findings of a kind, unless all are asked for


class Size(click.ParamType[tuple[int, int]]):
    """WIDTHxHEIGHT in pixels."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse, or fail with exit code 2."""
        width, _, height = str(value).lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            self.fail(f"{value!r} is not a size such as 512x768", param, ctx)
        return int(width), int(height)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """A native PyTorch Stable Diffusion stack."""


class Border(click.ParamType[tuple[int, int, int, int]]):
    """LEFT,TOP,RIGHT,BOTTOM in pixels."""

    name = "L,T,R,B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int, int]:
        """Parse, or fail with exit code 2."""
        sides = [side.strip() for side in str(value).split(",")]
        if len(sides) != 4 or not all(side.isdecimal() for side in sides):
            self.fail(f"{value!r} is not left,top,right,bottom in pixels, such as 0,0,128,0", param, ctx)
        left, top, right, bottom = map(int, sides)
        return left, top, right, bottom


MODEL_HELP = "'tiny' (embedded), a folder, a file, or a hub id"


@main.command()
@click.argument("prompt", required=False)
@click.option("--from", "picture", metavar="PICTURE", help="Repeat a picture by its parameters; options override them.")
@click.option("--model", help=f"{MODEL_HELP} [default: tiny].")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Picture to write [default: nativesd-SEED.png].")
@click.option("--steps", type=int, help="Sampling steps [default: 20; few-step models 4].")
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 is off [default: the model family's].")
@click.option("--seed", type=int, help="Seed of the first picture [default: random].")
@click.option("--sampler", help='Such as "DPM++ 2M Karras": see nativesd samplers [default: the model\'s own].')
@click.option("--schedule", help="Such as karras or ays: see nativesd samplers [default: the model's own].")
@click.option("--size", type=Size(), help="Pixels, such as 512x768 [default: the model's, or the image's].")
@click.option("--negative-prompt", help="What the picture should not show.")
@click.option("--num-images", type=int, help="Pictures, with seeds counting up [default: 1].")
@click.option("--image", type=click.Path(), help="Picture to begin from: image-to-image, inpainting, edits.")
@click.option("--mask", type=click.Path(), help="White where --image is painted anew.")
@click.option("--strength", type=float, help="How much of --image is given up, 0 to 1 [default: 0.8; with a mask 1].")
@click.option("--resize", type=click.Choice(["resize", "crop", "fill"]), help="How --image comes to --size.")
@click.option("--outpaint", type=Border(), help="Pixels to add to --image, such as 0,0,128,0.")
@click.option("--mask-blur", type=int, help="Pixels over which a repainted part fades in [default: 4].")
@click.option("--image-guidance-scale", type=float, help="How much an instruct-pix2pix model keeps [default: 1.5].")
@click.option("--hires", type=float, help='Second pass at so many times the size ("hires fix").')
@click.option("--hires-strength", type=float, help="How much the second pass repaints [default: 0.7].")
@click.option("--hires-steps", type=int, help="Steps of the second pass [default: the same].")
@click.option("--hires-upscaler", type=click.Choice(["latent", "lanczos"]), help="[default: latent]")
@click.option("--refiner", help="SDXL refiner for the last steps: a folder, a file, or a hub id.")
@click.option("--refiner-at", type=float, help="How far on the refiner takes over [default: 0.8].")
@click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE[:TEXT]]", help="LoRA to merge in; repeatable.")
@click.option("--control", nargs=2, multiple=True, metavar="MODEL IMAGE", help="ControlNet or T2I-Adapter; repeatable.")
@click.option("--control-scale", type=float, multiple=True, help="One per --control, in its order [default: 1].")
@click.option("--control-start", type=float, multiple=True, help="From which part of the steps on [default: 0].")
@click.option("--control-end", type=float, multiple=True, help="Up to which part of the steps [default: 1].")
@click.option("--control-preprocess", multiple=True, help="canny, a processor of controlnet_aux, or none [default].")
@click.option("--control-kind", multiple=True, help="For a ControlNetUnion: what the hint is, such as depth.")
@click.option("--guess-mode", is_flag=True, default=None, help="ControlNets act for the prompt only.")
@click.option("--guidance-rescale", type=float, help="0 to 1, against strong guidance's contrast [default: 0].")
@click.option("--eta", type=float, help="0 to 1, the noise that a sampler adds again [default: the sampler's].")
@click.option("--clip-skip", type=int, help="Layer of the text encoder from the end; 1 is the last.")
@click.option("--literal", is_flag=True, default=None, help="Take the prompts as they stand: no weights, no BREAK.")
@click.option("--noise", type=click.Choice(["cpu", "cuda"]), help="Whose: the CPU's, or an NVIDIA card's (A1111).")
@click.option("--embedding", "embeddings", type=click.Path(), multiple=True, help="Textual inversion; repeatable.")
@click.option("--preview", type=click.Path(path_type=Path), help="Picture file to show the state in, at every step.")
@click.option("--device", help="cpu, cuda, cuda:1, ... [default: cuda where there is one].")
@click.option("--dtype", help="float16, bfloat16 or float32 [default: float16 on CUDA, else float32].")
@click.option("--prediction", help="epsilon, v or sample, where the model says it wrong or not at all.")
@click.option("--unet", type=click.Path(), help="File or folder of a UNet to use instead of the model's.")
@click.option("--vae", type=click.Path(), help="File or folder of a VAE to use instead of the model's, or taesd.")
@click.option("--text-encoder", "text_encoders", type=click.Path(), multiple=True, help="The same; repeatable.")
@click.option("--offload", is_flag=True, default=None, help="Keep what is not in use in main memory.")
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override.")
@click.option("-v", "--verbose", is_flag=True, help="Say what was chosen without being told, and from what.")
def generate(
    prompt: str | None,
    picture: str | None,
    output: Path | None,
    size: tuple[int, int] | None,
    preview: Path | None,
    embeddings: Sequence[str],
    verbose: bool,
    **given: Any,
) -> None:
    """Make pictures of PROMPT; prints the path of each."""
    from tqdm import tqdm

    import nativesd
    from nativesd.diffusion import Step
    from nativesd.pipeline import Hires

    options = {name: value for name, value in given.items() if value not in (None, ())}
    if size is not None:
        options["width"], options["height"] = size
    if prompt is not None:
        options["prompt"] = prompt
    if "loras" in options:
        options["loras"] = [_lora(text) for text in options["loras"]]
    if control := _controls(options):
        options["control"] = control
    passes = {name.removeprefix("hires_"): options.pop(name) for name in list(options) if name.startswith("hires_")}
    if passes and "hires" not in options:
        raise click.UsageError("the options of the second pass need --hires")
    if "hires" in options:
        options["hires"] = Hires(options["hires"], **passes)
    if picture is not None:
        repeated, unheeded = nativesd.options_from(picture)
        if unheeded:
            click.echo(f"nativesd: {picture}: not repeated: {', '.join(unheeded)}", err=True)
        model = repeated.pop("model", None)
        if "model" not in options and model not in (None, "tiny"):
            raise click.UsageError(f"{picture} was made with the model {model}: pass it with --model")
        options = {**repeated, **options}
    if "prompt" not in options:
        raise click.UsageError("pass a prompt, or a picture to repeat with --from")
    loading = {name: options.pop(name) for name in nativesd.LOAD_OPTIONS if name in options}
    pipeline = nativesd.load(options.pop("model", "tiny"), **loading)
    for embedding in embeddings:
        pipeline.load_embedding(embedding)
    if "refiner" in options:
        options["refiner"] = nativesd.load(options["refiner"], **{**loading, "unet": None, "vae": None})
    with tqdm(file=sys.stderr, unit="step", leave=False, disable=None) as bar:

        def on_step(step: Step) -> None:
            bar.total = step.total
            bar.update()
            if preview is not None:
                step.preview().save(preview)

        result = pipeline(on_step=on_step, **options)
    for note in result.parameters["notes"]:
        click.echo(f"nativesd: {note}", err=True)
    if verbose:
        for what, reason in result.parameters["inferred"].items():
            click.echo(f"{what}: {reason}", err=True)
    for path in result.save(output or Path(f"nativesd-{result.seeds[0]}.png")):
        click.echo(path)


def _lora(text: str) -> tuple[str, float, float]:
    """FILE, FILE:SCALE or FILE:SCALE:TEXT, where the file's own name may have colons."""
    file, scales = text, list[float]()
    while len(scales) < 2 and ":" in file:
        head, _, tail = file.rpartition(":")
        try:
            scales.insert(0, float(tail))
        except ValueError:
            break
        file = head
    unet = scales[0] if scales else 1.0
    return file, unet, scales[1] if len(scales) > 1 else unet


def _controls(options: dict[str, Any]) -> list[Control]:
    """The --control options, taken out of `options`; those that go with them are matched by their order."""
    from nativesd.control import Control

    controls = options.pop("control", ())
    settings: dict[str, tuple[Any, ...]] = {
        name: options.pop(f"control_{name}", ()) for name in ("scale", "start", "end", "preprocess", "kind")
    }
    for name, values in settings.items():
        if len(values) > len(controls):
            raise click.UsageError(f"{len(values)} --control-{name} for {len(controls)} --control")
    out = []
    for i, (model, image) in enumerate(controls):
        chosen = {name: values[i] for name, values in settings.items() if i < len(values) and values[i] != "none"}
        out.append(Control(model, image, **chosen))
    return out


@main.command()
def samplers() -> None:
    """List the samplers and schedules, with the names they are known by and their sources."""
    from rich.table import Table

    from nativesd.sampling.table import SAMPLERS, SCHEDULES

    table = Table("sampler", "also", "order", "noise", "calls", "source", box=None, pad_edge=False)
    for each in SAMPLERS:
        names = ", ".join(filter(None, (each.published, *each.aliases)))
        noise = "" if not each.noisy else "Brownian" if each.brownian else "every step"
        table.add_row(each.name, names, str(each.order), noise, str(each.evaluations), each.source)
    schedules = Table("schedule", "also", "source", box=None, pad_edge=False)
    for schedule in SCHEDULES:
        schedules.add_row(schedule.name, ", ".join(schedule.aliases), schedule.source)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print()
    console.print(schedules)


@main.command()
@click.argument("prompt")
@click.option("--literal", is_flag=True, help="Take the prompt as it stands: no weights, no BREAK.")
@click.option("--embedding", "embeddings", type=click.Path(), multiple=True, help="Textual inversion; repeatable.")
def tokens(prompt: str, literal: bool, embeddings: Sequence[str]) -> None:
    """Show the tokens of PROMPT, their weights, and where its chunks break."""
    from nativesd.text.embedding import read_embedding
    from nativesd.text.prompt import explain_tokens
    from nativesd.text.tokenizer import END_OF_TEXT, ClipTokenizer

    known = {embedding.name: embedding for embedding in map(read_embedding, embeddings)}
    chunks = explain_tokens(prompt, ClipTokenizer(pad=END_OF_TEXT), literal=literal, embeddings=known)
    for number, chunk in enumerate(chunks, 1):
        click.echo(f"chunk {number} of {len(chunks)}: {len(chunk.tokens)} of 75 tokens")
        for token in chunk.tokens:
            weight = "" if token.weight == 1 else f"  x {token.weight:g}"
            click.echo(f"  {token.id:>5}  {token.text}{weight}")


SOURCE_HELP = "a safetensors file, a model folder, a hub id, or org/name/file.safetensors on the hub"


@main.command(help=f"Explain every tensor of SOURCE: {SOURCE_HELP}. Exit code 1 means findings.")
@click.argument("source")
@click.option("--keys", is_flag=True, help="List the whole mapping.")
@click.option("--trace", metavar="NAME", help="Show how a key, or a parameter of ours, is mapped.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON (schema 1: see the README).")
@click.option("--as", "believed", metavar="FAMILY/LAYOUT", help="Compare with what you take it for: such as sdxl/ldm.")
@click.option("--diff", "other", metavar="OTHER", help="Compare two checkpoints, whatever their layouts.")
@click.option("--values", is_flag=True, help="With --diff: compare the tensors too.")
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--all", "everything", is_flag=True, help=f"List every finding, not the first {SHOWN} of a kind.")
def audit(
    source: str,
    keys: bool,
    trace: str | None,
    as_json: bool,
    believed: str | None,
    other: str | None,
    values: bool,
    maps: Path | None,
    revision: str | None,
    everything: bool,
) -> None:
    """See the command's help."""
    from nativesd import auditing

    if other is not None:
        difference = auditing.diff(source, other, values=values, maps=maps)
        if as_json:
            click.echo(difference.to_json())
        else:
            _print(_diff_lines(difference, len(difference.differences) if everything else SHOWN))
        sys.exit(0 if difference.ok else 1)
    if values:
        raise click.UsageError("--values compares two checkpoints: name the other one with --diff")
    report = auditing.audit(source, maps=maps, believed=believed, revision=revision)
    if trace is not None:
        lines = report.trace(trace)
        if not lines:
            raise UsageError(f"{source} has no key, and its model no parameter, called {trace}")
        _print(Text(line) for line in lines)
    elif as_json:
        click.echo(report.to_json())
    else:
        _print(_audit_lines(report, keys=keys, shown=sys.maxsize if everything else SHOWN))
    sys.exit(0 if report.ok else 1)


@main.command(help=f"Write SOURCE ({SOURCE_HELP}) to DEST in another layout: a folder, or a .safetensors file for ldm.")
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--layout", required=True, type=click.Choice(["diffusers", "ldm"]), help="The layout of DEST.")
@click.option("--dtype", type=click.Choice(["f16", "bf16", "f32"]), help="[default: as stored]")
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override.")
def convert(source: str, dest: Path, layout: str, dtype: str | None, maps: Path | None) -> None:
    """See the command's help."""
    from nativesd.converting import convert as run_convert

    done = run_convert(source, dest, layout=layout, dtype=dtype, maps=maps)
    for reason, keys in _by_reason(done.ignored.items()).items():
        click.echo(f"left out {_some(keys)}: {reason}", err=True)
    click.echo(done.path)


@main.group()
def lora() -> None:
    """LoRA files."""


@lora.command(
    "merge", help=f"Write MODEL ({SOURCE_HELP.partition(',')[0]} or a model folder) with LORAs merged to DEST."
)
@click.argument("model")
@click.argument("loras", nargs=-1, required=True, metavar="LORA[:SCALE[:TEXT]]...")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override.")
def merge(model: str, loras: Sequence[str], dest: Path, maps: Path | None) -> None:
    """See the command's help."""
    from nativesd.merging import merge_checkpoint
    from nativesd.weights.lora import Use, read_lora

    uses = [Use(read_lora(file), unet, text) for file, unet, text in map(_lora, loras)]
    done = merge_checkpoint(model, uses, dest, maps=maps)
    for reason, keys in _by_reason(done.ignored.items()).items():
        click.echo(f"left out {_some(keys)}: {reason}", err=True)
    click.echo(f"{done.changed} of {done.tensors} tensors changed", err=True)
    click.echo(done.path)


def _print(lines: Iterable[Text]) -> None:
    """Colour and width follow the terminal; a pipe gets plain text, unwrapped."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    for line in lines:
        console.print(line)


def _by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """reason -> the keys it is given for."""
    out: dict[str, list[str]] = {}
    for key, reason in pairs:
        out.setdefault(reason, []).append(key)
    return out


def _some(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{len(keys)} tensors ({keys[0]}, ...)"


def _audit_lines(report: AuditReport, *, keys: bool, shown: int) -> Iterator[Text]:
    """The report for people: per component a headline, its sums, the evidence, what is ignored, the findings."""
    for component in report.components:
        what = ", ".join(filter(None, (component.family, component.layout)))
        counts = f"{len(component.mapped)} of {component.expected} mapped" if component.expected else ""
        yield Text.assemble(
            (component.name, "bold"), f" ({what})" if what else "", f": {counts}" if counts else "",
            style="" if component.ok else "red",
        )  # fmt: skip
        dtypes = ", ".join(f"{name} x{count}" for name, count in component.dtypes.items())
        yield _row(
            "tensors",
            f"{component.tensors}, {_count(component.parameters)} parameters, {dtypes}, {_size(component.bytes)}",
        )
        for entry in component.evidence:
            override = f"; to choose otherwise: {entry.override}" if entry.override else ""
            if entry.determined:
                yield _row(entry.what, f"{entry.value} ({entry.why})")
            else:
                yield _row(entry.what, f"{entry.value} by default, not determined ({entry.why}{override})", "yellow")
        for reason, names in _by_reason((i.key, i.reason) for i in component.ignored).items():
            yield _row("ignored", f"{_some(names)}: {reason}")
        if keys:
            for m in component.mapped:
                yield _row("mapped", f"{' + '.join(m.keys)} -> {m.parameter} {m.shape} [{m.operation}]")
        yield from _finding_lines(component, shown)


def _finding_lines(component: ComponentReport, shown: int) -> Iterator[Text]:
    paired = {m.found for m in component.missing if m.found}
    unexpected = [u for u in component.unexpected if u.key not in paired]
    for m in component.missing[:shown]:
        yield _row("missing", f"{m.parameter} {m.shape}", "red")
        yield _row("", f"expected as {' + '.join(m.expected) or 'nothing any rule names'}")
        if m.found:
            yield _row("", f"found {m.found}: {m.hint}")
    for u in unexpected[:shown]:
        yield _row("unexpected", f"{u.key} {u.shape} {u.dtype}: {u.reason}", "red")
    for w in component.wrong_shape[:shown]:
        yield _row("wrong shape", f"{' + '.join(w.keys)} {w.shape}, for {w.parameter}", "red")
        yield _row("", f"expected {w.expected} ({w.table} rule {w.rule})")
    for d in component.duplicate[:shown]:
        yield _row("duplicate", f"{d.parameter}: claimed by {', '.join(d.keys)}", "red")
    lists = {
        "missing": component.missing, "unexpected": unexpected, "of a wrong shape": component.wrong_shape,
        "duplicate": component.duplicate,
    }  # fmt: skip
    for kind, findings in lists.items():
        if len(findings) > shown:
            yield _row("", f"and {len(findings) - shown} more {kind} (--all lists them)")


def _diff_lines(report: DiffReport, shown: int) -> Iterator[Text]:
    yield Text(f"{report.same} parameters are the same in {report.first} and {report.second}")
    for d in report.differences[:shown]:
        maximum = "" if d.maximum is None else f", max |difference| {d.maximum:g}"
        sides = " | ".join(side for side in (d.first, d.second) if side)
        yield _row(d.kind, f"{d.parameter}: {sides}{maximum}", "red")
    if len(report.differences) > shown:
        yield _row("", f"and {len(report.differences) - shown} more (--all lists them)")


def _row(label: str, text: str, style: str = "") -> Text:
    return Text.assemble("  ", (f"{label:<20}" if len(label) < 20 else f"{label} ", style), text)


def _count(number: int) -> str:
    """1234567 as 1.23 M."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return str(number)


def _size(number: int) -> str:
    """Bytes in decimal units, as download pages give them."""
    return _count(number).replace(" B", " G").replace(" k", " k").rstrip() + ("B" if number >= 1000 else " B")


def run() -> None:
    """The console script: errors are one sentence on stderr and an exit code."""
    warnings.showwarning = lambda message, *_, **__: click.echo(f"nativesd: warning: {message}", err=True)
    try:
        main()
    except NativesdError as error:
        click.echo(f"nativesd: {error}", err=True)
        sys.exit(error.exit_code)
