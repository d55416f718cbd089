"""Exported graphs and engines: making them, and what is in a folder of engines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from rich.table import Table

from nativesd.cli.common import ENGINES_HELP, MODEL_HELP, Size, main, print_tables, say, size_text
from nativesd.cli.help import does_nothing, flags_of
from nativesd.pipeline.asked.readers import lora_use

if TYPE_CHECKING:
    from nativesd.checkpoints.export import Exported
    from nativesd.export.kept.entries import Entry

COMPONENTS = ["text_encoder", "unet", "controlnet", "vae_encoder", "vae_decoder", "image_encoder", "ip_adapter"]
NAMES = ["nativesd", "comfyui", "streamdiffusion"]
CHANGE: dict[str, tuple[str, ...]] = {
    "control": ("controlnet",), "image_encoder": ("image_encoder",), "image_adapters": ("ip_adapter", "unet"),
    "loras": ("unet", "text_encoder"), "chunks": ("unet", "controlnet"), "slots": ("unet", "controlnet"),
    **dict.fromkeys(("no_slots", "image_prompts", "names", "groups", "image_tokens"), ("unet",)),
}  # fmt: skip
"""The components that an option changes; of an adapter a FaceID's LoRA is merged into the UNet."""
MADE_OF = {"controlnet": "control", "image_encoder": "image_encoder", "ip_adapter": "image_adapters"}
"""The options that name what is exported as such a component."""
Command = TypeVar("Command", bound=Callable[..., None])


@main.group()
def export() -> None:
    """Write a model's components as ONNX files or TensorRT engines."""


def _common(command: Command) -> Command:
    """The options that both exporters have."""
    for option in reversed([
        click.argument("source"),
        click.option("--component", "components", multiple=True, type=click.Choice(COMPONENTS), help="[default: all]"),
        click.option("--control", multiple=True, metavar="MODEL", help="ControlNet to export too; repeatable."),
        click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE[:TEXT]]", help="LoRA to merge before."),
        click.option("--no-check", is_flag=True, help="Do not run what is written against PyTorch."),
        click.option("--tolerance", type=click.FloatRange(0), help="Largest relative difference that is allowed."),
        click.option("--no-slots", is_flag=True, help="Leave out the UNet's inputs for control residuals."),
        click.option(
            "--image-prompts/--no-image-prompts", default=None, help="Whether the UNet has inputs for IP-Adapters."
        ),
        click.option("--image-encoder", metavar="ENCODER", help="CLIP image encoder to export too."),
        click.option(
            "--image-adapter", "image_adapters", multiple=True, metavar="ADAPTER", help="IP-Adapter; repeatable."
        ),
        click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override."),
    ]):  # fmt: skip
        command = option(command)
    return command


@export.command("onnx", help=f"Write SOURCE ({MODEL_HELP}) as DEST/unet/model.onnx and so on, checked against PyTorch.")
@_common
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--dtype", default="float32", show_default=True, help="float32, float16 or bfloat16.")
@click.option("--static", type=Size(), metavar="WxH", help="One size in pixels [default: any].")
@click.option("--batch", type=int, help="With --static: rows, two for guidance [default: 2].")
@click.option("--chunks", type=int, help="With --static: chunks of 77 tokens [default: 1].")
@click.option("--groups", type=int, help="With --static: image prompts that act at once [default: 1].")
@click.option("--image-tokens", type=int, help="With --static: tokens of each image prompt [default: 16].")
@click.option("--opset", type=int, help="[default: 23; of the VAE and of --image-encoder and --image-adapter 21]")
@click.option("--names", type=click.Choice(NAMES), default=NAMES[0], help="Whose the UNet's inputs and outputs have.")
@click.pass_context
def export_onnx(
    context: click.Context,
    /,
    source: str,
    dest: Path,
    static: tuple[int, int] | None,
    batch: int | None,
    chunks: int | None,
    groups: int | None,
    image_tokens: int | None,
    no_check: bool,
    no_slots: bool,
    **given: Any,
) -> None:
    """See the command's help."""
    from nativesd.checkpoints.export import Static
    from nativesd.checkpoints.export import export_onnx as run_export

    told = {"batch": batch, "chunks": chunks, "groups": groups, "image_tokens": image_tokens}
    counts = {name: number for name, number in told.items() if number is not None}
    _refuse_idle(context)
    if given["image_prompts"] is False and (groups or image_tokens):
        raise click.UsageError("--groups and --image-tokens are of image prompts: leave out --no-image-prompts")
    if given["names"] != NAMES[0] and (groups or image_tokens):
        raise click.UsageError(f"--groups and --image-tokens are of image prompts: leave out --names {given['names']}")
    if counts and static is None:
        raise click.UsageError(f"--{next(iter(counts)).replace('_', '-')} is of one size: pass --static too")
    size = None if static is None else Static(*static, **counts)
    done = run_export(
        source, dest, static=size, slots=not no_slots, check=not no_check, on_part=_part, **_options(given)
    )
    _print_exported(done)


