"""The language of a table's names: templates with holes, integer expressions in them, and regular expressions.

What a stranger's table may cost is bounded here: an expression has at most MAX_EXPRESSION characters, a name's part at
most two captures, and a regular expression can read a name in at most MAX_WAYS ways. Names of over LONGEST characters,
which no published tensor has, fit no regular expression.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Generic, TypeVar

from nativesd.errors import NativesdError, quote

Dims = Mapping[str, int | tuple[int, ...]]

MAX_EXPRESSION = 100
MAX_NUMBER = 10**9
"""Of what an expression gives."""
LONGEST = 250
"""Characters of a name that a regular expression is tried on."""
MAX_WAYS = 250_000
"""Half a millisecond, of a name that fits in none of the ways."""
MAX_SPREAD = 64
"""Patterns of captures that may stand at one place of the names."""


class TableError(NativesdError):
    """A weight map that contradicts itself; the message names the table and the rule."""


# --- expressions

_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip


def evaluate(expression: str, values: Dims) -> int:
    """An integer expression over `values`: + - * // %, names, and an element of a list by name[index].

    Raises KeyError for a name that has no value, ValueError (SyntaxError) for anything else.
    """

    def visit(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name):
                bound = values[name]
                if isinstance(bound, int):
                    return bound
                raise ValueError(f"{name} is a list in {expression!r}: one of it is {name}[i]")
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                items = values[name]
                place = visit(index)
                if isinstance(items, int) or not 0 <= place < len(items):
                    raise ValueError(f"{name}[{place}] in {expression!r} is not there")
                return items[place]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                try:
                    result: int = _OPERATORS[type(op)](visit(left), visit(right))
                except ZeroDivisionError as error:
                    raise ValueError(f"{expression!r} divides by zero") from error
                return result
        raise ValueError(f"{expression!r} is not an integer expression")

    if len(expression) > MAX_EXPRESSION:  # which bounds its depth, too
        raise ValueError(f"{quote(expression)} has {len(expression)} characters, over {MAX_EXPRESSION}")
    number = visit(_parsed(expression))
    if abs(number) > MAX_NUMBER:
        raise ValueError(f"{expression!r} is {quote(number)}, beyond {MAX_NUMBER}")
    return number


@lru_cache(4096)
def _parsed(expression: str) -> ast.expr:
    """An expression's tree. A model's map has some dozens, and thousands of places where they stand."""
    return ast.parse(expression, mode="eval").body


# --- templates

_HOLE = re.compile(r"\{([^{}]+)\}")


def holes(template: str) -> list[str]:
    """What stands in a template's holes."""
    return _HOLE.findall(template)


def expand(where: str, template: str, values: Dims) -> str:
    """Replace the holes whose variables are bound; leave the captures. Raises TableError, beginning with `where`."""

    def fill(match: re.Match[str]) -> str:
        expression = match.group(1)
        if expression.isidentifier() and expression not in values:
            return match.group(0)
        try:
            return str(evaluate(expression, values))
        except (KeyError, ValueError, SyntaxError) as error:
            raise TableError(f"{where}: cannot compute {{{expression}}}: {error}") from error

    return _HOLE.sub(fill, template)


def captures(where: str, template: str) -> frozenset[str]:
    """The names of an expanded template's captures. Raises TableError, beginning with `where`."""
    for part in template.split("."):
        names = holes(part)
        if len(set(names)) < len(names):
            raise TableError(f"{where}: a capture stands twice between two dots")
        if len(names) > 2:
            raise TableError(f"{where}: more than two captures stand between two dots")
    return frozenset(holes(template))


def substitute(template: str, values: Mapping[str, str]) -> str:
    """A template with its captures' values."""
    return _HOLE.sub(lambda match: values[match.group(1)], template)


def join(prefix: str, template: str) -> str:
    """The full name; "../" at a template's start goes one part of the prefix up."""
    return re.sub(r"([^.]+\.)?\.\./", "", prefix + template) if "../" in template else prefix + template


def matching(where: str, template: str) -> re.Pattern[str]:
    """The pattern of an expanded template. Raises TableError."""
    if len(captures(where, template)) < len(holes(template)):
        raise TableError(f"{where}: a capture stands twice in {quote(template)}")
    return re.compile(_capturing(template))


def counting(where: str, template: str) -> re.Pattern[str]:
    """The pattern of an expanded template, whose first capture is a number. Raises TableError."""
    if holes(template)[:1] in ([], ["p"]):
        raise TableError(f"{where}: {quote(template)} has no number to count by")
    return matching(where, template)


