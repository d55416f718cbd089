"""The drawing of the rooms in docs/architecture.md: every room's door, its files, and what it imports.

    python tools/rooms.py           # prints the drawing
    python tools/rooms.py --write   # and puts it into docs/architecture.md

The floors are those of the contract in pyproject.toml, the sentences are the rooms' docstrings, and who imports whom is
read off the code. tests/docs/test_rooms.py holds the page to it.
"""

from __future__ import annotations

import argparse
import ast
import textwrap
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: python tools/rooms.py --write -->", "<!-- end of rooms -->"
PACKAGE = "nativesd"
WIDTH = 112


def floors() -> list[list[str]]:
    """The rooms and single modules of every floor, from the highest down."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]
    return [[name.strip().removeprefix(f"{PACKAGE}.") for name in layer.split("|")] for layer in contract["layers"]]


def drawing() -> str:
    """The drawing, floor by floor."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    return f"\n{'─' * WIDTH}\n".join("\n".join(_room(graph, name) for name in floor) for floor in floors())


def _room(graph: grimp.ImportGraph, name: str) -> str:
    """A room: its name and door, its files (and those of the rooms inside it), and the rooms that it imports."""
    module = f"{PACKAGE}.{name}"
    path = ROOT / PACKAGE / name
    inside = {module, *graph.find_descendants(module)}
    used = {
        target.split(".")[1]
        for source in inside
        for target in graph.find_modules_directly_imported_by(source) - inside
        if "." in target
    }
    lines = [f"{name:<13}{_door(path)}"]
    for folder in (path, *sorted(child for child in path.glob("*") if (child / "__init__.py").is_file())):
        if files := sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("__")):
            label = "" if folder == path else f"{folder.name}/: "
            lines += textwrap.wrap(label + " ".join(files), WIDTH, initial_indent=" " * 15,
                                   subsequent_indent=" " * 17)  # fmt: skip
    if used:
        lines += textwrap.wrap("imports " + ", ".join(sorted(used)), WIDTH, initial_indent=" " * 13,
                               subsequent_indent=" " * 15)  # fmt: skip
    return "\n".join(lines)


def _door(path: Path) -> str:
    """The first line of a room's docstring, or of a single module's."""
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def in_page(page: str) -> str:
    """The drawing as a page has it."""
    _, _, rest = page.partition(f"{BEGIN}\n\n```text\n")
    return rest.partition(f"\n```\n\n{END}")[0]


def main() -> None:
    """Print the drawing, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/architecture.md")
    drawn = drawing()
    if parser.parse_args().write:
        page = PAGE.read_text(encoding="utf-8")
        head, _, rest = page.partition(BEGIN)
        _, _, tail = rest.partition(END)
        PAGE.write_text(f"{head}{BEGIN}\n\n```text\n{drawn}\n```\n\n{END}{tail}", encoding="utf-8")
    print(drawn)


if __name__ == "__main__":
    main()
