"""The drawing of the rooms in docs/architecture.md is what the code is."""

from __future__ import annotations

import ast

import rooms

LONG = 350


def test_the_drawing_is_that_of_the_code() -> None:
    drawn = rooms.in_page(rooms.PAGE.read_text(encoding="utf-8"))
    assert drawn == rooms.drawing(), "the rooms have changed: python tools/rooms.py --write"


def test_every_room_is_drawn() -> None:
    """The contract of import-linter, whose floors are drawn, leaves no room and no module out."""
    package = rooms.ROOT / rooms.PACKAGE
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {name for floor in rooms.floors() for name in floor} == {name for name in there if name[0] != "_"}


def test_a_long_file_says_why_it_is_one() -> None:
    for path in sorted((rooms.ROOT / rooms.PACKAGE).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > LONG:
            said = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
            assert "one file" in said, f"{path} has over {LONG} lines: split it, or let its docstring say why not"
