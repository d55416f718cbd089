r"""A prompt's syntax, and its tokens in the chunks that text encoders take.

The syntax is that of AUTOMATIC1111/stable-diffusion-webui (modules/prompt_parser.py, `parse_prompt_attention`):

    (word)  [word]         weight times 1.1, divided by 1.1; nesting multiplies
    (word:1.2)             weight times 1.2
    \( \) \[ \] \\         the character itself, as after any backslash
    BREAK                  what follows starts a new chunk
    name, embedding:name   a textual inversion's vectors (the second form is ComfyUI's)

A bracket that is not closed weighs everything to the end; one that was not opened is text. Other than in A1111, BREAK
works within brackets too, and a backslash makes a colon text. What is no text of one step ([from:to:when], [a|b],
<lora:name:weight>) is refused here: `editing` and `tags` resolve it before.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from nativesd.errors import NativesdWarning, UsageError
from nativesd.text.comfyui import fill_chunks, weighted_texts
from nativesd.text.syntax import Syntax, require_weight
from nativesd.text.tokenizer import ClipTokenizer

if TYPE_CHECKING:  # torch is not needed to read a prompt
    from nativesd.text.embedding import Embedding

NO_EMBEDDINGS: Mapping[str, Embedding] = MappingProxyType({})

BRACKET_WEIGHT = {"(": 1.1, "[": 1 / 1.1}
COMMA_BACKTRACK = 20
"""A1111's `comma_padding_backtrack` (modules/shared_options.py)."""
MAX_CHARACTERS = 100_000
"""Of a prompt: 300 chunks and more, where people write one to five."""
PLACEHOLDER = 0
"""The id in a learnt vector's place: any but the highest of the vocabulary, which pooling takes for the end of text."""

SYNTAX = re.compile(
    r"""
      \\ (?P<escaped> .?)
    | (?P<network> < \w+ : [^<>]+ >)
    | : \s* (?P<weight> [+-]?[.\d]+) \s* \)
    | (?P<bracket> [()\[\]])
    | (?P<bar> \|)
    | [^\\()\[\]:|<]+ | [:<]
    """,
    re.VERBOSE | re.DOTALL,
)
BREAK = re.compile(r"\bBREAK\b")
AND = re.compile(r"\bAND\b")
STEP = re.compile(r"\s*+[+-]?(\d++(\.\d*+)?|\.\d++)(e[+-]?\d++)?\s*+", re.IGNORECASE)
LORA = re.compile(r"<(lora|lyco):", re.IGNORECASE)


@dataclass(frozen=True)
class Piece:
    """Text of one weight, or the textual inversion that it names."""

    text: str
    weight: float = 1.0
    embedding: Embedding | None = None


@dataclass(frozen=True)
class Token:
    """One position of a chunk: a token of the vocabulary, or vector `index` of `embedding`."""

    id: int
    text: str
    weight: float
    embedding: Embedding | None = None
    index: int = 0


@dataclass(frozen=True)
class Chunk:
    """Tokens that are encoded together: at most 75, without those of begin, end and padding."""

    tokens: tuple[Token, ...]


def explain_tokens(
    prompt: str,
    tokenizer: ClipTokenizer,
    *,
    syntax: Syntax = "original",
    embeddings: Mapping[str, Embedding] = NO_EMBEDDINGS,
) -> list[Chunk]:
    """What the text encoder gets of a prompt: its chunks, with every token's id, text and weight. At least one chunk.

    syntax      how it is read; names of embeddings are words where it is "literal"
    embeddings  the textual inversions that the prompt can name

    Raises UsageError for syntax that is not supported.
    """
    return split_chunks(parse_prompt(prompt, syntax=syntax, embeddings=embeddings), tokenizer, syntax)


