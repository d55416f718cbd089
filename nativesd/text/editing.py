"""Prompts that change between steps, and prompts that are combined: A1111's `[from:to:when]`, `[a|b]` and `AND`.

The rules, and the arithmetic of `when`, are those of AUTOMATIC1111/stable-diffusion-webui modules/prompt_parser.py
(`get_learned_conditioning_prompt_schedules`, `get_multicond_prompt_list`, `reconstruct_cond_batch`).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nativesd.text.syntax import require_weight

AND = re.compile(r"(?<!\\)\bAND\b")
WEIGHTED = re.compile(r":\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*$")
WHEN = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.IGNORECASE)
SYNTAX = re.compile(r"\\.?|[()\[\]:|]|[^\\()\[\]:|]+", re.DOTALL)


def split_and(prompt: str) -> list[tuple[str, float]]:
    """The prompts that AND combines, each with its weight: "a cat AND a dog :0.5"; as it stands where there is none.

    Raises UsageError for a weight that is too large.
    """
    parts = AND.split(prompt)
    if len(parts) == 1:
        return [(prompt, 1.0)]
    out = []
    for part in parts:
        weight = WEIGHTED.search(part)
        text = (part[: weight.start()] if weight else part).strip()
        out.append((text, require_weight(text, float(weight[1])) if weight else 1.0))
    return out


@dataclass
class _Edit:
    """`[before:after:when]`: `when` as it was written."""

    before: list[object]
    after: list[object]
    when: str


@dataclass
class _Turns:
    """`[a|b]`: one after the other, a step each."""

    options: list[list[object]]


@dataclass
class _Open:
    """A bracket that is not closed yet: what it holds, divided at the colons and bars that stand directly inside."""

    bracket: str
    parts: list[list[object]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def plain(self, mark: str = "") -> list[list[object]]:
        """What it holds, divided at the marks of one kind; the others are text."""
        out = [list(self.parts[0])]
        for each, part in zip(self.marks, self.parts[1:], strict=True):
            if each == mark:
                out.append(list(part))
            else:
                out[-1] += [each, *part]
        return out

    def text(self) -> list[object]:
        """All of it, as it stood there."""
        return self.plain()[0]

    def closed(self) -> object:
        """What the bracket means: an edit, turns, or text as it stands."""
        if self.bracket == "(":
            return ["(", *self.text(), ")"]
        divided = self.plain(mark=":")
        when = divided[-1][0] if len(divided) in (2, 3) and len(divided[-1]) == 1 else None
        if isinstance(when, str) and WHEN.fullmatch(when):
            before, after = ([], divided[0]) if len(divided) == 2 else divided[:2]
            return _Edit(before, after, when.strip())
        if "|" in self.marks:
            return _Turns(self.plain(mark="|"))
        return ["[", *self.text(), "]"]


def _parse(prompt: str) -> list[object]:
    """The nodes of a prompt, in time linear in its length."""
    stack = [_Open("")]
    counts = {"(": 0, "[": 0}
    for match in SYNTAX.finditer(prompt):
        token = match[0]
        if token in counts:
            counts[token] += 1
            stack.append(_Open(token))
        elif token in (")", "]") and counts["(" if token == ")" else "["]:
            bracket = "(" if token == ")" else "["
            while stack[-1].bracket != bracket:  # what is not closed in here is text
                _give_up(stack, counts)
            counts[bracket] -= 1
            closed = stack.pop().closed()
            stack[-1].parts[-1].append(closed)
        elif token in (":", "|") and len(stack) > 1:
            stack[-1].marks.append(token)
            stack[-1].parts.append([])
        else:
            stack[-1].parts[-1].append(token)
    while len(stack) > 1:
        _give_up(stack, counts)
    return stack[0].parts[0]


def _give_up(stack: list[_Open], counts: dict[str, int]) -> None:
    """The last open bracket is text, with all that stands in it."""
    opened = stack.pop()
    counts[opened.bracket] -= 1
    stack[-1].parts[-1] += [opened.bracket, opened.text()]


@dataclass(frozen=True)
class Timeline:
    """A prompt over the steps: `texts[i]` up to and including step `ends[i]`, steps counted from 0."""

    ends: Sequence[int]
    texts: Sequence[str]

    def at(self, step: int) -> str:
        """The prompt of a step; beyond the last it stays."""
        return self.texts[min(bisect_left(self.ends, step), len(self.texts) - 1)]


def timeline(prompt: str, steps: int, before: int | None = None) -> Timeline:
    """What the prompt is at each of `steps` steps.

    `when` with a dot is a share of the steps, else a step. In a second pass, `before` are the first one's steps: whole
    numbers go on counting there, and shares are those from 1 to 2.
    """
    if "[" not in prompt:
        return Timeline([steps], [prompt])
    nodes = _parse(prompt)
    offsets = (0, 0.0) if before is None else (before, 1.0)
    ends = {steps}
    for node in _special(nodes):
        if isinstance(node, _Edit):
            ends.add(_when(node.when, steps, offsets))
        else:
            ends.update(range(1, steps + 1))
    ordered = sorted(end for end in ends if end >= 1)
    return Timeline(ordered, ["".join(_text(nodes, end, steps, offsets)) for end in ordered])


def all_texts(prompt: str, steps: int = 1000) -> list[str]:
    """Every text that a prompt is at some step, of every prompt that AND combines in it."""
    texts = (text for part, _ in split_and(prompt) for text in timeline(part, steps).texts)
    return list(dict.fromkeys(texts))


def _when(written: str, steps: int, offsets: tuple[int, float]) -> int:
    number = float(written)
    scaled = (number - offsets[1]) * steps if "." in written else number - offsets[0]
    return int(max(min(scaled, steps), -1))


def _special(nodes: list[object]) -> Iterator[_Edit | _Turns]:
    """Every edit and every alternation, however deep."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, _Edit):
            yield node
            waiting += node.before + node.after
        elif isinstance(node, _Turns):
            yield node
            waiting += [each for option in node.options for each in option]


def _text(nodes: list[object], step: int, steps: int, offsets: tuple[int, float]) -> Iterator[str]:
    """The text at a step, counted from 1, piece by piece."""
    waiting = nodes[::-1]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, list):
            waiting += node[::-1]
        elif isinstance(node, _Edit):
            waiting += (node.before if step <= _when(node.when, steps, offsets) else node.after)[::-1]
        elif isinstance(node, _Turns):
            waiting += node.options[(step - 1) % len(node.options)][::-1]