@export.command("tensorrt", help=f"Build TensorRT engines of SOURCE ({MODEL_HELP}).")
@_common
@click.option("--engines", type=click.Path(path_type=Path), help=ENGINES_HELP)
@click.option("--engine", "backend", type=click.Choice(["tensorrt-rtx", "tensorrt"]), help="[default: by the GPU]")
@click.option("--for", "targets", multiple=True, metavar="SM",
              help="Such as sm120; sm86,sm89: one each; sm86+sm89: one for both [default: this GPU].")  # fmt: skip
@click.option("--profile", "profiles", multiple=True, metavar="SIZE[-bIMAGES][-cCHUNKS]",
              help="SIZE: 512, 768x512, 512to1024 or dynamic; repeatable [default: dynamic].")  # fmt: skip
@click.option("--stream", "slots", type=click.IntRange(1, 8), help="Rows of a stream of so many slots.")
@click.option("--dtype", default="float16", show_default=True, help="float16, bfloat16 or float32.")
@click.option("--weight-streaming", is_flag=True, help="The weights may stay in main memory.")
@click.option("--again", is_flag=True, help="Build in place of an engine that is there.")
@click.pass_context
def export_tensorrt(
    context: click.Context, /, source: str, no_slots: bool, no_check: bool, slots: int | None, **given: Any
) -> None:
    """See the command's help."""
    _refuse_idle(context)
    if slots is not None:
        given["profiles"] = [_streamed(profile, slots) for profile in given["profiles"] or ("dynamic",)]
    from nativesd.checkpoints.export import export_tensorrt as run_export

    with _progress() as on_progress:
        done = run_export(
            source,
            slots=not no_slots,
            check=not no_check,
            on_part=_part,
            on_progress=on_progress,
            **_options(given),
        )
    table = Table("component", "for", "", "seconds", "size", "checked", box=None, pad_edge=False)
    for each in done:
        seconds = str(each.details.get("build_seconds", ""))
        size = "" if each.path is None else size_text((each.path / "model.engine").stat().st_size)
        table.add_row(each.name, each.target, each.state, seconds, size, each.reason or _checked(each.details))
    print_tables(table, stderr=True)
    for each in done:
        if each.path is not None:
            click.echo(each.path)


@main.group()
def engines() -> None:
    """The folder of graphs and engines."""


@engines.command("list")
@click.option("--engines", "root", type=click.Path(path_type=Path), help=ENGINES_HELP)
def list_engines(root: Path | None) -> None:
    """List the engines with what they are for. Exit code 1: some are damaged."""
    _show(root, deep=False)


@engines.command("verify")
@click.option("--engines", "root", type=click.Path(path_type=Path), help=ENGINES_HELP)
def verify_engines(root: Path | None) -> None:
    """Compare every file with its checksum. Exit code 1: some are damaged."""
    _show(root, deep=True)


@engines.command("prune")
@click.option("--engines", "root", type=click.Path(path_type=Path), help=ENGINES_HELP)
@click.option("--dry-run", is_flag=True, help="Say what would be removed.")
def prune_engines(root: Path | None, dry_run: bool) -> None:
    """Remove engines that are damaged, and what unfinished builds left."""
    for gone in _store(root).prune(dry_run=dry_run):
        click.echo(f"{'would remove' if dry_run else 'removed'} {gone.path} ({size_text(gone.size)}): {gone.reason}")