def parse_prompt(
    prompt: str, *, syntax: Syntax = "original", embeddings: Mapping[str, Embedding] = NO_EMBEDDINGS
) -> list[tuple[Piece, ...]]:
    """Pieces of text with their weights, in a tuple for each part between BREAKs. Raises UsageError; see the module."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is no valid text at character {error.start + 1}: {error.reason}") from error
    if len(prompt) > MAX_CHARACTERS:
        raise UsageError(f"the prompt has {len(prompt)} characters, over the {MAX_CHARACTERS} that one can have")
    if syntax == "literal":
        return [(Piece(prompt),)]
    pattern, invoked = _names(embeddings, bare=syntax != "comfyui")
    if syntax == "comfyui":
        return [tuple(_find_embeddings(_bounded(list(starmap(Piece, weighted_texts(prompt)))), pattern, invoked))]
    if AND.search(prompt):
        warnings.warn(
            "AND is read as a word here: prompts are combined where a call has them as its prompt",
            NativesdWarning,
            stacklevel=2,
        )
    parts = [[Piece(prompt)]] if syntax == "none" else _parse_weights(prompt)
    if syntax == "ignore":
        parts = [[Piece(piece.text) for piece in part] for part in parts]
    return [tuple(_find_embeddings(_bounded(part), pattern, invoked)) for part in parts]


def _bounded(pieces: list[Piece]) -> list[Piece]:
    """The pieces. Raises UsageError for a weight that is too large."""
    for piece in pieces:
        require_weight(piece.text, piece.weight)
    return pieces


@dataclass
class _Open:
    """A bracket that is not closed yet."""

    bracket: str
    first: int
    """Number of the first weighted text inside."""
    start: int
    """Where it stands in the prompt."""
    colon: int | None = None
    """Where the last colon directly inside stands."""
    bar: bool = False
    """Whether a | stands directly inside."""


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused
def _parse_weights(prompt: str) -> list[list[Piece]]:
    texts: list[str | None] = []  # None: BREAK
    weights = np.ones(len(prompt) + 1)  # more than there are texts
    opened: dict[int, _Open] = {}  # by where they stand, in that order
    places: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str) -> _Open | None:
        """Take the innermost open bracket of this kind; the other kind is no hindrance, as in A1111."""
        return opened.pop(places[bracket].pop()) if places[bracket] else None

    def weigh(first: int, factor: float) -> None:
        weights[first : len(texts)] *= factor

    add = texts.append

    for match in SYNTAX.finditer(prompt):
        text = match[0]
        if match["escaped"] is not None:
            add(match["escaped"])
            continue
        if match["network"]:
            raise UsageError(
                f"{_short(text)} in a prompt does nothing: pass LoRAs with loras="
                if LORA.match(text)
                else f"{_short(text)} in a prompt is not supported; write \\{_short(text)} if it is meant as text"
            )
        if match["bracket"] in BRACKET_WEIGHT:
            opened[match.start()] = _Open(text, len(texts), match.start())
            places[text].append(match.start())
            continue
        if match["weight"] and (bracket := close("(")):
            weigh(bracket.first, _number(match["weight"], text))
            continue
        if text == ")" and (bracket := close("(")):
            weigh(bracket.first, BRACKET_WEIGHT["("])
            continue
        if text == "]" and (bracket := close("[")):
            _refuse_editing(prompt, bracket, match.start())
            weigh(bracket.first, BRACKET_WEIGHT["["])
            continue
        if opened and (match["bar"] or text == ":"):
            innermost = opened[next(reversed(opened))]
            if match["bar"]:
                innermost.bar = True
            else:
                innermost.colon = match.start()
        first, *others = BREAK.split(text)  # a pattern with the space around it would look at each space many times
        add(first.rstrip() if others else first)
        for i, part in enumerate(others, 1):
            add(None)
            add(part.strip() if i < len(others) else part.lstrip())
    # "(" first: A1111's order of multiplication
    for bracket in sorted(opened.values(), key=lambda bracket: bracket.bracket):
        weigh(bracket.first, BRACKET_WEIGHT[bracket.bracket])
    return _merge(texts, weights[: len(texts)].tolist())


def _merge(texts: Sequence[str | None], weights: Sequence[float]) -> list[list[Piece]]:
    """Neighbours of the same weight are one text, as words may be made of them. None in `texts` starts a new part."""
    parts: list[list[tuple[float, list[str]]]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        if text is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1][0] == weight:
            parts[-1][-1][1].append(text)
        else:
            parts[-1].append((weight, [text]))
    joined = [[Piece("".join(of_weight), weight) for weight, of_weight in part] for part in parts]
    return [[piece for piece in part if piece.text] for part in joined]


def _short(text: str) -> str:
    """For a message."""
    return text if len(text) <= 100 else f"{text[:97]}..."


def _number(digits: str, where: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise UsageError(
            f"{_short(where)!r} in the prompt gives a weight that is no number: write (word:1.2), or \\: for a colon"
        ) from None


def _refuse_editing(prompt: str, bracket: _Open, end: int) -> None:
    """Raise UsageError where [...], which ends at `end`, is A1111's prompt editing or alternation."""
    scheduled = bracket.colon is not None and STEP.fullmatch(prompt[bracket.colon + 1 : end])
    if scheduled or bracket.bar:
        escape = "|" if bracket.bar else ":"
        raise UsageError(
            f"{_short(prompt[bracket.start : end + 1])} in the prompt changes between steps, and is no one text:"
            f" write \\{escape} if the {escape} is meant as text"
        )


