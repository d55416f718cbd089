"""From the prompts of a call to what the UNet is told at every step of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from nativesd.diffusion.conditioning import Conditioning, Role
from nativesd.sampling.steps import Steps
from nativesd.text.editing import Timeline, split_and, timeline
from nativesd.text.encode import Text
from nativesd.text.syntax import ONE_TEXT, Syntax

# sgm inference/api.py (SamplingParams): the refiner's aesthetic scores for the prompt and the negative prompt
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5

Value = TypeVar("Value")
Pair = tuple[int, int]
Sides = Callable[[float], Sequence[Conditioning]]
"""What guidance combines, at a sigma: the same sequence for as long as nothing changes."""
Encode = Callable[[Sequence[Text]], tuple[Sequence[Tensor], Tensor]]
"""Texts to their contexts, (T_i, C) each, and pooled embeddings (n, P)."""


@dataclass(frozen=True)
class SDXL:
    """What SDXL's UNet is told beside the prompt, as it was trained: sizes are width and height in pixels.

    prompt_2, negative_prompt_2  texts for the second text encoder; default: as the first's
    original  size of the picture before it was scaled for training; small ones are painted blurred. Default: the
              picture's own
    crop      how much of it was cut off on the left and at the top; 0, 0 has its subject in the middle
    target    its size afterwards. Default: the picture's own
    negative_original, negative_crop, negative_target  the same for the negative prompt. Default: as for the prompt
    aesthetic_score, negative_aesthetic_score  the refiner's, 1 to 10

    Source: Podell et al. 2023, arXiv 2307.01952, section 2.2.
    """

    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    original: Pair | None = None
    crop: Pair = (0, 0)
    target: Pair | None = None
    negative_original: Pair | None = None
    negative_crop: Pair | None = None
    negative_target: Pair | None = None
    aesthetic_score: float = AESTHETIC_SCORE
    negative_aesthetic_score: float = NEGATIVE_AESTHETIC_SCORE

    def chosen(self) -> dict[str, Any]:
        """What is not at its default."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def ids(self, size: Pair, *, negative: bool, refiner: bool) -> list[float]:
        """The numbers of a picture of a size (width, height): heights stand first."""
        original, crop, target = self.original or size, self.crop, self.target or size
        score = self.aesthetic_score
        if negative:
            original, crop = self.negative_original or original, self.negative_crop or crop
            target, score = self.negative_target or target, self.negative_aesthetic_score
        return [*original[::-1], *crop[::-1], *([score] if refiner else target[::-1])]


@dataclass(frozen=True)
class Texts:
    """The prompts of one side over the steps, one for each picture, with the weight that each has."""

    role: Role
    lines: Sequence[Timeline]
    shares: Sequence[float] | None = None
    second: Timeline | None = None
    """For the second text encoder, of all pictures."""

    def at(self, step: int) -> tuple[Text, ...]:
        """Every picture's text at a step."""
        texts = [line.at(step) for line in self.lines]
        return tuple(texts) if self.second is None else tuple((text, self.second.at(step)) for text in texts)


@dataclass(frozen=True)
class Frame:
    """What a side is told beside its text: SDXL's size, and LCM's scale."""

    pictures: int
    size: tuple[int, int]
    """Width and height, in pixels."""
    ids: int | None
    """How many numbers SDXL's UNet takes; None: it is no such UNet."""
    guidance: Tensor | None
    device: torch.device
    zero_empty: bool
    """An empty negative prompt means zeros."""
    sdxl: SDXL = SDXL()


def prompt_sides(
    prompts: Sequence[str], pictures: int, steps: int, before: int | None, *, syntax: Syntax, second: str | None = None
) -> list[Texts]:
    """The sides of the prompts, more than one where AND combines some; a picture with fewer has them with weight 0.

    `second` is the prompt of the second text encoder, beside each of them.
    """
    also = _second(second, steps, before, syntax=syntax)
    if syntax in ONE_TEXT:
        return [Texts("prompt", _each([Timeline([steps], [prompt]) for prompt in prompts], pictures), second=also)]
    parts = [split_and(prompt) for prompt in prompts]
    most = max(map(len, parts))
    padded = [part + [(part[0][0], 0.0)] * (most - len(part)) for part in parts]
    plain = most == 1
    return [
        Texts(
            "prompt",
            _each([timeline(part[k][0], steps, before) for part in padded], pictures),
            None if plain else _each([part[k][1] for part in padded], pictures),
            also,
        )
        for k in range(most)
    ]


