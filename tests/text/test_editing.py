"""Prompt editing, alternation and AND; the first cases are the doctests of A1111's prompt parser."""

from __future__ import annotations

import pytest

from clock import seconds_of
from nativesd.errors import UsageError
from nativesd.text.editing import split_and, timeline


@pytest.mark.parametrize(
    ("prompt", "stages"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", [(i, "a" if i % 2 else "(b:1.1)") for i in range(1, 11)]),
        ("[fe|]male", [(i, "female" if i % 2 else "male") for i in range(1, 11)]),
        ("[fe|||]male", [(i, "female" if i % 4 == 1 else "male") for i in range(1, 11)]),
        ("[fox::4] x", [(4, "fox x"), (10, " x")]),
        ("[fox:penguin:0.5]", [(5, "fox"), (10, "penguin")]),
        ("[a:b:25]", [(10, "a")]),
        ("[a:b:c:5] [d] [e:f]", [(10, "[a:b:c:5] [d] [e:f]")]),
        (r"\[a:b:5\] [\[c:2]", [(2, r"\[a:b:5\] "), (10, r"\[a:b:5\] \[c")]),
    ],
)
def test_a_prompt_over_ten_steps(prompt: str, stages: list[tuple[int, str]]) -> None:
    found = timeline(prompt, 10)
    assert list(zip(found.ends, found.texts, strict=True)) == stages


@pytest.mark.parametrize(
    ("prompt", "stages"), [("a [b:.5] c", [(10, "a b c")]), ("a [b:1.5] c", [(5, "a  c"), (10, "a b c")])]
)
def test_a_prompt_over_a_second_pass(prompt: str, stages: list[tuple[int, str]]) -> None:
    found = timeline(prompt, 10, before=10)
    assert list(zip(found.ends, found.texts, strict=True)) == stages


def test_steps_count_from_zero() -> None:
    """As A1111's `reconstruct_cond_batch`: the first stage whose end the step is not beyond."""
    found = timeline("[fox:penguin:0.5]", 20)
    assert [found.at(step) for step in range(20)] == ["fox"] * 11 + ["penguin"] * 9


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), ("a dog", 1.0)]),
        ("a cat :1.2 AND a (dog:1.5) : .5 AND fog:-1", [("a cat", 1.2), ("a (dog:1.5)", 0.5), ("fog", -1.0)]),
        ("SAND AND ANDES", [("SAND", 1.0), ("ANDES", 1.0)]),
        (r"this \AND that", [(r"this \AND that", 1.0)]),
    ],
)
def test_prompts_that_are_combined(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert split_and(prompt) == parts


def test_a_prompt_that_weighs_too_much() -> None:
    with pytest.raises(
        UsageError, match=r"^'a dog' in the prompt gets the weight 1e\+30: weights must be between -1000"
    ):
        split_and(f"a cat AND a dog :1{'0' * 30}")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[a:" * 50_000, "([" * 50_000, "[a|" * 50_000 + "]" * 50_000, "[a:5]" * 20_000,
     "(" * 100_000 + "]" * 100_000, "[(" * 30_000 + "]" * 30_000, ":1" * 50_000],
)  # fmt: skip
def test_no_prompt_takes_long(text: str) -> None:
    assert seconds_of(lambda: (timeline(text, 2), split_and(text)), 3) < 3
