"""Making checkpoints and LoRAs of others, and the hashes that they are known by."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.text import Text

from nativesd.cli.common import SOURCE_HELP, Row, by_reason, main, print_lines, say_left_out, some, tell
from nativesd.errors import UsageError
from nativesd.pipeline.asked.readers import lora_use

if TYPE_CHECKING:
    from nativesd.checkpoints.loras.change import Written

METHODS = ["weighted-sum", "add-difference", "sum", "slerp", "train-difference", "ties", "dare", "magnitude"]


@main.command(
    "merge",
    help="Write several models merged into one to DEST, a .safetensors file or a folder. Each is a file, a model "
    "folder or a hub id, in a layout of its own.",
)
@click.argument("models", nargs=-1, metavar="A B [C ...]")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(METHODS), help="How: see docs/workshop.md. [default: weighted-sum]")
@click.option("--alpha", type=float, help="How much of the others. [default: 0.5 of weighted-sum and slerp, else 1]")
@click.option("--weights", metavar="W,W,...", help="With sum: one for each model, adding up to 1. [default: all alike]")
@click.option("--density", type=float, help="With ties, dare, magnitude: the part of the differences that is kept.")
@click.option("--seed", type=int, help="With dare: what the part that is dropped is drawn by. [default: 0]")
@click.option(
    "--blocks", metavar="ALPHAS", help="26 numbers (SDXL: 20), BASE first, or NAME=ALPHA,... such as IN00=0.3."
)
@click.option(
    "--only", multiple=True, metavar="PART", help="Merge unet, text_encoder, text_encoder_2 or vae; repeatable."
)
@click.option("--unet", help="The result's UNet, instead of a merged one.")
@click.option("--vae", help="The result's VAE, instead of a merged one.")
@click.option("--text-encoder", "text_encoders", multiple=True, help="The result's text encoder; repeatable.")
@click.option("--layout", type=click.Choice(["diffusers", "ldm"]), help="The layout of DEST. [default: by its name]")
@click.option("--dtype", type=click.Choice(["f16", "bf16", "f32"]), help="[default: as A has it]")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="A .toml file that says all of it, or a merged checkpoint."
)
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override.")
def merge_models(models: Sequence[str], dest: Path, weights: str | None, **given: Any) -> None:
    """See the command's help."""
    from nativesd.checkpoints.merging.merge import merge

    if given["recipe"] is not None:
        beside = {**given, "weights": weights, "recipe": None, "maps": None}
        if models or any(value not in (None, ()) for value in beside.values()):
            raise click.UsageError("--recipe says all of it: give DEST, and nothing else")
    options = _said(given)
    if weights is not None:
        options["weights"] = _numbers("weights", weights)
    done = merge(models or None, dest, **options)
    say_left_out(done.ignored)
    for choice, names in by_reason(done.choices.items()).items():
        tell(f"{some(names)}: {choice}")
    click.echo(done.path)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise UsageError(f"{name} must be numbers with commas between them, not {text!r}") from None


@main.command("hash")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="As JSON, an object a line.")
def hash_command(files: Sequence[Path], as_json: bool) -> None:
    """Print the hashes by which web UIs and model pages know FILES.

    Of a folder, those of its files of weights. They are kept in the user's cache, and pictures that are made with a
    file whose hashes are known carry A1111's "Model hash".
    """
    from dataclasses import asdict

    from nativesd.shipped import NAMED
    from nativesd.weights.files.hashes import hash_file
    from nativesd.weights.files.source import open_source

    for path in (NAMED.get(str(file), file) for file in files):
        of_folder = [file for member in open_source(path) for file in member.data_starts] if os.path.isdir(path) else []
        for file in of_folder or [path]:
            found = hash_file(file)
            if as_json:
                click.echo(json.dumps({"file": str(file), **asdict(found)}))
                continue
            rows = {
                "SHA-256": found.sha256, "AutoV1": found.short, "AutoV2": f"{found.auto_v2} (A1111's model hash)",
                "AutoV3": found.auto_v3, "CRC32": found.crc32, "sshs_model_hash": found.tensors,
                "sshs_legacy_hash": found.legacy,
            }  # fmt: skip
            print_lines([Text(str(file), style="bold"), *(Row(name, text) for name, text in rows.items() if text)])


@main.group()
def lora() -> None:
    """LoRA files."""


