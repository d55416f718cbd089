"""This machine: what works on it, and whether it computes what it should."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
from rich.text import Text

from nativesd.cli.common import main, print_lines, row


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON (schema 1).")
def doctor(as_json: bool) -> None:
    """Say what will not work on this machine, and what mends it. Exit code 1 means findings."""
    from nativesd.doctor import examine

    report = examine()
    if as_json:
        click.echo(report.to_json())
    else:
        print_lines(row(label, text) for label, text in report.rows())
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
    from nativesd.smoke import smoke as run_smoke

    report = run_smoke(
        device, families=families, size="published" if published_sizes else "small",
        progress=lambda what: click.echo(f"nativesd: {what}", err=True),
    )  # fmt: skip
    click.echo(report.to_json() if as_json else report.to_text())
    sys.exit(0 if report.ok else 1)
