"""What the commands have in common: the group they belong to, parameter types, output, and the way out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from nativesd.errors import NativesdError
from nativesd.version import __version__

MODEL_HELP = "'tiny' (embedded), a folder, a file, or a hub id"
ENGINES_HELP = "Folder of engines [default: nativesd/engines in the user's cache]."
SOURCE_HELP = "a file (safetensors or pickle), a model folder, a hub id, or org/name/file.safetensors on the hub"


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


def lora_use(text: str) -> tuple[str, float, float]:
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


def print_lines(lines: Iterable[Text]) -> None:
    """Colour and width follow the terminal; a pipe gets plain text, unwrapped."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    for line in lines:
        console.print(line)


def by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """reason -> the keys it is given for."""
    out: dict[str, list[str]] = {}
    for key, reason in pairs:
        out.setdefault(reason, []).append(key)
    return out


def some(keys: Sequence[str]) -> str:
    """One key, or how many and the first."""
    return keys[0] if len(keys) == 1 else f"{len(keys)} tensors ({keys[0]}, ...)"


def row(label: str, text: str, style: str = "") -> Text:
    """A line of a report: what, and what of it."""
    return Text.assemble("  ", (f"{label:<20}" if len(label) < 20 else f"{label} ", style), text)


def count(number: int) -> str:
    """1234567 as 1.23 M."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return str(number)


def size_text(number: int) -> str:
    """Bytes in decimal units, as download pages give them."""
    return count(number).replace(" B", " G").replace(" k", " k").rstrip() + ("B" if number >= 1000 else " B")


def run() -> None:
    """The console script: errors are one sentence on stderr and an exit code."""
    warnings.showwarning = lambda message, *_, **__: click.echo(f"nativesd: warning: {message}", err=True)
    try:
        main()
    except NativesdError as error:
        click.echo(f"nativesd: {error}", err=True)
        sys.exit(error.exit_code)
