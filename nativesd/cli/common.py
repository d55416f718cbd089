"""What the commands have in common: the group they belong to, parameter types, output, and the way out."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nativesd.cli.help import Group, as_flags
from nativesd.errors import NativesdError, NativesdWarning, printable
from nativesd.version import __version__

HANGING = 4
"""Columns by which the rest of a line is moved in that does not fit."""
LABEL = 20
"""Columns of a report's labels."""
MODEL_HELP = "'tiny' (embedded), a folder, a file, or a hub id"
ENGINES_HELP = "Folder of engines [default: nativesd/engines in the user's cache]."
BACKENDS = ["torch", "cudagraphs", "onnx", "openvino", "tensorrt", "tensorrt-rtx"]
RUNNING = (
    click.option("--device", help="cpu, cuda, cuda:1, ... [default: cuda where there is one]."),
    click.option("--dtype", help="float16, bfloat16 or float32 [default: float16 on CUDA, else float32]."),
    click.option("--backend", type=click.Choice(BACKENDS), help="What runs the model [default: torch]."),
    click.option("--engines", type=click.Path(path_type=Path), help=ENGINES_HELP),
)
"""The options that say what a model runs on."""
SAVING = (
    click.option("--offload", is_flag=True, default=None, help="Keep what is not in use in main memory."),
    click.option("--fp8", is_flag=True, default=None, help="Transformer blocks in float8 (RTX 40, H100 and newer)."),
    click.option("--quantize", type=click.Choice(["int8"]), help="Keep the UNet's weights in 8 bits: half the memory."),
)
"""Those that save memory."""
SOURCE_HELP = "a file (safetensors or pickle), a model folder, a hub id, or org/name/file.safetensors on the hub"


class Size(click.ParamType[tuple[int, int]]):
    """WIDTHxHEIGHT in pixels."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse, or fail with exit code 2."""
        found = re.fullmatch("([0-9]{1,9})[xX]([0-9]{1,9})", str(value))
        if found is None:
            self.fail(f"{value!r} is not a size such as 512x768", param, ctx)
        return int(found[1]), int(found[2])


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
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


def embedding_files(text: str) -> list[str]:
    """FILE, or the two of SDXL's embedding, FILE,FILE; a file's own name may have commas."""
    return [text] if os.path.exists(text) else text.split(",")


@dataclass(frozen=True)
class Row:
    """A line of a report: what, and what of it. On a terminal what does not fit goes on under where it began."""

    label: str
    text: str
    style: str = ""

    def head(self) -> Text:
        """The label, as wide as all are."""
        return Text.assemble(
            "  ", (f"{self.label:<{LABEL}}" if len(self.label) < LABEL else f"{self.label} ", self.style)
        )

    def lines(self, console: Console) -> Iterator[Text]:
        """As lines of the console's width."""
        head, indent = self.head(), " " * (LABEL + 2)
        width = max(console.width - max(len(head), len(indent)), 20)
        first, *others = [line.plain for line in Text(printable(self.text)).wrap(console, width)] or [""]
        yield head + Text(first)
        yield from (Text(indent + line) for line in others)


def print_lines(lines: Iterable[Text | Row]) -> None:
    """Colour and width follow the terminal; a pipe gets plain text, unwrapped."""
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, soft_wrap=not terminal)
    for line in lines:
        if isinstance(line, Row):
            for part in line.lines(console) if terminal else [line.head() + Text(printable(line.text))]:
                console.print(part, soft_wrap=True)
        else:
            if not line.plain.isprintable():
                line = Text(printable(line.plain), line.style)
            first, *others = line.wrap(console, console.width - HANGING) if terminal else [line]
            first.rstrip()
            console.print(first, soft_wrap=True)
            for part in others:
                part.rstrip()
                console.print(Text(" " * HANGING) + part, soft_wrap=True)


def print_tables(*tables: Table, stderr: bool = False) -> None:
    """As wide as the terminal, where what does not fit in a column goes on below; a pipe gets all of it."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    console = Console(width=None if terminal else 10_000, highlight=False, markup=False, stderr=stderr)
    for number, table in enumerate(tables):
        for column in table.columns:
            column.overflow = "fold"
        if number:
            console.print()
        console.print(table)


def by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """reason -> the keys it is given for."""
    out: dict[str, list[str]] = {}
    for key, reason in pairs:
        out.setdefault(reason, []).append(key)
    return out


def some(keys: Sequence[str]) -> str:
    """One key, or how many and the first."""
    return keys[0] if len(keys) == 1 else f"{len(keys)} tensors ({keys[0]}, ...)"


def say_left_out(ignored: Mapping[str, str]) -> None:
    """The keys that were left out, by the reasons, on stderr."""
    for reason, keys in by_reason(ignored.items()).items():
        tell(f"left out {some(keys)}: {reason}")


def count(number: int) -> str:
    """1234567 as 1.23 M."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return str(number)


def size_text(number: int) -> str:
    """Bytes in decimal units, as download pages give them."""
    return count(number).replace(" B", " G").replace(" k", " k").rstrip() + ("B" if number >= 1000 else " B")


def say(message: str) -> None:
    """What is going on, on stderr."""
    tell(f"nativesd: {message}")


def tell(message: str) -> None:
    """Lines on stderr that may name what a file holds."""
    click.echo("\n".join(map(printable, message.split("\n"))), err=True)


def run() -> None:
    """The console script: errors are one sentence on stderr and an exit code, and Ctrl-C is 130 without a word."""
    warnings.showwarning = _show_warning
    try:
        code = main(prog_name="nativesd", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process where it is
        sys.exit(130)
    except NativesdError as error:
        say(str(error))
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Our own warnings, in the words of the command line; other libraries' where -W or PYTHONWARNINGS asks for them."""
    if not issubclass(category, NativesdWarning) and not sys.warnoptions:
        return
    context = click.get_current_context(silent=True)
    say(f"warning: {message if context is None else as_flags(str(message), context)}")
