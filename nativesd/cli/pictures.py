"""What helps to ask for pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import click

from nativesd.cli.common import embedding_files, main, print_tables
from nativesd.text.syntax import Emphasis, Syntax

WHOLE_TABLE = 150  # columns in which the samplers' table folds no name


@main.command()
def samplers() -> None:
    """List the samplers and schedules, with the names they are known by and their sources."""
    from rich.console import Console
    from rich.table import Table

    from nativesd.sampling.table import SAMPLERS, SCHEDULES

    narrow = sys.stdout.isatty() and Console().width < WHOLE_TABLE
    columns = ["order", "calls", "also, noise, source"] if narrow else ["also", "order", "noise", "calls", "source"]
    table = Table("sampler", *columns, box=None, pad_edge=False)
    for each in SAMPLERS:
        names = [name for name in (each.published, *each.aliases) if name]
        noise = "" if not each.noisy else "Brownian" if each.brownian else "every step"
        order, calls = str(each.order), str(each.evaluations)
        if narrow:
            noises = [f"noise: {noise}"] if noise else []
            table.add_row(each.name, order, calls, "\n".join([*names, *noises, each.source]))
        else:
            table.add_row(each.name, ", ".join(names), order, noise, calls, each.source)
    schedules = Table("schedule", "also", "source", box=None, pad_edge=False)
    for schedule in SCHEDULES:
        schedules.add_row(schedule.name, ", ".join(schedule.aliases), schedule.source)
    print_tables(table, schedules)


@main.command()
@click.argument("prompt")
@click.option(
    "--emphasis",
    type=click.Choice(get_args(Emphasis), case_sensitive=False),
    default="original",
    show_default=True,
    help="How it weighs words: as A1111, or as ComfyUI.",
)
@click.option("--literal", is_flag=True, help="Take the prompt as it stands: no weights, no BREAK.")
@click.option(
    "--embedding",
    "embeddings",
    type=click.Path(),
    multiple=True,
    metavar="FILE[,FILE]",
    help="Textual inversion; repeatable.",
)
def tokens(prompt: str, emphasis: Emphasis, literal: bool, embeddings: Sequence[str]) -> None:
    """Show the tokens of PROMPT, their weights, and where its chunks break."""
    from nativesd.text.embedding import read_embeddings
    from nativesd.text.prompt import explain_tokens
    from nativesd.text.tokenizer import END_OF_TEXT, ClipTokenizer

    known = {word.name: word for files in embeddings for word in read_embeddings(embedding_files(files))}
    syntax: Syntax = "literal" if literal else emphasis
    chunks = explain_tokens(prompt, ClipTokenizer(pad=END_OF_TEXT), syntax=syntax, embeddings=known)
    for number, chunk in enumerate(chunks, 1):
        click.echo(f"chunk {number} of {len(chunks)}: {len(chunk.tokens)} of 75 tokens")
        for token in chunk.tokens:
            weight = "" if token.weight == 1 else f"  x {token.weight:g}"
            click.echo(f"  {token.id:>5}  {token.text}{weight}")


@main.command()
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("--model", required=True, type=click.Path(), help="File of a model such as ESRGAN.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File [default: PICTURE-SCALEx.png].")
@click.option(
    "--scale", type=click.FloatRange(0, 64, min_open=True), help="How many times as large [default: the model's]."
)
@click.option("--tile", type=click.IntRange(64), help="Pixels a side that the model sees at a time [default: 512].")
@click.option("--device", help="cpu, cuda, cuda:1, ... [default: cuda where there is one].")
def upscale(
    picture: Path, model: str, output: Path | None, scale: float | None, tile: int | None, device: str | None
) -> None:
    """Make PICTURE larger by a model; prints the path. The picture's parameters go along."""
    from nativesd.pictures.embedded import read_texts
    from nativesd.pictures.images import open_image
    from nativesd.pictures.result import check_target, text_options, write_picture
    from nativesd.pipeline.upscaling import load_upscaler, resized

    small = open_image(picture)
    loaded = load_upscaler(model, device=device)
    if tile is not None:
        loaded.tile, loaded.overlap = tile, min(loaded.overlap, tile // 4)
    times = loaded.scale if scale is None else scale
    path = output or picture.with_name(f"{picture.stem}-{times:g}x.png")
    kind = check_target(path)
    larger = resized(small, loaded, times)
    text = read_texts(picture).parameters
    fields = f"Postprocess upscale by: {times:g}, Postprocess upscaler: {loaded.name}"
    write_picture(larger, path, **text_options(f"{text}, {fields}" if text else fields, kind))
    click.echo(path)