def _names(embeddings: Mapping[str, Embedding], *, bare: bool) -> tuple[re.Pattern[str], list[Embedding]]:
    """A pattern that finds embeddings invoked in a text, and what its numbered groups stand for.

    The groups e0, e1, ... are names (the longest first), `unknown` what follows an embedding: that names none. A name
    is not found within a word, nor within one that goes on behind a hyphen or dot: "style" is not in "style-2".
    `bare` says that names count without the prefix.
    """
    if len({name.casefold() for name in embeddings}) < len(embeddings):
        raise UsageError(f"two embeddings have the same name but for its case: {', '.join(sorted(embeddings))}")
    names = sorted(embeddings, key=len, reverse=True)
    pattern = r"(?<!\w)embedding:(?P<unknown>[^\s,]+)"
    if names:
        groups = "|".join(f"(?P<e{i}>{re.escape(name)})" for i, name in enumerate(names))
        suffix = r"(?(prefix)(?:\.(?:safetensors|pt|bin))?)"  # ComfyUI takes the file's name with its suffix, too
        prefix = "(?P<prefix>embedding:)" + "?" * bare
        known = rf"(?<!\w)(?<!\w[-.]){prefix}(?:{groups}){suffix}(?![-.]?\w)"
        pattern = f"{known}|{pattern}"
    return re.compile(pattern, re.IGNORECASE), [embeddings[name] for name in names]


def _find_embeddings(
    pieces: Iterable[Piece], pattern: re.Pattern[str], invoked: Sequence[Embedding]
) -> Iterator[Piece]:
    """The pieces, with those that name embeddings divided at them."""
    for piece in pieces:
        end = 0
        for match in pattern.finditer(piece.text):
            if match["unknown"]:
                known = ", ".join(embedding.name for embedding in invoked) or "none"
                raise UsageError(
                    f"{_short(match[0])} in the prompt names an embedding that is not loaded (loaded: {known})"
                )
            if before := piece.text[end : match.start()]:
                yield Piece(before, piece.weight)
            embedding = next(e for i, e in enumerate(invoked) if match[f"e{i}"] is not None)
            yield Piece(match[0], piece.weight, embedding)
            end = match.end()
        if not end:
            yield piece
        elif rest := piece.text[end:]:
            yield Piece(rest, piece.weight)


def split_chunks(
    parts: Iterable[Iterable[Piece]], tokenizer: ClipTokenizer, syntax: Syntax = "original"
) -> list[Chunk]:
    """Tokens of `parse_prompt`'s parts in chunks of `tokenizer.length - 2`, every part in its own. At least one chunk.

    A full chunk is cut after its last comma, if that is among the last 20 tokens; the vectors of a textual inversion
    stay together. Raises UsageError where they do not fit one chunk. Source: AUTOMATIC1111/stable-diffusion-webui
    modules/sd_hijack_clip.py, `tokenize_line`. With the syntax "comfyui" as ComfyUI does it: see `fill_chunks`.
    """
    size = tokenizer.length - 2
    if syntax == "comfyui":
        groups = ([token for unit in _units([piece], tokenizer) for token in unit] for part in parts for piece in part)
        return [Chunk(tuple(tokens)) for tokens in fill_chunks(groups, size)]
    chunks: list[list[Token]] = []
    for part in parts:
        chunk: list[Token] = []
        for unit in _units(part, tokenizer):
            if len(unit) > size:
                raise UsageError(f"the embedding {unit[0].text!r} has {len(unit)} vectors: a chunk holds {size}")
            if len(chunk) == size and unit[0].id != tokenizer.comma:
                cut = _cut(chunk, tokenizer.comma)
                chunks.append(chunk[:cut])
                chunk = chunk[cut:]
            if len(chunk) + len(unit) > size:
                chunks.append(chunk)
                chunk = []
            chunk = chunk + unit
        chunks.append(chunk)
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()  # nothing follows the last BREAK
    return [Chunk(tuple(chunk)) for chunk in chunks]


def _units(part: Iterable[Piece], tokenizer: ClipTokenizer) -> Iterator[list[Token]]:
    """Tokens that stay together: every one alone, but for those of a textual inversion."""
    for piece in part:
        if piece.embedding is not None:
            embedding = piece.embedding
            yield [Token(PLACEHOLDER, embedding.name, piece.weight, embedding, i) for i in range(embedding.count)]
        else:
            for number, text in tokenizer.spans(piece.text):
                yield [Token(number, text, piece.weight)]


def _cut(chunk: Sequence[Token], comma: int | None) -> int:
    """How many tokens of a full chunk stay in it."""
    near = range(max(len(chunk) - COMMA_BACKTRACK, 0), len(chunk))
    return next((i + 1 for i in reversed(near) if chunk[i].id == comma), len(chunk))