def negative_side(
    negatives: Sequence[str],
    pictures: int,
    steps: int,
    before: int | None,
    role: Role,
    *,
    syntax: Syntax,
    second: str | None = None,
) -> Texts:
    """The side of the negative prompts; `second` is that of the second text encoder."""
    lines = [_line(text, steps, before, syntax=syntax) for text in negatives]
    return Texts(role, _each(lines, pictures), second=_second(second, steps, before, syntax=syntax))


def _second(text: str | None, steps: int, before: int | None, *, syntax: Syntax) -> Timeline | None:
    return None if text is None else _line(text, steps, before, syntax=syntax)


def _line(text: str, steps: int, before: int | None, *, syntax: Syntax) -> Timeline:
    """What a prompt is over the steps."""
    return Timeline([steps], [text]) if syntax in ONE_TEXT else timeline(text, steps, before)


def _each(values: Sequence[Value], pictures: int) -> list[Value]:
    """One for each picture, of one for each prompt."""
    return [value for value in values for _ in range(pictures // len(values))]


def over_steps(texts: Sequence[Texts], encode: Encode, frame: Frame, steps: Steps) -> Sides:
    """The sides at every sigma of a pass; all texts are encoded at once."""
    moments = [tuple(side.at(step) for side in texts) for step in range(len(steps))]
    distinct = list(dict.fromkeys(text for moment in dict.fromkeys(moments) for side in moment for text in side))
    contexts, pooled = encode(distinct)
    numbers = {text: i for i, text in enumerate(distinct)}
    made: dict[tuple[tuple[Text, ...], ...], list[Conditioning]] = {}
    for moment in dict.fromkeys(moments):
        made[moment] = [
            _told(side, [numbers[text] for text in row], contexts, pooled, frame)
            for side, row in zip(texts, moment, strict=True)
        ]
    if len(made) == 1:
        only = made[moments[0]]
        return lambda sigma: only

    def at(sigma: float) -> Sequence[Conditioning]:
        return made[moments[steps.at(sigma)]]

    return at


def with_channels(sides: Sides, channels: Tensor) -> Sides:
    """Sides that are told further channels too, (B or 1, c, h, w); those of "nothing" zeros."""
    made: dict[int, tuple[Sequence[Conditioning], list[Conditioning]]] = {}

    def at(sigma: float) -> Sequence[Conditioning]:
        now = sides(sigma)
        if id(now) not in made:
            given = {True: torch.zeros_like(channels), False: channels}
            out = [
                replace(side, channels=given[side.role == "nothing"].expand(len(side.prompt), -1, -1, -1))
                for side in now
            ]
            made[id(now)] = now, out  # `now` is kept, so that its id stays its own
        return made[id(now)][1]

    return at


def _told(
    texts: Texts, numbers: Sequence[int], contexts: Sequence[Tensor], pooled: Tensor, frame: Frame
) -> Conditioning:
    """One side's conditioning, of the texts of these numbers."""
    negative, total = texts.role != "prompt", frame.pictures
    # zeros for an empty negative prompt; its text is the only one without a character
    alone = texts.second is None or texts.second.texts == [""]
    empty = [frame.zero_empty and negative and alone and line.texts == [""] for line in texts.lines]
    rows = [contexts[i] * 0 if zero else contexts[i] for i, zero in zip(numbers, empty, strict=True)]
    one_length = len({len(row) for row in rows}) == 1
    time_ids = None
    if frame.ids is not None:
        ids = frame.sdxl.ids(frame.size, negative=negative, refiner=frame.ids == 5)
        time_ids = torch.tensor(ids, dtype=torch.float32, device=frame.device).expand(total, -1)
    told = None
    if frame.ids is not None:
        told = torch.stack([pooled[i] * (not zero) for i, zero in zip(numbers, empty, strict=True)])
    return Conditioning(
        torch.stack(rows) if one_length else tuple(rows),
        prompt=torch.full((total,), float(not negative), device=frame.device),
        pooled=told,
        time_ids=time_ids,
        guidance=None if frame.guidance is None else frame.guidance.expand(total, -1).to(frame.device),
        role=texts.role,
        share=None if texts.shares is None else torch.tensor(texts.shares, device=frame.device),
    )