def _capturing(template: str) -> str:
    """The regular expression of a template whose holes are captures."""
    pieces = _HOLE.split(template)  # literal, capture, literal, capture, ..., literal
    return "".join(
        f"(?P<{piece}>{'weight|bias' if piece == 'p' else '[0-9]{1,9}'})" if i % 2 else re.escape(piece)
        for i, piece in enumerate(pieces)
    )


V = TypeVar("V")


class Trie(Generic[V]):
    """Templates by their dot-separated parts: a name is matched in one walk, however many templates there are."""

    def __init__(self) -> None:
        self.literal: dict[str, Trie[V]] = {}
        self.pattern: dict[str, tuple[re.Pattern[str], Trie[V]]] = {}
        self.values: list[V] = []

    def add(self, where: str, template: str, value: V) -> None:
        """Store `value` under a template whose holes are captures. Raises TableError, beginning with `where`."""
        node = self
        for part in template.split("."):
            if "{" not in part:
                node = node.literal.setdefault(part, Trie())
                continue
            pattern = _capturing(part)
            if pattern not in node.pattern:
                if len(node.pattern) == MAX_SPREAD:
                    raise TableError(f"{where}: {quote(part)} is one of over {MAX_SPREAD} captures at its place")
                node.pattern[pattern] = re.compile(pattern), Trie()
            _, node = node.pattern[pattern]
        node.values.append(value)

    def find(self, name: str) -> list[tuple[V, dict[str, str]]]:
        """Every value whose template matches, with its captures."""
        out: list[tuple[V, dict[str, str]]] = []

        def walk(node: Trie[V], parts: list[str], found: dict[str, str]) -> None:
            if not parts:
                out.extend((value, found) for value in node.values)
                return
            if parts[0] in node.literal:
                walk(node.literal[parts[0]], parts[1:], found)
            for pattern, child in node.pattern.values():
                match = pattern.fullmatch(parts[0])
                if match and all(found.get(k, v) == v for k, v in match.groupdict().items()):
                    walk(child, parts[1:], found | match.groupdict())

        walk(self, name.split("."), {})
        return out


# --- regular expressions


def expression(text: str) -> re.Pattern[str]:
    """A regular expression of a table, to be tried on names of at most LONGEST characters.

    Raises ValueError for what is none, or could take for ever.
    """
    ways = _Ways(text).count()
    if ways > MAX_WAYS:
        raise ValueError(f"{quote(text)} can read a name in over {MAX_WAYS} ways: use fewer *, + and ?")
    try:
        return re.compile(text)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{quote(text)} is not a regular expression: {error}") from error


_REPEATED = re.compile(r"[*+]|\{[0-9]*(,?)[0-9]*\}")
_OPENS = re.compile(r"\((\?(:|P<\w+>|<[!=])|(?!\?))")
_CHARACTER = re.compile(r"\\[^1-9]|\[\^?\]?(\\.|[^]\\])*+\]|[^\\(\[]", re.DOTALL)


class _Ways:
    """In how many ways a backtracking reader may try to read a name of LONGEST characters by an expression.

    What is read is the part of the language that tables may use: no references to groups, no repeated groups, and no
    looking ahead.
    """

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def count(self) -> int:
        """Raises ValueError."""
        ways = self._either()
        if self.at < len(self.text):
            raise ValueError(f"{quote(self.text)} is not a regular expression: it closes a bracket that is not open")
        return ways

    def _either(self) -> int:
        ways = self._sequence()
        while self._take("|"):
            ways += self._sequence()
        return ways

    def _sequence(self) -> int:
        ways = 1
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            group, inside = self._item()
            if self._take("?"):
                inside += 1
            elif repeats := _REPEATED.match(self.text, self.at):
                if group:
                    raise ValueError(f"{quote(self.text)} repeats a group, which may take for ever: repeat a class")
                self.at = repeats.end()
                inside = 1 if repeats[1] == "" else LONGEST  # {n} is one way
            if self._take("?") or self._take("+"):  # reluctant or greedy, the ways are the same
                pass
            ways = min(ways * inside, 10**12)
        return ways

    def _item(self) -> tuple[bool, int]:
        """One character, class or group: whether it is a group, and its ways."""
        if special := _OPENS.match(self.text, self.at):
            self.at = special.end()
            ways = self._either()
            if not self._take(")"):
                raise ValueError(f"{quote(self.text)} is not a regular expression: a bracket is not closed")
            return True, ways
        one = _CHARACTER.match(self.text, self.at)
        if one is None:
            raise ValueError(f"{quote(self.text)} has {quote(self.text[self.at :][:9])}, which no table may use")
        self.at = one.end()
        return False, 1

    def _take(self, character: str) -> bool:
        taken = self.text.startswith(character, self.at)
        self.at += taken
        return taken
