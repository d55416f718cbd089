"""This machine: what works on it, and whether it computes what it should."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from nativesd.cli.common import Row, main, print_lines, print_tables, say

if TYPE_CHECKING:
    from nativesd.machine.timing import Report


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON (schema 1).")
def doctor(as_json: bool) -> None:
    """Say what will not work on this machine, and what mends it. Exit code 1 means findings."""
    from nativesd.machine.doctor import examine

    report = examine()
    if as_json:
        click.echo(report.to_json())
    else:
        print_lines(Row(label, text) for label, text in report.rows())
        for finding in report.findings:
            print_lines([Text(finding.message, style="red")])
            click.echo(f"  {finding.remedy}")  # not by rich, which would wrap a command that is to be copied
    sys.exit(0 if report.ok else 1)


@main.command()
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1, ... or cpu.")
@click.option(
    "--family",
    "families",
    multiple=True,
    type=click.Choice(["sd15", "sd21", "sdxl"]),
    help="Repeatable [default: all].",
)
@click.option("--published-sizes", is_flag=True, help="The families' own picture sizes; takes the CPU minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON (schema 1).")
def smoke(device: str, families: Sequence[str], published_sizes: bool, as_json: bool) -> None:
    """Compare every component on a device with float32 on the CPU. Exit code 1 means differences."""
    from nativesd.machine.smoke import smoke as run_smoke

    report = run_smoke(
        device, families=families, size="published" if published_sizes else "small",
        progress=lambda what: say(what),
    )  # fmt: skip
    click.echo(report.to_json() if as_json else report.to_text())
    sys.exit(0 if report.ok else 1)


@main.command()
@click.option("--case", "names", multiple=True, help="Such as 'unet sd21 64x64 bf16', repeatable [default: that one].")
@click.option("--device", help="cuda, cuda:1, ... or cpu [default: cuda where there is one].")
@click.option("--threads", type=click.IntRange(1), help="On a CPU [default: one per core].")
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Turns of every way.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def bench(names: Sequence[str], device: str | None, threads: int | None, rounds: int, as_json: bool) -> None:
    """Time UNet steps and VAE decodes at published sizes, with random weights, with and without the fast path."""
    from nativesd.machine.bench import run_bench

    report = run_bench(names, device, threads=threads, rounds=rounds, progress=say)
    if as_json:
        click.echo(json.dumps(report.fields(), indent=2))
    else:
        print_tables(timing_table(report, "nativesd plain"))


def timing_table(report: Report, base: str) -> Table:
    """A row for every case and way, compared with way `base`."""
    out = Table(title=" · ".join(f"{value}" for value in report.machine.values()))
    out.add_column("case")
    out.add_column("way")
    for name in ("first s", "median s", "± %", "it/s", f"x {base}", "peak MB", "GFLOP", "% of peak"):
        out.add_column(name, justify="right")
    for timing in report.timings:
        ratio = report.ratio(timing, base)
        out.add_row(
            timing.case,
            timing.way,
            f"{timing.first:.1f}",
            f"{timing.median:.3f}",
            f"{100 * timing.spread:.0f}",
            f"{1 / timing.median:.2f}",
            "" if math.isnan(ratio) else f"{ratio:.2f}",
            "" if timing.peak is None else f"{timing.peak / 1e6:.0f}",
            f"{timing.flops / 1e9:.0f}",
            f"{100 * timing.share:.0f}",
        )
    return out
