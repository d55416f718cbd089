"""What helps to ask for pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from nativesd.cli.common import embedding_files, main, print_tables

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
@click.option("--literal", is_flag=True, help="Take the prompt as it stands: no weights, no BREAK.")
@click.option(
    "--embedding",
    "embeddings",
    type=click.Path(),
    multiple=True,
    metavar="FILE[,FILE]",
    help="Textual inversion; repeatable.",
)
def tokens(prompt: str, literal: bool, embeddings: Sequence[str]) -> None:
    """Show the tokens of PROMPT, their weights, and where its chunks break."""
    from nativesd.text.embedding import read_embeddings
    from nativesd.text.prompt import explain_tokens
    from nativesd.text.tokenizer import END_OF_TEXT, ClipTokenizer

    known = {word.name: word for files in embeddings for word in read_embeddings(embedding_files(files))}
    chunks = explain_tokens(prompt, ClipTokenizer(pad=END_OF_TEXT), literal=literal, embeddings=known)
    for number, chunk in enumerate(chunks, 1):
        click.echo(f"chunk {number} of {len(chunks)}: {len(chunk.tokens)} of 75 tokens")
        for token in chunk.tokens:
            weight = "" if token.weight == 1 else f"  x {token.weight:g}"
            click.echo(f"  {token.id:>5}  {token.text}{weight}")