def _store(root: Path | None) -> Any:
    from nativesd.export.kept.store import Store
    from nativesd.export.library import default_store

    return Store(root or default_store())


def _show(root: Path | None, *, deep: bool) -> None:
    from nativesd.export.kept.entries import verify

    store = _store(root)
    table = Table(
        "component", "model", "weights", "backend", "for", "precision", "profiles", "takes", "size", "state",
        box=None, pad_edge=False,
    )  # fmt: skip
    sound = True
    for entry in store.entries():
        problem, key = verify(entry, deep=deep), entry.key
        sound = sound and problem is None
        what = (
            [entry.path.name, *[""] * 7]
            if key is None
            else [key.component, str(entry.details.get("source") or key.family), key.weights[:8],
                  f"{key.backend} {key.version}", key.device, key.precision,
                  ", ".join(key.profiles), _takes(entry)]
        )  # fmt: skip
        table.add_row(*what, size_text(entry.size), problem or "sound")
    print_tables(table)
    sys.exit(0 if sound else 1)


def _takes(entry: Entry) -> str:
    """What a graph has inputs for, beside those of its kind."""
    inputs = entry.details.get("inputs")
    slots = [each for each in inputs if isinstance(each, dict)] if isinstance(inputs, list) else []
    words = {"control": "without_control", "image prompts": "without_image_prompts"}
    return ", ".join(what for what, mark in words.items() if any(mark in slot for slot in slots))


def _refuse_idle(context: click.Context) -> None:
    """Refuse what was given where it changes nothing of the components that are exported, or of how."""
    given = {
        param.name: value for param in context.command.params
        if context.get_parameter_source(param.name or "") is not ParameterSource.DEFAULT
        and (value := context.params[param.name or ""]) != param.default
    }  # fmt: skip
    flags, components = flags_of(context), given.get("components", COMPONENTS)
    for name in given:
        changed = CHANGE.get(name, components)
        if not set(changed) & set(components):
            raise does_nothing(flags[name], *(f"--component {component}" for component in changed))
    lacking = [component for component in components if component in MADE_OF and MADE_OF[component] not in given]
    if "components" in given and len(lacking) < len(components):  # of nothing at all the exporters say more
        for component in lacking:
            raise does_nothing(f"--component {component}", flags[MADE_OF[component]])
    if "tolerance" in given and "no_check" in given:
        raise click.UsageError("--tolerance is of the check: leave out --no-check")


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """What was given on the command line, as the exporters take it."""
    options = {name: value for name, value in given.items() if value not in (None, ())}
    if "loras" in options:
        options["loras"] = [lora_use(text) for text in options["loras"]]
    return options


def _part(name: str, number: int, total: int) -> None:
    say(f"{name} ({number} of {total})")


def _print_exported(done: Sequence[Exported]) -> None:
    for each in done:
        click.echo(f"{each.path}, {_checked(each.details)}")


def _checked(details: dict[str, Any]) -> str:
    """How what was written was compared with PyTorch in float32, and with what result."""
    graph = details.get("onnx", details).get("error")
    graph_text = "not checked" if graph is None else f"within {graph:.1e} of PyTorch"
    if "onnx" not in details:
        return graph_text
    if "error" in details:
        return f"within {details['error']:.1e} of PyTorch"
    reason = details.get("not_run", "engine not run here")
    return f"{reason}; graph {graph_text}"


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """A bar of the builder's outermost phase, on stderr."""
    from tqdm import tqdm

    with tqdm(file=sys.stderr, leave=False, disable=None) as bar:

        def show(progress: Any) -> None:
            if len(progress.phases) == 1:
                bar.set_description(progress.phases[0])
                bar.total, bar.n = progress.steps, progress.step
                bar.refresh()

        yield show


def _streamed(profile: str, slots: int) -> str:
    """A profile for a stream of so many slots."""
    size, chunks = profile.partition("-c")[::2]
    if "-b" in size or "-s" in size:
        raise click.UsageError(f"--stream says the rows, and the profile {profile} too: pass either")
    return f"{size}-s{slots}" + (f"-c{chunks}" if chunks else "")
