"""The README and the pages of docs/ as the tests read them: blocks of code, links, headings, and code in sentences.

A fenced block names its language first. Blocks of `sh`, `console`, `python` and `pycon` (doctests) are run, unless the
rest of that line says "not run: REASON", which the source shows; "exits with N" or "exits with N or M" says how the
last command ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RUN, SHOWN = {"sh", "console", "python", "pycon"}, {"text", "toml", "json", "cpp"}
REASONS = ("it installs packages", "it needs a GPU", "it takes", "it downloads", "it exports", "a build takes",
           "the test suite runs it", "another page runs it")  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` counts from 1."""

    page: Path
    line: int
    language: str
    text: str
    skipped: str | None
    """Why it is not run."""
    exit_codes: tuple[int, ...]
    """How the last command may end."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def tokens(page: Path) -> list[Token]:
    """The page as markdown-it reads it, with tables as GitHub has them."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> Iterator[Block]:
    """The page's fenced blocks, in order."""
    for token in tokens(page):
        if token.type == "code_block":
            raise AssertionError(f"{page}: indented code, which cannot say what it is: {token.content[:60]!r}")
        if token.type == "fence":
            language, _, rest = token.info.partition(" ")
            skipped = rest.removeprefix("not run: ") if rest.startswith("not run: ") else None
            ends = re.fullmatch(r"exits with (\d)(?: or (\d))?", rest)
            if rest and skipped is None and ends is None:
                raise AssertionError(f"{page}: {token.info!r} is neither 'not run: REASON' nor 'exits with N'")
            assert token.map is not None
            codes = (0,) if ends is None else tuple(int(code) for code in ends.groups() if code)
            yield Block(page, token.map[0] + 1, language, token.content, skipped, codes)


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """The block's commands, each with the output that is shown with it: in a console those behind "$ "."""
    text = block.text.replace("\\\n", " ")
    if block.language == "sh":
        yield from ((line, "") for line in text.splitlines() if line.strip() and not line.startswith("#"))
        return
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, wanted = part.partition("\n")
        yield command, wanted


def inline(page: Path) -> Iterator[Token]:
    """What sentences, headings and cells are made of."""
    for token in tokens(page):
        yield from token.children or ()


def spans(page: Path) -> list[str]:
    """Code inside sentences."""
    return [token.content for token in inline(page) if token.type == "code_inline"]


def links(page: Path) -> list[str]:
    """The targets of the page's links and pictures."""
    targets = (token.attrs.get("href", token.attrs.get("src")) for token in inline(page))
    return [str(target) for target in targets if target]


def tables(page: Path) -> dict[str, list[list[str]]]:
    """The rows of the page's tables, without their heads, by the heading that they stand under."""
    out: dict[str, list[list[str]]] = {}
    heading = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("|"):
            out.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return {heading: rows[2:] for heading, rows in out.items()}  # without the head and the rule below it


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the page's headings."""
    read = tokens(page)
    titles = [after.content for before, after in pairwise(read) if before.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
