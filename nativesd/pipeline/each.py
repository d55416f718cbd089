"""Calls whose prompts have pictures, masks or hints of their own: one prompt after the other, and one result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nativesd.errors import UsageError
from nativesd.pictures.result import Result
from nativesd.pipeline.asked.arguments import Checked

COUNTED = ("seed", "variation", "inferred")
"""Parameters that a call has of its first picture, from which the others' follow."""


def by_prompt(asked: Checked) -> list[Checked]:
    """A call for each prompt where something is given for each, else the call itself.

    A batch's pictures are those that are made alone, so nothing but the time differs. Raises UsageError where there
    are as many of something as there are prompts no more.
    """
    given = {"image": asked.image, "mask": asked.mask, **{f"control {i}": each.image for i, each in
             enumerate(asked.control, 1)}}  # fmt: skip
    listed = {name: value for name, value in given.items() if isinstance(value, list | tuple)}
    count = len(asked.prompts)
    for name, values in listed.items():
        if len(values) != count:
            raise UsageError(f"{name} must be one picture, or one for each of {count} prompts, not {len(values)}")
    if not listed:
        return [asked]
    return [_of_prompt(asked, number) for number in range(count)]


def _of_prompt(asked: Checked, number: int) -> Checked:
    share = len(asked.seeds) // len(asked.prompts)
    control = [dataclasses.replace(each, image=_own(each.image, number)) for each in asked.control]
    negatives = asked.negative_prompt
    return dataclasses.replace(
        asked,
        prompts=[asked.prompts[number]],
        one_prompt=True,
        negative_prompt=negatives if len(negatives) == 1 else [negatives[number]],
        one_negative=True,
        seeds=asked.seeds[number * share : (number + 1) * share],
        variation=None if asked.variation is None else asked.variation.after(number * share),
        image=_own(asked.image, number),
        mask=_own(asked.mask, number),
        control=control,
    )


def _own(value: Any, number: int) -> Any:
    return value[number] if isinstance(value, list | tuple) else value


def joined(asked: Checked, results: Sequence[Result]) -> Result:
    """The results of some of a call's prompts as one; their pictures are of one size."""
    if len(results) == 1 and len(asked.prompts) == 1:
        return results[0]
    seeds = [seed for result in results for seed in result.seeds]
    each = [result.of(index) for result in results for index in range(len(result.images))]
    first = results[0].parameters
    parameters = {name: value for name, value in first.items() if all(own.get(name) == value for own in each)} | {
        "prompt": [own["prompt"] for own in each],
        "negative_prompt": [own["negative_prompt"] for own in each],
        "notes": list(dict.fromkeys(note for result in results for note in result.parameters["notes"])),
        **{name: first[name] for name in COUNTED if name in first},
    }
    pictures = [picture for result in results for picture in result.images]
    return Result(pictures, seeds, parameters, torch.cat([result.latents for result in results]), each)


def finished(asked: Checked, done: Sequence[Result], last: Callable[[], Result]) -> Result:
    """What there is of a call that was ended: its prompts' pictures so far."""
    return joined(asked, [*done, last()])