@lora.command(
    "merge", help=f"Write MODEL ({SOURCE_HELP.partition(',')[0]} or a model folder) with LORAs merged to DEST."
)
@click.argument("model")
@click.argument("loras", nargs=-1, required=True, metavar="LORA[:SCALE[:TEXT]]...")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--lora-partial", "partial", is_flag=True, help="Apply a LoRA of which a part finds no place.")
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override.")
def merge(model: str, loras: Sequence[str], dest: Path, partial: bool, maps: Path | None) -> None:
    """See the command's help."""
    from nativesd.checkpoints.loras.merge import merge_checkpoint
    from nativesd.weights.lora.file import read_lora
    from nativesd.weights.lora.resolve import Use, reasons

    uses = [Use(read_lora(file), unet, text) for file, unet, text in map(lora_use, loras)]
    done = merge_checkpoint(model, uses, dest, partial=partial, maps=maps)
    say_left_out(done.ignored)
    for use, unplaced in zip(uses, done.unplaced, strict=True):
        for line in reasons(unplaced):
            tell(f"not applied of {use.lora.path.name}: {line}")
    tell(f"{done.changed} of {done.tensors} tensors changed")
    click.echo(done.path)


RULES = [
    click.option("--rank", type=int, help="The rank of every layer; with another rule, the most."),
    click.option("--ratio", type=float, help="Keep singular values above the largest divided by this."),
    click.option("--cumulative", type=float, help="Keep values until their sum is this part of all."),
    click.option("--frobenius", type=float, help="The same of the root of the sum of their squares."),
    click.option("--energy", type=float, help="Keep values until the sum of their squares is this part of all."),
]
WRITTEN = [
    click.option("--layout", type=click.Choice(["kohya", "diffusers", "peft"]), help="[default: kohya]"),
    click.option("--dtype", type=click.Choice(["f16", "bf16", "f32"]), help="[default: as stored; extracted, f16]"),
]
BASE = click.option("--base", help="The model that it is for. [default: the published one that it fits]")
Command = TypeVar("Command", bound=Callable[..., None])


def _with(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Options that several commands have."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


@lora.command("extract", help="Write the difference of the model TUNED from BASE as a LoRA.")
@click.argument("tuned")
@click.argument("base")
@click.argument("dest", type=click.Path(path_type=Path))
@_with(*RULES)
@click.option("--conv-rank", type=int, help="The rank of convolutions with a kernel; 0 leaves them out.")
@click.option("--unet-only", is_flag=True, help="Leave the text encoders out.")
@click.option("--clamp-quantile", type=float, help="Keep the matrices within this quantile of their numbers.")
@_with(*WRITTEN)
def extract(tuned: str, base: str, dest: Path, unet_only: bool, **given: Any) -> None:
    """See the command's help."""
    from tqdm import tqdm

    from nativesd.checkpoints.loras.extract import extract_lora

    with tqdm(file=sys.stderr, leave=False, disable=None, unit="parameter") as bar:

        def show(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        done = extract_lora(tuned, base, dest, text_encoders=not unet_only, on_progress=show, **_said(given))
    unlike = [name for name, largest in done.left_out.items() if math.isinf(largest)]
    if differing := {name: largest for name, largest in done.left_out.items() if name not in unlike}:
        tell(f"left out {some(list(differing))}, which differ by {max(differing.values()):.3g} at most")
    if unlike:
        tell(f"left out {some(unlike)}: of another shape, or only in one of the models")
    _say_written(done)


@lora.command("resize", help="Write LORA with smaller ranks to DEST.")
@click.argument("file", metavar="LORA")
@click.argument("dest", type=click.Path(path_type=Path))
@_with(*RULES, *WRITTEN, BASE)
def resize(file: str, dest: Path, **given: Any) -> None:
    """See the command's help."""
    from nativesd.checkpoints.loras.change import resize_lora

    _say_written(resize_lora(file, dest, **_said(given)))


@lora.command("join", help="Write one LoRA to DEST that does what LORAs do together.")
@click.argument("files", nargs=-1, required=True, metavar="LORA[:SCALE]...")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="Decompose the sum: the rank of every layer. [default: the ranks add up]")
@click.option("--energy", type=float, help="Decompose the sum: keep this part of its squares.")
@_with(*WRITTEN, BASE)
def join(files: Sequence[str], dest: Path, **given: Any) -> None:
    """See the command's help."""
    from nativesd.checkpoints.loras.change import join_loras

    _say_written(join_loras([lora_use(file)[:2] for file in files], dest, **_said(given)))


def _say_written(done: Written) -> None:
    """How large a LoRA has become, and how exact it is."""
    ranks = " to ".join(map(str, dict.fromkeys(done.ranks)))
    tell(f"{done.layers} layers of rank {ranks}, relative error {done.error:.3g} at most")
    click.echo(done.path)
